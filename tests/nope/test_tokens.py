"""Tokens: what they state is what they draw, and what the layers see.

Chi-square statistics are held to a tail of 1e-7, moments to 5 standard errors.
"""

import dataclasses
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch

import nope
from montecarlo.campaign import Campaign
from montecarlo.evidence import Target
from montecarlo.sampler import Conditions, Group, sample
from nope.init import law_of
from nope.questions import Weights, given_weights, stream_key
from nope.sources import NumpySource
from nope.streams import TorchSource, generator
from nope.tokens import BOS, TABLE, EmbeddingTokens, GaussianTokens, TextTokens, WithBos

INIT = nope.init.normal(0.3)
TAIL = 1e-7
Z = 5.0
CPU = torch.device("cpu")


def numpy_source():
    return NumpySource(np.random.Generator(np.random.Philox(7)))


def torch_source():
    return TorchSource(generator(stream_key(7), CPU), CPU, torch.float32)


SOURCES = pytest.mark.parametrize("source", [numpy_source, torch_source])


@pytest.fixture
def written(tmp_path):
    """Writes bytes to a file and gives its path."""

    def write(content, name="text"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def assert_law(outcomes, probabilities):
    """Pearson's statistic of whole numbers against their probabilities."""
    observed = np.bincount(np.ravel(outcomes), minlength=len(probabilities))
    expected = probabilities * observed.sum()
    assert expected.min() >= 20
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert statistic < scipy.stats.chi2.isf(TAIL, len(probabilities) - 1)


def architecture(tokens, **changes):
    return nope.decoder(4, 2, **({"n_ctx": 5, "d_ff": 3, "tokens": tokens} | changes))


def embedded(tokens, given=None, index=0, seed=5, places=("embed",), **changes):
    group = Group(architecture(tokens, **changes), INIT, given)
    return sample(group, places, index, Conditions(seed))["embed"]


def ids_of_block(tokens, size, index=0, seed=5, n_ctx=5, d_model=4):
    """The ids that the sampler draws for a block."""
    source = TorchSource(generator(stream_key(seed, index, "embed"), CPU), CPU, torch.float32)
    return tokens.draw(source, size, n_ctx, d_model)


# ------------------------------------------------------------------------------------- laws


def test_zipf_probabilities_are_normalised_exactly():
    """v^-1 over H_4 = 25/12; exponent 0 is uniform; a vocabulary of one has no choice."""
    zipf = EmbeddingTokens(4, exponent=1.0).probabilities
    exact = [Fraction(12, 25) / v for v in (1, 2, 3, 4)]
    assert np.abs(zipf - [float(p) for p in exact]).max() <= 2**-52
    assert (EmbeddingTokens(8).probabilities == 1 / 8).all()
    assert EmbeddingTokens(1, exponent=3.0).probabilities == [1.0]
    assert not zipf.flags.writeable


@SOURCES
@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5])
def test_ids_have_the_stated_law(source, exponent):
    """Frequencies at all positions, and of pairs of neighbours: p_v and p_v p_w."""
    tokens = EmbeddingTokens(5, exponent=exponent)
    ids = np.asarray(tokens.draw(source(), 50_000, 4, 3))
    assert ids.shape == (50_000, 4)
    p = tokens.probabilities
    for column in ids.T:
        assert_law(column, p)
    for left, right in ((0, 1), (1, 2), (0, 3)):
        assert_law(ids[:, left] * 5 + ids[:, right], np.outer(p, p).ravel())


@SOURCES
def test_windows_of_a_text_start_anywhere_equally_often(source, written):
    """In a text of 64 different bytes the first id is the start: uniform on those that fit."""
    tokens = TextTokens(written(bytes(range(64))))
    ids = np.asarray(tokens.draw(source(), 20_000, 15, 3))
    assert ids.shape == (20_000, 15)
    assert (np.diff(ids, axis=1) == 1).all()
    assert_law(ids[:, 0], np.full(50, 1 / 50))


