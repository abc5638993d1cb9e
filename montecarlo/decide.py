"""Sequential measurement: draw blocks until every question is decided.

`decide` holds one question against a region, `measure` spends a fixed number of draws, and
`Campaign` is what both are made of: many targets, answered by shared draws, looked at after
fixed numbers of draws.  Nothing here knows of claims.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from montecarlo import confidence, sampler
from montecarlo.engines import default_workers, engine
from montecarlo.moments import Moments
from montecarlo.observables import STATISTICS
from montecarlo.sampler import Conditions, Group
from nope.devices import resolve_device
from nope.questions import Question

Verdict = Literal["CONFIRMED", "REFUTED", "UNDECIDED"]


def _on_diagonal(judged: np.ndarray) -> np.ndarray:
    """Which of the judged entries of a matrix lie on its diagonal."""
    return np.asarray(np.eye(len(judged), dtype=bool)[judged])


Found = Moments | FloatingPointError

RESOLUTION = {"float32": 2.0**-23, "float64": 2.0**-52}
SMALLEST = {name: float(np.finfo(name).tiny) / RESOLUTION[name] for name in RESOLUTION}
DEFAULT_DRAWS = 100_000


@dataclass(frozen=True, eq=False)
class Measurement:
    """An estimate from `draws` independent draws.

    `mean` has the question's shape (a ratio of means for ratio observables), and
    `standard_error` is taken across draws.  `moments` is the evidence behind both.
    """

    question: Question
    moments: Moments
    dtype: str = "float32"

    @property
    def draws(self) -> int:
        return self.moments.count

    @cached_property
    def mean(self) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(STATISTICS[self.question.observable].value(self.moments.mean))

    @property
    def failure(self) -> FloatingPointError | None:
        """Why there is no estimate: the place is 0 in every draw, or so small that it underflows.

        A second or fourth moment is trusted down to the smallest normal number over the
        rounding error; a cosine that is exactly 0 in every draw is that of zero vectors.
        """
        judged, observable = self.question.judged, self.question.observable
        moments = np.abs(self.moments.mean[:, judged])
        if self.question.kind.scale == "absolute":
            vanished = (moments[0] == 0) & (self._spread()[0][judged] == 0)
            bad = vanished & observable.startswith(("cosine", "adjacent", "kernel"))
        elif self.question.kind.scale == "kernel":
            bad = np.zeros(moments.shape[1], dtype=bool)
            bad[_on_diagonal(judged)] = np.abs(np.diagonal(self.mean)) < SMALLEST[self.dtype]
        else:
            bad = (moments < SMALLEST[self.dtype]).any(0)
        bad |= ~np.isfinite(self.mean[judged])
        if not bad.any():
            return None
        where = self.question.positions[int(np.argmax(bad))]
        return FloatingPointError(
            f"expected {observable} at {self.question.place} within the range of {self.dtype}, got "
            f"0 or an underflow at position {where}; use float64 or a larger std"
        )

    def _spread(self) -> tuple[np.ndarray, np.ndarray]:
        gradient = STATISTICS[self.question.observable].gradient(self.moments.mean)
        return self.moments.along(gradient)

    @property
    def standard_error(self) -> np.ndarray:
        return np.asarray(np.sqrt(self._spread()[0] / self.draws))

    @property
    def _size(self) -> np.ndarray:
        """What an event not yet seen may change: the value, or 1 for a cosine or a share."""
        least = 1.0 if self.question.kind.scale == "absolute" else 0.0
        return np.asarray(np.maximum(np.abs(self.mean), least))

    def half_width(self, error_rate: float) -> np.ndarray:
        """Half of the confidence sequence's interval at every entry, each at `error_rate`."""
        variance, skewness = self._spread()
        return confidence.half_width(
            self.draws, variance, skewness, error_rate, self._size, RESOLUTION[self.dtype]
        )


@dataclass(frozen=True, eq=False)
class Target:
    """A question, the region its answer must lie in, and the two error rates.

    `low` and `high` are infinite where nothing is asserted.  `confirm_error` bounds a wrong
    CONFIRMED, `refute_error` a wrong REFUTED; the latter is divided over the entries.
    """

    question: Question
    low: np.ndarray
    high: np.ndarray
    confirm_error: float
    refute_error: float

    @property
    def entries(self) -> int:
        return max(1, int((np.isfinite(self.low) | np.isfinite(self.high)).sum()))

    def simultaneous(self, measured: Measurement) -> np.ndarray:
        """The half-width that holds at every entry together, at `refute_error`."""
        return measured.half_width(self.refute_error / self.entries)

    def verdict(self, measured: Measurement) -> Verdict:
        """CONFIRMED if every interval lies inside, REFUTED if one lies wholly outside."""
        mean, wide = measured.mean, self.simultaneous(measured)
        if ((mean - wide > self.high) | (mean + wide < self.low)).any():
            return "REFUTED"
        narrow = measured.half_width(self.confirm_error)
        bounded = np.isfinite(self.low) | np.isfinite(self.high)
        inside = (mean - narrow >= self.low) & (mean + narrow <= self.high)
        return "CONFIRMED" if bounded.any() and inside[bounded].all() else "UNDECIDED"


