"""Softmax over m i.i.d. Gaussian logits at any temperature.

l_n = s z_n, z_n ~ N(0, 1) independent, n = 1..m, a = softmax(l).  With S = sum_n exp(s z_n)
and 1/S^k = int t^(k-1) exp(-t S) dt / Gamma(k), every mean of a rational function of the
weights is a one-dimensional integral over x = ln t of products of

    psi_k(x) = E u^k e^-u,   u = exp(x + s z),      phi = psi_0,

    A     = E sum a^2        = int m psi_2 phi^(m-1) dx
    B     = E (sum a z)^2    = int m (E z^2 u^2 e^-u) phi^(m-1) dx + B_off
    B_off                    = int m (m-1) (E z u e^-u)^2 phi^(m-2) dx
    P_2   = E (sum a^2)^2    = int [m psi_4 phi^(m-1) + m (m-1) psi_2^2 phi^(m-2)] dx / 6
    H     = -E sum a ln a    = int (phi - phi^m) dx - s^2 (1 - A)

The last: E ln S = int (e^(-t) - phi^m)/t dt is 0 at m = 1, which replaces e^(-t) by phi, and
E sum a z = s (1 - A) by Stein's lemma.  Source of all: derived here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import sympy as sp
from numpy.polynomial import chebyshev

from nope.checks import expect, expect_count, expect_finite
from theory.formula import Formula, Numeric, Status
from theory.symbols import d, d_h, g, m, s

TAIL = 36.0
"""Integrals end where what is left is e^-TAIL of the whole, the size of float64's rounding."""
STEP = 0.25
"""A trapezoidal rule of this step is off by about e^(-pi^2/STEP) = 7e-18: e^-u, u = exp(x), is
bounded in a strip of half-width pi/2."""
LARGEST_EXPONENT = 7.0
"""u^k e^-u is 0 in float64 beyond exp of this."""
SHARPEST = 300.0
"""The largest s: the lattices grow with it, to half a gigabyte."""
ROWS = 1024
"""Positions that are integrated at once."""
LONGEST = 1e100
"""The longest prefix whose breakdown is looked for: beyond it squares of s/m underflow."""


class Transforms:
    """psi_k and its like on a lattice in x, for one s > 0, every m up to `m_max`, k >= `least`.

    Both rules are trapezoidal.  The lattice in z reaches where the normal density is
    e^-TAIL/m, the one in x from where m E min(u^least, 1) is e^-TAIL to where phi is.  Its step
    may grow with s, as long as it resolves phi^m, which falls over s/sqrt(2 ln m).  Raises
    `ValueError` for an s above `SHARPEST`.
    """

    def __init__(self, s: float, m_max: float, least: float = 1.0) -> None:
        expect(s <= SHARPEST, f"logits of standard deviation up to {SHARPEST:g}", s, "lower s")
        reach = float(np.sqrt(2 * (np.log(m_max) + TAIL)))
        near = min(least * s, reach)
        left = (near**2 + reach**2) / (2 * least) + (s - near / least) * reach
        right = 4 + s * float(np.sqrt(2 * TAIL))
        self.s = s
        self.z, step = _lattice(-reach, reach, min(0.5, STEP / s))
        self.weights = step * np.exp(-(self.z**2) / 2) / np.sqrt(2 * np.pi)
        self.x, self.step = _lattice(-left, right, max(STEP, s / (3 * reach)))
        self.u = np.exp(np.minimum(self.x[:, None] + s * self.z, LARGEST_EXPONENT))
        self.damping = np.exp(-self.u)
        self.phi = self.damping @ self.weights
        # 1 - phi is summed on its own: it is 1/m where phi^m matters.
        self.log_phi = np.log(self.phi)
        high = self.phi > 0.5
        self.log_phi[high] = np.log1p(np.expm1(-self.u[high]) @ self.weights)

    def moment(self, k: float, power: int = 0) -> np.ndarray:
        """E z^power u^k e^-u on the lattice."""
        moment: np.ndarray = self.u**k * self.damping @ (self.weights * self.z**power)
        return moment

    def shared(self) -> np.ndarray:
        """E z u e^-u, by Stein's lemma s E (u - u^2) e^-u, where nothing cancels at small s."""
        return np.asarray(self.s * (self.moment(1) - self.moment(2)))

    def integral(self, positions: np.ndarray, distinct: int, density: np.ndarray) -> np.ndarray:
        """int m (m-1) ... (m-distinct+1) phi^(m-distinct) density dx for each position m."""
        counted = np.sum([np.log(positions - k) for k in range(distinct)], axis=0)

        def rows(some: slice) -> Any:
            m, log_counted = positions[some, None], counted[some, None]
            return np.exp(log_counted + (m - distinct) * self.log_phi) @ density

        return self.step * _by_rows(rows, len(positions))

    def log_partition(self, positions: np.ndarray) -> np.ndarray:
        """E ln S = int (phi - phi^m) dx for each position m."""

        def rows(some: slice) -> Any:
            return -np.expm1((positions[some, None] - 1) * self.log_phi) @ self.phi

        return self.step * _by_rows(rows, len(positions))


