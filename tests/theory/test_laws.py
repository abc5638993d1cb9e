"""Laws of coordinates and logits: numbers by quadrature and in closed form, and real layers.

A law is checked three ways that share nothing with it: mpmath's integrals and special functions,
closed forms of special cases, and draws of the layers themselves.
"""

import pickle
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import sympy as sp
from scipy import integrate, stats
from scipy.special import ndtr

import montecarlo
import nope
import theory
from nope.operations import Activate
from nope.tokens import EmbeddingTokens, GaussianTokens
from reports import figures, verify
from theory.formula import Formula, Status
from theory.formulas import laws as formulas
from theory.formulas.activations import ACTIVATIONS
from theory.laws import LEVELS, law, quantile_points
from theory.laws.scale_mixtures import ScaleMixture, VarianceGamma, centred
from theory.laws.sphere import Squashed, sphere
from theory.laws.transformed import Transformed, gated_variance
from theory.laws.variance import (
    RandomVariance,
    cdf_effect,
    chi_square,
    constant,
    either,
    matched,
)
from theory.predict import Prediction
from theory.relations import Law

FORMULAS = {found.name: found for found in formulas.formulas()}
TINY = 1e-10

# ------------------------------------------------------------------ random variances


@pytest.mark.parametrize("freedom", [0.5, 1, 2, 3.5, 8, 64, 767, 4096, 1e6])
def test_chi_square_has_its_moments(freedom):
    """E V = 1, and E V^p = (2/nu)^p Gamma(nu/2 + p)/Gamma(nu/2) also for fractional p."""
    found = chi_square(freedom)
    for power in (0.5, 1, 1.5, 2, 3, 6):
        half = mpmath.mpf(freedom) / 2
        with mpmath.workdps(30):
            log = mpmath.loggamma(half + power) - mpmath.loggamma(half) - power * mpmath.log(half)
        assert abs(found.power(power) / float(mpmath.exp(log)) - 1) < TINY
    assert found.freedom == freedom


def test_arithmetic_of_independent_variances():
    """Means, second moments and families of products, sums and mixtures."""
    one, two = chi_square(3.0).scaled(2.0), chi_square(5.0)
    assert abs(one.times(two).power(2) - one.power(2) * two.power(2)) < TINY
    assert abs(one.plus(two).central(2) * 9 - (4 * 2 / 3 + 2 / 5)) < TINY
    assert abs(either(one, two, 0.25).mean - (0.75 * 2 + 0.25)) < TINY
    assert one.times(constant(4.0)).freedom == constant(4.0).times(one).freedom == 3
    assert one.plus(constant(0.0)).freedom == 3
    assert one.plus(constant(1.0)).freedom is None
    assert one.times(two).freedom is None
    assert constant(1.0).plus(constant(2.0)).freedom == np.inf
    assert matched(2.0, 0.0).freedom == np.inf
    assert abs(matched(2.0, 0.1).central(2) - 0.1) < TINY


@pytest.mark.parametrize(
    ("freedoms", "tolerance"),
    [((32.0, 64.0), 1e-13), ((8.0, 8.0), 1e-13), ((4.0, 2.0), 1e-12), ((1.0, 1.0), 1e-9)],
)
def test_gausss_rule_keeps_the_law(freedoms, tolerance):
    """A product's CDF by its Gauss rule and by all pairs of values, at every scale."""
    one, two = (chi_square(freedom) for freedom in freedoms)
    found = one.times(two)
    pairs = np.multiply.outer(one.values, two.values).ravel()
    everything = RandomVariance(pairs, np.outer(one.weights, two.weights).ravel())
    assert len(found.values) < len(pairs)
    x = np.concatenate([-(10.0 ** np.arange(-6, 1)), np.linspace(-8, 8, 9)])
    assert np.abs(ScaleMixture(found).cdf(x) - ScaleMixture(everything).cdf(x)).max() < tolerance


@pytest.mark.parametrize("order", [1, 2, 3])
def test_what_a_wrong_variance_does_to_a_cdf(order):
    """The Taylor coefficient of Phi(x/sqrt(V)) at V = 1, by mpmath, at its largest over x."""
    x = np.linspace(0, 5, 501)
    derivatives = [
        abs(mpmath.diff(lambda v, t=t: mpmath.ncdf(t / mpmath.sqrt(v)), 1, order)) for t in x
    ]
    largest = float(max(derivatives)) / float(mpmath.factorial(order))
    assert abs(cdf_effect(order) - largest) < 1e-4 * largest


# ------------------------------------------------------------- distributions as distributions

