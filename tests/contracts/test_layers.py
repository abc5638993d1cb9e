"""Every layer kind, operation and token model: torch modules and kernel rules, held to NumPy.

A simulation is written once, one draw at a time and from the definition.  `LayerContract` holds
the torch modules to it, to rounding; `KernelContract` the kernel rules and the symmetries, by many
draws.  What a plugin registers is held by the contracts that it brings.
"""

import gc
import math
import sys
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import sympy as sp
import torch
from scipy import special

import nope
import theory
from nope import plugins
from nope.contracts import NAMED
from nope.layers import NORMS
from nope.operations import Average, Operation
from nope.testing import LayerContract, contracts_in, uncovered
from nope.tokens import TextTokens
from nope.transformer import apply
from theory.kernel import K, Rule, Traits
from theory.rules import rule_for
from theory.symbols import m, n
from theory.testing import KernelContract

ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * special.ndtr(x),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "erf": special.erf,
    "identity": lambda x: x,
}
GATES = {"reglu": "relu", "geglu": "gelu", "swiglu": "silu"}

# ------------------------------------------------------------------------------- simulations


@dataclass(frozen=True)
class RandomBiases:
    """Every weight N(0, std^2), the biases too: those of attention are 0 by all of `nope.init`."""

    std: float

    def law(self, weight, architecture):
        return nope.init.Normal(self.std)


def affine(x, weights, prefix, suffix):
    """x W + b, where there is a b."""
    return x @ weights[f"{prefix}.W_{suffix}"] + weights.get(f"{prefix}.b_{suffix}", 0.0)


def normed(x, kind, eps):
    """Each row less its mean (of a LayerNorm), over the root of its mean square."""
    rows = [row - np.mean(row) if kind == "layernorm" else row for row in x]
    return np.array([row / math.sqrt(sum(row**2) / len(row) + eps) for row in rows])


def prefix_means(x):
    return np.array([x[: m + 1].mean(0) for m in range(len(x))])


class Own:
    """A layer, which may stand behind another in a sequence."""

    @property
    def own(self):
        return getattr(self.layer, "layers", (self.layer,))[-1]


class LayerNorm(Own):
    layer = nope.Norm("ln")

    def plain(self, x, weights):
        return {"ln": normed(x, self.own.kind, self.own.eps)}


class LayerNormWithEps(LayerNorm):
    layer = nope.Norm("ln", eps=0.3)


class RMSNorm(LayerNorm):
    layer = nope.Norm("ln", "rmsnorm")


class RMSNormWithEps(LayerNorm):
    layer = nope.Norm("ln", "rmsnorm", eps=0.3)


class Attention(Own):
    """Each query of each head, with a softmax over the keys it sees."""

    layer = nope.Attention(2)
    init = nope.init.normal(0.25)
    d_model = 32
    draws_drawn = 8000
    widest = 0.25  # a logit of a token without a norm and itself: 4/d

    def plain(self, x, weights):
        q, k, v = (affine(x, weights, "attn", letter) for letter in "QKV")
        heads = [np.split(part, self.own.n_heads, axis=1) for part in (q, k)]
        logits = [a @ b.T / math.sqrt(a.shape[1]) for a, b in zip(*heads, strict=True)]
        scores = np.array([self.masked(each) for each in logits])
        pattern = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        before = {"attn.q": q, "attn.k": k, "attn.v": v, "attn.scores": scores}
        return before | self.mixed(pattern, v, weights)

    def masked(self, logits):
        """-inf where the key n is later than the query m."""
        later = np.array([[n > m for n in range(len(logits))] for m in range(len(logits))])
        return np.where(later & self.own.causal, -np.inf, logits)

    def mixed(self, pattern, v, weights):
        split = np.split(v, self.own.n_heads, axis=1)
        z = np.concatenate([a @ head for a, head in zip(pattern, split, strict=True)], axis=1)
        return {"attn.pattern": pattern, "attn.z": z, "attn_out": affine(z, weights, "attn", "O")}


