"""The table of a sweep: a row per cell and judged position, and the Parquet file it is kept in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from montecarlo import Decision
from nope.checks import expect
from reports import suite
from reports.cells import AXES, LARGEST_COUNT, OF_SCHEME, Cell
from reports.forecasts import Forecast
from reports.verdicts import CONFIRMED, NOT_APPLICABLE, REFUTED, UNDECIDED
from theory.relations import Region

SCHEMA = "nope.sweep/1"
FILE = "sweep.parquet"
KNOWLEDGE = (CONFIRMED, REFUTED)

ENTRIES: Mapping[str, str] = {
    "position": "m, from 1; empty for what is about all positions",
    "other_position": "n of a pair (m, n), or the coordinate j; empty for others",
    "worst": "whether this is the position furthest out of its band: one in each cell",
    "prediction": "what the theory says, in the observable's unit",
    "remainder": "what the theory estimates to have dropped, in the same unit",
    "band_low": "the tolerance and the remainder below the prediction",
    "band_high": "the same above",
    "estimate": "what the layers do; empty where nothing was drawn",
    "low": "lower end of the interval that the verdict was read from: this position's own where "
    "CONFIRMED, else the one that holds at all positions together",
    "high": "its upper end",
    "error": "estimate less prediction, over what the tolerance multiplies: the prediction, "
    "sqrt(K_mm K_nn) for kernels, 1 for cosines and probabilities",
}
"""The columns of a position."""

COLUMNS: Mapping[str, str] = {
    "cell": "number of the cell, from 0",
    **{name: axis.meaning for name, axis in AXES.items() if name != "question"},
    "observable": "what is measured: see nope.OBSERVABLES",
    "place": "where",
    **ENTRIES,
    "verdict": "CONFIRMED, REFUTED, UNDECIDED, NOT_APPLICABLE, UNINFORMATIVE, of the whole cell; "
    "UNDECIDED also where the theory or a block failed",
    "expected": "CONFIRMED or REFUTED where the best theory decides it",
    "draws": "independent draws of weights and inputs",
    "reason": "why nothing was judged, or what ended it",
}
"""The columns of the table and what they mean.  Second moments, kernels and standard deviations
are in units of the activations and weights, which have none; lengths are numbers of positions."""


def tabulate(
    found: Sequence[Cell],
    asked: Sequence[Forecast],
    decisions: Mapping[int, Decision],
    worst_only: bool = False,
) -> pd.DataFrame:
    """The table of a sweep: cells, what the theory says of each, and what was decided."""
    answers = [decisions.get(number) for number in range(len(found))]
    heads = pd.DataFrame([_head(*each) for each in zip(found, asked, answers, strict=True)])
    for name in heads.columns[heads.dtypes == heads["place"].dtype]:
        heads[name] = heads[name].astype("category")
    heads[list(OF_SCHEME)] = heads[list(OF_SCHEME)].astype(float)
    heads.insert(0, "cell", np.arange(len(found)))
    entries = [_entries(*each, worst_only) for each in zip(asked, answers, strict=True)]
    counts = [len(columns["worst"]) for columns in entries]
    table = heads.loc[heads.index.repeat(counts)].reset_index(drop=True)
    for name in ENTRIES:
        table[name] = np.concatenate([columns[name] for columns in entries])
    whole = ["position", "other_position"]
    table[whole] = table[whole].astype("Int64")
    return table[list(COLUMNS)]


def exit_status(table: pd.DataFrame) -> int:
    """As a run's: 1 if a verdict is opposite to the expected one, 3 if one is UNDECIDED, else 0.

    2, as for what cannot be asked, where every cell is NOT_APPLICABLE.
    """
    verdicts, expected = table["verdict"].astype(object), table["expected"].astype(object)
    known = verdicts.isin(KNOWLEDGE) & expected.isin(KNOWLEDGE)
    if (known & (verdicts != expected)).any():
        return 1
    if (verdicts == NOT_APPLICABLE).all():
        return 2
    return 3 if (verdicts == UNDECIDED).any() else 0


def _head(cell: Cell, one: Forecast, decision: Decision | None) -> dict[str, Any]:
    """What a cell's rows have in common."""
    measured = decision.measurement if decision else None
    ended = "" if measured else decision and str(decision.failure or "nothing drawn")
    at = {name: _held(value) for name, value in cell.at.items()}
    observable, _, place = at.pop("question").split()
    return {
        **at,
        "observable": observable,
        "place": place,
        "verdict": decision.verdict if decision else one.without,
        "expected": one.case.expected if one.case else None,
        "draws": measured.draws if measured else 0,
        "reason": one.reason or ended,
    }


