"""The adjacency score's law: its variance by the delta method, its numbers by simulation."""

from itertools import combinations, product

import numpy as np
import pytest
import sympy as sp

import nope
import theory
from theory.claims import UNINFORMATIVE_BAND
from theory.formulas import cosine
from theory.formulas.cosine import adjacency_score, difference_variance
from theory.symbols import i, j, k

INDICES = "abc"
PRODUCTS = [(p, q) for p, q in product(INDICES, repeat=2) if p <= q]


def delta_method_variance(r_ij, r_ik, r_jk):
    """d Var(C_ik - C_ij) of uncentred sample cosines of Gaussian triples (i, j, k) = (a, b, c).

    S_pq is the mean of d products; by Isserlis d Cov(S_pq, S_st) = K_ps K_qt + K_pt K_qs.
    """
    S = {pair: sp.Symbol(f"S_{pair[0]}{pair[1]}", positive=True) for pair in PRODUCTS}

    def sample(p, q):
        return S[p, q] / sp.sqrt(S[p, p] * S[q, q])

    correlation = {("a", "b"): r_ij, ("a", "c"): r_ik, ("b", "c"): r_jk}
    mean = {pair: correlation.get(pair, sp.Integer(1)) for pair in PRODUCTS}

    def kernel(p, q):
        return mean[min(p, q), max(p, q)]

    difference = sample("a", "c") - sample("a", "b")
    at = {S[pair]: mean[pair] for pair in PRODUCTS}
    slope = {pair: difference.diff(S[pair]).subs(at) for pair in PRODUCTS}
    return sum(
        slope[p, q] * slope[s, t] * (kernel(p, s) * kernel(q, t) + kernel(p, t) * kernel(q, s))
        for (p, q), (s, t) in product(PRODUCTS, repeat=2)
    )


@pytest.mark.parametrize("squares", [(1, 4, 9), (1, 2, 3), (4, 5, 25), (1, 99, 100), (9, 16, 400)])
def test_difference_variance_by_the_delta_method(squares):
    """V at exact positions, correlations sqrt(min/max): zero difference in exact arithmetic."""
    first, middle, last = (sp.Integer(p) for p in squares)
    expected = delta_method_variance(
        sp.sqrt(first / last), sp.sqrt(middle / last), sp.sqrt(first / middle)
    )
    found = difference_variance().subs({j: first, k: middle, i: last})
    assert sp.simplify(found - expected) == 0
    assert expected > 0


def test_isserlis_by_enumeration():
    """E x^2 y^2 = K_xx K_yy + 2 K_xy^2 for x = u, y = (u + v): the moments the delta method uses.

    The two-point rule has wrong fourth moments, the three-point rule (0, +-sqrt 3) the right ones.
    """
    nodes = {-1: sp.Rational(1, 6), 0: sp.Rational(2, 3), 1: sp.Rational(1, 6)}
    moment = sum(nodes[u] * nodes[v] * 9 * u**2 * (u + v) ** 2 for u, v in product(nodes, repeat=2))
    assert moment == 1 * 2 + 2 * 1**2


def self_cosines(rng, draws, length, width, maps=0, layernorm=False):
    """Cosine matrices of prefix means of normals, after `maps` Gaussian matrices."""
    x = rng.standard_normal((draws, length, width))
    if layernorm:
        x -= x.mean(2, keepdims=True)
        x /= np.linalg.norm(x, axis=2, keepdims=True)
    z = x.cumsum(1)
    for _ in range(maps):
        z = z @ rng.standard_normal((draws, width, width))
    z /= np.linalg.norm(z, axis=2, keepdims=True)
    return z @ z.transpose(0, 2, 1)


def simulated_score(C, variant):
    """Mean and standard error over draws of the share of triples j < k < i with C_ij < C_ik."""
    length = C.shape[1]
    hits = []
    for row in range(2, length):
        for left, right in combinations(range(row), 2):
            if variant == "triples" or right == left + 1:
                hits.append(C[:, row, left] < C[:, row, right])
    per_draw = np.mean(hits, axis=0)
    return per_draw.mean(), per_draw.std(ddof=1) / np.sqrt(len(per_draw))


