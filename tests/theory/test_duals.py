"""Dual activations against quadrature of their definition."""

import math

import mpmath
import numpy as np
import pytest
import scipy.special
import sympy as sp
import torch
from scipy.special import ndtr

import nope
import theory
from theory.formula import compile_number_form
from theory.formulas.duals import (
    DUALS,
    GeluTanhDual,
    PositivePart,
    SiluDual,
    TanhDual,
    dual,
    error_functions,
    gelu,
    relu,
)
from theory.formulas.duals import erf as erf_dual
from theory.formulas.mehler import mehler
from theory.symbols import a, b, c

SMOOTH = {"tanh": TanhDual, "silu": SiluDual, "gelu_tanh": GeluTanhDual}
FUNCTIONS = {
    "relu": lambda x: mpmath.mpf(max(x, 0)),
    "gelu": lambda x: x * mpmath.ncdf(x),
    "gelu_tanh": lambda x: x / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * cubic(x))),
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
    "tanh": mpmath.tanh,
    "erf": mpmath.erf,
    "identity": lambda x: x,
}
SCALAR_FUNCTIONS = {
    "gelu_tanh": lambda x: x / (1 + math.exp(-math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
}
DIGITS = 30
VARIANCES = [(sp.Integer(1), sp.Integer(1)), (sp.Rational(1, 4), sp.Integer(3))]
CORRELATIONS = [sp.Rational(r, 10) for r in (-10, -7, 0, 4, 9, 10)]


def relu_by_polar_angle(left, right, rho):
    """E relu(X) relu(Y): E r^2 = 2 times the mean over the angle of both positive cosines."""
    with mpmath.workdps(DIGITS):
        between = mpmath.acos(mpmath.mpf(rho.p) / rho.q)
        low, high = between - mpmath.pi / 2, mpmath.pi / 2
        integral = mpmath.quad(lambda t: mpmath.cos(t) * mpmath.cos(t - between), [low, high])
        return sp.Float(integral / mpmath.pi, DIGITS) * sp.sqrt(left * right)


@pytest.mark.parametrize(("left", "right"), VARIANCES)
@pytest.mark.parametrize("rho", CORRELATIONS)
def test_relu_by_quadrature_in_polar_coordinates(left, right, rho):
    """The arc-cosine kernel to 25 digits, correlations -1 and 1 and unequal variances included."""
    expr = theory.formula("dual.relu").expr
    found = expr.subs({a: left, b: right, c: rho * sp.sqrt(left * right)})
    expected = relu_by_polar_angle(left, right, rho)
    assert abs(sp.N(found - expected, DIGITS)) < sp.Rational(1, 10**25)


def cubic(x):
    """The argument of GELU's approximation."""
    return x + mpmath.mpf("0.044715") * x**3


ARRAY_FUNCTIONS = {
    "gelu": lambda x: x * ndtr(x),
    "gelu_tanh": lambda x: x * scipy.special.expit(np.sqrt(8 / np.pi) * (x + 0.044715 * x**3)),
    "silu": lambda x: x * scipy.special.expit(x),
    "tanh": np.tanh,
    "erf": scipy.special.erf,
}


def by_trapezoid(phi, left, right, rho, step):
    """E phi(X) phi(Y) on a grid: for analytic integrands the trapezoid rule is spectral."""
    z = np.arange(-12, 12 + step / 2, step)
    density = np.exp(-(z**2) / 2) * step / np.sqrt(2 * np.pi)
    x = np.sqrt(left) * z[:, None]
    y = np.sqrt(right) * (rho * z[:, None] + np.sqrt(1 - rho**2) * z[None, :])
    return density @ (phi(x) * phi(y)) @ density


@pytest.mark.parametrize("name", ARRAY_FUNCTIONS)
@pytest.mark.parametrize(("left", "right"), [(1.0, 1.0), (0.25, 3.0), (1e-4, 9.0)])
@pytest.mark.parametrize("rho", [-1.0, -0.7, 0.0, 0.4, 0.999, 1.0])
def test_a_dual_by_two_dimensional_quadrature(name, left, right, rho):
    """Closed forms within what halving the grid changes and rounding, the series within 1e-9."""
    phi = ARRAY_FUNCTIONS[name]
    coarse, fine = (by_trapezoid(phi, left, right, rho, step) for step in (0.1, 0.05))
    size = np.sqrt(
        by_trapezoid(phi, left, left, 1.0, 0.05) * by_trapezoid(phi, right, right, 1, 0.05)
    )
    tolerance = 1e-9 if name in SMOOTH else 1e-13
    found = theory.formula(f"dual.{name}")(a=left, b=right, c=rho * np.sqrt(left * right))
    assert abs(fine - coarse) <= 1e-12 * size
    assert abs(found - fine) <= tolerance * size


@pytest.mark.parametrize("name", SMOOTH)
def test_a_series_by_nested_quadrature(name):
    """mpmath on the definition, the inner integral given X, for one pair each, in float64."""
    phi, (left, right, rho), quad = SCALAR_FUNCTIONS[name], (2.0, 0.7, 0.6), mpmath.fp.quad

    def given(z):
        def integrand(w):
            y = np.sqrt(right) * (rho * z + np.sqrt(1 - rho**2) * w)
            return phi(y) * np.exp(-(w**2) / 2 - z**2 / 2) / (2 * np.pi)

        return phi(np.sqrt(left) * z) * quad(integrand, [-8, 0, 8])

    expected = quad(given, [-8, 0, 8])
    found = theory.formula(f"dual.{name}")(a=left, b=right, c=rho * np.sqrt(left * right))
    assert abs(found - expected) <= 1e-9 * abs(expected)


def graded(centre, width, nodes):
    """Gauss and Legendre's rule on [-10, 10], panels doubling from `centre` up to width 1."""
    steps = width * 2.0 ** np.arange(np.ceil(-np.log2(width)))
    edges = np.concatenate([centre - steps, [centre], centre + steps, np.arange(-10.0, 11.0)])
    edges = np.unique(np.clip(edges, -10, 10))
    points, weights = np.polynomial.legendre.leggauss(nodes)
    half = np.diff(edges)[:, None] / 2
    z = (edges[:-1, None] + half * (1 + points)).ravel()
    return z, (half * weights).ravel() * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)


def by_graded_panels(phi, left, right, rho, nodes):
    """E phi(X) phi(Y), the inner integral over Y given X refined where Y changes its sign."""
    spread, (z, outer) = np.sqrt(1 - rho**2), graded(0.0, 0.1 / np.sqrt(left), nodes)
    total = 0.0
    for x, weight in zip(z, outer, strict=True):
        centre = np.clip(-rho * x / spread, -10, 10)
        w, inner = graded(centre, 0.1 / (np.sqrt(right) * spread), nodes)
        total += (
            weight * phi(np.sqrt(left) * x) * (inner @ phi(np.sqrt(right) * (rho * x + spread * w)))
        )
    return total


@pytest.mark.parametrize("name", ["gelu", *SMOOTH])
@pytest.mark.parametrize(
    ("left", "right", "rho"), [(1e6, 1e6, 0.9999), (1e6, 300.0, -0.97), (400.0, 2.0, 0.99)]
)
def test_a_dual_at_large_variances(name, left, right, rho):
    """Where the activation is a kink and the series slow: panels graded towards the kink."""
    phi = ARRAY_FUNCTIONS[name]
    coarse, fine = (by_graded_panels(phi, left, right, rho, nodes) for nodes in (12, 16))
    found = theory.formula(f"dual.{name}")(a=left, b=right, c=rho * np.sqrt(left * right))
    size = np.sqrt(left * right) / 2 if name != "tanh" else 1.0
    assert abs(fine - coarse) <= 1e-11 * size
    assert abs(found - fine) <= 1e-9 * size


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("left", "right"), [(1e-12, 1e-12), (0.5, 2.0), (30.0, 30.0), (1e6, 5e5)])
def test_a_correlation_of_one_is_one_integral(name, sign, left, right):
    """E phi(sqrt(a) Z) phi(+-sqrt(b) Z) by mpmath, relative to sqrt(dual(a, a) dual(b, b))."""
    phi = FUNCTIONS[name]

    def against(first, second, sign):
        """Relative to sqrt(ab), since mpmath's stopping rule is absolute."""
        first, second = mpmath.sqrt(first), sign * mpmath.sqrt(second)
        panels = [x for x in (1 / first, 8 / first, 64 / first, 1, 4) if x < 12]
        return mpmath.quad(
            lambda z: (
                (phi(first * z) * phi(second * z) + phi(-first * z) * phi(-second * z))
                / abs(first * second)
                * mpmath.npdf(z)
            ),
            [0, *sorted(panels), 12],
        )

    size = float(mpmath.sqrt(against(left, left, 1) * against(right, right, 1)))
    scale = np.sqrt(left * right)
    found = theory.formula(f"dual.{name}")(a=left, b=right, c=sign * scale) / scale
    assert abs(found - float(against(left, right, sign))) <= 1e-9 * size


