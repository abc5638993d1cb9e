"""Tokens that repeat: how often positions hold the same one, and what attention makes of it.

Rows of an embedding table are independent, so given the ids <x_m, x_n>/d has mean sigma_x^2 if
the ids of m and n are equal and 0 otherwise: after averaging over the table, the law of the
tokens enters a kernel only through N_mn = [id_m = id_n].  Its mean is `collision_matrix`.  Over
a prefix of m positions with c_v of token v,

    1'N 1 = sum_v c_v^2,   |N|_F^2 = sum_v c_v^2,   |N 1|^2 = sum_v c_v^3,

so attention over the prefix needs no more than three moments of its counts (`CountMoments`).
For independent ids of probabilities p_v they are polynomials in m, p_2 and p_3, p_k being
sum_v p_v^k, the probability that k positions hold the same token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import numpy as np
import sympy as sp

from nope.tokens import EmbeddingTokens, GaussianTokens, TextTokens, Tokens, WithBos
from theory.formula import Formula, Numeric, Status
from theory.symbols import alpha, m, n, n_vocab, p_2, p_3, sigma_x

WINDOWS = 2000
"""The counts in a text are averaged over at most this many windows, evenly spaced."""

# ------------------------------------------------------------------ which positions are equal


@singledispatch
def collision_matrix(tokens: Tokens, n_ctx: int) -> np.ndarray:
    """P(positions m and n hold the same token), (n_ctx, n_ctx), 1 on the diagonal.

    Exact, for a text over all its windows.  Times sigma_x^2 it is the kernel of the tokens, over
    ids and tables.  Raises `NotImplementedError` for tokens of a kind not registered here.
    """
    raise _unknown(tokens)


@collision_matrix.register
def _(tokens: GaussianTokens, n_ctx: int) -> np.ndarray:
    return np.eye(n_ctx)


@collision_matrix.register
def _(tokens: EmbeddingTokens, n_ctx: int) -> np.ndarray:
    same = np.full((n_ctx, n_ctx), power_sum(tokens, 2))
    np.fill_diagonal(same, 1.0)
    return same


@collision_matrix.register
def _(tokens: TextTokens, n_ctx: int) -> np.ndarray:
    ids = tokens.ids.astype(np.min_scalar_type(tokens.vocabulary))  # bytes compare fastest
    starts = len(ids) - n_ctx + 1
    same = np.eye(n_ctx)
    for lag in range(1, n_ctx):
        row = np.arange(n_ctx - lag)
        found = _sliding_count(ids[lag:] == ids[:-lag], starts) / starts
        same[row, row + lag] = same[row + lag, row] = found
    return same


@collision_matrix.register
def _(tokens: WithBos, n_ctx: int) -> np.ndarray:
    same = np.eye(n_ctx)
    same[1:, 1:] = collision_matrix(tokens.tokens, n_ctx - 1)
    return same


def _sliding_count(flags: np.ndarray, size: int) -> np.ndarray:
    """How many of `size` consecutive flags are set, from each start that leaves room."""
    entering, leaving = (part.astype(np.int64) for part in (flags[size:], flags[:-size]))
    changes = (entering - leaving).cumsum()
    return np.count_nonzero(flags[:size]) + np.concatenate([[0], changes])


def prefix_mean_kernel(tokens: Tokens, n_ctx: int) -> np.ndarray:
    """E <z_m, z_n>/d of the prefix means z of the tokens, over ids and tables, (n_ctx, n_ctx)."""
    counts = np.arange(1.0, n_ctx + 1)
    sums = collision_matrix(tokens, n_ctx).cumsum(0).cumsum(1)
    return np.asarray(tokens.std**2 * sums / np.outer(counts, counts))


def power_sum(tokens: EmbeddingTokens, order: int) -> float:
    """p_k = sum_v p_v^k: the probability that k = `order` positions hold the same token."""
    return float((tokens.probabilities**order).sum())


def _unknown(tokens: object) -> NotImplementedError:
    known = "GaussianTokens, EmbeddingTokens, TextTokens or WithBos"
    return NotImplementedError(f"expected {known}, got {tokens!r}; register its own law")


# -------------------------------------------------------------- how often each is in a prefix


@dataclass(frozen=True, eq=False)
class CountMoments:
    """Moments of the counts c_v in a prefix of m positions: arrays, or expressions in symbols.

    `second` is E sum c_v^2, `third` E sum c_v^3 and `squared` E (sum c_v^2)^2.
    """

    m: Any
    second: Any
    third: Any
    squared: Any

    @property
    def collision(self) -> Any:
        """E sum_nn' N_nn'/m^2 = E sum c^2/m^2: uniform attention."""
        return self.second / self.m**2

    @property
    def tilt(self) -> Any:
        """E |J N J|_F^2/m^2 = E [sum c^2 - (2/m) sum c^3 + (sum c^2)^2/m^2]/m^2, J = I - 11'/m.

        With logits of covariance s^2 N given the ids, s^2 times this is what equal keys, having
        equal logits, add to E sum_nn' a_mn a_mn' N_nn'.
        """
        return (self.second - 2 * self.third / self.m + self.squared / self.m**2) / self.m**2

    @property
    def reweighting(self) -> Any:
        """E sum_nn' [(J N J)_nn - tr(J N J)/m] N_nn'/m^2 = E [2 (sum c^2)^2/m - 2 sum c^3]/m^3.

        s^2 times this is what keys whose centred logits vary more add to the same sum.
        """
        return 2 * (self.squared / self.m - self.third) / self.m**3


def independent_counts(m: Any, p_2: Any, p_3: Any) -> CountMoments:
    """The moments for m independent ids.

    sum c^2 = m + 2 U, U the pairs of positions that hold the same token: m (m-1)/2 pairs, each
    of variance p_2 (1 - p_2), and of covariance p_3 - p_2^2 with the 2 (m-2) that share one
    position with it, 0 with the others.
    """
    pairs, triples = m * (m - 1), m * (m - 1) * (m - 2)
    second = m + pairs * p_2
    variance = 2 * pairs * _pair_covariance(p_2, p_3, 2 * (m - 2))
    return CountMoments(m, second, m + 3 * pairs * p_2 + triples * p_3, second**2 + variance)


def _pair_covariance(p_2: Any, p_3: Any, neighbours: Any) -> Any:
    """Covariance of one pair's [equal] with a sum over itself and pairs that share one position."""
    return p_2 * (1 - p_2) + neighbours * (p_3 - p_2**2)


