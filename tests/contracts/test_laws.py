"""Every law against its own density, and against draws of the layer it is the law of."""

import gc
import math

import numpy as np
import pytest
import sympy as sp
from scipy import special, stats

import nope
from nope import plugins
from nope.layers import Attention, Norm, Residual, Sequence
from nope.operations import Operation
from nope.testing import contracts_in, uncovered
from theory.laws import Family, Law
from theory.laws.places import vector_of
from theory.symbols import x
from theory.testing import LawContract

STD = 0.3


def question(place, *layers, d_model=8, n_ctx=3, init=None, tokens=None):
    """About a place of a few layers over tokens of unit variance."""
    network = nope.Architecture(
        d_model, n_ctx, tokens or nope.GaussianTokens(1.0), Sequence(layers)
    )
    return nope.Question(network, init or nope.init.normal(STD), place, "kurtosis")


def normed(x, eps=0.0):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps)


def maps(generator, size, *shape):
    """Fresh N(0, STD^2) matrices, one a draw."""
    return generator.normal(0, STD, (size, *shape))


LN = Norm("ln")


class TestTokens(LawContract):
    question = question("embed", tokens=nope.GaussianTokens(0.7))

    def plain(self, generator, size):
        return generator.normal(0, 0.7, size)


class TestRowsOfATable(TestTokens):
    question = question("embed", tokens=nope.EmbeddingTokens(3, 0.7))


class TestLayerNorm(LawContract):
    question = question("ln", LN)

    def plain(self, generator, size):
        return normed(generator.normal(size=(size, 8)))[:, 0]


class TestLayerNormWithEps(LawContract):
    question = question("ln", Norm("ln", eps=0.5))

    def plain(self, generator, size):
        return normed(generator.normal(size=(size, 8)), 0.5)[:, 0]


class TestLayerNormOfThree(LawContract):
    """Of a circle: the density is infinite at both ends."""

    question = question("ln", LN, d_model=3)
    rounding = 1e-5

    def plain(self, generator, size):
        return normed(generator.normal(size=(size, 3)))[:, 0]


class TestQueryOfANormedToken(LawContract):
    question = question("attn.q", LN, Attention(2))

    def plain(self, generator, size):
        x = normed(generator.normal(size=(size, 8)))
        return np.sum(x * maps(generator, size, 8), 1)


class TestQueryOfAToken(LawContract):
    """A sum of eight products of Gaussians."""

    question = question("attn.q", Attention(2))

    def plain(self, generator, size):
        return np.sum(generator.normal(size=(size, 8)) * maps(generator, size, 8), 1)


class TestQueryByUniformWeights(LawContract):
    question = question("attn.q", LN, Attention(2), init=nope.init.xavier_uniform(), d_model=32)

    def plain(self, generator, size):
        x = normed(generator.normal(size=(size, 32)))
        bound = math.sqrt(6 / 64)
        return np.sum(x * generator.uniform(-bound, bound, (size, 32)), 1)


class TestQueryByAHaarMatrix(LawContract):
    question = question("attn.q", LN, Attention(2), init=nope.init.orthogonal())

    def plain(self, generator, size):
        row = generator.normal(size=(size, 8))
        row /= np.linalg.norm(row, axis=1, keepdims=True)
        return np.sum(normed(generator.normal(size=(size, 8))) * row, 1)


class TestLogit(LawContract):
    """Of the first query and its only key: one head of width 4."""

    question = question("attn.scores", LN, Attention(2))
    position = 1

    def plain(self, generator, size):
        x = normed(generator.normal(size=(size, 8)))
        q, k = (np.einsum("ci,cia->ca", x, maps(generator, size, 8, 4)) for _ in "qk")
        return np.sum(q * k, 1) / 2


class TestPrefixMean(LawContract):
    question = question("mean", nope.CausalMean())

    def plain(self, generator, size):
        return generator.normal(size=(size, 3)).mean(1)


class TestUniformAttention(LawContract):
    question = question("attn.z", LN, Attention(2, "uniform"))

    def plain(self, generator, size):
        z = normed(generator.normal(size=(size, 3, 8))).mean(1)
        return np.sum(z * maps(generator, size, 8), 1)


