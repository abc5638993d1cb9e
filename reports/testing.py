"""Contract tests for the claims of a paper; see `nope.contracts`.

A paper of your own, held to what a claim has to be, in a file of tests:

    class TestMyPaper(ClaimContract):
        claims = my_paper.claims

`my_paper.claims` is a function of a `theory.Setting`, as the entry points of `nope.claims` name
it.  Its plain counterpart is what it is about: real layers, which the contract draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache, cached_property
from re import fullmatch
from typing import Any, ClassVar

import numpy as np

from nope import plugins
from nope.contracts import ERROR_RATE, Contract, assert_survives, contracts_in, uncovered
from nope.questions import Question
from reports.suite import TOLERANCE, verify
from reports.verdicts import CONFIRMED, REFUTED, Run, Verdict
from theory.claims import UNINFORMATIVE_BAND, Claim, Setting, papers
from theory.formula import Status
from theory.relations import Equals

__all__ = ["ClaimContract", "Contract", "contracts_in", "uncovered"]

KNOWLEDGE = (CONFIRMED, REFUTED)
ID = r"[a-z][a-z0-9_-]*(\.[a-z0-9_-]+)+"
"""`paper.statement`."""


class ClaimContract(Contract):
    """The claims of a paper: words, predictions at `sizes`, and real layers at those `measured`.

    In the layers every claim has to be CONFIRMED, or REFUTED where the best theory expects that,
    to `tolerance` by so many `draws`; a printed claim of which no theory expects anything, either.
    `unsettled` has the reason of each that is neither, by id.
    """

    claims: ClassVar[Callable[[Setting], Iterable[Claim]]]
    sizes: ClassVar[tuple[Setting, ...]] = (
        Setting(),
        Setting(2, n_ctx=3),
        Setting(16, n_ctx=1),
        Setting(48, 1, 8),
    )
    measured: ClassVar[Setting] = Setting(64, 4, 4, 0.1)
    tolerance: ClassVar[float] = 0.05
    draws: ClassVar[int] = 20_000
    seed: ClassVar[int] = 0
    unsettled: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def registered(cls) -> list[str]:
        """The papers, and the entry points of `nope.claims` that can be read."""
        return list(_sources())

    @classmethod
    def covers(cls) -> list[str]:
        return [name for name, claims in _sources().items() if claims is cls.claims]

    @cached_property
    def default(self) -> tuple[Claim, ...]:
        """The claims at the first of `sizes`."""
        return self.at(self.sizes[0])

    def at(self, setting: Setting) -> tuple[Claim, ...]:
        """The claims at these sizes."""
        return _claims(type(self).claims, setting)

    def test_each_says_what_it_claims(self) -> None:
        """A name in its paper, a sentence, what it asserts; nothing is both spent and asserted."""
        assert self.default, "expected at least one claim; yield theory.Claim(...)"
        for claim in self.default:
            named = fullmatch(ID, claim.id)
            assert named, f"expected an id like paper.statement, got {claim.id!r}; rename it"
            assert claim.statement.endswith("."), f"expected a sentence, got {claim.statement!r}"
            assert claim.asserts, f"expected {claim.id} to say what it asserts; name a fact"
            both = set(claim.assumes) & set(claim.asserts)
            assert not both, f"expected {claim.id} not to assume what it asserts, got {both}"

    def test_they_are_the_same_when_asked_again(self) -> None:
        """Each run and each worker process asks by itself, and questions travel between them."""
        again = tuple(type(self).claims(self.sizes[0]))
        said, says = ([(c.id, c.asked) for c in each] for each in (self.default, again))
        assert said == says, "expected the same claims again; make them anew in each call"
        for claim in self.at(self.measured):
            for question in claim.asked:
                assert_survives(question)

    def test_predictions_lie_in_their_own_regions(self) -> None:
        """At every size: finite numbers, with room on each side; or the theory says why not."""
        for setting in self.sizes:
            for claim, question in _askable(self.at(setting)):
                try:
                    region = claim.region(question, TOLERANCE)
                except NotImplementedError:
                    continue
                where = f"{claim.id} at {setting}"
                judged = region.statistic.judged
                low, high = region.low[judged], region.high[judged]
                inside = (low < region.prediction[judged]) & (region.prediction[judged] < high)
                assert judged.any(), f"expected {where} to be judged somewhere"
                assert inside.all(), f"expected the prediction of {where} inside its region"
                free = np.isneginf(region.low) & np.isposinf(region.high)
                assert free[~judged].all(), f"expected no limits of {where} where none is judged"

    def test_bands_are_informative(self) -> None:
        """At the first of `sizes` every claim is predicted, to 10% with its remainder."""
        for claim, question in _askable(self.default):
            width = claim.region(question, TOLERANCE).width
            assert width <= UNINFORMATIVE_BAND, (
                f"expected a band of {UNINFORMATIVE_BAND:.0%} at most, got {width:.1%} of "
                f"{claim.id} at {question.place}; sharpen the prediction"
            )

    def test_the_best_theory_bears_out_what_is_exact(self) -> None:
        """And finds what is two bands off wrong: the expectation could have been another."""
        for claim, question in _askable(self.default):
            if claim.status is Status.EXACT:
                dropped = np.max(claim.predict(question).remainder, initial=0.0)
                assert not dropped, f"expected {claim.id}, exact, to drop nothing, got {dropped}"
            if claim.status is Status.EXACT and claim.expected is not None:
                found = replace(claim, status=Status.PRINTED).expected_verdict(question, TOLERANCE)
                assert found == CONFIRMED, f"expected {claim.id} to hold, the theory says {found}"
                if isinstance(claim.relation, Equals):
                    found = _two_bands_off(claim).expected_verdict(question, TOLERANCE)
                    assert found == REFUTED, f"expected {claim.id} two bands off REFUTED, {found}"

    def test_the_layers_say_what_is_expected(self) -> None:
        """Each question by itself; what is `unsettled` is so."""
        found = [verdict for verdict in self.run if verdict.verdict not in _wanted(verdict)]
        known = [v for v in found if v.verdict in KNOWLEDGE or v.claim not in self.unsettled]
        assert not known, "expected otherwise:\n" + "\n".join(verdict.words for verdict in known)
        closed = sorted(set(self.unsettled) - {verdict.claim for verdict in found})
        assert not closed, (
            f"expected {', '.join(closed)} to be unsettled; strike it from `unsettled`"
        )

    @property
    def run(self) -> Run:
        """The verdicts at `measured`."""
        kind: Any = type(self)
        return _run(kind)


def _sources() -> dict[str, Callable[[Setting], Iterable[Claim]]]:
    """All functions whose claims are in a run."""
    installed = plugins.load(plugins.CLAIMS)
    found = {f"claims of {name}": claims for name, claims in papers().items()}
    return found | {
        f"claims {plugin.name} of {plugin.package}": plugin.given
        for plugin in installed
        if not plugin.trouble
    }


@cache
def _claims(claims: Callable[[Setting], Iterable[Claim]], setting: Setting) -> tuple[Claim, ...]:
    return tuple(claims(setting))


@cache
def _run(contract: Any) -> Run:
    """Of a class, once for all its checks."""
    held = contract()
    return verify(
        held.at(held.measured),
        ERROR_RATE,
        tolerance=held.tolerance,
        draws=held.draws,
        seed=held.seed,
        device="cpu",
        workers=1,
    )


def _wanted(verdict: Verdict) -> tuple[str, ...]:
    """What is expected of it: to be true, but where a theory says otherwise."""
    if verdict.expected is None and verdict.status == Status.PRINTED:
        return KNOWLEDGE
    return (verdict.expected or CONFIRMED,)


def _askable(claims: Iterable[Claim]) -> Iterator[tuple[Claim, Question]]:
    """Claims with each question that has an answer."""
    for claim in claims:
        for question in claim.asked:
            asked = question, claim.relation.statistic(question)
            if not any(each.reason_not_applicable for each in asked):
                yield claim, question


def _two_bands_off(claim: Claim) -> Claim:
    """The same with another prediction: by two half-widths of its band, and a half."""

    def more(question: Question) -> np.ndarray:
        region = claim.region(question, TOLERANCE)
        half = (region.high - region.low) / 2
        moved = np.where(half > 0, region.prediction + 2.5 * half, 1.0)
        return np.where(question.judged, moved, region.prediction)

    return replace(claim, prediction=more, status=Status.PRINTED)
