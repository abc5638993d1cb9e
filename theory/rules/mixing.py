"""The kernels of one softmax attention at all pairs of positions: from values, keys and queries.

What the rules of `theory.rules.softmax` compute, in numbers.  What a position has alone is a
vector (`Mixing`); what two share is computed for blocks of pairs, the shorter prefix first
(`Pairs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from theory.formulas import outputs
from theory.formulas.softmax import (
    SHARPEST,
    Participation,
    SharedWithLonger,
    chi_square_nodes,
)
from theory.formulas.softmax_table import ParticipationTable, Restricted
from theory.propagation import column_sums, prefix_sum

ROWS = 32
"""Rows of a block of pairs: the steps of a long expression stay in the processor's cache."""

EVERY = 64
"""Keys that are summed one by one where a sum over all pairs and all keys is taken."""

GROUP = 32
"""Beyond them, a group of neighbours is this part of its position long: its inner covariance is
1/(12 GROUP^2) of what is summed."""


@dataclass(frozen=True, eq=False)
class Prefixed:
    """A kernel with its sums over i <= m (`rows`) and over i <= m and j <= n (`sums`)."""

    kernel: np.ndarray

    @cached_property
    def count(self) -> np.ndarray:
        return np.arange(1.0, len(self.kernel) + 1)

    @cached_property
    def rows(self) -> np.ndarray:
        return column_sums(self.kernel)

    @cached_property
    def sums(self) -> np.ndarray:
        return np.asarray(self.rows.cumsum(1))

    @cached_property
    def variance(self) -> np.ndarray:
        """v at each m: the prefix average of the diagonal."""
        return np.asarray(np.diagonal(self.kernel).cumsum() / self.count)

    @cached_property
    def spread(self) -> np.ndarray:
        """v - c at each m, c the prefix average off the diagonal; 0 at m = 1."""
        rest = np.diagonal(self.sums) - self.variance * self.count
        pairs = self.count * (self.count - 1)
        common = np.divide(rest, pairs, out=self.variance.copy(), where=pairs > 0)
        return np.asarray(self.variance - common)


def first_order_change(values: Prefixed, keys: Prefixed, queries: np.ndarray) -> np.ndarray:
    """`wick.first_order` less the prefix mean, for all m and n.

    Cumulative sums, and one sum over all keys that is grouped beyond the first `EVERY`.
    """
    count = values.count
    product = np.outer(count, count)
    by_column = (keys.rows * values.rows).cumsum(1) / count[:, None]
    shared = prefix_sum(keys.kernel * values.kernel) - by_column - by_column.T
    shared = queries * (shared + keys.sums * values.sums / product)
    own = np.tril(np.diagonal(keys.kernel)[None, :] - 2 * keys.rows / count[:, None])
    own = np.tril(own - own.sum(1, keepdims=True) / count[:, None])
    tilted = np.diagonal(queries)[:, None] / 2 * _grouped_product(own, values.rows)
    return np.asarray((shared + tilted + tilted.T) / product)


