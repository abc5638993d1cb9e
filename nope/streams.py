"""Random streams for torch: one per tensor, keyed by what the tensor is.

Every tensor a sampler draws has a stream of its own, keyed by (seed, block, path), so
drawing one more tensor changes no other.  `torch.Generator.manual_seed` is not enough for
that on the CPU: it keeps only the low 32 bits of the seed, and two of 10,000 streams then
coincide with a probability of about 1%.  The Mersenne Twister's whole state is set
instead, expanded from 256 bits by NumPy's `SeedSequence`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nope.sources import cumulative, haar, truncate

# torch's CPU generator state: seed (8 bytes), left (4), seeded (4), next (8), 624 words (8 each).
_LEFT, _WORDS = slice(8, 12), slice(24, 24 + 624 * 8)


def generator(key: int, device: torch.device) -> torch.Generator:
    """A generator whose stream depends on all bits of `key` (64 of them off the CPU)."""
    fresh = torch.Generator(device=device)
    if device.type != "cpu":
        return fresh.manual_seed(key & (2**63 - 1))
    fresh.manual_seed(0)
    words = np.random.MT19937(np.random.SeedSequence(key)).state["state"]["key"]
    state = fresh.get_state().numpy().copy()
    state[_LEFT] = np.frombuffer(np.int32(1).tobytes(), dtype=np.uint8)
    state[_WORDS] = np.frombuffer(words.astype(np.uint64).tobytes(), dtype=np.uint8)
    fresh.set_state(torch.from_numpy(state))
    return fresh


LARGE = 2**25
"""Arrays of this many bytes are in new memory each time; smaller ones reuse what was freed."""


def _in_huge_pages(size: int) -> Tensor:
    """So many new bytes on the CPU, for which NumPy asks for huge pages and torch does not.

    Normals fill them at 390 million a second instead of 250.  They begin at a multiple of 64 bytes
    as torch's arrays do, since the order of sums in a product may depend on that.
    """
    memory = np.empty(size + 64, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    return torch.from_numpy(memory[start : start + size])


@dataclass(frozen=True)
class TorchSource:
    """Random numbers in torch tensors: the `nope.sources.Source` of the real layers.

    What needs float64 or a QR is done on the CPU for MPS, which has neither; the numbers come
    from the device's own stream all the same.
    """

    generator: torch.Generator
    device: torch.device
    dtype: torch.dtype

    def normal(self, shape: tuple[int, ...], std: float) -> Tensor:
        return self._empty(shape).normal_(0.0, std, generator=self.generator)

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, device=self.device, dtype=self.dtype)

    def uniform(self, shape: tuple[int, ...], bound: float) -> Tensor:
        return self._empty(shape).uniform_(-bound, bound, generator=self.generator)

    def truncated_normal(self, shape: tuple[int, ...], std: float, cut: float) -> Tensor:
        drawn: Tensor = truncate(self._unit(shape), std, cut, torch.erfinv)
        return drawn.to(self.device, self.dtype)

    def orthogonal(self, shape: tuple[int, ...]) -> Tensor:
        drawn: Tensor = haar(self._capable(self.normal(shape, 1.0)), torch.linalg.qr)
        return drawn.to(self.device)

    def categorical(self, probabilities: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        unit = self._unit(shape)
        sums = torch.from_numpy(cumulative(probabilities)).to(unit.device)
        return torch.searchsorted(sums, unit, right=True).to(self.device)

    def integers(self, shape: tuple[int, ...], high: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def windows(self, values: np.ndarray, shape: tuple[int, int]) -> Tensor:
        every = torch.tensor(values, device=self.device).unfold(0, shape[1], 1)
        return every[self.integers(shape[:1], len(every))]

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape) * self.dtype.itemsize
        if self.device.type == "cpu" and size >= LARGE:
            return _in_huge_pages(size).view(self.dtype).view(shape)
        return torch.empty(shape, device=self.device, dtype=self.dtype)

    def _unit(self, shape: tuple[int, ...]) -> Tensor:
        """U(0, 1) in float64, 0 included and 1 not; of 24 bits on MPS, else of 53."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        drawn = torch.empty(shape, device=self.device, dtype=dtype)
        return self._capable(drawn.uniform_(generator=self.generator)).double()

    def _capable(self, x: Tensor) -> Tensor:
        return x.cpu() if self.device.type == "mps" else x
