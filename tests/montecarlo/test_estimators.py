"""Estimators with less variance have the plain one's mean, spend what they say, and no more."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy import stats

import nope
import theory
from montecarlo import Conditions, Target, measure, split
from montecarlo.campaign import Campaign
from montecarlo.estimators import best, bilinear, integrated, places_of, quadratic, spent, words
from montecarlo.sampler import Group, estimator
from nope.architecture import Architecture
from nope.facts import gain
from nope.init import Normal, Orthogonal, Uniform
from nope.layers import MLP
from nope.questions import Weights
from nope.tokens import EmbeddingTokens, GaussianTokens
from reports.suite import cases_of, estimator_of, require_independent, targets_of

ERROR_RATE = 1e-6
"""Of a false alarm in any one test of this file."""
GAINS = (gain("value"), gain("output"))


@dataclass(frozen=True)
class RandomBiases:
    def law(self, weight, architecture):
        return Normal(0.3) if weight.role == "bias" else Uniform(0.5)


INIT = RandomBiases()


def ask(place, observable="kernel", init=INIT, given=None, **changes):
    options = {"n_ctx": 5, "bias": True, "d_ff": 20, "eps": 1e-5, **changes}
    return nope.Question(nope.decoder(12, 3, 2, **options), init, place, observable, given)


def z_score(question, plain, other):
    width = np.hypot(plain.standard_error, other.standard_error)[question.judged]
    gap = np.abs(plain.mean - other.mean)[question.judged]
    return np.max(gap / np.maximum(width, 1e-12))


PLACES = {
    "attn_out": ("blocks.0.attn_out", {}),
    "uniform": ("blocks.1.attn_out", {"attention": "uniform"}),
    "bidirectional": ("blocks.0.attn_out", {"causal": False}),
    "bidirectional and uniform": (
        "blocks.0.attn_out",
        {"causal": False, "attention": "uniform"},
    ),
    "z": ("blocks.1.attn.z", {}),
    "sum": ("blocks.1.resid_mid", {"residual_scale": 0.5}),
    "values": ("blocks.0.attn.v", {"tokens": EmbeddingTokens(3)}),
    "swiglu": ("blocks.0.mlp_out", {"activation": "swiglu"}),
    "after an MLP": ("blocks.1.resid_post", {"norm": "rmsnorm"}),
}


@pytest.mark.parametrize("maps", [1, 2])
@pytest.mark.parametrize("name", PLACES)
def test_integrating_maps_out_keeps_the_mean(name, maps):
    """All three observables at once, against the plain estimator on other draws."""
    place, changes = PLACES[name]
    questions = [
        ask(place, o, **changes) for o in ("second_moment", "kernel", "mean_second_moment")
    ]
    found = [integrated(question, maps) for question in questions]
    if None in found:
        assert found == [None] * 3
        assert maps == 2
        return
    plain = measure(questions, 6000, 1, "cpu", "float64", sampler="real")
    anywhere = [np.full(question.shape, np.inf) for question in questions]
    targets = [
        Target(q, -a, a, 0.5, 0.5, integrated=f)
        for q, a, f in zip(questions, anywhere, found, strict=True)
    ]
    decisions = Campaign(targets, Conditions(2, dtype="float64"), draws=6000).run()
    for question, one, decision in zip(questions, plain, decisions, strict=True):
        assert decision.measurement.question == question
        z = z_score(question, one, decision.measurement)
        assert 2 * stats.norm.sf(z) * question.judged.sum() * len(questions) > ERROR_RATE


@pytest.mark.parametrize("change", ["factor", "offset", "pattern"])
def test_a_wrong_estimator_is_found(change):
    """A gain of d_ff for d, a forgotten bias, uniform for softmax: the same comparison fails."""
    question = ask("blocks.0.attn_out", "second_moment", init=nope.init.normal(0.8))
    question = question if change == "pattern" else ask("blocks.0.attn_out", "second_moment")
    right = integrated(question, 2)
    (term,) = right.terms
    mixed = replace(term, factor=term.factor * 1.2)
    running = ask("blocks.0.attn_out", "second_moment", attention="uniform", init=question.init)
    wrong = {
        "factor": replace(right, terms=(mixed,)),
        "offset": replace(right, offset=0.0),
        "pattern": integrated(running, 2),
    }[change]
    plain = measure(question, 6000, 1, "cpu", "float64", sampler="real")
    anywhere = np.full(question.shape, np.inf)
    target = Target(wrong.question, -anywhere, anywhere, 0.5, 0.5, integrated=wrong)
    (decision,) = Campaign([target], Conditions(2, dtype="float64"), draws=6000).run()
    assert 2 * stats.norm.sf(z_score(question, plain, decision.measurement)) < ERROR_RATE


def test_integrating_saves_variance_as_conditioning_must():
    """At d = 64 the second moment's 6/d comes in three parts of 2/d: inputs, values, output.

    The variance of x' A x/d for a Gaussian x is about 2/d of its square; a product of three
    independent such factors has 6/d.  Asked for is half of what integrating each should save.
    """
    architecture = nope.decoder(64, 4, n_ctx=4, d_ff=0, attention="uniform")
    question = nope.Question(
        architecture, nope.init.normal(0.02), "blocks.0.attn_out", "second_moment"
    )
    spread = [
        (found.standard_error**2 * found.draws)[-1]
        for found in (
            measure(question, 4000, seed, "cpu", "float64", integrate=integrate)
            for seed, integrate in ((1, False), (2, True))
        )
    ]
    assert spread[0] > 2 * spread[1]


def test_what_is_integrated_is_not_drawn():
    """Two maps of uniform attention leave nothing to draw but tokens."""
    question = ask("blocks.0.attn_out", attention="uniform")
    assert places_of(integrated(question, 2)) == ("blocks.0.ln1",)
    assert places_of(integrated(question, 1)) == ("blocks.0.attn.z",)
    assert places_of(integrated(ask("blocks.0.attn_out"), 2)) == (
        "blocks.0.ln1",
        "blocks.0.attn.pattern",
    )
    assert places_of(question) == ("blocks.0.attn_out",)


@dataclass(frozen=True)
class Tied:
    def operations(self, scope, source):
        (first,) = (o for o in MLP(20).operations(scope, source) if o.place == "mlp.pre")
        yield first
        yield replace(first, place="mlp.again")


@dataclass(frozen=True)
class HaarEverywhere:
    def law(self, weight, architecture):
        return Orthogonal(weight.fan_in, weight.fan_out)


@pytest.mark.parametrize(
    "question",
    [
        ask("blocks.0.attn_out", "cosine"),
        ask("blocks.0.attn_out", "kurtosis"),
        ask("blocks.0.attn_out", given=Weights(1)),
        ask("blocks.0.ln1"),
        ask("embed"),
        ask("blocks.0.mlp.post"),
        ask("blocks.0.attn.scores", "second_moment"),
        ask("nowhere"),
        ask("blocks.0.attn_out", init=HaarEverywhere(), bias=False),
        nope.Question(Architecture(12, 3, GaussianTokens(), Tied()), INIT, "mlp.again", "kernel"),
    ],
    ids=lambda question: f"{question.observable} at {question.place}",
)
def test_what_cannot_be_integrated_is_measured_plain(question):
    assert integrated(question, 1) is None
    assert integrated(question, 2) is None
    assert best(question) is None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 3, 128, 300])
def test_quadratic_forms_are_those_of_einsum(length, causal):
    a = torch.rand(2, 3, length, length, dtype=torch.float64, generator=torch.manual_seed(1))
    a = a.tril() if causal else a
    x = torch.randn(2, length, 7, dtype=torch.float64, generator=torch.manual_seed(2))
    K = x @ x.transpose(1, 2)
    whole = torch.einsum("bhmk,bkl,bhnl->bmn", a, K, a) / 3
    grid = torch.tensor([0, length - 1])
    assert torch.allclose(quadratic(a, K, causal), whole.diagonal(dim1=1, dim2=2))
    assert torch.allclose(bilinear(a, K, grid), whole[:, grid][:, :, grid])


# ------------------------------------------------------------------------- facts and claims


def test_only_what_is_granted_is_spent():
    question = ask("blocks.0.attn_out", "second_moment")
    assert set(best(question).spent) == set(GAINS)
    assert best(question, GAINS[1:]).spent == GAINS[1:]
    assert best(question, ()) is None
    assert spent(question) == ()


@pytest.fixture(scope="module")
def claims():
    return {claim.id: claim for claim in theory.claims(d_model=24, n_ctx=6)}


def test_claims_are_measured_by_independent_estimators(claims):
    """Lemmas 1 and 3 and the covariance plain; Lemma 3 for softmax by what it assumes."""
    used = {}
    for claim in claims.values():
        for question in claim.asked:
            found = estimator_of(claim, claim.relation.statistic(question))
            if found is not None:
                used[claim.id] = found
                assert set(found.spent) <= set(claim.assumes)
                assert not set(found.spent) & set(claim.asserts)
    assert set(used["chi2023.lemma3.softmax"].spent) == set(GAINS)
    for name in ("chi2023.lemma1", "chi2023.lemma3", "chi2023.covariance", "chi2023.residual"):
        assert name not in used
        assert set(best(claims[name].asked[0]).spent) <= set(claims[name].asserts)


@pytest.mark.parametrize("plain", [True, False])
def test_plain_switches_it_off(claims, plain):
    cases = cases_of([claims["chi2023.lemma3"], claims["chi2023.lemma3.softmax"]], 0.02)
    cases = [replace(case, region=case.claim.region(case.question, 0.02)) for case in cases]
    targets = targets_of(cases, 1e-3, plain)
    assert [target.integrated is None for target in targets] == [True, plain]


def test_a_fact_both_spent_and_asserted_is_an_error(claims):
    claim = claims["chi2023.lemma3"]
    found = best(claim.asked[0])
    with pytest.raises(ValueError, match=r"independent estimator of chi2023.lemma3.*plain"):
        require_independent(claim, found)
    greedy = replace(claim, assumes=GAINS)
    with pytest.raises(ValueError, match="which it asserts"):
        estimator_of(greedy, claim.asked[0])


# ----------------------------------------------------------------- several inputs per draw


@pytest.mark.parametrize("sampler", ["real", "collapsed"])
@pytest.mark.parametrize("observable", ["kernel", "kernel_cosine", "kurtosis"])
def test_several_inputs_keep_the_mean(observable, sampler):
    question = ask("blocks.0.resid_post", observable, init=nope.init.torch_default(), n_ctx=3)
    plain = measure(question, 6000, 1, "cpu", "float64", sampler="real")
    other = measure(question, 3000, 2, "cpu", "float64", sampler=sampler, inputs=3)
    z = z_score(question, plain, other)
    assert 2 * stats.norm.sf(z) * question.judged.sum() > ERROR_RATE


def test_inputs_of_a_draw_share_its_weights():
    """At n_ctx 1 without a norm, v = x W: two inputs of one draw span one W's images."""
    question = nope.Question(
        nope.decoder(2, 1, n_ctx=1, d_ff=0, norm_position="none"),
        nope.init.normal(1.0),
        "blocks.0.attn.v",
        "second_moment",
    )
    from montecarlo.sampler import sample

    group = Group.of(question, Conditions(inputs=3, dtype="float64"))
    values = sample(group, ["embed", "blocks.0.attn.v"], 0, Conditions(dtype="float64"))
    x = values["embed"].reshape(-1, 3, 2)
    v = values["blocks.0.attn.v"].reshape(-1, 3, 2)
    W = torch.linalg.solve(x[:, :2], v[:, :2])
    assert torch.allclose(x[:, 2:] @ W, v[:, 2:])
    assert not torch.allclose(W[0], W[1])


