"""Where blocks are computed: in this process, or in worker processes.

An engine is a `concurrent.futures.Executor`; which one is used never changes a bit.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

import loky


class InProcess(Executor):
    """Runs a task when it is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def default_workers(device: str) -> int:
    """One worker per core on the CPU; one process for an accelerator."""
    return (
        len(os.sched_getaffinity(0)) if device == "cpu" and hasattr(os, "sched_getaffinity") else 1
    )


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back; processes started meanwhile never see it, the coordinator does after."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


@contextmanager
def engine(workers: int) -> Iterator[Executor]:
    """An engine of `workers` processes, this one alone for 1."""
    if workers < 1:
        raise ValueError(f"expected at least 1 worker, got {workers}; raise workers")
    if workers == 1:
        yield InProcess()
        return
    executor = loky.ProcessPoolExecutor(max_workers=workers)
    try:
        with _interrupts_held():
            executor.submit(os.getpid)  # starts every process
        yield executor
    finally:
        executor.shutdown(wait=True, kill_workers=True)
