"""The real layers in torch, batched over independent draws of weights and inputs.

`evaluate` computes the asked places of an architecture and nothing they do not need.
Shapes: a vector place is `draws positions d`; q, k and v are `draws heads positions d_head`;
scores and pattern are `draws heads queries keys`, with -inf and 0 above the diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial, singledispatch
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from nope.architecture import Architecture
from nope.operations import (
    Activate,
    Add,
    Average,
    Embed,
    Linear,
    Mix,
    Multiply,
    Normalise,
    Operation,
    Scores,
    Softmax,
    Uniform,
    Weight,
)
from nope.tokens import BOS, TABLE

Product = Callable[[Tensor, Linear], Tensor]
"""x W of a map: from `draws positions fan_in` to `draws positions fan_out`."""


class Weights(NamedTuple):
    """What operations want of weights: the array of one, and the product with a map's matrix."""

    array: Callable[[Weight], Tensor]
    product: Product


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "identity": lambda x: x,
}


def evaluate(
    architecture: Architecture,
    places: Iterable[str],
    tokens: Float[Tensor, "draws positions d_model"] | Integer[Tensor, "draws positions"],
    weight: Callable[[Weight], Tensor],
    product: Product | None = None,
) -> dict[str, Tensor]:
    """The values at `places`.

    `tokens` are what `Tokens.draw` gives: the inputs x_m, or the ids of their rows.  `weight`
    gives the array of a weight, `draws fan_in fan_out`, or with a leading 1 when all draws
    share it; `product` what a map makes of its input before the bias, where that is not the
    product with the array.  Raises `LookupError` for an unknown place.
    """
    weights = Weights(weight, product or products(weight))
    wanted = tuple(places)
    needed = {o.place for place in wanted for o in architecture.upstream(place)}
    steps = [operation for operation in architecture.operations if operation.place in needed]
    last_use = {name: step for step, operation in enumerate(steps) for name in operation.inputs}
    values: dict[str, Tensor] = {}
    for step, operation in enumerate(steps):
        inputs = [values[name] for name in operation.inputs] or [tokens]
        values[operation.place] = apply(operation, inputs, weights)
        for name in set(operation.inputs).difference(wanted):
            if last_use[name] == step:
                del values[name]
    return {place: values[place] for place in wanted}


@singledispatch
def apply(operation: Operation, inputs: list[Tensor], weights: Weights) -> Tensor:
    """What `operation` does to its inputs."""
    raise NotImplementedError(f"no torch layer for {type(operation).__name__}; register one")


@apply.register
def _(operation: Embed, inputs: list[Tensor], weights: Weights) -> Tensor:
    x = inputs[0]
    arrays = {weight.path: weights.array(weight) for weight in operation.weights}
    if TABLE in arrays:
        x = _rows(arrays[TABLE], x)
    if BOS in arrays:
        x = torch.cat([arrays[BOS].expand(len(x), -1, -1), x], 1)
    return x


def _rows(
    table: Float[Tensor, "tables vocabulary d_model"], ids: Integer[Tensor, "draws positions"]
) -> Float[Tensor, "draws positions d_model"]:
    """The rows that the ids name, each draw's in its own table or all in the one they share."""
    tables = torch.arange(len(table), device=table.device).unsqueeze(1)
    return table[tables, ids.long()]


@apply.register
def _(operation: Normalise, inputs: list[Tensor], weights: Weights) -> Tensor:
    x = inputs[0]
    norm = F.layer_norm if operation.kind == "layernorm" else F.rms_norm
    return norm(x, (x.shape[-1],), eps=operation.eps)


@apply.register
def _(operation: Linear, inputs: list[Tensor], weights: Weights) -> Tensor:
    y = weights.product(inputs[0], operation)
    if operation.bias is not None:
        y = y + weights.array(operation.bias).unsqueeze(-2)
    if operation.n_heads is not None:
        split = y.view(*y.shape[:2], operation.n_heads, -1)
        return split.transpose(1, 2)  # draws heads positions d_head
    return y


def products(weight: Callable[[Weight], Tensor]) -> Product:
    """The products with the arrays themselves."""
    return lambda x, linear: multiply(x, weight(linear.weight))


def multiply(x: Tensor, w: Tensor) -> Tensor:
    """x W per draw; one plain product when all draws share W."""
    return x @ w[0] if w.shape[0] == 1 else torch.bmm(x, w)


@apply.register
def _(operation: Scores, inputs: list[Tensor], weights: Weights) -> Tensor:
    q, k = inputs
    draws, heads, length, d_head = q.shape
    if operation.causal:
        mask = torch.full((length, length), -math.inf, device=q.device, dtype=q.dtype).triu_(1)
    else:
        mask = torch.zeros(length, length, device=q.device, dtype=q.dtype)
    flat = torch.baddbmm(
        mask,
        q.reshape(draws * heads, length, d_head),
        k.reshape(draws * heads, length, d_head).transpose(1, 2),
        alpha=1 / math.sqrt(d_head),
    )
    return flat.view(draws, heads, length, length)


@apply.register
def _(operation: Softmax, inputs: list[Tensor], weights: Weights) -> Tensor:
    return inputs[0].softmax(-1)


@apply.register
def _(operation: Uniform, inputs: list[Tensor], weights: Weights) -> Tensor:
    draws, heads, length, _ = inputs[0].shape
    ones = torch.ones(length, length, device=inputs[0].device, dtype=inputs[0].dtype)
    rows = ones.tril_() / _counts(inputs[0]) if operation.causal else ones / length
    return rows.expand(draws, heads, length, length)


@apply.register
def _(operation: Mix, inputs: list[Tensor], weights: Weights) -> Tensor:
    pattern, v = inputs
    z = v.cumsum(-2) / _counts(v) if operation.uniform else pattern @ v
    return z.transpose(1, 2).flatten(2)  # draws positions d_model


@apply.register
def _(operation: Average, inputs: list[Tensor], weights: Weights) -> Tensor:
    return inputs[0].cumsum(-2) / _counts(inputs[0])


def _counts(x: Tensor) -> Tensor:
    """1, 2, ..., n_ctx as a column beside the positions of x."""
    return torch.arange(1, x.shape[-2] + 1, device=x.device, dtype=x.dtype).unsqueeze(-1)


@apply.register
def _(operation: Activate, inputs: list[Tensor], weights: Weights) -> Tensor:
    return ACTIVATIONS[operation.function](inputs[0])


@apply.register
def _(operation: Multiply, inputs: list[Tensor], weights: Weights) -> Tensor:
    return inputs[0] * inputs[1]


@apply.register
def _(operation: Add, inputs: list[Tensor], weights: Weights) -> Tensor:
    return torch.add(*inputs, alpha=operation.scale)
