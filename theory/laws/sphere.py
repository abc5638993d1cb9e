"""A normalised Gaussian: coordinates of a point on a sphere, and what eps makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from theory.laws.scale_mixtures import Parametrised, centred
from theory.laws.variance import RandomVariance, chi_square


def sphere(n: int, size: float = 1.0) -> Any:
    """The distribution of size sqrt(n) t, t a coordinate of a uniform point of S^(n-1).

    SciPy's R-distribution, which says (1 - t^2)^((n-3)/2); at n = 1 the two points +-1.
    """
    if n == 1:
        return stats.rv_discrete(values=([-size, size], [0.5, 0.5]))
    return stats.rdist(n - 1, scale=size * np.sqrt(n))


class Squashed(Parametrised):
    """A coordinate of sqrt(n) y/sqrt(|y|^2 + e), y = (g_1, ..., g_n) standard normal, e random.

    With C = g_2^2 + ... + g_n^2 it is sqrt(n) u/sqrt(1 + u^2) of u = g_1/sqrt(C + e), and u is a
    Gaussian of random variance 1/(C + e): no singularity at the ends is integrated over.
    """

    n: int
    offset: RandomVariance

    def __init__(self, n: int, offset: RandomVariance, **options: Any) -> None:
        rest = offset
        if n > 1:
            rest = chi_square(n - 1).scaled(n - 1).plus(offset)
        self._gaussian = centred(rest.mapped(lambda c: 1 / c))
        whole = chi_square(n).scaled(n)
        self._shrink = whole.combined(lambda s, e: s / (s + e), offset)
        ends = {"a": -np.sqrt(n), "b": np.sqrt(n)}
        super().__init__({"n": n, "offset": offset}, **{**ends, **options})

    def _before(self, x: np.ndarray) -> np.ndarray:
        """u: x/sqrt(n - x^2)."""
        return np.asarray(x / np.sqrt((np.sqrt(self.n) - x) * (np.sqrt(self.n) + x)))

    def _pdf(self, x: np.ndarray) -> np.ndarray:
        u = self._before(x)
        return np.asarray(self._gaussian.pdf(u) * (1 + u**2) ** 1.5 / np.sqrt(self.n))

    def _cdf(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self._gaussian.cdf(self._before(x)))

    def _sf(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self._gaussian.sf(self._before(x)))

    def _ppf(self, q: np.ndarray) -> np.ndarray:
        u = self._gaussian.ppf(q)
        return np.asarray(np.sqrt(self.n) * u / np.sqrt(1 + u**2))

    def _isf(self, q: np.ndarray) -> np.ndarray:
        return -self._ppf(q)

    def _munp(self, n: int) -> float:
        """E t^n, that of the sphere, times E (S/(S + e))^(n/2), S = |y|^2."""
        return float(sphere(self.n).moment(n)) * self._shrink.power(n / 2) if n else 1.0

    def _rvs(self, size: Any = None, random_state: Any = None) -> Any:
        u = self._gaussian.rvs(size=size, random_state=random_state)
        return np.sqrt(self.n) * u / np.sqrt(1 + u**2)
