"""Many targets decided together, by shared draws looked at after fixed numbers of draws."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from montecarlo import confidence, sampler
from montecarlo.engines import engine
from montecarlo.evidence import Decision, Measurement, Target
from montecarlo.moments import Moments
from montecarlo.sampler import Conditions, Group
from nope.questions import Question

Found = Moments | FloatingPointError


@dataclass(eq=False)
class _Stream:
    """The draws of one group: which blocks are out, which are in, what they say so far."""

    group: Group
    questions: list[Question]
    limit: int
    submitted: int = 0
    merged: int = 0
    waiting: dict[int, tuple[list[Question], list[Found], float]] = field(default_factory=dict)
    moments: dict[Question, Moments] = field(default_factory=dict)
    failures: dict[Question, FloatingPointError] = field(default_factory=dict)
    look_at: int = confidence.FIRST_LOOK
    seconds: float = 0.0

    @property
    def draws(self) -> int:
        return self.merged * self.group.block_size

    @property
    def exhausted(self) -> bool:
        return self.submitted * self.group.block_size >= self.limit

    def absorb(self) -> bool:
        """Merge the next block if it is in; blocks merge in index order."""
        if self.merged not in self.waiting:
            return False
        asked, found, seconds = self.waiting.pop(self.merged)
        self.seconds += seconds
        for question, moments in zip(asked, found, strict=True):
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


def _timed_block(
    group: Group, questions: Sequence[Question], index: int, conditions: Conditions
) -> tuple[list[Found], float]:
    begin = time.perf_counter()
    return sampler.block(group, questions, index, conditions), time.perf_counter() - begin


Flying = dict[Future[Any], tuple[_Stream, int, list[Question]]]


class Campaign:
    """Many targets decided together.

    Questions on the same architecture, initialisation and given weights share their draws.
    A question's evidence is the contiguous prefix of its blocks up to the look that decided
    it: the same bits for any number of workers and of blocks in flight, and whether it was
    asked alone or with others.

    `draws` caps the draws per question (rounded up to whole blocks); `budget` stops in
    seconds and is then not deterministic; `stop` is polled after each block.  When a worker
    process dies, what is known by then is kept and `broken` is set.
    """

    def __init__(
        self,
        targets: Iterable[Target],
        conditions: Conditions,
        draws: int | None = None,
        budget: float | None = None,
        stop: Callable[[], bool] = lambda: False,
        progress: Callable[[Campaign], None] = lambda campaign: None,
    ) -> None:
        for name, value in (("draws", draws), ("budget", budget)):
            if value is not None and not 0 < value < np.inf:
                raise ValueError(f"expected {name} above 0, got {value}; change {name}")
        self.targets = list(targets)
        self.conditions, self.budget = conditions, budget
        self.stop, self.progress = stop, progress
        self.decisions: dict[int, Decision] = {}
        self.broken = False
        self.streams: list[_Stream] = []
        limit = draws if draws is not None else np.iinfo(np.int64).max
        for target in self.targets:
            target.question.require_applicable()
            group = Group.of(target.question)
            stream = next((s for s in self.streams if s.group == group), None)
            if stream is None:
                stream = _Stream(group, [], limit)
                self.streams.append(stream)
            if target.question not in stream.questions:
                stream.questions.append(target.question)

    def run(self, workers: int = 1, in_flight: int | None = None) -> list[Decision]:
        """Draw until all is decided or the draws, the budget or the patience ends."""
        deadline = np.inf if self.budget is None else time.perf_counter() + self.budget
        with engine(workers) as executor:
            try:
                self._draw(executor, in_flight or 2 * workers, deadline)
            except BrokenExecutor:
                self.broken = True
        return [self.decisions.get(k) or self._last_look(k) for k in range(len(self.targets))]

    def _draw(self, executor: Executor, room: int, deadline: float) -> None:
        """Keep `room` blocks in flight, merge what comes back, look when it is time."""
        flying: Flying = {}
        while True:
            ending = time.perf_counter() > deadline or self.stop()
            while not ending and len(flying) < room:
                stream = self._next_stream(flying)
                if stream is None:
                    break
                asked = list(stream.questions)
                task = (stream.group, asked, stream.submitted, self.conditions)
                flying[executor.submit(_timed_block, *task)] = (stream, stream.submitted, asked)
                stream.submitted += 1
            if not flying:
                return
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                stream, index, asked = flying.pop(future)
                stream.waiting[index] = (asked, *future.result())
            for stream in self.streams:
                self._advance(stream)
            self.progress(self)

    def _next_stream(self, flying: Flying) -> _Stream | None:
        """The stream that has had the least time, blocks in flight counted as average ones."""
        ahead = [stream for stream, _, _ in flying.values()]

        def spent(stream: _Stream) -> float:
            average = stream.seconds / max(1, stream.merged)
            return stream.seconds + average * (ahead.count(stream) + len(stream.waiting))

        open_streams = [s for s in self.streams if s.questions and not s.exhausted]
        return min(open_streams, key=lambda s: (spent(s), s.submitted), default=None)

    def _advance(self, stream: _Stream) -> None:
        while stream.questions and stream.absorb():
            if stream.draws >= stream.look_at:
                self._look(stream)
                stream.look_at = confidence.next_look(stream.draws)

    def _look(self, stream: _Stream) -> None:
        """Decide what can be decided; questions with nothing left to decide are dropped."""
        for number, target in enumerate(self.targets):
            if number not in self.decisions and target.question in stream.questions:
                measured = self._measurement(stream, target.question)
                failure = measured.failure
                if failure is not None:
                    stream.failures[target.question] = failure
                    self.decisions[number] = self._last_look(number)
                    continue
                verdict = target.verdict(measured)
                if verdict != "UNDECIDED":
                    self.decisions[number] = Decision(target, verdict, measured, stream.seconds)
        pending = {
            target.question
            for number, target in enumerate(self.targets)
            if number not in self.decisions
        }
        stream.questions = [question for question in stream.questions if question in pending]

    def _measurement(self, stream: _Stream, question: Question) -> Measurement:
        return Measurement(question, stream.moments[question], self.conditions.dtype)

    def _last_look(self, number: int) -> Decision:
        """What is known of a target when the draws have ended."""
        target = self.targets[number]
        stream = next(s for s in self.streams if s.group == Group.of(target.question))
        failure = stream.failures.get(target.question)
        if failure is not None or target.question not in stream.moments:
            return Decision(target, "UNDECIDED", None, stream.seconds, failure)
        measured = self._measurement(stream, target.question)
        enough = measured.draws >= confidence.FIRST_LOOK
        verdict = target.verdict(measured) if enough else "UNDECIDED"
        return Decision(target, verdict, measured, stream.seconds)
