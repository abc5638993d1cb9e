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

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar

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


class LayerContract(Simulated):
    """A layer, or tokens: the torch module is `plain`, draw by draw, in float64.

    `causal` says that no output depends on later positions.  Covers the layer's class and
    kind by name, its tokens' class and every operation it is made of.
    """

    causal: ClassVar[bool] = True
    rounding: ClassVar[float] = 1e-12
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
        self, places: Iterable[str], draws: list[tuple[np.ndarray, dict[str, np.ndarray]]]
    ) -> dict[str, Tensor]:
        """The torch module's values at `places` for all of `draws` at once."""
        tokens = torch.from_numpy(np.stack([drawn for drawn, _ in draws]))

        def weight(asked: Weight) -> Tensor:
            return torch.from_numpy(np.stack([weights[asked.path] for _, weights in draws]))

        return evaluate(self.architecture, places, tokens, weight)

    def test_the_layer_survives_repr_and_pickle(self) -> None:
        assert_survives(self.layer)
        assert_survives(self.tokens)

    def test_plain_gives_every_place(self) -> None:
        found = set(self.values(*self.drawn[0]))
        expected = set(self.places)
        assert found == expected, f"expected `plain` to give {expected}, got {found}"

    def test_every_place_is_the_plain_one(self) -> None:
        """To rounding, at every place and in every draw of a batch."""
        found = self.torch(self.places, self.drawn)
        for draw, drawn in enumerate(self.drawn):
            for place, expected in self.values(*drawn).items():
                value = _plain_form(found[place][draw].numpy(), self.architecture, place)
                assert_close(value, expected, self.rounding, place)

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
        """With other tokens from m + 1 on, the outputs up to m change for some m, or for none."""
        changed = [m for m in range(1, len(self.drawn[0][0])) if self._changes(m)]
        wanted = "none" if self.causal else "some"
        assert bool(changed) != self.causal, (
            f"expected {wanted} of the outputs to see later positions, got those before {changed}"
        )

    def _changes(self, m: int) -> bool:
        """Whether any output up to m depends on what is drawn after m."""
        output, (one, weights), (other, _) = self.places[-1], *self.drawn[:2]
        mixed = np.concatenate([one[:m], other[m:]])
        found = self.torch([output], [(one, weights), (mixed, weights)])[output]
        seen = self.n_ctx - len(one) + m  # a BOS is not among what is drawn
        before, after = (_positions(value.numpy())[:seen] for value in found)
        finite = np.isfinite(before)
        gap = np.abs(before[finite] - after[finite]).max(initial=0.0)
        return bool(gap > self.rounding * np.abs(before[finite]).max(initial=0.0))


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
    `architecture` should have every role, with widths that differ.
    """

    name: ClassVar[str]
    scheme: ClassVar[Scheme]
    architecture: ClassVar[Architecture] = decoder(6, 2, 3, d_ff=9, n_ctx=2, bias=True)
    seed: ClassVar[int] = 0
    DRAWS: ClassVar[int] = 2000

    @classmethod
    def registered(cls) -> list[str]:
        return [f"scheme {name}" for name in SCHEMES]

    @classmethod
    def covers(cls) -> list[str]:
        return [f"scheme {cls.name}"]

    def plain(self, weight: Weight, architecture: Architecture) -> tuple[float, float | None]:
        """Variance and kurtosis of an entry."""
        raise NotImplementedError(f"expected {type(self).__name__} to have a `plain`; write it")

    @property
    def held(self) -> Scheme:
        """The scheme, that of the registered constructor unless given."""
        return self.scheme if hasattr(self, "scheme") else SCHEMES[self.name]()

    @property
    def laws(self) -> Iterator[tuple[Weight, WeightLaw]]:
        """A weight of each role, of each shape, with its law."""
        kinds = {(w.role, w.shape, w.path.split(".")[-1]): w for w in self.architecture.weights}
        return ((w, law_of(self.held, w, self.architecture)) for w in kinds.values())

    def test_the_scheme_survives_repr_and_pickle(self) -> None:
        assert_survives(self.held)

    def test_a_law_is_stated_for_every_weight(self) -> None:
        for weight, law in self.laws:
            assert isinstance(law, WeightLaw), f"expected a WeightLaw for {weight.path}, got {law}"
            assert not law.gaussian or law.independent, f"{weight.path}: Gaussian is independent"

    def test_variance_and_kurtosis_are_the_plain_ones(self) -> None:
        for weight, law in self.laws:
            variance, kurtosis = self.plain(weight, self.architecture)
            assert_close(law.variance, variance, 1e-12, f"the variance of {weight.path}")
            if kurtosis is not None:
                assert_close(law.kurtosis, kurtosis, 1e-12, f"the kurtosis of {weight.path}")

    def test_drawn_weights_have_the_stated_moments(self) -> None:
        """Mean, second and fourth moment, and that of pairs where entries are independent."""
        for where, source in SOURCES.items():
            for weight, law in self.laws:
                drawn = self._drawn(law, source(self.seed, weight.path), weight)
                for moment, (per_draw, expected) in _moments(drawn, law).items():
                    gap = np.abs(per_draw.mean(0) - expected)
                    allowed = half_width(per_draw) + 1e-12 * law.variance
                    assert (gap <= allowed).all(), (
                        f"expected {moment} of {weight.path} to be {expected:.6g}, got "
                        f"{per_draw.mean():.6g} of {len(drawn)} draws by {where}"
                    )

    def test_gaussian_weights_are_gaussian(self) -> None:
        """What calls itself Gaussian has a Gaussian's distribution function."""
        from scipy.special import ndtr

        for weight, law in self.laws:
            if law.gaussian and law.variance:
                drawn = self._drawn(law, SOURCES["NumPy"](self.seed, weight.path), weight)
                entry = np.sort(drawn.reshape(len(drawn), -1)[:, 0]) / np.sqrt(law.variance)
                steps = np.arange(1, len(entry) + 1) / len(entry)
                gap = np.abs(ndtr(entry) - steps).max()
                assert gap <= distance(len(entry)), f"{weight.path}: no Gaussian, {gap:.3f} away"

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
        return self._draw(law, source, weight, self.DRAWS)


def _moments(drawn: np.ndarray, law: WeightLaw) -> dict[str, tuple[np.ndarray, float]]:
    """What each draw says of a moment, (draws, 1), and what it should be on average."""
    entry = drawn.reshape(len(drawn), -1)
    square = entry**2
    stated = {
        "the mean": (entry, 0.0),
        "the second moment": (square, law.variance),
    }
    if law.variance:
        stated["the fourth moment"] = (square**2, law.kurtosis * law.variance**2)
    if law.independent:
        neighbours = square * np.roll(square, 1, 1)
        stated["E w_i^2 w_j^2"] = (neighbours, law.variance**2)
    return {name: (each.mean(1, keepdims=True), float(x)) for name, (each, x) in stated.items()}
