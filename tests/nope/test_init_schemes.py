"""Initialisation schemes: what they state is what they draw.

Sample moments are held to 5 standard errors, a false alarm in 1.7 million.
"""

import math

import numpy as np
import pytest
import torch

import nope
from nope.questions import NumpySource, stream_key
from nope.streams import TorchSource, generator

Z = 5.0
SIZE = 200_000
ARCHITECTURE = nope.decoder(8, 2, 3, n_ctx=2, bias=True)
SCHEMES = {"normal": nope.init.normal(0.7), "gpt2": nope.init.gpt2(0.02)}


def numpy_source():
    return NumpySource(np.random.Generator(np.random.Philox(7)))


def torch_source():
    cpu = torch.device("cpu")
    return TorchSource(generator(stream_key(7), cpu), cpu, torch.float64)


def weight(role):
    return next(w for w in ARCHITECTURE.weights if w.role == role)


@pytest.mark.parametrize("source", [numpy_source, torch_source])
@pytest.mark.parametrize("role", ["query", "output", "mlp_in", "mlp_out"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_drawn_weights_have_the_stated_moments(scheme, role, source):
    """Mean 0, the law's variance and the law's kurtosis, each to 5 standard errors."""
    law = scheme.law(weight(role), ARCHITECTURE)
    w = np.asarray(law.draw(source(), (SIZE,))) / math.sqrt(law.variance)
    powers = {1: 0.0, 2: 1.0, 4: law.kurtosis}
    for power, expected in powers.items():
        draws = w**power
        assert abs(draws.mean() - expected) <= Z * draws.std() / math.sqrt(SIZE)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_draws_have_the_asked_shape_and_independent_leading_axes(scheme):
    """`draw` fills the shape it is given, and no two draws are alike."""
    drawn = scheme.law(weight("query"), ARCHITECTURE).draw(torch_source(), (3, 8, 8))
    assert drawn.shape == (3, 8, 8)
    assert len({float(x) for x in drawn[:, 0, 0]}) == 3


@pytest.mark.parametrize("source", [numpy_source, torch_source])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_biases_are_zero(scheme, source):
    """Every scheme of this package starts biases at 0, and says so."""
    law = scheme.law(weight("bias"), ARCHITECTURE)
    assert law.variance == 0
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


def test_zero_std_draws_zeros():
    """std 0 is allowed and means what it says."""
    law = nope.init.normal(0.0).law(weight("query"), ARCHITECTURE)
    assert not law.draw(torch_source(), (4, 4)).any()
