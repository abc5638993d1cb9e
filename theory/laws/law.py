"""What a law is: a distribution in numbers, its density in symbols, and how true it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sympy as sp

from theory.formula import Status
from theory.laws.variance import NEGLIGIBLE


@dataclass(frozen=True, eq=False)
class Family:
    """A distribution, whatever it is the law of.

    `numbers` is a distribution of SciPy.  `density` is in x and the symbols of `parameters`,
    which holds their values, or None with the `reason`; `moments` maps an order to E x^order
    where that has a closed form; `atoms` maps a point to its probability, which is in the CDF
    and the moments but not in the density.
    """

    name: str
    numbers: Any
    density: sp.Expr | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    moments: Mapping[int, sp.Expr] = field(default_factory=dict)
    atoms: Mapping[float, float] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Law:
    """The law of one coordinate, or one logit, at a place and a position m.

    Over weights and inputs together.  `remainder` estimates the largest distance between this
    CDF and the true one, 0 where the law is exact; `source` says where it is from.  The methods
    are those of `scipy.stats`, and `family.numbers` has the rest of them.
    """

    place: str
    position: int
    family: Family
    remainder: float
    source: str

    @property
    def name(self) -> str:
        return self.family.name

    @property
    def status(self) -> Status:
        return Status.EXACT if self.remainder <= NEGLIGIBLE else Status.LEADING_ORDER

    @property
    def density(self) -> sp.Expr | None:
        """f(x) in symbols; None where there is no closed form, for `reason`."""
        return self.family.density

    @property
    def reason(self) -> str:
        return self.family.reason

    @property
    def parameters(self) -> Mapping[str, float]:
        """The values of the density's symbols."""
        return self.family.parameters

    @property
    def moments(self) -> Mapping[int, sp.Expr]:
        """E x^k in symbols, by k, where there is a closed form."""
        return self.family.moments

    @property
    def atoms(self) -> Mapping[float, float]:
        """Points of positive probability."""
        return self.family.atoms

    def pdf(self, x: Any) -> Any:
        """The density beside the atoms."""
        if isinstance(self.density, sp.Integer):
            return np.zeros(np.shape(x))[()]
        return self.family.numbers.pdf(x)

    def cdf(self, x: Any) -> Any:
        """P(X <= x)."""
        return self.family.numbers.cdf(x)

    def sf(self, x: Any) -> Any:
        """P(X > x)."""
        return self.family.numbers.sf(x)

    def ppf(self, q: Any) -> Any:
        """The quantile: the smallest x with cdf(x) >= q."""
        return self.family.numbers.ppf(q)

    def isf(self, q: Any) -> Any:
        """The quantile of the upper tail."""
        return self.family.numbers.isf(q)

    def moment(self, order: int) -> float:
        """E x^order."""
        return float(self.family.numbers.moment(order))

    def mean(self) -> float:
        return float(self.family.numbers.mean())

    def var(self) -> float:
        return float(self.family.numbers.var())

    def std(self) -> float:
        return float(self.family.numbers.std())

    @property
    def kurtosis(self) -> float:
        """E x^4/(E x^2)^2, as the observable: not the excess."""
        return self.moment(4) / self.moment(2) ** 2

    def rvs(self, size: Any = None, random_state: Any = None) -> Any:
        """Independent draws."""
        return self.family.numbers.rvs(size=size, random_state=random_state)
