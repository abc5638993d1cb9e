"""A softmax over repeated tokens: quadrature, enumerated kernels, sampled and measured layers."""

import itertools
import math

import numpy as np
import pytest

import montecarlo
import nope
import theory
from nope.tokens import EmbeddingTokens, TextTokens, WithBos
from theory.formulas.logits import Logits
from theory.formulas.softmax import Participation
from theory.formulas.tokens import collision_matrix, sample_ids
from theory.rules.mixing import Mixing, Prefixed, first_order_change
from theory.rules.mixing import any_temperature as of_mean_kernels
from theory.rules.repetition import (
    Attention,
    CopyTransforms,
    Window,
    any_temperature,
    first_order,
    gauss_rule,
)

Z = 5.0
WIDE = Logits()
IDS = np.array([0, 0, 1, 0, 2, 1, 3, 3, 0, 2])


def window(ids, spread, correlation=0.0, logits=WIDE):
    attention = Attention(spread**2, correlation, logits)
    copies = np.unique(ids, return_counts=True)[1].max()
    spreads, _ = attention.temperatures()
    return Window(
        ids, attention, [CopyTransforms(float(s), len(ids), copies, logits) for s in spreads]
    )


# -------------------------------------------------------------------------- given the ids


def weight_of_first(counts, spread, power):
    """E A_1^power and E A_2^power of two tokens with c_1 and c_2 copies, by a trapezoidal rule."""
    points = np.linspace(-12, 12, 4001)
    weights = np.exp(-(points**2) / 2)
    one, two = counts
    first = one / (one + two * np.exp(math.sqrt(2) * spread * points))
    return np.array([(first**power * weights).sum(), ((1 - first) ** power * weights).sum()]) / (
        weights.sum()
    )


@pytest.mark.parametrize("spread", [0.05, 1.0, 2.5])
def test_weights_of_two_tokens_by_quadrature(spread):
    """E A_v and E sum A_v^2 of every prefix."""
    ids = np.array([0, 1, 0, 0, 0, 1, 0, 0])
    weights, squares, _ = window(ids, spread).means
    for end in range(2, len(ids) + 1):
        counts = [(ids[:end] == v).sum() for v in (0, 1)]
        assert np.abs(weights[end - 1] - weight_of_first(counts, spread, 1)).max() < 1e-9
        assert abs(squares[end - 1] - weight_of_first(counts, spread, 2).sum()) < 1e-9


@pytest.mark.parametrize("logits", [WIDE, Logits(3, 5), Logits(4, 6, slack=1.0)])
def test_weights_add_up_to_one(logits):
    """E sum_v A_v = 1 at every prefix, at any width."""
    weights, _, _ = window(IDS, 1.5, logits=logits).means
    assert np.abs(weights.sum(1) - 1).max() < 1e-9


def test_distinct_tokens_have_the_participation_of_distinct_keys():
    """A(m, s), by the quadrature for exchangeable keys."""
    _, squares, _ = window(np.arange(9), 1.3).means
    assert np.abs(squares - Participation.numbers(np.arange(1.0, 10), 1.3)).max() < 1e-9


def tokens_of(rng, count, kinds, d_model, fixed_norm):
    """A table for each draw; on the sphere of a LayerNorm, or Gaussian."""
    rows = rng.standard_normal((count, kinds, d_model))
    if fixed_norm:
        rows -= rows.mean(2, keepdims=True)
        rows *= math.sqrt(d_model) / np.linalg.norm(rows, axis=2, keepdims=True)
    return rows


