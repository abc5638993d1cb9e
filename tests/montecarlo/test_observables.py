"""Each per-draw statistic against loops written from `nope.questions.OBSERVABLES`' words.

float64 values agree to 1e-12 of the largest: rounding of sums of at most some hundred terms.
"""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
import torch

import nope
from montecarlo import sampler
from montecarlo.moments import Moments
from montecarlo.observables import STATISTICS, ascents, gram
from montecarlo.sampler import Conditions, Group
from nope.questions import OBSERVABLES

ROUNDING = 1e-12
Q, PATTERN, STREAM = "blocks.0.attn.q", "blocks.0.attn.pattern", "blocks.0.resid_post"
VECTOR = [
    name for name, kind in OBSERVABLES.items() if "vector" in kind.on and not kind.transform
]  # those that transform the inputs: test_symmetry.py
PAIR = [name for name, kind in OBSERVABLES.items() if "pair" in kind.on]

POINTS = {"cdf": (-0.3, 0.1, 0.2, 2.0)}
SCALE_FREE = [n for n in VECTOR if n.startswith(("cosine", "adjacen"))]


def ask(observable, place, n_ctx=5, d_model=6, **changes):
    architecture = nope.decoder(d_model, 2, n_ctx=n_ctx, **changes)
    return nope.Question(
        architecture, nope.init.normal(0.1), place, observable, points=POINTS.get(observable, ())
    )


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def value_at(place, draws=4, n_ctx=5, d_model=6, seed=0):
    """A random value of the form that `nope.transformer` gives at the place."""
    if place == STREAM:
        return randn(draws, n_ctx, d_model, seed=seed)
    if place == Q:
        return randn(draws, 2, n_ctx, d_model // 2, seed=seed)
    scores = randn(draws, 2, n_ctx, n_ctx, seed=seed)
    above = torch.ones(n_ctx, n_ctx, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(above, -math.inf)
    return scores.softmax(-1) if place == PATTERN else scores


# ------------------------------------------------------------------- the definitions, as loops
# `draws` is a list with one entry per draw: x[m][coordinate] with positions from 0, or
# a[head][m][n].  Each function gives the whole array, NaN where nothing is asserted.


def as_vectors(value):
    """One list of vectors per draw, heads side by side."""
    if value.ndim == 3:
        return [draw.numpy() for draw in value]
    return [np.array([np.concatenate(list(draw[:, m].numpy())) for m in range(value.shape[2])])
            for draw in value]  # fmt: skip


def expect(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def power_at(draws, m, power, pairs):
    """E x^power at position m (from 0): over draws and coordinates, or heads and n <= m."""
    if pairs:
        return expect(
            float(a[n]) ** power for x in draws for h in x for a in [h[m]] for n in range(m + 1)
        )
    return expect(float(c) ** power for x in draws for c in x[m])


def plain_second_moment(draws, question, pairs):
    return [power_at(draws, m, 2, pairs) for m in range(question.architecture.n_ctx)]


def plain_mean_second_moment(draws, question, pairs):
    if pairs:
        n_ctx = question.architecture.n_ctx
        causal = [(m, n) for m in range(n_ctx) for n in range(m + 1)]
        return [expect(float(h[m][n]) ** 2 for x in draws for h in x for m, n in causal)]
    return [expect(float(c) ** 2 for x in draws for row in x for c in row)]


def plain_coordinate_second_moment(draws, question, pairs):
    return [[expect(float(x[m][j]) ** 2 for x in draws) for j in range(6)] for m in range(2)]


def plain_kurtosis(draws, question, pairs):
    n_ctx = question.architecture.n_ctx
    return [power_at(draws, m, 4, pairs) / power_at(draws, m, 2, pairs) ** 2 for m in range(n_ctx)]


def plain_participation(draws, question, pairs):
    n_ctx = question.architecture.n_ctx
    return [
        expect(sum(float(h[m][n]) ** 2 for n in range(m + 1)) for x in draws for h in x)
        for m in range(n_ctx)
    ]


def inner(x, y):
    return sum(float(a) * float(b) for a, b in zip(x, y, strict=True))


def plain_cos(x, y):
    return inner(x, y) / math.sqrt(inner(x, x) * inner(y, y))


def over_grid(question, entry):
    grid = [m - 1 for m in question.grid]
    return [[entry(m, n) for n in grid] for m in grid]


def plain_kernel(draws, question, pairs):
    return over_grid(question, lambda m, n: expect(inner(x[m], x[n]) / len(x[m]) for x in draws))


def plain_kernel_cosine(draws, question, pairs):
    def kernel(m, n):
        return expect(inner(x[m], x[n]) for x in draws)

    return over_grid(question, lambda m, n: kernel(m, n) / math.sqrt(kernel(m, m) * kernel(n, n)))


def plain_cosine(draws, question, pairs):
    return over_grid(question, lambda m, n: expect(plain_cos(x[m], x[n]) for x in draws))


def plain_cosine_steps(draws, question, pairs):
    grid = [m - 1 for m in question.grid]
    return [
        [
            expect(plain_cos(x[m], x[after]) - plain_cos(x[m], x[n]) for x in draws)
            for n, after in itertools.pairwise(grid)
        ]
        for m in grid
    ]


def plain_adjacent_cosine(draws, question, pairs):
    n_ctx = question.architecture.n_ctx
    return [expect(plain_cos(x[m], x[m + 1]) for x in draws) for m in range(n_ctx - 1)]


def plain_cdf(draws, question, pairs):
    def share(x, point):
        rows = [head[-1] for head in x] if pairs else [x[-1]]
        return expect(entry <= point for row in rows for entry in row)

    return [expect(share(x, point) for x in draws) for point in question.points]


def plain_adjacency_score(draws, question, pairs):
    def share(x):
        triples = itertools.combinations(range(len(x)), 3)
        cos = [[plain_cos(a, b) for b in x] for a in x]
        return expect(cos[i][j] < cos[i][k] for j, k, i in triples)

    return [expect(share(x) for x in draws)]


def plain_adjacency_score_steps(draws, question, pairs):
    def share(x):
        steps = [(i, j) for i in range(len(x)) for j in range(len(x)) if j + 1 < i]
        return expect(plain_cos(x[i], x[j]) < plain_cos(x[i], x[j + 1]) for i, j in steps)

    return [expect(share(x) for x in draws)]


def plain_adjacency_score_norm(draws, question, pairs):
    def share(x):
        neighbours = itertools.combinations(range(len(x)), 2)
        return expect(inner(x[j], x[j]) > inner(x[k], x[k]) for j, k in neighbours)

    return [expect(share(x) for x in draws)]


def reference(value, question):
    """The observable's array by the loops above."""
    pairs = question.operation.axes == "pair"
    loops = globals()["plain_" + question.observable.replace(".", "_")]
    draws = [draw.numpy() for draw in value] if pairs else as_vectors(value)
    return np.array(loops(draws, question, pairs), dtype=float)


def estimate(value, question):
    """The observable's array by the product: components, moments, value."""
    statistic = STATISTICS[question.observable]
    return statistic.value(Moments.of(statistic.components(value, question).numpy()).mean)


def assert_same(value, question):
    found, expected = estimate(value, question), reference(value, question)
    assert found.shape == question.shape == expected.shape
    found, expected = found[question.judged], expected[question.judged]
    assert np.abs(found - expected).max() <= ROUNDING * np.abs(expected).max()


# ---------------------------------------------------------------------------------- the tests


def test_every_observable_has_a_statistic():
    """What can be asked can be measured, and nothing else is."""
    assert set(STATISTICS) == set(OBSERVABLES)


@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.parametrize("place", [Q, STREAM])
@pytest.mark.parametrize("observable", VECTOR)
def test_vector_statistics_are_their_definitions(observable, place, draws):
    """Over one draw and over four, with heads and without."""
    assert_same(value_at(place, draws, seed=draws), ask(observable, place))


@pytest.mark.parametrize("place", [PATTERN, "blocks.0.attn.scores"])
@pytest.mark.parametrize("observable", PAIR)
def test_pair_statistics_are_their_definitions(observable, place):
    """Only n <= m counts: the -inf above the diagonal of scores enters nothing."""
    if observable == "participation":
        place = PATTERN
    assert_same(value_at(place), ask(observable, place))


@pytest.mark.parametrize("observable", ["kernel", "kernel_cosine", "cosine", "cosine_steps"])
def test_matrix_statistics_look_at_the_grid(observable):
    """Beyond 64 positions the matrices hold the grid's rows and columns."""
    assert_same(value_at(STREAM, 1, n_ctx=70), ask(observable, STREAM, n_ctx=70))


@pytest.mark.parametrize("n_ctx", [3, 4, 8, 9, 17])
@pytest.mark.parametrize("observable", ["adjacency_score", "adjacency_score.steps"])
def test_scores_count_at_every_length(observable, n_ctx):
    """The merge counting of triples is right at, below and above powers of two."""
    assert_same(value_at(STREAM, 2, n_ctx), ask(observable, STREAM, n_ctx))


def axis_vectors(draws, n_ctx, d_model, seed):
    """Vectors +-r e_j with whole r: cosines are exactly -1, 0 or 1, and most of them tie."""
    rng = np.random.default_rng(seed)
    x = np.zeros((draws, n_ctx, d_model))
    for draw, m in itertools.product(range(draws), range(n_ctx)):
        x[draw, m, rng.integers(d_model)] = rng.choice([-2, -1, 1, 2])
    return torch.from_numpy(x)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "observable", ["adjacency_score", "adjacency_score.steps", "adjacency_score.norm"]
)
def test_ties_do_not_count(observable, seed):
    """The comparisons are strict, on cosines and norms that tie exactly."""
    value = axis_vectors(3, 9, 3, seed)
    question = ask(observable, STREAM, n_ctx=9, d_model=6)
    assert_same(value, question)


def test_all_ties_score_zero():
    """Identical vectors: no cosine and no norm is above another."""
    value = torch.zeros(1, 6, 4, dtype=torch.float64)
    value[..., 0] = 1.0
    for name in ("adjacency_score", "adjacency_score.steps", "adjacency_score.norm"):
        assert estimate(value, ask(name, STREAM, n_ctx=6, d_model=4)) == 0


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 20, 150])
def test_ascents_count_pairs_below_the_diagonal(size):
    """Against the triple loop, on whole numbers that tie often."""
    x = torch.randint(-2, 3, (size, 3), generator=torch.Generator().manual_seed(size))
    rows = x @ x.T
    expected = sum(
        bool(rows[i, j] < rows[i, k]) for i in range(size) for k in range(i) for j in range(k)
    )
    assert int(ascents(x.double())) == expected


