"""Tokens that repeat: how often positions hold the same one, and what attention makes of it.

Rows of an embedding table are independent, so given the ids <x_m, x_n>/d has mean sigma_x^2 if
the ids of m and n are equal and 0 otherwise: after averaging over the table, the law of the
tokens enters a kernel only through N_mn = [id_m = id_n].  Its mean is `collision_matrix`.  Over
a prefix of m positions with c_v of token v,

    1'N 1 = sum_v c_v^2,   |N|_F^2 = sum_v c_v^2,   |N 1|^2 = sum_v c_v^3,

and of two prefixes sum_v c_v(m) c_v(n) and the like: attention to first order in s^2 needs no
more than a few moments of counts (`PairMoments`).  For independent ids of probabilities p_v they
are polynomials in m, n and the p_k = sum_v p_v^k, the probability that k positions hold the
same token; they follow from which positions coincide (`mean_count`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, singledispatch
from typing import Any

import numpy as np
import sympy as sp

from nope.tokens import EmbeddingTokens, GaussianTokens, TextTokens, Tokens, WithBos
from theory.cache import kept
from theory.formula import Formula, Numeric, Status, compile_number_form
from theory.symbols import alpha, m, n, n_vocab, p_2, p_3, p_4, sigma_x

WINDOWS = 2000
"""Averages over a sample of ids are over at most this many windows."""
PAIRS = 2**23
"""And over no more pairs of positions than this, all windows together, but for"""
FEWEST = 32
"""this many windows that are taken at least."""

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


# ------------------------------------------------------------ means over independent ids

Pattern = tuple[tuple[str, str], ...]
"""Pairs of positions that hold the same token.

A name that starts with m (n) is summed over the first m (n) positions; M and N are the positions
m and n themselves.
"""

OVERLAP: Pattern = (("m_1", "n_1"),)
"""sum_v c_v(m) c_v(n)."""
CUBIC: Pattern = (("m_1", "n_1"), ("m_2", "n_1"))
"""sum_v c_v(m)^2 c_v(n)."""
SQUARED: Pattern = (("m_1", "n_1"), ("m_2", "n_2"))
"""(sum_v c_v(m) c_v(n))^2."""
PRODUCT: Pattern = (("m_1", "m_2"), ("m_3", "n_1"))
"""sum_v c_v(m)^2 sum_v c_v(m) c_v(n)."""
ENDS: Pattern = (("M", "N"),)
"""[id_m = id_n]."""

CELLS = {"N": sp.Integer(1), "M": sp.Integer(1), "shared": n - 1, "longer": m - n - 1}
"""The m positions, n < m, and how many of each kind there are."""
REACH = {"m": tuple(CELLS), "n": ("N", "shared"), "M": ("M",), "N": ("N",)}
POWER_SUMS = (sp.Integer(1), p_2, p_3, p_4)
"""p_k, from k = 1."""


Placement = tuple[tuple[int, ...], tuple[str, ...]]
"""The label of each index's position, and the cell of each label."""


@cache
@kept
def mean_count(pattern: Pattern) -> sp.Expr:
    """Mean over independent ids, n < m, of the sum over positions of a product of [equal].

    Positions that coincide are one; distinct ones that the pattern connects, k of them, hold the
    same token with probability p_k.  A pattern without M and N holds for n = m as well.
    """
    names = sorted({name for pair in pattern for name in pair})
    edges = [tuple(map(names.index, pair)) for pair in pattern]
    counted = Counter(
        (tuple(sorted(Counter(cells).items())), _connected(labels, edges))
        for labels, cells in _placements([REACH[name[0]] for name in names])
    )
    return _in_powers_of_p(
        sum(
            times
            * sp.prod(sp.ff(CELLS[cell], k).expand(func=True) for cell, k in cells)
            * sp.prod(POWER_SUMS[k - 1] for k in sizes)
            for (cells, sizes), times in counted.items()
        )
    )


def _placements(reach: list[tuple[str, ...]]) -> list[Placement]:
    """All ways for indices of these reaches to lie in cells, coinciding or not."""
    ways: list[Placement] = [((), ())]
    for allowed in reach:
        ways = [way for before in ways for way in _one_more(before, allowed)]
    return ways


def _one_more(before: Placement, allowed: tuple[str, ...]) -> Iterator[Placement]:
    """The next index at a position that is taken, or at a new one in each cell."""
    labels, cells = before
    yield from (((*labels, old), cells) for old, cell in enumerate(cells) if cell in allowed)
    yield from (((*labels, len(cells)), (*cells, cell)) for cell in allowed)


