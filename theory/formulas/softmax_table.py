"""Participations by table: every position and every temperature of a kernel at once.

The quadratures of `theory.formulas.softmax` set up a lattice for each temperature, and a kernel
has one for every pair of positions.  ln(m P) is smooth in ln(1 + s^2), from small logits to
attention that has condensed on one key, so a Chebyshev series for each position, from a few dozen
temperatures, serves them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.polynomial import chebyshev

from nope.checks import expect, expect_count, expect_finite
from theory.formulas.logits import Logits
from theory.formulas.softmax import (
    GAUSSIAN,
    Participation,
    ParticipationSecondMoment,
    SoftmaxMean,
)

DEGREES = (16, 32, 64, 128, 256)
"""Chebyshev degrees that a table tries."""
EVERY_POSITION = 48
"""Up to this many positions each has integrals of its own."""
RESTRICTED = 6
"""The degree on an interval that is a part of a table's, where a kernel's pairs are."""
DROPPED = 1e-11
"""Chebyshev coefficients below this are left out of a table."""


@lru_cache(maxsize=64)
def _logarithms(
    function: type[SoftmaxMean], m_max: int, s_max: float, logits: Logits
) -> np.ndarray:
    """Chebyshev coefficients in ln(1 + s^2), up to s_max, of ln mixed(function)/function(s = 0).

    One row a degree, one column a position.  The logarithm of the function itself is
    interpolated first, up to s_max^2 u for the largest node u of the mixture: a few dozen
    temperatures serve all nodes.
    """
    positions, everywhere = _positions(m_max)
    u, weights = logits.scales()
    top = s_max**2 * u.max()

    def logarithm(x: np.ndarray) -> np.ndarray:
        spread = np.sqrt(_variance(x, top))[:, None]
        relative = function.of(logits, positions, spread) / function.uniform(positions)
        return np.asarray(np.log(relative))

    at_one_query = _interpolate(logarithm)

    def mean(variance: float) -> np.ndarray:
        basis = chebyshev.chebvander(_scaled(variance * u, top), len(at_one_query) - 1)
        return np.asarray(weights @ np.exp(basis @ at_one_query))

    found = _interpolate(lambda x: np.log([mean(each) for each in _variance(x, s_max**2)]))
    return found if everywhere is None else found @ everywhere


def _positions(m_max: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Where a table is integrated, and what makes the values at m = 1 .. m_max of those there.

    The integrals hold at any real m and are smooth in ln m, so beyond `EVERY_POSITION` a Chebyshev
    series in it, from m = 2 on, stands for all: at m = 1 all weights are certain and the logarithm
    is 0.
    """
    if m_max <= EVERY_POSITION:
        return np.arange(1.0, m_max + 1), None
    low, high = np.log(2.0), np.log(m_max)
    nodes = chebyshev.chebpts1(EVERY_POSITION)
    basis = chebyshev.chebvander(nodes, EVERY_POSITION - 1)
    inverse = 2 / EVERY_POSITION * basis.T
    inverse[0] /= 2
    x = 2 * (np.log(np.arange(2, m_max + 1)) - low) / (high - low) - 1
    series = chebyshev.chebvander(x, EVERY_POSITION - 1) @ inverse
    at_one = np.zeros((EVERY_POSITION, 1))
    return np.exp((nodes + 1) / 2 * (high - low) + low), np.hstack([at_one, series.T])


def _scaled(variance: Any, top: float) -> Any:
    """ln(1 + s^2) from 0 to its value at s^2 = top, mapped onto [-1, 1]."""
    return 2 * np.log1p(variance) / np.log1p(top) - 1


def _variance(x: np.ndarray, top: float) -> np.ndarray:
    """The inverse of `_scaled`, clear of rounding below 0."""
    return np.asarray(np.maximum(np.expm1((x + 1) / 2 * np.log1p(top)), 0.0))


def _interpolate(function: Any) -> np.ndarray:
    """Chebyshev coefficients of a function from points x in [-1, 1] to rows of numbers.

    The degree doubles until the last eighth of the coefficients is below `DROPPED`, then what
    is below it at the end goes.  Raises `NotImplementedError` where no degree is enough.
    """
    for degree in DEGREES:
        points = chebyshev.chebpts1(degree + 1)
        basis = chebyshev.chebvander(points, degree)
        coefficients: np.ndarray = 2 / (degree + 1) * basis.T @ function(points)
        coefficients[0] /= 2
        large = np.flatnonzero(np.abs(coefficients).max(axis=1) > DROPPED).max(initial=0)
        if large < degree - degree // 8:
            return coefficients[: large + 1]
    raise NotImplementedError(
        f"expected logits that a series of degree {degree} follows, got others; lower s_max"
    )


