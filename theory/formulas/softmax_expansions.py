"""What means over a softmax come to: small logits, long prefixes, wide heads.

Small logits: Wick's theorem for i.i.d. Gaussian logits makes of a polynomial in the power sums
sum_n a_n^k a series in s^2, to any order (`small_logits`).  Long prefixes: the delta method gives
the limits of m A and of B, and their corrections in 1/m (`long_prefix`).  Finite widths: the
cumulants of a logit over the sphere of LN'd tokens give the 1/d (`finite_width`).  The means
themselves, at any temperature, are those of `theory.formulas.softmax`.  Source of all: derived
here.

>>> participation_expansion(1)
1/m + s**2*(m - 1)/m**2
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import sympy as sp

from theory.cache import kept
from theory.formula import Formula, Status
from theory.formulas.softmax import (
    GAUSSIAN_LOGITS,
    SOFTMAX_SQUARES,
    Participation,
    ParticipationFiniteHead,
    SharedTilt,
    SoftmaxMean,
    Tilt,
)
from theory.symbols import d, g, m, s


def _power_sum(k: Any) -> sp.Expr:
    """q_k = sum_n a_n^k of the weights; q_1 = 1."""
    return sp.Integer(1) if k == 1 else sp.Function("q")(k)


def _laplacian(f: sp.Expr) -> sp.Expr:
    """sum_n d^2 f/dl_n^2 of a polynomial in power sums, from dq_k/dl_n = k (a_n^k - a_n q_k)."""
    sums = {q: q.args[0] for q in f.atoms(sp.core.function.AppliedUndef)}

    def curvature(k: sp.Integer) -> sp.Expr:
        q, up, two = _power_sum(k), _power_sum(k + 1), _power_sum(2)
        return k * (k * (q - up) - (1 - two) * q - k * (up - two * q))

    def slopes(j: sp.Integer, k: sp.Integer) -> sp.Expr:
        p, q = _power_sum(j), _power_sum(k)
        cross = p * _power_sum(k + 1) + q * _power_sum(j + 1)
        return j * k * (_power_sum(j + k) - cross + _power_sum(2) * p * q)

    once = sum(f.diff(q) * curvature(k) for q, k in sums.items())
    twice = sum(f.diff(p).diff(q) * slopes(sums[p], sums[q]) for p in sums for q in sums)
    return sp.expand(once + twice)


def small_logits(f: sp.Expr, order: int) -> sp.Expr:
    """E f for a polynomial in the power sums q(k) = sum_n a_n^k, up to s^(2 order).

    Wick's theorem for i.i.d. N(0, s^2) logits is E f = exp(s^2 Laplacian/2) f at l = 0, and
    there q(k) = m^(1-k).  The Laplacian of a polynomial in power sums is another.
    """
    total, term = sp.Integer(0), sp.sympify(f)
    for k in range(order + 1):
        at_zero = term.replace(sp.Function("q"), lambda power: m ** (1 - power))
        total += sp.factor(at_zero) * (s**2 / 2) ** k / sp.factorial(k)
        term = _laplacian(term)
    return total


@cache
@kept
def participation_expansion(order: int) -> sp.Expr:
    """A up to s^(2 order): (1/m) (1 + (1 - 1/m) s^2 + ...)."""
    return small_logits(_power_sum(2), order)


@cache
@kept
def tilt_expansion(order: int) -> sp.Expr:
    """B up to s^(2 order).

    By Stein's lemma, twice, B = A + s^2 E sum_{nn'} d^2(a_n a_n')/dl_n dl_n', and the sum is
    1 - q_2 - 6 q_3 + 6 q_2^2.
    """
    q_2, q_3 = _power_sum(2), _power_sum(3)
    curved = small_logits(1 - q_2 - 6 * q_3 + 6 * q_2**2, order - 1)
    return small_logits(q_2, order) + sp.expand(s**2 * curved)


@cache
@kept
def long_prefix(kind: type[SoftmaxMean]) -> tuple[sp.Expr, sp.Expr]:
    """The limit of m A or of B as m -> infinity, and its relative correction's factor of 1/m.

    The delta method for functions of the means of e^(sz), e^(2sz) and z e^(sz).
    """
    X = sp.symbols("X_0 X_1 X_2", positive=True)
    f = {Participation: X[1] / X[0] ** 2, Tilt: (X[2] / X[0]) ** 2}[kind]
    tilts = ((1, 0), (2, 0), (1, 1))
    theta = sp.Symbol("theta", real=True)

    def mean(k: int, power: int) -> sp.Expr:
        """E z^power e^(k s z)."""
        return sp.exp(theta**2 / 2).diff(theta, power).subs(theta, k * s)

    def covariance(i: int, j: int) -> sp.Expr:
        (k, p), (other, q) = tilts[i], tilts[j]
        return mean(k + other, p + q) - mean(k, p) * mean(other, q)

    at = {x: mean(*tilt) for x, tilt in zip(X, tilts, strict=True)}
    curved = sum(
        f.diff(X[i], X[j]).subs(at) * covariance(i, j) / 2 for i in range(3) for j in range(3)
    )
    limit = sp.simplify(f.subs(at))
    return limit, sp.expand(sp.simplify(sp.expand(curved / limit)))


def breakdown_leading() -> tuple[sp.Expr, sp.Expr]:
    """(d - 1) e^(s^2)/s^2, where the limits of (d - 1) A and B cross, and what 1/m adds to it."""
    (participation, of_participation), (tilt, of_tilt) = map(long_prefix, (Participation, Tilt))
    return (d - 1) * participation / tilt, sp.Abs(of_participation - of_tilt)


def finite_width() -> sp.Expr:
    """What a finite d changes in E|o_m|^2/d of LN'd tokens, over g, to first order in 1/d.

    Given the query, a logit is |w| times a coordinate of the sphere: its excess kurtosis is
    -6/d, and |w|^2 has a relative variance of 2/d.  In a long prefix ln m A is K(2) - 2 K(1)
    and B_off is K'(1)^2/s^2, K the logit's cumulant generating function.  The s^2 of these
    corrections is read off ln m A and B_off themselves, which saturate where attention
    condenses.  A LayerNorm leaves d - 1 directions: B_off/(d - 1), not B_off/d.
    """
    theta = sp.Symbol("theta")
    kurtosis, spread = -6 / d, 2 / d
    K = s**2 * theta**2 / 2 + kurtosis * s**4 * theta**4 / 24
    log_participation = sp.expand(K.subs(theta, 2) - 2 * K.subs(theta, 1) + spread * s**4 / 2)
    tilt = sp.expand(K.diff(theta).subs(theta, 1) ** 2 / s**2)
    A, B_off = Participation(m, s), SharedTilt(m, s)
    of_participation = sp.Abs(log_participation.coeff(s, 4)) * sp.log(m * A) ** 2 * A
    of_tilt = sp.Abs(tilt.coeff(s, 4)) * B_off**2 + B_off / d
    return of_participation + of_tilt / d


OUTPUT = r"\mathbb{E}|o_m|^2/d"


def formulas() -> Iterator[Formula]:
    """The participation, the output's second moment and its breakdown, to leading order."""
    A, B, B_off = (kind(m, s) for kind in (Participation, Tilt, SharedTilt))

    def term(order: int) -> sp.Expr:
        return sp.factor(participation_expansion(order) - participation_expansion(order - 1))

    yield Formula(
        "attention.participation_expansion",
        participation_expansion(2),
        "The participation up to s^4, by Wick's theorem for the logits.",
        Status.LEADING_ORDER,
        GAUSSIAN_LOGITS,
        SOFTMAX_SQUARES,
        remainder=sum(sp.Abs(term(k)) for k in (3, 4)),  # near m = 3.4 the first of them is 0
    )
    yield Formula(
        "attention.output_second_moment",
        g * (A + B_off / d),
        "LN'd or RMS-normed tokens, wide heads: the weights' squares and the tilt they share.",
        Status.LEADING_ORDER,
        "derived here, to leading order in 1/d at any s",
        OUTPUT,
        remainder=g * finite_width(),
    )
    yield Formula(
        "attention.output_second_moment_gaussian_tokens",
        g * ((d - 1) * A + B) / d,
        "Gaussian tokens, wide heads: d - 1 coordinates are averaged, one is tilted.",
        Status.LEADING_ORDER,
        "derived here; exact but for the length of the key direction, chi^2 of d degrees",
        OUTPUT,
        remainder=g * sp.Abs(ParticipationFiniteHead(m, s, d) - A),
    )
    yield Formula(
        "attention.floor",
        g * s**2 / d,
        "However long the prefix, the tilt towards the query stays: the 1/m law ends here.",
        Status.LEADING_ORDER,
        "derived here: the limit of attention.output_second_moment as m grows",
        OUTPUT,
        remainder=g * sp.Abs(A + (B_off - s**2) / d),
    )
    leading, beyond = breakdown_leading()
    yield Formula(
        "attention.breakdown_length_leading",
        leading,
        "Where the long-prefix limits (d - 1) e^(s^2)/m and s^2 meet.",
        Status.LEADING_ORDER,
        "derived here by the delta method; needs e^(2 s^2) much below m",
        "m_*",
        remainder=beyond,
    )
