"""The confidence sequences miss at no look more often than they say.

Thousands of sequences of draws with a known mean are simulated and looked at on the product's
own schedule, to 10,000 draws.  The number of sequences that any of their intervals misses is
binomial with a rate of at most the stated one; a test fails where so many misses had a chance
below 1e-6.  Below 0.1% the tail of one look is held against the Gaussian's, by importance
sampling from chi-square draws.  These are the last in this file: what a formula tells is quicker.
"""

import functools
import itertools
import math

import numpy as np
import pytest
from scipy import optimize, special, stats

import nope
from montecarlo import confidence
from montecarlo.confidence import boundary, bounded_half_width, half_width, next_look, widening
from montecarlo.evidence import Measurement
from montecarlo.moments import Moments

SEQUENCES = 2000
LAST = 10_000
CHUNK = 64
LEVEL = 1e-6
RATES = (0.05, 0.01, 1e-3)
RESOLUTION = 2.0**-23

DRAWS = {  # name: mean 1 draws of a shape
    "gaussian": lambda rng, shape: 1 + rng.standard_normal(shape),
    "mean of 8 squares": lambda rng, shape: rng.standard_gamma(4, shape) / 4,
    "log-normal": lambda rng, shape: np.exp(rng.standard_normal(shape) - 0.5),
    "fourth power": lambda rng, shape: rng.standard_normal(shape) ** 4 / 3,
    "coin": lambda rng, shape: 2.0 * (rng.random(shape) < 0.5),
    "rare coin": lambda rng, shape: (rng.random(shape) < 0.001) / 0.001,
    "almost sure coin": lambda rng, shape: (rng.random(shape) < 0.95) / 0.95,
}
HIGHEST = {"coin": 2.0, "rare coin": 1 / 0.001, "almost sure coin": 1 / 0.95, "uniform": 2.0}
"""How large one draw can be: what an event not yet seen may change it by."""
BOUNDED = {
    **{name: draw for name, draw in DRAWS.items() if name in HIGHEST},
    "uniform": lambda rng, shape: 2 * rng.random(shape),
}


def looks(first=confidence.FIRST_LOOK):
    """Numbers of draws at which a campaign looks, up to the first past LAST."""
    draws = [first]
    while draws[-1] < LAST:
        draws.append(max(draws[-1] + 1, math.ceil(confidence.LOOK_GROWTH * draws[-1])))
    return draws


def simulate(draw, seed, schedule):
    """At each look: draws, and per sequence the error of the mean, variance and skewness."""
    rng, seen = np.random.default_rng(seed), 0
    sums = np.zeros((3, SEQUENCES))
    for look in schedule:
        while seen < look:
            d = draw(rng, (min(CHUNK, look - seen), SEQUENCES)) - 1
            square = d * d
            sums += [d.sum(0), square.sum(0), np.einsum("ns,ns->s", square, d)]
            seen += len(d)
        one, two, three = sums / seen
        variance = np.maximum(two - one**2, 0)
        variance[variance < 1e-12] = 0  # all draws of a coin alike, up to rounding
        cube = three - 3 * one * two + 2 * one**3
        skewness = np.divide(cube, variance**1.5, out=np.zeros(SEQUENCES), where=variance > 0)
        yield seen, one, variance * seen / max(1, seen - 1), skewness


def ever_missed(draw, width, seed=0, schedule=None, rates=RATES):
    """How many sequences had an interval that missed the mean, at each error rate."""
    missed = np.zeros((len(rates), SEQUENCES), dtype=bool)
    for draws, error, variance, skewness in simulate(draw, seed, schedule or looks()):
        for k, rate in enumerate(rates):
            missed[k] |= np.abs(error) > width(draws, 1 + error, variance, skewness, rate)
    return missed.sum(1)


def chance(misses, error_rate):
    """The chance of so many misses or more if each sequence misses with `error_rate`."""
    return stats.binom.sf(misses - 1, SEQUENCES, error_rate)


def asymptotic(draws, mean, variance, skewness, rate, size=None):
    return half_width(draws, variance, skewness, rate, size or np.abs(mean), RESOLUTION)


@pytest.mark.parametrize(("draws", "z"), [(2, 2.0), (64, 4.5), (1000, 6.0)])
def test_students_quantile_has_the_gaussians_tail(draws, z):
    """Of n draws it has n - 1 degrees of freedom."""
    assert confidence.student(draws, z) == pytest.approx(stats.t.isf(stats.norm.sf(z), draws - 1))


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