def _connected(labels: tuple[int, ...], edges: list[tuple[int, ...]]) -> tuple[int, ...]:
    """How many distinct labels each connected component has, in order of size."""
    component = list(range(max(labels) + 1))
    for left, right in edges:
        old, new = component[labels[left]], component[labels[right]]
        component = [new if each == old else each for each in component]
    return tuple(sorted(Counter(component).values()))


def mirrored(pattern: Pattern) -> Pattern:
    """The same with m and n exchanged."""
    exchange = str.maketrans("mnMN", "nmNM")
    return tuple((left.translate(exchange), right.translate(exchange)) for left, right in pattern)


# ------------------------------------------------------- what attention makes of two prefixes


@dataclass(frozen=True, eq=False)
class PairMoments:
    """Moments of the counts c_v(m) and c_v(n) of two prefixes, at all pairs of positions.

    With N = [id_m = id_n], O = sum_v c_v(m) c_v(n), T = sum_v c_v(m)^2 c_v(n) and
    S = sum_v c_v(m)^2: `every` has the means of 1, O, T and O^2, `same` those of N, N O, N T and
    N O^2, (4, n_ctx, n_ctx), m the row; `product` is E S O.  `standard_error` is that of
    `tilt` + `reweighting` where they are averages over a sample.
    """

    every: np.ndarray
    same: np.ndarray
    product: np.ndarray
    standard_error: np.ndarray

    @cached_property
    def count(self) -> np.ndarray:
        """m, as a column."""
        return np.arange(1.0, len(self.product) + 1)[:, None]

    @property
    def collision(self) -> np.ndarray:
        """E sum_ij N_ij/(mn): uniform attention."""
        return np.asarray(self.every[1] / (self.count * self.count.T))

    @property
    def tilt(self) -> np.ndarray:
        """E N_mn sum_ij C_mn(i, j) N_ij/(mn), C the matrix N centred over i <= m and over j <= n.

        With logits of covariance s^2 N_mn N_ij given the ids, s^2 times this is what equal keys,
        having equal logits, add to E sum_ij a_mi a_nj N_ij.
        """
        return self._centred(self.same)

    @property
    def common_tilt(self) -> np.ndarray:
        """The same without the factor N_mn: for a part of the logits that all queries share."""
        return self._centred(self.every)

    def _centred(self, means: np.ndarray) -> np.ndarray:
        _, overlap, cubic, squared = means
        return np.asarray(centred(overlap, cubic, cubic.T, squared, self.count, self.count.T))

    @property
    def reweighting(self) -> np.ndarray:
        """E sum_ij [D_m(i) + D_n(j)] N_ij/(2mn), D_m(i) = C_mm(i, i) less its mean.

        s^2 times this is what keys whose centred logits vary more add to the same sum.
        """
        one_sided = lopsided(self.product, self.every[2], self.count, self.count.T)
        return np.asarray(one_sided + one_sided.T)


def centred(overlap: Any, cubic: Any, mirrored_cubic: Any, squared: Any, m: Any, n: Any) -> Any:
    """E [O - T/m - T'/n + O^2/(mn)]/(mn), T' the T of m and n exchanged."""
    return (overlap - cubic / m - mirrored_cubic / n + squared / (m * n)) / (m * n)


def lopsided(product: Any, cubic: Any, m: Any, n: Any) -> Any:
    """E sum_ij D_m(i) N_ij/(2mn) = E [S O/m^2 - T/m]/(mn)."""
    return (product / m**2 - cubic / m) / (m * n)


def moments_given(ids: np.ndarray) -> PairMoments:
    """Those of one window: no mean is taken."""
    equal = (ids[:, None] == ids[None, :]).astype(float)
    counts = equal.cumsum(0)  # of the token of the column in the prefix of the row
    overlap, cubic = counts.cumsum(1), (counts**2).cumsum(1)
    every = np.stack([np.ones_like(overlap), overlap, cubic, overlap**2])
    product = np.diagonal(overlap)[:, None] * overlap
    return PairMoments(every, equal * every, product, np.zeros_like(equal))


@singledispatch
def pair_moments(tokens: Tokens, n_ctx: int) -> PairMoments:
    """The moments of the counts in all pairs of prefixes up to n_ctx.

    Exact for independent ids; for a text averages over `sample_ids`.  Raises
    `NotImplementedError` for tokens of a kind not registered here.
    """
    raise _unknown(tokens)


