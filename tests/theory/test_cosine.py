"""Expected cosines at finite width: quadrature of a density, expansions, simulation."""

from itertools import pairwise

import mpmath
import numpy as np
import pytest
import sympy as sp

import theory

DIGITS = 20
PAIR = theory.formula("cosine.gaussian_pair")
EXPANSION = theory.formula("cosine.gaussian_pair_expansion")
MEANS = theory.formula("cosine.prefix_means")


def moment_of_the_sample_correlation(power, width, rho):
    """E r^power of d Gaussian pairs by R. A. Fisher's density, r = sin t.

    (d-1)/pi (1 - rho^2)^(d/2) int int sin^power t cos^(d-2) t / (cosh w - rho sin t)^d dw dt
    """
    with mpmath.workdps(DIGITS + 5):
        r = mpmath.mpf(rho.p) / rho.q

        def inner(t):
            sine, weight = mpmath.sin(t), mpmath.cos(t) ** (width - 2)
            tail = mpmath.quad(lambda w: (mpmath.cosh(w) - r * sine) ** -width, [0, 2, mpmath.inf])
            return sine**power * weight * tail

        half = mpmath.pi / 2
        integral = mpmath.quad(inner, [-half, 0, half], method="gauss-legendre")
        return integral * (width - 1) / mpmath.pi * (1 - r**2) ** (mpmath.mpf(width) / 2)


@pytest.mark.parametrize(("width", "rho"), [(2, "3/5"), (3, "-9/10"), (8, "1/2")])
def test_expected_cosine_by_quadrature_of_the_density(width, rho):
    """The hypergeometric form to 12 digits; the density integrates to 1 as a check of itself."""
    rho = sp.Rational(rho)
    exact = mpmath.mpf(str(sp.N(PAIR.subs(d=width, rho=rho), DIGITS)))
    tolerance = mpmath.mpf(10) ** -12
    assert abs(moment_of_the_sample_correlation(0, width, rho) - 1) < tolerance
    assert abs(moment_of_the_sample_correlation(1, width, rho) - exact) < tolerance


@pytest.mark.parametrize("rho", ["-1", "-1/3", "0", "1/2", "99/100", "1"])
def test_width_one_is_the_sign_correlation(rho):
    """At d = 1 the cosine is a product of signs: (2/pi) asin rho, at 30 digits."""
    rho = sp.Rational(rho)
    difference = PAIR.subs(d=1, rho=rho) - 2 * sp.asin(rho) / sp.pi
    assert abs(sp.N(difference, 30, chop=True)) < sp.Rational(1, 10**28)


