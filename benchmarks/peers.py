"""The sampler and the decisions beside the libraries that come nearest, both sides in one run.

    make bench-peers

neural-tangents: draws per second of the kernel over all positions of one unmasked attention layer,
ours on a worker of one thread per core, theirs (`monte_carlo_kernel_fn`) on XLA's threads.  That
both estimate one kernel is checked first.

TensorFlow Probability (TFP): verdicts per second on the cosines after one attention layer.  Ours is
timed, `montecarlo.decide` in one process.  For theirs the number of draws that its fixed-n design
asks for is multiplied by the seconds per draw that the same sampler takes in the same round: an
extrapolation, by what a draw costs alone.

Five rounds alternate between the sides, and the figures are those of the round with the median
ratio.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from importlib.metadata import distribution
from itertools import count, islice
from runpy import run_path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

import nope
import theory
from benchmarks.collapsed import work
from benchmarks.results import Result, keep, machine, table
from benchmarks.sampler import DIFFERENT, ROUNDS, SHARES, Size, compared, rate, together
from montecarlo import Conditions, Decision, decide, engines, sampler
from montecarlo.estimators import Asked, integrated, question_of
from montecarlo.observables import gram
from montecarlo.sampler import Group

PLACE = "blocks.0.attn_out"

# --------------------------------------------------------------- the kernel, by neural-tangents

PER_CALL = 16
"""Draws of neural-tangents in one call."""


def neural_tangents() -> ModuleType:
    """The library, without its part that converts functions of TensorFlow.

    That part is imported first of all and alone needs TensorFlow, which an empty module in its
    place does not.
    """
    name = "neural_tangents.experimental"
    sys.modules.setdefault(name, ModuleType(name))
    return import_module("neural_tangents")


def their_kernel(size: Size) -> Callable[[np.ndarray], np.ndarray]:
    """Tokens L x d to the mean kernel L x L of `PER_CALL` draws of an attention layer's weights.

    Its parametrisation gives every map x W weights of variance 1/d.
    """
    library, random = neural_tangents(), import_module("jax.random")
    heads = (size.d // size.H, size.d // size.H, size.H)
    build, apply, _ = library.stax.GlobalSelfAttention(size.d, *heads, linear_scaling=False)
    kernel = library.monte_carlo_kernel_fn(build, apply, random.PRNGKey(0), PER_CALL)
    return lambda tokens: np.asarray(kernel(tokens[None], None, "nngp"))[0, 0]


def inputs(size: Size, number: int) -> np.ndarray:
    """Tokens of N(0, 1): number x L x d."""
    shape = (number, size.L, size.d)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def theirs(size: Size) -> Callable[[], float]:
    """What times their draws per second, the weights' alone: all are given the same tokens."""
    kernel, tokens = their_kernel(size), inputs(size, 1)[0]

    def call() -> float:
        kernel(tokens)
        return PER_CALL

    call()  # compiles
    return lambda: rate(call)


def our_question(size: Size) -> nope.Question:
    """The same layer's kernel; its tokens are drawn too."""
    tokens = nope.tokens.GaussianTokens(std=1.0)
    architecture = nope.decoder(
        *size[:2], n_ctx=size.L, d_ff=0, norm_position="none", causal=False, tokens=tokens
    )
    return nope.Question(architecture, nope.init.normal(size.d**-0.5), PLACE, "kernel")


def our_kernels(size: Size) -> Iterator[tuple[int, Tensor]]:
    """Chunks of our draws: how many, and their mean kernel over all positions."""
    group = Group.of(our_question(size))
    for index in count():
        for values in sampler.chunks(group, [PLACE], index, Conditions()):
            yield len(values[PLACE]), gram(values[PLACE]).mean(0) / size.d


def ours(size: Size) -> float:
    """Our draws per second on one thread, their kernels averaged."""
    with sampler.one_thread():
        chunks, total = our_kernels(size), torch.zeros(size.L, size.L)

        def chunk() -> float:
            draws, kernel = next(chunks)
            total.add_(kernel, alpha=draws)
            return draws

        return rate(chunk)


def two_maps_out(question: nope.Question) -> Asked:
    """The estimator that `measure(..., integrate=True)` takes: W_V and W_O are not drawn."""
    found = integrated(question, 2)
    assert found is not None
    return found


def our_best(size: Size) -> float:
    """Draws per second of that estimator on one thread, on its grid of at most 64 positions."""
    return block_rate(two_maps_out(our_question(size)), Conditions())


def block_rate(asked: Asked, conditions: Conditions) -> float:
    """Draws per second of an estimator on one thread, with their moments."""
    group, index = Group.of(question_of(asked), conditions), count()

    def block() -> float:
        sampler.block(group, [asked], next(index), conditions)
        return group.block_size

    return rate(block)


def require_one_kernel(size: Size, groups: int = 64) -> None:
    """Raise `ArithmeticError` unless both sides estimate the same kernel, at every pair.

    The unit is a chunk of ours, and one input with all of a call's draws of theirs.
    """
    with sampler.one_thread():
        found = [kernel.numpy() for _, kernel in islice(our_kernels(size), groups)]
    sides = np.stack([found, [*map(their_kernel(size), inputs(size, groups))]])
    error = np.sqrt(sides.var(1, ddof=1).sum(0) / groups)
    gap = float(np.abs(np.diff(sides.mean(1), axis=0) / error).max())
    if not gap <= DIFFERENT:
        raise ArithmeticError(f"expected two samplers of one kernel, got {gap:.1f} errors between")


