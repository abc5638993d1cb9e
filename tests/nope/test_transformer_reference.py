"""The layers of `nope.transformer` are the ones that others use and that the papers write down.

Tolerances are the stated ones, relative to the largest output: 1e-5 in float32 and 1e-12 in
float64.  In float32 widths start at 4: over two coordinates LayerNorm is a step function, so
what its rounding does to the next layer is unbounded and no measure of equality.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nope
from nope import transformer

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
FIRST_PLACES = ("q", "k", "v", "scores", "pattern", "z")


@dataclass(frozen=True)
class Case:
    """A stack of encoder layers and the scale of what it is filled with."""

    architecture: nope.Architecture
    activation: str
    bias: bool
    norm_first: bool
    eps: float
    std: float
    seed: int

    @property
    def output(self) -> str:
        """The place that holds what torch's last layer returns."""
        places = list(self.architecture.places())
        return places[-2] if self.norm_first else places[-1]  # ln_final is not in torch's layer

    def arrays(self, dtype):
        """Weights N(0, std^2) with a leading 1, and two draws of unit tokens."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        weights = {w.path: draw(1, *w.shape) * self.std for w in self.architecture.weights}
        return weights, draw(2, self.architecture.n_ctx, self.architecture.d_model)

    def ours(self, place, weights, tokens):
        found = transformer.evaluate(self.architecture, [place], tokens, lambda w: weights[w.path])
        return found[place]


@st.composite
def cases(draw, least_width: int = 4, attention: str = "softmax") -> Case:
    n_heads = draw(st.integers(1, 4))
    d_model = n_heads * draw(st.integers(-(-least_width // n_heads), 6))
    activation, bias = draw(st.sampled_from(["relu", "gelu"])), draw(st.booleans())
    norm_first, eps = draw(st.booleans()), draw(st.sampled_from([0.0, 1e-5, 1e-2]))
    architecture = nope.decoder(
        d_model,
        n_heads,
        n_layers=draw(st.integers(1, 2)),
        d_ff=draw(st.integers(1, 12)),
        n_ctx=draw(st.integers(1, 9)),
        activation=activation,
        norm_position="pre" if norm_first else "post",
        attention=attention,
        eps=eps,
        bias=bias,
    )
    std, seed = draw(st.floats(0.02, 1.0)), draw(st.integers(0, 2**31))
    return Case(architecture, activation, bias, norm_first, eps, std, seed)


def torch_layer(case: Case, weights, block: int, dtype) -> torch.nn.Module:
    """torch's encoder layer holding our weights of one block; its matrices are out x in."""

    def own(name):
        return weights[f"blocks.{block}.{name}"][0]

    layer = torch.nn.TransformerEncoderLayer(
        case.architecture.d_model,
        case.architecture.n_heads,
        own("mlp.W_in").shape[1],
        dropout=0.0,
        activation=case.activation,
        layer_norm_eps=case.eps,
        batch_first=True,
        norm_first=case.norm_first,
        bias=case.bias,
        dtype=dtype,
    )
    state = {
        "self_attn.in_proj_weight": torch.cat([own(f"attn.W_{name}").T for name in "QKV"]),
        "self_attn.out_proj.weight": own("attn.W_O").T,
        "linear1.weight": own("mlp.W_in").T,
        "linear2.weight": own("mlp.W_out").T,
    }
    if case.bias:
        state |= {
            "self_attn.in_proj_bias": torch.cat([own(f"attn.b_{name}") for name in "QKV"]),
            "self_attn.out_proj.bias": own("attn.b_O"),
            "linear1.bias": own("mlp.b_in"),
            "linear2.bias": own("mlp.b_out"),
        }
    kept = layer.load_state_dict(state, strict=False)
    assert not kept.unexpected_keys
    assert all(name.startswith("norm") for name in kept.missing_keys)  # gain 1, offset 0
    return layer.train()  # dropout 0; the fused inference path is other code


def torch_output(case: Case, weights, tokens):
    length = tokens.shape[1]
    mask = torch.full((length, length), -math.inf, dtype=tokens.dtype).triu(1)
    block = 0
    while f"blocks.{block}.attn.W_Q" in weights:
        layer = torch_layer(case, weights, block, tokens.dtype)
        tokens = layer(tokens, src_mask=mask, is_causal=True)
        block += 1
    return tokens


def assert_equal_to_rounding(ours, theirs):
    largest = theirs.abs().max().item()
    assert ours.shape == theirs.shape
    assert largest > 0
    assert (ours - theirs).abs().max().item() <= TOLERANCE[theirs.dtype] * largest


@torch.no_grad()
def assert_equals_torch(case: Case, dtype):
    weights, tokens = case.arrays(dtype)
    ours = case.ours(case.output, weights, tokens)
    assert_equal_to_rounding(ours, torch_output(case, weights, tokens))