def _lattice(low: float, high: float, step: float) -> tuple[np.ndarray, float]:
    """Points from `low` to `high` or just beyond, symmetric if the ends are, and their step."""
    count = int(np.ceil((high - low) / step))
    return np.linspace(low, high, count + 1), (high - low) / count


def _by_rows(function: Callable[[slice], Any], count: int) -> np.ndarray:
    """A function of rows, `ROWS` at a time to spare memory."""
    return np.concatenate([function(slice(i, i + ROWS)) for i in range(0, count, ROWS)])


class Lettered(Numeric):
    """A function that LaTeX prints by its letter."""

    letter: ClassVar[str]

    def _latex(self, printer: Any) -> str:
        arguments = ", ".join(printer.doprint(argument) for argument in self.args)
        return rf"{self.letter}\left({arguments}\right)"


class SoftmaxMean(Lettered):
    """A mean over the softmax of m i.i.d. N(0, s^2) logits, as a function of m and s.

    `densities` gives, per number of distinct positions that are summed over, what stands
    beside m!/(m-k)! phi^(m-k) under the integral; `uniform` the value where all weights are
    1/m for certain: at s = 0 and at m = 1.
    """

    by = "one-dimensional quadrature"
    nargs = 2

    @staticmethod
    def uniform(positions: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    @staticmethod
    def densities(transforms: Transforms) -> Mapping[int, np.ndarray]:
        raise NotImplementedError

    @classmethod
    def integrated(cls, positions: np.ndarray, transforms: Transforms) -> np.ndarray:
        """The values at positions above 1 and at the temperature of the transforms."""
        terms = cls.densities(transforms).items()
        values = [transforms.integral(positions, k, density) for k, density in terms]
        return np.asarray(np.sum(values, axis=0))

    @classmethod
    def numbers(cls, *arrays: np.ndarray) -> np.ndarray:
        """The values at m >= 1, real numbers included, and s >= 0; each s is set up once."""
        shape = np.broadcast_shapes(*(np.shape(array) for array in arrays))
        positions, spread = (np.broadcast_to(array, shape).ravel() * 1.0 for array in arrays)
        values = cls.uniform(positions)
        for rows in _groups(spread):
            wanted = rows[positions[rows] > 1]
            if spread[rows[0]] > 0 and len(wanted):
                transforms = Transforms(float(spread[rows[0]]), float(positions[wanted].max()))
                values[wanted] = cls.integrated(positions[wanted], transforms)
        return values.reshape(shape)


def _groups(values: np.ndarray) -> list[np.ndarray]:
    """The indices of each value that occurs."""
    order = np.argsort(values, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(values[order])) + 1)


class Participation(SoftmaxMean):
    """A = E sum_n a_n^2."""

    letter = "A"

    @staticmethod
    def uniform(positions: np.ndarray) -> np.ndarray:
        return 1 / positions

    @staticmethod
    def densities(transforms: Transforms) -> Mapping[int, np.ndarray]:
        return {1: transforms.moment(2)}


