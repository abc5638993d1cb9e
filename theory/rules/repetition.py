"""A softmax over tokens that repeat: queries, keys and values that are rows of a table, mapped.

Given the ids and in a wide network the kernels are affine in N_mn = [id_m = id_n], zeros and ones,
which no recursion on mean kernels sees.  Equal keys have equal logits, so a query of token u
gives the c_v copies of token v in its prefix the weight

    A_v = c_v e^(l_uv) / sum_w c_w e^(l_uw),    l_uv ~ N(0, s^2) independent over u and v,

and what is wanted is E sum_v A_v(m) A_v(n), over logits and then over ids.

First order in s^2: polynomials in m, n and the p_k (`theory.formulas.tokens.PairMoments`).

Any temperature, given the ids.  As in `theory.formulas.softmax`, with x = ln t and
Phi = prod_v phi(c_v t),

    E A_v        = int psi_1(c_v t)/phi(c_v t) Phi dx       queries of different tokens: products
    E sum A_v^2  = int sum_v psi_2(c_v t)/phi(c_v t) Phi dx       one query

These hold at finite width as well, z the component of a key along what the key map makes of the
query (`theory.formulas.logits`).  Two queries of one token and unequal prefixes share a variance
of weights that grows with s^2 as that of each alone does; queries of correlation r share
G(0) + r G'(0) + r^2 (G(1) - G(0) - G'(0)).  Of all this the first order given the ids is
subtracted, the rest is averaged over a sample of ids, and the exact mean of the first order is
added: what is left of the sampling is small, and stated.

All derived here; held against real layers by the claims of `theory.papers.ours`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from nope.tokens import Tokens
from theory.formulas.logits import Logits
from theory.formulas.softmax import LARGEST_EXPONENT, Transforms
from theory.formulas.tokens import (
    PairMoments,
    collision_matrix,
    moments_given,
    pair_moments,
    sample_ids,
)
from theory.rules.mixing import Mixing, Prefixed, excess

NODES = 4
"""Of the Gauss rule for the scale of a query's logits."""
SMALLEST = 1e-60
"""phi and Phi are taken to be at least this: nothing, but not so little that products underflow."""
TINY = 1e-14
"""Rounding of a sum that vanishes."""
DEVIATIONS = 2.0
"""Standard errors of a sample that a remainder allows for."""


