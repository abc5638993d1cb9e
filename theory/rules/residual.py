"""Residual sums and gated products: two places become one."""

from collections.abc import Mapping
from functools import partial

import sympy as sp

from nope.operations import Add, Multiply
from theory.fluctuations import Fluctuation, Gram, Passage, Second, added, multiplied
from theory.kernel import Fidelity, J, K, Rule, Traits
from theory.rules import rule_for
from theory.symbols import d, m, maps, n


@rule_for.register
def _(operation: Add, traits: Mapping[str, Traits], fidelity: Fidelity) -> Rule:
    """K_y = K_x + scale^2 K_branch: the branch ends in zero-mean weights of its own."""
    stream, branch = (traits[name] for name in operation.inputs)
    _require_fresh(branch, operation.inputs[1], "a branch", operation.place)
    return Rule(
        name="residual sum",
        statement="Stream and branch are uncorrelated: their kernels add.",
        sources=operation.inputs,
        expression=K(m, n) + sp.nsimplify(operation.scale) ** 2 * J(m, n),
        assumption="the branch's last map has zero mean and is independent of the stream",
        source="chi2023, residual variance",
        carried="shared",
        traits=Traits(maps=max(stream.maps, branch.maps), partly_centred=stream.centred),
        fluctuates=partial(_adds, operation.scale**2),
    )


def _require_fresh(traits: Traits, place: str, what: str, at: str) -> None:
    """Refuse what may be correlated with the other input: no kernel says how."""
    if not traits.fresh:
        raise NotImplementedError(
            f"expected {what} that is odd in weights of its own (a linear map, or attention), got "
            f"{place} at {at}; end it in one, or measure it with montecarlo.measure"
        )


def _adds(gain: float, passage: Passage) -> tuple[Fluctuation, None]:
    stream, branch = passage.kernels
    scaled = Gram(gain * branch.mm, gain * branch.nn, gain * branch.mn)
    of_stream, of_branch = passage.fluctuations
    return added(of_stream, of_branch, (stream, scaled), passage.numbers["d"]), None


@rule_for.register
def _(operation: Multiply, traits: Mapping[str, Traits], fidelity: Fidelity) -> Rule:
    """K_h = K_gate K_linear: W_gate and W_in are independent given the input.

    Both fluctuate with the empirical kernel of one input, which adds twice the covariance of
    the factors: (1 - rho^2)^2 maps/d between correlations; the norm's part is gone after a norm.
    """
    gate, linear = (traits[name] for name in operation.inputs)
    _require_fresh(linear, operation.inputs[1], "a second factor", operation.place)
    rho = J(m, n) / sp.sqrt(J(m, m) * J(n, n))
    shared = (1 - rho**2) ** 2 if linear.slack == 0 else 2
    return Rule(
        name="gated product",
        statement="Gate and linear unit have independent weights: their kernels multiply.",
        sources=operation.inputs,
        expression=K(m, n) * J(m, n),
        assumption="W_gate and W_in independent; the input's empirical kernel near its mean",
        source="derived here, for the units of Shazeer 2020",
        remainder=shared * (maps - 1) / d,
        traits=Traits(maps=max(gate.maps, linear.maps), fresh=True),
        fluctuates=_multiplies,
    )


def _multiplies(passage: Passage) -> tuple[Fluctuation, Second]:
    gate, linear = passage.fluctuations
    of_gate, of_linear = passage.kernels
    return multiplied(gate, linear, (of_gate, of_linear))
