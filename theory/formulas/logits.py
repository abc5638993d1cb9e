"""The logits of one query: what finite widths make of i.i.d. Gaussians.

Given the query q, the key map makes a direction w = W_K q of it, and the logit of token n is the
component of e_n along w:

    l_n = s sqrt(u) z_n,   z_n i.i.d. of mean 0 and variance 1,   E u = 1.

The scale u is a product of chi^2_k/k: of q (k = d_h, the width of a head), of w (k the dimension
of the tokens), and of the query's own token where its norm fluctuates.  The shape is Gaussian
for Gaussian tokens; tokens of fixed norm lie on a sphere, z_n is sqrt(D) times a coordinate on
the unit sphere of R^D, and LayerNorm leaves D = d - 1.  Both are exact at any width, for
independent tokens and Gaussian maps.  Norms that keep a part of their fluctuation (`slack`) have
that part of what Gaussian tokens add to the fourth moments: right to first order in 1/D.  Derived
here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, reduce

import numpy as np

from nope.checks import expect

TAIL = 36.0
"""Integrals end where what is left is e^-TAIL of the whole, the size of float64's rounding."""
STEP = 0.25
"""A trapezoidal rule of this step is off by about e^(-pi^2/STEP) = 7e-18: e^-u, u = exp(x), is
bounded in a strip of half-width pi/2."""
NARROW = 4.0
"""Up to the square of this many dimensions a sphere has a Gauss rule, or else finer steps."""
MOST_NODES = 2048
"""Of a Gauss rule."""


@dataclass(frozen=True)
class Logits:
    """Of heads of width `d_h` over keys of dimension `freedom`.

    `slack` is the relative variance of a key's squared norm over that of a Gaussian's, 2/D: 0 on a
    sphere.  Infinite widths leave i.i.d. Gaussian logits.  Raises `ValueError` for widths below 1
    and a slack beyond [0, 1].
    """

    d_h: float = np.inf
    freedom: float = np.inf
    slack: float = 0.0

    def __post_init__(self) -> None:
        for name, width in (("d_h", self.d_h), ("freedom", self.freedom)):
            expect(width >= 1, f"{name} to be at least 1", width, f"change {name}")
        expect(0 <= self.slack <= 1, "slack from 0 to 1", self.slack, "change slack")

    def scales(self) -> tuple[np.ndarray, np.ndarray]:
        """Values of u and their probabilities."""
        own = self.freedom / self.slack if self.slack else np.inf
        return product_of_chi_squares(self.d_h, self.freedom, own)

    @property
    def sphere(self) -> float:
        """The dimension of the sphere whose coordinates z are: their excess kurtosis is -6/(D + 2),
        and 1 - slack of it is left."""
        return (self.freedom + 2) / (1 - self.slack) - 2 if self.slack < 1 else np.inf

    def shape(self, s: float, reach: float) -> tuple[np.ndarray, np.ndarray]:
        """Values of z, symmetric, and their probabilities, for functions of exp(s z).

        A trapezoidal rule, which ends where the density is e^(-reach^2/2) of its height, or, on a
        sphere of few dimensions, a Gauss rule: exp(-e^(x + s z)) is bounded in a strip of
        half-width pi/(2 s), which takes 12 s sqrt(D) nodes.  At D = 1 z is 1 or -1.
        """
        step = min(0.5, STEP / s)
        dimension = self.sphere
        if np.isinf(dimension):
            z = lattice(-reach, reach, step)
            return z, _normalised(np.exp(-(z**2) / 2))
        if dimension == 1:
            return np.array([-1.0, 1.0]), np.array([0.5, 0.5])
        nodes = 16 + 12 * s * np.sqrt(dimension)
        if dimension <= NARROW**2 and nodes <= MOST_NODES:
            return _gauss_rule(dimension, 2 ** int(np.ceil(np.log2(nodes))))
        return _sphere(dimension, step, reach)

    @property
    def gaussian(self) -> bool:
        """Whether z is Gaussian."""
        return bool(np.isinf(self.sphere))


