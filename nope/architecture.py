"""What a NoPE transformer is: frozen layers that compose, as data without torch.

A layer describes itself as a list of primitive `Operation`s, each with the name of
the place it produces and the places it reads.  Two interpreters walk that list: the
torch modules of `nope.transformer` and the kernel rules of `theory.rules`.  The list
is therefore also the only list of places (`Architecture.places`).

>>> from nope import decoder
>>> sorted(decoder(64, 4, n_ctx=8, d_ff=0).places())[:4]
['blocks.0.attn.k', 'blocks.0.attn.pattern', 'blocks.0.attn.q', 'blocks.0.attn.scores']
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, Protocol, runtime_checkable

from nope.checks import expect, expect_choice, expect_count, expect_finite

AttentionKind = Literal["softmax", "uniform"]
ActivationName = Literal["relu", "gelu", "identity"]
NormKind = Literal["layernorm", "rmsnorm"]
NormPosition = Literal["pre", "post", "none"]

ATTENTION_KINDS = ("softmax", "uniform")
ACTIVATIONS = ("relu", "gelu", "identity")
NORMS = ("layernorm", "rmsnorm")
NORM_POSITIONS = ("pre", "post", "none")


def _divides(n_heads: int, d_model: int) -> None:
    remedy = f"use one of the divisors of {d_model}"
    expect(d_model % n_heads == 0, f"n_heads to divide d_model={d_model}", n_heads, remedy)


# ---------------------------------------------------------------- weights and operations


@dataclass(frozen=True)
class Weight:
    """One weight array of an architecture: `fan_in` by `fan_out`, or a bias of `fan_out`.

    `role` is what an initialisation scheme decides by: query, key, value, output, mlp_in,
    mlp_out or bias.  `path` is its name in TransformerLens's style, and with the seed and
    the block index the key of its random stream.
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
    `pair` of a query position m and a key position n <= m, for each head.
    """

    place: str
    inputs: tuple[str, ...]
    axes: ClassVar[Literal["vector", "pair"]] = "vector"

    @property
    def weights(self) -> tuple[Weight, ...]:
        return ()


@dataclass(frozen=True)
class Embed(Operation):
    """The input tokens x_m."""

    tokens: GaussianTokens


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
    """Scaled logits l_mn = <q_m, k_n> / sqrt(d_head), n <= m."""

    d_head: int
    axes: ClassVar[Literal["vector", "pair"]] = "pair"


@dataclass(frozen=True)
class Softmax(Operation):
    """a_mn = softmax over n <= m of the scores."""

    axes: ClassVar[Literal["vector", "pair"]] = "pair"


@dataclass(frozen=True)
class Uniform(Operation):
    """a_mn = 1/m for n <= m; reads a place only to know how many positions there are."""

    n_heads: int
    axes: ClassVar[Literal["vector", "pair"]] = "pair"


@dataclass(frozen=True)
class Mix(Operation):
    """z_m = sum over n <= m of a_mn v_n, heads concatenated.  Inputs: pattern, values."""

    uniform: bool


@dataclass(frozen=True)
class Average(Operation):
    """The mean over the prefix, (1/m) sum over n <= m of x_n: the Cesaro matrix."""


@dataclass(frozen=True)
class Activate(Operation):
    """A pointwise nonlinearity."""

    function: ActivationName


@dataclass(frozen=True)
class Add(Operation):
    """The residual sum of the stream and a branch."""


# ------------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class Scope:
    """Where a layer stands: the width of the stream and the prefix of its places."""

    d_model: int
    prefix: str = ""

    def place(self, name: str) -> str:
        return f"{self.prefix}{name}"

    def within(self, name: str) -> Scope:
        return replace(self, prefix=f"{self.prefix}{name}.") if name else self


@runtime_checkable
class Layer(Protocol):
    """What composes: a layer turns the place it reads into operations.

    The last operation's place is the layer's output.
    """

    def operations(self, scope: Scope, source: str) -> Iterator[Operation]: ...


@dataclass(frozen=True)
class GaussianTokens:
    """x_m ~ N(0, std^2 I), independent over positions."""

    std: float = 0.02

    def __post_init__(self) -> None:
        expect_finite("the tokens' std", self.std, positive=True)


@dataclass(frozen=True)
class Norm:
    """LayerNorm or RMSNorm with gain 1, offset 0.  `eps` defaults to 0, the papers' assumption."""

    name: str
    kind: NormKind = "layernorm"
    eps: float = 0.0

    def __post_init__(self) -> None:
        expect_choice("norm", self.kind, NORMS)
        expect_finite("eps", self.eps)

    def operations(self, scope: Scope, source: str) -> Iterator[Operation]:
        expect(
            scope.d_model > 1 or self.kind != "layernorm" or self.eps > 0,
            "d_model of at least 2 for a LayerNorm with eps 0 (one centred coordinate is 0/0)",
            scope.d_model,
            "raise d_model or eps, or use norm='rmsnorm'",
        )
        yield Normalise(scope.place(self.name), (source,), self.kind, self.eps)