V = constant(0.7)
DISTRIBUTIONS = {
    "gaussian": centred(V),
    **{f"variance-gamma {nu}": centred(chi_square(nu).scaled(0.3)) for nu in (1, 2, 3, 64, 768)},
    "variance-gamma of any freedom": centred(chi_square(5.7)),
    "shifted chi-square": centred(chi_square(8.0).plus(constant(0.5))),
    "product of chi-squares": centred(
        chi_square(8.0).times(chi_square(6.0)).times(chi_square(4.0))
    ),
    **{f"sphere in {n}": sphere(n) for n in (2, 3, 4, 63)},
    "sphere with eps": Squashed(7, constant(2.0)),
    "circle with eps": Squashed(2, constant(0.1)),
    "line with eps": Squashed(1, constant(2.0)),
    "sphere with random eps": Squashed(5, chi_square(9.0)),
    **{name: Transformed(V, name) for name in ACTIVATIONS},
    "wide gelu": Transformed(constant(40.0), "gelu"),
    "silu of a mixture": Transformed(chi_square(4.0), "silu"),
    "geglu": ScaleMixture(gated_variance(V, "gelu")),
    "reglu": ScaleMixture(gated_variance(chi_square(6.0), "relu")),
}
ATOM = {"relu": 0.5, "reglu": 0.5}


@pytest.fixture(params=DISTRIBUTIONS)
def named(request):
    return request.param, DISTRIBUTIONS[request.param]


def levels_without_atom(name):
    levels = np.array([1e-6, 0.01, 0.1, 0.23, 0.4, 0.6, 0.77, 0.9, 0.99, 1 - 1e-6])
    if name == "relu":
        return levels[levels > 0.5]
    return levels[(levels < 0.25) | (levels > 0.75)] if name == "reglu" else levels


@pytest.mark.parametrize("level", [1e-8, 1e-12, 1e-300])
def test_a_quantile_at_the_end_of_the_support_is_the_end(named, level):
    """Where levels are finer than the end is known, no more is claimed, and nothing raised."""
    name, found = named
    assert found.support()[0] <= found.ppf(level) <= found.ppf(1e-6)
    assert name in ATOM or found.cdf(found.ppf(level)) <= 1e-6


def test_quantiles_invert_the_distribution_function(named):
    """F(F^-1(q)) = q from 1e-6 to 1 - 1e-6, and 1 - F is the sf."""
    name, found = named
    levels = levels_without_atom(name)
    points = found.ppf(levels)
    assert (np.diff(points) > 0).all()
    assert np.abs(found.cdf(points) - levels).max() < TINY
    assert np.abs(found.sf(points) + found.cdf(points) - 1).max() < TINY
    assert np.abs(found.sf(found.isf(1 - levels[-3:])) + levels[-3:] - 1).max() < TINY


def test_the_density_is_the_derivative(named):
    """Gauss's rule over the density between quantiles; 0 is a singularity or a jump of many."""
    name, found = named
    levels = levels_without_atom(name)[1:-1]
    for low, high in zip(found.ppf(levels[:-1]), found.ppf(levels[1:]), strict=True):
        if not low <= 0 <= high:
            edges = np.sign(low) * np.geomspace(abs(low), abs(high), 9)
            pieces = [integrate.fixed_quad(found.pdf, *ends, n=40)[0] for ends in pairwise(edges)]
            assert abs(sum(pieces) - (found.cdf(high) - found.cdf(low))) < 1e-8


def test_the_support_has_all_the_mass(named):
    """F rises from 0 to 1 between the ends of the support, and nothing is outside."""
    _, found = named
    low, high = found.support()
    assert found.cdf(max(low, -1e9) - 1e-9) < TINY
    assert abs(found.cdf(min(high, 1e9)) - 1) < TINY
    inside = np.linspace(max(low, -9), min(high, 9), 40)
    assert (np.diff(found.cdf(inside)) >= -1e-15).all()


def test_moments_are_integrals_of_the_tails(named):
    """E X^k = k int_0^inf x^(k-1) (P(X > x) + (-1)^k P(X < -x)) dx, panels halving towards 0."""
    _, found = named
    nodes, weights = np.polynomial.legendre.leggauss(20)
    edges = found.std() * np.concatenate([[0.0], 2.0 ** np.arange(-20, 10)])
    ends = [abs(end) * (1 - 0.5 ** np.arange(1.0, 41)) for end in found.support() if abs(end) < 99]
    edges = np.unique(np.concatenate([edges, *ends]))
    half = np.diff(edges)[:, None] / 2
    x, dx = (edges[:-1, None] + half * (1 + nodes)).ravel(), (half * weights).ravel()
    for order in (1, 2, 4):
        tails = found.sf(x) + (-1) ** order * found.cdf(-x)
        expected = order * dx @ (x ** (order - 1) * tails)
        assert abs(found.moment(order) - expected) < 1e-6 * max(1e-3, abs(expected))


