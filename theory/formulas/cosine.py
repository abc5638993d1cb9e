"""Cosines at finite width and the adjacency score of Zuo et al."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import sympy as sp

from nope.questions import position_grid
from theory.cache import kept
from theory.formula import Formula, Status, compile_number_form
from theory.symbols import d, d_eff, i, j, k, m, n, rho

LARGE = 512
"""Rows of more positions than this are averaged by a midpoint rule of this many cells."""


def gaussian_pair() -> sp.Expr:
    """E cos of d i.i.d. Gaussian coordinate pairs of correlation rho."""
    half = sp.Rational(1, 2)
    ratio = sp.gamma((d + 1) / 2) / sp.gamma(d / 2)
    return rho * 2 / d * ratio**2 * sp.hyper([half, half], [(d + 2) / 2], rho**2)


@cache
@kept
def gaussian_pair_expansion(order: int = 1) -> sp.Expr:
    """Terms up to 1/d^order (3 at most), from Stirling's series and the hypergeometric's own."""
    x = sp.Symbol("x", positive=True)  # 1/d, so that z = d/2 = 1/(2x)
    z = 1 / (2 * x)

    def stirling(h: sp.Expr) -> sp.Expr:
        """log Gamma(z + h) less (z + h - 1/2) log z - z and a constant."""
        log = sp.series(sp.log(1 + 2 * h * x), x, 0, 6).removeO()
        w = z + h
        return (w - sp.Rational(1, 2)) * log - h + 1 / (12 * w) - 1 / (360 * w**3)

    # The two log z that are left, log(z) + log(2/d), cancel.
    half = sp.Rational(1, 2)
    log_ratio = sp.series(2 * (stirling(half) - stirling(sp.Integer(0))), x, 0, order + 1)
    terms = [
        sp.rf(half, k) ** 2 / (sp.rf((1 / x + 2) / 2, k) * sp.factorial(k)) * rho ** (2 * k)
        for k in range(order + 1)
    ]
    product = sp.exp(log_ratio.removeO()) * sp.together(sp.expand_func(sum(terms)))
    expansion = sp.series(product, x, 0, order + 1).removeO()
    return (rho * sp.factor(expansion)).subs(x, 1 / d)


def expansion_remainder() -> sp.Expr:
    """|rho| (1 - rho^2) (1 + 4/d)/d^2.

    In `gaussian_pair_expansion(3)` the coefficients of 1/d^2 and 1/d^3 are at most 1 and 2 times
    rho (1 - rho^2); twice the latter covers what follows (checked at d = 4 and up).
    """
    return sp.Abs(rho) * (1 - rho**2) * (1 + 4 / d) / d**2


def cosine_covariance() -> sp.Expr:
    """Covariance of the cosines C_ij and C_ik, in units of 1/d_eff.

    Pearson and Filon's for two sample correlations that share an index,
    r_jk (1 - r_ij^2 - r_ik^2) - r_ij r_ik (1 - r_ij^2 - r_ik^2 - r_jk^2)/2, at sqrt(min/max).
    """
    x, y, z = sp.sqrt(j / i), sp.sqrt(k / i), sp.sqrt(j / k)
    return z * (1 - x**2 - y**2) - x * y * (1 - x**2 - y**2 - z**2) / 2


def difference_variance() -> sp.Expr:
    """V of C_ik - C_ij, in units of 1/d_eff; one cosine of mean r has variance (1 - r^2)^2."""
    return (1 - j / i) ** 2 + (1 - k / i) ** 2 - 2 * cosine_covariance()


def _normal_cdf(score: sp.Expr) -> sp.Expr:
    return (1 + sp.erf(score / sp.sqrt(2))) / 2


def plain_triple_probability() -> sp.Expr:
    """Phi(sqrt(d_eff) (y - x)/sqrt(V)), x = sqrt(j/i), y = sqrt(k/i): cosines as Gaussian."""
    step = sp.sqrt(k / i) - sp.sqrt(j / i)
    return _normal_cdf(sp.sqrt(d_eff) * step / sp.sqrt(difference_variance()))


def triple_probability(width: sp.Expr = d_eff) -> sp.Expr:
    """The same in Fisher's scale, where a cosine's skewness is gone and its variance is 1/d_eff.

    Phi(sqrt(d_eff) (atanh y - atanh x)/sqrt(W)), W = 2 - 2 cov/((1 - x^2)(1 - y^2)).
    """
    x, y = sp.sqrt(j / i), sp.sqrt(k / i)
    variance = 2 - 2 * cosine_covariance() / ((1 - x**2) * (1 - y**2))
    return _normal_cdf(sp.sqrt(width) * (sp.atanh(y) - sp.atanh(x)) / sp.sqrt(variance))


def triple_remainder() -> sp.Expr:
    """How far the two scales differ, an effect of order 1/sqrt(d_eff), plus the worth of one
    degree of freedom, which the centring of a LayerNorm takes."""
    fewer = triple_probability(sp.Max(d_eff - 1, 0))
    return sp.Abs(triple_probability() - plain_triple_probability()) + sp.Abs(
        triple_probability() - fewer
    )


def formulas() -> Iterator[Formula]:
    """Cosines of prefix means, of Gaussian pairs, and the score's law."""
    uniform = sp.sqrt(sp.Min(m, n) / sp.Max(m, n))
    yield Formula(
        "cosine.uniform",
        uniform,
        "Prefix means share the shorter prefix: their cosine is sqrt(n/m), n < m.",
        Status.PRINTED,
        "zuo2025, adjacency",
        r"\cos(o_m, o_n)",
    )
    yield Formula(
        "cosine.gaussian_pair",
        gaussian_pair(),
        "Expected cosine of two vectors of d i.i.d. Gaussian coordinate pairs of correlation rho.",
        Status.EXACT,
        "classical (uncentred sample correlation); checked here by quadrature",
        r"\mathbb{E}\cos",
    )
    yield Formula(
        "cosine.gaussian_pair_expansion",
        gaussian_pair_expansion(),
        "The first two terms of cosine.gaussian_pair in 1/d.",
        Status.LEADING_ORDER,
        "derived here",
        r"\mathbb{E}\cos",
        remainder=expansion_remainder(),
    )
    yield Formula(
        "cosine.prefix_means",
        gaussian_pair().subs(rho, uniform),
        "Expected cosine of the means of the first m and the first n of i.i.d. Gaussian vectors.",
        Status.EXACT,
        "zuo2025, adjacency, at finite width; derived here",
        r"\mathbb{E}\cos(\bar x_m, \bar x_n)",
    )
    yield Formula(
        "cosine.triple_probability",
        triple_probability(),
        "Probability that position k is closer to i than j is, j < k < i.",
        Status.LEADING_ORDER,
        "derived here from Pearson and Filon's covariance in Fisher's scale",
        r"P(C_{ij} < C_{ik})",
        remainder=triple_remainder(),
    )


