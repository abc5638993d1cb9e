"""Fluctuations of the empirical kernel: enumeration, quadrature, plain draws and real layers."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

import montecarlo
import nope
import theory
from nope.init import normal, orthogonal
from nope.questions import Question
from theory.bindings import local_bindings
from theory.fluctuations import (
    ENTRIES,
    NEAR,
    Fluctuation,
    Gram,
    correlation_shift,
    correlation_width,
    curved,
    mapped,
    of_means,
    response_of_means,
    wishart,
)
from theory.formula import compile_number_form
from theory.formulas import duals, formula
from theory.formulas.activations import ACTIVATIONS
from theory.predict import rules_to
from theory.propagation import KernelValues, all_pairs
from theory.rules.activation import unit_covariance
from theory.symbols import a, b, c

RHO = np.array([-0.6, 0.0, 0.3, 0.9])


def propagated(architecture, init, place, fidelity="uniform"):
    """Everything known at a place and before it, of all pairs of positions."""
    rules, n_ctx = rules_to(architecture, place, fidelity), architecture.n_ctx
    known = local_bindings(architecture, init)
    return KernelValues(rules, known, n_ctx, all_pairs(n_ctx), {})


# ----------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("rho", RHO)
def test_wishart_by_the_three_point_rule(rho):
    """Cov of x^2, y^2 and xy at d = 1: degree four in two Gaussians, each three points."""
    nodes = [(-np.sqrt(3), 1 / 6), (0.0, 2 / 3), (np.sqrt(3), 1 / 6)]
    rows, weights = [], []
    for (z, p), (w, q) in product(nodes, nodes):
        x, y = z, rho * z + np.sqrt(1 - rho**2) * w
        rows.append((x * x, y * y, x * y))
        weights.append(p * q)
    assert (
        np.abs(
            wishart((1.0, 1.0, np.array(rho))) - np.cov(np.array(rows).T, aweights=weights, ddof=0)
        ).max()
        < 1e-13
    )


def test_the_shift_of_a_cosine_is_the_expansions_first_term():
    """Against Stirling's series of the exact E cos of Gaussian coordinates."""
    width = 1e4
    shift = correlation_shift(wishart((1.0, 1.0, RHO)) / width, RHO)
    expansion = formula("cosine.gaussian_pair_expansion")(rho=RHO, d=width)
    assert np.abs(RHO + shift - expansion).max() < 1e-15
    assert np.allclose(correlation_width(wishart((1.0, 1.0, RHO)), RHO), 1.0)


@pytest.mark.parametrize("function", ["relu", "gelu", "tanh"])
def test_units_by_gauss_and_hermite(function):
    """Fourth moments of two activated Gaussians: Mehler's series against a product rule."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(160)
    joint = np.outer(weights, weights) / weights.sum() ** 2
    phi, variance, tolerance = ACTIVATIONS[function], 1.3, {"relu": 5e-3}.get(function, 1e-6)
    for rho in (0.0, 0.4, 0.8):
        x = np.sqrt(variance) * nodes[:, None] + 0 * nodes
        y = np.sqrt(variance) * (rho * nodes[:, None] + np.sqrt(1 - rho**2) * nodes)
        f, g = phi(x), phi(y)
        size = (joint * f * f).sum()
        rows = [f * f / size, g * g / size, f * g / size]
        means = np.array([(joint * row).sum() for row in rows])
        expected = np.array([[(joint * a * b).sum() for a in rows] for b in rows])
        expected -= np.outer(means, means)
        found = unit_covariance(function, variance, np.array(rho))
        assert np.abs(found - expected).max() < tolerance * expected.max()


@pytest.mark.parametrize("function", ["gelu", "tanh", "silu"])
def test_units_of_a_haar_matrix_by_quadrature(function):
    """A unit is a coordinate of the sphere in 4 d dimensions: what is left is of order 1/d^2."""
    phi, missed = ACTIVATIONS[function], []
    t, weights = np.polynomial.legendre.leggauss(400)
    for d in (16, 32):
        density = weights * (1 - t**2) ** ((4 * d - 3) / 2)
        expected = density @ phi(np.sqrt(d) * t) ** 2 / density.sum()
        stack = nope.decoder(d, 1, n_ctx=1, activation=function, norm="rmsnorm")
        asked = Question(stack, orthogonal(), "blocks.0.mlp.post", "second_moment")
        found = theory.predict(asked)
        missed.append(expected - found.values[0])
        assert abs(missed[-1]) < found.remainder[0]
    assert missed[0] / missed[1] == pytest.approx(4, rel=0.1)


def on_a_sphere(function, radius, d):
    """E of a function of two coordinates of a vector of this length, uniform in d dimensions."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    square, angle = (1 + nodes[:, None]) / 2, 2 * np.pi * np.arange(64) / 64  # Beta(1, d/2 - 1)
    density = weights * (1 - square[:, 0]) ** (d / 2 - 2)
    r = radius * np.sqrt(square)
    return density @ function(r * np.cos(angle), r * np.sin(angle)).mean(1) / density.sum()


