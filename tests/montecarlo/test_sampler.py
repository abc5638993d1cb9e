"""Blocks in chunks: the streams go on, the moments are those of all draws, memory stays flat."""

import dataclasses
import math
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import pytest
import torch

import nope
from montecarlo import Campaign, Conditions, Target, engines, sampler
from montecarlo.moments import Moments
from montecarlo.observables import STATISTICS
from montecarlo.provenance import Origin, Series
from montecarlo.sampler import Group, chunks, sample
from nope import streams, transformer
from nope.questions import stream_key

CPU = torch.device("cpu")
INIT = nope.init.normal(0.3)
Q, OUT = "blocks.0.attn.q", "blocks.0.resid_post"
SIZES = [(4, 2, 3), (64, 4, 64), (768, 12, 512)]


def ask(place=OUT, observable="second_moment", init=INIT, given=None, **changes):
    architecture = nope.decoder(4, 2, **({"n_ctx": 3, "d_ff": 5} | changes))
    return nope.Question(architecture, init, place, observable, given)


@pytest.fixture
def small_chunks(monkeypatch):
    """Blocks of several chunks even of small layers; moments taken of several of these."""
    monkeypatch.setitem(sampler.CHUNK_ELEMENTS, "cpu", 2**14)
    monkeypatch.setattr(sampler, "TALLY_ELEMENTS", 2**10)
    size = Group.of(ask()).chunk_size()
    assert 1 < size < Group.of(ask()).block_size / 4
    return size


# --------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_chunks_divide_blocks_and_stay_in_the_cache(size, device):
    """Powers of two; a step of a chunk holds what it may, or the chunk is one draw."""
    d_model, n_heads, n_ctx = size
    group = Group(nope.decoder(d_model, n_heads, n_ctx=n_ctx), INIT, None)
    chunk, block = group.chunk_size(device), group.block_size
    assert chunk & (chunk - 1) == block & (block - 1) == block % chunk == 0
    limit = 2**20 if device == "cpu" else 2**26
    assert chunk == 1 or chunk * group.working_set <= limit
    assert chunk == block or 2 * chunk * group.working_set > limit


def test_depth_takes_smaller_blocks_and_chunks_of_the_same_size():
    """A step holds no more in a deep stack; a block has the same work."""
    one, twelve = (Group(nope.decoder(64, 4, layers, n_ctx=64), INIT, None) for layers in (1, 12))
    assert one.working_set == twelve.working_set
    assert one.chunk_size() == twelve.chunk_size()
    assert twelve.block_size <= one.block_size / 8


# ----------------------------------------------------------------------------- the draws


def test_streams_go_on_from_chunk_to_chunk(small_chunks):
    """Tokens and queries are those of one generator each, drawn from again and again."""
    question = ask(Q)
    group, conditions = Group.of(question), Conditions(5, dtype="float64")
    x, W = (
        streams.TorchSource(streams.generator(stream_key(5, 2, path), CPU), CPU, torch.float64)
        for path in ("embed", "blocks.0.attn.W_Q")
    )
    count = 0
    for values in chunks(group, ["embed", Q], 2, conditions):
        tokens = x.normal((small_chunks, 3, 4), 0.02)
        assert torch.equal(values["embed"], tokens)
        centred = tokens - tokens.mean(-1, keepdim=True)
        units = centred / centred.square().mean(-1, keepdim=True).sqrt()
        expected = torch.einsum("nmd,nde->nme", units, W.normal((small_chunks, 4, 4), 0.3))
        found = values[Q].transpose(1, 2).flatten(2)
        assert (found - expected).abs().max() <= 1e-12
        count += len(tokens)
    assert count == group.block_size


