"""Linear maps with independent zero-mean weights."""

from collections.abc import Mapping

import sympy as sp

from nope.operations import Linear, Weight
from theory import symbols
from theory.kernel import Fidelity, K, Rule, Traits
from theory.rules import rule_for
from theory.symbols import m, n


def variance_of(weight: Weight) -> sp.Expr:
    """The symbol for the variance of one entry of `weight`."""
    return symbols.WEIGHT_STD[weight.role] ** 2


def width_of(weight: Weight) -> sp.Symbol:
    """The symbol for the number of inputs of `weight`."""
    return symbols.d_ff if weight.role == "mlp_out" else symbols.d


@rule_for.register
def _(operation: Linear, traits: Mapping[str, Traits], fidelity: Fidelity) -> Rule:
    """K_y(m, n) = fan_in sigma_w^2 K_x(m, n) (+ sigma_b^2): E W'W = fan_in sigma_w^2 I."""
    before = traits[operation.inputs[0]]
    expression = width_of(operation.weight) * variance_of(operation.weight) * K(m, n)
    if operation.bias is not None:
        expression += symbols.sigma_b**2
    kurtosis = None if before.norm_kurtosis is None else 3 * before.norm_kurtosis
    if operation.bias is not None and before.norm_kurtosis != 1:
        kurtosis = None  # given x, a coordinate is N(0, sigma^2 |x|^2 + sigma_b^2)
    return Rule(
        name="linear map",
        statement="Independent zero-mean weights multiply the kernel by fan_in times a variance.",
        sources=operation.inputs,
        expression=expression,
        assumption="weights i.i.d., zero mean, independent of the input",
        source="chi2023 Lemma 1",
        traits=Traits(
            maps=before.maps + 1,
            fixed_norm=before.normalised,
            independent=before.independent and operation.bias is None,
            repeated=before.repeated,
            centred=before.centred,
            kurtosis=kurtosis,
        ),
    )
