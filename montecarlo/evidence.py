"""What was measured, what it is held against, and what follows.

A `Measurement` is an estimate with its moments, a `Target` a region with its error rates, a
`Decision` the verdict of one on the other.  Nothing here draws, and nothing knows of claims.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from montecarlo import confidence
from montecarlo.estimators import Asked, Integrated
from montecarlo.moments import Moments
from montecarlo.observables import STATISTICS
from nope.checks import expect
from nope.questions import Question
from nope.tokens import may_repeat

Verdict = Literal["CONFIRMED", "REFUTED", "UNDECIDED"]


RESOLUTION = {"float32": 2.0**-23, "float64": 2.0**-52}
STEP = 1e-3
"""How far means are moved to see a gradient bend, in standard deviations of a draw."""
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
            bad = vanished & (not self.question.kind.is_share)
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
        """Variance per draw and skewness of the estimate, by the delta method.

        For a function of several means with gradient a, Hessian H, and covariance S of the draws,
        the tail of its t statistic is that of a mean of skewness gamma + 3/2 a'S H S a/sd^3,
        gamma that of a'x and sd^2 = a'S a: where the estimate is low, so is its gradient (derived
        here; `montecarlo.confidence` has the rest).
        """
        gradient = STATISTICS[self.question.observable].gradient
        slope = gradient(self.moments.mean)
        variance, skewness = self.moments.along(slope)
        if len(self.moments.mean) == 1 or self.draws < 2:
            return variance, skewness
        step = self.moments.covariance_with(slope)  # S a
        sd = np.sqrt(variance)
        unit = np.divide(STEP, sd, out=np.zeros_like(sd), where=sd > 0)
        mean = self.moments.mean
        bend = gradient(mean + unit * step) - gradient(mean - unit * step)  # 2 unit H S a
        bend = np.einsum("i...,i...->...", step, bend)
        return variance, skewness + 1.5 * np.divide(
            bend, 2 * unit * sd**3, out=np.zeros_like(sd), where=sd > 0
        )

    @property
    def standard_error(self) -> np.ndarray:
        return np.asarray(np.sqrt(self._spread()[0] / self.draws))

    @property
    def _size(self) -> np.ndarray:
        """What an event not yet seen may change: the value, of a kernel that of equal vectors; the
        way to the further bound."""
        kind = self.question.kind
        if kind.scale == "kernel":
            return self.question.scale_of(self.mean)
        least = 1.0 if kind.scale == "absolute" else 0.0
        if kind.scale == "absolute" and kind.bounds is not None:
            return np.asarray(np.maximum(self.mean - kind.bounds[0], kind.bounds[1] - self.mean))
        return np.asarray(np.maximum(np.abs(self.mean), least))

    def half_width(self, error_rate: float, exact: bool = False) -> np.ndarray:
        """Half of the confidence sequence's interval at every entry, each at `error_rate`.

        Exactly valid for observables that are 0 or 1 in a draw, and if `exact` for all that are
        bounded; asymptotically for the others (see `montecarlo.confidence`).

        Tokens that may repeat are the event in hiding: where no draw had one token at two positions
        nothing in the draws tells how often they would, and a skewness cannot warn.  What is
        bounded is judged exactly then, and for the rest what the event may change is added.
        """
        bounded, hiding = self.question.kind.bounds is not None, self._may_repeat
        if bounded and (exact or hiding or self.question.kind.is_event):
            return self._exact(error_rate)
        if not bounded:
            return self._asymptotic(error_rate)
        share = confidence.EXACT_SHARE
        halves = self._asymptotic((1 - share) * error_rate), self._exact(share * error_rate)
        return np.asarray(np.minimum(*halves))

    def _exact(self, error_rate: float) -> np.ndarray:
        bounds = self.question.kind.bounds
        assert bounds is not None
        variance = self._spread()[0]
        return confidence.bounded_half_width(self.draws, self.mean, variance, bounds, error_rate)

    def _asymptotic(self, error_rate: float) -> np.ndarray:
        """Where tokens may repeat each part has half the rate."""
        variance, skewness = self._spread()
        hidden: np.ndarray | float = 0.0
        if self._may_repeat:
            error_rate /= 2
            hidden = self._size * np.log(1 / error_rate) / max(self.draws, 1)
        return hidden + confidence.half_width(
            self.draws, variance, skewness, error_rate, self._size, RESOLUTION[self.dtype]
        )

    @property
    def _may_repeat(self) -> bool:
        return may_repeat(self.question.architecture.tokens)

    def projected(self, draws: int) -> Measurement:
        """What `draws` draws of the same mean, variance and skewness would be."""
        return replace(self, moments=self.moments.scaled(draws))


@dataclass(frozen=True, eq=False)
class Target:
    """A question, the region its answer must lie in, and the two error rates.

    `low` and `high` are infinite where nothing is asserted.  `confirm_error` bounds a wrong
    CONFIRMED, `refute_error` a wrong REFUTED; the latter is divided over the entries.  `exact`
    asks for exactly valid intervals wherever the observable is bounded, at the price of draws;
    `integrated` is an estimator with less variance (`montecarlo.estimators`).
    """

    question: Question
    low: np.ndarray
    high: np.ndarray
    confirm_error: float
    refute_error: float
    exact: bool = False
    integrated: Integrated | None = None

    @property
    def asked(self) -> Asked:
        """The estimator that answers the question; the plain one unless another is given."""
        return self.integrated or self.question

    @property
    def judged(self) -> np.ndarray:
        """Which entries something is asserted of."""
        return np.asarray(np.isfinite(self.low) | np.isfinite(self.high))

    @property
    def entries(self) -> int:
        return max(1, int(self.judged.sum()))

    def simultaneous(self, measured: Measurement) -> np.ndarray:
        """The half-width that holds at every entry together, at `refute_error`."""
        return measured.half_width(self.refute_error / self.entries, self.exact)

    def single(self, measured: Measurement) -> np.ndarray:
        """The half-width that holds at any one entry, at `confirm_error`."""
        return measured.half_width(self.confirm_error, self.exact)

    def outside(self, measured: Measurement) -> np.ndarray:
        """Which entries' simultaneous intervals lie wholly outside the region."""
        mean, wide = measured.mean, self.simultaneous(measured)
        return np.asarray((mean - wide > self.high) | (mean + wide < self.low))

    def inside(self, measured: Measurement) -> np.ndarray:
        """Which entries' own intervals lie inside the region; all where nothing is asserted."""
        mean, narrow = measured.mean, self.single(measured)
        return np.asarray((mean - narrow >= self.low) & (mean + narrow <= self.high) | ~self.judged)

    def verdict(self, measured: Measurement) -> Verdict:
        """CONFIRMED if every interval lies inside, REFUTED if one lies wholly outside."""
        if self.outside(measured).any():
            return "REFUTED"
        decided = self.judged.any() and self.inside(measured).all()
        return "CONFIRMED" if decided else "UNDECIDED"

    def require_reachable(self, dtype: str) -> None:
        """Raise `ValueError` for a band so narrow that rounding alone may leave it.

        Draws average noise away and rounding not: what is within some units of the last place
        is beyond any number of them.  A band of no width asks for an exact value, which can be
        refuted only, and passes.
        """
        half = (self.high - self.low) / 2
        size = np.maximum(np.abs(self.low), np.abs(self.high))
        if self.question.kind.scale == "absolute":
            size = np.maximum(size, 1.0)
        with np.errstate(invalid="ignore"):
            floor = confidence.ROUNDING * RESOLUTION[dtype] * size
            narrow = np.isfinite(half) & (half > 0) & (half < floor)
        if narrow.any():
            worst = np.unravel_index(int(np.argmax(np.where(narrow, floor, 0))), half.shape)
            expect(
                False,
                f"a half-width of at least {floor[worst]:.2g}, the rounding of {dtype}, "
                f"for {self.question.observable} at {self.question.place}",
                float(half[worst]),
                "no number of draws reaches it: "
                + ("use float64 or a wider band" if dtype == "float32" else "widen the band"),
            )


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
        return self.target.single(self.measurement)

    @property
    def _simultaneous_half_width(self) -> np.ndarray:
        if self.measurement is None:
            return np.full(self.target.question.shape, np.inf)
        return self.target.simultaneous(self.measurement)


def _on_diagonal(judged: np.ndarray) -> np.ndarray:
    """Which of the judged entries of a matrix lie on its diagonal."""
    return np.asarray(np.eye(len(judged), dtype=bool)[judged])
