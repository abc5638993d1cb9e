"""Softmax over m i.i.d. Gaussian logits at any temperature.

l_n = s z_n, z_n ~ N(0, 1) independent, n = 1..m, a = softmax(l).  With S = sum_n exp(s z_n)
and 1/S^k = int t^(k-1) exp(-t S) dt / Gamma(k), every mean of a rational function of the
weights is a one-dimensional integral over x = ln t of products of

    psi_k(x) = E u^k e^-u,   u = exp(x + s z),      phi = psi_0,

    A     = E sum a^2        = int m psi_2 phi^(m-1) dx
    B     = E (sum a z)^2    = int m (E z^2 u^2 e^-u) phi^(m-1) dx + B_off
    B_off                    = int m (m-1) (E z u e^-u)^2 phi^(m-2) dx
    S     = E sum a z^2      = int m (E z^2 u e^-u) phi^(m-1) dx
    P_2   = E (sum a^2)^2    = int [m psi_4 phi^(m-1) + m (m-1) psi_2^2 phi^(m-2)] dx / 6
    H     = -E sum a ln a    = int (phi - phi^m) dx - s int m (E z u e^-u) phi^(m-1) dx
    C     = m e^(-s^2/2) E e^(2 l_1)/S = int m psi_1(x) phi(x - s^2)^(m-1) dx

In H, E ln S = int (e^(-t) - phi^m)/t dt is 0 at m = 1, which replaces e^(-t) by phi.  In C
e^(l_1) tilts its own Gaussian to the mean s^2; it is what a query shares with itself over an
endless prefix.  At finite width z is not quite Gaussian and s varies (`theory.formulas.logits`);
all but C are the same integrals.  Source of all: derived here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from theory.formula import Formula, Numeric, Status
from theory.formulas.logits import NARROW, STEP, TAIL, Logits, lattice
from theory.symbols import d, d_h, m, s

LARGEST_EXPONENT = 7.0
"""u^k e^-u is 0 in float64 beyond exp of this."""
SHARPEST = 300.0
"""The largest s: the lattices grow with it, to half a gigabyte."""
LARGEST_LATTICE = 2e7
"""Points in x and z at most: 160 MB an array."""
ROWS = 1024
"""Positions that are integrated at once."""
LONGEST = 1e100
"""The longest prefix whose breakdown is looked for: beyond it squares of s/m underflow."""


GAUSSIAN = Logits()
"""Logits of infinite width."""


class Transforms:
    """psi_k and its like on a lattice in x, for one s > 0, every m up to `m_max`, k >= `least`.

    Both rules are trapezoidal.  The lattice in z reaches where the density of the `logits` is
    e^-TAIL/m, the one in x from where m E min(u^least, 1) is e^-TAIL to where phi is.  Its step
    may grow with s, as long as it resolves phi^m, which falls over s/sqrt(2 ln m) where z is
    smooth: few dimensions make steps of phi.  Raises `NotImplementedError` for an s above
    `SHARPEST`, or that few dimensions resolve with too many points.
    """

    def __init__(
        self, s: float, m_max: float, least: float = 1.0, logits: Logits = GAUSSIAN
    ) -> None:
        if not s <= SHARPEST:
            raise NotImplementedError(
                f"expected logits of standard deviation up to {SHARPEST:g}, got {s:g}; lower s"
            )
        reach = float(np.sqrt(2 * (np.log(m_max) + TAIL)))
        near = min(least * s, reach)
        left = (near**2 + reach**2) / (2 * least) + (s - near / least) * reach
        self.s, self.logits = s, logits
        self.z, self.weights = logits.shape(s, reach)
        right = 4 + s * min(float(np.sqrt(2 * TAIL)), float(self.z[-1]))
        smooth = logits.gaussian or logits.freedom > NARROW**2
        self.x = lattice(-left, right, max(STEP, s / (3 * reach)) if smooth else STEP)
        if len(self.x) * len(self.z) > LARGEST_LATTICE:
            raise NotImplementedError(
                f"expected logits that {LARGEST_LATTICE:.0e} points resolve, got a standard "
                f"deviation of {s:.3g} with few dimensions, {logits}; lower s or widen the heads"
            )
        self.step = float(self.x[1] - self.x[0])
        self.u = self._exponential(self.x)
        self.damping = np.exp(-self.u)
        self.phi = self.damping @ self.weights
        self.log_phi = self._logarithm(self.u, self.phi)

    def _exponential(self, x: np.ndarray) -> np.ndarray:
        return np.exp(np.minimum(x[:, None] + self.s * self.z, LARGEST_EXPONENT))

    def _logarithm(self, u: np.ndarray, phi: np.ndarray) -> np.ndarray:
        """ln phi; 1 - phi is summed on its own: it is 1/m where phi^m matters."""
        logarithm = np.log(phi)
        high = phi > 0.5
        logarithm[high] = np.log1p(np.expm1(-u[high]) @ self.weights)
        return np.asarray(logarithm)

    def log_phi_before(self, shift: float) -> np.ndarray:
        """ln phi(x - shift) on the lattice, for a shift to the left."""
        u = self._exponential(self.x - shift)
        return self._logarithm(u, np.exp(-u) @ self.weights)

    def moment(self, k: float, power: int = 0) -> np.ndarray:
        """E z^power u^k e^-u on the lattice."""
        moment: np.ndarray = self.u**k * self.damping @ (self.weights * self.z**power)
        return moment

    def shared(self) -> np.ndarray:
        """E z u e^-u, by Stein's lemma s E (u - u^2) e^-u, where nothing cancels at small s.

        On a sphere Stein's lemma has the factor (D - z^2)/(D - 1); at D = 1 the sum is as it is.
        """
        D = self.logits.freedom
        if self.logits.gaussian:
            return np.asarray(self.s * (self.moment(1) - self.moment(2)))
        if D == 1:
            return self.moment(1, power=1)
        weights = self.weights * (D - self.z**2) / (D - 1)
        return np.asarray(self.s * ((self.u - self.u**2) * self.damping @ weights))

    def integral(
        self,
        positions: np.ndarray,
        distinct: int,
        density: np.ndarray,
        log_phi: np.ndarray | None = None,
    ) -> np.ndarray:
        """int m (m-1) ... (m-distinct+1) phi^(m-distinct) density dx for each position m."""
        log_phi = self.log_phi if log_phi is None else log_phi
        counted = np.sum([np.log(positions - k) for k in range(distinct)], axis=0)

        def rows(some: slice) -> Any:
            m, log_counted = positions[some, None], counted[some, None]
            return np.exp(log_counted + (m - distinct) * log_phi) @ density

        return self.step * _by_rows(rows, len(positions))

    def log_partition(self, positions: np.ndarray) -> np.ndarray:
        """E ln S = int (phi - phi^m) dx for each position m."""

        def rows(some: slice) -> Any:
            return -np.expm1((positions[some, None] - 1) * self.log_phi) @ self.phi

        return self.step * _by_rows(rows, len(positions))


def _by_rows(function: Callable[[slice], Any], count: int) -> np.ndarray:
    """A function of rows, `ROWS` at a time to spare memory."""
    return np.concatenate([function(slice(i, i + ROWS)) for i in range(0, count, ROWS)])


class Lettered(Numeric):
    """A function that LaTeX prints by its letter."""

    letter: ClassVar[str]

    def _latex(self, printer: Any, exp: str | None = None) -> str:
        arguments = ", ".join(printer._print(argument) for argument in self.args)
        power = "" if exp is None else f"^{{{exp}}}"
        return rf"{self.letter}\left({arguments}\right){power}"


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
        """The values at m and s, for Gaussian logits."""
        return cls.of(GAUSSIAN, *arrays)

    @classmethod
    def of(cls, logits: Logits, *arrays: np.ndarray) -> np.ndarray:
        """The values at m >= 1, real numbers included, and s >= 0; each s is set up once."""
        shape = np.broadcast_shapes(*(np.shape(array) for array in arrays))
        positions, spread = (np.broadcast_to(array, shape).ravel() * 1.0 for array in arrays)
        values = cls.uniform(positions)
        for rows in _groups(spread):
            wanted = rows[positions[rows] > 1]
            if spread[rows[0]] > 0 and len(wanted):
                longest = float(positions[wanted].max())
                transforms = Transforms(float(spread[rows[0]]), longest, logits=logits)
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


class WeightedSquare(SoftmaxMean):
    """S = E sum_n a_n z_n^2: 1 + s^2 (m-1)(m-2)/m^2 for small logits, E max z^2 for large ones."""

    letter = "S"

    @staticmethod
    def uniform(positions: np.ndarray) -> np.ndarray:
        return np.ones_like(positions)

    @staticmethod
    def densities(transforms: Transforms) -> Mapping[int, np.ndarray]:
        return {1: transforms.moment(1, power=2)}


class SharedWithLonger(SoftmaxMean):
    """C = lim n E sum_i a_mi a_ni, n -> infinity, of one query over prefixes m and n.

    n a_ni tends to e^(l_i - s^2/2).
    """

    letter = "C"

    @staticmethod
    def uniform(positions: np.ndarray) -> np.ndarray:
        return np.ones_like(positions)

    @classmethod
    def integrated(cls, positions: np.ndarray, transforms: Transforms) -> np.ndarray:
        assert transforms.logits.gaussian, "a tilted Gaussian is a shifted one, nothing else is"
        before = transforms.log_phi_before(transforms.s**2)
        return transforms.integral(positions, 1, transforms.moment(1), before)


class Entropy(SoftmaxMean):
    """H = -E sum_n a_n ln a_n = E ln S - s^2 (1 - A)."""

    letter = "H"

    @staticmethod
    def uniform(positions: np.ndarray) -> np.ndarray:
        return np.asarray(np.log(positions))

    @classmethod
    def integrated(cls, positions: np.ndarray, transforms: Transforms) -> np.ndarray:
        leaning = transforms.integral(positions, 1, transforms.shared())
        return transforms.log_partition(positions) - transforms.s * leaning


NEGLIGIBLE = 1e-12
"""Scales with s^2 u below this are taken at s = 0: no mean here is further from it relative."""

REMEMBERED = 4096
"""Numbers, at most, in an array whose means are kept."""


def mixed(function: type[SoftmaxMean], logits: Logits, positions: Any, spread: Any) -> np.ndarray:
    """E_u function(m, s sqrt(u)) over the scales u of the logits: a mean over queries.

    `positions` m and `spread` s broadcast.

    >>> float(mixed(Participation, GAUSSIAN, 2, 1.0)) == float(Participation.numbers(2, 1.0))
    True
    """
    arrays = [np.array(each, dtype=float) for each in np.broadcast_arrays(positions, spread)]
    if arrays[0].size > REMEMBERED:
        return _mixed(function.of, logits, *arrays)
    described = (each.tobytes() for each in arrays)
    return _remembered(function.of, logits, arrays[0].shape, *described).copy()


@lru_cache(maxsize=256)
def _remembered(
    of: Callable[..., np.ndarray], logits: Logits, shape: tuple[int, ...], *described: bytes
) -> np.ndarray:
    """The places of a network and the claims about them ask for the same means again and again."""
    return _mixed(of, logits, *(np.frombuffer(each).reshape(shape) for each in described))


def _mixed(
    of: Callable[..., np.ndarray], logits: Logits, positions: np.ndarray, spread: np.ndarray
) -> np.ndarray:
    u, weights = logits.scales()
    scaled = spread[..., None] * np.sqrt(u)
    scaled[scaled**2 < NEGLIGIBLE] = 0.0
    return np.asarray(of(logits, positions[..., None], scaled) @ weights)


WIDTHS = ("d_h", "freedom")


class FiniteWidth(Lettered):
    """E_u f(m, s sqrt(u)) of a mean f, as a function of m, s and d_h (and D).

    `function` is f, `slack` that of the keys' norms; without D it is infinite.
    """

    by = "two one-dimensional quadratures"
    nargs = (3, 4)
    function: ClassVar[type[SoftmaxMean]]
    slack: ClassVar[float] = 0.0

    @classmethod
    def numbers(cls, *arrays: np.ndarray) -> np.ndarray:
        positions, spread, *widths = np.broadcast_arrays(*arrays)
        values = np.empty(positions.shape)
        stacked = np.stack(widths)
        for pair in np.unique(stacked.reshape(len(widths), -1), axis=1).T:
            rows = (stacked == pair.reshape(-1, *[1] * positions.ndim)).all(axis=0)
            logits = Logits(slack=cls.slack, **dict(zip(WIDTHS, pair, strict=False)))
            values[rows] = mixed(cls.function, logits, positions[rows], spread[rows])
        return values


class ParticipationFiniteHead(FiniteWidth):
    """P(m, s, d_h, D) = E_u A(m, s sqrt(u))."""

    letter = "P"
    function = Participation


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


GAUSSIAN_LOGITS = "derived here, for i.i.d. Gaussian logits of variance s^2"
SOFTMAX_SQUARES = r"\mathbb{E}\sum_n a_{mn}^2"


def formulas() -> Iterator[Formula]:
    """Participation, tilt and entropy of a softmax, and where the tilt takes over."""
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
        "attention.weighted_square",
        WeightedSquare(m, s),
        "How far the weights prefer keys of large components along the query, of either sign.",
        Status.EXACT,
        GAUSSIAN_LOGITS,
        r"\mathbb{E}\sum_n a_{mn} z_n^2",
    )
    yield Formula(
        "attention.participation_shared",
        SharedWithLonger(m, s),
        "What one query's weights over m logits share with its own over an endless prefix.",
        Status.EXACT,
        GAUSSIAN_LOGITS,
        r"\lim_{n \to \infty} n\,\mathbb{E}\sum_i a_{mi} a_{ni}",
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
        "attention.breakdown_length",
        BreakdownLength(s, d),
        "The length at which the tilt contributes as much as the averaging: (d - 1) A = B.",
        Status.EXACT,
        GAUSSIAN_LOGITS,
        "m_*",
    )
