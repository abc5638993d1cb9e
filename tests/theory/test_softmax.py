"""Softmax over Gaussian logits: nested Gauss-Legendre rules, closed integrals, simulation."""

import mpmath
import numpy as np
import pytest
import sympy as sp
from scipy.integrate import quad
from scipy.special import expit

from theory.formula import Status
from theory.formulas import softmax, softmax_expansions, softmax_table
from theory.formulas.logits import Logits
from theory.formulas.softmax import (
    BreakdownLength,
    Entropy,
    Participation,
    ParticipationFiniteHead,
    ParticipationSecondMoment,
    SharedTilt,
    SharedWithLonger,
    Tilt,
    Transforms,
    WeightedSquare,
    mixed,
)
from theory.formulas.softmax_expansions import (
    long_prefix,
    participation_expansion,
    tilt_expansion,
)
from theory.formulas.softmax_table import ParticipationTable
from theory.symbols import d, m, s

MEANS = (Participation, Tilt, SharedTilt, ParticipationSecondMoment, Entropy, WeightedSquare)
FORMULAS = {
    formula.name: formula
    for module in (softmax, softmax_expansions)
    for formula in module.formulas()
}
PROMISE = 1e-8
SPREADS = (1e-3, 0.3, 1.0, 3.0, 10.0, 30.0)


def value(function, *arguments):
    """One number of a function."""
    return float(function.numbers(*(np.array(float(x)) for x in arguments)))


# ------------------------------------------------------------------- other routes


def panels(low, high, count):
    """Gauss-Legendre points and weights on `count` equal panels of 24 points."""
    points, weights = np.polynomial.legendre.leggauss(24)
    edges = np.linspace(low, high, count + 1)
    half = np.diff(edges)[:, None] / 2
    return (edges[:-1, None] + half * (1 + points)).ravel(), (half * weights).ravel()


def nested(length, spread):
    """All six means by Gauss-Legendre in z and in ln t, as THEORY states them.

    No trapezoidal rule, no Stein's lemma for the tilt, e^-t in the entropy.
    """
    z, weights = panels(-13, 13, max(26, int(12 * spread)))
    weights = weights * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    low, high = -40 - np.log(length) - 12 * spread, 5 + 9 * spread
    points, outer = panels(low, high, int((high - low) / max(1.5, spread / 3)))
    sums = np.zeros(6)
    for x, weight in zip(points.reshape(-1, 24), outer.reshape(-1, 24), strict=True):
        sums += integrands(length, spread, x, z, weights) @ weight
    A = sums[0]
    return {
        Participation: A,
        Tilt: sums[1] + sums[2],
        SharedTilt: sums[2],
        ParticipationSecondMoment: sums[3],
        Entropy: sums[4] - spread**2 * (1 - A),
        WeightedSquare: sums[5],
    }


def integrands(length, spread, x, z, weights):
    """What stands under the six integrals over x = ln t."""
    u = np.exp(np.minimum(x[:, None] + spread * z, 7))
    damping = np.exp(-u)

    def mean(power, k):
        return (z**power * u**k * damping) @ weights

    phi, rest = damping @ weights, -np.expm1(-u) @ weights
    log_phi = np.where(phi > 0.5, np.log1p(-np.minimum(rest, 0.9)), np.log(phi))
    one = length * np.exp((length - 1) * log_phi)
    two = length * (length - 1) * np.exp((length - 2) * log_phi)
    return np.array(
        [
            mean(0, 2) * one,
            mean(2, 2) * one,
            mean(1, 1) ** 2 * two,
            (mean(0, 4) * one + mean(0, 2) ** 2 * two) / 6,
            np.exp(-np.exp(np.minimum(x, 7))) - np.exp(length * log_phi),
            mean(2, 1) * one,
        ]
    )


