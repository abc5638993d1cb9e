"""A plan keeps its word: verdicts fall by the draws it names, and what it says is seen is seen.

Its promise is a chance of `POWER` per run; a test fails where so few of 2,000 runs kept it that
this had a chance below 1e-6.
"""

import math

import numpy as np
import pytest
from scipy import stats

import montecarlo
import nope
from montecarlo import Measurement, Target
from montecarlo import exponent as exponent_of
from montecarlo.confidence import next_look
from montecarlo.memory import block_bytes, require_memory
from montecarlo.moments import Moments
from montecarlo.plan import POWER, draws_needed
from montecarlo.rates import exponent_of_gaps
from montecarlo.sampler import Conditions, Group

RUNS = 2000
D_MODEL = 8
BAND = 0.1
QUESTION = nope.Question(
    nope.decoder(D_MODEL, 2, n_ctx=1), nope.init.normal(1.0), "blocks.0.attn.q", "second_moment"
)


def mean_squares(rng, shape):
    return 2 / D_MODEL * rng.standard_gamma(D_MODEL / 2, shape)


def pilot(draws=20_000):
    rng = np.random.default_rng(1)
    return Measurement(QUESTION, Moments.of(mean_squares(rng, (draws, 1, 1))), "float64")


PLAN = montecarlo.plan(QUESTION, BAND, 0.01, pilot())


def kept(verdict, low, high, draws):
    """How many runs had the verdict by a number of draws, looked at on the usual schedule."""
    rng, seen, known = np.random.default_rng(7), 0, None
    ends = [np.full(RUNS, end) for end in (low, high)]
    asked = Target(QUESTION, *ends, 0.005, 0.005 * RUNS)
    fallen = np.zeros(RUNS, dtype=bool)
    while seen < draws:
        count = min(next_look(seen), math.ceil(draws)) - seen
        block = Moments.of(mean_squares(rng, (count, 1, RUNS)))
        known = block if known is None else known.merge(block)
        seen += count
        fallen |= getattr(asked, verdict)(Measurement(QUESTION, known, "float64"))
    return int(fallen.sum())


def plausible(successes):
    """Whether so few successes are no surprise if each has a chance of `POWER`."""
    return stats.binom.cdf(successes, RUNS, POWER) >= 1e-6


def test_right_claims_are_confirmed_by_the_draws_of_the_plan():
    """With the truth in the middle; and a fifth of the draws is too few."""
    assert plausible(kept("inside", 1 - BAND, 1 + BAND, PLAN.draws))
    assert not plausible(kept("inside", 1 - BAND, 1 + BAND, PLAN.draws / 5))


def test_detectable_errors_are_found():
    """A truth that far above the middle of the band is REFUTED; half as far outside is not."""
    draws = 1000
    error = PLAN.detectable(draws)
    assert error > BAND
    found = kept("outside", 1 - error - BAND, 1 - error + BAND, draws)
    assert plausible(found)
    nearer = BAND + (error - BAND) / 2
    assert not plausible(kept("outside", 1 - nearer - BAND, 1 - nearer + BAND, draws))


def test_narrower_and_surer_takes_more():
    """More draws for half the band (nearly four times) and for a lower error rate."""
    half = montecarlo.plan(QUESTION, BAND / 2, 0.01, pilot())
    assert 3.5 < half.draws / PLAN.draws < 4.5
    assert montecarlo.plan(QUESTION, BAND, 1e-6, pilot()).draws > PLAN.draws
    assert PLAN.detectable(4000) < PLAN.detectable(1000)


def test_a_plan_makes_its_own_pilot():
    """Real layers: E q^2 = 8, Var = 2/8 of its square per draw, so about 4 (z/0.1)^2/16 draws."""
    found = montecarlo.plan(QUESTION, BAND, 0.01)
    assert found.pilot.mean == pytest.approx([D_MODEL], rel=0.1)
    assert found.draws == pytest.approx(PLAN.draws, rel=0.3)


def test_what_is_outside_is_refuted_by_fewer_draws_the_further_it_is():
    """Draws to a verdict as a function of where the truth lies; infinite on the edge."""
    low, high = np.array([1 - BAND]), np.array([1 + BAND])
    target = Target(QUESTION, low, high, 0.005, 0.005)
    needed = [
        draws_needed(target, pilot(), np.array([truth])) for truth in (1.0, 1.05, 1.1, 1.15, 1.5)
    ]
    assert needed[0] < needed[1] < needed[2] == math.inf
    assert needed[2] > needed[3] > needed[4]
    nowhere = Target(QUESTION, np.array([-np.inf]), np.array([np.inf]), 0.1, 0.1)
    assert draws_needed(nowhere, pilot(), np.array([1.0])) == math.inf


def test_exact_intervals_are_planned_as_such():
    """Cosines within 2.5%: at least 2 log(2/alpha)/.025 draws where exactness is asked for."""
    question = nope.Question(
        nope.decoder(256, 4, n_ctx=2), nope.init.normal(0.05), "blocks.0.attn.v", "cosine"
    )
    rng = np.random.default_rng(0)
    known = Measurement(question, Moments.of(rng.normal(0, 0.02, (256, 1, 2, 2))))
    plain, exact = (montecarlo.plan(question, 0.025, 1e-4, known, exact=e) for e in (False, True))
    assert plain.draws < math.log(2 / 5e-5) / 0.025 < exact.draws


