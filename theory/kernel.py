"""The position kernel K(m, n) = E <x_m, x_n> / d and the form of a rule that propagates it.

A rule is one SymPy expression in the kernels of the places an operation reads: `K` for the
first, `J` for the second, `Q` for the third.  Substituting symbolic kernels gives the derivation
(`theory.derivation`), substituting arrays gives numbers (`theory.propagation`): one source for
both.  Where that would cost n_ctx^4 the rule brings an algorithm, and a test holds it against
the expression.

At a place of pairs (scores, pattern) the "kernel" is the second moment of the entry (m, n).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np
import sympy as sp

from nope.tokens import Tokens
from theory.fluctuations import Passing, averages
from theory.formulas.kurtosis import Map
from theory.symbols import i, j, m, n

K, J, Q = sp.Function("K"), sp.Function("J"), sp.Function("Q")
X = sp.Function("X")
"""The excess of a place: E cos / (cosine of the mean kernel) - 1, beyond what 1/d explains."""
PREFIX_SUM = sp.Sum(K(i, j), (i, 1, m), (j, 1, n))
ZERO, ONE = sp.Integer(0), sp.Integer(1)


@dataclass(frozen=True)
class Traits:
    """What a rule knows of a place besides its kernel.

    `maps` counts the independent random maps that made it (tokens included), each of which adds
    at most 1/d to a relative fluctuation: a bound, and `theory.fluctuations` has the numbers.
    `normalised`: |x|^2 = d exactly.  `slack`: the part that a norm leaves of the relative
    variance of |x|^2, as a function of the place's own K(m, m): 0 behind an exact one, 1 without;
    of a matrix's result that of its input.  `independent`: positions are, given the weights, and of
    zero mean.  `repeated`: the tokens of which equal ones are equal vectors here, distinct ones
    independent given the ids.  `centred`: a LayerNorm took one dimension; `partly_centred`: from
    one part of a sum.
    `fresh`: odd in weights that nothing before it reads, and so uncorrelated with all of that.
    `isotropic`: coordinates i.i.d. Gaussian.  `kurtosis` of a coordinate and `norm_kurtosis`
    E|x|^4/(E|x|^2)^2 are exact at every position m, or None where no closed form is known; one
    that holds for some weights only is in symbols of `theory.symbols.UNKNOWN`, which cancel for
    those.  `mapped` is the matrix that made the place and the place it was applied to.  `logits`
    names the scores behind a softmax pattern, `query_key` the places behind those.
    """

    maps: int = 0
    normalised: bool = False
    slack: sp.Expr = ONE
    independent: bool = False
    repeated: Tokens | None = None
    centred: bool = False
    partly_centred: bool = False
    fresh: bool = False
    isotropic: bool = False
    kurtosis: sp.Expr | None = None
    norm_kurtosis: sp.Expr | None = None
    mapped: tuple[Map, str] | None = None
    logits: str | None = None
    query_key: tuple[str, str] | None = None


@dataclass(frozen=True, eq=False)
class Moved:
    """What an algorithm returns, at all pairs of positions.

    `remainder` is relative to sqrt(K_mm K_nn) of the result, those of the sources included;
    `excess` is that of E cos over the cosine of the kernel (see `X`).
    """

    kernel: np.ndarray
    remainder: np.ndarray
    excess: np.ndarray | float = 0.0


Fidelity = Literal["uniform", "first_order", "any_temperature"]
"""How a softmax is treated."""

Algorithm = Callable[[Sequence[np.ndarray], np.ndarray, Mapping[str, float], int], Moved]
"""From the kernels of a rule's sources, the absolute remainder of the first, the values of the
symbols and n_ctx."""


@dataclass(frozen=True)
class Rule:
    """How one operation turns kernels into a kernel.

    `expression` is in K (and J, Q), m and n; `sources` names the places they stand for;
    `remainder` estimates what the rule drops, relative to sqrt(K_mm K_nn) of its result, and
    is 0 where it is exact; `carried` says whether remainders of the sources add up or are
    shared by the parts of the sources in the result.  `algorithm` computes the expression where
    compiling it would cost too much.  `excess` is what the operation itself brings of `X`.
    `fluctuates` says how the empirical kernel's fluctuation passes, and what it adds to the
    kernel to second order: a rule that has one states there, in numbers, what is left.
    """

    name: str
    statement: str
    sources: tuple[str, ...]
    expression: sp.Expr
    assumption: str
    source: str
    traits: Traits
    remainder: sp.Expr = field(default_factory=lambda: ZERO)
    carried: Literal["sum", "shared"] = "sum"
    algorithm: Algorithm | None = None
    excess: sp.Expr = field(default_factory=lambda: ZERO)
    fluctuates: Passing = averages

    @property
    def spends_excess(self) -> bool:
        """Whether the excess of the sources is used up here: by a norm, or by an average."""
        return self.traits.normalised or bool(self.expression.has(X, sp.Sum))

    def apply(self, kernels: list[sp.Expr]) -> sp.Expr:
        """The expression with symbolic kernels in place of K, J and Q, nothing simplified."""
        return _put(self.expression, tuple(kernels))


@lru_cache(maxsize=4096)
def _put(expression: sp.Expr, kernels: tuple[sp.Expr, ...]) -> sp.Expr:
    """Symbolic kernels in place of K, J and Q; the layers of many architectures are the same."""
    for function, kernel in zip((K, J, Q), kernels, strict=False):
        expression = expression.replace(function, _at(kernel))
    return expression


def _at(kernel: sp.Expr) -> Callable[[sp.Expr, sp.Expr], sp.Expr]:
    return lambda left, right: kernel.subs({m: left, n: right}, simultaneous=True)
