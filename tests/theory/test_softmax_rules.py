"""Softmax attention's rules by second routes: power series, sampled logits, limits."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import sympy as sp

import nope
import theory
from nope.init import normal
from theory.formulas.wick import first_order
from theory.kernel import J, K, Q
from theory.rules import mixing as rules_mixing
from theory.rules.mixing import (
    EVERY,
    KeyWidth,
    Mixing,
    Pairs,
    Prefixed,
    any_temperature,
    covering_table,
    first_order_change,
    group_edges,
)
from theory.rules.mixing import first_order as first_order_kernel
from theory.symbols import m, n

# ------------------------------------------------------------- first order, in rationals

LENGTH = 5


def random_root(rng):
    """A matrix of small integers whose Gram matrix is a kernel in exact rationals."""
    return rng.integers(-3, 4, size=(LENGTH, LENGTH))


ROOTS = [[random_root(np.random.default_rng([case, part])) for part in range(3)] for case in (0, 1)]
"""Roots of the kernels of values, keys and queries: three different ones, twice."""


def kernel(root):
    return root @ root.T


def series_of_weights(slopes):
    """Softmax weights of the logits t v up to t^2: (a_0, a_1, a_2) per key, exact rationals.

    Power series of e^(tv) and of their sum, divided term by term.
    """
    powers = [(Fraction(1), Fraction(v), Fraction(v) ** 2 / 2) for v in slopes]
    total = [sum(column) for column in zip(*powers, strict=True)]
    weights = []
    for top in powers:
        a_0 = top[0] / total[0]
        a_1 = (top[1] - a_0 * total[1]) / total[0]
        a_2 = (top[2] - a_0 * total[2] - a_1 * total[1]) / total[0]
        weights.append((a_0, a_1, a_2))
    return weights


def second_order(left, right):
    """The terms of order t^0 and t^2 of a product of two power series."""
    return left[0] * right[0], left[0] * right[2] + left[1] * right[1] + left[2] * right[0]


def by_power_series(values, keys, queries, row, column):
    """E sum_ij a_mi a_nj K_ij up to the first power of the logits' covariance Q(m, n) J(i, j).

    With Q = A A' and J = B B' the logit of the query m on the key i is sum_ab A_ma B_ib z_ab,
    z_ab independent N(0, 1), and E F = F(0) + sum_ab F''/2 along the direction z_ab.
    """
    K_v, total = kernel(values), Fraction(0)
    for of_query, of_key in product(range(LENGTH), repeat=2):
        left = series_of_weights(queries[row, of_query] * keys[: row + 1, of_key])
        right = series_of_weights(queries[column, of_query] * keys[: column + 1, of_key])
        for (i, a), (j, b) in product(enumerate(left), enumerate(right)):
            uniform, curved = second_order(a, b)
            total += int(K_v[i, j]) * (curved + uniform * Fraction(1, LENGTH**2))
    return total


PAIRS = [(row, column) for row in range(LENGTH) for column in range(LENGTH)]


@pytest.mark.parametrize("roots", ROOTS, ids=["one", "two"])
def test_the_cumulative_sums_by_power_series_in_rationals(roots):
    """Prefix mean and change, at every pair of positions up to 5."""
    values, keys, queries = (kernel(root).astype(float) for root in roots)
    every = np.arange(1, LENGTH + 1)
    mean = values.cumsum(0).cumsum(1) / np.outer(every, every)
    found = mean + first_order_change(Prefixed(values), Prefixed(keys), queries)
    expected = [[float(by_power_series(*roots, r, c)) for c in every - 1] for r in every - 1]
    assert np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize(("row", "column"), [(1, 1), (2, 2), (1, 3), (3, 2), (4, 4), (5, 3)])
def test_the_expression_by_power_series_in_rationals(row, column):
    """The SymPy expression with its sums written out: equal, not close."""
    roots = ROOTS[0]
    expr = first_order().subs({m: row, n: column}, simultaneous=True).doit()
    for function, root in zip((K, J, Q), roots, strict=True):
        matrix = sp.Matrix(kernel(root))
        expr = expr.replace(function, lambda r, c, of=matrix: of[int(r) - 1, int(c) - 1])
    expected = by_power_series(*roots, row - 1, column - 1)
    assert expr == sp.Rational(expected.numerator, expected.denominator)


def hessian_of_weights(length):
    """Weights with first and second derivatives at l = 0, by SymPy from the definition."""
    logits = sp.symbols(f"l_1:{length + 1}")
    weights = [sp.exp(x) / sum(map(sp.exp, logits)) for x in logits]
    zero = dict.fromkeys(logits, 0)
    first = [[w.diff(x).subs(zero) for x in logits] for w in weights]
    second = [[[w.diff(x, y).subs(zero) for y in logits] for x in logits] for w in weights]
    return first, second


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_the_power_series_by_derivatives_of_softmax(length):
    """The second route itself: a_1 = sum_p v_p d_p a, 2 a_2 = sum_pq v_p v_q d_p d_q a."""
    first, second = hessian_of_weights(length)
    slopes = [2, -3, 5, 1][:length]
    for index, (a_0, a_1, a_2) in enumerate(series_of_weights(slopes)):
        assert a_0 == Fraction(1, length)
        assert sp.Rational(a_1) == sum(x * y for x, y in zip(first[index], slopes, strict=True))
        curved = sum(
            second[index][p][q] * slopes[p] * slopes[q] for p, q in product(range(length), repeat=2)
        )
        assert 2 * sp.Rational(a_2) == curved


# --------------------------------------------------------- exchangeable keys, by sampling

POSITIONS = (2, 5, 17)
LONGEST = max(POSITIONS)
TEMPERATURES = (0.3, 1.0, 2.5)
DRAWS = 1_000_000
TABLED = 2e-9
"""What a tabulated participation may be off by: it promises 1e-9 (1 + m P)."""


def exchangeable(common, length=LONGEST):
    """c + (1 - c) I."""
    return common + (1 - common) * np.eye(length)


def mixing(spread, shared, common=0.5, length=LONGEST, d_h=np.inf):
    """One attention whose logits have variance s^2 beyond what all keys share; no fluctuation."""
    keys = Prefixed(exchangeable(common, length))
    queries = spread**2 / (1 - common) * exchangeable(shared, length)
    return Mixing(
        values=keys,
        keys=keys,
        queries=queries,
        maps=0,
        slack=0.0,
        freedom=np.inf,
        d_h=d_h,
        n_heads=1,
    )


def softmax(logits):
    weights = np.exp(logits)
    return weights / weights.sum(1, keepdims=True)


def sampled(spread, shared, common, draws=DRAWS):
    """Mean and standard error of sum_ij a_mi a_nj K_ij over Gaussian logits, m <= n.

    What all keys of a query share cancels in its weights and is not drawn.
    """
    rng = np.random.default_rng([int(10 * spread), int(100 * shared)])
    found = {}
    for last in POSITIONS:
        z, own = rng.standard_normal((2, draws // last, last))
        left, right = spread * z, spread * (shared * z + np.sqrt(1 - shared**2) * own)
        for first in (p for p in POSITIONS if p <= last):
            other = left if first == last else right
            both = softmax(left[:, :first]) * softmax(other)[:, :first]
            overlap = common + (1 - common) * both.sum(1)
            found[first, last] = overlap.mean(), overlap.std() / np.sqrt(len(overlap))
    return found


def misses(spread, shared, pairs, slack=False):
    """Pairs whose kernel is further from the sample than 5 standard errors (and the remainder)."""
    common = 0.5
    values, dropped, _ = any_temperature(mixing(spread, shared, common))
    found = []
    for (first, last), (mean, error) in sampled(spread, shared, common).items():
        if pairs(first, last):
            at = first - 1, last - 1
            gap = abs(values[at] - mean)
            if gap > 5 * error + slack * dropped[at]:
                found.append((first, last, round(values[at], 5), round(mean, 5), round(error, 5)))
    return found


@pytest.mark.parametrize("spread", TEMPERATURES)
def test_second_moments_over_exchangeable_keys_are_exact_at_any_temperature(spread):
    """The diagonal: c + (1 - c) A(m, s), by a million logits."""
    assert misses(spread, 0.5, lambda first, last: first == last) == []


@pytest.mark.parametrize("spread", TEMPERATURES)
def test_independent_queries_share_the_prefix_only(spread):
    """r = 0: c + (1 - c)/max(m, n) at any temperature."""
    values, dropped, _ = any_temperature(mixing(spread, 0.0))
    longer = np.maximum.outer(np.arange(1, 18), np.arange(1, 18))
    off = ~np.eye(LONGEST, dtype=bool)
    assert np.abs(values - 0.5 - 0.5 / longer)[off].max() <= TABLED
    assert np.abs(dropped[off]).max() <= TABLED
    assert misses(spread, 0.0, lambda first, last: first != last) == []


@pytest.mark.parametrize("shared", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("spread", TEMPERATURES)
def test_correlated_queries_are_within_the_remainder(spread, shared):
    """Off the diagonal: what is not exact is stated."""
    assert misses(spread, shared, lambda first, last: first != last, slack=True) == []


@pytest.mark.parametrize("shared", [0.25, 0.5, 0.75, 1.0])
def test_correlated_queries_of_small_logits_leave_little(shared):
    """At s = 1 the share of two queries is right within .02 of what uniform weights share."""
    values, _, _ = any_temperature(mixing(1.0, shared))
    for (first, last), (mean, error) in sampled(1.0, shared, 0.5).items():
        assert abs(values[first - 1, last - 1] - mean) < 0.02 * 0.5 / last + 5 * error


def test_the_slope_between_queries_is_exact():
    """h'(0): two queries with common numbers, of correlation r and -r, at s = 2."""
    rng, r, (first, last) = np.random.default_rng(11), 0.05, (5, 17)
    z, own = rng.standard_normal((2, 400_000, last))
    left = softmax(2 * z[:, :first])
    both = [
        (left * softmax(2 * (sign * r * z + np.sqrt(1 - r**2) * own))[:, :first]).sum(1)
        for sign in (1, -1)
    ]
    slope = last * (both[0] - both[1]) / (2 * r)
    found = Pairs(mixing(2.0, 0.0), slice(0, 17), slice(0, 17)).slope[last - 1, first - 1]
    assert abs(found - slope.mean()) < 5 * slope.std() / np.sqrt(len(slope)) + r**2 * found


