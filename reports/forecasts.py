"""What the theory says of each cell of a sweep, or why it says nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from montecarlo import Conditions
from montecarlo.engines import Running, in_process
from montecarlo.engines import engine as engine_of
from montecarlo.memory import require_memory
from montecarlo.sampler import Group
from nope.checks import is_refusal, line
from reports import suite
from reports.cells import Cell, by_setting
from reports.suite import Case
from reports.verdicts import NOT_APPLICABLE, UNDECIDED
from theory.relations import Region

FEW = 64
"""So many settings are predicted before worker processes have started."""

Progress = Callable[[str, float], None]
"""Told what is being done, and the share of it that is done."""


@dataclass(frozen=True, eq=False)
class Forecast:
    """What the theory says of a cell.

    `case` and `region` are what draws are held against, `remainder` has the region's shape.
    With a `reason` nothing is drawn, and the verdict is `without`.
    """

    case: Case | None = None
    region: Region | None = None
    remainder: np.ndarray | None = None
    reason: str = ""
    without: str = NOT_APPLICABLE

    @property
    def judged(self) -> Case | None:
        """The case that draws are to decide, if any."""
        return None if self.reason else self.case


NOT_ASKED = Forecast(reason="interrupted before the theory was asked", without=UNDECIDED)


def forecast(cell: Cell, tolerance: float) -> Forecast:
    """Ask the theory.  Whatever goes wrong is this cell's reason, and no other's.

    What the theory refuses is NOT_APPLICABLE; where it fails the cell is UNDECIDED.
    """
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused
            return _forecast(cell, tolerance)
    except Exception as error:
        without = NOT_APPLICABLE if is_refusal(error) else UNDECIDED
        return Forecast(reason=line(error), without=without)


def _forecast(cell: Cell, tolerance: float) -> Forecast:
    question = cell.question
    case = Case.of(cell.claim(question), question, tolerance)
    region = case.region or case.claim.region(question, tolerance)
    remainder = cell.prediction(question).remainder
    return Forecast(case, region, remainder, case.reason, case.without)


def _forecast_all(batch: Sequence[Cell], tolerance: float) -> list[Forecast]:
    return [forecast(cell, tolerance) for cell in batch]


def forecasts(
    asked: Sequence[Cell],
    tolerance: float,
    engine: str,
    workers: int | None,
    device: str,
    stop: Callable[[], bool],
    progress: Progress,
) -> list[Forecast]:
    """What the theory says of every cell, computed by an engine's workers.

    Cells of one setting go together, since what is derived for one serves the others.
    """
    batches, found = by_setting(asked), dict[int, Forecast]()
    chosen = engine_of(engine, workers, device)
    # What is lost with its workers is computed here.
    for start in (in_process,) if len(batches) <= FEW else (chosen, in_process):
        left = [numbers for numbers in batches if numbers[0] not in found]
        tasks = (([asked[k] for k in numbers], tolerance) for numbers in left)
        with start() as running:
            try:
                for number, answers in _each(running, _forecast_all, tasks, stop):
                    found |= zip(left[number], answers, strict=True)
                    progress("predicting", len(found) / len(asked))
                break
            except running.lost:
                continue
    return [found.get(number, NOT_ASKED) for number in range(len(asked))]


def _each(
    running: Running, work: Callable[..., Any], tasks: Iterable[Any], stop: Callable[[], bool]
) -> Iterator[tuple[int, Any]]:
    """The number of a task and what came of it, as they end; none is begun after `stop`."""
    flying: dict[Future[Any], int] = {}
    numbered = enumerate(tasks)
    while True:
        while len(flying) < running.room and not stop() and (task := next(numbered, None)):
            flying[running.executor.submit(work, *task[1])] = task[0]
        if not flying:
            return
        for future in wait(flying, return_when=FIRST_COMPLETED).done:
            yield flying.pop(future), future.result()


def possible(one: Forecast, conditions: Conditions, workers: int | None) -> Forecast:
    """The forecast, with the reason why no draws can decide it; `workers` None: not our memory."""
    if one.judged is None:
        return one
    try:
        (target,) = suite.targets_of([one.judged], 0.5)
        target.require_reachable(conditions.dtype)
        if workers is not None:
            require_memory([Group.of(target.question, conditions)], conditions, workers)
    except (ValueError, MemoryError) as error:
        return replace(one, reason=str(error), without=NOT_APPLICABLE)
    return one
