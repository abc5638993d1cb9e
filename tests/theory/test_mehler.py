"""Mehler's series against moments of Gaussian pairs, closed forms and its own error bound."""

import numpy as np
import pytest
from scipy.special import erf, eval_hermitenorm, gammaln, ndtr

import theory
from theory.formulas.mehler import (
    TERMS,
    TOLERANCE,
    expand,
    half_line,
    mehler,
    weighted_polynomials,
)

CLOSED = {
    "relu": lambda x: np.maximum(x, 0.0),
    "gelu": lambda x: x * ndtr(x),
    "erf": erf,
}


def pairs(variances, correlations):
    """A column of variances against a row, the middle axis, and correlations along the first."""
    a, b = np.array(variances)[:, None], np.array(variances)[None, :]
    return a, b, np.array(correlations)[:, None, None] * np.sqrt(a * b)


@pytest.mark.parametrize("power", range(0, 12, 2))
def test_the_nodes_integrate_even_moments(power):
    """E Z^(2k) = (2k - 1)!!, to rounding."""
    z, weights = half_line()
    exact = float(np.prod(np.arange(power - 1, 0, -2, dtype=float)))
    assert abs(weights @ z**power - exact) <= 1e-13 * exact


@pytest.mark.parametrize("parity", [0, 1])
def test_the_polynomials_are_hermites(parity):
    """SciPy's He_k over sqrt(k!), to the highest degree in use."""
    z, weights = half_line()
    found = weighted_polynomials()[parity] / weights[:, None]
    degrees = 2 * np.arange(TERMS) + parity
    expected = eval_hermitenorm(degrees, z[:, None]) * np.exp(-gammaln(degrees + 1) / 2)
    scale = np.abs(expected).max(axis=1, keepdims=True)
    assert (np.abs(found - expected) <= 1e-11 * scale).all()


def test_moments_of_a_gaussian_pair():
    """E X^2 Y^2 = ab + 2c^2 and E X^3 Y^3 = 9abc + 6c^3 (Isserlis), both parities at once too."""
    a, b, c = pairs([0.3, 1.0, 40.0], [-1.0, -0.4, 0.0, 0.7, 1.0])
    square, cube = a * b + 2 * c**2, 9 * a * b * c + 6 * c**3
    for phi, exact in [
        (lambda x: x**2, square),
        (lambda x: x**3, cube),
        (lambda x: x**2 + x**3, square + cube),
    ]:
        size = np.sqrt(phi_squared(phi, a) * phi_squared(phi, b))
        assert (np.abs(mehler(phi, a, b, c) - exact) <= 1e-12 * size).all()


def phi_squared(phi, variance):
    """E phi(sqrt(v) Z)^2 on a fine grid."""
    z = np.linspace(-14, 14, 28001)
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * 1e-3
    return phi(np.sqrt(variance)[..., None] * z) ** 2 @ density


@pytest.mark.parametrize("name", CLOSED)
def test_the_series_meets_the_closed_form(name):
    """Both routes to one dual, variances 1e-12 to 1e4: within the tolerance where not refused."""
    a, b, c = pairs([1e-12, 1e-3, 0.5, 2.0, 1e4], [-1, -0.99, -0.8, -0.3, 0, 0.5, 0.9, 1])
    dual = theory.formula(f"dual.{name}")
    size = np.sqrt(dual(a=a, b=a, c=a) * dual(a=b, b=b, c=b))
    error = np.abs(mehler(CLOSED[name], a, b, c) - dual(a=a, b=b, c=c)) / size
    reached = ~np.isnan(error)
    assert error[reached].max() <= TOLERANCE
    assert reached[2:6].all()  # |rho| <= 0.8
    assert not reached[7, 4, 4]


def test_a_step_is_refused_where_its_series_is_slow():
    """E sgn X sgn Y = (2/pi) asin rho (Sheppard): right or refused, and refused at rho = 1."""
    rho = np.linspace(0, 1, 101)
    values = mehler(np.sign, np.array(1.0), np.array(1.0), rho)
    reached = ~np.isnan(values)
    assert np.abs(values - 2 / np.pi * np.arcsin(rho))[reached].max() <= TOLERANCE
    assert reached[:80].all()
    assert not reached[-1]


@pytest.mark.parametrize("phi", [np.tanh, CLOSED["relu"], np.cos], ids=["tanh", "relu", "cos"])
def test_tails_are_what_the_coefficients_leave(phi):
    """T_K^2 - T_K+1^2 is one squared coefficient, and the two T_0^2 add up to 1."""
    coefficients, tails = expand(phi, np.array([0.2, 3.0]))
    size = phi_squared(phi, np.array([0.2, 3.0]))
    assert np.abs((tails[..., 0] ** 2).sum(axis=0) - 1).max() < 1e-12
    steps = tails[..., :-1] ** 2 - tails[..., 1:] ** 2
    assert np.abs(steps - coefficients**2 / size[:, None]).max() < 1e-8


def test_shapes_broadcast_and_each_variance_is_expanded_once():
    """A column, a row and a matrix give what their entries give; phi sees two variances."""
    seen = []

    def phi(x):
        seen.append(x.shape[0])
        return np.tanh(x)

    a, b = np.array([[0.5], [2.0], [0.5]]), np.array([[2.0, 0.5]])
    c = np.array([[0.1, 0.2], [-0.3, 0.4], [0.9, -0.5]])
    together = mehler(phi, a, b, c)
    assert together.shape == (3, 2)
    assert set(seen) == {2}
    alone = [[mehler(np.tanh, a[i, 0], b[0, j], c[i, j]) for j in range(2)] for i in range(3)]
    assert np.abs(together - alone).max() <= 2 * TOLERANCE
    assert mehler(np.tanh, a[:0], b, c[:0]).shape == (0, 2)


def test_a_variance_of_zero_leaves_the_constants():
    """phi(0) E phi(Y), phi = cos: E cos(sqrt(b) Z) = exp(-b/2)."""
    b = np.array([0.0, 0.5, 2.0])
    values = mehler(np.cos, np.array(0.0), b, np.array(0.0))
    assert np.abs(values - np.exp(-b / 2)).max() <= TOLERANCE