@pytest.mark.parametrize("observable", ["second_moment", "kernel_cosine"])
def test_the_moments_are_those_of_all_draws(small_chunks, observable):
    """Merged over chunks: count, mean, second and third central sums of the block's draws."""
    question = ask(observable=observable)
    group = Group.of(question)
    (found,) = sampler.block(group, [question], 1, Conditions(3))
    values = sample(group, [OUT], 1, Conditions(3))[OUT]
    draws = STATISTICS[observable].components(values, question).double().numpy()
    expected = Moments.of(draws)
    assert found.count == group.block_size == len(draws)
    for name in ("mean", "second", "third"):
        one, other = getattr(found, name), getattr(expected, name)
        assert np.abs(one - other).max() <= 1e-9 * np.abs(other).max()


def test_other_places_leave_the_bits_in_every_chunk(small_chunks):
    """A place is the same alone and with others, weights given or not."""
    for given in (None, nope.Weights(1)):
        group = Group.of(ask(given=given))
        alone, together = (
            sample(group, places, 0, Conditions()) for places in ([Q], ["embed", OUT, Q])
        )
        assert torch.equal(alone[Q], together[Q])
        assert len({float(draw.double().sum()) for draw in alone[Q]}) == group.block_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_arrays_hold_the_same_numbers(monkeypatch, dtype):
    """In huge pages or not: a weight of the same bits, aligned as torch's are."""

    def drawn():
        source = streams.TorchSource(streams.generator(9, CPU), CPU, dtype)
        return [source.normal((3, 100, 7), 0.1), source.uniform((33,), 1.0)]

    usual = drawn()
    monkeypatch.setattr(streams, "LARGE", 1)
    for one, other in zip(drawn(), usual, strict=True):
        assert one.dtype == dtype
        assert one.data_ptr() % 64 == 0
        assert torch.equal(one, other)


@dataclasses.dataclass(frozen=True)
class BrokenLater:
    """Standard normal queries, one of which is infinite in the draw `at` of a block."""

    at: int
    variance = 1.0
    kurtosis = 3.0
    gaussian = independent = False
    drawn: ClassVar[list[int]] = []

    def law(self, weight, architecture):
        return self if weight.role == "query" else nope.init.Normal(1.0)

    def draw(self, source, shape):
        array, first = source.normal(shape, 1.0), sum(self.drawn)
        self.drawn.append(shape[0])
        if first <= self.at < first + shape[0]:
            array[self.at - first, 0, 0] = math.inf
        return array


def test_an_error_names_the_draw_of_the_block(small_chunks):
    """Counted over chunks and blocks."""
    BrokenLater.drawn.clear()
    at = 3 * small_chunks + 7
    question = ask(Q, init=BrokenLater(at))
    group = Group.of(question)
    (found,) = sampler.block(group, [question], 2, Conditions())
    assert isinstance(found, FloatingPointError)
    assert f"in draw {2 * group.block_size + at} at position" in str(found)


def test_no_more_than_two_chunks_are_there(small_chunks, monkeypatch):
    """Beside the one that is computed only the one before it: memory is flat in the draws."""
    evaluate, alive, most = transformer.evaluate, weakref.WeakSet(), []

    def watched(*args):
        most.append(len(alive))
        values = evaluate(*args)
        alive.add(values[OUT])
        return values

    monkeypatch.setattr(transformer, "evaluate", watched)
    group = Group.of(ask())
    sampler.block(group, [ask()], 0, Conditions())
    assert len(most) == group.block_size // small_chunks > 4
    assert max(most) <= 1


# ------------------------------------------------------------------------------ devices


@pytest.mark.parametrize("init", [INIT, nope.init.orthogonal()], ids=["normal", "orthogonal"])
@pytest.mark.parametrize("tokens", [None, nope.WithBos(nope.EmbeddingTokens(5))], ids=str)
@pytest.mark.parametrize("given", [None, nope.Weights(1)], ids=str)
def test_everything_is_computed_on_the_device(init, tokens, given):
    """On the meta device, which holds shapes only and refuses to mix with the CPU."""
    question = ask(init=init, tokens=tokens, given=given, bias=True)
    group = Group.of(question)
    places = list(question.architecture.places())
    conditions = Conditions(device="meta", drawn_on="cpu")
    there, here = (sample(group, places, 0, c) for c in (conditions, Conditions()))
    for place in places:
        assert there[place].is_meta
        assert there[place].shape == here[place].shape


