"""Decisions and measurements as a caller sees them."""

import math

import numpy as np
import pytest

import nope
from montecarlo import Measurement, decide, measure
from montecarlo.campaign import Campaign
from montecarlo.confidence import FIRST_LOOK
from montecarlo.evidence import Target
from montecarlo.moments import Moments
from montecarlo.observables import STATISTICS
from montecarlo.sampler import Conditions, Group, sample

D_MODEL, STD = 16, 0.25
TRUTH = D_MODEL * STD**2
"""E q^2 after LayerNorm with eps 0, whose output has |x|^2 = d exactly."""

Z = 5.0


def query(observable="second_moment", place="blocks.0.attn.q", n_ctx=4, **changes):
    architecture = nope.decoder(D_MODEL, 2, n_ctx=n_ctx, **changes)
    return nope.Question(architecture, nope.init.normal(STD), place, observable)


BLOCK = Group.of(query()).block_size


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_right_prediction_is_confirmed(dtype):
    """The exact value within 2.5% is CONFIRMED, with an interval that holds it."""
    found = decide(query(), 0.975 * TRUTH, 1.025 * TRUTH, dtype=dtype, workers=1)
    assert found.verdict == "CONFIRMED"
    assert (found.low <= TRUTH).all()
    assert (found.high >= TRUTH).all()
    assert found.measurement.draws % BLOCK == 0


@pytest.mark.parametrize("factor", [0.95, 1.05, 2.0])
def test_a_wrong_prediction_is_refuted(factor):
    """5% off, either way, is REFUTED at a tolerance of 2.5%."""
    wrong = factor * TRUTH
    found = decide(query(), 0.975 * wrong, 1.025 * wrong, workers=1)
    assert found.verdict == "REFUTED"


def test_one_wrong_position_refutes():
    """A claim is refuted by one of its positions, and is not confirmed by the others."""
    low, high = np.full(4, 0.9 * TRUTH), np.full(4, 1.1 * TRUTH)
    low[2], high[2] = 1.2 * TRUTH, 1.4 * TRUTH
    found = decide(query(), low, high, workers=1)
    assert found.verdict == "REFUTED"
    assert (found.high < low).tolist() == [False, False, True, False]


def test_entries_with_infinite_bounds_are_not_judged():
    """Nothing is asserted where the bounds are infinite."""
    low, high = np.full(4, -np.inf), np.full(4, np.inf)
    low[0], high[0] = 0.975 * TRUTH, 1.025 * TRUTH
    assert decide(query(), low, high, workers=1).verdict == "CONFIRMED"
    assert decide(query(), -np.inf, np.inf, draws=1, workers=1).verdict == "UNDECIDED"


def test_one_sided_regions_are_decided():
    """A lower bound alone, as for a monotone claim."""
    assert decide(query(), 0.5 * TRUTH, np.inf, workers=1).verdict == "CONFIRMED"
    assert decide(query(), 2 * TRUTH, np.inf, workers=1).verdict == "REFUTED"


def test_undecided_when_the_draws_end():
    """A band too narrow for the draws is UNDECIDED, and says what was found so far."""
    found = decide(query(), 0.9999 * TRUTH, 1.0001 * TRUTH, draws=BLOCK + 1, workers=1)
    assert found.verdict == "UNDECIDED"
    assert found.measurement.draws == 2 * BLOCK
    assert (found.low < found.high).all()


def test_a_budget_of_no_time_decides_nothing():
    """When the seconds are over nothing is drawn: no measurement, infinite intervals."""
    found = decide(query(), 0, 1, budget=1e-9, workers=1)
    assert found.verdict == "UNDECIDED"
    assert found.measurement is None
    assert (found.low == -np.inf).all()
    assert (found.high == np.inf).all()


def test_a_budget_ends_what_would_not_end():
    """With the truth on the edge only the budget stops the run, at the end of a block."""
    found = decide(query(), TRUTH, 2 * TRUTH, error_rate=1e-9, budget=0.3, workers=1)
    assert found.verdict == "UNDECIDED"
    assert found.measurement.draws % BLOCK == 0


def test_stop_is_polled_between_blocks():
    """A run told to stop keeps the blocks it has."""
    target = Target(query(), np.full(4, -np.inf), np.full(4, np.inf), 0.5, 0.5)
    seen = []
    campaign = Campaign([target], Conditions(), stop=lambda: len(seen) >= 3, progress=seen.append)
    (found,) = campaign.run(1, in_flight=1)
    assert found.measurement.draws == 3 * BLOCK


