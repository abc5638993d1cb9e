"""A softmax that is not uniform: to first order in s^2, and at any temperature.

Given the tokens, logits are Gaussian over W_Q and W_K with covariance Q(m, n) J(i, j), Q and J the
kernels of the queries and of the keys (exactly so given the queries; d_h enters through theirs).

First order.  Wick's theorem (`theory.formulas.wick`) gives for the weights of the queries m and n
on the keys i and j

    m n E a_mi a_nj = 1 + Q(m, n) C_mn(i, j) + Q(m, m) D_m(i)/2 + Q(n, n) D_n(j)/2

with C_mn(i, j) = J(i, j) centred over i <= m and over j <= n, D_m(i) = C_mm(i, i) less its mean.

Any temperature.  Of keys that are exchangeable, J = c + (v - c) I, the common part cancels: what is
left are i.i.d. logits of variance s^2 = Q (v - c), with E sum_n a_n^2 = (1 + f(m, s^2))/m, f the
growth of `attention.participation_finite_head`.  So the exchangeable part of the first order is
replaced by f at the prefix averages of v and c: exact for exchangeable keys at any s, exact to
first order for others.  Two queries of correlation r share
(1 - 2/m) f(m, r s^2) + (2/m) r f(m, s^2), m the shorter prefix: exact at r = 0, at r = 1 for one
prefix, at m = 2 to second order and for large m (`between_queries`).

Finite width.  The empirical kernel of p random maps fluctuates by p/d about its mean, which tilts
every query towards keys that agree with it: the floor s^2/d, and its effect on pairs of queries.

All derived here; held against real layers by the claims of `theory.papers.ours`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import pairwise

import numpy as np
import sympy as sp

from nope.operations import Mix, Operation
from theory.formula import compile_number_form
from theory.formulas import outputs
from theory.formulas.softmax_expansions import participation_expansion
from theory.formulas.softmax_table import ParticipationTable
from theory.formulas.wick import first_order
from theory.kernel import J, K, Moved, Q, Rule, Traits
from theory.propagation import prefix_sum
from theory.symbols import d, i, j, m, n, s

# ------------------------------------------------------------------------- numbers


BLOCKS = 8
"""A product with a triangular matrix is taken in this many blocks of rows, without their zeros."""


@dataclass(frozen=True, eq=False)
class Prefixed:
    """A kernel with its sums over i <= m (`rows`) and over i <= m and j <= n (`sums`)."""

    kernel: np.ndarray

    @cached_property
    def count(self) -> np.ndarray:
        return np.arange(1.0, len(self.kernel) + 1)

    @cached_property
    def rows(self) -> np.ndarray:
        return np.asarray(self.kernel.cumsum(0))

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
    """`first_order` less the prefix mean, for all m and n: cumulative sums and one product."""
    count = values.count
    product = np.outer(count, count)
    by_column = (keys.rows * values.rows).cumsum(1) / count[:, None]
    shared = prefix_sum(keys.kernel * values.kernel) - by_column - by_column.T
    shared = queries * (shared + keys.sums * values.sums / product)
    own = np.tril(np.diagonal(keys.kernel)[None, :] - 2 * keys.rows / count[:, None])
    own = np.tril(own - own.sum(1, keepdims=True) / count[:, None])
    tilted = np.diagonal(queries)[:, None] / 2 * _lower_product(own, values.rows.T)
    return np.asarray((shared + tilted + tilted.T) / product)


def _lower_product(lower: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """lower @ matrix for a lower triangular matrix."""
    edges = np.linspace(0, len(lower), min(BLOCKS, len(lower)) + 1).astype(int)
    return np.concatenate([lower[a:b, :b] @ matrix[:b] for a, b in pairwise(edges)])


@dataclass(frozen=True, eq=False)
class Mixing:
    """One softmax attention's kernels at all pairs of positions, and what follows from them.

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
    def shorter(self) -> np.ndarray:
        return np.asarray(np.minimum.outer(self.count, self.count))

    @cached_property
    def longer(self) -> np.ndarray:
        return np.asarray(np.maximum.outer(self.count, self.count))

    @cached_property
    def uniform(self) -> np.ndarray:
        return np.asarray(self.values.sums / np.outer(self.count, self.count))

    @cached_property
    def change(self) -> np.ndarray:
        return first_order_change(self.values, self.keys, self.queries)

    @cached_property
    def size(self) -> np.ndarray:
        """sqrt(Q_mm Q_nn)."""
        root = np.sqrt(np.diagonal(self.queries))
        return np.outer(root, root)

    @cached_property
    def correlation(self) -> np.ndarray:
        """r of two queries."""
        nothing = np.zeros_like(self.queries)
        return np.asarray(np.divide(self.queries, self.size, out=nothing, where=self.size > 0))

    @property
    def value_spread(self) -> np.ndarray:
        return self.values.spread

    @cached_property
    def key_spread(self) -> np.ndarray:
        return np.asarray(np.maximum(self.keys.spread, 0.0))

    def over_shorter(self, by_position: np.ndarray) -> np.ndarray:
        """The entry of the shorter of the two prefixes."""
        return np.asarray(by_position[self.shorter.astype(int) - 1])

    @cached_property
    def overlap(self) -> np.ndarray:
        """What uniform weights leave of the values' own part: (v - c)/max(m, n)."""
        return np.asarray(self.over_shorter(self.value_spread) / self.longer)

    @cached_property
    def largest_variance(self) -> np.ndarray:
        """s^2 of one query, geometric mean of both, over the shorter prefix."""
        return np.asarray(self.size * self.over_shorter(self.key_spread))

    @cached_property
    def variance(self) -> np.ndarray:
        """s^2 that two queries share."""
        return np.asarray(self.largest_variance * np.clip(self.correlation, 0.0, 1.0))

    @cached_property
    def own_variance(self) -> np.ndarray:
        """s^2 of each query."""
        return np.asarray(np.diagonal(self.queries) * self.key_spread)

    @cached_property
    def table(self) -> ParticipationTable:
        top = max(float(self.largest_variance.max()), float(self.own_variance.max()))
        return covering_table(len(self.count), top, self.d_h)

    def linear(self, variance: np.ndarray) -> np.ndarray:
        """The first order of f: s^2 (1 - 1/m) over the shorter prefix."""
        return variance * (1 - 1 / self.shorter)

    def growth(self, variance: np.ndarray) -> np.ndarray:
        """f(m, s^2) over the shorter prefix."""
        return self._widened(self.table(self.shorter.astype(int), variance))

    def _widened(self, growth: np.ndarray) -> np.ndarray:
        return widened(growth, self.normalised, self.maps / self.freedom)

    @cached_property
    def own_growth(self) -> np.ndarray:
        """f(m, s^2) of each query."""
        return self._widened(self.table(self.count.astype(int), self.own_variance))

    @cached_property
    def unequal_prefixes(self) -> np.ndarray:
        """What f less its first order differs by between two prefixes."""
        beyond = self.own_growth - self.own_variance * (1 - 1 / self.count)
        return np.subtract.outer(beyond, beyond)

    @cached_property
    def tilt_growth(self) -> np.ndarray:
        """B_off over its first order, of each query."""
        return outputs.tilt_growth(self.table, self.count.astype(int), self.own_variance)

    @cached_property
    def fluctuation(self) -> np.ndarray:
        """What the fluctuation of the empirical kernel adds, to first order in s^2 and 1/d.

        (s^2/d) (r (1 - 1/m)(1 - 1/n) - [h(m) + h(n) + r h(min)]/max), h(m) = (m - 1)(m - 2)/m^2;
        h comes from norms that do not fluctuate, and is absent where they do.
        """
        rest = 1 - 1 / self.count
        shorter = self.over_shorter(self.value_spread)
        added = self.largest_variance * shorter * self.correlation * np.outer(rest, rest)
        if self.normalised:
            h = rest * (1 - 2 / self.count)
            own = np.add.outer(h * self.own_variance, h * self.own_variance)
            shared = self.correlation * self.largest_variance * self.over_shorter(h) * shorter
            longer = self.value_spread[self.longer.astype(int) - 1]
            added = added - (own * longer + shared) / self.longer
        return np.asarray(self.maps / self.freedom * added)

    @cached_property
    def unexchangeable(self) -> np.ndarray:
        """The first order that exchangeable keys would not have."""
        return np.asarray(self.change - self.overlap * self.linear(self.signed_variance))

    @cached_property
    def signed_variance(self) -> np.ndarray:
        return np.asarray(self.largest_variance * self.correlation)


