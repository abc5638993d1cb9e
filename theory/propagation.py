"""Numbers for the kernels of an architecture, from the rules that derive them.

Two ways, one source.  Where every kernel is known pointwise (no sum over prefixes without a
closed form) only the asked pairs of positions are computed, at any n_ctx.  Otherwise the
kernels of all pairs are carried forward, operation by operation, and each is dropped after its
last use: n_ctx^2 numbers per live place, cost linear in depth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import sympy as sp

from theory.formula import compile_number_form
from theory.kernel import PREFIX_SUM, J, K, Moved, Q, Rule, X
from theory.symbols import m, n

View = Literal["mn", "mm", "nn"]
Positions = tuple[np.ndarray, np.ndarray]

_ARGUMENTS = {
    function(*at): sp.Symbol(f"{function.__name__}_{view}")
    for function in (K, J, Q, X)
    for view, at in {"mn": (m, n), "mm": (m, m), "nn": (n, n)}.items()
}
_SUM = sp.Symbol("prefix_sum")

NEGLIGIBLE = 1e-9
"""Diagonals that differ by less are constant, but for rounding."""

TABLE = 1025
"""Nodes of a tabulated remainder."""


@cache
def _compiled(expr: sp.Expr) -> tuple[Callable[..., Any], tuple[sp.Symbol, ...]]:
    """The number form of a rule: kernels become arguments, the prefix sum becomes another."""
    flat = expr.xreplace({PREFIX_SUM: _SUM, **_ARGUMENTS})
    arguments = tuple(sorted(flat.free_symbols, key=str))
    return compile_number_form(flat, arguments), arguments


def column_sums(matrix: np.ndarray) -> np.ndarray:
    """Sums over i <= m, for all m: `cumsum(0)`, which walks down columns, ten times as fast."""
    sums = np.array(matrix, dtype=float)
    for above, row in pairwise(sums):
        row += above
    return sums


def prefix_sum(matrix: np.ndarray) -> np.ndarray:
    """Sums over i <= m, j <= n, for all m and n."""
    return np.asarray(column_sums(matrix).cumsum(1))


def all_pairs(n_ctx: int) -> Positions:
    """Every m as a column, every n as a row."""
    every = np.arange(1, n_ctx + 1)
    return every[:, None], every[None, :]


class KernelValues:
    """Kernels, remainders and excesses at broadcastable `positions` (m, n).

    `rules` maps a place to its rule, `symbols` a place to the numbers of its symbols, `closed`
    a place to a symbolic kernel where one without sums is known; `exact` are the places that
    nothing was dropped for.  At places with a sum or an algorithm the positions must be
    `all_pairs`.
    """

    def __init__(
        self,
        rules: Mapping[str, Rule],
        symbols: Mapping[str, Mapping[str, float]],
        n_ctx: int,
        positions: Positions,
        closed: Mapping[str, sp.Expr],
        exact: frozenset[str] = frozenset(),
    ) -> None:
        self._rules, self._symbols, self._n_ctx = rules, symbols, n_ctx
        self._m, self._n = positions
        self._closed, self._exact = closed, exact
        self._all_pairs = self._m.shape == (n_ctx, 1) and self._n.shape == (1, n_ctx)
        self._memo: dict[str, dict[tuple[str, str], np.ndarray]] = {place: {} for place in rules}
        self._moved: dict[str, Moved] = {}

    def advance(self, keep: str) -> None:
        """Compute every place in order and drop each after its last use, but for `keep`."""
        last = {name: place for place, rule in self._rules.items() for name in self._reads(rule)}
        for place, rule in self._rules.items():
            self.kernel(place, "mm"), self.kernel(place, "nn")
            self.remainder(place), self.excess(place)
            for name in {place, *self._reads(rule)}:
                if last.get(name, place) == place and name != keep:
                    self._memo[name].clear()
                    self._moved.pop(name, None)

    @staticmethod
    def _reads(rule: Rule) -> tuple[str, ...]:
        return rule.sources

    # --------------------------------------------------------------------- kernels

    def kernel(self, place: str, view: View = "mn") -> np.ndarray:
        """K(m, n), K(m, m) or K(n, n) at a place."""
        return self._remembered(place, "kernel", view, self._kernel)

    def _kernel(self, place: str, view: View) -> np.ndarray:
        rule = self._rules[place]
        if view != "mn" and self._all_pairs:
            return self._diagonal(self.kernel(place), view)
        if place in self._closed:
            return self._evaluate(place, self._closed[place], view)
        if rule.algorithm is None and not rule.expression.has(sp.Sum):
            return self._evaluate(place, rule.expression, view)
        if rule.algorithm is not None:
            return self._algorithm(place).kernel
        return self._evaluate(place, rule.expression, "mn", prefix_sum(self._source(rule, 0)))

    def _source(self, rule: Rule, number: int) -> np.ndarray:
        return self.kernel(rule.sources[number])

    def _diagonal(self, matrix: np.ndarray, view: View) -> np.ndarray:
        diagonal = np.diagonal(matrix)
        return diagonal[:, None] if view == "mm" else diagonal[None, :]

    def _algorithm(self, place: str) -> Moved:
        if place not in self._moved:
            rule = self._rules[place]
            assert rule.algorithm is not None
            kernels = [self.kernel(name) for name in rule.sources]
            dropped = [self.remainder(name) * self._size(name) for name in rule.sources]
            self._moved[place] = rule.algorithm(kernels, dropped, self._symbols[place], self._n_ctx)
        return self._moved[place]

    def _size(self, place: str) -> np.ndarray:
        return np.asarray(np.sqrt(self.kernel(place, "mm")) * np.sqrt(self.kernel(place, "nn")))

    # ------------------------------------------------------------ remainders, excesses

    def remainder(self, place: str, view: View = "mn") -> np.ndarray:
        """The estimated relative error of `kernel`, in units of sqrt(K_mm K_nn)."""
        return self._remembered(place, "remainder", view, self._remainder)

    def _remainder(self, place: str, view: View) -> np.ndarray:
        rule = self._rules[place]
        if rule.algorithm is not None:
            found = self._algorithm(place).remainder
            return found if view == "mn" else self._diagonal(found, view)
        carried = [self._carried(place, source, view) for source in rule.sources]
        if rule.carried == "shared":
            share = self._share(place, rule, view)
            carried = [share * carried[0], (1 - share) * carried[1]]
        if carried and rule.remainder == 0:
            return np.asarray(sum(carried[1:], carried[0]))
        return np.asarray(sum(carried, np.abs(self._own_remainder(place, rule, view))))

    def _own_remainder(self, place: str, rule: Rule, view: View) -> np.ndarray:
        """Of the rule itself; from a table where it is a function of one correlation alone.

        An estimate needs no more digits, and duals are dear.
        """
        names = {argument.name for argument in _compiled(rule.remainder)[1]}
        alone = {"K_mn", "K_mm", "K_nn"} <= names and not {"m", "n"} & names
        if not (self._all_pairs and view == "mn" and alone and len(rule.sources) == 1):
            return self._evaluate(place, rule.remainder, view)
        kernel, diagonal = self._source(rule, 0), self.kernel(rule.sources[0], "mm")
        if np.ptp(diagonal) > NEGLIGIBLE * diagonal[0, 0]:
            return self._evaluate(place, rule.remainder, view)
        nodes = np.linspace(kernel.min(), kernel.max(), TABLE)
        known = {**self._symbols[place], "p": rule.traits.maps, "K_mn": nodes}
        known |= {"K_mm": diagonal[0, 0], "K_nn": diagonal[0, 0]}
        function, arguments = _compiled(rule.remainder)
        values = np.asarray(function(*(known[argument.name] for argument in arguments)))
        return np.asarray(np.interp(kernel, nodes, np.broadcast_to(values, nodes.shape)))

    def _carried(self, place: str, source: str, view: View) -> np.ndarray:
        """What a place inherits of its source's remainder.

        A prefix mean averages it like the kernel itself; an exact norm leaves none of it on
        the diagonal.
        """
        rule, (left, right) = self._rules[place], self._positions(view)
        if source in self._exact:
            return np.zeros(np.broadcast_shapes(left.shape, right.shape))
        if rule.expression.has(sp.Sum) and source == rule.sources[0]:
            sums = prefix_sum(self.remainder(source) * self._size(source))
            averaged = self._evaluate(place, rule.expression, "mn", sums) / self._size(place)
            return averaged if view == "mn" else self._diagonal(averaged, view)
        found = self.remainder(source, view)
        return np.asarray(np.where(left == right, 0.0, found)) if rule.traits.normalised else found

    def excess(self, place: str, view: View = "mn") -> np.ndarray:
        """By how much E cos exceeds the cosine of the kernel, relatively, beyond 1/d."""
        if view != "mn":
            return np.zeros(())
        rule = self._rules[place]
        if rule.algorithm is not None:
            return np.asarray(self._algorithm(place).excess)
        return self._remembered(place, "excess", view, self._own_or_inherited)

    def _own_or_inherited(self, place: str, view: View) -> np.ndarray:
        """A norm spends the excess and a mean averages it away; a stream shares its branch's.

        The shares are those of the kernel's diagonal.
        """
        rule = self._rules[place]
        if rule.excess != 0:
            return self._evaluate(place, rule.excess, view)
        if rule.spends_excess:
            return np.zeros(())
        found = [self.excess(source) for source in rule.sources]
        if rule.carried == "shared" and any(np.any(part) for part in found):
            share = self._share(place, rule, view)
            found = [share * found[0], (1 - share) * found[1]]
        return np.asarray(sum(found, np.zeros(())))

    def _share(self, place: str, rule: Rule, view: View) -> np.ndarray:
        """The stream's part of sqrt(K_mm K_nn) of its sum with a branch."""
        stream = rule.sources[0]
        sides: tuple[View, View] = ("mm", "nn") if view == "mn" else (view, view)
        left, right = (self.kernel(stream, side) / self.kernel(place, side) for side in sides)
        return np.asarray(np.sqrt(left) * np.sqrt(right))

    # ------------------------------------------------------------------- evaluation

    def _remembered(
        self, place: str, what: str, view: View, compute: Callable[[str, View], np.ndarray]
    ) -> np.ndarray:
        memo = self._memo[place]
        if self._m is self._n:
            view = "mn"  # one position: the three are the same
        if (what, view) not in memo:
            memo[what, view] = compute(place, view)
        return memo[what, view]

    def _positions(self, view: View) -> Positions:
        return {"mn": (self._m, self._n), "mm": (self._m, self._m), "nn": (self._n, self._n)}[view]

    def _evaluate(
        self, place: str, expr: sp.Expr, view: View, sums: np.ndarray | None = None
    ) -> np.ndarray:
        function, arguments = _compiled(expr)
        sources, (left, right) = self._rules[place].sources, self._positions(view)
        values: dict[str, Any] = {
            **self._symbols[place],
            "p": self._rules[place].traits.maps,
            "m": left.astype(float),
            "n": right.astype(float),
            _SUM.name: sums,
        }
        for argument in arguments:
            head, _, at = argument.name.partition("_")
            if at not in ("mn", "mm", "nn"):
                continue
            inner: View = at if view == "mn" else view
            if head == "X":
                values[argument.name] = self.excess(sources[0], inner)
            elif head in "KJQ":
                values[argument.name] = self.kernel(sources["KJQ".index(head)], inner)
        result = function(*(values[argument.name] for argument in arguments))
        shape = np.broadcast_shapes(left.shape, right.shape)
        return np.broadcast_to(np.asarray(result, dtype=float), shape)


def at_pairs(found: Sequence[np.ndarray] | np.ndarray | float, positions: Positions) -> np.ndarray:
    """Entries of an all-pairs matrix at the asked positions."""
    left, right = np.broadcast_arrays(*positions)
    matrix = np.asarray(found)
    return matrix if matrix.ndim == 0 else matrix[left - 1, right - 1]
