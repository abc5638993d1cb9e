"""LayerNorm's coordinates at fixed weights: exact cases, an exact integral, a simulation."""

import numpy as np
import pytest
from scipy.integrate import quad

import nope
from nope.init import normal
from nope.questions import Question, Weights, coordinate_grid, given_weights
from theory.formulas import formula
from theory.formulas.stream import coordinate_variance
from theory.papers.chi2023 import second_order_lemma4

WIDTH, TOKEN = 32, 0.5
STD = (TOKEN / WIDTH) ** 0.5
"""kappa = d^2 std^4/token^2 = 1, where the cross term is largest."""


def value_map(seed, width=WIDTH, std=STD):
    """W_O W_V of two square Gaussian matrices."""
    rng = np.random.default_rng(seed)
    return std**2 * rng.standard_normal((width, width)) @ rng.standard_normal((width, width))


@pytest.mark.parametrize("position", [1, 3])
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_a_multiple_of_the_identity_changes_nothing(scale, position):
    """M = cI commutes with the centring: by symmetry every coordinate keeps second moment 1."""
    found = coordinate_variance(scale * np.eye(8), TOKEN, position)
    assert np.abs(found - 1).max() < 1e-13


@pytest.mark.parametrize("position", [1, 3])
def test_the_coordinates_sum_to_the_width(position):
    """|LN(y)|^2 = d whatever the weights, so the second moments sum to d."""
    assert abs(coordinate_variance(value_map(0), TOKEN, position).sum() - WIDTH) < 1e-11


def test_at_width_two_the_coordinates_are_signs():
    """Two centred coordinates are opposite: their squares are 1, and the law knows."""
    assert np.abs(coordinate_variance(value_map(0, 2, 0.4), TOKEN, 1) - 1).max() < 1e-13


def test_coordinates_may_be_renamed():
    """Permuting rows and columns of M permutes the answer."""
    M, order = value_map(0), np.random.default_rng(1).permutation(WIDTH)
    plain, renamed = (coordinate_variance(A, TOKEN, 2) for A in (M, M[np.ix_(order, order)]))
    assert np.abs(renamed - plain[order]).max() < 1e-13


def gaussian_ratio(A):
    """E (A g)_j^2 d/|A g|^2 for standard normal g, exactly, by 1/x = int exp(-tx) dt.

    In the eigenbasis of A A' it is d sum_k U_jk^2 int l_k/(1 + 2 t l_k) prod (1 + 2 t l)^(-1/2) dt,
    with t = u/((1 - u) tr), u on (0, 1), by Gauss and Legendre.
    """
    values, U = np.linalg.eigh(A @ A.T)
    values = np.clip(values, 0, None)
    nodes, weights = np.polynomial.legendre.leggauss(80)
    u, w = (nodes + 1) / 2, weights / 2
    t = u / (1 - u) / values.sum()
    spread = 1 + 2 * t[:, None] * values
    density = np.exp(-np.log(spread).sum(1) / 2) * w / (1 - u) ** 2 / values.sum()
    return len(A) * U**2 @ (values / spread * density[:, None]).sum(0)


def exact_first_position(M):
    """E LN(y_1)_j^2 to quadrature's error: y_1 = (r + M) e, r = |Px|/sqrt(d) independent of e.

    LN forgets the length of e, so e may be P g; r is sx chi_{d-1}/sqrt(d), a second quadrature.
    """
    d = len(M)
    P = np.eye(d) - 1 / d
    x = np.linspace(np.sqrt(d - 1) - 5, np.sqrt(d - 1) + 5, 27)
    x = x[x > 0]
    log = (d - 2) * np.log(x) - x**2 / 2
    weights = np.exp(log - log.max())
    parts = [gaussian_ratio(P @ (TOKEN * r / np.sqrt(d) * P + M @ P)) for r in x]
    return np.average(parts, axis=0, weights=weights)


def test_the_exact_integral_by_simulation():
    """The second route itself: against plain draws of x, within five standard errors."""
    M = value_map(0)
    mean, error = simulated(M, 1, 400_000)
    assert (np.abs(exact_first_position(M) - mean) < 5 * error).all()


def test_the_exact_integral_at_width_two():
    """The second route itself: one entry by direct integration over the angle of g."""
    direct, error = quad(
        lambda t: 2 * np.cos(t) ** 2 / (np.cos(t) ** 2 + np.sin(t) ** 2 / 4) / (2 * np.pi),
        0,
        2 * np.pi,
    )
    assert abs(gaussian_ratio(np.diag([1.0, 0.5]))[0] - direct) < error + 1e-9