def of_two(spread):
    """All six at m = 2, integrals over y = (z_1 - z_2)/sqrt(2) alone: T = tanh(s y/sqrt(2))."""
    root = mpmath.sqrt(2)

    def entropy(y):
        """-sum a ln a of the logits +-x, x = s y/sqrt(2): ln(2 cosh x) - x tanh x."""
        x = abs(spread * y / root)
        fall = mpmath.exp(-2 * x)
        return mpmath.log1p(fall) + 2 * x * fall / (1 + fall)

    integrands = {
        Participation: lambda y, T: (1 + T**2) / 2,
        Tilt: lambda y, T: (1 + y**2 * T**2) / 2,
        SharedTilt: lambda y, T: (1 - T**2) * (1 - y**2) / 4,
        ParticipationSecondMoment: lambda y, T: (1 + T**2) ** 2 / 4,
        Entropy: lambda y, T: entropy(y),
        WeightedSquare: lambda y, T: (1 + y**2) / 2,
    }
    breaks = [0, 0.1, 0.3, 1, 3, 6, 12] if spread > 3 else [0, 3, 6, 12]
    return {
        function: 2
        * mpmath.quad(lambda y, f=f: f(y, mpmath.tanh(spread * y / root)) * mpmath.npdf(y), breaks)
        for function, f in integrands.items()
    }


def draws(rng, count, length, spread):
    """Per draw what `MEANS` are means of: sum a^2, (sum a z)^2, its off-diagonal part, ..."""
    z = rng.standard_normal((count, length))
    a = weights_of(spread * z)
    squares, tilt = (a**2).sum(1), (a * z).sum(1) ** 2
    off = tilt - (a**2 * z**2).sum(1)
    entropy, square = -(a * np.log(a)).sum(1), (a * z**2).sum(1)
    return np.stack([squares, tilt, off, squares**2, entropy, square])


def weights_of(logits):
    """softmax along the last axis."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


# ------------------------------------------------------------------- the six means


POINTS = [
    (3, 2.0),
    (7, 0.01),
    (10, 8.0),
    (100, 1.0),
    (1000, 0.1),
    (1000, 3.0),
    (4096, 5.0),
    (100_000, 1.0),
    (100_000, 4.0),
    (100_000, 10.0),
]


@pytest.mark.parametrize(("length", "spread"), POINTS)
def test_against_nested_gauss_legendre_rules(length, spread):
    """Relative to the value, and to 1 for the entropy; the tilt's small part on its own too."""
    for function, expected in nested(length, spread).items():
        scale = 1.0 if function is Entropy else expected
        assert abs(value(function, length, spread) - expected) < PROMISE * scale


@pytest.mark.parametrize("spread", SPREADS)
def test_two_positions_by_one_closed_integral(spread):
    """At m = 2 everything depends on z_1 - z_2: mpmath's quadrature, another route altogether."""
    for function, expected in of_two(spread).items():
        assert abs(value(function, 2, spread) - expected) < PROMISE * abs(expected)


@pytest.mark.parametrize(("length", "spread"), [(2, 1.5), (9, 0.7), (40, 2.0)])
def test_against_simulation(length, spread):
    """200000 softmaxes: five standard errors."""
    found = draws(np.random.default_rng(length), 200_000, length, spread)
    error = found.std(1, ddof=1) / np.sqrt(found.shape[1])
    expected = np.array([value(function, length, spread) for function in MEANS])
    assert (np.abs(found.mean(1) - expected) < 5 * error).all()


@pytest.mark.parametrize("function", MEANS)
def test_certain_weights_are_exact(function):
    """m = 1 at any s, and s = 0 at any m: 1/m, 1/m, 0, 1/m^2, ln m, 1 to the bit."""
    lengths = np.array([1, 2, 7, 100_000])
    expected = {
        Participation: 1 / lengths,
        Tilt: 1 / lengths,
        SharedTilt: 0 * lengths,
        ParticipationSecondMoment: 1 / lengths**2.0,
        Entropy: np.log(lengths),
        WeightedSquare: np.ones(4),
    }[function]
    assert (function.numbers(lengths, 0.0) == expected).all()
    assert (function.numbers(1, np.array(SPREADS)) == expected[0]).all()


@pytest.mark.parametrize("function", MEANS)
def test_all_positions_at_once(function):
    """A vector of m up to 4096 against one m at a time: the lattice follows the longest."""
    lengths = np.array([2, 3, 50, 1025, 4096])
    table = function.numbers(np.arange(1, 4097), 2.0)[lengths - 1]
    alone = np.array([value(function, length, 2.0) for length in lengths])
    assert np.abs(table / alone - 1).max() < 1e-11


