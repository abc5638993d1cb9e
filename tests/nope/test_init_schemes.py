"""Initialisation schemes: what they state is what they draw, and what torch draws.

Sample moments are held to 5 standard errors, a false alarm in 1.7 million.
"""

import math

import mpmath
import numpy as np
import pytest
import torch
from torch import nn

import nope
from nope.init import Orthogonal, TruncatedNormal, Uniform, VarianceScaling, Zero
from nope.questions import stream_key
from nope.sources import NumpySource
from nope.streams import TorchSource, generator

Z = 5.0
DRAWS = 1500
D, D_FF = 8, 32
ARCHITECTURE = nope.decoder(D, 2, 3, n_ctx=2, bias=True)
MATRICES = ("query", "key", "value", "output", "mlp_in", "mlp_out")
BIASES = ("b_Q", "b_K", "b_V", "b_O", "b_in", "b_out")
TRUNCATED = 1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2))
"""Variance of N(0, 1) truncated at 2: 1 - 2 c phi(c)/(2 Phi(c) - 1)."""

# Per scheme the variance of a square matrix (fan_in = fan_out = D), W_in (D to D_FF) and W_out.
PUBLISHED = {
    "normal": (nope.init.normal(0.7), 0.49, 0.49, 0.49),
    "truncated_normal": (nope.init.truncated_normal(0.7), *3 * (0.49 * TRUNCATED,)),
    "xavier_normal": (nope.init.xavier_normal(), 1 / 8, 2 / 40, 2 / 40),
    "xavier_uniform": (nope.init.xavier_uniform(3.0), 9 / 8, 18 / 40, 18 / 40),
    "kaiming_normal": (nope.init.kaiming_normal(), 2 / 8, 2 / 8, 2 / 32),
    "kaiming_uniform": (nope.init.kaiming_uniform("fan_out", "linear"), 1 / 8, 1 / 32, 1 / 8),
    "lecun_normal": (nope.init.lecun_normal(), 1 / 8, 1 / 8, 1 / 32),
    "lecun_uniform": (nope.init.lecun_uniform(), 1 / 8, 1 / 8, 1 / 32),
    "jax_lecun_normal": (VarianceScaling(1.0, "fan_in", "truncated_normal"), 1 / 8, 1 / 8, 1 / 32),
    "orthogonal": (nope.init.orthogonal(1.5), 2.25 / 8, 2.25 / 32, 2.25 / 32),
    "mup": (nope.init.mup(0.02, 64), 4e-4 * 64 / 8, 4e-4 * 64 / 8, 4e-4 * 64 / 32),
}
SCHEMES = {name: scheme for name, (scheme, *_) in PUBLISHED.items()} | {
    "gpt2": nope.init.gpt2(0.02),
    "torch_default": nope.init.torch_default(),
    "torch_default_unpacked": nope.init.torch_default(packed=False),
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def numpy_source():
    return NumpySource(np.random.Generator(np.random.Philox(7)))


def torch_source():
    cpu = torch.device("cpu")
    return TorchSource(generator(stream_key(7), cpu), cpu, torch.float64)


def weight(role):
    return next(w for w in ARCHITECTURE.weights if w.role == role)


def bias(suffix):
    return next(w for w in ARCHITECTURE.weights if w.path.endswith(suffix))


def assert_moments(draws, variance, kurtosis):
    """Mean 0, variance and kurtosis, averaged over entries first: draws are the unit."""
    w = np.asarray(draws) / math.sqrt(variance)
    for power, expected in ((1, 0.0), (2, 1.0), (4, kurtosis)):
        means = (w**power).reshape(len(w), -1).mean(1)
        error = Z * means.std() / math.sqrt(len(w))
        assert abs(means.mean() - expected) <= error + 1e-12, power


@pytest.mark.parametrize("source", [numpy_source, torch_source])
@pytest.mark.parametrize("role", ["query", "output", "mlp_in", "mlp_out"])
@every_scheme
def test_drawn_weights_have_the_stated_moments(scheme, role, source):
    """Mean 0, the law's variance and the law's kurtosis, each to 5 standard errors."""
    law = scheme.law(weight(role), ARCHITECTURE)
    assert_moments(law.draw(source(), (DRAWS, *weight(role).shape)), law.variance, law.kurtosis)


@pytest.mark.parametrize("name", PUBLISHED)
def test_variances_are_the_published_ones(name):
    """Each rule written out by hand for fans 8 and 32."""
    scheme, square, widening, narrowing = PUBLISHED[name]
    expected = dict.fromkeys(MATRICES[:4], square) | {"mlp_in": widening, "mlp_out": narrowing}
    for role, variance in expected.items():
        found = scheme.law(weight(role), ARCHITECTURE).variance
        assert found == pytest.approx(variance, rel=1e-12)


@every_scheme
def test_draws_have_the_asked_shape_and_independent_leading_axes(scheme):
    """`draw` fills the shape it is given, and no two draws are alike."""
    drawn = scheme.law(weight("query"), ARCHITECTURE).draw(torch_source(), (3, 8, 8))
    assert drawn.shape == (3, 8, 8)
    assert len({float(x) for x in drawn[:, 0, 0]}) == 3


@every_scheme
def test_only_normal_laws_call_themselves_gaussian(scheme):
    """The theory's exact results for Gaussian weights go by this word, not by a kurtosis."""
    law = scheme.law(weight("query"), ARCHITECTURE)
    assert law.gaussian == isinstance(law, nope.init.Normal)
    assert law.independent != isinstance(law, Orthogonal)
    assert isinstance(law, nope.init.WeightLaw)


@pytest.mark.parametrize("source", [numpy_source, torch_source])
@pytest.mark.parametrize("name", [k for k in SCHEMES if not k.startswith("torch")])
def test_biases_are_zero(name, source):
    """Every scheme but torch's starts biases at 0, and says so."""
    for suffix in BIASES:
        law = SCHEMES[name].law(bias(suffix), ARCHITECTURE)
        assert (law.variance, law.gaussian, law.independent) == (0, True, True)
        assert np.array_equal(np.asarray(law.draw(source(), (2, 8))), np.zeros((2, 8)))


@pytest.mark.parametrize(
    ("layers", "d_ff", "additions"), [(1, None, 2), (3, None, 6), (12, None, 24), (3, 0, 3)]
)
def test_gpt2_divides_projections_into_the_stream(layers, d_ff, additions):
    """W_O and W_out have variance std^2 / (residual additions); all else has std^2."""
    architecture = nope.decoder(8, 2, layers, d_ff, n_ctx=2)
    scheme = nope.init.gpt2(0.02)
    for w in architecture.weights:
        into_stream = w.path.endswith(("W_O", "W_out"))
        expected = 0.02**2 / (additions if into_stream else 1)
        assert scheme.law(w, architecture).variance == pytest.approx(expected, rel=1e-12)


def test_gpt2_defaults_to_its_published_std():
    """0.02, and no division by zero where there is no residual sum."""
    value = nope.Attention(2)
    bare = nope.Architecture(8, 2, nope.GaussianTokens(), nope.Sequence((value,)))
    laws = [nope.init.gpt2().law(w, bare).variance for w in bare.weights]
    assert laws == pytest.approx([0.02**2] * 4, rel=1e-12)


def test_schemes_are_values():
    """Equal schemes are equal and hash alike: questions are grouped by them."""
    assert nope.init.normal(0.1) == nope.init.normal(0.1)
    assert hash(nope.init.gpt2()) == hash(nope.init.gpt2(0.02))
    assert nope.init.normal(0.02) != nope.init.gpt2(0.02)
    assert len(set(SCHEMES.values())) == len(SCHEMES)


@every_scheme
def test_a_scheme_is_what_its_repr_says(scheme):
    """A run records the repr: it names every number and rebuilds the scheme."""
    assert eval(repr(scheme), vars(nope.init)) == scheme


def test_zero_std_draws_zeros():
    """std 0 is allowed and means what it says."""
    law = nope.init.normal(0.0).law(weight("query"), ARCHITECTURE)
    assert not law.draw(torch_source(), (4, 4)).any()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: nope.init.normal(-1.0), "weights' std"),
        (lambda: nope.init.truncated_normal(1.0, 0.0), "the cut"),
        (lambda: nope.init.truncated_normal(1.0, math.inf), "the cut"),
        (lambda: nope.init.xavier_normal(-1.0), "the gain"),
        (lambda: nope.init.orthogonal(math.nan), "the gain"),
        (lambda: nope.init.kaiming_normal("fan"), "mode to be one of fan_in"),
        (lambda: nope.init.kaiming_uniform(nonlinearity="swish"), "nonlinearity to be one of"),
        (lambda: nope.init.mup(0.02, 0), "base_width"),
        (lambda: nope.init.gpt2(-0.02), "weights' std"),
        (lambda: Uniform(-1.0), "weights' bound"),
        (lambda: VarianceScaling(1.0, "fan_in", "cauchy"), "distribution to be one of"),
    ],
)
def test_impossible_arguments_are_named(make, named):
    """Negative scales, empty cuts and unknown words are refused at construction."""
    with pytest.raises(ValueError, match=named):
        make()


