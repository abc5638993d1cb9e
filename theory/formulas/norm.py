"""LayerNorm and RMSNorm of a Gaussian token: its coordinates are those of a point on a sphere."""

from collections.abc import Iterator

import sympy as sp

from theory.formula import Formula, Status
from theory.symbols import d, eps, sigma_x


def shrinkage_remainder(v: sp.Expr, offset: sp.Expr, freedom: sp.Expr) -> sp.Expr:
    """What v/(v + eps) drops, relative to it: three more terms of the expansion about E S = v.

    S = v chi^2_k/k has central moments 2 v^2/k, 8 v^3/k^2, (12/k^2 + 48/k^3) v^4, and f(S) =
    S/(S + eps) derivatives -2 eps/(S + eps)^3, 6 eps/(S + eps)^4, -24 eps/(S + eps)^5; sizes
    are added.
    """
    k, total = freedom, v + offset
    second = 2 / k * v * offset / total**2
    third = 8 / k**2 * v**2 * offset / total**3
    fourth = (12 / k**2 + 48 / k**3) * v**3 * offset / total**4
    return second + third + fourth


def formulas() -> Iterator[Formula]:
    """Laws of a normalised i.i.d. Gaussian token."""
    yield Formula(
        "layernorm.second_moment",
        sp.Integer(1),
        "With eps 0 a LayerNorm output has |e|^2 = d exactly: a coordinate's second moment is 1.",
        Status.EXACT,
        "chi2023, LayerNorm; definition",
        r"\mathbb{E}\,e_j^2",
    )
    yield Formula(
        "layernorm.kurtosis",
        3 * (d - 1) / (d + 1),
        "A coordinate of LN(x) is sqrt(d-1) times one of a uniform point of the sphere S^(d-2).",
        Status.EXACT,
        "derived here: E t^4 / (E t^2)^2 = 3n/(n+2) on a sphere in n = d-1 dimensions",
        r"\mathbb{E}\,e_j^4 / (\mathbb{E}\,e_j^2)^2",
    )
    yield Formula(
        "rmsnorm.kurtosis",
        3 * d / (d + 2),
        "A coordinate of RMSNorm(x) is sqrt(d) times one of a uniform point of the sphere S^(d-1).",
        Status.EXACT,
        "derived here: E t^4 / (E t^2)^2 = 3n/(n+2) on a sphere in n = d dimensions",
        r"\mathbb{E}\,e_j^4 / (\mathbb{E}\,e_j^2)^2",
    )
    v = sigma_x**2 * (d - 1) / d
    yield Formula(
        "layernorm.shrinkage",
        v / (v + eps),
        "What eps takes from a LayerNorm output's second moment; v is the token's variance.",
        Status.LEADING_ORDER,
        "derived here; the remainder is three more terms of the expansion",
        r"\mathbb{E}\,e_j^2",
        remainder=v / (v + eps) * shrinkage_remainder(v, eps, d - 1),
    )