class AttentionWithRandomBiases(Attention):
    layer = nope.Attention(4, bias=True)
    init = RandomBiases(0.15)


class AttentionBehindANorm(Attention):
    """Nothing is dropped of a logit's variance."""

    layer = nope.Sequence((nope.Norm("ln"), nope.Attention(2)))
    d_model = 16
    draws_drawn = 5000
    widest = 0.12

    def plain(self, x, weights):
        e = normed(x, "layernorm", 0.0)
        return {"ln": e, **super().plain(e, weights)}


def weights_for(s2, d=16):
    """Weights that make logits of this variance behind a norm, s^2 = d^2 sigma^4."""
    return nope.init.normal(s2**0.25 / d**0.5)


class AttentionTakenAsUniform(AttentionBehindANorm):
    fidelity = "uniform"
    init = weights_for(0.04)


class AttentionToFirstOrder(AttentionBehindANorm):
    fidelity = "first_order"
    init = weights_for(0.2)


class AttentionAtAnyTemperature(AttentionBehindANorm):
    fidelity = "any_temperature"


class AttentionWithoutAMask(Attention):
    layer = nope.Attention(2, causal=False)
    causal = predicted = False


class UniformAttention(Attention):
    layer = nope.Attention(2, "uniform", bias=True)
    init = RandomBiases(0.25)

    def plain(self, x, weights):
        v = affine(x, weights, "attn", "V")
        seen = self.masked(np.zeros((len(x), len(x)))) == 0
        pattern = np.array([seen / seen.sum(1, keepdims=True)] * self.own.n_heads)
        return {"attn.v": v} | self.mixed(pattern, v, weights)


class UniformAttentionWithoutAMask(UniformAttention):
    layer = nope.Attention(2, "uniform", causal=False)
    causal = predicted = False


class CausalMean:
    layer = nope.CausalMean()

    def plain(self, x, weights):
        return {"mean": prefix_means(x)}


class MLP(Own):
    """Of an activation; `GatedMLP` of a gate."""

    draws_drawn = 4000

    def plain(self, x, weights):
        return self.hidden(self.own, x, weights)

    def hidden(self, layer, x, weights):
        pre = affine(x, weights, "mlp", "in")
        post = ACTIVATIONS[layer.activation](pre)
        return {"mlp.pre": pre, "mlp.post": post, "mlp_out": affine(post, weights, "mlp", "out")}


class GatedMLP(Own):
    d_model = 32
    draws_drawn = 14_000  # products of hidden units have heavy tails
    widest = 0.16

    def plain(self, x, weights):
        pre, linear = (affine(x, weights, "mlp", suffix) for suffix in ("gate", "in"))
        gate = ACTIVATIONS[GATES[self.own.activation]](pre)
        values = {"mlp.pre": pre, "mlp.pre_linear": linear, "mlp.gate": gate}
        values["mlp.post"] = gate * linear
        return values | {"mlp_out": affine(values["mlp.post"], weights, "mlp", "out")}


class Residual(MLP):
    layer = nope.Residual(nope.MLP(11, "tanh"), "sum", 0.5)

    def plain(self, x, weights):
        values = self.hidden(self.own.branch, x, weights)
        return values | {"sum": x + values["mlp_out"] / 2}


class Sequence:
    layer = nope.Sequence((nope.CausalMean("one"), nope.CausalMean("two")), "twice")

    def plain(self, x, weights):
        one = prefix_means(x)
        return {"twice.one": one, "twice.two": prefix_means(one)}


class GaussianTokens:
    """Tokens alone, of no layer: what their draw stands for."""

    tokens = nope.GaussianTokens(0.5)

    def plain(self, x, weights):
        return {}


class EmbeddingTokens(GaussianTokens):
    tokens = nope.EmbeddingTokens(7, 0.5, exponent=1.0)

    def embed(self, drawn, weights):
        return np.array([weights["embed.W_E"][token] for token in drawn])


class Text(EmbeddingTokens):
    tokens = TextTokens()


class TextInCharacters(EmbeddingTokens):
    tokens = TextTokens(unit="characters")


