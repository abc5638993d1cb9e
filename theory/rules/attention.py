"""Scores, patterns and mixing.

How a softmax is treated is the fidelity: `uniform` takes a_mn = 1/m here, the others are in
`theory.rules.softmax`.  For a softmax taken as uniform the remainder is the leading effect of
what is ignored, with s^2 the variance of a logit: sum of a^2 grows by exp(s^2) - 1, and the
tilt towards keys that agree with the query adds s^2/d to the output's second moment, (m - 1) s^2/d
relative to 1/m.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import sympy as sp

from nope.operations import Average, Mix, Operation, Scores, Softmax, Uniform
from theory.formulas.kurtosis import Square, isotropic, logit_kurtosis, mean_of
from theory.kernel import PREFIX_SUM, ZERO, Fidelity, J, K, Rule, Traits
from theory.rules import rule_for, softmax
from theory.rules.linear import Kurtoses, kurtoses
from theory.symbols import d, kappa_x, m, n, p_same, sigma_b, v


def require_causal(operation: Scores | Uniform) -> None:
    """The kernel calculus sums over prefixes."""
    if not operation.causal:
        raise NotImplementedError(
            f"expected a causal mask, got none at {operation.place}; without one the network is "
            "permutation-equivariant (theory.symmetry), measure the rest with montecarlo.measure"
        )


@rule_for.register
def _(operation: Scores, traits: Mapping[str, Traits], fidelity: Fidelity) -> Rule:
    """E l_mn^2 = K_q(m, m) K_k(n, n): W_Q and W_K are independent, so only diagonals survive.

    d_h products of variance K_q K_k are summed and divided by sqrt(d_h), so d_h cancels.
    """
    require_causal(operation)
    query, key = (traits[name] for name in operation.inputs)
    exact = query.slack == key.slack == 0
    return Rule(
        name="scaled logits",
        statement="Queries and keys are uncorrelated: the variance of a logit is a product.",
        sources=operation.inputs,
        expression=K(m, m) * J(n, n),
        assumption="W_Q and W_K independent; |e_m|^2 constant",
        source="chi2023 Lemma 2, corrected",
        remainder=ZERO if exact else sp.Integer(2) * query.maps / d,
        traits=Traits(
            kurtosis=row_kurtosis(query, key, traits),
            query_key=(operation.inputs[0], operation.inputs[1]),
        ),
    )


def row_kurtosis(query: Traits, key: Traits, traits: Mapping[str, Traits]) -> sp.Expr | None:
    """Of a row's logits, where the positions hold tokens, or vectors of a fixed norm.

    Of vectors of a fixed norm whose shape is unknown and depends on the position, Gaussian and
    Haar weights see nothing but that norm.
    """
    if query.mapped is None or key.mapped is None or query.mapped[1] != key.mapped[1]:
        return None
    (by_query, source), (by_key, _) = query.mapped, key.mapped
    x = traits[source]
    if (x.independent or x.repeated) and x.norm_kurtosis is not None and x.kurtosis is not None:
        same = 1 / m if x.independent else p_same
        return logit_kurtosis(by_query, by_key, isotropic(dimensions(x), x.normalised), same)
    if x.norm_kurtosis != 1:
        return None
    unknown = Square(sp.Integer(1), kappa_x, (sp.Integer(1), kappa_x, kappa_x**2))
    return logit_kurtosis(by_query, by_key, unknown, ZERO)


@rule_for.register
def _(operation: Softmax, traits: Mapping[str, Traits], fidelity: Fidelity) -> Rule:
    return PATTERNS[fidelity](operation, traits)


@rule_for.register
def _(operation: Mix, traits: Mapping[str, Traits], fidelity: Fidelity) -> Rule:
    """The prefix mean of the values' kernel, exact for a uniform pattern."""
    pattern, values = operation.inputs
    if traits[pattern].logits is None:
        kurtosis, norm_kurtosis = mean_kurtoses(values, traits)
        left = replace(after(operation, traits), kurtosis=kurtosis, norm_kurtosis=norm_kurtosis)
        return prefix_mean("uniform attention", (values,), left, ZERO)
    return MIXTURES[fidelity](operation, traits)


def mean_kurtoses(values: str, traits: Mapping[str, Traits]) -> Kurtoses:
    """Of the mean of independent positions' values, which is the map of the inputs' mean."""
    mapped = traits[values].mapped
    if mapped is None:
        return None, None
    by, x = mapped[0], traits[mapped[1]]
    if not x.independent or x.norm_kurtosis is None or x.kurtosis is None:
        return None, None
    nu, kurtosis = mean_of(x.norm_kurtosis, x.kurtosis, dimensions(x))
    share = by.share if by.share == 1 else v / (v + sigma_b**2)  # the bias is not averaged
    return kurtoses(replace(by, share=share), d, Traits(kurtosis=kurtosis, norm_kurtosis=nu))


