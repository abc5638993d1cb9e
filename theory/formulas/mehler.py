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
from typing import NamedTuple

import numpy as np

TOLERANCE = 1e-9
"""What the series may drop, relative to sqrt(E phi(X)^2 E phi(Y)^2)."""
TERMS = 64
"""Terms of each parity, at most."""

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
    """He_k(z)/sqrt(k!), k < 2 TERMS, times the weights of the nodes; shape (nodes, k)."""
    z, weights = half_line()
    columns = [np.ones_like(z), z]
    for k in range(1, 2 * TERMS - 1):
        columns.append((z * columns[k] - np.sqrt(k) * columns[k - 1]) / np.sqrt(k + 1))
    return np.asarray(np.stack(columns, axis=1) * weights[:, None])


class Part(NamedTuple):
    """The even or the odd part of phi(sqrt(v) .), one column for each v.

    `coefficients[j]` is h_k(v) at k = 2j or 2j + 1; `tails[j]`, j = 0..TERMS, is this parity's
    T_k(v) relative to sqrt(E phi(sqrt(v) Z)^2).
    """

    coefficients: np.ndarray
    tails: np.ndarray

    def at(self, index: np.ndarray) -> Part:
        """The columns `index`, in its shape."""
        return Part(self.coefficients[:, index], self.tails[:, index])


def expand(phi: Function, variances: np.ndarray) -> list[Part]:
    """The even and the odd part of `phi` at variances of shape (n,)."""
    z, weights = half_line()
    x = np.sqrt(variances)[:, None] * z
    above, below = phi(x), phi(-x)
    parts = np.stack([above + below, above - below]) / 2
    energies = parts**2 @ weights
    size = np.maximum(energies.sum(axis=0), np.finfo(float).tiny)
    expanded = []
    for parity, (part, energy) in enumerate(zip(parts, energies, strict=True)):
        coefficients = (part @ weighted_polynomials()[:, parity::2]).T
        left = energy - np.cumsum(coefficients**2, axis=0)
        tails = np.sqrt(np.maximum(np.vstack([energy, left]), 0) / size)
        expanded.append(Part(coefficients, tails))
    return expanded


def correlation(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c/sqrt(ab) held to [-1, 1]; 0 where a variance is 0."""
    scale = np.broadcast_to(np.sqrt(a) * np.sqrt(b), np.broadcast_shapes(a.shape, b.shape, c.shape))
    ratio = np.divide(c, scale, out=np.zeros(scale.shape), where=scale > 0)
    return np.asarray(np.clip(ratio, -1, 1))


def horner(left: np.ndarray, right: np.ndarray, square: np.ndarray) -> np.ndarray:
    """sum_j left[j] right[j] square^j."""
    total, term = np.zeros(square.shape), np.empty(square.shape)
    for first, second in zip(left[::-1], right[::-1], strict=True):
        total *= square
        total += np.multiply(first, second, out=term)
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
    for parity, part in enumerate(expand(phi, distinct)):
        left, right = part.at(at_a), part.at(at_b)
        powers = 2 * np.arange(TERMS + 1) + parity
        worst = _largest(left.tails) * _largest(right.tails) * farthest**powers
        enough = np.append(np.flatnonzero(worst <= TOLERANCE / 2), TERMS)[0]
        values += rho**parity * horner(
            left.coefficients[:enough], right.coefficients[:enough], square
        )
        if worst[enough] > TOLERANCE / 2:
            dropped += left.tails[-1] * right.tails[-1] * np.abs(rho) ** powers[-1]
    values[dropped > TOLERANCE] = np.nan
    return values


def _largest(tails: np.ndarray) -> np.ndarray:
    return np.asarray(tails.reshape(len(tails), -1).max(axis=1, initial=0))
