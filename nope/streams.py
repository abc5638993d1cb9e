"""Random streams for torch: one per tensor, keyed by what the tensor is.

Every tensor a sampler draws has a stream of its own, keyed by (seed, block, path), so
drawing one more tensor changes no other.  `torch.Generator.manual_seed` is not enough for
that on the CPU: it keeps only the low 32 bits of the seed, and two of 10,000 streams then
coincide with a probability of about 1%.  The Mersenne Twister's whole state is set
instead, expanded from 256 bits by NumPy's `SeedSequence`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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


@dataclass(frozen=True)
class TorchSource:
    """Random numbers in torch tensors: the `nope.init.Source` of the real layers."""

    generator: torch.Generator
    device: torch.device
    dtype: torch.dtype

    def normal(self, shape: tuple[int, ...], std: float) -> Tensor:
        empty = torch.empty(shape, device=self.device, dtype=self.dtype)
        return empty.normal_(0.0, std, generator=self.generator)

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, device=self.device, dtype=self.dtype)
