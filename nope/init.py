"""Initialisation schemes as data: per weight a variance, a kurtosis and a way to draw.

A scheme maps a `Weight` of an `Architecture` to a `WeightLaw`.  The theory reads `variance`
and `kurtosis`; a sampler calls `draw` with a `Source` of its own numbers, so this module
needs neither torch nor a random number generator.

>>> from nope import decoder
>>> architecture = decoder(768, 12, n_ctx=4, n_layers=12)
>>> law = gpt2().law(architecture.weights[3], architecture)
>>> architecture.weights[3].path, round(law.variance * 24 / 0.02**2, 12)
('blocks.0.attn.W_O', 1.0)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from nope.architecture import Architecture
from nope.checks import expect_finite
from nope.operations import Weight


@runtime_checkable
class Source(Protocol):
    """Where random numbers come from: an array library with a generator and a place to put them."""

    def normal(self, shape: tuple[int, ...], std: float) -> Any:
        """Independent N(0, std^2)."""

    def zeros(self, shape: tuple[int, ...]) -> Any:
        """All zero."""


@runtime_checkable
class WeightLaw(Protocol):
    """The law of one weight array with independent zero-mean entries."""

    @property
    def variance(self) -> float:
        """E w^2."""

    @property
    def kurtosis(self) -> float:
        """E w^4 / (E w^2)^2."""

    def draw(self, source: Source, shape: tuple[int, ...]) -> Any:
        """Fresh arrays; leading axes are independent draws."""


@dataclass(frozen=True)
class Normal:
    """w ~ N(0, std^2)."""

    std: float
    kurtosis: ClassVar[float] = 3.0

    def __post_init__(self) -> None:
        expect_finite("the weights' std", self.std)

    @property
    def variance(self) -> float:
        return self.std**2

    def draw(self, source: Source, shape: tuple[int, ...]) -> Any:
        return source.normal(shape, self.std)


@dataclass(frozen=True)
class Zero:
    """w = 0: biases, in every scheme but torch's defaults."""

    variance: ClassVar[float] = 0.0
    kurtosis: ClassVar[float] = math.nan

    def draw(self, source: Source, shape: tuple[int, ...]) -> Any:
        return source.zeros(shape)


@runtime_checkable
class Scheme(Protocol):
    """An initialisation: the law of each weight of an architecture."""

    def law(self, weight: Weight, architecture: Architecture) -> WeightLaw:
        """The law of `weight` in `architecture`."""


@dataclass(frozen=True)
class IndependentNormal:
    """Every matrix N(0, std^2), every bias 0."""

    std: float

    def __post_init__(self) -> None:
        expect_finite("the weights' std", self.std)

    def law(self, weight: Weight, architecture: Architecture) -> WeightLaw:
        return Zero() if weight.role == "bias" else Normal(self.std)


@dataclass(frozen=True)
class GPT2:
    """N(0, std^2); projections into the stream divided by sqrt(number of residual additions).

    Source: Radford et al. 2019, section 2.3.
    """

    std: float = 0.02

    def __post_init__(self) -> None:
        expect_finite("the weights' std", self.std)

    def law(self, weight: Weight, architecture: Architecture) -> WeightLaw:
        if weight.role == "bias":
            return Zero()
        into_stream = weight.role in ("output", "mlp_out")
        return Normal(
            self.std / math.sqrt(architecture.n_residual or 1) if into_stream else self.std
        )


def normal(std: float) -> Scheme:
    """Every weight matrix N(0, std^2), biases 0.  Raises `ValueError` for a negative std."""
    return IndependentNormal(std)


def gpt2(std: float = 0.02) -> Scheme:
    """GPT-2's: N(0, std^2), with std / sqrt(2 n_layers) for projections into the stream."""
    return GPT2(std)