def test_draws_follow_the_law(named):
    """20,000 of the distribution's own draws: Kolmogorov and Smirnov, p > 1e-6."""
    name, found = named
    draws = found.rvs(size=20_000, random_state=np.random.default_rng(7))
    assert draws.shape == (20_000,)
    if name in ATOM:
        assert abs((draws == 0).mean() - ATOM[name]) < 5 * 0.5 / np.sqrt(20_000)
        draws = draws[draws != 0]
        return
    assert stats.kstest(draws, found.cdf).pvalue > 1e-6


@pytest.mark.parametrize("name", ["variance-gamma 3", "sphere with eps", "gelu", "reglu"])
def test_distributions_are_scipys(name):
    """They can be frozen with a scale, and pickled."""
    found = DISTRIBUTIONS[name]
    again = pickle.loads(pickle.dumps(found))
    assert again.cdf(0.3) == found.cdf(0.3)
    assert abs(found(scale=2.0).cdf(0.6) - found.cdf(0.3)) < 1e-15


# -------------------------------------------------------------------------- closed forms


def test_one_dimension_per_head_is_a_bessel_function():
    """d_h = 1: K_0(|x|/s)/(pi s), infinite at 0."""
    found, x = centred(chi_square(1).scaled(4.0)), np.array([1e-9, 0.3, 5.0, 60.0])
    expected = [mpmath.besselk(0, t / 2) / (2 * mpmath.pi) for t in x]
    assert np.abs(found.pdf(x) / np.array(expected, dtype=float) - 1).max() < 1e-12
    assert found.pdf(0.0) == np.inf
    assert found.cdf(0.0) == 0.5


def test_two_dimensions_per_head_are_laplaces_law():
    """d_h = 2: exp(-sqrt(2)|x|/s)/(sqrt(2) s), also in the tails."""
    found, exact = centred(chi_square(2).scaled(0.3)), stats.laplace(scale=np.sqrt(0.3 / 2))
    x = np.array([-5.0, -3.0, -0.1, 0.0, 1e-8, 0.4, 2.0, 5.0])
    for method in ("pdf", "cdf", "sf"):
        assert np.abs(getattr(found, method)(x) / getattr(exact, method)(x) - 1).max() < 1e-11
    assert np.abs(found.sf([9.0, 15.0]) / exact.sf([9.0, 15.0]) - 1).max() < 1e-5
    q = np.array([1e-8, 0.2, 0.9])
    assert np.abs(found.ppf(q) - exact.ppf(q)).max() < 1e-11


@pytest.mark.parametrize("freedom", [1, 2, 8, 64])
def test_variance_gamma_by_mpmath(freedom):
    """The CDF as an integral over the density of the formula, its Bessel function mpmath's."""
    density = formulas.variance_gamma(sp.Integer(freedom), sp.Rational(3, 10))
    plain = density.rewrite(sp.besselk)
    exact = sp.lambdify(formulas.x, plain, "mpmath")
    found = centred(chi_square(freedom).scaled(0.3))
    with mpmath.workdps(18):
        for x in (0.02, 0.5, 2.0):
            area = mpmath.quad(exact, [0, x / 16, x / 4, x])
            assert abs(found.cdf(x) - 0.5 - float(area)) < 1e-13
            assert abs(found.pdf(x) / float(exact(x)) - 1) < 1e-12
        whole = 2 * mpmath.quad(exact, [0, 0.1, 1, 4, 15])
    assert abs(whole - 1) < 1e-10


@pytest.mark.parametrize("freedom", [256, 768, 4096])
def test_wide_heads_are_stable(freedom):
    """Orders of thousands: the Bessel form against the average over variances, also at 0."""
    variance = chi_square(freedom).scaled(0.3)
    x = np.array([0.0, 1e-9, 0.1, 1.0, 3.0, 6.0])
    assert np.abs(VarianceGamma(variance).pdf(x) / ScaleMixture(variance).pdf(x) - 1).max() < 1e-10


