"""Blocks of draws from the real layers.

A block is a fixed number of draws computed on one thread, in chunks of one fixed shape that stay
in the processor's cache: in memory the generation of a weight and its product both wait for the
other's traffic.  Both sizes are set by the architecture and the type of device, not by what is
asked or by how attention works, so softmax and uniform versions of a question share tokens and
weights.  Every tensor has a stream keyed by (seed, block, path) that goes on from chunk to chunk,
so asking for more places changes no number.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from montecarlo.collapsed import SAMPLERS, Collapsed, chosen, collapses
from montecarlo.estimators import (
    PLAIN,
    Asked,
    allows_inputs,
    per_draw,
    places_of,
    question_of,
    shared,
    words,
)
from montecarlo.moments import Moments
from montecarlo.observables import TRANSFORMS
from nope import streams, transformer
from nope.architecture import Architecture
from nope.checks import expect_choice, expect_count
from nope.devices import DTYPES
from nope.init import Scheme, law_of
from nope.operations import Linear, Mix, Operation, Weight
from nope.questions import Question, Transform, Weights, given_weights, stream_key
from nope.tokens import GaussianTokens

BLOCK_ELEMENTS = 2**28
"""The steps of a block's draws together handle about this many numbers: under 1 s on one core."""
LARGEST_BLOCK = 2**11
CHUNK_ELEMENTS = {"cpu": 2**20}
"""A step of a chunk holds about this many numbers: 4 MiB in float32, where one draw is so small.

Measured at widths 64 to 768 on a core with 1 MiB of cache of its own and 32 MiB shared: half as
many cost 2%, a quarter 10%, and a whole block at once takes 1.3 to 2 times as long.
"""
DEVICE_CHUNK_ELEMENTS = 2**26
"""The same for an accelerator, which wants large batches: 256 MiB in float32."""
TALLY_ELEMENTS = 2**17
"""The moments are taken of about this many numbers at a time: 1 MiB in float64."""