# --------------------------------------------------------------------- truncated normals


@pytest.mark.parametrize("cut", [1e-6, 0.3, 1.0, 2.0, 5.0, 30.0])
def test_truncated_moments_by_quadrature(cut):
    """E w^2 and E w^4 of the density, w = cut t, at 30 digits."""
    with mpmath.workdps(30):
        points = sorted({0, min(1, 1 / cut), min(1, 4 / cut), 1})
        mass, second, fourth = (
            mpmath.quad(lambda t, k=k: t**k * mpmath.exp(-((cut * t) ** 2) / 2), points)
            for k in (0, 2, 4)
        )
        variance, kurtosis = cut**2 * second / mass, fourth * mass / second**2
    law = TruncatedNormal(0.5, cut)
    assert law.variance == pytest.approx(0.25 * float(variance), rel=1e-12)
    assert law.kurtosis == pytest.approx(float(kurtosis), rel=1e-12)


def test_jaxs_constant():
    """The standard deviation after truncation at 2 that JAX's initialisers divide by."""
    assert TruncatedNormal(1.0, 2.0).variance ** 0.5 == pytest.approx(
        0.87962566103423978, rel=1e-14
    )


# ---------------------------------------------------------------------------- orthogonal


@pytest.mark.parametrize("source", [numpy_source, torch_source])
@pytest.mark.parametrize("shape", [(8, 8), (8, 32), (32, 8), (1, 1), (1, 5)], ids=str)
def test_orthogonal_maps_have_orthonormal_frames(shape, source):
    """The smaller of W W' and W'W is gain^2 I: a map that widens keeps every inner product."""
    W = np.asarray(Orthogonal(*shape, gain=1.5).draw(source(), (7, *shape)))
    W = W.swapaxes(1, 2) if shape[0] > shape[1] else W
    assert np.abs(W @ W.swapaxes(1, 2) - 2.25 * np.eye(min(shape))).max() < 1e-13


