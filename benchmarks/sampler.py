"""The speed of the sampler: its share of what the machine can do, and a plain loop beside it.

    make bench

A draw of one layer needs its weights and tokens generated and its products computed.  The floor is
the time that takes at the rates which the same machine reaches in the same run with nothing else to
do: normals generated in place in the cache, products of float32 matrices that stay there.  What a
draw needs besides (softmax, norms, activations, statistics) is not in the floor.

Every core has a worker of one thread, and the rates are those of all together.  Rates, our draws
and the plain loop's take turns, five rounds; figures are medians over rounds of each round's ratio.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from itertools import count
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

import nope
from benchmarks.baselines import plain_layers
from benchmarks.results import Result, keep, machine, table
from benchmarks.theory import Bench, Work
from montecarlo import Conditions, engines, sampler
from montecarlo.moments import Moments
from montecarlo.sampler import Group
from nope.questions import position_grid

ROUNDS = 5
SECONDS = 0.5
"""How long each side of a round is timed, by a block or a draw at the least."""
OBSERVABLES = ("second_moment", "cosine")
DIFFERENT = 6.0
"""Means that differ by more standard errors than this are not of the same law."""


class Size(NamedTuple):
    """A layer with an MLP of width 4d: d_model, n_heads, n_ctx."""

    d: int
    H: int
    L: int

    @property
    def normals(self) -> int:
        """W_Q, W_K, W_V, W_O, the MLP's two matrices, and the tokens."""
        return 12 * self.d**2 + self.L * self.d

    @property
    def operations(self) -> int:
        """Of the products with these matrices, the scores and the mixing: 2 per multiplication."""
        return 2 * self.L * 12 * self.d**2 + 4 * self.L**2 * self.d


SHARES = {
    Size(64, 4, 64): 0.5,
    Size(128, 4, 128): 0.6,
    Size(256, 4, 256): 0.7,
    Size(768, 12, 512): 0.75,
}
"""Of the floor, to reach."""
RATIOS = dict(zip(SHARES, (8, 4, 2.5, 1.7), strict=True))
"""Of our draws per second to the plain loop's, to reach."""


def questions(size: Size, n_layers: int = 1) -> list[nope.Question]:
    architecture = nope.decoder(size.d, size.H, n_layers, n_ctx=size.L)
    place = f"blocks.{n_layers - 1}.resid_post"
    return [nope.Question(architecture, nope.init.normal(0.02), place, o) for o in OBSERVABLES]


# ----------------------------------------------------------------------- what is timed, per second


def rate(work: Callable[[], float]) -> float:
    """What calls of `work` do per second, by the sum of what they return."""
    done, begin = 0.0, time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        done += work()
    return done / (time.perf_counter() - begin)


def normals() -> float:
    """Normals generated in place, 256 KiB."""
    numbers = torch.empty(2**16)

    def fill() -> float:
        numbers.normal_()
        return numbers.numel()

    with sampler.one_thread():
        return rate(fill)


def operations() -> float:
    """Operations of a product of float32 matrices, 1 MiB each."""
    a, b, c = torch.randn(3, 512, 512)

    def multiply() -> float:
        torch.mm(a, b, out=c)
        return 2 * len(a) ** 3

    with sampler.one_thread():
        return rate(multiply)


def ours(size: Size) -> float:
    """Draws from the sampler, on one thread."""
    asked, index = questions(size), count()
    group = Group.of(asked[0])

    def block() -> float:
        sampler.block(group, asked, next(index), Conditions())
        return group.block_size

    return rate(block)


def plain(size: Size, threads: int) -> float:
    """Draws from the plain loop, on so many threads."""
    sums = [Sums() for _ in OBSERVABLES]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            draws = plain_layers(*size, grid=torch.as_tensor(position_grid(size.L) - 1))
            return rate(lambda: add(sums, next(draws)))
    finally:
        torch.set_num_threads(before)


class Sums:
    """Count, sum and sum of squares of a statistic."""

    def __init__(self) -> None:
        self.count, self.first, self.second = 0, torch.zeros(()), torch.zeros(())

    def add(self, value: torch.Tensor) -> None:
        value = value.double()
        self.count += 1
        self.first = self.first + value
        self.second = self.second + value.square()


def add(sums: list[Sums], values: tuple[torch.Tensor, ...]) -> float:
    for statistic, value in zip(sums, values, strict=True):
        statistic.add(value)
    return 1


def together(executor: Executor, cores: int, work: Callable[..., float], *sizes: Size) -> float:
    """What all cores do per second."""
    return sum(f.result() for f in [executor.submit(work, *sizes) for _ in range(cores)])


# --------------------------------------------------------------------------------- what is reported


