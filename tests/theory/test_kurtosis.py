"""Fourth moments at finite width, by averaging over discrete laws that share every moment used.

A weight of kurtosis kappa becomes the three points 0, +-sqrt(kappa); a token of two coordinates, or
what a norm leaves of two or three, a grid that is exact up to degree 9: Gauss-Hermite's for
Gaussians, equal angles on a circle.  A logit's fourth moment has degree 8 in a token that is its
own key, so these averages are exact up to rounding.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest

import nope
import theory
from nope import Question
from nope.init import Normal, Same, TruncatedNormal, Uniform, Zero
from theory.formulas.kurtosis import Map
from theory.laws import law
from theory.predict import predict
from theory.symbols import d, kappa_w, kappa_x, nu_x, theta_w

STD = 0.3
ROUNDING = 1e-11
SCHEMES = {
    "normal": nope.init.normal(STD),
    "truncated_normal": nope.init.truncated_normal(STD),
    "gpt2": nope.init.gpt2(),
    "xavier_normal": nope.init.xavier_normal(),
    "xavier_uniform": nope.init.xavier_uniform(),
    "kaiming_normal": nope.init.kaiming_normal(),
    "kaiming_uniform": nope.init.kaiming_uniform(),
    "lecun_normal": nope.init.lecun_normal(),
    "lecun_uniform": nope.init.lecun_uniform(),
    "orthogonal": nope.init.orthogonal(),
    "mup": nope.init.mup(STD),
    "torch_default": nope.init.torch_default(),
}
KURTOSIS = {
    **dict.fromkeys(SCHEMES, 3.0),
    **dict.fromkeys((name for name in SCHEMES if "uniform" in name), 9 / 5),
    "torch_default": 9 / 5,
    "truncated_normal": TruncatedNormal(1.0).kurtosis,
}
"""Of an entry of a matrix; Haar matrices have a test of their own."""
INDEPENDENT = [name for name in SCHEMES if name != "orthogonal"]


def ask(architecture, scheme, place, observable="kurtosis"):
    """The prediction, by the name of a scheme or a scheme."""
    init = SCHEMES[scheme] if isinstance(scheme, str) else scheme
    return predict(Question(architecture, init, place, observable))


def exactly(architecture, scheme, place):
    """Its values, which must be exact."""
    found = ask(architecture, scheme, place)
    assert found.status is theory.Status.EXACT
    return found.values


# --------------------------------------------------------------------- discrete laws


def entries(count, kurtosis):
    """All arrays of `count` three-point weights of variance 1, and their probabilities."""
    points = np.array([0.0, kurtosis**0.5, -(kurtosis**0.5)])
    shares = np.array([1 - 1 / kurtosis, 0.5 / kurtosis, 0.5 / kurtosis])
    states = np.array(list(product(range(3), repeat=count)))
    return points[states], shares[states].prod(1)


def circle(first, second):
    """Ten points at equal angles on the circle of radius sqrt(d) in the plane of two vectors."""
    angles = 2 * np.pi * np.arange(10) / 10
    plane = np.array([np.cos(angles), np.sin(angles)]).T @ np.array([first, second])
    return np.sqrt(len(first)) * plane, np.full(10, 0.1)


def gaussian():
    """Two Gaussian coordinates: five nodes each, exact up to degree 9."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    weights = weights / weights.sum()
    grid = np.array(list(product(nodes, repeat=2)))
    return grid, np.outer(weights, weights).ravel()


R2, R6 = 2**-0.5, 6**-0.5
TOKENS = {
    "raw": (gaussian(), {"norm_position": "none"}),
    "rmsnorm": (circle([1.0, 0.0], [0.0, 1.0]), {"norm": "rmsnorm"}),
    "layernorm": (circle([R2, -R2, 0.0], [R6, R6, -2 * R6]), {}),
    "signs": ((np.array([[1.0, -1.0], [-1.0, 1.0]]), np.full(2, 0.5)), {}),
}
"""What the matrices of a first layer read: points with probabilities, and the options for it."""
CASES = [(kind, d_h) for kind in TOKENS for d_h in (1, 2) if (kind, d_h) != ("layernorm", 2)]