@pytest.mark.parametrize("width", [3, 4, 5, 64, 768])
def test_layernorm_is_a_sphere_without_one_dimension(width):
    """sqrt(d-1) t, density (1 - t^2)^((d-4)/2) by mpmath: d = 3 arcsine, d = 4 uniform."""
    question = ask("blocks.0.ln1", d_model=width, n_heads=1)
    found, n = law(question), width - 1
    assert found.status is Status.EXACT
    with mpmath.workdps(20):
        power = mpmath.mpf(width - 4) / 2
        if width == 3:  # the end is a singularity: t = sin u
            share = mpmath.asin(0.3) / mpmath.pi
        else:
            density = lambda t: (1 - t**2) ** power  # noqa: E731
            share = mpmath.quad(density, [0, 0.3]) / (2 * mpmath.quad(density, [0, 0.1, 0.3, 1]))
    assert abs(found.cdf(0.3 * np.sqrt(n)) - 0.5 - float(share)) < 1e-12
    assert abs(found.kurtosis - 3 * (width - 1) / (width + 1)) < TINY


def test_layernorm_in_two_dimensions_is_two_points():
    """d = 2: +-1, each with probability 1/2; and points of a claim keep clear of them."""
    question = ask("blocks.0.ln1", d_model=2, n_heads=1)
    found = law(question)
    assert found.atoms == {-1.0: 0.5, 1.0: 0.5}
    assert found.cdf([-1.1, -1.0, 0.0, 0.9, 1.0]).tolist() == [0, 0.5, 0.5, 0.5, 1]
    assert found.pdf([0.0, 1.0]).tolist() == [0.0, 0.0]
    assert found.moment(2) == 1


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("name", ["density", "moments"])
def test_symbols_and_numbers_agree(kind, name):
    """At every place with a density in symbols: f(x) and E x^k, at the parameters' values."""
    architecture = nope.decoder(12, 3, n_ctx=3, norm=kind, attention="uniform", activation="relu")
    others = (nope.decoder(12, 3, n_ctx=3, activation=a) for a in ("tanh", "erf", "identity"))
    haar = Question(nope.decoder(12, 3, n_ctx=3), nope.init.orthogonal(0.7), "blocks.0.attn.q")
    seen = 0
    for question in (*(q for a in (architecture, *others) for q in everywhere(a)), haar):
        found = law(question)
        numbers = {symbol_of(k): value for k, value in found.parameters.items()}
        if name == "moments":
            for order, moment in found.moments.items():
                assert abs(float(moment.subs(numbers)) / found.moment(order) - 1) < 1e-9
                seen += 1
        elif found.density is not None:
            form = Formula("f", found.density, "", Status.EXACT, "")
            at = found.ppf([0.07, 0.3, 0.6, 0.93])
            at = at[at != 0]
            values = form(x=at, **found.parameters)
            assert np.abs(values / found.pdf(at) - 1).max() < 1e-9
            seen += 1
        else:
            assert found.reason
    assert seen > 20


def symbol_of(name):
    return theory.symbols.symbol(name)


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_print_and_evaluate(name):
    """LaTeX of each, and a finite value at a plain point."""
    found = FORMULAS[name]
    values = {"x": 0.4, "d": 7, "d_h": 3, "nu": 2.5, "v": 0.8, "s": 0.7}
    values |= {"sigma_x": 0.02, "epsilon": 1e-5}
    assert found.latex()
    assert 0 < found(**{k: values[k] for k in found.symbols}) < 10


@pytest.mark.parametrize("name", ["layernorm", "rmsnorm"])
def test_the_sphere_ends_where_it_ends(name):
    """The formula is 0 beyond sqrt(n)."""
    assert FORMULAS[f"law.{name}"](x=[-9.0, 9.0], d=6).tolist() == [0, 0]


# ------------------------------------------------------------------------------------ eps


@pytest.mark.parametrize("width", [2, 3, 16, 768])
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-3, 1.0])
def test_what_eps_leaves_is_an_exponential_integral(width, eps):
    """E e_j^2 = (k/2) e^z E_(1+k/2)(z), by mpmath, in the formula and as the law's moment."""
    found = FORMULAS["layernorm.shrinkage_exact"]
    z = mpmath.mpf(width) * eps / (2 * mpmath.mpf("0.02") ** 2)
    half = mpmath.mpf(width - 1) / 2
    with mpmath.workdps(30):
        exact = float(half * mpmath.exp(z) * mpmath.expint(1 + half, z)) if z < 1e3 else None
    value = found(d=width, epsilon=eps, sigma_x=0.02)
    moment = law(ask("blocks.0.ln1", d_model=width, n_heads=1, eps=eps)).moment(2)
    assert abs(value - moment) < 1e-12
    if exact is not None:
        assert abs(value / exact - 1) < 1e-10


