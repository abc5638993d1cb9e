"""Pointwise nonlinearities through their dual activations."""

from collections.abc import Mapping

import sympy as sp

from nope.operations import Activate
from theory.formulas.duals import DUALS
from theory.kernel import Fidelity, K, Rule, Traits
from theory.rules import rule_for
from theory.symbols import a, b, c, d, m, n


@rule_for.register
def _(operation: Activate, traits: Mapping[str, Traits], fidelity: Fidelity) -> Rule:
    """K_h(m, n) = E phi(X) phi(Y), (X, Y) ~ N(0, [[K_mm, K_mn], [K_mn, K_nn]]).

    Given the input, pre-activations are Gaussian over W_in with the *empirical* kernel, so
    what is dropped is half the dual's curvature along the kernel's fluctuations: the
    correlation's, of variance (1 - rho^2)^2 maps/d, and the norm's, of relative variance
    2 maps/d, which an exact norm in front takes away.  Both enter as second differences.
    """
    before = traits[operation.inputs[0]]
    dual = DUALS[operation.function]
    rho, scale = c / sp.sqrt(a * b), sp.sqrt(a * b)
    width = sp.sqrt(sp.Integer(before.maps) / d)
    ways = [{c: scale * (rho + sign * (1 - rho**2) * width)} for sign in (1, -1)]
    curvature = _second_difference(dual, ways)
    common = [{x: x * (1 + sign * sp.sqrt(2) * width) for x in (a, b, c)} for sign in (1, -1)]
    if not before.fixed_norm:
        curvature += _second_difference(dual, common)
    size = sp.sqrt(dual.subs({b: a, c: a}) * dual.subs({a: b, c: b}))
    entries = {a: K(m, m), b: K(n, n), c: K(m, n)}
    return Rule(
        name=f"{operation.function}, dual activation",
        statement="A wide layer of units averages the product of two activated Gaussians.",
        sources=operation.inputs,
        expression=dual.subs(entries, simultaneous=True),
        assumption="Gaussian pre-activations",
        source="Cho and Saul 2009 for ReLU; derived here for GELU",
        remainder=(curvature / size).subs(entries, simultaneous=True),
        traits=Traits(maps=before.maps),
    )


def _second_difference(dual: sp.Expr, ways: list[dict[sp.Symbol, sp.Expr]]) -> sp.Expr:
    up, down = (dual.subs(way, simultaneous=True) for way in ways)
    return sp.Abs(up + down - 2 * dual) / 2
