"""Depth: stacks of uniform causal attention, where one layer is the Cesaro matrix C.

C_mn = 1/m for n <= m, so row m of C^ell is the law of a walk that starts at m and moves ell
times to a uniform position among 1..where it is.  Two facts give everything here.

C = P diag(1, 1/2, 1/3, ...) P with P_mj = (-1)^(j-1) binom(m-1, j-1), its own inverse
(Hausdorff 1921).  So f(C) is an alternating sum over the eigenvalues f(1/j): exact in
rationals, but in floats the binomials drown it by m = 60.

The inverse of C is bidiagonal (m on the diagonal, -(m-1) to its left), so

    sum_ell z^(ell-1) (C^ell)_mn = (1/m) prod_{j=n}^m 1/(1 - z/j),

and (C^ell)_mn = h_(ell-1)(1/n, ..., 1/m)/m with h the complete homogeneous symmetric
polynomial: the sum over the ways down from m to n.  All its terms are positive, and Newton's
identities give it in differences of harmonic numbers: what symbols and floats use.

>>> two_layers = cesaro_power_in_harmonic_numbers(2)
>>> two_layers
(harmonic(m) - harmonic(n - 1))/m
>>> cesaro_power_exact(5, 2, 2) == two_layers.subs({m: 5, n: 2})
True
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from typing import Any

import numpy as np
import sympy as sp

from nope.checks import expect, expect_count, expect_finite
from theory.formula import Formula, Numeric, Status
from theory.symbols import beta, ell, g, m, n

Array = np.ndarray

_i, _j = (sp.Dummy(name, integer=True, positive=True) for name in "ij")
_x = sp.Dummy("x", positive=True)
"""What is summed or integrated over; dummies, so that a call may have any symbol as argument."""

# --- exact: alternating sums over eigenvalues ---------------------------------------------


def hausdorff(eigenvalue: Callable[[sp.Expr], sp.Expr], m: sp.Expr = m, n: sp.Expr = n) -> sp.Expr:
    """f(C)_mn = binom(m-1, n-1) sum_{j=n}^m (-1)^(j-n) binom(m-n, j-n) f_j, f_j = `eigenvalue(j)`.

    The identity for f = 1, and 0 for m < n.
    """
    term = (-1) ** (_j - n) * sp.binomial(m - n, _j - n) * eigenvalue(_j)
    return sp.binomial(m - 1, n - 1) * sp.Sum(term, (_j, n, m))


def hausdorff_kernel(
    eigenvalue: Callable[[sp.Expr, sp.Expr], sp.Expr], m: sp.Expr = m, n: sp.Expr = n
) -> sp.Expr:
    """What the map K -> C K C', or a function of it with eigenvalues f_ij, makes of K = I.

    sum_{i<=m, j<=n} (-1)^(i+j) binom(m-1, i-1) binom(n-1, j-1) binom(i+j-2, i-1) f_ij; the last
    binomial is (P P')_ij by Vandermonde's identity.  Derived here.
    """
    signed = (-1) ** (_i + _j) * sp.binomial(m - 1, _i - 1) * sp.binomial(n - 1, _j - 1)
    overlap = sp.binomial(_i + _j - 2, _i - 1)
    return sp.Sum(signed * overlap * eigenvalue(_i, _j), (_i, 1, m), (_j, 1, n))


def exact(expr: sp.Expr) -> sp.Rational:
    """The value of an expression in the functions below at whole positions and rational gains.

    Every sum is added up term by term in rationals.

    >>> exact(StackKernel(3, 2, 1)), exact(ResidualPower(3, 1, 2, sp.Rational(1, 2)))
    (1/3, 35/72)
    """
    known = not expr.free_symbols and not expr.has(sp.Float)
    expect(known, "whole positions and rational gains", expr, "substitute them, or use floats")
    return expr.rewrite(sp.Sum).replace(sp.Sum, _written_out)


def _written_out(term: sp.Expr, *limits: sp.Tuple) -> sp.Expr:
    indices = [limit[0] for limit in limits]
    ranges = [range(int(low), int(high) + 1) for _, low, high in limits]
    points = itertools.product(*(map(sp.Integer, one) for one in ranges))
    return sp.Add(*(term.xreplace(dict(zip(indices, point, strict=True))) for point in points))


class FiniteSum(Numeric):
    """A `Numeric` whose `definition` is a finite sum: exact in rationals, no use in floats.

    `rewrite(sp.Sum)` puts the sum in the call's place; LaTeX and MathML show the sum.
    """

    def definition(self) -> sp.Expr:
        """The sum, in the arguments of the call."""
        raise NotImplementedError

    def _eval_rewrite_as_Sum(self, *_: sp.Expr, **__: Any) -> sp.Expr:  # noqa: N802 (SymPy's)
        return self.definition()

    def _shown(self) -> sp.Expr:
        """The sum, its indices called otherwise where a symbol is called i or j."""
        taken = {symbol.name for symbol in self.free_symbols}
        letters = (letter for letter in "klpqrstuvw" if letter not in taken)
        new = {x: sp.Dummy(next(letters), **x.assumptions0) for x in (_i, _j) if x.name in taken}
        return self.definition().xreplace(new)

    def _latex(self, printer: Any, exp: str | None = None) -> str:
        shown: str = printer._print(self._shown())
        return shown if exp is None else rf"\left({shown}\right)^{{{exp}}}"

    def _mathml_presentation(self, printer: Any) -> Any:
        return printer._print(self._shown())


class CesaroPower(FiniteSum):
    """(C^ell)_mn: the weight of token n at position m after ell layers of uniform attention.

    The identity at ell = 0, 0 for m < n.  `rewrite(sp.Integral)` gives the moments
    binom(m-1, n-1) int_0^1 x^(n-1) (1-x)^(m-n) (-ln x)^(ell-1)/(ell-1)! dx (ell >= 1): row m
    is the law of 1 + Binomial(m-1, X), X a product of ell independent uniform variables.
    """

    by = "recursion over layers (Newton's identities)"

    def definition(self) -> sp.Expr:
        m, n, ell = self.args
        return hausdorff(lambda j: j**-ell, m, n)

    def _eval_rewrite_as_Integral(self, *args: sp.Expr, **_: Any) -> sp.Expr:  # noqa: N802
        m, n, ell = args
        return _moment((-sp.log(_x)) ** (ell - 1) / sp.factorial(ell - 1), m, n)

    @staticmethod
    def numbers(*arrays: Array) -> Array:
        m, n, ell = arrays
        return _mixed(_one_depth(ell), cesaro_powers(m, n, _deepest(ell)))


class ResidualPower(FiniteSum):
    """((I + beta C)^ell)_mn: ell layers with residual and one scalar value path of gain beta.

    `rewrite(sp.Integral)` has the Laguerre polynomial beta L^(1)_(ell-1)(beta ln x) where
    `CesaroPower` has its logarithm (ell >= 1).  In floats sum_k binom(ell, k) beta^k (C^k)_mn:
    positive terms for beta >= 0; for beta < 0 the rounding is relative to the value at |beta|.
    """

    by = "recursion over layers (Newton's identities)"

    def definition(self) -> sp.Expr:
        m, n, ell, beta = self.args
        return hausdorff(lambda j: (1 + beta / j) ** ell, m, n)

    def _eval_rewrite_as_Integral(self, *args: sp.Expr, **_: Any) -> sp.Expr:  # noqa: N802
        m, n, ell, beta = args
        laguerre = sp.assoc_laguerre(ell - 1, 1, beta * sp.log(_x))
        return sp.KroneckerDelta(m, n) + _moment(beta * laguerre, m, n)

    @staticmethod
    def numbers(*arrays: Array) -> Array:
        m, n, ell, beta = arrays
        return _mixed(_choices(ell, beta), cesaro_powers(m, n, _deepest(ell)))


class StackKernel(FiniteSum):
    """(C^ell C'^ell)_mn: the kernel of ell layers without residual or norm over i.i.d. tokens.

    The probability that two independent walks, from m and from n, are at the same position
    after ell moves; or that Binomial(m-1, X) and Binomial(n-1, Y) agree, X and Y independent
    products of ell uniform variables.
    """

    by = "recursion over layers (cumulative sums)"

    def definition(self) -> sp.Expr:
        m, n, ell = self.args
        return hausdorff_kernel(lambda i, j: (i * j) ** -ell, m, n)

    @staticmethod
    def numbers(*arrays: Array) -> Array:
        m, n, ell = arrays
        return _mixed(_one_depth(ell), meetings(m, n, _deepest(ell)))


class RandomValueKernel(FiniteSum):
    """sum_k binom(ell, k) g^k (C^k C'^k)_mn: the kernel of ell layers of random values.

    With residual and without norm, over i.i.d. tokens of unit variance: each layer adds
    g C K C' to K, because its fresh zero-mean value map makes the cross terms vanish.
    """

    by = "recursion over layers (cumulative sums)"

    def definition(self) -> sp.Expr:
        m, n, ell, gain = self.args
        return hausdorff_kernel(lambda i, j: (1 + gain / (i * j)) ** ell, m, n)

    @staticmethod
    def numbers(*arrays: Array) -> Array:
        m, n, ell, gain = arrays
        return _mixed(_choices(ell, gain), meetings(m, n, _deepest(ell)))


def _moment(weight: sp.Expr, m: sp.Expr, n: sp.Expr) -> sp.Expr:
    """binom(m-1, n-1) int_0^1 x^(n-1) (1-x)^(m-n) weight(x) dx."""
    integrand = _x ** (n - 1) * (1 - _x) ** (m - n) * weight
    return sp.binomial(m - 1, n - 1) * sp.Integral(integrand, (_x, 0, 1))


def cesaro_power_exact(m: int, n: int, ell: int) -> sp.Rational:
    """(C^ell)_mn as a rational number.

    >>> [cesaro_power_exact(3, n, 2) for n in (1, 2, 3, 4)]
    [11/18, 5/18, 1/9, 0]
    """
    _expect_counts(m=m, n=n)
    expect_count("ell", ell, least=0)
    return exact(CesaroPower(m, n, ell))


# --- closed forms in harmonic numbers -----------------------------------------------------


def homogeneous(power_sums: Iterable[Any], first: Any) -> list[Any]:
    """h_0, h_1, ... from p_1, p_2, ... by Newton's identities, k h_k = sum_i p_i h_(k-i).

    Symbols or arrays alike; `first` is h_0 = 1 in their kind.
    """
    found, sums = [first], []
    for k, power_sum in enumerate(power_sums, start=1):
        sums.append(power_sum)
        found.append(sum(map(operator.mul, sums, reversed(found))) / k)
    return found


class Harmonic(FiniteSum):
    """H_k = 1 + 1/2 + ... + 1/k, by the digamma function.

    SymPy's own `harmonic` (1.14; `rewrite(sp.harmonic)` gives it) is compiled to a sum without
    brackets, so that 2 H comes out wrong, and takes minutes for the rational H_100000.
    """

    by = "the digamma function"
    is_real = True

    def definition(self) -> sp.Expr:
        return sp.Sum(1 / _j, (_j, 1, self.args[0]))

    def _eval_rewrite_as_harmonic(self, last: sp.Expr, **_: Any) -> sp.Expr:
        return sp.harmonic(last)

    def _eval_evalf(self, prec: int) -> sp.Expr | None:
        if not self.args[0].is_number:
            return None
        after = (self.args[0] + 1)._eval_evalf(prec)
        return (sp.digamma(after) + sp.EulerGamma)._eval_evalf(prec)

    def _latex(self, printer: Any, exp: str | None = None) -> str:
        shown = rf"H_{{{printer._print(self.args[0])}}}"
        return shown if exp is None else rf"{shown}^{{{exp}}}"

    @staticmethod
    def numbers(*arrays: Array) -> Array:
        from scipy.special import digamma

        return np.asarray(digamma(arrays[0] + 1) + np.euler_gamma)


def cesaro_power_in_harmonic_numbers(layers: int) -> sp.Expr:
    """(C^layers)_mn for n <= m: a polynomial in H_m^(i) - H_(n-1)^(i), i < layers, over m."""
    expect_count("layers", layers)
    sums = (sp.harmonic(m, i) - sp.harmonic(n - 1, i) for i in range(1, layers))
    return homogeneous(sums, sp.Integer(1))[-1] / m


def two_layer_covariance() -> sp.Expr:
    """(s (2 + H_t - H_s) - H_s)/(m n), s = min(m, n), t = max(m, n), H the harmonic numbers.

    The mean over i <= m, j <= n of the one-layer kernel 1/max(i, j): 2k - 1 pairs have a
    maximum k <= s, and s pairs each larger one.
    """
    shorter, longer = sp.Min(m, n), sp.Max(m, n)
    total = shorter * (2 + Harmonic(longer) - Harmonic(shorter)) - Harmonic(shorter)
    return total / (m * n)


# --- floats: positive terms only ----------------------------------------------------------


def cesaro_powers(m: Array, n: Array, layers: int) -> Iterator[Array]:
    """(C^0)_mn, ..., (C^layers)_mn at positions that broadcast, 0 for m < n.

    O(layers^2) an entry and O(layers) arrays; `cesaro_power_matrix` is cheaper for all of them.
    """
    m, n = np.asarray(m, dtype=float), np.asarray(n, dtype=float)
    yield np.equal(m, n).astype(float)
    sums = (_reciprocal_power_sum(order, n, m) for order in range(1, layers))
    if layers:
        yield from (h / m for h in homogeneous(sums, np.less_equal(n, m).astype(float)))


def _reciprocal_power_sum(order: int, low: Array, high: Array) -> Array:
    """sum_{j=low}^high j^-order."""
    from scipy.special import digamma, zeta

    if order == 1:
        return np.asarray(digamma(high + 1) - digamma(low))
    return np.asarray(zeta(order, low) - zeta(order, high + 1))


def meetings(m: Array, n: Array, layers: int) -> Iterator[Array]:
    """(C^k C'^k)_mn for k = 0..layers at positions that broadcast.

    Multiplies the rows of the distinct positions by C, by cumulative sums from the right:
    O(layers n_ctx) for each position, and as much for each pair of them.
    """
    m, n = np.asarray(m, dtype=int), np.asarray(n, dtype=int)
    positions = np.union1d(m, n)
    left, right = np.searchsorted(positions, m), np.searchsorted(positions, n)
    every = np.arange(1, positions[-1] + 1)
    rows = np.equal.outer(positions, every).astype(float)
    for _ in range(layers + 1):
        yield (rows @ rows.T)[left, right]
        rows = (rows / every)[:, ::-1].cumsum(axis=1)[:, ::-1]


def _deepest(ell: Array) -> int:
    return int(np.max(ell))


def _one_depth(ell: Array) -> Iterator[Array]:
    """Weights 1 at k = ell, 0 elsewhere."""
    return (np.equal(ell, k) for k in itertools.count())


def _choices(ell: Array, gain: Array) -> Iterator[Array]:
    """Weights binom(ell, k) gain^k, 0 beyond ell."""
    weight = np.ones(np.broadcast_shapes(np.shape(ell), np.shape(gain)))
    for k in itertools.count():
        yield weight
        weight = weight * gain * (ell - k) / (k + 1)


def _mixed(weights: Iterator[Array], terms: Iterator[Array]) -> Array:
    """sum_k w_k T_k, for as many as there are terms."""
    return np.asarray(sum(term * weight for term, weight in zip(terms, weights, strict=False)))


# --- whole matrices, O(ell n_ctx^2) -------------------------------------------------------


def _prefix_means(matrix: Array) -> Array:
    """C times the matrix: row m becomes the mean of rows 1..m."""
    return np.asarray(matrix.cumsum(axis=0) / np.arange(1, len(matrix) + 1)[:, None])


def _attended(kernel: Array) -> Array:
    """C K C' for a symmetric K."""
    return _prefix_means(_prefix_means(kernel).T)


def _iterated(step: Callable[[Array], Array], n_ctx: int, ell: int) -> Array:
    _expect_counts(n_ctx=n_ctx)
    expect_count("ell", ell, least=0)
    return reduce(lambda matrix, _: step(matrix), range(ell), np.eye(n_ctx))


def cesaro_power_matrix(n_ctx: int, ell: int) -> Array:
    """C^ell, shape (n_ctx, n_ctx).

    >>> cesaro_power_matrix(2, 3)
    array([[1.   , 0.   ],
           [0.875, 0.125]])
    """
    return _iterated(_prefix_means, n_ctx, ell)


def residual_power_matrix(n_ctx: int, ell: int, gain: float) -> Array:
    """(I + gain C)^ell, shape (n_ctx, n_ctx); `gain` may be negative."""
    expect_finite("the size of gain", abs(gain))
    return _iterated(lambda matrix: matrix + gain * _prefix_means(matrix), n_ctx, ell)


def stack_kernel_matrix(n_ctx: int, ell: int) -> Array:
    """C^ell C'^ell, shape (n_ctx, n_ctx)."""
    return _iterated(_attended, n_ctx, ell)


def random_value_kernel_matrix(n_ctx: int, ell: int, gain: float) -> Array:
    """The kernel after ell times K -> K + gain C K C' from the identity, shape (n_ctx, n_ctx)."""
    expect_finite("gain", gain)
    return _iterated(lambda kernel: kernel + gain * _attended(kernel), n_ctx, ell)


def _expect_counts(**values: object) -> None:
    for name, value in values.items():
        expect_count(name, value)


# --- the formulas -------------------------------------------------------------------------


def formulas() -> Iterator[Formula]:
    """Weights and kernels of stacks of uniform attention."""
    yield from _weights()
    yield from _kernels()


def _weights() -> Iterator[Formula]:
    yield Formula(
        "depth.cesaro_power",
        CesaroPower(m, n, ell),
        "The weight of token n at position m after ell layers of uniform causal attention.",
        Status.EXACT,
        "Hausdorff 1921 on powers of the Cesaro matrix; derived here",
        r"\left(C^{\ell}\right)_{mn}",
    )
    yield Formula(
        "depth.two_layer_weight",
        sp.Max(0, Harmonic(m) - Harmonic(n - 1)) / m,
        "Two layers of uniform attention weigh token n by a difference of harmonic numbers.",
        Status.EXACT,
        "derived here",
        r"\left(C^{2}\right)_{mn}",
    )
    yield Formula(
        "depth.residual_power",
        ResidualPower(m, n, ell, beta),
        "The weight of token n at position m after ell layers x -> x + beta C x.",
        Status.EXACT,
        "Hausdorff 1921 on powers of the Cesaro matrix; derived here",
        r"\left((I + \beta C)^{\ell}\right)_{mn}",
    )
    yield Formula(
        "depth.residual_eigenvalue",
        (1 + beta / m) ** ell,
        "The weight that position m keeps of its own token; these are the eigenvalues.",
        Status.EXACT,
        "derived here: the matrix is triangular",
        r"\left((I + \beta C)^{\ell}\right)_{mm}",
    )


def _kernels() -> Iterator[Formula]:
    yield Formula(
        "depth.two_layer_covariance",
        two_layer_covariance(),
        "The kernel of two layers of uniform attention over i.i.d. tokens, no residual or norm.",
        Status.EXACT,
        "derived here",
        r"\left(C^{2} C'^{2}\right)_{mn}",
    )
    yield Formula(
        "depth.stack_kernel",
        StackKernel(m, n, ell),
        "The kernel of ell layers of uniform attention over i.i.d. tokens, no residual or norm.",
        Status.EXACT,
        "derived here",
        r"\left(C^{\ell} C'^{\ell}\right)_{mn}",
    )
    yield Formula(
        "depth.random_value_kernel",
        RandomValueKernel(m, n, ell, g),
        "The kernel of ell layers with residual, without norm, over i.i.d. tokens of unit "
        "variance: independent zero-mean value maps of gain g add without cross terms.",
        Status.EXACT,
        "derived here",
        r"\sum_{k} \binom{\ell}{k} g^{k} \left(C^{k} C'^{k}\right)_{mn}",
    )
