"""The verdict: what is judged, at which error rate, and what comes out."""

from dataclasses import replace

import numpy as np
import pytest

import nope
import reports
import theory
from reports import plan, suite
from reports.verdicts import NOT_APPLICABLE, UNINFORMATIVE
from theory.claims import select

SMALL = {"d_model": 64, "n_heads": 4, "n_ctx": 8, "std": 0.1}
PAPERS = ("chi2023.*", "zuo2025.*", "ours.layernorm.eps")
"""What the suite is tried on; the rest of ours takes minutes and is `nope verify`'s to judge."""
MEANS = ("second_moment", "mean_second_moment", "kernel", "cosine")


def scaled(claim: theory.Claim, factor: float) -> theory.Claim:
    """A claim of a user's own: the same questions, the prediction times a factor."""

    def prediction(question: nope.Question) -> np.ndarray:
        return factor * np.broadcast_to(claim.predict(question).values, question.shape)

    return theory.Claim(
        id=f"user.{claim.id}",
        statement=f"{factor} times {claim.statement}",
        source="a test",
        status="exact",
        questions=claim.questions,
        prediction=prediction,
    )


def exact_claims() -> list[theory.Claim]:
    """Every exact claim on a mean, at small sizes."""
    means = []
    for claim in select(theory.claims(**SMALL), PAPERS):
        asked = [question for question in claim.asked if question.observable in MEANS]
        equality = claim.status is theory.Status.EXACT and claim.relation.name == "equals"
        if asked and equality:
            means.append(replace(claim, questions=asked))
    assert len(means) >= 7
    return means


@pytest.mark.parametrize("seed", [7, 77])
def test_exact_claims_are_confirmed_and_five_percent_off_is_refuted(seed):
    """Every exact formula is CONFIRMED, and the same formula times 1.05 REFUTED."""
    claims = exact_claims()
    run = reports.verify([*claims, *(scaled(c, 1.05) for c in claims)], seed=seed, workers=1)
    for verdict in run:
        expected = "REFUTED" if verdict.claim.startswith("user.") else "CONFIRMED"
        assert verdict.verdict == expected, verdict.words


def test_one_head_confirms_lemma_2_as_printed():
    """With H = 1 the factor H is gone."""
    claims = [c for c in theory.claims(d_model=64, n_heads=1, n_ctx=8) if "lemma2" in c.id]
    run = reports.verify(claims, seed=3, workers=1)
    assert [verdict.verdict for verdict in run] == ["CONFIRMED", "CONFIRMED"]
    assert [verdict.expected for verdict in run] == ["CONFIRMED", "CONFIRMED"]


