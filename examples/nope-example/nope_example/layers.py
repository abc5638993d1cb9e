"""LayerScale: a branch is multiplied by a small number before it joins the stream.

    y_m = lambda x_m

At initialisation all the entries of its learned diagonal matrix are one number.  Source: Touvron
et al. 2021 (arXiv 2103.17239), section 2.1.

All that is known of the layer is registered here, so that a worker process that unpickles one has
it too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy as sp
from torch import Tensor

from nope.checks import expect_finite
from nope.layers import Scope
from nope.operations import Operation
from nope.transformer import Weights, apply
from theory.fluctuations import Fluctuation, Passage
from theory.kernel import Fidelity, K, Rule, Traits
from theory.laws.places import Network, vector_of
from theory.laws.vectors import Isotropic, Vector
from theory.rules import rule_for
from theory.symbols import m, n
from theory.symmetry import dependence

SOURCE = "Touvron et al. 2021 (arXiv 2103.17239)"


@dataclass(frozen=True)
class Rescale(Operation):
    """y = scale x."""

    scale: float


@dataclass(frozen=True)
class LayerScale:
    """y_m = scale x_m at the place `name`.

    Raises `ValueError` for a scale that is not positive.
    """

    name: str
    scale: float = 0.1

    def __post_init__(self) -> None:
        expect_finite("the scale", self.scale, positive=True)

    def operations(self, scope: Scope, source: str) -> Iterator[Operation]:
        yield Rescale(scope.place(self.name), (source,), self.scale)


@apply.register
def _(operation: Rescale, inputs: list[Tensor], weights: Weights) -> Tensor:
    return operation.scale * inputs[0]


@rule_for.register
def _(operation: Rescale, traits: Mapping[str, Traits], fidelity: Fidelity) -> Rule:
    """K_y(m, n) = scale^2 K_x(m, n), exactly: one number changes neither cosines nor kurtoses."""
    before = traits[operation.inputs[0]]
    return Rule(
        name="LayerScale",
        statement="A number multiplies the kernel by its square.",
        sources=operation.inputs,
        expression=sp.nsimplify(operation.scale) ** 2 * K(m, n),
        assumption="one scale for all coordinates, as at initialisation",
        source=SOURCE,
        traits=Traits(
            maps=before.maps,
            independent=before.independent,
            repeated=before.repeated,
            centred=before.centred,
            fresh=before.fresh,
            isotropic=before.isotropic,
            kurtosis=before.kurtosis,
            norm_kurtosis=before.norm_kurtosis,
        ),
        fluctuates=_keeps,
    )


def _keeps(passage: Passage) -> tuple[Fluctuation, None]:
    """Relative to its mean the empirical kernel fluctuates as before."""
    return passage.fluctuations[0], None


@dependence.register
def _(operation: Rescale, inputs: list[Any]) -> Any:
    return inputs[0]


@vector_of.register
def _(operation: Rescale, network: Network) -> Vector:
    """A Gaussian of random variance stays one; of others the leading order."""
    before = network.vector(operation.inputs[0])
    if not isinstance(before, Isotropic):
        return network.gaussian(operation.place)
    return replace(before, variance=before.variance.scaled(operation.scale**2))
