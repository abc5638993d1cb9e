"""What the theory is timed against: the same numbers by the shortest honest way."""

from __future__ import annotations

import math

import numpy as np
from scipy.integrate import quad


def uniform_stack(n_layers: int, n_ctx: int, d: int = 768, std: float = 0.02) -> np.ndarray:
    """E x_m^2 after pre-LN layers with a_mn = 1/m, GELU and GPT-2's weights, by recursion."""
    m = np.arange(1.0, n_ctx + 1)
    kernel, into_stream = std**2 * np.eye(n_ctx), std / math.sqrt(2 * n_layers)
    for _ in range(n_layers):
        means = _cosine(kernel).cumsum(0).cumsum(1) / np.outer(m, m)
        kernel = kernel + (d * std * into_stream) ** 2 * means
        v, c = d * std**2, d * std**2 * _cosine(kernel)
        w = np.sqrt((1 + v) ** 2 - c**2)
        dual = c / 4 + c * np.arcsin(c / (1 + v)) / (2 * math.pi)
        dual += (v**2 - c**2 + 2 * c**2 / (1 + v)) / (2 * math.pi * w)
        kernel = kernel + 4 * d * into_stream**2 * dual
    return np.asarray(np.diagonal(kernel))


def _cosine(kernel: np.ndarray) -> np.ndarray:
    root = np.sqrt(np.diagonal(kernel))
    return np.asarray(kernel / np.outer(root, root))


def _transform(x: float, s: float, k: int, power: int = 0) -> float:
    """E z^power u^k e^-u, u = exp(x + s z)."""

    def density(z: float) -> float:
        log_u = min(x + s * z, 700.0)
        return z**power * math.exp(k * log_u - math.exp(log_u) - z * z / 2) / math.sqrt(2 * math.pi)

    return float(quad(density, -9, 9)[0])


def A_by_quad(m: int, s: float) -> float:  # noqa: N802
    """A(m, s), one quadrature inside another."""
    return float(
        quad(lambda x: m * _transform(x, s, 2) * _transform(x, s, 0) ** (m - 1), -25, 12)[0]
    )


def B_by_quad(m: int, s: float) -> float:  # noqa: N802
    """B(m, s), likewise."""

    def density(x: float) -> float:
        own = _transform(x, s, 2, power=2) * _transform(x, s, 0)
        return (
            m * (own + (m - 1) * _transform(x, s, 1, power=1) ** 2) * _transform(x, s, 0) ** (m - 2)
        )

    return float(quad(density, -25, 12)[0])