@singledispatch
def count_moments(tokens: Tokens, n_ctx: int) -> CountMoments:
    """The moments of the counts in the prefixes of m = 1..n_ctx positions.

    Exact for independent ids; for a text an average over `WINDOWS` evenly spaced windows, or
    over all if there are fewer.  Raises `NotImplementedError` for tokens of a kind not
    registered here.
    """
    raise _unknown(tokens)


@count_moments.register
def _(tokens: GaussianTokens, n_ctx: int) -> CountMoments:
    return independent_counts(_positions(n_ctx), 0.0, 0.0)


@count_moments.register
def _(tokens: EmbeddingTokens, n_ctx: int) -> CountMoments:
    return independent_counts(_positions(n_ctx), power_sum(tokens, 2), power_sum(tokens, 3))


@count_moments.register
def _(tokens: TextTokens, n_ctx: int) -> CountMoments:
    """Position by position: a token that is there c times adds 2c + 1 to sum c^2."""
    windows = _spaced_windows(tokens.ids, n_ctx)
    every = np.arange(len(windows))
    counts = np.zeros((len(windows), tokens.vocabulary))
    second, third = np.zeros((2, len(windows)))
    moments = np.empty((n_ctx, 3))
    for position in range(n_ctx):
        at = (every, windows[:, position])
        there = counts[at]
        second += 2 * there + 1
        third += 3 * there**2 + 3 * there + 1
        counts[at] += 1
        moments[position] = second.mean(), third.mean(), (second**2).mean()
    return CountMoments(_positions(n_ctx), *moments.T)


@count_moments.register
def _(tokens: WithBos, n_ctx: int) -> CountMoments:
    """The BOS adds 1 to sum c^2 and to sum c^3; m positions hold m - 1 other tokens."""
    rest = count_moments(tokens.tokens, n_ctx - 1)
    moments = (rest.second, rest.third, rest.squared)
    second, third, squared = (np.concatenate([[0.0], moment]) for moment in moments)
    return CountMoments(_positions(n_ctx), 1 + second, 1 + third, 1 + 2 * second + squared)


def _positions(n_ctx: int) -> np.ndarray:
    return np.arange(1.0, n_ctx + 1)


def _spaced_windows(ids: np.ndarray, n_ctx: int) -> np.ndarray:
    every = np.lib.stride_tricks.sliding_window_view(ids, n_ctx)
    starts = np.linspace(0, len(every) - 1, min(len(every), WINDOWS)).round().astype(int)
    return np.asarray(every[starts])


# ------------------------------------------------------------------------------- closed forms


class GeneralHarmonic(Numeric):
    """H_{V,r} = sum over v = 1..V of v^-r, for real r."""

    by = "summation"
    nargs = 2

    @staticmethod
    def numbers(*arrays: np.ndarray) -> np.ndarray:
        def one(size: float, order: float) -> float:
            return float((np.arange(1, size + 1) ** -order).sum())

        return np.asarray(np.vectorize(one, otypes=[float])(*arrays))

    def _latex(self, printer: Any, exp: str | None = None) -> str:
        printed = f"H_{{{','.join(printer._print(argument) for argument in self.args)}}}"
        return printed if exp is None else f"{printed}^{{{exp}}}"


