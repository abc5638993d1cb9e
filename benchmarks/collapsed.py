"""The collapsed sampler and the estimators: what each saves, against the plain way in one run.

    python -m benchmarks.collapsed

Draws per second of processor time for one attention layer on one thread, the real sampler's and
the collapsed one's in turns, medians over rounds of each round's ratio.  Then the seconds to a
given precision for `chi2023.lemma3.softmax`, which are seconds per draw times the relative variance
of a draw (averaged over positions): of the real sampler's plain estimator over those of the others.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from itertools import count
from statistics import median

import numpy as np

import nope
from benchmarks.results import Result, keep, machine, table
from montecarlo import Conditions, split
from montecarlo.estimators import Asked, integrated
from montecarlo.moments import Moments
from montecarlo.sampler import Group, block, chunks, one_thread
from nope.questions import Question

ROUNDS = 5
DRAWS = 96
"""Of each estimator: a relative variance, the mean over positions, is then known to some 10%."""
INIT = nope.init.normal(0.02)
SIZES = {(4096, 32, 128): "15", (768, 12, 128): "", (256, 4, 64): "", (768, 12, 512): ""}
"""d_model, n_heads, n_ctx, and the ratio to reach."""
WIDE = (16_384, 64, 128)
PLACE = "blocks.0.attn_out"


def question(d: int, heads: int, length: int) -> Question:
    """Lemma 3's: the second moment after one attention layer."""
    architecture = nope.decoder(d, heads, n_ctx=length, d_ff=0)
    return Question(architecture, INIT, PLACE, "second_moment")


# ------------------------------------------------------------------------ draws per second


def alternated(size: tuple[int, int, int]) -> tuple[float, float]:
    """Draws per second, collapsed and real: the real one's median, times the median ratio."""
    asked = question(*size)
    timed = [
        seconds_per_draw(Group.of(asked, Conditions(sampler=sampler)))
        for sampler in ("collapsed", "real")
    ]
    rounds = [tuple(next(one) for one in timed) for _ in range(ROUNDS + 1)][1:]
    real = 1 / median(seconds for _, seconds in rounds)
    return real * median(real / collapsed for collapsed, real in rounds), real


def seconds_per_draw(group: Group) -> Iterator[float]:
    """Seconds per draw over blocks that together take long enough to be timed."""
    for index in count():
        begin, draws = time.process_time(), 0
        while time.process_time() - begin < 0.3:
            draws += sum(group.chunk_size() for _ in chunks(group, [PLACE], index, Conditions()))
        yield (time.process_time() - begin) / draws


def samplers() -> Iterator[Result]:
    for size, target in SIZES.items():
        ours, theirs = alternated(size)
        d, _, length = size
        yield Result(f"collapsed, d = {d}, L = {length}", ours, theirs, "draws/s", target)


def wide() -> str:
    """What a layer of d = 16,384 takes collapsed; its real weights are 4 GiB."""
    seconds = next(seconds_per_draw(Group.of(question(*WIDE), Conditions(sampler="collapsed"))))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return f"d = {WIDE[0]}, L = {WIDE[2]}: {1 / seconds:.2f} draws/s, peak memory {peak:.2f} GiB"


# ------------------------------------------------------------------ seconds times variance


def work(asked: Asked, plain: Question, conditions: Conditions) -> tuple[float, float]:
    """Seconds per draw and the mean over positions of its relative variance."""
    group = Group.of(plain, conditions)
    begin, found = time.process_time(), None
    for index in count():
        (one,) = block(group, [asked], index, conditions)
        assert isinstance(one, Moments)
        found = one if found is None else found.merge(one)
        if found.count >= DRAWS:
            break
    assert found is not None
    seconds = (time.process_time() - begin) / found.count
    variance, _ = found.along(np.ones_like(found.mean))
    return seconds, float((variance / found.mean[0] ** 2).mean())


def estimators(size: tuple[int, int, int]) -> Iterator[Result]:
    """Each way to estimate Lemma 3's second moment for softmax attention."""
    plain = question(*size)
    ways: dict[str, tuple[Asked | None, str]] = {
        "real, plain": (plain, "real"),
        "collapsed, plain": (plain, "collapsed"),
        "real, W_O integrated": (integrated(plain, 1), "real"),
        "collapsed, W_O integrated": (integrated(plain, 1), "collapsed"),
        "real, W_V and W_O integrated": (integrated(plain, 2), "real"),
        "collapsed, W_V and W_O integrated": (integrated(plain, 2), "collapsed"),
    }
    base = 0.0
    for name, (asked, sampler) in ways.items():
        assert asked is not None
        seconds, variance = work(asked, plain, Conditions(sampler=sampler))
        base = base or seconds * variance
        target = "3" if name.endswith("and W_O integrated") else ""
        yield _saved(f"{size}: {name}", seconds, variance, base, target)
        found = split(asked, Conditions(sampler=sampler))
        if found.inputs > 1:
            more = Conditions(sampler=sampler, inputs=found.inputs)
            several = f"{size}: {name}, {found.inputs} inputs"
            yield _saved(several, *work(asked, plain, more), base, target)


def _saved(name: str, seconds: float, variance: float, base: float, target: str) -> Result:
    """The ratio is how many times less time the estimator takes than the plain one."""
    print(f"{name}: {seconds * 1e3:.2f} ms a draw, relative variance {variance:.5f}", flush=True)
    return Result(name, 1 / (seconds * variance), 1 / base, "precision/s", target)


def main() -> None:
    with one_thread():
        found = [*samplers(), *estimators((768, 12, 512)), *estimators((768, 12, 16))]
        print(table(found))
        print(wide())
    print(machine())
    keep(found)


if __name__ == "__main__":
    main()