def simulated(M, position, draws, batch=20_000):
    """Mean and standard error of LN(y)_j^2, y = x_m + M mean(LN(x_1), ..., LN(x_m))."""
    rng = np.random.default_rng(position)
    width, sums, squares = len(M), 0.0, 0.0
    for _ in range(draws // batch):
        x = TOKEN * rng.standard_normal((batch, position, width))
        e = x - x.mean(2, keepdims=True)
        e /= np.sqrt((e**2).mean(2, keepdims=True))
        y = x[:, -1] + e.mean(1) @ M.T
        y -= y.mean(1, keepdims=True)
        z = y**2 / (y**2).mean(1, keepdims=True)
        sums, squares = sums + z.sum(0), squares + (z**2).sum(0)
    mean = sums / draws
    return mean, np.sqrt((squares / draws - mean**2) / draws)


def leading(M, position):
    """(m sx^2 + 2 sx M_jj + sum_i M_ji^2)/(m sx^2 + g), the first-order form at kappa = 1."""
    total = (position + 1) * TOKEN**2
    return (position * TOKEN**2 + 2 * TOKEN * np.diag(M) + (M**2).sum(1)) / total


def root_mean_square(x):
    return np.sqrt((x**2).mean())


@pytest.mark.parametrize("width", [32, 64])
def test_second_order_is_nearer_than_first(width):
    """At m = 1 the error is below a third of the first-order form's, against the exact integral."""
    M = value_map(3, width, (TOKEN / width) ** 0.5)
    exact = exact_first_position(M)
    second = root_mean_square(coordinate_variance(M, TOKEN, 1) - exact)
    assert second < root_mean_square(leading(M, 1) - exact) / 3


def test_the_error_falls_faster_than_one_over_d():
    """Second order in 1/d: eight times the width leaves less than an eighth of the error."""
    errors = []
    for width in (16, 128):
        M = value_map(3, width, (TOKEN / width) ** 0.5)
        exact = exact_first_position(M)
        errors.append(root_mean_square(coordinate_variance(M, TOKEN, 1) - exact))
    assert errors[1] < errors[0] / 8


def lemma4(width, seed):
    """The question of Lemma 4 at kappa = 1, and its M."""
    architecture = nope.decoder(
        width, 1, n_ctx=2, tokens=nope.GaussianTokens(TOKEN), attention="uniform"
    )
    question = Question(
        architecture,
        normal((TOKEN / width) ** 0.5),
        "blocks.0.ln2",
        "coordinate_second_moment",
        given=Weights(seed),
    )
    weights = given_weights(question)
    return question, (weights["blocks.0.attn.W_V"] @ weights["blocks.0.attn.W_O"]).T


@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_claims_theory_is_within_its_remainder_at_the_first_position(width, seed):
    """Lemma 4's best theory against the exact integral: off by less than it says."""
    question, M = lemma4(width, seed)
    found = second_order_lemma4(question)
    exact = exact_first_position(M)[coordinate_grid(width)]
    assert (np.abs(found.values[0] - exact) <= found.remainder[0]).all()


@pytest.mark.parametrize("kappa", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("width", [16, 64])
def test_the_formula_is_within_its_remainder(width, kappa):
    """The first-order form against the exact integral, every coordinate; not ten times too wide."""
    std = (kappa**0.5 * TOKEN / width) ** 0.5
    M, law = value_map(4, width, std), formula("residual.coordinate_variance")
    known = {"M_jj": np.diag(M), "M_j2": (M**2).sum(1), "m": 1, "d": width}
    known |= {"sigma": std, "sigma_x": TOKEN}
    gap = np.abs(law(**known) - exact_first_position(M))
    remainder = law.remainder_at(**known)
    assert (gap <= remainder).all()
    assert root_mean_square(remainder) < 20 * root_mean_square(gap)


@pytest.mark.parametrize("width", [32, 64])
def test_the_claims_theory_is_within_its_remainder_at_the_second_position(width):
    """The same at m = 2 against 400000 plain draws, five standard errors allowed."""
    question, M = lemma4(width, 0)
    found = second_order_lemma4(question)
    mean, error = (x[coordinate_grid(width)] for x in simulated(M, 2, 400_000))
    assert (np.abs(found.values[1] - mean) <= found.remainder[1] + 5 * error).all()