@pytest.mark.parametrize("width", [1, 2, 3, 8])
def test_expected_cosine_by_simulation(width):
    """A million pairs of plain normals, within five standard errors."""
    rng, rho = np.random.default_rng(width), 0.6
    x, z = rng.standard_normal((2, 1_000_000 // width, width))
    y = rho * x + np.sqrt(1 - rho**2) * z
    cos = (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))
    error = cos.std(ddof=1) / np.sqrt(len(cos))
    assert abs(cos.mean() - PAIR(d=width, rho=rho)) < 5 * error


@pytest.mark.parametrize("width", [1, 2, 5, 64])
@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_parallel_and_orthogonal_limits_are_exact(width, sign):
    """rho = +-1 gives +-1 by Gauss's theorem at 1, rho = 0 gives 0, symbolically."""
    assert sp.simplify(sp.hyperexpand(PAIR.subs(d=width, rho=sign)) - sign) == 0


@pytest.mark.parametrize("width", [1, 2, 768, 100_000])
def test_parallel_limit_in_numbers(width):
    """The number form at rho = +-1 to nine digits, at any width."""
    assert abs(PAIR(d=width, rho=1.0) - 1) < 1e-9
    assert abs(PAIR(d=width, rho=-1.0) + 1) < 1e-9


def scaled_error(width, rho):
    """d^2 (exact - expansion) at 40 digits."""
    difference = PAIR.subs(d=width, rho=rho) - EXPANSION.subs(d=width, rho=rho)
    return sp.N(difference * width**2, 40)


@pytest.mark.parametrize("rho", [sp.Rational(1, 5), sp.Rational(-3, 5), sp.Rational(4, 5)])
def test_the_expansion_drops_terms_of_order_d_squared(rho):
    """d^2 times the error is c + c_1/d + c_2/d^2 + ..., c = rho (1 - rho^2)(1 - 9 rho^2)/8.

    c is the next term of Stirling's series times the hypergeometric's, by hand.  One Richardson
    step leaves O(1/d^2), a fourth at twice d; a second O(1/d^3), an eighth.
    """
    limit = rho * (1 - rho**2) * (1 - 9 * rho**2) / 8
    errors = [scaled_error(2**p, rho) for p in range(6, 10)]
    once = [2 * b - a for a, b in pairwise(errors)]
    twice = [(4 * b - a) / 3 for a, b in pairwise(once)]
    assert abs(errors[-1] - limit) < abs(errors[-2] - limit) / sp.Rational(3, 2)
    assert abs(once[-1] - limit) < abs(once[-2] - limit) / 3
    assert abs(twice[-1] - limit) < abs(twice[-2] - limit) / 6


@pytest.mark.parametrize(
    ("width", "rho"),
    [(w, r) for w in (4, 16) for r in (0.1, 0.5, 0.9, 0.99, -0.7)]
    + [(w, r) for w in (256, 4096) for r in (0.1, 0.9, 0.99)],
)
def test_the_expansion_is_within_its_remainder(width, rho):
    """What is dropped is below the stated estimate."""
    dropped = PAIR(d=width, rho=rho) - EXPANSION(d=width, rho=rho)
    assert abs(dropped) <= EXPANSION.remainder_at(d=width, rho=rho) + 1e-12


def test_the_expansion_is_the_one_on_the_page():
    """rho (1 - (1 - rho^2)/(2d)), symbol for symbol."""
    d, rho = EXPANSION.symbols["d"].symbol, EXPANSION.symbols["rho"].symbol
    assert sp.simplify(EXPANSION.expr - rho * (1 - (1 - rho**2) / (2 * d))) == 0


@pytest.mark.parametrize("width", [2, 5])
def test_prefix_means_by_simulation(width):
    """E cos of the means of the first m and n of plain normals: every pair within five s.e."""
    rng, length, draws = np.random.default_rng(width), 5, 200_000
    x = rng.standard_normal((draws, length, width))
    means = x.cumsum(1) / np.arange(1, length + 1)[:, None]
    means /= np.linalg.norm(means, axis=2, keepdims=True)
    cos = means @ means.transpose(0, 2, 1)
    every = np.arange(1, length + 1)
    expected = MEANS(d=width, m=every[:, None], n=every)
    error = cos.std(0, ddof=1) / np.sqrt(draws)
    below = np.tril_indices(length, -1)
    assert (np.abs(cos.mean(0) - expected)[below] < 5 * error[below]).all()
    assert np.abs(np.diag(expected) - 1).max() < 1e-9


def test_prefix_means_at_width_one():
    """d = 1: (2/pi) asin sqrt(n/m)."""
    every = np.arange(1, 40)
    expected = 2 / np.pi * np.arcsin(np.sqrt(every / 40))
    assert np.abs(MEANS(d=1, m=40, n=every) - expected).max() < 1e-9


def test_the_infinite_width_limit_is_the_printed_law():
    """At d = 100000 the finite-width cosine is sqrt(n/m) up to (1 - rho^2)/(2d) and its square."""
    uniform = theory.formula("cosine.uniform")(m=9, n=[1, 4, 9])
    assert np.abs(uniform - [1 / 3, 2 / 3, 1]).max() <= 2**-52
    bias = uniform * (1 - uniform**2) / 200_000
    assert np.abs(MEANS(d=100_000, m=9, n=[1, 4, 9]) - uniform + bias).max() < 1e-9
