"""Contract tests for kernel rules, formulas and laws; see `nope.contracts`.

A formula of your own, held to its definition, in a file of tests:

    class TestMeanOfSquares(FormulaContract):
        name = "mine.mean_of_squares"

        def plain(self, m, sigma):
            return np.mean(sigma**2 * np.ones(m))

A simulation has errors of its own: return `Draws(values)` for the mean of independent draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any, ClassVar, get_args

import numpy as np
import sympy as sp

from nope.checks import is_refusal
from nope.contracts import (
    ERROR_RATE,
    Contract,
    Simulated,
    assert_close,
    contracts_in,
    distance,
    entries,
    half_width,
    kinds,
    kinds_of,
    uncovered,
)
from nope.operations import Activate, Multiply, Scores, Softmax
from nope.questions import Question, stream_key
from theory.formula import Formula, Status
from theory.formulas import formula, formulas
from theory.laws import Law, law
from theory.predict import Asked, Prediction, predict, rules_to
from theory.rules import rule_for
from theory.symbols import Described
from theory.symmetry import THEOREMS, dependence

__all__ = [
    "ERROR_RATE",
    "Contract",
    "Draws",
    "FormulaContract",
    "KernelContract",
    "LawContract",
    "contracts_in",
    "uncovered",
]


@dataclass(frozen=True, eq=False)
class Draws:
    """Independent draws, on the first axis, whose mean a simulation estimates."""

    values: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        return np.asarray(self.values.mean(0))

    @property
    def error(self) -> np.ndarray:
        """How far the mean may be off, with probability 1 - `ERROR_RATE`."""
        return half_width(np.asarray(self.values))


# ------------------------------------------------------------------------------ kernel rules

REORDERED: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "past_permutation": lambda x: np.concatenate([x[-2::-1], x[-1:]]),
    "permutation": lambda x: x[::-1],
    "equal_tokens": lambda x: np.repeat(x[:1], len(x), 0),
}
"""Inputs as `nope.questions.Transform` transforms them, by the theorem that is about it."""
KEPT: Mapping[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "past_permutation": lambda x, moved: (x[-1:], moved[-1:]),
    "permutation": lambda x, moved: (x[::-1], moved),
    "equal_tokens": lambda x, moved: (np.repeat(moved[:1], len(moved), 0), moved),
}
"""What each theorem says is equal, of outputs x and of those of reordered inputs."""


class KernelContract(Simulated):
    """The kernel at each of a layer's places against many draws of its simulation `plain`.

    `fidelity` is how a softmax is treated.  A place's remainder and the simulation's error are
    together at most `widest` of the scale: a wide band holds anything.  Where the theory refuses
    to predict the layer's output, `predicted` is False.  Covers what is predicted: the rules of
    the operations, the kind of layer and of tokens, and the fidelity of a softmax.
    """

    d_model: ClassVar[int] = 16
    n_ctx: ClassVar[int] = 4
    draws_drawn: ClassVar[int] = 3000
    fidelity: ClassVar[Asked] = "best"
    predicted: ClassVar[bool] = True
    widest: ClassVar[float] = 0.12

    @classmethod
    def registered(cls) -> list[str]:
        """Operations with a kernel rule or known symmetries, kinds of layers, fidelities."""
        return [
            *entries("kernel rule of", rule_for.registry),
            *entries("symmetries of", dependence.registry),
            *(f"kernel of {kind}" for kind in kinds()),
            *(f"fidelity {fidelity}" for fidelity in get_args(Asked)),
        ]

    @classmethod
    def covers(cls) -> list[str]:
        operations = {type(operation) for operation in cls.operations()}
        found = entries("symmetries of", operations)
        if cls.predicted:
            found += entries("kernel rule of", operations)
            found += [f"kernel of {kind}" for kind in kinds_of(cls.layer, cls.tokens)]
            found += [f"fidelity {cls.fidelity}"] * (Softmax in operations)
        return found

    def question(self, place: str) -> Question:
        """What is asked at a place: its kernel, or of pairs E x^2 over the keys n <= m."""
        network = self.architecture
        vector = network.places()[place].axes == "vector"
        return Question(network, self.init, place, "kernel" if vector else "second_moment")

    @property
    def predictions(self) -> dict[str, Prediction]:
        """By place; those that the theory refuses to predict are left out."""
        kind: Any = type(self)
        return _predictions(kind)

    @property
    def simulated(self) -> dict[str, Draws]:
        """The per-draw statistic of `question` by place."""
        kind: Any = type(self)
        return _simulated(kind)

    def test_every_place_has_a_kernel(self) -> None:
        """Unless `predicted` says that the theory has none of the output."""
        refused = [place for place in self.architecture.places() if place not in self.predictions]
        if self.predicted:
            assert not refused, (
                f"expected a prediction at every place, got none at {refused}: "
                f"{self._refusal(refused[0])}"
            )
        else:
            output = list(self.architecture.places())[-1]
            assert output in refused, f"expected no prediction of {output}, got one"

    def _refusal(self, place: str) -> str:
        try:
            predict(self.question(place), self.fidelity)
        except NotImplementedError as error:
            return str(error)
        return ""

    def test_kernels_are_symmetric_and_positive(self) -> None:
        """K(m, n) = K(n, m), no negative eigenvalue beyond rounding, a positive diagonal."""
        for place, found in self.predictions.items():
            values = np.asarray(found.values)
            if values.ndim == 2:
                assert_close(values, values.T, 1e-12, f"K(n, m) at {place}")
                least, largest = np.linalg.eigvalsh(values)[[0, -1]]
                slack = 1e-9 * largest + float(np.asarray(found.remainder).max()) * len(values)
                assert least >= -slack, f"expected no negative eigenvalue at {place}, got {least}"
                values = np.diagonal(values)
            assert (values > 0).all(), f"expected a positive diagonal at {place}, got {values}"

    def test_remainders_are_stated_and_narrow(self) -> None:
        """Finite, not negative, 0 where exact, and of `widest` of the scale at most."""
        for place, found in self.predictions.items():
            size = self._shares(place, found.remainder)
            assert np.isfinite(size).all(), f"expected finite remainders at {place}, got {size}"
            assert (size >= 0).all(), f"expected remainders of at least 0 at {place}, got {size}"
            assert size.max() <= self.widest, f"{place}: a remainder of {size.max():.3g}"
            exact = found.status is not Status.EXACT or size.max() <= 1e-9
            assert exact, f"expected no remainder of an exact prediction at {place}, got {size}"

    def test_kernels_are_those_of_the_simulation(self) -> None:
        """Within the remainder and the simulation's own error, at every pair of positions."""
        for place, found in self.predictions.items():
            simulated, values = self.simulated[place], np.asarray(found.values)
            rounding = 1e-9 * np.abs(values).max()
            gap = np.abs(simulated.mean - values)
            allowed = simulated.error + np.asarray(found.remainder) + rounding
            worst = np.unravel_index(np.argmax(gap - allowed), gap.shape)
            assert (gap <= allowed).all(), (
                f"expected {place} to be {simulated.mean[worst]:.5g} +- {allowed[worst]:.2g} at "
                f"{tuple(int(k) + 1 for k in worst)}, got {values[worst]:.5g} from its rule"
            )

    def test_sizes_are_those_of_the_simulation(self) -> None:
        """E x^2 averaged over positions: a factor that all have shows before that of one entry."""
        for place, found in self.predictions.items():
            drawn = self.simulated[place].values
            own, values, remainder = (
                self._sizes(place, each) for each in (drawn, found.values, found.remainder)
            )
            ratio = Draws((own / values).mean(1, keepdims=True))
            allowed = float(ratio.error[0] + (remainder / values).mean()) + 1e-9
            assert abs(float(ratio.mean[0]) - 1) <= allowed, (
                f"expected E x^2 at {place} to be {float(ratio.mean[0]):.4g} +- {allowed:.2g} "
                "times what its rule says, averaged over positions, got 1"
            )

    def _sizes(self, place: str, array: np.ndarray) -> np.ndarray:
        """E x^2 by position, of arrays of the shape of `question` on the last axes."""
        paired = self.question(place).kind.shape == "pairs"
        return np.diagonal(array, axis1=-2, axis2=-1) if paired else array

    def test_the_simulation_can_tell(self) -> None:
        """What agreement allows is at most `widest` of the scale, so that it says something."""
        for place, found in self.predictions.items():
            error, remainder = (
                self._shares(place, each) for each in (self.simulated[place].error, found.remainder)
            )
            share = (error + remainder).max()
            assert share <= self.widest, (
                f"{place}: {share:.3g} of the scale, {remainder.max():.3g} the remainder's; raise "
                "draws_drawn, or ask where the theory is sharper"
            )

    def _shares(self, place: str, of: Any) -> np.ndarray:
        """Of the scale of the prediction at a place."""
        scale = self.question(place).scale_of(np.asarray(self.predictions[place].values))
        return np.asarray(of / scale)

    def test_positions_are_correlated(self) -> None:
        """Of a kernel that is 0 beside its diagonal any multiple agrees with the simulation."""
        output = list(self.architecture.places())[-1]
        found = self.predictions.get(output)
        if found is None or np.ndim(found.values) < 2 or output == "embed":
            return
        apart = ~np.eye(self.n_ctx, dtype=bool)
        seen = np.abs(self.simulated[output].mean) > self.simulated[output].error
        assert (seen & apart).any(), (
            f"expected correlated positions at {output}, got a diagonal kernel; hold "
            "nope.Sequence((nope.CausalMean(), layer))"
        )

    def test_cosines_and_kurtoses_are_those_of_the_simulation(self) -> None:
        """Where the theory has them: what a rule says of a place beside its kernel."""
        for place in self.predictions:
            for observable, (per_draw, value) in self._beside(place).items():
                estimate = Draws(per_draw)
                allowed = estimate.error + np.asarray(value.remainder)
                gap = np.where(self._apart(per_draw), np.abs(estimate.mean - value.values), 0.0)
                worst = np.unravel_index(np.argmax(gap - allowed), gap.shape)
                assert (gap <= allowed + 1e-9).all(), (
                    f"expected the {observable} at {place} to be {estimate.mean[worst]:.5g} +- "
                    f"{allowed[worst]:.2g}, got {np.asarray(value.values)[worst]:.5g} from its rule"
                )

    def _apart(self, per_draw: np.ndarray) -> np.ndarray:
        """Which entries are judged: a cosine with itself is 1."""
        shape = per_draw.shape[1:]
        return ~np.eye(*shape, dtype=bool) if len(shape) == 2 else np.ones(shape, dtype=bool)

    def _beside(self, place: str) -> dict[str, tuple[np.ndarray, Prediction]]:
        """By observable, its draws and the prediction; kurtosis made linear in the moments."""
        if self.architecture.places()[place].axes != "vector":
            return {}
        found = {}
        for observable in ("cosine", "kurtosis"):
            asked = Question(self.architecture, self.init, place, observable)
            with suppress(NotImplementedError, LookupError):
                value = predict(asked, self.fidelity)
                found[observable] = (self.vectors[place][observable], value)
        return found

    @property
    def vectors(self) -> dict[str, dict[str, np.ndarray]]:
        """Of the places that are vectors: what the draws say of `_beside`'s observables."""
        kind: Any = type(self)
        return _vectors(kind)

    def test_traits_are_those_of_the_simulation(self) -> None:
        """Of unit mean square, centred, uncorrelated with all before: where a rule says so."""
        network = self.architecture
        for place in self.vectors:
            traits = rules_to(network, place, "uniform")[place].traits
            shape = self.vectors[place]
            if traits.normalised:
                assert_close(shape["norm"], np.ones_like(shape["norm"]), 1e-9, f"|x|^2 at {place}")
                centre = np.abs(shape["centre"]).max() if traits.centred else 0.0
                assert centre <= 1e-9, f"expected {place} to be centred, got a mean of {centre:.2g}"
            if traits.fresh and "before" in shape:
                common = Draws(shape["before"])
                assert (np.abs(common.mean) <= common.error).all(), (
                    f"expected {place} to be uncorrelated with the tokens, as its rule says "
                    f"(fresh), got {common.mean} +- {common.error}"
                )

    def test_symmetries_are_those_of_the_simulation(self) -> None:
        """Reordered or equal tokens leave the output as `theory.symmetry` says, and only then.

        Of tokens that never repeat, and a layer whose symmetries are known.
        """
        network, place = self.architecture, list(self.architecture.places())[-1]
        if network.places()[place].axes != "vector" or network.tokens.weights(self.d_model):
            return
        x, weights = next(self.draws(1))
        before = self.values(x, weights)[place]
        for name, reorder in REORDERED.items():
            with suppress(NotImplementedError):  # nothing is claimed
                holds = THEOREMS[name](network, place).holds
                one, two = KEPT[name](before, self.values(reorder(x), weights)[place])
                gap = np.abs(one - two).max() / np.abs(before).max()
                same = (gap <= 1e-9) == holds
                assert same, f"{name} at {place}: stated {holds}, a gap of {gap:.2g}"


