"""Engines: the same bits from each, and a worker that dies costs time only."""

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import distributed
import numpy as np
import psutil
import pytest
import torch
from distributed import LocalCluster

import nope
from montecarlo import (
    Campaign,
    Conditions,
    Target,
    campaign,
    decide,
    engines,
    measure,
    memory,
    provenance,
    sampler,
)
from montecarlo.provenance import Origin
from montecarlo.sampler import Group
from montecarlo.store import Store

INIT = nope.init.normal(0.3)
PLACES = (("blocks.0.attn.q", "second_moment"), ("ln_final", "kernel_cosine"))
ASKED = [nope.Question(nope.decoder(8, 2, n_ctx=8), INIT, *place) for place in PLACES]
BLOCKS = 24
DRAWS = BLOCKS * Group.of(ASKED[0]).block_size


@pytest.fixture(scope="module")
def started():
    """A real scheduler and two workers of one thread, each with a claim to be a GPU."""
    with LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        dashboard_address=":0",
        silence_logs=logging.CRITICAL,
        resources={"GPU": 1},
    ) as found:
        yield found


@pytest.fixture
def cluster(started):
    """The cluster with both its workers, though a test before has killed one.

    What the scheduler counts may be one that is dead already, and its place not yet filled.
    """

    def whole():
        alive = [
            n.worker_address for n in started.workers.values() if psutil.pid_exists(n.pid or 0)
        ]
        return len(alive) == 2 and set(alive) == set(started.scheduler.workers)

    deadline = time.monotonic() + engines.WORKER_SECONDS
    while not whole() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert whole()
    return started


def asked(**options):
    bounds = [np.full(question.shape, np.inf) for question in ASKED]
    targets = [Target(q, -b, b, 0.5, 0.5) for q, b in zip(ASKED, bounds, strict=True)]
    return Campaign(targets, Conditions(), DRAWS, **options)


def bits(decisions):
    """The evidence of some questions, as bytes."""
    found = [decision.measurement.moments for decision in decisions]
    assert all(moments.count == DRAWS for moments in found)
    return [(m.mean.tobytes(), m.second.tobytes(), m.third.tobytes()) for m in found]


@pytest.fixture(scope="module")
def expected():
    return bits(asked().run(engine="in-process"))


@contextmanager
def threaded():
    """An engine of two threads."""
    with ThreadPoolExecutor(2) as threads:
        yield engines.Running(threads, room=4)


class Counted:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function, self.calls, self.one = function, 0, threading.Lock()

    def __call__(self, *arguments):
        with self.one:
            self.calls += 1
        return self.function(*arguments)


