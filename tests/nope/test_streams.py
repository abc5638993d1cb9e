"""The CPU streams are NumPy's Mersenne Twister; both sources draw the laws they name."""

import math

import numpy as np
import pytest
import torch

from nope.questions import stream_key
from nope.sources import NumpySource, Source, cumulative
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


# ------------------------------------------------------------------- laws of both sources

SIZE = 100_000
ROW = np.array([0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
CALLS = {
    "normal": lambda source: source.normal((3, 4), 2.0),
    "uniform": lambda source: source.uniform((3, 4), 2.0),
    "truncated_normal": lambda source: source.truncated_normal((3, 4), 2.0, 1.0),
    "orthogonal": lambda source: source.orthogonal((3, 4)),
    "categorical": lambda source: source.categorical(ROW, (3, 4)),
    "integers": lambda source: source.integers((3, 4), 1000),
}


def torch_source(key=1, dtype=torch.float64):
    return TorchSource(generator(stream_key(key), CPU), CPU, dtype)


def numpy_source(key=1):
    return NumpySource(np.random.Generator(np.random.Philox(key)))


each_source = pytest.mark.parametrize("make", [torch_source, numpy_source])


def assert_mean(draws, expected):
    """The mean of independent draws, to 5 standard errors."""
    draws = np.asarray(draws, dtype=float)
    assert abs(draws.mean() - expected) <= Z * draws.std() / math.sqrt(len(draws)) + 1e-12


def assert_distribution(draws, cdf):
    """The share of draws below a few points, each to 5 binomial standard errors."""
    for point in np.quantile(draws, [0.01, 0.2, 0.5, 0.9]):
        assert_mean(np.asarray(draws) <= point, cdf(point))


@each_source
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_source_depends_on_its_stream_alone(make, call):
    """Equal streams, equal bits; another stream or a later call, other numbers."""
    one, two = make(), make()
    first = np.asarray(call(one))
    assert first.shape == (3, 4)
    assert np.array_equal(first, np.asarray(call(two)))
    assert not np.array_equal(first, np.asarray(call(one)))
    assert not np.array_equal(first, np.asarray(call(make(2))))


@each_source
def test_both_forms_are_sources(make):
    """What a weight law or a token law may ask for is there."""
    assert isinstance(make(), Source)


def test_normal_draws_are_torchs_own():
    """`normal` is `normal_` on the stream and nothing else: recorded evidence depends on it."""
    plain = torch.empty(5, 7).normal_(0.0, 0.3, generator=generator(stream_key(1), CPU))
    assert torch.equal(torch_source(dtype=torch.float32).normal((5, 7), 0.3), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_draws_have_the_sources_dtype(dtype):
    """Reals in the source's dtype, whole numbers in int64."""
    for name, call in CALLS.items():
        whole = name in ("categorical", "integers")
        assert call(torch_source(dtype=dtype)).dtype == (torch.int64 if whole else dtype)


@each_source
def test_uniform_draws_fill_their_interval(make):
    """The distribution function (1 + x/b)/2 on [-b, b]."""
    draws = np.asarray(make().uniform((SIZE,), 0.3))
    assert np.abs(draws).max() <= 0.3
    assert_distribution(draws, lambda x: (1 + x / 0.3) / 2)


@each_source
@pytest.mark.parametrize("cut", [0.1, 2.0, 9.0])
def test_truncated_normal_draws_follow_their_law(make, cut):
    """erf(x)/erf(cut) inside the cut, nothing beyond; a cut where erf is 1 is no special case."""
    draws = np.asarray(make().truncated_normal((SIZE,), 0.5, cut))
    assert np.abs(draws).max() <= 0.5 * cut
    whole = math.erf(cut / math.sqrt(2))
    assert_distribution(draws, lambda x: (1 + math.erf(x / 0.5 / math.sqrt(2)) / whole) / 2)


@each_source
@pytest.mark.parametrize("shape", [(3, 3), (2, 5), (5, 2), (1, 1)], ids=str)
def test_orthogonal_draws_are_haar(make, shape):
    """Orthonormal frames; E O_ij = 0 and E (tr O)^2 = k/n for a k by n frame, as Haar has.

    Without its signs a QR has a diagonal of one sign, and the first of these fails.
    """
    frames = np.asarray(make().orthogonal((20_000, *shape)))
    short, long = min(shape), max(shape)
    rows = frames if shape[0] == short else frames.swapaxes(1, 2)
    assert np.abs(rows @ rows.swapaxes(1, 2) - np.eye(short)).max() < 1e-12
    for row in range(short):
        assert_mean(frames[:, row, row], 0.0)
    trace = np.trace(frames, axis1=1, axis2=2)
    assert_mean(trace**2, short / long)
    if short == long:
        assert_mean(np.linalg.det(frames), 0.0)


@each_source
def test_an_orthogonal_draw_needs_matrices(make):
    """A vector has no frame."""
    with pytest.raises(ValueError, match=r"matrices on the last two axes, got \(4,\)"):
        make().orthogonal((4,))


@each_source
def test_categorical_draws_have_their_probabilities(make):
    """Each value's share to 5 standard errors; what has probability 0 never comes."""
    draws = np.asarray(make().categorical(ROW, (SIZE,)))
    for value, probability in enumerate(ROW):
        assert_mean(draws == value, probability)
        assert (draws == value).any() == (probability > 0)


class Edges:
    """A generator that returns the numbers where one value of `ROW` ends and another begins."""

    def random(self, shape):
        return np.array([0.0, 0.25, 0.5, 0.75, 1 - 2.0**-53])


def test_categorical_draws_at_the_edges():
    """[0, 1) is cut into half-open pieces: a value of probability 0 does not come even there."""
    row = np.array([0.0, 0.25, 0.25, 0.0, 0.25, 0.25, 0.0])
    found = NumpySource(Edges()).categorical(row, (5,))
    assert found.tolist() == [1, 2, 4, 5, 5]


@each_source
def test_neighbouring_categorical_draws_are_independent(make):
    """Two positions hold the same token with probability sum p^2."""
    first, second = np.asarray(make().categorical(ROW, (2, SIZE)))
    assert_mean(first == second, (ROW**2).sum())


@each_source
@pytest.mark.parametrize("high", [1, 5, 50_257])
def test_integers_are_equally_likely(make, high):
    """Mean and variance of the whole numbers below `high`, and its ends."""
    draws = np.asarray(make().integers((SIZE,), high))
    assert 0 <= draws.min() <= draws.max() < high
    assert_mean(draws, (high - 1) / 2)
    assert_mean((draws - (high - 1) / 2) ** 2, (high**2 - 1) / 12)


@pytest.mark.parametrize(
    "row", [[], [0.5, 0.6], [1.5, -0.5], [[0.5, 0.5]], [math.nan, 1.0]], ids=str
)
def test_a_row_that_is_no_distribution_is_refused(row):
    """Empty, negative, not a number, not of sum 1, not a row."""
    with pytest.raises(ValueError, match="one row of probabilities that sum to 1"):
        cumulative(np.array(row))


def test_cumulative_probabilities_end_at_one_exactly():
    """So that a number just below 1 has a value, though the sums round."""
    row = np.full(50_257, 1 / 50_257)
    assert cumulative(row)[-1] == 1.0
    assert row.cumsum()[-1] != 1.0
    assert np.array_equal(cumulative(np.array([0.0, 1.0, 0.0])), [0.0, 1.0, 1.0])