@pytest.mark.parametrize("error_rate", [0.01, 1e-4, 1e-9])
def test_the_boundary_is_lowest_where_it_is_tuned(error_rate):
    """At 256 draws, up to the next order of its r."""
    n = np.arange(64, 1024)
    lowest = n[np.argmin([boundary(k, error_rate) for k in n])]
    assert lowest == pytest.approx(256, rel=0.03)


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
    widths = [width_at(100, skewness=s) for s in (0.0, 0.2, 0.5, 100.0)]
    assert widths == sorted(widths)
    assert len(set(widths)) == 4
    assert width_at(100, skewness=-0.5) == widths[2]
    assert widths[-1] == math.inf
    assert math.isfinite(width_at(10**7, skewness=100.0))


@pytest.mark.parametrize("epsilon", [0.01, 0.03, 0.1])
def test_the_widening_restores_the_exponent(epsilon):
    """r^2 - 2 e r^3/3 = 1 to the order stated, what is left being 8 e^3/27 of 2 r."""
    draws, z = 10**6, 3.0
    r = float(widening(z, draws, np.array(epsilon * math.sqrt(draws) / z)))
    exact = optimize.brentq(lambda x: x**2 - 2 / 3 * epsilon * x**3 - 1, 1, 1.3)
    assert exact - r == pytest.approx(8 / 27 * epsilon**3, rel=6 * epsilon)


@pytest.mark.parametrize("z", [3.0, 5.0, 7.0])
def test_the_wait_is_longer_deeper_in_the_tail(z):
    """Finite up to exp(8 z^2 e^3/27) = 1.2 and not beyond."""
    edge = (27 / 8 * math.log(1.2) / z**2) ** (1 / 3) * math.sqrt(100) / z
    assert np.isfinite(widening(z, 100, np.array([0.999 * edge, -0.999 * edge]))).all()
    assert np.isinf(widening(z, 100, np.array([1.001 * edge, -1.001 * edge]))).all()


@pytest.mark.parametrize("skewness", [-0.5, 0.5, 1.0])
def test_skewed_draws_have_an_interval_as_much_wider(skewness):
    wider = widening(boundary(1000, 0.01), 1000, np.array(skewness))
    assert width_at(1000, skewness=skewness) == pytest.approx(wider * width_at(1000))


@pytest.mark.parametrize("draws", [0, 1])
def test_fewer_than_two_draws_say_nothing(draws):
    """The interval is infinite."""
    assert width_at(draws) == math.inf
    assert math.isfinite(width_at(2))


@pytest.mark.parametrize("variance", [0.0, (RESOLUTION * 40) ** 2])
def test_constant_draws_wait_for_what_they_may_have_missed(variance):
    """Draws that agree to rounding: an event of the draws' size and chance log(1/a)/n."""
    for draws in (64, 10**4):
        expected = 3.0 * math.log(1 / 0.01) / draws
        assert width_at(draws, variance, size=3.0) == pytest.approx(expected, rel=1e-12)
        assert (1 - expected / 3) ** draws <= 0.01  # such an event shows up with chance 99%


def test_draws_that_differ_by_more_than_rounding_are_not_the_same():
    """By 100 units of the last place of their size."""
    spread = 100 * RESOLUTION * 3
    assert width_at(64, spread**2, size=3.0) == pytest.approx(spread * width_at(64))


def test_one_draw_has_no_variance_and_an_exact_interval():
    found = bounded_half_width(1, np.array(0.5), np.array(np.nan), (0.0, 1.0), 0.01)
    assert float(found) == 0.5


def capital(draws, mean, stake, high=1.0):
    """What betting `stake` on a lower mean than `mean` has made of 1, for draws in [0, high]."""
    return np.prod(1 + stake * (mean - draws) / (high - mean))


@pytest.mark.parametrize("seed", range(5))
def test_the_exact_interval_ends_where_a_bet_has_won(seed):
    """Just beyond the end a stake's bound on its capital, draw by draw, has passed 2/(w alpha)."""
    rng = np.random.default_rng(seed)
    x, rate = rng.beta(2, 3, size=200), 1e-3
    far = max(x.mean(), 1 - x.mean())  # the larger radius is on the side of the further bound
    y = x if far == 1 - x.mean() else 1 - x
    half = float(bounded_half_width(200, x.mean(), x.var(ddof=1), (0.0, 1.0), rate))

    def won(mean):
        xi = (mean - y) / (1 - mean)
        psi = -np.log1p(-confidence.STAKES) - confidence.STAKES
        logs = confidence.STAKES * xi.sum() - psi * (xi**2).sum()
        assert all(  # the inequality that makes it a bet
            log <= np.log(capital(y, mean, stake)) + 1e-9
            for log, stake in zip(logs, confidence.STAKES, strict=True)
        )
        return (np.exp(logs) * confidence.CAPITAL).max() * rate / 2

    assert won(y.mean() + half * 1.001) > 1
    assert won(y.mean() + half * 0.999) < 1


