"""Boundaries: where a formula stops agreeing with its reference, in closed form.

`entries` says, formula by formula, what it is held against and, where that is known, at which
value of which symbol agreement ends.

>>> found = entry(formula("attention.uniform_participation"))
>>> found.boundary.of, found.boundary.holds, found.boundary.expr
(s**2, 'below', log(tolerance/(1 - 1/m) + 1))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
import sympy as sp

from nope.checks import expect
from theory.formula import Formula, Numeric, Status
from theory.formulas import formula
from theory.formulas.depth import RandomValueKernel, StackKernel, residual_power_matrix
from theory.formulas.outputs import shared_norm
from theory.formulas.softmax import BreakdownLength
from theory.formulas.softmax_expansions import breakdown_leading
from theory.references import Asked, Better, Reference
from theory.symbols import H, M_j2, M_jj, beta, d, d_h, ell, g, kappa, m, n, rho, s, sigma_x
from theory.symbols import tolerance as tau

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
        "a formula that is exact, states a remainder or has an entry in theory.boundaries",
        asked.name,
        "give against=Asked(place, observable) or against=Better(formula)",
    )
    return Entry(asked.name, against or Better(asked))
