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
first order for others.  What two queries of correlation r share is h(r) - 1 in place of f:
1 at r = 0 with a slope that Stein's lemma gives, f at r = 1, where prefixes of two lengths lie
between f and that of an endless one (`theory.rules.mixing.Pairs`).

Finite width.  The empirical kernel of p random maps fluctuates by p/d about its mean, which tilts
every query towards keys that agree with it: the floor s^2/d, and its effect on pairs of queries.

All derived here; held against real layers by the claims of `theory.papers.ours`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import sympy as sp

from nope.operations import Mix, Operation
from theory.formula import compile_number_form
from theory.formulas import outputs
from theory.formulas.wick import first_order
from theory.kernel import J, K, Moved, Q, Rule, Traits
from theory.propagation import blocks, prefix_sum
from theory.rules import mixing, repetition
from theory.rules.mixing import Mixing, Prefixed
from theory.symbols import d, d_h, i, j, m, n

Treatment = Callable[[Mixing], tuple[np.ndarray, np.ndarray, np.ndarray | float]]


def _move(
    treatment: Treatment,
    traits: Traits,
    kernels: Sequence[np.ndarray],
    dropped: np.ndarray,
    symbols: Mapping[str, float],
    n_ctx: int,
) -> Moved:
    """The algorithm of a mixture: from values, keys and queries to their output."""
    found = _mixing(traits, kernels, symbols)
    kernel, lost, excess = treatment(found)
    remainder = prefix_sum(dropped)
    variance, root = found.values.variance, np.sqrt(np.diagonal(kernel))
    for rows in blocks(n_ctx):
        # Queries, keys and values read one place: what is relative to the one is to the others.
        shift = 2 * np.abs(kernel[rows] - found.uniform(rows))
        shift /= np.sqrt(variance[rows, None] * variance)
        inherited = remainder[rows]
        inherited /= found.count[rows, None] * found.count
        inherited *= 1 + shift
        inherited += lost[rows]
        inherited /= root[rows, None] * root
    return Moved(kernel, remainder, excess)


def _mixing(traits: Traits, kernels: Sequence[np.ndarray], symbols: Mapping[str, float]) -> Mixing:
    """Of the kernels of values, keys and queries."""
    values, keys, queries = kernels
    freedom = symbols["d"] - (1 if traits.centred else 0)
    return Mixing(
        Prefixed(values),
        Prefixed(keys),
        queries,
        symbols["p"] - 1,
        symbols[SLACK.name],
        max(freedom, 1.0),
        symbols["d_h"],
        symbols.get("H", 1.0),
    )


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
        traits=Traits(maps=traits[values].maps, fresh=traits[values].fresh),
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
    tokens = traits[operation.inputs[1]].repeated
    how = partial(repetition.first_order, tokens) if tokens else mixing.first_order
    return _general(operation, traits, "softmax to first order in s^2", how)


def mixture(operation: Mix, traits: Mapping[str, Traits]) -> Rule:
    """The same at any temperature; a closed law where the keys are independent tokens."""
    values, (_, keys) = operation.inputs[1], _query_key(traits[operation.inputs[0]])
    if traits[values].independent and traits[keys].independent:
        return independent_mixture(operation, traits)
    tokens = traits[values].repeated
    how = partial(repetition.any_temperature, tokens) if tokens else mixing.any_temperature
    return _general(operation, traits, "softmax at any temperature", how)


