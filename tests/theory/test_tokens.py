"""Repetition of tokens: enumeration of ids and windows, quadrature, measured layers."""

import itertools
import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import sympy as sp

import montecarlo
import nope
from nope.tokens import EmbeddingTokens, GaussianTokens, TextTokens, WithBos
from theory.formulas import tokens as repetition
from theory.formulas.tokens import collision_matrix, pair_moments, prefix_mean_kernel, sample_ids

FORMULAS = {found.name: found for found in repetition.formulas()}
KERNEL = FORMULAS["tokens.uniform_kernel"]
COSINE = FORMULAS["tokens.uniform_cosine"]
ROUNDING = 1e-12
Z = 5.0

SKEWED = (Fraction(1, 2), Fraction(1, 3), Fraction(1, 6))
EVEN = (Fraction(1, 4),) * 4


def power_sums(probabilities, *orders):
    return {f"p_{k}": float(sum(p**k for p in probabilities)) for k in orders or (2, 3)}


def every_pattern(probabilities, length):
    """All ids of `length` positions as rows, and their probabilities."""
    ids = np.array(list(itertools.product(range(len(probabilities)), repeat=length)))
    weights = np.array([float(p) for p in probabilities])[ids].prod(1)
    return ids, weights


def equal(ids):
    """N, one matrix per row of ids."""
    return (ids[:, :, None] == ids[:, None, :]).astype(float)


def deviation(N, length):
    """(JNJ)_ii - tr(JNJ)/m over a prefix of N."""
    J = np.eye(length) - 1 / length
    diagonal = np.einsum("kii->ki", J @ N[:, :length, :length] @ J)
    return diagonal - diagonal.mean(1, keepdims=True)


def pair_sums(ids, m, n):
    """sum N, N_mn tr(J_m N J_n N), the same without N_mn, and sum [D_m(i) + D_n(j)] N_ij/2.

    Over mn, one row each, by the matrices themselves.
    """
    N = equal(ids)
    block = N[:, :m, :n]
    centred = (np.eye(m) - 1 / m) @ block @ (np.eye(n) - 1 / n)
    common = (centred * block).sum((1, 2))
    both = deviation(N, m)[:, :, None] + deviation(N, n)[:, None, :]
    reweighting = (both * block).sum((1, 2)) / 2
    sums = block.sum((1, 2)), N[:, m - 1, n - 1] * common, common, reweighting
    return np.stack(sums) / (m * n)


def of_moments(found):
    return np.stack([found.collision, found.tilt, found.common_tilt, found.reweighting])


def moments_by_enumeration(patterns, weights):
    """The same of all pairs of prefixes."""
    length = patterns.shape[1]
    sums = np.empty((4, length, length))
    for m, n in itertools.product(range(1, length + 1), repeat=2):
        sums[:, m - 1, n - 1] = pair_sums(patterns, m, n) @ weights
    return sums


# ------------------------------------------------------------------------------- collisions


@pytest.mark.parametrize("alpha", [0, 1, 2, 3])
def test_collisions_of_zipf_in_exact_rationals(alpha):
    """sum p^2 with p_v = v^-a over its sum: the formula, and the tokens' own probabilities."""
    powers = [Fraction(1, v**alpha) for v in range(1, 41)]
    exact = float(sum((p / sum(powers)) ** 2 for p in powers))
    assert abs(FORMULAS["tokens.collision_zipf"](V=40, alpha=alpha) - exact) <= 4 * 2**-52
    tokens = EmbeddingTokens(40, exponent=float(alpha))
    assert abs(repetition.power_sum(tokens, 2) - exact) <= 4 * 2**-52
    if alpha == 0:
        assert FORMULAS["tokens.collision_uniform"](V=40) == 1 / 40


def test_collisions_of_zipf_at_any_exponent():
    """Hurwitz zeta functions by mpmath, on an array of vocabularies and exponents."""

    def harmonic(size, order):
        return mpmath.zeta(order) - mpmath.zeta(order, size + 1)

    sizes, exponents = np.array([[3], [5000]]), np.array([0.7, 1.3])
    found = FORMULAS["tokens.collision_zipf"](V=sizes, alpha=exponents)
    for i, j in np.ndindex(2, 2):
        size, order = int(sizes[i, 0]), float(exponents[j])
        expected = harmonic(size, 2 * order) / harmonic(size, order) ** 2
        assert abs(found[i, j] / float(expected) - 1) < ROUNDING


def test_general_harmonics_print_as_such():
    """H_{V,2a}/H_{V,a}^2 on the page, numbers by evalf."""
    assert FORMULAS["tokens.collision_zipf"].latex() == (
        r"p_2 = \frac{H_{V,2 \alpha}}{H_{V,\alpha}^{2}}"
    )
    assert abs(repetition.GeneralHarmonic(3, 1).evalf() - sp.Rational(11, 6)) < ROUNDING


