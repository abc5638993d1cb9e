"""Where blocks are computed: in this process, or in worker processes.

An engine is a `concurrent.futures.Executor`; which one is used never changes a bit.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

import loky

WATCH_SECONDS = 1.0


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
def _interrupts_ignored() -> Iterator[None]:
    """Processes started meanwhile ignore Ctrl-C from birth: it is for the coordinator alone.

    (Blocking the signal instead does not do: loky unblocks it when it starts its tracker.)
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _end_with(coordinator: int) -> None:
    """End this worker when its coordinator is gone, however it went."""

    def watch() -> None:
        while os.getppid() == coordinator:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def engine(workers: int) -> Iterator[Executor]:
    """An engine of `workers` processes, this one alone for 1."""
    if workers < 1:
        raise ValueError(f"expected at least 1 worker, got {workers}; raise workers")
    if workers == 1:
        yield InProcess()
        return
    executor = loky.ProcessPoolExecutor(workers, initializer=_end_with, initargs=(os.getpid(),))
    try:
        with _interrupts_ignored():
            executor.submit(os.getpid)  # starts every process
        yield executor
    finally:
        executor.shutdown(wait=True, kill_workers=True)