def test_gpt2s_eps_shrinks_by_two_percent():
    """eps 1e-5 against std 0.02: E e_j^2 = 0.9756, inside the leading order's remainder."""
    exact = FORMULAS["layernorm.shrinkage_exact"](d=768, epsilon=1e-5, sigma_x=0.02)
    leading = theory.formula("layernorm.shrinkage")
    assert abs(exact - 0.9755) < 1e-4
    assert abs(exact - leading(d=768, epsilon=1e-5, sigma_x=0.02)) <= leading.remainder_at(
        d=768, epsilon=1e-5, sigma_x=0.02
    )


@pytest.mark.parametrize("width", [2, 3, 4, 16])
def test_eps_goes_to_the_sphere(width):
    """As eps -> 0 the CDF becomes the sphere's, at d = 2 that of two points."""
    x = np.linspace(-0.9, 0.9, 7) * np.sqrt(width - 1)
    x = x[x != 0]
    exact = law(ask("blocks.0.ln1", d_model=width, n_heads=1)).cdf(x)
    found = law(ask("blocks.0.ln1", d_model=width, n_heads=1, eps=1e-20)).cdf(x)
    assert np.abs(found - exact).max() < 1e-6


def test_one_coordinate_with_eps_by_hand():
    """n = 1: g/sqrt(g^2 + e) <= x where g <= x sqrt(e/(1 - x^2))."""
    x = np.linspace(-0.99, 0.99, 9)
    expected = ndtr(x * np.sqrt(2.0 / (1 - x**2)))
    assert np.abs(Squashed(1, constant(2.0)).cdf(x) - expected).max() < 1e-14


# --------------------------------------------------------------------------- activations


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_turning_points(name):
    """Left of it phi falls, right of it phi rises; GELU's is the root of Phi(x) + x phi(x)."""
    phi = ACTIVATIONS[name]
    x = np.linspace(-12, 6, 4001)
    assert (np.diff(phi(x[x < phi.turn])) < 0).all()
    assert (np.diff(phi(x[x > phi.turn])) > 0).all()
    if name == "gelu":
        slope = mpmath.ncdf(phi.turn) + phi.turn * mpmath.npdf(phi.turn)
        assert abs(slope) < 1e-15
        assert abs(phi.support[0] + 0.169971) < 1e-6


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "relu"])
def test_activated_gaussians_by_counting_cells(name):
    """P(phi(X) <= y) as the Gaussian mass of the cells of a fine grid where phi is below y."""
    grid = np.linspace(-9, 9, 600_001)
    middle, mass = (grid[1:] + grid[:-1]) / 2, np.diff(ndtr(grid / np.sqrt(0.7)))
    values = ACTIVATIONS[name](middle)
    found = Transformed(V, name)
    low = found.support()[0]
    for y in (0.6 * max(low, -0.5), -1e-3, 0.05, 0.4):
        assert abs(found.cdf(y) - mass[values <= y].sum()) < 1e-4


def test_relu_has_half_its_mass_at_zero():
    """F(0) = 1/2, F(0-) = 0, quantiles up to 1/2 are 0."""
    found = Transformed(V, "relu")
    assert found.cdf([-1e-300, 0.0]).tolist() == [0.0, 0.5]
    assert found.ppf([0.1, 0.5]).tolist() == [0.0, 0.0]
    assert abs(found.moment(2) - 0.35) < 1e-12


def test_gated_units_by_mpmath():
    """P(phi(G) U <= x) = E Phi(x/|phi(G)|) for GEGLU."""
    found = ScaleMixture(gated_variance(constant(1.0), "gelu"))
    phi = lambda g: g * mpmath.ncdf(g)  # noqa: E731
    for x in (1e-3, 0.1, 1.0):
        inner = lambda g, x=x: mpmath.npdf(g) * mpmath.ncdf(x / abs(phi(g)))  # noqa: E731
        exact = mpmath.quad(inner, [-12, -6, -4, -3, -2, -1, -0.1, -1e-3, 0, 1e-3, 0.1, 1, 3, 12])
        assert abs(found.cdf(x) - float(exact)) < 1e-8


# -------------------------------------------------------------------------------- places


def Question(architecture, init, place):  # noqa: N802
    return nope.Question(architecture, init, place, "second_moment")


def ask(place, d_model=12, n_heads=3, n_ctx=4, std=0.3, **changes):
    architecture = nope.decoder(d_model, n_heads, n_ctx=n_ctx, **changes)
    return Question(architecture, nope.init.normal(std), place)


