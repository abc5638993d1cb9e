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
    FiniteWidth,
    Participation,
    ParticipationFiniteHead,
    ParticipationSecondMoment,
    SharedTilt,
    SoftmaxMean,
    Tilt,
    Transforms,
    WeightedSquare,
)
from theory.formulas.softmax_table import Tabulated
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
        doubled = Transforms(2 * transforms.s, positions.max(), 0.5, transforms.logits)
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


class SharedTiltFiniteHead(FiniteWidth):
    """E_u B_off(m, s sqrt(u))."""

    letter = r"B_{\mathrm{off}}"
    function = SharedTilt


class WeightedSquareFiniteHead(FiniteWidth):
    """E_u S(m, s sqrt(u))."""

    letter = "S"
    function = WeightedSquare


class GaussianKeysParticipation(FiniteWidth):
    """E_u A(m, s sqrt(u)) over keys whose norm fluctuates."""

    letter = r"\tilde{P}"
    function = Participation
    slack = 1.0


class GaussianKeysTilt(FiniteWidth):
    """E_u B(m, s sqrt(u)) over keys whose norm fluctuates."""

    letter = r"\tilde{B}"
    function = Tilt
    slack = 1.0


def mean_over_heads(single: Any, relative_variance: Any, heads: Any) -> Any:
    """E (P/E P)^(-1/2) - 1 of the mean P of `heads` independent participations.

    The expansion in cumulants starts with 3/8 of the relative variance over H; the next are
    of order 1/H^2, and are what one head, known exactly, leaves: right at H = 1 and to first
    order in 1/H.
    """
    leading = 3 * relative_variance / 8
    return leading / heads + (single - leading) / heads**2


class SecondMomentFiniteHead(FiniteWidth):
    """E_u E (sum a^2)^2."""

    letter = "P_2"
    function = ParticipationSecondMoment


class InverseRootFiniteHead(FiniteWidth):
    """E_u E (sum a^2)^(-1/2)."""

    letter = "R"
    function = InverseRootParticipation


class GaussianKeysSecondMoment(SecondMomentFiniteHead):
    """The same over keys whose norm fluctuates."""

    slack = 1.0


class GaussianKeysInverseRoot(InverseRootFiniteHead):
    """The same over keys whose norm fluctuates."""

    slack = 1.0


class RootBias(Numeric):
    """E (P/E P)^(-1/2) - 1 of the participation averaged over H heads of width d_h."""

    by = "one-dimensional quadratures; interpolated in 1/H"
    nargs = 4
    moments = ParticipationFiniteHead, SecondMomentFiniteHead, InverseRootFiniteHead

    @classmethod
    def numbers(cls, *arrays: np.ndarray) -> np.ndarray:
        *of_one_head, heads = arrays
        mean, square, root = (kind.numbers(*of_one_head) for kind in cls.moments)
        return np.asarray(mean_over_heads(root * np.sqrt(mean) - 1, square / mean**2 - 1, heads))


class GaussianKeysRootBias(RootBias):
    """The same over keys of D dimensions whose norm fluctuates, D before H."""

    nargs = 5
    moments = GaussianKeysParticipation, GaussianKeysSecondMoment, GaussianKeysInverseRoot


def root_bias(table: Tabulated, positions: Any, variances: Any) -> np.ndarray:
    """`RootBias` of one head, from a table."""
    root = table.logarithm(InverseRootParticipation, positions, variances)
    return np.expm1(root + table.logarithm(Participation, positions, variances) / 2)


def tilt_growth(table: Tabulated, positions: Any, variances: Any) -> np.ndarray:
    """B_off/s^2 over its value at s = 0, from a table."""
    return np.asarray(np.exp(table.logarithm(SharedTiltSlope, positions, variances)))


def participation(spread: sp.Expr, freedom: sp.Expr, slack: sp.Expr) -> sp.Expr:
    """E sum_n a_mn^2 of a real layer: heads of width d_h, keys of `freedom` dimensions.

    `slack` is that of the keys' norms (`Logits`), and what it changes linear in it: exact at 0 and
    at 1, and to first order in 1/D.
    """
    on_sphere = ParticipationFiniteHead(m, spread, d_h, freedom)
    free = GaussianKeysParticipation(m, spread, d_h, freedom)
    return (1 - slack) * on_sphere + slack * free


def shared_norm(position: sp.Expr) -> sp.Expr:
    """h(m) = (m - 1)(m - 2)/m^2: S - 1 over s^2, for small logits."""
    return (position - 1) * (position - 2) / position**2


def second_moment(spread: sp.Expr, freedom: sp.Expr, slack: sp.Expr) -> sp.Expr:
    """E|o_m|^2 over that of one value: A + B_off/D, or ((d - 1) A + B)/d where norms fluctuate.

    The part of every value along the direction of the query is its logit, the rest is independent
    of the weights.  Exact over tokens of fixed norm; where norms fluctuate but for the query's
    own key, whose norm is that of the query too.
    """
    tilted = SharedTiltFiniteHead(m, spread, d_h, freedom) / freedom
    free = participation(spread, freedom, sp.S.One)
    loose = (GaussianKeysTilt(m, spread, d_h, freedom) - free) / d
    return participation(spread, freedom, slack) + (1 - slack) * tilted + slack * loose


