"""Kernels carried through stacks: two passes agree, kernels are kernels, real layers, memory."""

import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import sympy as sp

import montecarlo
import nope
import theory
from nope.init import normal, torch_default
from nope.questions import Question
from theory.bindings import local_bindings
from theory.kernel import K, Traits
from theory.predict import rules_to
from theory.propagation import KernelValues, all_pairs, compiled, of_product, of_variance
from theory.rules import rule_for, softmax
from theory.symbols import m, n

FIDELITIES = ("uniform", "first_order", "any_temperature")


def carried(architecture, init, place, fidelity, rules=None):
    """Kernels of all pairs of positions at a place and everything before it."""
    chosen = rules_to(architecture, place, fidelity) if rules is None else rules
    known = local_bindings(architecture, init)
    return KernelValues(chosen, known, architecture.n_ctx, all_pairs(architecture.n_ctx), {})


# ------------------------------------------------------------ pointwise and all pairs


@pytest.mark.parametrize("observable", ["kernel", "cosine", "second_moment", "adjacent_cosine"])
@pytest.mark.parametrize("place", ["blocks.0.attn_out", "blocks.0.resid_post"])
def test_all_pairs_equal_the_pointwise_pass_under_uniform_attention(place, observable):
    """The closed first layer against cumulative sums over all pairs: the same numbers."""
    architecture = nope.decoder(16, 4, n_ctx=9, d_ff=8, activation="relu")
    question = Question(architecture, normal(0.2), place, observable)
    found = theory.predict(question, "uniform")
    matrix = carried(architecture, normal(0.2), place, "uniform")
    every = np.arange(9)
    if observable == "kernel":
        assert np.abs(found.values - matrix.kernel(place)).max() <= 1e-13
    elif observable == "second_moment":
        assert np.abs(found.values - np.diagonal(matrix.kernel(place))).max() <= 1e-13
    else:
        scale = np.sqrt(np.diagonal(matrix.kernel(place)))
        rho = matrix.kernel(place) / np.outer(scale, scale)
        biased = rho + matrix.drift(place)[0]
        expected = biased if observable == "cosine" else biased[every[:-1], every[1:]]
        assert np.abs(found.values - expected).max() <= 1e-13


def general_rules(architecture, place):
    """The rules to a place, its softmax treated as if its keys were not independent tokens."""
    rules, traits = {}, {}
    for operation in architecture.upstream(place):
        rule = rule_for(operation, traits, "any_temperature")
        if operation.place.endswith("attn.z"):
            dependent = {
                name: replace(each, independent=False) if isinstance(each, Traits) else each
                for name, each in traits.items()
            }
            rule = softmax.mixture(operation, dependent)
        rules[operation.place] = rule
        traits[operation.place] = rule.traits
    return rules


def forced(width, std, n_ctx=6):
    """Both treatments of the first layer: largest gap of the kernels over sqrt(K_mm K_nn)."""
    architecture = nope.decoder(width, 4, n_ctx=n_ctx, d_ff=0)
    place, init = "blocks.0.attn.z", normal(std)
    closed = carried(architecture, init, place, "any_temperature")
    general = carried(
        architecture, init, place, "any_temperature", general_rules(architecture, place)
    )
    assert closed._rules[place].algorithm is None
    assert general._rules[place].algorithm is not None
    root = np.sqrt(np.diagonal(closed.kernel(place)))
    size = np.outer(root, root)
    gap = np.abs(closed.kernel(place) - general.kernel(place)) / size
    return gap, closed.remainder(place) + general.remainder(place)


@pytest.mark.parametrize("rows", [slice(1, None), slice(0, 1)], ids=["from m = 2", "m = 1"])
@pytest.mark.parametrize("s2", [0.05, 0.9])
def test_the_general_algorithm_equals_the_first_layers_law(s2, rows):
    """Two treatments of independent tokens: within their remainders, and their gap falls as 1/d^2.

    Four times the width at the same s leaves about a sixteenth; d_h grows along with d.
    """
    gaps = []
    for width in (32, 128):
        gap, remainder = forced(width, (s2**0.5 / width) ** 0.5)
        assert (gap <= remainder + 1e-9)[rows, rows.start :].all()
        gaps.append(gap[rows, rows.start :].max())
    assert gaps[1] < gaps[0] / 8 + 1e-9
    assert gaps[1] <= 12 * s2 / 128**2


