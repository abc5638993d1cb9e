"""Streaming moments of per-draw statistics: mergeable, in float64, of constant size.

A statistic has K components per entry (K = 1 for a mean, 2 or 3 for a ratio of means).  Kept
are the count, the mean, and the second and third central sums over draws, with cross terms,
so that the variance and the skewness of any smooth function of the mean follow by the delta
method.  Merging is Chan's update and its third-order form; blocks are merged in index order,
so the result does not depend on who computed them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations_with_replacement, permutations

import numpy as np


@dataclass(frozen=True, eq=False)
class Moments:
    """`mean` is K x entries; `second` sums d_i d_j, `third` d_i d_j d_k, d = draw - mean."""

    count: int
    mean: np.ndarray
    second: np.ndarray
    third: np.ndarray

    @classmethod
    def of(cls, draws: np.ndarray) -> Moments:
        """The moments of an array of shape draws x K x entries."""
        x = np.asarray(draws, dtype=np.float64)
        mean = x.mean(0)
        d = x - mean
        parts, entries = len(mean), mean.shape[1:]
        second, third = np.empty((parts, parts, *entries)), np.empty((parts,) * 3 + entries)
        for i, j in combinations_with_replacement(range(parts), 2):  # they are symmetric
            product = d[:, i] * d[:, j]
            second[i, j] = second[j, i] = product.sum(0)
            for k in range(j, parts):
                sums = np.einsum("n...,n...->...", product, d[:, k])
                for axes in permutations((i, j, k)):
                    third[axes] = sums
        return cls(len(x), mean, second, third)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of draws together."""
        a, b = self.count, other.count
        total = a + b
        shift = other.mean - self.mean
        outer = np.einsum("i...,j...->ij...", shift, shift)
        mixed = np.einsum("i...,jk...->ijk...", shift, (a * other.second - b * self.second) / total)
        cube = np.einsum("i...,jk...->ijk...", shift, outer) * (a * b * (a - b) / total**2)
        rotations = mixed + np.moveaxis(mixed, 0, 1) + np.moveaxis(mixed, 0, 2)
        return Moments(
            total,
            self.mean + shift * (b / total),
            self.second + other.second + outer * (a * b / total),
            self.third + other.third + cube + rotations,
        )

    def scaled(self, count: int) -> Moments:
        """The moments of `count` draws with the mean, spread and skewness of these."""
        share = count / self.count
        return Moments(count, self.mean, self.second * share, self.third * share)

    def covariance_with(self, gradient: np.ndarray) -> np.ndarray:
        """The covariance of each component with the combination `gradient`, K x entries."""
        product = np.einsum("ij...,j...->i...", self.second, gradient)
        return np.asarray(product / (self.count - 1))

    def along(self, gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Variance per draw and skewness of the linear combination `gradient` (K x entries).

        The variance is unbiased (infinite for one draw); the skewness is 0 where it vanishes.
        """
        g = gradient
        square = np.einsum("i...,j...,ij...->...", g, g, self.second)
        cube = np.einsum("i...,j...,k...,ijk...->...", g, g, g, self.third)
        if self.count < 2:
            return np.full(square.shape, np.inf), np.zeros(square.shape)
        square = np.maximum(square, 0.0)
        root = np.sqrt(square / self.count) ** 3
        skewness = np.divide(cube / self.count, root, out=np.zeros_like(root), where=root > 0)
        return square / (self.count - 1), skewness
