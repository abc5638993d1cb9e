"""Wick's theorem for the weights of a softmax, on symbolic indices.

For centred Gaussian logits E f(l) = exp(sum_pq Cov(l_p, l_q) d_p d_q / 2) f at l = 0.  The weights
a_i of a softmax satisfy d a_i/d l_p = a_i (delta_ip - a_p) and are 1/m at l = 0, so every order is
algebra on Kronecker deltas.  Derived here; `theory.formulas.softmax_expansions.small_logits` is
the same theorem, to any order, for independent logits.
"""

from __future__ import annotations

from functools import cache

import sympy as sp

from theory.kernel import J, K, Q
from theory.symbols import i, j, m, n

WEIGHT = sp.Function("a")
P, R = sp.symbols("p r", integer=True, positive=True)
"""The two keys whose logits are differentiated by."""

Ends = tuple[tuple[sp.Symbol, sp.Symbol], ...]
"""Indices that are summed over, each with the end of its range."""


def derivative(expr: sp.Expr, key: sp.Symbol) -> sp.Expr:
    """By the logit of `key`, of a polynomial in the weights of one query."""
    weights = [call for call in expr.atoms(sp.core.function.AppliedUndef) if call.func == WEIGHT]
    return sum(
        expr.diff(a) * a * (sp.KroneckerDelta(a.args[0], key) - WEIGHT(key)) for a in weights
    )


def at_uniform(expr: sp.Expr, length: sp.Symbol) -> sp.Expr:
    """At l = 0 every weight is 1/length."""
    return expr.replace(WEIGHT, lambda key: 1 / length)


def contract(expr: sp.Expr, ends: Ends) -> sp.Expr:
    """The sum over indices, those in Kronecker deltas carried out."""
    return sum(_contract_term(term, ends) for term in sp.Add.make_args(sp.expand(expr)))


def _contract_term(term: sp.Expr, ends: Ends) -> sp.Expr:
    for number, (index, _) in enumerate(ends):
        for delta in term.atoms(sp.KroneckerDelta):
            if index in delta.args:
                (other,) = set(delta.args) - {index}
                rest = (term / delta).subs(index, other)
                return _contract_term(rest, ends[:number] + ends[number + 1 :])
    free = [(index, end) for index, end in ends if term.has(index)]
    counted = sp.Mul(*(end for index, end in ends if not term.has(index)))
    if not free:
        return term * counted
    outside, inside = term.as_independent(*(index for index, _ in free))
    return outside * counted * sp.Sum(inside, *((index, 1, end) for index, end in free))


def shared(left: sp.Symbol, right: sp.Symbol) -> sp.Expr:
    """Q(m, n)'s part of m n E a_m,left a_n,right: the keys' kernel, centred on both sides."""
    of_left = at_uniform(derivative(WEIGHT(left), P), m)
    of_right = at_uniform(derivative(WEIGHT(right), R), n)
    return contract(m * n * of_left * of_right * J(P, R), ((P, m), (R, n)))


def own(key: sp.Symbol, length: sp.Symbol) -> sp.Expr:
    """Q(length, length)'s part of length E a_key."""
    twice = at_uniform(derivative(derivative(WEIGHT(key), P), R), length)
    return contract(length * twice * J(P, R) / 2, ((P, length), (R, length)))


@cache
def first_order() -> sp.Expr:
    """sum over i <= m, j <= n of E a_mi a_nj K(i, j), to first order in Q, times J's entries."""
    change = Q(m, n) * shared(i, j) + Q(m, m) * own(i, m) + Q(n, n) * own(j, n)
    return sp.Sum((1 + change) * K(i, j), (i, 1, m), (j, 1, n)) / (m * n)
