"""Dual activations: E phi(X) phi(Y) for a centred Gaussian pair of variances a, b, covariance c.

A gated unit, phi(W_gate x) * (W_in x) with independent W_gate and W_in (SwiGLU, GEGLU, ReGLU),
needs none of its own: its kernel is exactly the dual of phi times the covariance of W_in x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import product
from typing import Any, ClassVar, NamedTuple

import numpy as np
import sympy as sp

from nope.checks import expect_choice
from theory.formula import Formula, Numeric, Status, compile_number_form
from theory.formulas.mehler import Function, correlation, mehler
from theory.symbols import a, b, c

WIDTHS = 16
"""Error functions in the sum that stands for a gate."""


class PositivePart(Numeric):
    """max(0, x), left alone: SymPy's Max compares its arguments, for seconds in a deep kernel."""

    nargs = 1
    by = "comparison with 0"
    is_extended_nonnegative = True

    @classmethod
    def eval(cls, x: sp.Expr) -> sp.Expr | None:
        """A number is compared at once, exactly."""
        return sp.Max(0, x) if x.is_number else None

    @staticmethod
    def numbers(*arrays: np.ndarray) -> np.ndarray:
        """max(0, x)."""
        return np.asarray(np.maximum(arrays[0], 0.0))

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        """The unit step."""
        return sp.Heaviside(self.args[0])

    def _latex(self, printer: Any, exp: str | None = None) -> str:
        power = "" if exp is None else f"^{{{exp}}}"
        return rf"\left({printer._print(self.args[0])}\right)_{{+}}{power}"


def relu() -> sp.Expr:
    """(w + c (pi - t))/(2 pi), w = sqrt(ab - c^2) and t = atan2(w, c), the angle of the pair.

    Source: Cho and Saul 2009, degree 1.  The positive part changes nothing but the rounding at
    t = 0, and one angle for both terms keeps it to the last digits there.
    """
    height = sp.sqrt(PositivePart(a * b - c**2))
    return (height + c * (sp.pi - sp.atan2(height, c))) / (2 * sp.pi)


def erf() -> sp.Expr:
    """(2/pi) asin(2c/sqrt((1+2a)(1+2b))).

    Source: Williams 1997.  erf(x) = 2 P(U < x) - 1 for U of variance 1/2, so that the dual is
    4 P(U < X, W < Y) - 1, and X - U and Y - W have this sine as their correlation (Sheppard).
    """
    return 2 / sp.pi * sp.asin(2 * c / sp.sqrt((1 + 2 * a) * (1 + 2 * b)))


def gelu() -> sp.Expr:
    """c/4 + c asin(c/sqrt((1+a)(1+b)))/(2 pi) + [ab - c^2 + c^2/(1+a) + c^2/(1+b)] / (2 pi w).

    w = sqrt((1+a)(1+b) - c^2).  Derived here by Stein's identity, E X g = a E g_x + c E g_y,
    applied to x Phi(x) y Phi(y) until only E Phi Phi and E phi phi are left.
    """
    quadrant = sp.Rational(1, 4) + sp.asin(c / sp.sqrt((1 + a) * (1 + b))) / (2 * sp.pi)
    density = 1 / (2 * sp.pi * sp.sqrt((1 + a) * (1 + b) - c**2))
    return c * quadrant + (a * b - c**2 + c**2 / (1 + a) + c**2 / (1 + b)) * density


@cache
def _numbers(closed: Callable[[], sp.Expr]) -> Callable[..., Any]:
    return compile_number_form(closed(), (a, b, c))


class Gate(NamedTuple):
    """An odd function from -1 to 1, and the range of the widths t of erf(x/t) that add up to it.

    tanh is a mixture of erf(x/t) with a density over t (the logistic law is a scale mixture of
    normal laws: Stefanski 1991).  `WIDTHS` widths in geometric progression, weighted by least
    squares, leave a relative error below 2e-10 of each gate here and so, by Cauchy and Schwarz,
    one below 4e-10 sqrt(E phi(X)^2 E phi(Y)^2) of a dual at any a, b and c.
    """

    function: Function
    narrow: float
    wide: float


@cache
def error_functions(gate: Gate) -> tuple[np.ndarray, np.ndarray]:
    """Widths t and weights w with gate(x) = sum w erf(x/t)."""
    widths = np.geomspace(gate.narrow, gate.wide, WIDTHS)
    x = np.linspace(0, 10 * gate.wide, 4000)
    from scipy.special import erf as error_function

    basis = error_function(x[:, None] / widths)
    return widths, np.linalg.lstsq(basis, gate.function(x), rcond=1e-14)[0]


