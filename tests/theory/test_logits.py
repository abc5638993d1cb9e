"""Logits of finite width: moments, closed integrals, and layers drawn in NumPy."""

import numpy as np
import pytest
from scipy.special import betaln, gammaln

from theory.formulas import formula
from theory.formulas.logits import Logits, product_of_chi_squares
from theory.formulas.outputs import GaussianKeysParticipation, GaussianKeysTilt
from theory.formulas.softmax import Entropy, Participation, Tilt, WeightedSquare

REACH = 9.0

# ------------------------------------------------------------------- scales and shapes


@pytest.mark.parametrize(
    "degrees", [(64.0,), (1.0,), (64.0, 63.0), (1.0, 15.0, 15.0), (2.0, np.inf), (16.0, 767.0)]
)
def test_products_of_chi_squares_have_their_moments(degrees):
    """E u^p = prod of Gamma(k/2 + p)/Gamma(k/2) (2/k)^p, for p = -1/4, 1/2, 1, 2, 4."""
    u, weights = product_of_chi_squares(*degrees)
    assert weights.sum() == pytest.approx(1, abs=1e-14)
    for power in (-0.25, 0.5, 1, 2, 4):
        halves = [k / 2 for k in degrees if np.isfinite(k)]
        logs = [gammaln(k + power) - gammaln(k) - power * np.log(k) for k in halves]
        assert weights @ u**power == pytest.approx(np.exp(sum(logs)), rel=1e-7)


def test_infinite_widths_have_one_scale():
    """u = 1."""
    u, weights = product_of_chi_squares(np.inf, np.inf)
    assert u.tolist() == weights.tolist() == [1.0]


@pytest.mark.parametrize("dimension", [1.0, 1.5, 2.0, 3.0, 7.0, 63.0, 767.0])
def test_a_sphere_has_its_moments(dimension):
    """E z^2 = 1, E z^4 = 3 D/(D + 2), E z^6 = 15 D^2/((D + 2)(D + 4)), by symmetry E z^3 = 0."""
    D = dimension
    z, weights = Logits(freedom=D).shape(1.0, REACH)
    moments = [weights @ z**k for k in (1, 2, 3, 4, 6)]
    expected = [0, 1, 0, 3 * D / (D + 2), 15 * D**2 / ((D + 2) * (D + 4))]
    assert moments == pytest.approx(expected, rel=1e-10, abs=1e-13)
    assert np.abs(z).max() <= np.sqrt(D)


@pytest.mark.parametrize("dimension", [1.0625, 1.75, 2.0, 3.5, 16.0])
def test_a_gauss_rule_of_many_nodes_has_the_moments_of_its_density(dimension):
    """E z^(2k) = D^k B(k + 1/2, (D - 1)/2)/B(1/2, (D - 1)/2), where SciPy's rule is 1e-7 off."""
    s = 1500 / 12 / np.sqrt(dimension)
    z, weights = Logits(freedom=dimension).shape(s, REACH)
    assert len(z) == 2048
    for k in (1, 2, 4, 10, 20):
        expected = np.exp(betaln(k + 0.5, (dimension - 1) / 2) - betaln(0.5, (dimension - 1) / 2))
        found = weights @ (z / np.sqrt(dimension)) ** (2 * k)
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("width", [0, 0.5, -1, np.nan])
def test_widths_below_one_are_refused(width):
    """One line, with the width."""
    for name in ("d_h", "freedom"):
        with pytest.raises(ValueError, match=f"expected {name} to be at least 1"):
            Logits(**{name: width})


# ------------------------------------------------------------------- means over a sphere


@pytest.mark.parametrize("spread", [1e-3, 0.5, 2.0, 10.0])
def test_two_keys_on_a_circle(spread):
    """D = 2: z = sqrt(2) cos of a uniform angle, both means by quad over the two angles."""
    nodes = np.pi * (np.arange(2000) + 0.5) / 2000
    z = np.sqrt(2) * np.cos(nodes)
    a = 1 / (1 + np.exp(-spread * np.subtract.outer(z, z)))
    squares, tilt = a**2 + (1 - a) ** 2, (a * z[:, None] + (1 - a) * z[None, :]) ** 2
    circle = Logits(freedom=2.0)
    expected = {
        Participation: squares.mean(),
        Tilt: tilt.mean(),
        WeightedSquare: (a * z[:, None] ** 2 + (1 - a) * z[None, :] ** 2).mean(),
        Entropy: -(a * np.log(a) + (1 - a) * np.log1p(-a)).mean() if spread < 5 else None,
    }
    for function, value in expected.items():
        if value is not None:
            assert function.of(circle, 2.0, spread) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(("length", "spread"), [(3.0, 0.4), (8.0, 2.0)])
