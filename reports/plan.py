"""What a run would take and see: draws, seconds and memory, estimated from a small pilot."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np

from montecarlo import Campaign, Conditions
from montecarlo.estimators import Asked
from montecarlo.memory import block_bytes
from montecarlo.plan import MOST_DRAWS, detectable, draws_needed
from montecarlo.sampler import Group
from reports.suite import Case, note, targets_of

PILOT_DRAWS = 16


@dataclass(frozen=True)
class Estimate:
    """What deciding one case would take, judged from a pilot.

    `detectable` is the smallest discrepancy, over its scale, that so many draws would have seen.
    """

    case: Case
    draws: float
    seconds: float
    megabytes: float
    detectable: float


def dry_run(
    cases: Sequence[Case],
    conditions: Conditions,
    error_rate: float,
    workers: int,
    errors: dict[Asked, Exception] | None = None,
) -> tuple[list[Estimate], float]:
    """Estimated draws, seconds and memory per case, and the seconds of all together.

    A pilot of a few draws gives the variance and the time of a draw, and `montecarlo.plan` the
    draws.  Where the truth lies is taken from the best theory (the claim's own prediction
    without one).  What nothing could be drawn for has no estimate; `errors` is told why.
    """
    judged = [case for case in cases if case.region is not None]
    targets = targets_of(cases, error_rate)
    told = partial(note, {} if errors is None else errors)
    pilot = Campaign(targets, conditions, draws=PILOT_DRAWS, failed=told).run(1)
    found, by_group = [], dict[Group, float]()
    for case, target, decision in zip(judged, targets, pilot, strict=True):
        measured, group = decision.measurement, Group.of(target.question, conditions)
        if measured is None or case.region is None:
            continue
        draws = draws_needed(target, measured, _truth(case))
        seconds = draws * decision.seconds / measured.draws / workers
        memory = block_bytes(group, conditions.dtype, conditions.device) * workers / 2**20
        then = measured.projected(int(min(draws, MOST_DRAWS)))
        sees = detectable(target, then, case.region.prediction)
        found.append(Estimate(case, draws, seconds, memory, sees))
        by_group[group] = max(seconds, by_group.get(group, 0.0))
    return found, sum(by_group.values())


def _truth(case: Case) -> np.ndarray:
    """What the best theory says, the claim's own prediction without one."""
    assert case.region is not None
    if case.claim.expected is not None:
        with suppress(NotImplementedError):
            best = case.claim.expected(case.question)
            return np.asarray(case.claim.relation.predicted(case.question, best)[0])
    return case.region.prediction