def uniform_kernel() -> sp.Expr:
    """sigma_x^2 (p_2 + (1 - p_2)/max(m, n)): of mn pairs of positions, min(m, n) are one."""
    return sigma_x**2 * (p_2 + (1 - p_2) / sp.Max(m, n))


def uniform_cosine() -> sp.Expr:
    """`uniform_kernel` normalised: sqrt((n/m) (1 + (m-1) p_2)/(1 + (n-1) p_2)), n <= m.

    It is sqrt(n/m) without repetition and 1 with nothing else.
    """
    longer, shorter = sp.Max(m, n), sp.Min(m, n)
    ratio = (1 + (longer - 1) * p_2) / (1 + (shorter - 1) * p_2)
    return sp.sqrt(shorter / longer * ratio)


def pattern_remainder() -> sp.Expr:
    """How far E cos over the ids is from `uniform_cosine` at infinite width.

    Given the ids, cos = A_mn/sqrt(A_mm A_nn), A_mn = sum_v c_v(m) c_v(n).  With relative
    deviations x, y, z of A_mn, A_mm, A_nn from their means and t = (y + z)/2, u = (y - z)/2,
    the relative bias is E [u^2/2 + t (t - x)] to second order; E xy = E yy, n <= m, because the
    longer prefix alone predicts x to be y.  The estimate is (3/2) cos (E u^2/2 + |E t (t - x)|):
    for two tokens, enumerated up to m = 450, the worst m, n and p_2 need 1.27 in place of 3/2.
    """
    M, N = sp.Max(m, n), sp.Min(m, n)
    long, short = 1 + (M - 1) * p_2, 1 + (N - 1) * p_2  # E A_MM = M long, E A_MN = N long
    beyond = _pair_covariance(p_2, p_3, 2 * (M - 2))
    within = _pair_covariance(p_2, p_3, 2 * (N - 2))
    across = _pair_covariance(p_2, p_3, M + N - 4)
    yy = 2 * (M - 1) * beyond / (M * long**2)
    zz = 2 * (N - 1) * within / (N * short**2)
    yz = 2 * (N - 1) * beyond / (M * long * short)
    xz = 2 * (N - 1) * across / (N * long * short)
    spread = (yy + zz - 2 * yz) / 8
    shift = (zz - yy + 2 * yz - 2 * xz) / 4
    return sp.Rational(3, 2) * uniform_cosine() * (spread + sp.Abs(shift))


def _in_powers_of_p(expr: sp.Expr) -> sp.Expr:
    return sp.collect(sp.expand(expr), (p_2, p_3), sp.factor)


def formulas() -> Iterator[Formula]:
    """Repetition of tokens and what uniform attention makes of it."""
    prefix = independent_counts(m, p_2, p_3)
    yield Formula(
        "tokens.collision_uniform",
        1 / n_vocab,
        "Probability that two positions hold the same token, all V tokens equally likely.",
        Status.EXACT,
        "definition",
        "p_2",
    )
    yield Formula(
        "tokens.collision_zipf",
        GeneralHarmonic(n_vocab, 2 * alpha) / GeneralHarmonic(n_vocab, alpha) ** 2,
        "Probability that two positions hold the same token, p_v ~ v^-alpha for v = 1..V.",
        Status.EXACT,
        "definition",
        "p_2",
    )
    yield Formula(
        "tokens.uniform_kernel",
        uniform_kernel(),
        "Kernel of the means of the first m and n tokens, ids independent, over ids and tables.",
        Status.EXACT,
        "derived here",
        r"\mathbb{E}\langle z_m, z_n\rangle/d",
    )
    yield Formula(
        "tokens.uniform_cosine",
        uniform_cosine(),
        "Expected cosine of the same means at infinite width; exactly the cosine of their kernel. "
        "Dropped: which tokens repeat differs from draw to draw, and a cosine is not linear in it.",
        Status.LEADING_ORDER,
        "derived here",
        r"\mathbb{E}\cos(z_m, z_n)",
        remainder=pattern_remainder(),
    )
    yield Formula(
        "tokens.tilt",
        _in_powers_of_p(prefix.tilt),
        "Mean of |J N J|_F^2/m^2 over independent ids, N_nn' = [id_n = id_n'], J centring over m.",
        Status.EXACT,
        "derived here by counting pairs that share a position",
        r"\mathbb{E}\,\lVert J N J\rVert_F^2/m^2",
    )
    yield Formula(
        "tokens.reweighting",
        _in_powers_of_p(prefix.reweighting),
        "Mean of sum_nn' [(J N J)_nn - tr(J N J)/m] N_nn'/m^2 over independent ids.",
        Status.EXACT,
        "derived here by counting pairs that share a position",
        r"\mathbb{E}\sum_{nn'} [(JNJ)_{nn} - \mathrm{tr}(JNJ)/m] N_{nn'}/m^2",
    )
