"""What holds the layer and the scheme to their definitions: NumPy, a draw at a time.

And the claims to real layers.  The kit is `nope.testing`, `theory.testing` and `reports.testing`;
`nope-theory`'s own suite finds this module too.
"""

from collections.abc import Mapping

import numpy as np

from nope import Architecture, CausalMean, GaussianTokens, Norm, Question, Sequence
from nope.init import normal
from nope.operations import Weight
from nope.testing import LayerContract, SchemeContract
from nope_example.claims import claims
from nope_example.layers import LayerScale
from nope_example.schemes import neox
from reports.testing import ClaimContract
from theory.testing import KernelContract, LawContract

SCALE = 0.3
STD = 0.5


class Simulation:
    """The plain counterpart of a layer: one draw, the values of every place by name.

    Behind prefix means positions are correlated, so that all of a kernel is looked at.
    """

    layer = Sequence((CausalMean("means"), Norm("ln", "rmsnorm"), LayerScale("scaled", SCALE)))

    def plain(self, x: np.ndarray, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        means = np.array([x[: m + 1].mean(0) for m in range(len(x))])
        normalised = means / np.sqrt(np.mean(means**2, axis=1, keepdims=True))
        return {"means": means, "ln": normalised, "scaled": SCALE * normalised}


class TestLayerScale(Simulation, LayerContract):
    """The torch module."""


class TestLayerScaleKernel(Simulation, KernelContract):
    """The kernel rule and the symmetries."""


class TestLayerScaleLaw(LawContract):
    """The law of a coordinate: of Gaussian tokens it is Gaussian."""

    question = Question(
        Architecture(8, 4, GaussianTokens(STD), LayerScale("scaled", SCALE)),
        normal(1.0),
        "scaled",
        "kurtosis",
    )

    def plain(self, generator: np.random.Generator, size: int) -> np.ndarray:
        return SCALE * generator.normal(0.0, STD, size)


class TestNeoX(SchemeContract):
    """GPT-NeoX's scheme: the variances of `small_init` and `wang_init` in its source code."""

    name = "neox"
    scheme = neox()

    def plain(self, weight: Weight, architecture: Architecture) -> tuple[float, float | None]:
        into_stream = [w for w in architecture.weights if w.role in ("output", "mlp_out")]
        d, n_layers = architecture.d_model, len(into_stream) / 2
        std = {
            "bias": 0.0,
            "output": 2 / n_layers / np.sqrt(d),
            "mlp_out": 2 / n_layers / np.sqrt(d),
        }.get(weight.role, np.sqrt(2 / (d + 4 * d)))
        return std**2, 3.0 if std else None


class TestClaims(ClaimContract):
    """All of them: what they say, what they predict, and what real layers say of them."""

    claims = claims
