"""The phase diagram of a sweep: the verdict, or the error, over two of its axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from nope.checks import expect, expect_choice
from reports.cells import AXES
from reports.figures import STYLE
from reports.grids import split
from reports.verdicts import CONFIRMED, NOT_APPLICABLE, REFUTED, UNDECIDED, UNINFORMATIVE

COLOURS = {
    CONFIRMED: "#2f6fab",
    REFUTED: "#c8502d",
    UNDECIDED: "#f0cf7a",
    UNINFORMATIVE: "#c9ccd1",
    NOT_APPLICABLE: "#f4f4f4",
}
"""Told apart by eyes of every kind: blue and red, yellow and two greys between them."""
VARIED = (*(name for name in AXES if name != "question"), "observable", "place")
PANELS = 12
"""More panels than this are no picture."""
TICKS = 5
LEAST_ERROR = 1e-3
"""Smaller errors have one colour; draws seldom see them."""
SHOWN = ("verdict", "error")


def phase(table: pd.DataFrame, x: str, y: str, show: str = "verdict", where: str = "") -> Figure:
    """The cells of a sweep's table over two axes; what else varies has a panel for each value.

    `show` is `verdict`, or `error`: |estimate - prediction| at the worst position, over what the
    tolerance multiplies.  The black line is where the verdict that the best theory expects changes.
    `where` keeps some cells: `fidelity=uniform,n_ctx=8,16`.  Raises `ValueError` for an axis that
    the table has not or that is empty, no cells, and more than a dozen panels.
    """
    expect_choice("show", show, SHOWN)
    for name in (x, y):
        expect(name in VARIED, f"an axis of {', '.join(VARIED)}", name, "name one of these")
    expect(x != y, "two different axes", x, "change one")
    cells = _kept(table[table["worst"]], where)
    for name in (x, y):
        remedy = "name one that their scheme takes, or other cells"
        expect(bool(cells[name].notna().any()), "an axis with values in these cells", name, remedy)
    panels = _panels(cells, x, y)
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        return _figure(cells, panels, x, y, show)


def write(figure: Figure, file: str | Path) -> Path:
    """Save a figure in the format that the file's name says; the same bytes every time."""
    target = Path(file)
    known = sorted(figure.canvas.get_supported_filetypes())
    suffix = target.suffix.lstrip(".")
    form = f"a file name that ends in one of {', '.join(known)}"
    expect(suffix in known, form, str(file), "change it")
    metadata: Any = {"Date": None} if suffix == "svg" else None
    with mpl.rc_context(STYLE):
        figure.savefig(target, dpi=200, metadata=metadata)
    return target


def _kept(cells: pd.DataFrame, where: str) -> pd.DataFrame:
    """The cells whose axes have one of the values given."""
    for name, values in (split(where) if where else {}).items():
        expect(name in VARIED, f"an axis of {', '.join(VARIED)}", name, "name one of these")
        there = cells[name]
        wanted: list[Any] = values
        if pd.api.types.is_numeric_dtype(there):
            try:
                wanted = [float(value) for value in values]
            except ValueError:
                raise ValueError(f"expected numbers for {name}, got {values}; change it") from None
        cells = cells[there.isin(wanted)]
    expect(len(cells) > 0, "a cell to show", where or "an empty table", "widen --where")
    return cells


def _panels(cells: pd.DataFrame, x: str, y: str) -> list[tuple[str, pd.DataFrame]]:
    """A title and the cells of each panel, so that no two cells fall on one square.

    An axis that follows from the two shown, as d_ff does from d_model, takes none.
    """
    others = [name for name in VARIED if name not in (x, y)]
    squares = cells.groupby([x, y], observed=True, dropna=False)
    several = [name for name in others if squares[name].nunique(dropna=False).max() > 1]
    if not several:
        return [("", cells)]
    found = [
        (", ".join(f"{n} = {v}" for n, v in zip(several, key, strict=True)), part)
        for key, part in cells.groupby(several, observed=True, dropna=False, sort=False)
    ]
    form, remedy = f"at most {PANELS} panels", f"fix one with --where {several[0]}=VALUE"
    expect(len(found) <= PANELS, f"{form} of {', '.join(several)}", len(found), remedy)
    return found