def _grouped_product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left @ right.T, with the mean of `right` over each group of neighbouring keys."""
    starts = group_starts(len(left))
    sizes = np.diff([*starts, len(left)])
    summed, averaged = (np.add.reduceat(each, starts, axis=1) for each in (left, right))
    return np.asarray(summed @ (averaged / sizes).T)


def group_starts(count: int) -> np.ndarray:
    """Where groups of neighbours start, from 0: single up to `EVERY`, then longer and longer."""
    starts = [0]
    while starts[-1] < count:
        starts.append(starts[-1] + max(1, (starts[-1] - EVERY) // GROUP + 1))
    return np.array(starts[:-1])


@dataclass(frozen=True, eq=False)
class Mixing:
    """One softmax attention: its kernels, and what each query has alone.

    `values` K, `keys` J and `queries` Q are kernels; `maps` random maps made the input, whose
    empirical kernel therefore fluctuates by maps/freedom; `normalised` says that its norms do
    not; `repeated` that it is 0 or 1 by chance.
    """

    values: Prefixed
    keys: Prefixed
    queries: np.ndarray
    maps: int
    normalised: bool
    freedom: float
    d_h: float
    n_heads: float
    repeated: bool = False

    @cached_property
    def count(self) -> np.ndarray:
        return self.values.count

    @cached_property
    def positions(self) -> np.ndarray:
        return self.count.astype(int)

    @cached_property
    def uniform(self) -> np.ndarray:
        return np.asarray(self.values.sums / np.outer(self.count, self.count))

    @cached_property
    def change(self) -> np.ndarray:
        return first_order_change(self.values, self.keys, self.queries)

    @cached_property
    def length(self) -> np.ndarray:
        """sqrt(Q_mm)."""
        return np.asarray(np.sqrt(np.diagonal(self.queries)))

    @cached_property
    def key_spread(self) -> np.ndarray:
        return np.asarray(np.maximum(self.keys.spread, 0.0))

    @cached_property
    def own_variance(self) -> np.ndarray:
        """s^2 of each query."""
        return np.asarray(np.diagonal(self.queries) * self.key_spread)

    @cached_property
    def pair_variances(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each prefix, the least and the largest s^2 with a query at its end or later."""
        later = self.length[::-1]
        ends = np.minimum.accumulate(later)[::-1], np.maximum.accumulate(later)[::-1]
        least, largest = (self.length * end * self.key_spread for end in ends)
        return least, largest

    @cached_property
    def table(self) -> ParticipationTable:
        top = float(self.pair_variances[1].max())
        return covering_table(len(self.count), top, self.d_h)

    def widened(self, growth: np.ndarray) -> np.ndarray:
        return widened(growth, self.normalised, self.maps / self.freedom)

    @cached_property
    def participation(self) -> np.ndarray:
        """A of each query."""
        growth = self.widened(self.table(self.positions, self.own_variance))
        return np.asarray((1 + growth) / self.count)

    @cached_property
    def shared_growth(self) -> tuple[Restricted, Restricted]:
        """ln(1 + f) and ln(1 + f_inf) of each prefix, at the s^2 of its pairs."""
        least, largest = self.pair_variances
        own = self.table.restricted(Participation, least, largest)
        return own, self.table.restricted(SharedWithLonger, least, largest)

    @cached_property
    def tilt_growth(self) -> np.ndarray:
        """B_off over its first order, of each query."""
        return outputs.tilt_growth(self.table, self.positions, self.own_variance)

    def over_pairs(
        self, function: Callable[[Pairs], Sequence[np.ndarray]], results: int
    ) -> list[np.ndarray]:
        """As many symmetric matrices as `function` gives of each block of pairs."""
        n_ctx = len(self.count)
        found = [np.empty((n_ctx, n_ctx)) for _ in range(results)]
        for start in range(0, n_ctx, ROWS):
            rows, columns = slice(start, start + ROWS), slice(0, min(start + ROWS, n_ctx))
            for matrix, block in zip(found, function(Pairs(self, rows, columns)), strict=True):
                matrix[rows, columns] = block
                matrix[columns, rows] = matrix[rows, columns].T
                square = matrix[rows, rows]
                square[:] = np.tril(block[:, start:]) + np.tril(block[:, start:], -1).T
        return found


