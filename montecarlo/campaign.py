"""Many targets decided together, by shared draws looked at after fixed numbers of draws."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from heapq import heapify, heappop, heappush
from itertools import count
from typing import NamedTuple

import numpy as np
import torch

from montecarlo import confidence, engines, memory, sampler
from montecarlo.engines import Ahead, Engine, Running
from montecarlo.estimators import Asked, question_of
from montecarlo.evidence import Decision, Measurement, Target
from montecarlo.moments import Moments
from montecarlo.provenance import Origin, Series
from montecarlo.sampler import Conditions, Group, estimator
from montecarlo.store import Store
from nope.checks import expect, expect_count, expect_finite

AHEAD = 4
"""A group's finished blocks wait for a slower one, as many as this times what is in flight."""

LIMITS = {"draws": 10**12, "budget": 366 * 24 * 3600}
"""More draws per question, or more seconds, are a mistake."""

Found = Moments | Exception
"""What a block says of a question: the error where it is not finite, or could not be computed."""


# ------------------------------------------------------------------------------- refusals


def require_limits(draws: int | None, budget: float | None) -> None:
    """Raise `ValueError` for a number of draws or of seconds that cannot be meant."""
    if draws is not None:
        expect_count("draws", draws)
    if budget is not None:
        expect_finite("budget", budget, positive=True)
    for name, value in (("draws", draws), ("budget", budget)):
        most = LIMITS[name]
        ok = value is None or value <= most
        expect(ok, f"{name} of at most {most:.3g}", value, f"change {name}")


def require_decidable(target: Target, dtype: str) -> None:
    """Refuse a target on which no number of draws could say anything.

    Raises `LookupError` for a question without an answer and `ValueError` for a region that is
    none, or so narrow that rounding alone may leave it.
    """
    target.question.require_applicable()
    wrong = ~(target.low <= target.high)
    if wrong.any():
        low, high = (float(bound[wrong][0]) for bound in (target.low, target.high))
        expect(False, "low <= high at every entry", (low, high), "swap them")
    target.require_reachable(dtype)


def at_once(engine: str, workers: int | None, device: str) -> int | None:
    """How many blocks this machine's memory must hold; None for a cluster, which has its own."""
    if engines.is_cluster(engine):
        return None
    return 1 if engine == "in-process" else workers or engines.default_workers(device)


# -------------------------------------------------------------------------------- streams


@dataclass(eq=False)
class _Stream:
    """The draws of one group: which blocks are out, which are in, what they say so far."""

    group: Group
    number: int
    limit: int
    questions: list[Asked] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)  # the targets not yet decided
    out: set[int] = field(default_factory=set)
    merged: int = 0
    waiting: dict[int, tuple[dict[Asked, Found], float]] = field(default_factory=dict)
    moments: dict[Asked, Moments] = field(default_factory=dict)
    failures: dict[Asked, FloatingPointError] = field(default_factory=dict)
    fitting: int = 0  # blocks that a worker's memory holds; 0 before that has been measured
    look_at: int = confidence.FIRST_LOOK
    seconds: float = 0.0
    drawn: int = 0

    @property
    def draws(self) -> int:
        return self.merged * self.group.block_size

    @property
    def upcoming(self) -> int:
        """The first block that is neither merged nor in nor out."""
        return next(k for k in count(self.merged) if k not in self.waiting and k not in self.out)

    @property
    def exhausted(self) -> bool:
        return self.upcoming * self.group.block_size >= self.limit

    @property
    def width(self) -> int:
        """Blocks in the next task: as many as fit, and as are merged, so that few are in vain."""
        return max(1, min(self.fitting, self.merged))

    @property
    def spent(self) -> float:
        """Seconds, each block not yet merged counted as an average one."""
        average = self.seconds / max(1, self.drawn)
        return self.seconds + average * (len(self.out) + len(self.waiting))

    @property
    def turn(self) -> tuple[float, int, int]:
        """The least of these is drawn from next."""
        return self.spent, self.upcoming, self.number

    def absorb(self) -> dict[Asked, Exception]:
        """Merge the next block, which is in; blocks merge in index order.

        Returns the questions that it could not be computed for, and why.
        """
        found, seconds = self.waiting.pop(self.merged)
        self.merged += 1
        self.seconds += seconds
        self.drawn += seconds > 0
        failed: dict[Asked, Exception] = {}
        for question in [question for question in self.questions if question in found]:
            match found[question]:
                case FloatingPointError() as error:
                    self.failures[question] = error
                case Exception() as error:
                    failed[question] = error
                case Moments() as moments:
                    known = self.moments.get(question)
                    self.moments[question] = known.merge(moments) if known else moments
                    continue
            self.questions.remove(question)
        return failed