@pytest.mark.parametrize("name", SMOOTH)
def test_a_gate_is_its_sum_of_error_functions(name):
    """To a relative 2e-10 from 1e-6 to far beyond the fit."""
    gate = SMOOTH[name].gate
    widths, weights = error_functions(gate)
    x = np.concatenate([np.geomspace(1e-6, 1, 500), np.linspace(1, 50 * gate.wide, 5000)])
    found = scipy.special.erf(x[:, None] / widths) @ weights
    assert np.abs(found / gate.function(x) - 1).max() < 2e-10


@pytest.mark.parametrize("name", SMOOTH)
def test_error_functions_and_series_agree(name):
    """Two routes to one number wherever the series ends, any variances and correlations."""
    family, rng = SMOOTH[name], np.random.default_rng(7)
    left, right = 10 ** rng.uniform(-6, 6, (2, 400))
    covariance = rng.uniform(-1, 1, 400) * np.sqrt(left * right)
    size = np.sqrt(family.mixture(left, left, left) * family.mixture(right, right, right))
    series = mehler(family.activation, left, right, covariance)
    difference = np.abs(series - family.mixture(left, right, covariance)) / size
    assert np.isfinite(series).mean() > 0.5
    assert np.nanmax(difference) <= 1.5e-9


@pytest.mark.parametrize("name", SMOOTH)
def test_activations_are_pytorchs(name):
    """One function on both sides of a comparison."""
    pytorch = {
        "tanh": torch.tanh,
        "silu": torch.nn.functional.silu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }
    x = np.linspace(-30, 30, 301)
    expected = pytorch[name](torch.from_numpy(x)).numpy()
    assert np.abs(SMOOTH[name].activation(x) - expected).max() <= 1e-14 * 30


