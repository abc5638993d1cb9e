"""References: what a formula is held against, and at which values of its symbols.

A formula in positions, widths and standard deviations stands for a better formula (`Better`), or
answers a question about an architecture (`Asked`).  A reference gives the best answer that is
known and its own remainder, at arrays of the symbols; what is not given is GPT-2 small's
(`DEFAULTS`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar, Protocol

import numpy as np

import nope
from nope.checks import expect
from nope.layers import AttentionKind
from nope.questions import OBSERVABLES, Question, Scale
from nope.tokens import GaussianTokens
from theory.formula import Formula
from theory.predict import predict

# ---------------------------------------------------------------------- values of symbols

LONGEST = 1024
"""The positions of a formula that is asked over none: 64 of 1..LONGEST, log-spaced."""

DEFAULTS: Mapping[str, Callable[..., Any]] = {
    "d": lambda: 768,
    "H": lambda d: np.gcd(12, d.astype(int)),
    "d_h": lambda d, H: d / H,
    "L": lambda: LONGEST,
    "ell": lambda: 12,
    "sigma": lambda: 0.02,
    "sigma_x": lambda: 0.02,
    "epsilon": lambda: 0.0,
    "s": lambda d, sigma: d * sigma**2,
    "g": lambda s: s**2,
    "kappa": lambda g, sigma_x: g / sigma_x**2,
    "n": lambda m: np.maximum(m - 1, 1),
    "V": lambda: 50257,
    "p_2": lambda V: 1 / V,
    "p_3": lambda p_2: p_2**2,
    "M_jj": lambda d, sigma: np.sqrt(d) * sigma**2,
    "M_j2": lambda d, sigma: d**2 * sigma**4,
}
"""What a symbol is where it is not given, as a function of others: GPT-2 small's sizes, one sigma
for all weights; n the neighbour of m; uniform tokens; of M = W_O W_V a standard deviation of M_jj
and the mean of M_j2."""


def sigma_of_logits(s: np.ndarray, d: np.ndarray) -> np.ndarray:
    """The sigma of logits of standard deviation s, where that is given instead."""
    return np.asarray(np.sqrt(s / d))


def _defaults(given: Iterable[str]) -> Mapping[str, Callable[..., Any]]:
    return {**DEFAULTS, "sigma": sigma_of_logits} if "s" in given else DEFAULTS


def needed(names: Iterable[str], given: Iterable[str] = ()) -> set[str]:
    """The names, and those that the defaults of what is not given are computed from."""
    defaults, found, queue = _defaults(given), set[str](), list(names)
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            if name in defaults and name not in given:
                queue += signature(defaults[name]).parameters
    return found


class Values(dict[str, np.ndarray]):
    """Arrays that broadcast, by symbol; what is missing is its default."""

    def __missing__(self, name: str) -> np.ndarray:
        default = _defaults(self.given)[name]
        read = {other: self[other] for other in signature(default).parameters}
        self[name] = np.asarray(default(**read), dtype=float)
        return self[name]

    def __init__(self, given: Mapping[str, np.ndarray]) -> None:
        super().__init__(given)
        self.given = tuple(given)

    def of(self, asked: Formula) -> dict[str, np.ndarray]:
        """What to call a formula with."""
        return {name: self[name] for name in asked.symbols}


# ----------------------------------------------------------------------------- references


class Reference(Protocol):
    """What a formula is held against: `Asked` and `Better` are built.

    `symbols` are the names that it reads, `fixed` those that it computes from them by itself,
    so that they cannot be given; `scale` is what a tolerance multiplies.
    """

    fixed: ClassVar[frozenset[str]]

    @property
    def symbols(self) -> frozenset[str]: ...
    @property
    def scale(self) -> Scale: ...
    @property
    def words(self) -> str: ...
    def best(self, values: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
        """The best answer and its remainder, on arrays that broadcast."""


@dataclass(frozen=True)
class Better:
    """A formula of higher fidelity in the same meaning.

    A formula is held against itself where nothing better is known: right where it is exact,
    else to within its own remainder.
    """

    formula: Formula
    scale: Scale = "relative"
    fixed: ClassVar[frozenset[str]] = frozenset()

    @property
    def symbols(self) -> frozenset[str]:
        return frozenset(self.formula.symbols)

    @property
    def words(self) -> str:
        return f"{self.formula.name} ({str(self.formula.status).replace('_', ' ')})"

    def best(self, values: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
        known = {name: values[name] for name in self.formula.symbols}
        return self.formula(**known), self.formula.remainder_at(**known)


@dataclass(frozen=True)
class _AtPositions(Question):
    """A question whose pairs are of positions of one's own."""

    chosen: tuple[int, ...] = ()

    @property
    def grid(self) -> np.ndarray:
        return np.array(self.chosen)


