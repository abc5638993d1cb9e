"""What a NoPE transformer is: a width, a length, tokens and a body of layers, as data.

Layers are written out as a list of primitive operations (`nope.operations`), which is also
the only list of places (`Architecture.places`).

>>> from nope import decoder
>>> sorted(decoder(64, 4, n_ctx=8, d_ff=0).places())[:4]
['blocks.0.attn.k', 'blocks.0.attn.pattern', 'blocks.0.attn.q', 'blocks.0.attn.scores']
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from nope.checks import expect, expect_choice, expect_count
from nope.layers import (
    MLP,
    Attention,
    AttentionKind,
    CausalMean,
    GatedName,
    Layer,
    Norm,
    Residual,
    Scope,
    Sequence,
    divides,
)
from nope.operations import (
    Activate,
    ActivationName,
    Add,
    Embed,
    Linear,
    Multiply,
    NormKind,
    Operation,
    Weight,
)
from nope.tokens import GaussianTokens, Tokens

NormPosition = Literal["pre", "post", "none"]


@dataclass(frozen=True)
class Architecture:
    """A stack of layers over `n_ctx` tokens of width `d_model`.

    `ValueError` at construction for sizes that cannot be; `places()` lists what can be seen.
    """

    d_model: int
    n_ctx: int
    tokens: Tokens
    body: Layer

    def __post_init__(self) -> None:
        expect_count("d_model", self.d_model)
        expect_count("n_ctx", self.n_ctx)
        kind = "GaussianTokens() or others of nope.tokens"
        expect(isinstance(self.tokens, Tokens), kind, self.tokens, "change tokens")
        longest = self.tokens.longest
        remedy = "lower n_ctx or give a longer text"
        expect(self.n_ctx <= longest, f"n_ctx of at most {longest} tokens", self.n_ctx, remedy)
        names = Counter(operation.place for operation in self.operations)
        twice = sorted(name for name, count in names.items() if count > 1)
        expect(not twice, "every place to have its own name", twice, "name the layers apart")

    @cached_property
    def operations(self) -> tuple[Operation, ...]:
        """Every primitive step in order of computation."""
        embed = Embed("embed", (), self.tokens, self.d_model)
        return (embed, *self.body.operations(Scope(self.d_model), embed.place))

    def places(self) -> Mapping[str, Operation]:
        """Every place that can be asked about, with the operation that produces it."""
        return self._places

    @cached_property
    def _places(self) -> Mapping[str, Operation]:
        return {operation.place: operation for operation in self.operations}

    @property
    def weights(self) -> tuple[Weight, ...]:
        return tuple(weight for operation in self.operations for weight in operation.weights)

    @property
    def n_residual(self) -> int:
        """The number of residual additions (GPT-2 scales its output projections by it)."""
        return sum(isinstance(operation, Add) for operation in self.operations)

    @property
    def n_heads(self) -> int:
        """The heads of the first attention layer; 1 without attention."""
        linear = (o for o in self.operations if isinstance(o, Linear))
        return next((o.n_heads for o in linear if o.n_heads), 1)

    def width(self, place: str) -> int:
        """The number of coordinates of a vector place, heads concatenated."""
        operation = self.places()[place]
        while isinstance(operation, Activate | Multiply):
            operation = self.places()[operation.inputs[0]]
        return operation.weight.fan_out if isinstance(operation, Linear) else self.d_model

    def upstream(self, place: str) -> tuple[Operation, ...]:
        """The operations that `place` needs, in order of computation, `place` included.

        Raises `LookupError` when the architecture has no such place.
        """
        places = self.places()
        if place not in places:
            raise LookupError(
                f"expected a place of this architecture, got {place!r}; it has {', '.join(places)}"
            )
        needed, queue = {place}, [place]
        while queue:
            for source in places[queue.pop()].inputs:
                if source not in needed:
                    needed.add(source)
                    queue.append(source)
        return tuple(operation for operation in self.operations if operation.place in needed)


# ----------------------------------------------------------------------------- builders


def decoder(
    d_model: int,
    n_heads: int,
    n_layers: int = 1,
    d_ff: int | None = None,
    *,
    n_ctx: int,
    activation: ActivationName | GatedName = "gelu",
    norm: NormKind = "layernorm",
    norm_position: NormPosition = "pre",
    attention: AttentionKind = "softmax",
    tokens: Tokens | None = None,
    eps: float = 0.0,
    bias: bool = False,
    causal: bool = True,
    residual_scale: float = 1.0,
) -> Architecture:
    """A GPT-2 shaped decoder without positional encodings.

    `d_ff` defaults to 4 d_model as in GPT-2; 0 leaves the MLP out.  `norm_position` is `pre`
    (norm inside each branch and `ln_final`), `post` (norm after each residual sum) or `none`.
    `eps` is added to the variance under the norm's root; 0 is what the papers assume, GPT-2
    has 1e-5.  `tokens` defaults to N(0, 0.02^2).  Without the `causal` mask every query sees
    every key.  `residual_scale` multiplies each branch before it is added to the stream.

    Raises `ValueError` for impossible sizes.
    """
    expect_count("d_model", d_model)
    expect_count("n_layers", n_layers, least=0)
    expect_choice("norm_position", norm_position, get_args(NormPosition))
    width = 4 * d_model if d_ff is None else d_ff
    expect_count("d_ff", width, least=0)
    mix = Attention(n_heads, attention, bias, causal=causal)
    divides(n_heads, d_model)
    mlp = MLP(width, activation, bias) if width else None
    norms = tuple(Norm(name, norm, eps) for name in ("ln1", "ln2", "ln_final"))

    def branch(layer: Layer, index: int, total: str) -> tuple[Layer, ...]:
        scale = norms[index - 1]
        if norm_position == "pre":
            return (Residual(Sequence((scale, layer)), total, residual_scale),)
        residual = Residual(layer, total, residual_scale)
        return (residual,) if norm_position == "none" else (residual, scale)

    def block(index: int) -> Layer:
        layers = branch(mix, 1, "resid_mid" if mlp else "resid_post")
        if mlp:
            layers += branch(mlp, 2, "resid_post")
        return Sequence(layers, f"blocks.{index}")

    blocks: tuple[Layer, ...] = tuple(block(index) for index in range(n_layers))
    if norm_position == "pre":
        blocks += (norms[2],)
    return Architecture(d_model, n_ctx, tokens or GaussianTokens(), Sequence(blocks))


def prefix_means(d_model: int, *, n_ctx: int, tokens: Tokens | None = None) -> Architecture:
    """Causal averaging of raw tokens, one place `mean`: what the uniform picture reduces to."""
    return Architecture(d_model, n_ctx, tokens or GaussianTokens(std=1.0), CausalMean())
