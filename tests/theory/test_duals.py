"""Dual activations against quadrature of their definition."""

import mpmath
import numpy as np
import pytest
import sympy as sp
from scipy.special import ndtr

import nope
import theory
from theory.symbols import a, b, c

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


def gelu_by_trapezoid(left, right, rho, step):
    """E gelu(X) gelu(Y) on a grid: for analytic integrands the trapezoid rule is spectral."""
    z = np.arange(-12, 12 + step / 2, step)
    density = np.exp(-(z**2) / 2) * step / np.sqrt(2 * np.pi)
    x = np.sqrt(left) * z[:, None]
    y = np.sqrt(right) * (rho * z[:, None] + np.sqrt(1 - rho**2) * z[None, :])
    return density @ (x * ndtr(x) * y * ndtr(y)) @ density


@pytest.mark.parametrize(("left", "right"), [(1.0, 1.0), (0.25, 3.0), (1e-4, 9.0)])
@pytest.mark.parametrize("rho", [-1.0, -0.7, 0.0, 0.4, 0.999, 1.0])
def test_gelu_by_two_dimensional_quadrature(left, right, rho):
    """The closed form within what halving the grid changes, plus float64 rounding of 1e5 terms."""
    coarse, fine = (gelu_by_trapezoid(left, right, rho, step) for step in (0.1, 0.05))
    error = abs(fine - coarse) + 1e-13 * np.sqrt(left * right)
    found = theory.formula("dual.gelu")(a=left, b=right, c=rho * np.sqrt(left * right))
    assert abs(found - fine) <= error


def test_identity_is_the_covariance():
    """E X Y = c."""
    assert theory.formula("dual.identity").expr == c


@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_a_dual_is_symmetric(name):
    """Exchanging X and Y changes nothing."""
    expr = theory.formula(f"dual.{name}").expr
    assert sp.simplify(expr - expr.subs({a: b, b: a}, simultaneous=True)) == 0


@pytest.mark.parametrize("rho", [1.0 + 2**-52, -1.0 - 2**-52])
def test_relu_survives_rounding_at_the_edge(rho):
    """A covariance one rounding beyond sqrt(ab) gives the value at the edge, not NaN."""
    found = theory.formula("dual.relu")(a=1.0, b=1.0, c=rho)
    assert abs(found - (0.5 if rho > 0 else 0.0)) <= 4 * 2**-52


@pytest.mark.parametrize("activation", ["relu", "gelu", "identity"])
def test_an_mlp_of_known_pre_activations(activation):
    """E phi(x)^2 at mlp.post for x ~ N(0, d sigma^2), by quadrature, to nine digits."""
    width, std = 16, 0.3
    architecture = nope.decoder(width, 2, n_ctx=3, activation=activation, attention="uniform")
    question = nope.Question(
        architecture, nope.init.normal(std), "blocks.0.mlp.post", "second_moment"
    )
    variance = width * std**2
    functions = {
        "relu": lambda x: mpmath.mpf(max(x, 0)),
        "gelu": lambda x: x * mpmath.ncdf(x),
        "identity": lambda x: x,
    }
    phi = functions[activation]
    expected = mpmath.quad(
        lambda z: phi(mpmath.sqrt(variance) * z) ** 2 * mpmath.npdf(z),
        [-mpmath.inf, 0, mpmath.inf],
    )
    values = theory.predict(question).values
    assert np.abs(values - float(expected)).max() <= 1e-9 * float(expected)