# --------------------------------------------------------------------------------- blocks


class _Part(NamedTuple):
    """A block of a task: what the store knows of it, and the questions it is computed for."""

    number: int
    known: Mapping[Asked, Moments]
    missing: tuple[Asked, ...]


_Task = tuple[tuple[int, tuple[Asked, ...]], ...]
"""Numbers of blocks, and the questions that each is computed for."""


class _Answer(NamedTuple):
    """What came of a task, block by block: None where the device's memory did not suffice.

    `seconds` is the time that all took together, `fitting` how many such blocks fit at once.
    """

    found: Sequence[Sequence[Found] | None]
    seconds: float
    fitting: int


_ALONE = threading.Lock()


def _computed_blocks(group: Group, asked: _Task, conditions: Conditions, origin: Origin) -> _Answer:
    """Blocks and what is asked of each; several are computed side by side on a GPU.

    Workers whose bits would be others refuse.  Threads of one process take turns, since the
    settings of `sampler.one_thread` are the process's.
    """
    here = Origin.here(conditions.device).making(group)
    expect(here == origin, f"workers of one kind, {origin}", here, "start all from one code")
    with _ALONE:
        begin = time.perf_counter()
        work = partial(_side_by_side, group, asked, conditions)
        found, fitting = memory.measured(conditions.device, work)
        seconds = time.perf_counter() - begin
        if None in found:
            torch.cuda.empty_cache()  # for others on the same device
        return _Answer(found, seconds, fitting)


def _side_by_side(group: Group, asked: _Task, conditions: Conditions) -> list[list[Found] | None]:
    """The blocks, each in a thread; within `one_thread` those of the threads change nothing."""
    if len(asked) == 1:
        ((index, questions),) = asked
        return [_computed(group, questions, index, conditions)]

    def compute(slot: int) -> list[Found] | None:
        index, questions = asked[slot]
        with memory.own_stream(conditions.device, slot):
            return _computed(group, questions, index, conditions)

    with sampler.one_thread(), ThreadPoolExecutor(len(asked)) as threads:
        return list(threads.map(compute, range(len(asked))))


def _computed(
    group: Group, questions: Sequence[Asked], index: int, conditions: Conditions
) -> list[Found] | None:
    """A block, empty if nothing is asked of it; None where the device's memory did not suffice.

    Where it fails for some other reason, each question is tried alone, and those that fail alone
    have the error in their place.
    """
    try:
        return [*sampler.block(group, questions, index, conditions)] if questions else []
    except torch.cuda.OutOfMemoryError:
        return None  # what the block holds is let go with the error, at the end of this clause
    except Exception as error:
        failure = _told(error)
    if len(questions) == 1:
        return [failure]
    alone = [_computed(group, [question], index, conditions) for question in questions]
    found = [each for one in alone if one is not None for each in one]
    return found if len(found) == len(questions) else None


def _told(error: Exception) -> Exception:
    """The error without its traceback, which keeps the block's tensors; it is in a note instead."""
    error.add_note("".join(traceback.format_exception(error)))
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


