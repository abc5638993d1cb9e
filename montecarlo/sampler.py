"""Blocks of draws from the real layers.

A block is a fixed number of draws computed in one fixed shape on one thread.  Its size is set
by the architecture alone, not by what is asked of it or by how attention works, so softmax
and uniform versions of a question share tokens and weights.  Every tensor has a stream keyed
by (seed, block, path), so asking for more places changes no number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from montecarlo.moments import Moments
from montecarlo.observables import STATISTICS, TRANSFORMS
from nope import streams, transformer
from nope.architecture import Architecture
from nope.checks import expect_count
from nope.devices import DTYPES
from nope.init import Scheme, law_of
from nope.operations import Activate, Mix, Weight
from nope.questions import Question, Transform, Weights, given_weights, stream_key
from nope.tokens import GaussianTokens

BLOCK_ELEMENTS = 2**26
"""A block's tensors together hold about this many numbers."""
LARGEST_BLOCK = 2**11


@dataclass(frozen=True)
class Group:
    """What questions must share to be answered by the same draws."""

    architecture: Architecture
    init: Scheme
    given: Weights | None

    @classmethod
    def of(cls, question: Question) -> Group:
        return cls(question.architecture, question.init, question.given)

    @property
    def elements(self) -> int:
        """Roughly how many numbers one draw holds; blind to the kind of attention."""
        d, length = self.architecture.d_model, self.architecture.n_ctx
        shared = () if self.given else self.architecture.tokens.weights(d)
        total = 4 * length * d + sum(math.prod(weight.shape) for weight in shared)
        for operation in self.architecture.operations:
            if isinstance(operation, Mix):
                weights = 0 if self.given else 4 * d * d
                total += weights + 4 * length * d + self.architecture.n_heads * length**2
            elif isinstance(operation, Activate):
                width = self.architecture.width(operation.place)
                total += (0 if self.given else 2 * d * width) + 2 * length * width
        return total

    @property
    def block_size(self) -> int:
        """Draws per block: a power of two."""
        fitting = max(1, BLOCK_ELEMENTS // self.elements)
        return min(LARGEST_BLOCK, 1 << (fitting.bit_length() - 1))


@dataclass(frozen=True)
class Conditions:
    """What the bits of a block depend on besides the question: seed, device and dtype."""

    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        expect_count("seed", self.seed, least=0)


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread and full-precision products: sums in one order, on any machine."""
    threads, tf32 = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(tf32)


def sample(
    group: Group,
    places: Sequence[str],
    index: int,
    conditions: Conditions,
    transform: Transform | None = None,
) -> dict[str, Tensor]:
    """The values at `places` in block number `index`, as `nope.transformer` shapes them.

    `transform` is applied to the input vectors x_m; the weights are the same without it.
    """
    device, dtype = torch.device(conditions.device), DTYPES[conditions.dtype]

    def source(path: str) -> streams.TorchSource:
        key = stream_key(conditions.seed, index, path)
        return streams.TorchSource(streams.generator(key, device), device, dtype)

    architecture, size = group.architecture, group.block_size
    tokens = architecture.tokens.draw(
        source("embed"), size, architecture.n_ctx, architecture.d_model
    )
    weight: Callable[[Weight], Tensor]
    if group.given is None:

        def weight(asked: Weight) -> Tensor:
            law = law_of(group.init, asked, architecture)
            drawn: Tensor = law.draw(source(asked.path), (size, *asked.shape))
            return drawn
    else:
        fixed: dict[str, np.ndarray] = {}
        for place in places:
            fixed |= given_weights(Question(architecture, group.init, place, "kernel", group.given))

        def weight(asked: Weight) -> Tensor:
            return torch.tensor(fixed[asked.path], device=device, dtype=dtype).unsqueeze(0)

    network = architecture
    if transform is not None:
        x = transformer.evaluate(architecture, ["embed"], tokens, weight)["embed"]
        tokens = TRANSFORMS[transform](x)
        network = replace(architecture, tokens=GaussianTokens())  # whose draws are vectors x_m
    return transformer.evaluate(network, places, tokens, weight)


def block(
    group: Group, questions: Sequence[Question], index: int, conditions: Conditions
) -> list[Moments | FloatingPointError]:
    """The moments of every question's statistic over block number `index`.

    Where a statistic is not finite its place is taken by the error that says in which draw.
    """
    with one_thread():
        values = _values(group, questions, index, conditions)
        found: list[Moments | FloatingPointError] = []
        for question in questions:
            components = STATISTICS[question.observable].components
            looks = dict.fromkeys((None, question.kind.transform))
            arrays = [values[look][question.place] for look in looks]
            draws = components(*arrays, question).cpu().double().numpy()
            found.append(
                _not_finite(draws, question, index * group.block_size) or Moments.of(draws)
            )
    return found


def _values(
    group: Group, questions: Sequence[Question], index: int, conditions: Conditions
) -> dict[Transform | None, dict[str, Tensor]]:
    """The asked places with the inputs as drawn (None), and under each transformation asked for.

    Its streams give a tensor again, so each look draws its own and none is kept for the next.
    """
    looks = dict.fromkeys((None, *(question.kind.transform for question in questions)))
    asked = {
        look: tuple(dict.fromkeys(q.place for q in questions if look in (None, q.kind.transform)))
        for look in looks
    }
    return {look: sample(group, asked[look], index, conditions, look) for look in looks}


def _not_finite(draws: np.ndarray, question: Question, first: int) -> FloatingPointError | None:
    judged = draws[:, :, question.judged]
    if np.isfinite(judged).all():
        return None
    draw, part, entry = (int(axis[0]) for axis in np.nonzero(~np.isfinite(judged)))
    value = judged[draw, part, entry]
    return FloatingPointError(
        f"expected finite {question.observable} at {question.place}, got {value} "
        f"in draw {first + draw} at position {question.positions[entry]}; "
        "use float64 or a smaller std"
    )
