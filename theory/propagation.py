"""Numbers for the kernels of an architecture, from the rules that derive them.

Two ways, one source.  Where every kernel is known pointwise (no sum over prefixes without a
closed form) only the asked pairs of positions are computed, at any n_ctx.  Otherwise the
kernels of all pairs are carried forward, operation by operation, and each is dropped after its
last use: n_ctx^2 numbers per live place, cost linear in depth.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import cache, cached_property, partial
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import sympy as sp
from sympy.core.function import AppliedUndef

from nope.questions import position_grid
from theory.fluctuations import (
    Fluctuation,
    Gram,
    Passage,
    Second,
    correlation_shift,
    correlation_shift_error,
    correlation_width,
)
from theory.formula import compile_number_form
from theory.kernel import PREFIX_SUM, J, K, Moved, Q, Rule, X
from theory.symbols import m, n

View = Literal["mn", "mm", "nn"]
VIEWS = get_args(View)
Positions = tuple[np.ndarray, np.ndarray]

_ARGUMENTS = {
    function(*at): sp.Symbol(f"{function.__name__}_{view}")
    for function in (K, J, Q, X)
    for view, at in {"mn": (m, n), "mm": (m, m), "nn": (n, n)}.items()
}
_SUM = sp.Symbol("prefix_sum")

ROUNDING = 1e-12
"""Of slopes, by central differences: an exact norm's in the variance are less, and 0."""

LEFT = 0.5
"""The part of a second-order term that is stated as its error, besides the fluctuation itself."""

ROWS = 32
"""Rows of a block of pairs: the steps of a long expression stay in the processor's cache."""

LEAST_SLACK = 1e-5
"""Less changes no logit's moments by more than that part of 1/d."""

GRID = 32
"""Positions at most that fluctuations are followed at: smooth in log m beside the kernel."""
NEARLY = 1e-12
"""Of 1 - rho^2: less is rounding."""


@cache
def compiled(expr: sp.Expr) -> tuple[Callable[..., Any], tuple[sp.Symbol, ...]]:
    """The number form of a rule: kernels become arguments, the prefix sum becomes another.

    Raises `NotImplementedError` for an expression that reads kernels in another way.
    """
    flat = expr.xreplace({PREFIX_SUM: _SUM, **_ARGUMENTS})
    left = [each for each in flat.atoms(AppliedUndef) if each.func in (K, J, Q, X)]
    if left:
        raise NotImplementedError(
            "expected a rule in K, J and Q at (m, n), (m, m) and (n, n), or in PREFIX_SUM, got "
            f"{left[0]}; give the rule an `algorithm`"
        )
    arguments = tuple(sorted(flat.free_symbols, key=str))
    return compile_number_form(flat, arguments), arguments


