"""One picture per verdict: theory, its band, and the measurement with its simultaneous interval."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.verdicts import Verdict

THEORY, BAND, MEASURED = "#1f4e8c", "#1f4e8c", "#c2410c"
ROWS = 4
"""A matrix is shown along this many of its rows."""

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.hashsalt": "nope",
    "svg.fonttype": "none",
}


def svg(verdict: Verdict) -> str:
    """The figure of a judged verdict as an `<svg>` element; empty when nothing was drawn."""
    if not verdict.estimate or all(value is None for value in verdict.estimate):
        return ""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.0), layout="constrained")
        _draw(verdict)(figure, verdict)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _draw(verdict: Verdict) -> Callable[[Figure, Verdict], None]:
    if verdict.relation == "ordered":
        return _steps
    if len(verdict.positions) == 1:
        return _single
    if verdict.question["observable"] == "cdf":
        return _distribution
    return _matrix if isinstance(verdict.positions[0], list) else _curve


def _column(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values])


def _arrays(verdict: Verdict) -> dict[str, np.ndarray]:
    columns = {
        name: _column(getattr(verdict, name)) for name in ("prediction", "estimate", "low", "high")
    }
    return {
        **columns,
        "band_low": _column(verdict.band["low"]),
        "band_high": _column(verdict.band["high"]),
        "lowest": _column(verdict.simultaneous["low"]),
        "highest": _column(verdict.simultaneous["high"]),
    }


def _theory(axes: Axes, x: np.ndarray, found: dict[str, np.ndarray]) -> None:
    axes.fill_between(
        x, found["band_low"], found["band_high"], color=BAND, alpha=0.18, lw=0, label="band"
    )
    axes.plot(x, found["prediction"], color=THEORY, lw=1.4, label="theory")


def _measured(axes: Axes, x: np.ndarray, found: dict[str, np.ndarray]) -> None:
    """The estimate, its own interval where that decided, and the simultaneous one, paler."""
    pale: Any = {"color": MEASURED, "lw": 0}
    wider = not np.array_equal(found["low"], found["lowest"], equal_nan=True)
    if wider:
        axes.fill_between(x, found["low"], found["high"], alpha=0.25, label="interval", **pale)
    label = "simultaneous interval"
    axes.fill_between(x, found["lowest"], found["highest"], alpha=0.16, label=label, **pale)
    marker = "." if len(x) < 80 else ""
    axes.plot(x, found["estimate"], color=MEASURED, lw=1.0, marker=marker, ms=4, label="simulation")


def _relative(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Everything over the prediction."""
    return {name: values / found["prediction"] for name, values in found.items()}