@pytest.mark.parametrize("haar", [False, True])
@pytest.mark.parametrize("function", ["gelu", "tanh"])
def test_pairs_of_units_that_are_not_gaussian(haar, function):
    """Of unit vectors and of uniform weights, |x|^2 = |y|^2 = d = 8: averaged over rotations, two
    coordinates of a sphere of the weights' length.  Most of what the dual lacks is there."""
    rng, d, phi, rho = np.random.default_rng(1), 8, ACTIVATIONS[function], (0.0, 0.5, -0.5)
    w = rng.uniform(-1, 1, (200_000, d)) * 3**0.5
    lengths = np.full(1, d**0.5) if haar else np.linalg.norm(w, axis=1)

    def expected(r):
        def product(u, v):
            return phi(u) * phi(r * u + np.sqrt(1 - r * r) * v)

        at = np.linspace(0, (3 * d) ** 0.5, 30)
        values = np.polynomial.Chebyshev.fit(at, [on_a_sphere(product, R, d) for R in at], 15)
        return values(lengths).mean()

    one, nothing = np.ones(3), np.zeros((3, 3, 3))
    fixed = Fluctuation(nothing, nothing, d, nothing, nothing)
    peak = -2 / (d + 2) if haar else -1.2 / d
    behind = mapped(fixed, Gram(one, one, one), np.array(rho), nothing, d, peak)
    dual, at = compile_number_form(duals.dual(function), (a, b, c)), (one, one, np.array(rho))
    _, second = curved(behind, Gram(*at), dual, nothing)
    lacking = [expected(r) for r in rho] - dual(*at)
    assert (np.abs(lacking - second.term.mn) < 0.25 * np.abs(lacking) + 5e-4).all()
    assert np.abs(lacking).max() > 2e-3


# ------------------------------------------------------------------------------ plain draws


def entries(x, y):
    """|x|^2/d, |y|^2/d and <x, y>/d, per draw."""
    pair = x, y
    return np.array([(pair[a] * pair[b]).mean(1) for a, b in ENTRIES])


def relative_covariance(left, right):
    """The covariance of two triples over their sizes; its standard error."""
    sides = []
    for triple in (left, right):
        mean = triple.mean(1)
        size = np.sqrt([mean[0] ** 2, mean[1] ** 2, mean[0] * mean[1]])[:, None]
        sides.append((triple - mean[:, None]) / size)
    products = sides[0][:, None] * sides[1]
    return products.mean(2), products.std(2) / np.sqrt(products.shape[2])


@pytest.mark.parametrize("c", [0.0, 0.6])
@pytest.mark.parametrize("at", [(2, 5), (4, 3)])
def test_means_of_normalised_vectors_by_plain_draws(c, at):
    """Covariance of the entries of two prefix means, to 4/d: exchangeable vectors at d = 64."""
    rng, width, draws = np.random.default_rng(0), 64, 20_000
    common = rng.standard_normal((draws, 1, width))
    x = np.sqrt(c) * common + np.sqrt(1 - c) * rng.standard_normal((draws, max(at), width))
    x *= np.sqrt(width) / np.linalg.norm(x, axis=2, keepdims=True)
    triple = entries(*(x[:, :p].mean(1) for p in at))
    found, error = relative_covariance(triple, triple)
    expected, _ = of_means(np.array(c), *map(np.array, at))
    assert (np.abs(width * found - expected) < 5 * width * error + 4 / width * expected.max()).all()


