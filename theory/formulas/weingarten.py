"""Haar matrices: moments of O(n) by Weingarten calculus, and what they do to attention.

A moment of order 2p of a Haar matrix O in O(n) is a sum over pairings of its 2p factors,

    E prod_t O[r_t, c_t] = sum over pairings P, Q of [P pairs equal rows] Wg(P, Q) [Q columns],

where Wg is the inverse of the Gram matrix G(P, Q) = n^(loops of P and Q laid together).
Source: Collins and Sniady 2006.  The same G(P, Q), with the number of coordinates of a head
for n, sums the row condition over a head's coordinates, so everything here about one head of
a Haar layer is a form in three pairings (`logit_moment`, `head_kernel_variance`).

>>> haar_moment((1, 1, 1, 1), (1, 1, 1, 1))
3/(d*(d + 2))
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from functools import cache

import sympy as sp

from nope.checks import expect
from theory.formula import Formula, Status
from theory.formulas.cosine import gaussian_pair
from theory.symbols import d, d_h, m, n, rho, sigma_k, sigma_q

Pairing = tuple[tuple[int, int], ...]


@cache
def pairings(size: int) -> tuple[Pairing, ...]:
    """The (size - 1)!! ways to pair 0, ..., size - 1; none for an odd size.

    >>> pairings(4)
    (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2)))
    """

    def pair(left: tuple[int, ...]) -> Iterator[Pairing]:
        if not left:
            yield ()
        for partner in left[1:]:
            rest = tuple(one for one in left[1:] if one != partner)
            yield from (((left[0], partner), *others) for others in pair(rest))

    return tuple(pair(tuple(range(size))))


def loops(first: Pairing, second: Pairing) -> int:
    """The closed loops that two pairings form together: 1 to p of 2p points."""
    label = list(range(2 * len(first)))
    for x, y in (*first, *second):
        label = [label[x] if one == label[y] else one for one in label]
    return len(set(label))


def gram(size: int, dimension: sp.Expr) -> sp.Matrix:
    """G(P, Q) = dimension^loops(P, Q): the sum over indices that P and Q both pair equally."""
    every = pairings(size)
    return sp.Matrix([[dimension ** loops(P, Q) for Q in every] for P in every])


@cache
def weingarten(size: int) -> sp.Matrix:
    """Wg = G^-1 over the pairings of `size` factors, in the dimension d.

    Size 2: 1/d.  Size 4: (d+1)/(d(d-1)(d+2)) on the diagonal, -1/(d(d-1)(d+2)) off it.
    """
    return gram(size, d).inv().applyfunc(sp.factor)


def paired(labels: Sequence[Hashable]) -> sp.Matrix:
    """Per pairing 1 if it pairs equal labels only, else 0."""
    every = pairings(len(labels))
    return sp.Matrix([int(all(labels[x] == labels[y] for x, y in P)) for P in every])


def haar_moment(rows: Sequence[int], columns: Sequence[int]) -> sp.Expr:
    """E prod_t O[rows[t], columns[t]] for O Haar in O(d); 0 for an odd number of factors.

    The poles of Wg at small d cancel here, so it holds at every d that has the rows and columns.
    Raises `ValueError` for rows and columns of unequal number.
    """
    expect(
        len(rows) == len(columns),
        f"a column for each of {len(rows)} rows",
        tuple(columns),
        "give one row and one column per factor",
    )
    if len(rows) % 2:
        return sp.Integer(0)
    return sp.factor((paired(rows).T * weingarten(len(rows)) * paired(columns))[0])


# ------------------------------------------------------------- one head of a Haar layer

TWO_SUMS: Pairing = ((0, 1), (2, 3))
"""The rows of (sum over a of x_a y_a)(sum over b of z_b w_b)."""


def inner_products(vectors: Sequence[int], products: sp.Matrix) -> sp.Matrix:
    """Per pairing the product of its pairs' inner products: `vectors` name rows of `products`."""
    every = pairings(len(vectors))
    return sp.Matrix([sp.prod(products[vectors[x], vectors[y]] for x, y in P) for P in every])


def coordinate_weights(vectors: Sequence[int], products: sp.Matrix) -> sp.Matrix:
    """Coefficients w_P of E prod_t (O x_t)[a_t] = sum over P of w_P [P pairs equal a]."""
    return weingarten(len(vectors)) * inner_products(vectors, products)


PAIR = d * sp.Matrix([[1, rho], [rho, 1]])
"""Inner products of two normed tokens of correlation rho: |e|^2 = d, <e, f> = d rho."""


