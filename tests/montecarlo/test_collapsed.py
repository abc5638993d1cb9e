"""The collapsed sampler is the real one in law: at every place, jointly, whatever the layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy import stats

import nope
from montecarlo import Conditions, collapsed, measure
from montecarlo.collapsed import SAMPLERS, chosen, cost, factor, reason_not_collapsed
from montecarlo.sampler import Group, chunks, sample
from nope.architecture import Architecture
from nope.layers import MLP
from nope.operations import Linear
from nope.questions import Weights
from nope.tokens import EmbeddingTokens, GaussianTokens, WithBos

ERROR_RATE = 1e-6
"""Of a false alarm in any one test of this file."""
INIT = nope.init.normal(0.4)
CONDITIONS = Conditions(seed=11, dtype="float64")

ARCHITECTURES = {
    "one layer": nope.decoder(12, 3, n_ctx=4, d_ff=0),
    "biases": nope.decoder(12, 2, n_ctx=4, d_ff=20, bias=True),
    "two layers": nope.decoder(12, 2, 2, n_ctx=3, d_ff=16),
    "rmsnorm, swiglu": nope.decoder(
        12, 2, n_ctx=3, d_ff=10, norm="rmsnorm", activation="swiglu", eps=1e-5
    ),
    "post-LN": nope.decoder(12, 2, n_ctx=3, d_ff=16, norm_position="post"),
    "uniform": nope.decoder(12, 2, n_ctx=4, d_ff=0, attention="uniform"),
    "bidirectional": nope.decoder(12, 2, n_ctx=4, d_ff=0, causal=False),
    "repeated tokens": nope.decoder(12, 2, n_ctx=4, d_ff=16, tokens=EmbeddingTokens(2), eps=1e-5),
    "bos": nope.decoder(12, 2, n_ctx=4, d_ff=0, tokens=WithBos(GaussianTokens())),
    "one token": nope.decoder(12, 2, n_ctx=1, d_ff=16),
    "narrow hidden layer": nope.decoder(12, 2, n_ctx=4, d_ff=3),
    "as long as wide": nope.decoder(4, 2, n_ctx=4, d_ff=16),
    "longer than wide": nope.decoder(4, 2, n_ctx=6, d_ff=16),
}


def biased(architecture):
    """A scheme with biases that are not 0, where there are any."""
    return RandomBiases() if any(w.role == "bias" for w in architecture.weights) else INIT


@dataclass(frozen=True)
class RandomBiases:
    def law(self, weight, architecture):
        return nope.init.Normal(0.3 if weight.role == "bias" else 0.4)


def draws_of(architecture, sampler, seed, count=2048):
    """The values of every place in so many draws, as `nope.transformer` shapes them."""
    group = Group(architecture, biased(architecture), None, sampler)
    conditions, places = Conditions(seed, dtype="float64"), list(architecture.places())
    blocks = [
        sample(group, places, index, conditions)
        for index in range(math.ceil(count / group.block_size))
    ]
    return {p: torch.cat([block[p] for block in blocks])[:count].numpy() for p in places}


def flat(values):
    """Draws by coordinates, those that the mask holds at -inf left out."""
    x = values.reshape(len(values), -1)
    return x[:, np.isfinite(x[0])]


def grams(values):
    """The inner products of the first two positions of every vector place, side by side."""
    vectors = [
        (x.swapaxes(1, 2).reshape(len(x), x.shape[2], -1) if x.ndim == 4 else x)[:, :2]
        for place, x in values.items()
        if not place.endswith(("scores", "pattern"))
    ]
    every = [x @ x.swapaxes(1, 2) for x in vectors]
    return np.concatenate([x.reshape(len(x), -1) for x in every], 1)


def features(values):
    """What is compared: draws by numbers, to be scaled, of each place and of all together."""
    return {**{place: flat(x) for place, x in values.items()}, "inner products": grams(values)}


def bounded(x):
    """Odd and even moments of scaled columns, and products of pairs, all between -1 and 1."""
    x = np.tanh(x)
    pairs = [x * np.roll(x, k, 1) for k in range(1, min(x.shape[1], 64) // 2 + 1)]
    return np.concatenate([x, x**2, x**4, *pairs], 1)


def smallest_p_value(values, others):
    """Of equal means of all bounded features, Bonferroni over every comparison.

    A mean of 2048 bounded numbers is close to normal; a feature that never varies must be equal
    to rounding.
    """
    least, compared = 1.0, 0
    mine, theirs = features(values), features(others)
    for name, x in mine.items():
        scale = np.sqrt((x**2).mean(0)).clip(1e-12)
        a, b = bounded(x / scale), bounded(theirs[name] / scale)
        width = np.sqrt((a.var(0) + b.var(0)) / len(a))
        gap = np.abs(a.mean(0) - b.mean(0))
        z = gap / np.maximum(width, 1e-9)
        least, compared = min(least, 2 * stats.norm.sf(z.max())), compared + len(z)
    assert compared > 100
    return least * compared


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_place_has_the_law_of_the_real_layers(name):
    """Moments within and across places, and the whole distribution of a coordinate of each."""
    values, others = (
        draws_of(ARCHITECTURES[name], sampler, seed)
        for sampler, seed in (("real", 1), ("collapsed", 2))
    )
    assert smallest_p_value(values, others) > ERROR_RATE
    for place, x in values.items():
        found = stats.ks_2samp(flat(x)[:, -1], flat(others[place])[:, -1]).pvalue
        assert found * len(values) > ERROR_RATE, place


def factor_of_another_draw(monkeypatch):
    monkeypatch.setattr(collapsed, "factor", lambda x: factor(x).roll(1, 0))


def factor_of_another_place(monkeypatch):
    """What a cache would do that is not told which place it holds."""
    first = {}
    own = collapsed.Collapsed._factor
    monkeypatch.setattr(
        collapsed.Collapsed,
        "_factor",
        lambda self, x, place: first.setdefault(id(self), own(self, x, place)),
    )


def one_stream_for_all(monkeypatch):
    """W_Q = W_K = W_V."""
    monkeypatch.setattr("montecarlo.sampler.stream_key", lambda seed, index, path: 1 + index)


@pytest.mark.parametrize(
    "plant", [factor_of_another_draw, factor_of_another_place, one_stream_for_all]
)
def test_a_planted_error_is_found(monkeypatch, plant):
    architecture = ARCHITECTURES["one layer"]
    values = draws_of(architecture, "real", 1)
    plant(monkeypatch)
    assert smallest_p_value(values, draws_of(architecture, "collapsed", 2)) < ERROR_RATE


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(5, 4, 9, dtype=torch.float64),
        torch.randn(2, 9, 4, dtype=torch.float64),
        torch.randn(3, 1, 7, dtype=torch.float64),
        torch.ones(2, 4, 6, dtype=torch.float64),
        torch.zeros(1, 3, 5, dtype=torch.float64),
        torch.randn(2, 3, 8, dtype=torch.float64).repeat(1, 2, 1),
    ],
    ids=["wide", "tall", "row", "rank one", "zero", "every row twice"],
)
def test_the_factor_is_triangular_and_has_the_gram_matrix(x):
    R = factor(x)
    assert R.shape == (*x.shape[:2], min(x.shape[1:]))
    assert torch.equal(R, R.tril())
    assert torch.allclose(R @ R.transpose(1, 2), x @ x.transpose(1, 2), atol=1e-12)


def test_given_the_inputs_images_are_gaussian_with_the_gram_matrix_as_covariance():
    """The law that the docstring derives: cov(y_m, y_n) = s^2 <x_m, x_n>, columns independent."""
    architecture = nope.decoder(8, 2, n_ctx=3, d_ff=0)
    linear = next(o for o in architecture.operations if isinstance(o, Linear))
    x = torch.randn(1, 3, 8, dtype=torch.float64, generator=torch.manual_seed(3))
    count = 40_000
    drawn = torch.manual_seed(4)

    def draw(weight, shape):
        return 0.4 * torch.randn(count, *shape, dtype=torch.float64, generator=drawn)

    product = collapsed.Collapsed(architecture, INIT, draw)
    y = product(x.expand(count, -1, -1), linear).numpy()
    covariance = 0.16 * (x[0] @ x[0].T).numpy()
    root = np.linalg.inv(np.linalg.cholesky(covariance))
    white = (root @ y).reshape(count, -1)
    assert stats.kstest(white.ravel(), "norm").pvalue > ERROR_RATE
    off = (white.T @ white / count - np.eye(white.shape[1])) * math.sqrt(count / 2)
    assert 2 * stats.norm.sf(np.abs(off).max()) * off.size > ERROR_RATE


def test_weights_that_are_not_gaussian_are_drawn():
    """Then the collapsed sampler has the bits of the real one."""
    architecture = nope.decoder(12, 2, n_ctx=4, d_ff=16)
    init = nope.init.truncated_normal(0.4)
    groups = [Group(architecture, init, None, sampler) for sampler in ("real", "collapsed")]
    real, other = (sample(g, ["ln_final"], 0, CONDITIONS)["ln_final"] for g in groups)
    assert torch.equal(real, other)


def test_queries_keys_and_values_share_one_factor(monkeypatch):
    seen = []
    monkeypatch.setattr(collapsed, "factor", lambda x: seen.append(x.shape) or factor(x))
    group = Group(nope.decoder(12, 2, n_ctx=4, activation="swiglu"), INIT, None, "collapsed")
    next(chunks(group, ["ln_final"], 0, CONDITIONS))
    assert [shape[1:] for shape in seen] == [(4, 12), (4, 12), (4, 12), (4, 48)]


# ---------------------------------------------------------------------------- the choice


def ask(observable="second_moment", place="blocks.0.attn_out", init=INIT, given=None, **changes):
    options = {"n_ctx": 16, "d_ff": 0, **changes}
    return nope.Question(nope.decoder(512, 8, **options), init, place, observable, given)


@dataclass(frozen=True)
class Twice:
    """One map used at two places."""

    def operations(self, scope, source):
        (first,) = (o for o in MLP(600).operations(scope, source) if o.place == "mlp.pre")
        yield first
        yield replace(first, place="mlp.again")


TIED = Architecture(512, 16, GaussianTokens(), Twice())

REFUSED = {
    "given": ask(given=Weights(1)),
    "same weights twice": ask("permutation", causal=False),
    "more than one place": nope.Question(TIED, INIT, "mlp.pre", "second_moment"),
    "may be equal": ask("adjacency_score", tokens=EmbeddingTokens(5)),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_it_cannot_answer_is_refused_or_left_to_the_real_sampler(why):
    question = REFUSED[why]
    assert why in reason_not_collapsed(question)
    assert chosen(question, "auto", "cpu") == "real"
    with pytest.raises(ValueError, match=f"{why}.*; use sampler='auto' or 'real'"):
        measure(question, draws=1, sampler="collapsed", device="cpu")


def test_auto_takes_the_faster():
    assert chosen(ask(), "auto", "cpu") == "collapsed"
    assert chosen(ask(n_ctx=600), "auto", "cpu") == "real"
    assert chosen(ask(), "auto", "cuda") == "real"
    assert chosen(ask(init=nope.init.kaiming_uniform()), "auto", "cpu") == "real"
    large = nope.decoder(4096, 32, n_ctx=128, d_ff=0)
    assert cost(large, INIT, "real") > 15 * cost(large, INIT, "collapsed")


def test_unknown_samplers_are_refused():
    with pytest.raises(ValueError, match="expected sampler"):
        Conditions(sampler="fast")
    assert all(Conditions(sampler=name).sampler == name for name in SAMPLERS)


def test_evidence_of_the_samplers_is_kept_apart(tmp_path):
    """One store holds both, and gives each its own."""
    question = nope.Question(ARCHITECTURES["one layer"], INIT, "blocks.0.attn_out", "kernel")
    options = {"draws": 10, "device": "cpu", "store": tmp_path}
    first = {s: measure(question, sampler=s, **options).mean for s in ("real", "collapsed")}
    again = {s: measure(question, sampler=s, **options).mean for s in ("real", "collapsed")}
    assert not np.array_equal(first["real"], first["collapsed"])
    assert all(np.array_equal(first[s], again[s]) for s in first)


def test_a_wide_layer_takes_little_memory():
    """d = 16,384: the four matrices of a layer are 4 GiB in float32, their 4 rows each 1 MiB."""
    group = Group(nope.decoder(16_384, 64, n_ctx=4, d_ff=0), INIT, None, "collapsed")
    assert 4 * group.working_set < 2**24
    values = next(chunks(group, ["blocks.0.attn_out"], 0, Conditions()))["blocks.0.attn_out"]
    size = values.square().mean().item() / (16_384 * 0.16) ** 2  # between 1/m and 1
    assert 0.2 < size < 1.2


def test_a_weight_that_is_read_twice_is_one():
    """Of the real sampler: tied weights give equal places, from chunk to chunk."""
    group = Group.of(nope.Question(TIED, INIT, "mlp.pre", "second_moment"))
    found = sample(group, ["mlp.pre", "mlp.again"], 0, Conditions())
    assert torch.equal(found["mlp.pre"], found["mlp.again"])
    assert found["mlp.pre"].std() > 0
