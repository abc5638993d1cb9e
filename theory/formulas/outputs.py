"""The output of one softmax attention layer over independent tokens, at any temperature.

Given its query, the logits of a prefix are i.i.d. Gaussians, so the kernel of the outputs is one
of participations and tilts (`theory.formulas.softmax`).  The expected cosine of two outputs is
more than the cosine of that kernel: the participation P fluctuates from query to query and from
head to head, and E cos takes E P^(-1/2), not (E P)^(-1/2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import sympy as sp

from theory.formula import Formula, Numeric, Status
from theory.formulas.softmax import (
    Participation,
    ParticipationFiniteHead,
    ParticipationSecondMoment,
    SharedTilt,
    SoftmaxMean,
    Tilt,
    Transforms,
    mixed,
)
from theory.formulas.softmax_table import ParticipationTable
from theory.symbols import H, d, d_h, g, m, n, s


class InverseRootParticipation(SoftmaxMean):
    """E (sum_n a_n^2)^(-1/2) = E S_1/sqrt(S_2), S_k = sum_n exp(k s z_n).

    1/sqrt(S_2) = int t^(-1/2) exp(-t S_2) dt/sqrt(pi) makes it m int psi_1/2 phi^(m-1) dx/sqrt(pi)
    with psi and phi at twice the temperature.
    """

    letter = "R"

    @staticmethod
    def uniform(positions: np.ndarray) -> np.ndarray:
        return np.asarray(np.sqrt(positions))

    @classmethod
    def integrated(cls, positions: np.ndarray, transforms: Transforms) -> np.ndarray:
        doubled = Transforms(2 * transforms.s, positions.max(), least=0.5)
        return np.asarray(doubled.integral(positions, 1, doubled.moment(0.5)) / np.sqrt(np.pi))


class SharedTiltSlope(SoftmaxMean):
    """B_off/s^2, at s = 0 (1 - 1/m)(1 - 4/m + 6/m^2); 1 at m = 1, where there is no pair."""

    letter = "b"

    @staticmethod
    def uniform(positions: np.ndarray) -> np.ndarray:
        slope = (1 - 1 / positions) * (1 - 4 / positions + 6 / positions**2)
        return np.where(positions > 1, slope, 1.0)

    @staticmethod
    def densities(transforms: Transforms) -> Mapping[int, np.ndarray]:
        return {2: (transforms.shared() / transforms.s) ** 2}


class SharedTiltFiniteHead(Numeric):
    """E_u B_off(m, s sqrt(u)), u = chi^2_{d_h}/d_h."""

    by = "two one-dimensional quadratures"
    nargs = 3

    @classmethod
    def numbers(cls, *arrays: np.ndarray) -> np.ndarray:
        return mixed(SharedTilt, *arrays)


class TiltFiniteHead(Numeric):
    """E_u B(m, s sqrt(u)), u = chi^2_{d_h}/d_h."""

    by = "two one-dimensional quadratures"
    nargs = 3

    @classmethod
    def numbers(cls, *arrays: np.ndarray) -> np.ndarray:
        return mixed(Tilt, *arrays)


def mean_over_heads(single: Any, relative_variance: Any, heads: Any) -> Any:
    """E (P/E P)^(-1/2) - 1 of the mean P of `heads` independent participations.

    The expansion in cumulants starts with 3/8 of the relative variance over H; the next are
    of order 1/H^2, and are what one head, known exactly, leaves: right at H = 1 and to first
    order in 1/H.
    """
    leading = 3 * relative_variance / 8
    return leading / heads + (single - leading) / heads**2


class RootBias(Numeric):
    """E (P/E P)^(-1/2) - 1 of the participation averaged over H heads of width d_h."""

    by = "one-dimensional quadratures; interpolated in 1/H"
    nargs = 4

    @classmethod
    def numbers(cls, *arrays: np.ndarray) -> np.ndarray:
        positions, spread, degrees, heads = arrays
        mean = mixed(Participation, positions, spread, degrees)
        square = mixed(ParticipationSecondMoment, positions, spread, degrees)
        root = mixed(InverseRootParticipation, positions, spread, degrees)
        return np.asarray(mean_over_heads(root * np.sqrt(mean) - 1, square / mean**2 - 1, heads))


def root_bias(table: ParticipationTable, positions: Any, variances: Any) -> np.ndarray:
    """`RootBias` of one head, from a table."""
    root = table.logarithm(InverseRootParticipation, positions, variances)
    return np.expm1(root + table.logarithm(Participation, positions, variances) / 2)


def tilt_growth(table: ParticipationTable, positions: Any, variances: Any) -> np.ndarray:
    """B_off/s^2 over its value at s = 0, from a table."""
    return np.asarray(np.exp(table.logarithm(SharedTiltSlope, positions, variances)))


def width_coefficient(fixed_norm: bool) -> sp.Rational:
    """What a finite width d adds to ln m A, over (ln m A)^2/d: -5/2 for keys of fixed norm, else 1.

    Given the query, a logit is |w| <w/|w|, e_n>: |w|^2 has a relative variance of 2/d and a
    coordinate of a sphere an excess kurtosis of -6/d, a Gaussian one none.  In a long prefix
    ln m A is kappa(2) - 2 kappa(1), kappa the cumulant generating function, s^2 to leading
    order; it is read off ln m A itself, which saturates where attention condenses.
    """
    theta = sp.Symbol("theta")
    kurtosis, spread = (-6 if fixed_norm else 0), 2
    kappa = kurtosis * theta**4 / 24
    return kappa.subs(theta, 2) - 2 * kappa.subs(theta, 1) + sp.Rational(spread, 2)


def participation(spread: sp.Expr, freedom: sp.Expr, fixed_norm: bool) -> sp.Expr:
    """E sum_n a_mn^2 of a real layer: heads of width d_h, keys of `freedom` dimensions."""
    A = ParticipationFiniteHead(m, spread, d_h)
    return A * sp.exp(width_coefficient(fixed_norm) * sp.log(m * A) ** 2 / freedom)


def shared_norm(position: sp.Expr) -> sp.Expr:
    """h(m) = (m - 1)(m - 2)/m^2: what keys of fixed norm take from pairs of queries, over s^2/d."""
    return (position - 1) * (position - 2) / position**2


def second_moment(spread: sp.Expr, freedom: sp.Expr, fixed_norm: bool) -> sp.Expr:
    """E|o_m|^2 over that of one value: A + B_off/d, or ((d - 1) A + B)/d where norms fluctuate."""
    A = participation(spread, freedom, fixed_norm)
    if fixed_norm:
        return A + SharedTiltFiniteHead(m, spread, d_h) / freedom
    return ((d - 1) * A + TiltFiniteHead(m, spread, d_h)) / d


def overlap(spread: sp.Expr, freedom: sp.Expr, fixed_norm: bool) -> sp.Expr:
    """E<o_m, o_n> over that of one value, m != n: 1/max(m, n), less what fixed norms take.

    1/(1 + x) for 1 - x, x = (s^2/d)(h(m) + h(n)): the same to the order known, and positive.
    """
    taken = spread**2 / freedom * (shared_norm(m) + shared_norm(n)) if fixed_norm else 0
    return 1 / sp.Max(m, n) / (1 + taken)


def excess(spread: sp.Expr) -> sp.Expr:
    """E cos over the cosine of the kernel, less 1, of two outputs with independent queries.

    The tilt fluctuates with the participation (a query with one large weight has both), so
    |o|^2 as a whole has the participation's relative fluctuation.
    """
    of_one = RootBias(m, spread, d_h, H)
    return of_one + of_one.subs(m, n)


def adjacent_cosine() -> sp.Expr:
    """E cos(o_m, o_m+1) over LN'd tokens: the kernel's, its excess, and 3 maps of width d."""
    freedom = d - 1
    diagonal = second_moment(s, freedom, True)
    rho = overlap(s, freedom, True) / sp.sqrt(diagonal * diagonal.subs(m, n))
    cosine = rho * (1 + excess(s)) - 3 * rho * (1 - rho**2) / (2 * d)
    return cosine.subs(sp.Max(m, n), n).subs(n, m + 1)


def formulas() -> Iterator[Formula]:
    """Kernel and cosine of the outputs of a softmax layer."""
    yield Formula(
        "attention.output_kernel",
        g * overlap(s, d - 1, True),
        "The covariance of two outputs over LN'd tokens, m != n: little of it is lost to softmax.",
        Status.LEADING_ORDER,
        "derived here",
        r"\mathbb{E}\langle o_m, o_n\rangle/d",
        remainder=g * (s**4 / d + (4 * s**2 / d) ** 2) / sp.Max(m, n),
    )
    yield Formula(
        "attention.output_second_moment_finite_head",
        g * second_moment(s, d - 1, True),
        "The second moment of an output over LN'd tokens, with heads of width d_h.",
        Status.LEADING_ORDER,
        "derived here",
        r"\mathbb{E}|o_m|^2/d",
        remainder=4 * g * s**2 / d**2,
    )
    yield Formula(
        "attention.root_bias",
        RootBias(m, s, d_h, H),
        "What the fluctuation of the participation adds to the norm's expected inverse root.",
        Status.LEADING_ORDER,
        "derived here; exact for one head, to first order in 1/H otherwise",
        r"\mathbb{E}\left(P/\mathbb{E}P\right)^{-1/2} - 1",
        remainder=RootBias(m, s, d_h, H) ** 2 * 4 / 3,
    )
    cosine = adjacent_cosine()
    yield Formula(
        "attention.adjacent_cosine",
        cosine,
        "The expected cosine of neighbouring outputs over LN'd tokens, at any temperature.",
        Status.LEADING_ORDER,
        "derived here",
        r"\mathbb{E}\cos(o_m, o_{m+1})",
        remainder=s**4 / d + 4 / d**2 + 4 * excess(s).subs(n, m + 1) ** 2 / 3,
    )
