"""A random variance: what turns a Gaussian into the law of a coordinate.

Given the inputs, a coordinate behind a Gaussian weight matrix is N(0, V) with V the weights'
variance times the input's squared norm.  Over inputs V is random, x = sqrt(V) Z, and everything
asked of x is an expectation over V.  Here V is a quadrature rule, its values and their weights:
for a chi-square the trapezoidal rule in log V, which for such integrands (analytic, and falling
exponentially at both ends) converges exponentially: full precision with some 50 values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np

from theory.formulas.mehler import half_line

LARGEST_VARIANCE = 1e4
"""Relative, of a variance that is fitted by two moments."""
NEGLIGIBLE = 1e-12
"""Remainders below this are rounding, not something dropped."""

LEFT, RIGHT = 41.0, 200.0
"""Values are kept where the density is above e^-LEFT of its top, and far to the right, where they
make the tail of a law: there down to e^-RIGHT."""

LARGEST_STEP = 0.2
"""The step in log V: its error is about exp(-pi^2/step) at few degrees of freedom, 1e-20."""

LARGEST, GAUSS = 512, (32, 256)
"""More values than `LARGEST` are replaced by Gauss's rule, of a size in the range `GAUSS`."""

BLOCK = 2**22
"""At most this many numbers at once in an average over points and values."""


