"""What is known of the vector at a place: the law of a coordinate and of its squared norm.

The next Gaussian matrix only sees |x|^2, so each kind of vector says what `mean_square` =
|x|^2/width is, as a random variance.  Two remainders are kept apart: `dropped`, how far the CDF
of a coordinate may be off, and `norm_dropped`, how far that of a Gaussian of variance
|x|^2/width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import sympy as sp

from theory.formulas import laws
from theory.formulas.activations import ACTIVATIONS
from theory.laws.law import Family
from theory.laws.scale_mixtures import ScaleMixture, centred
from theory.laws.sphere import Squashed, sphere
from theory.laws.transformed import Transformed, gated_variance
from theory.laws.variance import (
    RandomVariance,
    cdf_effect,
    chi_square,
    gaussian_power,
    matched,
)
from theory.symbols import d, v, x

NO_CLOSED_FORM = "an average over a random variance that has no closed form"


class Vector(Protocol):
    """The vector at a place and a position."""

    @property
    def dropped(self) -> float:
        """The remainder of a coordinate's law."""

    @property
    def norm_dropped(self) -> float:
        """The remainder of `mean_square`, as the distance of CDFs that it causes."""

    @property
    def mean_square(self) -> RandomVariance:
        """|x|^2 over the width."""

    @property
    def kurtosis(self) -> float:
        """E x^4/(E x^2)^2 of a coordinate."""

    def family(self) -> Family:
        """The distribution of a coordinate."""


def mixture_family(variance: RandomVariance) -> Family:
    """The distribution of sqrt(V) Z: Gaussian, variance-gamma, or neither."""
    numbers = centred(variance)
    match variance.freedom:
        case np.inf:
            return Family(
                "Gaussian",
                numbers,
                laws.gaussian(),
                {"v": variance.mean},
                laws.gaussian_moments(),
            )
        case None:
            atoms = {0.0: variance.at_zero} if variance.at_zero else {}
            return Family("Gaussian scale mixture", numbers, atoms=atoms, reason=NO_CLOSED_FORM)
        case freedom:
            return Family(
                "symmetric variance-gamma",
                numbers,
                laws.variance_gamma(),
                {"v": variance.mean, "nu": freedom},
                laws.variance_gamma_moments(),
            )


@dataclass(frozen=True, eq=False)
class Isotropic:
    """x = sqrt(V) g: g standard normal in `width` dimensions and independent of V."""

    variance: RandomVariance
    width: int
    dropped: float = 0.0

    @property
    def norm_dropped(self) -> float:
        return self.dropped

    @cached_property
    def mean_square(self) -> RandomVariance:
        return self.variance.times(chi_square(float(self.width)))

    @property
    def kurtosis(self) -> float:
        return 3 * (1 + self.variance.central(2))

    def family(self) -> Family:
        return mixture_family(self.variance)


@dataclass(frozen=True, eq=False)
class Heads(Isotropic):
    """Heads side by side whose variances differ from head to head by a relative variance `own`.

    The law of a coordinate has all of it and drops as much, a squared norm its share per head.
    """

    own: float = 0.0
    n_heads: int = 1

    @property
    def norm_dropped(self) -> float:
        return self.dropped - cdf_effect(2) * self.own * (1 - 1 / self.n_heads)

    @cached_property
    def mean_square(self) -> RandomVariance:
        spread = self.variance.central(2) - self.own * (1 - 1 / self.n_heads)
        each = chi_square(float(self.width))
        return matched(self.variance.mean, spread).times(each)


@dataclass(frozen=True, eq=False)
class OfNorm:
    """A vector of which only the norm is known: enough for the next Gaussian matrix."""

    mean_square: RandomVariance
    norm_dropped: float
    dropped: float = np.nan
    kurtosis: float = 3.0

    def family(self) -> Family:
        raise NotImplementedError("expected a vector whose coordinates are known, got a norm only")


@dataclass(frozen=True, eq=False)
class Normalised:
    """sqrt(n) y/sqrt(|y|^2 + e) in the n dimensions that a norm leaves, up to its centring.

    `offset` is e, over the variance of a coordinate of y; `dimensions` is d - 1 for LayerNorm
    and d for RMSNorm, in symbols.
    """

    n: int
    offset: RandomVariance
    dimensions: sp.Expr
    width: int
    dropped: float = 0.0
    norm_dropped: float = 0.0

    @cached_property
    def mean_square(self) -> RandomVariance:
        """S/(S + e), S = |y|^2."""
        whole = chi_square(float(self.n)).scaled(self.n)
        if self.offset.mean == 0:
            return matched(1.0, 0.0)
        return whole.combined(lambda s, e: s / (s + e), self.offset)

    @property
    def kurtosis(self) -> float:
        square = self.mean_square
        return 3 * self.n / (self.n + 2) * (1 + square.central(2))

    def family(self) -> Family:
        name = "coordinate of a point on a sphere"
        if self.offset.mean:
            reason = f"with eps > 0 it is {NO_CLOSED_FORM}"
            return Family(f"{name}, shrunk by eps", Squashed(self.n, self.offset), reason=reason)
        moments = laws.sphere_moments(self.dimensions)
        parameters = {"d": float(self.width)}
        if self.n == 1:
            atoms = {-1.0: 0.5, 1.0: 0.5}
            return Family("two points", sphere(1), sp.Integer(0), parameters, moments, atoms)
        return Family(name, sphere(self.n), laws.sphere(self.dimensions), parameters, moments)


