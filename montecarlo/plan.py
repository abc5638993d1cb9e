"""What a decision takes: how many draws, and what they could have seen.

A pilot's mean, variance and skewness are projected to more draws, and the confidence sequence
itself says how wide its intervals will then be.  The mean of a run is noisy too; by the number
of draws given here a verdict has fallen in at least `POWER` of all runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import special

from montecarlo.confidence import FIRST_LOOK
from montecarlo.decide import measure, require_rate
from montecarlo.evidence import Measurement, Target
from nope.checks import expect_finite
from nope.questions import Question

POWER = 0.9
"""The chance that the verdict has fallen by the draws that are named."""
PILOT_DRAWS = 64
MOST_DRAWS = 1 << 60


@dataclass(frozen=True, eq=False)
class Plan:
    """A region about what a pilot measured, and the draws that judging it takes.

    `draws` are those by which a truth in the middle of the band is CONFIRMED with a chance of
    `POWER`; infinite if none are enough.
    """

    target: Target
    pilot: Measurement
    draws: float

    def detectable(self, draws: int) -> float:
        """The smallest discrepancy, over its scale, that `draws` draws would have seen."""
        return detectable(self.target, self.pilot.projected(draws), self.pilot.mean)


def plan(
    question: Question,
    band: float,
    error_rate: float = 1e-3,
    pilot: Measurement | None = None,
    *,
    exact: bool = False,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
) -> Plan:
    """How many draws it takes to hold a prediction against real layers, within a band.

    `band` is half its width, in units of the observable's scale: .02 is 2% for a second moment.
    `error_rate` bounds a wrong CONFIRMED or REFUTED, half each.  Spread and skewness are those
    of `pilot`, of `PILOT_DRAWS` draws that are made here when there is none.

    Raises `ValueError` for a band that is lost in rounding, and as `montecarlo.measure` does.
    """
    expect_finite("band", band, positive=True)
    require_rate(error_rate)
    known = pilot or measure(question, PILOT_DRAWS, seed, device, dtype)
    room = np.where(question.judged, band * question.scale_of(known.mean), np.inf)
    half = error_rate / 2
    target = Target(question, known.mean - room, known.mean + room, half, half, exact)
    target.require_reachable(known.dtype)
    return Plan(target, known, draws_needed(target, known, known.mean))


def draws_needed(target: Target, pilot: Measurement, truth: np.ndarray) -> float:
    """Draws by which a verdict has fallen with a chance of `POWER`, were `truth` the means.

    CONFIRMED takes room for the noise and the interval inside the band at every entry, REFUTED
    outside of it at one.  Infinite where the truth lies on an edge.
    """
    judged = target.judged
    room = np.minimum(truth - target.low, target.high - truth)[judged]
    refuting = bool((room < 0).any())

    def decides(draws: int) -> bool:
        then = pilot.projected(draws)
        half = target.simultaneous(then) if refuting else target.single(then)
        reach = (half + _noise(then, 1 if refuting else 2 * target.entries))[judged]
        return bool((reach <= -room).any() if refuting else (reach <= room).all())

    return _smallest(decides) if room.size else np.inf


def more_draws(target: Target, measured: Measurement) -> float:
    """How many more draws a verdict takes, were the truth as near the band's middle as may be.

    That is the point of each simultaneous interval that is nearest to it.
    """
    half = target.simultaneous(measured)
    with np.errstate(invalid="ignore"):
        middle = (target.low + target.high) / 2
    nearest = np.clip(middle, measured.mean - half, measured.mean + half)
    return max(1.0, draws_needed(target, measured, nearest) - measured.draws)


def detectable(target: Target, measured: Measurement, values: np.ndarray) -> float:
    """The smallest discrepancy common to all entries that these draws find with `POWER`.

    In units of the observable's scale at `values`: half the band, the interval and the noise,
    at the entry where they are least.
    """
    judged = target.judged
    band = (target.high - target.low)[judged] / 2
    total = (target.simultaneous(measured) + _noise(measured, 1))[judged]
    total += np.where(np.isfinite(band), band, 0.0)
    scale = target.question.scale_of(values)[judged]
    relative = np.divide(total, scale, out=np.full(total.shape, np.inf), where=scale > 0)
    return float(relative.min(initial=np.inf))


def _noise(measured: Measurement, ways: int) -> np.ndarray:
    """What the means stay within, with a chance of `POWER`, if there are so many ways to leave."""
    return np.asarray(-special.ndtri((1 - POWER) / ways) * measured.standard_error)


def _smallest(holds: Callable[[int], bool]) -> float:
    """The least number of draws from the first look on at which a condition begins to hold."""
    high = FIRST_LOOK
    while not holds(high):
        high *= 2
        if high > MOST_DRAWS:
            return np.inf
    low = high // 2
    while high - low > max(1, high // 1000):
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return float(max(high, FIRST_LOOK))