def test_an_orthogonal_matrix_is_drawn_whole():
    """A slice of one would not be orthogonal."""
    with pytest.raises(ValueError, match=r"a shape that ends in \(8, 4\)"):
        Orthogonal(8, 4).draw(numpy_source(), (3, 4, 8))


# ------------------------------------------------------------------- torch's own numbers


def seeded(draw):
    """`draw()` under a seeded global generator, the caller's left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return draw()


def drawn_by(initialise, fan_in, fan_out, count=40):
    """Arrays that a function of `torch.nn.init` fills: torch's matrices are fan_out by fan_in."""
    empty = [torch.empty(fan_out, fan_in, dtype=torch.float64) for _ in range(count)]
    return seeded(lambda: torch.stack([initialise(w) for w in empty])).numpy()


TORCH = {
    "normal": lambda w: nn.init.normal_(w, std=0.7),
    "truncated_normal": lambda w: nn.init.trunc_normal_(w, std=0.7, a=-1.4, b=1.4),
    "xavier_normal": nn.init.xavier_normal_,
    "xavier_uniform": lambda w: nn.init.xavier_uniform_(w, gain=3.0),
    "kaiming_normal": lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"),
    "kaiming_uniform": lambda w: nn.init.kaiming_uniform_(w, mode="fan_out", nonlinearity="linear"),
    "orthogonal": lambda w: nn.init.orthogonal_(w, gain=1.5),
}


@pytest.mark.parametrize("role", ["query", "mlp_in", "mlp_out"])
@pytest.mark.parametrize("name", TORCH)
def test_torch_draws_the_stated_moments(name, role):
    """The function of `torch.nn.init` that a scheme is named after, same variance and kurtosis."""
    asked = weight(role)
    law = SCHEMES[name].law(asked, ARCHITECTURE)
    drawn = drawn_by(TORCH[name], asked.fan_in, asked.fan_out, count=400)
    assert_moments(drawn, law.variance, law.kurtosis)
    if isinstance(law, Uniform):
        assert 0.99 * law.bound < np.abs(drawn).max() <= law.bound