def layer(kind, d_h=1, **options):
    """One layer over tokens of the kind's width."""
    (points, _), own = TOKENS[kind]
    width = points.shape[1]
    return nope.decoder(width, width // d_h, n_ctx=4, **{**own, **options})


def ratio(values, shares):
    """E y^4/(E y^2)^2."""
    return (shares * values**4).sum() / (shares * values**2).sum() ** 2


def row_ratio(points, shares, d_h, kurtosis, share):
    """That of a row of logits, of which `share` have the query's own token as their key."""
    weights, chances = entries(points.shape[1] * d_h, kurtosis)
    mapped = np.einsum("xi,wia->xwa", points, weights.reshape(len(weights), -1, d_h))
    logits = np.einsum("xwa,yva->xywv", mapped, mapped) / d_h**0.5
    moments = [np.einsum("xywv,w,v->xy", logits**k, chances, chances) for k in (2, 4)]
    second, fourth = (
        share * shares @ np.diagonal(each) + (1 - share) * shares @ each @ shares
        for each in moments
    )
    return fourth / second**2


# ------------------------------------------------------------------- one layer, i.i.d. weights


@pytest.mark.parametrize("name", INDEPENDENT)
@pytest.mark.parametrize("kind", TOKENS)
def test_queries_keys_and_values(kind, name):
    """A coordinate of x W over all weights of its column and all points of x."""
    points, shares = TOKENS[kind][0]
    weights, chances = entries(points.shape[1], KURTOSIS[name])
    expected = ratio(points @ weights.T, np.outer(shares, chances))
    for letter in "qkv":
        found = exactly(layer(kind), name, f"blocks.0.attn.{letter}")
        assert np.allclose(found, expected, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("name", ["normal", "truncated_normal", "xavier_uniform"])
@pytest.mark.parametrize(("kind", "d_h"), CASES)
def test_logits(kind, d_h, name):
    """A row m of logits: one of its m keys is that of the query's own token."""
    (points, shares), _ = TOKENS[kind]
    found = exactly(layer(kind, d_h), name, "blocks.0.attn.scores")
    expected = [row_ratio(points, shares, d_h, KURTOSIS[name], 1 / m) for m in range(1, 5)]
    assert np.allclose(found, expected, rtol=ROUNDING, atol=0)


def test_the_own_key_matters_at_fixed_norm_and_flat_weights_only():
    """Gaussian weights see the norm alone, uniform ones S as well: less at n = m, by 1e-3 here."""
    flat = exactly(layer("rmsnorm"), "lecun_uniform", "blocks.0.attn.scores")
    assert (np.diff(flat) < -1e-3).all()
    normal = exactly(layer("rmsnorm"), "lecun_normal", "blocks.0.attn.scores")
    assert np.ptp(normal) < ROUNDING


@pytest.mark.parametrize("kind", ["raw", "rmsnorm"])
def test_logits_of_tokens_that_repeat(kind):
    """Three equally likely rows of a table: any other key is the query's with probability 1/3."""
    (points, shares), _ = TOKENS[kind]
    tokens = nope.EmbeddingTokens(3, std=1.0)
    found = exactly(layer(kind, tokens=tokens), "lecun_uniform", "blocks.0.attn.scores")
    same = [(1 + (m - 1) / 3) / m for m in range(1, 5)]
    expected = [row_ratio(points, shares, 1, 9 / 5, share) for share in same]
    assert np.allclose(found, expected, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("name", ["normal", "truncated_normal", "xavier_uniform"])
@pytest.mark.parametrize("kind", ["rmsnorm", "raw", "signs"])
def test_uniform_attention(kind, name):
    """Positions 1 and 2: two tokens, W_V and a column of W_O, all enumerated."""
    points, shares = TOKENS[kind][0]
    weights, chances = entries(4, KURTOSIS[name])
    columns, odds = entries(2, KURTOSIS[name])
    means = (points[:, None] + points).reshape(-1, 2) / 2
    pairs = np.outer(shares, shares).ravel()
    for m, (inputs, masses) in enumerate([(points, shares), (means, pairs)]):
        z = np.einsum("xi,wia->xwa", inputs, weights.reshape(-1, 2, 2))
        known = {"attn.z": ratio(z[..., 0], np.outer(masses, chances))}
        outputs = np.einsum("xwa,va->xwv", z, columns)
        known["attn_out"] = ratio(outputs, np.einsum("x,w,v->xwv", masses, chances, odds))
        for place, expected in known.items():
            found = exactly(layer(kind, attention="uniform"), name, f"blocks.0.{place}")
            assert abs(found[m] / expected - 1) < ROUNDING


# ------------------------------------------------------------------------------- biases


@dataclass(frozen=True)
class Biased:
    """Uniform matrices and biases, of variances 1/5 and 1/7."""

    bias: object = Uniform((3 / 7) ** 0.5)

    def law(self, weight, architecture):
        return self.bias if weight.role == "bias" else Uniform((3 / 5) ** 0.5)


def test_a_bias_behind_a_norm():
    """x W + b over all W, b and x; logits of two such maps, of one and of two tokens."""
    points, shares = TOKENS["rmsnorm"][0]
    states, chances = entries(3, 9 / 5)
    mapped = points @ states[:, :2].T / 5**0.5 + states[:, 2] / 7**0.5
    expected = ratio(mapped, np.outer(shares, chances))
    architecture = layer("rmsnorm", bias=True)
    found = exactly(architecture, Biased(), "blocks.0.attn.q")
    assert np.allclose(found, expected, rtol=ROUNDING, atol=0)
    fourth, second = ((mapped**k) @ chances for k in (4, 2))
    rows = [
        (shares @ fourth**2 / m + (1 - 1 / m) * (shares @ fourth) ** 2) / (shares @ second) ** 4
        for m in range(1, 5)
    ]
    found = exactly(architecture, Biased(), "blocks.0.attn.scores")
    assert np.allclose(found, rows, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("place", ["attn.q", "attn.scores", "attn.z"])
def test_a_bias_of_zero_changes_nothing_and_another_is_refused_where_the_norm_is_not_fixed(place):
    """There its share of the variance is that of a random norm."""
    options = {"attention": "uniform"} if place == "attn.z" else {}
    plain, biased = (layer("raw", bias=bias, **options) for bias in (False, True))
    expected = exactly(plain, Biased(), f"blocks.0.{place}")
    found = exactly(biased, Biased(Zero()), f"blocks.0.{place}")
    assert np.allclose(found, expected, rtol=ROUNDING, atol=0)
    with pytest.raises(NotImplementedError, match="no closed form"):
        ask(biased, Biased(), f"blocks.0.{place}")


# ------------------------------------------------------------------------- Haar matrices


@pytest.mark.parametrize(("width", "heads"), [(2, 1), (6, 2), (6, 6), (16, 4)])
@pytest.mark.parametrize("block", [0, 1])
def test_haar_logits_are_those_of_weingarten_calculus(width, heads, block):
    """At every depth: `orthogonal.logit_kurtosis`, which sums three pairings instead."""
    architecture = nope.decoder(width, heads, n_layers=2, n_ctx=3)
    found = exactly(architecture, "orthogonal", f"blocks.{block}.attn.scores")
    known = theory.formula("orthogonal.logit_kurtosis")(d=width, d_h=width // heads)
    assert np.allclose(found, known, rtol=ROUNDING, atol=0)


def test_haar_logits_of_gaussian_tokens():
    """At d = 2, over angles and reflections of both matrices and all points of the tokens."""
    (points, shares), _ = TOKENS["raw"]
    angles = 2 * np.pi * np.arange(10) / 10
    columns = np.array([np.cos(angles), np.sin(angles)])
    q = points @ columns
    fourth, second = (np.mean(q**k, axis=1) for k in (4, 2))
    for m, found in enumerate(exactly(layer("raw"), "orthogonal", "blocks.0.attn.scores"), 1):
        four, two = (
            (shares @ each**2) / m + (1 - 1 / m) * (shares @ each) ** 2 for each in (fourth, second)
        )
        assert abs(found / (four / two**2) - 1) < ROUNDING


def test_an_isometry_keeps_norms():
    """Haar square: nu_y = nu_x, so uniform attention's output has the values' kurtosis."""
    haar = {theta_w: d / (d + 2), kappa_w: 3 * d / (d + 2)}
    kept = Map(d, theta_w, kappa_w).norm(nu_x, kappa_x, d).subs(haar)
    assert (kept - nu_x).simplify() == 0
    architecture = nope.decoder(8, 2, n_ctx=4, attention="uniform")
    places = ("blocks.0.attn.z", "blocks.0.attn_out")
    z, out = (exactly(architecture, "orthogonal", place) for place in places)
    assert np.allclose(z, out, rtol=ROUNDING, atol=0)


def test_a_haar_matrix_that_is_not_square():
    """mlp.pre: entries of a fixed vector's image are those of a sphere of the longer side."""
    for d_ff in (2, 8):
        architecture = nope.decoder(4, 1, n_ctx=2, d_ff=d_ff)
        longer = max(4, d_ff)
        found = exactly(architecture, "orthogonal", "blocks.0.mlp.pre")
        assert np.allclose(found, 3 * longer / (longer + 2), rtol=ROUNDING, atol=0)


# ----------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", SCHEMES)
def test_tokens_and_their_norm_need_no_weights(name):
    """3, and 3(d - 1)/(d + 1), whatever the scheme."""
    assert np.allclose(exactly(layer("layernorm"), name, "embed"), 3)
    assert np.allclose(exactly(layer("layernorm"), name, "blocks.0.ln1"), 3 / 2)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("place", ["blocks.0.mlp.pre", "blocks.1.attn.scores"])
def test_behind_a_stream_only_gaussian_and_haar_weights_have_an_answer(place, name):
    """The shape of ln2 under other weights has no closed form, its norm is d under all."""
    architecture = nope.decoder(6, 2, n_ctx=3, n_layers=2, d_ff=6)
    if name == "orthogonal" or KURTOSIS[name] == 3:
        d_h, kurtosis = 3, 3.0 if name != "orthogonal" else 3 * 6 / 8
        known = {"pre": kurtosis, "scores": kurtosis**2 / 9 * (3 + 6 / d_h)}
        expected = known[place.rpartition(".")[2]]
        assert np.allclose(exactly(architecture, name, place), expected, rtol=ROUNDING, atol=0)
        return
    with pytest.raises(NotImplementedError, match="Gaussian or Haar weights"):
        ask(architecture, name, place)


@pytest.mark.parametrize("place", ["resid_mid", "attn.pattern", "attn_out", "mlp.post"])
def test_no_closed_form_at_all(place):
    """Sums of dependent parts, shares, mixtures by a softmax, activations."""
    with pytest.raises(NotImplementedError, match="closed form"):
        ask(nope.decoder(6, 2, n_ctx=3), "normal", f"blocks.0.{place}")


@dataclass(frozen=True)
class Equal:
    """Entries that are all one Gaussian: neither independent nor Haar."""

    variance: float = 1.0
    kurtosis: float = 3.0
    independent: bool = False
    gaussian: bool = False

    def law(self, weight, architecture):
        return self


def test_weights_of_unknown_dependence_are_refused():
    """Their pair moment is not known."""
    with pytest.raises(NotImplementedError, match="Gaussian or Haar weights"):
        ask(layer("rmsnorm"), Equal(), "blocks.0.attn.q")


def test_two_kurtoses_of_one_role_are_not_one_symbol():
    """Values of values of two unlike layers, with no norm between."""

    @dataclass(frozen=True)
    class Layerwise:
        def law(self, weight, architecture):
            return Uniform(1.0) if "first" in weight.path else Normal(3**-0.5)

    parts = tuple(nope.layers.Attention(1, "uniform", name=name) for name in ("first", "second"))
    body = nope.layers.Sequence(parts)
    architecture = nope.architecture.Architecture(2, 2, nope.GaussianTokens(1.0), body)
    assert np.allclose(exactly(architecture, Same(Normal(1.0)), "first_out"), 3 * (1 + 2 / 2) ** 2)
    with pytest.raises(NotImplementedError):
        ask(architecture, Layerwise(), "second_out")


# ---------------------------------------------------------------------------------- laws


def uniform(rng, shape):
    """Entries of variance 1/d."""
    return rng.uniform(-1, 1, shape) * (3 / shape[-1]) ** 0.5


def haar(rng, shape):
    """Orthogonal matrices by QR, signs put right."""
    found, upper = np.linalg.qr(rng.normal(size=shape))
    return found * np.sign(np.diagonal(upper, axis1=-2, axis2=-1))[:, None, :]


@pytest.mark.parametrize(
    ("draw", "name", "place"),
    [
        (uniform, "lecun_uniform", "attn.q"),
        (uniform, "lecun_uniform", "attn.scores"),
        (haar, "orthogonal", "attn.scores"),
    ],
)
def test_a_law_for_gaussian_weights_states_what_others_change(draw, name, place):
    """At d = 3 the largest distance of CDFs is within the remainder, at 1e-9 of chance (DKW)."""
    rng, draws, width = np.random.default_rng(20), 200_000, 3
    tokens = rng.normal(size=(draws, width))
    tokens -= tokens.mean(1, keepdims=True)
    tokens /= np.sqrt((tokens**2).mean(1, keepdims=True))
    shape = (draws, width, width)
    q, k = (np.einsum("ni,nia->na", tokens, draw(rng, shape)) for _ in range(2))
    values = np.sort(q[:, 0] if place == "attn.q" else (q * k).sum(1) / width**0.5)
    architecture = nope.decoder(width, 1, n_ctx=1, d_ff=0)
    found = law(Question(architecture, SCHEMES[name], f"blocks.0.{place}", "kurtosis"))
    points = np.linspace(*np.quantile(values, [0.001, 0.999]), 300)
    distance = np.abs(np.searchsorted(values, points) / draws - found.cdf(points)).max()
    assert found.status is theory.Status.LEADING_ORDER
    assert distance < found.remainder + np.sqrt(np.log(2e9) / (2 * draws))
    assert distance > found.remainder / 5