@pytest.mark.parametrize("name", SMOOTH)
def test_a_dual_inside_an_expression(name):
    """What the MLP rule does: roots of symbols inside, compiled, on a column, a row and a matrix.

    A covariance beyond sqrt(ab), by rounding or by a step of a second difference, counts as
    sqrt(ab), a variance of 0 or below as 0; no warning (the tests make these errors).
    """
    step = sp.sqrt(a * b) * (c + (1 - c**2) * sp.Rational(7, 10))
    expr = sp.sqrt(DUALS[name].subs(c, step) ** 2 + DUALS[name].subs({b: a, c: a}))
    form = compile_number_form(expr, (a, b, c))
    variances, rho = np.array([[0.3], [1.0], [0.0]]), np.array([[0.9, 0.1], [0.7, 1.0], [0.2, 0.5]])
    found = form(variances, np.array([[2.0, 0.5]]), rho)
    for (i, j), correlation in np.ndenumerate(rho):
        left, right = variances[i, 0], (2.0, 0.5)[j]
        moved = min(correlation + 0.7 * (1 - correlation**2), 1.0)
        whole, own = (
            theory.formula(f"dual.{name}")(a=left, b=other, c=covariance)
            for other, covariance in [(right, moved * np.sqrt(left * right)), (left, left)]
        )
        assert abs(found[i, j] - np.sqrt(whole**2 + own)) <= 1e-9
    edge, beyond = (form(np.array(1.0), np.array(1.0), np.array(x)) for x in (1.0, 1.0 + 2e-16))
    assert abs(edge - beyond) <= 1e-15
    assert SMOOTH[name].numbers(np.array(-0.1), np.array(1.0), np.array(0.2)) == 0


def test_a_dual_evaluates_in_sympy():
    """`N` of a dual at numbers is its number form."""
    found = sp.N(dual("silu").subs({a: 1, b: 2, c: sp.Rational(1, 2)}))
    assert abs(found - theory.formula("dual.silu")(a=1.0, b=2.0, c=0.5)) < 1e-14


# Price's theorem: d/dc E phi(X) phi(Y) = E phi'(X) phi'(Y), exactly.
PAIR = sp.Matrix([[a, c], [c, b]])