def test_where_one_input_is_the_unit_there_is_one():
    asked = Conditions(inputs=4)
    for question in (
        ask("ln_final", given=Weights(1)),
        ask("ln_final", "permutation", causal=False),
        ask("ln_final", tokens=EmbeddingTokens(3)),
    ):
        assert Group.of(question, asked).inputs == 1
    assert Group.of(ask("ln_final"), asked).inputs == 4
    with pytest.raises(ValueError, match="expected inputs"):
        Conditions(inputs=0)


def test_components_of_variance_add_up_to_the_plain_variance():
    """Var = V_b + V_w; and V_b alone is left with very many inputs."""
    question = ask("blocks.0.attn.q", "mean_second_moment", init=nope.init.normal(0.5), bias=False)
    found = split(question, Conditions(dtype="float64"), draws=4000)
    plain = measure(question, 4000, 1, "cpu", "float64", sampler="real")
    variance = plain.standard_error**2 * plain.draws
    assert np.allclose(found.between + found.within, variance, rtol=0.25)
    # |x_m W|^2/12 of normed x_m: given W the mean over directions is |W|_F^2/12, of 144 entries
    assert np.allclose(found.between, 2 * (12 * 0.25) ** 2 / 144, rtol=0.4)


def test_the_split_is_worth_it_where_weights_are_dear():
    short = nope.Question(
        nope.decoder(96, 4, n_ctx=2, d_ff=0), nope.init.normal(0.02), "blocks.0.attn_out", "kernel"
    )
    found = split(short, Conditions())
    assert found.inputs > 1
    assert found.saved > 1.5
    assert split(ask("ln_final", given=Weights(1)), Conditions()).inputs == 1
    assert split(short, Conditions()).inputs == found.inputs


def test_evidence_of_estimators_is_kept_apart(tmp_path):
    question = ask("blocks.0.attn_out", "second_moment")
    names = set()
    for conditions in (Conditions(), Conditions(sampler="collapsed"), Conditions(inputs=2)):
        group = Group.of(question, conditions)
        names |= {estimator(group, asked) for asked in (question, best(question))}
    assert len(names) == 6
    assert "plain" in names
    assert "blocks.0.attn.W_V and blocks.0.attn.W_O integrated out" in names
    assert words(question) == "plain"
    options = {"draws": 10, "device": "cpu", "store": tmp_path}
    first, second, again = (
        measure(question, integrate=integrate, **options).mean for integrate in (0, 1, 0)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