def test_keys_of_one_dimension_are_signs(length, spread):
    """D = 1: k of m keys have z = 1, a binomial number, and the sum is finite."""
    k = np.arange(int(length) + 1)
    weights = np.exp(gammaln(length + 1) - gammaln(k + 1) - gammaln(length - k + 1))
    weights /= weights.sum()
    up, down = np.exp(spread), np.exp(-spread)
    total = k * up + (length - k) * down
    participation = (k * up**2 + (length - k) * down**2) / total**2
    tilt = ((k * up - (length - k) * down) / total) ** 2
    signs = Logits(freedom=1.0)
    for function, each in ((Participation, participation), (Tilt, tilt)):
        assert function.of(signs, length, spread) == pytest.approx(weights @ each, rel=1e-9)


def test_wide_keys_are_gaussian():
    """D -> infinity: the rest falls as 1/D."""
    exact = Participation.numbers(20.0, 1.5)
    left = [Participation.of(Logits(freedom=D), 20.0, 1.5) - exact for D in (1e4, 2e4)]
    assert 0 < abs(left[0]) < 1e-3
    assert left[0] / left[1] == pytest.approx(2, rel=1e-3)


# ------------------------------------------------------------------- layers by simulation


def outputs_of_a_layer(rng, draws, d, d_h, length, spread, normed):
    """o_m = sum_n a_mn e_n of one head at every m: |o_m|^2/d and <o_m, o_n>/d, per draw."""
    e = rng.standard_normal((draws, length, d))
    if normed:
        e -= e.mean(-1, keepdims=True)
        e /= e.std(-1, keepdims=True)
    q = e @ rng.standard_normal((draws, d, d_h)) / np.sqrt(d)
    k = e @ rng.standard_normal((draws, d, d_h)) / np.sqrt(d)
    logits = spread * q @ k.swapaxes(1, 2) / np.sqrt(d_h)
    logits = np.where(np.tri(length, dtype=bool), logits, -np.inf)
    a = np.exp(logits - logits.max(-1, keepdims=True))
    o = a / a.sum(-1, keepdims=True) @ e
    return o @ o.swapaxes(1, 2) / d


@pytest.mark.parametrize("spread", [0.5, 3.0])
@pytest.mark.parametrize(("d", "d_h"), [(7, 3), (4, 2), (2, 2)])
def test_second_moments_over_normed_tokens_are_exact(d, d_h, spread):
    """At any width and temperature: five standard errors of 40,000 layers."""
    rng, length = np.random.default_rng([d, int(10 * spread)]), 6
    found = np.diagonal(outputs_of_a_layer(rng, 40_000, d, d_h, length, spread, True), 0, 1, 2)
    exact = formula("attention.output_second_moment_finite_head")
    expected = exact(m=np.arange(1, length + 1), s=spread, d=d, d_h=d_h, g=1.0)
    error = found.std(0) / np.sqrt(len(found))
    assert (np.abs(found.mean(0) - expected) < 5 * error + 1e-12).all()


@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_pairs_of_outputs_are_within_the_remainder(spread):
    """At d = 16: the remainder is a tenth of the kernel's scale or less, and covers the rest."""
    rng, (d, d_h, length) = np.random.default_rng(int(10 * spread)), (16, 4, 8)
    found = outputs_of_a_layer(rng, 40_000, d, d_h, length, spread, True)
    exact = formula("attention.output_kernel")
    for last in range(2, length + 1):
        point = {"m": last, "n": last - 1, "s": spread, "d": d, "d_h": d_h, "g": 1.0}
        pair = found[:, last - 1, last - 2]
        size = np.sqrt(np.prod([found[:, k, k].mean() for k in (last - 1, last - 2)]))
        allowed = 5 * pair.std() / np.sqrt(len(pair)) + exact.remainder_at(**point)
        assert abs(pair.mean() - exact(**point)) < allowed
        assert exact.remainder_at(**point) < 0.1 * size


def test_second_moments_over_gaussian_tokens():
    """Norms that fluctuate: exact but for the query's own key, which is less than 1% at d = 16."""
    rng, (d, d_h, length, spread) = np.random.default_rng(4), (16, 4, 8, 1.0)
    found = np.diagonal(outputs_of_a_layer(rng, 60_000, d, d_h, length, spread, False), 0, 1, 2)
    m = np.arange(1.0, length + 1)
    kinds = GaussianKeysParticipation, GaussianKeysTilt
    A, B = (kind.numbers(m, spread, d_h, d) for kind in kinds)
    expected = ((d - 1) * A + B) / d
    error = found.std(0) / np.sqrt(len(found))
    assert (np.abs(found.mean(0) - expected) < 5 * error + 0.015 * expected).all()
    assert (np.abs(found.mean(0) - Participation.numbers(m, spread))[4:] > 5 * error[4:]).all()
