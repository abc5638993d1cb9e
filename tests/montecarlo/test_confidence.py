"""The confidence sequence misses at no look more often than it says.

Thousands of sequences of draws with a known mean are simulated and looked at on the product's
own schedule.  The number of sequences that any of their intervals misses is binomial with a
rate of at most the stated one; the test fails where so many misses had a chance below 1e-4.
"""

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

import nope
from montecarlo import confidence
from montecarlo.confidence import boundary, half_width, next_look
from montecarlo.evidence import Measurement
from montecarlo.moments import Moments

SEQUENCES = 3000
LAST = 2000
LEVEL = 1e-4
RESOLUTION = 2.0**-23

DRAWS = {  # name: mean 1 draws of a shape
    "gaussian": lambda rng, shape: 1 + rng.standard_normal(shape),
    "mean of 8 exponentials": lambda rng, shape: rng.standard_gamma(8, shape) / 8,
    "mean of 8 squares": lambda rng, shape: rng.standard_gamma(4, shape) / 4,
    "coin": lambda rng, shape: 2.0 * (rng.random(shape) < 0.5),
    "rare coin": lambda rng, shape: (rng.random(shape) < 0.05) / 0.05,
    "almost sure coin": lambda rng, shape: (rng.random(shape) < 0.95) / 0.95,
}
SIZE = {"coin": 2.0, "rare coin": 1 / 0.05, "almost sure coin": 1 / 0.95}
"""How large one draw of a coin can be: what an event not yet seen may change it by."""


def looks():
    """Numbers of draws at which a campaign looks, up to the first past LAST."""
    draws = [next_look(0)]
    while draws[-1] < LAST:
        draws.append(next_look(draws[-1]))
    return draws


def simulate(draw, seed):
    """At each look: draws, and per sequence the error of the mean, variance and skewness."""
    rng, seen = np.random.default_rng(seed), 0
    sums = np.zeros((3, SEQUENCES))
    for look in looks():
        d = draw(rng, (look - seen, SEQUENCES)) - 1
        sums += [(d**power).sum(0) for power in (1, 2, 3)]
        seen = look
        one, two, three = sums / seen
        variance = np.maximum(two - one**2, 0)
        variance[variance < 1e-12] = 0  # all draws of a coin alike, up to rounding
        cube = three - 3 * one * two + 2 * one**3
        skewness = np.divide(cube, variance**1.5, out=np.zeros(SEQUENCES), where=variance > 0)
        yield seen, one, variance * seen / (seen - 1), skewness


def ever_missed(name, width, seed=0):
    """How many sequences had an interval that missed the mean."""
    missed = np.zeros(SEQUENCES, dtype=bool)
    for draws, error, variance, skewness in simulate(DRAWS[name], seed):
        size = SIZE.get(name, np.abs(1 + error))
        missed |= np.abs(error) > width(draws, variance, skewness, size)
    return int(missed.sum())


def chance(misses, error_rate):
    """The chance of so many misses or more if each sequence misses with `error_rate`."""
    return stats.binom.sf(misses - 1, SEQUENCES, error_rate)


@pytest.mark.parametrize("error_rate", [0.05, 0.01])
@pytest.mark.parametrize("name", DRAWS)
def test_no_look_misses_more_often_than_stated(name, error_rate):
    """Over all looks together the intervals miss in at most the stated share of sequences."""

    def width(draws, variance, skewness, size):
        return half_width(draws, variance, skewness, error_rate, size, RESOLUTION)

    assert chance(ever_missed(name, width), error_rate) >= LEVEL


def test_the_simulation_finds_intervals_that_may_be_looked_at_only_once():
    """Student's interval at 5%, looked at again and again, fails the same test."""

    def width(draws, variance, skewness, size):
        return stats.t.isf(0.025, draws - 1) * np.sqrt(variance / draws)

    assert chance(ever_missed("gaussian", width), 0.05) < LEVEL


def test_the_simulation_finds_a_missing_correction_for_few_draws():
    """Without the wait for rare events, draws that happen to agree decide wrongly."""

    def width(draws, variance, skewness, size):
        return boundary(draws, 0.01) * np.sqrt(variance / draws)

    assert chance(ever_missed("rare coin", width), 0.01) < LEVEL


@pytest.mark.parametrize("name", ["gaussian", "mean of 8 exponentials", "coin"])
def test_intervals_are_of_use(name):
    """At the last look all are finite and at most twice as wide as a one-look interval."""
    *_, (draws, _, variance, skewness) = simulate(DRAWS[name], seed=1)
    found = half_width(draws, variance, skewness, 0.01, np.ones(SEQUENCES), RESOLUTION)
    assert (found <= 2 * stats.norm.isf(0.005) * np.sqrt(variance / draws)).all()