@cache
def _predictions(contract: Any) -> dict[str, Prediction]:
    """Of a class, once for all its checks."""
    held, found = contract(), {}
    for place in held.architecture.places():
        with suppress(NotImplementedError):
            found[place] = predict(held.question(place), held.fidelity)
    return found


@lru_cache(maxsize=2)
def _drawn(contract: Any) -> dict[str, np.ndarray]:
    """What the simulation gives at each predicted place, draws on the first axis."""
    held = contract()
    every: dict[str, list[np.ndarray]] = {place: [] for place in held.predictions}
    for draw in held.draws(held.draws_drawn):
        values = held.values(*draw)
        for place, found in every.items():
            found.append(values[place])
    return {place: np.stack(found) for place, found in every.items()}


@cache
def _simulated(contract: Any) -> dict[str, Draws]:
    return {place: Draws(_statistic(x)) for place, x in _drawn(contract).items()}


def _statistic(x: np.ndarray) -> np.ndarray:
    """<x_m, x_n>/width of vectors; of pairs the mean square over heads and keys n <= m."""
    if x.ndim == 3:
        return np.asarray(x @ x.swapaxes(1, 2) / x.shape[2])
    n_ctx = x.shape[-1]
    squares = np.where(np.tri(n_ctx, dtype=bool), x, 0.0) ** 2
    return np.asarray(squares.sum(-1).mean(1) / np.arange(1, n_ctx + 1))


