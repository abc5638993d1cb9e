"""Derivations are values whose every step is checked, and really derived."""

from dataclasses import replace

import pytest
import sympy as sp

import nope
import theory
from nope.init import normal
from theory import symbols
from theory.derivation import derive
from theory.kernel import K
from theory.symbols import WEIGHT_STD, d, m, n, sigma_o, sigma_v, sigma_x

ARCHITECTURES = {
    "uniform": {"attention": "uniform", "d_ff": 0},
    "softmax gelu": {"d_ff": 8},
    "two layers relu": {"attention": "uniform", "n_layers": 2, "d_ff": 8, "activation": "relu"},
    "two layers linear": {
        "attention": "uniform",
        "n_layers": 2,
        "d_ff": 8,
        "activation": "identity",
        "norm_position": "none",
    },
    "post rms eps bias": {
        "norm_position": "post",
        "norm": "rmsnorm",
        "eps": 1e-5,
        "bias": True,
        "d_ff": 0,
    },
    "none relu": {"norm_position": "none", "activation": "relu", "d_ff": 8},
    "pre eps": {"eps": 1e-5, "d_ff": 0, "attention": "uniform"},
}


def derivation(name):
    """The derivation to the last place of a named architecture, or its second attention."""
    architecture = nope.decoder(16, 4, n_ctx=4, **ARCHITECTURES[name])
    last = architecture.operations[-1].place
    return derive(architecture, None, "blocks.1.attn_out" if "two" in name else last)


def with_step(found, index, **changes):
    """The derivation with one step corrupted, nothing else touched."""
    steps = list(found.steps)
    steps[index] = replace(steps[index], **changes)
    return replace(found, steps=tuple(steps))


def undetected(found, corruptions):
    """The (place, corruption) whose corrupted derivation passes its check."""
    missed = []
    for index, step in enumerate(found.steps):
        for name, changes in corruptions(step).items():
            if not with_step(found, index, **changes).check():
                missed.append((step.place, name))
    return missed


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_honest_derivation_checks(name):
    """No step of a derivation as derived fails."""
    assert derivation(name).check() == []


@pytest.mark.parametrize("name", ["uniform", "post rms eps bias"])
def test_a_derivation_has_one_step_per_operation_it_needs(name):
    """The chain from the tokens to any place has no gap and nothing needless."""
    architecture = nope.decoder(16, 4, n_ctx=4, **ARCHITECTURES[name])
    for place in architecture.places():
        needed = [operation.place for operation in architecture.upstream(place)]
        assert [step.place for step in derive(architecture, None, place).steps] == needed


def factor(step):
    return {"after doubled": {"after": step.after * 2}, "after zero": {"after": sp.Integer(0)}}


def start(step):
    return {
        "before doubled": {"before": step.before * 2},
        "rule doubled": {"rule": replace(step.rule, expression=step.rule.expression * 2)},
    }


def origin(step):
    return {
        f"source {at} doubled": {
            "used": tuple(2 * k if at == index else k for index, k in enumerate(step.used))
        }
        for at in range(len(step.used))
    }


CORRUPTED = ["uniform", "post rms eps bias", "none relu"]


@pytest.mark.parametrize("name", CORRUPTED)
@pytest.mark.parametrize("corruptions", [factor, start, origin])
def test_corrupting_any_one_step_fails_the_check(name, corruptions):
    """A wrong result, start, rule or source of any single step is found."""
    assert undetected(derivation(name), corruptions) == []


def one_sided(step):
    """Errors that show at m < n only, at m > n only, or on the diagonal only."""
    step_up = sp.Max(m, n) - m
    return {
        "above the diagonal": {"after": step.after * (1 + step_up)},
        "below the diagonal": {"after": step.after * (1 + sp.Max(m, n) - n)},
        "on the diagonal": {"after": step.after * (1 + sp.KroneckerDelta(m, n))},
    }


@pytest.mark.parametrize("name", ["uniform", "post rms eps bias", "pre eps"])
def test_an_error_on_one_side_of_the_diagonal_fails_the_check(name):
    """1/m for 1/max(m, n) is right at half of the places: the check looks at both halves.

    Off-diagonal errors of a kernel that vanishes there are none.
    """
    found = derivation(name)
    vanishing = {s.place for s in found.steps if s.after.subs({m: 2, n: 3}) == 0}
    missed = [
        (place, error)
        for place, error in undetected(found, one_sided)
        if not (place in vanishing and error != "on the diagonal")
    ]
    assert missed == []


