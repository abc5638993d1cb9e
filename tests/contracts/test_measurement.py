"""Every observable, sampler and engine against plain loops in NumPy."""

import itertools
import logging
import math
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from distributed import LocalCluster

import nope
from montecarlo import collapsed, engines
from montecarlo.observables import STATISTICS, Statistic
from montecarlo.sampler import Group
from montecarlo.testing import (
    EngineContract,
    ObservableContract,
    SamplerContract,
    contracts_in,
    uncovered,
)
from nope import plugins
from tests.contracts.test_layers import RandomBiases, affine

# ------------------------------------------------------------------------------ observables
# `draws` has x[m, coordinate] of each draw, or a[head, m, n], with positions from 0.


def is_pairs(x):
    return x.ndim == 3


def seen(x, m):
    """What a query or a position m has: its coordinates, or its keys n <= m in every head."""
    return x[:, m, : m + 1] if is_pairs(x) else x[m]


def power(draws, m, k):
    return np.mean([seen(x, m) ** k for x in draws])


def positions(question):
    return range(question.architecture.n_ctx)


def second_moment(draws, question):
    return [power(draws, m, 2) for m in positions(question)]


def mean_second_moment(draws, question):
    every = [np.concatenate([seen(x, m).ravel() for m in positions(question)]) for x in draws]
    return [np.mean([np.mean(row**2) for row in every])]


def coordinate_second_moment(draws, question):
    return np.mean([x[:2] ** 2 for x in draws], 0)


def kurtosis(draws, question):
    return [power(draws, m, 4) / power(draws, m, 2) ** 2 for m in positions(question)]


def participation(draws, question):
    rows = [[np.sum(seen(x, m) ** 2, 1).mean() for m in positions(question)] for x in draws]
    return np.mean(rows, 0)


def over_pairs(question, entry):
    return [[entry(m, n) for n in positions(question)] for m in positions(question)]


def kernel(draws, question):
    return over_pairs(question, lambda m, n: np.mean([x[m] @ x[n] / len(x[m]) for x in draws]))


def kernel_cosine(draws, question):
    K = np.array(kernel(draws, question))
    return over_pairs(question, lambda m, n: K[m, n] / math.sqrt(K[m, m] * K[n, n]))


def cos(x, y):
    return x @ y / math.sqrt((x @ x) * (y @ y))


def cosine(draws, question):
    return over_pairs(question, lambda m, n: np.mean([cos(x[m], x[n]) for x in draws]))


def cosine_steps(draws, question):
    C = np.array(cosine(draws, question))
    return [[row[n + 1] - row[n] for n in range(len(C) - 1)] for row in C]


def adjacent_cosine(draws, question):
    return [np.mean([cos(x[m], x[m + 1]) for x in draws]) for m in positions(question)[:-1]]


def adjacency_score(draws, question):
    """The share of j < k < i where k is closer to i."""
    triples = list(itertools.combinations(positions(question), 3))
    return [np.mean([cos(x[i], x[j]) < cos(x[i], x[k]) for x in draws for j, k, i in triples])]


def adjacency_steps(draws, question):
    steps = [(i, j) for i in positions(question) for j in range(i - 1)]
    return [np.mean([cos(x[i], x[j]) < cos(x[i], x[j + 1]) for x in draws for i, j in steps])]


def adjacency_norm(draws, question):
    pairs = list(itertools.combinations(positions(question), 2))
    return [np.mean([x[j] @ x[j] > x[k] @ x[k] for x in draws for j, k in pairs])]


def cdf(draws, question):
    last = [x[:, -1] if is_pairs(x) else x[-1] for x in draws]
    return [np.mean([np.mean(row <= point) for row in last]) for point in question.points]


def moves(pairs):
    """Whether two looks differ by more than a millionth of their size, in share of the draws."""
    found = []
    for one, two in pairs:
        size = math.sqrt(np.mean(np.sum(np.concatenate([one, two]) ** 2, 1)))
        found.append(np.linalg.norm(one - two, axis=1).max() > 1e-6 * size)
    return [np.mean(found)]


def past_permutation(draws, moved, question):
    return moves([(x[-1:], y[-1:]) for x, y in zip(draws, moved, strict=True)])


def permutation(draws, moved, question):
    return moves([(x[::-1], y) for x, y in zip(draws, moved, strict=True)])


