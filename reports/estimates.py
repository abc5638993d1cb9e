"""What a sweep would take, from a pilot of a few of its cells."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from montecarlo import Campaign, Conditions
from montecarlo.plan import draws_needed
from montecarlo.sampler import Group
from nope.checks import line
from reports import suite
from reports.cells import Cell, by_setting, cells
from reports.forecasts import forecast, possible
from reports.suite import Case
from reports.sweep import require
from theory.claims import best_theory

SAMPLED = 16
"""So many groups of cells are tried to estimate all."""
PILOT_DRAWS = 16


@dataclass(frozen=True)
class Estimate:
    """What a sweep would take: counted where it can be, else projected from `sampled` groups.

    `draws` and `seconds` are of all groups together (a group is what shares draws), `seconds`
    those of drawing and `predicting` those of the theory, both with all workers at work.
    `judged` is the share of the cells that draws would decide, `refused` why others of the sample
    would not be judged, `endless` the share that no number of draws would decide.
    """

    cells: int
    groups: int
    impossible: Counter[str]
    sampled: int
    judged: float
    refused: Counter[str]
    endless: float
    draws: float
    seconds: float
    predicting: float


def estimate(
    grid: Mapping[str, Any] | str | Path,
    error_rate: float = suite.ERROR_RATE,
    *,
    tolerance: float = suite.TOLERANCE,
    draws: int | None = None,
    conditions: Conditions | None = None,
    workers: int = 1,
) -> Estimate:
    """What `sweep` would take, from a pilot of `SAMPLED` groups of all sizes.

    Where the truth lies is taken from the best theory, and a verdict counted to fall when it has
    in `montecarlo.plan.POWER` of all runs.
    """
    require(error_rate, tolerance, draws, None)
    made, found = conditions or Conditions(), cells(grid)
    reasons = [_impossible(cell) for cell in found]
    groups = [
        [found[k] for k in numbers] for numbers in by_setting(found) if not reasons[numbers[0]]
    ]
    sample = _spread(sorted(groups, key=_elements))
    begin = time.perf_counter()
    asked = [
        possible(forecast(cell, tolerance), made, workers) for group in sample for cell in group
    ]
    predicting = time.perf_counter() - begin
    judged = [case for one in asked if (case := one.judged)]
    count, each = max(1, len(asked)), len(groups) / max(1, len(sample))
    pilots = _pilots(judged, error_rate / max(1.0, each), draws, made)
    size = sum(map(_elements, groups)) / max(1, sum(map(_elements, sample)))
    return Estimate(
        cells=len(found),
        groups=len(groups),
        impossible=Counter(reason for reason in reasons if reason),
        sampled=len(sample),
        judged=len(judged) / count,
        refused=Counter(one.reason for one in asked if one.reason),
        endless=sum(np.isinf(pilot.needed) for pilot in pilots) / count,
        draws=each * sum(_largest(pilots, "draws")),
        seconds=size * sum(_largest(pilots, "seconds")) / workers,
        predicting=each * predicting / workers,
    )


def _spread(groups: list[list[Cell]]) -> list[list[Cell]]:
    """At most `SAMPLED` of them, evenly spaced, both ends among them."""
    chosen = np.linspace(0, len(groups) - 1, SAMPLED).round().astype(int)
    return [groups[k] for k in dict.fromkeys(chosen.tolist())] if groups else []


def _impossible(cell: Cell) -> str:
    """Why a cell has no question; empty where it has one."""
    try:
        _ = cell.question
    except Exception as error:
        return line(error)
    return ""


def _elements(group: Sequence[Cell]) -> int:
    return Group.of(group[0].question).elements


class _Pilot(NamedTuple):
    """What one case takes: draws that decide it, draws that are made, their seconds."""

    group: Group
    needed: float
    draws: float
    seconds: float


def _pilots(
    judged: Sequence[Case], error_rate: float, limit: int | None, conditions: Conditions
) -> list[_Pilot]:
    """What each case takes; one that no draws decide takes all that are allowed, if any are."""
    targets = suite.targets_of(judged, error_rate)
    decisions = Campaign(targets, conditions, draws=PILOT_DRAWS).run(1)
    found = []
    for case, target, decision in zip(judged, targets, decisions, strict=True):
        if decision.measurement is not None:
            group, measured = Group.of(target.question, conditions), decision.measurement
            needed = draws_needed(target, measured, best_theory(case.question).values)
            made = min(needed, np.inf if limit is None else limit)
            blocks = np.ceil(made / group.block_size) if np.isfinite(made) else 0.0
            each = decision.seconds * group.block_size / measured.draws
            found.append(_Pilot(group, needed, blocks * group.block_size, blocks * each))
    return found


def _largest(pilots: Sequence[_Pilot], name: str) -> Iterable[float]:
    """In each group the largest, since its cells share their draws."""
    found: dict[Group, float] = {}
    for pilot in pilots:
        found[pilot.group] = max(getattr(pilot, name), found.get(pilot.group, 0.0))
    return found.values()
