"""Tests that planted errors asked for: what no other test noticed."""

import numpy as np
import pytest

import nope
import theory
from montecarlo import Conditions, Target
from montecarlo.campaign import _Stream
from montecarlo.evidence import Measurement
from montecarlo.moments import Moments
from montecarlo.sampler import Group, block, sample

INPUTS = 3
QUERY = "blocks.0.attn.q"


@pytest.fixture
def question():
    return nope.Question(
        nope.decoder(4, 2, n_ctx=3, d_ff=0), nope.init.normal(0.5), QUERY, "second_moment"
    )


def test_inputs_of_one_draw_are_one_draw(question):
    """Its inputs share the weights: they are averaged, and only draws of the weights counted."""
    group = Group.of(question, Conditions(inputs=INPUTS))
    (moments,) = block(group, [question], 0, Conditions(inputs=INPUTS))
    queries = sample(group, [QUERY], 0, Conditions(inputs=INPUTS))[QUERY].double().numpy()
    squares = (queries**2).mean((1, 3)).reshape(-1, INPUTS, 3).mean(1)
    assert moments.count == len(squares) == group.block_size
    expected = squares.std(0, ddof=1) / np.sqrt(len(squares))
    assert Measurement(question, moments).standard_error == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def measured(question):
    """A thousand draws of three entries."""
    draws = np.random.default_rng(0).normal(1.0, 0.1, (1000, 1, 3))
    return Measurement(question, Moments.of(draws), "float64")


def verdict(measured, low, high):
    return Target(measured.question, low, high, 1e-3, 1e-3).verdict(measured)


def test_confirmed_does_not_pay_for_its_entries(measured):
    """A wrong one needs the one entry that is out to slip through: its rate is not divided."""
    own, shared = (measured.half_width(rate) for rate in (1e-3, 1e-3 / 3))
    assert (1.001 * own < shared).all()
    for factor, expected in ((1.001, "CONFIRMED"), (0.999, "UNDECIDED")):
        half = factor * own
        assert verdict(measured, measured.mean - half, measured.mean + half) == expected


def test_refuted_pays_for_its_entries(measured):
    """Any of the three may err: an entry is out by its interval at a third of the rate."""
    own, shared = (measured.half_width(rate) for rate in (1e-3, 1e-3 / 3))
    assert (own < 0.999 * shared).all()
    for factor, expected in ((1.001, "REFUTED"), (0.999, "UNDECIDED")):
        low = measured.mean + np.array([0.0, factor, 0.0]) * shared - [1.0, 0.0, 1.0]
        assert verdict(measured, low, low + 9.0) == expected


def test_float32_draws_have_the_moments_of_the_same_numbers():
    """To the last bit: they are sums in float64 from the start."""
    draws = np.random.default_rng(0).normal(1.0, 0.1, (999, 2, 3)).astype(np.float32)
    found, expected = Moments.of(draws), Moments.of(draws.astype(np.float64))
    for name in ("mean", "second", "third"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))


def test_blocks_merge_in_index_order(question):
    """Whichever comes back first: what is merged is block 0, then 1, then 2."""
    rng = np.random.default_rng(0)
    blocks = [Moments.of(rng.normal(size=(8, 1, 3))) for _ in range(3)]
    stream = _Stream(Group.of(question), 0, 100, questions=[question])
    stream.waiting = {number: ({question: blocks[number]}, 0.0) for number in (2, 0, 1)}
    merged = blocks[0], blocks[0].merge(blocks[1]), blocks[0].merge(blocks[1]).merge(blocks[2])
    for expected in merged:
        stream.absorb()
        assert np.array_equal(stream.moments[question].mean, expected.mean)
        assert np.array_equal(stream.moments[question].third, expected.third)


@pytest.mark.parametrize("observable", ["adjacent_cosine", "second_moment", "kernel"])
def test_a_residual_scale_is_a_factor_of_the_last_map(observable):
    """x + c W z: the theory says the same, remainder included, of c as of weights times c.

    GPT-2's scheme divides the maps into the stream by 2 where there are four of them.
    """

    def says(init, **changes):
        stack = nope.decoder(
            16, 4, 2, n_ctx=4, norm_position="post", attention="uniform", **changes
        )
        return theory.predict(nope.Question(stack, init, "blocks.1.resid_post", observable))

    scaled = says(nope.init.normal(0.25), residual_scale=0.5)
    smaller = says(nope.init.gpt2(0.25))
    assert scaled.values == pytest.approx(smaller.values, rel=1e-9)
    assert scaled.remainder == pytest.approx(smaller.remainder, rel=1e-6, abs=1e-12)