def equal_tokens(draws, moved, question):
    return moves([(np.repeat(y[:1], len(y), 0), y) for y in moved])


PLAIN = {
    "second_moment": second_moment,
    "mean_second_moment": mean_second_moment,
    "coordinate_second_moment": coordinate_second_moment,
    "kurtosis": kurtosis,
    "participation": participation,
    "kernel": kernel,
    "kernel_cosine": kernel_cosine,
    "cosine": cosine,
    "cosine_steps": cosine_steps,
    "adjacent_cosine": adjacent_cosine,
    "adjacency_score": adjacency_score,
    "adjacency_score.steps": adjacency_steps,
    "adjacency_score.norm": adjacency_norm,
    "cdf": cdf,
    "past_permutation": past_permutation,
    "permutation": permutation,
    "equal_tokens": equal_tokens,
}
ATTRIBUTES = {
    "cdf": {"points": (-0.3, 0.1, 0.2, 2.0)},
    "participation": {"places": ("blocks.0.attn.pattern",)},
    "adjacency_score.norm": {"places": ("blocks.0.attn.q", "blocks.0.attn_out")},
}
"""Participation is of shares, which scores are not; behind a norm all norms tie."""
for name, plain in PLAIN.items():
    contract = ObservableContract.named(name, name=name, plain=plain, **ATTRIBUTES.get(name, {}))
    globals()[contract.__name__] = contract


class TestCdfWithAnAtom(ObservableContract):
    """Half of a ReLU's units lie at a point exactly."""

    name = "cdf"
    architecture = nope.decoder(6, 2, n_ctx=5, d_ff=7, activation="relu")
    places = ("blocks.0.mlp.post", "blocks.0.attn.scores")
    points = (-0.1, 0.0, 0.1)
    plain = staticmethod(cdf)


# --------------------------------------------------------------------------------- samplers


class Layer(SamplerContract):
    """A pre-norm block of softmax attention and an MLP."""

    layer = nope.Sequence(
        (
            nope.Residual(nope.Sequence((nope.Norm("ln1"), nope.Attention(2, bias=True))), "mid"),
            nope.Residual(nope.Sequence((nope.Norm("ln2"), nope.MLP(6, "relu"))), "post"),
        )
    )
    init = RandomBiases(0.3)

    def plain(self, x, weights):
        values = {"ln1": self.normed(x)}
        values |= {f"attn.{n}": affine(values["ln1"], weights, "attn", n.upper()) for n in "qkv"}
        heads = {n: np.split(values[f"attn.{n}"], 2, axis=1) for n in "qkv"}
        z = [self.attended(*parts) for parts in zip(*heads.values(), strict=True)]
        values["attn.z"] = np.concatenate(z, 1)
        values["attn_out"] = affine(values["attn.z"], weights, "attn", "O")
        values["mid"] = x + values["attn_out"]
        values["ln2"] = self.normed(values["mid"])
        values["mlp.pre"] = values["ln2"] @ weights["mlp.W_in"]
        values["mlp.post"] = np.maximum(values["mlp.pre"], 0)
        values["mlp_out"] = values["mlp.post"] @ weights["mlp.W_out"]
        return values | {"post": values["mid"] + values["mlp_out"]}

    def normed(self, x):
        return (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)

    def attended(self, q, k, v):
        rows = []
        for m in range(len(q)):
            shares = np.exp(k[: m + 1] @ q[m] / math.sqrt(q.shape[1]))
            rows.append(shares @ v[: m + 1] / shares.sum())
        return np.array(rows)


for name in collapsed.SAMPLERS:
    globals()[f"TestSampler_{name}"] = Layer.named(name, sampler=name)


class TestCollapsedUniformWeights(Layer):
    """What is not Gaussian is drawn itself."""

    sampler = "collapsed"
    init = nope.init.xavier_uniform()


@pytest.mark.parametrize("name", collapsed.SAMPLERS)
def test_no_draw_of_a_block_comes_twice(name):
    """Of a layer so wide that a block takes several chunks: streams go on from each to the next."""
    wide = Layer.named(name, sampler=name, d_model=48)()
    asked = nope.Question(wide.architecture, wide.init, wide.places[0], "kernel")
    group = Group.of(asked, wide.conditions)
    assert group.block_size > group.chunk_size()
    for place, values in wide.sampled(wide.places).items():
        largest = values.flatten(1).amax(1)
        assert len(largest.unique()) == group.block_size, place