def test_broadcasting():
    """A column of m against a row of s, values that occur twice included."""
    lengths, spreads = np.array([1, 5, 5, 30])[:, None], np.array([0.0, 2.0, 0.5, 2.0])
    table = Participation.numbers(lengths, spreads)
    alone = [[value(Participation, length, x) for x in spreads] for (length,) in lengths]
    assert table.shape == (4, 4)
    assert np.abs(table - np.array(alone)).max() < 1e-13


@pytest.mark.parametrize("spread", [1e-3, 0.5, 1.0, 2.5, 6.0, 30.0])
def test_what_a_query_shares_with_its_longer_self(spread):
    """Of two positions 2 E 1/(1 + e^(l_2 - l_1)), l_2 - l_1 ~ N(-s^2, 2 s^2), by quad; 1 of one."""

    def density(z):
        logistic = expit(spread**2 - spread * np.sqrt(2) * z)
        return 2 * logistic * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)

    edge = min(spread / np.sqrt(2), 12.0)  # where the logistic turns
    expected = quad(density, -12, 12, points=[edge], epsabs=1e-13, limit=300)[0]
    found = SharedWithLonger.numbers(np.array([1.0, 2.0]), spread)
    assert found == pytest.approx([1, expected], abs=1e-11)


@pytest.mark.parametrize("length", [5, 40])
def test_what_a_query_shares_by_a_longer_prefix(length):
    """n E sum_i a_mi a_ni at n = 4000, of one query, within 5 standard errors and 1/n."""
    rng, endless = np.random.default_rng(length), 4000
    weights = np.exp(rng.standard_normal((4000, endless)))
    short = weights[:, :length] / weights[:, :length].sum(1, keepdims=True)
    shared = endless * (short * weights[:, :length]).sum(1) / weights.sum(1)
    found = SharedWithLonger.numbers(float(length), 1.0)
    assert abs(found - shared.mean()) < 5 * shared.std() / np.sqrt(len(shared)) + 5 / endless


def test_half_powers_reach_further_left():
    """E 1/sqrt(S_2) S_1 = m int psi_1/2 phi^(m-1) dx/sqrt(pi) of doubled logits is at m = 1 one."""
    transforms = Transforms(2.0, 1.0, least=0.5)
    whole = transforms.integral(np.ones(1), 1, transforms.moment(0.5)) / np.sqrt(np.pi)
    assert abs(whole[0] - 1) < 1e-12


# ------------------------------------------------------------------- limits


def maximum_square(length):
    """E max_n z_n^2, by the density of the maximum."""
    z, weights = panels(-12, 12, 24)
    from scipy.special import log_ndtr

    density = length * np.exp((length - 1) * log_ndtr(z) - z**2 / 2) / np.sqrt(2 * np.pi)
    return float((z**2 * density) @ weights)


@pytest.mark.parametrize("length", [3, 10, 1000])
def test_large_logits_pick_the_maximum(length):
    """A -> 1 as 1/s and B -> E max z^2 as 1/s^2: doubling s halves and quarters what is left."""
    spreads = np.array([50.0, 100.0])
    left = 1 - Participation.numbers(length, spreads)
    assert 0 < left[1] < 0.05
    assert abs(left[0] / left[1] - 2) < 0.1
    missing = np.abs(maximum_square(length) - Tilt.numbers(length, spreads))
    assert missing[1] < 1e-2
    assert abs(missing[0] / missing[1] - 4) < 0.3


@pytest.mark.parametrize(("function", "power"), [(Participation, 1), (Tilt, 0)])
@pytest.mark.parametrize("spread", [0.3, 0.8])
def test_long_prefixes(function, power, spread):
    """m A -> e^(s^2), B -> s^2; the factor of 1/m leaves O(1/m^2): a quarter at twice m."""
    limit, factor = (float(part.subs(s, sp.Rational(spread))) for part in long_prefix(function))
    assert abs(limit / (np.exp(spread**2) if power else spread**2) - 1) < 1e-14
    lengths = np.array([4000.0, 8000.0])
    relative = function.numbers(lengths, spread) * lengths**power / limit - 1
    left = relative - factor / lengths
    assert np.abs(left[1]) < np.abs(relative[1]) / 50
    assert abs(left[0] / left[1] - 4) < 0.2


# ------------------------------------------------------------------- small logits


