"""No position sees a later one, and nothing is computed that was not asked for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nope
from nope import transformer

ATTENTION = pytest.mark.parametrize("attention", ["softmax", "uniform"])
NORM_POSITIONS = pytest.mark.parametrize("norm_position", ["pre", "post", "none"])
ROUNDING = 1e-12
"""Of the largest output, float64: a few thousand units of the last place."""


def evaluate_all(architecture, tokens, seed=0, std=0.5):
    """Every place of the architecture, float64, weights N(0, std^2)."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        w.path: std * torch.randn(1, *w.shape, generator=generator, dtype=torch.float64)
        for w in architecture.weights
    }
    places = list(architecture.places())
    with torch.no_grad():
        return transformer.evaluate(architecture, places, tokens, lambda w: weights[w.path])


def tokens_for(architecture, draws=2, seed=1):
    shape = (draws, architecture.n_ctx, architecture.d_model)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@ATTENTION
@NORM_POSITIONS
@given(n_ctx=st.integers(2, 9), n_heads=st.integers(1, 3), seed=st.integers(0, 999), data=st.data())
def test_later_tokens_change_nothing_earlier(attention, norm_position, n_ctx, n_heads, seed, data):
    """Replacing the tokens from a cut on leaves every place before the cut as it was."""
    cut = data.draw(st.integers(1, n_ctx - 1))
    architecture = nope.decoder(
        4 * n_heads,
        n_heads,
        2,
        d_ff=5,
        n_ctx=n_ctx,
        attention=attention,
        norm_position=norm_position,
    )
    tokens = tokens_for(architecture, seed=seed)
    other = torch.cat([tokens[:, :cut], 3 - tokens[:, cut:]], 1)
    before = evaluate_all(architecture, tokens, seed)
    after = evaluate_all(architecture, other, seed)
    for place, value in before.items():
        axis = value.ndim - 2  # positions of a vector place, queries of a pair place
        early, changed = value.narrow(axis, 0, cut), after[place].narrow(axis, 0, cut)
        largest = early[early.isfinite()].abs().max()
        torch.testing.assert_close(changed, early, rtol=0.0, atol=ROUNDING * float(largest))
    assert not torch.equal(before["embed"], after["embed"])
    output = list(before)[-1]
    assert (before[output] - after[output])[:, cut:].abs().max() > 0


@ATTENTION
def test_patterns_are_causal_distributions(attention):
    """Every row of a pattern is non-negative, sums to 1 and is 0 above the diagonal."""
    architecture = nope.decoder(12, 3, 2, n_ctx=11, attention=attention)
    values = evaluate_all(architecture, tokens_for(architecture), std=1.0)
    for block in range(2):
        pattern = values[f"blocks.{block}.attn.pattern"]
        assert pattern.shape == (2, 3, 11, 11)
        assert (pattern >= 0).all()
        assert torch.equal(pattern.triu(1), torch.zeros_like(pattern))
        assert (pattern.sum(-1) - 1).abs().max() <= ROUNDING


def test_scores_are_minus_infinity_above_the_diagonal_and_finite_elsewhere():
    """The causal mask is -inf, so softmax gives exact zeros."""
    architecture = nope.decoder(8, 2, n_ctx=6)
    scores = evaluate_all(architecture, tokens_for(architecture))["blocks.0.attn.scores"]
    above = torch.ones(6, 6, dtype=torch.bool).triu(1)
    assert (scores[..., above] == -torch.inf).all()
    assert scores[..., ~above].isfinite().all()


def test_uniform_attention_averages_the_prefix():
    """z_m of uniform attention is the mean of v_1 .. v_m, and its pattern is 1/m."""
    architecture = nope.decoder(6, 2, n_ctx=7, attention="uniform")
    values = evaluate_all(architecture, tokens_for(architecture))
    v = values["blocks.0.attn.v"].transpose(1, 2).flatten(2)
    for m in range(1, 8):
        mean = v[:, :m].mean(1)
        found = values["blocks.0.attn.z"][:, m - 1]
        assert (found - mean).abs().max() <= ROUNDING * v.abs().max()
        assert (values["blocks.0.attn.pattern"][..., m - 1, :m] == 1 / m).all()


def test_prefix_means_average_the_tokens():
    """`prefix_means` has the mean of the first m tokens at position m."""
    architecture = nope.prefix_means(3, n_ctx=5)
    tokens = tokens_for(architecture)
    found = evaluate_all(architecture, tokens)["mean"]
    for m in range(1, 6):
        mean = tokens[:, :m].mean(1)
        assert (found[:, m - 1] - mean).abs().max() <= ROUNDING * tokens.abs().max()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("place", list(nope.decoder(4, 2, 2, n_ctx=3).places()))
def test_only_upstream_weights_are_asked_for(place, bias):
    """Computing a place reads the weights of the operations upstream of it, each once."""
    architecture = nope.decoder(4, 2, 2, n_ctx=3, bias=bias)
    asked = []

    def weight(wanted):
        asked.append(wanted)
        return torch.ones(1, *wanted.shape, dtype=torch.float64)

    transformer.evaluate(architecture, [place], tokens_for(architecture), weight)
    upstream = [w for o in architecture.upstream(place) for w in o.weights]
    assert asked == upstream


def test_queries_need_only_their_own_matrix():
    """The upstream weights of q, scores and z, written out by hand."""
    architecture = nope.decoder(4, 2, n_ctx=3)

    def letters(place):
        upstream = architecture.upstream(f"blocks.0.attn.{place}")
        return [w.path.removeprefix("blocks.0.attn.W_") for o in upstream for w in o.weights]

    assert letters("q") == ["Q"]
    assert letters("scores") == ["Q", "K"]
    assert letters("z") == ["Q", "K", "V"]


def test_a_place_is_the_same_alone_or_with_others():
    """Asking for more places changes no bit of any of them."""
    architecture = nope.decoder(8, 2, 2, n_ctx=5)
    tokens = tokens_for(architecture)
    together = evaluate_all(architecture, tokens)
    generator = torch.Generator().manual_seed(0)
    weights = {
        w.path: 0.5 * torch.randn(1, *w.shape, generator=generator, dtype=torch.float64)
        for w in architecture.weights
    }
    for place, value in together.items():
        alone = transformer.evaluate(architecture, [place], tokens, lambda w: weights[w.path])
        assert list(alone) == [place]
        assert torch.equal(alone[place], value)


def test_weights_of_each_draw_are_used_by_that_draw():
    """With a leading axis of draws, draw i sees its own weights."""
    architecture = nope.decoder(4, 2, n_ctx=3)
    tokens = tokens_for(architecture, draws=3)
    generator = torch.Generator().manual_seed(0)
    weights = {
        w.path: torch.randn(3, *w.shape, generator=generator, dtype=torch.float64)
        for w in architecture.weights
    }

    def output(tokens, select):
        found = transformer.evaluate(
            architecture, ["ln_final"], tokens, lambda w: weights[w.path][select]
        )
        return found["ln_final"]

    together = output(tokens, slice(None))
    for draw in range(3):
        alone = output(tokens[draw : draw + 1], slice(draw, draw + 1))
        assert (together[draw] - alone[0]).abs().max() <= ROUNDING * together.abs().max()


def test_an_unknown_place_is_a_lookup_error():
    """The error names the place that is not there and the ones that are."""
    architecture = nope.decoder(4, 2, n_ctx=3)
    with pytest.raises(LookupError, match=r"got 'blocks\.7\.ln1'; it has embed, blocks\.0\.ln1"):
        transformer.evaluate(
            architecture, ["blocks.7.ln1"], tokens_for(architecture), lambda w: None
        )