def local_workers():
    """The worker processes that loky has started for this one."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it has ended since
            found += [child.pid] if "popen_loky" in " ".join(child.cmdline()) else []
    return found


def killing(victims):
    """A `progress` that kills a worker once some blocks are merged, and notes after how many."""
    killed = []

    def progress(run):
        merged = run.streams[0].merged
        for pid in victims()[:1] if merged >= BLOCKS // 4 and not killed else ():
            os.kill(pid, signal.SIGKILL)
            killed.append(merged)

    progress.killed = killed
    return progress


def test_a_killed_local_worker_costs_time_only(expected):
    """One of two is killed in the middle: new ones go on, to the same bits."""
    progress = killing(local_workers)
    run = asked(progress=progress)
    assert bits(run.run(2, engine="local")) == expected
    assert 0 < progress.killed[0] < BLOCKS
    assert not run.broken
    assert not local_workers()


def test_workers_that_cannot_live_are_not_started_for_ever(monkeypatch):
    """After some restarts without a block in between the run ends, with what is known."""
    starts, local = [], engines.local

    def counted(workers):
        starts.append(workers)
        return local(workers)

    monkeypatch.setattr(engines, "local", counted)
    monkeypatch.setattr(engines, "_end_with", os._exit)
    run = asked()
    assert [decision.verdict for decision in run.run(2)] == ["UNDECIDED", "UNDECIDED"]
    assert run.broken
    assert len(starts) == 1 + engines.RESTARTS


def test_a_cluster_gives_the_same_bits_and_survives_a_worker(cluster, expected):
    """One of the two workers is killed at work; Dask computes its blocks again."""

    def busiest_first():
        work = {address: len(w.processing) for address, w in cluster.scheduler.workers.items()}
        nannies = cluster.workers.values()
        return [n.pid for n in sorted(nannies, key=lambda n: -work.get(n.worker_address, 0))]

    progress = killing(busiest_first)
    run = asked(progress=progress)
    assert bits(run.run(None, engine=cluster.scheduler_address)) == expected
    assert 0 < progress.killed[0] < BLOCKS
    assert not run.broken


def test_measure_and_decide_take_an_engine(cluster):
    """Where blocks are computed is an option of every entry point."""
    here = measure(ASKED[0], 2048)
    there = measure(ASKED[0], 2048, engine=cluster.scheduler_address, workers=None)
    assert np.array_equal(here.mean, there.mean)
    found = decide(ASKED[0], 0.0, 10.0, engine=cluster.scheduler_address, workers=2)
    assert found.verdict == "CONFIRMED"


def test_gpu_blocks_ask_for_a_gpu_each(cluster, monkeypatch):
    """A CUDA device is one `GPU` of a worker; what is no CUDA device asks for nothing."""
    noted, get = [], distributed.Client.get_executor

    def noting(client, **options):
        noted.append(options["resources"])
        return get(client, **options)

    monkeypatch.setattr(distributed.Client, "get_executor", noting)
    for device in ("cpu", "cuda"):
        with engines.cluster(cluster.scheduler_address, None, device) as running:
            assert running.room == 4
            assert running.executor.submit(os.getpid).result() != os.getpid()
    assert noted == [None, {"GPU": 1}]


def test_a_clusters_devices_are_its_own():
    """This machine need not have them; its own are checked here."""
    assert engines.device_of("tcp://host:1", "cuda:7", "float32") == "cuda:7"
    with pytest.raises(ValueError, match="expected device cuda:7 to be there"):
        engines.device_of("local", "cuda:7", "float32")


def test_workers_of_another_kind_are_refused():
    """Their bits would be others: another code, build or processor."""
    (question, _), here = ASKED, Origin.here("cpu")
    for change in ({"sources": "old"}, {"build": "torch 1"}, {"device": "cpu ENIAC"}):
        with pytest.raises(ValueError, match="expected workers of one kind"):
            campaign._computed_blocks(
                Group.of(question), [(0, [question])], Conditions(), replace(here, **change)
            )


def test_workers_with_another_version_of_a_plugin_are_refused(monkeypatch):
    """What a question's classes are made of counts where they are used, and nowhere else."""
    plain, foreign = ASKED[0], replace(ASKED[0], init=Noting())
    tasks = {}
    for question in (plain, foreign):
        group = Group.of(question)
        making = Origin.here("cpu").making(group)
        tasks[question] = group, [(0, [question])], Conditions(), making
    known = provenance._class
    foreign_now = f"{known(Noting)} of another version"
    monkeypatch.setattr(
        provenance, "_class", lambda kind: foreign_now if kind is Noting else known(kind)
    )
    assert campaign._computed_blocks(*tasks[plain]).found[0]
    with pytest.raises(ValueError, match="expected workers of one kind"):
        campaign._computed_blocks(*tasks[foreign])


@dataclass(frozen=True)
class Noting:
    """Normal weights, noting how many blocks are drawn at once, and on how many torch threads."""

    noted: ClassVar[list] = []
    now: ClassVar[list] = []

    def law(self, weight, architecture):
        return self

    def draw(self, source, shape):
        self.now.append(None)
        time.sleep(0.01)
        self.noted.append((len(self.now), torch.get_num_threads()))
        self.now.pop()
        return source.normal(shape, 1.0)


def test_threads_of_one_worker_take_turns():
    """The settings of one block are not put back by another, so each keeps to one thread."""
    question = replace(ASKED[0], init=Noting())
    group = Group.of(question)
    Noting.noted.clear()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(3) as executor:
            here = Origin.here("cpu").making(group)
            sent = [
                executor.submit(
                    campaign._computed_blocks, group, [(k, [question])], Conditions(), here
                )
                for k in range(6)
            ]
            assert all(future.result().found[0] for future in sent)
    finally:
        torch.set_num_threads(1)
    assert len(Noting.noted) == 6 * group.block_size // group.chunk_size()  # a draw per chunk
    assert set(Noting.noted) == {(1, 1)}


# -------------------------------------------------------------------- blocks side by side


@pytest.mark.parametrize(
    ("free", "block", "fitting"),
    [
        (80 * 2**30, 6 * 2**30, 12),  # 13.3, a tenth left free
        (10, 5, 1),
        (5, 10, 1),  # the first has been computed, so one is
        (0, 10, 1),
        (80 * 2**30, 1, memory.STREAMS),
        (80 * 2**30, 0, memory.STREAMS),  # what held nothing
    ],
)
def test_as_many_blocks_as_the_measured_memory_holds(free, block, fitting):
    assert memory.fitting(free, block) == fitting
    assert fitting == 1 or fitting * block <= memory.FILLED * free


