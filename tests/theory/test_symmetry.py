"""The symmetry theorems against every permutation of real layers' inputs.

float64; a symmetry that holds leaves 1e-12 of the largest output, one that does not 1e-6.
"""

import dataclasses
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import nope
import reports
import theory
from montecarlo import Conditions
from montecarlo.confidence import FIRST_LOOK
from nope import transformer
from nope.layers import Attention, CausalMean, Residual, Sequence
from nope.operations import Linear, Mix, Operation, Scores, Softmax, Weight
from reports import document, plan, suite
from theory import symmetry
from theory.relations import Identical

ROUNDING, GENUINE = 1e-12, 1e-6
D = 6
TOKENS = nope.GaussianTokens(1.0)


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Attention whose queries, keys or values, as named, are read from the prefix means."""

    averaged: str
    causal: bool = True
    name: str = "mixed"

    def operations(self, scope, source):
        here = scope.within(self.name)
        (average,) = CausalMean("mean").operations(here, source)
        yield average
        for name in "qkv":
            weight = Weight(here.place(f"W_{name}"), "query", D, D)
            read = average.place if name in self.averaged else source
            yield Linear(here.place(name), (read,), weight, None, 2)
        yield Scores(here.place("scores"), (here.place("q"), here.place("k")), 3, self.causal)
        yield Softmax(here.place("pattern"), (here.place("scores"),))
        yield Mix(here.place("z"), (here.place("pattern"), here.place("v")))


def bare(*layers, n_ctx=4):
    """Layers one after the other, nothing else."""
    return nope.Architecture(D, n_ctx, TOKENS, Sequence(layers))


def decoder(*args, n_ctx=4, **changes):
    return nope.decoder(D, 2, *args, n_ctx=n_ctx, tokens=TOKENS, **changes)


def attention(name, **changes):
    return Attention(2, name=name, **changes)


STACKS = {
    **{
        f"{n} {kind} {norms} {'causal' if causal else 'unmasked'}": decoder(
            n, 5, attention=kind, norm_position=norms, causal=causal, activation=activation
        )
        for n, (norms, activation) in itertools.product(
            range(5), [("pre", "swiglu"), ("post", "gelu"), ("none", "relu")]
        )
        for kind in ("softmax", "uniform")
        for causal in (True, False)
    },
    "biases": decoder(2, 5, bias=True, norm="rmsnorm"),
    "means of means": bare(CausalMean("one"), CausalMean("two")),
    "unmasked, then causal": bare(attention("one", causal=False), attention("two")),
    "causal, then unmasked": bare(attention("one"), attention("two", causal=False)),
    "unmasked, causal, unmasked": bare(
        attention("one", causal=False), attention("two"), attention("three", causal=False)
    ),
    "a branch of scale 0": bare(
        Residual(attention("one"), "sum", scale=0.0), attention("two"), attention("three")
    ),
    **{
        f"{averaged} of means {'causal' if causal else 'unmasked'}": bare(Mixed(averaged, causal))
        for averaged in ("q", "k", "v", "qk")
        for causal in (True, False)
    },
}


def evaluate(architecture, tokens, seed=0):
    """Every vector place, d coordinates per position, weights N(0, 1/2) shared by the draws."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        w.path: torch.randn(1, *w.shape, generator=generator, dtype=torch.float64) * 0.5**0.5
        for w in architecture.weights
    }
    places = [p for p, operation in architecture.places().items() if operation.axes == "vector"]
    with torch.no_grad():
        found = transformer.evaluate(architecture, places, tokens, lambda w: weights[w.path])
    return {
        place: (x.transpose(1, 2).flatten(2) if x.ndim == 4 else x).numpy()
        for place, x in found.items()
    }


def gaps(architecture):
    """Per place and theorem the largest violation over all permutations, relative."""
    length = architecture.n_ctx
    x = np.random.default_rng(1).normal(size=(length, D))
    orders = np.array(list(itertools.permutations(range(length))))
    every = np.stack([*(x[order] for order in orders), np.broadcast_to(x[0], x.shape)])
    past = orders[:, -1] == length - 1
    found = {}
    for place, values in evaluate(architecture, torch.from_numpy(every)).items():
        moved, equal, as_drawn = values[:-1], values[-1], values[0]
        violations = {
            "past_permutation": moved[past, -1] - as_drawn[-1],
            "permutation": moved - as_drawn[orders],
            "equal_tokens": equal - equal[0],
        }
        size = np.abs(values).max()
        found |= {(place, k): np.abs(v).max() / size for k, v in violations.items()}
    return found


