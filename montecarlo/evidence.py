"""What was measured, what it is held against, and what follows.

A `Measurement` is an estimate with its moments, a `Target` a region with its error rates, a
`Decision` the verdict of one on the other.  Nothing here draws, and nothing knows of claims.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from montecarlo import confidence
from montecarlo.moments import Moments
from montecarlo.observables import STATISTICS
from nope.questions import Question

Verdict = Literal["CONFIRMED", "REFUTED", "UNDECIDED"]


RESOLUTION = {"float32": 2.0**-23, "float64": 2.0**-52}
SMALLEST = {name: float(np.finfo(name).tiny) / RESOLUTION[name] for name in RESOLUTION}


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
            bad = vanished & (self.question.kind.shape not in ("whole", "points"))  # shares
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

    @property
    def aside(self) -> str:
        """What the evidence tells beside the estimate, in words; often nothing."""
        return STATISTICS[self.question.observable].aside(self.moments.mean)

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


def _on_diagonal(judged: np.ndarray) -> np.ndarray:
    """Which of the judged entries of a matrix lie on its diagonal."""
    return np.asarray(np.eye(len(judged), dtype=bool)[judged])
