"""The kernels of one softmax attention at all pairs of positions: from values, keys and queries.

What the rules of `theory.rules.softmax` compute, in numbers.  What a position has alone is a
vector (`Mixing`); what two share is computed for blocks of pairs, the shorter prefix first
(`Pairs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from theory.formulas import outputs
from theory.formulas.logits import Logits
from theory.formulas.softmax import SHARPEST, Participation, SharedWithLonger, WeightedSquare
from theory.formulas.softmax_table import Between, ParticipationTable, Restricted, Tabulated
from theory.propagation import blocks, column_sums

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
        """v - c at each m, c the prefix average off the diagonal; at m = 1 of the first pair."""
        rest = np.diagonal(self.sums) - self.variance * self.count
        pairs = self.count * (self.count - 1)
        common = np.divide(rest, pairs, out=self.variance.copy(), where=pairs > 0)
        common[:1] = common[1:2] if len(common) > 1 else common[:1]
        return np.asarray(self.variance - common)


def first_order_change(values: Prefixed, keys: Prefixed, queries: np.ndarray) -> np.ndarray:
    """`wick.first_order` less the prefix mean, for all m and n.

    Cumulative sums, and one sum over all keys that is grouped beyond the first `EVERY`.
    """
    count = values.count
    half = _tilted(values, keys)
    half *= np.diagonal(queries)[:, None] / 2
    above = np.zeros(len(count))
    for rows in blocks(len(count)):
        shared, above = _running(keys.kernel[rows] * values.kernel[rows], above)
        weighted = keys.sums[rows] * values.sums[rows]
        weighted /= count[rows, None] * count
        shared += weighted
        by_column = np.cumsum(keys.rows[rows] * values.rows[rows], axis=1)
        by_column *= 2 / count[rows, None]
        shared -= by_column
        shared *= queries[rows] / 2
        half[rows] += shared
        half[rows] /= count[rows, None] * count
    return np.asarray(half + half.T)


def _running(rows: np.ndarray, above: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prefix sums in some rows of a matrix below its column sums `above`, and those below them."""
    rows[0] += above
    below = column_sums(rows)
    return np.asarray(below.cumsum(1)), below[-1]


def _tilted(values: Prefixed, keys: Prefixed) -> np.ndarray:
    """sum over i <= m of D_m(i) times the sum over j <= n of K(i, j), with the mean of the latter
    over each group of neighbouring keys.

    D_m(i) = J_ii - (2/m) sum over j <= m of J_ij, less its mean over i <= m.
    """
    count, edges = keys.count[:, None], group_edges(len(keys.count))
    inside = np.minimum(edges, count.astype(int))  # of m's keys, those before each edge
    diagonal = np.insert(np.diagonal(keys.kernel).cumsum(), 0, 0.0)[inside]
    sums = np.take_along_axis(keys.sums, np.maximum(inside - 1, 0), axis=1)
    sums[:, 0] = 0.0
    own = np.diff(diagonal - 2 / count * sums)
    own -= own.sum(1, keepdims=True) / count * np.diff(inside)
    mean = np.diff(values.sums[:, edges[1:] - 1], prepend=0.0) / np.diff(edges)
    return np.asarray(own @ mean.T)