@SOURCES
@pytest.mark.parametrize("unit", ["bytes", "characters"])
def test_windows_occur_in_the_text(source, unit, written):
    """Decoded by the sorted units that occur, every window is a piece of the text."""
    text = "Größe, größer, am größten: ein Text mit Wiederholungen. " * 3 + "Ende"
    units = text if unit == "characters" else text.encode()
    tokens = TextTokens(written(text.encode()), unit=unit)
    alphabet = sorted(set(units))
    assert tokens.vocabulary == len(alphabet)
    assert tokens.longest == len(units)
    join = "".join if unit == "characters" else bytes
    for ids in np.asarray(tokens.draw(source(), 200, 12, 3)):
        assert join([alphabet[v] for v in ids]) in units


def test_units_of_a_text_by_hand(written):
    """Bytes and characters of the same file, ranked; the whole text is one window of itself."""
    path = written("bañ€a".encode())
    assert TextTokens(path, unit="characters").ids.tolist() == [1, 0, 2, 3, 0]
    # a b, then the bytes of the n tilde (c3 b1) and of the euro sign (e2 82 ac), sorted
    assert TextTokens(path).ids.tolist() == [1, 0, 5, 4, 6, 2, 3, 0]
    whole = TextTokens(path).draw(torch_source(), 3, 8, 4)
    assert whole.tolist() == [[1, 0, 5, 4, 6, 2, 3, 0]] * 3


def test_the_default_text_is_the_python_documentation():
    """The topics of `pydoc_data`, in order of their keys."""
    from pydoc_data.topics import topics

    content = "".join(text for _, text in sorted(topics.items())).encode()
    tokens = TextTokens()
    assert np.array(sorted(set(content)), dtype=np.uint8)[tokens.ids].tobytes() == content
    assert TextTokens(unit="characters").longest == len(content.decode())


# --------------------------------------------------------------------------------- identity


def test_a_text_is_its_content(written):
    """Equal contents are equal questions wherever they lie; other contents, units, std are not."""
    one, same, other = (
        TextTokens(written(c, n)) for c, n in ((b"abc", "a"), (b"abc", "b"), (b"abd", "c"))
    )
    assert one == same
    assert hash(one) == hash(same)
    assert (
        len({one, other, TextTokens(one.path, unit="characters"), TextTokens(one.path, 1.0)}) == 4
    )
    assert dataclasses.replace(one, std=1.0) == TextTokens(one.path, 1.0)
    assert one.digest in repr(one)


def test_a_text_travels_without_its_content():
    """Worker processes get the path and the digest, and read the text for themselves."""
    tokens = TextTokens()
    assert len(tokens.ids) > 100_000
    sent = pickle.dumps(tokens)
    assert len(sent) < 1000
    assert pickle.loads(sent) == tokens


def test_a_text_that_changed_is_refused(written):
    """A question is of one text: read again, another one is an error, not another answer."""
    tokens = TextTokens(written(b"one text"))
    assert len(tokens.ids) == 8
    written(b"another text")
    with pytest.raises(ValueError, match=f"expected a text of digest {tokens.digest}, got .*; ask"):
        _ = tokens.ids


@pytest.mark.parametrize(
    ("content", "unit", "message"),
    [
        (None, "bytes", r"got .*missing \(No such file or directory\); change path"),
        ("directory", "bytes", r"\(Is a directory\); change path"),
        (b"", "bytes", "expected a text of at least one unit, got .*; give a longer file"),
        (b"caf\xe9", "characters", r"expected a text of characters, got .*; use unit='bytes'"),
        (b"abc", "words", "expected unit to be one of bytes, characters, got 'words'"),
    ],
)
def test_texts_that_cannot_be(content, unit, message, tmp_path, written):
    """Refused when the tokens are made, in one line."""
    if isinstance(content, bytes):
        path = written(content)
    else:
        path = tmp_path if content else tmp_path / "missing"
    with pytest.raises(ValueError, match=message) as refused:
        TextTokens(path, unit=unit)
    assert "\n" not in str(refused.value)


