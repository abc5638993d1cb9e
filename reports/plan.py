"""What a run would take: draws, seconds and memory, estimated from a small pilot."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from scipy import stats

from montecarlo import Campaign, Conditions, Measurement, Target, confidence
from montecarlo.sampler import Group
from reports.suite import Case, targets_of

PILOT_DRAWS = 16


@dataclass(frozen=True)
class Estimate:
    """What deciding one case would take, judged from a pilot."""

    case: Case
    draws: float
    seconds: float
    megabytes: float


def dry_run(
    cases: Sequence[Case], conditions: Conditions, error_rate: float, workers: int
) -> tuple[list[Estimate], float]:
    """Estimated draws, seconds and memory per case, and the seconds of all together.

    A pilot of a few draws gives the variance and the time of a draw.  Where the truth lies is
    taken from the best theory (the claim's own prediction without one).  Deciding takes about
    (z sd/room)^2 draws, room being the distance to the band's edge: for CONFIRMED at the entry
    with the least, for REFUTED at the one with the most.  Where all draws agree it is
    log(1/level)/room, as the interval then shrinks like 1/n.
    """
    judged = [case for case in cases if case.region is not None]
    targets = targets_of(cases, error_rate)
    pilot = Campaign(targets, conditions, draws=PILOT_DRAWS).run(1)
    found, by_group = [], dict[Group, float]()
    for case, target, decision in zip(judged, targets, pilot, strict=True):
        measured, group = decision.measurement, Group.of(target.question)
        if measured is None:
            continue
        draws = max(confidence.FIRST_LOOK, _needed(case, target, measured))
        seconds = draws * decision.seconds / measured.draws / workers
        size = np.dtype(conditions.dtype).itemsize
        memory = group.elements * group.block_size * size * workers / 2**20
        found.append(Estimate(case, draws, seconds, memory))
        by_group[group] = max(seconds, by_group.get(group, 0.0))
    return found, sum(by_group.values())


def _needed(case: Case, target: Target, measured: Measurement) -> float:
    """Draws to decide a case; infinite where the best theory sits on the edge of the band."""
    assert case.region is not None
    truth, judged = case.region.prediction, case.region.statistic.judged
    if case.claim.expected is not None:
        with suppress(NotImplementedError):
            best = case.claim.expected(case.question)
            truth = case.claim.relation.predicted(case.question, best)[0]
    error = measured.standard_error[judged]
    spread = np.where(np.isfinite(error), error, 0.0) * np.sqrt(measured.draws)
    room = np.minimum(truth - target.low, target.high - truth)[judged]
    refuting = bool((room < 0).any())
    level = target.refute_error / target.entries if refuting else target.confirm_error
    z = confidence.boundary(confidence.TUNED_FOR, level)
    z += stats.norm.isf(1 / (2 * target.entries)) if target.entries > 1 else 1.0
    constant = measured.half_width(level)[judged] * measured.draws
    unit = np.where(spread > 0, z * spread, constant)
    ratio = np.divide(unit, np.abs(room), out=np.full(room.shape, np.inf), where=room != 0)
    draws = np.where(spread > 0, ratio**2, ratio)
    return float(draws[room < 0].min() if refuting else draws.max())
