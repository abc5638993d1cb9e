"""Where blocks are computed: in this process, in local worker processes, on a Dask cluster.

A running engine is a `concurrent.futures.Executor`; which one is used never changes a bit.
A block is a pure function of its arguments, so one that was lost with its worker is computed
again: Dask does so by itself, local workers are started anew (`montecarlo.campaign`).

Workers of a cluster have this package installed, the same version, and run one block at a time:
start them with one thread each (`dask worker ADDRESS --nthreads 1`), and for a CUDA device one per
GPU that says so (`--resources GPU=1`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ThreadPoolExecutor,
)
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import loky

from nope.checks import expect
from nope.devices import resolve_device

WATCH_SECONDS = 1.0
"""How often a worker looks after its coordinator, and a coordinator that waits for its clock."""
CONNECT_SECONDS = 10.0
"""How long a scheduler may take to answer."""
WORKER_SECONDS = 60.0
"""How long a cluster may take to have its first worker."""
NAMES = ("local", "in-process")
"""The engines that have a name; a cluster goes by its scheduler's address."""
NEVER_RENEWED = {"LOKY_MAX_MEMORY_LEAK_SIZE": "1e18"}
"""Loky takes it for a leak when a later block is larger than the first, and starts anew."""
RESTARTS = 3
"""Local workers are started again at most this often without a block in between."""


class Running(NamedTuple):
    """An engine at work.

    `room` is how many blocks in flight keep it busy, `lost` what it raises when blocks are lost
    with their workers, `restarts` how often in a row starting it again is worth trying.
    """

    executor: Executor
    room: int
    lost: tuple[type[BaseException], ...] = ()
    restarts: int = 0


Engine = Callable[[], AbstractContextManager[Running]]


def engine(name: str, workers: int | None, device: str) -> Engine:
    """The engine of a name: `local`, `in-process`, or the address of a Dask scheduler.

    `local` is `workers` processes, one per core unless given, and this process alone for 1; a
    cluster is kept busy as if it had `workers`, those it has at the start unless given.  Raises
    `ValueError` for any other name and for no workers.
    """
    some = workers is None or (isinstance(workers, int) and workers >= 1)
    expect(some, "at least 1 worker", workers, "raise workers")
    if is_cluster(name):
        return partial(cluster, name, workers, device)
    known = name in NAMES
    expect(known, "an engine: local, in-process or tcp://HOST:PORT", name, "name one of these")
    if name == "in-process":
        expect(workers in (None, 1), "in-process with 1 worker", workers, "use the engine local")
        return in_process
    count = default_workers(device) if workers is None else workers
    return in_process if count == 1 else partial(local, count)


@contextmanager
def ready(start: Engine) -> Iterator[tuple[Engine, Ahead]]:
    """The same engine, started at once: its workers load, and begin, while something else is done.

    It ends with this context; an engine that was lost is started again as before.
    """
    with ExitStack() as stack:
        running = stack.enter_context(start())
        ahead = Ahead(running.executor)
        waiting = [running._replace(executor=ahead)]
        yield lambda: nullcontext(waiting.pop()) if waiting else start(), ahead


def is_cluster(name: str) -> bool:
    """Whether an engine's name is the address of a scheduler; what is no name is none."""
    return isinstance(name, str) and "://" in name


def device_of(name: str, device: str, dtype: str) -> str:
    """The device that an engine's blocks are computed on.

    A cluster's devices are its own: what is named is taken as it is, and refused by its workers.
    """
    here = device == "auto" or not is_cluster(name)
    return str(resolve_device(device, dtype)) if here else device


def default_workers(device: str) -> int:
    """One worker per core on the CPU; one process for an accelerator."""
    return (
        len(os.sched_getaffinity(0)) if device == "cpu" and hasattr(os, "sched_getaffinity") else 1
    )


class Ahead(Executor):
    """Is given tasks before they are asked for; one that is then asked for is on its way.

    For pure functions of hashable arguments: a task begun in vain costs its time and no more.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._begun: dict[tuple[Any, ...], Future[Any]] = {}

    def begin(self, fn: Callable[..., Any], /, *args: Any) -> None:
        self._begun[fn, *args] = self._executor.submit(fn, *args)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        begun = self._begun.pop((fn, *args), None)
        return begun or self._executor.submit(fn, *args, **kwargs)


# ------------------------------------------------------------------------------ in process


class InProcess(Executor):
    """Runs a task when it is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def in_process() -> Iterator[Running]:
    """This process alone, a block at a time."""
    yield Running(InProcess(), room=1)


# ------------------------------------------------------------------------- local processes


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
def local(workers: int) -> Iterator[Running]:
    """Worker processes of this machine; they end with this one."""
    executor = loky.ProcessPoolExecutor(
        workers, initializer=_end_with, initargs=(os.getpid(),), env=NEVER_RENEWED
    )
    try:
        with _interrupts_ignored():
            executor.submit(os.getpid)  # starts every process
        yield Running(executor, 2 * workers, (BrokenExecutor,), RESTARTS)
    finally:
        executor.shutdown(wait=True, kill_workers=True)


# --------------------------------------------------------------------------------- cluster


@contextmanager
def cluster(address: str, workers: int | None, device: str) -> Iterator[Running]:
    """The workers of a Dask scheduler, each with one `GPU` as its resource for a CUDA device.

    Raises `ImportError` without `dask.distributed` and `OSError` where nobody answers.
    """
    try:
        import distributed
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise ImportError(
            f"expected dask.distributed for the engine {address}, got none; "
            "pip install 'nope-theory[cluster]'"
        ) from error
    with ThreadPoolExecutor(1) as aside:  # asyncio.run is refused where a loop runs, as in Jupyter
        aside.submit(asyncio.run, _reach(address)).result()
    resources = {"GPU": 1} if device.startswith("cuda") else None
    with distributed.Client(address, set_as_default=False) as client:
        count = workers or _workers(client, address)
        executor = client.get_executor(pure=False, resources=resources)
        try:
            yield Running(executor, 2 * count, (KilledWorker, CancelledError))
        finally:
            executor.shutdown(wait=False)


async def _reach(address: str) -> None:
    """Raise `OSError` where no scheduler answers (a client that cannot connect lingers)."""
    from distributed.comm import connect
    from distributed.security import Security

    try:
        settings = Security().get_connection_args("client")
        comm = await connect(address, CONNECT_SECONDS, **settings)
        await comm.close()
    except (OSError, ValueError) as error:
        got = str(error).splitlines()[0]
        raise OSError(
            f"expected a Dask scheduler at {address}, got {got!r}; start it or correct the address"
        ) from error


def _workers(client: Any, address: str) -> int:
    """How many workers a cluster has, once it has one."""
    try:
        client.wait_for_workers(1, timeout=WORKER_SECONDS)
    except TimeoutError as error:
        raise OSError(
            f"expected a worker at {address}, got none in {WORKER_SECONDS:.0f} s; start some, or "
            "give workers for a cluster that starts them on demand"
        ) from error
    return len(client.nthreads())
