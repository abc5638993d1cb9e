"""From a question to numbers: the prediction, how true it is and what it drops.

>>> import nope, theory
>>> question = nope.Question(
...     nope.decoder(64, 4, n_ctx=4, attention="uniform"),
...     nope.init.normal(0.1), "blocks.0.attn_out", "second_moment",
... )
>>> prediction = theory.predict(question)
>>> prediction.values.round(4), prediction.status.name
(array([0.4096, 0.2048, 0.1365, 0.1024]), 'EXACT')
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import sympy as sp

from nope.operations import Linear, Normalise, Uniform
from nope.questions import Question
from theory.derivation import Derivation, Step, derive
from theory.formula import Formula, Status, compile_number_form
from theory.formulas.cosine import adjacency_score, cosine_remainder
from theory.kernel import KernelValues, Traits
from theory.symbols import WEIGHT_STD, m, n

Fidelity = Literal["uniform", "best"]

NEGLIGIBLE = 1e-12
"""Remainders below this are rounding, not something dropped."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the theory says of a question.

    `values` has the shape of the question; `remainder`, of the same shape and unit, estimates
    what was dropped.  `formula` is the symbolic kernel behind the values, `derivation` its
    steps; `treatment` says per place what was assumed beyond exact algebra.
    """

    values: np.ndarray
    remainder: np.ndarray
    status: Status
    formula: Formula | None = None
    derivation: Derivation | None = None
    treatment: tuple[str, ...] = ()


def bindings(question: Question) -> dict[str, float]:
    """The value of every symbol that the question fixes, positions aside.

    Raises `NotImplementedError` when weights of one role have different variances, since one
    symbol stands for them all.
    """
    architecture = question.architecture
    values: dict[str, float] = {
        "d": architecture.d_model,
        "H": architecture.n_heads,
        "L": architecture.n_ctx,
        "d_h": architecture.d_model // architecture.n_heads,
        "sigma_x": architecture.tokens.std,
    }

    def bind(name: str, value: float) -> None:
        if values.setdefault(name, value) != value:
            raise NotImplementedError(
                f"expected one value of {name} in an architecture, got {values[name]} and {value}; "
                "ask layer by layer"
            )

    for operation in architecture.operations:
        for weight in operation.weights:
            std = question.init.law(weight, architecture).variance ** 0.5
            bind(WEIGHT_STD[weight.role].name if weight.role in WEIGHT_STD else "sigma_b", std)
        if isinstance(operation, Linear) and operation.weight.role == "mlp_out":
            bind("d_ff", operation.weight.fan_in)
        if isinstance(operation, Normalise) and operation.eps:
            bind("epsilon", operation.eps)
    stds = [values[s.name] for s in WEIGHT_STD.values() if s.name in values]
    if stds and len(set(stds)) == 1:
        values["sigma"] = stds[0]
    if "sigma_q" in values:
        values["s"] = architecture.d_model * values["sigma_q"] * values["sigma_k"]
    return values


def position_arrays(question: Question) -> tuple[np.ndarray, np.ndarray]:
    """m and n for every entry of the question's array, broadcastable to its shape."""
    grid, n_ctx = question.grid, question.architecture.n_ctx
    match question.kind.shape:
        case "positions" | "whole":
            every = np.arange(1, n_ctx + 1)
            return every, every
        case "adjacent":
            return np.arange(1, n_ctx), np.arange(2, n_ctx + 1)
        case "coordinates":
            rows = np.arange(1, question.shape[0] + 1)[:, None]
            return rows, rows
        case _:
            return grid[:, None], grid[None, :]


def at(formula: Formula, question: Question) -> np.ndarray:
    """A formula on the symbols that a question fixes, in the question's shape.

    Raises `ValueError` for a symbol that the question does not fix.
    """
    return np.broadcast_to(formula(**arguments(formula, question)), question.shape)


def arguments(formula: Formula, question: Question) -> dict[str, Any]:
    """What to call a formula with to answer a question."""
    left, right = position_arrays(question)
    known = {**bindings(question), "m": left, "n": right}
    unknown = [name for name in formula.symbols if name not in known]
    if unknown:
        raise ValueError(
            f"expected a formula in {', '.join(known)}, got {formula.name} with "
            f"{', '.join(unknown)}; substitute them first"
        )
    return {name: known[name] for name in formula.symbols}


def predict(question: Question, fidelity: Fidelity = "best") -> Prediction:
    """The answer to `question`.

    `fidelity` is how attention is treated: `uniform`, a_mn = 1/m; `best` takes the smallest
    stated remainder among what there is (today `uniform`).  Raises `LookupError` where there
    is nothing to answer, `ValueError` for an unknown fidelity and `NotImplementedError` with
    the reason where no formula is known.
    """
    if fidelity not in get_args(Fidelity):
        known = ", ".join(get_args(Fidelity))
        raise ValueError(f"expected fidelity of {known}, got {fidelity!r}; change fidelity")
    question.require_applicable()
    if question.given is not None:
        raise NotImplementedError(
            "expected a question over random weights: the kernel calculus averages over them; "
            "for given weights see theory.formulas.stream.coordinate_variance"
        )
    return _Predictor(question).answer()