def test_a_huge_vocabulary_is_independent_tokens():
    """Rows of a table that hardly ever repeat: the kernel of Gaussian tokens, by another route."""
    few = nope.GaussianTokens()
    many = nope.EmbeddingTokens(vocabulary=10**8)
    found = []
    for tokens in (few, many):
        architecture = nope.decoder(128, 4, n_ctx=6, d_ff=0, tokens=tokens)
        question = Question(architecture, normal(128**-0.5), "blocks.0.attn_out", "kernel")
        found.append(theory.predict(question, "any_temperature"))
    gap = np.abs(found[1].values - found[0].values)[1:, 1:]
    assert (gap <= (found[0].remainder + found[1].remainder)[1:, 1:]).all()
    root = np.sqrt(np.diagonal(found[0].values))[1:]
    assert (gap / np.outer(root, root)).max() <= 12 / 128**2


# ------------------------------------------------------------------- kernels are kernels

STACKS = {
    "pre": {},
    "post relu": {"norm_position": "post", "activation": "relu"},
    "none": {"norm_position": "none", "activation": "identity", "d_ff": 8},
    "rms swiglu": {"norm": "rmsnorm", "activation": "swiglu"},
    "scaled eps bias": {"residual_scale": 0.5, "eps": 1e-5, "bias": True},
    "embedding": {"tokens": nope.EmbeddingTokens(16, exponent=1.0)},
    "bos": {"tokens": nope.WithBos(nope.EmbeddingTokens(16))},
    "one head": {"n_heads": 1, "d_ff": 0},
}


def stack(name, n_layers=2, n_ctx=12, **changes):
    options = {"d_ff": 128, "n_heads": 4, **STACKS[name], **changes}
    return nope.decoder(64, options.pop("n_heads"), n_layers, n_ctx=n_ctx, **options)


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("name", STACKS)
def test_every_kernel_is_symmetric_and_positive(name, fidelity):
    """At each vector place: symmetric, positive diagonal, no eigenvalue below rounding.

    Treatments that are not exact may break positivity by no more than they say they drop.
    """
    architecture = stack(name)
    last = architecture.operations[-1].place
    values = carried(architecture, normal(0.125), last, fidelity)
    for place, operation in architecture.places().items():
        if operation.axes != "vector" or place not in values._rules:
            continue
        kernel = values.kernel(place)
        dropped = np.abs(values.remainder(place)) * np.sqrt(
            np.outer(np.diagonal(kernel), np.diagonal(kernel))
        )
        assert np.isfinite(kernel).all(), place
        assert np.abs(kernel - kernel.T).max() <= 1e-12 * kernel.max(), place
        assert (np.diagonal(kernel) > 0).all(), place
        least = np.linalg.eigvalsh((kernel + kernel.T) / 2).min()
        assert least >= -1e-12 * kernel.max() - np.linalg.norm(dropped, 2), place


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("name", STACKS)
def test_every_remainder_is_a_size(name, fidelity):
    """Finite and at least 0, at every place that a two-layer stack needs."""
    architecture = stack(name)
    last = architecture.operations[-1].place
    values = carried(architecture, normal(0.125), last, fidelity)
    for place in values._rules:
        remainder = values.remainder(place)
        assert np.isfinite(remainder).all(), place
        assert remainder.min() >= -1e-12, place


# --------------------------------------------------------------------- memory and work


def counting(rules):
    """The same rules, and how often the algorithm of each place is called."""
    calls = Counter()

    def counted(place, algorithm):
        def call(*arguments):
            calls[place] += 1
            return algorithm(*arguments)

        return call

    return {
        place: replace(rule, algorithm=counted(place, rule.algorithm)) if rule.algorithm else rule
        for place, rule in rules.items()
    }, calls