def series(length, order):
    """sum a^2 and (sum a z)^2 as polynomials in z of each even degree up to 2 order, exactly."""
    z, e = sp.symbols(f"z_1:{length + 1}"), sp.Symbol("e")

    def cut(expr):
        poly = sp.Poly(expr, e, *z)
        return sum(
            c * sp.prod(g**k for g, k in zip((e, *z), powers, strict=True))
            for powers, c in poly.terms()
            if powers[0] <= 2 * order
        )

    def power(x):
        return sum((e * x) ** k / sp.factorial(k) for k in range(2 * order + 1))

    excess = sum(power(x) for x in z) / length - 1
    inverse = term = sp.Integer(1)
    for _ in range(2 * order):
        term = cut(-term * excess)
        inverse += term
    inverse = cut(inverse**2) / length**2
    squares = cut(inverse * cut(sum(power(x) ** 2 for x in z)))
    tilt = cut(inverse * cut(sum(x * power(x) for x in z) ** 2))
    return [sum(gaussian_mean(expr, e, z)) for expr in (squares, tilt)]


def gaussian_mean(expr, e, z):
    """The terms of E expr over i.i.d. standard normals z: E z^2k = (2k - 1)!!."""
    for powers, coefficient in sp.Poly(expr, *z).terms():
        if all(k % 2 == 0 for k in powers):
            yield coefficient * sp.prod(sp.factorial2(k - 1) for k in powers)


@pytest.mark.parametrize(("length", "order"), [(1, 3), (2, 3), (3, 2)])
def test_expansions_equal_the_exact_power_series(length, order):
    """Taylor's series of the softmax of 1 to 3 symbols, monomial by monomial, in rationals."""
    found = series(length, order)
    for expansion, mean in zip((participation_expansion, tilt_expansion), found, strict=True):
        derived = sp.Poly(expansion(order).subs(m, length), s)
        mean = sp.Poly(mean, sp.Symbol("e"))
        assert [derived.nth(2 * k) for k in range(order + 1)] == [
            mean.nth(2 * k) for k in range(order + 1)
        ]


def test_first_order_in_s_squared():
    """(1 + s^2 (1 - 1/m))/m and 1/m + s^2 (1 - 1/m^2)."""
    assert sp.simplify(participation_expansion(1) - (1 + s**2 * (1 - 1 / m)) / m) == 0
    assert sp.simplify(tilt_expansion(1) - 1 / m - s**2 * (1 - 1 / m**2)) == 0


@pytest.mark.parametrize("length", [2, 5, 300])
@pytest.mark.parametrize(
    ("function", "expansion"), [(Participation, participation_expansion), (Tilt, tilt_expansion)]
)
def test_expansions_leave_the_next_power(function, expansion, length):
    """What is left after s^4 is s^6 times the next coefficient, and less than 1/10 beside it."""
    spread = 0.1
    second, third = (float(expansion(k).subs({m: length, s: spread})) for k in (2, 3))
    left = value(function, length, spread) - second
    assert abs(left - (third - second)) < 0.1 * abs(third - second) + 1e-14


# ------------------------------------------------------------------- heads of finite width


def variance_gamma_participation(spread, width):
    """P at m = 2 over the law of x = z sqrt(width u) itself, a Bessel density: no mixture at all.

    1/2 + E tanh^2(s x/sqrt(2 width))/2, in ln x, since the density may be singular at 0.
    """
    from scipy.special import gammaln, kve

    order = (width - 1) / 2
    log_x, weights = panels(-11, np.log(60 + 12 * np.sqrt(width)), 40)
    x = np.exp(log_x)
    log_density = np.log(kve(order, x)) - x + order * np.log(x / 2)
    density = 2 * np.exp(log_density - gammaln(width / 2)) / np.sqrt(np.pi)
    return 0.5 + (np.tanh(spread * x / np.sqrt(2 * width)) ** 2 * density * x) @ weights / 2


@pytest.mark.parametrize("width", [1, 2, 3, 64])
@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_mixture_by_the_variance_gamma_density(width, spread):
    """E_u A(2, s sqrt(u)) for narrow heads, at temperatures where Laguerre's nodes fail."""
    expected = variance_gamma_participation(spread, width)
    assert abs(value(ParticipationFiniteHead, 2, spread, width) - expected) < PROMISE * expected