class _Predictor:
    """The kernel of the question's place and what its observable makes of it."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.derivation = derive(question.architecture, question.place)
        self.traits: Traits = self.derivation.steps[-1].rule.traits
        self.bindings = bindings(question)

    def values(self) -> KernelValues:
        return KernelValues(
            self.derivation.rules(),
            self.derivation.closed(),
            self.bindings,
            self.question.architecture.n_ctx,
            position_arrays(self.question),
            self.derivation.exact_places(),
        )

    def answer(self) -> Prediction:
        name = self.question.observable
        answers: Mapping[str, Callable[[], tuple[Any, Any]]] = {
            "second_moment": self._second_moment,
            "mean_second_moment": self._mean_second_moment,
            "participation": self._participation,
            "kurtosis": self._kurtosis,
            "kernel": self._kernel,
            "kernel_cosine": lambda: self._cosine(finite_width=False),
            "cosine": self._cosine,
            "adjacent_cosine": self._cosine,
            "cosine_steps": self._cosine_steps,
            "adjacency_score": lambda: self._adjacency_score("triples"),
            "adjacency_score.steps": lambda: self._adjacency_score("steps"),
        }
        if name not in answers:
            raise NotImplementedError(
                f"expected an observable the theory predicts ({', '.join(answers)}), got {name}; "
                "measure it with montecarlo.measure"
            )
        values, remainder = (np.broadcast_to(x, self.question.shape) for x in answers[name]())
        dropped = float(np.abs(remainder).max(initial=0.0)) > NEGLIGIBLE
        status = Status.LEADING_ORDER if dropped else Status.EXACT
        return Prediction(
            values,
            np.abs(remainder) if dropped else np.zeros(self.question.shape),
            status,
            self._formula(status),
            self.derivation,
            tuple(_treatment(step) for step in self.derivation.steps if not step.exact),
        )

    def _formula(self, status: Status) -> Formula:
        step: Step = self.derivation.steps[-1]
        return Formula(
            name=f"kernel({self.question.place})",
            expr=step.after,
            statement=step.rule.statement,
            status=status,
            source=step.rule.source,
            left="K(m, n)",
            derivation=self.derivation,
        )

    def _second_moment(self) -> tuple[Any, Any]:
        values = self.values()
        moments = values.kernel(self.question.place)
        return moments, moments * values.remainder(self.question.place)

    def _mean_second_moment(self) -> tuple[Any, Any]:
        moments, remainder = self._second_moment()
        pairs = self.question.operation.axes == "pair"
        weights = np.arange(1, len(moments) + 1) if pairs else np.ones(len(moments))
        return np.average(moments, weights=weights), np.average(remainder, weights=weights)

    def _participation(self) -> tuple[Any, Any]:
        """m entries of second moment E a_mn^2 in row m."""
        if not isinstance(self.question.operation, Uniform) and self.traits.logits is None:
            raise NotImplementedError(
                f"expected a pattern, got {self.question.place}; use it there"
            )
        moments, remainder = self._second_moment()
        counts = np.arange(1, len(moments) + 1)
        return counts * moments, counts * remainder

    def _kurtosis(self) -> tuple[Any, Any]:
        if self.traits.kurtosis is None:
            raise NotImplementedError(
                f"expected a place whose kurtosis has a closed form, got {self.question.place}; "
                "measure it with montecarlo.measure"
            )
        self._require_gaussian_weights()
        free = tuple(sorted(self.traits.kurtosis.free_symbols, key=str))
        form = compile_number_form(self.traits.kurtosis, free)
        return form(*(self.bindings[symbol.name] for symbol in free)), 0.0

    def _require_gaussian_weights(self) -> None:
        architecture = self.question.architecture
        for operation in architecture.upstream(self.question.place):
            for weight in operation.weights:
                law = self.question.init.law(weight, architecture)
                if law.variance and law.kurtosis != 3:
                    raise NotImplementedError(
                        f"expected Gaussian weights for a kurtosis, got {law} at {weight.path}; "
                        "measure it with montecarlo.measure"
                    )

    def _kernel(self) -> tuple[Any, Any]:
        values, place = self.values(), self.question.place
        size = np.sqrt(values.kernel(place, "mm") * values.kernel(place, "nn"))
        return values.kernel(place), size * values.remainder(place)

    def _cosine(self, finite_width: bool = True) -> tuple[Any, Any]:
        values, place = self.values(), self.question.place
        size = np.sqrt(values.kernel(place, "mm") * values.kernel(place, "nn"))
        rho = values.kernel(place) / size
        bias = cosine_remainder(rho, self.bindings["d"] / max(self.traits.maps, 1))
        same = np.equal(*position_arrays(self.question))
        own = np.where(same, 0.0, values.remainder(place))
        return rho, own + (bias if finite_width else 0.0)

    def _cosine_steps(self) -> tuple[Any, Any]:
        rho, remainder = self._cosine()
        return np.diff(rho, axis=1), remainder[:, 1:] + remainder[:, :-1]

    def _adjacency_score(self, variant: str) -> tuple[Any, Any]:
        """The law of a triple where the cosine is sqrt(n/m), averaged over the triples."""
        prefix_mean = sp.simplify(self.derivation.result * sp.Max(m, n))
        if prefix_mean.has(m, n):
            raise NotImplementedError(
                "expected a place whose kernel is c/Max(m, n) (attn.z or attn_out of the first "
                f"layer), got {self.question.place}; measure it with montecarlo.measure"
            )
        if self.bindings["d"] < 3:
            raise NotImplementedError(
                "expected d_model of at least 3 (in two dimensions a LayerNorm leaves a line, and "
                f"its cosines tie), got {self.bindings['d']}; measure it with montecarlo.measure"
            )
        width = self.bindings["d"] / self.traits.maps
        value, remainder = adjacency_score(self.question.architecture.n_ctx, width, variant)
        values = self.values()
        return value, remainder + float(values.remainder(self.question.place).max())


def _treatment(step: Step) -> str:
    return f"{step.place}: {step.rule.name}, assuming {step.rule.assumption}"