def _less(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Everything less the prediction."""
    return {name: values - found["prediction"] for name, values in found.items()}


def _distribution(figure: Figure, verdict: Verdict) -> None:
    """A distribution function at its points, and beside it everything less the prediction."""
    points, found = np.array(verdict.positions, dtype=float), _arrays(verdict)
    left, right = figure.subplots(1, 2)
    for axes, columns in ((left, found), (right, _less(found))):
        _theory(axes, points, columns)
        _measured(axes, points, columns)
        axes.set_xlabel("x")
    left.set_ylabel("share at or below")
    right.set_ylabel("less the prediction")
    left.legend(framealpha=0.8, edgecolor="none", fontsize=8)


def _curve(figure: Figure, verdict: Verdict) -> None:
    """The curve over positions, and beside it everything over the prediction."""
    m, found = np.array(verdict.positions, dtype=float), _arrays(verdict)
    left, right = figure.subplots(1, 2)
    for axes, columns in ((left, found), (right, _relative(found))):
        _theory(axes, m, columns)
        _measured(axes, m, columns)
        axes.set_xlabel("position m")
        if len(m) > 16:
            axes.set_xscale("log")
    if _spans_decades(found["prediction"]):
        left.set_yscale("log")
    left.set_ylabel(verdict.question["observable"].replace("_", " "))
    right.set_ylabel("over the prediction")
    left.legend(framealpha=0.8, edgecolor="none", fontsize=8)


def _spans_decades(values: np.ndarray) -> bool:
    return bool(values.min() > 0 and values.max() > 10 * values.min())


def _rows_of(verdict: Verdict) -> Iterator[tuple[int, np.ndarray, dict[str, np.ndarray]]]:
    """A few rows of a matrix: the row's label, its column labels, its entries."""
    pairs, found = np.array(verdict.positions), _arrays(verdict)
    labels = [row for row in np.unique(pairs[:, 0]) if (pairs[:, 0] == row).sum() > 1]
    labels = labels or list(np.unique(pairs[:, 0]))
    spread = np.linspace(0, len(labels) - 1, min(ROWS, len(labels))).round().astype(int)
    for row in (labels[k] for k in spread):
        mine = pairs[:, 0] == row
        yield int(row), pairs[mine, 1].astype(float), {k: v[mine] for k, v in found.items()}


def _matrix(figure: Figure, verdict: Verdict) -> None:
    """Rows of a matrix, and beside them measurement less prediction in half-widths of the band."""
    left, right = figure.subplots(1, 2)
    coordinates = verdict.question["observable"].startswith("coordinate")
    what = "coordinate j" if coordinates else "position n"
    shades = mpl.colormaps["viridis"](np.linspace(0.0, 0.8, ROWS))
    right.axhspan(-1, 1, color=BAND, alpha=0.18, lw=0, label="band")
    for shade, (row, columns, found) in zip(shades, _rows_of(verdict), strict=False):
        unit = (found["band_high"] - found["band_low"]) / 2
        middle = (found["band_high"] + found["band_low"]) / 2
        line: dict[str, Any] = {"marker": "_", "ls": "", "ms": 9} if coordinates else {"lw": 1.2}
        left.plot(columns, found["prediction"], color=shade, label=f"m = {row}", **line)
        error = [found["estimate"] - found["lowest"], found["highest"] - found["estimate"]]
        style: dict[str, Any] = {"color": shade, "fmt": ".", "ms": 4, "lw": 0.8}
        left.errorbar(columns, found["estimate"], yerr=error, **style)
        away = (found["estimate"] - middle) / unit
        right.errorbar(columns, away, yerr=[e / unit for e in error], **style)
    for axes in (left, right):
        axes.set_xlabel(what)
        if not coordinates and max(pair[1] for pair in verdict.positions) > 16:
            axes.set_xscale("log")
    if _spans_decades(_arrays(verdict)["prediction"]) and not coordinates:
        left.set_yscale("log")
    left.set_ylabel(verdict.question["observable"].replace("_", " "))
    right.set_ylabel("simulation - theory, in bands")
    left.legend(
        frameon=False,
        fontsize=8,
        title=f"{'dashes' if coordinates else 'lines'}: theory, dots: simulation",
        title_fontsize=7,
    )


def _steps(figure: Figure, verdict: Verdict) -> None:
    """Steps along rows: the claim holds where all of them are above zero."""
    panels = list(_rows_of(verdict))
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (row, columns, found) in zip(grid, panels, strict=True):
        error = [found["estimate"] - found["lowest"], found["highest"] - found["estimate"]]
        axes.axhline(0, color="black", lw=0.8)
        axes.plot(columns, found["prediction"], color=THEORY, lw=1.2, label="theory")
        axes.errorbar(
            columns,
            found["estimate"],
            yerr=error,
            color=MEASURED,
            fmt=".",
            ms=4,
            lw=0.8,
            label="simulation",
        )
        axes.set_title(f"query m = {row}", fontsize=9)
        axes.set_xlabel("position n of the step")
        if columns.max() > 16:
            axes.set_xscale("log")
    grid[0].set_ylabel("step of the cosine")
    grid[0].legend(framealpha=0.8, edgecolor="none", fontsize=8)


def _single(figure: Figure, verdict: Verdict) -> None:
    """One number: its band and its interval on one line each."""
    found = {name: float(values[0]) for name, values in _arrays(verdict).items()}
    axes = figure.subplots()
    figure.set_size_inches(8.4, 1.6)
    axes.plot([found["band_low"], found["band_high"]], [1, 1], color=THEORY, lw=6, alpha=0.3)
    axes.plot([found["prediction"]], [1], "|", color=THEORY, ms=16, mew=2)
    axes.plot([found["lowest"], found["highest"]], [0, 0], color=MEASURED, lw=6, alpha=0.3)
    axes.plot([found["estimate"]], [0], "|", color=MEASURED, ms=16, mew=2)
    axes.set_yticks([1, 0], ["theory, band", "simulation, interval"])
    axes.set_ylim(-0.6, 1.6)
    axes.set_xlabel(verdict.question["observable"].replace("_", " "))