@pytest.mark.parametrize("c", [0.0, 0.6])
@pytest.mark.parametrize("at", [(2, 5), (4, 3)])
def test_the_response_of_means_by_regression(c, at):
    """Of the means' entries on those of the vectors at their ends: least squares over draws."""
    rng, width, draws = np.random.default_rng(1), 16, 40_000
    common = rng.standard_normal((draws, 1, width))
    x = np.sqrt(c) * common + np.sqrt(1 - c) * rng.standard_normal((draws, max(at), width))
    ends = entries(*(x[:, p - 1] for p in at))
    means = entries(*(x[:, :p].mean(1) for p in at))
    cross, noise = relative_covariance(means, ends)
    own, _ = relative_covariance(ends, ends)
    found = response_of_means(np.array(c), *map(np.array, at))
    spread = 5 * noise @ np.abs(np.linalg.inv(own))
    assert (np.abs(cross @ np.linalg.inv(own) - found) < spread).all()


# ------------------------------------------------------------------------------ operations


def test_a_norm_and_maps_leave_what_they_should():
    """After a norm no norm fluctuates; a Gaussian map adds wishart/d, a square Haar map nothing."""
    architecture = nope.decoder(16, 4, n_ctx=3, attention="uniform")
    for init, added in ((normal(0.25), 1 / 16), (orthogonal(), 0.0)):
        values = propagated(architecture, init, "blocks.0.mlp.pre")
        normed = values._passed("blocks.0.ln1")[0].covariance
        mapped = values._passed("blocks.0.attn.v")[0].covariance
        assert not normed[:2].any()
        rho = np.where(np.eye(3, dtype=bool), NEAR, 0.0)
        assert np.allclose(mapped - normed, added * wishart((1.0, 1.0, rho)))


def test_without_fluctuation_nothing_is_added():
    """The leading order is the limit of large widths: what is added falls as 1/d."""
    added = []
    for width in (10**3, 10**5):
        architecture = nope.decoder(width, 4, n_ctx=4, attention="uniform", d_ff=4 * width)
        values = propagated(architecture, normal(width**-0.5), "blocks.0.resid_post")
        place = "blocks.0.mlp.post"
        added.append(np.abs(values.kernel(place) - values._leading(place, "mn")).max())
    assert added[0] > 0
    assert added[0] / added[1] == pytest.approx(100, rel=0.02)


def test_between_the_positions_of_the_grid():
    """Interpolated second orders are those of all positions, within a tenth."""
    architecture = nope.decoder(64, 4, n_ctx=48, attention="uniform")
    place = "blocks.0.ln2"
    few = propagated(architecture, normal(0.125), place)
    all_of_them = propagated(architecture, normal(0.125), place)
    all_of_them._grid = np.arange(1, 49)
    one, other = (v.kernel(place) - v._leading(place, "mn") for v in (few, all_of_them))
    assert len(few._grid) < 48
    assert np.abs(one - other).max() < 0.1 * np.abs(other).max()


# ------------------------------------------------------------------------------ real layers

STACKS = {
    "gelu": {},
    "swiglu": {"activation": "swiglu"},
    "post relu": {"norm_position": "post", "activation": "relu"},
    "no norm": {"norm_position": "none", "activation": "relu"},
    "scaled": {"activation": "tanh", "residual_scale": 0.5},
}
REPEATED = {"activation": "swiglu", "tokens": nope.tokens.EmbeddingTokens(5, 1.0)}
DRAWS = 20_000


@pytest.mark.parametrize("name", STACKS)
def test_uniform_stacks_of_width_16(name):
    """Two layers: within the remainder and 5 standard errors, and the remainder below a sixth."""
    architecture = nope.decoder(16, 4, 2, n_ctx=4, attention="uniform", **STACKS[name])
    place = architecture.operations[-1].place.replace("ln_final", "blocks.1.resid_post")
    questions = [
        Question(architecture, normal(0.25), place, o) for o in ("kernel", "adjacent_cosine")
    ]
    for question, found in zip(questions, montecarlo.measure(questions, DRAWS), strict=True):
        theory_says = theory.predict(question)
        gap = np.abs(theory_says.values - found.mean)
        assert (gap <= theory_says.remainder + 5 * found.standard_error + 1e-6).all()
        assert theory_says.remainder.max() <= np.abs(theory_says.values).max() / 6