@cache
def _vectors(contract: Any) -> dict[str, dict[str, np.ndarray]]:
    """Of each predicted vector place, what draws say beside its kernel."""
    places, drawn = contract().architecture.places(), _drawn(contract)
    vectors = {place: x for place, x in drawn.items() if places[place].axes == "vector"}
    tokens = drawn.get("embed", np.zeros(0))  # of which the theory may know nothing
    return {place: _beside_kernel(x, tokens) for place, x in vectors.items()}


def _beside_kernel(x: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """By draw and position: |x|^2/width, the mean coordinate, cosines, the kurtosis with each
    draw's influence on it (the delta method), and <x_m, e_m> with tokens of as many coordinates.

    A vector that is 0, as units of a ReLU may be, has no direction: its cosines count as 0.
    """
    square, fourth = np.mean(x**2, 2), np.mean(x**4, 2)
    inner, size = _statistic(x), np.sqrt(square[:, :, None] * square[:, None])
    k = fourth.mean(0) / square.mean(0) ** 2
    found = {
        "norm": square,
        "centre": x.mean(2),
        "cosine": np.divide(inner, size, out=np.zeros_like(inner), where=size > 0),
        "kurtosis": k * (2 + fourth / fourth.mean(0) - 2 * square / square.mean(0)),
    }
    return found | ({"before": np.mean(x * tokens, 2)} if x.shape == tokens.shape else {})


# --------------------------------------------------------------------------------- formulas

DIGITS = 30
TINY = 1e-15
"""What rounding leaves of a number that is 0."""
LARGEST_COUNT, LARGEST_NUMBER = 9, 1.5


class FormulaContract(Contract):
    """A formula: `plain`, given the symbols by name, is the number it should be.

    `plain` may return `Draws`.  `points` gives values by symbol, a list each, taken together
    (the first of each, the second of each, ...); unless given they are drawn in the symbols'
    domains.  An `EXACT` or `PRINTED` formula is `plain` to `rounding`, a `LEADING_ORDER` one
    within its remainder, which is at most `widest` of it.
    """

    name: ClassVar[str]
    points: ClassVar[Mapping[str, Sequence[float]]] = {}
    rounding: ClassVar[float] = 1e-9
    widest: ClassVar[float] = 0.25
    COUNT: ClassVar[int] = 4

    @classmethod
    def registered(cls) -> list[str]:
        return [f"formula {name}" for name in formulas()]

    @classmethod
    def covers(cls) -> list[str]:
        return [f"formula {cls.name}"]

    def plain(self, **values: Any) -> Any:
        """The number at one point, by an independent route."""
        raise NotImplementedError(f"expected {type(self).__name__} to have a `plain`; write it")

    @property
    def formula(self) -> Formula:
        return formula(self.name)

    @cached_property
    def arguments(self) -> dict[str, np.ndarray]:
        """The points as an array for each symbol."""
        if self.points or not self.formula.symbols:
            return {name: np.array(values, dtype=float) for name, values in self.points.items()}
        generator = np.random.default_rng(stream_key(0, self.name))
        every = self.formula.symbols.items()
        return {name: _in_domain(entry, self.COUNT, generator) for name, entry in every}

    @property
    def places(self) -> Iterator[dict[str, Any]]:
        """One point at a time, whole numbers as such; one empty one for a constant."""
        arrays = self.arguments
        for index in range(len(next(iter(arrays.values()), np.zeros(1)))):
            yield {name: _tidy(values[index]) for name, values in arrays.items()}

    def test_symbols_are_documented(self) -> None:
        """Each has a meaning and a domain, the formula a statement and a source."""
        found = self.formula
        assert found.statement.endswith("."), f"expected a sentence, got {found.statement!r}"
        assert found.source, "expected a source"
        for name, entry in found.symbols.items():
            assert entry.meaning, f"expected a meaning of {name}"
            assert entry.domain.text, f"expected a domain of {name}"

    def test_it_can_be_printed_and_read_again(self) -> None:
        """LaTeX and MathML build; the SymPy source, read with the symbols, is the expression."""
        found = self.formula
        assert found.latex(), "expected LaTeX"
        assert found.mathml().startswith("<"), "expected MathML"
        again = sp.sympify(found.python(), locals=_names(found))
        assert again == found.expr or sp.simplify(again - found.expr) == 0, found.python()

    def test_the_number_form_is_the_expression(self) -> None:
        """Compiled numbers against the expression at the same points in high precision.

        A function without a closed form has the same numbers in both: those are `plain`'s to hold.
        """
        found = self.formula
        symbols = {name: entry.symbol for name, entry in found.symbols.items()}
        for point in self.places:
            exact = found.expr.subs({symbols[k]: sp.Rational(str(v)) for k, v in point.items()})
            expected = float(exact.evalf(DIGITS))
            assert_close(found(**point), expected, 1e-10, f"{found.name} at {point}")

    def test_it_is_the_plain_number(self) -> None:
        """To rounding where it is exact or as printed, else within its remainder.

        What is allowed is at most `widest` of it, and where the formula is 0 what rounding leaves.
        """
        for point in self.places:
            expected, error = _number_and_error(self.plain(**point))
            assert math.isfinite(expected + error), (
                f"expected `plain` to be a finite number at {point}, got {expected} +- {error}"
            )
            found = float(self.formula(**point))
            allowed = float(self.formula.remainder_at(**point)) + error
            rounding = self.rounding * abs(expected) if found else TINY
            assert abs(found - expected) <= allowed + rounding, (
                f"expected {self.name} to be {expected:.10g} +- {allowed:.2g} at {point}, "
                f"got {found:.10g}"
            )
            assert allowed <= self.widest * abs(expected), (
                f"expected to know {self.name} to {self.widest:.0%} at {point}, got {expected:.4g} "
                f"+- {allowed:.2g}; take more draws, or a point where the formula is sharper"
            )

    def test_the_remainder_fits_the_status(self) -> None:
        """0 unless of leading order; there finite, not negative and at most `widest` of it."""
        found, leading = self.formula, self.formula.status is Status.LEADING_ORDER
        assert leading or found.remainder == 0, f"expected no remainder of {found.status} formulas"
        assert not leading or found.remainder != 0, "expected a leading order to state a remainder"
        for point in self.places:
            size, value = float(found.remainder_at(**point)), abs(float(found(**point)))
            assert 0 <= size <= self.widest * value, f"a remainder of {size} of {value} at {point}"

    def test_arrays_are_numbers_one_by_one(self) -> None:
        """A call on arrays broadcasts; a symbol unknown, missing or out of domain is refused."""
        found = self.formula
        one_by_one = [float(found(**point)) for point in self.places]
        at_once = np.atleast_1d(found(**self.arguments))
        assert_close(at_once, one_by_one, self.rounding, "an array's values")
        for wrong in ({"unheard_of": 1.0}, *self._incomplete()):
            refused = _refused(found, {**next(iter(self.places)), **wrong})
            assert refused, f"expected {found.name} to refuse {wrong}"

    def _incomplete(self) -> Iterator[dict[str, Any]]:
        for name in self.formula.symbols:
            yield {name: math.nan}


def _number_and_error(plain: Any) -> tuple[float, float]:
    return (
        (float(plain.mean), float(plain.error)) if isinstance(plain, Draws) else (float(plain), 0)
    )


def _refused(found: Formula, values: Mapping[str, Any]) -> bool:
    try:
        found(**values)
    except ValueError as error:
        return is_refusal(error)
    return False


def _names(found: Formula) -> dict[str, Any]:
    """What the source of an expression names: its symbols, and functions of this package."""
    functions = {type(call).__name__: type(call) for call in found.expr.atoms(sp.Function)}
    return {**functions, **{name: entry.symbol for name, entry in found.symbols.items()}}


def _tidy(value: float) -> Any:
    return int(value) if float(value).is_integer() else float(value)


def _in_domain(entry: Described, count: int, generator: np.random.Generator) -> np.ndarray:
    """Values in a symbol's domain: counts up to 9, numbers of three digits up to 1.5."""
    domain = entry.domain
    low, high = max(domain.low, -LARGEST_NUMBER), min(domain.high, LARGEST_NUMBER)
    if domain.integer:
        return generator.integers(int(domain.low) + 1, LARGEST_COUNT + 1, count).astype(float)
    return np.round(generator.uniform(low + 0.1, high - 0.1, count), 3)


# ------------------------------------------------------------------------------------- laws

FARTHEST = 1e-13
"""Beyond this quantile no density is summed."""
REACH, STEP = 3.3, 1 / 20
"""Of the tanh-sinh rule."""
UNITS = "layer MLP "
"""How kinds begin whose hidden units have laws."""
LEVELS = np.array([1e-4, 0.03, 0.2, 0.41, 0.6, 0.77, 0.9, 0.99, 0.9999])


class LawContract(Contract):
    """The law at a question's place: `plain(generator, size)` draws from it by its definition.

    Everything else is checked against the law's own density: normalisation, moments, quantiles.
    `ORDERS` are the moments that exist and are compared.
    """

    question: ClassVar[Question]
    position: ClassVar[int | None] = None
    rounding: ClassVar[float] = 1e-6
    ORDERS: ClassVar[tuple[int, ...]] = (1, 2, 4)
    SIZE: ClassVar[int] = 40_000
    seed: ClassVar[int] = 0

    @classmethod
    def registered(cls) -> list[str]:
        """Operations whose laws are known, by activation, and the distributions they come to."""
        from theory.laws.places import vector_of
        from theory.laws.scale_mixtures import Parametrised

        return [
            *entries("law of", {*vector_of.registry, Scores}),
            *(f"law of {kind}" for kind in kinds() if kind.startswith(UNITS)),
            *entries("distribution", _subclasses(Parametrised)),
        ]

    @classmethod
    def covers(cls) -> list[str]:
        operations = cls.question.architecture.upstream(cls.question.place)
        numbers = law(cls.question, cls.position).family.numbers
        found = [
            *entries("law of", {type(operations[-1])}),
            *entries("distribution", {type(numbers)}),
        ]
        if isinstance(operations[-1], Activate | Multiply):
            network = cls.question.architecture
            every = kinds_of(network.body, network.tokens)
            found += [f"law of {kind}" for kind in every if kind.startswith(UNITS)]
        return found

    def plain(self, generator: np.random.Generator, size: int) -> np.ndarray:
        """`size` independent draws of the coordinate or logit, or dependent ones given draws."""
        raise NotImplementedError(f"expected {type(self).__name__} to have a `plain`; write it")

    @cached_property
    def law(self) -> Law:
        return law(self.question, self.position)

    @cached_property
    def breaks(self) -> np.ndarray:
        """Where quadrature is cut: the ends, quantiles, atoms and 0."""
        low, high = self.law.family.numbers.support()
        ends = [
            low if np.isfinite(low) else float(self.law.ppf(FARTHEST)),
            high if np.isfinite(high) else float(self.law.isf(FARTHEST)),
        ]
        inner = [*self.law.ppf(LEVELS), *self.law.atoms, 0.0]
        return np.unique([*ends, *(x for x in inner if ends[0] < x < ends[1])])

    @cached_property
    def nodes(self) -> tuple[np.ndarray, np.ndarray]:
        """Points, and the probability that the density gives to each.

        By the tanh-sinh rule in each piece, which takes an infinite density at its ends.
        """
        t = np.arange(-REACH, REACH + STEP, STEP)
        inside = np.tanh(np.pi / 2 * np.sinh(t))
        weights = STEP * np.pi / 2 * np.cosh(t) / np.cosh(np.pi / 2 * np.sinh(t)) ** 2
        low, high = self.breaks[:-1, None], self.breaks[1:, None]
        x, half = (low + high) / 2 + (high - low) / 2 * inside, (high - low) / 2
        within = (x > low) & (x < high)
        with np.errstate(all="ignore"):
            density = self.law.pdf(np.where(within, x, (low + high) / 2))
        density = np.where(within & np.isfinite(density), density, 0.0)
        return x.ravel(), (half * weights * density).ravel()

    def below(self, point: float) -> float:
        """P(X <= point) by quadrature of the density, and the atoms."""
        x, shares = self.nodes
        atoms = sum(p for at, p in self.law.atoms.items() if at <= point)
        return float(shares[x <= point].sum() + atoms)

    def test_the_density_has_mass_one(self) -> None:
        assert_close(self.below(math.inf), 1.0, self.rounding, "the mass")

    def test_moments_are_those_of_the_density(self) -> None:
        x, shares = self.nodes
        for order in self.ORDERS:
            found, scale = self.law.moment(order), self.law.moment(2) ** (order / 2)
            atoms = sum(p * at**order for at, p in self.law.atoms.items())
            summed = float(x**order @ shares + atoms)
            close = abs(found - summed) <= self.rounding * max(abs(summed), scale)
            assert close, f"expected E x^{order} of {summed:.10g}, got {found:.10g}"

    def test_the_distribution_function_is_the_density_summed(self) -> None:
        """And 1 less the other tail, and does not fall."""
        x = self.breaks
        below = self.law.cdf(x)
        assert (np.diff(below) >= 0).all(), "expected a CDF that does not fall"
        assert_close(self.law.sf(x), 1 - below, 1e-9, "the upper tail")
        at = float(x[len(x) // 2])
        assert_close(self.law.cdf(at), self.below(at), self.rounding, f"the CDF at {at}")

    def test_quantiles_invert_the_distribution_function(self) -> None:
        """The smallest x with F(x) >= q; F(x) = q but for levels that an atom takes up."""
        x = self.law.ppf(LEVELS)
        below, taken = self.law.cdf(x), np.array([self._atom(point) for point in x])
        assert (below >= LEVELS - 1e-9).all(), "expected F(ppf(q)) of at least q"
        assert (below - taken <= LEVELS + 1e-9).all(), "expected the smallest such point"
        assert_close(self.law.isf(1 - LEVELS), x, 1e-6, "quantiles of the upper tail")

    def _atom(self, x: float) -> float:
        """The probability of the atom at a point."""
        return sum(p for at, p in self.law.atoms.items() if math.isclose(at, x, abs_tol=1e-12))

    def test_the_symbols_say_the_same(self) -> None:
        """The density and the moments in symbols, at the parameters, are the numbers."""
        from theory.formula import compile_number_form

        found = self.law
        values = {sp.Symbol(name): value for name, value in found.parameters.items()}
        assert found.density is not None or found.reason, "expected a density or the reason"
        for order, moment in found.moments.items():
            number = moment.subs({s: values[sp.Symbol(s.name)] for s in moment.free_symbols})
            assert_close(float(number), found.moment(order), 1e-9, f"E x^{order} in symbols")
        if found.density is None or found.density.is_number:
            return
        arguments = tuple(sorted(found.density.free_symbols, key=str))
        x = np.array([point for point in found.ppf(LEVELS) if not self._atom(point)])
        given = [x if s.name == "x" else values[sp.Symbol(s.name)] for s in arguments]
        assert_close(
            compile_number_form(found.density, arguments)(*given),
            found.pdf(x),
            self.rounding,
            "the density",
        )

    def test_random_variates_follow_the_law(self) -> None:
        drawn = self.law.rvs(self.SIZE, np.random.default_rng(self.seed))
        self._assert_follows(np.asarray(drawn), 0.0, "rvs")

    def test_the_simulation_follows_the_law(self) -> None:
        """Within the law's remainder: the largest distance of its CDF from the true one."""
        assert 0 <= self.law.remainder <= 0.1, f"a remainder of {self.law.remainder}"
        self._assert_follows(self.drawn, self.law.remainder, "the simulation")

    def test_the_simulation_has_its_moments(self) -> None:
        """The second and, where it is among `ORDERS`, the fourth: a scale shows there first.

        A distance r of distribution functions moves a mean square by r times the largest square
        that is not rare, in so many draws.
        """
        for order in (2, 4):
            if order in self.ORDERS:
                powers = Draws(self.drawn[:, None] ** order)
                reach = float(np.abs(self.law.ppf([0.001, 0.999])).max()) ** order
                allowed = float(powers.error[0]) + self.law.remainder * reach
                found, expected = float(self.law.moment(order)), float(powers.mean[0])
                assert abs(found - expected) <= allowed + 1e-12, (
                    f"expected E x^{order} of {expected:.5g} +- {allowed:.2g}, got {found:.5g}"
                )

    @cached_property
    def drawn(self) -> np.ndarray:
        """As many draws by `plain` as were asked for."""
        drawn = np.asarray(self.plain(np.random.default_rng(self.seed), self.SIZE), dtype=float)
        assert drawn.ndim == 1, f"expected one number a draw, got shape {drawn.shape}"
        assert len(drawn) >= self.SIZE, f"expected {self.SIZE} draws by `plain`, got {len(drawn)}"
        assert np.isfinite(drawn).all(), "expected finite draws by `plain`"
        return drawn

    def _assert_follows(self, drawn: np.ndarray, remainder: float, what: str) -> None:
        """Massart's bound on the largest distance of an empirical CDF, atoms from both sides."""
        points, counts = np.unique(drawn, return_counts=True)
        share = np.cumsum(counts) / len(drawn)
        at_atom = np.array([self._atom(x) for x in points])
        above = self.law.cdf(points)
        before = np.concatenate([[0.0], share[:-1]])
        gap = max(np.abs(share - above).max(), np.abs(before - (above - at_atom)).max())
        allowed = distance(len(drawn)) + remainder
        assert gap <= allowed, f"{what} is {gap:.4f} from the law, more than {allowed:.4f}"


def _subclasses(kind: type) -> list[type]:
    found: list[type] = kind.__subclasses__()
    return [each for one in found for each in (one, *_subclasses(one))]