@pytest.mark.parametrize("n_ctx", [3, 10, 40])
def test_the_ideal_cosine_matrix_scores_one(n_ctx):
    """cos = sqrt(min/max) grows towards the query everywhere: both scores are exactly 1."""
    prefixes = torch.ones(n_ctx, n_ctx, dtype=torch.float64).tril()  # row m: m ones
    m = torch.arange(1, n_ctx + 1, dtype=torch.float64)
    ideal = (torch.minimum(m[:, None], m) / torch.maximum(m[:, None], m)).sqrt()
    unit = prefixes / prefixes.norm(dim=-1, keepdim=True)
    assert (gram(unit[None])[0] - ideal).abs().max() <= ROUNDING
    for name in ("adjacency_score", "adjacency_score.steps"):
        assert estimate(prefixes[None], ask(name, STREAM, n_ctx, n_ctx * 2)) == 1
    norm = ask("adjacency_score.norm", STREAM, n_ctx, n_ctx * 2)
    assert estimate(prefixes[None], norm) == 0  # norms sqrt(m) grow
    assert estimate(prefixes.flip(0)[None], norm) == 1


@pytest.mark.parametrize(
    "observable", ["adjacency_score", "adjacency_score.steps", "adjacency_score.norm"]
)
def test_noise_scores_one_half(observable):
    """Independent vectors have no order: 1/2 to 5 standard errors over 2000 draws."""
    question = ask(observable, STREAM, n_ctx=8, d_model=4)
    value = value_at(STREAM, 2000, 8, 4, seed=9)
    draws = STATISTICS[observable].components(value, question).numpy().ravel()
    assert abs(draws.mean() - 0.5) <= 5 * draws.std() / math.sqrt(len(draws))