@cache
def _compiled_triple() -> tuple[Callable[..., Any], Callable[..., Any]]:
    arguments = (j, k, i, d_eff)
    return (
        compile_number_form(triple_probability(), arguments),
        compile_number_form(triple_remainder(), arguments),
    )


def adjacency_score(n_ctx: int, width: float, variant: str) -> tuple[float, float]:
    """The law of the score of a self-cosine matrix of prefix means, and its remainder.

    The mean of `triple_probability` over j < k < i <= n_ctx (`triples`) or over k = j + 1
    (`steps`).  At most 64 log-spaced rows i are averaged and interpolated.  `width` is d_eff.
    """
    rows = position_grid(n_ctx)
    rows = rows[rows >= 3]
    means = np.array([_row(int(row), width, variant) for row in rows])
    every = np.arange(3, n_ctx + 1)
    weights = (every - 1.0) * (every - 2.0) / 2 if variant == "triples" else every - 2.0
    filled = [np.interp(np.log(every), np.log(rows), column) for column in means.T]
    value, remainder = (float(np.average(column, weights=weights)) for column in filled)
    return value, remainder


def _row(row: int, width: float, variant: str) -> tuple[float, float]:
    """Mean probability and remainder over the pairs j < k of one row i."""
    if variant == "steps":
        left, weights = np.arange(1.0, row - 1), np.ones(row - 2)
        right = left + 1
    elif row <= LARGE:
        left, right = (index + 1.0 for index in np.triu_indices(row - 1, 1))
        weights = np.ones(len(left))
    else:
        left, right, weights = _midpoint_pairs(row)
    found = [form(left, right, float(row), width) for form in _compiled_triple()]
    return float(np.average(found[0], weights=weights)), float(
        np.average(found[1], weights=weights)
    )


def _midpoint_pairs(row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of centres of the cells of 1..row-1, and per cell one pair at its mean distance."""
    cell = (row - 1) / LARGE
    centres = 0.5 + (np.arange(LARGE) + 0.5) * cell
    first, second = np.triu_indices(LARGE, 1)
    left = np.concatenate([centres[first], centres - (cell + 1) / 6])
    right = np.concatenate([centres[second], centres + (cell + 1) / 6])
    within = np.full(LARGE, (1 - 1 / cell) / 2)
    return left, right, np.concatenate([np.ones(len(first)), within])