@pytest.mark.parametrize("band", [0.0, -1.0, math.nan, math.inf])
def test_bands_that_cannot_be_are_refused(band):
    with pytest.raises(ValueError, match="expected band to be a finite positive number"):
        montecarlo.plan(QUESTION, band, pilot=pilot(64))


def test_bands_within_rounding_are_refused():
    """In float32 with float64 as the remedy, which can; a band of no width asks for a value."""
    single = Measurement(QUESTION, pilot(64).moments, "float32")
    with pytest.raises(ValueError, match=r"half-width of at least .* of float32.*use float64"):
        montecarlo.plan(QUESTION, 1e-7, pilot=single)
    assert montecarlo.plan(QUESTION, 1e-7, pilot=pilot(64)).draws > 1e12
    with pytest.raises(ValueError, match=r"of float64.*widen the band"):
        montecarlo.plan(QUESTION, 1e-16, pilot=pilot(64))
    point = Target(QUESTION, np.array([1.0]), np.array([1.0]), 0.1, 0.1)
    point.require_reachable("float32")


def test_blocks_that_do_not_fit_are_refused():
    """Estimated before anything is drawn: a petabyte is no block."""
    huge = nope.Question(
        nope.decoder(2**24, 1, n_ctx=2), nope.init.normal(1.0), "blocks.0.attn.q", "second_moment"
    )
    group = Group.of(huge)
    assert block_bytes(group, "float64") == 2 * block_bytes(group, "float32")
    assert block_bytes(group, "float32") >= 4 * 4 * 2**48
    with pytest.raises(MemoryError, match=r"expected blocks that fit into .*use smaller sizes"):
        require_memory([Group.of(QUESTION), group], Conditions(device="cpu"))
    with pytest.raises(MemoryError, match="fewer workers"):
        require_memory([Group.of(QUESTION)], Conditions(device="cpu"), workers=10**6)
    require_memory([Group.of(QUESTION)], Conditions(device="cpu"))


# ------------------------------------------------------------------------------- rates


def gap_measurement(rng, gap, draws=4000, runs=1):
    return Measurement(
        QUESTION, Moments.of(2 + gap + rng.normal(0, 0.2, (draws, 1, runs))), "float64"
    )


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_lies_in_its_interval(power):
    """Gaps 3 d^-p at d = 2, 4, 8: p is missed by at most 5% of runs, and known to a few tenths."""
    rng, widths = np.random.default_rng(3), (2, 4, 8)
    measured = [gap_measurement(rng, 3 * d**-power, runs=RUNS) for d in widths]
    low, high = exponent_of(widths, measured, [np.full(RUNS, 2.0)] * 3, 0.05)
    missed = ((low > power) | (high < power)).sum()
    assert stats.binom.sf(missed - 1, RUNS, 0.05) >= 1e-6
    assert np.median(high - low) < 0.8
    assert ((low > power + 1) | (high < power - 1)).mean() < 0.05


def test_what_is_no_power_has_an_empty_interval():
    """Gaps 1, 1/2 and 1/2 again, known to 1%; with two widths there is always a power."""
    gaps = np.array([1.0, 0.5, 0.5])
    low, high = exponent_of_gaps([1, 2, 4], 0.99 * gaps, 1.01 * gaps)
    assert low > high
    low, high = exponent_of_gaps([1, 2], 0.99 * gaps[:2], 1.01 * gaps[:2])
    assert low < 1 < high


def test_a_pair_of_ends_is_the_whole_of_what_is_known():
    """The interval is the set of p for which some C fits every width (linear programming)."""
    from scipy.optimize import linprog

    widths, gaps = np.array([3.0, 5.0, 16.0, 40.0]), np.array([1.0, 0.62, 0.2, 0.07])
    low, high = exponent_of_gaps(widths, 0.9 * gaps, 1.1 * gaps)
    rows = np.stack([np.ones(4), -np.log(widths)], 1)
    A, b = np.concatenate([rows, -rows]), np.log(np.concatenate([1.1 * gaps, 1 / (0.9 * gaps)]))
    ends = [linprog([0, s], A, b, bounds=(None, None)).x[1] for s in (1, -1)]
    assert [low, high] == pytest.approx(ends)


def test_a_gap_that_may_be_zero_leaves_the_exponent_open():
    """No end above where the gap at the larger width is not told from 0."""
    rng = np.random.default_rng(0)
    measured = [gap_measurement(rng, gap) for gap in (1.0, 0.0)]
    low, high = exponent_of((16, 64), measured, [np.array([2.0])] * 2, 0.01)
    assert 0 < low < high == np.inf


@pytest.mark.parametrize("widths", [(16,), (64, 16), (16, 16), (0, 16)])
def test_widths_that_give_no_rate_are_refused(widths):
    rng = np.random.default_rng(0)
    measured = [gap_measurement(rng, 1.0)] * len(widths)
    with pytest.raises(ValueError, match="expected two widths or more, rising"):
        exponent_of(widths, measured, [np.array([2.0])] * len(widths), 0.01)
