"""Values typed on the command line: `d=768,sigma=0.02,m=1:8`.

The grammar is names, numbers and ranges; nothing typed is evaluated as code.

>>> parse("d=768,1024,m=1:4")
{'d': [768.0, 1024.0], 'm': [1.0, 2.0, 3.0, 4.0]}
>>> values("0.01:1:log3")
[0.01, 0.1, 1.0]
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pandas as pd

from nope.checks import expect
from theory.formula import Formula

LARGEST = 1_000_000
"""More values than this on one command line are a mistake."""
LOG = re.compile(r"log([1-9]\d{0,6})")
REMEDY = "write d=768,m=1:8"


def parse(text: str) -> dict[str, list[float]]:
    """Names to lists of numbers, each as `values` reads it: `d=768,1024,m=1:8`.

    Raises `ValueError` for anything else.
    """
    named = split(text)
    return {name: [x for part in parts for x in values(part)] for name, parts in named.items()}


def split(text: str) -> dict[str, list[str]]:
    """Names to what stands for their values: `d=16,32,m=1:8` has 16 and 32 for d."""
    found: dict[str, list[str]] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals and found:
            name, value = next(reversed(found)), name
            found[name].append(value)
        else:
            expect(bool(equals and name), "NAME=VALUE", part, REMEDY)
            expect(name not in found, "each name once", name, "drop one")
            found[name] = [value]
        expect(bool(value), "a value after each = and comma", part, REMEDY)
    return found


def values(text: str) -> list[float]:
    """`3`; `1:8` and `1:9:2`, in steps; `0.01:1:log5`, five in geometric progression.

    Both ends are included.  Raises `ValueError` for anything else.
    """
    first, *rest = text.split(":")
    logs = LOG.fullmatch(rest[-1].strip()) if len(rest) == 2 else None
    if logs:
        low, high = _numbers(text, [first, rest[0]])
        return _geometric(text, low, high, int(logs[1]))
    ends = _numbers(text, [first, *rest])
    return ends if len(ends) == 1 else _arithmetic(text, *ends)


def _numbers(text: str, parts: list[str]) -> list[float]:
    try:
        found = [float(part) for part in parts]
    except ValueError:
        raise ValueError(f"expected numbers, got {text!r}; {REMEDY}") from None
    expect(bool(np.isfinite(found).all()), "finite numbers", text, "change it")
    return found


def _arithmetic(text: str, *ends: float) -> list[float]:
    first, last, step, *more = (*ends, 1.0)[: max(3, len(ends))]
    form = "FIRST:LAST, FIRST:LAST:STEP or FIRST:LAST:logCOUNT"
    expect(not more and step > 0 and last >= first, form, text, "write m=1:8")
    expect((last - first) / step < LARGEST, f"at most {LARGEST:,} values", text, "raise the step")
    steps = int((last - first) / step + 1e-9)
    return [_rounded(first + step * k) for k in range(steps + 1)]


def _geometric(text: str, first: float, last: float, count: int) -> list[float]:
    expect(0 < first <= last, "FIRST:LAST:logCOUNT with 0 < FIRST <= LAST", text, "change the ends")
    expect(count <= LARGEST, f"at most {LARGEST:,} values", text, "lower the count")
    return [_rounded(x) for x in np.geomspace(first, last, count)]


def _rounded(value: float) -> float:
    """What was meant: 0.06, not 0.060000000000000005."""
    return float(f"{value:.15g}")


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
