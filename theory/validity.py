"""Domain of validity: where a formula agrees with the best that is known.

`theory.boundaries` says what a formula is held against; `validity` evaluates both over a grid of
the symbols and compares them.  It decides as an expected verdict does, by the one function
`decided`: agreement is established where the better answer lies inside the tolerance by more than
its own remainder, refuted where it lies outside by more than that, and undecided on the edge.

>>> import theory
>>> over = {"sigma": [0.005, 0.02], "m": [1, 8]}
>>> found = theory.validity("attention.uniform_participation", over)
>>> print(found.where())
every m from 1 to 8 at sigma = 0.005
m = 1 at sigma = 0.02
>>> found.boundary.of, found.boundary.holds, found.boundary.expr
(s**2, 'below', log(tolerance/(1 - 1/m) + 1))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy as sp

from nope.checks import expect, expect_finite
from nope.questions import Scale, position_grid
from theory import symbols
from theory.boundaries import Boundary, entry
from theory.formula import Formula, Status
from theory.formulas import formula
from theory.references import DEFAULTS, LONGEST, Better, Reference, Values, needed

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 8
"""How many lines of ranges a repr has."""

# ------------------------------------------------------------------------- three values


def decided(values: Any, slack: Any, low: Any, high: Any) -> np.ndarray:
    """Does `values`, known to within `slack`, lie between `low` and `high`?  Entry by entry.

    1 where all of values +- slack does, 0 where none of it does, nan where the edge is within.
    """
    inside = (values - slack >= low) & (values + slack <= high)
    outside = (values + slack < low) | (values - slack > high)
    return np.where(inside, 1.0, np.where(outside, 0.0, np.nan))


def verdict(decisions: np.ndarray) -> str | None:
    """CONFIRMED if all is inside, REFUTED if anything is outside, else None."""
    if (decisions == 1).all():
        return "CONFIRMED"
    return "REFUTED" if (decisions == 0).any() else None


# ---------------------------------------------------------------------------- validity


@dataclass(frozen=True)
class Range:
    """Along one axis, at a point of the others: where it agrees, where that is undecided.

    `worst` is the largest error on it.
    """

    at: Mapping[str, float]
    agrees: str
    undecided: str
    worst: float

    def __str__(self) -> str:
        point = ", ".join(f"{name} = {value:.6g}" for name, value in self.at.items())
        where = f" at {point}" if point else ""
        return self.agrees + where + (f" (undecided: {self.undecided})" if self.undecided else "")


@dataclass(frozen=True, eq=False, repr=False)
class Validity:
    """Where a formula agrees with what it was held against, on the grid of `axes`.

    axes:      the values of each symbol that varies, in the order in which they were given
    values:    the formula; `error` and `remainder` are those of `against` in units of its scale:
               relative for moments, sqrt(K_mm K_nn) for kernels, absolute for cosines and
               probabilities.  All have one axis of the array per entry of `axes`
    boundary:  where agreement ends, or None where that is not known in closed form
    given:     the numbers of every symbol and of `tolerance`, as arrays that broadcast to the grid;
               what was not given is computed when it is looked up
    """

    formula: Formula
    against: Reference
    axes: Mapping[str, np.ndarray]
    tolerance: float
    values: np.ndarray
    error: np.ndarray
    remainder: np.ndarray
    boundary: Boundary | None
    given: Mapping[str, np.ndarray]

    @cached_property
    def decisions(self) -> np.ndarray:
        """1 where agreement is established, 0 where it is refuted, nan where neither."""
        return decided(self.error, self.remainder, -self.tolerance, self.tolerance)

    @property
    def agrees(self) -> np.ndarray:
        """Where agreement is established: error + remainder <= tolerance."""
        return np.asarray(self.decisions == 1)

    @property
    def known(self) -> np.ndarray:
        """Where the better answer is good enough to decide."""
        return np.asarray(np.isfinite(self.decisions))

    @property
    def inside(self) -> np.ndarray | None:
        """Where the boundary says that it agrees, if there is one."""
        if self.boundary is None:
            return None
        return np.broadcast_to(self.boundary.inside(self.given), self.values.shape)

    @property
    def verdict(self) -> str | None:
        """What to expect of the formula as a claim about the whole grid."""
        return verdict(self.decisions)

    def ranges(self, along: str | None = None) -> list[Range]:
        """Agreement in words along an axis, one line per point of the other axes.

        By default along m, or else the first axis of more than one value.  Raises `ValueError`
        for an axis that is not there.
        """
        if not self.axes:
            return [self._range({}, "", ())]
        along = self._along(along)
        others = [name for name in self.axes if name != along]
        place = list(self.axes).index(along)
        return [
            self._range(
                {name: self.axes[name][k] for name, k in zip(others, index, strict=True)},
                along,
                (*index[:place], slice(None), *index[place:]),
            )
            for index in np.ndindex(*(len(self.axes[name]) for name in others))
        ]

    def _along(self, asked: str | None) -> str:
        if asked is not None:
            expect(asked in self.axes, f"an axis of {', '.join(self.axes)}", asked, "change along")
            return asked
        wide = [name for name, points in self.axes.items() if len(points) > 1]
        return "m" if "m" in wide else next(iter(wide or self.axes))

    def _range(self, at: Mapping[str, float], along: str, index: tuple[Any, ...]) -> Range:
        agrees, unknown = (np.atleast_1d(a[index]) for a in (self.agrees, ~self.known))
        points = self.axes.get(along, np.zeros(1))
        return Range(
            at,
            _in_words(along, points, agrees),
            _in_words(along, points, unknown) if unknown.any() else "",
            float(np.max(self.error[index])),
        )

    def where(self, along: str | None = None) -> str:
        """The same, a sentence per line: `m up to 37 at sigma = 0.02, d = 768`."""
        return "\n".join(map(str, self.ranges(along)))

    def table(self) -> pd.DataFrame:
        """A row per point: axes, value, error, remainder, agrees (None where undecided)."""
        import pandas as pd

        grid = np.meshgrid(*self.axes.values(), indexing="ij")
        columns: dict[str, Any] = {
            name: points.ravel() for name, points in zip(self.axes, grid, strict=True)
        }
        columns |= {"value": self.values.ravel(), "error": self.error.ravel()}
        columns["remainder"] = self.remainder.ravel()
        words = {1.0: True, 0.0: False}
        columns["agrees"] = [words.get(decision) for decision in self.decisions.ravel()]
        return pd.DataFrame(columns).astype({"agrees": object})

    @property
    def basis(self) -> str:
        """What the formula was held against, in words."""
        if self.against != Better(self.formula, self.against.scale):
            return f"against {self.against.words}"
        return "exact" if self.formula.status is Status.EXACT else "by its own remainder"

    @property
    def title(self) -> str:
        """What was compared with what."""
        band = f"within {self.tolerance:g} ({self.against.scale})"
        return f"{self.formula.name}, {band}, {self.basis}"

    def __repr__(self) -> str:
        lines = [str(line) for line in self.ranges()]
        more = [f"and {len(lines) - SHOWN} lines more"] if len(lines) > SHOWN else []
        ends = [] if self.boundary is None else [f"ends at {self.boundary.words}"]
        return "\n  ".join([f"{self.title}:", *lines[:SHOWN], *more, *ends])


def _in_words(name: str, points: np.ndarray, inside: np.ndarray) -> str:
    """The runs of points that are inside, in increasing order."""
    if not name:
        return "everywhere" if inside.all() else "nowhere"
    order = np.argsort(points, kind="stable")
    sorted_points, flags = [f"{point:.6g}" for point in points[order]], inside[order]
    first, last = sorted_points[0], sorted_points[-1]
    if not flags.any():
        return f"no {name}"
    if flags.all():
        return f"every {name} from {first} to {last}" if first != last else f"{name} = {first}"
    steps = np.diff(np.concatenate([[0], flags, [0]]).astype(int))
    starts, ends = (np.flatnonzero(steps == step).tolist() for step in (1, -1))
    runs = [_run(sorted_points, start, end - 1) for start, end in zip(starts, ends, strict=True)]
    return f"{name} {' and '.join(runs)}"


def _run(points: list[str], start: int, end: int) -> str:
    if start == end:
        return f"= {points[start]}"
    if start == 0:
        return f"up to {points[end]}"
    last = end == len(points) - 1
    return f"from {points[start]}" if last else f"from {points[start]} to {points[end]}"


def validity(
    asked: str | Formula,
    over: Mapping[str, Any] | None = None,
    tolerance: float = 0.025,
    against: Reference | None = None,
) -> Validity:
    """Where a formula agrees, within a tolerance, with the best that is known.

    `over` gives numbers or lists of them by symbol, and the answer is on their product.  What is
    not given is GPT-2 small's (d = 768, H = 12 or its greatest common divisor with d, sigma =
    sigma_x = 0.02, eps 0, 12 layers, a vocabulary of 50257; see `theory.references.DEFAULTS`):
    s = d sigma^2, or sigma from s where s is given; m all of 1 to 1024, log-spaced; n the
    neighbour of m.

    `against` says what the formula is held against: `Asked(place, observable)` for
    `theory.predict` at its best, `Better(formula)` for another formula; by default what
    `theory.boundaries.entries` has for the name.

    Raises `LookupError` for an unknown name and `ValueError` for a symbol that nothing here
    reads, that has no default or whose values are empty or out of their domain, and for a
    tolerance that is not positive and finite.
    """
    expect_finite("tolerance", tolerance, positive=True)
    law = formula(asked) if isinstance(asked, str) else asked
    found = entry(law, against)
    axes = _axes(law, found.against, over or {})
    grid = np.meshgrid(*axes.values(), indexing="ij", sparse=True)
    values = Values({**dict(zip(axes, grid, strict=True)), "tolerance": np.array(tolerance)})
    shape = tuple(map(len, axes.values()))
    with np.errstate(all="ignore"):
        own = law(**values.of(law))
        best, remainder = found.against.best(values)
        scale = _scale(law, found.against.scale, own, values)
        error = np.where(best == own, 0.0, np.abs(best - own) / scale)
        slack = np.where(remainder == 0, 0.0, np.abs(remainder) / scale)
    own, error, slack = (np.broadcast_to(array, shape) for array in (own, error, slack))
    return Validity(law, found.against, axes, tolerance, own, error, slack, found.boundary, values)


def _axes(law: Formula, against: Reference, over: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The values of each symbol by its own name; m, if it is read and not given, comes last."""
    read = frozenset(law.symbols) | against.symbols
    allowed = needed(read) - against.fixed
    allowed |= {"s"} if "sigma" in allowed else set()
    axes: dict[str, np.ndarray] = {}
    for name, values in over.items():
        symbol = _known(name, allowed, law)
        expect(symbol.name not in axes, f"{symbol.name} once", name, "drop one")
        axes[symbol.name] = _axis(symbol, values)
    both = {"s", "sigma"} <= set(axes)
    expect(not both, "s or sigma", "both", "drop one: s = d sigma^2")
    sources = needed(read, axes)
    missing = sorted(sources - set(axes) - set(DEFAULTS) - {"m"})
    expect(not missing, f"values for {', '.join(missing)}", "none", "add them to over")
    if "m" in sources and "m" not in axes:
        axes["m"] = position_grid(LONGEST).astype(float)
    return axes


