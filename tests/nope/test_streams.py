"""The CPU streams are NumPy's Mersenne Twister seeded by all 256 bits of the key."""

import math

import numpy as np
import pytest
import torch

from nope.questions import stream_key
from nope.streams import TorchSource, generator

CPU = torch.device("cpu")
KEYS = [0, 1, 2**32, 2**255 + 12345, stream_key(0, 0, "embed")]
Z = 5.0


def numpy_words(key, count):
    """The 32-bit outputs of NumPy's generator, less the one word its seeding leaves over."""
    return np.random.MT19937(np.random.SeedSequence(key)).random_raw(count + 1)[1:]


def raw(key, count):
    """63 bits of each pair of the stream's 32-bit words."""
    return torch.empty(count, dtype=torch.int64).random_(generator=generator(key, CPU)).numpy()


@pytest.mark.parametrize("key", KEYS)
def test_the_raw_stream_is_numpys_mersenne_twister(key):
    """torch's 64-bit draws are (first word << 32 | second word) mod 2^63, over three refills."""
    words = numpy_words(key, 2000).astype(np.uint64)
    expected = ((words[0::2] << np.uint64(32)) | words[1::2]) & np.uint64(2**63 - 1)
    assert np.array_equal(raw(key, 1000), expected.astype(np.int64))


def test_the_first_word_of_the_fresh_generator_is_not_skipped():
    """32-bit draws show the same words one by one, less their top bit."""
    drawn = torch.empty(9, dtype=torch.int32).random_(generator=generator(5, CPU)).numpy()
    assert np.array_equal(drawn, numpy_words(5, 9) & 0x7FFFFFFF)


def test_keys_that_differ_above_bit_32_have_different_streams():
    """Every bit of the key counts."""
    streams = {tuple(raw(2**bit, 4)) for bit in range(0, 256, 15)} | {tuple(raw(0, 4))}
    assert len(streams) == 19


def test_manual_seed_keeps_only_32_bits():
    """Why the state is set by hand: torch's CPU seeds 1 and 1 + 2^32 are one stream."""
    one, two = (torch.Generator().manual_seed(seed) for seed in (1, 1 + 2**32))
    assert torch.equal(torch.rand(50, generator=one), torch.rand(50, generator=two))


def test_a_stream_starts_over_for_the_same_key():
    """Nothing is shared between two generators of one key, normals included."""
    one, two = (TorchSource(generator(9, CPU), CPU, torch.float32) for _ in range(2))
    one_first = one.normal((7,), 1.0)
    assert torch.equal(one_first, two.normal((7,), 1.0))
    assert not torch.equal(one_first, one.normal((7,), 1.0))


def test_the_global_generator_is_left_alone():
    """Making and using a stream changes no other code's random numbers."""
    before = torch.get_rng_state()
    TorchSource(generator(3, CPU), CPU, torch.float32).normal((100,), 1.0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(200_000,), (20_000, 2, 5), (12_500, 16)], ids=str)
def test_normal_draws_are_standard_normal(dtype, shape):
    """Mean, variance, skewness and kurtosis to 5 standard errors of their exact values."""
    x = TorchSource(generator(stream_key(1, *shape), CPU), CPU, dtype).normal(shape, 2.0)
    assert x.dtype == dtype
    assert x.shape == shape
    z, size = x.double().flatten() / 2, x.numel()
    # E z^k, and Var z^k = E z^2k - (E z^k)^2, of a standard normal
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = abs(float(z.pow(power).mean()) - expected)
        assert error <= Z * math.sqrt(variance / size)


def test_streams_of_different_keys_are_uncorrelated():
    """The mean product of two streams is 0 to 5 standard errors."""
    size = 100_000
    one, two = (
        TorchSource(generator(stream_key(0, path), CPU), CPU, torch.float64).normal((size,), 1.0)
        for path in ("embed", "blocks.0.attn.W_Q")
    )
    assert abs(float((one * two).mean())) <= Z / math.sqrt(size)


def test_zeros_have_the_asked_type():
    """Biases come in the source's dtype and device."""
    zeros = TorchSource(generator(0, CPU), CPU, torch.float64).zeros((2, 3))
    assert zeros.dtype == torch.float64
    assert zeros.shape == (2, 3)
    assert not zeros.any()
