"""Many targets decided together, by shared draws looked at after fixed numbers of draws."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Any

import numpy as np
import torch

from montecarlo import confidence, engines, sampler
from montecarlo.engines import InProcess, Running
from montecarlo.estimators import Asked, question_of
from montecarlo.evidence import Decision, Measurement, Target
from montecarlo.moments import Moments
from montecarlo.provenance import Origin, Series
from montecarlo.sampler import Conditions, Group, estimator
from montecarlo.store import Store
from nope.checks import expect

AHEAD = 4
"""A group's finished blocks wait for a slower one, as many as this times what is in flight."""

Found = Moments | FloatingPointError


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
    def spent(self) -> float:
        """Seconds, each block not yet merged counted as an average one."""
        average = self.seconds / max(1, self.drawn)
        return self.seconds + average * (len(self.out) + len(self.waiting))

    @property
    def turn(self) -> tuple[float, int, int]:
        """The least of these is drawn from next."""
        return self.spent, self.upcoming, self.number

    def absorb(self) -> bool:
        """Merge the next block if it is in; blocks merge in index order."""
        if self.merged not in self.waiting:
            return False
        found, seconds = self.waiting.pop(self.merged)
        self.seconds += seconds
        self.drawn += seconds > 0
        for question, moments in found.items():
            if question not in self.questions:
                continue
            if isinstance(moments, FloatingPointError):
                self.failures[question] = moments
                self.questions.remove(question)
                continue
            known = self.moments.get(question)
            self.moments[question] = known.merge(moments) if known else moments
        self.merged += 1
        return True


_ALONE = threading.Lock()


def _timed_block(
    group: Group, questions: Sequence[Asked], index: int, conditions: Conditions, origin: Origin
) -> tuple[list[Found] | None, float]:
    """A block and the seconds it took; no block where the device's memory did not suffice.

    Workers whose bits would be others refuse.  Threads of one process take turns, since the
    settings of `sampler.one_thread` are the process's.
    """
    if not questions:
        return [], 0.0
    here = Origin.here(conditions.device)
    expect(here == origin, f"workers of one kind, {origin}", here, "start all from one code")
    with _ALONE:
        begin = time.perf_counter()
        try:
            found = sampler.block(group, questions, index, conditions)
            return found, time.perf_counter() - begin
        except torch.cuda.OutOfMemoryError:
            pass  # what the failed block holds is let go with the error, at the end of this clause
        torch.cuda.empty_cache()  # for others on the same device
        return None, 0.0


@dataclass(frozen=True, eq=False)
class _Flight:
    """A block on its way: what the store knew of it, and what is being computed.

    `room` is how many blocks might be on their way when it was sent off, itself among them.
    """

    stream: _Stream
    index: int
    known: dict[Asked, Moments]
    missing: list[Asked]
    room: int


Flying = dict[Future[Any], _Flight]


class Campaign:
    """Many targets decided together.

    Questions on the same architecture, initialisation and given weights share their draws.
    A question's evidence is the contiguous prefix of its blocks up to the look that decided
    it: the same bits for any number of workers and of blocks in flight, and whether it was
    asked alone or with others.

    `draws` caps the draws per question (rounded up to whole blocks); `budget` stops in
    seconds and is then not deterministic; `stop` is polled after each block.  Blocks that
    `store` holds are taken from it, and those that are computed are kept there.  Blocks lost
    with their workers are computed again, and so are those that find no memory on their device,
    with half as many in flight; where that fails again and again, what is known by
    then is kept and `broken` is set.
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
    ) -> None:
        for name, value in (("draws", draws), ("budget", budget)):
            if value is not None and not 0 < value < np.inf:
                raise ValueError(f"expected {name} above 0, got {value}; change {name}")
        self.targets = list(targets)
        self.conditions, self.budget = conditions, budget
        self.stop, self.progress, self.store = stop, progress, store
        self.decisions: dict[int, Decision] = {}
        self.series: dict[Asked, Series] = {}
        self.computed = 0
        self.broken = False
        self._by_group: dict[Group, _Stream] = {}
        self._turns: list[tuple[float, int, int]] = []
        limit = draws if draws is not None else np.iinfo(np.int64).max
        for number, target in enumerate(self.targets):
            target.question.require_applicable()
            group = Group.of(target.question, conditions)
            stream = self._by_group.setdefault(group, _Stream(group, len(self._by_group), limit))
            stream.pending.append(number)
            if target.asked not in stream.questions:
                stream.questions.append(target.asked)
        self.streams = list(self._by_group.values())

    def run(
        self, workers: int | None = 1, in_flight: int | None = None, engine: str = "local"
    ) -> list[Decision]:
        """Draw until all is decided or the draws, the budget or the patience ends.

        `engine` and `workers` are those of `montecarlo.engines.engine`.  Raises `ValueError`,
        `OSError` and `ImportError` as `montecarlo.engines` and `montecarlo.store` do.
        """
        deadline = np.inf if self.budget is None else time.perf_counter() + self.budget
        start = engines.engine(engine, workers, self.conditions.device)
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
            ending = self._ending(deadline)
            while not ending and len(flying) < room:
                stream = self._next_stream(AHEAD * room)
                if stream is None:
                    break
                flying |= self._submit(stream, running, origin, room)
            if not flying:
                return
            for future in wait(flying, self._patience(), FIRST_COMPLETED).done:
                flight, (found, seconds) = flying.pop(future), future.result()
                if found is None:
                    room = min(room, self._fewer(flight))
                else:
                    self._collect(flight, found, seconds)
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
        """Send off the next block of a stream: what the store does not know of it."""
        index = stream.upcoming
        stream.out.add(index)
        known = {q: moments for q in stream.questions if (moments := self._recall(q, index))}
        missing = [question for question in stream.questions if question not in known]
        executor = running.executor if missing else InProcess()
        task = (stream.group, missing, index, self.conditions, origin)
        heappush(self._turns, stream.turn)
        return {executor.submit(_timed_block, *task): _Flight(stream, index, known, missing, room)}

    def _recall(self, question: Asked, index: int) -> Moments | None:
        return self.store.recall(self.series[question], index) if self.store else None

    def _patience(self) -> float | None:
        """How long to wait for a block: until the next commit, without end if none is due."""
        if self.store is None:
            return None
        self.store.settle()
        return self.store.patience

    def _fewer(self, flight: _Flight) -> int:
        """Have a block that found no memory drawn again, with half as many in flight."""
        flight.stream.out.remove(flight.index)
        heappush(self._turns, flight.stream.turn)
        if flight.room == 1:
            device, group = self.conditions.device, flight.stream.group
            raise MemoryError(
                f"expected a block of d_model = {group.architecture.d_model}, n_ctx = "
                f"{group.architecture.n_ctx} to fit into the memory of {device}, got none free; "
                "use cpu or smaller sizes"
            )
        return flight.room // 2

    def _collect(self, flight: _Flight, found: list[Found], seconds: float) -> None:
        """Take in a block that came back, have what is new kept, and look if it is time."""
        stream, index = flight.stream, flight.index
        stream.out.remove(index)
        fresh = dict(zip(flight.missing, found, strict=True))
        stream.waiting[index] = ({**flight.known, **fresh}, seconds)
        self.computed += len(fresh)
        for question, moments in fresh.items():
            if self.store and isinstance(moments, Moments):
                self.store.keep(self.series[question], index, moments)
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
        while stream.questions and stream.absorb():
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