@pytest.mark.parametrize("width", [64, 1000, 10_000])
@pytest.mark.parametrize("function", MEANS)
def test_mixture_by_laguerre_nodes(width, function):
    """Generalised Gauss-Laguerre nodes by Golub and Welsch, where they converge."""
    from scipy.linalg import eigh_tridiagonal

    alpha, k = width / 2 - 1, np.arange(24)
    nodes, vectors = eigh_tridiagonal(2 * k + alpha + 1, np.sqrt(k[1:] * (k[1:] + alpha)))
    lengths, spread = np.array([2, 300]), 0.8
    at_nodes = function.numbers(lengths[:, None], spread * np.sqrt(nodes / (width / 2)))
    expected = at_nodes @ vectors[0] ** 2
    assert np.abs(mixed(function, Logits(width), lengths, spread) / expected - 1).max() < PROMISE


def test_infinite_heads_are_not_mixed():
    """d_h = inf is A itself, in one array with others; d_h -> inf approaches it as 1/d_h."""
    lengths, widths = np.array([2, 64])[:, None], np.array([np.inf, 1e6, 2e6])
    found = ParticipationFiniteHead.numbers(lengths, 1.2, widths)
    plain = Participation.numbers(lengths[:, 0], 1.2)
    assert (found[:, 0] == plain).all()
    left = found[:, 1:] - plain[:, None]
    assert np.abs(left[:, 0] / left[:, 1] - 2).max() < 1e-3


def test_mixture_by_simulation():
    """Second moment of the participation at d_h = 2, queries and keys drawn: five errors."""
    rng, count, length = np.random.default_rng(3), 100_000, 6
    u = rng.chisquare(2, (count, 1)) / 2
    squares = (weights_of(1.3 * np.sqrt(u) * rng.standard_normal((count, length))) ** 2).sum(1)
    for function, found in ((Participation, squares), (ParticipationSecondMoment, squares**2)):
        error = found.std() / np.sqrt(count)
        assert abs(found.mean() - float(mixed(function, Logits(2), length, 1.3))) < 5 * error


# ------------------------------------------------------------------- outputs


def output_second_moments(rng, kind, width, length, spread, count):
    """|o_m|^2/d per draw at g = 1: a direction w ~ N(0, s^2 I/d), tokens e, o = sum a e."""
    w = rng.standard_normal((count, width)) * spread / np.sqrt(width)
    if kind == "fixed":
        w *= spread / np.linalg.norm(w, axis=1, keepdims=True)
    found = []
    for direction in w:
        e = rng.standard_normal((length, width))
        if kind == "norm":
            e *= np.sqrt(width) / np.linalg.norm(e, axis=1, keepdims=True)
        o = weights_of(e @ direction) @ e
        found.append(o @ o / width)
    return np.array(found)


SETTINGS = [(16, 128, 1.0), (32, 200, 0.8)]


@pytest.mark.parametrize(("width", "length", "spread"), SETTINGS)
def test_output_of_gaussian_tokens(width, length, spread):
    """Exact at a fixed length of w, within the remainder at a Gaussian w: five errors."""
    formula = FORMULAS["attention.output_second_moment_gaussian_tokens"]
    point = {"m": length, "s": spread, "d": width, "g": 1}
    for kind, slack in (("fixed", 0.0), ("gaussian", 1.0)):
        rng = np.random.default_rng(width)
        found = output_second_moments(rng, kind, width, length, spread, 8000)
        error = found.std() / np.sqrt(len(found))
        allowed = 5 * error + slack * formula.remainder_at(**point)
        assert abs(found.mean() - formula(**point)) < allowed


@pytest.mark.parametrize(("width", "length", "spread"), SETTINGS)
def test_output_of_normed_tokens(width, length, spread):
    """Within the remainder, which is less than a quarter of the value; without the tilt, not."""
    formula = FORMULAS["attention.output_second_moment"]
    point = {"m": length, "s": spread, "d": width, "g": 1}
    found = output_second_moments(np.random.default_rng(width), "norm", width, length, spread, 8000)
    allowed = 5 * found.std() / np.sqrt(len(found)) + formula.remainder_at(**point)
    assert formula.remainder_at(**point) < formula(**point) / 4
    assert abs(found.mean() - formula(**point)) < allowed
    assert abs(found.mean() - value(Participation, length, spread)) > allowed