def independent_mixture(operation: Mix, traits: Mapping[str, Traits]) -> Rule:
    """K_v times `outputs.second_moment` on the diagonal, `outputs.overlap` off it.

    Given the query the keys' logits are i.i.d., at any width (`theory.formulas.logits`).
    """
    pattern, values = operation.inputs
    queries, keys = _query_key(traits[pattern])
    before = traits[values]
    s2, near = Q(m, m) * J(m, m), sp.KroneckerDelta(m, n)
    freedom = _freedom(before)
    given = sp.sqrt(s2), freedom, before.slack
    mean = near * outputs.second_moment(*given) + (1 - near) * outputs.overlap(*given)
    A = outputs.participation(*given)
    size, grown = sp.sqrt(A * A.subs(m, n)), sp.log(m * A)
    shapes = sum(_shape(traits[name]) for name in (queries, keys))
    # its own key is as long as a query, and so is its value: 2/D twice, of one token in m, of
    # what is (1 + m/D) times as much where norms fluctuate
    alone = (before.slack * 4 * grown * (1 / m + 1 / freedom) + shapes * grown**2) / freedom
    of_keys = sp.Max(alone, alone.subs({m: n, n: m}, simultaneous=True))
    return Rule(
        name="softmax over independent keys, any temperature",
        statement="Given its query the logits of a prefix are i.i.d.",
        sources=(values, keys, queries),
        expression=K(m, m) * mean,
        assumption="independent Gaussian tokens",
        source="derived here",
        remainder=(1 - near) * outputs.overlap_remainder(*given) / size + of_keys,
        traits=Traits(maps=before.maps, fresh=before.fresh),
        excess=(1 - near) * outputs.excess(*given),
    )


# ------------------------------------------------------------------------- patterns


def _pattern(
    operation: Operation, traits: Mapping[str, Traits], name: str, grown: Growth, lost: Lost
) -> Rule:
    """E a_mn^2 = E sum_n a_mn^2/m, averaged over n <= m."""
    logits = operation.inputs[0]
    queries, keys = _query_key(traits[logits])
    independent = traits[keys].independent
    value = grown.expression(K(m, m) * (J(m, m) if independent else _spread_over_prefix()))
    return Rule(
        name=f"softmax {name}",
        statement="The participation of a query whose logits have variance s^2.",
        sources=(queries, keys),
        expression=value / m**2,
        assumption="exchangeable keys; logits Gaussian given the query",
        source="derived here",
        remainder=lost(K(m, m) * J(m, m), value, _slack(traits[keys])),
        traits=Traits(logits=logits, query_key=traits[logits].query_key),
        algorithm=None if independent else partial(_participate, traits[keys], grown, lost),
    )


def _slack(keys: Traits) -> sp.Expr:
    """That of the keys, the second source of a pattern."""
    return keys.slack.replace(K, J)


def _spread_over_prefix() -> sp.Expr:
    """v - c of the keys at m."""
    trace = sp.Sum(J(i, i), (i, 1, m))
    return trace / m - (sp.Sum(J(i, j), (i, 1, m), (j, 1, m)) - trace) / (m * (m - 1))


def _same_for_all_keys(second_moment: np.ndarray, relative: np.ndarray) -> Moved:
    """A pattern's entries and their relative error, from those of each row."""
    square = (len(second_moment), len(second_moment))
    kernel, error = (np.broadcast_to(x[:, None], square) for x in (second_moment, relative))
    return Moved(kernel, error)


def _participate(
    before: Traits,
    grown: Growth,
    lost: Lost,
    kernels: Sequence[np.ndarray],
    dropped: np.ndarray,
    symbols: Mapping[str, float],
    n_ctx: int,
) -> Moved:
    """The algorithm of a pattern: from queries and keys to E a_mn^2, the same for all n."""
    queries, keys = kernels
    variance = np.diagonal(queries) * np.maximum(Prefixed(keys).spread, 0.0)
    count = np.arange(1.0, n_ctx + 1)
    value = grown.numbers(count, variance, symbols)
    known = {**symbols, "m": count, "s2": variance, "f": value}
    apart = _unlike(value, keys, before.repeated is not None)
    relative = _relative_error(lost, known, dropped, kernels) + apart
    return _same_for_all_keys(value / count**2, relative)