@dataclass(frozen=True)
class Attention:
    """Causal self-attention; `kind="uniform"` replaces the softmax pattern by a_mn = 1/m."""

    n_heads: int
    kind: AttentionKind = "softmax"
    bias: bool = False
    name: str = "attn"

    def __post_init__(self) -> None:
        expect_count("n_heads", self.n_heads)
        expect_choice("attention", self.kind, ATTENTION_KINDS)

    def operations(self, scope: Scope, source: str) -> Iterator[Operation]:
        d, heads = scope.d_model, self.n_heads
        _divides(heads, d)
        here = scope.within(self.name)
        pattern, scores = here.place("pattern"), here.place("scores")
        value = _linear(here, source, "v", "V", "value", d, d, self.bias, heads)
        if self.kind == "uniform":
            yield value
            yield Uniform(pattern, (value.place,), heads)
        else:
            query = _linear(here, source, "q", "Q", "query", d, d, self.bias, heads)
            key = _linear(here, source, "k", "K", "key", d, d, self.bias, heads)
            yield from (query, key, value)
            yield Scores(scores, (query.place, key.place), d // heads)
            yield Softmax(pattern, (scores,))
        mixed = Mix(here.place("z"), (pattern, value.place), self.kind == "uniform")
        yield mixed
        output = _linear(here, mixed.place, "", "O", "output", d, d, self.bias)
        yield replace(output, place=scope.place(f"{self.name}_out"))


@dataclass(frozen=True)
class CausalMean:
    """The mean over the prefix: uniform attention without its value and output maps."""

    name: str = "mean"

    def operations(self, scope: Scope, source: str) -> Iterator[Operation]:
        yield Average(scope.place(self.name), (source,))


@dataclass(frozen=True)
class MLP:
    """W_out phi(W_in x)."""

    d_ff: int
    activation: ActivationName = "gelu"
    bias: bool = False
    name: str = "mlp"

    def __post_init__(self) -> None:
        expect_count("d_ff", self.d_ff)
        expect_choice("activation", self.activation, ACTIVATIONS)

    def operations(self, scope: Scope, source: str) -> Iterator[Operation]:
        here, d = scope.within(self.name), scope.d_model
        pre = _linear(here, source, "pre", "in", "mlp_in", d, self.d_ff, self.bias)
        yield pre
        post = Activate(here.place("post"), (pre.place,), self.activation)
        yield post
        output = _linear(here, post.place, "", "out", "mlp_out", self.d_ff, d, self.bias)
        yield replace(output, place=scope.place(f"{self.name}_out"))


def _linear(
    here: Scope,
    source: str,
    name: str,
    suffix: str,
    role: str,
    fan_in: int,
    fan_out: int,
    bias: bool,
    n_heads: int | None = None,
) -> Linear:
    weight = Weight(here.place(f"W_{suffix}"), role, fan_in, fan_out)
    offset = Weight(here.place(f"b_{suffix}"), "bias", fan_in, fan_out) if bias else None
    return Linear(here.place(name), (source,), weight, offset, n_heads)


@dataclass(frozen=True)
class Sequence:
    """Layers one after the other, their places under `name`."""

    layers: tuple[Layer, ...]
    name: str = ""

    def operations(self, scope: Scope, source: str) -> Iterator[Operation]:
        here = scope.within(self.name)
        for layer in self.layers:
            for operation in layer.operations(here, source):
                yield operation
                source = operation.place


@dataclass(frozen=True)
class Residual:
    """x + branch(x), at the place `name`."""

    branch: Layer
    name: str

    def operations(self, scope: Scope, source: str) -> Iterator[Operation]:
        output = source
        for operation in self.branch.operations(scope, source):
            yield operation
            output = operation.place
        yield Add(scope.place(self.name), (source, output))


@dataclass(frozen=True)
class Architecture:
    """A stack of layers over `n_ctx` tokens of width `d_model`.

    `ValueError` at construction for sizes that cannot be; `places()` lists what can be seen.
    """

    d_model: int
    n_ctx: int
    tokens: GaussianTokens
    body: Layer

    def __post_init__(self) -> None:
        expect_count("d_model", self.d_model)
        expect_count("n_ctx", self.n_ctx)
        names = [operation.place for operation in self.operations]
        twice = sorted({name for name in names if names.count(name) > 1})
        expect(not twice, "every place to have its own name", twice, "name the layers apart")

    @cached_property
    def operations(self) -> tuple[Operation, ...]:
        """Every primitive step in order of computation."""
        embed = Embed("embed", (), self.tokens)
        return (embed, *self.body.operations(Scope(self.d_model), embed.place))

    def places(self) -> Mapping[str, Operation]:
        """Every place that can be asked about, with the operation that produces it."""
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
        while isinstance(operation, Activate):
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
    activation: ActivationName = "gelu",
    norm: NormKind = "layernorm",
    norm_position: NormPosition = "pre",
    attention: AttentionKind = "softmax",
    tokens: GaussianTokens | None = None,
    eps: float = 0.0,
    bias: bool = False,
) -> Architecture:
    """A GPT-2 shaped decoder without positional encodings.

    `d_ff` defaults to 4 d_model as in GPT-2; 0 leaves the MLP out.  `norm_position` is `pre`
    (norm inside each branch and `ln_final`), `post` (norm after each residual sum) or `none`.
    `eps` is added to the variance under the norm's root; 0 is what the papers assume, GPT-2
    has 1e-5.  `tokens` defaults to N(0, 0.02^2).

    Raises `ValueError` for impossible sizes.
    """
    expect_count("d_model", d_model)
    expect_count("n_layers", n_layers, least=0)
    expect_choice("norm_position", norm_position, NORM_POSITIONS)
    expect_choice("activation", activation, ACTIVATIONS)
    width = 4 * d_model if d_ff is None else d_ff
    expect_count("d_ff", width, least=0)
    mix = Attention(n_heads, attention, bias)
    _divides(n_heads, d_model)
    mlp = MLP(width, activation, bias) if width else None
    norms = tuple(Norm(name, norm, eps) for name in ("ln1", "ln2", "ln_final"))

    def branch(layer: Layer, index: int, total: str) -> tuple[Layer, ...]:
        scale = norms[index - 1]
        if norm_position == "pre":
            return (Residual(Sequence((scale, layer)), total),)
        residual = Residual(layer, total)
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


def prefix_means(d_model: int, *, n_ctx: int, tokens: GaussianTokens | None = None) -> Architecture:
    """Causal averaging of raw tokens, one place `mean`: what the uniform picture reduces to."""
    return Architecture(d_model, n_ctx, tokens or GaussianTokens(std=1.0), CausalMean())