def overlap(spread: sp.Expr, freedom: sp.Expr, slack: sp.Expr) -> sp.Expr:
    """E<o_m, o_n> over that of one value, m != n: 1/max(m, n) to leading order.

    With T = S - 1, to first order in the widths:  fixed norms take (T_m + T_n)/D, since of other
    keys E<e_i, e_j | logits> = (z_mi z_mj + z_ni z_nj)/D and by Stein's lemma
    E sum_i a_mi z_mi sum_(j != i) z_mj = 1 - S_m.  Queries of a head agree by chance, r^2 = 1/d_h
    (and the keys of two random directions by 1/D where norms fluctuate), which adds
    T_m T_n r^2/2 (1 + 1/(max - 1)) by Mehler's expansion.  1/(1 + x) stands for 1 - x: the same
    to the order known, and positive.
    """
    T: sp.Expr = WeightedSquareFiniteHead(m, spread, d_h, freedom) - 1
    longer = sp.Max(m, n)
    other = T.subs(m, n)
    taken = (1 - slack) * (T + other) / freedom
    agreement = 1 / d_h + slack / freedom
    given = T * other * agreement / 2 * longer / sp.Max(longer - 1, 1)
    return (1 + given) / longer / (1 + taken)


def overlap_remainder(spread: sp.Expr, freedom: sp.Expr, slack: sp.Expr) -> sp.Expr:
    """What `overlap` drops: G_m G_n/D of pairs and twice the square of 1/D, G = ln m A.

    G is s^2 for small logits and at most ln m.  Norms that fluctuate vary what is weighed with the
    weights, which an expected cosine sees to the order of (G_m + G_n)/D.
    """
    G = sp.log(m * participation(spread, freedom, slack))
    other = G.subs(m, n)
    both = G + other
    return (G * other + slack * both + 2 * both**2 / freedom) / freedom / sp.Max(m, n)


def excess(spread: sp.Expr, freedom: sp.Expr, slack: sp.Expr) -> sp.Expr:
    """E cos over the cosine of the kernel, less 1, of two outputs with independent queries.

    The tilt fluctuates with the participation (a query with one large weight has both), so
    |o|^2 as a whole has the participation's relative fluctuation.  Norms that fluctuate vary the
    weights; that they vary what is weighed with them is dropped.
    """
    on_sphere = RootBias(m, spread, d_h, H)
    free = GaussianKeysRootBias(m, spread, d_h, freedom, H)
    of_one = (1 - slack) * on_sphere + slack * free
    return of_one + of_one.subs(m, n)


def adjacent_cosine() -> sp.Expr:
    """E cos(o_m, o_m+1) over LN'd tokens: the kernel's, its excess, and 3 maps of width d."""
    freedom = d - 1
    diagonal = second_moment(s, freedom, sp.S.Zero)
    rho = overlap(s, freedom, sp.S.Zero) / sp.sqrt(diagonal * diagonal.subs(m, n))
    cosine = rho * (1 + excess(s, d - 1, sp.S.Zero)) - 3 * rho * (1 - rho**2) / (2 * d)
    return cosine.subs(sp.Max(m, n), n).subs(n, m + 1)


def formulas() -> Iterator[Formula]:
    """Kernel and cosine of the outputs of a softmax layer."""
    yield Formula(
        "attention.output_kernel",
        g * overlap(s, d - 1, sp.S.Zero),
        "The covariance of two outputs over LN'd tokens, m != n: little of it is lost to softmax.",
        Status.LEADING_ORDER,
        "derived here",
        r"\mathbb{E}\langle o_m, o_n\rangle/d",
        remainder=g * overlap_remainder(s, d - 1, sp.S.Zero),
    )
    yield Formula(
        "attention.output_second_moment_finite_head",
        g * second_moment(s, d - 1, sp.S.Zero),
        "The second moment of an output over LN'd tokens, at any width, by Gaussian maps.",
        Status.EXACT,
        "derived here",
        r"\mathbb{E}|o_m|^2/d",
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
    cosine, diagonal = adjacent_cosine(), second_moment(s, d - 1, sp.S.Zero)
    between = overlap_remainder(s, d - 1, sp.S.Zero) / sp.sqrt(diagonal * diagonal.subs(m, n))
    yield Formula(
        "attention.adjacent_cosine",
        cosine,
        "The expected cosine of neighbouring outputs over LN'd tokens, at any temperature.",
        Status.LEADING_ORDER,
        "derived here",
        r"\mathbb{E}\cos(o_m, o_{m+1})",
        remainder=(between + 4 / d**2 + 4 * excess(s, d - 1, sp.S.Zero) ** 2 / 3)
        .subs(sp.Max(m, n), n)
        .subs(n, m + 1),
    )
