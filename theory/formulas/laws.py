"""Densities and moments of single coordinates and logits.

Derived here unless said otherwise: a coordinate of a point of a sphere, a Gaussian of random
variance (a chi-square makes it a symmetric variance-gamma law), functions of a Gaussian.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import sympy as sp
from scipy.special import kve
from sympy.printing.latex import LatexPrinter

from theory.formula import Formula, Numeric, Status
from theory.laws.variance import chi_square, log_laplace
from theory.symbols import d, d_h, eps, nu, s, sigma_x, v, x

ORDERS = (2, 4, 6, 8)
"""Moments are given up to this order."""

HALF = sp.Rational(1, 2)


class LogBesselK(Numeric):
    """log((z/2)^a K_a(z)), which stays finite at z = 0 (a > 0) and at orders of thousands."""

    by = "SciPy's kve; (Gamma(a)/2) E exp(-z^2/(4T)), T ~ Gamma(a), where that overflows"

    @staticmethod
    def numbers(*arrays: np.ndarray) -> np.ndarray:
        a, z = np.broadcast_arrays(*(np.asarray(array, dtype=float) for array in arrays))
        with np.errstate(all="ignore"):
            values = np.atleast_1d(np.log(kve(a, z)) - z + a * np.log(z / 2))
        a, z = np.atleast_1d(a), np.atleast_1d(z)
        missing = ~np.isfinite(values)
        for order in np.unique(a[missing]):
            at = missing & (a == order)
            values[at] = log_laplace(2 * order, z[at]) if order > 0 else np.inf
        return values.reshape(np.broadcast_shapes(*map(np.shape, arrays)))

    def _eval_rewrite_as_besselk(self, a: sp.Expr, z: sp.Expr, **hints: Any) -> sp.Expr:
        return sp.log((z / 2) ** a * sp.besselk(a, z))

    def _latex(self, printer: LatexPrinter, exp: str | None = None) -> str:
        a, z = (printer._print(argument) for argument in self.args)
        power = "" if exp is None else f"^{{{exp}}}"
        half = rf"\left(\frac{{{z}}}{{2}}\right)"
        return rf"\log{power}\left[{half}^{{{a}}} K_{{{a}}}\left({z}\right)\right]"


class Shrinkage(Numeric):
    """E S/(S + e), S chi-square with nu degrees of freedom: (nu/2) e^(e/2) E_(1 + nu/2)(e/2).

    E is the exponential integral (DLMF 8.19), which SciPy has for whole orders only.
    """

    by = "the trapezoidal rule in log S"

    @staticmethod
    def numbers(*arrays: np.ndarray) -> np.ndarray:
        freedom, offset = np.broadcast_arrays(*(np.asarray(a, dtype=float) for a in arrays))
        pairs = zip(freedom.ravel(), offset.ravel(), strict=True)
        values = [chi_square(float(k)).scaled(k).shrunk(e).mean for k, e in pairs]
        return np.array(values).reshape(freedom.shape)

    def _eval_rewrite_as_expint(self, freedom: sp.Expr, e: sp.Expr, **hints: Any) -> sp.Expr:
        return freedom / 2 * sp.exp(e / 2) * sp.expint(1 + freedom / 2, e / 2)


# ------------------------------------------------------------------------- the densities


def gaussian() -> sp.Expr:
    """exp(-x^2/(2v))/sqrt(2 pi v)."""
    return sp.exp(-(x**2) / (2 * v)) / sp.sqrt(2 * sp.pi * v)


def sphere(n: sp.Expr) -> sp.Expr:
    """The density of sqrt(n) t, t a coordinate of a uniform point of the sphere in n dimensions.

    Gamma(n/2)/(sqrt(pi n) Gamma((n-1)/2)) (1 - x^2/n)^((n-3)/2) for |x| < sqrt(n).
    """
    top = sp.gamma(n / 2) / (sp.sqrt(sp.pi * n) * sp.gamma((n - 1) / 2))
    return top * sp.Abs(1 - x**2 / n) ** ((n - 3) / 2) * sp.Heaviside(n - x**2, 0)


def variance_gamma(freedom: sp.Expr = nu, variance: sp.Expr = v) -> sp.Expr:
    """sqrt(nu/(pi v))/Gamma(nu/2) (z/2)^a K_a(z), a = (nu-1)/2 and z = |x| sqrt(nu/v).

    The density of sqrt(V) Z with V = v chi^2_nu/nu.  At nu = 1 it is K_0 and infinite at 0, at
    nu = 2 Laplace's.
    """
    power = LogBesselK((freedom - 1) / 2, sp.Abs(x) * sp.sqrt(freedom / variance))
    return sp.sqrt(freedom / (sp.pi * variance)) * sp.exp(power) / sp.gamma(freedom / 2)


INVERSES: Mapping[str, sp.Expr] = {
    "identity": x,
    "relu": x,
    "tanh": sp.atanh(x),
}
"""The inverses, where one function has them in closed form, of the activations."""


def transformed(name: str) -> sp.Expr:
    """The density of phi(X), X ~ N(0, v), for the activations of `INVERSES`; no atom in it."""
    inverse = INVERSES[name]
    density = gaussian().subs(x, inverse) * sp.diff(inverse, x)
    return density * sp.Heaviside(x, 0) if name == "relu" else density


# -------------------------------------------------------------------------- the moments


def gaussian_moments() -> dict[int, sp.Expr]:
    """E x^k = (k-1)!! v^(k/2)."""
    return {k: sp.factorial2(k - 1) * v ** (k // 2) for k in ORDERS}


def sphere_moments(n: sp.Expr) -> dict[int, sp.Expr]:
    """E x^k = (k-1)!! n^(k/2) / (n (n+2) ... (n+k-2))."""
    return {
        k: sp.factorial2(k - 1) * sp.prod([n / (n + 2 * i) for i in range(k // 2)]) for k in ORDERS
    }


def variance_gamma_moments(freedom: sp.Expr = nu, variance: sp.Expr = v) -> dict[int, sp.Expr]:
    """E x^k = (k-1)!! v^(k/2) nu (nu+2) ... (nu+k-2)/nu^(k/2)."""
    return {
        k: sp.factorial2(k - 1)
        * variance ** (k // 2)
        * sp.prod([1 + 2 * sp.Integer(i) / freedom for i in range(k // 2)])
        for k in ORDERS
    }


def relu_moments() -> dict[int, sp.Expr]:
    """Half of a Gaussian's."""
    return {k: moment / 2 for k, moment in gaussian_moments().items()}