@dataclass(frozen=True, eq=False)
class Pairs:
    """A block of pairs of queries: n <= m in `columns`, the shorter prefix, m in `rows`.

    What it says of pairs with n > m is not read.
    """

    mixing: Mixing
    rows: slice
    columns: slice

    def of(self, matrix: np.ndarray) -> np.ndarray:
        return matrix[self.rows, self.columns]

    def longer(self, by_position: np.ndarray) -> np.ndarray:
        return by_position[self.rows, None]

    def shorter(self, by_position: np.ndarray) -> np.ndarray:
        return by_position[None, self.columns]

    @cached_property
    def correlation(self) -> np.ndarray:
        """r of two queries."""
        lengths = self.mixing.length
        size = self.longer(lengths) * self.shorter(lengths)
        nothing = np.zeros(size.shape)
        r = np.divide(self.of(self.mixing.queries), size, out=nothing, where=size > 0)
        return np.asarray(np.clip(r, -1.0, 1.0))

    @cached_property
    def overlap(self) -> np.ndarray:
        """What uniform weights leave of the values' own part: (v - c)/max(m, n)."""
        spread = self.shorter(self.mixing.values.spread)
        return np.asarray(spread / self.longer(self.mixing.count))

    @cached_property
    def variance(self) -> np.ndarray:
        """s^2 of one query, geometric mean of both, over the shorter prefix."""
        lengths = self.mixing.length
        keys = self.shorter(lengths * self.mixing.key_spread)
        return np.asarray(self.longer(lengths) * keys)

    @cached_property
    def linear(self) -> np.ndarray:
        """What equal queries share to first order: s^2 (1 - 1/n)."""
        return np.asarray(self.variance * (1 - 1 / self.shorter(self.mixing.count)))

    @cached_property
    def slope(self) -> np.ndarray:
        """h'(0), exact: s^2 (1 - A_m)(1 - A_n)/(1 - 1/m) by Stein's lemma in both queries."""
        rest = 1 - self.mixing.participation
        count = np.maximum(self.longer(self.mixing.count), 2)  # at m = 1 both A are 1
        return np.asarray(self.variance * self.longer(rest) * self.shorter(rest) / (1 - 1 / count))

    @cached_property
    def _equal(self) -> tuple[np.ndarray, np.ndarray]:
        """h(1) - 1, between f of equal prefixes and f_inf of endless ones, and its error."""
        growths = (each(self.columns, self.variance) for each in self.mixing.shared_growth)
        alike, endless = (self.mixing.widened(np.expm1(each)) for each in growths)
        A = self.mixing.participation
        share = np.clip(1 - self.longer(A) / self.shorter(A), 0.0, 1.0)
        return alike + share * (endless - alike), share * (1 - share) / 2 * np.abs(endless - alike)

    @cached_property
    def shared(self) -> tuple[np.ndarray, np.ndarray]:
        """h(r) - 1, m E sum_i a_mi a_ni = h(r) over exchangeable keys, and what it drops.

        r h'(0) + r^2 (h(1) - 1 - h'(0)): exact to s^4, at r = 1 and in its slope at r = 0; the
        next order is in r^2 (1 - r).
        """
        r, (equal, unsure) = self.correlation, self._equal
        curved = equal - self.slope
        dropped = r**2 * (unsure + (1 - r) * np.abs(curved))
        return r * self.slope + r**2 * curved, dropped

    @cached_property
    def fluctuation(self) -> np.ndarray:
        """What the fluctuation of the empirical kernel adds, to first order in s^2 and 1/d.

        (s^2/d) (r (1 - 1/m)(1 - 1/n) - [h(m) + h(n) + r h(min)]/max), h(m) = (m - 1)(m - 2)/m^2;
        h comes from norms that do not fluctuate, and is absent where they do.
        """
        mixing, r = self.mixing, self.correlation
        rest = 1 - 1 / mixing.count
        added = r * self.longer(rest) * self.shorter(rest)
        if mixing.normalised:
            h = rest * (1 - 2 / mixing.count)
            pairs = self.longer(h) + self.shorter(h) + r * self.shorter(h)
            added = added - pairs / self.longer(mixing.count)
        size = mixing.maps / mixing.freedom * self.shorter(mixing.values.spread)
        return np.asarray(size * self.variance * added)

    @cached_property
    def unexchangeable(self) -> np.ndarray:
        """The first order that exchangeable keys would not have."""
        exchangeable = self.overlap * self.correlation * self.linear
        return np.asarray(self.of(self.mixing.change) - exchangeable)

    @cached_property
    def lost(self) -> np.ndarray:
        """What both fidelities drop: keys that are not exchangeable, and the next orders in 1/d.

        Those of the fluctuation, and s^4/d that pairs of queries share.  Where tokens repeat, also
        what a kernel of zeros and ones has beyond its mean's square: s^2 c (1 - c), c the share
        of repetitions.
        """
        mixing = self.mixing
        width = mixing.maps / mixing.freedom
        lost = 4 * width * np.abs(self.fluctuation) + self.overlap * self.variance**2 * width
        if mixing.repeated:
            diagonal = self.shorter(np.diagonal(mixing.values.kernel))
            share = self.shorter(mixing.values.spread) / diagonal
            lost = lost + self.variance * share * (1 - share) * diagonal
        return np.asarray(lost + self.variance * np.abs(self.unexchangeable))


