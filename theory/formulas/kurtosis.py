"""Fourth moments at finite width: of coordinates behind a random matrix, and of logits.

Four entries of one column of W have, in units of their variance, the moment

    E w_i w_j w_k w_l = theta (three pairings of i, j, k, l) + (kappa_w - 3 theta) [all equal]:

theta = 1 for independent zero-mean entries of kurtosis kappa_w, and theta = n/(n + 2) =
kappa_w/3 for a Haar matrix of n = max(fan_in, fan_out), whose columns are uniform on a sphere.
Columns a and b of either kind have E (x w_a)^2 (x w_b)^2 = theta |x|^4, and a product of an odd
number of entries of one column is 0 beside them.  So the next fourth moment only sees two averages
over the d coordinates of x, in units of the mean square of one,

    T = (|x|^2/d)^2 and S = (1/d) sum over i of x_i^4,

of mean nu = E|x|^4/(E|x|^2)^2 (1 where the norm is fixed) and kappa_x, the kurtosis of a
coordinate.  Everything here is exact at every width.

>>> Map(d, theta_w, kappa_w).coordinate(sp.Integer(1), kappa_x)
3*theta_w + kappa_x*(kappa_w - 3*theta_w)/d
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import sympy as sp

from theory.formula import Formula, Status
from theory.symbols import (
    KURTOSIS,
    PAIR_MOMENT,
    d,
    d_h,
    kappa_b,
    kappa_w,
    kappa_x,
    m,
    nu_x,
    theta_w,
)

ONE = sp.Integer(1)


@dataclass(frozen=True)
class Map:
    """y = x W + b as fourth moments see it.

    `pair` and `kurtosis` are theta and kappa of the entries of W, which has `fan_in` rows;
    `share` is the part of a coordinate's variance that x W has, 1 without a bias of kurtosis
    kappa_b.
    """

    fan_in: sp.Expr
    pair: sp.Expr
    kurtosis: sp.Expr
    share: sp.Expr = ONE

    @property
    def peak(self) -> sp.Expr:
        """What multiplies S in the fourth moment of a coordinate of y, given x."""
        return self.share**2 * (self.kurtosis - 3 * self.pair) / self.fan_in

    def pairs(self, nu: sp.Expr) -> sp.Expr:
        """E y_a^2 y_b^2/(E y_a^2)^2 of two coordinates, nu the norm kurtosis of x."""
        return self.share**2 * self.pair * nu + 1 - self.share**2

    def body(self, nu: sp.Expr) -> sp.Expr:
        """A coordinate's kurtosis but for `peak`."""
        return 3 * self.pairs(nu) + (kappa_b - 3) * (1 - self.share) ** 2

    def coordinate(self, nu: sp.Expr, kurtosis: sp.Expr) -> sp.Expr:
        """The kurtosis of a coordinate of y, from the norm kurtosis and the kurtosis of x."""
        return self.body(nu) + self.peak * kurtosis

    def norm(self, nu: sp.Expr, kurtosis: sp.Expr, fan_out: sp.Expr) -> sp.Expr:
        """The norm kurtosis E|y|^4/(E|y|^2)^2 of `fan_out` coordinates."""
        return self.pairs(nu) * (1 - 1 / fan_out) + self.coordinate(nu, kurtosis) / fan_out


@dataclass(frozen=True)
class Square:
    """Means of T and S of one vector, and of the products TT, TS and SS."""

    nu: sp.Expr
    kurtosis: sp.Expr
    products: tuple[sp.Expr, sp.Expr, sp.Expr]

    def over(self, share: sp.Expr) -> sp.Matrix:
        """E (T, S)(T', S') of two vectors: with probability `share` one, else independent."""
        apart = sp.Matrix([self.nu, self.kurtosis])
        TT, TS, SS = self.products
        once = apart * apart.T
        return once + share * (sp.Matrix([[TT, TS], [TS, SS]]) - once)


@cache
def isotropic(n: sp.Expr, fixed_norm: bool) -> Square:
    """d coordinates of a vector that is isotropic in n = d dimensions, or in the n = d - 1 where
    they sum to 0: uniform on a sphere, or Gaussian.

    A Gaussian y of those dimensions has coordinates of variance a = n/d and covariance b, and
    (sum of y^4)^2 has d E y_i^8 + d (d - 1) E y_i^4 y_j^4 = 105 d a^4 + d (d - 1)(9 a^4 +
    72 a^2 b^2 + 24 b^4) as mean.  Its norm is independent of its direction.
    """
    a, b = n / d, (n - d) / d
    chi = n * (n + 2) * (n + 4) * (n + 6)
    eighth = 105 * d * a**4 + d * (d - 1) * (9 * a**4 + 72 * a**2 * b**2 + 24 * b**4)
    nu, square = (ONE, ONE) if fixed_norm else ((n + 2) / n, chi / n**4)
    kurtosis = 3 * n / (n + 2)
    products = (square, square * kurtosis, square * sp.factor(d**2 * eighth / chi))
    return Square(nu, sp.cancel(nu * kurtosis), products)


