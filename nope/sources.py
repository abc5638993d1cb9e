"""Sources of random numbers: one protocol, what its forms share, and the NumPy form.

A source fills arrays from one stream of its own: the law of an array is the caller's, the
numbers are the source's.  `nope.streams.TorchSource` is the torch form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from nope.checks import expect


@runtime_checkable
class Source(Protocol):
    """Where random numbers come from: an array library with a generator and a place to put them.

    What a call returns depends on the stream and on the calls before it, on nothing else.
    """

    def normal(self, shape: tuple[int, ...], std: float) -> Any:
        """Independent N(0, std^2)."""

    def zeros(self, shape: tuple[int, ...]) -> Any:
        """All zero."""

    def uniform(self, shape: tuple[int, ...], bound: float) -> Any:
        """Independent U(-bound, bound)."""

    def truncated_normal(self, shape: tuple[int, ...], std: float, cut: float) -> Any:
        """Independent N(0, std^2) conditioned on |w| <= cut std."""

    def orthogonal(self, shape: tuple[int, ...]) -> Any:
        """Haar measure: the last two axes hold orthonormal columns, or rows if those are fewer."""

    def categorical(self, probabilities: np.ndarray, shape: tuple[int, ...]) -> Any:
        """Independent whole numbers, v with probability `probabilities[v]`."""

    def integers(self, shape: tuple[int, ...], high: int) -> Any:
        """Independent whole numbers, 0 to high - 1 equally likely."""

    def windows(self, values: np.ndarray, shape: tuple[int, int]) -> Any:
        """Rows of consecutive `values`, shape (rows, length), every start equally likely."""


def truncate(unit: Any, std: float, cut: float, erfinv: Callable[[Any], Any]) -> Any:
    """Numbers u of U(0, 1) as N(0, std^2) given |w| <= cut std, by the inverse CDF.

    w = sqrt(2) std erfinv((2u - 1) erf(cut/sqrt(2))); one number each, so a stream stays in step.
    The ends are clipped, since erf rounds to 1 beyond a cut of 8.
    """
    quantile = math.sqrt(2) * erfinv((2 * unit - 1) * math.erf(cut / math.sqrt(2)))
    return std * quantile.clip(-cut, cut)


def haar(gaussian: Any, qr: Callable[[Any], tuple[Any, Any]]) -> Any:
    """The Q of Gaussian matrices, R's diagonal made positive: uniform on orthonormal frames.

    Matrices are the last two axes; a wide one has orthonormal rows.  Without the signs Q would
    follow a convention of the linear algebra library, not the Haar measure (Mezzadri 2007).
    """
    shape = tuple(gaussian.shape)
    expect(len(shape) >= 2, "matrices on the last two axes", shape, "add an axis")
    if shape[-2] < shape[-1]:
        return haar(gaussian.swapaxes(-2, -1), qr).swapaxes(-2, -1)
    Q, R = qr(gaussian)
    signs = 1 - 2 * (R.diagonal(0, -2, -1) < 0)
    return Q * signs[..., None, :]


def cumulative(probabilities: np.ndarray) -> np.ndarray:
    """P(V <= v) in float64, ending at 1 exactly.

    Raises `ValueError` unless `probabilities` is one row of numbers >= 0 that sum to 1 (to 1e-6).
    """
    row = np.asarray(probabilities, dtype=np.float64)
    good = row.ndim == 1 and row.size > 0 and bool((row >= 0).all())
    total = float(row.sum())
    expect(
        good and abs(total - 1) <= 1e-6,
        "one row of probabilities that sum to 1",
        f"shape {row.shape}, least {row.min(initial=math.inf):.4g}, sum {total:.6g}",
        "divide the row by its sum",
    )
    sums = row.cumsum()
    return np.asarray(sums / sums[-1])


@dataclass(frozen=True)
class NumpySource:
    """Random numbers in NumPy arrays, float64 or int64, for the weights that a question fixes."""

    generator: np.random.Generator

    def normal(self, shape: tuple[int, ...], std: float) -> np.ndarray:
        return std * self.generator.standard_normal(shape)

    def zeros(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape)

    def uniform(self, shape: tuple[int, ...], bound: float) -> np.ndarray:
        return self.generator.uniform(-bound, bound, shape)

    def truncated_normal(self, shape: tuple[int, ...], std: float, cut: float) -> np.ndarray:
        from scipy.special import erfinv

        return np.asarray(truncate(self.generator.random(shape), std, cut, erfinv))

    def orthogonal(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(haar(self.generator.standard_normal(shape), np.linalg.qr))

    def categorical(self, probabilities: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        unit = self.generator.random(shape)
        return np.searchsorted(cumulative(probabilities), unit, side="right")

    def integers(self, shape: tuple[int, ...], high: int) -> np.ndarray:
        return self.generator.integers(high, size=shape)

    def windows(self, values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        every = np.lib.stride_tricks.sliding_window_view(values, shape[1])
        return np.asarray(every[self.integers(shape[:1], len(every))])
