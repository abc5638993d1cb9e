"""Contract tests for layer kinds, token models and initialisation schemes; see `nope.contracts`.

A layer kind of your own, held to its definition, in a file of tests:

    class TestDoubling(LayerContract):
        layer = Doubling("twice")

        def plain(self, x, weights):
            return {"twice": 2 * x}

`theory.testing.KernelContract` takes the same `layer` and `plain` and holds the kernel rule to
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cached_property
from inspect import signature
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nope.architecture import Architecture, decoder
from nope.contracts import (
    ERROR_RATE,
    Contract,
    Simulated,
    assert_close,
    assert_survives,
    contracts_in,
    distance,
    entries,
    half_width,
    kinds,
    kinds_of,
    uncovered,
)
from nope.init import SCHEMES, Scheme, WeightLaw, law_of
from nope.operations import Weight
from nope.questions import stream_key
from nope.sources import NumpySource, Source
from nope.streams import TorchSource, generator
from nope.transformer import apply, evaluate

__all__ = [
    "ERROR_RATE",
    "Contract",
    "LayerContract",
    "SchemeContract",
    "Simulated",
    "assert_close",
    "assert_survives",
    "contracts_in",
    "half_width",
    "uncovered",
]

CPU = torch.device("cpu")
Precision = torch.dtype


class LayerContract(Simulated):
    """A layer, or tokens: the torch module is `plain`, draw by draw, in float64 and in float32.

    `causal` says that no place depends on later positions.  `rounding` is that of float64 and
    `rounding_float32` that of what measurements run in, of a place's largest entry.  Covers the
    layer's class and kind by name, its tokens' class and every operation it is made of.
    """

    causal: ClassVar[bool] = True
    rounding: ClassVar[float] = 1e-12
    rounding_float32: ClassVar[float] = 1e-5
    DRAWS: ClassVar[int] = 3

    @classmethod
    def registered(cls) -> list[str]:
        """Operations with a torch module, and layers and tokens of every kind."""
        return [*entries("operation", apply.registry), *kinds()]

    @classmethod
    def covers(cls) -> list[str]:
        operations = {type(operation) for operation in cls.operations()}
        return [*entries("operation", operations), *kinds_of(cls.layer, cls.tokens)]

    @cached_property
    def places(self) -> tuple[str, ...]:
        return tuple(self.architecture.places())

    @cached_property
    def drawn(self) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
        return list(self.draws(self.DRAWS))

    def torch(
        self,
        places: Iterable[str],
        draws: list[tuple[np.ndarray, dict[str, np.ndarray]]],
        dtype: Precision = torch.float64,
    ) -> dict[str, Tensor]:
        """The torch module's values at `places` for all of `draws` at once."""
        tokens = torch.from_numpy(np.stack([drawn for drawn, _ in draws]))

        def weight(asked: Weight) -> Tensor:
            return torch.from_numpy(np.stack([weights[asked.path] for _, weights in draws])).to(
                dtype
            )

        inputs = tokens.to(dtype) if tokens.is_floating_point() else tokens
        return evaluate(self.architecture, places, inputs, weight)

    def test_the_layer_survives_repr_and_pickle(self) -> None:
        assert_survives(self.layer)
        assert_survives(self.tokens)

    def test_plain_gives_every_place(self) -> None:
        """And nothing else; see `Simulated.values`."""
        self.values(*self.drawn[0])

    def test_every_place_is_the_plain_one(self) -> None:
        """To rounding, at every place and in every draw of a batch."""
        self._assert_plain(torch.float64, self.rounding)

    def test_every_place_is_the_plain_one_in_float32(self) -> None:
        """Which measurements run in unless told otherwise."""
        self._assert_plain(torch.float32, self.rounding_float32)

    def _assert_plain(self, dtype: Precision, rounding: float) -> None:
        found = self.torch(self.places, self.drawn, dtype)
        for draw, drawn in enumerate(self.drawn):
            for place, expected in self.values(*drawn).items():
                got = found[place].dtype
                assert got == dtype, f"expected {dtype} at {place}, got {got}; keep the input's"
                value = _plain_form(found[place][draw].numpy(), self.architecture, place)
                assert_close(value, expected, rounding, place)

    def test_shapes_are_the_stated_ones(self) -> None:
        """`draws n_ctx width` for vectors, `draws heads n_ctx n_ctx` for pairs."""
        found = self.torch(self.places, self.drawn)
        for place, operation in self.architecture.places().items():
            shape = _plain_form(found[place][0].numpy(), self.architecture, place).shape
            vector, pair = (self.architecture.width(place),), (self.n_ctx,)
            expected = (self.n_ctx, *(vector if operation.axes == "vector" else pair))
            assert shape[-2:] == expected, f"expected {expected} at {place}, got {shape}"

    def test_draws_do_not_meet(self) -> None:
        """A draw alone gives what it gives beside others, and an asked place what it gives."""
        output = self.places[-1]
        together = self.torch(self.places, self.drawn)[output]
        for draw, drawn in enumerate(self.drawn):
            alone = self.torch([output], [drawn])[output][0]
            assert_close(alone, together[draw], self.rounding, f"draw {draw} alone")

    def test_later_positions_are_seen_only_without_a_mask(self) -> None:
        """With other tokens from m + 1 on, what is up to m changes at some place, or at none."""
        told = isinstance(self.causal, bool)
        assert told, f"expected causal to be True or False, got {self.causal!r}; change causal"
        (one, weights), count = self.drawn[0], len(self.drawn[0][0])
        assert count > 1, f"expected at least two drawn positions, got {count}; raise n_ctx"
        other = self._other(one)
        changed = [
            (place, seen)
            for cut in range(count)
            if (seen := self.n_ctx - count + cut)  # a BOS is not among what is drawn
            for place in self._changed(one, np.concatenate([one[:cut], other[cut:]]), weights, seen)
        ]
        wanted = "no place" if self.causal else "some place"
        assert bool(changed) != self.causal, (
            f"expected {wanted} to see later positions, got these up to m: {changed}; change causal"
        )

    def _other(self, one: np.ndarray) -> np.ndarray:
        """Tokens that differ from `one` at every position, each from the first draw that does."""
        other = one.copy()
        for drawn, _ in self.draws(100):
            same = (other == one).reshape(len(one), -1).all(1)
            if not same.any():
                return other
            other[same] = drawn[same]
        where = [int(position) + 1 for position in np.flatnonzero(same)]
        raise AssertionError(
            f"expected tokens that differ between draws, got the same at {where}; "
            "give tokens of several values"
        )

    def _changed(
        self, one: np.ndarray, mixed: np.ndarray, weights: dict[str, np.ndarray], seen: int
    ) -> Iterator[str]:
        """The places that are not the same for two inputs at the positions up to `seen`."""
        found = self.torch(self.places, [(one, weights), (mixed, weights)])
        for place in self.places:
            before, after = (_positions(value.numpy())[:seen] for value in found[place])
            finite = np.isfinite(before)
            gap = np.abs(before[finite] - after[finite]).max(initial=0.0)
            within = gap <= self.rounding * np.abs(before[finite]).max(initial=0.0)
            if not within or not np.array_equal(before[~finite], after[~finite], equal_nan=True):
                yield place


