"""Gaussians of random variance: x = sqrt(V) Z, Z standard normal and independent of V.

Every distribution here is an instance of `scipy.stats.rv_continuous`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from scipy.special import ndtr

from theory.formula import compile_number_form
from theory.formulas.laws import variance_gamma
from theory.laws.variance import RandomVariance
from theory.symbols import nu, v, x


class Parametrised(stats.rv_continuous):
    """An `rv_continuous` with parameters of its own, that may be frozen and pickled."""

    def __init__(self, parameters: dict[str, Any], **options: Any) -> None:
        for name, value in parameters.items():
            setattr(self, name, value)
        self._parameters = parameters
        super().__init__(**{"name": type(self).__name__, **options})

    def _updated_ctor_param(self) -> dict[str, Any]:
        return {**super()._updated_ctor_param(), **self._parameters}


class ScaleMixture(Parametrised):
    """The law of sqrt(V) Z; where V may be 0 there is an atom at 0, which the CDF counts."""

    variance: RandomVariance

    def __init__(self, variance: RandomVariance, **options: Any) -> None:
        super().__init__({"variance": variance}, **options)

    def _pdf(self, x: np.ndarray) -> np.ndarray:
        def density(point: np.ndarray, value: np.ndarray) -> np.ndarray:
            return np.asarray(np.exp(-(point**2) / (2 * value)) / np.sqrt(2 * np.pi * value))

        return self.variance.average(density, x)

    def _cdf(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self._below(x) + self.variance.at_zero * (x >= 0))

    def _sf(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self._below(-x) + self.variance.at_zero * (x < 0))

    def _below(self, x: np.ndarray) -> np.ndarray:
        return self.variance.average(lambda point, value: ndtr(point / np.sqrt(value)), x)

    def _munp(self, n: int) -> float:
        """E V^(n/2) E Z^n, and 0 for odd n."""
        normal = np.prod(np.arange(1.0, n, 2)) if n % 2 == 0 else 0.0
        return float(normal * (self.variance.power(n / 2) if n else 1.0))

    def _ppf(self, q: np.ndarray) -> np.ndarray:
        """By symmetry from the upper tail, where the sf keeps its digits."""
        return np.asarray(np.sign(q - 0.5) * self._upper(np.minimum(q, 1 - q)))

    def _isf(self, q: np.ndarray) -> np.ndarray:
        return -self._ppf(q)

    def _upper(self, tail: np.ndarray) -> np.ndarray:
        """x >= 0 with sf(x) = tail <= 1/2; 0 where the atom begins."""
        unit, edge = np.sqrt(self.variance.mean), (1 - self.variance.at_zero) / 2

        def excess(x: float, p: float) -> float:
            return float(self._sf(np.array([x]))[0] - p)

        def root(p: float) -> float:
            high = unit
            while excess(high, p) > 0:
                high *= 2
            return float(brentq(excess, 0.0, high, args=(p,), xtol=1e-15 * unit))

        return np.array([0.0 if p >= edge else root(p) for p in tail])

    def _rvs(self, size: Any = None, random_state: Any = None) -> Any:
        law = self.variance
        chosen = random_state.choice(len(law.values), size=size, p=law.weights / law.weights.sum())
        normal = np.sqrt(law.values[chosen]) * random_state.standard_normal(size)
        return np.where(random_state.uniform(size=size) < law.at_zero, 0.0, normal)


class VarianceGamma(ScaleMixture):
    """V = v chi^2_nu/nu: a density in closed form, and exact random numbers."""

    def _pdf(self, x: np.ndarray) -> np.ndarray:
        law = self.variance
        return np.asarray(_variance_gamma_density()(x, law.mean, law.freedom))

    def _rvs(self, size: Any = None, random_state: Any = None) -> Any:
        law = self.variance
        chi = random_state.chisquare(law.freedom, size) / law.freedom
        return np.sqrt(law.mean * chi) * random_state.standard_normal(size)


@cache
def _variance_gamma_density() -> Any:
    return compile_number_form(variance_gamma(), (x, v, nu))


def centred(variance: RandomVariance) -> Any:
    """The distribution of sqrt(V) Z, in the most special form there is."""
    if variance.freedom == np.inf:
        return stats.norm(scale=np.sqrt(variance.mean))
    return ScaleMixture(variance) if variance.freedom is None else VarianceGamma(variance)