@pair_moments.register
def _(tokens: GaussianTokens, n_ctx: int) -> PairMoments:
    return _independent_moments(n_ctx, (0.0, 0.0, 0.0))


@pair_moments.register
def _(tokens: EmbeddingTokens, n_ctx: int) -> PairMoments:
    return _independent_moments(n_ctx, tuple(power_sum(tokens, k) for k in (2, 3, 4)))


@pair_moments.register
def _(tokens: TextTokens, n_ctx: int) -> PairMoments:
    windows = sample_ids(tokens, n_ctx)
    size, shape = len(windows), (n_ctx, n_ctx)
    every, same = np.zeros((2, 4, *shape))
    product, change, square = np.zeros((3, *shape))
    for ids in windows:
        given = moments_given(ids)
        every += given.every / size
        same += given.same / size
        product += given.product / size
        changed = given.tilt + given.reweighting
        change += changed / size
        square += changed**2 / size
    error = np.sqrt(np.maximum(square - change**2, 0.0) / size)
    return PairMoments(every, same, product, error)


@pair_moments.register
def _(tokens: WithBos, n_ctx: int) -> PairMoments:
    """The BOS adds 1 to O, T and S at every m and n, and is equal to itself alone."""
    rest = pair_moments(tokens.tokens, n_ctx - 1)
    before = ((1, 0), (1, 0))
    every, same = (np.pad(means, ((0, 0), *before)) for means in (rest.every, rest.same))
    every[0], same[0, 0, 0] = 1.0, 1.0
    for means in (every, same):
        weight, overlap, cubic, squared = means
        squared += 2 * overlap + weight
        overlap += weight
        cubic += weight
    own = np.pad(np.diagonal(rest.every[1]), (1, 0))[:, None]  # S without the BOS
    product = np.pad(rest.product, before) + own + every[1]
    return PairMoments(every, same, product, np.pad(rest.standard_error, before))


def _independent_moments(n_ctx: int, powers: tuple[float, ...]) -> PairMoments:
    """From the closed forms; powers are p_2, p_3 and p_4."""
    every = np.ones((4, n_ctx, n_ctx))
    for number, pattern in enumerate((OVERLAP, CUBIC, SQUARED), start=1):
        every[number] = _at_all_pairs(pattern, n_ctx, powers)
    same = every.copy()
    off = ~np.eye(n_ctx, dtype=bool)
    for number, pattern in enumerate(((), OVERLAP, CUBIC, SQUARED)):
        same[number, off] = _at_all_pairs(pattern + ENDS, n_ctx, powers)[off]
    product = _at_all_pairs(PRODUCT, n_ctx, powers)
    return PairMoments(every, same, product, np.zeros_like(product))


def _at_all_pairs(pattern: Pattern, n_ctx: int, powers: tuple[float, ...]) -> np.ndarray:
    """`mean_count` below the diagonal, that of the mirrored pattern above it."""
    found = np.empty((n_ctx, n_ctx))
    longer, shorter = np.tril_indices(n_ctx)
    for at, asked in (((shorter, longer), mirrored(pattern)), ((longer, shorter), pattern)):
        found[at] = _compiled(asked)(longer + 1.0, shorter + 1.0, *powers)
    return found


@cache
def _compiled(pattern: Pattern) -> Callable[..., Any]:
    return compile_number_form(mean_count(pattern), (m, n, p_2, p_3, p_4))


# ------------------------------------------------------------------------------ samples of ids