class Device:
    """A GPU with memory for some blocks at a time, as far as a campaign can see."""

    def __init__(self, monkeypatch, blocks, claimed):
        self.blocks, self.claimed = blocks, claimed
        self.tasks, self.refused, self.threads = [], 0, set()
        self.compute, side_by_side = sampler.block, campaign._side_by_side

        def noting(group, asked, conditions):
            self.tasks.append(len(asked))
            return side_by_side(group, asked, conditions)

        monkeypatch.setattr(memory, "measured", lambda device, work: (work(), self.claimed))
        monkeypatch.setattr(campaign, "_side_by_side", noting)
        monkeypatch.setattr(sampler, "block", self.block)

    def block(self, group, questions, index, conditions):
        self.threads.add(threading.get_ident())
        if self.tasks[-1] > self.blocks and index % 2:
            self.refused += 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return self.compute(group, questions, index, conditions)


def test_blocks_side_by_side_have_the_same_bits(expected, monkeypatch):
    """One is measured, then as many as have been, up to what fits; each in a thread of its own."""
    device = Device(monkeypatch, blocks=8, claimed=8)
    assert bits(asked().run(engine="in-process")) == expected
    assert device.tasks == [1, 1, 2, 4, 8, 8]
    assert sum(device.tasks) == BLOCKS
    assert len(device.threads) > 1


def test_side_by_side_out_of_memory_is_halved_to_the_same_bits(expected, monkeypatch):
    """Free memory promised 8, and 3 fit: what found none is drawn again, never more than fit."""
    device = Device(monkeypatch, blocks=3, claimed=8)
    assert bits(asked().run(engine="in-process")) == expected
    assert device.tasks[:4] == [1, 1, 2, 4]
    assert set(device.tasks[4:]) == {2}
    assert device.refused == 2


def test_side_by_side_only_what_is_missing_is_computed(expected, monkeypatch, tmp_path):
    """The store knows half the blocks of one of two questions."""
    with Store(tmp_path) as store:
        targets = asked().targets[:1]
        Campaign(targets, Conditions(), DRAWS // 2, store=store).run()
        again = asked(store=store)
        device = Device(monkeypatch, blocks=8, claimed=8)
        assert bits(again.run(engine="in-process")) == expected
        assert again.computed == 2 * BLOCKS - BLOCKS // 2
        assert sum(device.tasks) == BLOCKS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_blocks_have_the_same_bits_side_by_side(monkeypatch):
    """Several fit by what the first took, in streams of their own; alone they are the same."""
    group, conditions = Group.of(ASKED[0]), Conditions(device="cuda")
    work = partial(sampler.block, group, ASKED, 0, conditions)
    _, fitting = memory.measured("cuda", work)
    assert 1 < fitting <= memory.STREAMS
    blocks = [(number, ASKED) for number in range(4)]
    together = campaign._side_by_side(group, blocks, conditions)
    alone = [campaign._side_by_side(group, [block], conditions)[0] for block in blocks]
    for one, two in zip(together, alone, strict=True):
        for found, other in zip(one, two, strict=True):
            assert found.mean.tobytes() == other.mean.tobytes()
            assert found.second.tobytes() == other.second.tobytes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_without_room_goes_on_with_fewer_blocks(monkeypatch):
    """So much is promised that several together find no memory; each alone does."""
    question = replace(ASKED[0], architecture=nope.decoder(768, 12, n_ctx=512))
    group = Group.of(question)
    one, all_ = memory.block_bytes(group, "float32", "cuda"), memory.capacity("cuda")
    expected = measure(question, 12 * group.block_size, device="cuda").mean
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1.5 * one / all_))
    monkeypatch.setattr(memory, "FILLED", 1e6)
    try:
        found = measure(question, 12 * group.block_size, device="cuda").mean
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert np.array_equal(found, expected)


# ------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("name", "workers", "said"),
    [
        ("slurm", None, "expected an engine: local, in-process or tcp://HOST:PORT, got 'slurm'"),
        ("in-process", 2, "expected in-process with 1 worker, got 2"),
        ("local", 0, "expected at least 1 worker, got 0"),
        ("tcp://127.0.0.1:1", 0, "expected at least 1 worker, got 0"),
    ],
)
def test_engines_that_cannot_be_are_refused(name, workers, said):
    """In one line, before anything is started."""
    with pytest.raises(ValueError, match=said):
        asked().run(workers, engine=name)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "carrier-pigeon://loft:1"])