# ----------------------------------------------------------------------------------- engines


class TestInProcess(EngineContract):
    name = "in-process"


class TestLocal(EngineContract):
    name = "local"
    workers = 2


class TestCluster(EngineContract):
    """Two Dask workers of this process."""

    name = "cluster"

    @contextmanager
    def start(self):
        options = {"processes": False, "dashboard_address": None, "silence_logs": logging.CRITICAL}
        with LocalCluster(n_workers=2, threads_per_worker=1, **options) as found:
            yield found.scheduler_address


# ------------------------------------------------------------------------------ the registries

CONTRACTS = [*contracts_in(globals()), *plugins.contracts()]


@pytest.mark.parametrize("kind", [ObservableContract, SamplerContract, EngineContract])
def test_everything_registered_has_a_contract(kind):
    assert len(list(kind.registered())) >= 3
    assert uncovered(kind, CONTRACTS) == []


def test_what_has_no_contract_is_named(monkeypatch):
    """An observable, a sampler and an engine that someone adds."""
    monkeypatch.setitem(STATISTICS, "mine", STATISTICS["kernel"])
    monkeypatch.setattr("montecarlo.testing.SAMPLERS", (*collapsed.SAMPLERS, "mine"))
    monkeypatch.setattr(engines, "NAMES", (*engines.NAMES, "mine"))
    for kind, entry in (
        (ObservableContract, "observable mine"),
        (SamplerContract, "sampler mine"),
        (EngineContract, "engine mine"),
    ):
        (line,) = uncovered(kind, CONTRACTS)
        assert line.startswith(f"expected a contract for {entry}, got none; subclass montecarlo")


# ------------------------------------------------------------------- contracts notice errors


def statistic(components, **combined):
    return Statistic(lambda x, question: components(x).square().mean(-1).unsqueeze(1), **combined)


class Stream(ObservableContract):
    """The second moment of the stream alone."""

    name = "second_moment"
    places = ("ln_final", "blocks.0.attn.scores")
    plain = staticmethod(second_moment)
    statistic = STATISTICS["second_moment"]


class Vectors(Stream):
    places = ("ln_final",)


NUMBER, UNIT = "test_it_is_the_plain_number", "test_each_draw_counts_by_itself"
ON_BOTH = "test_it_is_described_and_measured"


@pytest.mark.parametrize(
    ("contract", "changes", "caught"),
    [
        (Stream, {}, set()),
        (Vectors, {}, {ON_BOTH}),
        (Vectors, {"plain": lambda self, draws, question: 1.01 * np.ones(5)}, {NUMBER, ON_BOTH}),
        (Vectors, {"statistic": statistic(lambda x: x)}, {ON_BOTH}),
        (Vectors, {"statistic": statistic(lambda x: x, gradient=np.zeros_like)},
         {ON_BOTH, "test_the_gradient_is_that_of_the_value"}),
    ],
)  # fmt: skip
def test_a_wrong_observable_fails_in_the_check_that_is_about_it(contract, changes, caught):
    assert set(type("Held", (contract,), changes).failures()) == caught


def test_draws_that_meet_are_noticed(monkeypatch):
    """A statistic that takes its draws' mean away from each."""
    centred = statistic(lambda x: x - x.mean(0) * torch.tensor(1.0))
    monkeypatch.setitem(STATISTICS, "second_moment", centred)
    found = type("Held", (Vectors,), {"statistic": centred}).failures()
    assert {NUMBER, UNIT} <= set(found)


class Unscaled(Layer):
    """A layer without the scale of its logits."""

    sampler = "collapsed"

    def attended(self, q, k, v):
        return super().attended(q * math.sqrt(q.shape[1]), k, v)


def test_a_sampler_of_another_law_fails():
    found = Unscaled.failures()
    assert set(found) == {
        "test_the_law_is_that_of_the_simulation",
        "test_the_law_is_the_same_for_several_inputs",
    }


class LastBit(EngineContract):
    """As many draws, and one mean that is off by its last bit."""

    name = "in-process"

    def plain(self):
        for moments in super().plain():
            mean = moments.mean.copy()
            mean.flat[0] = np.nextafter(mean.flat[0], np.inf)
            yield replace(moments, mean=mean)


def test_an_engine_of_other_bits_fails():
    assert set(LastBit.failures()) == {"test_the_bits_are_those_of_a_plain_loop"}
