"""Observables of transformed inputs: their definition, their bits, and what they can catch."""

import math

import numpy as np
import pytest
import torch

import nope
from montecarlo import decide, measure
from montecarlo.campaign import Campaign
from montecarlo.evidence import RESOLUTION, Target
from montecarlo.observables import ROUNDING_ERRORS, STATISTICS, TRANSFORMS, gap
from montecarlo.sampler import Conditions, Group, sample
from nope import transformer
from nope.operations import Mix, Scores, Uniform
from nope.questions import OBSERVABLES

NAMES = [name for name, kind in OBSERVABLES.items() if kind.transform]
TOLERANCE, ERROR_RATE = 0.025, 1e-3


def ask(observable, n_layers=1, place="ln_final", given=None, **changes):
    options = {"n_ctx": 6, "tokens": nope.GaussianTokens(1.0), **changes}
    architecture = nope.decoder(8, 2, n_layers, 5, **options)
    return nope.Question(architecture, nope.init.normal(0.3), place, observable, given)


def gap_of(measured):
    """The mean gap, which the evidence holds beside the share."""
    return float(measured.moments.mean[1, 0])


# ---------------------------------------------------------------------------- definitions

ORDERS = {  # the position that each position takes its token from, n_ctx = 6
    "past_reversed": [4, 3, 2, 1, 0, 5],
    "reversed": [5, 4, 3, 2, 1, 0],
    "first_repeated": [0, 0, 0, 0, 0, 0],
}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_transformation_is_known():
    """Each is asked for by an observable, and can be done."""
    assert {OBSERVABLES[name].transform for name in NAMES} == set(TRANSFORMS) == set(ORDERS)


@pytest.mark.parametrize("tokens", [
    nope.GaussianTokens(1.0), nope.WithBos(nope.EmbeddingTokens(9)), nope.EmbeddingTokens(9),
])  # fmt: skip
@pytest.mark.parametrize("given", [None, nope.Weights(1)])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_vectors_move_and_the_weights_stay(transform, given, tokens):
    """The inputs, whatever they are made of, are permuted exactly; a map of them follows."""
    group = Group.of(ask(NAMES[0], tokens=tokens, given=given))
    places, conditions = ["embed", "blocks.0.attn.q"], Conditions(2, dtype="float64")
    plain, moved = (sample(group, places, 1, conditions, t) for t in (None, transform))
    order = ORDERS[transform]
    assert torch.equal(moved["embed"], plain["embed"][:, order])
    assert not torch.equal(moved["embed"], plain["embed"])
    q = plain["blocks.0.attn.q"]
    assert (moved["blocks.0.attn.q"] - q[:, :, order]).abs().max() <= 1e-13 * q.abs().max()


def plain_gap(pairs):
    """Largest |a - b| over the pairs of vectors, over the rms norm of all of them."""
    norms = [math.sqrt(sum(float(c) ** 2 for c in v)) for pair in pairs for v in pair]
    differences = [math.sqrt(sum((float(c) - float(e)) ** 2 for c, e in zip(a, b, strict=True)))
                   for a, b in pairs]  # fmt: skip
    return max(differences) / math.sqrt(sum(r**2 for r in norms) / len(norms))


PAIRS = {  # which vectors of x and of x with transformed inputs, y, should be equal
    "past_permutation": lambda x, y: [(x[-1], y[-1])],
    "permutation": lambda x, y: [(x[m], y[len(x) - 1 - m]) for m in range(len(x))],
    "equal_tokens": lambda x, y: [(y[0], vector) for vector in y],
}


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("observable", NAMES)
def test_statistics_are_their_definitions(observable, heads):
    """The gap by loops, and whether it is beyond rounding, with heads and without."""
    x, y = randn(4, heads, 5, 3), randn(4, heads, 5, 3, seed=1)
    y[1:] = x[1:]
    y[2] *= 1 + 2e-12  # just beyond rounding in float64, 2^13 eps = 1.8e-12 ...
    y[3] *= 1 + 1e-12  # ... and just within
    if observable == "permutation":
        y[1:] = y[1:].flip(2)
    if observable == "equal_tokens":
        y[1:, :, 1:] = x[1:, :, :1]
    vectors = [v.transpose(1, 2).flatten(2) for v in (x, y)]
    given = (x, y) if heads > 1 else vectors
    found = STATISTICS[observable].components(*given, ask(observable)).numpy()
    expected = [plain_gap(PAIRS[observable](a, b)) for a, b in zip(*vectors, strict=True)]
    assert found.shape == (4, 2, 1)
    assert np.abs(found[:, 1, 0] - expected).max() <= 1e-12 * max(expected)
    limit = ROUNDING_ERRORS * RESOLUTION["float64"]
    assert found[:, 0, 0].tolist() == [float(value > limit) for value in expected]
    assert found[0, 0, 0] == 1
    assert found[1, 0, 0] == 0