def sampled_kernel(ids, spread, d_model, d_h, fixed_norm, draws, seed):
    """sum_vw A_v A_w <e_v, e_w>/d of a real head, over tables, W_Q and W_K; mean and error."""
    rng = np.random.default_rng(seed)
    kinds = ids.max() + 1
    counts = np.eye(kinds)[ids].cumsum(0)
    total, square, count = 0.0, 0.0, 1000
    for _ in range(draws // count):
        rows = tokens_of(rng, count, kinds, d_model, fixed_norm)
        maps = rng.standard_normal((2, count, d_model, d_h)) / math.sqrt(d_model)
        queries, keys = rows @ maps[0], rows @ maps[1]
        logits = spread * queries @ keys.transpose(0, 2, 1) / math.sqrt(d_h)
        weights = counts * np.exp(logits[:, ids])
        weights /= weights.sum(2, keepdims=True)
        gram = rows @ rows.transpose(0, 2, 1) / d_model
        found = weights @ gram @ weights.transpose(0, 2, 1)
        total, square = total + found.sum(0), square + (found**2).sum(0)
    mean = total / draws
    return mean, np.sqrt((square / draws - mean**2) / draws)


@pytest.mark.parametrize(
    ("fixed_norm", "d_model", "d_h"), [(True, 9, 4), (True, 33, 16), (False, 12, 4)]
)
def test_one_query_is_exact_at_finite_width(fixed_norm, d_model, d_h):
    """The diagonal, for a table, W_Q and W_K of any width: five standard errors.

    A LayerNorm makes d - 1 the dimension of the keys.  A Gaussian query's own norm is shared by
    the key of its token, which one query of a window does not see: left out there.
    """
    mean, error = sampled_kernel(IDS, 1.0, d_model, d_h, fixed_norm, 50_000, seed=d_model)
    logits = Logits(d_h, d_model - fixed_norm, 1.0 - fixed_norm)
    found = np.diagonal(window(IDS, 1.0, logits=logits).kernel[0])
    slack = 0 if fixed_norm else 0.1 / d_model
    assert (np.abs(found - np.diagonal(mean)) <= Z * np.diagonal(error) + 1e-9 + slack).all()


@pytest.mark.parametrize("spread", [0.5, 1.0, 1.6])
def test_two_queries_are_within_the_remainder(spread):
    """Wide keys, heads of 8: what is not exact is stated, and is less than 5% of the scale."""
    mean, error = sampled_kernel(IDS, spread, 256, 8, True, 8_000, seed=4)
    logits = Logits(8, 255)
    found, dropped = window(IDS, spread, logits=logits).kernel
    assert (np.abs(found - mean) <= dropped + Z * error + 2 * spread**2 / 255).all()
    root = np.sqrt(np.diagonal(found))
    assert (dropped <= 0.05 * np.outer(root, root)).all()


@pytest.mark.parametrize("fixed_norm", [True, False])
def test_the_fluctuation_by_enumerated_kernels(fixed_norm):
    """N + eps F with signs for F, every pattern: eps^2 times the two parts, exactly.

    By the first order for arbitrary kernels, whose queries do not fluctuate here.
    """
    ids, eps = np.array([0, 0, 1, 0, 2, 2]), 0.3
    pairs = [(0, 1), (0, 2), (1, 2)]
    own = [] if fixed_norm else [(0, 0), (1, 1), (2, 2)]
    same = np.eye(3)[np.ix_(ids, ids)]

    def change(kernel):
        prefixed = Prefixed(kernel[np.ix_(ids, ids)])
        return first_order_change(prefixed, prefixed, same)

    total, patterns = 0.0, list(itertools.product((-1, 1), repeat=len(pairs + own)))
    for signs in patterns:
        kernel = np.eye(3)
        for (v, w), sign in zip(pairs + own, signs, strict=True):
            kernel[v, w] = kernel[w, v] = (v == w) + eps * sign * math.sqrt(1 + (v == w))
        total = total + change(kernel) / len(patterns)
    equal, any_two = window(ids, 1.0, logits=Logits(8, eps**-2, 1.0 - fixed_norm)).fluctuation
    assert np.abs(same * equal + any_two - (total - change(np.eye(3)))).max() < 1e-12


@pytest.mark.parametrize("correlation", [0.0, 0.4])
def test_all_temperatures_agree_with_the_first_order_as_logits_vanish(correlation):
    """Halving s^2 quarters what lies between them."""
    gaps = []
    for s2 in (0.02, 0.01):
        found = window(IDS, math.sqrt(s2), correlation)
        gaps.append(np.abs(found.kernel[0] - found.first_order).max())
    assert 3.7 < gaps[0] / gaps[1] < 4.3


@pytest.mark.parametrize("degrees", [1, 16])
def test_few_scales_have_the_moments_of_many(degrees):
    """Four nodes: E u^k up to k = 7 of a chi-square, exactly."""
    nodes, weights = gauss_rule(*Logits(degrees).scales(), 4)
    for k in range(8):
        exact = math.prod((degrees + 2 * j) / degrees for j in range(k))
        assert abs((weights * nodes**k).sum() / exact - 1) < 1e-6
    assert len(gauss_rule(np.ones(1), np.ones(1), 4)[0]) == 1


# ------------------------------------------------------------------------- averages of ids

TOKENS = [
    EmbeddingTokens(64, exponent=1.0),
    EmbeddingTokens(16),
    EmbeddingTokens(1000),
    EmbeddingTokens(3),
    TextTokens(),
    WithBos(EmbeddingTokens(16)),
]


def mixing(tokens, spread, length, own=1.0, common=0.0):
    """Wide layers whose values are `own` N + `common`; heads of any width."""
    same = collision_matrix(tokens, length)
    values = Prefixed(own * same + common)
    return Mixing(values, Prefixed(same), spread**2 * same, 0, 0.0, np.inf, np.inf, 1)


def drawn(tokens, draws, length, seed):
    """Ids, by the description of the tokens themselves."""
    rng = np.random.default_rng(seed)
    if isinstance(tokens, WithBos):
        return np.pad(drawn(tokens.tokens, draws, length - 1, seed), ((0, 0), (1, 0)), "constant",
                      constant_values=tokens.tokens.vocabulary)  # fmt: skip
    if isinstance(tokens, TextTokens):
        starts = rng.integers(len(tokens.ids) - length + 1, size=draws)
        return tokens.ids[starts[:, None] + np.arange(length)]
    return rng.choice(tokens.vocabulary, (draws, length), p=tokens.probabilities)


def wide_attention(tokens, spread, length, draws, seed=1):
    """Kernels of attention with i.i.d. logits for each pair of tokens: mean and error."""
    rng = np.random.default_rng(seed)
    kernels = np.empty((draws, length, length))
    for row, ids in enumerate(drawn(tokens, draws, length, seed)):
        _, kinds = np.unique(ids, return_inverse=True)
        size = kinds.max() + 1
        weights = np.exp(spread * rng.standard_normal((size, size)))[kinds]
        weights *= np.eye(size)[kinds].cumsum(0)
        weights /= weights.sum(1, keepdims=True)
        kernels[row] = weights @ weights.T
    return kernels.mean(0), kernels.std(0) / math.sqrt(draws)


LENGTH = 20


@pytest.mark.parametrize("tokens", TOKENS, ids=repr)
def test_wide_layers_at_any_temperature(tokens):
    """s = 1: within the remainder, which is 5% at most; second moments 2%, cosines .02."""
    mean, error = wide_attention(tokens, 1.0, LENGTH, 2000)
    found, dropped, _ = any_temperature(tokens, mixing(tokens, 1.0, LENGTH))
    assert (np.abs(found - mean) <= dropped + Z * error + 1e-9).all()
    root = np.sqrt(np.diagonal(found))
    assert (dropped <= 0.05 * np.outer(root, root)).all()
    relative = np.abs(np.diagonal(found / mean) - 1)
    assert (relative <= 0.02 + Z * np.diagonal(error / mean)).all()
    size = np.sqrt(np.diagonal(mean))
    cosines = np.abs(found / np.outer(root, root) - mean / np.outer(size, size))
    assert (cosines <= 0.02 + Z * error / np.outer(size, size)).all()


@pytest.mark.parametrize("tokens", TOKENS, ids=repr)
@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_wide_layers_to_first_order(tokens, spread):
    """What it drops at s = 1 is not small, and is stated."""
    mean, error = wide_attention(tokens, spread, 12, 2000, seed=3)
    found, dropped, _ = first_order(tokens, mixing(tokens, spread, 12))
    assert (np.abs(found - mean) <= dropped + Z * error + 1e-9).all()


@pytest.mark.parametrize("treatment", [first_order, any_temperature])
def test_one_token_only_is_attended_uniformly(treatment):
    """All keys equal: 1 everywhere, nothing dropped."""
    tokens = EmbeddingTokens(1)
    found, dropped, excess = treatment(tokens, mixing(tokens, 2.0, 6))
    assert np.abs(found - 1).max() < 1e-9
    assert np.abs(dropped).max() < 1e-9
    assert np.abs(excess).max() < 1e-9


def test_rare_repetition_is_that_of_independent_tokens():
    """A vocabulary of a million: the law of mean kernels, which are of distinct keys then."""
    tokens = EmbeddingTokens(10**6)
    attention = mixing(tokens, 1.0, 12)
    found, _, excess = any_temperature(tokens, attention)
    expected, _, theirs = of_mean_kernels(attention)
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(excess - theirs).max() < 1e-3


@pytest.mark.parametrize("treatment", [first_order, any_temperature])
def test_what_all_values_share_is_added(treatment):
    """Values a N + b have the kernel a K + b."""
    tokens = EmbeddingTokens(5)
    plain, dropped, _ = treatment(tokens, mixing(tokens, 1.0, 8))
    found, lost, _ = treatment(tokens, mixing(tokens, 1.0, 8, own=2.0, common=0.5))
    assert np.abs(found - 2 * plain - 0.5).max() < 1e-12
    assert np.abs(np.diagonal(lost - 2 * dropped)).max() < 1e-12


def test_samples_are_of_the_tokens():
    """Shares of ids by the law; windows of the text; a BOS of its own; always the same ones."""
    zipf = EmbeddingTokens(7, exponent=1.0)
    ids = sample_ids(zipf, 50)
    shares = np.bincount(ids.ravel(), minlength=7) / ids.size
    error = np.sqrt(zipf.probabilities / ids.size)
    assert (np.abs(shares - zipf.probabilities) <= Z * error).all()
    assert np.array_equal(ids, sample_ids(zipf, 50))
    longer = sample_ids(zipf, 90)  # fewer windows, which begin like the first of these
    assert len(longer) < len(ids)
    assert np.array_equal(longer[:, :50], ids[: len(longer)])
    started = sample_ids(WithBos(zipf), 51)
    assert np.array_equal(started[:, 1:], ids)
    assert (started[:, 0] == -1).all()


# ---------------------------------------------------------------------------- real layers


@pytest.mark.parametrize(
    "tokens", [EmbeddingTokens(64, exponent=1.0), TextTokens(), WithBos(EmbeddingTokens(16))],
    ids=repr,
)  # fmt: skip
def test_measured_layers(tokens):
    """Kernel and expected cosine at s = 1, d = 64: within the remainder, itself below 10%."""
    network = nope.decoder(64, 4, n_ctx=8, d_ff=0, n_layers=1, tokens=tokens)
    ask = [
        nope.Question(network, nope.init.normal(64**-0.5), "blocks.0.attn_out", observable)
        for observable in ("kernel", "cosine")
    ]
    for question, measured in zip(
        ask, montecarlo.measure(ask, draws=3000, seed=11, device="cpu"), strict=True
    ):
        prediction = theory.predict(question, "any_temperature")
        gap = np.abs(prediction.values - measured.mean)
        assert (gap <= prediction.remainder + Z * measured.standard_error + 1e-6).all()
        assert (prediction.remainder <= 0.1 * measured.mean.max()).all()


@pytest.mark.parametrize("vocabulary", [2, 6])
def test_the_participation_of_repeated_ids_by_plain_draws(vocabulary):
    """Copies of a key share a logit: one head of width 24 by NumPy, d = 48."""
    rng, d, d_h, length, draws = np.random.default_rng(3), 48, 24, 8, 10_000
    tokens = nope.tokens.EmbeddingTokens(vocabulary, 1.0)
    architecture = nope.decoder(d, d // d_h, n_ctx=length, tokens=tokens)
    std = 0.7 / np.sqrt(d)
    asked = nope.Question(
        architecture, nope.init.normal(std), "blocks.0.attn.pattern", "participation"
    )
    found = theory.predict(asked)
    assert found.fidelity == "any_temperature"
    table = rng.standard_normal((draws, vocabulary, d))
    ids = rng.integers(vocabulary, size=(draws, length))
    x = table[np.arange(draws)[:, None], ids]
    x -= x.mean(-1, keepdims=True)
    x /= x.std(-1, keepdims=True)
    # Given x a head's queries are Gaussian: q k' only needs x W_Q at the last position.
    query = np.einsum("bd,bde->be", x[:, -1], std * rng.standard_normal((draws, d, d_h)))
    back = np.einsum("be,bde->bd", query, std * rng.standard_normal((draws, d, d_h)))
    logits = np.einsum("bnd,bd->bn", x, back) / np.sqrt(d_h)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    drawn = (weights**2).sum(1)
    error = drawn.std() / np.sqrt(draws)
    assert abs(found.values[-1] - drawn.mean()) < found.remainder[-1] + 5 * error
    assert found.remainder[-1] < 0.02 * found.values[-1]


@pytest.mark.parametrize("vocabulary", [2, 5])
def test_patterns_over_few_words_know_what_they_miss(vocabulary):
    """The second layer's keys are clusters: measured participations are within the remainder,
    and beyond what would be left if the keys' correlations were exact."""
    network = nope.decoder(64, 4, n_ctx=8, n_layers=2, d_ff=0, tokens=EmbeddingTokens(vocabulary))
    question = nope.Question(
        network, nope.init.normal(0.16), "blocks.1.attn.pattern", "second_moment"
    )
    found = theory.predict(question)
    measured = montecarlo.measure(question, draws=3000, seed=1, device="cpu")
    gap, error = np.abs(measured.mean - found.values), Z * measured.standard_error
    assert (gap <= found.remainder + error + 1e-12).all()
    assert (gap[-1] > error[-1]) or vocabulary > 2
    assert (found.remainder[1:] < 0.6 * found.values[1:]).all()


@pytest.mark.parametrize(("norm", "d_model"), [("layernorm", 8), ("rmsnorm", 64)])
def test_one_word_is_one_vector_at_any_length(norm, d_model):
    """A norm with eps reads one vector at every position: one moment, and one fluctuation."""

    def predicted(n_ctx, place, observable):
        network = nope.decoder(
            d_model, 2, n_ctx=n_ctx, n_layers=2, norm=norm, eps=0.1, tokens=EmbeddingTokens(1)
        )
        return theory.predict(nope.Question(network, nope.init.normal(0.3), place, observable))

    found = []
    for n_ctx in (2, 8, 64):
        kernel = predicted(n_ctx, "blocks.0.ln1", "kernel").values
        assert np.ptp(kernel) < 1e-6 * kernel.max()
        found.append(kernel[0, 0])
        assert np.isfinite(predicted(n_ctx, "ln_final", "cosine").remainder).all()
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("n_ctx", [8, 48])
def test_one_word_behind_a_bos_is_predicted(n_ctx):
    """Two vectors, one of them at every position but the first: three layers with their norms."""
    network = nope.decoder(
        32, 4, n_ctx=n_ctx, n_layers=3, norm_position="post", tokens=WithBos(EmbeddingTokens(1))
    )
    for place, observable in [
        ("blocks.1.attn.pattern", "second_moment"),
        ("blocks.2.ln2", "cosine"),
    ]:
        question = nope.Question(network, nope.init.normal(0.2), place, observable)
        found = theory.predict(question)
        measured = montecarlo.measure(question, draws=1000, seed=2, device="cpu")
        gap = np.abs(measured.mean - found.values)[question.judged]
        allowed = (found.remainder + Z * measured.standard_error)[question.judged]
        assert (gap <= allowed + 1e-12).all()
        assert np.isfinite(found.remainder).all()
        if observable == "cosine":
            assert found.remainder[question.judged].max() <= 0.3


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_a_norm_of_tokens_that_repeat_is_exact_at_any_width(norm, eps):
    """One token or two that point anywhere: E cos is the share of equal ids, by plain draws."""
    tokens = EmbeddingTokens(3)
    network = nope.decoder(4, 2, n_ctx=3, d_ff=0, norm=norm, eps=eps, tokens=tokens)
    question = nope.Question(network, nope.init.normal(0.3), "blocks.0.ln1", "kernel")
    found = theory.predict(question)
    rng, count = np.random.default_rng(0), 200_000
    table = rng.normal(0, tokens.std, size=(count, 3, 4))
    ids = rng.integers(3, size=(count, 3))
    x = np.take_along_axis(table, ids[:, :, None], 1)
    x = x - x.mean(-1, keepdims=True) if norm == "layernorm" else x
    x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps)
    plain = np.einsum("bmi,bni->bmn", x, x) / 4
    error = Z * plain.std(0) / math.sqrt(count)
    assert (np.abs(plain.mean(0) - found.values) <= error + found.remainder).all()
    apart = ~np.eye(3, dtype=bool)
    if not eps:
        assert found.status is theory.Status.EXACT
        assert found.values[apart] == pytest.approx(1 / 3, rel=1e-12)