def test_a_text_shorter_than_the_context_is_refused(written):
    """A BOS saves one position."""
    tokens = TextTokens(written(b"abcd"))
    assert architecture(tokens, n_ctx=4).n_ctx == 4
    assert architecture(WithBos(tokens), n_ctx=5).n_ctx == 5
    for short in (tokens, WithBos(tokens)):
        with pytest.raises(ValueError, match=r"expected n_ctx of at most [45] tokens, got 6"):
            architecture(short, n_ctx=6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EmbeddingTokens(0), "expected vocabulary to be a whole number of at least 1"),
        (lambda: EmbeddingTokens(3, std=0.0), "expected the tokens' std to be a finite positive"),
        (lambda: EmbeddingTokens(3, exponent=-1.0), "expected the exponent to be .* non-negative"),
        (lambda: TextTokens(std=math.inf), "expected the tokens' std to be a finite positive"),
        (lambda: WithBos(WithBos(GaussianTokens())), "expected tokens without a BOS of their own"),
        (lambda: WithBos(3), r"expected GaussianTokens\(\) or others .*, got 3; change tokens"),
        (lambda: TextTokens(3), "expected path to be that of a text, or None, got 3; change path"),
        (lambda: TextTokens(b"a.txt"), "expected path to be that of a text, .*; change path"),
    ],
)
def test_tokens_that_cannot_be(make, message):
    """Each is refused with its own reason."""
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------ what layers see

REPEATING = [EmbeddingTokens(3, 0.5), WithBos(EmbeddingTokens(3, 0.5)), WithBos(GaussianTokens())]


def test_gaussian_tokens_keep_their_stream():
    """The numbers of the stream `embed`, as they always were."""
    x = embedded(GaussianTokens(0.3), index=2, seed=11)
    source = TorchSource(generator(stream_key(11, 2, "embed"), CPU), CPU, torch.float32)
    assert torch.equal(x, source.normal(tuple(x.shape), 0.3))


@pytest.mark.parametrize("given", [None, Weights(1)], ids=["random", "given"])
def test_positions_hold_the_rows_of_their_ids(given):
    """Equal ids are the same vector, different ids are not, in every draw."""
    tokens = EmbeddingTokens(3, 0.5)
    x = embedded(tokens, given)
    ids = ids_of_block(tokens, len(x))
    equal_rows = (x[:, :, None] == x[:, None, :]).all(-1)
    assert torch.equal(equal_rows, ids[:, :, None] == ids[:, None, :])


def test_given_weights_fix_the_table_and_the_bos():
    """Every input of every block reads the rows of `given_weights`."""
    tokens = WithBos(EmbeddingTokens(3, 0.5))
    asked = nope.Question(architecture(tokens), INIT, "embed", "kernel", Weights(1))
    fixed = given_weights(asked)
    assert {path: array.shape for path, array in fixed.items()} == {TABLE: (3, 4), BOS: (1, 4)}
    for index in (0, 1):
        x = embedded(tokens, Weights(1), index)
        ids = ids_of_block(tokens, len(x), index)
        assert ids.shape == (len(x), 4)
        assert (x[:, 0].numpy() == fixed[BOS].astype(np.float32)).all()
        assert (x[:, 1:].numpy() == fixed[TABLE].astype(np.float32)[ids]).all()


@pytest.mark.parametrize("tokens", REPEATING, ids=repr)
def test_random_weights_give_every_draw_its_own_rows(tokens):
    """Without given weights no two draws share a vector, the BOS included."""
    x = torch.cat([embedded(tokens, index=index) for index in (0, 1)])
    assert len(x[:, 0].unique(dim=0)) == len(x)