def test_the_cpus_numbers_on_another_device_are_other_evidence():
    """What is kept names the generators where they are not the device's own."""
    origin = Origin("code", "build", "cuda X")
    one, other = (
        Series(ask(), Conditions(device="cuda", drawn_on=drawn_on), origin)
        for drawn_on in (None, "cpu")
    )
    assert one.digest != other.digest
    assert one.row["seed"] == "0"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("observable", ["second_moment", "kernel_cosine", "cosine"])
def test_cuda_agrees_with_the_cpu_on_the_same_numbers(observable):
    """Drawn on the CPU and computed on either: the means agree within float32's rounding."""
    question = ask(observable=observable, n_ctx=16)
    there, here = (
        sampler.block(Group.of(question), [question], 1, conditions)[0]
        for conditions in (Conditions(7, "cuda", drawn_on="cpu"), Conditions(7))
    )
    assert there.count == here.count
    assert np.abs(there.mean - here.mean).max() <= 1e-5 * np.abs(here.mean).max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_blocks_have_the_same_bits_again():
    """The device's own streams start over, and another block is another."""
    group = Group.of(ask())
    one, again, other = (sample(group, [OUT], k, Conditions(7, "cuda"))[OUT] for k in (0, 0, 1))
    assert one.is_cuda
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


class Device(ThreadPoolExecutor):
    """A device with memory for some blocks at a time: another finds none."""

    def __init__(self, blocks):
        super().__init__(1)
        self.blocks, self.busy, self.refused = blocks, 0, 0
        self.crowded, self.lock = False, threading.Lock()

    def submit(self, fn, /, *args):
        with self.lock:
            self.busy += 1
            beside = self.busy
        return super().submit(self._run, beside, fn, *args)

    def _run(self, beside, fn, *args):
        self.crowded = beside > self.blocks
        try:
            return fn(*args)
        finally:
            with self.lock:
                self.busy -= 1

    def block(self, *args):
        if self.crowded:
            self.refused += 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return self.computed(*args)

    computed = staticmethod(sampler.block)


def evidence(monkeypatch, device, room=8):
    """The moments of two questions after 16 blocks, drawn on `device`."""

    @contextmanager
    def engine():
        with device:
            yield engines.Running(device, room)

    asked = [ask(Q), ask(OUT, "kernel")]
    bounds = [np.full(question.shape, np.inf) for question in asked]
    targets = [Target(q, -b, b, 0.5, 0.5) for q, b in zip(asked, bounds, strict=True)]
    with monkeypatch.context() as patched:
        patched.setattr(sampler, "block", device.block)
        patched.setattr(engines, "engine", lambda *_: engine)
        found = Campaign(targets, Conditions(), 16 * Group.of(asked[0]).block_size).run()
    return [decision.measurement.moments for decision in found]


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_out_of_memory_goes_on_with_fewer_blocks_and_the_same_numbers(monkeypatch, blocks):
    """Half as many in flight until they fit; those that found no memory are drawn again."""
    enough, short = Device(8), Device(blocks)
    expected = evidence(monkeypatch, enough)
    found = evidence(monkeypatch, short)
    assert enough.refused == 0
    assert 0 < short.refused <= 8 - blocks + 4
    for one, other in zip(found, expected, strict=True):
        assert one.count == other.count == 16 * Group.of(ask()).block_size
        for name in ("mean", "second", "third"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


def test_a_block_that_never_fits_is_refused(monkeypatch):
    """Alone on the device and still no memory: an error with the remedy, not a loop."""
    device = Device(0)
    with pytest.raises(MemoryError, match=r"d_model = 4.*fit into the memory of cpu.*smaller"):
        evidence(monkeypatch, device)
    assert device.refused <= 8 + 4 + 2 + 1