class ParticipationSecondMoment(SoftmaxMean):
    """P_2 = E (sum_n a_n^2)^2."""

    letter = "P_2"

    @staticmethod
    def uniform(positions: np.ndarray) -> np.ndarray:
        return 1 / positions**2

    @staticmethod
    def densities(transforms: Transforms) -> Mapping[int, np.ndarray]:
        return {1: transforms.moment(4) / 6, 2: transforms.moment(2) ** 2 / 6}


class Tilt(SoftmaxMean):
    """B = E (sum_n a_n z_n)^2."""

    letter = "B"

    @staticmethod
    def uniform(positions: np.ndarray) -> np.ndarray:
        return 1 / positions

    @staticmethod
    def densities(transforms: Transforms) -> Mapping[int, np.ndarray]:
        return {1: transforms.moment(2, power=2), 2: transforms.shared() ** 2}


class SharedTilt(SoftmaxMean):
    """B_off = E sum_{n != n'} a_n a_n' z_n z_n'."""

    letter = r"B_{\mathrm{off}}"

    @staticmethod
    def uniform(positions: np.ndarray) -> np.ndarray:
        return np.zeros_like(positions)

    @staticmethod
    def densities(transforms: Transforms) -> Mapping[int, np.ndarray]:
        return {2: transforms.shared() ** 2}


class Entropy(SoftmaxMean):
    """H = -E sum_n a_n ln a_n = E ln S - s^2 (1 - A)."""

    letter = "H"

    @staticmethod
    def uniform(positions: np.ndarray) -> np.ndarray:
        return np.asarray(np.log(positions))

    @classmethod
    def integrated(cls, positions: np.ndarray, transforms: Transforms) -> np.ndarray:
        spread = 1 - Participation.integrated(positions, transforms)
        return transforms.log_partition(positions) - transforms.s**2 * spread


