"""Collapse: stacks of uniform attention move all weight onto the first token.

Row m of C^ell is the law of a walk from m that moves ell times to a uniform position among
1..where it is (`theory.formulas.depth`); it ends at 1.  The eigenvalues of C are 1/j and those of
I + beta C are 1 + beta/j, so what is left after ell layers goes as r_2^ell, r_j being eigenvalue j
over the largest, and the error as r_3^ell.  Rows that become alike make outputs alike: the cosine
of two of them misses 1 by about (m - n)^2 r_2^(2 ell)/2, by other powers for random value maps.

>>> missing_weight()
((m - 1)/2**ell, (m - 2)*(m - 1)/(2*3**ell))
"""

from __future__ import annotations

from collections.abc import Iterator

import sympy as sp

from theory.formula import Formula, Status
from theory.formulas.depth import CesaroPower, Harmonic, ResidualPower
from theory.symbols import beta, ell, g, m, n


def ratio(j: int, gain: sp.Expr | None = None) -> sp.Expr:
    """Eigenvalue j of I + gain C over the largest, (1 + gain/j)/(1 + gain); of C alone, 1/j."""
    return sp.Rational(1, j) if gain is None else (1 + gain / j) / (1 + gain)


def missing_weight(gain: sp.Expr | None = None) -> tuple[sp.Expr, sp.Expr]:
    """What position m has not yet put on the first token, to leading order, and the remainder.

    (m-1) r_2^ell, at most binom(m-1, 2) r_3^ell too large (r_j = `ratio`): Bonferroni's
    inequalities on 1 - (1-X)^(m-1), with E X^(j-1) = r_j^ell.
    """
    pairs = (m - 1) * (m - 2) / 2
    return (m - 1) * ratio(2, gain) ** ell, pairs * ratio(3, gain) ** ell


def missing_cosine(gain: sp.Expr | None = None) -> tuple[sp.Expr, sp.Expr]:
    """1 - cos of rows m and n of C^ell or (I + gain C)^ell, to leading order, and the remainder.

    The rows lean from e_1 towards e_2 by the angles (m-1) r_2^ell and (n-1) r_2^ell.  The next
    term is -(m-n)^2 (m+n-3) (r_2 r_3)^ell; m + n in its place covers what follows.
    """
    second, third = ratio(2, gain), ratio(3, gain)
    return (m - n) ** 2 * second ** (2 * ell) / 2, (m - n) ** 2 * (m + n) * (second * third) ** ell


def missing_cosine_of_random_values() -> tuple[sp.Expr, sp.Expr]:
    """The same for `RandomValueKernel`, whose eigenvalues are q_ij = (1 + g/(ij))/(1 + g).

    (m-n)^2 (q_22^ell - q_12^(2 ell)/2).  The terms of q_12 and q_13 themselves are sums of a
    function of m and one of n, which the norms cancel.  Next comes
    -(3/2) (m-n)^2 (m+n-3) q_23^ell; m + n covers what follows.
    """
    leading = ratio(4, g) ** ell - ratio(2, g) ** (2 * ell) / 2
    return (m - n) ** 2 * leading, 3 * (m - n) ** 2 * (m + n) * ratio(6, g) ** ell / 2


def moves_to_the_first_token() -> sp.Expr:
    """1 + H_(m-1) for m > 1 and 0 for m = 1: how many layers a walk takes on average.

    The generating function of their number is z prod_{j=2}^m (1 - 1/j)/(1 - z/j): one move and,
    for each j, an independent geometric variable of mean 1/(j-1).
    """
    return 1 + Harmonic(m - 1) - sp.KroneckerDelta(m, 1)


def half_collapse() -> tuple[sp.Expr, sp.Expr]:
    """Where (C^ell)_m1, continued to real ell, is 1/2: H_(m-1) + 1/3, and the remainder.

    (C^ell)_m1 is the probability that a Gamma(ell) variable exceeds the largest of m-1 unit
    exponentials.  Their difference has mean ell - H_(m-1) and lies a third of that lower in the
    median; in ell the next term of Cornish and Fisher's series tends to
    -(zeta(2) + zeta(3) + 8/135)/(3 ln m) = -0.97/ln m.
    """
    depth = Harmonic(m - 1) + sp.Rational(1, 3)
    return depth, 1 / depth


