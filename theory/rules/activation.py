"""Pointwise nonlinearities through their dual activations."""

from collections.abc import Mapping
from functools import cache

import sympy as sp

from nope.operations import Activate
from theory.cache import kept
from theory.formulas.duals import dual
from theory.kernel import Fidelity, K, Rule, Traits
from theory.rules import rule_for
from theory.symbols import a, b, c, d, m, maps, n


@rule_for.register
def _(operation: Activate, traits: Mapping[str, Traits], fidelity: Fidelity) -> Rule:
    """K_h(m, n) = E phi(X) phi(Y), (X, Y) ~ N(0, [[K_mm, K_mn], [K_mn, K_nn]]).

    Given the input, pre-activations are Gaussian over W_in with the *empirical* kernel, so
    what is dropped is half the dual's curvature along the kernel's fluctuations: the
    correlation's, of variance (1 - rho^2)^2 maps/d, and the norm's, of relative variance
    2 maps/d, which an exact norm in front takes away.  Both enter as second differences.
    """
    before = traits[operation.inputs[0]]
    expression, remainder = _dual_and_remainder(dual(operation.function), before.fixed_norm)
    return Rule(
        name=f"{operation.function}, dual activation",
        statement="A wide layer of units averages the product of two activated Gaussians.",
        sources=operation.inputs,
        expression=expression,
        assumption="Gaussian pre-activations",
        source="Cho and Saul 2009 for ReLU, Williams 1997 for erf; derived here for the others",
        remainder=remainder,
        traits=Traits(maps=before.maps),
    )


@cache
@kept
def _dual_and_remainder(of: sp.Expr, fixed_norm: bool) -> tuple[sp.Expr, sp.Expr]:
    """Both in K, the same for every layer."""
    rho, scale = c / sp.sqrt(a * b), sp.sqrt(a * b)
    width = sp.sqrt((maps - 1) / d)  # of the input: given it, W_in only averages
    step = sp.tanh(width)  # on the scale of atanh rho, so that no correlation leaves [-1, 1]
    ways = [{c: scale * (rho + sign * step) / (1 + sign * rho * step)} for sign in (1, -1)]
    curvature = _second_difference(of, ways)
    common = [
        {x: x * (1 + sign * sp.tanh(sp.sqrt(2) * width)) for x in (a, b, c)} for sign in (1, -1)
    ]
    if not fixed_norm:
        curvature += _second_difference(of, common)
    size = sp.sqrt(of.subs({b: a, c: a}) * of.subs({a: b, c: b}))
    entries = {a: K(m, m), b: K(n, n), c: K(m, n)}
    return of.subs(entries, simultaneous=True), (curvature / size).subs(entries, simultaneous=True)


def _second_difference(dual: sp.Expr, ways: list[dict[sp.Symbol, sp.Expr]]) -> sp.Expr:
    up, down = (dual.subs(way, simultaneous=True) for way in ways)
    return sp.Abs(up + down - 2 * dual) / 2