class Tabulated:
    """Means of a softmax at whole positions and any variances, from their logarithms."""

    def logarithm(self, function: type[SoftmaxMean], positions: Any, variances: Any) -> np.ndarray:
        """ln of the mixed function over its value at s = 0, at positions and s^2 that broadcast."""
        raise NotImplementedError

    def __call__(self, positions: Any, variances: Any) -> np.ndarray:
        """m P - 1 for whole positions m and variances s^2 that broadcast."""
        return np.asarray(np.expm1(self.logarithm(Participation, positions, variances)))

    def relative_variance(self, positions: Any, variances: Any) -> np.ndarray:
        """P_2/P^2 - 1: the variance of sum a^2 from query to query over its squared mean."""
        mean = self.logarithm(Participation, positions, variances)
        square = self.logarithm(ParticipationSecondMoment, positions, variances)
        return np.asarray(np.expm1(square - 2 * mean))

    def restricted(
        self, function: type[SoftmaxMean], least: np.ndarray, largest: np.ndarray
    ) -> Restricted:
        """`logarithm` for each position m = 1, 2, ... at variances from `least` to `largest`."""
        positions = np.arange(1, len(least) + 1)
        nodes = chebyshev.chebpts1(RESTRICTED + 1)
        middle, half = (largest + least) / 2, (largest - least) / 2
        values = self.logarithm(function, positions, middle + nodes[:, None] * half)
        basis = chebyshev.chebvander(nodes, RESTRICTED)
        coefficients: np.ndarray = 2 / (RESTRICTED + 1) * basis.T @ values
        coefficients[0] /= 2
        inverse = np.divide(1, half, out=np.zeros_like(half), where=half > 0)
        return Restricted(coefficients, middle, inverse)


@dataclass(frozen=True)
class ParticipationTable(Tabulated):
    """m P(m, s) - 1 of `logits` for whole kernels: m up to `m_max`, s up to `s_max`.

    A Chebyshev series in ln(1 + s^2) of ln m P for each position, built once for equal tables.
    Off by less than 1e-9 (1 + m P).  Raises `ValueError` for positions and variances outside it.

    >>> table = ParticipationTable(8, 1.0, Logits(d_h=64))
    >>> table(np.array([2, 4, 8]), 1.0).round(6)
    array([0.271843, 0.564519, 0.855196])
    """

    m_max: int
    s_max: float
    logits: Logits = GAUSSIAN

    def __post_init__(self) -> None:
        expect_count("m_max", self.m_max)
        expect_finite("s_max", self.s_max, positive=True)

    def logarithm(self, function: type[SoftmaxMean], positions: Any, variances: Any) -> np.ndarray:
        columns, variances = np.asarray(positions) - 1, np.asarray(variances, dtype=float)
        top = self.s_max**2
        _expect_within("positions", np.asarray(positions), 1, self.m_max)
        _expect_within("variances", variances, 0, top)
        key: Any = function  # to mypy, SymPy's classes have no hash
        table = _logarithms(key, self.m_max, self.s_max, self.logits)
        return _clenshaw(table, columns, _scaled(variances, top))


@dataclass(frozen=True)
class Between(Tabulated):
    """A linear interpolation of the logarithms of two tables, `share` of the second."""

    first: Tabulated
    second: Tabulated
    share: float

    def logarithm(self, function: type[SoftmaxMean], positions: Any, variances: Any) -> np.ndarray:
        first, second = (
            each.logarithm(function, positions, variances) for each in (self.first, self.second)
        )
        return np.asarray(first + self.share * (second - first))


@dataclass(frozen=True, eq=False)
class Restricted:
    """A short Chebyshev series for each position, on an interval of variances of its own."""

    coefficients: np.ndarray
    middle: np.ndarray
    inverse_half: np.ndarray

    def __call__(self, columns: slice, variances: np.ndarray) -> np.ndarray:
        """At variances (rows, columns), one column a position; beyond the interval its end."""
        x = (variances - self.middle[columns]) * self.inverse_half[columns]
        series = self.coefficients[:, columns]
        return _clenshaw(series, np.arange(series.shape[1]), np.clip(x, -1, 1))


def _expect_within(name: str, values: np.ndarray, low: float, high: float) -> None:
    """Refuse an array that leaves an interval, by one part in 1e9 of rounding or more."""
    if values.size:
        ends = float(values.min()), float(values.max())
        inside = ends[0] >= low and ends[1] <= high * (1 + 1e-9)
        expect(inside, f"{name} from {low} to {high}", ends, "build a larger table")


def _clenshaw(coefficients: np.ndarray, columns: np.ndarray, x: np.ndarray) -> np.ndarray:
    """sum_k coefficients[k, columns] T_k(x); columns and x broadcast."""
    above, two_above = np.zeros(1), np.zeros(1)
    for row in coefficients[:0:-1]:
        above, two_above = row[columns] + 2 * x * above - two_above, above
    return np.asarray(coefficients[0][columns] + x * above - two_above)
