"""Streaming moments: merging any split is the same as having seen all draws at once.

Tolerances are rounding bounds in float64: 1e-12 of (draws x largest value^power), thousands of
units of the last place of the largest sum that could arise.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from montecarlo.moments import Moments

ROUNDING = 1e-12


def plain(draws):
    """Mean and central sums of draws x K x entries, one entry at a time with exact sums."""
    count, K, entries = draws.shape
    mean = np.array([[math.fsum(draws[:, i, e]) / count for e in range(entries)] for i in range(K)])
    second, third = np.zeros((K, K, entries)), np.zeros((K, K, K, entries))
    for e in range(entries):
        d = [[float(draws[n, i, e] - mean[i, e]) for i in range(K)] for n in range(count)]
        for i in range(K):
            for j in range(K):
                second[i, j, e] = math.fsum(x[i] * x[j] for x in d)
                for k in range(K):
                    third[i, j, k, e] = math.fsum(x[i] * x[j] * x[k] for x in d)
    return mean, second, third


def assert_moments(found, draws):
    largest = np.abs(draws).max()
    mean, second, third = plain(draws)
    assert found.count == len(draws)
    for power, one, other in (
        (1, found.mean, mean),
        (2, found.second, second),
        (3, found.third, third),
    ):
        assert one.shape == other.shape
        assert one.dtype == np.float64
        assert np.abs(one - other).max() <= ROUNDING * len(draws) * largest**power


@st.composite
def samples(draw, most=30):
    """Skewed, correlated draws with an offset: draws x K x entries."""
    count, K, entries = (draw(st.integers(1, n)) for n in (most, 3, 3))
    offset, seed = draw(st.sampled_from([0.0, 1.0, -50.0])), draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    return offset + rng.exponential(size=(count, K, entries)) @ rng.normal(size=(entries, entries))


@given(samples())
def test_moments_of_an_array_are_the_plain_sums(draws):
    """`Moments.of` is the mean and the central sums with their cross terms."""
    assert_moments(Moments.of(draws), draws)


@given(samples(), st.data())
def test_merging_any_split_gives_the_moments_of_all_draws(draws, data):
    """However the draws are cut into blocks, of one draw or many, the merge is the whole."""
    cuts = data.draw(st.sets(st.integers(1, len(draws) - 1))) if len(draws) > 1 else set()
    parts = [Moments.of(part) for part in np.split(draws, sorted(cuts))]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert_moments(merged, draws)


@given(samples())
def test_merging_draw_by_draw_gives_the_moments_of_all_draws(draws):
    """The extreme split: a block per draw."""
    merged = Moments.of(draws[:1])
    for n in range(1, len(draws)):
        merged = merged.merge(Moments.of(draws[n : n + 1]))
    assert_moments(merged, draws)


@given(samples(), samples(), st.integers(0, 2**31))
def test_merging_is_symmetric(one, two, seed):
    """Which side comes first matters only to rounding."""
    shape = np.minimum(one.shape, two.shape)[1:]
    a, b = (x[:, : shape[0], : shape[1]] for x in (one, two))
    both = np.concatenate([a, b])
    assert_moments(Moments.of(a).merge(Moments.of(b)), both)
    assert_moments(Moments.of(b).merge(Moments.of(a)), both)


@given(samples(), st.integers(0, 2**31))
def test_along_is_variance_and_skewness_of_the_combination(draws, seed):
    """`along(g)` is the unbiased variance and the skewness of sum_k g_k x_k, entry by entry."""
    if len(draws) < 3:
        draws = np.concatenate([draws, draws + 1.0, draws**2])
    gradient = np.random.default_rng(seed).normal(size=draws.shape[1:])
    combination = (draws * gradient).sum(1)
    variance, skewness = Moments.of(draws).along(gradient)
    largest = (np.abs(draws) * np.abs(gradient)).sum(1).max()
    rounding = ROUNDING * len(draws) * largest**2
    assert np.abs(variance - combination.var(0, ddof=1)).max() <= rounding
    # the skewness divides by variance^1.5: its rounding grows by the cube of largest/sd
    for e in range(draws.shape[2]):
        sd = combination[:, e].std()
        if sd > 1e-3 * largest:
            expected = stats.skew(combination[:, e])
            assert abs(skewness[e] - expected) <= ROUNDING * len(draws) * (largest / sd) ** 3


def test_one_draw_has_infinite_variance():
    """One draw says nothing of spread: infinite variance, skewness 0, no warning."""
    found = Moments.of(np.array([[[1.0, 2.0]]]))
    variance, skewness = found.along(np.ones((1, 2)))
    assert found.count == 1
    assert np.array_equal(found.mean, [[1.0, 2.0]])
    assert np.array_equal(variance, [np.inf, np.inf])
    assert np.array_equal(skewness, [0.0, 0.0])


def test_two_single_draws_make_a_pair():
    """1 and 3: mean 2, variance 2, skewness 0."""
    one, two = (Moments.of(np.full((1, 1, 1), x)) for x in (1.0, 3.0))
    variance, skewness = one.merge(two).along(np.ones((1, 1)))
    assert (variance[0], skewness[0]) == (2.0, 0.0)


def test_constant_draws_have_no_variance_and_no_skewness():
    """Draws that agree exactly have variance 0 and a defined skewness."""
    variance, skewness = Moments.of(np.full((50, 1, 2), 0.25)).along(np.ones((1, 2)))
    assert not variance.any()
    assert not skewness.any()


def test_float32_draws_are_accumulated_in_float64():
    """A large offset in float32 leaves the variance that the rounded draws have."""
    rng = np.random.default_rng(0)
    draws = (1000 + rng.normal(size=(500, 1, 1))).astype(np.float32)
    variance, _ = Moments.of(draws).along(np.ones((1, 1)))
    expected = draws.astype(np.float64).var(ddof=1)
    assert variance[0] == pytest.approx(expected, rel=ROUNDING * 1000**2)


@given(samples(), st.integers(2, 10**6))
def test_scaled_moments_keep_the_spread_and_the_skewness(draws, count):
    """As if the same draws had been seen again and again, up to the n - 1 of the variance."""
    found = Moments.of(draws)
    scaled = found.scaled(count)
    assert scaled.count == count
    assert np.array_equal(scaled.mean, found.mean)
    again = found.merge(found)
    twice = found.scaled(2 * len(draws))
    for one, other in ((again.second, twice.second), (again.third, twice.third)):
        largest = np.abs(draws).max() + 1
        assert np.abs(one - other).max() <= ROUNDING * len(draws) * largest**3
