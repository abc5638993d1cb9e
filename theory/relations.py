"""Relations: what it means for a claim to hold.

A relation turns a question and a prediction into the statistic that is measured and the
region that it must lie in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

import nope
from nope.questions import Question
from theory.predict import Prediction


@dataclass(frozen=True, eq=False)
class Region:
    """Where the measured statistic must lie for a claim to hold, entry by entry.

    `statistic` is the question that is measured; `low` and `high` have its shape and are
    infinite where nothing is asserted; `width` is the half-width as a fraction of its scale.
    """

    statistic: Question
    prediction: np.ndarray
    low: np.ndarray
    high: np.ndarray
    width: float


@runtime_checkable
class Relation(Protocol):
    """What it means for a claim to hold: its statistic, its region, its words.

    `Equals`, `Law`, `Identical` and `Ordered` are built; a rate is another class of this form.
    """

    @property
    def name(self) -> str:
        """A word for it, by which the report picks its figure."""

    def statistic(self, question: Question) -> Question:
        """The question whose answer decides."""

    def predicted(self, question: Question, prediction: Prediction) -> tuple[Any, Any]:
        """What a prediction says of the statistic: values and remainder, in its shape."""

    def region(self, question: Question, prediction: Prediction, tolerance: float) -> Region:
        """Where the statistic must lie."""

    def words(self, tolerance: float, scale: str, remainder: float) -> str:
        """The relation in words; `remainder` is the largest that a band was widened by."""


@dataclass(frozen=True)
class Equals:
    """measured = predicted, within the tolerance times the observable's scale, plus remainder."""

    name: ClassVar[str] = "equals"

    def statistic(self, question: Question) -> Question:
        return question

    def predicted(self, question: Question, prediction: Prediction) -> tuple[Any, Any]:
        shape = question.shape
        return np.broadcast_to(prediction.values, shape), np.broadcast_to(
            prediction.remainder, shape
        )

    def region(self, question: Question, prediction: Prediction, tolerance: float) -> Region:
        values, remainder = self.predicted(question, prediction)
        scale = question.scale_of(values)
        width = tolerance * scale + remainder
        low = np.where(question.judged, values - width, -np.inf)
        high = np.where(question.judged, values + width, np.inf)
        nothing = np.where(width > 0, np.inf, 0.0)
        relative = np.divide(width, scale, out=nothing, where=scale > 0)
        widest = relative[question.judged].max(initial=0.0)
        return Region(question, values, low, high, float(widest))

    def words(self, tolerance: float, scale: str, remainder: float) -> str:
        units = {
            "relative": f"{tolerance:.2%} of the prediction",
            "kernel": f"{tolerance:.2%} of sqrt(K_mm K_nn) of the prediction",
            "absolute": f"{tolerance:.3g} of the prediction, in absolute terms",
        }
        extra = f", and a remainder of up to {remainder:.2g}" if remainder > 0 else ""
        return f"within {units[scale]}{extra}"


@dataclass(frozen=True)
class Law(Equals):
    """A coordinate, or a logit, has the predicted distribution, at every point that is asked.

    The tolerance is on probabilities; the points are the question's, `theory.laws.quantile_points`
    puts them at quantiles of the law.
    """

    name: ClassVar[str] = "law"

    def statistic(self, question: Question) -> Question:
        if question.observable != "cdf":
            raise ValueError(
                f"expected a Law claim to ask for cdf, got {question.observable}; use Equals"
            )
        return question

    def words(self, tolerance: float, scale: str, remainder: float) -> str:
        extra = f", and a remainder of up to {remainder:.2g}" if remainder > 0 else ""
        return f"within {tolerance:.3g} of the predicted share at or below the point{extra}"


@dataclass(frozen=True)
class Identical(Equals):
    """A symmetry: transforming the inputs leaves a place as it was, up to rounding.

    The theorem is about every input, and draws can bound the exceptions only: the statistic is
    the share of draws in which the gap is more than rounding, and the tolerance is on it.  No
    exception in n draws bounds the share by log(1/alpha)/n, so a tolerance of 2.5% takes some
    400 draws.  Nothing is lost by that: a gap that is not 0 for all inputs is, being analytic,
    not 0 for almost all, and the share is 0 or 1.  What counts as rounding is stated where the
    gap is measured, in units of its dtype's last place.
    """

    name: ClassVar[str] = "identical"

    def statistic(self, question: Question) -> Question:
        if question.kind.transform is None:
            raise ValueError(
                "expected an Identical claim to ask for an observable that transforms the inputs, "
                f"got {question.observable}; use Equals"
            )
        return question

    def words(self, tolerance: float, scale: str, remainder: float) -> str:
        return f"the same up to rounding in at least {1 - tolerance:.2%} of draws"


@dataclass(frozen=True)
class Ordered:
    """The measured cosine falls with distance: every step towards the diagonal is positive."""

    name: ClassVar[str] = "ordered"

    def statistic(self, question: Question) -> Question:
        if question.observable != "cosine":
            raise ValueError(
                f"expected an Ordered claim to ask for cosine, got {question.observable}; "
                "use Equals"
            )
        return nope.Question(
            question.architecture, question.init, question.place, "cosine_steps", question.given
        )

    def predicted(self, question: Question, prediction: Prediction) -> tuple[Any, Any]:
        values = np.broadcast_to(prediction.values, question.shape)
        remainder = np.broadcast_to(prediction.remainder, question.shape)
        return np.diff(values, axis=1), remainder[:, 1:] + remainder[:, :-1]

    def region(self, question: Question, prediction: Prediction, tolerance: float) -> Region:
        steps = self.statistic(question)
        values, _ = self.predicted(question, prediction)
        low = np.where(steps.judged, 0.0, -np.inf)
        return Region(steps, values, low, np.full(steps.shape, np.inf), 0.0)

    def words(self, tolerance: float, scale: str, remainder: float) -> str:
        return "rising at every step towards the query, with no tolerance"


@dataclass(frozen=True)
class Rate(Equals):
    """The gap to infinite width is the predicted one: the tolerance multiplies the gap.

    `limit` is the formula without the gap, `power` the p of d^-p.  Right at widths d_1 < d_2 within
    a share t of the gap, the measured exponent is p up to 2 t/ln(d_2/d_1).
    """

    limit: Callable[[Question], np.ndarray]
    power: float = 1.0
    name: ClassVar[str] = "rate"

    def region(self, question: Question, prediction: Prediction, tolerance: float) -> Region:
        values, remainder = self.predicted(question, prediction)
        gap = np.abs(values - self.limit(question))
        width = tolerance * gap + remainder
        low = np.where(question.judged, values - width, -np.inf)
        high = np.where(question.judged, values + width, np.inf)
        relative = np.divide(width, gap, out=np.full(gap.shape, np.inf), where=gap > 0)
        widest = float(relative[question.judged].max(initial=0.0))
        return Region(question, values, low, high, widest)

    def words(self, tolerance: float, scale: str, remainder: float) -> str:
        extra = f" and {remainder:.2g}" if remainder > 0 else ""
        return f"within {tolerance:.2%}{extra} of the gap, which falls as d^-{self.power:g}"