def group_edges(count: int) -> np.ndarray:
    """Where groups of neighbours end, from 0: single up to `EVERY`, then longer and longer."""
    edges = [0]
    while edges[-1] < count:
        edges.append(edges[-1] + max(1, (edges[-1] - EVERY) // GROUP + 1))
    return np.array([*edges[:-1], count])


@dataclass(frozen=True, eq=False)
class Mixing:
    """One softmax attention: its kernels, and what each query has alone.

    `values` K, `keys` J and `queries` Q are kernels; the input's empirical kernel fluctuates as
    that of `maps` random maps, by maps/freedom, and its norms by a `slack` of that.
    """

    values: Prefixed
    keys: Prefixed
    queries: np.ndarray
    maps: float
    slack: float
    freedom: float
    d_h: float
    n_heads: float

    @cached_property
    def count(self) -> np.ndarray:
        return self.values.count

    @cached_property
    def positions(self) -> np.ndarray:
        return self.count.astype(int)

    def uniform(self, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        """The kernel that uniform weights give."""
        pairs = self.count[rows, None] * self.count[columns]
        return np.asarray(self.values.sums[rows, columns] / pairs)

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

    @property
    def width(self) -> KeyWidth:
        return KeyWidth(self.d_h, self.freedom, self.maps, self.slack)

    def _table(self, width: KeyWidth) -> Tabulated:
        return covering_table(len(self.count), float(self.pair_variances[1].max()), width)

    @cached_property
    def table(self) -> Tabulated:
        return self._table(self.width)

    @cached_property
    def wide_table(self) -> Tabulated:
        """Of keys whose correlations do not fluctuate, for what is small already."""
        return self._table(replace(self.width, maps=0.0, slack=0.0))

    @cached_property
    def loose_table(self) -> Tabulated:
        """Of keys whose norms may; without that it is the wide one, which layers share."""
        return self.table if self.slack else self.wide_table

    @cached_property
    def participation(self) -> np.ndarray:
        """A of each query."""
        return np.asarray((1 + self.table(self.positions, self.own_variance)) / self.count)

    @cached_property
    def shared_growth(self) -> tuple[Restricted, Restricted, Restricted]:
        """ln(1 + f) of each prefix at the s^2 of its pairs; over wide keys with ln(1 + f_inf)."""
        wide = self.wide_table
        asked = (self.table, Participation), (wide, Participation), (wide, SharedWithLonger)
        own, widest, endless = (table.restricted(f, *self.pair_variances) for table, f in asked)
        return own, widest, endless

    @cached_property
    def log_growth(self) -> np.ndarray:
        """ln m A of each query: s^2 where logits are small, at most ln m where they are not."""
        return np.asarray(np.log(self.count * self.participation))

    @cached_property
    def square_growth(self) -> np.ndarray:
        """S - 1 of each query."""
        found = self.table.logarithm(WeightedSquare, self.positions, self.own_variance)
        return np.asarray(np.expm1(found))

    @cached_property
    def tilt_growth(self) -> np.ndarray:
        """B_off over its first order, of each query."""
        return outputs.tilt_growth(self.wide_table, self.positions, self.own_variance)

    def over_pairs(
        self, function: Callable[[Pairs], Sequence[np.ndarray]], results: int
    ) -> list[np.ndarray]:
        """As many symmetric matrices as `function` gives of each block of pairs."""
        n_ctx = len(self.count)
        found = [np.empty((n_ctx, n_ctx)) for _ in range(results)]
        for rows in blocks(n_ctx):
            columns = slice(0, rows.stop)
            for matrix, block in zip(found, function(Pairs(self, rows, columns)), strict=True):
                matrix[rows, columns] = block
                matrix[columns, rows] = matrix[rows, columns].T
                square = matrix[rows, rows]
                square[:] = np.tril(block[:, rows.start :]) + np.tril(block[:, rows.start :], -1).T
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

    @property
    def uniform(self) -> np.ndarray:
        return self.mixing.uniform(self.rows, self.columns)

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
        logarithms = (each(self.columns, self.variance) for each in self.mixing.shared_growth)
        alike, wide, endless = (np.expm1(each) for each in logarithms)
        A = self.mixing.participation
        share = np.clip(1 - self.longer(A) / self.shorter(A), 0.0, 1.0)
        between = share * (endless - wide)
        return alike + between, (1 - share) / 2 * np.abs(between)

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
        """What the fluctuation of the empirical kernel adds, to first order in s^2 and 1/D.

        (s^2/D) (r (1 - 1/m)(1 - 1/n) - [h(m) + h(n) + r h(min)]/max), h(m) = (m - 1)(m - 2)/m^2,
        where norms do not fluctuate, and (s^2/D) r (1 - 1/min) where all is i.i.d. Gaussian, which
        Wishart's second moments say exactly: between the two by the norms' slack.
        """
        count = self.mixing.count
        h = (1 - 1 / count) * (1 - 2 / count)
        return self._fluctuation(h * self.mixing.own_variance, np.ones_like(h))

    @cached_property
    def floor(self) -> np.ndarray:
        """The same at any temperature: S - 1 for s^2 h, and shared parts grow as their tilt.

        Also what queries of one head share by chance, of r^2 (1 - r^2)^2/d_h beyond the mean.
        """
        T, r, count = self.mixing.square_growth, self.correlation, self.longer(self.mixing.count)
        chance = (1 - r**2) ** 2 / (2 * self.mixing.d_h) * self.longer(T) * self.shorter(T)
        chance = chance * self.overlap * count / np.maximum(count - 1, 1)
        return np.asarray(self._fluctuation(T, self.mixing.tilt_growth) + chance)

    def _fluctuation(self, square: np.ndarray, tilt: np.ndarray) -> np.ndarray:
        mixing, r = self.mixing, self.correlation
        rest = 1 - 1 / mixing.count
        growth = 1 + np.abs(r) * self.shorter(tilt - 1)
        own = self.longer(rest + mixing.slack / mixing.count)
        added = r * self.variance * own * self.shorter(rest) * growth
        taken = self.longer(square) + self.shorter(square) + r * self.shorter(square)
        added = added - (1 - mixing.slack) * taken / self.longer(mixing.count)
        return np.asarray(mixing.maps / mixing.freedom * self.shorter(mixing.values.spread) * added)

    @cached_property
    def unexchangeable(self) -> np.ndarray:
        """The first order that exchangeable keys would not have."""
        exchangeable = self.overlap * self.correlation * self.linear
        return np.asarray(self.of(self.mixing.change) - exchangeable)

    @cached_property
    def narrow(self) -> np.ndarray:
        """The next orders in 1/D of the fluctuation, s^4/D that pairs of queries share, and that a
        query, its own key and its value are equally long."""
        mixing = self.mixing
        width, first = mixing.maps / mixing.freedom, (1 - 1 / mixing.count) * mixing.own_variance
        own_key = 2 * mixing.slack * (self.longer(first) + self.shorter(first))
        shared = self.variance**2 + own_key / self.longer(mixing.count)
        return np.asarray(4 * width * np.abs(self.fluctuation) + self.overlap * width * shared)

    @cached_property
    def narrow_floor(self) -> np.ndarray:
        """The same at any temperature: ln(m A)^2 in place of s^4, and what norms vary."""
        width, G = self.mixing.maps / self.mixing.freedom, self.mixing.log_growth
        both = self.longer(G) + self.shorter(G)
        shared = self.longer(G) * self.shorter(G) + 2 * width * both**2 + self.mixing.slack * both
        return np.asarray(4 * width * np.abs(self.floor) + self.overlap * width * shared)

    @cached_property
    def lost(self) -> np.ndarray:
        """The part of the first order that keys are not exchangeable in, times s^2."""
        return np.asarray(self.variance * np.abs(self.unexchangeable))


def first_order(mixing: Mixing) -> tuple[np.ndarray, np.ndarray, np.ndarray | float]:
    """The kernel, what is dropped (absolutely) and the excess."""

    def block(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        count, s2 = pairs.shorter(mixing.count), pairs.variance
        scales = (1 + 2 / mixing.d_h) * (1 + 2 * mixing.maps / mixing.freedom)  # E u^2
        next_order = scales * (np.expm1(s2) - s2) * np.maximum(1, np.abs(1 - 6 / count))
        one_key = np.maximum(pairs.longer(mixing.count), s2)  # what it has alone is at most this
        beyond = pairs.overlap * np.minimum(next_order, one_key) * (1 - 1 / count)
        kernel = pairs.uniform + pairs.of(mixing.change) + pairs.fluctuation
        return kernel, beyond + pairs.lost + pairs.narrow

    kernel, dropped = mixing.over_pairs(block, 2)
    return kernel, dropped, 0.0


def any_temperature(mixing: Mixing) -> tuple[np.ndarray, np.ndarray, np.ndarray | float]:
    """The same with the exchangeable part at any s, and the fluctuation of the participation."""

    def block(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        r = pairs.correlation
        shared, unsure = pairs.shared
        beyond = pairs.overlap * (shared - r * pairs.linear)
        kernel = pairs.uniform + pairs.of(mixing.change) + beyond + pairs.floor
        return kernel, pairs.overlap * unsure + pairs.lost + pairs.narrow_floor

    kernel, dropped = mixing.over_pairs(block, 2)
    return kernel, dropped, excess(mixing, kernel)


def excess(mixing: Mixing, kernel: np.ndarray) -> np.ndarray:
    """E cos over the cosine of the kernel, less 1, for the participation P of each query.

    With delta = E (P/E P)^(-1/2) - 1 of the mean over heads, diluted by what all values have in
    common: delta_m + delta_n for independent queries.  For correlated ones to leading order the
    covariances of both P and of sum_n a_mn a_nn leave (1 - r)(1 - r/3) of it.
    """
    delta = outputs.mean_over_heads(
        outputs.root_bias(mixing.loose_table, mixing.positions, mixing.own_variance),
        mixing.loose_table.relative_variance(mixing.positions, mixing.own_variance),
        mixing.n_heads,
    )
    common = mixing.values.variance - mixing.values.spread
    delta = delta * (1 - common / np.diagonal(kernel)) ** 2

    def block(pairs: Pairs) -> tuple[np.ndarray]:
        r = np.maximum(pairs.correlation, 0.0)
        return ((pairs.longer(delta) + pairs.shorter(delta)) * (1 - r) * (1 - r / 3),)

    return mixing.over_pairs(block, 1)[0]


@dataclass(frozen=True)
class KeyWidth:
    """What the logits of a query over keys of `maps` random maps vary by, beyond s.

    The keys' empirical kernel fluctuates as that of one map into D/maps dimensions, D = `freedom`.
    """

    d_h: float
    freedom: float
    maps: float
    slack: float = 0.0

    def logits(self, maps: float) -> Logits:
        """Of another number of maps."""
        freedom = max(self.freedom / maps, 1.0) if maps else np.inf
        return Logits(self.d_h, freedom, self.slack)

    @property
    def neighbours(self) -> tuple[float, float]:
        """0, 1, 2, 4, ...: the two next to `maps`."""
        above = 2.0 ** np.ceil(np.log2(max(self.maps, 1.0)))
        return (0.0 if above <= 1 else above / 2), float(above)


def covering_table(n_ctx: int, variance: float, width: KeyWidth) -> Tabulated:
    """Tables up to a power of two of s, at 0, 1, 2, 4, ... maps, so that the layers of a stack
    share them; between two of them linear in the number of maps, and in the slack of norms.

    Raises `NotImplementedError` for logits that no quadrature covers: narrow heads vary them.
    """
    if 0 < width.slack < 1:
        sphere, free = (replace(width, slack=end) for end in (0.0, 1.0))
        ends = [covering_table(n_ctx, variance, each) for each in (sphere, free)]
        return Between(ends[0], ends[1], width.slack)
    spread = 2.0 ** np.ceil(np.log2(np.sqrt(variance)) - 1e-9) if variance > 0 else 1.0

    def table(maps: float) -> ParticipationTable:
        logits = width.logits(maps)
        sharpest = SHARPEST / 2 / np.sqrt(logits.scales()[0].max())  # roots take 2 s
        if spread > sharpest:
            raise NotImplementedError(
                f"expected logits of standard deviation up to {sharpest:.3g} for {logits}, "
                f"got {np.sqrt(variance):.3g}; use fidelity='first_order', or measure it"
            )
        return ParticipationTable(n_ctx, float(spread), logits)

    fewer, more = width.neighbours
    if width.maps in (fewer, more):
        return table(width.maps)
    return Between(table(fewer), table(more), (width.maps - fewer) / (more - fewer))
