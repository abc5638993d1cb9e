"""Residual sums."""

from collections.abc import Mapping

from nope.operations import Add
from theory.kernel import J, K, Rule, Traits
from theory.rules import rule_for
from theory.symbols import m, n


@rule_for.register
def _(operation: Add, traits: Mapping[str, Traits]) -> Rule:
    """K_y = K_x + K_branch: the branch ends in zero-mean weights of its own."""
    stream, branch = (traits[name] for name in operation.inputs)
    return Rule(
        name="residual sum",
        statement="Stream and branch are uncorrelated: their kernels add.",
        sources=operation.inputs,
        expression=K(m, n) + J(m, n),
        assumption="the branch's last map has zero mean and is independent of the stream",
        source="chi2023, residual variance",
        carried="largest",
        traits=Traits(maps=max(stream.maps, branch.maps)),
    )