def test_no_algorithm_runs_twice():
    """Four layers: each attention's output once, whatever a prediction asks for afterwards."""
    architecture = stack("embedding", n_layers=4)
    last = "blocks.3.resid_post"
    rules, calls = counting(rules_to(architecture, last, "any_temperature"))
    values = carried(architecture, normal(0.125), last, "any_temperature", rules)
    values.advance({last})
    for view in ("mn", "mm", "nn"):
        values.kernel(last, view)
    values.remainder(last), values.excess(last)
    assert set(calls.values()) == {1}
    assert sum(place.endswith("attn.z") for place in calls) == 4


def advanced(n_layers):
    """The kernels of a stack at n_ctx = 256 carried to its end, and the peak of the memory."""
    architecture = stack("pre", n_layers=n_layers, n_ctx=256)
    last = f"blocks.{n_layers - 1}.resid_post"
    first = carried(architecture, normal(0.125), last, "any_temperature")
    first.advance({last})  # fills the tables, which are kept for the next call
    values = carried(architecture, normal(0.125), last, "any_temperature")
    tracemalloc.start()
    values.advance({last})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(values.kernel(last), first.kernel(last))
    return values, last, peak


def test_advancing_frees_what_is_behind():
    """Of 512 KiB matrices as many are alive in nine layers as in three, not one a place."""
    _, _, few = advanced(3)
    values, last, peak = advanced(9)
    kept = [place for place, memo in values._memo.items() if memo]
    assert kept == [last]
    assert not values._moved
    assert peak < 1.1 * few < 64 * 256**2 * 8


# ------------------------------------------------------------------------- real layers

WIDTH, LENGTH = 64, 16
HOT = normal(WIDTH**-0.5)
"""s = 1."""

REAL = {
    "pre": ({}, HOT),
    "post": ({"norm_position": "post"}, HOT),
    "rmsnorm": ({"norm": "rmsnorm"}, HOT),
    "swiglu": ({"activation": "swiglu"}, HOT),
    "halved branches": ({"residual_scale": 0.5}, HOT),
    "torch's biases": ({"bias": True}, torch_default()),
    "zipf": ({"tokens": nope.EmbeddingTokens(16, exponent=1.0)}, HOT),
}
OBSERVABLES = ("second_moment", "adjacent_cosine")
INFORMATIVE = 0.1
WIDE = {"swiglu", "zipf"}
"""Stacks at whose small width the theory of the cosine knows less than that: nothing is decided."""
DRAWS = 4096


def real(name, heads):
    """Questions about the second block's output."""
    options, init = REAL[name]
    architecture = nope.decoder(WIDTH, heads, 2, WIDTH, n_ctx=LENGTH, **options)
    return [Question(architecture, init, "blocks.1.resid_post", what) for what in OBSERVABLES]


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("name", REAL)
def test_two_layers_against_real_ones(name, heads):
    """GELU stacks: |theory - estimate| <= remainder + 5 standard errors, at every position."""
    questions = real(name, heads)
    for question, found in zip(
        questions, montecarlo.measure(questions, DRAWS, seed=1), strict=True
    ):
        theory_says = theory.predict(question)
        gap = np.abs(theory_says.values - found.mean)
        beyond = gap - theory_says.remainder - 5 * found.standard_error
        assert beyond.max() <= 1e-6, (question.observable, beyond.argmax() + 1)