def blocks(n_ctx: int) -> Iterator[slice]:
    """Rows by rows, `ROWS` at a time."""
    return (slice(start, min(start + ROWS, n_ctx)) for start in range(0, n_ctx, ROWS))


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
        self._fluctuations: dict[str, tuple[Fluctuation, Second | None]] = {}

    def advance(self, keep: Container[str]) -> None:
        """Compute every place in order and drop each after its last use, but for `keep`."""
        last = {name: place for place, rule in self._rules.items() for name in self._reads(rule)}
        for place, rule in self._rules.items():
            self.kernel(place, "mm"), self.kernel(place, "nn")
            self.remainder(place), self.excess(place), self._passed(place)
            for name in {place, *self._reads(rule)}:
                if last.get(name, place) == place and name not in keep:
                    self._memo[name].clear()
                    self._moved.pop(name, None)
                    self._fluctuations.pop(name, None)

    @staticmethod
    def _reads(rule: Rule) -> tuple[str, ...]:
        return rule.sources

    # --------------------------------------------------------------------- kernels

    def kernel(self, place: str, view: View = "mn") -> np.ndarray:
        """K(m, n), K(m, m) or K(n, n) at a place."""
        return self._remembered(place, "kernel", view, self._kernel)

    def _kernel(self, place: str, view: View) -> np.ndarray:
        if view != "mn" and self._all_pairs:
            return self._diagonal(self.kernel(place), view)
        leading = self._leading(place, view)
        second = None if place in self._exact else self._passed(place)[1]
        return leading if second is None else leading + self._everywhere(second.term, leading, view)

    def _leading(self, place: str, view: View) -> np.ndarray:
        return self._remembered(place, "leading", view, self._without_second_order)

    def _without_second_order(self, place: str, view: View) -> np.ndarray:
        rule = self._rules[place]
        if view != "mn" and self._all_pairs:
            return self._diagonal(self._leading(place, "mn"), view)
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
            dropped = self._dropped(rule.sources[0]) if rule.sources else np.zeros(())
            maps = self._maps(rule)
            known = {**self._symbols[place], "p": maps, "slack": self._slack(rule, maps - 1)}
            self._moved[place] = rule.algorithm(kernels, dropped, known, self._n_ctx)
        return self._moved[place]

    def _dropped(self, place: str) -> np.ndarray:
        """The absolute remainder."""
        return np.asarray(self.remainder(place) * self._size(place))

    def _size(self, place: str, view: View = "mn") -> np.ndarray:
        if view != "mn":
            return self.kernel(place, view)
        return np.asarray(np.sqrt(self.kernel(place, "mm")) * np.sqrt(self.kernel(place, "nn")))

    # ------------------------------------------------------------ remainders, excesses

    def remainder(self, place: str, view: View = "mn") -> np.ndarray:
        """The estimated relative error of `kernel`, in units of sqrt(K_mm K_nn)."""
        return self._remembered(place, "remainder", view, self._remainder)

    def _remainder(self, place: str, view: View) -> np.ndarray:
        rule = self._rules[place]
        if view != "mn" and self._all_pairs:
            return self._diagonal(self.remainder(place), view)
        if rule.algorithm is not None:
            return self._algorithm(place).remainder
        if second := self._passed(place)[1]:
            passed = zip(rule.sources, second.slopes, strict=True)
            carried = [self._sloped(source, slopes, view) for source, slopes in passed]
        else:
            carried = [self._carried(place, source, view) for source in rule.sources]
        if rule.carried == "shared":
            carried = [_mean(self._share(place, rule, view), *carried)]
        if carried and rule.remainder == 0:
            return np.asarray(sum(carried[1:], carried[0]))
        return np.asarray(sum(carried, np.abs(self._own_remainder(place, rule, view))))

    def _sloped(self, source: str, slopes: np.ndarray, view: View) -> np.ndarray:
        """What a source's remainders come to in a function of each pair's three entries.

        On the diagonal that of the variance alone, off it also those of both variances
        (`of_variance`, `of_product`).
        """
        if view != "mn":
            alone = slopes[0, 0] if view == "mm" else slopes[1, 1]
            own = self._sourced(source, view)
            return of_variance(alone[tuple(map(slice, own.shape))], own)
        errors = [self._sourced(source, each) for each in ("mm", "nn", "mn")]
        left, right = (of_variance(self._smooth(slopes[k, k]), errors[k]) for k in (0, 1))
        found = of_product([self._smooth(each) for each in slopes[2]], errors, (left + right) / 2)
        return np.where(np.equal(*self._positions("mn")), left, found)

    def _sourced(self, source: str, view: View) -> np.ndarray:
        """The remainder of a source, which may be exact."""
        if source not in self._exact:
            return self.remainder(source, view)
        return np.zeros(np.broadcast_shapes(*(each.shape for each in self._positions(view))))

    def _own_remainder(self, place: str, rule: Rule, view: View) -> np.ndarray:
        """Of the rule itself, or what is left of its second order once that is added."""
        second = self._passed(place)[1]
        if second is None:
            return self._evaluate(place, rule.remainder, view)
        doubt, size = self._doubt(rule.sources[0]), second.size
        leading = self._gram(place, self._leading)
        across = np.minimum(size.mn * doubt, 2 * leading.size)  # no cosine is further off
        left = Gram(size.mm * doubt, size.nn * doubt, across)
        found = self._everywhere(left, self._leading(place, "mn"), view)
        return np.asarray(found / self._size(place, view))

    def _carried(self, place: str, source: str, view: View) -> np.ndarray:
        """What a place inherits of its source's remainder; a prefix mean averages it too."""
        rule = self._rules[place]
        if source in self._exact or not rule.expression.has(sp.Sum) or source != rule.sources[0]:
            return self._sourced(source, view)
        sums = prefix_sum(self._dropped(source))
        return np.asarray(self._evaluate(place, rule.expression, "mn", sums) / self._size(place))

    def excess(self, place: str, view: View = "mn") -> np.ndarray:
        """By how much E cos exceeds the cosine of the kernel, relatively, beyond 1/d."""
        if view != "mn":
            return np.zeros(())
        return self._remembered(place, "excess", view, self._own_or_inherited)

    def _own_excess(self, place: str) -> np.ndarray:
        """What the operation itself brings."""
        rule = self._rules[place]
        if rule.algorithm is not None:
            return np.asarray(self._algorithm(place).excess)
        return self._evaluate(place, rule.excess, "mn") if rule.excess != 0 else np.zeros(())

    def _own_or_inherited(self, place: str, view: View) -> np.ndarray:
        """A norm spends the excess and a mean averages it away; a stream shares its branch's.

        The shares are those of the kernel's diagonal.
        """
        rule = self._rules[place]
        if rule.excess != 0 or rule.algorithm is not None:
            return self._own_excess(place)
        if rule.spends_excess or not rule.sources:
            return np.zeros(())
        found = [self.excess(source) for source in rule.sources]
        if rule.carried == "shared" and any(np.any(part) for part in found):
            return _mean(self._share(place, rule, view), *found)
        return np.asarray(sum(found[1:], found[0]))

    def _share(self, place: str, rule: Rule, view: View) -> np.ndarray:
        """The stream's part of sqrt(K_mm K_nn) of its sum with a branch."""
        stream = rule.sources[0]
        sides: tuple[View, View] = ("mm", "nn") if view == "mn" else (view, view)
        left, right = (self.kernel(stream, side) / self.kernel(place, side) for side in sides)
        return np.asarray(np.sqrt(left) * np.sqrt(right))

    # ----------------------------------------------------------------- fluctuations

    def _maps(self, rule: Rule) -> float:
        """The number of random maps of width d whose fluctuation the first source has.

        One of its own, and as many as the correlations of its input fluctuate like, on average.
        """
        if not rule.sources or self._n_ctx == 1:
            return 1.0
        source = rule.sources[0]
        if self._rules[source].traits.repeated:
            return float(self._rules[source].traits.maps)  # the ids are treated as given
        rho = self._gram(source, self.kernel).correlation
        width = correlation_width(self._passed(source)[0].inherited, rho)
        apart = np.not_equal(*self._grid_positions)
        return 1.0 + self._symbols[source]["d"] * float(np.mean(width[apart]))

    def _slack(self, rule: Rule, maps: float) -> float:
        """Half the relative variance of the first source's norms, before its own map, in units of
        maps/d: that of their correlations if coordinates were i.i.d. Gaussian."""
        if not rule.sources or self._n_ctx == 1:
            return 0.0
        source = rule.sources[0]
        norms = self._passed(source)[0].inherited
        variance = float(np.mean(norms[0, 0] + norms[1, 1])) / 4
        slack = min(variance * self._symbols[source]["d"] / maps, 1.0) if maps > 0 else 0.0
        return slack if slack > LEAST_SLACK else 0.0

    def drift(self, place: str) -> tuple[np.ndarray, np.ndarray]:
        """E cos - rho to second order, and what is left of it: of the fluctuation at a place."""
        gram = self._gram(place, self.kernel)
        rho = gram.correlation
        covariance = self._passed(place)[0].covariance
        shift = correlation_shift(covariance, rho)
        left = np.abs(shift) * self._doubt(place) + correlation_shift_error(covariance, rho)
        nothing, leading = np.zeros_like(shift), self.kernel(place)
        one, other = (
            self._everywhere(Gram(nothing, nothing, x * gram.size), leading, "mn")
            / self._size(place)
            for x in (shift, left)
        )
        return one, other

    def common(self, place: str) -> np.ndarray:
        """The covariance of G_mm and G_nn at all pairs, over their means, of a map's input."""
        return self._smooth(self._passed(place)[0].inherited[0, 1])

    def _doubt(self, place: str) -> np.ndarray:
        """The relative error of a second-order term: `LEFT`, and the fluctuation itself."""
        rho = self._gram(place, self.kernel).correlation
        width = correlation_width(self._passed(place)[0].covariance, rho)
        return LEFT + (_continued(width) if self._all_pairs and len(width) > 1 else width)

    def _passed(self, place: str) -> tuple[Fluctuation, Second | None]:
        """The fluctuation at a place, and the second order of its kernel."""
        if place not in self._fluctuations:
            rule = self._rules[place]
            passage = Passage(
                tuple(self._gram(source, self.kernel) for source in rule.sources),
                tuple(self._passed(source)[0] for source in rule.sources),
                self._gram(place, self._leading),
                partial(self._of_pair, place),
                self._grid_positions,
                self._symbols[place],
                self._on_grid(self._own_excess(place)),
            )
            self._fluctuations[place] = rule.fluctuates(passage)
        return self._fluctuations[place]

    def _gram(self, place: str, values: Callable[[str, View], np.ndarray]) -> Gram:
        mm, nn, mn = (self._on_grid(values(place, view)) for view in ("mm", "nn", "mn"))
        return Gram(mm, nn, mn)

    @cached_property
    def _grid(self) -> np.ndarray:
        """The positions that fluctuations are followed at, where all pairs are."""
        return position_grid(self._n_ctx, GRID)

    @cached_property
    def _grid_positions(self) -> Positions:
        chosen = (self._grid[:, None], self._grid) if self._all_pairs else (self._m, self._n)
        left, right = np.broadcast_arrays(*chosen)
        return left.astype(float), right.astype(float)

    def _on_grid(self, values: np.ndarray) -> np.ndarray:
        whole = np.broadcast_to(values, np.broadcast_shapes(self._m.shape, self._n.shape))
        return whole[np.ix_(self._grid - 1, self._grid - 1)] if self._all_pairs else whole

    def _of_pair(self, place: str, mm: np.ndarray, nn: np.ndarray, mn: np.ndarray) -> np.ndarray:
        """A rule's expression at other values of its source's kernel."""
        function, arguments = compiled(self._rules[place].expression)
        known = {**self._symbols[place], "K_mm": mm, "K_nn": nn, "K_mn": mn}
        known["X_mn"] = self._on_grid(self.excess(self._rules[place].sources[0]))
        return np.asarray(function(*(known[argument.name] for argument in arguments)))

    def _smooth(self, found: np.ndarray) -> np.ndarray:
        """The same at the asked positions, interpolated between those of the grid in log m."""
        if not self._all_pairs or len(self._grid) == self._n_ctx:
            return found
        return np.asarray(self._weights @ found @ self._weights.T)

    @cached_property
    def _weights(self) -> np.ndarray:
        """Of the grid's positions in each position."""
        every = np.log(np.arange(1, self._n_ctx + 1))
        return np.array(
            [np.interp(every, np.log(self._grid), row) for row in np.eye(len(self._grid))]
        ).T

    def _everywhere(self, found: Gram, leading: np.ndarray, view: View) -> np.ndarray:
        """A second-order term at the asked positions.

        Between those of the grid what it is on the diagonal is interpolated, and what it has
        beyond, in units of 1 - rho^2; in log m, rho of the leading order.
        """
        left, right = self._positions(view)
        if not self._all_pairs:
            if view == "mn":
                return np.where(left == right, found.mm, found.mn)
            alone = found.mm if view == "mm" else found.nn
            return alone[tuple(map(slice, left.shape))]  # the same at every other position
        same = np.equal.outer(self._grid, self._grid)
        if len(self._grid) == self._n_ctx:
            return np.where(same, found.mm, found.mn)
        return _interpolated(found, leading, self._grid, self._weights)

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
        function, arguments = compiled(expr)
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
            if at not in VIEWS:
                continue
            inner: View = at if view == "mn" else view
            if head == "X":
                values[argument.name] = self.excess(sources[0], inner)
            elif head in "KJQ":
                values[argument.name] = self.kernel(sources["KJQ".index(head)], inner)
        result = function(*(values[argument.name] for argument in arguments))
        shape = np.broadcast_shapes(left.shape, right.shape)
        return np.broadcast_to(np.asarray(result, dtype=float), shape)