def formulas() -> Iterator[Formula]:
    """The densities by name, and what eps leaves of a second moment."""
    laws = {
        "gaussian": (gaussian(), "A Gaussian coordinate of variance v."),
        "layernorm": (
            sphere(d - 1),
            "A coordinate of LN(x) is sqrt(d-1) times one of a point of the sphere S^(d-2).",
        ),
        "rmsnorm": (
            sphere(d),
            "A coordinate of RMSNorm(x) is sqrt(d) times one of a point of the sphere S^(d-1).",
        ),
        "variance_gamma": (
            variance_gamma(),
            "A Gaussian whose variance is a chi-square of nu degrees of freedom, on average v.",
        ),
        "logit": (
            variance_gamma(d_h, s**2),
            "A scaled logit is a sum of d_h products of Gaussians: symmetric variance-gamma.",
        ),
        **{
            name: (transformed(name), f"The density of {name}(X), X ~ N(0, v).")
            for name in INVERSES
            if name != "identity"
        },
    }
    for name, (density, statement) in laws.items():
        yield Formula(f"law.{name}", density, statement, Status.EXACT, "derived here", left="f(x)")
    yield Formula(
        "layernorm.shrinkage_exact",
        Shrinkage(d - 1, d * eps / sigma_x**2),
        "What eps leaves of a LayerNorm output's second moment, for a Gaussian token.",
        Status.EXACT,
        "derived here: (k/2) e^z E_(1+k/2)(z), k = d - 1 and z = d eps/(2 sigma_x^2)",
        r"\mathbb{E}\,e_j^2",
    )
