"""GPT-NeoX's initialisation.

Source: Black et al. 2022 (arXiv 2204.06745), section 2.1: "small init" of Nguyen and Salazar 2019
and, into the stream, that of Wang and Komatsuzaki 2021.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nope.architecture import Architecture
from nope.init import Normal, Scheme, WeightLaw, ZeroBiases
from nope.operations import Weight


@dataclass(frozen=True)
class NeoX(ZeroBiases):
    """N(0, 2/(5 d_model)); into the stream N(0, 4/(n_layers^2 d_model)).  Biases are 0.

    A layer is two residual additions.
    """

    def matrix(self, weight: Weight, architecture: Architecture) -> WeightLaw:
        d_model = architecture.d_model
        if weight.role in ("output", "mlp_out"):
            n_layers = (architecture.n_residual or 2) / 2
            return Normal(2 / (n_layers * math.sqrt(d_model)))
        return Normal(math.sqrt(2 / (5 * d_model)))


def neox() -> Scheme:
    """GPT-NeoX's scheme, which has nothing to choose."""
    return NeoX()