def sample_size(n_ctx: int) -> int:
    """`WINDOWS`, fewer where they hold more than `PAIRS` pairs of positions."""
    return int(np.clip(PAIRS // max(n_ctx, 1) ** 2, FEWEST, WINDOWS))


@singledispatch
def sample_ids(tokens: Tokens, n_ctx: int) -> np.ndarray:
    """Rows of ids to average over, always the same ones: `sample_size` at most.

    Of a text windows evenly spaced, or all if there are fewer; independent ids are drawn.
    Raises `NotImplementedError` for tokens of a kind not registered here.
    """
    raise _unknown(tokens)


@sample_ids.register
def _(tokens: EmbeddingTokens, n_ctx: int) -> np.ndarray:
    """Every position has a stream of its own, so that a longer context begins with the same ids."""
    ids = np.empty((sample_size(n_ctx), n_ctx), dtype=int)
    for position, column in enumerate(ids.T):
        rng = np.random.default_rng((0, position))
        column[:] = rng.choice(tokens.vocabulary, len(ids), p=tokens.probabilities)
    return ids


@sample_ids.register
def _(tokens: TextTokens, n_ctx: int) -> np.ndarray:
    last = len(tokens.ids) - n_ctx
    starts = np.linspace(0, last, min(last + 1, sample_size(n_ctx))).round().astype(int)
    return np.asarray(tokens.ids[starts[:, None] + np.arange(n_ctx)])


@sample_ids.register
def _(tokens: WithBos, n_ctx: int) -> np.ndarray:
    """The BOS has the id -1."""
    return np.pad(sample_ids(tokens.tokens, n_ctx - 1), ((0, 0), (1, 0)), constant_values=-1)


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


def _pair_covariance(neighbours: sp.Expr) -> sp.Expr:
    """Covariance of one pair's [equal] with a sum over itself and pairs that share one position."""
    return p_2 * (1 - p_2) + neighbours * (p_3 - p_2**2)


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
    beyond = _pair_covariance(2 * (M - 2))
    within = _pair_covariance(2 * (N - 2))
    across = _pair_covariance(M + N - 4)
    yy = 2 * (M - 1) * beyond / (M * long**2)
    zz = 2 * (N - 1) * within / (N * short**2)
    yz = 2 * (N - 1) * beyond / (M * long * short)
    xz = 2 * (N - 1) * across / (N * long * short)
    spread = (yy + zz - 2 * yz) / 8
    shift = (zz - yy + 2 * yz - 2 * xz) / 4
    return sp.Rational(3, 2) * uniform_cosine() * (spread + sp.Abs(shift))


def _in_powers_of_p(expr: sp.Expr) -> sp.Expr:
    return sp.collect(sp.expand(expr), (p_2, p_3, p_4), sp.factor)


def tilt(ends: Pattern = ()) -> sp.Expr:
    """E sum_ij C_mn(i, j) N_ij/(mn) over independent ids, n < m; with `ENDS` times N_mn."""
    cubic, mirrored_cubic = (mean_count(each + ends) for each in (CUBIC, mirrored(CUBIC)))
    overlap, squared = (mean_count(each + ends) for each in (OVERLAP, SQUARED))
    return centred(overlap, cubic, mirrored_cubic, squared, m, n)


def reweighting() -> sp.Expr:
    """E sum_ij [D_m(i) + D_n(j)] N_ij/(2mn) over independent ids, n <= m."""
    by_longer = lopsided(mean_count(PRODUCT), mean_count(CUBIC), m, n)
    return by_longer + lopsided(mean_count(mirrored(PRODUCT)), mean_count(mirrored(CUBIC)), n, m)


COUNTED = "derived here by counting positions that coincide"


def formulas() -> Iterator[Formula]:
    """Repetition of tokens and what uniform attention makes of it."""
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
        _in_powers_of_p(tilt().subs(n, m)),
        "Mean of |J N J|_F^2/m^2 over independent ids, N_nn' = [id_n = id_n'], J centring over m.",
        Status.EXACT,
        COUNTED,
        r"\mathbb{E}\,\lVert J N J\rVert_F^2/m^2",
    )
    yield Formula(
        "tokens.reweighting",
        _in_powers_of_p(reweighting().subs(n, m)),
        "Mean of sum_nn' [(J N J)_nn - tr(J N J)/m] N_nn'/m^2 over independent ids.",
        Status.EXACT,
        COUNTED,
        r"\mathbb{E}\sum_{nn'} [(JNJ)_{nn} - \mathrm{tr}(JNJ)/m] N_{nn'}/m^2",
    )
    yield Formula(
        "tokens.shared_tilt",
        _in_powers_of_p(tilt(ENDS)),
        "Mean of N_mn tr(J_m N J_n N)/(mn), n < m: what two queries of one token share.",
        Status.EXACT,
        COUNTED,
        r"\mathbb{E}\,N_{mn} \mathrm{tr}(J_m N J_n N)/(mn)",
    )
    yield Formula(
        "tokens.shared_reweighting",
        _in_powers_of_p(reweighting()),
        "Mean of sum_ij [D_m(i) + D_n(j)] N_ij/(2mn), n <= m, D_m(i) = (J_m N J_m)_ii - mean.",
        Status.EXACT,
        COUNTED,
        r"\mathbb{E}\sum_{ij} [D_m(i) + D_n(j)] N_{ij}/(2mn)",
    )