def _held(value: Any) -> Any:
    """A value as a column holds it: a whole number beyond 64 bits is a float."""
    return float(value) if isinstance(value, int) and abs(value) > LARGEST_COUNT else value


def _entries(one: Forecast, decision: Decision | None, worst_only: bool) -> dict[str, np.ndarray]:
    """The columns of a cell's positions; one that is empty where there is no prediction."""
    if one.region is None or one.remainder is None:
        empty = dict.fromkeys(ENTRIES, np.full(1, np.nan))
        return {**empty, "worst": np.array([True])}
    region, asked = one.region, one.region.statistic
    measured = decision.measurement if decision else None
    nothing = np.full(asked.shape, np.nan)
    estimate, low, high = (
        (measured.mean, decision.low, decision.high) if decision and measured else [nothing] * 3
    )
    scale = asked.scale_of(region.prediction)
    labels = np.array([_label(label) for label in asked.positions])
    arrays = {
        "prediction": region.prediction,
        "remainder": np.broadcast_to(one.remainder, asked.shape),
        "band_low": region.low,
        "band_high": region.high,
        "estimate": estimate,
        "low": low,
        "high": high,
        "error": np.divide(
            estimate - region.prediction, scale, out=nothing.copy(), where=scale > 0
        ),
    }
    columns = {name: values[asked.judged] for name, values in arrays.items()}
    worst = _worst(region, estimate, decision, columns["remainder"])
    columns |= {
        "position": labels[:, 0],
        "other_position": labels[:, 1],
        "worst": np.arange(len(labels)) == worst,
    }
    return {name: values[[worst]] for name, values in columns.items()} if worst_only else columns


def _worst(
    region: Region, estimate: np.ndarray, decision: Decision | None, remainder: np.ndarray
) -> int:
    """The entry furthest out of its band; where nothing was drawn, of the largest remainder."""
    found = suite._worst(region, estimate, decision) if decision else None
    if found is None:
        return int(np.argmax(np.nan_to_num(remainder)))
    return region.statistic.positions.index(found["position"])


def _label(label: Any) -> tuple[float, float]:
    """m and n (or j) of a position's label."""
    match label:
        case [first, second]:
            return first, second
        case int():
            return label, np.nan
    return np.nan, np.nan


# ----------------------------------------------------------------------------- the file


def require_pyarrow() -> None:
    """Raise `ImportError` without what writes and reads Parquet."""
    if find_spec("pyarrow") is None:
        raise ImportError(
            "expected pyarrow for a Parquet file, got none; pip install 'nope-theory[sweep]'"
        )


def save(table: pd.DataFrame, directory: str | Path) -> Path:
    """Write `sweep.parquet` into a directory, made when missing; returns the file."""
    require_pyarrow()
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    partial_file, target = folder / f".{FILE}.part", folder / FILE
    table.to_parquet(partial_file, engine="pyarrow", index=False)
    partial_file.replace(target)
    return target


def load(path: str | Path) -> pd.DataFrame:
    """Read the table of a sweep: its directory or its file.

    Raises `FileNotFoundError` where there is none and `ValueError` for a file of another kind.
    """
    require_pyarrow()
    file = Path(path)
    file = file / FILE if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(
            f"expected a sweep in {path}, got no {FILE}; make one with nope sweep --out"
        )
    try:
        table = pd.read_parquet(file, engine="pyarrow")
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise ValueError(f"expected {file} to be Parquet, got {error}; run again") from error
    got = table.attrs.get("schema")
    expect(got == SCHEMA, f"{file} to be a table of {SCHEMA}", got, "make one with nope sweep")
    return table
