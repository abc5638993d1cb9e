"""An architecture is data: its places, what cannot be built, and what small sizes do."""

import dataclasses
import math
import pickle

import pytest
import torch

import nope
from nope import transformer
from nope.operations import Average

PRE = [
    "embed",
    "blocks.0.ln1",
    "blocks.0.attn.q",
    "blocks.0.attn.k",
    "blocks.0.attn.v",
    "blocks.0.attn.scores",
    "blocks.0.attn.pattern",
    "blocks.0.attn.z",
    "blocks.0.attn_out",
    "blocks.0.resid_mid",
    "blocks.0.ln2",
    "blocks.0.mlp.pre",
    "blocks.0.mlp.post",
    "blocks.0.mlp_out",
    "blocks.0.resid_post",
    "ln_final",
]
UNIFORM_LACKS = {"blocks.0.attn.q", "blocks.0.attn.k", "blocks.0.attn.scores"}


def places(*args, **kwargs):
    return list(nope.decoder(*args, **kwargs).places())


def test_places_have_transformer_lens_names_in_order():
    """A one-block pre-norm decoder has exactly TransformerLens's places, less `hook_`."""
    assert places(8, 2, n_ctx=4) == PRE


def test_blocks_are_numbered():
    """A second block repeats the first one's places under `blocks.1`."""
    block = [name for name in PRE if name.startswith("blocks.")]
    second = [name.replace("blocks.0", "blocks.1") for name in block]
    assert places(8, 2, 2, n_ctx=4) == ["embed", *block, *second, "ln_final"]


def test_uniform_attention_has_no_queries_keys_or_scores():
    """What a uniform pattern does not need does not exist."""
    assert places(8, 2, n_ctx=4, attention="uniform") == [p for p in PRE if p not in UNIFORM_LACKS]


def test_post_norm_follows_each_residual_sum():
    """In post-norm ln1 and ln2 come after the sums, and there is no ln_final."""
    names = [p.removeprefix("blocks.0.") for p in places(8, 2, n_ctx=4, norm_position="post")]
    expected = ["resid_mid", "ln1", "mlp.pre", "mlp.post", "mlp_out", "resid_post", "ln2"]
    assert names[-7:] == expected
    assert "ln_final" not in names


def test_no_norm_leaves_all_norms_out():
    """`norm_position="none"` has the places of pre-norm less ln1, ln2 and ln_final."""
    expected = [p for p in PRE if "ln" not in p]
    assert places(8, 2, n_ctx=4, norm_position="none") == expected


def test_without_mlp_the_block_ends_after_attention():
    """With d_ff=0 the attention's residual sum is resid_post."""
    expected = [*PRE[:9], "blocks.0.resid_post", "ln_final"]
    assert places(8, 2, n_ctx=4, d_ff=0) == expected


def test_d_ff_defaults_to_four_times_the_width():
    """GPT-2's choice."""
    weights = {w.path: w.shape for w in nope.decoder(6, 2, n_ctx=4).weights}
    assert weights["blocks.0.mlp.W_in"] == (6, 24)
    assert weights["blocks.0.mlp.W_out"] == (24, 6)


@pytest.mark.parametrize("bias", [False, True])
def test_weights_are_those_of_attention_and_mlp(bias):
    """Six matrices a block, fan_in x fan_out, and with `bias` six offsets of fan_out."""
    found = {w.path: w.shape for w in nope.decoder(6, 2, d_ff=5, n_ctx=4, bias=bias).weights}
    expected = {f"blocks.0.attn.W_{name}": (6, 6) for name in "QKVO"}
    expected |= {"blocks.0.mlp.W_in": (6, 5), "blocks.0.mlp.W_out": (5, 6)}
    if bias:
        expected |= {f"blocks.0.attn.b_{name}": (6,) for name in "QKVO"}
        expected |= {"blocks.0.mlp.b_in": (5,), "blocks.0.mlp.b_out": (6,)}
    assert found == expected


@pytest.mark.parametrize(
    ("layers", "d_ff", "additions"), [(0, 8, 0), (1, 8, 2), (3, 8, 6), (3, 0, 3)]
)
def test_residual_additions_are_counted(layers, d_ff, additions):
    """Two a block, one without MLP."""
    assert nope.decoder(8, 2, layers, d_ff, n_ctx=2).n_residual == additions


def test_heads_are_known_without_walking_the_layers():
    """`n_heads` is the attention's, and 1 where there is none."""
    assert nope.decoder(8, 4, n_ctx=2).n_heads == 4
    assert nope.decoder(8, 4, n_ctx=2, attention="uniform").n_heads == 4
    assert nope.prefix_means(8, n_ctx=2).n_heads == 1