def test_the_bets_spend_no_more_than_they_have():
    """Together the stakes are laid with a capital below 1, each between 0 and 1."""
    assert 0.9 < confidence.CAPITAL.sum() <= 1
    assert ((confidence.STAKES > 0) & (confidence.STAKES < 1)).all()


@pytest.mark.parametrize("draws", [1, 256, 10**4])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_exact_intervals_of_equal_draws_know_what_may_hide(draws, mean):
    """All draws at one bound: (1 - r)^n <= alpha/2 for what is excluded; at most 40% more."""
    found = float(bounded_half_width(draws, np.array(mean), np.array(0.0), (0.0, 1.0), 1e-3))
    least = 1 - (1e-3 / 2) ** (1 / draws)
    assert least <= found <= min(1.0, 1.4 * math.log(2 / 1e-3) / draws)


@pytest.mark.parametrize(("draws", "most"), [(1024, 1.4), (16384, 1.2), (10**6, 1.1)])
def test_exact_intervals_adapt_to_the_variance(draws, most):
    """For a deviation of a tenth of the range, and 1e-5, not much wider than the asymptotic."""
    exact = float(bounded_half_width(draws, np.array(0.5), np.array(0.01), (0.0, 1.0), 1e-5))
    assert 0.9 < exact / (0.1 * boundary(draws, 1e-5) / math.sqrt(draws)) < most


@pytest.mark.parametrize(("scale", "low"), [(2.0, -1.0), (1e-6, 0.0), (1e6, 0.0)])
def test_bounds_scale_and_shift(scale, low):
    """[-1, 1] is [0, 1] doubled and shifted."""
    mean, variance = np.array([0.1, 0.9]), np.array([0.04, 0.01])
    unit = bounded_half_width(500, mean, variance, (0.0, 1.0), 0.01)
    bounds = (low, scale + low)
    moved = bounded_half_width(500, scale * mean + low, scale**2 * variance, bounds, 0.01)
    assert moved == pytest.approx(scale * unit, rel=1e-9)


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


@pytest.mark.parametrize("observable", ["past_permutation", "cosine", "adjacency_score"])
def test_what_is_bounded_can_be_judged_exactly(observable):
    """Events always are, other bounded observables when asked; the rest has no such interval."""
    rng = np.random.default_rng(0)
    event = observable == "past_permutation"
    first = (rng.random((300, 1, 1)) < 0.3) if event else rng.uniform(0.2, 0.4, (300, 1, 1))
    draws = np.concatenate([first, rng.random((300, 1, 1))], 1) if event else first
    measured = Measurement(question(observable), Moments.of(draws))
    bounds = measured.question.kind.bounds
    spread = first.astype(float).var(0, ddof=1)[0]
    exact = bounded_half_width(300, first.mean(0)[0], spread, bounds, 0.01)
    assert measured.half_width(0.01, exact=True) == pytest.approx(exact)
    assert (measured.half_width(0.01) == measured.half_width(0.01, exact=True)).all() == event
    other = Measurement(question("second_moment"), Moments.of(first))
    assert other.half_width(0.01) == other.half_width(0.01, exact=True)


def test_the_skewness_of_a_ratio_counts_its_bend():
    """Kurtosis, a = (1/v^2, -2 f/v^3): gamma of a'x plus 3/2 a'S H S a/sd^3, H written out."""
    x = np.random.default_rng(0).standard_normal((5000, 8))
    draws = np.stack([(x**4).mean(1), (x**2).mean(1)], 1)
    (f, v), S = draws.mean(0), np.cov(draws.T)
    a, H = np.array([1 / v**2, -2 * f / v**3]), np.array([[0, -2], [-2, 6 * f / v]]) / v**3
    sd = math.sqrt(a @ S @ a)
    skewness = stats.skew(draws @ a) + 1.5 * (a @ S @ H @ S @ a) / sd**3
    measured = Measurement(question("kurtosis"), Moments.of(draws[..., None]), "float64")
    expected = half_width(5000, sd**2, np.array([skewness]), 0.05, np.array([3.0]), 1e-16)
    assert np.isfinite(expected).all()
    assert measured.half_width(0.05) == pytest.approx(expected, rel=1e-5)
    plain = half_width(5000, sd**2, stats.skew(draws @ a), 0.05, np.array([3.0]), 1e-16)
    assert abs(expected[0] / plain - 1) > 1e-3


def test_looks_grow_geometrically_and_start_at_the_first():
    """The first look is at FIRST_LOOK; each later one is 5% on, rounded up."""
    draws = [next_look(0)]
    for _ in range(100):
        draws.append(next_look(draws[-1]))
    assert draws[0] == confidence.FIRST_LOOK
    for before, after in itertools.pairwise(draws):
        assert 1.05 * before <= after + 1e-9 <= 1.05 * before + 1 + 1e-9