class SmoothDual(Numeric):
    """The dual of an activation that is a gate: Mehler's series, error functions where it is slow.

    A variance below 0 counts as 0 and a covariance beyond sqrt(ab) as that: rounding and second
    differences ask for both.
    """

    nargs = 3
    by = "Mehler's series, and closed forms for a sum of error functions where that is slow"
    gate: ClassVar[Gate]

    @classmethod
    def activation(cls, x: np.ndarray) -> np.ndarray:
        """phi(x)."""
        return np.asarray(cls.gate.function(x))

    @staticmethod
    def pair(t: float, u: float, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> Any:
        """E phi_t(X) phi_u(Y), phi_t the activation with erf(x/t) as its gate."""
        return _numbers(erf)(a / t**2, b / u**2, c / (t * u))

    @classmethod
    def mixture(cls, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> Any:
        """The dual by `WIDTHS`^2 closed forms."""
        terms = list(zip(*error_functions(cls.gate), strict=True))
        return sum(w * r * cls.pair(t, u, a, b, c) for (t, w), (u, r) in product(terms, terms))

    @classmethod
    def numbers(cls, *arrays: np.ndarray) -> np.ndarray:
        """The values, to 1e-9 sqrt(E phi(X)^2 E phi(Y)^2)."""
        a, b, c = np.maximum(arrays[0], 0.0), np.maximum(arrays[1], 0.0), arrays[2]
        values = mehler(cls.activation, a, b, c)
        slow = np.isnan(values)
        if slow.any():
            a, b, c = (array[slow] for array in np.broadcast_arrays(a, b, c))
            values[slow] = cls.mixture(a, b, correlation(a, b, c) * np.sqrt(a) * np.sqrt(b))
        return values


class GatedDual(SmoothDual):
    """The dual of x (1 + gate(x))/2."""

    @classmethod
    def activation(cls, x: np.ndarray) -> np.ndarray:
        """phi(x)."""
        return np.asarray(x * (1 + cls.gate.function(x)) / 2)

    @staticmethod
    def pair(t: float, u: float, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> Any:
        """GELU's dual: x (1 + erf(x/t))/2 is t/sqrt(2) times GELU at sqrt(2) x/t."""
        return t * u / 2 * _numbers(gelu)(2 * a / t**2, 2 * b / u**2, 2 * c / (t * u))


class TanhDual(SmoothDual):
    """E tanh(X) tanh(Y)."""

    gate = Gate(np.tanh, 0.4, 4.0)


class SiluDual(GatedDual):
    """E phi(X) phi(Y), phi(x) = x sigmoid(x)."""

    gate = Gate(lambda x: np.tanh(x / 2), 0.8, 8.0)


class GeluTanhDual(GatedDual):
    """E phi(X) phi(Y), phi the tanh approximation of GELU (Hendrycks and Gimpel 2016)."""

    gate = Gate(lambda x: np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)), 0.7, 1.8)


DUALS: Mapping[str, sp.Expr] = {
    "identity": c,
    "relu": relu(),
    "gelu": gelu(),
    "gelu_tanh": GeluTanhDual(a, b, c),
    "silu": SiluDual(a, b, c),
    "tanh": TanhDual(a, b, c),
    "erf": erf(),
}
"""The dual of each activation an MLP may have."""

_SOURCES = {
    "identity": "definition",
    "relu": "Cho and Saul 2009, degree 1",
    "gelu": "derived here by Stein's identity",
    "erf": "Williams 1997",
}


def dual(name: str) -> sp.Expr:
    """The dual of the activation `name` in a, b and c; `ValueError` names those there are."""
    expect_choice("the activation", name, tuple(DUALS))
    return DUALS[name]


def formulas() -> Iterator[Formula]:
    """The duals as formulas in a, b and c."""
    for name, expr in DUALS.items():
        kind = f"By {expr.by}" if isinstance(expr, Numeric) else "A closed form"
        yield Formula(
            f"dual.{name}",
            expr,
            f"E phi(X) phi(Y) for phi = {name} and a centred Gaussian pair.  {kind}.",
            Status.EXACT,
            _SOURCES.get(name, "Mehler 1866; the sum of error functions derived here"),
            r"\mathbb{E}\,\varphi(X)\,\varphi(Y)",
        )