@dataclass(frozen=True, eq=False)
class RandomVariance:
    """The law of V >= 0: E f(V) = sum of weights f(values).

    Weights that sum to less than 1 leave the rest to V = 0.  `freedom` is nu where V is exactly
    a multiple of chi^2_nu, infinity for a constant, and None for neither.
    """

    values: np.ndarray
    weights: np.ndarray
    freedom: float | None = None

    @cached_property
    def mean(self) -> float:
        """E V."""
        return float(self.weights @ self.values)

    @cached_property
    def at_zero(self) -> float:
        """P(V = 0)."""
        missing = 1.0 - float(self.weights.sum())
        return missing if missing > NEGLIGIBLE else 0.0

    def central(self, order: int) -> float:
        """E (V/E V - 1)^order: at order 2 the relative variance."""
        deviation = self.values / self.mean - 1
        return float(self.weights @ deviation**order) + self.at_zero * (-1.0) ** order

    def power(self, order: float) -> float:
        """E V^order."""
        return float(self.weights @ self.values**order)

    def scaled(self, factor: float) -> RandomVariance:
        """The law of factor V."""
        return replace(self, values=factor * self.values)

    def mapped(self, function: Callable[[np.ndarray], np.ndarray]) -> RandomVariance:
        """The law of function(V)."""
        freedom = np.inf if self.freedom == np.inf else None
        return RandomVariance(function(self.values), self.weights, freedom)

    def shrunk(self, offset: float) -> RandomVariance:
        """The law of V/(V + offset)."""
        return self.mapped(lambda values: values / (values + offset))

    def combined(
        self, function: Callable[[np.ndarray, np.ndarray], np.ndarray], other: RandomVariance
    ) -> RandomVariance:
        """The law of function(V, U), U another variance, independent of V."""
        constants = self.freedom == other.freedom == np.inf
        values = function(self.values[:, None], other.values).ravel()
        weights = np.outer(self.weights, other.weights).ravel()
        return RandomVariance(values, weights, np.inf if constants else None).compressed()

    def compressed(self, largest: int = LARGEST) -> RandomVariance:
        """Gauss's rule for the same law where there are more than `largest` values.

        In log V, by Stieltjes' recursion for its orthogonal polynomials; 128 standard deviations
        of log V make a CDF to 1e-13 from 4 degrees of freedom on, to 1e-10 from 1.
        """
        if len(self.values) <= largest:
            return self
        total = self.weights.sum()
        t, weights = np.log(self.values), self.weights / total
        middle, unit = (t.max() + t.min()) / 2, np.ptp(t) / 4
        size = int(np.clip(128 * np.sqrt(weights @ (t - weights @ t) ** 2), *GAUSS))
        nodes, shares = _gauss((t - middle) / unit, weights, size)
        return replace(self, values=np.exp(middle + unit * nodes), weights=total * shares)

    def times(self, other: RandomVariance) -> RandomVariance:
        """The law of the product with an independent variance."""
        product = self.combined(np.multiply, other)
        if np.inf in (self.freedom, other.freedom):
            kept = other.freedom if self.freedom == np.inf else self.freedom
            return replace(product, freedom=kept)
        return product

    def plus(self, other: RandomVariance) -> RandomVariance:
        """The law of the sum with an independent variance."""
        return self if other.mean == 0 else self.combined(np.add, other)

    def average(
        self, function: Callable[[np.ndarray, np.ndarray], np.ndarray], x: np.ndarray
    ) -> np.ndarray:
        """E f(x, V) over V > 0 at every point; `function` takes a column x and a row of values."""
        points = np.atleast_1d(np.asarray(x, dtype=float))
        flat = points.ravel()
        size = max(1, BLOCK // len(self.values))
        parts = [
            function(flat[start : start + size, None], self.values) @ self.weights
            for start in range(0, len(flat), size)
        ]
        return np.concatenate(parts).reshape(points.shape) if parts else points


def _gauss(u: np.ndarray, weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of Gauss's rule for a discrete law; u in an interval of length 4."""
    from scipy.linalg import eigh_tridiagonal

    diagonal, beside = np.zeros(size), np.zeros(size)
    before, polynomial = np.zeros_like(u), np.ones_like(u)
    for k in range(size):
        diagonal[k] = weights @ (u * polynomial**2)
        following = (u - diagonal[k]) * polynomial - beside[k - 1] * before
        beside[k] = np.sqrt(weights @ following**2)
        before, polynomial = polynomial, following / beside[k]
    nodes, vectors = eigh_tridiagonal(diagonal, beside[:-1])
    return nodes, vectors[0] ** 2


def constant(value: float) -> RandomVariance:
    """V = value: a Gaussian."""
    return RandomVariance(np.array([value]), np.ones(1), np.inf)


@cache
def chi_square(freedom: float) -> RandomVariance:
    """V = chi^2_nu/nu, of mean 1 and relative variance 2/nu, for any real nu > 0.

    log V has the density proportional to exp((nu/2)(t - e^t)).
    """
    step = min(LARGEST_STEP, 0.6 * np.sqrt(2 / freedom))
    left = 2 * np.sqrt(LEFT / freedom) + 2 * LEFT / freedom
    right = min(2 * np.sqrt(RIGHT / freedom), np.log1p(2 * RIGHT / freedom) + 3)
    t = step * np.arange(-np.ceil(left / step), np.ceil(right / step) + 1)
    weights = np.exp(freedom / 2 * (t + 1 - np.exp(t)))
    weights /= weights.sum()
    kept = (weights > 0) & (t > -700)  # far below 1 degree of freedom V underflows
    return RandomVariance(np.exp(t[kept]), weights[kept], float(freedom))


def matched(mean: float, relative_variance: float) -> RandomVariance:
    """The multiple of a chi-square with this mean and relative variance, nu = 2/variance.

    Raises `NotImplementedError` above `LARGEST_VARIANCE`, where values span thousands of orders.
    """
    if relative_variance < NEGLIGIBLE:
        return constant(mean)
    if not relative_variance <= LARGEST_VARIANCE:
        raise NotImplementedError(
            f"expected a relative variance of |x|^2 of at most {LARGEST_VARIANCE:g}, got "
            f"{relative_variance:.3g}; give the stack norms, or smaller weights"
        )
    return chi_square(2 / relative_variance).scaled(mean)


def either(first: RandomVariance, second: RandomVariance, share: float) -> RandomVariance:
    """The first with probability 1 - share, the second with probability `share`."""
    return RandomVariance(
        np.concatenate([first.values, second.values]),
        np.concatenate([(1 - share) * first.weights, share * second.weights]),
    )


def log_laplace(freedom: float, z: np.ndarray) -> np.ndarray:
    """log of Gamma(a)/2 E exp(-z^2/(4 T)), T ~ Gamma(a) and a = freedom/2."""
    law = chi_square(freedom)
    exponent = -(z[:, None] ** 2) / (2 * freedom * law.values) + np.log(law.weights)
    top = exponent.max(1)
    total = np.log(np.exp(exponent - top[:, None]).sum(1))
    from scipy.special import gammaln

    return np.asarray(gammaln(freedom / 2) - np.log(2) + top + total)


def gaussian_power(
    function: Callable[[np.ndarray], np.ndarray], variances: np.ndarray, order: int
) -> np.ndarray:
    """E f(sqrt(v) Z)^order for each variance v."""
    z, weights = half_line()
    points = np.sqrt(np.atleast_1d(variances))[:, None] * z
    return np.asarray((function(points) ** order + function(-points) ** order) @ weights / 2)


# -------------------------------------------------------- what a wrong variance does to a CDF


@cache
def cdf_effect(order: int) -> float:
    """sup over x of |d^k/dV^k Phi(x/sqrt(V))| / k! at V = 1.

    Phi(x/sqrt(V)) solves the heat equation in V, so the derivative is that of order 2k in x over
    2^k: sup |He_(2k-1) phi| / (2^k k!), attained at a zero of He_(2k).  A wrong k-th moment of
    V about its mean, relative to it, moves the CDF by that much: .121 for the mean, .0688 for
    the variance (a third of the excess kurtosis), .0481 for the third.
    """
    hermite = np.polynomial.hermite_e.HermiteE.basis(2 * order - 1)
    zeros = np.polynomial.hermite_e.HermiteE.basis(2 * order).roots()
    density = np.exp(-np.square(zeros) / 2) / np.sqrt(2 * np.pi)
    return float(np.abs(hermite(zeros) * density).max() / 2**order / math.factorial(order))
