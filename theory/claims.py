"""A claim: what a paper says, as data that can be held against a measurement.

A claim has questions, a prediction for each, and a relation that says what being right means.
Whether the claim *should* hold at given sizes is not typed in: `expected` names the best
theory available, and the expected verdict is computed by holding its prediction against the
claim's own band.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from math import gcd
from typing import Any

import numpy as np

import nope
from nope import plugins
from nope.architecture import Architecture
from nope.checks import expect, expect_count, expect_finite
from nope.plugins import Plugin
from nope.questions import Question
from nope.tokens import GaussianTokens
from theory.formula import Formula, Status
from theory.predict import Prediction, arguments, at, predict
from theory.relations import Equals, Region, Relation
from theory.validity import decided, verdict

PredictionLike = np.ndarray | Formula | Callable[[Question], Any] | float

UNINFORMATIVE_BAND = 0.10
"""A band wider than this, remainder included, counts as no knowledge."""


@dataclass(frozen=True, eq=False)
class Claim:
    """One statement about a transformer at initialisation.

    id:         name, `paper.statement`
    statement:  the claim in words
    source:     paper and lemma
    status:     how true its formula is held to be: exact, leading_order or printed
    questions:  one `nope.Question` or several, each judged by itself
    prediction: an array, a number, a `Formula`, or a function of the question that returns an
                array or a `Prediction`
    band:       tolerance of this claim, None for the run's
    relation:   `Equals()` or `Ordered()`
    expected:   the best theory available, a function from question to `Prediction`, or None
    assumes, asserts: facts it spends and makes, as short words
    remark:     what a reader should know beside the verdict
    setting:    the sizes it was made for, set by `claims`; None for a claim of a user's own,
                also one made from a paper's by `dataclasses.replace`
    package:    the installed package that added it, set by `claims`; none for the papers'
    """

    id: str
    statement: str
    source: str
    status: Status | str
    questions: Question | Iterable[Question]
    prediction: PredictionLike
    band: float | None = None
    relation: Relation = field(default_factory=Equals)
    expected: Callable[[Question], Prediction] | None = None
    assumes: tuple[str, ...] = ()
    asserts: tuple[str, ...] = ()
    remark: str = ""
    setting: Setting | None = field(default=None, init=False)
    package: str = field(default="", init=False)

    def __post_init__(self) -> None:
        for name in ("id", "statement", "source", "remark"):
            given = getattr(self, name)
            told = isinstance(given, str) and bool(given.strip() or name == "remark")
            expect(told, f"the {name} of a claim as text", given, f"change {name}")
        may_be = self.expected is None or callable(self.expected)
        remedy = "give a function of the question, as theory.predict"
        expect(may_be, f"what is expected of claim {self.id} as a function", self.expected, remedy)
        object.__setattr__(self, "questions", self.asked)
        if not self.asked or not all(isinstance(asked, Question) for asked in self.asked):
            raise ValueError(
                f"expected claim {self.id} to ask nope.Questions, got {self.questions!r}; add one"
            )
        if self.status not in list(Status):
            known = ", ".join(Status)
            raise ValueError(f"expected status {known}, got {self.status!r}; change status")
        object.__setattr__(self, "status", Status(self.status))
        if self.band is not None:
            expect_finite(f"the band of claim {self.id}", self.band, positive=True)

    @property
    def asked(self) -> tuple[Question, ...]:
        """The questions, always as a tuple."""
        return (self.questions,) if isinstance(self.questions, Question) else tuple(self.questions)

    @property
    def credit(self) -> str:
        """The source, and the package that added the claim."""
        return f"{self.source} ({self.package})" if self.package else self.source

    def predict(self, question: Question) -> Prediction:
        """The claim's own prediction for one of its questions.

        Raises `ValueError` when it is not finite or does not fit the question's shape.
        """
        found = self._as_prediction(question)
        self._require_fit(question, found.values)
        self._require_fit(question, found.remainder)
        if (np.asarray(found.remainder) < 0).any():
            raise ValueError(f"expected the remainder of {self.id} to be at least 0; change it")
        return found

    def _as_prediction(self, question: Question) -> Prediction:
        """Whatever form the prediction was given in."""
        given: Any = self.prediction
        if callable(given) and not isinstance(given, Formula):
            given = given(question)
        if isinstance(given, Prediction):
            return given
        if isinstance(given, Formula):
            known = arguments(given, question)
            remainder = np.broadcast_to(given.remainder_at(**known), question.shape)
            return Prediction(at(given, question), remainder, given.status, given)
        values = np.asarray(given, dtype=float)
        return Prediction(values, np.zeros(values.shape), Status(self.status))

    def _require_fit(self, question: Question, values: np.ndarray) -> None:
        try:
            filled = np.broadcast_to(values, question.shape)
        except ValueError:
            raise ValueError(
                f"expected the prediction of {self.id} to have shape {question.shape}, "
                f"got {values.shape}; change the prediction"
            ) from None
        if not np.isfinite(filled[question.judged]).all():
            raise ValueError(
                f"expected a finite prediction of {self.id} at {question.place}, got "
                f"{filled[question.judged].min()} to {filled[question.judged].max()}; change it"
            )

    def region(self, question: Question, tolerance: float) -> Region:
        """Where the measurement must lie, at the run's tolerance unless the claim has a band."""
        return self.relation.region(question, self.predict(question), self.band or tolerance)

    def expected_verdict(self, question: Question, tolerance: float) -> str | None:
        """CONFIRMED or REFUTED where the best theory decides it, else None.

        Inside the band by more than its own remainder everywhere: CONFIRMED.  Outside by more
        than its remainder somewhere: REFUTED, unless the claim is held to be exact: then two
        theories disagree, and a refutation is a surprise.
        """
        if self.expected is None:
            return None
        region = self.region(question, tolerance)
        with np.errstate(over="ignore", invalid="ignore"):
            best, remainder = self.relation.predicted(question, self.expected(question))
        judged = region.statistic.judged
        values, slack, low, high = (x[judged] for x in (best, remainder, region.low, region.high))
        found = verdict(decided(values, slack, low, high))
        exact = self.status == Status.EXACT
        return "CONFIRMED" if exact and found == "REFUTED" else found