def everywhere(architecture, init=None):
    """A question for each place that has a law."""
    places = [place for place in architecture.places() if not place.endswith("pattern")]
    return [Question(architecture, init or nope.init.normal(0.3), place) for place in places]


EXACT = {
    "embed": "Gaussian",
    "blocks.1.ln1": "coordinate of a point on a sphere",
    "blocks.1.attn.q": "Gaussian",
    "blocks.1.attn.scores": "symmetric variance-gamma",
    "blocks.1.ln2": "coordinate of a point on a sphere",
    "blocks.1.mlp.pre": "Gaussian",
    "blocks.1.mlp.post": "gelu of a Gaussian",
    "ln_final": "coordinate of a point on a sphere",
}


@pytest.mark.parametrize(("place", "name"), EXACT.items())
def test_exact_at_every_depth(place, name):
    """With eps = 0 and Gaussian weights, whatever the softmax and the layers before do."""
    found = law(ask(place, n_layers=2))
    assert (found.name, found.status, found.remainder) == (name, Status.EXACT, 0.0)


LEADING = ("blocks.0.attn.z", "blocks.0.attn_out", "blocks.0.resid_mid", "blocks.1.attn.z")


@pytest.mark.parametrize("place", LEADING)
@pytest.mark.parametrize("attention", ["uniform", "softmax"])
def test_leading_order_elsewhere(place, attention):
    """The remainder is there, falls with the width, and at the first position there is none."""
    narrow, wide = (
        law(ask(place, d, 4, n_layers=2, attention=attention, std=0.3 / np.sqrt(d)))
        for d in (16, 256)
    )
    assert narrow.status is wide.status is Status.LEADING_ORDER
    assert 0 < wide.remainder < narrow.remainder / 4
    if place == "blocks.0.attn.z":
        first = law(ask(place, attention=attention), position=1)
        assert (first.name, first.status) == ("Gaussian", Status.EXACT)


@dataclass(frozen=True)
class Squashing:
    """A nonlinearity on the stream itself: it has a basis."""

    def operations(self, scope, source):
        yield Activate(scope.place("squashed"), (source,), "tanh")


def test_a_norm_of_something_with_a_basis_is_no_sphere():
    """tanh of the stream, normalised, is claimed to leading order only; behind maps it is exact."""
    found = {}
    for first in (Squashing(), nope.MLP(8)):
        body = nope.Sequence((first, nope.Norm("ln")))
        architecture = nope.Architecture(8, 2, GaussianTokens(), body)
        found[type(first)] = law(Question(architecture, nope.init.normal(0.3), "ln")).status
    assert found == {Squashing: Status.LEADING_ORDER, nope.MLP: Status.EXACT}


def test_variances_are_the_kernel_calculus():
    """E x^2 of each law against `theory.predict`, a route of its own, within its remainder."""
    for changes in ({}, {"norm_position": "post"}, {"norm_position": "none", "n_layers": 2}):
        for question in everywhere(nope.decoder(16, 4, n_ctx=5, attention="uniform", **changes)):
            found, expected = law(question).moment(2), theory.predict(question)
            slack = expected.remainder[-1] + 1e-9 * expected.values[-1]
            assert abs(found - expected.values[-1]) <= slack


def test_the_position_matters():
    """z averages m values: its variance falls as 1/m, and the last position is the default."""
    question = ask("blocks.0.attn.z", attention="uniform")
    variances = [law(question, position).moment(2) for position in (1, 2, 4)]
    assert np.abs(np.array(variances) * [1, 2, 4] / variances[0] - 1).max() < 1e-9
    assert law(question).position == 4


def test_without_norms_the_laws_are_products():
    """q is variance-gamma with d degrees of freedom, prefix means of raw tokens are exact too."""
    question = ask("blocks.0.attn.q", norm_position="none")
    found = law(question)
    assert (found.status, found.parameters["nu"]) == (Status.EXACT, 12.0)
    mean = law(ask("blocks.0.attn.z", norm_position="none", attention="uniform"))
    assert (mean.status, mean.parameters["nu"]) == (Status.EXACT, 12.0)
    tokens = law(Question(nope.prefix_means(5, n_ctx=4), nope.init.normal(1.0), "mean"))
    assert (tokens.name, tokens.status) == ("Gaussian", Status.EXACT)