@pytest.mark.parametrize(
    "sizes",
    [
        {"d_model": 64, "n_ctx": 1},
        {"d_model": 64, "n_ctx": 2},
        {"d_model": 16, "n_heads": 1, "n_ctx": 4},
        {"d_model": 2, "n_ctx": 4},
        {"d_model": 3, "n_ctx": 5, "std": 1.0},
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_edge_sizes_give_verdicts_or_reasons(sizes, dtype):
    """Every row is a verdict with evidence, or says why there is none; ours in float32."""
    wanted = PAPERS if dtype == "float64" else (*PAPERS, "ours.depth.*", "ours.tokens.*")
    claims = select(theory.claims(**sizes), wanted)
    run = reports.verify(claims, seed=2, workers=1, draws=4096, dtype=dtype)
    assert len(run.verdicts) == sum(len(claim.asked) for claim in claims)
    for verdict in run:
        if verdict.verdict in (NOT_APPLICABLE, UNINFORMATIVE):
            assert verdict.reason
            assert not verdict.positions
        elif verdict.verdict != "UNDECIDED":
            assert verdict.draws >= 64
            assert verdict.positions


def test_one_position_has_no_cosine_to_judge():
    """Nothing is CONFIRMED for want of positions."""
    names = ("zuo2025.cosine", "zuo2025.monotone", "zuo2025.score", "chi2023.property1")
    claims = select(theory.claims(d_model=16, n_ctx=1), names)
    run = reports.verify(claims, seed=2, workers=1, draws=512)
    found = {verdict.claim: verdict for verdict in run}
    for name in names:
        assert found[name].verdict == NOT_APPLICABLE
        assert "n_ctx is 1" in found[name].reason


def test_a_place_that_is_not_there_is_not_applicable():
    """Uniform attention has no scores."""
    question = nope.Question(
        nope.decoder(16, 2, n_ctx=4, attention="uniform"),
        nope.init.normal(0.1),
        "blocks.0.attn.scores",
        "second_moment",
    )
    claim = theory.Claim("user.scores", "Scores.", "a test", "exact", question, 1.0)
    (verdict,) = reports.verify(claim, workers=1)
    assert verdict.verdict == NOT_APPLICABLE
    assert "blocks.0.attn.scores" in verdict.reason


def test_a_band_wider_than_ten_percent_is_uninformative():
    """A claim that everything satisfies is no knowledge."""
    question = theory.Setting(**SMALL).question("blocks.0.ln1", "second_moment")
    claim = theory.Claim("user.wide", "Wide.", "a test", "exact", question, 1.0, band=0.2)
    (verdict,) = reports.verify(claim, workers=1)
    assert verdict.verdict == UNINFORMATIVE
    assert "20.0%" in verdict.reason


def a_claim(prediction, **options) -> theory.Claim:
    """A claim of a user's own about the residual stream."""
    setting = theory.Setting(**SMALL)
    question = setting.question("blocks.0.resid_mid", "second_moment", attention="uniform")
    return theory.Claim("user.one", "One.", "a test", "exact", question, prediction, **options)


def test_a_zero_prediction_with_a_remainder_is_uninformative():
    """A band around 0 that everything fits into is no knowledge."""
    vague = theory.Prediction(np.zeros(8), np.full(8, 0.09), theory.Status.LEADING_ORDER)
    (verdict,) = reports.verify(a_claim(lambda question: vague), workers=1)
    assert verdict.verdict == UNINFORMATIVE


def test_claims_that_cannot_be_told_apart_are_refused():
    """What is no claim, and two claims of one name."""
    with pytest.raises(ValueError, match="expected theory"):
        reports.verify("chi2023.lemma1", workers=1)
    with pytest.raises(ValueError, match="own id"):
        reports.verify([a_claim(1.0), a_claim(2.0)], workers=1)


def test_an_expectation_that_cannot_be_derived_is_no_expectation():
    """The claim is judged all the same."""
    setting = theory.Setting(**SMALL)
    question = setting.question("blocks.0.attn.z", "adjacency_score.norm", attention="uniform")
    claim = theory.Claim(
        "user.norm", "Norms fall.", "a test", "exact", question, 0.5, expected=theory.predict
    )
    (verdict,) = reports.verify(claim, workers=1, draws=2000)
    assert verdict.expected is None
    assert verdict.verdict == "REFUTED"


@pytest.mark.parametrize(("std", "dtype"), [(1e-30, "float32"), (1e-85, "float64")])
def test_underflow_is_said_and_never_judged(std, dtype):
    """What the dtype cannot hold is UNDECIDED with the reason."""
    claims = theory.claims(d_model=16, n_ctx=4, n_heads=2, std=std)
    chosen = [c for c in claims if c.id in ("chi2023.lemma2.corrected", "chi2023.lemma3")]
    run = reports.verify(chosen, workers=1, draws=300, dtype=dtype)
    for verdict in run:
        assert verdict.verdict == "UNDECIDED"
        assert "underflow" in verdict.words


@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_eps_at_small_widths_is_not_wrongly_refuted(width):
    """The remainder of v/(v + eps) is honest where |x|^2 fluctuates most."""
    claims = theory.claims(d_model=width, n_ctx=2)
    chosen = [claim for claim in claims if claim.id == "ours.layernorm.eps"]
    (verdict,) = reports.verify(chosen, workers=1, draws=20_000, dtype="float64")
    assert verdict.verdict in ("CONFIRMED", UNINFORMATIVE)


def test_the_error_rate_is_shared_over_what_is_judged():
    """Half for CONFIRMED, half for REFUTED, divided over the judged questions only."""
    claims = theory.claims(d_model=16, n_ctx=1)
    cases = suite.cases_of(claims, 0.025)
    targets = suite.targets_of(cases, 1e-3)
    assert 0 < len(targets) < len(cases)
    total = sum(target.confirm_error + target.refute_error for target in targets)
    assert total == pytest.approx(1e-3)


def test_asking_with_others_changes_no_bit():
    """The verdict of a claim is the same alone and among others, except for its error share."""
    claims = [c for c in theory.claims(**SMALL) if c.id in ("chi2023.lemma1", "chi2023.lemma3")]
    target = suite.targets_of(suite.cases_of(claims[:1], 0.025), 1e-3)
    together = suite.Campaign(target, suite.Conditions(4)).run(1)
    others = suite.targets_of(suite.cases_of(claims[1:], 0.025), 1e-3)
    among = suite.Campaign([*others, *target], suite.Conditions(4)).run(1)[len(others) :]
    for alone, mixed in zip(together, among, strict=True):
        assert np.array_equal(alone.measurement.moments.mean, mixed.measurement.moments.mean)
        assert alone.verdict == mixed.verdict


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"error_rate": 0.0}, "error_rate"),
        ({"error_rate": 1.5}, "error_rate"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"draws": 0}, "draws"),
        ({"budget": -1.0}, "budget"),
        ({"device": "toaster"}, "device"),
        ({"dtype": "float16"}, "dtype"),
        ({"workers": -1}, "worker"),
    ],
)
def test_bad_arguments_are_named(options, word):
    """A refusal names the argument and what was expected."""
    claims = [c for c in theory.claims(**SMALL) if c.id == "chi2023.lemma1"]
    with pytest.raises(ValueError, match=f"(?s)expected.*{word}"):
        reports.verify(claims, **{"workers": 1, **options})