@lru_cache(maxsize=64)
def _gauss_rule(dimension: float, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Gegenbauer's, whose weight is the density (1 - z^2/D)^((D-3)/2), of an even number of nodes.

    Golub and Welsch's (1969): nodes are eigenvalues of the Jacobi matrix J, weights the squares of
    the eigenvectors' first entries.  J's diagonal is 0, so J^2 leaves the even entries among
    themselves, a tridiagonal matrix of half the size that has the squared nodes.  SciPy's weights,
    from the polynomial at its rounded nodes, are off by up to 1e-7 at 2048 nodes.
    """
    from scipy.linalg import eigh_tridiagonal

    order, k = (dimension - 2) / 2, np.arange(2, nodes)
    others = k * (k + 2 * order - 1) / (4 * (k + order) * (k + order - 1))
    squares = np.concatenate([[0, 1 / (2 * (1 + order))], others, [0]])  # J_(k-1)k^2, k = 0 .. n
    even, odd = squares[::2], squares[1::2]
    y, vectors = eigh_tridiagonal(even[:-1] + odd, np.sqrt(odd[:-1] * even[1:-1]))
    z, weights = np.sqrt(dimension * np.maximum(y, 0)), vectors[0] ** 2
    return np.concatenate([-z[::-1], z]), _normalised(np.concatenate([weights[::-1], weights]))


def _sphere(dimension: float, step: float, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """sqrt(D) times a coordinate on the unit sphere of R^D: z = sqrt(D) tanh y.

    The density (1 - z^2/D)^((D-3)/2) becomes cosh(y)^(1-D), smooth at the ends too.
    """
    # cosh(end)^(1-D) = e^(-reach^2/2), and e^y/2 stands for cosh(y) where it is large
    depth = reach**2 / 2 / (dimension - 1)
    end = depth + np.log1p(np.sqrt(-np.expm1(-2 * depth)))
    # tanh is bounded in a strip of the width of a few steps, however few the dimensions
    y = lattice(-end, end, step / max(np.sqrt(dimension), NARROW))
    log_cosh = np.logaddexp(y, -y) - np.log(2)
    return np.sqrt(dimension) * np.tanh(y), _normalised(np.exp((1 - dimension) * log_cosh))


def product_of_chi_squares(*degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """Values and probabilities of a product of independent chi^2_k/k, k up to infinity (1).

    A trapezoidal rule in y = ln u, whose density prop. to exp((k/2) (y - e^y)) is smooth at any
    k; in y the product is a convolution.  With w = sqrt(2 TAIL/(k/2)), what lies beyond
    -(w + w^2/2) and ln(1 + w + w^2/2) is less than e^-TAIL of it.
    """
    finite = [k / 2 for k in degrees if np.isfinite(k)]
    if not finite:
        return np.ones(1), np.ones(1)
    step = 0.8 / np.sqrt(max(finite) + 5)
    ends = [np.sqrt(2 * TAIL / k) + TAIL / k for k in finite]
    first = [-int(np.ceil(end / step)) for end in ends]
    last = [int(np.ceil(np.log1p(end) / step)) for end in ends]
    y = [step * np.arange(a, b + 1) for a, b in zip(first, last, strict=True)]
    densities = [np.exp(k * (each - np.expm1(each))) for k, each in zip(finite, y, strict=True)]
    weights = reduce(np.convolve, densities)
    u = np.exp(step * (sum(first) + np.arange(len(weights))))
    kept = weights > np.exp(-TAIL) * weights.max()
    return u[kept], _normalised(weights[kept])


def lattice(low: float, high: float, step: float) -> np.ndarray:
    """Points from `low` to `high`, at most `step` apart, symmetric if the ends are."""
    return np.linspace(low, high, int(np.ceil((high - low) / step)) + 1)


def _normalised(weights: np.ndarray) -> np.ndarray:
    return np.asarray(weights / weights.sum())