def mean_of(nu: sp.Expr, kurtosis: sp.Expr, n: sp.Expr) -> tuple[sp.Expr, sp.Expr]:
    """Norm kurtosis and kurtosis of the mean of m independent vectors isotropic in n dimensions.

    Of E <x_i, x_j><x_k, x_l>, equal pairs give m nu + m (m - 1), crossed ones 2 m (m - 1)/n.
    """
    return (nu + (m - 1) * (1 + 2 / n)) / m, 3 + (kurtosis - 3) / m


@cache
def logit_kurtosis(query: Map, key: Map, x: Square, same: sp.Expr) -> sp.Expr:
    """E l^4/(E l^2)^2 of l = <q, k>/sqrt(d_h), over the keys of a row.

    q and k come by independent matrices from two vectors like x, which with probability `same`
    are one.  Of E q_a q_b q_c q_d k_a k_b k_c k_d over the d_h^4 quadruples of a head's coordinates
    d_h are all equal and 3 d_h (d_h - 1) are two pairs; E l^2 is 1 + same (nu - 1).
    A bias is taken for one on a vector of fixed norm.
    """
    products = x.over(same)
    paired = query.pairs(ONE) * key.pairs(ONE) * products[0, 0]
    fourth = (_given(query).T * products * _given(key))[0]
    return (3 * (1 - 1 / d_h) * paired + fourth / d_h) / (1 + same * (x.nu - 1)) ** 2


def _given(by: Map) -> sp.Matrix:
    """The fourth moment of a coordinate of y given x, by T and S."""
    return sp.Matrix([by.body(ONE), by.peak])


def of_role(role: str, fan_in: sp.Expr, share: sp.Expr = ONE) -> Map:
    """The matrix of a role, in the symbols for its entries' moments."""
    return Map(fan_in, PAIR_MOMENT[role], KURTOSIS[role], share)


SOURCE = "derived here: fourth moments of i.i.d. or Haar columns given the input"

TOKENS = {
    "layernorm": (d - 1, True, "after a LayerNorm"),
    "rmsnorm": (d, True, "after an RMSNorm"),
    "tokens": (d, False, "without a norm"),
}
"""Dimensions of i.i.d. Gaussian tokens, whether their norm is fixed, and the words for it."""


def formulas() -> Iterator[Formula]:
    """Kurtoses behind weights of any kurtosis, independent or Haar."""
    yield Formula(
        "linear.coordinate_kurtosis",
        Map(d, theta_w, kappa_w).coordinate(nu_x, kappa_x),
        "Kurtosis of a coordinate of x W.  For independent zero-mean weights theta_w = 1, and "
        "what Gaussian weights give has (kappa_w - 3) kappa_x/d added; for Haar ones kappa_w = "
        "3 theta_w, and the shape of x drops out.",
        Status.EXACT,
        SOURCE,
        r"\mathbb{E}\,y_a^4/(\mathbb{E}\,y_a^2)^2",
    )
    yield Formula(
        "linear.norm_kurtosis",
        Map(d, theta_w, kappa_w).norm(nu_x, kappa_x, d),
        "E|y|^4/(E|y|^2)^2 of y = x W, W square: nu_x itself for a Haar matrix, which keeps norms.",
        Status.EXACT,
        SOURCE,
        r"\mathbb{E}|y|^4/(\mathbb{E}|y|^2)^2",
    )
    maps = of_role("query", d), of_role("key", d)
    for name, (n, fixed, words) in TOKENS.items():
        yield Formula(
            f"attention.logit_kurtosis_{name}",
            logit_kurtosis(*maps, isotropic(n, fixed), 1 / m),
            f"Kurtosis of the scaled logits of query m and its m keys, i.i.d. Gaussian tokens "
            f"{words}, weights of any kurtosis, i.i.d. or Haar: 3 + (kappa_q' kappa_k' - 3)/d_h "
            "in the kurtoses of queries' and keys' coordinates where the norm is fixed, weights "
            "are independent and n < m; the key of the query's own token adds its share 1/m.",
            Status.EXACT,
            SOURCE,
            r"\mathbb{E}\,l_{mn}^4/(\mathbb{E}\,l_{mn}^2)^2",
        )
        before = isotropic(n, fixed)
        mean = mean_of(before.nu, before.kurtosis, n)
        value = of_role("value", d)
        mixed = value.norm(*mean, d), value.coordinate(*mean)
        yield Formula(
            f"attention.uniform_kurtosis_{name}",
            of_role("output", d).coordinate(*mixed),
            f"Kurtosis of a coordinate of uniform attention's output at m, i.i.d. Gaussian tokens "
            f"{words}, weights of any kurtosis, i.i.d. or Haar.",
            Status.EXACT,
            SOURCE,
            r"\mathbb{E}\,o_{mj}^4/(\mathbb{E}\,o_{mj}^2)^2",
        )
