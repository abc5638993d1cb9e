"""Theorems about layers, on the layers themselves: drawn architectures and weights, float64.

They hold draw by draw, to rounding, so nothing is averaged and nothing is estimated.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nope
from nope import strategies, transformer
from theory import symmetry

ROUNDING = 1e-9
"""Of a place's largest entry: a norm of what nearly cancels loses some of float64's 16 digits."""

SMALL = {"widths": (4, 6, 8), "depths": (1, 2), "lengths": range(2, 7), "eps": (0.0, 0.1)}
TOKENS = strategies.tokens(vocabularies=(), units=(), stds=(1.0,), bos=(False,))
SEEDS = st.integers(0, 2**32 - 1)


def weights_of(architecture, seed, scaled=lambda path: 1.0):
    """A function that gives the same Gaussian array to the same weight, whoever asks."""

    def array(weight):
        generator = torch.Generator().manual_seed(hash_of(seed, weight.path))
        shape = (1, *weight.shape)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return scaled(weight.path) * drawn / weight.fan_in**0.5

    return array


def hash_of(seed, path):
    return (seed + sum((at + 1) * ord(letter) for at, letter in enumerate(path))) % 2**63


def tokens_of(architecture, seed):
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.standard_normal((1, architecture.n_ctx, architecture.d_model)))


def evaluated(architecture, tokens, array, places=None):
    with torch.no_grad():
        return transformer.evaluate(architecture, places or architecture.places(), tokens, array)


def differ(one, other):
    """The largest gap of two places, over the larger of them; entries that are masked agree."""
    seen = one.isfinite()
    assert torch.equal(seen, other.isfinite())
    size = max(one[seen].abs().max(), other[seen].abs().max(), 1e-300)
    return float((one[seen] - other[seen]).abs().max() / size)


@given(strategies.architectures(**SMALL, causal=(True,), tokens=TOKENS), SEEDS, st.data())
def test_a_prefix_is_computed_as_if_it_were_all(architecture, seed, data):
    """Causality: the first positions of every place are those of the architecture cut off there."""
    cut = data.draw(st.integers(1, architecture.n_ctx - 1))
    array, tokens = weights_of(architecture, seed), tokens_of(architecture, seed)
    whole = evaluated(architecture, tokens, array)
    short = evaluated(replace(architecture, n_ctx=cut), tokens[:, :cut], array)
    for place, operation in architecture.places().items():
        first = whole[place].narrow(-2, 0, cut)
        first = first[..., :cut] if operation.axes == "pair" else first
        assert differ(first, short[place]) <= ROUNDING, place


@given(strategies.architectures(**SMALL, attention=("uniform",), tokens=TOKENS), SEEDS)
def test_heads_that_attend_alike_are_one_head(architecture, seed):
    """Uniform attention: with the same weights, any number of heads gives the same vectors."""
    one = with_heads(architecture, 1)
    array, tokens = weights_of(architecture, seed), tokens_of(architecture, seed)
    many, single = (evaluated(each, tokens, array) for each in (architecture, one))
    for place, operation in architecture.places().items():
        if operation.axes == "vector" and not place.endswith(".v"):
            assert differ(many[place], single[place]) <= ROUNDING, place


def with_heads(architecture, n_heads):
    return mapped(architecture, nope.Attention, lambda layer: replace(layer, n_heads=n_heads))


def attending(architecture, kind):
    return mapped(architecture, nope.Attention, lambda layer: replace(layer, kind=kind))


def mapped(architecture, kind, change):
    """The architecture with every layer of a kind changed."""

    def walk(layer):
        match layer:
            case nope.Sequence():
                return replace(layer, layers=tuple(map(walk, layer.layers)))
            case nope.Residual():
                return changed(replace(layer, branch=walk(layer.branch)))
            case _:
                return changed(layer)

    def changed(layer):
        return change(layer) if isinstance(layer, kind) else layer

    return replace(architecture, body=walk(architecture.body))


@given(
    strategies.architectures(**SMALL, attention=("softmax",), causal=(True,), tokens=TOKENS), SEEDS
)
def test_the_first_position_knows_no_attention(architecture, seed):
    """m = 1: there is one key, so a softmax is the uniform pattern exactly."""
    array, tokens = weights_of(architecture, seed), tokens_of(architecture, seed)
    uniform = attending(architecture, "uniform")
    one, other = (evaluated(each, tokens, array) for each in (architecture, uniform))
    for place in uniform.places():
        assert differ(one[place].narrow(-2, 0, 1), other[place].narrow(-2, 0, 1)) <= ROUNDING


@given(strategies.architectures(**SMALL, attention=("softmax",), tokens=TOKENS), SEEDS)
def test_small_logits_attend_uniformly(architecture, seed):
    """W_Q, b_Q -> 0: the output goes to that of uniform attention, and linearly.

    A tenth of the logits leaves a tenth of the gap, up to the next order; of a gap to anything
    else it would leave all.
    """
    tokens, uniform = tokens_of(architecture, seed), attending(architecture, "uniform")
    limit = evaluated(uniform, tokens, weights_of(architecture, seed))
    place = list(uniform.places())[-1]
    gaps = []
    for size in (1e-6, 1e-7):
        array = weights_of(architecture, seed, lambda path, s=size: s if "_Q" in path else 1.0)
        gaps.append(differ(evaluated(architecture, tokens, array, [place])[place], limit[place]))
    assert gaps[1] <= 0.11 * gaps[0] + ROUNDING


@pytest.mark.parametrize("factor", [0.125, 3.0])
@given(
    strategies.architectures(**SMALL | {"eps": (0.0,)}, norm_position=("pre",), tokens=TOKENS),
    SEEDS,
)
def test_norms_make_branches_free_of_the_streams_scale(factor, architecture, seed):
    """Tokens and branches times c: the stream is times c, and what norms read is as it was."""
    array, tokens = weights_of(architecture, seed), tokens_of(architecture, seed)
    louder = mapped(
        architecture, nope.Residual, lambda layer: replace(layer, scale=factor * layer.scale)
    )
    before, after = (
        evaluated(architecture, tokens, array),
        evaluated(louder, factor * tokens, array),
    )
    for place, values in before.items():
        stream = place == "embed" or "resid" in place
        assert differ(factor * values if stream else values, after[place]) <= ROUNDING, place


@given(
    strategies.architectures(**SMALL | {"lengths": range(3, 7)}, tokens=TOKENS), SEEDS, st.data()
)
def test_the_past_is_permuted_where_the_theorem_says(architecture, seed, data):
    """The last position does not see the order of the others where `theory.symmetry` says so, and
    in a generic draw it does where it does not."""
    length = architecture.n_ctx
    order = data.draw(st.permutations(range(length - 1)).filter(lambda at: at != sorted(at)))
    place = data.draw(
        st.sampled_from([p for p in architecture.places() if is_vector(architecture, p)])
    )
    theorem = symmetry.past_permutation(architecture, place)
    array, tokens = weights_of(architecture, seed), tokens_of(architecture, seed)
    moved = tokens[:, [*order, length - 1]]
    one, other = (evaluated(architecture, each, array, [place])[place] for each in (tokens, moved))
    gap = differ(one.select(-2, length - 1), other.select(-2, length - 1))
    assert (gap <= ROUNDING) == theorem.holds, theorem


def is_vector(architecture, place):
    return architecture.places()[place].axes == "vector"