@pytest.mark.parametrize("repeated", [False, True])
def test_a_key_with_the_querys_token_shares_its_norm(repeated):
    """Kurtosis of raw logits: 3 (1+2/d_h) (1+2/d)^2, and with |x|^8 where both are one token."""
    tokens = EmbeddingTokens(vocabulary=3) if repeated else GaussianTokens()
    found = law(ask("blocks.0.attn.scores", norm_position="none", tokens=tokens))
    d, d_h, length = 12, 4, 4
    same = 1 / length + (1 - 1 / length) * (1 / 3 if repeated else 0)
    moments = [np.prod([d + 2 * i for i in range(k)]) / d**k for k in range(5)]  # E (|x|^2/d)^k
    fourth = (1 - same) * moments[2] ** 2 + same * moments[4]
    second = (1 - same) + same * moments[2]
    assert abs(found.kurtosis / (3 * (1 + 2 / d_h) * fourth / second**2) - 1) < 1e-9


def test_where_there_is_no_law():
    """Patterns and given weights say why; places, positions that are not there are refused."""
    for attention in ("softmax", "uniform"):
        with pytest.raises(NotImplementedError, match="expected a place whose law is known"):
            law(ask("blocks.0.attn.pattern", attention=attention))
    with pytest.raises(NotImplementedError, match="over random weights"):
        law(replace(ask("embed"), given=nope.Weights(0)))
    with pytest.raises(NotImplementedError, match="weights that are not 0"):
        law(ask("blocks.0.attn.q", std=0.0))
    with pytest.raises(LookupError, match="expected a place of this architecture"):
        law(ask("blocks.7.ln1"))
    for position in (0, 5):
        with pytest.raises(ValueError, match="expected a position from 1 to 4"):
            law(ask("embed"), position)


def test_scipys_distributions_are_imported_late():
    """`import theory, theory.laws` costs no scipy.stats."""
    code = "import sys, theory, theory.laws; print('scipy.stats' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --------------------------------------------------------------------------- real layers

UNIT = GaussianTokens(1.0)
NORMAL = nope.init.normal(0.25)
LAYERS = {
    "pre-LN softmax": (nope.decoder(16, 4, n_ctx=5, d_ff=32, tokens=UNIT), NORMAL),
    "uniform RMSNorm with eps": (
        nope.decoder(
            16,
            4,
            n_ctx=5,
            d_ff=32,
            attention="uniform",
            norm="rmsnorm",
            eps=1e-4,
            activation="relu",
        ),
        NORMAL,
    ),
    "LN with eps and softmax": (nope.decoder(8, 4, n_ctx=4, d_ff=0, eps=2e-4), NORMAL),
    "two layers, gated, biases": (
        nope.decoder(
            12, 3, 2, 24, n_ctx=4, activation="reglu", bias=True, residual_scale=0.5, tokens=UNIT
        ),
        nope.init.normal(0.2),
    ),
    "no norm, one dimension per head": (
        nope.decoder(
            12, 12, n_ctx=4, d_ff=24, norm_position="none", activation="swiglu", tokens=UNIT
        ),
        nope.init.normal(0.1),
    ),
    "post-LN, uniform weights": (
        nope.decoder(16, 4, n_ctx=4, d_ff=32, norm_position="post", activation="erf", tokens=UNIT),
        nope.init.xavier_uniform(),
    ),
    "torch's defaults": (
        nope.decoder(16, 4, n_ctx=4, d_ff=32, bias=True, activation="tanh", tokens=UNIT),
        nope.init.torch_default(),
    ),
    "Haar matrices": (
        nope.decoder(16, 4, n_ctx=4, d_ff=32, activation="gelu_tanh", tokens=UNIT),
        nope.init.orthogonal(),
    ),
    "a small vocabulary": (
        nope.decoder(
            12,
            4,
            n_ctx=4,
            d_ff=24,
            norm_position="none",
            attention="softmax",
            activation="silu",
            tokens=EmbeddingTokens(vocabulary=3, std=1.0),
        ),
        nope.init.normal(0.1),
    ),
    "unmasked": (nope.decoder(12, 3, n_ctx=4, d_ff=0, causal=False), NORMAL),
}
STANDARD_ERRORS = 6.0
"""Two-sided 2e-9, times some 2000 comparisons of a whole run."""


def deviations(questions, seed=5, draws=6000):
    """Per question: the measured CDF less the law's, in standard errors, beyond the remainder."""
    asked = [quantile_points(question) for question in questions]
    for question, found in zip(asked, montecarlo.measure(asked, draws, seed), strict=True):
        expected = law(question)
        away = np.abs(found.mean - expected.cdf(np.array(question.points)))
        yield question.place, (away - expected.remainder) / found.standard_error


