"""What can be asked: a place of an architecture and an observable there.

The table `OBSERVABLES` says what each observable means, on which kind of place it lives,
what its array looks like and how its band is measured.  It is a description only: the
theory derives values for it and the measurement estimates them, each in its own code.

Positions count from 1 in formulas; arrays are indexed from 0, so `values[0]` is m = 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from nope.architecture import Architecture
from nope.checks import expect, expect_count
from nope.init import Scheme, law_of
from nope.operations import Operation
from nope.sources import NumpySource

Shape = Literal[
    "positions", "adjacent", "pairs", "distinct_pairs", "steps", "whole", "coordinates", "points"
]
Scale = Literal["relative", "kernel", "absolute"]
Transform = Literal["past_reversed", "reversed", "first_repeated"]
"""What is done to the inputs of a draw, its weights kept: positions 1..L-1 in reverse order, all
of them in reverse order, or the first token at every position."""

GRID_SIZE = 64
"""Matrix observables are judged on at most this many positions, log-spaced."""

COORDINATE_GRID = (2, 16)
"""`coordinate_second_moment` looks at this many first positions and at this many coordinates."""


@dataclass(frozen=True)
class Observable:
    """What a per-draw statistic means.

    `shape` is the form of its array; `scale` is what a tolerance multiplies: the prediction
    (`relative`), sqrt(K_mm K_nn) (`kernel`) or 1 (`absolute`); `least` is the number of
    positions below which there is nothing to judge; `bounds` hold every draw of it, if any do;
    `transform` says what is done to the inputs for a second look at the same draw.
    """

    name: str
    meaning: str
    on: tuple[str, ...]
    shape: Shape
    scale: Scale
    least: int = 1
    bounds: tuple[float, float] | None = None
    transform: Transform | None = None

    @property
    def is_event(self) -> bool:
        """Whether a draw is 0 or 1: a symmetry held in it, or not."""
        return self.transform is not None

    @property
    def is_share(self) -> bool:
        """Whether a draw is a share of something, or an event, which can be 0 or 1 exactly."""
        return self.scale == "absolute" and self.bounds == (0.0, 1.0)


OBSERVABLES = {
    observable.name: observable
    for observable in (
        Observable(
            "second_moment",
            "E x^2 of a coordinate at position m; of a score or a weight of query m, over n <= m",
            ("vector", "pair"),
            "positions",
            "relative",
        ),
        Observable(
            "mean_second_moment",
            "E x^2 averaged over every position (and pair n <= m) of a draw",
            ("vector", "pair"),
            "whole",
            "relative",
        ),
        Observable(
            "coordinate_second_moment",
            "E x_j^2 of single coordinates j at the first positions, not averaged",
            ("vector",),
            "coordinates",
            "relative",
        ),
        Observable(
            "kurtosis",
            "E x^4 / (E x^2)^2 over all randomness",
            ("vector", "pair"),
            "positions",
            "relative",
        ),
        Observable(
            "participation",
            "E sum_n a_mn^2; at m = 1 it is 1 whatever the attention, and not judged",
            ("pair",),
            "positions",
            "relative",
            least=2,
            bounds=(0.0, 1.0),
        ),
        Observable("kernel", "E <x_m, x_n> / d", ("vector",), "pairs", "kernel"),
        Observable(
            "kernel_cosine",
            "K(m, n) / sqrt(K(m, m) K(n, n)) of the mean kernel K",
            ("vector",),
            "distinct_pairs",
            "absolute",
            least=2,
        ),
        Observable(
            "cosine",
            "E cos(x_m, x_n), 0 for a zero vector",
            ("vector",),
            "distinct_pairs",
            "absolute",
            least=2,
            bounds=(-1.0, 1.0),
        ),
        Observable(
            "cosine_steps",
            "E [cos(x_m, x_n') - cos(x_m, x_n)], n < n' < m neighbours on the grid",
            ("vector",),
            "steps",
            "absolute",
            least=3,
            bounds=(-2.0, 2.0),
        ),
        Observable(
            "adjacent_cosine",
            "E cos(x_m, x_m+1)",
            ("vector",),
            "adjacent",
            "absolute",
            least=2,
            bounds=(-1.0, 1.0),
        ),
        Observable(
            "adjacency_score",
            "share of triples j < k < i with cos(x_i, x_j) < cos(x_i, x_k)",
            ("vector",),
            "whole",
            "absolute",
            least=3,
            bounds=(0.0, 1.0),
        ),
        Observable(
            "adjacency_score.steps",
            "share of neighbours (j, j+1), j+1 < i, with cos(x_i, x_j) < cos(x_i, x_j+1)",
            ("vector",),
            "whole",
            "absolute",
            least=3,
            bounds=(0.0, 1.0),
        ),
        Observable(
            "adjacency_score.norm",
            "share of pairs j < k with |x_j| > |x_k|",
            ("vector",),
            "whole",
            "absolute",
            least=2,
            bounds=(0.0, 1.0),
        ),
        Observable(
            "cdf",
            "share of coordinates (of scores of the last query, over heads and keys) at the last "
            "position at or below each point",
            ("vector", "pair"),
            "points",
            "absolute",
            bounds=(0.0, 1.0),
        ),
        Observable(
            "past_permutation",
            "share of draws whose x_L moves, beyond rounding, as the tokens before it are reversed",
            ("vector",),
            "whole",
            "absolute",
            least=3,
            bounds=(0.0, 1.0),
            transform="past_reversed",
        ),
        Observable(
            "permutation",
            "share of draws whose x_m, as all tokens are reversed, are not reversed to rounding",
            ("vector",),
            "whole",
            "absolute",
            least=2,
            bounds=(0.0, 1.0),
            transform="reversed",
        ),
        Observable(
            "equal_tokens",
            "share of draws whose x_m differ, beyond rounding, though all tokens are equal",
            ("vector",),
            "whole",
            "absolute",
            least=2,
            bounds=(0.0, 1.0),
            transform="first_repeated",
        ),
    )
}


@dataclass(frozen=True)
class Weights:
    """Condition a question on weights drawn once, from `seed`; the unit is then an input."""

    seed: int = 0

    def __post_init__(self) -> None:
        expect_count("the weights' seed", self.seed, least=0)


@dataclass(frozen=True)
class Question:
    """An architecture, an initialisation, a place in the network, an observable.

    `given=Weights(seed)` fixes the weights; `points` are where `cdf` asks for the distribution
    function, in increasing order.  Raises `ValueError` for an unknown observable and for points
    that are missing, superfluous or no such list; whether the place exists and has anything to
    judge is `reason_not_applicable`.
    """

    architecture: Architecture
    init: Scheme
    place: str
    observable: str
    given: Weights | None = None
    points: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        right = isinstance(self.architecture, Architecture)
        expect(right, "an Architecture", self.architecture, "make one with nope.decoder")
        expect(isinstance(self.init, Scheme), "a Scheme", self.init, "take one of nope.init")
        expect(isinstance(self.place, str), "the name of a place", self.place, "change place")
        fixed = self.given is None or isinstance(self.given, Weights)
        expect(fixed, "given to be None or Weights", self.given, "use given=nope.Weights(seed)")
        expect(
            self.observable in OBSERVABLES,
            f"an observable of {', '.join(OBSERVABLES)}",
            self.observable,
            "see nope.questions.OBSERVABLES",
        )
        wanted = self.kind.shape == "points"
        expect(
            bool(self.points) == wanted,
            f"{'points' if wanted else 'no points'} for {self.observable}",
            self.points,
            "give points=(x_1, x_2, ...)" if wanted else "ask for cdf, or drop points",
        )
        expect(
            isinstance(self.points, tuple)
            and bool(np.isfinite(self.points).all() and (np.diff(self.points) > 0).all()),
            "points to be a tuple of finite numbers in increasing order",
            self.points,
            "sort them and drop what is twice",
        )

    @property
    def kind(self) -> Observable:
        return OBSERVABLES[self.observable]

    def scale_of(self, values: np.ndarray) -> np.ndarray:
        """What a tolerance multiplies: the values' size, sqrt(K_mm K_nn), or 1."""
        match self.kind.scale:
            case "relative":
                return np.asarray(np.abs(values))
            case "kernel":
                diagonal = np.sqrt(np.abs(np.diagonal(values)))
                return np.asarray(diagonal[:, None] * diagonal[None, :])
            case _:
                return np.ones(self.shape)

    @property
    def operation(self) -> Operation:
        """The operation at the place; `LookupError` if there is none."""
        return self.architecture.upstream(self.place)[-1]

    @property
    def reason_not_applicable(self) -> str | None:
        """Why nothing can be judged here, or None."""
        operation = self.architecture.places().get(self.place)
        kind, n_ctx = self.kind, self.architecture.n_ctx
        if operation is None:
            near = get_close_matches(self.place, self.architecture.places(), n=1)
            hint = f", the nearest is {near[0]}" if near else ""
            return f"this architecture has no place {self.place}{hint}"
        if operation.axes not in kind.on:
            return f"{kind.name} is not defined on {self.place}: it needs a {kind.on[0]} place"
        if n_ctx < kind.least:
            return f"{kind.name} needs {kind.least} positions and n_ctx is {n_ctx}"
        return None

    def require_applicable(self) -> None:
        """Raise `LookupError` with the reason unless the question can be answered."""
        reason = self.reason_not_applicable
        if reason is not None:
            places = ", ".join(self.architecture.places())
            raise LookupError(f"expected a question with an answer, but {reason}; places: {places}")

    @property
    def grid(self) -> np.ndarray:
        """The positions, counted from 1, that matrix observables look at."""
        return position_grid(self.architecture.n_ctx)

    @property
    def _coordinates(self) -> np.ndarray:
        places, place = self.architecture.places(), self.place
        return coordinate_grid(self.architecture.width(place) if place in places else 1)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the observable's array."""
        size, n_ctx = len(self.grid), self.architecture.n_ctx
        coordinates = self._coordinates
        return {
            "positions": (n_ctx,),
            "adjacent": (n_ctx - 1,),
            "pairs": (size, size),
            "distinct_pairs": (size, size),
            "steps": (size, size - 1),
            "whole": (1,),
            "coordinates": (min(n_ctx, COORDINATE_GRID[0]), len(coordinates)),
            "points": (len(self.points),),
        }[self.kind.shape]

    @cached_property
    def judged(self) -> np.ndarray:
        """Which entries of the array carry the claim: a kernel is symmetric, cos(x, x) is 1."""
        rows = np.arange(self.shape[0])[:, None]
        columns = np.arange(self.shape[-1])[None, :]
        match self.kind.shape:
            case "pairs":
                return columns <= rows
            case "distinct_pairs":
                return columns < rows
            case "steps":
                return columns + 1 < rows
            case "positions":
                return np.arange(1, self.shape[0] + 1) >= self.kind.least
            case _:
                return np.ones(self.shape, dtype=bool)

    @cached_property
    def positions(self) -> list[Any]:
        """A label per judged entry: m, (m, n), (m, coordinate), `all`, or a point."""
        grid, (rows, *columns) = self.grid, np.nonzero(self.judged)
        match self.kind.shape:
            case "positions" | "adjacent":
                return [int(row) + 1 for row in rows]
            case "whole":
                return ["all"]
            case "points":
                return list(self.points)
            case "coordinates":
                return [
                    [int(r) + 1, int(self._coordinates[c]) + 1]
                    for r, c in zip(rows, columns[0], strict=True)
                ]
            case _:
                return [[int(grid[r]), int(grid[c])] for r, c in zip(rows, columns[0], strict=True)]