def layers(executor: Executor, cores: int, size: Size) -> Iterator[Result]:
    """The share of the floor, and the plain loop on one thread and on all cores.

    The target is for the faster of the two.
    """
    floors, found, loops = [], [], []
    together(executor, cores, ours, size)  # what is compiled, looked up and allocated once
    for _ in range(ROUNDS):
        generation, products = (together(executor, cores, w) for w in (normals, operations))
        floors.append(1 / (size.normals / generation + size.operations / products))
        found.append(together(executor, cores, ours, size))
        loops.append({threads: plain(size, threads) for threads in {1, cores}})
    best = max(loops[0], key=lambda threads: median(loop[threads] for loop in loops))
    name, unit = f"({size.d}, {size.H}, {size.L})", "draws/s"
    yield compared(f"share of the floor, {name}", found, floors, unit, f">= {SHARES[size]}")
    for threads in loops[0]:
        target = f">= {RATIOS[size]}" if threads == best else ""
        side = [loop[threads] for loop in loops]
        yield compared(f"plain loop, torch threads: {threads}, {name}", found, side, unit, target)


def compared(name: str, ours: list[float], baseline: list[float], unit: str, target: str) -> Result:
    """The round whose ratio is the median."""
    pairs = sorted(zip(ours, baseline, strict=True), key=lambda pair: pair[0] / pair[1])
    return Result(name, *pairs[len(pairs) // 2], unit, target)


def workers(executor: Executor, cores: int, size: Size) -> Result:
    """All workers against one."""
    rounds = [[together(executor, k, ours, size) for k in (1, cores)] for _ in range(ROUNDS)]
    one, every = zip(*rounds, strict=True)
    name = f"{cores} workers and 1, ({size.d}, {size.H}, {size.L})"
    return compared(name, list(every), list(one), "draws/s", f">= {0.9 * cores:.2g}")


def draw(size: Size, draws: int, n_layers: int = 1) -> None:
    """At least so many draws of a stack."""
    asked = questions(size, n_layers)
    group = Group.of(asked[0])
    for index in range(-(-draws // group.block_size)):
        sampler.block(group, asked, index, Conditions())


GROWTH = {
    "4 times the draws": ("Size(64, 4, 64), 2048", "Size(64, 4, 64), 512", "<= 4.4"),
    "4 times the layers": ("Size(64, 4, 64), 256, 12", "Size(64, 4, 64), 256, 3", "<= 4.4"),
    "twice the positions": ("Size(64, 4, 1024), 8", "Size(64, 4, 512), 8", "<= 4.4"),
}
"""How cost grows: linearly in draws and depth, no worse than quadratically in n_ctx."""


def growth() -> Iterator[Result]:
    """Processor seconds on one thread, and peak memory, of more against fewer."""
    setup = "from benchmarks.sampler import Size, draw; draw(Size(4, 2, 4), 1)"
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(scratch)
        for name, (more, fewer, target) in GROWTH.items():
            large, small = (
                bench.cost(Work(name, f"draw({sizes})", setup, times=2)) for sizes in (more, fewer)
            )
            yield Result(f"seconds, {name}", large.seconds, small.seconds, "s", target)
            if "draws" in name:
                yield Result(f"memory, {name}", large.memory, small.memory, "MiB", "<= 1.02")


def require_one_law(size: Size, draws: int = 512) -> None:
    """Raise `ArithmeticError` unless both sides estimate the same numbers."""
    asked, sums = questions(size), [Sums() for _ in OBSERVABLES]
    stream = plain_layers(*size, grid=torch.as_tensor(position_grid(size.L) - 1))
    with torch.no_grad():
        for _ in range(draws):
            add(sums, next(stream))
    found = sampler.block(Group.of(asked[0]), asked, 0, Conditions())
    for statistic, moments in zip(sums, found, strict=True):
        assert isinstance(moments, Moments)
        mean = (statistic.first / draws).numpy()
        variance = (statistic.second / draws).numpy() - mean**2
        error = np.sqrt(variance / draws + moments.second[0, 0] / moments.count**2) + 1e-6
        gap = float(np.abs((mean - moments.mean[0]) / error).max())
        if gap > DIFFERENT:
            raise ArithmeticError(f"expected two samplers of one law, got {gap:.1f} errors between")


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    print(f"{machine()}\n", flush=True)
    require_one_law(Size(64, 4, 64))
    results: list[Result] = []
    with engines.local(cores) as running:
        for size in SHARES:
            results += layers(running.executor, cores, size)
        results.append(workers(running.executor, cores, Size(128, 4, 128)))
    results += growth()
    print(table(results))
    keep(results)


if __name__ == "__main__":
    main()