def of_variance(slope: np.ndarray, error: np.ndarray) -> np.ndarray:
    """The relative error of f(v), positive, from that of v and from the slope of ln f in ln v.

    Above v as a power of it, (1 + r)^a - 1; below as v/(v + eps), a r/(1 - r + a r), which is 1
    where v may be 0.
    """
    slope = np.where(slope > ROUNDING, slope, 0.0)
    least = np.minimum(error, 1.0)
    left = 1 - least + slope * least
    below = np.divide(slope * least, left, out=np.zeros_like(left), where=left > 0)
    return np.asarray(np.maximum(below, (1 + error) ** slope - 1))


def of_product(
    slopes: Sequence[np.ndarray], errors: Sequence[np.ndarray], of_norms: np.ndarray
) -> np.ndarray:
    """The error of an inner product's function, in units of the two norms.

    `slopes` and relative `errors` are those of both squared norms and of the product.  The error
    of a cosine is that of the product and |rho|/2 of each squared norm's, over the least that the
    norms may be; two vectors differ by no more than 2, of norms off by `of_norms`.
    """
    *norms, product = errors
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # 0 times infinity
        left, right = (-np.log1p(-np.minimum(each, 1.0)) for each in norms)
        linear = slopes[0] * left + slopes[1] * right + slopes[2] * product
        return np.asarray(np.fmin(linear * np.exp((left + right) / 2), 2 + of_norms))