def position_grid(n_ctx: int, size: int = GRID_SIZE) -> np.ndarray:
    """At most `size` positions of 1..n_ctx, log-spaced, both ends included."""
    if n_ctx <= size:
        return np.arange(1, n_ctx + 1)
    return np.unique(np.geomspace(1, n_ctx, size).round().astype(int))


def coordinate_grid(d_model: int) -> np.ndarray:
    """The coordinates, counted from 0, that `coordinate_second_moment` looks at."""
    size = min(d_model, COORDINATE_GRID[1])
    return np.linspace(0, d_model - 1, size).round().astype(int)


def stream_key(seed: int, *labels: object) -> int:
    """A 256-bit key for the random stream of (seed, labels)."""
    text = "\x1f".join(str(label) for label in (seed, *labels))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=32).digest(), "little")


@lru_cache(maxsize=16)
def given_weights(question: Question) -> Mapping[str, np.ndarray]:
    """The weights that `question.given` fixes, by path; read-only, drawn once.

    They are part of the question, so both routes read the same arrays; NumPy draws them
    because the theory does without torch.
    """
    if question.given is None:
        raise ValueError("expected a question with given=Weights(seed), got given=None; add it")
    architecture, arrays = question.architecture, {}
    for operation in architecture.upstream(question.place):
        for weight in operation.weights:
            key = stream_key(question.given.seed, "given", weight.path)
            source = NumpySource(np.random.Generator(np.random.Philox(np.random.SeedSequence(key))))
            law = law_of(question.init, weight, architecture)
            arrays[weight.path] = law.draw(source, weight.shape)
            arrays[weight.path].flags.writeable = False
    return arrays
