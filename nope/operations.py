"""Primitive steps: what an architecture is made of once its layers are written out.

A layer (`nope.layers`) describes itself as a list of `Operation`s, each with the name of the
place it produces and the places it reads.  Two interpreters walk that list: the torch modules
of `nope.transformer` and the kernel rules of `theory.rules`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from nope.tokens import Tokens

NormKind = Literal["layernorm", "rmsnorm"]
ActivationName = Literal["relu", "gelu", "gelu_tanh", "silu", "tanh", "erf", "identity"]
Axes = Literal["vector", "pair"]


@dataclass(frozen=True)
class Weight:
    """One weight array of an architecture: `fan_in` by `fan_out`, or a bias of `fan_out`.

    `role` is what an initialisation scheme decides by: query, key, value, output, mlp_in,
    mlp_out or bias; an embedding has the law of the tokens it belongs to.  `path` is its name
    in TransformerLens's style, and with the seed and the block index the key of its random
    stream.
    """

    path: str
    role: str
    fan_in: int
    fan_out: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.fan_out,) if self.role == "bias" else (self.fan_in, self.fan_out)


@dataclass(frozen=True)
class Operation:
    """One primitive step: reads the places `inputs`, produces the place `place`.

    `axes` says what a value at the place is: a `vector` per position, or one number per
    `pair` of a query position m and a key position n, for each head.
    """

    place: str
    inputs: tuple[str, ...]
    axes: ClassVar[Axes] = "vector"

    @property
    def weights(self) -> tuple[Weight, ...]:
        return ()


@dataclass(frozen=True)
class Embed(Operation):
    """The input tokens x_m, with the embedding table or BOS row that all inputs share."""

    tokens: Tokens
    d_model: int

    @property
    def weights(self) -> tuple[Weight, ...]:
        return self.tokens.weights(self.d_model)


@dataclass(frozen=True)
class Normalise(Operation):
    """LayerNorm (centred) or RMSNorm over the coordinates, gain 1 and offset 0."""

    kind: NormKind
    eps: float


@dataclass(frozen=True)
class Linear(Operation):
    """y = x W (+ b); queries, keys and values are split over `n_heads` heads."""

    weight: Weight
    bias: Weight | None
    n_heads: int | None = None

    @property
    def weights(self) -> tuple[Weight, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Scores(Operation):
    """Scaled logits l_mn = <q_m, k_n> / sqrt(d_head), for n <= m if `causal`."""

    d_head: int
    causal: bool = True
    axes: ClassVar[Axes] = "pair"


@dataclass(frozen=True)
class Softmax(Operation):
    """a_mn = softmax of the scores over the keys."""

    axes: ClassVar[Axes] = "pair"


@dataclass(frozen=True)
class Uniform(Operation):
    """a_mn = 1/m for n <= m (1/n_ctx for all n unless `causal`); reads the values' shape only."""

    n_heads: int
    causal: bool = True
    axes: ClassVar[Axes] = "pair"


@dataclass(frozen=True)
class Mix(Operation):
    """z_m = sum over n of a_mn v_n, heads concatenated.  Inputs: pattern, values.

    `uniform` marks the pattern a_mn = 1/m, for which a running mean does.
    """

    uniform: bool = False


@dataclass(frozen=True)
class Average(Operation):
    """The mean over the prefix, (1/m) sum over n <= m of x_n: the Cesaro matrix."""


@dataclass(frozen=True)
class Activate(Operation):
    """A pointwise nonlinearity."""

    function: ActivationName


@dataclass(frozen=True)
class Multiply(Operation):
    """The coordinatewise product of two places: a gated unit."""


@dataclass(frozen=True)
class Add(Operation):
    """The residual sum: the stream plus `scale` times the branch."""

    scale: float = 1.0