def test_the_floor_is_the_limit():
    """g s^2/d, g scaling all, with a remainder that is what the prefix still adds."""
    point = {"g": 3.0, "s": 0.9, "d": 64}
    full, floor = FORMULAS["attention.output_second_moment"], FORMULAS["attention.floor"]
    lengths = np.array([10, 1000, 100_000])
    assert full(m=1e9, **point) == pytest.approx(3.0 * 0.81 / 64, rel=1e-6)
    left = full(m=lengths, **point) - floor(m=lengths, **point)
    assert np.abs(left - floor.remainder_at(m=lengths, **point)).max() < 1e-14
    assert (np.diff(left) < 0).all()


# ------------------------------------------------------------------- where the 1/m law ends


@pytest.mark.parametrize(("width", "spread"), [(256, 1.0), (256, 2.0), (256, 2.5), (3, 1.5)])
def test_breakdown_length_solves_its_equation(width, spread):
    """(d - 1) A = B at m*, by the other quadrature."""
    found = nested(value(BreakdownLength, spread, width), spread)
    assert abs((width - 1) * found[Participation] / found[Tilt] - 1) < PROMISE


def test_breakdown_length_at_the_edges():
    """1 where d - 1 <= 1, none where attention is uniform, 1e15 positions and more in between."""
    assert BreakdownLength.numbers(np.array([0.0, 1.0, 30.0]), np.array([1.0, 2.0, 2.0])).max() == 1
    assert value(BreakdownLength, 0, 3) == np.inf
    assert value(BreakdownLength, 1e-70, 3) == np.inf
    lengths = BreakdownLength.numbers(10.0, np.array([16.0, 64.0, 256.0]))
    assert (np.diff(np.log(lengths)) > 2).all()
    assert 1e14 < lengths[-1] < 1e16


@pytest.mark.parametrize("spread", [0.01, 0.1, 0.5, 1.0, 2.0, 3.0])
def test_leading_breakdown_length_within_its_remainder(spread):
    """Twice the next term at most, and that term itself where e^(2 s^2) is far below m*."""
    formula = FORMULAS["attention.breakdown_length_leading"]
    for width in (16, 256, 4096):
        point = {"s": spread, "d": width}
        off = formula(**point) - value(BreakdownLength, spread, width)
        assert abs(off) < 2 * formula.remainder_at(**point)
        if 1000 * np.exp(2 * spread**2) < value(BreakdownLength, spread, width):
            assert abs(abs(off) / formula.remainder_at(**point) - 1) < 0.02


# ------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("m_max", "s_max", "d_h"),
    [(256, 1.0, 64), (256, 1.0, np.inf), (64, 0.2, 8), (16, 2.0, 16), (16, 8.0, 64), (4, 4.0, 1)],
)
def test_a_table_is_the_mixture(m_max, s_max, d_h):
    """m P - 1 and P_2/P^2 - 1 to 1e-6 of the larger of the value and 1/1000; 0 at s = 0."""
    table = ParticipationTable(m_max, s_max, Logits(d_h))
    lengths = np.unique(np.geomspace(1, m_max, 20).astype(int))[:, None]
    spreads = s_max * np.array([0, 1e-3, 0.03, 0.2, 0.5, 0.77, 1.0])
    P = mixed(Participation, Logits(d_h), lengths, spreads)
    P_2 = mixed(ParticipationSecondMoment, Logits(d_h), lengths, spreads)
    found = table(lengths, spreads**2), table.relative_variance(lengths, spreads**2)
    for values, expected in zip(found, (lengths * P - 1, P_2 / P**2 - 1), strict=True):
        assert (np.abs(values - expected) < 1e-6 * np.maximum(expected, 1e-3)).all()
        assert np.abs(values[:, 0]).max() < 1e-9


def test_a_restricted_table_is_the_table():
    """A short series on part of the variances: 1e-6 over a factor of two, the end beyond it."""
    table, least = ParticipationTable(40, 2.0, Logits(64)), np.linspace(0, 1.6, 40)
    for largest, within in ((least, 1e-12), (2 * least, 1e-6)):
        short = table.restricted(SharedWithLonger, least, largest)
        variances = least + (largest - least) * np.linspace(0, 1, 9)[:, None]
        exact = table.logarithm(SharedWithLonger, np.arange(1, 41), variances)
        assert np.abs(short(slice(0, 40), variances) - exact).max() < within
        whole, some = short(slice(0, 40), variances), short(slice(5, 7), variances[:, 5:7])
        assert (some == whole[:, 5:7]).all()
        assert np.allclose(short(slice(0, 40), largest[None] + 1), whole[-1:], rtol=1e-12)