def test_neighbouring_keys_may_be_summed_in_groups():
    """Alone up to `EVERY`; beyond it the change is off by less than 1e-4 of its size."""
    assert list(group_edges(EVERY)) == list(range(EVERY + 1))
    assert list(group_edges(5)) == list(range(6))
    length = 300
    count = np.arange(1, length + 1)
    kernel = 0.8 * np.eye(length) + np.minimum.outer(count, count) / np.maximum.outer(count, count)
    found, exact = (Prefixed(kernel) for _ in range(2))
    grouped = first_order_change(found, found, kernel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules_mixing, "EVERY", length)
        one_by_one = first_order_change(exact, exact, kernel)
    assert 0 < np.abs(grouped - one_by_one).max() < 1e-4 * np.abs(one_by_one).max()


def test_logits_that_no_quadrature_covers_are_refused():
    """One line, with what would be covered."""
    refused = r"up to 1\d\.\d for Logits\(d_h=1, .*got 64; use"
    with pytest.raises(NotImplementedError, match=refused):
        covering_table(4, 64.0**2, KeyWidth(1, np.inf, 0))


@pytest.mark.parametrize("treatment", [first_order_kernel, any_temperature])
@pytest.mark.parametrize("shared", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("spread", TEMPERATURES)
def test_remainders_are_not_negative(treatment, spread, shared):
    """A remainder is a size: what one term overstates no other may take back."""
    for common in (0.0, 0.5, 0.9):
        _, dropped, _ = treatment(mixing(spread, shared, common))
        assert dropped.min() >= -TABLED


VAST = 4, 100.0
"""Keys, and a standard deviation of logits whose e^(s^2) no float holds."""


def network(norm_position, tokens, std):
    return nope.decoder(
        16, 1, n_layers=3, n_ctx=VAST[0], d_ff=0, norm_position=norm_position, tokens=tokens
    ), normal(std)


def test_what_vast_logits_leave_out_is_finite():
    """One key has all the attention then: the prefix mean, its first order and the truth are as
    far apart as one key and all of them allow."""
    length, spread = VAST
    attention = mixing(spread, 1.0, 0.0, length=length)
    with np.errstate(over="ignore"):
        kernel, dropped, _ = first_order_kernel(attention)
    assert np.isfinite(dropped).all()
    one_key = np.ones(length)  # E sum a^2 is between 1/m and this
    assert (np.abs(np.diagonal(kernel) - one_key) <= np.diagonal(dropped)).all()
    assert dropped[0, 0] == 0


@pytest.mark.parametrize("fidelity", ["uniform", "first_order", "any_temperature"])
@pytest.mark.parametrize("tokens", [nope.GaussianTokens(100.0), nope.EmbeddingTokens(9, 100.0)])
def test_predictions_of_vast_logits_have_no_nan(fidelity, tokens):
    """A remainder is a number or infinite; of a row's first key it is nothing."""
    layers, scheme = network("none", tokens, 0.3)
    for place in ("blocks.0.attn.pattern", "blocks.0.attn.z", "blocks.2.attn.pattern"):
        question = nope.Question(layers, scheme, place, "second_moment")
        try:
            found = theory.predict(question, fidelity)
        except NotImplementedError:
            continue  # logits that no quadrature covers, said so
        assert not np.isnan(found.remainder).any(), place
        if place.endswith("pattern"):
            count = np.arange(1, VAST[0] + 1)
            assert found.values[0] == 1
            assert found.remainder[0] == pytest.approx(0, abs=1e-9) or fidelity == "uniform"
            reached = found.values + found.remainder, found.values - found.remainder
            assert (reached[0] >= 1 / count * (1 - 1e-9)).all() or fidelity == "any_temperature"
            assert (reached[1] <= 1 / count).all()


def test_a_bos_before_gaussian_tokens_is_one_more_of_them():
    """It is drawn with the weights, they with the inputs: of both averages nothing tells it."""
    started = nope.WithBos(nope.GaussianTokens(0.7))
    for place, observable in [
        ("blocks.0.attn.pattern", "second_moment"),
        ("blocks.1.attn.z", "kernel"),
        ("blocks.2.resid_post", "cosine"),
        ("blocks.0.attn.scores", "kurtosis"),
    ]:
        found = [
            theory.predict(nope.Question(*network("pre", tokens, 0.2), place, observable))
            for tokens in (started, started.tokens)
        ]
        for name in ("values", "remainder", "fidelity"):
            assert np.array_equal(*(getattr(each, name) for each in found)), place


# -------------------------------------------------------------------------------- limits


def fidelities(spread, shared, common=0.3, **sizes):
    """The kernel taken as uniform, to first order, at any temperature."""
    attention = mixing(spread, shared, common, **sizes)
    return attention.uniform(), first_order_kernel(attention)[0], any_temperature(attention)[0]


@pytest.mark.parametrize("shared", [0.0, 0.4, 1.0])
def test_fidelities_agree_as_the_logits_vanish(shared):
    """Halving s^2 halves what uniform misses, and quarters what the first order misses."""
    spreads = 0.1 / 2 ** (np.arange(3) / 2)
    found = [fidelities(spread, shared) for spread in spreads]
    gaps = np.array([[np.abs(b - a).max(), np.abs(c - b).max()] for a, b, c in found])
    ratios = gaps[:-1] / gaps[1:]
    assert np.abs(ratios[:, 0] - 2).max() < 0.05
    assert np.abs(ratios[:, 1] - 4).max() < 0.2


def test_without_logits_all_fidelities_are_uniform():
    """s = 0: the prefix mean, nothing dropped."""
    uniform, first, any_s = fidelities(0.0, 0.5)
    assert np.abs(first - uniform).max() <= 1e-15
    assert np.abs(any_s - uniform).max() <= TABLED
    assert np.abs(any_temperature(mixing(0.0, 0.5))[1]).max() <= TABLED


def test_one_key_has_all_the_weight():
    """n_ctx = 1: the value, whatever the logit."""
    for found in fidelities(2.0, 1.0, common=0.0, length=1):
        assert found.tolist() == [[1.0]]


def test_equal_keys_are_attended_uniformly():
    """Every token the same: what all keys share cancels, at any s, for any values."""
    rng = np.random.default_rng(0)
    root = rng.standard_normal((6, 6))
    values = root @ root.T
    same = np.ones((6, 6))
    attention = Mixing(Prefixed(values), Prefixed(same), 9 * same, 0, 0.0, np.inf, 8, 2)
    for treatment in (first_order_kernel, any_temperature):
        found, dropped, excess = treatment(attention)
        assert np.abs(found - attention.uniform()).max() <= TABLED * np.abs(values).max()
        assert np.abs(dropped).max() <= TABLED
        assert np.abs(excess).max() <= TABLED


def test_the_spread_of_a_prefix_by_its_definition():
    """Mean of the diagonal less the mean of the rest, at every length; of one key with the next."""
    root = np.random.default_rng(3).standard_normal((6, 6))
    values = root @ root.T
    expected = [values[0, 0] - values[0, 1]]
    for length in range(2, 7):
        head = values[:length, :length]
        expected.append(head.trace() / length - head[~np.eye(length, dtype=bool)].mean())
    assert np.abs(Prefixed(values).spread - expected).max() <= 1e-13 * np.abs(values).max()
    assert Prefixed(values[:1, :1]).spread.tolist() == [0.0]


@pytest.mark.parametrize(("d_h", "spread"), [(1, 0.4), (4, 0.8)])
def test_narrow_heads_by_sampling(d_h, spread):
    """The diagonal with |q|^2 of d_h degrees: logits s |q|/sqrt(d_h) z, five standard errors."""
    rng = np.random.default_rng(d_h)
    values, _, _ = any_temperature(mixing(spread, 0.5, 0.0, d_h=d_h))
    for last in POSITIONS:
        draws = 400_000 // last
        length = np.sqrt(rng.chisquare(d_h, size=(draws, 1)) / d_h)
        squares = (softmax(spread * length * rng.standard_normal((draws, last))) ** 2).sum(1)
        error = squares.std() / np.sqrt(draws)
        assert abs(values[last - 1, last - 1] - squares.mean()) < 5 * error


@pytest.mark.parametrize("fidelity", ["uniform", "first_order", "any_temperature"])
def test_heads_change_the_logits_only_through_their_width(fidelity):
    """As d grows at fixed s, one head and four have the same kernel: d_h leaves with 1/d_h."""
    gaps = []
    for width in (64, 128):
        kernels = []
        for heads in (1, 4):
            architecture = nope.decoder(width, heads, n_ctx=6, d_ff=0)
            question = nope.Question(
                architecture, normal(width**-0.5), "blocks.0.attn_out", "kernel"
            )
            kernels.append(theory.predict(question, fidelity).values)
        gaps.append(np.abs(kernels[1] - kernels[0]).max())
    if fidelity == "any_temperature":
        assert 1.7 < gaps[0] / gaps[1] < 2.3
    else:
        assert max(gaps) <= 1e-14


@pytest.mark.parametrize("eps", [0.5, 1.0, 4.0])
def test_a_norm_with_eps_leaves_a_part_of_its_fluctuation(eps):
    """By plain softmaxes: keys on a sphere, or free, would be 3 to 10 standard errors off."""
    width, length, batch = 16, 12, 40_000
    std = 0.3 * np.sqrt(1 + eps)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, length, width))
    e = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    query, key = (rng.standard_normal((batch, width, width)) * std for _ in range(2))
    logits = ((e[:, -1:] @ query) @ (e @ key).transpose(0, 2, 1))[:, 0] / np.sqrt(width)
    outputs = np.einsum("bi,bij->bj", softmax(logits), e)
    found = width * std**2 * (outputs**2).mean(-1)
    tokens = nope.GaussianTokens(std=1.0)
    layer = nope.decoder(width, 1, n_ctx=length, norm="rmsnorm", eps=eps, d_ff=0, tokens=tokens)
    asked = nope.Question(layer, nope.init.normal(std), "blocks.0.attn.z", "second_moment")
    error = found.std() / np.sqrt(batch)
    assert abs(theory.predict(asked).values[-1] - found.mean()) < 4 * error


