"""Mehler's formula: E phi(X) phi(Y) of a centred Gaussian pair as a power series.

With variances a, b and correlation rho,

    E phi(X) phi(Y) = sum_k h_k(a) h_k(b) rho^k,    h_k(v) = E phi(sqrt(v) Z) He_k(Z)/sqrt(k!).

By Cauchy and Schwarz the terms from K on are at most |rho|^K T_K(a) T_K(b), where Parseval
gives T_K(v)^2 = E phi(sqrt(v) Z)^2 - sum_{k<K} h_k(v)^2.  Even and odd k belong to the even and
the odd part of phi, and each is a power series in rho^2 with an end of its own.  The formula is
classical (Mehler 1866); the bound is derived here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

TOLERANCE = 1e-9
"""What the series may drop, relative to sqrt(E phi(X)^2 E phi(Y)^2)."""
TERMS = 64
"""Terms of each parity, at most."""
ROUNDING = 2e-15
"""Below this a tail's square, the difference of two sums, is not known."""
BLOCK = 4096
"""Variances expanded at once, for the sake of memory."""

Function = Callable[[np.ndarray], np.ndarray]


@cache
def half_line() -> tuple[np.ndarray, np.ndarray]:
    """Nodes z > 0 and weights such that weights @ f(z) = E f(Z) for an even f.

    Gauss and Legendre's rule on dyadic panels from 2^-20 on, which resolve the bend of
    phi(sqrt(v) z) near z = 1/sqrt(v) for v up to 10^12, and on panels of width 1 up to 13,
    where the integrands, which fall like exp(-z^2/4) or faster, are below 10^-18.
    """
    points, weights = np.polynomial.legendre.leggauss(16)
    edges = np.concatenate([[0.0], 2.0 ** np.arange(-20, 0), np.arange(1.0, 14.0)])
    half = np.diff(edges)[:, None] / 2
    z = (edges[:-1, None] + half * (1 + points)).ravel()
    return z, (half * weights).ravel() * np.sqrt(2 / np.pi) * np.exp(-(z**2) / 2)


@cache
def weighted_polynomials() -> np.ndarray:
    """He_k(z)/sqrt(k!), k = 2j + parity, times the weights of the nodes; (parity, nodes, j)."""
    z, weights = half_line()
    columns = [np.ones_like(z), z]
    for k in range(1, 2 * TERMS - 1):
        columns.append((z * columns[k] - np.sqrt(k) * columns[k - 1]) / np.sqrt(k + 1))
    weighted = np.stack(columns, axis=1) * weights[:, None]
    return np.stack([weighted[:, 0::2], weighted[:, 1::2]])


def expand(phi: Function, variances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """h_k(v), k = 2j + parity, and T_k(v) of this parity relative to sqrt(E phi(sqrt(v) Z)^2).

    Shapes (parity, n, j) with j < TERMS and j <= TERMS, for `variances` of shape (n,).
    """
    blocks = np.array_split(variances, len(variances) // BLOCK + 1)
    coefficients, tails = zip(*(_expand(phi, block) for block in blocks), strict=True)
    return np.concatenate(coefficients, axis=1), np.concatenate(tails, axis=1)


def _expand(phi: Function, variances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    z, weights = half_line()
    x = np.sqrt(variances)[:, None] * z
    above, below = phi(x), phi(-x)
    parts = np.stack([above + below, above - below]) / 2
    coefficients = parts @ weighted_polynomials()
    energies = (parts**2 @ weights)[..., None]
    left = energies - np.cumsum(coefficients**2, axis=-1)
    size = np.maximum(energies.sum(axis=0), np.finfo(float).tiny)
    tails = np.concatenate([energies, left], axis=-1) / size
    return coefficients, np.sqrt(np.maximum(tails, ROUNDING))


def correlation(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c/sqrt(ab) held to [-1, 1]; 0 where a variance is 0."""
    scale = np.broadcast_to(np.sqrt(a) * np.sqrt(b), np.broadcast_shapes(a.shape, b.shape, c.shape))
    ratio = np.divide(c, scale, out=np.zeros(scale.shape), where=scale > 0)
    return np.asarray(np.clip(ratio, -1, 1))


def horner(rows: np.ndarray, at_a: np.ndarray, at_b: np.ndarray, square: np.ndarray) -> np.ndarray:
    """sum_j rows[j, at_a] rows[j, at_b] square^j."""
    total, term = np.zeros(square.shape), np.empty(square.shape)
    for row in rows[::-1]:
        total *= square
        total += np.multiply(row[at_a], row[at_b], out=term)
    return total


def mehler(phi: Function, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """E phi(X) phi(Y) by the series; NaN where `TERMS` terms do not reach `TOLERANCE`.

    a, b and c broadcast.  phi is expanded once for each distinct variance.
    """
    distinct, index = np.unique(np.concatenate([a.ravel(), b.ravel()]), return_inverse=True)
    at_a, at_b = index[: a.size].reshape(a.shape), index[a.size :].reshape(b.shape)
    rho = correlation(a, b, c)
    square, farthest = rho**2, np.abs(rho).max(initial=0)
    values, dropped = np.zeros(rho.shape), np.zeros(rho.shape)
    for parity, (coefficients, tails) in enumerate(zip(*expand(phi, distinct), strict=True)):
        powers = 2 * np.arange(TERMS + 1) + parity
        worst = tails.max(axis=0, initial=0) ** 2 * farthest**powers
        enough = np.append(np.flatnonzero(worst <= TOLERANCE / 2), TERMS)[0]
        values += rho**parity * horner(coefficients.T[:enough], at_a, at_b, square)
        if worst[enough] > TOLERANCE / 2:
            dropped += tails[at_a, -1] * tails[at_b, -1] * np.abs(rho) ** powers[-1]
    values[dropped > TOLERANCE] = np.nan
    return values
