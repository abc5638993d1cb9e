"""The position kernel K(m, n) = E <x_m, x_n> / d and the form of a rule that propagates it.

A rule is one SymPy expression in the kernels of the places an operation reads: `K` for the
first, `J` for the second.  Substituting symbolic kernels gives the derivation
(`theory.derivation`), substituting arrays gives numbers (`KernelValues`): one source for both.

At a place of pairs (scores, pattern) the "kernel" is the second moment of the entry (m, n).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
import sympy as sp

from theory.formula import compile_number_form
from theory.symbols import i, j, m, n

K, J = sp.Function("K"), sp.Function("J")
PREFIX_SUM = sp.Sum(K(i, j), (i, 1, m), (j, 1, n))
ZERO = sp.Integer(0)


@dataclass(frozen=True)
class Traits:
    """What a rule knows of a place besides its kernel.

    `maps` counts the independent random maps that made it (tokens included): each adds 1/d to
    the relative fluctuation of a squared norm.  `normalised`: |x|^2 = d exactly.  `fixed_norm`:
    K(m, m) does not fluctuate given the inputs, one map after a norm.  `isotropic`: coordinates
    i.i.d. Gaussian.  `kurtosis` of a coordinate and `norm_kurtosis`
    E|x|^4/(E|x|^2)^2 are exact, or None where no closed form is known.  `logits` names the
    scores behind a softmax pattern.
    """

    maps: int = 0
    normalised: bool = False
    fixed_norm: bool = False
    isotropic: bool = False
    kurtosis: sp.Expr | None = None
    norm_kurtosis: sp.Expr | None = None
    logits: str | None = None


@dataclass(frozen=True)
class Rule:
    """How one operation turns kernels into a kernel.

    `expression` is in K (and J), m and n; `sources` names the places K and J stand for;
    `remainder` estimates what the rule drops, relative to sqrt(K_mm K_nn) of its result, and
    is 0 where it is exact; `carried` says whether remainders of the sources add up or the
    largest counts.
    """

    name: str
    statement: str
    sources: tuple[str, ...]
    expression: sp.Expr
    assumption: str
    source: str
    traits: Traits
    remainder: sp.Expr = field(default_factory=lambda: ZERO)
    carried: Literal["sum", "largest"] = "sum"

    def apply(self, kernels: list[sp.Expr]) -> sp.Expr:
        """The expression with symbolic kernels in place of K and J, nothing simplified."""
        return self._put(self.expression, kernels)

    def dropped(self, kernels: list[sp.Expr]) -> sp.Expr:
        """The remainder with symbolic kernels in place of K and J."""
        return self._put(self.remainder, kernels)

    @staticmethod
    def _put(result: sp.Expr, kernels: list[sp.Expr]) -> sp.Expr:
        for function, kernel in zip((K, J), kernels, strict=False):
            result = result.replace(function, _at(kernel))
        return result


def _at(kernel: sp.Expr) -> Callable[[sp.Expr, sp.Expr], sp.Expr]:
    return lambda left, right: kernel.subs({m: left, n: right}, simultaneous=True)


_ARGUMENTS = {
    function(*at): sp.Symbol(f"{function.__name__}_{view}")
    for function in (K, J)
    for view, at in {"mn": (m, n), "mm": (m, m), "nn": (n, n)}.items()
}
_SUM = sp.Symbol("prefix_sum")


@cache
def _compiled(expr: sp.Expr) -> tuple[Callable[..., Any], tuple[sp.Symbol, ...]]:
    """The number form of a rule: kernels become arguments, the prefix sum becomes another."""
    flat = expr.subs(PREFIX_SUM, _SUM).subs(_ARGUMENTS)
    arguments = tuple(sorted(flat.free_symbols, key=str))
    return compile_number_form(flat, arguments), arguments


View = Literal["mn", "mm", "nn"]


class KernelValues:
    """Numbers for the kernels of an architecture at broadcastable positions `m` and `n`.

    `rules` maps a place to its rule, `closed` to a symbolic kernel where one without sums is
    known, `bindings` the names of symbols to numbers, `exact` the places that nothing was
    dropped for.  A place under an average over prefixes
    without a closed kernel needs all positions: those are computed once, n_ctx^2 numbers.
    """

    def __init__(
        self,
        rules: Mapping[str, Rule],
        closed: Mapping[str, sp.Expr],
        bindings: Mapping[str, float],
        n_ctx: int,
        positions: tuple[np.ndarray, np.ndarray],
        exact: frozenset[str] = frozenset(),
    ) -> None:
        self._rules, self._closed, self._bindings = rules, closed, bindings
        self._n_ctx, (self._m, self._n) = n_ctx, positions
        self._exact = exact
        self._memo: dict[tuple[str, str, str], np.ndarray] = {}

    @cached_property
    def _whole(self) -> KernelValues:
        every = np.arange(1, self._n_ctx + 1)
        if self._m.shape == (self._n_ctx, 1) and self._n.shape == (1, self._n_ctx):
            return self
        positions = (every[:, None], every[None, :])
        return KernelValues(
            self._rules, self._closed, self._bindings, self._n_ctx, positions, self._exact
        )

    def kernel(self, place: str, view: View = "mn") -> np.ndarray:
        """K(m, n), K(m, m) or K(n, n) at a place."""
        key = ("kernel", place, view)
        if key not in self._memo:
            if place in self._closed:
                self._memo[key] = self._evaluate(self._closed[place], (), view)
            elif self._rules[place].expression.has(sp.Sum):
                self._memo[key] = self._averaged(place)[self._index(view)]
            else:
                rule = self._rules[place]
                self._memo[key] = self._evaluate(rule.expression, rule.sources, view)
        return self._memo[key]

    def remainder(self, place: str, view: View = "mn") -> np.ndarray:
        """The estimated relative error of `kernel`, in units of sqrt(K_mm K_nn)."""
        key = ("remainder", place, view)
        if key not in self._memo:
            rule = self._rules[place]
            own: np.ndarray = np.abs(self._evaluate(rule.remainder, rule.sources, view))
            carried = [self._carried(place, source, view) for source in rule.sources]
            pooled = np.maximum.reduce if rule.carried == "largest" else np.add.reduce
            self._memo[key] = own + (pooled(np.broadcast_arrays(*carried)) if carried else 0.0)
        return self._memo[key]

    def _carried(self, place: str, source: str, view: View) -> np.ndarray:
        """What a place inherits of its source's remainder.

        A prefix mean averages it like the kernel itself; an exact norm leaves none of it on
        the diagonal.
        """
        rule, (left, right) = self._rules[place], self._positions(view)
        if rule.expression.has(sp.Sum) and source == rule.sources[0]:
            if source in self._exact:
                return np.zeros(np.broadcast_shapes(left.shape, right.shape))
            averaged = self._averaged_remainder(place, source)
            return np.asarray(averaged[left - 1, right - 1])
        found = self.remainder(source, view)
        exact = (left == right) & rule.traits.normalised
        return np.asarray(np.where(exact, 0.0, found))

    def _averaged_remainder(self, place: str, source: str) -> np.ndarray:
        """The prefix mean of a source's absolute remainder, relative again, at all positions."""
        whole, rule = self._whole, self._rules[place]
        sums = (whole.remainder(source) * whole._size(source)).cumsum(0).cumsum(1)
        averaged = whole._evaluate(rule.expression, rule.sources, "mn", sums)
        return np.asarray(averaged / whole._size(place))

    def _size(self, place: str) -> np.ndarray:
        return np.asarray(np.sqrt(self.kernel(place, "mm") * self.kernel(place, "nn")))

    def _averaged(self, place: str) -> np.ndarray:
        """A prefix-averaged kernel at all positions."""
        whole, rule = self._whole, self._rules[place]
        key = ("averaged", place, "mn")
        if key not in whole._memo:
            sums = whole.kernel(rule.sources[0]).cumsum(0).cumsum(1)
            whole._memo[key] = whole._evaluate(rule.expression, rule.sources, "mn", sums)
        return whole._memo[key]

    def _index(self, view: View) -> tuple[np.ndarray, np.ndarray]:
        left, right = self._positions(view)
        return left - 1, right - 1

    def _positions(self, view: View) -> tuple[np.ndarray, np.ndarray]:
        return {"mn": (self._m, self._n), "mm": (self._m, self._m), "nn": (self._n, self._n)}[view]

    def _evaluate(
        self,
        expr: sp.Expr,
        sources: tuple[str, ...],
        view: View,
        sums: np.ndarray | None = None,
    ) -> np.ndarray:
        function, arguments = _compiled(expr)
        left, right = self._positions(view)
        values: dict[str, Any] = {
            **self._bindings,
            "m": left.astype(float),
            "n": right.astype(float),
        }
        for argument in arguments:
            head, _, at = argument.name.partition("_")
            if argument is _SUM:
                values[argument.name] = sums
            elif head in ("K", "J") and at in ("mn", "mm", "nn"):
                inner: View = at if view == "mn" else view
                values[argument.name] = self.kernel(sources["KJ".index(head)], inner)
        result = function(*(values[argument.name] for argument in arguments))
        shape = np.broadcast_shapes(left.shape, right.shape)
        return np.broadcast_to(np.asarray(result, dtype=float), shape)