def build(**changes):
    sizes = {"d_model": 8, "n_heads": 2, "n_ctx": 4} | changes
    return nope.decoder(**sizes)


WHOLE = "to be a whole number of at least"
IMPOSSIBLE = {
    "heads that do not divide": ({"n_heads": 3}, "expected n_heads to divide d_model=8, got 3"),
    "more heads than coordinates": ({"n_heads": 16}, "to divide d_model=8, got 16"),
    "no heads": ({"n_heads": 0}, f"expected n_heads {WHOLE} 1, got 0"),
    "boolean heads": ({"n_heads": True}, f"expected n_heads {WHOLE} 1, got True"),
    "zero width": ({"d_model": 0}, f"expected d_model {WHOLE} 1, got 0"),
    "negative width": ({"d_model": -8}, f"expected d_model {WHOLE} 1, got -8"),
    "fractional width": ({"d_model": 8.0}, f"expected d_model {WHOLE} 1, got 8.0"),
    "boolean width": ({"d_model": True}, f"expected d_model {WHOLE} 1, got True"),
    "zero positions": ({"n_ctx": 0}, f"expected n_ctx {WHOLE} 1, got 0"),
    "boolean positions": ({"n_ctx": True}, f"expected n_ctx {WHOLE} 1, got True"),
    "negative layers": ({"n_layers": -1}, f"expected n_layers {WHOLE} 0, got -1"),
    "boolean layers": ({"n_layers": True}, f"expected n_layers {WHOLE} 0, got True"),
    "negative d_ff": ({"d_ff": -1}, f"expected d_ff {WHOLE} 0, got -1"),
    "boolean d_ff": ({"d_ff": False}, f"expected d_ff {WHOLE} 0, got False"),
    "negative eps": ({"eps": -1e-5}, "expected eps to be a finite non-negative number, got -1e-05"),
    "NaN eps": ({"eps": math.nan}, "expected eps to be a finite non-negative number, got nan"),
    "unknown activation": ({"activation": "tanhh"}, "activation to be one of .*, got 'tanhh'"),
    "unknown norm": ({"norm": "batchnorm"}, "norm to be one of .*, got 'batchnorm'"),
    "unknown norm position": ({"norm_position": "mid"}, "norm_position to be one of .*, got 'mid'"),
    "unknown attention": ({"attention": "linear"}, "attention to be one of .*, got 'linear'"),
    "a word for the mask": ({"causal": "False"}, "causal to be True or False, got 'False'"),
    "a number for the mask": ({"causal": 0}, "causal to be True or False, got 0"),
    "nothing for the mask": ({"causal": None}, "causal to be True or False, got None"),
    "a word for the biases": ({"bias": "no"}, "bias to be True or False, got 'no'"),
    "LayerNorm of one coordinate": (
        {"d_model": 1, "n_heads": 1},
        "expected d_model of at least 2 for a LayerNorm with eps 0 .*, got 1",
    ),
}


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_combinations_fail_at_construction(changes, message):
    """`ValueError` with what was expected, what was got and, after the semicolon, the remedy."""
    with pytest.raises(ValueError, match=rf"{message}; \w+"):
        build(**changes)


@pytest.mark.parametrize("std", [-0.02, 0.0, math.nan, math.inf, True, "0.02"])
def test_token_std_must_be_positive_and_finite(std):
    """Tokens of no, negative or undefined size are refused."""
    with pytest.raises(ValueError, match=r"expected the tokens' std .* got .*; change"):
        nope.GaussianTokens(std=std)


@pytest.mark.parametrize("make", [nope.init.normal, nope.init.gpt2])
@pytest.mark.parametrize("std", [-0.02, math.nan, math.inf, True, "0.02"])
def test_weight_std_must_be_finite_and_not_negative(make, std):
    """Weights of negative or undefined size are refused."""
    with pytest.raises(ValueError, match=r"expected the weights' std .* got .*; change"):
        make(std)


@pytest.mark.parametrize("bias", ["False", 0, None])
def test_biases_of_an_mlp_are_there_or_not(bias):
    with pytest.raises(ValueError, match=r"expected bias to be True or False, got .*; change bias"):
        nope.MLP(8, bias=bias)


class Name(str):
    """A string that counts how often it is compared."""

    compared = 0

    def __eq__(self, other):
        Name.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


@dataclasses.dataclass(frozen=True)
class Stack:
    """So many prefix means."""

    count: int

    def operations(self, scope, source):
        for index in range(self.count):
            yield Average(Name(index), (source,))


def test_construction_takes_time_in_proportion_to_the_places():
    nope.Architecture(4, 2, nope.GaussianTokens(), Stack(500))
    assert Name.compared < 5000


