"""Layers as frozen dataclasses that compose: what a user writes, as data without torch.

A layer turns the place it reads into primitive operations (`nope.operations`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol, cast, get_args, runtime_checkable

from nope.checks import expect, expect_choice, expect_count, expect_finite, expect_flag
from nope.operations import (
    Activate,
    ActivationName,
    Add,
    Average,
    Linear,
    Mix,
    Multiply,
    Normalise,
    NormKind,
    Operation,
    Scores,
    Softmax,
    Uniform,
    Weight,
)

AttentionKind = Literal["softmax", "uniform"]
GatedName = Literal["reglu", "geglu", "swiglu"]

GATES: dict[str, ActivationName] = {"reglu": "relu", "geglu": "gelu", "swiglu": "silu"}
"""The activation of the gate of a gated unit (Shazeer 2020)."""

ATTENTION_KINDS = get_args(AttentionKind)
ACTIVATIONS = (*get_args(ActivationName), *GATES)
NORMS = get_args(NormKind)


def divides(n_heads: int, d_model: int) -> None:
    """Refuse heads that do not divide the width."""
    remedy = f"use one of the divisors of {d_model}"
    expect(d_model % n_heads == 0, f"n_heads to divide d_model={d_model}", n_heads, remedy)


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
    """Self-attention; `kind="uniform"` replaces the softmax pattern by a_mn = 1/m.

    A query sees the keys n <= m, or every key unless `causal`.
    """

    n_heads: int
    kind: AttentionKind = "softmax"
    bias: bool = False
    name: str = "attn"
    causal: bool = True

    def __post_init__(self) -> None:
        expect_count("n_heads", self.n_heads)
        expect_choice("attention", self.kind, ATTENTION_KINDS)
        expect_flag("bias", self.bias)
        expect_flag("causal", self.causal)

    def operations(self, scope: Scope, source: str) -> Iterator[Operation]:
        d, heads = scope.d_model, self.n_heads
        divides(heads, d)
        here = scope.within(self.name)
        pattern, scores = here.place("pattern"), here.place("scores")
        value = _linear(here, source, "v", "V", "value", d, d, self.bias, heads)
        if self.kind == "uniform":
            yield value
            yield Uniform(pattern, (value.place,), heads, self.causal)
        else:
            query = _linear(here, source, "q", "Q", "query", d, d, self.bias, heads)
            key = _linear(here, source, "k", "K", "key", d, d, self.bias, heads)
            yield from (query, key, value)
            yield Scores(scores, (query.place, key.place), d // heads, self.causal)
            yield Softmax(pattern, (scores,))
        running = self.kind == "uniform" and self.causal
        mixed = Mix(here.place("z"), (pattern, value.place), running)
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
    """W_out phi(W_in x); a gated unit (reglu, geglu, swiglu) is W_out (phi(W_gate x) * W_in x)."""

    d_ff: int
    activation: ActivationName | GatedName = "gelu"
    bias: bool = False
    name: str = "mlp"

    def __post_init__(self) -> None:
        expect_count("d_ff", self.d_ff)
        expect_choice("activation", self.activation, ACTIVATIONS)
        expect_flag("bias", self.bias)

    def operations(self, scope: Scope, source: str) -> Iterator[Operation]:
        here, d = scope.within(self.name), scope.d_model
        post = here.place("post")
        gated = GATES.get(self.activation)
        if gated:
            gate = _linear(here, source, "pre", "gate", "mlp_in", d, self.d_ff, self.bias)
            linear = _linear(here, source, "pre_linear", "in", "mlp_in", d, self.d_ff, self.bias)
            opened = Activate(here.place("gate"), (gate.place,), gated)
            yield from (gate, linear, opened, Multiply(post, (opened.place, linear.place)))
        else:
            pre = _linear(here, source, "pre", "in", "mlp_in", d, self.d_ff, self.bias)
            plain = cast(ActivationName, self.activation)
            yield from (pre, Activate(post, (pre.place,), plain))
        output = _linear(here, post, "", "out", "mlp_out", self.d_ff, d, self.bias)
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
    """x + scale branch(x), at the place `name`."""

    branch: Layer
    name: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        expect_finite("the residual scale", self.scale)

    def operations(self, scope: Scope, source: str) -> Iterator[Operation]:
        output = source
        for operation in self.branch.operations(scope, source):
            yield operation
            output = operation.place
        yield Add(scope.place(self.name), (source, output), self.scale)