def _unlike(value: np.ndarray, keys: np.ndarray, repeated: bool) -> np.ndarray:
    """What keys that are not exchangeable leave of m E sum a^2, relatively; at most m - 1.

    The variance s^2 of a logit is that of a mean pair of keys; by one pair alone it is s^2 r.  One
    key unlike all others, r = m/2 for its pairs, has (e^(4u) - 2 e^u + 1)/m beyond 1, u = s^2 r: to
    second order 7/2 s^4 Var r more than is predicted, and e^(4u) beyond.  Two clusters of equal
    size have 5/2 s^4 Var r less.  Two tokens of repeated ids are one, or have nothing in common.
    """
    size = np.sqrt(np.multiply.outer(np.diagonal(keys), np.diagonal(keys)))
    mean, square = _over_pairs(keys), _over_pairs(keys * (size if repeated else keys))
    below = np.tri(len(keys), k=-1, dtype=bool)
    pairs = np.where(below, 0.0 if repeated else keys, np.inf)
    least = np.minimum.accumulate(pairs.min(1))
    spread, s2 = Prefixed(keys).spread, np.log(np.maximum(value, 1.0))
    step = np.divide(s2, spread, out=np.zeros_like(s2), where=spread > 0)
    u = 4 * step * np.maximum(mean - least, 0.0)
    beyond = np.divide(2 * (np.expm1(u) - u), u**2, out=np.ones_like(u), where=u > 1e-4)
    second = step**2 * np.maximum(square - mean**2, 0.0)
    return np.asarray(np.minimum(7 / 2 * second * beyond, np.arange(len(keys))))


def _over_pairs(matrix: np.ndarray) -> np.ndarray:
    """The mean over the pairs i < j <= m, for all m; 0 where there is none."""
    count = np.arange(1.0, len(matrix) + 1)
    sums = np.tril(matrix, -1).sum(1).cumsum()
    return np.asarray(sums / np.maximum(count * (count - 1) / 2, 1))


def _relative_error(
    lost: Lost, known: Mapping[str, Any], dropped: np.ndarray, kernels: Sequence[np.ndarray]
) -> np.ndarray:
    """Of each row: of the participation itself, and of s^2, which is of the queries and the keys.

    ln(m E sum a^2) grows as s^2 and then slower, so that a part of s^2 is at most this part of it
    (but for heads of one dimension, whose heavy tails add a quarter at s^2 = 1/3).
    """
    own = _numbers(lost(VARIANCE, VALUE, SLACK), known)
    moved = np.log(np.maximum(known[VALUE.name], 1.0))
    return np.asarray(own + moved * _relative_error_of_variance(dropped, *kernels))


def _relative_error_of_variance(
    dropped: np.ndarray, queries: np.ndarray, keys: np.ndarray
) -> np.ndarray:
    """Of s^2 = Q_mm (v - c): norms scale it, and what inner products have beyond them moves c.

    Queries and keys are maps of one place, so what is dropped of both is relatively the same.
    """
    size, known = (np.sqrt(np.multiply.outer(x, x)) for x in map(np.diagonal, (queries, keys)))
    relative = np.divide(dropped, size, out=np.zeros_like(size), where=size > 0)
    norms, count = np.diagonal(relative), np.arange(1.0, len(keys) + 1)
    beyond = known * np.maximum(relative - np.add.outer(norms, norms) / 2, 0.0)
    common, spread = _over_pairs(beyond), Prefixed(keys).spread
    moved = np.divide(common, spread, out=np.zeros_like(common), where=common > 0)
    return np.asarray(norms + norms.cumsum() / count + moved)


def _participate_copies(
    before: Traits,
    lost: Lost,
    kernels: Sequence[np.ndarray],
    dropped: np.ndarray,
    symbols: Mapping[str, float],
    n_ctx: int,
) -> Moved:
    """The same where keys are tokens that repeat, given the ids: copies share a logit."""
    queries, keys = kernels
    found = repetition.Repetition(before.repeated, _mixing(before, (keys, keys, queries), symbols))
    value, error = found.participation
    count = np.arange(1.0, n_ctx + 1)
    variance = np.full(n_ctx, found.attention.variance)
    known = {**symbols, "m": count, "s2": variance, "f": count * value}
    relative = error / value + _relative_error(lost, known, dropped, kernels)
    return _same_for_all_keys(value / count, relative)


VARIANCE, VALUE, SLACK = sp.symbols("s2 f slack", nonnegative=True)
"""A logit's variance, m E sum a^2 and the keys' slack, where all are numbers."""

MAPS = sp.Symbol("p", positive=True)
"""As many random maps as the keys' correlations fluctuate like, in an algorithm's numbers."""

Lost = Callable[[sp.Expr, sp.Expr, sp.Expr], sp.Expr]
"""What is dropped of m E sum a^2, relatively, from a logit's variance, that value and a slack."""