@pytest.mark.parametrize("d_model", [8, 64])
def test_the_first_order_over_gaussian_tokens_is_that_of_wishart_matrices(d_model):
    """(1 - 1/m)(1 + m/d)/m of s^2 where a query is none of the tokens: G = X X'/d, and

    E G A G = A + (A' + tr A)/d,  K = sum_ij E a_i a_j G_ij with the softmax to second order.

    What is left is that a query is its last token, 4/(d m) of it and stated.
    """
    tokens, count = nope.GaussianTokens(1.0), np.arange(1, 7)
    layer = nope.decoder(d_model, 1, n_ctx=6, d_ff=0, norm_position="none", tokens=tokens)
    s2, std = 1e-6, (1e-6**0.5 / d_model) ** 0.5
    question = nope.Question(layer, normal(std), "blocks.0.attn.z", "second_moment")
    found = theory.predict(question, "first_order")
    value = d_model * std**2
    plain = (1 - 1 / count) * (1 + count / d_model) / count
    own = 4 / (d_model * count) * plain
    assert (found.values / value - 1 / count) / s2 == pytest.approx(plain, rel=1e-6, abs=1e-9)
    assert (found.remainder / value / s2 >= own * (1 - 1e-6)).all()
    exact = theory.predict(question, "any_temperature")
    gap = np.abs((exact.values / value - 1 / count) / s2 - plain - own)
    assert (gap <= exact.remainder / value / s2 + 1e-6).all()


def test_a_query_is_its_own_key_and_value_by_plain_draws():
    """To first order in s^2, of Gaussian tokens: (1 + 4/(d m)) times what another's query reads."""
    rng, d_model, count = np.random.default_rng(1), 16, 3
    x = rng.normal(size=(400_000, count, d_model))
    G = np.einsum("bid,bjd->bij", x, x) / d_model
    centred = np.eye(count) - 1 / count
    C = centred @ G @ centred
    own = np.diagonal(C, axis1=1, axis2=2)
    second = C + (own[:, :, None] + own[:, None, :]) / 2 - own.mean(1)[:, None, None]
    added = (G * second).sum((1, 2)) / count**2
    plain = (1 - 1 / count) * (1 + count / d_model) / count
    for weight, expected in ((1.0, plain), (G[:, -1, -1], plain * (1 + 4 / (d_model * count)))):
        found = weight * added
        error = 5 * found.std() / len(x) ** 0.5
        assert abs(found.mean() - expected) <= error
    assert error < plain * 4 / (d_model * count) / 2
