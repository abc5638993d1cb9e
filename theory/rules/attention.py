"""Scores, patterns and mixing, at the fidelity `uniform`: a_mn = 1/m.

For a softmax the remainder is the leading effect of what `uniform` ignores, with s^2 the
variance of a logit: sum of a^2 grows by exp(s^2) - 1, and the tilt towards keys that agree
with the query adds s^2/d to the output's second moment, m s^2/d relative to 1/m.
"""

from collections.abc import Mapping

import sympy as sp

from nope.operations import Average, Mix, Scores, Softmax, Uniform
from theory.kernel import PREFIX_SUM, ZERO, J, K, Rule, Traits
from theory.rules import rule_for
from theory.symbols import d, d_h, m, n


@rule_for.register
def _(operation: Scores, traits: Mapping[str, Traits]) -> Rule:
    """E l_mn^2 = K_q(m, m) K_k(n, n): W_Q and W_K are independent, so only diagonals survive.

    d_h products of variance K_q K_k are summed and divided by sqrt(d_h), so d_h cancels.
    """
    query, key = (traits[name] for name in operation.inputs)
    gaussian = query.kurtosis == 3 and key.kurtosis == 3
    exact = query.fixed_norm and key.fixed_norm
    return Rule(
        name="scaled logits",
        statement="Queries and keys are uncorrelated: the variance of a logit is a product.",
        sources=operation.inputs,
        expression=K(m, m) * J(n, n),
        assumption="W_Q and W_K independent; |e_m|^2 constant",
        source="chi2023 Lemma 2, corrected",
        remainder=ZERO if exact else sp.Integer(2) * query.maps / d,
        traits=Traits(kurtosis=3 + 6 / d_h if gaussian else None),
    )


@rule_for.register
def _(operation: Softmax, traits: Mapping[str, Traits]) -> Rule:
    """E a_mn^2 = 1/m^2; what is dropped is (e^{s^2} - 1)(1 - 1/m), s^2 the logit's variance."""
    return Rule(
        name="softmax taken as uniform",
        statement="A query spreads its attention evenly over its prefix: a_mn = 1/m.",
        sources=operation.inputs,
        expression=1 / m**2,
        assumption="s^2 << 1: logits so small that the softmax is flat",
        source="chi2023 Property 1",
        remainder=(sp.exp(K(m, m)) - 1) * (1 - 1 / m),
        traits=Traits(logits=operation.inputs[0]),
    )


@rule_for.register
def _(operation: Uniform, traits: Mapping[str, Traits]) -> Rule:
    """a_mn^2 = 1/m^2."""
    return Rule(
        name="uniform pattern",
        statement="The pattern is a_mn = 1/m by definition.",
        sources=(),
        expression=1 / m**2,
        assumption="none",
        source="definition",
        traits=Traits(),
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


@rule_for.register
def _(operation: Mix, traits: Mapping[str, Traits]) -> Rule:
    """The prefix mean of the values' kernel; exact for a uniform pattern."""
    pattern, values = operation.inputs
    after = Traits(maps=traits[values].maps)
    logits = traits[pattern].logits
    if logits is None:
        return prefix_mean("uniform attention", (values,), after, ZERO)
    ignored = [(sp.exp(J(x, x)) - 1) * (1 - 1 / x) + x * J(x, x) / d for x in (m, n)]
    return prefix_mean("attention taken as uniform", (values, logits), after, sum(ignored) / 2)


@rule_for.register
def _(operation: Average, traits: Mapping[str, Traits]) -> Rule:
    """The prefix mean of the input's kernel."""
    before = traits[operation.inputs[0]]
    after = Traits(maps=before.maps, isotropic=before.isotropic)
    return prefix_mean("causal mean", operation.inputs, after, ZERO)