@dataclass(frozen=True)
class Attention:
    """Queries of tokens u on keys of tokens v: s^2, the correlation of two such queries, widths."""

    variance: float
    correlation: float
    logits: Logits

    def temperatures(self) -> tuple[np.ndarray, np.ndarray]:
        """s sqrt(u) and probabilities, u the scales of the logits."""
        scales, weights = gauss_rule(*self.logits.scales(), NODES)
        return np.sqrt(self.variance * scales), weights

    def shared(self, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """E r and E r^2 of all pairs of queries, `same` where they are of one token.

        Of two tokens r varies about its mean by 1 - r^2 over d_h, and over the keys' dimension.
        """
        r = self.correlation
        square = r**2 + (1 - r**2) * min(1 / self.logits.d_h + 1 / self.logits.freedom, 1.0)
        return same + (1 - same) * r, same + (1 - same) * square


def gauss_rule(values: np.ndarray, weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Fewer values and weights, with the same mean of all polynomials of degree 2 size - 1.

    The eigenvalues of multiplication by x on polynomials of degree below `size`.
    """
    size = min(size, len(values))
    powers = np.vander(values, size, increasing=True) * np.sqrt(weights)[:, None]
    basis, _ = np.linalg.qr(powers)
    nodes, vectors = np.linalg.eigh(basis.T @ (values[:, None] * basis))
    return nodes, vectors[0] ** 2


# --------------------------------------------------------------------------- given the ids


class CopyTransforms:
    """Means over one logit at c t for c = 0, 1, ... copies of a token (rows), over x = ln t.

    `log_phi`, and over phi: `first` E u e^-u, `second` E u^2 e^-u times |e_v|^2/d given z,
    `single` E u^2 e^-u over c, and `lean` E z u e^-u.  For one s; `step` is that in x.
    """

    def __init__(self, s: float, n_ctx: int, copies: int, logits: Logits) -> None:
        single = Transforms(s, n_ctx, logits=logits)
        norm = 1 + logits.slack * (single.z**2 - 1) / logits.freedom
        self.step, self.freedom = single.step, logits.freedom
        shape = copies + 1, len(single.x)
        self.log_phi, self.first, self.second, self.single, self.lean = np.zeros((5, *shape))
        for c in range(1, copies + 1):
            exponent = single.x[:, None] + np.log(c) + s * single.z
            u = np.exp(np.minimum(exponent, LARGEST_EXPONENT))
            damping = np.where(u < -np.log(SMALLEST), np.exp(-u), 0.0)
            phi = np.maximum(damping @ single.weights, SMALLEST)
            self.log_phi[c] = np.log(phi)
            self.first[c] = (u * damping) @ single.weights / phi
            self.second[c] = (u**2 * damping) @ (norm * single.weights) / phi
            self.single[c] = (u**2 * damping) @ single.weights / phi / c
            self.lean[c] = (u * damping) @ (single.z * single.weights) / phi

    def means(self, counts: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, ...]:
        """E A_v, E sum_v A_v^2 |e_v|^2/d and E sum_{v != w} A_v A_w z_v z_w/D of every prefix.

        `counts` are c_v (n_ctx, tokens), `own` how many copies of its own token each position
        completes.
        """
        Phi = self._joint(own)
        first = Phi @ self.first[: counts.max() + 1].T
        leaning = _summed(self.lean, own) ** 2 - _summed(self.lean**2, own)
        squares, pairs = ((Phi * each).sum(1) for each in (_summed(self.second, own), leaning))
        return np.take_along_axis(first, counts, 1), squares, pairs / self.freedom

    def participation(self, own: np.ndarray) -> np.ndarray:
        """E sum_n a_n^2 of every prefix: c_v copies share A_v evenly."""
        return np.asarray((self._joint(own) * _summed(self.single, own)).sum(1))

    def _joint(self, own: np.ndarray) -> np.ndarray:
        """prod_v phi_v of every prefix, times the step."""
        logarithm = np.maximum(_summed(self.log_phi, own), np.log(SMALLEST))
        return np.asarray(self.step * np.exp(logarithm))


def _summed(rows: np.ndarray, own: np.ndarray) -> np.ndarray:
    """sum_v rows[c_v] of every prefix."""
    return np.asarray((rows[own] - rows[own - 1]).cumsum(0))


@dataclass(frozen=True, eq=False)
class Window:
    """One sequence of ids: what attention makes of its prefixes, in the mean over logits."""

    ids: np.ndarray
    attention: Attention
    transforms: Sequence[CopyTransforms] = ()

    @cached_property
    def moments(self) -> PairMoments:
        return moments_given(self.ids)

    @cached_property
    def same(self) -> np.ndarray:
        """N."""
        return np.asarray(self.moments.same[0])

    @cached_property
    def tokens(self) -> np.ndarray:
        """The ids, numbered from 0 without gaps."""
        return np.asarray(np.unique(self.ids, return_inverse=True)[1])

    @cached_property
    def counts(self) -> np.ndarray:
        """c_v of each prefix."""
        one_hot = np.eye(self.tokens.max() + 1, dtype=int)[self.tokens]
        return np.asarray(one_hot.cumsum(0))

    @cached_property
    def own(self) -> np.ndarray:
        """How many copies of its own token each position completes."""
        return np.take_along_axis(self.counts, self.tokens[:, None], 1)[:, 0]

    @property
    def participation(self) -> np.ndarray:
        """E sum_n a_mn^2."""
        shares = self.attention.temperatures()[1]
        found = (each.participation(self.own) for each in self.transforms)
        return np.asarray(sum(s * each for s, each in zip(shares, found, strict=True)))

    @cached_property
    def means(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """E A_v, the squares and the pairs of `CopyTransforms.means`, over all scales."""
        found = [each.means(self.counts, self.own) for each in self.transforms]
        _, shares = self.attention.temperatures()
        weights, squares, pairs = (
            sum(share * mean for share, mean in zip(shares, means, strict=True))
            for means in zip(*found, strict=True)
        )
        return weights, squares, pairs

    @cached_property
    def tilt(self) -> np.ndarray:
        """What equal queries share to first order."""
        return np.asarray(self.attention.variance * self.moments.common_tilt)

    @cached_property
    def first_order(self) -> np.ndarray:
        """At infinite width."""
        r, _ = self.attention.shared(self.same)
        reweighting = self.attention.variance * self.moments.reweighting
        return np.asarray(self.moments.collision + r * self.tilt + reweighting)

    @cached_property
    def fluctuation(self) -> tuple[np.ndarray, np.ndarray]:
        """What finite width adds to first order in s^2 and 1/D: to equal queries, to any two.

        F the fluctuation of the tokens' kernel, C and D of F as they are of N, p and q the shares
        c_v/m and c_v/n: E sum_vw p_v q_w F_vw C_mn(v, w), and E sum_vw p_v q_w F_vw
        (D_m(v) + D_n(w))/2.  E F_vw^2 is 1, E F_vv^2 is 2 times the slack of norms.
        """
        p = self.counts / self.moments.count
        U, T, V, W = p @ p.T, p**2 @ p.T, p**3 @ p.T, p**2 @ (p**2).T
        S = np.diagonal(U)[:, None]
        equal = 1 - S - S.T + S * S.T + U**2 - U + T + T.T - 2 * W
        one_sided = 2 * (S * U - V) - (U - T)
        logits = self.attention.logits
        equal += logits.slack * 2 * (U - T - T.T + W)
        one_sided += logits.slack * (U - 3 * T + 2 * V)
        size = self.attention.variance / logits.freedom
        return size * equal, size * (one_sided + one_sided.T)

    @cached_property
    def slope(self) -> np.ndarray:
        """G'(0): the first order, times (1 - P)/(1 - uniform P) for each query.

        By Stein's lemma in both queries this is exact where all c_v are equal.
        """
        uniform = 1 - np.diagonal(self.moments.collision)
        rest = 1 - self.means[1]
        damped = np.divide(rest, uniform, out=np.zeros_like(rest), where=uniform > 0)
        return np.asarray(self.tilt * np.outer(damped, damped))

    @cached_property
    def apart(self) -> np.ndarray:
        """G(0): independent queries."""
        return np.asarray(self.means[0] @ self.means[0].T)

    @cached_property
    def together(self) -> tuple[np.ndarray, np.ndarray]:
        """G(1) - G(0), and what it drops.

        The variance of the weights, sum_v Var A_v, grows as it does on average for the two
        prefixes alone; exact for one prefix, and where one of them holds one token only.
        """
        variance = self.means[1] - np.diagonal(self.apart)
        growth = _ratio(variance, np.diagonal(self.tilt))
        unsure = np.abs(np.subtract.outer(growth, growth)) / 2
        return self.tilt * np.add.outer(growth, growth) / 2, np.abs(self.tilt) * unsure

    @cached_property
    def floor(self) -> np.ndarray:
        """The fluctuation at any temperature: one query has the pairs of its `means`.

        What these have beyond the first order equal queries share over the shorter prefix.
        """
        r, _ = self.attention.shared(self.same)
        equal, any_two = self.fluctuation
        beyond = self.means[2] - np.diagonal(equal + any_two)
        every = np.arange(len(self.ids))
        return np.asarray(any_two + r * (equal + beyond[np.minimum.outer(every, every)]))

    @cached_property
    def kernel(self) -> tuple[np.ndarray, np.ndarray]:
        """E sum_vw A_v(m) A_w(n) <e_v, e_w>/d, and what it drops."""
        r, square = self.attention.shared(self.same)
        together, unsure = self.together
        curved = together - self.slope
        fourth = 3 * (1 - self.same) / self.attention.logits.d_h**2
        dropped = square * unsure + (r**2 * (1 - np.abs(r)) + fourth) * np.abs(curved)
        return self.apart + r * self.slope + square * curved + self.floor, dropped


def _ratio(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """1 where there is nothing to compare."""
    return np.asarray(np.divide(left, right, out=np.ones_like(left), where=np.abs(right) > TINY))


# -------------------------------------------------------------------------- averages of ids


@lru_cache(maxsize=16)
def fluctuation(tokens: Tokens, n_ctx: int, attention: Attention) -> np.ndarray:
    """What finite width adds to first order, over `sample_ids`."""
    total = np.zeros((n_ctx, n_ctx))
    for ids, share in patterns(sample_ids(tokens, n_ctx)):
        window = Window(ids, attention)
        equal, any_two = window.fluctuation
        total += share * (attention.shared(window.same)[0] * equal + any_two)
    return total


def patterns(windows: np.ndarray) -> Iterator[tuple[np.ndarray, float]]:
    """Each pattern of equal ids once, as the places where they first occur, and its share."""
    first = np.array([np.equal.outer(ids, ids).argmax(1) for ids in windows])
    found, counts = np.unique(first, axis=0, return_counts=True)
    return zip(found, counts / len(windows), strict=True)


@dataclass(frozen=True, eq=False)
class Sampled:
    """Averages over a sample of ids: what is beyond the first order, and what that drops.

    `excess` is that of E cos over the cosine of the mean kernel.
    """

    beyond: np.ndarray
    dropped: np.ndarray
    excess: np.ndarray


@lru_cache(maxsize=16)
def sampled(tokens: Tokens, n_ctx: int, attention: Attention, common: float) -> Sampled:
    """Over `sample_ids`; `common` is what all values share, over what is a token's own."""
    windows = sample_ids(tokens, n_ctx)
    size, shape = len(windows), (n_ctx, n_ctx)
    transforms = _transforms(windows, attention)
    beyond, square, dropped, kernel, cosine = (np.zeros(shape) for _ in range(5))
    for ids, share in patterns(windows):
        window = Window(ids, attention, transforms)
        found, lost = window.kernel
        change = found - window.first_order
        beyond += share * change
        square += share * change**2
        dropped += share * lost
        kernel += share * (found + common)
        cosine += share * _cosine(found + common)
    error = np.sqrt(np.maximum(square - beyond**2, 0.0) / size)
    excess = _ratio(cosine, _cosine(kernel)) - 1
    return Sampled(beyond, dropped + DEVIATIONS * error, excess)


@lru_cache(maxsize=16)
def participation(
    tokens: Tokens, n_ctx: int, attention: Attention
) -> tuple[np.ndarray, np.ndarray]:
    """E sum_n a_mn^2 over `sample_ids`, and what a sample leaves open."""
    windows = sample_ids(tokens, n_ctx)
    transforms = _transforms(windows, attention)
    mean, square = np.zeros((2, n_ctx))
    for ids, share in patterns(windows):
        found = Window(ids, attention, transforms).participation
        mean, square = mean + share * found, square + share * found**2
    error = np.sqrt(np.maximum(square - mean**2, 0.0) / len(windows))
    return mean, DEVIATIONS * error


def _transforms(windows: np.ndarray, attention: Attention) -> list[CopyTransforms]:
    copies = max(int(np.unique(ids, return_counts=True)[1].max()) for ids in windows)
    spreads, _ = attention.temperatures()
    n_ctx = windows.shape[1]
    return [CopyTransforms(float(s), n_ctx, copies, attention.logits) for s in spreads]


def _cosine(kernel: np.ndarray) -> np.ndarray:
    root = np.sqrt(np.diagonal(kernel))
    return np.asarray(kernel / np.outer(root, root))


@lru_cache(maxsize=4)
def _moments(tokens: Tokens, n_ctx: int) -> tuple[PairMoments, np.ndarray]:
    """The moments, and v - c of the mean of N."""
    return pair_moments(tokens, n_ctx), Prefixed(collision_matrix(tokens, n_ctx)).spread


# ----------------------------------------------------------------------------- the treatments


@dataclass(frozen=True, eq=False)
class Repetition:
    """A mixing whose queries, keys and values are maps of `tokens`: kernels affine in N."""

    tokens: Any  # hashable, which the protocol `Tokens` does not say
    mixing: Mixing

    @property
    def n_ctx(self) -> int:
        return len(self.mixing.count)

    @cached_property
    def moments(self) -> PairMoments:
        return _moments(self.tokens, self.n_ctx)[0]

    def own(self, kernel: Prefixed) -> float:
        """a of a kernel a N + b; all of it where nothing tells the two apart."""
        spread = _moments(self.tokens, self.n_ctx)[1][-1]
        return float(kernel.spread[-1] / spread if spread > 0 else kernel.kernel[0, 0])

    @cached_property
    def value(self) -> float:
        return self.own(self.mixing.values)

    @cached_property
    def common(self) -> float:
        """What all values share, over what is a token's own; 0 where they have nothing."""
        return float(self.mixing.values.kernel[0, 0] / self.value - 1) if self.value else 0.0

    @cached_property
    def attention(self) -> Attention:
        size = float(self.mixing.queries[0, 0])
        correlation = 1 - self.own(Prefixed(self.mixing.queries)) / size if size else 0.0
        return Attention(
            size * self.own(self.mixing.keys),
            correlation,
            self.mixing.width.logits(self.mixing.maps),
        )

    @property
    def participation(self) -> tuple[np.ndarray, np.ndarray]:
        """E sum_n a_mn^2, and what a sample leaves open."""
        if self.attention.variance == 0:
            return 1 / self.mixing.count, np.zeros(self.n_ctx)
        _ = self.mixing.table  # refuses logits that no quadrature covers
        return participation(self.tokens, self.n_ctx, self.attention)

    @cached_property
    def first_order(self) -> tuple[np.ndarray, np.ndarray]:
        """Tilt and reweighting."""
        r, moments = self.attention.correlation, self.moments
        tilt = (1 - r) * moments.tilt + r * moments.common_tilt
        return self.attention.variance * tilt, self.attention.variance * moments.reweighting

    @cached_property
    def error(self) -> np.ndarray:
        """Of the first order, where it is an average over a sample."""
        return np.asarray(DEVIATIONS * self.attention.variance * self.moments.standard_error)


Found = tuple[np.ndarray, np.ndarray, np.ndarray | float]


def first_order(tokens: Tokens, mixing: Mixing) -> Found:
    """The kernel, what is dropped (absolutely) and the excess."""
    found = Repetition(tokens, mixing)
    tilt, reweighting = found.first_order
    s2, uniform = found.attention.variance, np.sqrt(np.diagonal(found.moments.collision))
    # Of k equal counts the s^4 is 1/2 - 3/k of the s^2, and of many all orders are e^(s^2) - 1.
    # All that is there is at most 1, that of one key.
    size = np.abs(tilt) + np.abs(reweighting)
    one_key = _ratio(1 + size, size)
    grown = (np.expm1(s2) / s2 - 1 if s2 else 0.0) * (1 + 2 * np.outer(uniform, uniform))
    beyond = np.minimum(grown, one_key) * size
    added = fluctuation(found.tokens, found.n_ctx, found.attention)
    (narrow,) = mixing.over_pairs(lambda pairs: (pairs.narrow,), 1)
    kernel = mixing.uniform() + found.value * (tilt + reweighting + added)
    return kernel, found.value * (beyond + found.error) + narrow, 0.0


def any_temperature(tokens: Tokens, mixing: Mixing) -> Found:
    """The same with all orders in s^2, averaged over ids."""
    found = Repetition(tokens, mixing)
    if found.attention.variance == 0:
        return first_order(tokens, mixing)
    _ = mixing.table  # refuses logits that no quadrature covers
    sample = sampled(found.tokens, found.n_ctx, found.attention, found.common)
    (narrow,) = mixing.over_pairs(lambda pairs: (pairs.narrow,), 1)
    kernel = mixing.uniform() + found.value * (sum(found.first_order) + sample.beyond)
    dropped = found.value * (sample.dropped + found.error) + narrow
    return kernel, dropped, (1 + excess(mixing, kernel)) * (1 + sample.excess) - 1