def first_order(mixing: Mixing) -> tuple[np.ndarray, np.ndarray, np.ndarray | float]:
    """The kernel, what is dropped (absolutely) and the excess."""

    def block(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        rest = 1 - 1 / pairs.shorter(mixing.count)
        beyond = pairs.overlap * (np.expm1(pairs.variance) - pairs.variance) * rest
        kernel = pairs.of(mixing.uniform) + pairs.of(mixing.change) + pairs.fluctuation
        return kernel, beyond + pairs.lost

    kernel, dropped = mixing.over_pairs(block, 2)
    return kernel, dropped, 0.0


def any_temperature(mixing: Mixing) -> tuple[np.ndarray, np.ndarray, np.ndarray | float]:
    """The same with the exchangeable part at any s, and the fluctuation of the participation."""

    def block(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        r = pairs.correlation
        shared, unsure = pairs.shared
        beyond = pairs.overlap * (shared - r * pairs.linear)
        floor = pairs.fluctuation * (1 + np.abs(r) * pairs.shorter(mixing.tilt_growth - 1))
        kernel = pairs.of(mixing.uniform) + pairs.of(mixing.change) + beyond + floor
        return kernel, pairs.overlap * unsure + pairs.lost

    kernel, dropped = mixing.over_pairs(block, 2)
    return kernel, dropped, _excess(mixing, kernel)


def _excess(mixing: Mixing, kernel: np.ndarray) -> np.ndarray:
    """E cos over the cosine of the kernel, less 1, for the participation P of each query.

    With delta = E (P/E P)^(-1/2) - 1 of the mean over heads, diluted by what all values have in
    common: delta_m + delta_n for independent queries.  For correlated ones to leading order the
    covariances of both P and of sum_n a_mn a_nn leave (1 - r)(1 - r/3) of it.
    """
    delta = outputs.mean_over_heads(
        outputs.root_bias(mixing.table, mixing.positions, mixing.own_variance),
        mixing.table.relative_variance(mixing.positions, mixing.own_variance),
        mixing.n_heads,
    )
    common = mixing.values.variance - mixing.values.spread
    delta = delta * (1 - common / np.diagonal(kernel)) ** 2

    def block(pairs: Pairs) -> tuple[np.ndarray]:
        r = np.maximum(pairs.correlation, 0.0)
        return ((pairs.longer(delta) + pairs.shorter(delta)) * (1 - r) * (1 - r / 3),)

    return mixing.over_pairs(block, 1)[0]


def widened(growth: np.ndarray, fixed_norm: bool, inverse_width: float) -> np.ndarray:
    """f of keys whose empirical kernel fluctuates: ln(1 + f) and its square, as in `outputs`."""
    factor = float(outputs.width_coefficient(fixed_norm)) * inverse_width
    return np.asarray(np.expm1(np.log1p(growth) + factor * np.log1p(growth) ** 2))


def covering_table(n_ctx: int, variance: float, d_h: float) -> ParticipationTable:
    """A table up to a power of two of s, so that the layers of a stack share it.

    Raises `NotImplementedError` for logits that no quadrature covers: narrow heads vary them.
    """
    spread = 2.0 ** np.ceil(np.log2(np.sqrt(variance)) - 1e-9) if variance > 0 else 1.0
    sharpest = SHARPEST / np.sqrt(chi_square_nodes(d_h)[0].max())
    if spread > sharpest:
        raise NotImplementedError(
            f"expected logits of standard deviation up to {sharpest:.3g} at d_head = {d_h:g}, "
            f"got {np.sqrt(variance):.3g}; use fidelity='first_order', or measure it"
        )
    return ParticipationTable(n_ctx, float(spread), d_h)