@pytest.fixture(scope="module")
def short_text(tmp_path_factory):
    """70 letters of three kinds, common ones clustered."""
    rng = np.random.default_rng(4)
    letters = rng.choice(3, size=70, p=[0.6, 0.3, 0.1]).cumsum() // 3 % 3
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(bytes(letters.astype(np.uint8)))
    return TextTokens(path, std=0.5)


def every_window(tokens, length):
    return np.array([tokens.ids[k : k + length] for k in range(len(tokens.ids) - length + 1)])


@pytest.mark.parametrize("length", [1, 2, 7, 40, 69, 70])
def test_collisions_in_a_text_over_every_window(short_text, length):
    """The share of windows in which m and n are equal, window by window."""
    expected = equal(every_window(short_text, length)).mean(0)
    assert np.abs(collision_matrix(short_text, length) - expected).max() <= 4 * 2**-52


@pytest.mark.parametrize("length", [1, 5])
def test_a_bos_equals_nothing_else(short_text, length):
    """Its row and column are 0, and the rest is one position shorter."""
    for tokens in (short_text, EmbeddingTokens(3), GaussianTokens()):
        found = collision_matrix(WithBos(tokens), length)
        assert found[0].tolist() == found[:, 0].tolist() == [1.0] + [0.0] * (length - 1)
        assert np.array_equal(found[1:, 1:], collision_matrix(tokens, length - 1))


@pytest.mark.parametrize("function", [collision_matrix, pair_moments, sample_ids])
def test_tokens_of_another_kind_are_refused(function):
    """Not taken for Gaussian."""
    with pytest.raises(NotImplementedError, match=r"expected GaussianTokens, .* register its"):
        function(object(), 3)


# ------------------------------------------------------------------------- moments of counts


@pytest.mark.parametrize("probabilities", [SKEWED, EVEN], ids=["skewed", "even"])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 6])
def test_pair_sums_of_independent_ids_by_enumeration(probabilities, length):
    """Every pattern of ids, with the matrices J N J written out."""
    ids, weights = every_pattern(probabilities, length)
    collision, tilt, _, reweighting = pair_sums(ids, length, length) @ weights
    sums = power_sums(probabilities, 2, 3)
    assert abs(FORMULAS["tokens.tilt"](m=length, **sums) - tilt) < ROUNDING
    assert abs(FORMULAS["tokens.reweighting"](m=length, **sums) - reweighting) < ROUNDING
    one = KERNEL(m=length, n=length, sigma_x=1.0, p_2=sums["p_2"])
    assert abs(one - collision) < ROUNDING


@pytest.mark.parametrize("probabilities", [SKEWED, EVEN], ids=["skewed", "even"])
@pytest.mark.parametrize(("m", "n"), [(2, 1), (3, 2), (5, 2), (6, 3), (6, 5)])
def test_sums_over_two_prefixes_by_enumeration(probabilities, m, n):
    """What queries at m and n < m share, every pattern of ids."""
    ids, weights = every_pattern(probabilities, m)
    _, tilt, _, reweighting = pair_sums(ids, m, n) @ weights
    shared = FORMULAS["tokens.shared_tilt"]
    assert abs(shared(m=m, n=n, **power_sums(probabilities, 2, 3, 4)) - tilt) < ROUNDING
    shared = FORMULAS["tokens.shared_reweighting"]
    assert abs(shared(m=m, n=n, **power_sums(probabilities, 2, 3)) - reweighting) < ROUNDING


def test_moments_of_tokens_by_enumeration():
    """`pair_moments` of a Zipf vocabulary with and without a BOS, all pairs of prefixes."""
    tokens, length = EmbeddingTokens(3, exponent=1.0), 5
    ids, weights = every_pattern([Fraction(6, 11) / v for v in (1, 2, 3)], length)
    started = np.hstack([np.full((len(ids), 1), 3), ids])
    for model, patterns in ((tokens, ids), (WithBos(tokens), started)):
        found = of_moments(pair_moments(model, patterns.shape[1]))
        assert np.abs(found - moments_by_enumeration(patterns, weights)).max() < ROUNDING


def test_moments_of_a_text_over_every_window(short_text):
    """With fewer windows than the limit, the average over all of them and its standard error."""
    found, windows = pair_moments(short_text, 9), every_window(short_text, 9)
    assert np.array_equal(sample_ids(short_text, 9), windows)
    expected = moments_by_enumeration(windows, np.full(len(windows), 1 / len(windows)))
    assert np.abs(of_moments(found) - expected).max() < ROUNDING
    _, tilt, _, reweighting = pair_sums(windows, 9, 4)
    error = (tilt + reweighting).std() / math.sqrt(len(windows))
    assert abs(found.standard_error[8, 3] - error) < ROUNDING


