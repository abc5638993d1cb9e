"""What blocks of draws take of a device's memory: estimated before them, measured on a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

from montecarlo.sampler import Conditions, Group
from nope.devices import DTYPES

T = TypeVar("T")

LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""Where Linux tells a container how much memory it may use, in both versions of its groups."""
FILLED = 0.9
"""The share of a GPU's free memory that blocks fill: the rest is lost between odd sizes."""
STREAMS = 32
"""Blocks side by side at most: torch has so many streams on a GPU."""


# ------------------------------------------------------------------------------ estimated


def block_bytes(group: Group, dtype: str, device: str = "cpu") -> int:
    """Roughly how much memory a block of draws takes while it is computed, chunk by chunk.

    That is a step's working set and as much again for what is looked at later.
    """
    numbers = 2 * group.working_set * group.chunk_size(device)
    return numbers * torch.finfo(DTYPES[dtype]).bits // 8


def capacity(device: str) -> int:
    """The bytes of memory that a device has; a very large number where it does not say."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no such call, or no such name, on this system
        installed = sys.maxsize
    return min(installed, *map(_limit, LIMITS))


def _limit(file: Path) -> int:
    """What a file says that a container may use; no file or "max" is no limit."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return sys.maxsize


def require_memory(groups: Iterable[Group], conditions: Conditions, workers: int = 1) -> None:
    """Raise `MemoryError` where a block on each of `workers` is more than the device holds."""
    there = capacity(conditions.device)
    for group in groups:
        wanted = block_bytes(group, conditions.dtype, conditions.device) * workers
        if wanted > there:
            d_model, n_ctx = group.architecture.d_model, group.architecture.n_ctx
            raise MemoryError(
                f"expected blocks that fit into {there / 2**30:.3g} GiB, got {workers} at once of "
                f"{wanted / workers / 2**30:.3g} GiB for d_model = {d_model}, n_ctx = {n_ctx}; use "
                f"{'fewer workers' if workers * there >= wanted > there else 'smaller sizes'}"
            )


# ------------------------------------------------------------------------------- measured


def fitting(free: int, block: int) -> int:
    """How many blocks of `block` bytes fit side by side into `free` bytes: from 1 to `STREAMS`.

    >>> fitting(free=80_000, block=10_000)
    7
    """
    return max(1, min(STREAMS, int(FILLED * free) // max(1, block)))


def measured(device: str, compute: Callable[[], T]) -> tuple[T, int]:
    """What a block's computation gives, and how many like it fit side by side on the device.

    On a GPU that is told by the most memory it held, and by what is free afterwards: the
    device's, and torch's own that holds no tensor.  Elsewhere it is 1: there, blocks side by side
    are the business of worker processes.
    """
    if not device.startswith("cuda"):
        return compute(), 1
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = compute()
    block = torch.cuda.max_memory_allocated(device) - before
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free, _ = torch.cuda.mem_get_info(device)
    return result, fitting(free + idle, block)


def own_stream(device: str, slot: int) -> AbstractContextManager[object]:
    """Has a thread's work on a GPU go on beside that of others, each in a slot of its own.

    A slot is the same stream every time: what torch keeps of its memory serves no other.
    """
    if not device.startswith("cuda"):
        return nullcontext()
    return torch.cuda.stream(_stream(device, slot))


@cache
def _stream(device: str, slot: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