class TokensAfterABos(GaussianTokens):
    tokens = nope.WithBos(nope.EmbeddingTokens(7))

    def embed(self, drawn, weights):
        rows = [weights["embed.W_E"][token] for token in drawn]
        return np.array([weights["embed.bos"][0], *rows])


class GaussianTokensAfterABos(GaussianTokens):
    tokens = nope.WithBos(nope.GaussianTokens(0.5))

    def embed(self, drawn, weights):
        return np.vstack([weights["embed.bos"], drawn])


def of_activation(base, name):
    bias = name in ("gelu", "swiglu")
    init = {"init": RandomBiases(0.4)} if bias else {}
    return type(f"MLP_{name}", (base,), {"layer": nope.MLP(11, name, bias)} | init)


SIMULATIONS = [
    LayerNorm,
    LayerNormWithEps,
    RMSNorm,
    RMSNormWithEps,
    Attention,
    AttentionBehindANorm,
    AttentionTakenAsUniform,
    AttentionToFirstOrder,
    AttentionAtAnyTemperature,
    AttentionWithRandomBiases,
    AttentionWithoutAMask,
    UniformAttention,
    UniformAttentionWithoutAMask,
    CausalMean,
    *(of_activation(MLP, name) for name in ACTIVATIONS),
    *(of_activation(GatedMLP, name) for name in GATES),
    Residual,
    Sequence,
    GaussianTokens,
    EmbeddingTokens,
    Text,
    TextInCharacters,
    TokensAfterABos,
    GaussianTokensAfterABos,
]


def behind_a_mean(simulation):
    """Prefix means in place of tokens: a layer that acts on each position alone is told more than
    a diagonal kernel, of whose other entries any multiple is right."""

    class Behind(simulation):
        layer = nope.Sequence((nope.CausalMean("means"), simulation.layer))

        def plain(self, x, weights):
            means = prefix_means(x)
            return {"means": means, **super().plain(means, weights)}

    return Behind


for simulation in SIMULATIONS:
    alone = issubclass(simulation, LayerNorm | MLP | GatedMLP)
    of_kernel = behind_a_mean(simulation) if alone else simulation
    for kind, base in ((LayerContract, simulation), (KernelContract, of_kernel)):
        name = f"Test{simulation.__name__}{kind.__name__}"
        globals()[name] = type(name, (base, kind), {})

# ---------------------------------------------------------------------------- the registries

CONTRACTS = [*contracts_in(globals()), *plugins.contracts()]


@pytest.mark.parametrize("kind", [LayerContract, KernelContract])
def test_everything_registered_has_a_contract(kind):
    """Layers, tokens, operations, their kernel rules and symmetries, of plugins too."""
    assert len(list(kind.registered())) > 10
    assert uncovered(kind, CONTRACTS) == []


@pytest.mark.parametrize(
    "contract", [each for each in CONTRACTS if issubclass(each, LayerContract)]
)
def test_no_weight_of_a_contract_is_zero(contract):
    """A layer that forgets it would be held to nothing."""
    _, weights = next(contract().draws(1))
    assert [path for path, array in weights.items() if not array.all()] == []


@dataclass(frozen=True)
class Triple(Operation):
    """An operation without a contract."""


def test_an_operation_without_a_contract_is_named(monkeypatch):
    """The suite fails with the name and what to do, for each registry that it is in."""
    for dispatched, kind, entry in (
        (apply, LayerContract, f"operation {__name__}.Triple"),
        (rule_for, KernelContract, f"kernel rule of {__name__}.Triple"),
    ):
        (registry,) = gc.get_referents(dispatched.registry)  # the dictionary behind the proxy
        monkeypatch.setitem(registry, Triple, lambda *arguments: None)
        assert uncovered(kind, CONTRACTS) == [
            f"expected a contract for {entry}, got none; subclass "
            f"{kind.__module__}.{kind.__name__} with its `plain`"
        ]


