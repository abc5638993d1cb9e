"""What the input positions hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from nope.checks import expect_finite


@runtime_checkable
class Tokens(Protocol):
    """The law of the inputs x_m; `std` is that of one coordinate."""

    @property
    def std(self) -> float:
        """The standard deviation of one coordinate."""


@dataclass(frozen=True)
class GaussianTokens:
    """x_m ~ N(0, std^2 I), independent over positions."""

    std: float = 0.02

    def __post_init__(self) -> None:
        expect_finite("the tokens' std", self.std, positive=True)