def _numbers(expression: sp.Expr, known: Mapping[str, Any]) -> np.ndarray:
    free = tuple(sorted(expression.free_symbols, key=str))
    return np.asarray(compile_number_form(expression, free)(*(known[x.name] for x in free)))


@dataclass(frozen=True)
class Growth:
    """A function of m and s^2: its expression, and its numbers for a variance per position."""

    expression: Callable[[sp.Expr], sp.Expr]

    def numbers(
        self, count: np.ndarray, variance: np.ndarray, symbols: Mapping[str, float]
    ) -> np.ndarray:
        return _numbers(self.expression(VARIANCE), {**symbols, "m": count, "s2": variance})


@dataclass(frozen=True)
class TabulatedGrowth(Growth):
    """m P(m, s, d_h), whose numbers come from a table: every position has an s of its own."""

    before: Traits

    def numbers(
        self, count: np.ndarray, variance: np.ndarray, symbols: Mapping[str, float]
    ) -> np.ndarray:
        freedom = max(symbols["d"] - self.before.centred, 1.0)
        maps = symbols["p"] - 1
        width = mixing.KeyWidth(symbols["d_h"], freedom, maps, symbols[SLACK.name])
        table = mixing.covering_table(len(count), float(variance.max()), width)
        return 1 + table(count.astype(int), variance)


def _shape(mapped: Traits) -> sp.Expr:
    """D times half of what the relative variance of |W q|^2 has beyond a Gaussian W's, 0 for those.

    1 for a Haar matrix, which leaves |q| as it is, and 3 |kappa - 3|/(2 d_h) for independent
    entries: what it changes is ln m A by (ln m A)^2.
    """
    assert mapped.mapped is not None
    by, _ = mapped.mapped
    haar = (1 - by.pair) * (d + 2) / 2
    return haar + 3 * sp.Abs(by.kurtosis - 3 * by.pair) / (2 * d_h)


def first_order_pattern(operation: Operation, traits: Mapping[str, Traits]) -> Rule:
    """(1 + s^2 (1 - 1/m))/m^2; the truth is between 1/m^2 and 1/m.

    What is dropped is s^4 (1 - 1/m)(1 - 6/m)/2 first, times E u^2 of the scales u of heads and of
    keys (`theory.formulas.logits`), and of many keys e^(s^2) - 1 - s^2.
    """
    grown = Growth(lambda s2: 1 + s2 * (1 - 1 / m))
    _, keys = _query_key(traits[operation.inputs[0]])
    scales = (1 + 2 / d_h) * (1 + 2 * _key_width(traits[keys]))

    def lost(s2: sp.Expr, value: sp.Expr, slack: sp.Expr) -> sp.Expr:
        beyond = scales * (sp.exp(s2) - 1 - s2) * sp.Max(1, sp.Abs(1 - 6 / m))
        return sp.Min(beyond, sp.Max(m, s2)) * (1 - 1 / m) / value

    return _pattern(operation, traits, "to first order in s^2", grown, lost)


def _key_width(keys: Traits) -> sp.Expr:
    """1/D, of keys of one map into D dimensions or of as many as they fluctuate like."""
    return (keys.maps - 1 if keys.independent else MAPS - 1) / _freedom(keys)


def pattern(operation: Operation, traits: Mapping[str, Traits]) -> Rule:
    """A/m at any temperature and width."""
    before = traits[_query_key(traits[operation.inputs[0]])[1]]
    freedom, width = _freedom(before) / sp.Integer(before.maps - 1), _key_width(before)

    def participation(s2: sp.Expr) -> sp.Expr:
        return m * outputs.participation(sp.sqrt(s2), freedom, _slack(before))

    def lost(s2: sp.Expr, value: sp.Expr, slack: sp.Expr) -> sp.Expr:
        own_key = slack * 2 * sp.log(value) / m
        unlike = shapes if before.independent else shapes + 4 * width
        return (own_key + unlike * sp.log(value) ** 2) * width

    shapes = sum(_shape(traits[name]) for name in _query_key(traits[operation.inputs[0]]))
    grown = TabulatedGrowth(participation, before)
    rule = _pattern(operation, traits, "at any temperature", grown, lost)
    copies = partial(_participate_copies, before, lost)
    return replace(rule, algorithm=copies) if before.repeated else rule