@pytest.mark.parametrize("name", LAYERS)
def test_laws_of_real_layers(name):
    """At sixteen quantiles of each place: as predicted, to the remainder and noise."""
    architecture, init = LAYERS[name]
    questions = everywhere(architecture, init)
    if name == "unmasked":  # the kernel calculus has no unmasked softmax
        questions = [q for q in questions if q.place in ("ln_final", "blocks.0.attn.scores")]
    worst = {place: float(z.max()) for place, z in deviations(questions)}
    assert max(worst.values()) < STANDARD_ERRORS, worst


PLANTED = {
    "a variance off by 5%": ("blocks.0.attn.q", lambda right: stats.norm(scale=1.05**0.5)),
    "Gaussian logits": ("blocks.0.attn.scores", lambda right: stats.norm(scale=right.std())),
    "a Gaussian sphere": ("blocks.0.ln1", lambda right: stats.norm()),
    "the sphere of RMSNorm": ("blocks.0.ln1", lambda right: sphere(8)),
    "a Gaussian GELU": (
        "blocks.0.mlp.post",
        lambda right: stats.norm(loc=right.mean(), scale=right.std()),
    ),
    "a Gaussian output": ("blocks.0.attn_out", lambda right: stats.norm(scale=right.std())),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_mistakes_are_found(name):
    """A wrong law of the right place is out by more than noise and remainder; the right one not."""
    place, wrong = PLANTED[name]
    question = ask(place, 8, 4, n_ctx=2, d_ff=8, std=8**-0.5, attention="softmax")
    if place == "blocks.0.attn_out":
        question = ask(place, 8, 4, n_ctx=2, d_ff=8, std=8**-0.5, attention="uniform")
    right = law(question)
    asked = quantile_points(question)
    found = montecarlo.measure(asked, 60_000, 3)
    x, slack = np.array(asked.points), right.remainder + STANDARD_ERRORS * found.standard_error
    assert (np.abs(found.mean - right.cdf(x)) < slack).all()
    assert (np.abs(found.mean - wrong(right).cdf(x)) > slack).any()


# ------------------------------------------------------------------------- claims on laws


def predicted(question):
    found = law(question)
    values = found.cdf(np.array(question.points))
    return Prediction(values, np.full(values.shape, found.remainder), found.status)


def claim(question, prediction=predicted):
    return theory.Claim(
        "laws.test", "It is so.", "here", Status.EXACT, question, prediction, relation=Law()
    )


def test_quantile_points_are_quantiles():
    """Sixteen increasing points at which F is the levels; a ReLU's atom is one point."""
    asked = quantile_points(ask("blocks.0.attn.scores"))
    assert asked.observable == "cdf"
    assert np.abs(law(asked).cdf(np.array(asked.points)) - LEVELS).max() < TINY
    relu = quantile_points(ask("blocks.0.mlp.post", activation="relu"))
    assert relu.points[0] == 0.0
    assert len(relu.points) == 9


def test_the_relation_is_about_distribution_functions():
    """Its region is the predicted share, the tolerance and the remainder to either side."""
    asked = quantile_points(ask("blocks.0.attn.z"), levels=(0.2, 0.5, 0.8))
    region = Law().region(asked, predicted(asked), 0.01)
    width = 0.01 + law(asked).remainder
    assert np.abs(region.high - [0.2 + width, 0.5 + width, 0.8 + width]).max() < TINY
    assert np.abs(region.high - region.low - 2 * width).max() < TINY
    assert "remainder of up to" in Law().words(0.01, "absolute", 0.002)
    with pytest.raises(ValueError, match="expected a Law claim to ask for cdf"):
        Law().statistic(ask("embed"))


def test_a_law_is_confirmed_and_a_wrong_one_refuted():
    """The whole way: claim, draws, verdict, words, and a figure of the distribution."""
    asked = quantile_points(ask("blocks.0.attn.scores", 8, 4, n_ctx=2, d_ff=0), levels=(0.1, 0.4))
    gaussian = stats.norm(scale=law(asked).std()).cdf(np.array(asked.points))
    options = {"tolerance": 0.02, "draws": 40_000, "workers": 1, "device": "cpu"}
    right, wrong = (
        next(iter(verify(claim(asked, prediction), **options)))
        for prediction in (predicted, gaussian)
    )
    assert right.verdict == "CONFIRMED"
    assert wrong.verdict == "REFUTED"
    assert "at x = " in wrong.words
    assert right.question["points"] == list(asked.points)
    assert "<svg" in figures.svg(right)