@pytest.mark.parametrize("observable", SCALE_FREE)
def test_a_zero_vector_has_cosine_zero(observable):
    """A dead ReLU layer is no failure: its vector is like no other, and nothing is undefined."""
    value, question = value_at(STREAM), ask(observable, STREAM)
    value[:, 2] = 0.0
    found = STATISTICS[observable].components(value, question)
    assert found.isfinite().all()
    if question.kind.shape == "distinct_pairs":
        assert not found[:, 0, 2].any()
        assert not found[:, 0, :, 2].any()


@pytest.mark.parametrize("observable", ["kurtosis", "kernel_cosine"])
def test_gradients_of_ratios_are_derivatives(observable):
    """Against the complex step, which has no truncation error: to 1e-12 of the largest."""
    statistic = STATISTICS[observable]
    question = ask(observable, STREAM)
    mean = statistic.components(value_at(STREAM, 50), question).numpy().mean(0)
    gradient = statistic.gradient(mean)
    assert gradient.shape == mean.shape
    for k in range(len(mean)):
        moved = mean.astype(complex)
        moved[k] += 1e-30j
        derivative = statistic.value(moved).imag / 1e-30
        assert np.abs(gradient[k] - derivative).max() <= ROUNDING * np.abs(derivative).max()


@pytest.mark.parametrize(
    "observable", [name for name in OBSERVABLES if name not in ("kurtosis", "kernel_cosine")]
)
def test_means_are_their_own_value(observable):
    """A statistic of one component has that mean as its value and gradient 1."""
    mean = np.random.default_rng(0).normal(size=(1, 4))
    assert np.array_equal(STATISTICS[observable].value(mean), mean[0])
    assert np.array_equal(STATISTICS[observable].gradient(mean), np.ones((1, 4)))