def entry_kurtosis() -> sp.Expr:
    """E O^4/(E O^2)^2 of one entry; also of a coordinate of O x for |x| fixed."""
    second, fourth = (haar_moment((1,) * t, (1,) * t) for t in (2, 4))
    return sp.factor(fourth / second**2)


def logit_moment(keys: Sequence[int]) -> sp.Expr:
    """E of the product of one query's logits with `keys`, each 0 or 1, of correlation rho.

    l = sum over a <= d_h of q_a k_a/sqrt(d_h), gain 1.  q and k are independent, and summing
    both their pairings' conditions over a head's coordinates is a Gram matrix of dimension d_h.
    """
    size = len(keys)
    query, key = (coordinate_weights(vectors, PAIR) for vectors in ((0,) * size, keys))
    return sp.factor((query.T * gram(size, d_h) * key)[0] / sp.sqrt(d_h) ** size)


def head_kernel_variance() -> sp.Expr:
    """Variance of <q_m, q_n>/d_h over the weights, <e_m, e_n>/d = rho, gain 1; its mean is rho."""
    over_head = gram(4, d_h).row(pairings(4).index(TWO_SUMS))
    second = (over_head * coordinate_weights((0, 1, 0, 1), PAIR))[0] / d_h**2
    return sp.factor(second - rho**2)


def formulas() -> Iterator[Formula]:
    """Moments of Haar matrices and of a Haar attention layer over tokens of fixed norm."""
    source = "derived here by Weingarten calculus (Collins and Sniady 2006)"
    yield Formula(
        "orthogonal.entry_kurtosis",
        entry_kurtosis(),
        "Kurtosis of an entry of a Haar matrix, and of a coordinate of its product with a vector "
        "of fixed norm.",
        Status.EXACT,
        source,
        r"\mathbb{E}\,O_{ij}^4/(\mathbb{E}\,O_{ij}^2)^2",
    )
    yield Formula(
        "orthogonal.logit_second_moment",
        d**2 * sigma_q**2 * sigma_k**2 * logit_moment((0, 0)),
        "Variance of a scaled logit of normed tokens for Haar W_Q, W_K: as for independent "
        "entries of the same variance, and 1 at gain 1, whatever the heads.",
        Status.EXACT,
        source,
        r"\mathbb{E}\,l_{mn}^2",
    )
    yield Formula(
        "orthogonal.logit_kurtosis",
        logit_moment((0, 0, 0, 0)),
        "Kurtosis of a scaled logit of normed tokens for Haar W_Q, W_K: a factor (d/(d+2))^2 "
        "below the variance-gamma's 3 + 6/d_h, and 3d/(d+2) for one head.",
        Status.EXACT,
        source,
        r"\mathbb{E}\,l_{mn}^4/(\mathbb{E}\,l_{mn}^2)^2",
    )
    yield Formula(
        "orthogonal.logit_pair_moment",
        logit_moment((0, 0, 1, 1)),
        "Two logits of one query whose normed keys' inputs have correlation rho, Haar W_Q, W_K.",
        Status.EXACT,
        source,
        r"\mathbb{E}\,l_{mn}^2 l_{mn'}^2/(\mathbb{E}\,l_{mn}^2)^2",
    )
    yield Formula(
        "orthogonal.logit_kurtosis_gaussian_tokens",
        sp.factor(logit_moment((0, 0, 0, 0)) * (1 + 2 / d) ** 2),
        "Kurtosis of a logit of two different Gaussian tokens without a norm, Haar W_Q, W_K: "
        "Q and K turn them into Gaussian vectors, so the logit is variance-gamma.",
        Status.EXACT,
        source,
        r"\mathbb{E}_{m \ne n}\,l_{mn}^4/(\mathbb{E}_{m \ne n}\,l_{mn}^2)^2",
    )
    yield Formula(
        "orthogonal.head_kernel_variance",
        head_kernel_variance(),
        "Variance over Haar weights of a head's kernel <q_m, q_n>/d_h at a kernel rho of normed "
        "inputs: (1 + rho^2)/d_h for Gaussian weights, less here, and 0 for one head, since a "
        "square Haar map keeps inner products.",
        Status.EXACT,
        source,
        r"\mathrm{Var}\,\langle q_m, q_n\rangle/d_h",
    )
    yield Formula(
        "orthogonal.uniform_cosine",
        gaussian_pair().subs(rho, sp.sqrt(sp.Min(m, n) / sp.Max(m, n))),
        "Expected cosine of uniform attention's outputs for square Haar W_V, W_O and Gaussian "
        "tokens: that of the prefix means themselves, without a Gaussian map's further bias.",
        Status.EXACT,
        "derived here: Haar maps keep every cosine",
        r"\mathbb{E}\cos(o_m, o_n)",
    )