# --- the formulas -------------------------------------------------------------------------


def formulas() -> Iterator[Formula]:
    """The collapse of weights and of cosines, and how deep it is."""
    yield from _collapse()
    yield from _collapse_of_cosines()
    yield from _collapse_depths()


def _collapse() -> Iterator[Formula]:
    yield Formula(
        "depth.first_token_weight",
        CesaroPower(m, 1, ell),
        "The weight of the first token after ell layers of uniform attention: it tends to 1.",
        Status.EXACT,
        "derived here",
        r"\left(C^{\ell}\right)_{m1}",
    )
    yield _leading(
        "depth.collapse",
        missing_weight(),
        "All weight moves to the first token: what is left halves with every layer.",
        r"1 - \left(C^{\ell}\right)_{m1}",
    )
    yield Formula(
        "depth.first_token_weight_residual",
        ResidualPower(m, 1, ell, beta) / (1 + beta) ** ell,
        "The weight of the first token after ell layers x -> x + beta C x, rows summing to 1.",
        Status.EXACT,
        "derived here",
        r"\left((I + \beta C)^{\ell}\right)_{m1} / (1 + \beta)^{\ell}",
    )
    yield _leading(
        "depth.collapse_residual",
        missing_weight(beta),
        "A residual slows the collapse: what is left falls by (1 + beta/2)/(1 + beta) a layer "
        "(beta >= 0).",
        r"1 - \left((I + \beta C)^{\ell}\right)_{m1} / (1 + \beta)^{\ell}",
    )


def _collapse_of_cosines() -> Iterator[Formula]:
    yield _leading(
        "depth.collapse_cosine",
        missing_cosine(),
        "The kernel cosine of any two positions of C^ell x tends to 1.",
        r"1 - \cos(m, n)",
    )
    yield _leading(
        "depth.collapse_cosine_residual",
        missing_cosine(beta),
        "The kernel cosine of any two positions of (I + beta C)^ell x tends to 1 (beta >= 0).",
        r"1 - \cos(m, n)",
    )
    yield _leading(
        "depth.collapse_cosine_random_values",
        missing_cosine_of_random_values(),
        "With random value maps and residual the kernel cosine of any two positions tends to 1.",
        r"1 - \cos(m, n)",
    )


def _collapse_depths() -> Iterator[Formula]:
    yield Formula(
        "depth.collapse_depth",
        moves_to_the_first_token(),
        "The sum over depths of the weight that is not yet on the first token: the mean number "
        "of layers that a uniform walk takes to it.",
        Status.EXACT,
        "derived here",
        r"\sum_{\ell \geq 0} \left(1 - \left(C^{\ell}\right)_{m1}\right)",
    )
    yield Formula(
        "depth.collapse_depth_residual",
        (1 + 1 / beta) * moves_to_the_first_token(),
        "A residual makes the walk to the first token longer by the factor 1 + 1/beta (beta > 0).",
        Status.EXACT,
        "derived here: a layer moves the walk with probability beta/(1 + beta)",
        r"\sum_{\ell \geq 0} \left(1 - \left((I + \beta C)^{\ell}\right)_{m1} "
        r"/ (1 + \beta)^{\ell}\right)",
    )
    yield _leading(
        "depth.half_collapse",
        half_collapse(),
        "The depth at which position m has half of its weight on the first token (m > 1).",
        r"\ell_{1/2}",
    )


def _leading(name: str, law: tuple[sp.Expr, sp.Expr], statement: str, left: str) -> Formula:
    expr, remainder = law
    return Formula(
        name, expr, statement, Status.LEADING_ORDER, "derived here", left, remainder=remainder
    )