def test_a_gap_is_relative_and_of_zero_vectors_zero():
    """Powers of 2 change nothing, also where squares leave float32; one position is at most 2."""
    x, y = randn(3, 4, 5).float(), randn(3, 4, 5, seed=1).float()
    for scale in (2.0**100, 2.0**-100):
        assert torch.allclose(gap(scale * x, scale * y), gap(x, y), rtol=1e-12, atol=0)
    assert not gap(0 * x, 0 * x).any()
    assert torch.allclose(gap(x[:, :1], -x[:, :1]), torch.full((3,), 2.0, dtype=torch.float64))
    assert gap(x, x * math.nan).isnan().all()


# ---------------------------------------------------------------------------------- bits


def evidence(questions):
    """The moments after one block."""
    whole = [np.full(q.shape, np.inf) for q in questions]
    targets = [Target(q, -w, w, 0.5, 0.5) for q, w in zip(questions, whole, strict=True)]
    return [d.measurement.moments for d in Campaign(targets, Conditions(), draws=1).run()]


def test_asking_for_a_transformation_changes_no_other_bit():
    """Together or alone, of the same place or another: the same evidence."""
    asked = [ask(name) for name in NAMES] + [ask("kernel"), ask("cosine", 1, "blocks.0.attn.z")]
    for question, together in zip(asked, evidence(asked), strict=True):
        (alone,) = evidence([question])
        assert alone.mean.any()
        for part in ("count", "mean", "second", "third"):
            assert np.array_equal(getattr(together, part), getattr(alone, part))


def test_only_what_is_asked_for_is_evaluated(monkeypatch):
    """One evaluation without a transformation, one more for each, its own places only."""
    looks = []
    evaluate = transformer.evaluate
    monkeypatch.setattr(
        transformer, "evaluate", lambda a, places, *rest: looks.append(tuple(places))
        or evaluate(a, places, *rest),
    )  # fmt: skip
    evidence([ask("kernel"), ask("cosine", 1, "blocks.0.attn.z")])
    assert looks == [("ln_final", "blocks.0.attn.z")]
    looks.clear()
    evidence([ask("kernel"), ask("permutation", 1, "blocks.0.attn.z")])
    assert looks == [("ln_final", "blocks.0.attn.z"), ("embed",), ("blocks.0.attn.z",)]


# ----------------------------------------------------------------------- sizes of the gaps

HOLD = {
    "one layer": ask("past_permutation"),
    "one layer, an exact 0 in float32": ask("past_permutation", attention="uniform"),
    "deep, no mask": ask("permutation", 8, causal=False),
    "deep, equal tokens": ask("equal_tokens", 8),
    "post-norm, equal tokens": ask("equal_tokens", 8, "blocks.7.resid_post", norm_position="post"),
    "given weights": ask("past_permutation", given=nope.Weights(3)),
}
FAIL = {
    "two layers": ask("past_permutation", 2),
    "two uniform layers": ask("past_permutation", 2, attention="uniform"),
    "three positions": ask("past_permutation", 2, n_ctx=3),
    "a mask": ask("permutation"),
    "a mask, two positions": ask("permutation", n_ctx=2),
}
UNITS = 64
"""Rounding in these small stacks: far below the 2^13 units that are allowed for."""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", HOLD)
def test_a_symmetry_is_confirmed_by_few_draws(name, dtype):
    """No draw in log(1/alpha)/tolerance is an exception, and the gap is rounding, or exactly 0."""
    found = decide(HOLD[name], -TOLERANCE, TOLERANCE, ERROR_RATE, dtype=dtype, workers=1)
    assert found.verdict == "CONFIRMED"
    assert found.measurement.failure is None
    assert found.measurement.draws <= 2 * Group.of(HOLD[name]).block_size
    assert gap_of(found.measurement) <= UNITS * RESOLUTION[dtype]