def test_dry_run_estimates_are_of_the_right_size():
    """The planned draws are within a factor of eight of the spent ones, where it matters."""
    claims = [c for c in theory.claims(**SMALL) if c.id in ("chi2023.lemma3", "zuo2025.cosine")]
    cases = suite.cases_of(claims, 0.025)
    estimates, total = plan.dry_run(cases, suite.Conditions(1), 1e-3, workers=1)
    assert total > 0
    run = reports.verify(claims, seed=1, workers=1)
    for estimate, verdict in zip(estimates, run, strict=True):
        assert verdict.draws / 8 < estimate.draws < verdict.draws * 8
        assert estimate.megabytes > 0


def test_a_rate_comes_with_its_exponent():
    """Both widths of the claim say the same interval, and it holds the exponent claimed."""
    (claim,) = select(theory.claims(**SMALL), ("ours.rate.cosine",))
    run = reports.verify(claim, seed=4, workers=1, tolerance=0.025)
    assert len(run.verdicts) == 2
    for verdict in run:
        assert verdict.exponent == run.verdicts[0].exponent
        assert 0.7 < verdict.exponent["low"] < claim.relation.power < verdict.exponent["high"] < 1.3
        assert "exponent of the rate lies in" in verdict.words


def test_undecided_says_how_many_more_draws():
    """Within a factor of 3 of what the verdict then takes."""
    claim = a_claim(theory.predict)
    (first,) = reports.verify(claim, workers=1, draws=1024, tolerance=0.01)
    assert first.verdict == "UNDECIDED"
    assert first.exponent is None
    more = float(first.words.split("about ")[-1].split(" more draws")[0])
    (second,) = reports.verify(claim, workers=1, tolerance=0.01)
    assert 1 / 3 < (first.draws + more) / second.draws < 3


def test_what_cannot_be_measured_is_refused_before_the_work():
    """A tolerance within float32's rounding, and a block that no machine holds."""
    with pytest.raises(ValueError, match=r"rounding of float32.*use float64"):
        reports.verify(a_claim(theory.predict), workers=1, tolerance=1e-8)
    setting = theory.Setting(d_model=2**24, n_heads=1, n_ctx=2)
    question = setting.question("blocks.0.attn.q", "second_moment")
    huge = theory.Claim("user.huge", "Huge.", "a test", "exact", question, 1.0)
    with pytest.raises(MemoryError, match="expected blocks that fit"):
        reports.verify(huge, workers=1, sampler="real")