@dataclass(frozen=True)
class Group:
    """What questions must share to be answered by the same draws, and how these are made.

    `sampler` is `real` or `collapsed`; each draw of the weights is given so many `inputs`.
    """

    architecture: Architecture
    init: Scheme
    given: Weights | None
    sampler: str = "real"
    inputs: int = 1

    @classmethod
    def of(cls, question: Question, conditions: Conditions | None = None) -> Group:
        """That of a question, drawn as `conditions` ask where the question allows it."""
        wished = conditions or Conditions()
        inputs = wished.inputs if allows_inputs(question) else 1
        sampler = chosen(question, wished.sampler, wished.device, inputs)
        return cls(question.architecture, question.init, question.given, sampler, inputs)

    @cached_property
    def _steps(self) -> list[int]:
        """Roughly how many numbers each step of one draw holds; blind to the kind of attention.

        They are its weights, inputs and output; `Mix` stands for all of attention's pairs.
        """
        vector = self.rows * self.architecture.d_model
        pairs = self.architecture.n_heads * self.architecture.n_ctx * self.rows
        operations = [o for o in self.architecture.operations if o.axes == "vector"]
        return [
            self._weights(o) + self._width(o) * self.rows + 2 * vector
            + (2 * pairs if isinstance(o, Mix) else 0)
            for o in operations
        ]  # fmt: skip

    def _weights(self, operation: Operation) -> int:
        return 0 if self.given else sum(math.prod(self._drawn(w)) for w in operation.weights)

    def _drawn(self, weight: Weight) -> tuple[int, ...]:
        """The shape of what is drawn for a weight."""
        collapsed = self.sampler == "collapsed" and collapses(
            weight, self.rows, self.architecture, self.init
        )
        return (self.rows, weight.fan_out) if collapsed else weight.shape

    @property
    def rows(self) -> int:
        """Positions of all the inputs that one draw of the weights is given."""
        return self.inputs * self.architecture.n_ctx

    def _width(self, operation: Operation) -> int:
        """The wider of what a map reads and makes; of another step, what it makes."""
        width = self.architecture.width(operation.place)
        return max(width, operation.weight.fan_in) if isinstance(operation, Linear) else width

    @property
    def elements(self) -> int:
        """Roughly how many numbers all steps of one draw handle."""
        return sum(self._steps)

    @property
    def working_set(self) -> int:
        """Roughly how many numbers one draw holds at a time."""
        return max(self._steps)

    @cached_property
    def block_size(self) -> int:
        """Draws per block: a power of two."""
        return min(LARGEST_BLOCK, _power_of_two(BLOCK_ELEMENTS // self.elements))

    def chunk_size(self, device: str = "cpu") -> int:
        """Draws computed at once on a type of device: a power of two that divides a block."""
        room = CHUNK_ELEMENTS.get(device.partition(":")[0], DEVICE_CHUNK_ELEMENTS)
        return min(self.block_size, _power_of_two(room // self.working_set))


def estimator(group: Group, asked: Asked) -> str:
    """How a question is answered beside the question: `plain`, or what differs from that."""
    ways = {
        "collapsed": group.sampler == "collapsed",
        f"{group.inputs} inputs per draw": group.inputs > 1,
        words(asked): words(asked) != PLAIN,
    }
    return ", ".join(way for way, so in ways.items() if so) or PLAIN


def _power_of_two(number: int) -> int:
    """The largest that is not above a number; 1 for 0."""
    return 1 << (max(1, number).bit_length() - 1)


@dataclass(frozen=True)
class Conditions:
    """What the bits of a block depend on besides the question: seed, device and dtype.

    `drawn_on` is the device whose generators draw, the same unless given: `cpu` gives any device
    the numbers that the CPU has, so that results agree within rounding.  `sampler` is one of
    `montecarlo.collapsed.SAMPLERS`, and `inputs` how many inputs each draw of the weights is given
    where a question allows more than one.
    """

    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    drawn_on: str | None = None
    sampler: str = "real"
    inputs: int = 1

    def __post_init__(self) -> None:
        expect_count("seed", self.seed, least=0)
        expect_choice("dtype", self.dtype, tuple(DTYPES))
        expect_choice("sampler", self.sampler, SAMPLERS)
        expect_count("inputs", self.inputs)

    @property
    def source(self) -> str:
        """The device whose generators draw."""
        return self.drawn_on or self.device

    @property
    def stream(self) -> str:
        """The name of the random numbers: the seed, and the device where that is another's."""
        return str(self.seed) if self.drawn_on is None else f"{self.seed} of {self.drawn_on}"


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
    """The values at `places` of all draws of block number `index`; see `chunks`."""
    found = list(chunks(group, places, index, conditions, transform))
    return {place: torch.cat([values[place] for values in found]) for place in places}


def chunks(
    group: Group,
    places: Sequence[str],
    index: int,
    conditions: Conditions,
    transform: Transform | None = None,
) -> Iterator[dict[str, Tensor]]:
    """The values at `places` in block number `index`, as `nope.transformer` shapes them.

    One dictionary per `chunk_size` draws; the inputs of a draw of the weights follow each other on
    the first axis.  `transform` is applied to the input vectors x_m; the weights are the same
    without it.
    """
    device, dtype = torch.device(conditions.device), DTYPES[conditions.dtype]
    generating = torch.device(conditions.source)
    network, size = group.architecture, group.chunk_size(conditions.source)

    @cache
    def source(path: str) -> streams.TorchSource:
        key = stream_key(conditions.seed, index, path)
        return streams.TorchSource(streams.generator(key, generating), generating, dtype)

    @cache
    def drawing(asked: Weight) -> Callable[[tuple[int, ...]], Tensor]:
        law = law_of(group.init, asked, group.architecture)
        return lambda shape: law.draw(source(asked.path), (size, *shape)).to(device)

    def product(weight: Callable[[Weight], Tensor]) -> transformer.Product:
        if group.sampler == "real":
            return transformer.products(weight)
        return Collapsed(group.architecture, group.init, lambda w, shape: drawing(w)(shape))

    @cache
    def fixed(asked: Weight) -> Tensor:
        return torch.tensor(given[asked.path], device=device, dtype=dtype).unsqueeze(0)

    given, tied = _given(group, places), _tied(group.architecture)
    each = (lambda asked: drawing(asked)(asked.shape)) if group.given is None else fixed
    for _ in range(group.block_size // size):
        weight = _once(each, tied)
        tokens = group.architecture.tokens.draw(
            source("embed"), size * group.inputs, network.n_ctx, network.d_model
        ).to(device)
        if transform is not None:
            x = transformer.evaluate(group.architecture, ["embed"], tokens, weight)["embed"]
            tokens = TRANSFORMS[transform](x)
            network = replace(group.architecture, tokens=GaussianTokens())  # its draws are x_m
        weights = shared(weight, product(weight), group.inputs)
        yield transformer.evaluate(network, places, tokens, *weights)


def _tied(architecture: Architecture) -> frozenset[str]:
    """The paths of the weights that several operations read."""
    read = Counter(w.path for operation in architecture.operations for w in operation.weights)
    return frozenset(path for path, times in read.items() if times > 1)


def _once(weight: Callable[[Weight], Tensor], tied: frozenset[str]) -> Callable[[Weight], Tensor]:
    """The same, giving what is tied again instead of drawing on."""
    kept: dict[str, Tensor] = {}

    def once(asked: Weight) -> Tensor:
        if asked.path not in tied:
            return weight(asked)
        if asked.path not in kept:
            kept[asked.path] = weight(asked)
        return kept[asked.path]

    return once


def _given(group: Group, places: Sequence[str]) -> Mapping[str, np.ndarray]:
    """The arrays of the weights that the questions at `places` fix, by path."""
    if group.given is None:
        return {}
    found: dict[str, np.ndarray] = {}
    for place in places:
        question = Question(group.architecture, group.init, place, "kernel", group.given)
        found |= given_weights(question)
    return found


@dataclass
class _Tally:
    """The moments of a question's statistic over the chunks of a block, in their order.

    The unit is a draw of the weights: what its inputs say is averaged.
    """

    asked: Asked
    inputs: int
    drawn: int
    pending: list[np.ndarray] = field(default_factory=list)
    moments: Moments | None = None
    failure: FloatingPointError | None = None

    def add(self, values: Mapping[Transform | None, Mapping[str, Tensor]]) -> None:
        """Take in a chunk, given as the places without and with the inputs transformed."""
        every = per_draw(self.asked, values).cpu().double().numpy()
        draws = every.reshape(-1, self.inputs, *every.shape[1:]).mean(1)
        self.failure = self.failure or _not_finite(draws, question_of(self.asked), self.drawn)
        self.drawn += len(draws)
        self.pending.append(draws)
        if len(self.pending) * draws.size >= TALLY_ELEMENTS:
            self._merge()

    def _merge(self) -> None:
        """Take the moments of what is pending, unless some of it is not finite."""
        if self.pending and self.failure is None:
            found = Moments.of(np.concatenate(self.pending))
            self.moments = found if self.moments is None else self.moments.merge(found)
        self.pending.clear()

    @property
    def found(self) -> Moments | FloatingPointError:
        self._merge()
        if self.failure is not None:
            return self.failure
        assert self.moments is not None, "a block has draws"
        return self.moments


def block(
    group: Group, questions: Sequence[Asked], index: int, conditions: Conditions
) -> list[Moments | FloatingPointError]:
    """The moments of every question's statistic over block number `index`.

    Where a statistic is not finite its place is taken by the error that says in which draw.
    """
    first = index * group.block_size
    tallies = [_Tally(asked, group.inputs, first) for asked in questions]
    with one_thread():
        for values in _values(group, questions, index, conditions):
            for tally in tallies:
                tally.add(values)
        return [tally.found for tally in tallies]


def _values(
    group: Group, questions: Sequence[Asked], index: int, conditions: Conditions
) -> Iterator[dict[Transform | None, dict[str, Tensor]]]:
    """The asked places with the inputs as drawn (None), and under each transformation asked for.

    One dictionary per chunk.  Streams give a tensor again, so each look draws its own weights and
    none is kept for the next.
    """
    transforms = {each: question_of(each).kind.transform for each in questions}
    looks = dict.fromkeys((None, *transforms.values()))
    asked = {
        look: tuple(dict.fromkeys(
            place
            for each, transform in transforms.items() if look in (None, transform)
            for place in places_of(each)
        ))
        for look in looks
    }  # fmt: skip
    every = {look: chunks(group, asked[look], index, conditions, look) for look in looks}
    for _ in range(group.block_size // group.chunk_size(conditions.source)):
        yield {look: next(values) for look, values in every.items()}


def _not_finite(draws: np.ndarray, question: Question, first: int) -> FloatingPointError | None:
    if np.isfinite(draws).all():
        return None
    judged = draws[:, :, question.judged]
    if np.isfinite(judged).all():
        return None
    draw, part, entry = (int(axis[0]) for axis in np.nonzero(~np.isfinite(judged)))
    value = judged[draw, part, entry]
    return FloatingPointError(
        f"expected finite {question.observable} at {question.place}, got {value} "
        f"in draw {first + draw} at position {question.positions[entry]}; "
        "use float64, or weights and tokens of a std nearer to 1"
    )