@dataclass(frozen=True)
class Setting:
    """The sizes at which the papers' claims are asked; defaults are GPT-2 small's.

    `n_heads` defaults to 12, or at other widths to its greatest common divisor with d_model.
    Raises `ValueError` for impossible sizes.
    """

    d_model: int = 768
    n_heads: int | None = None
    n_ctx: int = 512
    std: float = 0.02
    token_std: float = 0.02

    def __post_init__(self) -> None:
        expect_count("d_model", self.d_model)
        expect_count("n_ctx", self.n_ctx)
        expect_finite("std", self.std, positive=True)
        expect_finite("token_std", self.token_std, positive=True)
        if self.n_heads is None:
            object.__setattr__(self, "n_heads", gcd(12, self.d_model))

    def decoder(self, **changes: Any) -> Architecture:
        """One pre-LN layer of these sizes."""
        options: dict[str, Any] = {
            "n_ctx": self.n_ctx,
            "tokens": GaussianTokens(self.token_std),
            **changes,
        }
        assert self.n_heads is not None
        return nope.decoder(self.d_model, self.n_heads, **options)

    def question(self, place: str, observable: str, given: Any = None, **changes: Any) -> Question:
        """A question about one layer of these sizes, weights N(0, std^2)."""
        init = nope.init.normal(self.std)
        return Question(self.decoder(**changes), init, place, observable, given)


best_theory = partial(predict, fidelity="best")
"""The default for `Claim.expected`: the kernel calculus at its best fidelity."""


def claims(**sizes: Any) -> tuple[Claim, ...]:
    """Every claim at the given sizes (see `Setting`): of `theory.papers`, then of plugins.

    A plugin that does not work is left out, with a `nope.plugins.PluginWarning`.
    """
    found, contributed = gather(Setting(**sizes))
    plugins.warn(contributed)
    return found


def papers() -> dict[str, Callable[[Setting], Iterable[Claim]]]:
    """The claims of each paper of `theory.papers`, by its key."""
    from theory.papers import chi2023, ours, zuo2025

    return {"chi2023": chi2023.claims, "zuo2025": zuo2025.claims, "ours": ours.claims}


def gather(setting: Setting) -> tuple[tuple[Claim, ...], tuple[Plugin, ...]]:
    """Every claim at these sizes, and the plugins of `nope.claims`, those without claims too."""
    found = [claim for claims in papers().values() for claim in claims(setting)]
    contributed = []
    for plugin in plugins.load(plugins.CLAIMS):
        asked = plugin.read(lambda claims: _new(claims(setting), found))
        for claim in asked.given or ():
            object.__setattr__(claim, "package", plugin.package)
            found.append(claim)
        contributed.append(asked)
    for claim in found:
        object.__setattr__(claim, "setting", setting)
    return tuple(found), tuple(contributed)


def _new(given: Iterable[Any], known: Iterable[Claim]) -> tuple[Claim, ...]:
    """The claims of a plugin.  Raises `ValueError` for what is none and for ids that are taken."""
    found = tuple(given)
    for claim in found:
        expect(isinstance(claim, Claim), "theory.Claims", claim, "yield theory.Claim(...)")
    expect_own_ids((*known, *found))
    return found


def expect_own_ids(found: Iterable[Claim]) -> None:
    """Refuse two claims of one id."""
    twice = sorted(name for name, count in Counter(c.id for c in found).items() if count > 1)
    expect(not twice, "every claim to have its own id", ", ".join(twice), "rename one")


def select(available: Iterable[Claim], patterns: Iterable[str]) -> tuple[Claim, ...]:
    """The claims whose id matches one of the globs; all without a glob.

    Raises `LookupError` naming a glob that matches nothing.
    """
    everything, wanted = tuple(available), tuple(patterns)
    for pattern in wanted:
        if not any(fnmatchcase(claim.id, pattern) for claim in everything):
            known = ", ".join(claim.id for claim in everything)
            raise LookupError(f"expected a claim id or glob, got {pattern!r}; there are {known}")
    if not wanted:
        return everything
    return tuple(c for c in everything if any(fnmatchcase(c.id, p) for p in wanted))