def test_a_kind_without_a_contract_is_named(monkeypatch):
    """A layer that is several by name is covered under each name."""
    monkeypatch.setitem(NAMED, nope.Norm, ("kind", (*NORMS, "batchnorm")))
    (line,) = uncovered(LayerContract, CONTRACTS)
    assert line.startswith("expected a contract for layer Norm batchnorm, got none")


# ---------------------------------------------------------------------- contracts notice errors


class Scaled(UniformAttention):
    """One of its places is off."""

    factor = 1.0

    def plain(self, x, weights):
        values = super().plain(x, weights)
        return values | {"attn.z": self.factor * values["attn.z"]}


@dataclass(frozen=True)
class Unfaithful(nope.CausalMean):
    """A layer whose name is not what its repr says."""

    def __repr__(self):
        return "Unfaithful('other')"


@dataclass(frozen=True)
class NoRule(nope.CausalMean):
    """A layer of an operation that has no torch module."""

    def operations(self, scope, source):
        yield Triple(scope.place("mean"), (source,))


def held(kind, *simulations, **attributes):
    return type("Held", (*simulations, kind), attributes)


PLACE, SINGLE, LATER = (
    "test_every_place_is_the_plain_one",
    "test_every_place_is_the_plain_one_in_float32",
    "test_later_positions_are_seen_only_without_a_mask",
)


@pytest.mark.parametrize(
    ("contract", "caught"),
    [
        (held(LayerContract, Scaled), set()),
        (held(LayerContract, Scaled, factor=1 + 1e-9), {PLACE}),
        (held(LayerContract, UniformAttentionWithoutAMask, causal=True), {LATER}),
        (held(LayerContract, CausalMean, causal=False), {LATER}),
        (held(LayerContract, CausalMean, layer=Unfaithful()),
         {"test_the_layer_survives_repr_and_pickle"}),
        (held(LayerContract, MLP, layer=nope.CausalMean(), plain=lambda *_: {}),
         {"test_plain_gives_every_place", PLACE, SINGLE}),
        (held(KernelContract, CausalMean, plain=lambda self, x, w: {"mean": 1.1 * prefix_means(x)}),
         {"test_kernels_are_those_of_the_simulation", "test_sizes_are_those_of_the_simulation"}),
        (held(KernelContract, CausalMean, plain=lambda self, x, w: {"mean": x.cumsum(0)}),
         {"test_kernels_are_those_of_the_simulation", "test_sizes_are_those_of_the_simulation",
          "test_symmetries_are_those_of_the_simulation", "test_the_simulation_can_tell"}),
        (held(KernelContract, CausalMean,
              plain=lambda self, x, w: {"mean": 1.016 * prefix_means(x)}),
         {"test_sizes_are_those_of_the_simulation"}),
        (held(KernelContract, CausalMean, predicted=False), {"test_every_place_has_a_kernel"}),
    ],
)  # fmt: skip
def test_a_contract_fails_in_the_check_that_is_about_it(contract, caught):
    assert set(contract.failures()) == caught


@dataclass(frozen=True)
class Halved(Operation):
    """x/2."""


@dataclass(frozen=True)
class Half:
    """A layer of that operation."""

    def operations(self, scope, source):
        yield Halved(scope.place("half"), (source,))


class Halves(Own):
    layer = nope.Sequence((nope.CausalMean("means"), Half()))

    def plain(self, x, weights):
        means = prefix_means(x)
        return {"means": means, "half": means / 2}


class HalvesAlone(Halves):
    layer = Half()

    def plain(self, x, weights):
        return {"half": x / 2}


def keeps(passage):
    return passage.fluctuations[0], None


KERNEL, SIZES = (
    "test_kernels_are_those_of_the_simulation",
    "test_sizes_are_those_of_the_simulation",
)
BESIDE, TRAITS = (
    "test_cosines_and_kurtoses_are_those_of_the_simulation",
    "test_traits_are_those_of_the_simulation",
)
DIAGONAL = {"expression": sp.Piecewise((K(m, n) / 4, sp.Eq(m, n)), (0, True))}