def chi_square_nodes(degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes u and weights of the mean over u = chi^2_degrees/degrees, for degrees up to infinity.

    A trapezoidal rule in y = ln u, whose density prop. to exp(k (y - e^y)), k = degrees/2, is
    smooth at any k, and so is a function of s sqrt(u) at any s.  With w = sqrt(2 TAIL/k), what
    lies beyond -(w + w^2/2) and ln(1 + w + w^2/2) is less than e^-TAIL of it.
    """
    if np.isinf(degrees):
        return np.ones(1), np.ones(1)
    k = degrees / 2
    end = np.sqrt(2 * TAIL / k) + TAIL / k
    y, _ = _lattice(-end, np.log1p(end), 0.8 / np.sqrt(k + 5))
    weights = np.exp(k * (y - np.expm1(y)))
    return np.exp(y), weights / weights.sum()


NEGLIGIBLE = 1e-12
"""Nodes with s^2 u below this are taken at s = 0: no mean here is further from it relative."""


def mixed(function: type[SoftmaxMean], positions: Any, spread: Any, degrees: Any) -> np.ndarray:
    """E_u function(m, s sqrt(u)), u = chi^2_{d_h}/d_h: a mean over queries of width d_h.

    Given the query, the logits are exactly Gaussian, with variance s^2 |q|^2/E|q|^2.
    `positions` m, `spread` s and `degrees` d_h broadcast; d_h may be infinite, where u = 1.

    >>> float(mixed(Participation, 2, 1.0, np.inf)) == float(Participation.numbers(2, 1.0))
    True
    """
    positions, spread, degrees = np.broadcast_arrays(positions, spread, degrees)
    values = np.empty(positions.shape)
    for width in np.unique(degrees):
        rows = degrees == width
        u, weights = chi_square_nodes(float(width))
        scaled = spread[rows][:, None] * np.sqrt(u)
        scaled[scaled**2 < NEGLIGIBLE] = 0.0
        values[rows] = function.numbers(positions[rows][:, None], scaled) @ weights
    return values


class ParticipationFiniteHead(Lettered):
    """P(m, s, d_h) = E_u A(m, s sqrt(u)), u = chi^2_{d_h}/d_h."""

    by = "two one-dimensional quadratures"
    nargs = 3
    letter = "P"

    @classmethod
    def numbers(cls, *arrays: np.ndarray) -> np.ndarray:
        return mixed(Participation, *arrays)


class BreakdownLength(Lettered):
    """The m >= 1, not rounded, from which on B(m, s) is at least (d - 1) A(m, s).

    The integrals hold at any real m, so no asymptotics are needed; infinite where there is
    none up to `LONGEST`, as at s = 0 and d > 2.
    """

    by = "root finding on one-dimensional quadratures"
    nargs = 2
    letter = "m_*"

    @classmethod
    def numbers(cls, *arrays: np.ndarray) -> np.ndarray:
        return np.asarray(np.vectorize(_breakdown, otypes=[float])(*arrays))


def _breakdown(spread: float, width: float) -> float:
    from scipy.optimize import brentq

    def excess(log_m: float) -> float:
        """ln of (d - 1) A/B, which falls with m."""
        at = np.asarray(np.exp(log_m)), np.asarray(spread)
        return float(np.log((width - 1) * Participation.numbers(*at) / Tilt.numbers(*at)))

    # At m = 1 both A and B are 1.
    if width <= 2:
        return 1.0
    for low, high in pairwise(np.log(LONGEST) * np.array([0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1])):
        if excess(high) < 0:
            return float(np.exp(brentq(excess, low, high, xtol=1e-13)))
    return np.inf


def _power_sum(k: Any) -> sp.Expr:
    """q_k = sum_n a_n^k of the weights; q_1 = 1."""
    return sp.Integer(1) if k == 1 else sp.Function("q")(k)


def _laplacian(f: sp.Expr) -> sp.Expr:
    """sum_n d^2 f/dl_n^2 of a polynomial in power sums, from dq_k/dl_n = k (a_n^k - a_n q_k)."""
    sums = {q: q.args[0] for q in f.atoms(sp.core.function.AppliedUndef)}

    def curvature(k: sp.Integer) -> sp.Expr:
        q, up, two = _power_sum(k), _power_sum(k + 1), _power_sum(2)
        return k * (k * (q - up) - (1 - two) * q - k * (up - two * q))

    def slopes(j: sp.Integer, k: sp.Integer) -> sp.Expr:
        p, q = _power_sum(j), _power_sum(k)
        cross = p * _power_sum(k + 1) + q * _power_sum(j + 1)
        return j * k * (_power_sum(j + k) - cross + _power_sum(2) * p * q)

    once = sum(f.diff(q) * curvature(k) for q, k in sums.items())
    twice = sum(f.diff(p).diff(q) * slopes(sums[p], sums[q]) for p in sums for q in sums)
    return sp.expand(once + twice)


def small_logits(f: sp.Expr, order: int) -> sp.Expr:
    """E f for a polynomial in the power sums q(k) = sum_n a_n^k, up to s^(2 order).

    Wick's theorem for i.i.d. N(0, s^2) logits is E f = exp(s^2 Laplacian/2) f at l = 0, and
    there q(k) = m^(1-k).  The Laplacian of a polynomial in power sums is another.
    """
    total, term = sp.Integer(0), sp.sympify(f)
    for k in range(order + 1):
        at_zero = term.replace(sp.Function("q"), lambda power: m ** (1 - power))
        total += sp.factor(at_zero) * (s**2 / 2) ** k / sp.factorial(k)
        term = _laplacian(term)
    return total


@cache
def participation_expansion(order: int) -> sp.Expr:
    """A up to s^(2 order): (1/m) (1 + (1 - 1/m) s^2 + ...)."""
    return small_logits(_power_sum(2), order)


@cache
def tilt_expansion(order: int) -> sp.Expr:
    """B up to s^(2 order).

    By Stein's lemma, twice, B = A + s^2 E sum_{nn'} d^2(a_n a_n')/dl_n dl_n', and the sum is
    1 - q_2 - 6 q_3 + 6 q_2^2.
    """
    q_2, q_3 = _power_sum(2), _power_sum(3)
    curved = small_logits(1 - q_2 - 6 * q_3 + 6 * q_2**2, order - 1)
    return small_logits(q_2, order) + sp.expand(s**2 * curved)


@cache
def long_prefix(kind: type[SoftmaxMean]) -> tuple[sp.Expr, sp.Expr]:
    """The limit of m A or of B as m -> infinity, and its relative correction's factor of 1/m.

    The delta method for functions of the means of e^(sz), e^(2sz) and z e^(sz).
    """
    X = sp.symbols("X_0 X_1 X_2", positive=True)
    f = {Participation: X[1] / X[0] ** 2, Tilt: (X[2] / X[0]) ** 2}[kind]
    tilts = ((1, 0), (2, 0), (1, 1))
    theta = sp.Symbol("theta", real=True)

    def mean(k: int, power: int) -> sp.Expr:
        """E z^power e^(k s z)."""
        return sp.exp(theta**2 / 2).diff(theta, power).subs(theta, k * s)

    def covariance(i: int, j: int) -> sp.Expr:
        (k, p), (other, q) = tilts[i], tilts[j]
        return mean(k + other, p + q) - mean(k, p) * mean(other, q)

    at = {x: mean(*tilt) for x, tilt in zip(X, tilts, strict=True)}
    curved = sum(
        f.diff(X[i], X[j]).subs(at) * covariance(i, j) / 2 for i in range(3) for j in range(3)
    )
    limit = sp.simplify(f.subs(at))
    return limit, sp.expand(sp.simplify(sp.expand(curved / limit)))


def breakdown_leading() -> tuple[sp.Expr, sp.Expr]:
    """(d - 1) e^(s^2)/s^2, where the limits of (d - 1) A and B cross, and what 1/m adds to it."""
    (participation, of_participation), (tilt, of_tilt) = map(long_prefix, (Participation, Tilt))
    return (d - 1) * participation / tilt, sp.Abs(of_participation - of_tilt)


DEGREES = (16, 32, 64, 128, 256)
"""Chebyshev degrees that a table tries."""
DROPPED = 1e-11
"""Chebyshev coefficients below this are left out of a table."""


@lru_cache(maxsize=32)
def _logarithms(
    function: type[SoftmaxMean], m_max: int, s_max: float, degrees: float
) -> np.ndarray:
    """Chebyshev coefficients in s^2 on [0, s_max^2] of ln mixed(function)/function(s = 0).

    One row a degree, one column a position.  The logarithm of the function itself is
    interpolated first, up to s_max^2 u for the largest node u of the mixture: a few dozen
    temperatures serve all nodes.
    """
    positions = np.arange(1.0, m_max + 1)
    u, weights = chi_square_nodes(degrees)
    top = s_max**2 * u.max()

    def logarithm(x: np.ndarray) -> np.ndarray:
        spread = np.sqrt((x[:, None] + 1) * top / 2)
        relative = function.numbers(positions, spread) / function.uniform(positions)
        return np.asarray(np.log(relative))

    at_one_query = _interpolate(logarithm)

    def mean(x: float) -> np.ndarray:
        basis = chebyshev.chebvander((x + 1) * u / u.max() - 1, len(at_one_query) - 1)
        return np.asarray(weights @ np.exp(basis @ at_one_query))

    return _interpolate(lambda x: np.log([mean(each) for each in x]))


def _interpolate(function: Any) -> np.ndarray:
    """Chebyshev coefficients of a function from points x in [-1, 1] to rows of numbers.

    The degree doubles until the last eighth of the coefficients is below `DROPPED`, then what
    is below it at the end goes.  Raises `ValueError` where no degree is enough.
    """
    for degree in DEGREES:
        points = chebyshev.chebpts1(degree + 1)
        basis = chebyshev.chebvander(points, degree)
        coefficients: np.ndarray = 2 / (degree + 1) * basis.T @ function(points)
        coefficients[0] /= 2
        large = np.flatnonzero(np.abs(coefficients).max(axis=1) > DROPPED).max(initial=0)
        if large < degree - degree // 8:
            return coefficients[: large + 1]
    raise ValueError(f"expected a Chebyshev degree up to {degree}, got more; lower s_max")


@dataclass(frozen=True)
class ParticipationTable:
    """m P(m, s, d_h) - 1 for whole kernels: m up to `m_max`, s up to `s_max`.

    A Chebyshev series in s^2 of ln m P for each position, built once for equal tables.  Off by
    less than 1e-9 (1 + m P).  Raises `ValueError` for positions and variances outside it.

    >>> table = ParticipationTable(8, 1.0, 64)
    >>> table(np.array([2, 4, 8]), 1.0).round(6)
    array([0.271843, 0.564519, 0.855196])
    """

    m_max: int
    s_max: float
    d_h: float = np.inf

    def __post_init__(self) -> None:
        expect_count("m_max", self.m_max)
        expect_finite("s_max", self.s_max, positive=True)
        expect(self.d_h >= 1, "d_h to be at least 1", self.d_h, "change d_h")

    def __call__(self, positions: Any, variances: Any) -> np.ndarray:
        """m P - 1 for whole positions m and variances s^2 in [0, s_max^2] that broadcast."""
        return np.asarray(np.expm1(self.logarithm(Participation, positions, variances)))

    def relative_variance(self, positions: Any, variances: Any) -> np.ndarray:
        """P_2/P^2 - 1: the variance of sum a^2 from query to query over its squared mean."""
        mean = self.logarithm(Participation, positions, variances)
        square = self.logarithm(ParticipationSecondMoment, positions, variances)
        return np.asarray(np.expm1(square - 2 * mean))

    def logarithm(self, function: type[SoftmaxMean], positions: Any, variances: Any) -> np.ndarray:
        """ln of the mixed function over its value at s = 0."""
        columns, variances = np.asarray(positions) - 1, np.asarray(variances, dtype=float)
        top = self.s_max**2
        _expect_within("positions", np.asarray(positions), 1, self.m_max)
        _expect_within("variances", variances, 0, top)
        key: Any = function  # to mypy, SymPy's classes have no hash
        table = _logarithms(key, self.m_max, self.s_max, self.d_h)
        return _clenshaw(table, columns, 2 * variances / top - 1)


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


def finite_width() -> sp.Expr:
    """What a finite d changes in E|o_m|^2/d of LN'd tokens, over g, to first order in 1/d.

    Given the query, a logit is |w| times a coordinate of the sphere: its excess kurtosis is
    -6/d, and |w|^2 has a relative variance of 2/d.  In a long prefix ln m A is K(2) - 2 K(1)
    and B_off is K'(1)^2/s^2, K the logit's cumulant generating function.  The s^2 of these
    corrections is read off ln m A and B_off themselves, which saturate where attention
    condenses.  A LayerNorm leaves d - 1 directions: B_off/(d - 1), not B_off/d.
    """
    theta = sp.Symbol("theta")
    kurtosis, spread = -6 / d, 2 / d
    K = s**2 * theta**2 / 2 + kurtosis * s**4 * theta**4 / 24
    log_participation = sp.expand(K.subs(theta, 2) - 2 * K.subs(theta, 1) + spread * s**4 / 2)
    tilt = sp.expand(K.diff(theta).subs(theta, 1) ** 2 / s**2)
    A, B_off = Participation(m, s), SharedTilt(m, s)
    of_participation = sp.Abs(log_participation.coeff(s, 4)) * sp.log(m * A) ** 2 * A
    of_tilt = sp.Abs(tilt.coeff(s, 4)) * B_off**2 + B_off / d
    return of_participation + of_tilt / d


GAUSSIAN_LOGITS = "derived here, for i.i.d. Gaussian logits of variance s^2"
SOFTMAX_SQUARES = r"\mathbb{E}\sum_n a_{mn}^2"
OUTPUT = r"\mathbb{E}|o_m|^2/d"


def formulas() -> Iterator[Formula]:
    """Participation, tilt and entropy of a softmax, and what they make of the output."""
    A, B, B_off = (kind(m, s) for kind in (Participation, Tilt, SharedTilt))
    yield Formula(
        "attention.participation",
        A,
        "The participation of a softmax over m logits, between 1/m and 1.",
        Status.EXACT,
        GAUSSIAN_LOGITS,
        SOFTMAX_SQUARES,
    )
    yield Formula(
        "attention.participation_finite_head",
        ParticipationFiniteHead(m, s, d_h),
        "The participation where the logits' variance varies from query to query as |q|^2 does.",
        Status.EXACT,
        "derived here, for logits that are i.i.d. Gaussian given the query",
        SOFTMAX_SQUARES,
    )
    yield Formula(
        "attention.participation_second_moment",
        ParticipationSecondMoment(m, s),
        "The second moment of a query's participation: how much it varies from query to query.",
        Status.EXACT,
        GAUSSIAN_LOGITS,
        r"\mathbb{E}\left(\sum_n a_{mn}^2\right)^2",
    )
    yield Formula(
        "attention.tilt",
        B,
        "How far, squared, the weights lean towards the direction of the query.",
        Status.EXACT,
        GAUSSIAN_LOGITS,
        r"\mathbb{E}\left(\sum_n a_{mn} z_n\right)^2",
    )
    yield Formula(
        "attention.tilt_shared",
        B_off,
        "The tilt that pairs of distinct positions share.",
        Status.EXACT,
        GAUSSIAN_LOGITS,
        r"\mathbb{E}\sum_{n \neq n'} a_{mn} a_{mn'} z_n z_{n'}",
    )
    yield Formula(
        "attention.entropy",
        Entropy(m, s),
        "The entropy of a softmax over m logits, between 0 and ln m.",
        Status.EXACT,
        GAUSSIAN_LOGITS,
        r"-\mathbb{E}\sum_n a_{mn} \ln a_{mn}",
    )
    yield Formula(
        "attention.participation_expansion",
        participation_expansion(2),
        "The participation up to s^4, by Wick's theorem for the logits.",
        Status.LEADING_ORDER,
        GAUSSIAN_LOGITS,
        SOFTMAX_SQUARES,
        remainder=sp.Abs(sp.factor(participation_expansion(3) - participation_expansion(2))),
    )
    yield Formula(
        "attention.output_second_moment",
        g * (A + B_off / d),
        "LN'd or RMS-normed tokens, wide heads: the weights' squares and the tilt they share.",
        Status.LEADING_ORDER,
        "derived here, to leading order in 1/d at any s",
        OUTPUT,
        remainder=g * finite_width(),
    )
    yield Formula(
        "attention.output_second_moment_gaussian_tokens",
        g * ((d - 1) * A + B) / d,
        "Gaussian tokens, wide heads: d - 1 coordinates are averaged, one is tilted.",
        Status.LEADING_ORDER,
        "derived here; exact but for the length of the key direction, chi^2 of d degrees",
        OUTPUT,
        remainder=g * sp.Abs(ParticipationFiniteHead(m, s, d) - A),
    )
    yield Formula(
        "attention.floor",
        g * s**2 / d,
        "However long the prefix, the tilt towards the query stays: the 1/m law ends here.",
        Status.LEADING_ORDER,
        "derived here: the limit of attention.output_second_moment as m grows",
        OUTPUT,
        remainder=g * sp.Abs(A + (B_off - s**2) / d),
    )
    yield Formula(
        "attention.breakdown_length",
        BreakdownLength(s, d),
        "The length at which the tilt contributes as much as the averaging: (d - 1) A = B.",
        Status.EXACT,
        GAUSSIAN_LOGITS,
        "m_*",
    )
    leading, beyond = breakdown_leading()
    yield Formula(
        "attention.breakdown_length_leading",
        leading,
        "Where the long-prefix limits (d - 1) e^(s^2)/m and s^2 meet.",
        Status.LEADING_ORDER,
        "derived here by the delta method; needs e^(2 s^2) much below m",
        "m_*",
        remainder=beyond,
    )