@pytest.mark.parametrize("error_rate", [0.05, 1e-3, 1e-6])
def test_the_boundary_is_robbins_mixture(error_rate):
    """At S = z_n sqrt(n) one and the same mixture martingale is 1/error_rate, for every n.

    M_n = exp(S^2 r / (2 (1 + n r))) / sqrt(1 + n r), whose chance of ever reaching
    1/error_rate is at most error_rate (Ville).
    """

    def log_martingale(r, n):
        square = boundary(n, error_rate) ** 2 * n
        return square * r / (2 * (1 + n * r)) - np.log1p(n * r) / 2

    target = math.log(1 / error_rate)
    # At n r >> 1 the martingale falls with r: one root, the mixture's r.
    r = optimize.brentq(lambda r: log_martingale(r, 10**6) - target, 1e-3, 1.0, xtol=1e-16)
    for n in (1, 2, 10, 64, 500, 10**4):
        assert log_martingale(r, n) == pytest.approx(target, rel=1e-9)


@pytest.mark.parametrize("draws", [2, 64, 1000, 10**6])
def test_the_boundary_rises_as_the_error_rate_falls(draws):
    """Surer is wider, and always wider than the normal quantile of one look."""
    rates = [0.2, 0.05, 1e-2, 1e-4, 1e-8]
    found = [boundary(draws, rate) for rate in rates]
    assert found == sorted(found)
    assert len(set(found)) == len(found)
    assert all(z > stats.norm.isf(rate / 2) for z, rate in zip(found, rates, strict=True))


@pytest.mark.parametrize("error_rate", [0.05, 1e-3, 1e-8])
def test_the_interval_shrinks_with_draws(error_rate):
    """z_n / sqrt(n) falls with every draw, and to nothing."""
    n = [2, 3, 10, 64, 65, 256, 1000, 10**6, 10**9]
    widths = [boundary(k, error_rate) / math.sqrt(k) for k in n]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 1e-3


def width_at(draws, variance=1.0, skewness=0.0, error_rate=0.01, size=1.0):
    one = (np.array([x]) for x in (variance, skewness, size))
    spread, skew, magnitude = one
    return float(half_width(draws, spread, skew, error_rate, magnitude, RESOLUTION)[0])


def test_the_interval_allows_for_an_estimated_deviation():
    """Wider than with a known deviation at 64 draws, the same at a million."""
    assert width_at(64) > 1.01 * boundary(64, 0.01) / 8
    assert width_at(10**6) == pytest.approx(boundary(10**6, 0.01) / 1000, rel=1e-4)


def test_skewness_widens_and_then_forbids():
    """More skew is wider, whatever its sign; where the expansion means little, infinite."""
    widths = [width_at(100, skewness=s) for s in (0.0, 0.5, 1.0, 100.0)]
    assert widths == sorted(widths)
    assert len(set(widths)) == 4
    assert width_at(100, skewness=-0.5) == widths[1]
    assert widths[-1] == math.inf
    assert math.isfinite(width_at(10**7, skewness=100.0))


@pytest.mark.parametrize("draws", [0, 1])
def test_fewer_than_two_draws_say_nothing(draws):
    """The interval is infinite."""
    assert width_at(draws) == math.inf


@pytest.mark.parametrize("variance", [0.0, (RESOLUTION * 3) ** 2])
def test_constant_draws_wait_for_what_they_may_have_missed(variance):
    """Draws that agree to rounding: an event of the draws' size and chance log(1/a)/n."""
    for draws in (64, 10**4):
        expected = 3.0 * math.log(1 / 0.01) / draws
        assert width_at(draws, variance, size=3.0) == pytest.approx(expected, rel=1e-12)
        assert (1 - expected / 3) ** draws <= 0.01  # such an event shows up with chance 99%


def question(observable, n_ctx=3):
    return nope.Question(
        nope.decoder(4, 2, n_ctx=n_ctx), nope.init.normal(0.1), "ln_final", observable
    )


@pytest.mark.parametrize("constant", [0.0, 0.5, 1.0])
def test_a_score_that_never_varied_is_not_known_exactly(constant):
    """64 equal shares leave room for a rare event, also where all of them were 0."""
    draws = np.full((64, 1, 1), constant)
    measured = Measurement(question("adjacency_score"), Moments.of(draws))
    assert measured.half_width(0.01)[0] >= (1 - 0.01 ** (1 / 64)) * max(constant, 1 - constant)


def test_looks_grow_geometrically_and_start_at_the_first():
    """The first look is at FIRST_LOOK; each later one is 10% on, rounded up."""
    draws = looks()
    assert draws[0] == confidence.FIRST_LOOK
    for before, after in itertools.pairwise(draws):
        assert 1.1 * before <= after + 1e-9 <= 1.1 * before + 1 + 1e-9