@pytest.mark.parametrize(("maps", "layernorm"), [(0, False), (1, False), (1, True), (2, True)])
def test_score_law_by_simulation(maps, layernorm):
    """Prefix means, then one or two Gaussian maps: the law at d_eff = d/(maps + 1).

    Both variants within five standard errors plus the returned remainder, which is below the
    10% at which a band is called uninformative.
    """
    length, width = 12, 48
    rng = np.random.default_rng([maps, layernorm])
    C = self_cosines(rng, 6000, length, width, maps, layernorm)
    for variant in ("triples", "steps"):
        value, remainder = adjacency_score(length, width / (maps + 1), variant)
        found, error = simulated_score(C, variant)
        assert remainder < UNINFORMATIVE_BAND
        assert abs(found - value) <= 5 * error + remainder, (
            variant,
            found,
            value,
            remainder,
            error,
        )


def test_noise_is_a_coin_and_no_noise_is_certain():
    """d_eff -> 0 gives 1/2, d_eff -> infinity gives 1."""
    for variant in ("triples", "steps"):
        assert abs(adjacency_score(10, 1e-12, variant)[0] - 0.5) < 1e-5
        assert abs(adjacency_score(10, 1e9, variant)[0] - 1) < 1e-12


def plain_average(n_ctx, width, variant):
    """The mean of the triple's law over every triple, nothing interpolated."""
    law = theory.formula("cosine.triple_probability")
    triples = np.array(list(combinations(range(1, n_ctx + 1), 3)))
    if variant == "steps":
        triples = triples[triples[:, 1] == triples[:, 0] + 1]
    left, middle, right = triples.T
    symbols = {"j": left, "k": middle, "i": right, "d_eff": width}
    return law(**symbols).mean(), law.remainder_at(**symbols).mean()


@pytest.mark.parametrize("variant", ["triples", "steps"])
def test_short_contexts_average_every_triple(variant):
    """Up to 64 positions nothing is interpolated: the plain mean of the law."""
    found, expected = adjacency_score(20, 96.0, variant), plain_average(20, 96.0, variant)
    assert np.abs(np.subtract(found, expected)).max() < 1e-12


@pytest.mark.parametrize("variant", ["triples", "steps"])
def test_interpolated_rows_equal_the_plain_mean(variant):
    """Beyond 64 positions rows are interpolated: within the law's own remainder."""
    value, remainder = adjacency_score(150, 384.0, variant)
    assert abs(value - plain_average(150, 384.0, variant)[0]) < remainder


@pytest.mark.parametrize("row", [513, 1200])
def test_long_rows_by_the_midpoint_rule_equal_all_their_pairs(monkeypatch, row):
    """The midpoint rule against every pair of the row: within the law's own remainder."""
    value, remainder = cosine._row(row, 384.0, "triples")
    monkeypatch.setattr(cosine, "LARGE", row)
    exact, _ = cosine._row(row, 384.0, "triples")
    assert abs(value - exact) < remainder


@pytest.mark.parametrize(("place", "maps"), [("blocks.0.attn.z", 2), ("blocks.0.attn_out", 3)])
@pytest.mark.parametrize("variant", ["triples", "steps"])
def test_predict_counts_the_maps(place, maps, variant):
    """d_eff = d/2 at attn.z, d/3 at attn_out, as `predict` uses it."""
    architecture = nope.decoder(48, 4, n_ctx=12, attention="uniform")
    name = "adjacency_score" if variant == "triples" else "adjacency_score.steps"
    question = nope.Question(architecture, nope.init.normal(0.1), place, name)
    found = theory.predict(question)
    value, remainder = adjacency_score(12, 48 / maps, variant)
    assert found.values.shape == (1,)
    assert found.values[0] == value
    assert found.remainder[0] == remainder
    assert found.status is theory.Status.LEADING_ORDER
