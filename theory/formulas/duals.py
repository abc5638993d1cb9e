"""Dual activations: E phi(X) phi(Y) for a centred Gaussian pair of variances a, b, covariance c."""

from collections.abc import Iterator

import sympy as sp

from theory.formula import Formula, Status
from theory.symbols import a, b, c


def relu() -> sp.Expr:
    """(w + c (pi - t))/(2 pi), w = sqrt(ab - c^2) and t = atan2(w, c), the angle of the pair.

    Source: Cho and Saul 2009, degree 1.  Max(0, .) changes nothing but the rounding at t = 0,
    and one angle for both terms keeps it to the last digits there.
    """
    height = sp.sqrt(sp.Max(0, a * b - c**2))
    return (height + c * (sp.pi - sp.atan2(height, c))) / (2 * sp.pi)


def gelu() -> sp.Expr:
    """c/4 + c asin(c/sqrt((1+a)(1+b)))/(2 pi) + [ab - c^2 + c^2/(1+a) + c^2/(1+b)] / (2 pi w).

    w = sqrt((1+a)(1+b) - c^2).  Derived here by Stein's identity, E X g = a E g_x + c E g_y,
    applied to x Phi(x) y Phi(y) until only E Phi Phi and E phi phi are left.
    """
    quadrant = sp.Rational(1, 4) + sp.asin(c / sp.sqrt((1 + a) * (1 + b))) / (2 * sp.pi)
    density = 1 / (2 * sp.pi * sp.sqrt((1 + a) * (1 + b) - c**2))
    return c * quadrant + (a * b - c**2 + c**2 / (1 + a) + c**2 / (1 + b)) * density


DUALS: dict[str, sp.Expr] = {"identity": c, "relu": relu(), "gelu": gelu()}
"""The dual of each activation an MLP may have."""


def formulas() -> Iterator[Formula]:
    """The duals as formulas in a, b and c."""
    sources = {
        "identity": "definition",
        "relu": "Cho and Saul 2009, degree 1",
        "gelu": "derived here by Stein's identity",
    }
    for name, expr in DUALS.items():
        yield Formula(
            f"dual.{name}",
            expr,
            f"E phi(X) phi(Y) for phi = {name} and a centred Gaussian pair.",
            Status.EXACT,
            sources[name],
            r"\mathbb{E}\,\varphi(X)\,\varphi(Y)",
        )