def test_two_layers_of_one_name_are_refused():
    """Every place has its own name."""
    body = nope.Sequence((nope.Norm("ln"), nope.Norm("ln")))
    with pytest.raises(ValueError, match=r"own name, got \['ln'\]; name the layers apart"):
        nope.Architecture(4, 3, nope.GaussianTokens(), body)


SMALL = {
    "width 1 with RMSNorm": nope.decoder(1, 1, n_ctx=3, norm="rmsnorm"),
    "width 1 with eps": nope.decoder(1, 1, n_ctx=3, eps=1e-5),
    "width 1 without norm": nope.decoder(1, 1, n_ctx=3, norm_position="none"),
    "width 2": nope.decoder(2, 1, n_ctx=3),
    "one head": nope.decoder(8, 1, n_ctx=3),
    "heads of one coordinate": nope.decoder(8, 8, n_ctx=3),
    "one position": nope.decoder(8, 2, n_ctx=1),
    "no layers": nope.decoder(8, 2, 0, n_ctx=3),
    "no layers and no norm": nope.decoder(8, 2, 0, n_ctx=3, norm_position="none"),
    "no MLP": nope.decoder(8, 2, d_ff=0, n_ctx=3),
    "MLP of width 1": nope.decoder(8, 2, d_ff=1, n_ctx=3),
    "all at once": nope.decoder(1, 1, d_ff=0, n_ctx=1, norm="rmsnorm", attention="uniform"),
    "prefix means of one token": nope.prefix_means(1, n_ctx=1),
}


@pytest.mark.parametrize("architecture", SMALL.values(), ids=SMALL)
def test_edge_sizes_run(architecture):
    """Every place of the smallest architectures has finite values of the shape it should have."""
    generator = torch.Generator().manual_seed(0)
    n_ctx, d_model = architecture.n_ctx, architecture.d_model
    tokens = torch.randn(2, n_ctx, d_model, generator=generator)
    weights = {w.path: torch.randn(1, *w.shape, generator=generator) for w in architecture.weights}
    operations = architecture.places()
    found = transformer.evaluate(architecture, operations, tokens, lambda w: weights[w.path])
    for place, value in found.items():
        assert not value.isnan().any()
        if operations[place].axes == "pair":
            assert value.shape == (2, architecture.n_heads, n_ctx, n_ctx)
        elif value.ndim == 4:
            assert value.shape == (2, architecture.n_heads, n_ctx, d_model // architecture.n_heads)
        else:
            assert value.shape[:2] == (2, n_ctx)
    assert next(reversed(found.values())).shape == (2, n_ctx, d_model)


def test_upstream_is_what_a_place_needs_in_order():
    """Upstream of the scores: the embedding, the norm, queries and keys; not the values."""
    names = [o.place for o in nope.decoder(8, 2, n_ctx=4).upstream("blocks.0.attn.scores")]
    assert names == [*PRE[:4], "blocks.0.attn.scores"]


def test_upstream_of_an_unknown_place_is_a_lookup_error():
    """The error names what was asked for and every place there is."""
    with pytest.raises(LookupError, match=r"got 'ln_fnal'; it has embed, .*ln_final"):
        nope.decoder(8, 2, n_ctx=4).upstream("ln_fnal")


def test_architectures_are_frozen():
    """Data cannot be changed behind a question's back."""
    architecture = nope.decoder(8, 2, n_ctx=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        architecture.d_model = 16
    with pytest.raises(dataclasses.FrozenInstanceError):
        architecture.tokens.std = 1.0


@pytest.mark.parametrize("used", [False, True])
def test_architectures_are_values(used):
    """Equal descriptions are equal, hash alike and survive pickling, whatever was cached."""
    one, two = nope.decoder(8, 2, 2, n_ctx=4), nope.decoder(8, 2, 2, n_ctx=4)
    if used:
        one.upstream("ln_final")
    assert one == two
    assert hash(one) == hash(two)
    copy = pickle.loads(pickle.dumps(one))
    assert copy == two
    assert hash(copy) == hash(two)
    assert list(copy.places()) == list(two.places())


DIFFERENT = [
    {"d_model": 16},
    {"n_heads": 4},
    {"n_ctx": 5},
    {"n_layers": 2},
    {"d_ff": 8},
    {"activation": "relu"},
    {"norm": "rmsnorm"},
    {"norm_position": "post"},
    {"attention": "uniform"},
    {"eps": 1e-5},
    {"bias": True},
    {"tokens": nope.GaussianTokens(std=1.0)},
]


@pytest.mark.parametrize("changes", DIFFERENT, ids=str)
def test_every_argument_makes_another_architecture(changes):
    """No argument of `decoder` is dropped on the way."""
    assert build(**changes) != build()
