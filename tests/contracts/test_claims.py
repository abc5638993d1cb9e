"""Every paper's claims: what they say, what they predict, and what real layers say of them.

Behind it what the contract is for: a claim that is wrong in one way fails in the check that is
about it.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest

import theory
from nope import plugins
from reports.testing import ClaimContract, contracts_in, uncovered
from theory.papers import chi2023, ours, zuo2025
from theory.predict import Prediction


class TestChi2023(ClaimContract):
    """Lemma 4 is about single coordinates: its two forms are apart where a token is in its prefix
    by half, and wide."""

    claims = chi2023.claims
    measured = theory.Setting(256, 4, 4, std=512**-0.5, token_std=0.5)
    draws = 100_000


class TestZuo2025(ClaimContract):
    claims = zuo2025.claims


FOURTH = "a fourth moment takes some 10^6 draws"


UNSETTLED = {
    "ours.rate.cosine": "10% of a gap of 1/d take some 10^6 draws",
    "ours.init.orthogonal.kurtosis": FOURTH,
    "ours.init.kaiming_uniform.kurtosis": FOURTH,
    "ours.init.truncated_normal.kurtosis": FOURTH,
}


class TestOurs(ClaimContract):
    claims = ours.claims
    unsettled = UNSETTLED


def test_every_paper_has_its_contract():
    assert uncovered(ClaimContract, [*contracts_in(globals()), *plugins.contracts()]) == []


# ------------------------------------------------------------- what is wrong fails by its name

SIZES = (theory.Setting(16, 2, 4, 0.2), theory.Setting(16, 2, 1, 0.2))
SAYS = "test_each_says_what_it_claims"
AGAIN = "test_they_are_the_same_when_asked_again"
REGIONS = "test_predictions_lie_in_their_own_regions"
BANDS = "test_bands_are_informative"
THEORY = "test_the_best_theory_bears_out_what_is_exact"
LAYERS = "test_the_layers_say_what_is_expected"


def queries(setting: theory.Setting) -> Iterable[theory.Claim]:
    """E q^2 = d sigma^2."""
    yield theory.Claim(
        "mine.queries",
        "A query has the variance d sigma^2.",
        "a test",
        "exact",
        setting.question("blocks.0.attn.q", "second_moment"),
        setting.d_model * setting.std**2,
        expected=theory.predict,
        asserts=("variance of queries",),
    )


def changed(**changes):
    """The same claim but for some fields."""
    return lambda setting: [replace(claim, **changes) for claim in queries(setting)]


class Queries(ClaimContract):
    claims = queries
    sizes = SIZES
    measured = SIZES[0]
    draws = 8192


def test_the_claim_itself_passes():
    assert Queries.failures() == {}


RIGHT = 16 * 0.2**2
WRONG = {
    "no paper": (changed(id="queries"), {SAYS}),
    "no sentence": (changed(statement="d sigma^2"), {SAYS}),
    "no fact": (changed(asserts=()), {SAYS}),
    "a circle": (changed(assumes=("variance of queries",)), {SAYS}),
    "no claim": (lambda setting: (), {SAYS}),
    "half of it": (changed(prediction=RIGHT / 2), {THEORY, LAYERS}),
    "half, unexpected": (changed(prediction=RIGHT / 2, expected=None), {LAYERS}),
    "half, as printed": (changed(prediction=RIGHT / 2, status="printed"), set()),
    "a wide band": (changed(band=0.2), {BANDS, LAYERS}),
    "a remainder": (
        changed(
            prediction=lambda q: Prediction(
                np.full(q.shape, RIGHT), np.full(q.shape, RIGHT), theory.Status.LEADING_ORDER
            ),
            status="leading_order",
        ),
        {BANDS, LAYERS},
    ),
    "a theory that agrees": (
        changed(prediction=RIGHT / 2, expected=lambda q: just(RIGHT / 2, q)),
        {LAYERS},
    ),
    "a theory that knows nothing": (
        changed(expected=lambda q: Prediction(*np.full((2, *q.shape), RIGHT), "leading_order")),
        {THEORY},
    ),
}


def just(value, question):
    """As the best theory would say it."""
    return Prediction(np.full(question.shape, value), np.zeros(question.shape), "exact")


@pytest.mark.parametrize(("claims", "caught"), WRONG.values(), ids=WRONG)
def test_a_wrong_claim_fails_in_the_check_that_is_about_it(claims, caught):
    wrong = ClaimContract.named("wrong", claims=claims, sizes=SIZES, measured=SIZES[0], draws=8192)
    assert set(wrong.failures()) == caught
