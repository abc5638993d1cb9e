"""Linear maps with independent zero-mean weights."""

from collections.abc import Mapping
from functools import partial

import sympy as sp

from nope.operations import Linear, Weight
from theory import symbols
from theory.fluctuations import Fluctuation, Gram, Passage, mapped, wishart
from theory.formulas.kurtosis import Map, of_role
from theory.kernel import ONE, Fidelity, K, Rule, Traits
from theory.rules import rule_for
from theory.symbols import m, n


def variance_of(weight: Weight) -> sp.Expr:
    """The symbol for the variance of one entry of `weight`."""
    return symbols.WEIGHT_STD[weight.role] ** 2


def width_of(weight: Weight) -> sp.Symbol:
    """The symbol for the number of inputs of `weight`."""
    return symbols.d_ff if weight.role == "mlp_out" else symbols.d


def height_of(weight: Weight) -> sp.Symbol:
    """The symbol for the number of outputs of `weight`."""
    return symbols.d_ff if weight.role == "mlp_in" else symbols.d


def map_of(operation: Linear, before: Traits) -> Map:
    """The matrix and the bias of `operation` as fourth moments see them.

    The bias's share of the variance is known after a norm, where |x|^2 = d; elsewhere it is in
    the unknown v, which cancels where the bias is 0.
    """
    share = sp.Integer(1)
    if operation.bias is not None:
        size = 1 if before.normalised else symbols.v
        product = width_of(operation.weight) * variance_of(operation.weight) * size
        share = product / (product + symbols.sigma_b**2)
    return of_role(operation.weight.role, width_of(operation.weight), share)


Kurtoses = tuple[sp.Expr | None, sp.Expr | None]


def kurtoses(by: Map, fan_out: sp.Expr, before: Traits) -> Kurtoses:
    """A coordinate's kurtosis and the norm kurtosis behind a matrix.

    Of the input only the norm kurtosis is needed where the weights are Gaussian or Haar: a
    coordinate's kurtosis is then the unknown kappa_x, which cancels.
    """
    if before.norm_kurtosis is None:
        return None, None
    shape = symbols.kappa_x if before.kurtosis is None else before.kurtosis
    known = before.norm_kurtosis, shape
    return by.coordinate(*known), by.norm(*known, fan_out)


@rule_for.register
def _(operation: Linear, traits: Mapping[str, Traits], fidelity: Fidelity) -> Rule:
    """K_y(m, n) = fan_in sigma_w^2 K_x(m, n) (+ sigma_b^2): E W'W = fan_in sigma_w^2 I."""
    before = traits[operation.inputs[0]]
    expression = width_of(operation.weight) * variance_of(operation.weight) * K(m, n)
    if operation.bias is not None:
        expression += symbols.sigma_b**2
    by = map_of(operation, before)
    kurtosis, norm_kurtosis = kurtoses(by, height_of(operation.weight), before)
    return Rule(
        name="linear map",
        statement="Independent zero-mean weights multiply the kernel by fan_in times a variance.",
        sources=operation.inputs,
        expression=expression,
        assumption="weights i.i.d., zero mean, independent of the input",
        source="chi2023 Lemma 1",
        traits=Traits(
            maps=before.maps + 1,
            slack=_slack(before, expression),
            fresh=True,
            independent=before.independent and operation.bias is None,
            repeated=before.repeated,
            centred=before.centred,
            kurtosis=kurtosis,
            norm_kurtosis=norm_kurtosis,
            mapped=(by, operation.inputs[0]),
        ),
        fluctuates=partial(_fluctuates, operation.weight),
    )


def _slack(before: Traits, after: sp.Expr) -> sp.Expr:
    """That of the input in the result's kernel; of a matrix more nothing is known."""
    if before.mapped is not None or not before.slack.has(K):
        return before.slack if before.mapped is None else ONE
    gain, added = after.coeff(K(m, n)), after.subs(K(m, n), 0)
    return before.slack.subs(K(m, m), (K(m, m) - added) / gain)


def _fluctuates(weight: Weight, passage: Passage) -> tuple[Fluctuation, None]:
    """1/fan_out more; of a Haar matrix what it projects away, 1/fan_out - 1/fan_in if that is > 0.

    A bias is a Gaussian coordinate more: it takes its share of what was there before.
    """
    before, after = passage.fluctuations[0], passage.after
    bias = passage.numbers.get("sigma_b", 0.0) ** 2
    share = Gram(1 - bias / after.mm, 1 - bias / after.nn, 1 - bias / after.size)
    lost = 1 / weight.fan_in if _is_haar(weight, passage) else 0.0
    own = max(1 / weight.fan_out - lost, 0.0) * wishart((1.0, 1.0, after.correlation))
    rho = passage.kernels[0].correlation
    return mapped(before, share, rho, own, weight.fan_out, _peak(weight, passage)), None


def _peak(weight: Weight, passage: Passage) -> float:
    """A third of a coordinate's excess kurtosis given inputs whose own is about 3.

    (3 theta T + (kappa_w - 3 theta) S/fan_in)/(3 T) - 1 of `theory.formulas.kurtosis`, S = 3 T.
    """
    theta, kappa = _pair(weight, passage), passage.numbers[symbols.KURTOSIS[weight.role].name]
    return theta - 1 + (kappa - 3 * theta) / weight.fan_in


def _pair(weight: Weight, passage: Passage) -> float:
    return passage.numbers.get(symbols.PAIR_MOMENT[weight.role].name, 1.0)


def _is_haar(weight: Weight, passage: Passage) -> bool:
    """Only of Haar matrices is the pair moment known and not 1."""
    return _pair(weight, passage) != 1.0
