"""Pointwise nonlinearities through their dual activations."""

from collections.abc import Mapping
from functools import cache, partial

import numpy as np
import sympy as sp

from nope.operations import Activate, ActivationName
from theory.cache import kept
from theory.fluctuations import Fluctuation, Passage, Second, curved
from theory.formulas.activations import ACTIVATIONS
from theory.formulas.duals import dual
from theory.formulas.mehler import expand
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
    expression, remainder = _dual_and_remainder(dual(operation.function), before.slack == 0)
    return Rule(
        name=f"{operation.function}, dual activation",
        statement="A wide layer of units averages the product of two activated Gaussians.",
        sources=operation.inputs,
        expression=expression,
        assumption="Gaussian pre-activations",
        source="Cho and Saul 2009 for ReLU, Williams 1997 for erf; derived here for the others",
        remainder=remainder,
        traits=Traits(maps=before.maps),
        fluctuates=partial(_activates, operation.function),
    )


def _activates(function: ActivationName, passage: Passage) -> tuple[Fluctuation, Second]:
    """The dual's, and that of the mean over units."""
    (kernel,), (before,) = passage.kernels, passage.fluctuations
    own = unit_covariance(function, float(np.mean(kernel.mm)), kernel.correlation) / before.width
    return curved(before, kernel, passage.function, own)


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


def unit_covariance(function: ActivationName, variance: float, rho: np.ndarray) -> np.ndarray:
    """Of f^2/E f^2, g^2/E g^2 and f g/E f^2, f and g = phi of two Gaussians of this variance.

    Mehler's series of the products of phi's powers; shape (3, 3, ...).
    """
    single, double, triple = _powers(function, variance)
    size = series(single, single, np.ones(()))
    joint = np.empty((3, 3, *rho.shape))
    joint[0, 0] = joint[1, 1] = series(double, double, np.ones(())) / size**2
    joint[0, 1] = joint[1, 0] = joint[2, 2] = series(double, double, rho) / size**2
    joint[:2, 2] = joint[2, :2] = series(triple, single, rho) / size**2
    one = np.ones_like(rho)
    mean = np.array([one, one, series(single, single, rho) / size])
    return np.asarray(joint - mean[:, None] * mean)


@cache
def _powers(function: ActivationName, variance: float) -> tuple[np.ndarray, ...]:
    """The coefficients of phi, phi^2 and phi^3 in Mehler's series."""
    phi, at = ACTIVATIONS[function], np.array([variance])

    def power(k: int) -> np.ndarray:
        return np.asarray(expand(lambda x: phi(x) ** k, at)[0][:, 0])

    return tuple(map(power, (1, 2, 3)))


def series(left: np.ndarray, right: np.ndarray, rho: np.ndarray) -> np.ndarray:
    """sum_k h_k g_k rho^k from coefficients by parity."""
    even, odd = (np.polynomial.polynomial.polyval(rho**2, row) for row in left * right)
    return np.asarray(even + rho * odd)