@pytest.mark.parametrize("name", STACKS)
def test_a_theorem_holds_exactly_where_no_permutation_is_seen(name):
    """At every place of every stack: derived from the structure, and found by brute force."""
    for (place, theorem), gap in gaps(STACKS[name]).items():
        found = symmetry.THEOREMS[theorem](STACKS[name], place)
        assert gap <= ROUNDING if found.holds else gap >= GENUINE, (place, theorem, gap, found)


@pytest.mark.parametrize("n_ctx", [1, 2, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_a_theorem_holds_at_lengths_with_nothing_to_permute(n_ctx, causal):
    """Two positions have one past token, one position has none."""
    stack = decoder(2, 5, n_ctx=n_ctx, causal=causal)
    for (place, theorem), gap in gaps(stack).items():
        found = symmetry.THEOREMS[theorem](stack, place)
        assert gap <= ROUNDING if found.holds else gap >= GENUINE, (place, theorem, gap, found)


def test_the_theorems_of_the_issue():
    """One causal layer does not see the past's order, two do; unmasked ones never; the mask is
    nothing without content."""
    one, two = (decoder(n) for n in (1, 2))
    unmasked = decoder(4, causal=False)
    assert symmetry.past_permutation(one, "ln_final").holds
    assert not symmetry.past_permutation(two, "ln_final").holds
    assert not symmetry.permutation(one, "ln_final").holds
    assert symmetry.permutation(unmasked, "ln_final").holds
    assert symmetry.past_permutation(unmasked, "ln_final").holds
    assert all(symmetry.equal_tokens(stack, "ln_final").holds for stack in (one, two, unmasked))


@pytest.mark.parametrize(
    ("theorem", "place", "holds", "reason"),
    [
        ("past_permutation", "blocks.0.ln1", True, "x_L depends on token L alone"),
        ("past_permutation", "blocks.1.attn.v", True, "multiset of the others it sees"),
        ("past_permutation", "blocks.3.mlp_out", False, "blocks.1.attn.z reads vectors"),
        ("permutation", "blocks.0.attn.q", True, "x_m depends on token m alone"),
        ("permutation", "ln_final", False, "blocks.0.attn.z is masked"),
        ("equal_tokens", "ln_final", True, "sum to one"),
    ],
)
def test_the_reason_names_the_operation_that_decides(theorem, place, holds, reason):
    """The first place where the symmetry is lost, or why it is not."""
    found = symmetry.THEOREMS[theorem](decoder(4), place)
    assert found.holds is holds
    assert reason in found.reason


@dataclasses.dataclass(frozen=True)
class Positioned(Operation):
    """An operation that adds a vector per position."""


@dataclasses.dataclass(frozen=True)
class AddPositions:
    """The layer of it."""

    def operations(self, scope, source):
        yield Positioned(scope.place("positioned"), (source,))


@pytest.mark.parametrize("theorem", symmetry.THEOREMS)
def test_what_is_not_known_is_refused(theorem):
    """No theorem is claimed past an operation without a rule, at a pair place or at none."""
    with pytest.raises(NotImplementedError, match="got Positioned; register it with"):
        symmetry.THEOREMS[theorem](bare(AddPositions()), "positioned")
    with pytest.raises(ValueError, match=r"got 'blocks\.0\.attn\.pattern'; ask at"):
        symmetry.THEOREMS[theorem](decoder(), "blocks.0.attn.pattern")
    with pytest.raises(LookupError, match="got 'nowhere'"):
        symmetry.THEOREMS[theorem](decoder(), "nowhere")


# ------------------------------------------------------------------------ questions and claims


def ask(observable, n_layers=1, place="ln_final", init=None, **changes):
    options = {"n_ctx": 5, "tokens": TOKENS, **changes}
    architecture = nope.decoder(options.pop("d_model", D), 2, n_layers, 5, **options)
    return nope.Question(architecture, init or nope.init.normal(0.5), place, observable)


def test_the_share_is_zero_or_one():
    """0 where the theorem holds, 1 where it does not; only these observables have a theorem."""
    assert symmetry.share_broken(ask("past_permutation")) == 0
    assert symmetry.share_broken(ask("past_permutation", 2)) == 1
    with pytest.raises(LookupError, match="expected an observable with a theorem"):
        symmetry.share_broken(ask("kernel"))
    assert set(symmetry.THEOREMS) == {k for k, v in nope.OBSERVABLES.items() if v.transform}


@pytest.mark.parametrize(
    ("changes", "requirement"),
    [
        ({"tokens": nope.EmbeddingTokens(1)}, "tokens that never repeat"),
        ({"init": nope.init.normal(0.0)}, "matrices other than 0"),
        ({"d_model": 2}, "d_model of at least 3"),
    ],
)
def test_a_share_that_is_not_generic_is_not_predicted(changes, requirement):
    """Where equal tokens, zeros or signs hide the order the share is anything; a 0 is a 0."""
    assert symmetry.share_broken(ask("past_permutation", 1, **changes)) == 0
    with pytest.raises(NotImplementedError, match=requirement):
        symmetry.share_broken(ask("past_permutation", 2, **changes))


def best(question):
    """What `theory.predict` makes of `share_broken`."""
    share = np.full(question.shape, symmetry.share_broken(question))
    return theory.Prediction(share, np.zeros(question.shape), theory.Status.EXACT)


def claim(question, **changes):
    """That the transformation changes nothing."""
    name = f"user.{question.observable}.{len(question.architecture.operations)}"
    options = {"relation": Identical(), "expected": best, **changes}
    return theory.Claim(name, "Nothing changes.", "a test", "printed", question, 0.0, **options)


CLAIMS = {
    "past_permutation": (ask("past_permutation"), ask("past_permutation", 2)),
    "permutation": (ask("permutation", 3, causal=False), ask("permutation")),
}


@pytest.mark.parametrize("observable", CLAIMS)
def test_the_expected_verdict_is_that_of_the_theorem(observable):
    """CONFIRMED where it holds, REFUTED where it does not, nothing where nothing is known."""
    holds, fails = CLAIMS[observable]
    assert claim(holds).expected_verdict(holds, 0.025) == "CONFIRMED"
    assert claim(fails).expected_verdict(fails, 0.025) == "REFUTED"


def test_identical_asks_for_a_transformation():
    """Other observables are refused."""
    with pytest.raises(ValueError, match=r"transforms the inputs, got kernel; use Equals"):
        Identical().statistic(ask("kernel"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_run_ends_as_expected(dtype):
    """By real draws: few, with the size of the gap in the words, and no kernel's derivation."""
    unknown = ask("past_permutation", 2, tokens=nope.EmbeddingTokens(4))
    asked = [q for pair in CLAIMS.values() for q in pair] + [ask("equal_tokens", 4)]
    claims = [*map(claim, asked), replace(claim(unknown), id="user.unknown")]
    run = reports.verify(claims, seed=4, workers=1, dtype=dtype)
    expected = ["CONFIRMED", "REFUTED"] * 2 + ["CONFIRMED"]
    assert [v.expected for v in run] == [*expected, None]
    assert [v.verdict for v in run] == [*expected, "REFUTED"]
    assert all("the same up to rounding in at least 97.50% of draws" in v.words for v in run)
    assert all("draws, mean gap " in v.words and not v.derivation for v in run)
    assert "NaN" not in run.to_json()
    assert document.render(run).count("<svg") >= len(claims)


def test_a_dry_run_knows_what_a_symmetry_takes():
    """log(2/error rate)/tolerance draws without an exception, up to 1.3 times that; the first look
    for a refutation."""
    cases = suite.cases_of([claim(question) for question in CLAIMS["past_permutation"]], 0.01)
    for case, needed in zip(cases, (math.log(2 / 1e-3) / 0.01, FIRST_LOOK), strict=True):
        ((estimate,), _) = plan.dry_run([case], Conditions(), 1e-3, workers=1)
        assert needed <= estimate.draws <= 1.3 * needed