def test_the_draws_that_a_confirmation_takes():
    """No exception in n draws bounds their share by log(1/alpha)/n at best, by 1.3 that at most."""
    measured = measure(HOLD["one layer"], draws=1, device="cpu")
    half = measured.half_width(ERROR_RATE / 2)
    least = math.log(2 / ERROR_RATE) / measured.draws
    assert least <= half.item() <= 1.3 * least


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FAIL)
def test_what_is_no_symmetry_is_refuted(name, dtype):
    """Every draw shows a gap that no rounding makes."""
    found = decide(FAIL[name], -TOLERANCE, TOLERANCE, ERROR_RATE, dtype=dtype, workers=1)
    assert found.verdict == "REFUTED"
    assert found.measurement.mean.item() > 0.99
    assert gap_of(found.measurement) > 0.01


def test_a_small_stream_hides_the_order_from_float32_and_not_from_float64():
    """At std 1e-4 a second layer sees the order at d std^2 = 8e-8 of the stream."""
    architecture = nope.decoder(8, 2, 2, 0, n_ctx=6, tokens=nope.GaussianTokens(1.0))
    question = nope.Question(
        architecture, nope.init.normal(1e-4), "blocks.1.attn_out", "past_permutation"
    )
    shares = [measure(question, device="cpu", dtype=d).mean.item() for d in RESOLUTION]
    assert shares == [0, 1]


# --------------------------------------------------------------------------- planted errors


def window(operation, scores):
    """A mask off by one: the last query misses the first key."""
    if isinstance(operation, Scores):
        scores[..., -1, 0] = -math.inf


def distance(operation, scores):
    """A bias by distance, as ALiBi's."""
    if isinstance(operation, Scores):
        scores += torch.arange(scores.shape[-1], dtype=scores.dtype)


def unnormalised(operation, pattern):
    """1/(m + 1) for 1/m."""
    if isinstance(operation, Uniform | Mix):
        m = torch.arange(1, 7, dtype=pattern.dtype)[:, None]
        pattern *= m / (m + 1)


def positional(operation, x):
    """A vector per position."""
    if operation.place == "blocks.0.ln1":
        x[..., 0] += torch.arange(6, dtype=x.dtype)


@pytest.mark.parametrize(
    ("plant", "name", "changes"),
    [
        (window, "past_permutation", {}),
        (window, "permutation", {"causal": False}),
        (distance, "past_permutation", {}),
        (distance, "permutation", {"causal": False}),
        (unnormalised, "equal_tokens", {"attention": "uniform"}),
        (positional, "equal_tokens", {}),
        (positional, "past_permutation", {}),
        (positional, "permutation", {"causal": False}),
    ],
)
def test_planted_errors_are_refuted(monkeypatch, plant, name, changes):
    """A layer that sees positions breaks the symmetry that it had."""
    question = ask(name, place="blocks.0.attn_out", **changes)
    assert decide(question, -TOLERANCE, TOLERANCE, workers=1).verdict == "CONFIRMED"
    apply = transformer.apply

    def planted(operation, inputs, arrays):
        found = apply(operation, inputs, arrays).clone()
        plant(operation, found)
        return found

    monkeypatch.setattr(transformer, "apply", planted)
    assert decide(question, -TOLERANCE, TOLERANCE, workers=1).verdict == "REFUTED"


def test_what_is_not_finite_is_an_error(monkeypatch):
    """No NaN is taken for a gap within rounding."""
    apply = transformer.apply

    def planted(operation, inputs, arrays):
        found = apply(operation, inputs, arrays).clone()
        if operation.place == "blocks.0.attn_out":
            found[3, -1, 0] = math.nan
        return found

    monkeypatch.setattr(transformer, "apply", planted)
    for name in NAMES:
        with pytest.raises(FloatingPointError, match=rf"expected finite {name} .* in draw 3"):
            measure(ask(name), device="cpu")
