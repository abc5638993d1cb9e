"""What we are timed against: the same numbers by the shortest honest way."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy.integrate import quad
from torch import Tensor, nn


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


def plain_layers(
    d_model: int, n_heads: int, n_ctx: int, grid: Tensor, std: float = 0.02
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless draws of a `torch.nn` layer: x_m^2 averaged over coordinates, cosines on a grid.

    Each is built, initialised to N(0, std^2) without biases, and run on tokens of the same law.
    `grid` holds positions counted from 0.
    """
    mask = nn.Transformer.generate_square_subsequent_mask(n_ctx)
    while True:
        layer = nn.TransformerEncoderLayer(
            d_model,
            n_heads,
            dim_feedforward=4 * d_model,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=0.0,
            batch_first=True,
            norm_first=True,
            bias=False,
        )
        for weight in layer.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=std)
        tokens = std * torch.randn(1, n_ctx, d_model)
        x = layer.eval()(tokens, src_mask=mask, is_causal=True)[0]
        units = nn.functional.normalize(x[grid], dim=-1)
        yield x.square().mean(-1), units @ units.T