@pytest.mark.parametrize(
    ("simulation", "changes", "caught"),
    [
        (Halves, {}, set()),
        (Halves, {"expression": K(m, n) / 2}, {KERNEL, SIZES}),
        (Halves, DIAGONAL, {KERNEL, BESIDE}),
        (HalvesAlone, DIAGONAL, {"test_positions_are_correlated"}),
        (Halves, {"excess": sp.Rational(1, 2)}, {BESIDE}),
        (Halves, {"traits": Traits(kurtosis=sp.Integer(30))}, {BESIDE}),
        (Halves, {"traits": Traits(fresh=True)}, {TRAITS}),
        (Halves, {"traits": Traits(normalised=True)}, {TRAITS}),
    ],
    ids=["right", "kernel", "off the diagonal", "nothing off the diagonal", 
         "excess", "kurtosis", "fresh", "normalised"],
)  # fmt: skip
def test_a_wrong_rule_fails_in_the_check_that_is_about_it(simulation, changes, caught, monkeypatch):
    """Of its kernel, and of what it says beside it."""

    def rule(operation, known, fidelity):
        right = {"expression": K(m, n) / 4, "traits": Traits(), "fluctuates": keeps}
        said = {"sources": operation.inputs, "assumption": "none", "source": "definition"}
        return Rule("halved", "x/2.", **{**said, **right, **changes})

    (registry,) = gc.get_referents(rule_for.registry)  # the dictionary behind the proxy
    monkeypatch.setitem(registry, Halved, rule)
    for keeps_the_rule_before in (rule_for._clear_cache, theory.predict.cache_clear):
        keeps_the_rule_before()
    assert set(held(KernelContract, simulation).failures()) == caught


def test_check_runs_without_pytest():
    """`check` runs every inherited check and raises what the first failure raises."""
    held(LayerContract, RMSNorm).check()
    with pytest.raises(AssertionError, match=r"expected attn\.z"):
        held(LayerContract, Scaled, factor=2.0).check()
    with pytest.raises(NotImplementedError, match="to have a `plain`"):
        LayerContract.check()
    with pytest.raises(NotImplementedError, match="no torch layer for Triple"):
        held(LayerContract, CausalMean, layer=NoRule()).check()


# ------------------------------------------------------------- contracts of layers notice errors


class LeakingBranch(UniformAttentionWithoutAMask):
    """Every place but the last sees later positions."""

    layer = nope.Residual(nope.Attention(2, "uniform", causal=False), "sum", 0.0)
    causal = True

    @property
    def own(self):
        return self.layer.branch

    def plain(self, x, weights):
        return super().plain(x, weights) | {"sum": x}


class OneToken(EmbeddingTokens):
    tokens = nope.EmbeddingTokens(1)


VACUOUS = {
    "one position": (CausalMean, {"n_ctx": 1}, "at least two drawn positions, got 1"),
    "a BOS and a position": (TokensAfterABos, {"n_ctx": 2}, "at least two drawn positions, got 1"),
    "one token": (OneToken, {}, "tokens that differ between draws"),
    "a word": (CausalMean, {"causal": "no"}, "causal to be True or False, got 'no'"),
    "none": (CausalMean, {"causal": None}, "causal to be True or False, got None"),
    "a number": (CausalMean, {"causal": 1}, "causal to be True or False, got 1"),
    "an inner place": (LeakingBranch, {}, "no place to see later positions, got"),
}


@pytest.mark.parametrize(("simulation", "given", "words"), VACUOUS.values(), ids=VACUOUS)
def test_causality_is_never_said_of_nothing(simulation, given, words):
    found = held(LayerContract, simulation, **given).failures()
    assert set(found) == {LATER}
    assert words in str(found[LATER])


@pytest.fixture
def module(monkeypatch):
    """Registers another torch module for a kind of operation."""

    def register(operation, module):
        (registry,) = gc.get_referents(apply.registry)
        monkeypatch.setitem(registry, operation, module)
        apply._clear_cache()

    yield register
    monkeypatch.undo()
    apply._clear_cache()