def test_a_table_broadcasts_like_its_entries():
    """Gathered entries equal those of the whole grid."""
    table, rng = ParticipationTable(40, 1.0, Logits(64)), np.random.default_rng(0)
    every, variances = np.arange(1, 41)[:, None], rng.uniform(0, 1, 30)
    grid, pick = table(every, variances), rng.integers(0, [[40], [30]], (2, 100))
    assert grid.shape == (40, 30)
    assert (table(pick[0] + 1, variances[pick[1]]) == grid[pick[0], pick[1]]).all()
    assert table(every[:0], variances).shape == (0, 30)


def test_equal_tables_are_built_once():
    """The coefficients are kept by the table's arguments."""
    ParticipationTable(12, 0.5, Logits(4))(1, 0.1)
    before = softmax_table._logarithms.cache_info()
    ParticipationTable(12, 0.5, Logits(4))(2, 0.2)
    after = softmax_table._logarithms.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 1)


@pytest.mark.parametrize(
    ("positions", "variances", "named"),
    [
        (0, 0.5, "positions from 1 to 8"),
        (9, 0.5, "positions from 1 to 8"),
        (1, -0.1, "variances from 0"),
        (1, 1.1, "variances from 0"),
        (1, np.nan, "variances from 0"),
    ],
)
def test_a_table_refuses_what_it_does_not_hold(positions, variances, named):
    """Positions and variances beyond the table, with the remedy."""
    with pytest.raises(ValueError, match=f"{named}.*; build a larger table"):
        ParticipationTable(8, 1.0, Logits(64))(positions, variances)


@pytest.mark.parametrize("arguments", [(0, 1.0), (2.5, 1.0), (8, -1.0)])
def test_a_table_refuses_wrong_arguments(arguments):
    """m_max whole, s_max positive, d_h at least 1."""
    with pytest.raises(ValueError, match="expected"):
        ParticipationTable(*arguments)


def test_temperatures_out_of_reach_are_refused(monkeypatch):
    """What no lattice follows, and what no polynomial of the largest degree does."""
    with pytest.raises(NotImplementedError, match=r"up to 300, got 301; lower s"):
        Participation.numbers(2, 301.0)
    monkeypatch.setattr(softmax_table, "DEGREES", (8,))
    with pytest.raises(NotImplementedError, match=r"of degree 8 follows, got others; lower s_max"):
        ParticipationTable(7, 2.0, Logits(32))(1, 0.0)


# ------------------------------------------------------------------- as formulas


def test_a_numeric_function_prints_and_evaluates():
    """LaTeX by its letter, source by its name, numbers by evalf and by calls with arrays."""
    formula = FORMULAS["attention.participation"]
    assert formula.latex() == r"\mathbb{E}\sum_n a_{mn}^2 = A\left(m, s\right)"
    assert formula.python() == "Participation(m, s)"
    one = float(formula.subs(m=3, s=sp.Rational(1, 2)).evalf())
    assert abs(one - value(Participation, 3, 0.5)) < 1e-14
    assert formula(m=[3, 4], s=0.5)[0] == pytest.approx(one, rel=1e-13)


def test_what_is_exact_and_what_is_not():
    """Means over i.i.d. Gaussian logits are exact; outputs and expansions have remainders."""
    point = {"m": 50, "s": 0.8, "d": 64, "d_h": 16, "g": 1.0}
    for formula in FORMULAS.values():
        given = {name: point[name] for name in formula.symbols}
        assert (formula.remainder_at(**given) > 0) == (formula.status is Status.LEADING_ORDER)


def test_the_tilt_holds_its_shared_part():
    """B - B_off = E sum a^2 z^2 > 0, and (d - 1) A + B is the same sum by both formulas."""
    gaussian = FORMULAS["attention.output_second_moment_gaussian_tokens"].expr
    difference = sp.expand(gaussian * d / sp.Symbol("g", nonnegative=True))
    assert difference.coeff(Tilt(m, s)) == 1
    lengths = np.arange(2, 60)
    assert (Tilt.numbers(lengths, 1.5) > SharedTilt.numbers(lengths, 1.5)).all()
