"""Values typed on the command line: `d=768,sigma=0.02,m=1:8`.

The grammar is numbers and ranges; nothing typed is evaluated as code.

>>> parse("d=768,m=1:4")
{'d': [768.0], 'm': [1.0, 2.0, 3.0, 4.0]}
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd

from theory.formula import Formula

LARGEST = 1_000_000
"""More values than this on one command line are a mistake."""


def parse(text: str) -> dict[str, list[float]]:
    """Names to lists of numbers: `m=3`, `m=1:8` or `m=1:9:2`, both ends included.

    Raises `ValueError` for anything else.
    """
    found: dict[str, list[float]] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name or not value:
            raise ValueError(f"expected NAME=VALUE in --at, got {part!r}; write d=768,m=1:8")
        if name in found:
            raise ValueError(f"expected each name once in --at, got {name} twice; drop one")
        found[name] = _values(part, value)
    return found


def _values(part: str, value: str) -> list[float]:
    try:
        ends = [float(end) for end in value.split(":")]
    except ValueError:
        raise ValueError(f"expected numbers in --at, got {part!r}; write d=768,m=1:8") from None
    if not np.isfinite(ends).all():
        raise ValueError(f"expected finite numbers in --at, got {part!r}; change it")
    if len(ends) == 1:
        return ends
    step = ends[2] if len(ends) == 3 else 1.0
    if len(ends) > 3 or step <= 0 or ends[1] < ends[0]:
        raise ValueError(f"expected FIRST:LAST or FIRST:LAST:STEP, got {part!r}; write m=1:8")
    if (ends[1] - ends[0]) / step >= LARGEST:
        raise ValueError(f"expected at most {LARGEST:,} values, got {part!r}; raise the step")
    steps = int((ends[1] - ends[0]) / step + 1e-9)
    return [ends[0] + step * k for k in range(steps + 1)]


def evaluate(formula: Formula, grid: dict[str, list[float]]) -> pd.DataFrame:
    """The formula on the product of all values, one row each."""
    size = int(np.prod([len(values) for values in grid.values()], dtype=float))
    if size > LARGEST:
        raise ValueError(f"expected at most {LARGEST:,} rows, got {size:,}; shorten a range")
    points = np.array(list(itertools.product(*grid.values())))
    columns: dict[str, Any] = {name: points[:, k] for k, name in enumerate(grid)}
    values = formula(**columns)
    table = pd.DataFrame({name: _tidy(column) for name, column in columns.items()})
    table[formula.name] = values
    return table


def _tidy(column: np.ndarray) -> np.ndarray:
    """Whole numbers as whole numbers."""
    whole = bool((column == np.round(column)).all()) and np.abs(column).max(initial=0) < 2**53
    return column.astype(int) if whole else column