class TestSoftmaxAttention(LawContract):
    question = question("attn.z", LN, Attention(1), d_model=32, init=nope.init.normal(0.1))

    def plain(self, generator, size):
        sigma, x = 0.1, normed(generator.normal(size=(size, 3, 32)))
        norm_and_direction = generator.normal(size=(size, 32)) * sigma * math.sqrt(32)
        towards = sigma * np.linalg.norm(norm_and_direction, axis=1) / math.sqrt(32)
        logits = towards[:, None] * np.einsum("cni,ci->cn", x, generator.normal(size=(size, 32)))
        a = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        z = np.einsum("cn,cni->ci", a, x)
        return np.sum(z * sigma * generator.normal(size=(size, 32)), 1)


class TestStreamAfterAttention(LawContract):
    layers = Residual(Sequence((LN, Attention(2, "uniform"))), "sum")
    question = question("sum", layers, d_model=16)

    def plain(self, generator, size):
        x = generator.normal(size=(size, 3, 16))
        v = np.einsum("ci,cij->cj", normed(x).mean(1), maps(generator, size, 16, 16))
        return x[:, -1, 0] + np.sum(v * maps(generator, size, 16), 1)


PHI = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * special.ndtr(x),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x * special.expit(x),
    "tanh": np.tanh,
    "erf": special.erf,
    "identity": lambda x: x,
}
GATES = {"reglu": "relu", "geglu": "gelu", "swiglu": "silu"}


class HiddenUnit(LawContract):
    function = "relu"

    def plain(self, generator, size):
        x = normed(generator.normal(size=(size, 8)))
        return PHI[self.function](np.sum(x * maps(generator, size, 8), 1))


class GatedUnit(HiddenUnit):
    def plain(self, generator, size):
        x = normed(generator.normal(size=(size, 8)))
        gate, unit = (np.sum(x * maps(generator, size, 8), 1) for _ in "gu")
        return PHI[GATES[self.function]](gate) * unit


for name in nope.layers.ACTIVATIONS:
    globals()[f"Test_{name}"] = (GatedUnit if name in GATES else HiddenUnit).named(
        name, function=name, question=question("mlp.post", LN, nope.MLP(5, name))
    )


CONTRACTS = [*contracts_in(globals()), *plugins.contracts()]


def test_every_law_has_a_contract():
    """Operations whose vectors' laws are known, and the distributions these come to."""
    assert len(list(LawContract.registered())) > 10
    assert uncovered(LawContract, CONTRACTS) == []


def test_an_operation_without_a_contract_is_named(monkeypatch):
    (registry,) = gc.get_referents(vector_of.registry)  # the dictionary behind the proxy
    monkeypatch.setitem(registry, Operation, lambda operation, network: None)
    assert uncovered(LawContract, CONTRACTS) == [
        "expected a contract for law of Operation, got none; subclass "
        "theory.testing.LawContract with its `plain`"
    ]


FOLLOWS, MOMENTS = "test_the_simulation_follows_the_law", "test_the_simulation_has_its_moments"
NORMAL = stats.norm(scale=0.7)


def wrong(**changes):
    """The law of tokens, N(0, 0.7^2), with another family."""
    return {"law": Law("embed", 1, Family("wrong", NORMAL, **changes), 0.0, "here")}


@pytest.mark.parametrize(
    ("changes", "caught"),
    [
        ({}, set()),
        ({"plain": lambda self, generator, size: generator.normal(0, 0.65, size)},
         {FOLLOWS, MOMENTS}),
        ({"plain": lambda self, generator, size: generator.normal(0, 0.682, size)}, {MOMENTS}),
        ({"plain": lambda self, generator, size: generator.normal(0, 0.7, 10)},
         {FOLLOWS, MOMENTS}),
        ({"plain": lambda self, generator, size: generator.uniform(-1.2, 1.2, size)},
         {FOLLOWS, MOMENTS}),
        (wrong(density=sp.exp(-(x**2))), {"test_the_symbols_say_the_same"}),
        (wrong(), {"test_the_symbols_say_the_same"}),
        (wrong(reason="none", moments={2: sp.Rational(1, 2)}), {"test_the_symbols_say_the_same"}),
        (wrong(reason="none", atoms={0.0: 0.1}),
         {"test_the_density_has_mass_one",
          "test_the_distribution_function_is_the_density_summed"}),
    ],
)  # fmt: skip
def test_a_wrong_law_fails_in_the_check_that_is_about_it(changes, caught):
    assert set(type("Held", (TestTokens,), changes).failures()) == caught
