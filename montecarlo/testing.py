"""Contract tests for observables, samplers and engines; see `nope.contracts`.

An observable of your own, held to its definition, in a file of tests:

    class TestLargest(ObservableContract):
        name = "largest"

        def plain(self, draws, question):
            return np.mean([np.abs(x).max(-1) for x in draws], 0)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property, reduce
from itertools import count
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from montecarlo import engines, sampler
from montecarlo.campaign import Campaign
from montecarlo.collapsed import SAMPLERS
from montecarlo.estimators import per_draw
from montecarlo.evidence import Decision, Target
from montecarlo.moments import Moments
from montecarlo.observables import STATISTICS, Statistic
from montecarlo.sampler import Conditions, Group
from nope.architecture import Architecture, decoder
from nope.contracts import (
    ERROR_RATE,
    Contract,
    Simulated,
    assert_close,
    contracts_in,
    half_width,
    uncovered,
)
from nope.init import Scheme, normal
from nope.questions import OBSERVABLES, Question, Transform
from nope.tokens import GaussianTokens

__all__ = [
    "ERROR_RATE",
    "Contract",
    "EngineContract",
    "ObservableContract",
    "SamplerContract",
    "contracts_in",
    "uncovered",
]

Draw = np.ndarray
"""Vectors (n_ctx, width), heads side by side, or pairs (heads, n_ctx, n_ctx)."""


def draws_at(values: Tensor, question: Question) -> list[Draw]:
    """A place's values as one array for each draw."""
    vectors = question.operation.axes == "vector" and values.ndim == 4
    return [np.concatenate(list(x), -1) if vectors else x for x in values.numpy()]


class ObservableContract(Contract):
    """An observable: `plain(draws, question)` is its array over a few draws of real layers.

    Of one that transforms its inputs `plain(draws, moved, question)`, the same draws with the
    inputs transformed.  What is not judged may be anything.  Every kind of place that the
    observable is defined on is among `places`.
    """

    name: ClassVar[str]
    architecture: ClassVar[Architecture] = decoder(
        6, 2, n_layers=2, n_ctx=5, d_ff=7, tokens=GaussianTokens(1.0)
    )
    init: ClassVar[Scheme] = normal(0.5)
    places: ClassVar[tuple[str, ...]] = (
        "blocks.0.attn.q",
        "blocks.0.attn_out",
        "ln_final",
        "blocks.1.attn.scores",
        "blocks.1.attn.pattern",
    )
    points: ClassVar[tuple[float, ...]] = ()
    rounding: ClassVar[float] = 1e-12
    DRAWS: ClassVar[int] = 4

    @classmethod
    def registered(cls) -> list[str]:
        """What can be asked and what can be measured."""
        return [f"observable {name}" for name in dict.fromkeys((*OBSERVABLES, *STATISTICS))]

    @classmethod
    def covers(cls) -> list[str]:
        return [f"observable {cls.name}"]

    def plain(self, *looks_and_question: Any) -> Any:
        """The observable's array."""
        raise NotImplementedError(f"expected {type(self).__name__} to have a `plain`; write it")

    @property
    def statistic(self) -> Statistic:
        return STATISTICS[self.name]

    @property
    def questions(self) -> list[Question]:
        """About every place that the observable is defined on."""
        points = self.points
        asked = (Question(self.architecture, self.init, p, self.name, None, points)
                 for p in self.places)  # fmt: skip
        return [question for question in asked if question.reason_not_applicable is None]

    @cached_property
    def values(self) -> dict[Transform | None, dict[str, Tensor]]:
        """A few draws of every place, in float64, without and with the inputs transformed."""
        group, conditions = Group.of(self.questions[0]), Conditions(dtype="float64")
        places = [question.place for question in self.questions]
        looks = dict.fromkeys((None, OBSERVABLES[self.name].transform))
        found = {look: sampler.sample(group, places, 0, conditions, look) for look in looks}
        return {look: {place: x[: self.DRAWS] for place, x in values.items()}
                for look, values in found.items()}  # fmt: skip

    def components(self, question: Question) -> np.ndarray:
        """What the statistic says of each draw."""
        return np.asarray(per_draw(question, self.values).double().numpy())

    def test_it_is_described_and_measured(self) -> None:
        """Asked of every kind of place that it is on, and known to both tables."""
        assert self.name in OBSERVABLES, f"expected {self.name} in nope.OBSERVABLES"
        assert self.name in STATISTICS, f"expected {self.name} in STATISTICS"
        asked = {question.operation.axes for question in self.questions}
        assert asked == set(OBSERVABLES[self.name].on), f"expected a place of each kind of {asked}"
        assert OBSERVABLES[self.name].meaning, "expected a meaning"

    def test_it_is_the_plain_number(self) -> None:
        """The value of the components' means, where it is judged, at every place."""
        for question in self.questions:
            looks = [draws_at(values[question.place], question) for values in self.values.values()]
            expected = np.asarray(self.plain(*looks, question), dtype=float)
            found = self.statistic.value(self.components(question).mean(0))
            assert found.shape == question.shape == expected.shape, (found.shape, expected.shape)
            judged = question.judged
            where = f"{self.name} at {question.place}"
            assert_close(found[judged], expected[judged], self.rounding, where)

    def test_each_draw_counts_by_itself(self) -> None:
        """The draw is the unit: what is beside it changes nothing of what it says."""
        for question in self.questions:
            together = self.components(question)
            for draw in range(self.DRAWS):
                alone = {look: {place: x[draw : draw + 1] for place, x in values.items()}
                         for look, values in self.values.items()}  # fmt: skip
                found = per_draw(question, alone).double().numpy()[0]
                judged = question.judged
                assert_close(found[:, judged], together[draw][:, judged], 1e-12, f"draw {draw}")

    def test_the_gradient_is_that_of_the_value(self) -> None:
        """By central differences in each of the means."""
        for question in self.questions:
            mean = self.components(question).mean(0)[:, question.judged]
            gradient = self.statistic.gradient(mean)
            for part in range(len(mean)):
                step = np.zeros_like(mean)
                step[part] = 1e-5 * np.maximum(np.abs(mean[part]), 1e-3)
                rise = self.statistic.value(mean + step) - self.statistic.value(mean - step)
                assert_close(gradient[part], rise / (2 * step[part]), 1e-6, f"slope {part}")

    def test_every_draw_is_within_the_bounds(self) -> None:
        bounds = OBSERVABLES[self.name].bounds
        for question in self.questions:
            first = self.components(question)[:, 0][:, question.judged]
            low, high = bounds or (-np.inf, np.inf)
            slack = 1e-12
            assert (first >= low - slack).all(), f"{self.name} is below {low}"
            assert (first <= high + slack).all(), f"{self.name} is above {high}"