@pytest.mark.parametrize("d_ff", [3, 6, 11])
def test_single_coordinates_are_those_of_the_place(d_ff):
    """At an MLP's hidden layer the coordinates run to d_ff, not to d_model."""
    question = ask("coordinate_second_moment", "blocks.0.mlp.post", d_ff=d_ff)
    value = randn(3, 5, d_ff)
    found = estimate(value, question)[question.judged]
    assert {coordinate for _, coordinate in question.positions} == set(range(1, d_ff + 1))
    for (m, coordinate), entry in zip(question.positions, found, strict=True):
        expected = float(value[:, m - 1, coordinate - 1].square().mean())
        assert abs(entry - expected) <= ROUNDING * float(value.abs().max()) ** 2


@dataclasses.dataclass(frozen=True)
class Planted:
    """Standard normal weights, except for one wrong number in draw 5 of each query matrix."""

    wrong: float
    variance = 1.0
    kurtosis = 3.0
    path: str = ""

    def law(self, weight, architecture):
        return dataclasses.replace(self, path=weight.path)

    def draw(self, source, shape):
        drawn = source.normal(shape, 1.0)
        if self.path.endswith("W_Q"):
            drawn[5, 0, 0] = self.wrong
        return drawn


def planted(wrong, place, observable):
    points = POINTS.get(observable, ())
    return nope.Question(
        nope.decoder(4, 2, n_ctx=4), Planted(wrong), place, observable, points=points
    )


def failure(question, index):
    """What block number `index` finds: an error as a value, so that other questions go on."""
    (found,) = sampler.block(Group.of(question), [question], index, Conditions())
    assert isinstance(found, FloatingPointError)
    return str(found)


@pytest.mark.parametrize(
    ("observable", "wrong"),
    [(name, wrong) for name in VECTOR for wrong in (math.nan, math.inf)]
    + [(name, 1e30) for name in VECTOR if name not in (*SCALE_FREE, "cdf")],
)
def test_what_is_not_finite_is_an_error_at_vector_places(observable, wrong):
    """The error names observable, place and draw: nothing undefined becomes a number.

    1e30 is finite, but its square overflows float32.
    """
    question = planted(wrong, Q, observable)
    draw = 2 * Group.of(question).block_size + 5
    expected = rf"expected finite {observable} at {Q}, got (nan|-?inf) in draw {draw} at position"
    assert re.match(expected, failure(question, 2))


@pytest.mark.parametrize("observable", PAIR)
def test_what_is_not_finite_is_an_error_at_pair_places(observable):
    """The same for a pattern: a NaN query makes NaN attention."""
    question = planted(math.nan, PATTERN, observable)
    expected = f"expected finite {observable} at {PATTERN}, got nan in draw 5 at position"
    assert failure(question, 0).startswith(expected)


@pytest.mark.parametrize("scale", [2.0**100, 2.0**-100])
@pytest.mark.parametrize("observable", SCALE_FREE)
def test_scale_free_statistics_are_right_or_not_finite_at_any_scale(observable, scale):
    """Where squares leave float32's range the answer may be an error, never another number.

    A power of 2 rounds nothing, so what is finite is what it is at scale 1, to float32's 1e-5.
    """
    question = ask(observable, STREAM)
    value = value_at(STREAM).float()
    components = STATISTICS[observable].components
    expected, found = components(value, question), components(value * scale, question)
    assert not found.isfinite().all() or (found - expected).abs().max() <= 1e-5
