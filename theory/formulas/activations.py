"""Activations as functions of a number: each is one SymPy expression.

Its slope and its turning point follow from it; between the turning point and the ends it is
monotone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import sympy as sp

from theory.formula import compile_number_form
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