@dataclass(frozen=True, eq=False)
class _Flight:
    """A task on its way: blocks of one stream.

    `room` is how many tasks might be on their way when it was sent off, itself among them.
    """

    stream: _Stream
    parts: Sequence[_Part]
    room: int


Flying = dict[Future[_Answer], _Flight]


def begin(
    ahead: Ahead, together: int | None, asked: Iterable[Asked], conditions: Conditions
) -> None:
    """Send off the blocks of the first look, before it is known what they are held against.

    `asked` in the order in which a campaign will have their targets; `together` is `at_once`.
    Nothing is begun where it would be computed here and now, nor on a cluster, whose kind of
    workers is not known.  Raises `MemoryError` as `Campaign.run` does.
    """
    if together in (None, 1):
        return
    groups: dict[Group, list[Asked]] = {}
    for each in dict.fromkeys(asked):
        groups.setdefault(Group.of(question_of(each), conditions), []).append(each)
    memory.require_memory(groups, conditions, together)
    origin = Origin.here(conditions.device)
    for group, questions in groups.items():
        making = origin.making(group)
        for number in range(-(-confidence.FIRST_LOOK // group.block_size)):
            task = ((number, tuple(questions)),)
            ahead.begin(_computed_blocks, group, task, conditions, making)


def _raise(asked: Asked, error: Exception) -> None:
    raise error


# ------------------------------------------------------------------------------- campaign


class Campaign:
    """Many targets decided together.

    Questions on the same architecture, initialisation and given weights share their draws.
    A question's evidence is the contiguous prefix of its blocks up to the look that decided
    it: the same bits for any number of workers and of blocks in flight, and whether it was
    asked alone or with others.

    `draws` caps the draws per question (rounded up to whole blocks); `budget` stops in
    seconds and is then not deterministic; `stop` is polled after each block.  Blocks that
    `store` holds are taken from it, before any is computed, and those that are computed are kept
    there.  `failed` is told of an error in a question's block; unless it raises it, as it does
    when not given, the question is dropped and the others go on.

    On a GPU as many blocks are computed side by side as its memory holds, by what the first of a
    group took.  Blocks that find no memory are computed again with half as many in flight.  So are
    blocks lost with their workers; where that happens again and again, what is known by then is
    kept and `broken` is set.

    All that is measured passes here, and is refused here: raises `LookupError` for a question
    without an answer and `ValueError` for limits and regions that cannot be
    (`require_limits`, `require_decidable`).
    """

    def __init__(
        self,
        targets: Iterable[Target],
        conditions: Conditions,
        draws: int | None = None,
        budget: float | None = None,
        stop: Callable[[], bool] = lambda: False,
        progress: Callable[[Campaign], None] = lambda campaign: None,
        store: Store | None = None,
        failed: Callable[[Asked, Exception], None] = _raise,
    ) -> None:
        require_limits(draws, budget)
        self.targets = list(targets)
        self.conditions, self.budget = conditions, budget
        self.stop, self.progress, self.store, self.failed = stop, progress, store, failed
        self.decisions: dict[int, Decision] = {}
        self.series: dict[Asked, Series] = {}
        self.computed = 0
        self.broken = False
        self._by_group: dict[Group, _Stream] = {}
        self._turns: list[tuple[float, int, int]] = []
        limit = draws if draws is not None else np.iinfo(np.int64).max
        for number, target in enumerate(self.targets):
            require_decidable(target, conditions.dtype)
            group = Group.of(target.question, conditions)
            stream = self._by_group.setdefault(group, _Stream(group, len(self._by_group), limit))
            stream.pending.append(number)
            if target.asked not in stream.questions:
                stream.questions.append(target.asked)
        self.streams = list(self._by_group.values())

    def run(
        self,
        workers: int | None = 1,
        in_flight: int | None = None,
        engine: str = "local",
        started: Engine | None = None,
    ) -> list[Decision]:
        """Draw until all is decided or the draws, the budget or the patience ends.

        `engine` and `workers` are those of `montecarlo.engines.engine`, and `started` the same one
        where it is at work already (`montecarlo.engines.ready`).  Raises `ValueError`,
        `OSError` and `ImportError` as `montecarlo.engines` and `montecarlo.store` do, and
        `MemoryError` where this machine's memory will not hold the blocks.
        """
        deadline = np.inf if self.budget is None else time.perf_counter() + self.budget
        device = engines.device_of(engine, self.conditions.device, self.conditions.dtype)
        start = started or engines.engine(engine, workers, device)
        together = at_once(engine, workers, device)
        if together is not None:
            memory.require_memory(self._by_group, self.conditions, together)
        try:
            failures = 0
            while not self.broken:
                computed = self.computed
                with start() as running:
                    try:
                        self._draw(running, in_flight or running.room, deadline)
                        break
                    except running.lost:
                        failures = 1 if self.computed > computed else failures + 1
                        self.broken = failures > running.restarts
                for stream in self.streams:
                    stream.out.clear()
        finally:
            if self.store is not None:
                self.store.commit()
        return [self.decisions.get(k) or self._last_look(k) for k in range(len(self.targets))]

    def _draw(self, running: Running, room: int, deadline: float) -> None:
        """Keep `room` blocks in flight, merge what comes back, look when it is time."""
        origin = self._origin(running, deadline)
        if origin is None:
            return
        self.series = {
            asked: Series(
                question_of(asked), self.conditions, origin, estimator(stream.group, asked)
            )
            for stream in self.streams
            for asked in stream.questions
        }
        self._turns = [stream.turn for stream in self.streams]
        heapify(self._turns)
        flying: Flying = {}
        while True:
            while len(flying) < room and not self._ending(deadline):
                stream = self._next_stream(AHEAD * room)
                if stream is None:
                    break
                flying |= self._submit(stream, running, origin, room)
            if not flying:
                return
            for future in wait(flying, self._patience(), FIRST_COMPLETED).done:
                room = min(room, self._land(flying.pop(future), future.result()))
            self.progress(self)

    def _ending(self, deadline: float) -> bool:
        return time.perf_counter() > deadline or self.stop()

    def _origin(self, running: Running, deadline: float) -> Origin | None:
        """Where the blocks will be computed, as one of the workers says; None if none does."""
        told = running.executor.submit(Origin.here, self.conditions.device)
        while not wait([told], engines.WATCH_SECONDS).done:
            if self._ending(deadline):
                return None
        return told.result()

    def _submit(self, stream: _Stream, running: Running, origin: Origin, room: int) -> Flying:
        """Send off the next blocks of a stream; one that the store knows is taken in at once."""
        parts = [self._part(stream)]
        if not parts[0].missing:
            self._collect(stream, parts[0], [], 0.0)
            self.progress(self)
            return {}
        while len(parts) < stream.width and not stream.exhausted:
            parts.append(self._part(stream))
        heappush(self._turns, stream.turn)
        asked = tuple((part.number, part.missing) for part in parts)
        task = (stream.group, asked, self.conditions, origin.making(stream.group))
        return {running.executor.submit(_computed_blocks, *task): _Flight(stream, parts, room)}

    def _part(self, stream: _Stream) -> _Part:
        """The next block of a stream, and what the store does not know of it."""
        index = stream.upcoming
        stream.out.add(index)
        known = {q: moments for q in stream.questions if (moments := self._recall(q, index))}
        return _Part(index, known, tuple(q for q in stream.questions if q not in known))

    def _recall(self, question: Asked, index: int) -> Moments | None:
        return self.store.recall(self.series[question], index) if self.store else None

    def _patience(self) -> float | None:
        """How long to wait for a block: until the next commit, without end if none is due."""
        if self.store is None:
            return None
        self.store.settle()
        return self.store.patience

    def _land(self, flight: _Flight, answer: _Answer) -> int:
        """Take in what came of a task; how many may now be on their way.

        Blocks that found no memory are drawn again: fewer side by side, then in fewer tasks.
        """
        stream, seconds = flight.stream, answer.seconds / len(flight.parts)
        for part, found in zip(flight.parts, answer.found, strict=True):
            if found is not None:
                self._collect(stream, part, found, seconds)
            elif len(flight.parts) == flight.room == 1:
                self._collect(stream, part, [self._no_memory(stream)] * len(part.missing), 0.0)
            else:
                stream.out.remove(part.number)
                heappush(self._turns, stream.turn)
        if None not in answer.found:
            stream.fitting = stream.fitting or answer.fitting
            return flight.room
        stream.fitting = max(1, len(flight.parts) // 2)
        return flight.room if len(flight.parts) > 1 else max(1, flight.room // 2)

    def _no_memory(self, stream: _Stream) -> MemoryError:
        architecture = stream.group.architecture
        return MemoryError(
            f"expected a block of d_model = {architecture.d_model}, n_ctx = {architecture.n_ctx} "
            f"to fit into the memory of {self.conditions.device}, got none free; use cpu or "
            "smaller sizes"
        )

    def _collect(
        self, stream: _Stream, part: _Part, found: Sequence[Found], seconds: float
    ) -> None:
        """Take in a block, have what is new kept, and look if it is time."""
        stream.out.remove(part.number)
        fresh = dict(zip(part.missing, found, strict=True))
        stream.waiting[part.number] = ({**part.known, **fresh}, seconds)
        self.computed += len(fresh)
        for question, moments in fresh.items():
            if self.store and isinstance(moments, Moments):
                self.store.keep(self.series[question], part.number, moments)
        self._advance(stream)
        heappush(self._turns, stream.turn)

    def _next_stream(self, ahead: int) -> _Stream | None:
        """The stream that has had the least time, of those with something left to draw.

        A stream whose turn has changed since is in the heap with its new turn too.
        """
        while self._turns:
            stream = self.streams[self._turns[0][-1]]
            able = stream.questions and not stream.exhausted and len(stream.waiting) < ahead
            if able and stream.turn == self._turns[0]:
                return stream
            heappop(self._turns)
        return None

    def _advance(self, stream: _Stream) -> None:
        while stream.questions and stream.merged in stream.waiting:
            for question, error in stream.absorb().items():
                self.failed(question, error)
            if stream.draws >= stream.look_at:
                self._look(stream)
                stream.look_at = confidence.next_look(stream.draws)

    def _look(self, stream: _Stream) -> None:
        """Decide what can be decided; questions with nothing left to decide are dropped."""
        for number in stream.pending:
            target = self.targets[number]
            if target.asked in stream.questions:
                measured = self._measurement(stream, target.asked)
                failure = measured.failure
                if failure is not None:
                    stream.failures[target.asked] = failure
                    self.decisions[number] = self._last_look(number)
                    continue
                verdict = target.verdict(measured)
                if verdict != "UNDECIDED":
                    self.decisions[number] = Decision(target, verdict, measured, stream.seconds)
        stream.pending = [number for number in stream.pending if number not in self.decisions]
        pending = {self.targets[number].asked for number in stream.pending}
        stream.questions = [question for question in stream.questions if question in pending]

    def _measurement(self, stream: _Stream, asked: Asked) -> Measurement:
        return Measurement(question_of(asked), stream.moments[asked], self.conditions.dtype)

    def _last_look(self, number: int) -> Decision:
        """What is known of a target when the draws have ended."""
        target = self.targets[number]
        stream = self._by_group[Group.of(target.question, self.conditions)]
        failure = stream.failures.get(target.asked)
        if failure is not None or target.asked not in stream.moments:
            return Decision(target, "UNDECIDED", None, stream.seconds, failure)
        measured = self._measurement(stream, target.asked)
        enough = measured.draws >= confidence.FIRST_LOOK
        verdict = target.verdict(measured) if enough else "UNDECIDED"
        return Decision(target, verdict, measured, stream.seconds)