# ---------------------------------------------------------------------------------- samplers


class SamplerContract(Simulated):
    """A sampler: the law of a layer's places is that of its simulation `plain`, in NumPy.

    Compared are kernels and fourth moments at every vector place, the kernels also with `INPUTS`
    inputs for each draw of the weights.
    """

    sampler: ClassVar[str]
    n_ctx: ClassVar[int] = 3
    draws_drawn: ClassVar[int] = 2048
    INPUTS: ClassVar[int] = 3

    @classmethod
    def registered(cls) -> list[str]:
        return [f"sampler {name}" for name in SAMPLERS]

    @classmethod
    def covers(cls) -> list[str]:
        return [f"sampler {cls.sampler}"]

    @property
    def places(self) -> list[str]:
        """The vector places but the tokens."""
        every = self.architecture.places().items()
        return [place for place, operation in every if operation.axes == "vector"][1:]

    @property
    def conditions(self) -> Conditions:
        return Conditions(self.seed, dtype="float64", sampler=self.sampler)

    def sampled(self, places: list[str], index: int = 0, **changes: Any) -> dict[str, Tensor]:
        """One block."""
        asked = Question(self.architecture, self.init, places[0], "kernel")
        conditions = Conditions(**{**vars(self.conditions), **changes})
        return sampler.sample(Group.of(asked, conditions), places, index, conditions)

    @property
    def simulated(self) -> dict[str, np.ndarray]:
        """The features of draws of the simulation, by place."""
        kind: Any = type(self)
        return _simulated(kind)

    def sampled_features(self, inputs: int) -> dict[str, np.ndarray]:
        """Those of as many draws of the sampler, in whole blocks, averaged over their inputs."""
        found: dict[str, list[np.ndarray]] = {place: [] for place in self.places}
        for index in count():
            for place, values in self.sampled(self.places, index, inputs=inputs).items():
                asked = Question(self.architecture, self.init, place, "kernel")
                found[place] += map(_features, draws_at(values, asked))
            if len(found[self.places[0]]) >= self.draws_drawn * inputs:
                break
        features = {place: np.stack(each) for place, each in found.items()}
        return {place: x.reshape(-1, inputs, x.shape[1]).mean(1) for place, x in features.items()}

    def test_the_law_is_that_of_the_simulation(self) -> None:
        """Two means of independent draws differ by both errors at most."""
        self._assert_same_means(1)

    def test_the_law_is_the_same_for_several_inputs(self) -> None:
        """Those of one draw of the weights are averaged: the draw is the unit."""
        self._assert_same_means(self.INPUTS)

    def _assert_same_means(self, inputs: int) -> None:
        for place, one in self.sampled_features(inputs).items():
            two = self.simulated[place]
            gap, allowed = np.abs(one.mean(0) - two.mean(0)), half_width(one) + half_width(two)
            worst = int(np.argmax(gap / allowed))
            assert (gap <= allowed).all(), (
                f"expected moment {worst} at {place} of {two.mean(0)[worst]:.5g} +- "
                f"{allowed[worst]:.2g}, got {one.mean(0)[worst]:.5g} of {self.sampler}"
            )

    def test_a_block_is_a_function_of_its_key(self) -> None:
        """The same bits again, whatever else is asked; others of another seed or block."""
        output = self.places[-1]
        once = self.sampled([output])[output]
        assert torch.equal(once, self.sampled([output])[output]), "expected the same bits again"
        beside = self.sampled(self.places)[output]
        assert torch.equal(once, beside), "expected the same bits beside other places"
        for other in (self.sampled([output], 1), self.sampled([output], seed=self.seed + 1)):
            fresh = not np.isin(once.numpy(), other[output].numpy()).any()
            assert fresh, "expected other numbers in another block, and of another seed"