def test_relu_by_prices_theorem():
    """E 1[X > 0, Y > 0] = (pi - t)/(2 pi), and relu's dual is 0 at c = -sqrt(ab)."""
    expr = relu().replace(PositivePart, lambda x: x)
    angle = sp.atan2(sp.sqrt(a * b - c**2), c)
    assert sp.simplify(sp.diff(expr, c) - (sp.pi - angle) / (2 * sp.pi)) == 0
    assert sp.simplify(relu().subs({a: 4, b: 9, c: -6})) == 0


def test_erf_by_prices_theorem():
    """E erf' erf' = 4/pi E exp(-X^2 - Y^2) = 4/pi det(1 + 2 Sigma)^(-1/2), and erf is odd."""
    derivative = 4 / (sp.pi * sp.sqrt((sp.eye(2) + 2 * PAIR).det()))
    assert sp.simplify(sp.diff(erf_dual(), c) - derivative) == 0
    assert erf_dual().subs(c, 0) == 0


def test_gelu_by_prices_theorem():
    """A proof of the closed form: its value and slope at c = 0 and its second derivative.

    gelu''(x) = (2 - x^2) exp(-x^2/2)/sqrt(2 pi), so E gelu''(X) gelu''(Y) is a fourth moment of
    the Gaussian pair of covariance T = (Sigma^-1 + 1)^-1 over 2 pi sqrt(det(1 + Sigma)).
    At c = 0: E gelu(X) = E X Phi(X) = a/sqrt(2 pi (1 + a)) by Stein, E gelu'(X) = 1/2 by parity.
    """
    tilted = (PAIR.inv() + sp.eye(2)).inv().applyfunc(sp.cancel)
    left, right, both = tilted[0, 0], tilted[1, 1], tilted[0, 1]
    moment = 4 - 2 * left - 2 * right + left * right + 2 * both**2
    scaled = sp.diff(gelu(), c, 2) * sp.sqrt(sp.expand((sp.eye(2) + PAIR).det()))
    assert sp.cancel(sp.radsimp(sp.powsimp(scaled)) - moment / (2 * sp.pi)) == 0
    mean = [x / sp.sqrt(2 * sp.pi * (1 + x)) for x in (a, b)]
    assert sp.simplify(gelu().subs(c, 0) - mean[0] * mean[1]) == 0
    assert sp.diff(gelu(), c).subs(c, 0) == sp.Rational(1, 4)


@pytest.mark.parametrize("name", DUALS)
def test_a_statement_says_how_the_numbers_come(name):
    """A closed form, or the series by which a function without one is computed."""
    statement, smooth = theory.formula(f"dual.{name}").statement, name in SMOOTH
    assert ("Mehler's series" in statement, "A closed form." in statement) == (smooth, not smooth)


def test_an_unknown_activation_is_refused():
    """The message lists the known ones."""
    with pytest.raises(ValueError, match=r"expected the activation to be one of identity.*swish"):
        dual("swish")


def test_identity_is_the_covariance():
    """E X Y = c."""
    assert theory.formula("dual.identity").expr == c


@pytest.mark.parametrize("name", ["relu", "gelu", "erf"])
def test_a_dual_is_symmetric(name):
    """Exchanging X and Y changes nothing."""
    expr = theory.formula(f"dual.{name}").expr
    assert sp.simplify(expr - expr.subs({a: b, b: a}, simultaneous=True)) == 0


@pytest.mark.parametrize("rho", [1.0 + 2**-52, -1.0 - 2**-52])
def test_relu_survives_rounding_at_the_edge(rho):
    """A covariance one rounding beyond sqrt(ab) gives the value at the edge, not NaN."""
    found = theory.formula("dual.relu")(a=1.0, b=1.0, c=rho)
    assert abs(found - (0.5 if rho > 0 else 0.0)) <= 4 * 2**-52


@pytest.mark.parametrize("activation", DUALS)
def test_an_mlp_of_known_pre_activations(activation):
    """E phi(x)^2 at mlp.post for x ~ N(0, d sigma^2), by quadrature, to nine digits."""
    width, std = 16, 0.3
    architecture = nope.decoder(width, 2, n_ctx=3, activation=activation, attention="uniform")
    question = nope.Question(
        architecture, nope.init.normal(std), "blocks.0.mlp.post", "second_moment"
    )
    variance = width * std**2
    phi = FUNCTIONS[activation]
    expected = mpmath.quad(
        lambda z: phi(mpmath.sqrt(variance) * z) ** 2 * mpmath.npdf(z),
        [-mpmath.inf, 0, mpmath.inf],
    )
    values = theory.predict(question).values
    assert np.abs(values - float(expected)).max() <= 1e-9 * float(expected)