def test_a_step_with_a_superfluous_source_fails_the_check():
    """A kernel that no rule asks for is reported, not raised."""
    found = derivation("uniform")
    extra = with_step(found, 0, used=(sp.Integer(1),))
    assert extra.check()


def test_the_output_of_uniform_attention_is_symbolic():
    """d^2 sigma_o^2 sigma_v^2/Max(m, n), letter for letter."""
    architecture = nope.decoder(16, 4, n_ctx=4, attention="uniform")
    expected = d**2 * sigma_o**2 * sigma_v**2 / sp.Max(m, n)
    assert derive(architecture, None, "blocks.0.attn_out").result == expected


def test_the_residual_stream_is_symbolic():
    """The tokens' variance on the diagonal plus the branch."""
    architecture = nope.decoder(16, 4, n_ctx=4, attention="uniform")
    branch = d**2 * sigma_o**2 * sigma_v**2 / sp.Max(m, n)
    expected = branch + sigma_x**2 * sp.KroneckerDelta(m, n)
    assert sp.expand(derive(architecture, None, "blocks.0.resid_mid").result - expected) == 0


def forget():
    """Drop the derivations and the predictions that this process keeps."""
    derive.cache_clear()
    theory.predict.cache_clear()


@pytest.fixture
def fresh_derivations():
    forget()
    yield
    forget()


@pytest.mark.usefixtures("fresh_derivations")
def test_changing_a_rules_variance_changes_all_that_follows(monkeypatch):
    """With another symbol for every weight's variance, all kernels after a weight are in it."""
    architecture = nope.decoder(16, 4, n_ctx=4, d_ff=0, attention="uniform")
    plain = derive(architecture, None, "blocks.0.resid_post").kernels()
    derive.cache_clear()
    monkeypatch.setattr("theory.rules.linear.variance_of", lambda weight: symbols.s)
    changed = derive(architecture, None, "blocks.0.resid_post").kernels()
    first = list(plain).index("blocks.0.attn.v")
    after = [place for place in list(plain)[first:] if not place.endswith("pattern")]
    assert {place for place in plain if plain[place] != changed[place]} == set(after)
    weights = set(WEIGHT_STD.values())
    assert all(symbols.s in changed[place].free_symbols for place in after)
    assert not any(weights & changed[place].free_symbols for place in changed)


@pytest.mark.usefixtures("fresh_derivations")
def test_changing_the_value_map_alone_changes_what_reads_it(monkeypatch):
    """Only W_V's symbol is exchanged: queries, keys and scores stay, values and outputs change."""
    architecture = nope.decoder(16, 4, n_ctx=4, d_ff=0)
    plain = derive(architecture, None, "blocks.0.resid_post").kernels()
    derive.cache_clear()
    from theory.rules import linear

    honest = linear.variance_of
    monkeypatch.setattr(
        linear, "variance_of", lambda w: symbols.s if w.role == "value" else honest(w)
    )
    changed = derive(architecture, None, "blocks.0.resid_post").kernels()
    differ = {place.rpartition(".")[2] for place in plain if plain[place] != changed[place]}
    assert differ == {"v", "z", "attn_out", "resid_post"}


@pytest.mark.usefixtures("fresh_derivations")
def test_numbers_come_from_the_rules(monkeypatch):
    """Doubling the variance in the linear rule quadruples the number predicted for attn_out."""
    architecture = nope.decoder(16, 4, n_ctx=4, d_ff=0, attention="uniform")
    question = nope.Question(architecture, normal(0.1), "blocks.0.attn_out", "second_moment")
    plain = theory.predict(question).values
    from theory.rules import linear

    honest = linear.variance_of
    forget()
    monkeypatch.setattr(linear, "variance_of", lambda weight: 2 * honest(weight))
    doubled = theory.predict(question).values
    assert (doubled == 4 * plain).all()


def test_an_unknown_place_is_named():
    """The error lists what the architecture has."""
    with pytest.raises(LookupError, match=r"blocks\.9\.attn_out.*embed"):
        derive(nope.decoder(16, 4, n_ctx=4), None, "blocks.9.attn_out")


def test_a_long_kernel_is_used_by_name():
    """Kernels too long to read get a name K_1, ... which later steps are written in."""
    found = derivation("two layers relu")
    named = {name.func for name in found.names.values()}
    used = {c.func for s in found.steps for c in s.before.atoms(sp.core.function.AppliedUndef)}
    assert used
    assert used <= named
    assert K not in used
