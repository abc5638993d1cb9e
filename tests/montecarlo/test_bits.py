"""The evidence has the same bits however it was computed, and shares what it should share."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import nope
from montecarlo import measure
from montecarlo.campaign import Campaign
from montecarlo.evidence import Target
from montecarlo.sampler import Conditions, Group, sample
from montecarlo.store import Store
from nope.streams import TorchSource

INIT = nope.init.normal(0.3)
DRAWS = 5 * 2048
Q, Z, PATTERN = (f"blocks.0.attn.{name}" for name in ("q", "z", "pattern"))


def architecture(**changes):
    return nope.decoder(4, 2, **({"n_ctx": 4, "d_ff": 3} | changes))


def ask(place=Q, observable="second_moment", given=None, **changes):
    return nope.Question(architecture(**changes), INIT, place, observable, given)


ASKED = [
    ask(),
    ask(Z, "cosine"),
    ask(PATTERN, "participation"),
    ask("blocks.0.resid_post", "kernel_cosine"),
    ask(Z, "kurtosis", attention="uniform"),
    ask("ln_final", "adjacency_score"),
    ask(Z, "kernel", given=nope.Weights(1)),
]


def everywhere(question):
    bound = np.full(question.shape, np.inf)
    return Target(question, -bound, bound, 0.5, 0.5)


def evidence(questions, workers=1, in_flight=None, draws=DRAWS, conditions=None, store=None):
    """The moments of every question after `draws` draws."""
    targets = [everywhere(question) for question in questions]
    campaign = Campaign(targets, conditions or Conditions(), draws, store=store)
    return [decision.measurement.moments for decision in campaign.run(workers, in_flight)]


@pytest.fixture(scope="module")
def alone():
    """Each question measured by itself, in this process."""
    return [evidence([question])[0] for question in ASKED]


def assert_same_bits(found, expected):
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        assert one.count == two.count
        for name in ("mean", "second", "third"):
            assert np.array_equal(getattr(one, name), getattr(two, name))


def test_five_blocks_are_drawn(alone):
    """The comparisons below are of several blocks, and no evidence is empty or constant."""
    for moments in alone:
        assert moments.count == DRAWS
        assert moments.second.any()


@pytest.mark.parametrize("in_flight", [1, 3, 8])
def test_a_place_alone_or_with_others(alone, in_flight):
    """Asking all questions at once changes no bit of any, whatever is in flight."""
    assert_same_bits(evidence(ASKED, in_flight=in_flight), alone)


@pytest.mark.parametrize("in_flight", [1, 3, 8])
def test_two_workers(alone, in_flight):
    """Worker processes that finish in any order leave the same bits."""
    assert_same_bits(evidence(ASKED, 2, in_flight), alone)


@pytest.mark.parametrize(("workers", "in_flight"), [(1, 1), (1, 8), (2, 4)])
def test_some_blocks_from_a_store(alone, tmp_path, workers, in_flight):
    """Whether a block was kept, for all its questions or some, or is computed: the same bits."""
    with Store(tmp_path) as store:
        evidence(ASKED[::2], draws=2 * 2048, store=store)
        assert_same_bits(evidence(ASKED, workers, in_flight, store=store), alone)
        assert store.recalled == 2 * len(ASKED[::2])


def test_the_order_of_questions(alone):
    """Backwards is the same evidence backwards."""
    assert_same_bits(evidence(ASKED[::-1]), alone[::-1])


def test_questions_of_one_shape_keep_their_answers():
    """Nothing but the numbers tells the answers of these apart."""
    alike = [ask(f"blocks.0.attn.{name}") for name in "qkvz"]
    assert_same_bits(evidence(alike), [evidence([question])[0] for question in alike])


@dataclasses.dataclass(frozen=True)
class Spy:
    """Standard normal weights, noting the settings under which they are drawn."""

    noted: tuple[list, ...] = dataclasses.field(default_factory=lambda: ([],))
    variance = 1.0
    kurtosis = 3.0

    def __hash__(self):
        return 0

    def law(self, weight, architecture):
        return self

    def draw(self, source, shape):
        self.noted[0].append((torch.get_num_threads(), torch.get_float32_matmul_precision()))
        return source.normal(shape, 1.0)


def test_blocks_run_on_one_thread_in_full_precision():
    """Whatever the caller has set, so that sums have one order; the settings survive it."""
    spy = Spy()
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("medium")
    try:
        measure(nope.Question(architecture(), spy, Q, "second_moment"), device="cpu")
        assert spy.noted[0] == [(1, "highest")]
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (2, "medium")
    finally:
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")


def test_the_decision_of_one_question_does_not_end_the_evidence_of_another(alone):
    """Where a question is decided early, the rest of the group goes on as if alone."""
    easy = Target(ASKED[0], np.full(4, 10.0), np.full(4, np.inf), 0.01, 0.01)
    found = Campaign([easy, everywhere(ASKED[1])], Conditions(), DRAWS).run()
    assert found[0].verdict == "REFUTED"
    assert found[0].measurement.draws < DRAWS
    assert_same_bits([found[1].measurement.moments], [alone[1]])


def decided(in_flight, workers=1):
    truth = 4 * 0.3**2  # LayerNorm makes |x|^2 = 4 exactly, so E q^2 = d std^2
    target = Target(ASKED[0], np.full(4, 0.97 * truth), np.full(4, 1.03 * truth), 0.05, 0.05)
    (found,) = Campaign([target], Conditions(), 200_000).run(workers, in_flight)
    return found


@pytest.mark.parametrize(("workers", "in_flight"), [(1, 3), (1, 8), (2, 4)])
def test_a_decision_falls_at_the_same_draw(workers, in_flight):
    """Blocks in flight beyond the deciding look are not counted."""
    one, other = decided(1), decided(in_flight, workers)
    assert one.verdict == other.verdict == "CONFIRMED"
    assert_same_bits([other.measurement.moments], [one.measurement.moments])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_uniform_and_softmax_attention_share_tokens_and_weights(dtype):
    """The same blocks have the same embed and the same values v, bit for bit."""
    places = ["embed", "blocks.0.attn.v"]
    softmax, uniform = (
        Group(architecture(attention=k), INIT, None) for k in ("softmax", "uniform")
    )
    assert softmax.block_size == uniform.block_size
    for index in (0, 3):
        one, two = (
            sample(group, places, index, Conditions(5, dtype=dtype)) for group in (softmax, uniform)
        )
        assert all(torch.equal(one[place], two[place]) for place in places)
        assert one["embed"].any()


def test_blocks_and_seeds_are_different_draws():
    """Another block or seed is other tokens and other weights."""
    group = Group(architecture(), INIT, None)
    keys = [(0, 0), (0, 1), (1, 0), (2**32, 0)]
    drawn = [sample(group, ["embed", Q], index, Conditions(seed)) for seed, index in keys]
    for place in ("embed", Q):
        assert len({float(values[place].double().sum()) for values in drawn}) == len(keys)


def test_the_same_seed_is_the_same_measurement():
    """`measure` is a function of its arguments; another seed is other evidence."""
    one, two, other = (measure(ASKED[0], seed=seed, device="cpu").moments for seed in (7, 7, 8))
    assert_same_bits([one], [two])
    assert not np.array_equal(one.mean, other.mean)


def test_given_weights_are_shared_by_all_draws():
    """With given weights, q is x W of one W in every draw and block; without, of its own."""
    question = ask(given=nope.Weights(1), norm_position="none")
    solutions = []
    for index in (0, 1):
        values = sample(Group.of(question), ["embed", Q], index, Conditions(dtype="float64"))
        x = values["embed"][:, 0].numpy()
        q = values[Q].transpose(1, 2).flatten(2)[:, 0].numpy()
        W, residual, *_ = np.linalg.lstsq(x, q, rcond=None)
        assert (residual <= 1e-24 * (q**2).sum()).all()
        solutions.append(W)
    assert np.abs(solutions[0] - solutions[1]).max() <= 1e-12 * np.abs(solutions[0]).max()


@pytest.mark.parametrize("n_ctx", [1, 64, 512])
def test_block_size_is_set_by_the_architecture_alone(n_ctx):
    """A power of two, the same for every question and for both kinds of attention."""
    sizes = {
        Group.of(ask(place, observable, attention=kind, n_ctx=n_ctx)).block_size
        for place, observable in ((Z, "second_moment"), ("ln_final", "kernel"))
        for kind in ("softmax", "uniform")
    }
    (size,) = sizes
    assert size & (size - 1) == 0


@dataclasses.dataclass(frozen=True)
class Broken:
    """Standard normal weights, but the keys of draw 3 are not a number."""

    variance = 1.0
    kurtosis = 3.0
    path: str = ""

    def law(self, weight, architecture):
        return dataclasses.replace(self, path=weight.path)

    def draw(self, source: TorchSource, shape):
        drawn = source.normal(shape, 1.0)
        if self.path.endswith("W_K"):
            drawn[3] = math.nan
        return drawn


def test_what_is_not_finite_ends_its_own_question_only():
    """A failing question is UNDECIDED with the reason; its neighbour's evidence is as if alone."""
    good, bad = (
        nope.Question(architecture(), Broken(), f"blocks.0.attn.{name}", "second_moment")
        for name in "qk"
    )
    failed, fine = Campaign([everywhere(bad), everywhere(good)], Conditions(), DRAWS).run()
    assert failed.verdict == "UNDECIDED"
    assert "blocks.0.attn.k, got nan in draw 3 at position 1" in str(failed.failure)
    assert np.isinf(failed.low).all()
    assert fine.failure is None
    assert_same_bits([fine.measurement.moments], evidence([good]))
    with pytest.raises(FloatingPointError, match="got nan in draw 3"):
        measure([good, bad], device="cpu")