def _mean(share: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """share one + (1 - share) other."""
    found = share * (one - other)
    return np.asarray(np.add(found, other, out=found))


def _with_diagonal(matrix: np.ndarray, values: np.ndarray | float) -> np.ndarray:
    """The matrix, which is changed."""
    np.fill_diagonal(matrix, values)
    return matrix


def _continued(matrix: np.ndarray) -> np.ndarray:
    """With the diagonal, where a ratio is 0/0, from the entries beside it."""
    near = np.diagonal(matrix, 1)
    mean = (np.append(near, near[-1]) + np.insert(near, 0, near[0])) / 2
    return _with_diagonal(np.array(matrix), mean)


def _interpolated(
    found: Gram, leading: np.ndarray, grid: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """All pairs from those of a grid: see `KernelValues._everywhere`."""
    root = np.sqrt(np.diagonal(leading))
    at, chosen = np.ix_(grid - 1, grid - 1), root[grid - 1]
    alone = np.diagonal(found.mm) / chosen**2
    beyond = found.mn - leading[at] * np.add.outer(alone, alone) / 2
    size = np.multiply.outer(chosen, chosen)
    open_ = _open(size, leading[at])
    apart = open_ > NEARLY * size  # vectors that are one have nothing beyond
    ratio = np.divide(beyond, open_, out=np.zeros_like(open_), where=apart)
    across, smooth = _continued(ratio) @ weights.T, weights @ alone
    whole = np.empty_like(leading)
    for rows in blocks(len(leading)):
        beside = _open(np.multiply.outer(root[rows], root), leading[rows])
        np.matmul(weights[rows], across, out=whole[rows])
        whole[rows] *= beside
        if alone.any():
            whole[rows] += leading[rows] * np.add.outer(smooth[rows], smooth) / 2
    return whole


def _open(size: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """size (1 - rho^2)."""
    beside = inner**2
    beside /= size
    return np.asarray(np.subtract(size, beside, out=beside))


def at_pairs(found: Sequence[np.ndarray] | np.ndarray | float, positions: Positions) -> np.ndarray:
    """Entries of an all-pairs matrix at the asked positions."""
    left, right = np.broadcast_arrays(*positions)
    matrix = np.asarray(found)
    return matrix if matrix.ndim == 0 else matrix[left - 1, right - 1]