def test_moments_of_a_long_text_agree_with_its_collisions():
    """2000 windows of the default text estimate what all of them say exactly, to 5 s.e.

    A prefix's share of equal pairs varies by less than itself from window to window.
    """
    tokens, length = TextTokens(), 64
    exact = prefix_mean_kernel(tokens, length).diagonal() / tokens.std**2
    found = pair_moments(tokens, length).collision.diagonal()
    assert (np.abs(found / exact - 1) < Z / math.sqrt(repetition.WINDOWS)).all()
    assert np.abs(found / exact - 1).max() > 0


def test_without_repetition_the_moments_are_those_of_distinct_keys():
    """Gaussian tokens: 1/max(m, n), (m-1)/m^2 on the diagonal only, and 0.

    The law E sum a^2 = (1 + s^2 (1 - 1/m))/m.
    """
    found, counts = pair_moments(GaussianTokens(), 9), np.arange(1.0, 10)
    assert np.abs(found.collision - 1 / np.maximum.outer(counts, counts)).max() < ROUNDING
    assert np.abs(found.tilt - np.diag((counts - 1) / counts**2)).max() < ROUNDING
    assert np.abs(found.reweighting).max() < ROUNDING


def softmax_of_two(counts, s, nodes=60):
    """E sum_v (weight of token v)^2 for c_1, c_2 keys whose logits are one N(0, s^2) each."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    one, two = counts
    first = one / (one + two * np.exp(math.sqrt(2) * s * points))
    return ((first**2 + (1 - first) ** 2) * weights).sum() / weights.sum()


@pytest.mark.parametrize("length", [2, 3, 6])
def test_softmax_over_repeated_keys_to_first_order(length):
    """E sum a a N = collision + s^2 (tilt + reweighting) + O(s^4), by quadrature over the logits.

    The s^2 coefficient by one Richardson step, whose error is O(s^4).
    """
    p = 0.7
    counts = [(k, length - k) for k in range(length + 1)]
    weights = [math.comb(length, k) * p**k * (1 - p) ** (length - k) for k, _ in counts]

    def mean(s):
        return sum(w * softmax_of_two(c, s) for w, c in zip(weights, counts, strict=True))

    slopes = [(mean(s) - mean(0.0)) / s**2 for s in (0.04, 0.02)]
    sums = {"p_2": p**2 + (1 - p) ** 2, "p_3": p**3 + (1 - p) ** 3}
    expected = sum(FORMULAS[f"tokens.{x}"](m=length, **sums) for x in ("tilt", "reweighting"))
    assert abs((4 * slopes[1] - slopes[0]) / 3 - expected) < 1e-6
    assert abs(slopes[0] - expected) > 1e-5


# ------------------------------------------------------------------------- uniform attention


def mean_products(ids):
    """<mean one-hot of the first m, of the first n>: A_mn/(mn), one matrix per row of ids."""
    counts = np.arange(1.0, ids.shape[1] + 1)
    return equal(ids).cumsum(1).cumsum(2) / np.outer(counts, counts)


@pytest.mark.parametrize("probabilities", [SKEWED, EVEN], ids=["skewed", "even"])
def test_uniform_kernel_by_enumeration(probabilities):
    """(1/(mn)) sum P(equal) over the two prefixes, pattern by pattern, every m and n."""
    ids, weights = every_pattern(probabilities, 6)
    expected = np.tensordot(weights, mean_products(ids), 1)
    m = np.arange(1, 7)
    sums = power_sums(probabilities)
    found = KERNEL(m=m[:, None], n=m, sigma_x=0.5, p_2=sums["p_2"])
    assert np.abs(found - 0.25 * expected).max() < ROUNDING
    cosine = COSINE(m=m[:, None], n=m, **sums)
    size = np.sqrt(expected.diagonal())
    assert np.abs(cosine - expected / np.outer(size, size)).max() < ROUNDING


@pytest.mark.parametrize("tokens", [EmbeddingTokens(6, 0.3, 1.0), GaussianTokens(0.3)], ids=repr)
def test_prefix_mean_kernel_is_the_closed_form(tokens):
    """Cumulative sums of the collisions against p_2 + (1 - p_2)/max(m, n)."""
    m = np.arange(1, 20)
    p_2 = collision_matrix(tokens, 2)[0, 1]
    expected = KERNEL(m=m[:, None], n=m, sigma_x=0.3, p_2=p_2)
    assert np.abs(prefix_mean_kernel(tokens, 19) - expected).max() < ROUNDING


def test_uniform_cosine_between_its_limits():
    """sqrt(n/m) without repetition, 1 with one token only, symbolically."""
    m, n, p_2 = (COSINE.symbols[name].symbol for name in ("m", "n", "p_2"))
    plain = sp.sqrt(sp.Min(m, n) / sp.Max(m, n))
    assert sp.simplify(COSINE.expr.subs(p_2, 0) - plain) == 0
    assert sp.simplify(COSINE.expr.subs(p_2, 1) - 1) == 0
    assert sp.simplify(COSINE.remainder.subs({p_2: 0, COSINE.symbols["p_3"].symbol: 0})) == 0


def expected_cosine(p, m, n):
    """E cos over the ids of two tokens of probability p and 1 - p, n <= m, by the binomial law."""
    before, after = np.arange(n + 1)[:, None], np.arange(m - n + 1)[None, :]
    weights = _binomial(n, p)[:, None] * _binomial(m - n, p)[None, :]
    long, short = (before + after, m - before - after), (before, n - before)
    product = long[0] * short[0] + long[1] * short[1]
    size = np.sqrt((long[0] ** 2 + long[1] ** 2) * (short[0] ** 2 + short[1] ** 2))
    return float((weights * product / size).sum())


def _binomial(size, p):
    return np.array([math.comb(size, k) * p**k * (1 - p) ** (size - k) for k in range(size + 1)])


PAIRS = [(n + gap, n) for n in (1, 2, 3, 5, 11, 50) for gap in (1, 3, 5, 30, 100)]


@pytest.mark.parametrize("p", [0.5, 0.6, 0.7, 0.9, 0.999])
def test_cosine_is_within_its_remainder(p):
    """Two tokens, pattern by pattern: what is dropped is below the estimate."""
    m, n = np.array(PAIRS).T
    sums = power_sums((p, 1 - p))
    exact = np.array([expected_cosine(p, *pair) for pair in PAIRS])
    dropped = np.abs(exact - COSINE(m=m, n=n, **sums))
    remainder = COSINE.remainder_at(m=m, n=n, **sums)
    assert (dropped <= remainder + 1e-12).all()


@pytest.mark.parametrize("probabilities", [SKEWED, EVEN], ids=["skewed", "even"])
def test_cosine_is_within_its_remainder_for_more_tokens(probabilities):
    """Three and four tokens, every pattern of seven positions."""
    ids, weights = every_pattern(probabilities, 7)
    products = mean_products(ids)
    size = np.sqrt(np.einsum("kmm->km", products))
    exact = np.tensordot(weights, products / (size[:, :, None] * size[:, None, :]), 1)
    m, sums = np.arange(1, 8), power_sums(probabilities)
    arguments = {"m": m[:, None], "n": m, **sums}
    assert (np.abs(exact - COSINE(**arguments)) <= COSINE.remainder_at(**arguments) + 1e-12).all()


@pytest.mark.parametrize("p", [0.5, 0.7, 0.9])
def test_the_cosines_remainder_is_second_order(p):
    """Over longer prefixes what is dropped tends to the estimate without its factor 3/2.

    The next terms are smaller by 1/n: at n = 25, 100 and 400 they have room for 10/n.
    """
    sums = power_sums((p, 1 - p))
    for n in (25, 100, 400):
        dropped = abs(expected_cosine(p, 2 * n, n) - COSINE(m=2 * n, n=n, **sums))
        estimate = COSINE.remainder_at(m=2 * n, n=n, **sums) / 1.5
        assert abs(dropped / estimate - 1) < 10 / n


# --------------------------------------------------------------------------- measured layers

TOKENS = [
    EmbeddingTokens(5, 0.5),
    EmbeddingTokens(12, 0.5, exponent=1.2),
    TextTokens(std=0.5),
    WithBos(EmbeddingTokens(3, 0.5)),
    WithBos(GaussianTokens(0.5)),
]


@pytest.mark.parametrize("tokens", TOKENS, ids=repr)
@pytest.mark.parametrize("norm", ["pre", "none"])
def test_measured_kernels_are_the_exact_ones(tokens, norm):
    """At `embed` and after uniform attention: every entry within five standard errors.

    A norm makes sigma_x 1, and value and output maps multiply by (d sigma^2)^2.
    """
    d_model, length, std = 6, 7, 0.3
    network = nope.decoder(
        d_model, 2, n_ctx=length, d_ff=0, attention="uniform", norm_position=norm, tokens=tokens
    )
    ask = [
        nope.Question(network, nope.init.normal(std), place, "kernel")
        for place in ("embed", "blocks.0.attn_out")
    ]
    raw, mixed = montecarlo.measure(ask, draws=20_000, seed=3, device="cpu")
    kernel = tokens.std**2 * collision_matrix(tokens, length)
    gain = (d_model * std**2) ** 2 / (tokens.std**2 if norm == "pre" else 1.0)
    means = gain * prefix_mean_kernel(tokens, length)
    for measured, expected in ((raw, kernel), (mixed, means)):
        assert (np.abs(measured.mean - expected) <= Z * measured.standard_error).all()
        assert measured.standard_error.max() < 0.05 * expected.max()