@cache
def _simulated(contract: Any) -> dict[str, np.ndarray]:
    """Of a class, once for all its checks."""
    held = contract()
    every: dict[str, list[np.ndarray]] = {place: [] for place in held.places}
    for draw in held.draws(held.draws_drawn):
        values = held.values(*draw)
        for place, found in every.items():
            found.append(_features(values[place]))
    return {place: np.stack(found) for place, found in every.items()}


def _features(x: Draw) -> np.ndarray:
    """The kernel of a draw, and its fourth moment at each position."""
    return np.concatenate([(x @ x.T / x.shape[1]).ravel(), np.mean(x**4, 1)])


# ----------------------------------------------------------------------------------- engines


class EngineContract(Contract):
    """An engine: the moments it gives have the bits of a plain loop over blocks.

    `start` is overridden where the engine has to be started first, and gives its name.
    """

    name: ClassVar[str]
    workers: ClassVar[int | None] = None
    BLOCKS: ClassVar[int] = 4
    questions: ClassVar[tuple[Question, ...]] = tuple(
        Question(decoder(8, 2, n_ctx=4), normal(0.3), *asked)
        for asked in (("blocks.0.attn.q", "second_moment"), ("ln_final", "kernel_cosine"))
    )

    @classmethod
    def registered(cls) -> list[str]:
        return [f"engine {name}" for name in (*engines.NAMES, "cluster")]

    @classmethod
    def covers(cls) -> list[str]:
        return [f"engine {cls.name}"]

    def start(self) -> AbstractContextManager[str]:
        """The engine at work, by the name that `montecarlo.measure` is given."""
        return nullcontext(self.name)

    @property
    def decisions(self) -> list[Decision]:
        """What the engine gives for each question, and for one that overflows."""
        kind: Any = type(self)
        return _decisions(kind)

    def plain(self) -> Iterator[Moments]:
        """The moments of each question: its blocks one after the other, merged in their order."""
        group = Group.of(self.questions[0])
        blocks = [
            sampler.block(group, self.questions, index, Conditions())
            for index in range(self.BLOCKS)
        ]
        for found in zip(*blocks, strict=True):
            moments = [each for each in found if isinstance(each, Moments)]
            assert len(moments) == self.BLOCKS, "expected finite moments"
            yield reduce(Moments.merge, moments)

    def test_the_bits_are_those_of_a_plain_loop(self) -> None:
        for decision, expected in zip(self.decisions[:-1], self.plain(), strict=True):
            assert decision.measurement is not None, "expected a measurement"
            found = decision.measurement.moments
            assert found.count == expected.count, (found.count, expected.count)
            for part in ("mean", "second", "third"):
                same = np.array_equal(getattr(found, part), getattr(expected, part))
                assert same, f"expected the bits of {part} of a plain loop from {self.name}"

    def test_a_failing_block_is_told(self) -> None:
        """The error of a block's question comes back, and the other questions have gone on."""
        failure = self.decisions[-1].failure
        assert isinstance(failure, FloatingPointError), f"expected the block's error, got {failure}"
        assert "in draw 0" in str(failure), f"expected the first draw, got {failure}"


OVERFLOWS = Question(decoder(8, 2, n_ctx=4), normal(1e30), "blocks.0.attn.scores", "second_moment")
"""Beyond float32."""


@cache
def _decisions(contract: Any) -> list[Decision]:
    """Of a class, once for all its checks: as many blocks as are compared, of each question."""
    held = contract()
    questions = (*held.questions, OVERFLOWS)
    bounds = (np.full(question.shape, np.inf) for question in questions)
    targets = [Target(q, -b, b, 0.5, 0.5) for q, b in zip(questions, bounds, strict=True)]
    draws = held.BLOCKS * Group.of(held.questions[0]).block_size
    with held.start() as name:
        return Campaign(targets, Conditions(), draws).run(held.workers, engine=name)
