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
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, get_args

import numpy as np
import sympy as sp

from nope.architecture import Architecture
from nope.checks import expect
from nope.operations import Normalise, Scores, Softmax, Uniform
from nope.questions import Question
from theory import symmetry
from theory.bindings import bindings, local_bindings
from theory.derivation import Derivation, Step, derive
from theory.formula import Formula, Status, compile_number_form
from theory.formulas import formula
from theory.formulas.cosine import adjacency_score
from theory.formulas.tokens import collision_matrix
from theory.kernel import Fidelity, Rule, Traits
from theory.propagation import LEFT, KernelValues, all_pairs, at_pairs, of_product
from theory.rules import rule_for
from theory.symbols import WEIGHT_STD, p_same

Asked = Literal["uniform", "first_order", "any_temperature", "best"]

NEGLIGIBLE = 1e-12
"""Remainders below this share of the values are rounding, not something dropped."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the theory says of a question.

    `values` has the shape of the question; `remainder`, of the same shape and unit, estimates
    what was dropped.  `stated` is the formula they were computed from, if it was one;
    `fidelity` is how attention was treated.  `formula`, `derivation` and `treatment` are derived
    when asked for.
    """

    values: np.ndarray
    remainder: np.ndarray
    status: Status
    stated: Formula | None = None
    fidelity: Fidelity | None = None
    question: Question | None = None

    def __post_init__(self) -> None:
        for name in ("values", "remainder"):
            view = np.asarray(getattr(self, name)).view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)

    @cached_property
    def derivation(self) -> Derivation | None:
        """The steps to the kernel behind the values."""
        if self.question is None or self.fidelity is None:
            return None
        asked = self.question
        return derive(asked.architecture, asked.init, asked.place, self.fidelity)

    @property
    def formula(self) -> Formula | None:
        """The formula behind the values: the stated one, or the derived kernel."""
        if self.stated is not None or self.derivation is None:
            return self.stated
        step: Step = self.derivation.steps[-1]
        return Formula(
            name=f"kernel({step.place})",
            expr=step.after,
            statement=step.rule.statement,
            status=self.status,
            source=step.rule.source,
            left="K(m, n)",
            derivation=self.derivation,
        )

    @property
    def treatment(self) -> tuple[str, ...]:
        """What was assumed beyond exact algebra, per place."""
        steps = self.derivation.steps if self.derivation else ()
        return tuple(_treatment(step) for step in steps if not step.exact)


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
    known = {
        **bindings(question.architecture, question.init),
        "m": left,
        "n": right,
    }
    unknown = [name for name in formula.symbols if name not in known]
    if unknown:
        raise ValueError(
            f"expected a formula in {', '.join(known)}, got {formula.name} with "
            f"{', '.join(unknown)}; substitute them first"
        )
    return {name: known[name] for name in formula.symbols}


@lru_cache(maxsize=256)
def predict(question: Question, fidelity: Asked = "best") -> Prediction:
    """The answer to `question`.

    `fidelity` is how a softmax is treated: `uniform`, a_mn = 1/m; `first_order` in the logits'
    variance s^2; `any_temperature`; `best` is the one of the smallest stated remainder.  Raises
    `LookupError` where there is nothing to answer, `ValueError` for an unknown fidelity and
    `NotImplementedError` with the reason where no formula is known.  Recent answers are kept, and
    their arrays are read-only.
    """
    if fidelity not in get_args(Asked):
        known = ", ".join(get_args(Asked))
        raise ValueError(f"expected fidelity of {known}, got {fidelity!r}; change fidelity")
    expect(isinstance(question, Question), "a nope.Question", question, "ask one")
    question.require_applicable()
    if question.kind.transform is not None:
        share = np.full(question.shape, symmetry.share_broken(question))
        return Prediction(share, np.zeros(question.shape), Status.EXACT)
    if question.observable == "cdf":
        return _shares(question)
    if question.given is not None:
        raise NotImplementedError(
            "expected a question over random weights: the kernel calculus averages over them; "
            "for given weights see theory.formulas.stream.coordinate_variance"
        )
    if fidelity != "best":
        return _Predictor(question, fidelity).answer()
    return _best(question)


def _shares(question: Question) -> Prediction:
    """The share of coordinates at or below each point, from the coordinate's law."""
    from theory.laws import law

    found = law(question)
    remainder = np.full(question.shape, found.remainder)
    return Prediction(found.cdf(np.array(question.points)), remainder, found.status)