@pytest.mark.parametrize("name", nope.init.GAINS_SQUARED)
def test_gains_are_torchs(name):
    """`torch.nn.init.calculate_gain`, squared."""
    expected = nn.init.calculate_gain(name) ** 2
    assert nope.init.GAINS_SQUARED[name] == pytest.approx(expected, rel=1e-15)


def test_torchs_default_truncation_is_none():
    """Its bounds are absolute: at std 0.02, a = -2 and b = 2 cut at 100 standard deviations."""
    drawn = drawn_by(lambda w: nn.init.trunc_normal_(w, std=0.02), 64, 64)
    assert_moments(drawn, 0.02**2, 3.0)
    assert np.abs(drawn).max() > 3 * 0.02


def packed_attention():
    """The arrays of `torch.nn.MultiheadAttention` of width D, by our names."""
    module = nn.MultiheadAttention(D, 2)
    arrays = dict(zip(MATRICES, module.in_proj_weight.chunk(3), strict=False))
    arrays |= dict(zip(BIASES, module.in_proj_bias.chunk(3), strict=False))
    return arrays | {"output": module.out_proj.weight, "b_O": module.out_proj.bias}


def unpacked_attention():
    """The same where torch keeps W_Q, W_K, W_V apart, which only another width makes it do."""
    keys, values = nn.MultiheadAttention(D, 2, kdim=D + 1), nn.MultiheadAttention(D, 2, vdim=D + 1)
    return {
        "query": keys.q_proj_weight,
        "key": values.k_proj_weight,
        "value": keys.v_proj_weight,
        "output": keys.out_proj.weight,
        "b_O": keys.out_proj.bias,
    }


def mlp():
    """Two `torch.nn.Linear`, by our names."""
    widening, narrowing = nn.Linear(D, D_FF), nn.Linear(D_FF, D)
    return {
        "mlp_in": widening.weight,
        "b_in": widening.bias,
        "mlp_out": narrowing.weight,
        "b_out": narrowing.bias,
    }


def module_draws(make, count=1500):
    made = seeded(lambda: [make() for _ in range(count)])
    return {
        name: np.stack([one[name].detach().double().numpy() for one in made]) for name in made[0]
    }


@pytest.mark.parametrize("make", [packed_attention, unpacked_attention, mlp])
def test_torch_modules_draw_the_stated_laws(make):
    """Every array of real modules: variance, kurtosis and bound of `torch_default`."""
    scheme = nope.init.torch_default(packed=make is not unpacked_attention)
    for name, drawn in module_draws(make).items():
        law = scheme.law(bias(name) if name in BIASES else weight(name), ARCHITECTURE)
        if isinstance(law, Zero):
            assert not drawn.any(), name
        else:
            assert_moments(drawn, law.variance, law.kurtosis)
            assert 0.99 * law.bound < np.abs(drawn).max() <= law.bound * (1 + 1e-6), name


def test_torchs_defaults_written_out():
    """1/(2d) packed, 1/d unpacked, 1/(3 fan_in) for Linear; attention's biases 0, the MLP's not."""
    packed, unpacked = nope.init.torch_default(), nope.init.torch_default(packed=False)

    def variances(scheme, weights):
        return [scheme.law(w, ARCHITECTURE).variance for w in weights]

    matrices, biases = [weight(r) for r in MATRICES], [bias(b) for b in BIASES]
    rest = [1 / (3 * D), 1 / (3 * D), 1 / (3 * D_FF)]
    assert variances(packed, matrices) == pytest.approx([1 / (2 * D)] * 3 + rest, rel=1e-12)
    assert variances(unpacked, matrices) == pytest.approx([1 / D] * 3 + rest, rel=1e-12)
    expected = [0, 0, 0, 0, 1 / (3 * D), 1 / (3 * D_FF)]
    assert variances(packed, biases) == pytest.approx(expected, rel=1e-12)


def test_torchs_biases_go_by_the_matrix_they_belong_to():
    """Names do not matter: an attention layer may be called anything; strangers are refused."""
    layers = nope.Sequence((nope.Attention(2, bias=True, name="in"), nope.MLP(4, bias=True)))
    architecture = nope.Architecture(8, 2, nope.GaussianTokens(), layers)
    scheme = nope.init.torch_default()
    found = {w.path: scheme.law(w, architecture) for w in architecture.weights if w.role == "bias"}
    assert {path for path, law in found.items() if law.variance} == {"mlp.b_in", "mlp.b_out"}
    with pytest.raises(ValueError, match=r"a bias of this architecture, got 'blocks\.0"):
        scheme.law(bias("b_in"), architecture)