def _known(name: str, allowed: set[str], law: Formula) -> sp.Symbol:
    try:
        found = symbols.symbol(name)
    except LookupError:
        found = None
    wanted = ", ".join(sorted(allowed)) or "none"
    known = found is not None and found.name in allowed
    expect(known, f"symbols that {law.name} is a matter of ({wanted})", name, "drop it")
    return found


def _axis(symbol: sp.Symbol, values: Any) -> np.ndarray:
    domain = symbols.describe(symbol).domain
    try:
        points = np.atleast_1d(np.asarray(values, dtype=float))
    except (TypeError, ValueError):
        points = np.zeros(0)
    ok = points.ndim == 1 and points.size > 0 and domain.contains(points)
    shown = values if points.size < 9 else f"{points.size} values"
    expect(ok, f"one or more values for {symbol.name}, {domain.text}", shown, "change it")
    return points


def _scale(law: Formula, scale: Scale, own: Any, values: Values) -> Any:
    """What a tolerance multiplies: as for a claim, of the formula that is judged."""
    if scale == "absolute":
        return 1.0
    if scale == "relative":
        return np.abs(own)
    known = values.of(law)
    left, right = ({**known, "m": known[name], "n": known[name]} for name in ("m", "n"))
    return np.sqrt(np.abs(law(**left) * law(**right)))
