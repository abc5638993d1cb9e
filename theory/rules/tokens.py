"""Input tokens."""

from collections.abc import Mapping

import sympy as sp

from nope.operations import Embed
from theory.kernel import Rule, Traits
from theory.rules import rule_for
from theory.symbols import d, m, n, sigma_x


@rule_for.register
def _(operation: Embed, traits: Mapping[str, Traits]) -> Rule:
    """K(m, n) = sigma_x^2 delta_mn; kurtosis 3 and E|x|^4/(E|x|^2)^2 = 1 + 2/d."""
    return Rule(
        name="i.i.d. Gaussian tokens",
        statement="Different positions are independent, one coordinate has variance sigma_x^2.",
        sources=(),
        expression=sigma_x**2 * sp.KroneckerDelta(m, n),
        assumption="x_m ~ N(0, sigma_x^2 I), independent over positions",
        source="definition",
        traits=Traits(
            maps=1, isotropic=True, kurtosis=sp.Integer(3), norm_kurtosis=1 + sp.Integer(2) / d
        ),
    )
