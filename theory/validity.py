"""Domain of validity: where a formula agrees with the best that is known.

A formula in positions, widths and standard deviations answers a question about an architecture,
or stands for a better formula.  `entries` says which, formula by formula; `validity` evaluates
both over a grid of the symbols and compares them.  It decides as an expected verdict does, by
the one function `decided`: agreement is established where the better answer lies inside the
tolerance by more than its own remainder, refuted where it lies outside by more than that, and
undecided on the edge.

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

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import sympy as sp

import nope
from nope.checks import expect, expect_finite
from nope.layers import AttentionKind
from nope.questions import OBSERVABLES, Question, Scale, position_grid
from nope.tokens import GaussianTokens
from theory import symbols
from theory.formula import Formula, Numeric, Status
from theory.formulas import formula
from theory.formulas.depth import RandomValueKernel, StackKernel, residual_power_matrix
from theory.formulas.outputs import shared_norm
from theory.formulas.softmax import BreakdownLength, breakdown_leading
from theory.predict import predict
from theory.symbols import H, M_j2, M_jj, beta, d, d_h, ell, g, kappa, m, n, rho, s, sigma_x
from theory.symbols import tolerance as tau

if TYPE_CHECKING:
    import pandas as pd

LONGEST = 1024
"""The positions of a formula that is asked over none: 64 of 1..LONGEST, log-spaced."""

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


# ---------------------------------------------------------------------- values of symbols

DEFAULTS: Mapping[str, Callable[..., Any]] = {
    "d": lambda: 768,
    "H": lambda d: np.gcd(12, d.astype(int)),
    "d_h": lambda d, H: d / H,
    "L": lambda: LONGEST,
    "ell": lambda: 12,
    "sigma": lambda: 0.02,
    "sigma_x": lambda: 0.02,
    "epsilon": lambda: 0.0,
    "s": lambda d, sigma: d * sigma**2,
    "g": lambda s: s**2,
    "kappa": lambda g, sigma_x: g / sigma_x**2,
    "n": lambda m: np.maximum(m - 1, 1),
    "V": lambda: 50257,
    "p_2": lambda V: 1 / V,
    "p_3": lambda p_2: p_2**2,
    "M_jj": lambda d, sigma: np.sqrt(d) * sigma**2,
    "M_j2": lambda d, sigma: d**2 * sigma**4,
}
"""What a symbol is where it is not given, as a function of others: GPT-2 small's sizes, one sigma
for all weights; n the neighbour of m; uniform tokens; of M = W_O W_V a standard deviation of M_jj
and the mean of M_j2."""


def sigma_of_logits(s: np.ndarray, d: np.ndarray) -> np.ndarray:
    """The sigma of logits of standard deviation s, where that is given instead."""
    return np.asarray(np.sqrt(s / d))


def _defaults(given: Iterable[str]) -> Mapping[str, Callable[..., Any]]:
    return {**DEFAULTS, "sigma": sigma_of_logits} if "s" in given else DEFAULTS


def _needed(names: Iterable[str], given: Iterable[str] = ()) -> set[str]:
    """The names, and those that the defaults of what is not given are computed from."""
    defaults, found, queue = _defaults(given), set[str](), list(names)
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            if name in defaults and name not in given:
                queue += signature(defaults[name]).parameters
    return found


class _Values(dict[str, np.ndarray]):
    """Arrays that broadcast, by symbol; what is missing is its default."""

    def __missing__(self, name: str) -> np.ndarray:
        default = _defaults(self.given)[name]
        read = {other: self[other] for other in signature(default).parameters}
        self[name] = np.asarray(default(**read), dtype=float)
        return self[name]

    def __init__(self, given: Mapping[str, np.ndarray]) -> None:
        super().__init__(given)
        self.given = tuple(given)

    def of(self, asked: Formula) -> dict[str, np.ndarray]:
        """What to call a formula with."""
        return {name: self[name] for name in asked.symbols}


# ----------------------------------------------------------------------------- references


class Reference(Protocol):
    """What a formula is held against: `Asked` and `Better` are built.

    `symbols` are the names that it reads, `fixed` those that it computes from them by itself,
    so that they cannot be given; `scale` is what a tolerance multiplies.
    """

    fixed: ClassVar[frozenset[str]]

    @property
    def symbols(self) -> frozenset[str]: ...
    @property
    def scale(self) -> Scale: ...
    @property
    def words(self) -> str: ...
    def best(self, values: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
        """The best answer and its remainder, on arrays that broadcast."""


@dataclass(frozen=True)
class Better:
    """A formula of higher fidelity in the same meaning.

    A formula is held against itself where nothing better is known: right where it is exact,
    else to within its own remainder.
    """

    formula: Formula
    scale: Scale = "relative"
    fixed: ClassVar[frozenset[str]] = frozenset()

    @property
    def symbols(self) -> frozenset[str]:
        return frozenset(self.formula.symbols)

    @property
    def words(self) -> str:
        return f"{self.formula.name} ({str(self.formula.status).replace('_', ' ')})"

    def best(self, values: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
        known = {name: values[name] for name in self.formula.symbols}
        return self.formula(**known), self.formula.remainder_at(**known)


@dataclass(frozen=True)
class _AtPositions(Question):
    """A question whose pairs are of positions of one's own."""

    chosen: tuple[int, ...] = ()

    @property
    def grid(self) -> np.ndarray:
        return np.array(self.chosen)