IMPOSSIBLE = {
    "error rate 0": ({"error_rate": 0.0}, "expected error_rate between 0 and 1, got 0.0"),
    "error rate 1": ({"error_rate": 1.0}, "expected error_rate between 0 and 1, got 1.0"),
    "error rate NaN": ({"error_rate": math.nan}, "expected error_rate between 0 and 1, got nan"),
    "no draws": ({"draws": 0}, "expected draws above 0, got 0"),
    "negative draws": ({"draws": -5}, "expected draws above 0, got -5"),
    "no budget": ({"budget": 0.0}, "expected budget above 0, got 0.0"),
    "endless budget": ({"budget": math.inf}, "expected budget above 0, got inf"),
    "low above high": ({"low": 2.0}, "expected low <= high"),
    "NaN bound": ({"high": math.nan}, "expected low <= high"),
    "unknown dtype": ({"dtype": "float16"}, "expected dtype float32 or float64, got 'float16'"),
    "unknown device": ({"device": "tpu"}, "expected a device of .*, got 'tpu'"),
    "no workers": ({"workers": 0}, "expected at least 1 worker, got 0"),
    "negative workers": ({"workers": -1}, "expected at least 1 worker, got -1"),
}


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_wrong_arguments_are_refused(changes, message):
    """`ValueError` with what was expected and what was got."""
    arguments = {"low": 0.0, "high": 1.0, "draws": 1, "workers": 1} | changes
    with pytest.raises(ValueError, match=message):
        decide(query(), **arguments)


def test_bounds_of_another_shape_are_refused():
    """Bounds broadcast to the question's shape or not at all."""
    with pytest.raises(ValueError, match="shape"):
        decide(query(), np.zeros(3), 1.0, draws=1, workers=1)


@pytest.mark.parametrize(
    "asked", [query(place="blocks.5.ln1"), query("cosine", n_ctx=1)], ids=["place", "positions"]
)
def test_questions_without_an_answer_are_lookup_errors(asked):
    """Both `decide` and `measure` give the reason."""
    with pytest.raises(LookupError, match="expected a question with an answer, but"):
        decide(asked, 0, 1, workers=1)
    with pytest.raises(LookupError, match="expected a question with an answer, but"):
        measure(asked)


def test_measure_one_question():
    """The mean is right to 5 of its standard errors, and they are the spread across draws."""
    found = measure(query(), draws=4 * BLOCK, seed=3)
    assert isinstance(found, Measurement)
    assert found.mean.shape == found.standard_error.shape == (4,)
    assert (np.abs(found.mean - TRUTH) <= Z * found.standard_error).all()
    # q_j^2 of 16 independent columns: Var = 2 TRUTH^2 / 16 per draw
    expected = TRUTH * math.sqrt(2 / D_MODEL / found.draws)
    assert found.standard_error == pytest.approx(np.full(4, expected), rel=0.1)


def test_measure_many_questions():
    """A list in the order asked, each as if measured alone."""
    asked = [query("cosine"), query(), query(place="ln_final")]
    found = measure(asked, seed=3)
    assert [one.question for one in found] == asked
    for question, one in zip(asked, found, strict=True):
        assert np.array_equal(one.mean, measure(question, seed=3).mean)
    assert measure([]) == []


@pytest.mark.parametrize(("draws", "blocks"), [(1, 1), (BLOCK, 1), (BLOCK + 1, 2), (3 * BLOCK, 3)])
def test_draws_round_up_to_whole_blocks(draws, blocks):
    """`draws` is a lower bound, met by the fewest blocks."""
    assert measure(query(), draws=draws).draws == blocks * BLOCK


@pytest.mark.parametrize("changes", [{"draws": 0}, {"dtype": "half"}, {"workers": 0}], ids=str)
def test_measure_refuses_wrong_arguments(changes):
    """`ValueError`, as `decide` does."""
    with pytest.raises(ValueError, match="expected"):
        measure(query(), **changes)


@pytest.mark.parametrize("observable", ["kurtosis", "kernel_cosine", "second_moment"])
def test_a_measurement_is_that_of_the_sampled_blocks(observable):
    """`measure` is the statistic over the very draws that `sample` gives, blocks 0 and 1."""
    question = query(observable)
    group, statistic = Group.of(question), STATISTICS[observable]
    draws = np.concatenate(
        [
            statistic.components(sample(group, [question.place], i, Conditions(9))[question.place],
                                 question).double().numpy()
            for i in (0, 1)
        ]
    )  # fmt: skip
    found = measure(question, draws=2 * BLOCK, seed=9, device="cpu")
    expected = statistic.value(draws.mean(0))
    assert np.abs(found.mean - expected).max() <= 1e-12 * np.abs(expected).max()


def test_standard_errors_of_ratios_are_those_of_repetition():
    """The delta method's standard error is the spread of the estimate over 200 repetitions.

    A deviation estimated from 200 has a relative error of 1/sqrt(400) = 5%; 5 of those allowed.
    """
    question = query("kurtosis", n_ctx=1)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 2000, 4))
    components = np.stack([(x**4).mean(-1), (x**2).mean(-1)], 2)[..., None]
    found = [Measurement(question, Moments.of(draws)) for draws in components]
    spread = np.std([one.mean[0] for one in found], ddof=1)
    assert np.mean([one.standard_error[0] for one in found]) == pytest.approx(spread, rel=0.25)


def test_nothing_is_decided_before_the_first_look():
    """However few draws are allowed, a verdict has at least `FIRST_LOOK` of them."""
    question = nope.Question(
        nope.decoder(768, 12, n_ctx=256), nope.init.normal(0.02), "blocks.0.ln1", "second_moment"
    )
    decision = decide(question, 5.0, 6.0, draws=2, workers=1)
    assert decision.measurement.draws < FIRST_LOOK
    assert decision.verdict == "UNDECIDED"
