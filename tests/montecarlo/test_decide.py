"""Decisions and measurements as a caller sees them."""

import math
import time
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

import montecarlo
import nope
from montecarlo import Measurement, decide, measure, memory, sampler
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


def test_a_budget_ends_what_would_not_end(monkeypatch):
    """With the truth on the edge only the budget stops the run, at the end of a block.

    The clock goes on when it is looked at, so that a slow machine draws as much.
    """
    looks = count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(looks) / 100)
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
    "error rate 0": ({"error_rate": 0.0}, "expected error_rate from 1e-100 .*, got 0.0"),
    "error rate 1": ({"error_rate": 1.0}, "expected error_rate from 1e-100 .*, got 1.0"),
    "error rate NaN": ({"error_rate": math.nan}, "expected error_rate from 1e-100 .*, got nan"),
    "error rate that underflows": ({"error_rate": 5e-324}, "expected error_rate from 1e-100 to"),
    "no error rate": ({"error_rate": None}, "expected error_rate from 1e-100 .*, got None"),
    "half a draw": ({"draws": 2.5}, "expected draws to be a whole number .*, got 2.5"),
    "a draw that is no number": ({"draws": True}, "expected draws to be a whole number"),
    "no draws": ({"draws": 0}, "expected draws to be a whole number of at least 1, got 0"),
    "negative draws": ({"draws": -5}, "expected draws to be a whole number of at least 1, got -5"),
    "no budget": ({"budget": 0.0}, "expected budget to be a finite positive number, got 0.0"),
    "endless budget": ({"budget": math.inf}, "expected budget to be a finite .*, got inf"),
    "budget NaN": ({"budget": math.nan}, "expected budget to be a finite .*, got nan"),
    "ages": ({"budget": 1e9}, r"expected budget of at most 3.16e\+07, got 1000000000.0"),
    "draws for ages": ({"draws": 10**15}, r"expected draws of at most 1e\+12, got 10{15};"),
    "low above high": ({"low": 2.0}, "expected low <= high"),
    "NaN bound": ({"high": math.nan}, "expected low <= high"),
    "unknown dtype": ({"dtype": "float16"}, "expected dtype float32 or float64, got 'float16'"),
    "unknown device": ({"device": "tpu"}, "expected a device of .*, got 'tpu'"),
    "half a worker": ({"workers": 1.5}, "expected at least 1 worker, got 1.5"),
    "no engine": ({"engine": None}, "expected an engine: local, .*, got None"),
    "no question": ({"question": None}, "expected a nope.Question, got None"),
    "no workers": ({"workers": 0}, "expected at least 1 worker, got 0"),
    "negative workers": ({"workers": -1}, "expected at least 1 worker, got -1"),
}


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_wrong_arguments_are_refused(changes, message):
    """`ValueError` with what was expected and what was got."""
    arguments = {"question": query(), "low": 0.0, "high": 1.0, "draws": 1, "workers": 1} | changes
    with pytest.raises(ValueError, match=message):
        decide(**arguments)


HUGE = nope.Question(
    nope.decoder(2**24, 1, n_ctx=2), nope.init.normal(1.0), "blocks.0.attn.q", "second_moment"
)


def everywhere(question, **options):
    bound = np.full(question.shape, np.inf)
    return Campaign([Target(question, -bound, bound, 0.5, 0.5)], Conditions(), **options)


DOORS = {
    "measure": lambda question, **options: measure(question, **options),
    "decide": lambda question, **options: decide(question, 0.0, 1.0, workers=1, **options),
    "plan": lambda question, **options: montecarlo.plan(question, 0.1, **options),
    "campaign": lambda question, **options: everywhere(question, **options).run(),
}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_memory_that_will_not_suffice_is_refused_at_every_door(door, monkeypatch):
    """By an estimate, before anything is drawn; also what is only too much for this machine."""
    monkeypatch.setattr(sampler, "block", None)
    with pytest.raises(MemoryError, match=r"expected blocks that fit into .* GiB, got 1 at once"):
        door(replace(HUGE, init=nope.init.xavier_uniform()))  # no fewer numbers will do
    monkeypatch.setattr(memory, "capacity", lambda device: 2**10)
    with pytest.raises(MemoryError, match="d_model = 16, n_ctx = 4; use smaller sizes"):
        door(query())


@pytest.mark.parametrize("door", [DOORS["measure"], DOORS["decide"], DOORS["plan"]])
def test_devices_that_are_not_there_are_refused_at_every_door(door):
    """By name; the campaign has it from its conditions."""
    with pytest.raises(ValueError, match=r"expected device cuda:7 to be there, got .*; use cpu"):
        door(query(), device="cuda:7")
    target = Target(query(), np.zeros(4), np.ones(4), 0.1, 0.1)
    with pytest.raises(ValueError, match="expected device cuda:7 to be there"):
        Campaign([target], Conditions(device="cuda:7")).run()
    with pytest.raises(ValueError, match="expected dtype to be one of float32, float64"):
        Conditions(dtype="float16")


@pytest.mark.parametrize("draws", [None, 2.5, True, "x"])
def test_a_measurement_without_a_number_of_draws_is_refused(draws, monkeypatch):
    """It would never end: nothing is drawn."""
    monkeypatch.setattr(sampler, "block", None)
    with pytest.raises(ValueError, match="expected draws to be a whole number of at least 1, got"):
        measure(query(), draws=draws)