def test_a_norm_behind_a_softmax_reads_a_participation_that_varies():
    """One head, no residual, s^2 = 2: E cos of neighbours is more than the mean kernel's cosine, by
    more than the theory leaves."""
    body = nope.Sequence((nope.Norm("ln1"), nope.Attention(1), nope.Norm("ln2")))
    network = nope.Architecture(WIDTH, 6, nope.GaussianTokens(1.0), body)
    question = Question(network, normal((2**0.5 / WIDTH) ** 0.5), "ln2", "kernel")
    found = theory.predict(question)
    without = theory.predict(Question(network, question.init, "attn_out", "kernel_cosine"))
    measured = montecarlo.measure(question, 8 * DRAWS, seed=1)
    allowed = found.remainder + 5 * measured.standard_error
    assert (np.abs(found.values - measured.mean) <= allowed + 1e-6).all()
    neighbours = np.arange(2, 6), np.arange(1, 5)
    assert (measured.mean - without.values > allowed)[neighbours].all()


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("name", sorted(REAL.keys() - WIDE))
def test_remainders_of_two_layers_are_informative(name, heads):
    """At most 10% at d = 64 and s = 1: agreement within them says something."""
    for question in real(name, heads):
        found = theory.predict(question)
        size = found.values if question.kind.scale == "relative" else 1.0
        assert (found.remainder / size).max() <= INFORMATIVE


def test_logits_of_any_size_have_an_answer():
    """s = 2 over narrow heads: where one treatment has no numbers another answers."""
    architecture = nope.decoder(16, 4, 2, 0, n_ctx=4)
    question = Question(architecture, normal((2 / 16) ** 0.5), "blocks.1.attn_out", "second_moment")
    assert np.isfinite(theory.predict(question).values).all()


def test_a_rule_that_reads_kernels_in_another_way_is_refused_with_the_remedy():
    """A mean over one prefix alone: there is no number form of it."""
    j = sp.Symbol("j")
    with pytest.raises(NotImplementedError, match=r"got K\(m, j\); give the rule an `algorithm`"):
        compiled(sp.Sum(K(m, j), (j, 1, n)) / n)


# ------------------------------------------------------------------- how errors pass


@pytest.mark.parametrize("largest", [0.05, 0.5, 0.95])
def test_the_error_of_a_cosine_is_within_what_its_parts_leave(largest):
    """Of Gram matrices off by up to a share each: not passed, and nearly reached if it is small."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 4000, 3))
    mm, nn, mn = (np.sum(a * b, 1) for a, b in ((x, x), (y, y), (x, y)))
    size = np.sqrt(mm * nn)
    rho = mn / size
    errors, signs = largest * rng.random((3, len(x))), rng.choice([-1, 1], (3, len(x)))
    off = [1 + sign * error for sign, error in zip(signs, errors, strict=True)]
    true = mm * off[0], nn * off[1], mn + size * (off[2] - 1)
    moved = np.abs(np.clip(true[2] / np.sqrt(true[0] * true[1]), -1, 1) - rho)
    slopes = [np.abs(rho) / 2, np.abs(rho) / 2, np.ones_like(rho)]
    allowed = of_product(slopes, list(errors), np.zeros_like(rho))
    assert (moved <= allowed).all()
    assert (moved / allowed).max() > 0.9 or largest > 0.05


@pytest.mark.parametrize(
    "function",
    [
        lambda v: v / (v + 0.3),
        lambda v: v / (v + 30.0),
        lambda v: np.ones_like(v),
        lambda v: v,
        lambda v: v**1.7,
    ],
    ids=["small eps", "large eps", "exact norm", "relu", "power"],
)
def test_the_error_of_a_variance_is_within_what_its_own_leaves(function):
    """f(v (1 +- r)) for r up to 1 and beyond; an exact norm leaves nothing."""
    v, r = np.full(400, 0.9), np.linspace(0, 1.5, 400)
    step = 1e-4
    slope = np.log(function(v * (1 + step)) / function(v * (1 - step))) / (2 * step)
    allowed = of_variance(slope, r)
    for ends in (v * (1 + r), v * np.maximum(1 - r, 0)):
        assert (np.abs(function(ends) / function(v) - 1) <= allowed + 1e-6).all()


def test_infinite_errors_leave_no_nan():
    """A cosine is at most 2 off; a variance may be anything, unless it is normalised."""
    endless, nothing = np.full(2, np.inf), np.zeros(2)
    assert (of_product([nothing, nothing, nothing + 1], [endless] * 3, nothing) == 2).all()
    assert (of_variance(np.array([0.0, 0.5]), endless) == [0, np.inf]).all()