@pytest.mark.parametrize("tokens", REPEATING, ids=repr)
@pytest.mark.parametrize("scheme", [INIT, nope.init.gpt2(), nope.init.normal(0.0)], ids=repr)
def test_embeddings_have_the_tokens_law_whatever_the_scheme(tokens, scheme):
    """Variance std^2 and kurtosis 3 as a law, and as drawn; other weights keep the scheme's."""
    network = architecture(tokens)
    for weight in network.weights:
        if weight.role == "embedding":
            assert law_of(scheme, weight, network) == nope.init.Normal(tokens.std)
        else:
            assert law_of(scheme, weight, network) == scheme.law(weight, network)
    first = sample(Group(network, scheme, None), ["embed"], 0, Conditions(3))["embed"][:, 0]
    powers = (first.double().numpy() / tokens.std).ravel()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        error = abs((powers**power).mean() - expected)
        assert error <= Z * math.sqrt(variance / powers.size)


@pytest.mark.parametrize("given", [None, Weights(1)], ids=["random", "given"])
@pytest.mark.parametrize("tokens", [*REPEATING, WithBos(TextTokens())], ids=repr)
def test_one_position(tokens, given):
    """n_ctx = 1: with a BOS nothing else is left."""
    x = embedded(tokens, given, n_ctx=1)
    assert x.shape[1:] == (1, 4)
    assert x.any()


def test_a_bos_leaves_the_others_independent_of_it():
    """Over random rows the BOS has the same variance and no covariance with what follows."""
    x = embedded(WithBos(GaussianTokens(1.0))).double()
    products = (x[:, :1] * x[:, 1:]).flatten()
    assert abs(float(products.mean())) <= Z / math.sqrt(len(products))


def test_tables_are_part_of_a_blocks_size():
    """A table per draw counts towards the memory of a block, a table for all does not."""
    small, large = (Group(architecture(EmbeddingTokens(v)), INIT, None) for v in (3, 2**20))
    assert large.elements - small.elements == (2**20 - 3) * 4
    assert large.block_size < small.block_size
    shared = Group(architecture(EmbeddingTokens(2**20)), INIT, Weights(1))
    assert shared.elements < small.elements


# -------------------------------------------------------------------------------- the bits

VARIED = [EmbeddingTokens(7, exponent=1.0), WithBos(TextTokens(std=1.0)), WithBos(GaussianTokens())]


def evidence(workers, in_flight, seed=0):
    """The moments of a kernel after attention, for each kind of tokens, given weights or not."""
    questions = [
        nope.Question(architecture(tokens), INIT, "blocks.0.attn_out", "kernel", given)
        for tokens in VARIED
        for given in (None, Weights(2))
    ]
    bounds = [np.full(question.shape, np.inf) for question in questions]
    targets = [
        Target(question, -bound, bound, 0.5, 0.5)
        for question, bound in zip(questions, bounds, strict=True)
    ]
    found = Campaign(targets, Conditions(seed), 2 * 2048).run(workers, in_flight)
    return [decision.measurement.moments.mean for decision in found]


def test_bits_do_not_depend_on_workers():
    """Two processes, blocks out of order: the same numbers, to the last bit."""
    one, two = evidence(1, None), evidence(2, 5)
    assert len(one) == 6
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    other = evidence(1, None, seed=1)
    assert not any(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("tokens", VARIED, ids=repr)
def test_blocks_and_seeds_are_different_tokens(tokens):
    """The same seed and block are the same tokens, anything else is not."""
    keys = [(0, 0), (0, 1), (1, 0)]
    drawn = [embedded(tokens, Weights(1), index, seed) for seed, index in keys]
    assert torch.equal(drawn[0], embedded(tokens, Weights(1), 0, 0))
    assert len({float(x.double().sum()) for x in drawn}) == len(keys)


@pytest.mark.parametrize("tokens", VARIED, ids=repr)
def test_attention_shares_the_tokens(tokens):
    """Softmax and uniform versions of a question see the same tokens."""
    softmax, uniform = (embedded(tokens, attention=kind) for kind in ("softmax", "uniform"))
    assert torch.equal(softmax, uniform)