@dataclass(frozen=True)
class Asked:
    """`theory.predict` at its best, for an observable at a place of a decoder.

    Pre-LN blocks as deep as the place says, of width d with H heads, all weights N(0, sigma^2),
    tokens N(0, sigma_x^2), `epsilon` under the norms' roots.  One question for each of these
    sizes answers all positions.  Raises `ValueError` for an observable whose answer is not by
    position, pair or as a whole.
    """

    place: str
    observable: str
    attention: AttentionKind = "softmax"
    fixed: ClassVar[frozenset[str]] = frozenset({"g", "kappa", "d_h"})
    sizes: ClassVar[tuple[str, ...]] = ("d", "H", "sigma", "sigma_x", "epsilon")
    positions: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "positions": ("m",),
        "adjacent": ("m",),
        "pairs": ("m", "n"),
        "distinct_pairs": ("m", "n"),
        "whole": ("L",),
    }

    def __post_init__(self) -> None:
        known = [kind.name for kind in OBSERVABLES.values() if kind.shape in self.positions]
        expect(self.observable in known, f"one of {', '.join(known)}", self.observable, "change it")

    @property
    def scale(self) -> Scale:
        return OBSERVABLES[self.observable].scale

    @property
    def words(self) -> str:
        return f"the best prediction of {self.observable} at {self.place} ({self.attention})"

    @property
    def symbols(self) -> frozenset[str]:
        return frozenset(self.sizes + self._positions)

    @property
    def _positions(self) -> tuple[str, ...]:
        return self.positions[OBSERVABLES[self.observable].shape]

    def best(self, values: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
        """Answers to one question per point of the sizes."""
        names = self.sizes + self._positions
        columns = np.broadcast_arrays(*(values[name] for name in names))
        flat = np.stack([column.ravel() for column in columns])
        points, group = np.unique(flat[: len(self.sizes)], axis=1, return_inverse=True)
        found = np.empty((2, flat.shape[1]))
        for index, point in enumerate(points.T):
            rows = group.ravel() == index
            found[:, rows] = self._answers(point, flat[len(self.sizes) :, rows].astype(int))
        best, remainder = found.reshape(2, *columns[0].shape)
        return best, remainder

    def _answers(self, sizes: np.ndarray, where: np.ndarray) -> np.ndarray:
        """Values and remainders at columns of positions, for one point of the sizes."""
        if self._positions == ("L",):
            lengths, of = np.unique(where[0], return_inverse=True)
            whole = [predict(self.question(sizes, int(length), (1,))) for length in lengths]
            return np.array([[p.values[0], p.remainder[0]] for p in whole]).T[:, of]
        chosen = np.unique(where)
        reach = int(chosen[-1]) + (OBSERVABLES[self.observable].shape == "adjacent")
        prediction = predict(self.question(sizes, reach, tuple(chosen.tolist())))
        at = where - 1 if len(where) == 1 else np.searchsorted(chosen, where)
        return np.stack([prediction.values[tuple(at)], prediction.remainder[tuple(at)]])

    def question(self, sizes: Iterable[float], n_ctx: int, chosen: tuple[int, ...]) -> Question:
        """The question at values of `sizes`, pairs asked at the chosen positions."""
        width, heads, std, token_std, eps = (float(size) for size in sizes)
        block = re.match(r"blocks\.(\d+)\.", self.place)
        architecture = nope.decoder(
            int(width),
            int(heads),
            int(block[1]) + 1 if block else 1,
            n_ctx=max(n_ctx, OBSERVABLES[self.observable].least),
            attention=self.attention,
            tokens=GaussianTokens(token_std),
            eps=eps,
        )
        init = nope.init.normal(std)
        return _AtPositions(architecture, init, self.place, self.observable, chosen=chosen)


# ----------------------------------------------------------------------------- boundaries


@dataclass(frozen=True, eq=False)
class Boundary(Formula):
    """Where agreement ends: it holds while `of` is below (or above) this expression."""

    of: sp.Expr = field(default_factory=lambda: m)
    holds: Literal["below", "above"] = "below"

    @cached_property
    def bounded(self) -> Formula:
        """`of` as a formula."""
        return Formula(f"{self.name}.of", self.of, self.statement, self.status, self.source)

    @property
    def words(self) -> str:
        return f"{self.of} = {self.expr}.  {self.statement}"

    def inside(self, values: Mapping[str, Any]) -> np.ndarray:
        """Whether points, by the names of all symbols and `tolerance`, are where it holds."""
        with np.errstate(all="ignore"):
            end = self(**{name: values[name] for name in self.symbols})
            here = self.bounded(**{name: values[name] for name in self.bounded.symbols})
        return np.asarray(here <= end if self.holds == "below" else here >= end)


def _boundary(
    of: sp.Expr,
    expr: sp.Expr,
    statement: str,
    remainder: sp.Expr = sp.S.Zero,
    holds: Literal["below", "above"] = "below",
    exact: bool = False,
) -> Boundary:
    return Boundary(
        f"boundary of {of}",
        expr,
        statement,
        Status.EXACT if exact else Status.LEADING_ORDER,
        "derived here",
        sp.latex(of),
        remainder=remainder,
        of=of,
        holds=holds,
    )


LOGITS = "to first order in the logits' variance s^2"


def growth(position: sp.Expr) -> sp.Expr:
    """(m A - 1)/s^2 at s = 0: how fast participation leaves 1/m."""
    return 1 - 1 / position


def growth_with_floor(position: sp.Expr) -> sp.Expr:
    """(m (A + B_off/(d - 1)) - 1)/s^2 at s = 0: in long prefixes 1 + m/d, the floor."""
    shared = growth(position) * (1 - 4 / position + 6 / position**2)
    return growth(position) + position * shared / (d - 1)


def branch(position: sp.Expr) -> sp.Expr:
    """The share of the attention branch in the stream's variance: all of it where kappa >> m."""
    return kappa / (kappa + position)


def _next_order(first: sp.Expr) -> sp.Expr:
    """What s^4 does to a boundary in s^2 that is of first order.

    In short prefixes m A = 1 + (1 - 1/m)(s^2 + (1 - 6/m) s^4/2), where e^(s^2) - 1 was taken for
    the bracket: 3 s^4/m.  The rest is at most s^4.
    """
    return (1 + 3 / sp.Min(m, n)) * first**2


def _of_moment(rate: sp.Expr, statement: str) -> Boundary:
    """rate (e^(s^2) - 1) = tolerance, a relative error."""
    first = tau / rate
    remainder = _next_order(first).subs(n, m) if not rate.has(n) else _next_order(first)
    return _boundary(s**2, sp.log(1 + first), f"{statement}, {LOGITS}.", remainder)


def _of_cosine(cosine: sp.Expr, weight: Callable[[sp.Expr], sp.Expr], statement: str) -> Boundary:
    """cos (1 - e^(-rate s^2)) = tolerance, less the 3 cos (1 - cos^2)/(2d) of three Gaussian maps.

    Both norms grow, each by half of its rate; a cosine below the tolerance agrees at any s.
    """
    rate = sum(weight(position) * growth_with_floor(position) for position in (m, n)) / 2
    left = tau / cosine - 3 * (1 - cosine**2) / (2 * d)
    end = -sp.log(sp.Max(0, 1 - left)) / (rate * (1 - sp.KroneckerDelta(m, n)))
    return _boundary(s**2, end, f"{statement}, {LOGITS}.", _next_order(end))


def _kernel_rate(cosine: sp.Expr, weight: Callable[[sp.Expr], sp.Expr]) -> sp.Expr:
    """Of a kernel, over sqrt(K_mm K_nn): the moment's on the diagonal, little beside it."""
    same = sp.KroneckerDelta(m, n)
    off = cosine * (shared_norm(m) + shared_norm(n)) / (d - 1)
    return same * weight(m) * growth_with_floor(m) + (1 - same) * off


UNIFORM_COSINE = sp.sqrt(sp.Min(m, n) / sp.Max(m, n))
STREAM_COSINE = UNIFORM_COSINE * sp.sqrt(branch(m) * branch(n))
"""Of the stream after uniform attention, m != n."""


def _of_dilution() -> Boundary:
    """sqrt(n/m) (1 - 1/sqrt((1 + m/kappa)(1 + n/kappa))) = tolerance, solved for kappa."""
    kept = sp.Max(0, 1 - tau / UNIFORM_COSINE) ** -2
    total = m + n
    inverse = (sp.sqrt(total**2 + 4 * m * n * (kept - 1)) - total) / (2 * m * n)
    end = (1 - sp.KroneckerDelta(m, n)) / inverse
    beside = 3 * (1 - UNIFORM_COSINE**2) / (2 * d) + s**2 * growth_with_floor(sp.Max(m, n))
    return _boundary(
        kappa,
        end,
        "The stream dilutes adjacency: neighbours are alike up to m = kappa tolerance/"
        "(1 - tolerance), where neither the width nor softmax counts.",
        end / tau * beside,
        holds="above",
    )


def _of_condensation() -> Boundary:
    """The leading correction over the leading term, which goes as 1/(d - 1).

    The correction is of the size e^(2 s^2)/m; the next has third cumulants, e^(5 s^2)/m^2, which
    is e^(s^2) times its square.
    """
    leading, beyond = breakdown_leading()
    end = 1 + sp.simplify(beyond * (d - 1) / leading) / tau
    return _boundary(
        d,
        end,
        "About 2 s^2 e^(s^2)/tolerance, which is s^2 = (1/2) ln(tolerance m_*/2): from there on "
        "softmax condenses within the length, and the limits of long prefixes do not hold.",
        2 * tau * sp.exp(s**2) * end,
        holds="above",
    )


def _of_expansion() -> Boundary:
    """The coefficients of 1/d^2 and, as in `expansion_remainder`, at most twice for 1/d^3."""
    second = sp.Abs(rho * (1 - rho**2) * (1 - 9 * rho**2)) / 8
    return _boundary(
        d,
        sp.sqrt(second / tau),
        "The next term of the expansion, rho (1 - rho^2)(1 - 9 rho^2)/(8 d^2).",
        8 / sp.Abs(1 - 9 * rho**2),
        holds="above",
    )


def _of_depth(leading: Formula) -> Boundary:
    """remainder = C r^ell = tolerance."""
    at_zero, at_one = (leading.remainder.subs(ell, depth) for depth in (0, 1))
    return _boundary(
        ell,
        sp.log(at_zero / tau) / sp.log(at_zero / at_one),
        "From this depth on the stated remainder is below the tolerance; agreement may begin "
        "earlier.",
        holds="above",
    )


# ------------------------------------------------------------------------- the entries


class ResidualPowerCosine(Numeric):
    """The cosine of rows m and n of (I + beta C)^ell."""

    by = "whole matrices"
    nargs = 4

    @staticmethod
    def numbers(*arrays: np.ndarray) -> np.ndarray:
        rows = np.broadcast_arrays(*arrays)
        left, right = (array.ravel().astype(int) - 1 for array in rows[:2])
        stacks, group = np.unique([a.ravel() for a in rows[2:]], axis=1, return_inverse=True)
        values = np.empty(left.shape)
        for index, (layers, gain) in enumerate(stacks.T):
            at = group.ravel() == index
            longest = int(max(left[at].max(), right[at].max())) + 1
            matrix = residual_power_matrix(longest, int(layers), float(gain))
            matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
            values[at] = np.einsum("ij,ij->i", matrix[left[at]], matrix[right[at]])
        return values.reshape(rows[0].shape)


@dataclass(frozen=True)
class Entry:
    """What the formula of this name is held against, and where agreement ends if that is known."""

    name: str
    against: Reference
    boundary: Boundary | None = None


STREAM = Asked("blocks.0.ln2", "cosine")
"""What `cosine.uniform` is not about, and may be taken for: the stream after attention."""


@cache
def entries() -> tuple[Entry, ...]:
    """Every formula that is printed or to leading order, or exact for uniform attention only.

    Of two entries of a name the first is the default.  A formula without an entry is held
    against itself.
    """
    return (*_layer(), *_softmax(), *_cosines(), *_depth())


def _layer() -> Iterator[Entry]:
    """One layer of softmax attention, and the stream after it."""
    attention, out, mid = "blocks.0.attn", "blocks.0.attn_out", "blocks.0.resid_mid"
    yield Entry(
        "attention.logit_second_moment_printed",
        Asked(f"{attention}.scores", "mean_second_moment"),
        _boundary(H, 1 + tau, "A factor H too small: right for one head.", exact=True),
    )
    yield Entry(
        "attention.uniform_participation",
        Asked(f"{attention}.pattern", "participation"),
        _of_moment(growth(m), "In long prefixes the participation grows by e^(s^2)"),
    )
    yield Entry(
        "attention.uniform_second_moment",
        Asked(out, "second_moment"),
        _of_moment(
            growth_with_floor(m),
            "Participation adds s^2, and the floor m s^2/d: however small s is, the 1/m law ends "
            "near m = tolerance d/s^2, the tolerance times the breakdown length m_*",
        ),
    )
    yield Entry(
        "attention.uniform_covariance",
        Asked(out, "kernel"),
        _of_moment(_kernel_rate(UNIFORM_COSINE, lambda _: sp.S.One), "As for the second moment"),
    )
    yield Entry(
        "residual.second_moment",
        Asked(mid, "second_moment"),
        _of_moment(branch(m) * growth_with_floor(m), "A wide stream, kappa << m, hides the branch"),
    )
    yield Entry(
        "residual.kernel",
        Asked(mid, "kernel"),
        _of_moment(_kernel_rate(STREAM_COSINE, branch), "As for the second moment"),
    )
    yield Entry(
        "residual.coordinate_variance_printed",
        Better(formula("residual.coordinate_variance")),
        _boundary(
            m,
            2 * sp.Abs(M_jj) / (tau * sigma_x) - M_j2 / sigma_x**2,
            "The cross term 2 sigma_x M_jj is missing.",
            holds="above",
            exact=True,
        ),
    )


def _softmax() -> Iterator[Entry]:
    """Formulas in s, against formulas in s of higher fidelity."""
    output = Better(formula("attention.output_second_moment_finite_head"))
    yield Entry("attention.output_second_moment", output)
    yield Entry(
        "attention.floor",
        output,
        _boundary(
            m,
            BreakdownLength(s, d) / tau,
            "The averaging, m_*/m of the floor, has fallen below the tolerance.",
            BreakdownLength(s, d) / tau * (s**4 / d_h + 4 / (d * tau)),
            holds="above",
        ),
    )
    yield Entry("attention.participation_expansion", Better(formula("attention.participation")))
    yield Entry(
        "attention.breakdown_length_leading",
        Better(formula("attention.breakdown_length")),
        _of_condensation(),
    )
    for name in ("attention.root_bias", "attention.adjacent_cosine"):
        yield Entry(name, Better(formula(name), "absolute"))


def _cosines() -> Iterator[Entry]:
    """Cosines and probabilities: absolute errors."""
    yield Entry(
        "cosine.uniform",
        Asked("blocks.0.attn_out", "cosine"),
        _of_cosine(UNIFORM_COSINE, lambda _: sp.S.One, "Softmax adds to both norms"),
    )
    yield Entry("cosine.uniform", STREAM, _of_dilution())
    yield Entry(
        "residual.cosine",
        STREAM,
        _of_cosine(STREAM_COSINE, branch, "Softmax adds to both norms, less in a wide stream"),
    )
    yield Entry(
        "cosine.gaussian_pair_expansion",
        Better(formula("cosine.gaussian_pair"), "absolute"),
        _of_expansion(),
    )
    for name in ("cosine.triple_probability", "tokens.uniform_cosine"):
        yield Entry(name, Better(formula(name), "absolute"))


def _depth() -> Iterator[Entry]:
    """The collapse onto the first token, of weights and of cosines."""
    stack, values = StackKernel(m, n, ell), RandomValueKernel(m, n, ell, g)
    exact = {
        "collapse": 1 - formula("depth.first_token_weight").expr,
        "collapse_residual": 1 - formula("depth.first_token_weight_residual").expr,
        "collapse_cosine": 1 - _normalised(stack),
        "collapse_cosine_residual": 1 - ResidualPowerCosine(m, n, ell, beta),
        "collapse_cosine_random_values": 1 - _normalised(values),
    }
    for name, expr in exact.items():
        leading = formula(f"depth.{name}")
        better = Formula(
            f"{leading.name}, exact",
            expr,
            leading.statement,
            Status.EXACT,
            leading.source,
            leading.left,
        )
        yield Entry(leading.name, Better(better, "absolute"), _of_depth(leading))


def _normalised(kernel: sp.Expr) -> sp.Expr:
    return kernel / sp.sqrt(kernel.subs(n, m) * kernel.subs(m, n))


def entry(asked: Formula, against: Reference | None = None) -> Entry:
    """The entry of a formula, or one made for it.

    Raises `ValueError` for a formula that is not exact, states no remainder and has no entry.
    """
    for found in entries():
        if found.name == asked.name and against in (None, found.against):
            return found
    known = against is not None or asked.status is Status.EXACT or asked.remainder != 0
    expect(
        known,
        "a formula that is exact, states a remainder or has an entry in theory.validity",
        asked.name,
        "give against=Asked(place, observable) or against=Better(formula)",
    )
    return Entry(asked.name, against or Better(asked))


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
    sigma_x = 0.02, eps 0, 12 layers, a vocabulary of 50257; see `DEFAULTS`): s = d sigma^2, or
    sigma from s where s is given; m all of 1 to 1024, log-spaced; n the neighbour of m.

    `against` says what the formula is held against: `Asked(place, observable)` for
    `theory.predict` at its best, `Better(formula)` for another formula; by default what
    `entries` has for the name.

    Raises `LookupError` for an unknown name and `ValueError` for a symbol that nothing here
    reads, that has no default or whose values are empty or out of their domain, and for a
    tolerance that is not positive and finite.
    """
    expect_finite("tolerance", tolerance, positive=True)
    law = formula(asked) if isinstance(asked, str) else asked
    found = entry(law, against)
    axes = _axes(law, found.against, over or {})
    grid = np.meshgrid(*axes.values(), indexing="ij", sparse=True)
    values = _Values({**dict(zip(axes, grid, strict=True)), "tolerance": np.array(tolerance)})
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
    allowed = _needed(read) - against.fixed
    allowed |= {"s"} if "sigma" in allowed else set()
    axes: dict[str, np.ndarray] = {}
    for name, values in over.items():
        symbol = _known(name, allowed, law)
        expect(symbol.name not in axes, f"{symbol.name} once", name, "drop one")
        axes[symbol.name] = _axis(symbol, values)
    both = {"s", "sigma"} <= set(axes)
    expect(not both, "s or sigma", "both", "drop one: s = d sigma^2")
    needed = _needed(read, axes)
    missing = sorted(needed - set(axes) - set(DEFAULTS) - {"m"})
    expect(not missing, f"values for {', '.join(missing)}", "none", "add them to over")
    if "m" in needed and "m" not in axes:
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


def _scale(law: Formula, scale: Scale, own: Any, values: _Values) -> Any:
    """What a tolerance multiplies: as for a claim, of the formula that is judged."""
    if scale == "absolute":
        return 1.0
    if scale == "relative":
        return np.abs(own)
    known = values.of(law)
    left, right = ({**known, "m": known[name], "n": known[name]} for name in ("m", "n"))
    return np.sqrt(np.abs(law(**left) * law(**right)))