@pytest.mark.parametrize("name", ["gelu", "swiglu", "no norm"])
def test_the_second_order_is_most_of_what_the_leading_order_lacks(name):
    """E cos of neighbours at d = 32: the cosine of the mean kernel is off by over three times as
    much as the prediction, noise aside."""
    architecture = nope.decoder(32, 4, 2, n_ctx=4, attention="uniform", **STACKS[name])
    place = "blocks.1.resid_post"
    question = Question(architecture, normal(32**-0.5), place, "adjacent_cosine")
    found = montecarlo.measure(question, DRAWS)
    wide = nope.decoder(32 * 10**6, 4, 2, n_ctx=4, attention="uniform", **STACKS[name])
    limit = theory.predict(Question(wide, normal((32 * 10**6) ** -0.5), place, "adjacent_cosine"))
    prediction = theory.predict(question).values
    without, gap, noise = (
        np.linalg.norm(x)
        for x in (limit.values - found.mean, prediction - found.mean, found.standard_error)
    )
    assert without > 6 * noise
    assert 3 * (gap - 3 * noise) < without


@pytest.mark.parametrize("observable", ["kernel", "adjacent_cosine", "second_moment"])
def test_ids_that_repeat_bend_a_dual(observable):
    """Gated units of five tokens: a mean over ids of the dual, not the dual of the mean."""
    architecture = nope.decoder(32, 4, n_ctx=6, d_ff=64, **REPEATED)
    question = Question(architecture, normal(0.1), "blocks.0.mlp.post", observable)
    found, theory_says = montecarlo.measure(question, 8192), theory.predict(question)
    gap = np.abs(theory_says.values - found.mean)
    assert (gap <= theory_says.remainder + 5 * found.standard_error).all()
    assert (gap <= 0.35 * np.abs(found.mean) + 5 * found.standard_error).all()


@pytest.mark.parametrize("norm_position", ["none", "pre"])
def test_logits_of_later_layers_are_averaged_over_their_keys(norm_position):
    """E l_mn^2 over n <= m where norms differ between positions, and fluctuate together."""
    architecture = nope.decoder(16, 4, 2, n_ctx=4, eps=0.5, norm_position=norm_position)
    init = nope.init.lecun_normal()
    question = Question(architecture, init, "blocks.1.attn.scores", "second_moment")
    found, theory_says = montecarlo.measure(question, DRAWS), theory.predict(question)
    gap = np.abs(theory_says.values - found.mean)
    assert (gap <= theory_says.remainder + 5 * found.standard_error).all()
    assert (gap <= 0.2 * found.mean + 5 * found.standard_error).all()


def test_a_norm_behind_a_norm_moves_both_ways_or_none():
    """Rounding leaves one of two norms without fluctuation: no index is out of range."""
    for width in (24, 64):
        architecture = nope.decoder(width, 4, n_ctx=10, norm_position="post")
        for init in (nope.init.torch_default(), nope.init.xavier_uniform()):
            question = Question(architecture, init, "blocks.0.mlp_out", "adjacent_cosine")
            assert np.isfinite(theory.predict(question).values).all()


@pytest.mark.parametrize(("width", "eps"), [(3, 0.01), (6, 1e-5), (6, 0.1), (16, 1.0)])
def test_eps_at_small_widths_against_the_exact_mean(width, eps):
    """E v/(v + eps) over the variance of a token's coordinates, chi-square of d - 1 over d."""
    tokens = nope.tokens.GaussianTokens(1.0)
    architecture = nope.decoder(width, 1, n_ctx=1, eps=eps, tokens=tokens)
    found = theory.predict(Question(architecture, normal(0.1), "blocks.0.ln1", "second_moment"))
    variance = stats.chi2(width - 1, scale=1 / width)
    expected = variance.expect(lambda v: v / (v + eps))
    assert abs(found.values[0] - expected) <= found.remainder[0]
    assert found.remainder[0] < 0.1