def test_what_a_bos_holds_does_not_see_the_tokens(module):
    """The cut before the first drawn token: with other tokens the first position is the same."""

    def leaking(operation, inputs, weights):
        x = inputs[0]
        first = x[:, :1] + x[:, 1:2]
        return torch.cat([first, x[:, 1:]], 1)

    module(Average, leaking)
    found = held(LayerContract, GaussianTokensAfterABos, layer=nope.CausalMean()).failures()
    assert "('mean', 1)" in str(found[LATER])
    assert "('mean', 2)" not in str(found[LATER])


def test_what_is_wrong_in_float32_alone_fails(module):
    right = apply.dispatch(Average)

    def wrong(operation, inputs, weights):
        found = right(operation, inputs, weights)
        return found if found.element_size() == 8 else 1.001 * found

    module(Average, wrong)
    assert set(held(LayerContract, CausalMean).failures()) == {SINGLE}


def test_what_is_in_another_precision_fails(module):
    right = apply.dispatch(Average)
    module(Average, lambda *given: right(*given).double())
    assert set(held(LayerContract, CausalMean).failures()) == {SINGLE}


def wrongly_plain(x):
    return {
        "a missing place": ({}, "expected `plain` to give ['mean'], got []"),
        "a misspelt place": ({"maen": x}, "got ['maen']; mend ['maen', 'mean']"),
        "the tokens": ({"mean": x, "embed": x}, "got ['embed', 'mean']; mend ['embed']"),
        "a list": ([x], "to give arrays by place, got list; return a dictionary"),
        "complex numbers": ({"mean": x + 0j}, "expected real numbers of mean, got complex128"),
        "words": ({"mean": x.astype(str)}, "expected real numbers of mean, got <U"),
        "nothing": ({"mean": None}, "expected real numbers of mean, got object"),
        "a ragged list": ({"mean": [[1.0], [1.0, 2.0]]}, "expected numbers of mean, got "),
        "nan": ({"mean": x + math.nan}, "expected `plain` finite or -inf at mean, got nan"),
        "inf": ({"mean": x + math.inf}, "expected `plain` finite or -inf at mean, got inf"),
    }  # fmt: skip


@pytest.mark.parametrize("case", wrongly_plain(np.ones((5, 8))))
@pytest.mark.parametrize("kind", [LayerContract, KernelContract])
def test_plain_gives_numbers_at_the_places_and_no_others(kind, case):
    value, words = wrongly_plain(np.ones((5, 8)))[case]
    contract = held(kind, CausalMean, plain=lambda *_: value)
    with pytest.raises(AssertionError) as told:
        contract().values(*next(contract().draws(1)))
    assert words in str(told.value)


def test_tensors_are_converted():
    plain = {"plain": lambda _, x, weights: {"mean": torch.from_numpy(prefix_means(x))}}
    assert held(LayerContract, CausalMean, **plain).failures() == {}


# --------------------------------------------------------------------- names are of one package

NAMESAKES = """
from dataclasses import dataclass
from nope import layers, operations
from nope.transformer import apply
@dataclass(frozen=True)
class Average(operations.Operation):
    pass
@dataclass(frozen=True)
class CausalMean:
    def operations(self, scope, source):
        yield Average(scope.place("mean"), (source,))
@apply.register
def _(operation: Average, inputs, weights):
    return 2 * inputs[0]
"""


def test_a_plugin_is_not_covered_by_our_classes_of_its_names(monkeypatch):
    """Neither its operation nor its layer."""
    namesakes = ModuleType("namesakes")
    monkeypatch.setitem(sys.modules, "namesakes", namesakes)
    (registry,) = gc.get_referents(apply.registry)
    monkeypatch.setattr(plugins, "layers", lambda: (plugins.Plugin("", "", "", namesakes),))
    exec(NAMESAKES, vars(namesakes))
    try:
        found = [
            line.split(" for ")[1].split(",")[0] for line in uncovered(LayerContract, CONTRACTS)
        ]
    finally:
        del registry[namesakes.Average]
        apply._clear_cache()
    assert found == ["operation namesakes.Average", "layer namesakes.CausalMean"]
