"""Speed and memory of the theory, each figure against a baseline measured in the same run.

    make bench

Every figure is the processor time of one statement in a fresh process on one thread, the best of
several where it is short, and that process's peak memory.  The machine is part of every figure;
the ratio to the baseline is less so.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
FIDELITIES = ("uniform", "first_order", "any_temperature")

TIMED = """
import time
{setup}
start = time.process_time()
{statement}
seconds = time.process_time() - start
import resource
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@dataclass(frozen=True)
class Work:
    """A statement that is timed after a setup; `recalled` derivations come from the disk.

    `times` repeats are made, each in a process of its own.
    """

    name: str
    statement: str
    setup: str = ""
    recalled: bool = False
    times: int = 1


@dataclass(frozen=True)
class Cost:
    """Processor seconds and peak memory in MiB."""

    seconds: float
    memory: float


@dataclass(frozen=True)
class Comparison:
    """Work held against a baseline of `scale` times another; the target is in words."""

    work: Work
    baseline: Work
    target: str
    scale: float = 1.0


class Bench:
    """Runs work, each piece once, with bytecode and derivations in a scratch folder."""

    def __init__(self, scratch: str) -> None:
        self._environment = {**os.environ, **ONE_THREAD, "PYTHONPYCACHEPREFIX": scratch}
        self._environment["PYTHONPATH"] = str(Path(__file__).parents[1])
        self._environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self._derivations = str(Path(scratch) / "derivations")
        self.cost = cache(self._cost)

    def _cost(self, work: Work) -> Cost:
        self._run(replace(work, statement="pass"))  # compiles what it imports
        if work.recalled:
            self._run(work)
        costs = [self._run(work) for _ in range(work.times)]
        return Cost(min(cost.seconds for cost in costs), max(cost.memory for cost in costs))

    def _run(self, work: Work) -> Cost:
        kept = self._derivations if work.recalled else ""
        code = TIMED.format(setup=work.setup, statement=work.statement)
        environment = {**self._environment, "NOPE_CACHE_DIR": kept}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return Cost(*map(float, done.stdout.split()[-2:]))


# ------------------------------------------------------------------------------ what is measured


def imports() -> Iterator[Comparison]:
    sympy = Work("import sympy", "import sympy", times=5)
    numpy = Work("import numpy", "import numpy", "import sympy", times=5)
    for setup in ("import sympy", "import sympy, numpy"):
        name = f"import theory, after {setup}"
        yield Comparison(Work(name, "import theory", setup, times=5), sympy, "0.15 s")
    yield Comparison(numpy, sympy, "")


def derivations() -> Iterator[Comparison]:
    ready = "import theory, nope, scipy.special, scipy.linalg"
    formulas = Work("all formulas, derived", "theory.formulas()", ready, times=3)
    yield Comparison(formulas, Work("import sympy", "import sympy", times=5), "20 s")
    yield Comparison(recalled(formulas), formulas, "1 s")
    every = "for place in layer.places(): theory.derive(layer, None, place, {!r})"
    stack = "theory.derive(stack, None, 'blocks.{}.resid_post', {!r})"
    ready += "\nlayer = nope.decoder(64, 4, n_ctx=8); stack = nope.decoder(64, 4, 48, n_ctx=8)"
    for fidelity in FIDELITIES:
        one = Work(f"every place of a layer, {fidelity}", every.format(fidelity), ready, times=3)
        yield Comparison(one, formulas, "")
        yield Comparison(recalled(one), one, "1 s")
        long, short = (
            Work(f"derive {depth} layers, {fidelity}", stack.format(depth - 1, fidelity), ready)
            for depth in (48, 12)
        )
        yield Comparison(long, short, "20 s; ratio 4")
        yield Comparison(recalled(long), long, "1 s")


def recalled(work: Work) -> Work:
    """The same work with its derivations on disk already."""
    return replace(work, name=f"{work.name}, recalled", recalled=True)


def stack(fidelity: str, n_layers: int, n_ctx: int) -> Work:
    """Every position's second moment at the end of a GPT-2 small of any depth and length."""
    sizes = f"768, 12, {n_layers}, n_ctx={n_ctx}"
    setup = f"""
import nope, theory
question = nope.Question(
    nope.decoder({sizes}), nope.init.gpt2(), "blocks.{n_layers - 1}.resid_post", "second_moment"
)"""
    name = f"predict {n_layers} layers at n_ctx {n_ctx}, {fidelity}"
    return Work(name, f"theory.predict(question, {fidelity!r})", setup)


def predictions() -> Iterator[Comparison]:
    for fidelity in FIDELITIES:
        work = stack(fidelity, 48, 1024)
        yield Comparison(work, stack(fidelity, 12, 1024), "10 s; ratio 4 (depth)")
        yield Comparison(work, stack(fidelity, 48, 512), "10 s; ratio 4 (n_ctx^2)")
    by_hand = Work(
        "ten lines of NumPy", "uniform_stack(48, 1024)", "from benchmarks.baselines import *"
    )
    yield Comparison(stack("uniform", 48, 1024), by_hand, "")


def participation() -> Iterator[Comparison]:
    setup = "import numpy as np; from benchmarks.baselines import *\nm = np.arange(1.0, 4097)\n"
    setup += "from theory.formulas.softmax import Participation, Tilt"
    for letter, kind in (("A", "Participation"), ("B", "Tilt")):
        table = Work(
            f"{letter}, 4,096 positions", f"{kind}.numbers(m, np.float64(1))", setup, times=5
        )
        one = Work(f"{letter} by quad, x 4,096", f"{letter}_by_quad(64, 1.0)", setup, times=3)
        yield Comparison(table, one, "0.5 s", scale=4096)


# ------------------------------------------------------------------------------------- the table

HEADER = ("", "seconds", "MiB", "baseline", "seconds", "ratio", "target")


def row(comparison: Comparison, bench: Bench) -> tuple[str, ...]:
    cost, baseline = bench.cost(comparison.work), bench.cost(comparison.baseline)
    seconds = comparison.scale * baseline.seconds
    return (
        comparison.work.name,
        f"{cost.seconds:.3f}",
        f"{cost.memory:.0f}",
        comparison.baseline.name,
        f"{seconds:.3f}",
        f"{cost.seconds / seconds:.3g}",
        comparison.target,
    )


def show(cells: Sequence[str]) -> None:
    widths = (52, 8, 5, 50, 8, 9, 24)
    texts = ("<", ">", ">", "<", ">", ">", "<")
    columns = (
        f"{cell:{text}{width}}" for cell, text, width in zip(cells, texts, widths, strict=True)
    )
    print("| " + " | ".join(columns) + " |", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(scratch)
        show(HEADER)
        show(["-" * 3, *["--:"] * 2, "---", *["--:"] * 2, "---"])
        for part in (imports, derivations, participation, predictions):
            for comparison in part():
                show(row(comparison, bench))


if __name__ == "__main__":
    main()