def test_a_scheduler_that_is_not_there_is_named(address, monkeypatch):
    """Also where a loop runs already, as in a notebook; and nothing lingers."""
    monkeypatch.setattr(engines, "CONNECT_SECONDS", 0.3)

    async def notebook():
        asked().run(engine=address)

    with pytest.raises(OSError, match=f"expected a Dask scheduler at {address}, got .*; start it"):
        asyncio.run(notebook())


def test_a_cluster_without_workers_is_named(monkeypatch):
    """Unless it is told how many to count on; then they are waited for while there is time."""
    monkeypatch.setattr(engines, "WORKER_SECONDS", 0.2)
    options = {"dashboard_address": ":0", "silence_logs": logging.CRITICAL}
    with LocalCluster(n_workers=0, **options) as empty:
        with pytest.raises(OSError, match=r"expected a worker at tcp.*, got none"):
            asked().run(None, engine=empty.scheduler_address)
        found = asked(budget=0.1).run(2, engine=empty.scheduler_address)
        assert [decision.measurement for decision in found] == [None, None]


def test_a_cluster_without_dask_says_what_to_install(monkeypatch):
    """The extra is optional, and only a cluster needs it."""
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r"pip install 'nope-theory\[cluster\]'"):
        asked().run(engine="tcp://127.0.0.1:1")


def test_a_ready_engine_is_started_at_once_and_anew_when_it_is_lost():
    """Its first use takes what is there; all has ended with the context."""
    begun, ended = [], []

    @contextmanager
    def start():
        number = len(begun)
        begun.append(number)
        yield engines.Running(engines.InProcess(), room=number)
        ended.append(number)

    with engines.ready(start) as (again, _):
        assert begun == [0]
        with again() as first, again() as second:
            assert (first.room, second.room) == (0, 1)
        assert ended == [1]
    assert ended == [1, 0]


HELD = []


def held(megabytes):
    """Have a worker hold so much more, and say which one it was."""
    HELD.append(np.ones(megabytes * 2**17))
    return os.getpid()


def test_a_worker_that_has_grown_is_not_taken_to_leak():
    """Loky looks at a worker's memory when its last look is a second old."""
    with engines.local(1) as running:
        found = []
        for megabytes in (1, 400, 1):
            found.append(running.executor.submit(held, megabytes).result())
            time.sleep(engines.loky.process_executor._MEMORY_LEAK_CHECK_DELAY)
    assert len(set(found)) == 1


def test_a_task_that_was_begun_is_done_once():
    """It is given to whoever asks for it first, and done again for who asks later."""
    done = []
    ahead = engines.Ahead(engines.InProcess())
    ahead.begin(done.append, 1)
    assert done == [1]
    for task, expected in ((1, [1]), (2, [1, 2]), (1, [1, 2, 1])):
        ahead.submit(done.append, task).result()
        assert done == expected


@pytest.mark.parametrize("asked_for", [ASKED, ASKED[:1], ASKED[::-1]])
def test_blocks_begun_for_other_questions_change_nothing(expected, monkeypatch, asked_for):
    """Those of the first look are begun; a campaign that asks the same takes them."""
    monkeypatch.setattr(campaign, "_computed_blocks", counted := Counted(campaign._computed_blocks))
    with engines.ready(threaded) as (start, ahead):
        campaign.begin(ahead, 2, asked_for, Conditions())
        assert len(ahead._begun) == -(-64 // Group.of(ASKED[0]).block_size)
        assert bits(asked().run(2, started=start)) == expected
    in_vain = 0 if asked_for is ASKED else 1
    assert counted.calls == BLOCKS + in_vain


@pytest.mark.parametrize("together", [None, 1])
def test_nothing_is_begun_on_a_cluster_or_in_this_process(together):
    with engines.ready(engines.in_process) as (_, ahead):
        campaign.begin(ahead, together, ASKED, Conditions())
        assert not ahead._begun


def test_too_much_is_refused_before_it_is_begun(monkeypatch):
    monkeypatch.setattr(memory, "capacity", lambda device: 1)
    with engines.ready(threaded) as (_, ahead), pytest.raises(MemoryError, match="expected blocks"):
        campaign.begin(ahead, 2, ASKED, Conditions())
    assert not ahead._begun