def _best(question: Question) -> Prediction:
    """The prediction of the smallest largest remainder, among the fidelities that have one.

    `first_order` is no candidate: it is what `any_temperature` starts with.
    """
    softmax = any(
        isinstance(operation, Softmax)
        for operation in question.architecture.upstream(question.place)
    )
    tried: tuple[Fidelity, ...] = ("any_temperature", "uniform") if softmax else ("uniform",)
    found, refused = [], []
    for fidelity in tried:
        try:
            found.append(_Predictor(question, fidelity).answer())
        except NotImplementedError as reason:
            refused.append(reason)
    if not found:
        raise refused[-1]
    return min(found, key=lambda prediction: _largest(prediction, question))


def _largest(prediction: Prediction, question: Question) -> float:
    """The largest remainder that counts."""
    return float(prediction.remainder[question.judged].max(initial=0.0))


class _Predictor:
    """The kernel of the question's place at one fidelity, and what its observable makes of it."""

    def __init__(self, question: Question, fidelity: Fidelity) -> None:
        self.question, self.fidelity = question, fidelity
        self.rules = rules_to(question.architecture, question.place, fidelity)
        self.traits: Traits = self.rules[question.place].traits
        self.symbols = local_bindings(question.architecture, question.init)[question.place]

    @cached_property
    def values(self) -> _Values:
        return _Values(self.question, self.rules, self.fidelity)

    def answer(self) -> Prediction:
        name = self.question.observable
        answers: Mapping[str, Callable[[], tuple[Any, Any]]] = {
            "second_moment": self._second_moment,
            "mean_second_moment": self._mean_second_moment,
            "participation": self._participation,
            "kurtosis": self._kurtosis,
            "kernel": self._kernel,
            "kernel_cosine": self._kernel_cosine,
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
        # Errors relative to what is 0, and those of sharp logits, may be infinite.
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            values, remainder = (np.broadcast_to(x, self.question.shape) for x in answers[name]())
        if not np.isfinite(values[self.question.judged]).all():
            raise NotImplementedError(
                f"expected finite numbers, got others for {name} at {self.question.place}; keep "
                "the weights away from 0 and below 1"
            )
        size = float(np.abs(values).max(initial=0.0))
        remainder = np.where(np.isnan(remainder), np.inf, np.abs(remainder))
        dropped = not (remainder <= NEGLIGIBLE * size).all()
        return Prediction(
            values,
            remainder if dropped else np.zeros(self.question.shape),
            Status.LEADING_ORDER if dropped else Status.EXACT,
            fidelity=self.fidelity,
            question=self.question,
        )

    def _second_moment(self) -> tuple[Any, Any]:
        if isinstance(self.question.operation, Scores):
            return self._of_scores()
        moments = self.values.kernel
        return moments, moments * self.values.remainder

    def _of_scores(self) -> tuple[Any, Any]:
        """K_q(m, m) times the mean of K_k(n, n) over n <= m, and of the norms' covariance with it.

        Given the input l_mn has the second moment |x_m|^2 |x_n|^2 times constants.
        """
        rule = self.rules[self.question.place]
        (query, of_query), (key, of_key) = map(self.values.diagonal, rule.sources)
        common, own = self.values.common(rule.sources[0]), self.values.remainder
        count = np.arange(1, len(key) + 1)
        mean = key.cumsum() / count
        added = np.zeros_like(mean)
        if common is not None:
            added = np.tril(key * common).sum(1) / count
            own = np.abs(added) / mean * (LEFT + np.diagonal(common))
        inherited = mean * of_query + (key * of_key).cumsum() / count
        return query * (mean + added), query * (mean * own + inherited)

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
        """Computed at two guesses of what the question does not say: it must not matter."""
        asked, kurtosis = self.question, self.traits.kurtosis
        if kurtosis is None:
            raise NotImplementedError(
                f"expected a place whose kurtosis has a closed form, got {asked.place}; "
                "measure it with montecarlo.measure"
            )
        free = tuple(sorted(kurtosis.free_symbols, key=str))
        form, known = compile_number_form(kurtosis, free), self._fourth_moments(free)
        found, other = (form(*(known.get(s.name, guess) for s in free)) for guess in (1.0, 2.0))
        if not np.allclose(found, other, rtol=NEGLIGIBLE, atol=0.0):
            raise NotImplementedError(
                f"expected Gaussian or Haar weights and no biases where {asked.place} has no "
                f"closed form for the inputs' coordinates, got {asked.init}; "
                "measure it with montecarlo.measure"
            )
        return found, 0.0

    def _fourth_moments(self, wanted: tuple[sp.Symbol, ...]) -> dict[str, Any]:
        """What the question gives to the symbols of a kurtosis."""
        asked = self.question
        positions, _ = position_arrays(asked)
        found = bindings(asked.architecture, asked.init, self._since_norm(asked.place))
        stds = {symbol.name for symbol in WEIGHT_STD.values()}.intersection(found)
        self._require_vectors(all(found[name] ** 2 > 0 for name in stds))
        known: dict[str, Any] = {**found, "m": positions}
        if p_same in wanted:
            same = collision_matrix(asked.architecture.tokens, asked.architecture.n_ctx)
            known["p_same"] = np.array([same[at - 1, :at].mean() for at in positions])
        return known

    def _since_norm(self, place: str) -> set[str]:
        """The places whose fourth moments are in that of `place`: those back to a norm."""
        sources = () if self.rules[place].traits.normalised else self.rules[place].sources
        return {place}.union(*map(self._since_norm, sources))

    def _kernel(self) -> tuple[Any, Any]:
        return self.values.kernel, self.values.size * self.values.remainder

    def _require_vectors(self, given: bool) -> None:
        """Refuse ratios at a place where everything is 0."""
        if not given:
            raise NotImplementedError(
                f"expected a place that is not 0 for {self.question.observable}, got 0 at "
                f"{self.question.place}; raise the weights' standard deviation"
            )

    def _kernel_cosine(self) -> tuple[Any, Any]:
        self._require_vectors(bool((self.values.size > 0).all()))
        same = np.equal(*position_arrays(self.question))
        rho = self.values.kernel / self.values.size
        slopes = [np.abs(rho) / 2, np.abs(rho) / 2, np.ones_like(rho)]
        remainder = of_product(slopes, self.values.remainders, np.zeros_like(rho))
        return rho, np.where(same, 0.0, remainder)

    def _cosine(self) -> tuple[Any, Any]:
        """E cos: exact for Gaussian vectors, else the kernel's, its excess, and the second order
        of the empirical kernel's fluctuation.

        The remainder adds the excess's next order, 4/3 of its square, and that of the drift.
        """
        rho, own = self._kernel_cosine()
        if self.traits.isotropic and not own.any():
            return formula("cosine.gaussian_pair")(rho=rho, d=self.symbols["d"]), own
        excess, (drift, left) = self.values.excess, self.values.drift
        beyond = left + np.abs(rho) * 4 / 3 * excess**2
        return np.clip(rho * (1 + excess) + drift, -1.0, 1.0), own + beyond

    def _cosine_steps(self) -> tuple[Any, Any]:
        rho, remainder = self._cosine()
        return np.diff(rho, axis=1), remainder[:, 1:] + remainder[:, :-1]

    def _adjacency_score(self, variant: str) -> tuple[Any, Any]:
        """The law of a triple where the cosine is sqrt(n/m), averaged over the triples."""
        self._require_vectors(bool((self.values.size > 0).all()))
        asked = self.question
        if not self._is_prefix_mean():
            raise NotImplementedError(
                "expected a place whose kernel is c/Max(m, n) (attn.z or attn_out of the first "
                f"layer), got {asked.place}; measure it with montecarlo.measure"
            )
        if self.symbols["d"] < 3:
            raise NotImplementedError(
                "expected d_model of at least 3 (in two dimensions a LayerNorm leaves a line, and "
                f"its cosines tie), got {self.symbols['d']}; measure it with montecarlo.measure"
            )
        width = self.symbols["d"] / self.traits.maps
        value, remainder = adjacency_score(asked.architecture.n_ctx, width, variant)
        return value, remainder + float(self.values.remainder.max())

    def _is_prefix_mean(self) -> bool:
        """Whether Max(m, n) K(m, n) is the same at all pairs of positions."""
        pairs = replace(self.question, observable="kernel")
        kernel = _Values(pairs, self.rules, self.fidelity).kernel
        scaled = np.maximum(*position_arrays(pairs)) * kernel
        return bool(np.ptp(scaled) <= NEGLIGIBLE * np.abs(scaled).max())


class _Values:
    """Kernel, remainder, size and excess at the question's positions.

    Pointwise where every kernel on the way is; otherwise all pairs are carried forward.
    """

    def __init__(self, question: Question, rules: Mapping[str, Rule], fidelity: Fidelity) -> None:
        self._question, self._rules = question, rules
        self._positions = position_arrays(question)
        self._closed, self._exact = _closed(question, rules, fidelity)
        self._pointwise = all(
            place in self._closed and rule.sources[0] in self._exact
            for place, rule in rules.items()
            if rule.algorithm is not None or rule.expression.has(sp.Sum)
        )

    @cached_property
    def _values(self) -> KernelValues:
        architecture, place = self._question.architecture, self._question.place
        n_ctx = architecture.n_ctx
        positions = self._positions if self._pointwise else all_pairs(n_ctx)
        symbols = local_bindings(architecture, self._question.init)
        for closed in self._closed:
            before = (operation.place for operation in architecture.upstream(closed))
            symbols[closed] = bindings(architecture, self._question.init, before)
        found = KernelValues(self._rules, symbols, n_ctx, positions, self._closed, self._exact)
        if not self._pointwise:
            found.advance({place, *self._rules[place].sources})
        return found

    def diagonal(self, place: str) -> tuple[np.ndarray, np.ndarray]:
        """K(m, m) and its relative remainder at the question's place or one that it reads."""
        found = (self._values.kernel(place, "mm"), self._values.remainder(place, "mm"))
        every = (self._question.architecture.n_ctx,)
        one, other = (np.broadcast_to(each.ravel(), every) for each in found)
        return one, other

    def common(self, place: str) -> np.ndarray | None:
        """The covariance of |x_m|^2 and |x_n|^2, over their means, of the input of a place's map.

        At all pairs; None where only the asked ones are computed.
        """
        return None if self._pointwise else self._values.common(place)

    def _at(self, what: str, view: str = "mn") -> np.ndarray:
        values = getattr(self._values, what)(self._question.place, view)
        if self._pointwise:
            return np.asarray(values)
        left, right = self._positions
        shown = {"mn": (left, right), "mm": (left, left), "nn": (right, right)}[view]
        n_ctx = self._question.architecture.n_ctx
        return at_pairs(np.broadcast_to(values, (n_ctx, n_ctx)), shown)

    @cached_property
    def kernel(self) -> np.ndarray:
        return self._at("kernel")

    @cached_property
    def remainder(self) -> np.ndarray:
        return self._at("remainder")

    @property
    def remainders(self) -> list[np.ndarray]:
        """Of K_mm, K_nn and K_mn, relatively."""
        return [self._at("remainder", view) for view in ("mm", "nn", "mn")]

    @cached_property
    def excess(self) -> np.ndarray:
        return self._at("excess")

    @cached_property
    def drift(self) -> tuple[np.ndarray, np.ndarray]:
        """E cos - rho of the empirical kernel's fluctuation, and its remainder."""
        found = self._values.drift(self._question.place)
        if self._pointwise:
            return found
        one, other = (at_pairs(part, self._positions) for part in found)
        return one, other

    @cached_property
    def size(self) -> np.ndarray:
        return np.asarray(np.sqrt(self._at("kernel", "mm") * self._at("kernel", "nn")))


def rules_to(architecture: Architecture, place: str, fidelity: Fidelity) -> dict[str, Rule]:
    """The rules that the kernel at `place` needs, in order of computation.

    Raises `NotImplementedError` where an operation has none.
    """
    if architecture.d_model == 1 and any(
        isinstance(operation, Normalise) and operation.kind == "layernorm"
        for operation in architecture.upstream(place)
    ):
        raise NotImplementedError(
            "expected d_model of at least 2 behind a LayerNorm (one centred coordinate is 0), "
            f"got 1 at {place}; use norm='rmsnorm'"
        )
    traits: dict[str, Traits] = {}
    rules: dict[str, Rule] = {}
    for operation in architecture.upstream(place):
        rules[operation.place] = rule_for(operation, traits, fidelity)
        traits[operation.place] = rules[operation.place].traits
    read = {place}
    for name in reversed(rules):
        if name in read:
            read.update(rules[name].sources)
    return {name: rule for name, rule in rules.items() if name in read}


def _closed(
    question: Question, rules: Mapping[str, Rule], fidelity: Fidelity
) -> tuple[Mapping[str, sp.Expr], frozenset[str]]:
    """Kernels without sums up to the first prefix mean, and the places exact until there.

    A mean of means has no closed form here, so nothing is derived beyond.
    """
    first = next((place for place, rule in rules.items() if rule.expression.has(sp.Sum)), None)
    if first is None or rules[first].algorithm is not None:
        return {}, frozenset()
    derivation = derive(question.architecture, None, first, fidelity)
    closed, exact = derivation.closed(), derivation.exact_places()
    known = first in closed and exact.issuperset(rules[first].sources[:1])
    return ({first: closed[first]} if known else {}), exact


def _treatment(step: Step) -> str:
    return f"{step.place}: {step.rule.name}, assuming {step.rule.assumption}"