@given(cases())
def test_equals_torch_encoder_layer_in_float32(case):
    """The stack gives what `torch.nn.TransformerEncoderLayer` gives with the same weights."""
    assert_equals_torch(case, torch.float32)


@given(cases(least_width=2))
def test_equals_torch_encoder_layer_in_float64(case):
    """The same in float64, down to width 2 and to 1e-12."""
    assert_equals_torch(case, torch.float64)


@DTYPES
@torch.no_grad()
def test_equals_torch_at_gpt2_like_width(dtype):
    """The same at 12 heads of 16, at GPT-2's std and eps, where sums are long."""
    architecture = nope.decoder(192, 12, 1, n_ctx=33, eps=1e-5, bias=True)
    case = Case(architecture, "gelu", True, True, 1e-5, 0.02, seed=3)
    assert_equals_torch(case, dtype)


@DTYPES
@given(case=cases())
@torch.no_grad()
def test_uniform_attention_is_softmax_attention_with_zero_queries(dtype, case):
    """Zero queries give zero scores, so softmax spreads evenly: the same pattern and output."""
    softmax = case.architecture
    weights, tokens = case.arrays(dtype)
    zeroed = {
        path: torch.zeros_like(w) if path.endswith(("attn.W_Q", "attn.b_Q")) else w
        for path, w in weights.items()
    }
    uniform = nope.decoder(
        softmax.d_model,
        softmax.n_heads,
        n_layers=sum(path.endswith("W_O") for path in weights),
        d_ff=weights["blocks.0.mlp.W_in"].shape[-1],
        n_ctx=softmax.n_ctx,
        activation=case.activation,
        norm_position="pre" if case.norm_first else "post",
        attention="uniform",
        eps=case.eps,
        bias=case.bias,
    )
    for place in ("blocks.0.attn.pattern", "blocks.0.attn.z", case.output):
        found = transformer.evaluate(uniform, [place], tokens, lambda w: weights[w.path])[place]
        assert_equal_to_rounding(found, case.ours(place, zeroed, tokens))


@torch.no_grad()
def test_attention_places_are_what_their_names_say():
    """q, k, v, scores, pattern and z of one head, against the formulas written out with loops."""
    d_model, n_heads, n_ctx = 6, 2, 5
    architecture = nope.decoder(d_model, n_heads, n_ctx=n_ctx, norm_position="none", bias=True)
    case = Case(architecture, "gelu", True, True, 0.0, 0.7, seed=11)
    weights, tokens = case.arrays(torch.float64)
    names = [f"blocks.0.attn.{name}" for name in FIRST_PLACES]
    found = transformer.evaluate(architecture, names, tokens, lambda w: weights[w.path])
    q, k, v, scores, pattern, z = (found[name] for name in names)
    d_head = d_model // n_heads
    for draw in range(2):
        for head in range(n_heads):
            own = slice(head * d_head, (head + 1) * d_head)
            for name, value in zip("QKV", (q, k, v), strict=True):
                whole = tokens[draw] @ weights[f"blocks.0.attn.W_{name}"][0]
                whole = whole + weights[f"blocks.0.attn.b_{name}"][0]
                assert_equal_to_rounding(value[draw, head], whole[:, own])
            for m in range(n_ctx):
                logits = [
                    float(q[draw, head, m] @ k[draw, head, n]) / math.sqrt(d_head)
                    for n in range(m + 1)
                ]
                exponentials = torch.tensor([math.exp(x) for x in logits], dtype=torch.float64)
                expected = exponentials / exponentials.sum()
                assert_equal_to_rounding(
                    scores[draw, head, m, : m + 1], torch.tensor(logits, dtype=torch.float64)
                )
                assert_equal_to_rounding(pattern[draw, head, m, : m + 1], expected)
                mixed = expected @ v[draw, head, : m + 1]
                assert_equal_to_rounding(z[draw, m, own], mixed)


@DTYPES
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@torch.no_grad()
def test_norms_are_their_formulas(dtype, kind):
    """LayerNorm divides centred x by sqrt(var + eps), RMSNorm x by sqrt(mean square + eps)."""
    architecture = nope.decoder(8, 2, n_ctx=4, norm=kind, eps=1e-2)
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True) if kind == "layernorm" else x
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-2).sqrt()
    place = "blocks.0.ln1"
    found = transformer.evaluate(architecture, [place], x.to(dtype), lambda w: None)[place]
    assert_equal_to_rounding(found, expected.to(dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_cuda_agrees_with_the_cpu():
    """The same layers on a CUDA device give the same float64 numbers to rounding."""
    case = Case(nope.decoder(32, 4, 2, n_ctx=17, bias=True), "gelu", True, True, 0.0, 0.2, seed=1)
    weights, tokens = case.arrays(torch.float64)
    there = {path: w.cuda() for path, w in weights.items()}
    found = case.ours(case.output, there, tokens.cuda())
    assert_equal_to_rounding(found.cpu(), case.ours(case.output, weights, tokens))