@dataclass(frozen=True)
class Asked:
    """`theory.predict` at its best, for an observable at a place of a decoder.

    Pre-LN blocks as deep as the place says, of width d with H heads, all weights N(0, sigma^2),
    tokens N(0, sigma_x^2), `epsilon` under the norms' roots.  One question for each of these
    sizes answers all positions.  Raises `ValueError` for an observable whose answer is not by
    position, pair or as a whole.
    """

    place: str
    observable: str
    attention: AttentionKind = "softmax"
    fixed: ClassVar[frozenset[str]] = frozenset({"g", "kappa", "d_h"})
    sizes: ClassVar[tuple[str, ...]] = ("d", "H", "sigma", "sigma_x", "epsilon")
    positions: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "positions": ("m",),
        "adjacent": ("m",),
        "pairs": ("m", "n"),
        "distinct_pairs": ("m", "n"),
        "whole": ("L",),
    }

    def __post_init__(self) -> None:
        known = [kind.name for kind in OBSERVABLES.values() if kind.shape in self.positions]
        expect(self.observable in known, f"one of {', '.join(known)}", self.observable, "change it")

    @property
    def scale(self) -> Scale:
        return OBSERVABLES[self.observable].scale

    @property
    def words(self) -> str:
        return f"the best prediction of {self.observable} at {self.place} ({self.attention})"

    @property
    def symbols(self) -> frozenset[str]:
        return frozenset(self.sizes + self._positions)

    @property
    def _positions(self) -> tuple[str, ...]:
        return self.positions[OBSERVABLES[self.observable].shape]

    def best(self, values: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
        """Answers to one question per point of the sizes."""
        names = self.sizes + self._positions
        columns = np.broadcast_arrays(*(values[name] for name in names))
        flat = np.stack([column.ravel() for column in columns])
        points, group = np.unique(flat[: len(self.sizes)], axis=1, return_inverse=True)
        found = np.empty((2, flat.shape[1]))
        for index, point in enumerate(points.T):
            rows = group.ravel() == index
            found[:, rows] = self._answers(point, flat[len(self.sizes) :, rows].astype(int))
        best, remainder = found.reshape(2, *columns[0].shape)
        return best, remainder

    def _answers(self, sizes: np.ndarray, where: np.ndarray) -> np.ndarray:
        """Values and remainders at columns of positions, for one point of the sizes."""
        if self._positions == ("L",):
            lengths, of = np.unique(where[0], return_inverse=True)
            whole = [predict(self.question(sizes, int(length), (1,))) for length in lengths]
            return np.array([[p.values[0], p.remainder[0]] for p in whole]).T[:, of]
        chosen = np.unique(where)
        reach = int(chosen[-1]) + (OBSERVABLES[self.observable].shape == "adjacent")
        prediction = predict(self.question(sizes, reach, tuple(chosen.tolist())))
        at = where - 1 if len(where) == 1 else np.searchsorted(chosen, where)
        return np.stack([prediction.values[tuple(at)], prediction.remainder[tuple(at)]])

    def question(self, sizes: Iterable[float], n_ctx: int, chosen: tuple[int, ...]) -> Question:
        """The question at values of `sizes`, pairs asked at the chosen positions."""
        width, heads, std, token_std, eps = (float(size) for size in sizes)
        block = re.match(r"blocks\.(\d+)\.", self.place)
        architecture = nope.decoder(
            int(width),
            int(heads),
            int(block[1]) + 1 if block else 1,
            n_ctx=max(n_ctx, OBSERVABLES[self.observable].least),
            attention=self.attention,
            tokens=GaussianTokens(token_std),
            eps=eps,
        )
        init = nope.init.normal(std)
        return _AtPositions(architecture, init, self.place, self.observable, chosen=chosen)