def _positions(value: np.ndarray) -> np.ndarray:
    """With the positions on the first axis."""
    return value if value.ndim == 2 else np.moveaxis(value, 1, 0)


def _plain_form(value: np.ndarray, architecture: Architecture, place: str) -> np.ndarray:
    """A draw's value as `Simulated.plain` gives it: heads of a vector side by side."""
    vectors = architecture.places()[place].axes == "vector" and value.ndim == 3
    return np.concatenate(list(value), -1) if vectors else value


# --------------------------------------------------------------------------------- schemes

SOURCES: Mapping[str, Any] = {
    "NumPy": lambda *key: NumpySource(np.random.default_rng(stream_key(*key))),
    "torch": lambda *key: TorchSource(generator(stream_key(*key), CPU), CPU, torch.float64),
}
"""Sources of random numbers, by seed and labels."""


class SchemeContract(Contract):
    """A scheme: `plain(weight, architecture)` is the variance and the kurtosis it should give.

    Both are written from the scheme's definition; the kurtosis is None for weights that are 0.
    They are held at every weight of `architecture`, which should have every role, with widths
    that differ, and of `others`; drawn are the weights of `architecture` whose laws differ.
    Covers the registered `name` if its constructor makes schemes like this one.
    """

    name: ClassVar[str]
    scheme: ClassVar[Scheme]
    architecture: ClassVar[Architecture] = decoder(6, 2, 3, d_ff=9, n_ctx=2, bias=True)
    others: ClassVar[tuple[Architecture, ...]] = (decoder(8, 4, 2, d_ff=0, n_ctx=3, bias=True),)
    seed: ClassVar[int] = 0
    NUMBERS: ClassVar[int] = 500_000

    @classmethod
    def registered(cls) -> list[str]:
        return [f"scheme {name}" for name in SCHEMES]

    @classmethod
    def covers(cls) -> list[str]:
        covered = cls.name in SCHEMES and _is_of(cls.name, cls.given())
        return [f"scheme {cls.name}"] * covered

    @classmethod
    def given(cls) -> Scheme:
        """The scheme, that of the registered constructor unless there is one."""
        return cls.scheme if hasattr(cls, "scheme") else _made(SCHEMES[cls.name])

    def plain(self, weight: Weight, architecture: Architecture) -> tuple[float, float | None]:
        """Variance and kurtosis of an entry."""
        raise NotImplementedError(f"expected {type(self).__name__} to have a `plain`; write it")

    @property
    def held(self) -> Scheme:
        return self.given()

    @property
    def every(self) -> Iterator[tuple[Weight, Architecture, WeightLaw]]:
        """Every weight of every architecture, with its law."""
        for network in (self.architecture, *self.others):
            for weight in network.weights:
                yield weight, network, law_of(self.held, weight, network)

    @property
    def laws(self) -> list[tuple[Weight, WeightLaw]]:
        """A weight of `architecture` for each law and shape, which are all that a draw knows of."""
        found: list[tuple[Weight, WeightLaw]] = []
        for weight in self.architecture.weights:
            law = law_of(self.held, weight, self.architecture)
            if not any(w.shape == weight.shape and known == law for w, known in found):
                found.append((weight, law))
        return found

    def test_the_scheme_survives_repr_and_pickle(self) -> None:
        assert_survives(self.held)

    def test_a_law_is_stated_for_every_weight(self) -> None:
        for weight, _, law in self.every:
            assert isinstance(law, WeightLaw), f"expected a WeightLaw for {weight.path}, got {law}"
            assert not law.gaussian or law.independent, f"{weight.path}: Gaussian is independent"

    def test_variance_and_kurtosis_are_the_plain_ones(self) -> None:
        for weight, network, law in self.every:
            variance, kurtosis = _pair(self.plain(weight, network), weight)
            assert_close(law.variance, variance, 1e-12, f"the variance of {weight.path}")
            if kurtosis is not None:
                assert_close(law.kurtosis, kurtosis, 1e-12, f"the kurtosis of {weight.path}")

    def test_drawn_weights_have_the_stated_moments(self) -> None:
        """Those of entries, and those of neighbours where entries are independent."""
        for where, source in SOURCES.items():
            for weight, law in self.laws:
                drawn = self._drawn(law, source(self.seed, weight.path), weight)
                for moment in _moments(drawn, law):
                    found = moment.per_draw.mean(0)
                    gap = np.abs(found - moment.expected)
                    allowed = half_width(moment.per_draw) + 1e-12 * moment.size
                    worst = np.unravel_index(np.argmax(gap - allowed), gap.shape)
                    assert (gap <= allowed).all(), (
                        f"expected {moment.name} of {weight.path} to be {moment.expected:.6g} +- "
                        f"{allowed[worst]:.2g}, got {found[worst]:.6g} of {len(drawn)} draws by "
                        f"{where}"
                    )

    def test_gaussian_weights_are_gaussian(self) -> None:
        """What calls itself Gaussian has a Gaussian's distribution function, at every entry."""
        from scipy.special import ndtr

        for where, source in SOURCES.items():
            for weight, law in self.laws:
                if law.gaussian and law.variance:
                    drawn = self._drawn(law, source(self.seed, weight.path), weight)
                    entries = np.sort(drawn.reshape(len(drawn), -1), 0) / np.sqrt(law.variance)
                    steps = np.arange(1, len(drawn) + 1) / len(drawn)
                    gap = np.abs(ndtr(entries) - steps[:, None]).max()
                    allowed = distance(len(drawn), ERROR_RATE / entries.shape[1])
                    assert gap <= allowed, (
                        f"expected {weight.path} to be Gaussian to {allowed:.3f}, got a gap of "
                        f"{gap:.3f} in a distribution function by {where}"
                    )

    def test_entries_have_one_law(self) -> None:
        """The distribution function of each is that of all, at quantiles of all."""
        for where, source in SOURCES.items():
            for weight, law in self.laws:
                drawn = self._drawn(law, source(self.seed, weight.path), weight)
                entries = np.sort(drawn.reshape(len(drawn), -1), 0)
                at = np.sort(entries, axis=None)[:: 1 + entries.size // 500]
                below = np.array([np.searchsorted(each, at, "right") for each in entries.T])
                gap = np.abs(below - below.mean(0)).max() / len(drawn)
                allowed = 2 * distance(len(drawn), ERROR_RATE / len(below))
                assert gap <= allowed, (
                    f"expected the entries of {weight.path} to have one law to {allowed:.3f}, got "
                    f"a gap of {gap:.3f} in a distribution function by {where}"
                )

    def test_a_draw_depends_on_its_stream_and_shape_only(self) -> None:
        """The asked shape; the same numbers from the same stream, others from another seed."""
        for source in SOURCES.values():
            for weight, law in self.laws:
                one, same = (self._draw(law, source(1, weight.path), weight) for _ in range(2))
                other = self._draw(law, source(2, weight.path), weight)
                assert one.shape == (2, *weight.shape), f"{weight.path}: {one.shape}"
                assert np.array_equal(one, same), f"{weight.path} is not a function of its stream"
                fresh = law.variance == 0 or not np.isin(one, other).any()
                assert fresh, f"{weight.path} is the same in two streams"
                assert law.variance == 0 or not np.isin(one[0], one[1]).any(), weight.path

    def _draw(self, law: WeightLaw, source: Source, weight: Weight, count: int = 2) -> np.ndarray:
        return np.asarray(law.draw(source, (count, *weight.shape)))

    def _drawn(self, law: WeightLaw, source: Source, weight: Weight) -> np.ndarray:
        """About so many `NUMBERS`, whatever the shape."""
        return self._draw(law, source, weight, max(1000, self.NUMBERS // math.prod(weight.shape)))


def _made(constructor: Callable[..., Scheme]) -> Scheme:
    """The scheme of a constructor by its defaults; 1 for a parameter that has none."""
    every = signature(constructor).parameters.values()
    named = (p for p in every if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    return constructor(**{p.name: 1.0 for p in named if p.default is p.empty})


def _is_of(name: str, scheme: Scheme) -> bool:
    """Whether the registered constructor makes such schemes."""
    constructor = SCHEMES[name]
    parameters = signature(constructor).parameters
    made = _made(constructor)
    return _alike(made, scheme, frozenset(parameters)) if parameters else made == scheme


def _alike(made: object, other: object, free: frozenset[str]) -> bool:
    """Of one type, their numbers apart and the fields that a constructor is told by name."""
    if _is_number(made) and _is_number(other):
        return True
    if type(made) is not type(other):
        return False
    if not is_dataclass(made):
        return made == other
    ours = (field.name for field in fields(made) if field.name not in free)
    return all(_alike(getattr(made, each), getattr(other, each), free) for each in ours)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _pair(found: Any, weight: Weight) -> tuple[float, float | None]:
    """What a scheme's `plain` gave; no kurtosis of a weight that is 0."""
    wanted = f"expected `plain` to give a variance and a kurtosis of {weight.path}"
    pair = isinstance(found, tuple) and len(found) == 2
    assert pair, f"{wanted}, got {found!r}; return a pair"
    variance, kurtosis = found
    numbers = (variance,) if kurtosis is None else found
    good = all(_is_number(x) and 0 <= float(x) < math.inf for x in numbers)
    assert good, f"{wanted}, got {found!r}; return finite numbers of at least 0"
    missing = f"{wanted}, got {found!r}; give the kurtosis of what is not 0"
    assert kurtosis is not None or variance == 0, missing
    return variance, kurtosis


class Moment(NamedTuple):
    """What each draw says of a moment, what it should be on average, and the size of its terms."""

    name: str
    per_draw: np.ndarray
    expected: float
    size: float


def _moments(drawn: np.ndarray, law: WeightLaw) -> Iterator[Moment]:
    """Of each entry and on average, and of neighbours if these are independent.

    Products of four factors only on average: of one entry their means are far from Gaussian.
    """
    variance = float(law.variance)
    fourth = float(law.kurtosis) * variance**2 if variance else 0.0
    for name, power, expected in (
        ("the mean", 1, 0.0),
        ("the second moment", 2, variance),
        ("the fourth moment", 4, fourth),
    ):
        size, values = variance ** (power / 2), drawn**power
        yield Moment(f"{name} on average", _averaged(values), expected, size)
        if power < 4:
            yield Moment(f"{name} of an entry", values, expected, size)
    if law.independent:
        for where, product in _neighbours(drawn):
            yield Moment(f"E w_i w_j {where}", product, 0.0, variance)
            yield Moment(f"E w_i^2 w_j^2 {where}", _averaged(product**2), variance**2, variance**2)


def _averaged(values: np.ndarray) -> np.ndarray:
    """Over the entries of each draw, (draws, 1)."""
    return np.asarray(values.reshape(len(values), -1).mean(1, keepdims=True))


def _neighbours(drawn: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Products of entries and those beside them, the last one's neighbour being the first."""
    axes = {"in a row": (-1,), "in a column": (-2,), "on a diagonal": (-2, -1)}
    for where, moved in axes.items():
        if all(-axis < drawn.ndim and drawn.shape[axis] > 1 for axis in moved):
            yield where, drawn * np.roll(drawn, (1,) * len(moved), moved)