@dataclass(frozen=True, eq=False)
class Decision:
    """The verdict on a target, with the measurement at the moment it fell.

    `failure` is why a statistic that was not finite ended it.
    """

    target: Target
    verdict: Verdict
    measurement: Measurement | None
    seconds: float
    failure: FloatingPointError | None = None

    @property
    def low(self) -> np.ndarray:
        """Lower ends of the interval that the verdict was read from.

        For CONFIRMED each entry's own interval, for the others the simultaneous one.
        """
        return np.asarray(self._mean - self._half_width)

    @property
    def high(self) -> np.ndarray:
        """Upper ends of the interval that the verdict was read from."""
        return np.asarray(self._mean + self._half_width)

    def simultaneous(self) -> tuple[np.ndarray, np.ndarray]:
        """The ends of the interval that holds at every entry together; infinite without one."""
        half = self._simultaneous_half_width
        return self._mean - half, self._mean + half

    @property
    def _mean(self) -> np.ndarray:
        shape = self.target.question.shape
        return np.zeros(shape) if self.measurement is None else self.measurement.mean

    @property
    def _half_width(self) -> np.ndarray:
        if self.verdict != "CONFIRMED" or self.measurement is None:
            return self._simultaneous_half_width
        return self.measurement.half_width(self.target.confirm_error)

    @property
    def _simultaneous_half_width(self) -> np.ndarray:
        if self.measurement is None:
            return np.full(self.target.question.shape, np.inf)
        return self.target.simultaneous(self.measurement)


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


def _require_finite(decision: Decision) -> Decision:
    measured = decision.measurement
    failure = decision.failure or (measured.failure if measured else None)
    if failure is not None:
        raise failure
    return decision


def measure(
    questions: Question | Sequence[Question],
    draws: int = 1024,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    workers: int = 1,
) -> Any:
    """Estimate one question (a `Measurement`) or several (a list) from at least `draws` draws.

    Draws come in whole blocks, so `Measurement.draws` may be larger.  Raises `LookupError` for
    a question without an answer, `ValueError` for a device or dtype that cannot be,
    `FloatingPointError` where an observable is not finite.
    """
    asked = [questions] if isinstance(questions, Question) else list(questions)
    everywhere = [
        np.full(q.shape if q.reason_not_applicable is None else (1,), np.inf) for q in asked
    ]
    targets = [Target(q, -x, x, 0.5, 0.5) for q, x in zip(asked, everywhere, strict=True)]
    conditions = Conditions(seed, str(resolve_device(device, dtype)), dtype)
    decisions = Campaign(targets, conditions, draws).run(workers)
    found = [_require_finite(decision).measurement for decision in decisions]
    return found[0] if isinstance(questions, Question) else found


def decide(
    question: Question,
    low: Any,
    high: Any,
    error_rate: float = 1e-3,
    draws: int | None = None,
    budget: float | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    workers: int | None = None,
) -> Decision:
    """Does the answer lie between `low` and `high`, at every entry?

    `low` and `high` broadcast to the question's shape; infinite where nothing is asked.
    `error_rate` bounds the probability of a wrong CONFIRMED or REFUTED, half each.  Stops at
    the decision, at `draws` (100,000 if neither limit is given) or after `budget` seconds.
    """
    if not 0 < error_rate < 1:
        raise ValueError(f"expected error_rate between 0 and 1, got {error_rate}; change it")
    question.require_applicable()
    bounds = [np.broadcast_to(np.asarray(x, dtype=float), question.shape) for x in (low, high)]
    if not (bounds[0] <= bounds[1]).all():
        raise ValueError(
            f"expected low <= high at every entry, got {low!r} and {high!r}; swap them"
        )
    target = Target(question, bounds[0], bounds[1], error_rate / 2, error_rate / 2)
    conditions = Conditions(seed, str(resolve_device(device, dtype)), dtype)
    limit = DEFAULT_DRAWS if draws is None and budget is None else draws
    campaign = Campaign([target], conditions, limit, budget)
    return _require_finite(
        campaign.run(default_workers(conditions.device) if workers is None else workers)[0]
    )
