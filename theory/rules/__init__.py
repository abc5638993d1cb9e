"""One rule per operation, one file per kind: how the position kernel passes through it.

`rule_for(operation, traits, fidelity)` is dispatched on the operation's class.  To add a layer
kind, register a function that returns a `theory.kernel.Rule`: an expression in K (and J, Q), what
it assumes, and the relative size of what it drops, 0 if it is exact.  Another package does the
same: `nope.plugins`.
"""

from collections.abc import Mapping
from functools import singledispatch

from nope.operations import Operation
from theory.kernel import Fidelity, Rule, Traits


@singledispatch
def rule_for(
    operation: Operation, traits: Mapping[str, Traits], fidelity: Fidelity = "uniform"
) -> Rule:
    """The kernel rule of `operation`.

    `traits` holds those of the places it may read, `fidelity` is how a softmax is treated.
    """
    raise NotImplementedError(
        f"expected an operation with a kernel rule, got {type(operation).__name__}; "
        "register one with theory.rules.rule_for.register"
    )


from theory.rules import activation, attention, linear, norm, residual, tokens  # noqa: E402, F401