def _figure(
    cells: pd.DataFrame, panels: list[tuple[str, pd.DataFrame]], x: str, y: str, show: str
) -> Figure:
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.2 + 3.1 * columns, 1.3 + 2.7 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    ticks = [sorted(cells[name].dropna().unique()) for name in (x, y)]
    norm = _error_norm(cells)
    for axes, (title, part) in zip(grid.flat, panels, strict=False):
        verdicts, errors, expected = (
            part.pivot(index=y, columns=x, values=name).reindex(index=ticks[1], columns=ticks[0])
            for name in ("verdict", "error", "expected")
        )
        image = _verdicts(axes, verdicts) if show == "verdict" else _errors(axes, errors, norm)
        _edge(axes, expected)
        axes.set_title(title, fontsize=9)
        axes.tick_params(length=0)
        _label(axes, x, y, ticks)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(_subject(cells, x, y), fontsize=9)
    if show == "error":
        words = "|error| at the worst position"
        figure.colorbar(image, ax=grid, label=words, extend="min")
    _legend(figure, cells, show, 3 * columns)
    return figure


def _verdicts(axes: Axes, words: pd.DataFrame) -> Any:
    order = list(COLOURS)
    codes = words.astype(object).apply(lambda column: column.map(order.index, na_action="ignore"))
    colours = ListedColormap(list(COLOURS.values()))
    norm = BoundaryNorm(np.arange(len(order) + 1) - 0.5, len(order))
    return _squares(axes, codes.to_numpy(float), cmap=colours, norm=norm)


def _errors(axes: Axes, errors: pd.DataFrame, norm: LogNorm) -> Any:
    axes.set_facecolor(COLOURS[UNINFORMATIVE])
    values = np.clip(np.abs(errors.to_numpy(float)), norm.vmin, norm.vmax)
    return _squares(axes, values, cmap="magma_r", norm=norm)


def _squares(axes: Axes, values: np.ndarray, **style: Any) -> Any:
    line = 0.6 if max(values.shape) <= 40 else 0.0
    return axes.pcolormesh(np.ma.masked_invalid(values), edgecolors="white", lw=line, **style)


def _error_norm(cells: pd.DataFrame) -> LogNorm:
    errors = np.abs(cells["error"].to_numpy(float))
    return LogNorm(LEAST_ERROR, float(errors[np.isfinite(errors)].max(initial=1.0)))


def _edge(axes: Axes, expected: pd.DataFrame) -> None:
    """A line between neighbours of which the best theory expects opposite verdicts."""
    sides = np.full(expected.shape, np.nan)
    sides[(expected == CONFIRMED).to_numpy()] = 1.0
    sides[(expected == REFUTED).to_numpy()] = -1.0
    across = np.argwhere(sides[:, 1:] * sides[:, :-1] < 0)
    along = np.argwhere(sides[1:] * sides[:-1] < 0)
    lines = [[(c + 1, r), (c + 1, r + 1)] for r, c in across]
    lines += [[(c, r + 1), (c + 1, r + 1)] for r, c in along]
    axes.add_collection(LineCollection(lines, colors="black", linewidths=1.6, capstyle="round"))


def _label(axes: Axes, x: str, y: str, ticks: list[list[Any]]) -> None:
    for axis, name, values in zip((axes.xaxis, axes.yaxis), (x, y), ticks, strict=True):
        shown = np.arange(0, len(values), -(-len(values) // TICKS))
        axis.set_ticks(shown + 0.5, [_word(values[k]) for k in shown])
        axis.set_label_text(name)
        axis.label.set_visible(True)
    axes.label_outer()


def _word(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.2g}" if value < 10 else f"{value:g}"


def _subject(cells: pd.DataFrame, x: str, y: str) -> str:
    """What all cells have in common and a reader must know."""

    def one(name: str) -> Any:
        values = cells[name].unique()
        return values[0] if len(values) == 1 and name not in (x, y) else None

    asked = one("observable"), one("place")
    sizes = [name for name in AXES if name in cells and one(name) not in (None, AXES[name].default)]
    fixed = [f"{name} {_word(one(name))}" for name in sizes if one(name) == one(name)]
    fixed = [words for words in fixed if not words.startswith(("d_ff 0 ", "question"))]
    return "\n".join(filter(None, [" at ".join(filter(None, asked)), ", ".join(fixed)]))


def _legend(figure: Figure, cells: pd.DataFrame, show: str, widest: int) -> None:
    there = [verdict for verdict in COLOURS if (cells["verdict"] == verdict).any()]
    handles: list[Any] = []
    if show == "verdict":
        handles += [
            Patch(facecolor=COLOURS[verdict], edgecolor="#999999", lw=0.4, label=verdict.lower())
            for verdict in there
        ]
    if {CONFIRMED, REFUTED} <= set(cells["expected"].dropna()):
        handles.append(Line2D([], [], color="black", lw=1.6, label="expected edge"))
    if handles:
        style: Any = {"frameon": False, "fontsize": 8, "ncols": min(len(handles), widest)}
        figure.legend(handles=handles, loc="outside lower center", **style)