def dimensions(x: Traits) -> sp.Expr:
    """Of the space that a token fills, or a normalised one."""
    return d - 1 if x.centred else d


def after(operation: Mix, traits: Mapping[str, Traits]) -> Traits:
    """What is left to know of a place once its positions are mixed."""
    values = traits[operation.inputs[1]]
    return Traits(maps=values.maps, fresh=values.fresh)


def uniform_pattern(operation: Operation, traits: Mapping[str, Traits]) -> Rule:
    """E a_mn^2 = 1/m^2; what is dropped is (e^{s^2} - 1)(1 - 1/m), s^2 the logit's variance.

    It is m - 1 at most, where one key has all the attention.
    """
    logits = operation.inputs[0]
    return Rule(
        name="softmax taken as uniform",
        statement="A query spreads its attention evenly over its prefix: a_mn = 1/m.",
        sources=operation.inputs,
        expression=1 / m**2,
        assumption="s^2 << 1: logits so small that the softmax is flat",
        source="chi2023 Property 1",
        remainder=grown(K(m, m), m, m),
        traits=Traits(logits=logits, query_key=traits[logits].query_key),
    )


def grown(s2: sp.Expr, count: sp.Expr, largest: sp.Expr) -> sp.Expr:
    """What m E sum a^2 has beyond 1: e^{s^2} - 1 of many keys, and what one key alone has.

    That is m, or m^2 of values of which one may be as large as the sum of all.
    """
    return sp.Min(sp.exp(s2) - 1, largest) * (1 - 1 / count)


def uniform_mixture(operation: Mix, traits: Mapping[str, Traits]) -> Rule:
    """The prefix mean, as if a_mn = 1/m."""
    pattern, values = operation.inputs
    logits = traits[pattern].logits
    assert logits is not None
    ignored = [grown(J(x, x), x, x**2) + (x - 1) * J(x, x) / d for x in (m, n)]
    sources = (values, logits)
    return prefix_mean(
        "attention taken as uniform", sources, after(operation, traits), sum(ignored) / 2
    )


def prefix_mean(name: str, sources: tuple[str, ...], traits: Traits, remainder: sp.Expr) -> Rule:
    """K_z(m, n) = (1/(m n)) sum over i <= m, j <= n of K_v(i, j)."""
    return Rule(
        name=name,
        statement="The kernel of prefix means is the prefix mean of the kernel, on both sides.",
        sources=sources,
        expression=PREFIX_SUM / (m * n),
        assumption="a_mn = 1/m" + (" to leading order in s^2" if remainder else ""),
        source="chi2023 Lemma 3",
        remainder=remainder,
        traits=traits,
    )


PATTERNS: dict[Fidelity, Callable[[Operation, Mapping[str, Traits]], Rule]] = {
    "uniform": uniform_pattern,
    "first_order": softmax.first_order_pattern,
    "any_temperature": softmax.pattern,
}
"""E a_mn^2 of a softmax, by fidelity."""

MIXTURES: dict[Fidelity, Callable[[Mix, Mapping[str, Traits]], Rule]] = {
    "uniform": uniform_mixture,
    "first_order": softmax.first_order_mixture,
    "any_temperature": softmax.mixture,
}
"""The kernel of a softmax's output, by fidelity."""


@rule_for.register
def _(operation: Uniform, traits: Mapping[str, Traits], fidelity: Fidelity) -> Rule:
    """a_mn^2 = 1/m^2."""
    require_causal(operation)
    return Rule(
        name="uniform pattern",
        statement="The pattern is a_mn = 1/m by definition.",
        sources=(),
        expression=1 / m**2,
        assumption="none",
        source="definition",
        traits=Traits(),
    )


@rule_for.register
def _(operation: Average, traits: Mapping[str, Traits], fidelity: Fidelity) -> Rule:
    """The prefix mean of the input's kernel."""
    before = traits[operation.inputs[0]]
    alone = before.isotropic and not before.repeated
    left = Traits(maps=before.maps, fresh=before.fresh, isotropic=alone)
    if before.isotropic and before.independent:
        left = replace(left, kurtosis=before.kurtosis, norm_kurtosis=before.norm_kurtosis)
    return prefix_mean("causal mean", operation.inputs, left, ZERO)
