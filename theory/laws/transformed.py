"""Functions of a Gaussian of random variance: activations and gated units.

Between its turning point and its ends an activation is monotone, so that the CDF is that of the
Gaussian at one or two roots, and exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import brentq

from theory.formulas.activations import ACTIVATIONS, Activation
from theory.formulas.mehler import half_line
from theory.laws.scale_mixtures import Parametrised, centred
from theory.laws.variance import GAUSS, RandomVariance, gaussian_power


class Transformed(Parametrised):
    """The law of phi(sqrt(V) Z); `pdf` is the density beside the atom that a ReLU has at 0."""

    variance: RandomVariance
    function: str

    def __init__(self, variance: RandomVariance, function: str, **options: Any) -> None:
        self._gaussian = centred(variance)
        low, high = ACTIVATIONS[function].support
        # SciPy takes a CDF for 0 at the lower end itself, where a ReLU has its atom.
        ends = {"a": np.nextafter(low, -np.inf) if function == "relu" else low, "b": high}
        super().__init__({"variance": variance, "function": function}, **{**ends, **options})

    @property
    def _phi(self) -> Activation:
        return ACTIVATIONS[self.function]

    def _pdf(self, x: np.ndarray) -> np.ndarray:
        risen = self._density_at(self._phi.risen(x), x)
        return np.asarray(risen + self._of_fallen(x, self._density_at))

    def _density_at(self, root: np.ndarray, x: np.ndarray) -> np.ndarray:
        density, slope = self._gaussian.pdf(root), np.abs(self._phi.slope(root))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(density > 0, density / slope, 0.0)

    def _of_fallen(
        self, x: np.ndarray, of: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """`of` the left root, and 0 where there is none."""
        values = np.zeros(np.shape(x))
        if self._phi.near is not None:
            has = x < 0
            values[has] = of(self._phi.fallen(x[has]), x[has])
        return values

    def _cdf(self, x: np.ndarray) -> np.ndarray:
        left = self._of_fallen(x, lambda root, _: self._gaussian.cdf(root))
        return np.asarray(self._gaussian.cdf(self._phi.risen(x)) - left)

    def _sf(self, x: np.ndarray) -> np.ndarray:
        left = self._of_fallen(x, lambda root, _: self._gaussian.cdf(root))
        return np.asarray(self._gaussian.sf(self._phi.risen(x)) + left)

    def _ppf(self, q: np.ndarray) -> np.ndarray:
        """phi of the Gaussian's quantile, unless values below 0 come from both sides."""
        values = self._phi(self._gaussian.ppf(q))
        low = self._phi.support[0]
        if self._phi.near is not None and low < 0:
            both = q < self._gaussian.cdf(0.0)
            values[both] = [self._negative_quantile(p, low) for p in q[both]]
        return values

    def _negative_quantile(self, q: float, low: float) -> float:
        def excess(y: float) -> float:
            return float(self._cdf(np.array([y]))[0] - q)

        if excess(low) >= 0:
            return low  # nearer to the end of the support than that is known
        return float(brentq(excess, low, 0.0, xtol=1e-300, maxiter=2000))

    def _munp(self, n: int) -> float:
        return float(gaussian_power(self._phi, self.variance.values, n) @ self.variance.weights)

    def _rvs(self, size: Any = None, random_state: Any = None) -> Any:
        return self._phi(self._gaussian.rvs(size=size, random_state=random_state))


def gated_variance(variance: RandomVariance, function: str) -> RandomVariance:
    """V phi(sqrt(V) Z)^2: given the input and its gate, a gated unit is Gaussian of this variance.

    A ReLU's gate is closed half of the time: V is 0.
    """
    phi, (z, weights) = ACTIVATIONS[function], half_line()
    variance = variance.compressed(largest=GAUSS[0])
    opened = phi(np.sqrt(variance.values)[:, None] * np.concatenate([-z, z]))
    values = (variance.values[:, None] * opened**2).ravel()
    shares = np.outer(variance.weights, np.concatenate([weights, weights]) / 2).ravel()
    return RandomVariance(values[values > 0], shares[values > 0])