@dataclass(frozen=True, eq=False)
class Rotated:
    """A Haar matrix times a vector of constant norm: coordinates of a point on a sphere.

    `size` is the standard deviation of a coordinate; all `n` = max(fan_in, fan_out) coordinates
    make the sphere, of which `width` are kept.
    """

    size: float
    n: int
    width: int
    dropped: float = 0.0

    @property
    def _spread(self) -> float:
        """The relative variance of Beta(width/2, (n - width)/2), which |x|^2 is a multiple of."""
        return 2 * (self.n - self.width) / (self.width * (self.n + 2))

    @property
    def mean_square(self) -> RandomVariance:
        """The chi-square of the mean and the variance of that Beta law."""
        return matched(self.size**2, self._spread)

    @property
    def norm_dropped(self) -> float:
        """That Beta law has 2 (n - 2 width)/(width (n + 4)) of its spread as third moment."""
        third = 2 * self._spread * (self.n - 2 * self.width) / (self.width * (self.n + 4))
        return self.dropped + cdf_effect(3) * abs(third - 2 * self._spread**2)

    @property
    def kurtosis(self) -> float:
        return 3 * self.n / (self.n + 2)

    def family(self) -> Family:
        scaled = laws.sphere(d).subs(x, x / sp.sqrt(v)) / sp.sqrt(v)
        parameters = {"d": float(self.n), "v": self.size**2}
        moments = {k: e * v ** (k // 2) for k, e in laws.sphere_moments(d).items()}
        name = "coordinate of a point on a sphere"
        return Family(name, sphere(self.n, self.size), scaled, parameters, moments)


@dataclass(frozen=True, eq=False)
class Units:
    """The hidden units of an MLP: given V, i.i.d. phi(sqrt(V) Z), gated ones times sqrt(V) Z'."""

    variance: RandomVariance
    function: str
    width: int
    gated: bool = False
    base_dropped: float = 0.0

    @property
    def dropped(self) -> float:
        """Twice the Gaussian's where two roots count."""
        low = ACTIVATIONS[self.function].support[0]
        return self.base_dropped * (2 if np.isfinite(low) and low < 0 else 1)

    def _moments(self, order: int) -> np.ndarray:
        """E of a unit's power given V, at each value of V."""
        values = self.variance.values
        powers = gaussian_power(ACTIVATIONS[self.function], values, order)
        if self.gated:
            powers = powers * values ** (order / 2) * np.prod(np.arange(1.0, order, 2))
        return powers

    @cached_property
    def _conditional(self) -> tuple[RandomVariance, float, float]:
        """The mean of squares given V; relative variance and third moment about it."""
        second, fourth, sixth = (self._moments(order) for order in (2, 4, 6))
        weights = self.variance.weights
        spread = (weights @ (fourth / second**2) - 1) / self.width
        third = weights @ (sixth / second**3 - 3 * fourth / second**2 + 2) / self.width**2
        return self.variance.mapped(lambda _: second), float(spread), float(third)

    @cached_property
    def mean_square(self) -> RandomVariance:
        """A mean of `width` i.i.d. squares: the chi-square of its mean and variance."""
        mean, spread, _ = self._conditional
        return mean.times(matched(1.0, spread))

    @property
    def norm_dropped(self) -> float:
        _, spread, third = self._conditional
        return self.base_dropped + cdf_effect(3) * abs(third - 2 * spread**2)

    @property
    def kurtosis(self) -> float:
        second, fourth = (float(self.variance.weights @ self._moments(k)) for k in (2, 4))
        return fourth / second**2

    def family(self) -> Family:
        if self.gated:
            return self._gated_family()
        return (
            mixture_family(self.variance) if self.function == "identity" else self._plain_family()
        )

    def _gated_family(self) -> Family:
        variance = gated_variance(self.variance, self.function)
        atoms = {0.0: variance.at_zero} if variance.at_zero else {}
        reason = "an average over the gate that has no closed form"
        return Family(
            f"Gaussian times {self.function}", ScaleMixture(variance), atoms=atoms, reason=reason
        )

    def _plain_family(self) -> Family:
        name = f"{self.function} of a {mixture_family(self.variance).name}"
        numbers = Transformed(self.variance, self.function)
        atoms = {0.0: 0.5} if self.function == "relu" else {}
        reason = f"{self.function} has no inverse in elementary functions"
        if self.variance.freedom != np.inf:
            reason = "only that of a Gaussian is kept in symbols"
        elif self.function in laws.INVERSES:
            density, parameters = laws.transformed(self.function), {"v": self.variance.mean}
            moments = laws.relu_moments() if self.function == "relu" else {}
            return Family(name, numbers, density, parameters, moments, atoms)
        return Family(name, numbers, atoms=atoms, reason=reason)