def kernels(executor: Executor, cores: int, size: Size) -> Iterator[Result]:
    """Draws of the kernel per second, both sides on all cores, and their precision.

    Precision is over the relative variance of a draw, the mean over the grid of pairs; theirs is
    that of our plain estimator, as if each draw of theirs had tokens of its own.
    """
    name, question = f"neural-tangents' kernel, ({size.d}, {size.H}, {size.L})", our_question(size)
    plain, least = (
        work(asked, question, Conditions())[1] for asked in (question, two_maps_out(question))
    )
    everywhere = partial(together, executor, cores)
    sides = partial(everywhere, ours, size), partial(everywhere, our_best, size), theirs(size)
    rounds = [[side() for side in sides] for _ in range(ROUNDS + 1)][1:]
    drawn, best, baseline = map(np.array, zip(*rounds, strict=True))
    yield compared(name, list(drawn), list(baseline), "draws/s", ">= 3")
    precision = list(best / least), list(baseline / plain)
    yield compared(f"{name}, two maps integrated", *precision, "precision/s", ">= 3")


# --------------------------------------------------------------------- the verdict, by TFP's design

BAND = 0.025
"""How far from the theory a cosine may be: the tolerance of `nope verify`."""
ERROR_RATE = 1e-3
"""Of a wrong verdict, half for each of the two."""
DESIGNS = "tensorflow_probability/python/distributions/internal/statistical_testing.py"
"""In the wheels up to 0.6.0."""
DESIGN = "min_num_samples_for_dkwm_mean_test"


class Case(NamedTuple):
    """The cosines after an attention layer against a treatment of it, and the verdict."""

    size: Size
    std: float
    fidelity: str
    verdict: str

    @property
    def name(self) -> str:
        return f"{self.verdict}, ({self.size.d}, {self.size.H}, {self.size.L}), std {self.std:g}"

    @property
    def question(self) -> nope.Question:
        architecture = nope.decoder(*self.size[:2], n_ctx=self.size.L, d_ff=0)
        return nope.Question(architecture, nope.init.normal(self.std), PLACE, "cosine")


CASES = [
    Case(size, std, fidelity, verdict)
    for size, std in {Size(768, 12, 512): 0.02, Size(256, 4, 256): 1 / 16}.items()
    for fidelity, verdict in {"best": "CONFIRMED", "uniform": "REFUTED"}.items()
]
"""GPT-2 small's own size, and one where logits of sd 1 make cosines differ widely between draws."""


def fixed_n(entries: int) -> float:
    """Draws that tell, at so many entries, cosines as predicted from one that is `BAND` away."""
    low, high = nope.questions.OBSERVABLES["cosine"].bounds or (-np.inf, np.inf)
    rates = {"false_fail_rate": ERROR_RATE / 2, "false_pass_rate": ERROR_RATE / 2}
    return float(mean_design()(np.full(entries, BAND), low, high, **rates).max())


def mean_design() -> Callable[..., np.ndarray]:
    """TFP's function from discrepancies, bounds and error rates to the draws of a test of means.

    It was made for a TensorFlow that no current Python has, and all that it wants of that are
    functions of NumPy by other names: they stand in its place while the file is run.
    """
    tensorflow = SimpleNamespace(
        float32=np.float64,
        log=np.log,
        maximum=np.maximum,
        shape=np.shape,
        cast=np.asarray,
        reduce_prod=np.prod,
        broadcast_dynamic_shape=np.broadcast_shapes,
        convert_to_tensor=lambda value, name, dtype: np.asarray(value, dtype),
        name_scope=lambda *_: nullcontext(),
    )
    dtype_util = SimpleNamespace(common_dtype=lambda values, default: default)
    internal = SimpleNamespace(dtype_util=dtype_util)
    stubs = {"tensorflow": tensorflow, "tensorflow_probability.python.internal": internal}
    file = distribution("tensorflow-probability").locate_file(DESIGNS)
    with patch.dict(sys.modules, stubs):
        design: Callable[..., np.ndarray] = run_path(str(file))[DESIGN]
    return design


def decided(case: Case, centre: np.ndarray, seed: int) -> Decision:
    """Our decision, in this process; `ArithmeticError` unless it is the case's verdict."""
    reach = np.where(case.question.judged, BAND, np.inf)
    low, high = centre - reach, centre + reach
    found = decide(case.question, low, high, ERROR_RATE, seed=seed, device="cpu", workers=1)
    if found.verdict != case.verdict:
        raise ArithmeticError(f"expected {case.name}, got {found.verdict} at seed {seed}")
    return found


def verdicts(case: Case) -> Result:
    """Verdicts per second in one process; each round decides by other draws."""
    centre = np.nan_to_num(theory.predict(case.question, fidelity=case.fidelity).values)
    needed = fixed_n(int(case.question.judged.sum()))
    speed = partial(block_rate, case.question, Conditions(sampler="auto"))
    speed()  # what is looked up and allocated once
    rounds, spent = [], []
    for seed in range(ROUNDS):
        begin = time.perf_counter()
        measured = decided(case, centre, seed).measurement
        rounds.append((1 / (time.perf_counter() - begin), speed() / needed))
        spent.append(measured.draws if measured else 0)
    print(f"{case.name}: {needed:,.0f} draws by TFP's design, ours took {spent}", flush=True)
    name = f"TFP's design, {case.name}"
    found, baseline = zip(*rounds, strict=True)
    return compared(name, list(found), list(baseline), "verdicts/s", ">= 100")


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    print(f"{machine()}\n", flush=True)
    require_one_kernel(Size(64, 4, 64))
    with engines.local(cores) as running:
        found = [each for size in SHARES for each in kernels(running.executor, cores, size)]
    found += map(verdicts, CASES)
    print(table(found))
    keep(found)


if __name__ == "__main__":
    main()