@cache
def _mismatch() -> Callable[[np.ndarray], np.ndarray]:
    """|alpha - (1 - 2/m) c_2|, compiled: c_2 the coefficient of s^4 in f, alpha that of r^2 s^4.

    Wick's theorem for two queries, E = exp((s^2/2)(D + D' + 2 r sum_n d_n d'_n)), has r^2 s^4 with
    half of sum_npq (d_p d_q a_n)^2 at uniform weights, times m: (1 - 1/m)(1 - 2/m)/2.
    """
    alpha = (1 - 1 / m) * (1 - 2 / m) / 2
    second = sp.expand(m * participation_expansion(2)).coeff(s, 4)
    gap = sp.Abs(sp.factor(alpha - (1 - 2 / m) * second))
    compiled: Callable[[np.ndarray], np.ndarray] = compile_number_form(gap, (m,))
    return compiled


def between_queries(shorter: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """What the share of two queries drops at order s^4, over r (1 - r)."""
    return np.asarray(_mismatch()(shorter) * variance**2)


def _first_order(mixing: Mixing) -> tuple[np.ndarray, np.ndarray, np.ndarray | float]:
    """The kernel, what is dropped (absolutely) and the excess."""
    variance = mixing.largest_variance
    beyond = mixing.overlap * (np.expm1(variance) - variance) * (1 - 1 / mixing.shorter)
    dropped = beyond + variance * np.abs(mixing.unexchangeable) + _lost(mixing)
    return mixing.uniform + mixing.change + mixing.fluctuation, dropped, 0.0


def _any_temperature(mixing: Mixing) -> tuple[np.ndarray, np.ndarray, np.ndarray | float]:
    """The same with the exchangeable part at any s, and the fluctuation of the participation."""
    variance, r = mixing.variance, np.clip(mixing.correlation, 0.0, 1.0)
    alike = 2 / mixing.shorter
    growth = (1 - alike) * mixing.growth(variance) + alike * r * mixing.over_shorter(
        mixing.own_growth
    )
    beyond = growth - mixing.linear(variance)
    floor = mixing.fluctuation * (1 + r * mixing.over_shorter(mixing.tilt_growth - 1))
    kernel = mixing.uniform + mixing.change + mixing.overlap * beyond + floor
    dropped = (
        r * mixing.overlap * np.abs(mixing.unequal_prefixes)
        + (1 - r) * r * mixing.overlap * between_queries(mixing.shorter, mixing.largest_variance)
        + mixing.largest_variance * np.abs(mixing.unexchangeable)
        + _lost(mixing)
    )
    return kernel, dropped, _excess(mixing, kernel)


def _lost(mixing: Mixing) -> np.ndarray:
    """The next orders in 1/d of the fluctuation, and s^4/d that pairs of queries share.

    Where tokens repeat, also what a kernel of zeros and ones has beyond its mean's square:
    s^2 c (1 - c), c the share of repetitions.
    """
    width = mixing.maps / mixing.freedom
    pairs = mixing.overlap * mixing.largest_variance**2 * width
    lost = 4 * width * np.abs(mixing.fluctuation) + pairs
    if mixing.repeated:
        diagonal = np.diagonal(mixing.values.kernel)
        share = mixing.over_shorter(mixing.value_spread) / diagonal
        lost = lost + mixing.largest_variance * share * (1 - share) * diagonal
    return np.asarray(lost)


def _excess(mixing: Mixing, kernel: np.ndarray) -> np.ndarray:
    """E cos over the cosine of the kernel, less 1, for the participation P of each query.

    With delta = E (P/E P)^(-1/2) - 1 of the mean over heads, diluted by what all values have in
    common: delta_m + delta_n for independent queries.  For correlated ones to leading order the
    covariances of both P and of sum_n a_mn a_nn leave (1 - r)(1 - r/3) of it.
    """
    positions = mixing.count.astype(int)
    delta = outputs.mean_over_heads(
        outputs.root_bias(mixing.table, positions, mixing.own_variance),
        mixing.table.relative_variance(positions, mixing.own_variance),
        mixing.n_heads,
    )
    common = mixing.values.variance - mixing.value_spread
    share = 1 - common / np.diagonal(kernel)
    r = np.clip(mixing.correlation, 0.0, 1.0)
    delta = delta * share**2
    return np.asarray(np.add.outer(delta, delta) * (1 - r) * (1 - r / 3))


# --------------------------------------------------------------------------- the rules

Treatment = Callable[[Mixing], tuple[np.ndarray, np.ndarray, np.ndarray | float]]


def _within_tables(
    treatment: Treatment, mixing: Mixing
) -> tuple[np.ndarray, np.ndarray, np.ndarray | float]:
    try:
        return treatment(mixing)
    except ValueError as sharp:
        raise NotImplementedError(
            "expected logits that a table covers, got a variance of "
            f"{mixing.own_variance.max():.3g} at d_head = {mixing.d_h:g}; "
            "use fidelity='first_order', or measure it"
        ) from sharp


def _move(
    treatment: Treatment,
    traits: Traits,
    kernels: Sequence[np.ndarray],
    dropped: Sequence[np.ndarray],
    symbols: Mapping[str, float],
    n_ctx: int,
) -> Moved:
    """The algorithm of a mixture: from values, keys and queries to their output."""
    values, keys, queries = kernels
    freedom = symbols["d"] - (1 if traits.centred else 0)
    mixing = Mixing(
        Prefixed(values),
        Prefixed(keys),
        queries,
        traits.maps - 1,
        traits.fixed_norm,
        max(freedom, 1.0),
        symbols["d_h"],
        symbols["H"],
        traits.repeated,
    )
    kernel, lost, excess = _within_tables(treatment, mixing)
    of_values = prefix_sum(dropped[0]) / np.outer(mixing.count, mixing.count)
    # Queries, keys and values read one place: what is relative to the one is to the others.
    scale = np.sqrt(mixing.values.variance)
    inherited = of_values + 2 * np.abs(kernel - mixing.uniform) * of_values / np.outer(scale, scale)
    root = np.sqrt(np.diagonal(kernel))
    return Moved(kernel, (lost + inherited) / np.outer(root, root), excess)


def _general(operation: Mix, traits: Mapping[str, Traits], name: str, how: Treatment) -> Rule:
    pattern, values = operation.inputs
    queries, keys = _query_key(traits[pattern])
    return Rule(
        name=name,
        statement="Weights follow the logits, Gaussian with the kernels of queries and keys.",
        sources=(values, keys, queries),
        expression=first_order(),
        assumption="logits Gaussian given the tokens; the empirical kernel near its mean",
        source="derived here by Wick's theorem",
        remainder=(Q(m, m) * J(m, m)) ** 2,
        traits=Traits(maps=traits[values].maps),
        algorithm=partial(_move, how, traits[values]),
    )


def _freedom(traits: Traits) -> sp.Expr:
    """The dimensions that vectors span: a LayerNorm takes one, if there is one to take."""
    return sp.Max(d - 1, 1) if traits.centred else d


def _query_key(traits: Traits) -> tuple[str, str]:
    assert traits.query_key is not None
    return traits.query_key


def first_order_mixture(operation: Mix, traits: Mapping[str, Traits]) -> Rule:
    """sum_ij E a_mi a_nj K(i, j) to first order in s^2 and in 1/d."""
    return _general(operation, traits, "softmax to first order in s^2", _first_order)


def mixture(operation: Mix, traits: Mapping[str, Traits]) -> Rule:
    """The same at any temperature; a closed law where the keys are independent tokens."""
    values, (_, keys) = operation.inputs[1], _query_key(traits[operation.inputs[0]])
    if traits[values].independent and traits[keys].independent:
        return independent_mixture(operation, traits)
    return _general(operation, traits, "softmax at any temperature", _any_temperature)


def independent_mixture(operation: Mix, traits: Mapping[str, Traits]) -> Rule:
    """K_v (A + B_off/d) on the diagonal, K_v/max(m, n) (1 - (s^2/d)(h(m) + h(n))) off it.

    Given the query the keys' logits are i.i.d.; for tokens of fixed norm.  Where norms
    fluctuate the diagonal is K_v ((d - 1) A + B)/d and h is absent.
    """
    pattern, values = operation.inputs
    queries, keys = _query_key(traits[pattern])
    before = traits[values]
    s2, near = Q(m, m) * J(m, m), sp.KroneckerDelta(m, n)
    given = sp.sqrt(s2), _freedom(before), before.fixed_norm
    mean = near * outputs.second_moment(*given) + (1 - near) * outputs.overlap(*given)
    return Rule(
        name="softmax over independent keys, any temperature",
        statement="Given its query the logits of a prefix are i.i.d. Gaussians.",
        sources=(values, keys, queries),
        expression=K(m, m) * mean,
        assumption="independent tokens; logits Gaussian given the query",
        source="derived here",
        remainder=s2**2 / d * (1 - near) * sp.sqrt(m * n) / sp.Max(m, n)
        + 4 * s2 / d**2 * (m - 1)
        + (outputs.width_coefficient(before.fixed_norm) * s2**2 / _freedom(before)) ** 2
        * (1 - 1 / m),
        traits=Traits(maps=before.maps),
        excess=(1 - near) * outputs.excess(given[0]),
    )


# ------------------------------------------------------------------------- patterns


def _pattern(
    operation: Operation, traits: Mapping[str, Traits], name: str, grown: Growth, lost: Growth
) -> Rule:
    """E a_mn^2 = E sum_n a_mn^2/m, averaged over n <= m."""
    logits = operation.inputs[0]
    queries, keys = _query_key(traits[logits])
    independent = traits[keys].independent
    s2 = K(m, m) * (J(m, m) if independent else _spread_over_prefix())
    return Rule(
        name=f"softmax {name}",
        statement="The participation of a query whose logits have variance s^2.",
        sources=(queries, keys),
        expression=grown.expression(s2) / m**2,
        assumption="exchangeable keys; logits Gaussian given the query",
        source="derived here",
        remainder=lost.expression(K(m, m) * J(m, m)) / m,
        traits=Traits(logits=logits, query_key=traits[logits].query_key),
        algorithm=None if independent else partial(_participate, grown, lost),
    )


def _spread_over_prefix() -> sp.Expr:
    """v - c of the keys at m."""
    trace = sp.Sum(J(i, i), (i, 1, m))
    return trace / m - (sp.Sum(J(i, j), (i, 1, m), (j, 1, m)) - trace) / (m * (m - 1))


def _participate(
    grown: Growth,
    lost: Growth,
    kernels: Sequence[np.ndarray],
    dropped: Sequence[np.ndarray],
    symbols: Mapping[str, float],
    n_ctx: int,
) -> Moved:
    """The algorithm of a pattern: from queries and keys to E a_mn^2, the same for all n."""
    queries, keys = kernels
    variance = np.diagonal(queries) * np.maximum(Prefixed(keys).spread, 0.0)
    count = np.arange(1.0, n_ctx + 1)
    value, beyond = (form.numbers(count, variance, symbols) for form in (grown, lost))
    relative = beyond / value + np.diagonal(dropped[0]) / np.diagonal(queries)
    square = (n_ctx, n_ctx)
    return Moved(
        np.broadcast_to((value / count**2)[:, None], square),
        np.broadcast_to(relative[:, None], square),
    )


@dataclass(frozen=True)
class Growth:
    """A function of m and s^2: its expression, and its numbers for a variance per position."""

    expression: Callable[[sp.Expr], sp.Expr]

    def numbers(
        self, count: np.ndarray, variance: np.ndarray, symbols: Mapping[str, float]
    ) -> np.ndarray:
        s2 = sp.Symbol("s2", nonnegative=True)
        function = compile_number_form(self.expression(s2), (m, s2, d))
        return np.asarray(function(count, variance, symbols["d"]))


@dataclass(frozen=True)
class TabulatedGrowth(Growth):
    """m P(m, s, d_h), whose numbers come from a table: every position has an s of its own."""

    before: Traits

    def numbers(
        self, count: np.ndarray, variance: np.ndarray, symbols: Mapping[str, float]
    ) -> np.ndarray:
        table = covering_table(len(count), float(variance.max()), symbols["d_h"])
        freedom = max(symbols["d"] - self.before.centred, 1.0)
        growth = table(count.astype(int), variance)
        return 1 + widened(growth, self.before.fixed_norm, (self.before.maps - 1) / freedom)


def widened(growth: np.ndarray, fixed_norm: bool, inverse_width: float) -> np.ndarray:
    """f of keys whose empirical kernel fluctuates: ln(1 + f) and its square, as in `outputs`."""
    factor = float(outputs.width_coefficient(fixed_norm)) * inverse_width
    return np.asarray(np.expm1(np.log1p(growth) + factor * np.log1p(growth) ** 2))


def covering_table(n_ctx: int, variance: float, d_h: float) -> ParticipationTable:
    """A table up to a power of two of s, so that the layers of a stack share it."""
    spread = 2.0 ** np.ceil(np.log2(np.sqrt(variance)) - 1e-9) if variance > 0 else 1.0
    return ParticipationTable(n_ctx, float(spread), d_h)


def first_order_pattern(operation: Operation, traits: Mapping[str, Traits]) -> Rule:
    """(1 + s^2 (1 - 1/m))/m^2."""
    grown = Growth(lambda s2: 1 + s2 * (1 - 1 / m))
    lost = Growth(lambda s2: (sp.exp(s2) - 1 - s2) * (1 - 1 / m))
    return _pattern(operation, traits, "to first order in s^2", grown, lost)


def pattern(operation: Operation, traits: Mapping[str, Traits]) -> Rule:
    """A/m at any temperature; the term of order 1/d is that of a long prefix."""
    before = traits[_query_key(traits[operation.inputs[0]])[1]]
    freedom = _freedom(before) / sp.Integer(before.maps - 1)

    def participation(s2: sp.Expr) -> sp.Expr:
        return m * outputs.participation(sp.sqrt(s2), freedom, before.fixed_norm)

    grown = TabulatedGrowth(participation, before)
    lost = Growth(lambda s2: ((2 * s2 / freedom) ** 2 + s2**2 / freedom / m) * (1 - 1 / m))
    return _pattern(operation, traits, "at any temperature", grown, lost)