@pytest.mark.parametrize("questions", [None, "two", [query(), None]])
def test_only_questions_are_measured(questions):
    """One or several."""
    with pytest.raises(ValueError, match=r"expected a nope.Question, got"):
        measure(questions)


@pytest.mark.parametrize("std", [1e-30, 1e30])
def test_the_remedy_for_what_is_not_finite_goes_either_way(std):
    """Tokens whose squares underflow want a larger std, those whose squares overflow a smaller."""
    with pytest.raises(FloatingPointError, match="weights and tokens of a std nearer to 1"):
        measure(query(tokens=nope.GaussianTokens(std)), draws=1)


def test_bands_that_no_number_of_draws_reaches_are_refused(monkeypatch):
    """In float32, naming float64; before anything is drawn."""
    low, high = np.full(4, 1 - 1e-8), np.full(4, 1 + 1e-8)
    assert decide(query(), low, high, dtype="float64", draws=1, workers=1).verdict == "UNDECIDED"
    monkeypatch.setattr(sampler, "block", None)
    with pytest.raises(ValueError, match=r"rounding of float32, for second_moment .*use float64"):
        decide(query(), low, high, workers=1)
    with pytest.raises(ValueError, match=r"rounding of float32, for second_moment .*use float64"):
        Campaign([Target(query(), low, high, 0.1, 0.1)], Conditions())


@pytest.mark.parametrize("low", [2.0, math.nan])
def test_regions_that_are_none_are_refused_by_the_campaign(low):
    """The first entry that is wrong is told; what is no number asserts nothing and is no bound."""
    target = Target(query(), np.array([0.0, 0.0, low, 0.0]), np.ones(4), 0.1, 0.1)
    with pytest.raises(
        ValueError, match=rf"expected low <= high at every entry, got \({low}, 1.0\)"
    ):
        Campaign([target], Conditions())


@pytest.mark.parametrize("door", [DOORS["measure"], DOORS["decide"]])
def test_what_is_not_finite_is_told_with_its_place_and_draw(door):
    """float32 ends at 3e38: the fourth moment of a key of size 1e12 does not fit."""
    question = replace(query("kurtosis"), init=nope.init.normal(1e12))
    with pytest.raises(FloatingPointError, match=r"kurtosis at .*attn\.q, got inf in draw 0 at"):
        door(question, sampler="real")


def test_limits_on_a_container_count(monkeypatch, tmp_path):
    """Less than the machine has; a file that says "max", or is not there, limits nothing."""
    limit, nothing = tmp_path / "limit", tmp_path / "max"
    limit.write_text("4096\n")
    nothing.write_text("max\n")
    monkeypatch.setattr(memory, "LIMITS", (nothing, limit, tmp_path / "none"))
    assert memory.capacity("cpu") == 4096
    monkeypatch.setattr(memory, "LIMITS", (nothing,))
    assert memory.capacity("cpu") > 2**20


# ---------------------------------------------------------------------- blocks that fail


class Failing:
    """`sampler.block`, which fails wherever a place is asked for."""

    def __init__(self, place, error):
        self.place, self.error, self.compute = place, error, sampler.block

    def __call__(self, group, questions, index, conditions):
        if any(question.place == self.place for question in questions):
            raise self.error
        return self.compute(group, questions, index, conditions)


@pytest.mark.parametrize("error", [MemoryError("no room"), TypeError("a bug")], ids=repr)
def test_an_error_in_a_block_is_raised_with_where_it_came_from(monkeypatch, error):
    """By its own type; the traceback of a worker does not travel, and is told in a note."""
    monkeypatch.setattr(sampler, "block", Failing("blocks.0.attn.q", error))
    with pytest.raises(type(error), match=str(error)) as raised:
        measure([query(), query(place="ln_final")])
    assert "in __call__" in raised.value.__notes__[0]


@pytest.mark.parametrize("error", [MemoryError("no room"), TypeError("a bug")], ids=repr)
def test_the_others_go_on_where_it_is_told_instead(monkeypatch, error):
    """A question of the same draws and one of others have the evidence that they have alone."""
    fine = [query(place="ln_final"), query("cosine", "ln_final", n_ctx=5)]
    expected = [found.mean for found in measure(fine, 3 * BLOCK, sampler="real")]
    monkeypatch.setattr(sampler, "block", Failing("blocks.0.attn.q", error))
    asked, told = [query(), *fine], []
    bounds = [np.full(question.shape, np.inf) for question in asked]
    targets = [Target(q, -b, b, 0.5, 0.5) for q, b in zip(asked, bounds, strict=True)]
    run = Campaign(targets, Conditions(), 3 * BLOCK, failed=lambda *found: told.append(found))
    failed, *others = run.run()
    assert told == [(asked[0], error)]
    assert (failed.verdict, failed.measurement) == ("UNDECIDED", None)
    for found, mean in zip(others, expected, strict=True):
        assert np.array_equal(found.measurement.mean, mean)


def test_an_interrupt_is_no_failing_block(monkeypatch):
    """Ctrl-C a second time ends the run."""
    monkeypatch.setattr(sampler, "block", Failing("blocks.0.attn.q", KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        everywhere(query(), failed=lambda *found: None).run()


def test_bounds_of_another_shape_are_refused():
    """Bounds broadcast to the question's shape or not at all."""
    refusal = r"expected low to be a number or of shape \(4,\), got \(3,\); change low"
    with pytest.raises(ValueError, match=refusal):
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