# ----------------------------------------------------------------------- simulated


@pytest.mark.parametrize("name", DRAWS)
def test_no_look_misses_more_often_than_stated(name):
    """Over all looks together the intervals miss in at most 5%, 1% and 0.1% of sequences."""
    width = functools.partial(asymptotic, size=HIGHEST.get(name))
    for misses, rate in zip(ever_missed(DRAWS[name], width), RATES, strict=True):
        assert chance(misses, rate) >= LEVEL


@pytest.mark.parametrize("name", BOUNDED)
def test_bounded_draws_are_never_missed_more_often_than_stated(name):
    """The exact sequence, from the very first draw on, whatever the draws are."""

    def width(draws, mean, variance, skewness, rate):
        return bounded_half_width(draws, mean, variance, (0.0, HIGHEST[name]), rate)

    found = ever_missed(BOUNDED[name], width, schedule=looks(first=1))
    for misses, rate in zip(found, RATES, strict=True):
        assert chance(misses, rate) >= LEVEL


def student(draws, mean, variance, skewness, rate):
    """Student's interval at one look."""
    return stats.t.isf(rate / 2, draws - 1) * np.sqrt(variance / draws)


def unwidened(draws, mean, variance, skewness, rate):
    """The normal mixture, without a word on skewness and on draws that agree."""
    return boundary(draws, rate) * np.sqrt(variance / draws)


@pytest.mark.parametrize(
    ("width", "name", "rate"),
    [
        (student, "gaussian", 0.05),
        (unwidened, "almost sure coin", 0.01),
        (unwidened, "log-normal", 0.01),
        (unwidened, "log-normal", 1e-3),
    ],
)
def test_the_simulation_finds_what_each_correction_is_for(width, name, rate):
    """Intervals for one look, and the mixture alone on skewed or rare draws, fail the same test."""
    (misses,) = ever_missed(DRAWS[name], width, rates=(rate,))
    assert chance(misses, rate) < LEVEL


@pytest.mark.parametrize("name", ["gaussian", "mean of 8 squares", "coin"])
def test_intervals_are_of_use(name):
    """At the last look all are finite and at most twice as wide as a one-look interval."""
    *_, (draws, _, variance, skewness) = simulate(DRAWS[name], 1, [LAST // 5])
    found = half_width(draws, variance, skewness, 0.01, np.ones(SEQUENCES), RESOLUTION)
    assert (found <= 2 * stats.norm.isf(0.005) * np.sqrt(variance / draws)).all()


# ------------------------------------------------------------------------ the far tail


def tail_ratio(shape, draws, error_rate, widened, samples=20_000):
    """P(the upper end lies below the mean) of gamma draws, over the Gaussian tail; standard error.

    Importance sampling from the gamma law that is nearest to the draws' own (in relative entropy)
    among those whose mean lies just so far below.
    """
    z = boundary(draws, error_rate)
    quantile = stats.t.isf(stats.norm.sf(z), draws - 1)
    factor = 1 + 2 / np.sqrt(shape) * z / np.sqrt(draws) / 3 if widened else 1.0

    def scale_of(k):
        return 1 / (k + quantile * factor * np.sqrt(k / draws))

    def entropy(k):
        s = scale_of(k)
        away = (k - shape) * special.digamma(k) - special.gammaln(k) + special.gammaln(shape)
        return away - shape * np.log(shape * s) + k * (s * shape - 1)

    k = optimize.minimize_scalar(entropy, (shape, 1.1 * shape)).x
    x = np.random.default_rng(0).gamma(k, scale_of(k), (samples, draws))
    target = stats.gamma(shape, scale=1 / shape).logpdf(x)
    weight = np.exp((target - stats.gamma(k, scale=scale_of(k)).logpdf(x)).sum(1))
    variance, skewness = x.var(1, ddof=1), stats.skew(x, axis=1)
    wide = widening(z, draws, skewness) if widened else 1.0
    hit = x.mean(1) + quantile * wide * np.sqrt(variance / draws) < 1
    found = weight * hit / stats.norm.sf(z)
    return found.mean(), found.std() / np.sqrt(samples)


@pytest.mark.parametrize(
    ("shape", "draws", "error_rate"), [(4, 256, 1e-6), (4, 512, 1e-9), (64, 256, 1e-6)]
)
def test_far_tails_are_nearly_gaussian(shape, draws, error_rate):
    """Mean squares at d = 8 and 128: one look's tail is at most 1.7 times the Gaussian's.

    Student's quantile alone is off by far more.
    """
    ratio, error = tail_ratio(shape, draws, error_rate, widened=True)
    assert error < 0.1
    assert 0.3 < ratio <= 1.7 + 5 * error
    plain, error = tail_ratio(shape, draws, error_rate, widened=False)
    assert plain > 2 + 5 * error
