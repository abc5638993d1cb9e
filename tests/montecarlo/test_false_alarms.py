"""A verdict is wrong no more often than its target says, over all looks and all entries.

Draws with known means take the place of a network's.  The number of sequences with a wrong
verdict is binomial with at most the stated rate; a test fails where so many had a chance below
1e-4.  Means lie on the very edge of the region, where being wrong is most likely.
"""

import functools

import numpy as np
import pytest
from scipy import stats

import nope
from montecarlo import confidence
from montecarlo.evidence import Measurement, Target
from montecarlo.moments import Moments

SEQUENCES = 400
ENTRIES = 6
LAST = 1200
LEVEL = 1e-4
ERROR_RATE = 0.05
QUESTION = nope.Question(
    nope.decoder(8, 2, n_ctx=ENTRIES), nope.init.normal(1.0), "blocks.0.attn.q", "second_moment"
)


@functools.cache
def evidence():
    """Per sequence, the measurement at every look: means 1, chi-square like, correlated entries."""
    rng = np.random.default_rng(2023)
    return [list(looked_at(rng)) for _ in range(SEQUENCES)]


def looked_at(rng):
    seen, known = 0, None
    while seen < LAST:
        count = confidence.next_look(seen) - seen
        shared = rng.standard_normal((count, 4, 1)) ** 2  # all entries see the same weights
        own = rng.standard_normal((count, 4, ENTRIES)) ** 2
        block = Moments.of((shared + own).mean(1, keepdims=True) / 2)
        known = block if known is None else known.merge(block)
        seen += count
        yield Measurement(QUESTION, known, "float64")


def target(low, high, error_rate=ERROR_RATE):
    low, high = (np.broadcast_to(np.asarray(x, dtype=float), ENTRIES) for x in (low, high))
    return Target(QUESTION, low, high, error_rate / 2, error_rate / 2)


def verdicts(asked):
    """What each sequence ends with: its first verdict, as a campaign takes it."""
    found = []
    for sequence in evidence():
        looks = (asked.verdict(measured) for measured in sequence)
        found.append(next((v for v in looks if v != "UNDECIDED"), "UNDECIDED"))
    return found


def chance(wrong, error_rate):
    """The chance of so many wrong verdicts or more at `error_rate` each."""
    return stats.binom.sf(wrong - 1, SEQUENCES, error_rate)


@pytest.mark.parametrize("error_rate", [0.05, 0.5])
@pytest.mark.parametrize(("low", "high"), [(1.0, 2.0), (0.5, 1.0), (1.0, 1.0)])
def test_true_claims_are_refuted_no_more_often_than_stated(low, high, error_rate):
    """Every mean lies in the region, on its edge: REFUTED is wrong, half the rate is its share."""
    wrong = verdicts(target(low, high, error_rate)).count("REFUTED")
    assert chance(wrong, error_rate / 2) >= LEVEL


@pytest.mark.parametrize("error_rate", [0.05, 0.5])
@pytest.mark.parametrize("edge", ["low", "high"])
def test_false_claims_are_confirmed_no_more_often_than_stated(edge, error_rate):
    """One mean is only just out, the others are well inside: CONFIRMED is wrong."""
    low, high = np.full(ENTRIES, 0.5), np.full(ENTRIES, 1.5)
    (low if edge == "low" else high)[3] = 1.0
    wrong = verdicts(target(low, high, error_rate)).count("CONFIRMED")
    assert chance(wrong, error_rate / 2) >= LEVEL


def test_verdicts_are_reached():
    """Well inside is CONFIRMED and well outside REFUTED in every sequence."""
    assert set(verdicts(target(0.5, 1.5))) == {"CONFIRMED"}
    assert set(verdicts(target(1.5, 2.0))) == {"REFUTED"}
    assert set(verdicts(target(0.2, 0.5))) == {"REFUTED"}


def test_the_simulation_finds_an_interval_that_may_be_looked_at_only_once(monkeypatch):
    """With Student's interval in place of the sequence the same count is too high."""

    def once(draws, variance, skewness, error_rate, size, resolution):
        return stats.t.isf(error_rate / 2, draws - 1) * np.sqrt(variance / draws)

    monkeypatch.setattr(confidence, "half_width", once)
    wrong = verdicts(target(1.0, 2.0)).count("REFUTED")
    assert chance(wrong, ERROR_RATE / 2) < LEVEL


def test_simultaneous_intervals_hold_at_every_entry_and_look():
    """The band of a figure misses anywhere, ever, in at most its share of sequences."""
    asked = target(1.0, 2.0)
    wrong = sum(
        any((np.abs(m.mean - 1) > asked.simultaneous(m)).any() for m in sequence)
        for sequence in evidence()
    )
    assert chance(wrong, ERROR_RATE / 2) >= LEVEL
