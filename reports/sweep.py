"""A theory's phase diagram: predictions held against real layers over a grid of settings.

Every cell of a grid (`reports.cells`) is judged as `reports.suite` judges a claim, under one error
rate for all cells together.  Cells that differ in fidelity or in what they ask share their draws.

The result is one tidy table (`reports.tables.COLUMNS`): a row per cell and judged position.  In
each cell one row is marked `worst`, so that `table[table.worst]` has a row per cell.  What cannot
be judged (heads that do not divide the width, a formula that is not known, a number that is not
finite, a theory or a block that fails) is a cell with its reason, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from montecarlo import Campaign, Conditions
from montecarlo.campaign import at_once, require_limits
from montecarlo.engines import device_of
from montecarlo.estimators import Asked
from montecarlo.store import opened
from nope.checks import line
from reports import suite
from reports.cells import Cell, cells, read
from reports.forecasts import Forecast, Progress, forecasts, possible
from reports.kept import recalled
from reports.tables import COLUMNS, SCHEMA, require_pyarrow, save, tabulate
from reports.verdicts import UNDECIDED

WATCH_SECONDS = 0.25
"""How often progress is told."""


def sweep(
    grid: Mapping[str, Any] | str | Path,
    error_rate: float = suite.ERROR_RATE,
    budget: float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    *,
    tolerance: float = suite.TOLERANCE,
    draws: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    workers: int | None = None,
    engine: str = "local",
    sampler: str = "auto",
    inputs: int = 1,
    worst_only: bool = False,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress = lambda what, share: None,
) -> pd.DataFrame:
    """Hold the theory against real layers in every cell of a grid.

    grid:       axes to values, or the TOML file that says them: see `read` and `AXES`
    error_rate: probability of any wrong CONFIRMED or REFUTED in the whole table, half each
    budget:     seconds to draw for; 600 unless `draws` is given
    draws:      draws per cell at most, rounded up to whole blocks
    out:        directory for `sweep.parquet`, the evidence and the theory's answers; those that it
                holds are used again
    worst_only: keep the worst position of each cell only

    The others are those of `reports.verify`, and so is what they promise: with `draws` the table
    is the same bits for any workers, and after being killed and called again.  Its columns are
    `COLUMNS`; its `attrs` say how it was made, in the file too.  Raises `ValueError` for
    arguments that cannot be, `OSError` for files that cannot be used, `ImportError` for `out`
    without pyarrow.
    """
    begin = time.perf_counter()
    budget = suite.BUDGET if budget is None and draws is None else budget
    where = device_of(engine, device, dtype)
    conditions = Conditions(seed, where, dtype, sampler=sampler, inputs=inputs)
    written, found = read(grid), cells(grid)
    require(error_rate, tolerance, draws, budget)
    if out is not None:
        require_pyarrow()
    errors: dict[Asked, Exception] = {}

    def ask(left: Sequence[Cell], told: Progress) -> list[Forecast]:
        return forecasts(left, tolerance, engine, workers, where, stop, told)

    with opened(out) as store:
        here = at_once(engine, workers, where)
        asked = [
            possible(one, conditions, here)
            for one in recalled(found, tolerance, store, ask, progress)
        ]
        judged = {k: one.judged for k, one in enumerate(asked) if one.judged}
        targets = suite.targets_of(list(judged.values()), error_rate)
        watch, failed = _Watch(progress, budget), errors.__setitem__
        campaign = Campaign(targets, conditions, draws, budget, stop, watch, store, failed)
        decisions = dict(zip(judged, campaign.run(workers, engine=engine), strict=True))
    for k in [k for k, decision in decisions.items() if decision.target.asked in errors]:
        error = errors[decisions.pop(k).target.asked]
        asked[k] = replace(asked[k], reason=line(error), without=UNDECIDED)
    table = tabulate(found, asked, decisions, worst_only)
    table.attrs = {
        "schema": SCHEMA,
        "grid": written,
        "error_rate": error_rate,
        "tolerance": tolerance,
        "draws": draws,
        "budget": budget,
        "seed": seed,
        "device": where,
        "dtype": dtype,
        "sampler": sampler,
        "inputs": inputs,
        "interrupted": stop(),
        "broken": campaign.broken,
        "blocks": {"computed": campaign.computed, "recalled": store.recalled if store else 0},
        "seconds": time.perf_counter() - begin,
        "versions": suite.versions(),
        "commit": suite.commit(),
        "columns": dict(COLUMNS),
    }
    if out is not None:
        save(table, out)
    return table


def require(error_rate: float, tolerance: float, draws: int | None, budget: float | None) -> None:
    """Refuse before the theory is asked what would be refused after it."""
    suite.cases_of((), tolerance)
    suite.targets_of((), error_rate)
    require_limits(draws, budget)


class _Watch:
    """Tells how far a campaign is: the share of its draws or of its seconds, the larger."""

    def __init__(self, progress: Progress, budget: float | None) -> None:
        self._progress, self._budget = progress, budget
        self._begin, self._next = time.perf_counter(), 0.0

    def __call__(self, campaign: Campaign) -> None:
        now = time.perf_counter()
        if now < self._next:  # a look at ten thousand streams takes a while
            return
        self._next = now + WATCH_SECONDS
        elapsed = 0.0 if self._budget is None else (now - self._begin) / self._budget
        words = f"{len(campaign.decisions)} of {len(campaign.targets)} cells decided"
        self._progress(words, min(1.0, max(elapsed, _share_drawn(campaign))))


def _share_drawn(campaign: Campaign) -> float:
    """Of the draws that may still come, each weighed by its size: all, where cells never decide."""
    drawn = sum(s.draws * s.group.elements for s in campaign.streams)
    left = sum((s.limit - s.draws) * s.group.elements for s in campaign.streams if s.questions)
    return float(drawn / (drawn + max(left, 0))) if drawn else 0.0
