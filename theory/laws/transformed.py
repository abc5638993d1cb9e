"""Functions of a Gaussian of random variance: activations and gated units.

An activation is one SymPy expression.  Its slope and its turning point follow from it; between
the turning point and the ends it is monotone, so that the CDF is that of the Gaussian at one or
two roots, and exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import sympy as sp
from scipy.optimize import brentq

from theory.formula import compile_number_form
from theory.formulas.mehler import half_line
from theory.laws.scale_mixtures import Parametrised, centred
from theory.laws.variance import GAUSS, RandomVariance, gaussian_power
from theory.symbols import x

FAR = 1024.0
"""To the left of -FAR every activation with a turning point is 0 in float64."""
HALVINGS = 128


@dataclass(frozen=True)
class Activation:
    """A pointwise nonlinearity: falling up to its turning point, where it has one, then rising.

    `near` is where to look for the turning point; what falls, falls from 0.  `ends` are the
    infimum and the supremum of an activation that only rises.
    """

    expression: sp.Expr
    near: float | None = None
    ends: tuple[float, float] = (-np.inf, np.inf)

    @cached_property
    def _forms(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        slope = sp.diff(self.expression, x)
        return compile_number_form(self.expression, (x,)), compile_number_form(slope, (x,))

    def __call__(self, at: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.asarray(self._forms[0](at))

    def slope(self, at: np.ndarray) -> np.ndarray:
        """The derivative."""
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(np.nan_to_num(self._forms[1](at)))

    @cached_property
    def turn(self) -> float:
        """Where falling ends and rising begins, minus infinity for what only rises."""
        if self.near is None:
            return -np.inf
        if self.near == 0:
            return 0.0
        return float(sp.nsolve(sp.diff(self.expression, x), x, self.near, prec=30))

    @cached_property
    def support(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        if self.near is None:
            return self.ends
        return float(self(np.array([self.turn]))[0]), np.inf

    def risen(self, y: np.ndarray) -> np.ndarray:
        """The root of phi(x) = y to the right of the turning point."""
        reach = FAR + 2 * np.abs(y)
        return self._root(y, np.maximum(self.turn, -reach), reach, rising=True)

    def fallen(self, y: np.ndarray) -> np.ndarray:
        """The root to the left of the turning point, for y < 0."""
        return self._root(y, np.full(y.shape, -FAR), np.full(y.shape, self.turn), rising=False)

    def _root(
        self, y: np.ndarray, low: np.ndarray, high: np.ndarray, *, rising: bool
    ) -> np.ndarray:
        """Bisection to the last digit, on whole arrays."""
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            beyond = (self(middle) >= y) == rising
            low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
        return high


_CUBIC = sp.sqrt(2 / sp.pi) * (x + sp.Rational(44715, 1000000) * x**3)

ACTIVATIONS: Mapping[str, Activation] = {
    "identity": Activation(x),
    "relu": Activation(sp.Max(0, x), near=0.0),
    # SymPy would make this 2 - erfc(x/sqrt(2)), which cancels on the left.
    "gelu": Activation(x * sp.erfc(-x / sp.sqrt(2), evaluate=False) / 2, near=-0.75),
    "gelu_tanh": Activation(x / (1 + sp.exp(-2 * _CUBIC)), near=-0.75),
    "silu": Activation(x / (1 + sp.exp(-x)), near=-1.28),
    "tanh": Activation(sp.tanh(x), ends=(-1.0, 1.0)),
    "erf": Activation(sp.erf(x), ends=(-1.0, 1.0)),
}
"""By the names of `nope.operations.ActivationName`, written so that far left tails keep digits."""


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
