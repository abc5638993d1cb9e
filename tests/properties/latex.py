r"""Reads what `theory.Formula.latex` prints after its = back into a number, without SymPy.

    sum      = ["-"] product {("+" | "-") product}
    product  = power {["\cdot"] power}
    power    = atom ["_{+}"] ["^{" sum "}"]
    atom     = a number, or the longest entry of the reader's table that comes next

A function is told from a symbol by the bracket that follows at once, as in `H\left(m, s\right)`:
between factors there is a space.  The terms of a `\sum` go on to the end of its product.

>>> number(r"\frac{H_{m}}{2} + \max\left(1, m - 1\right)", {"m": 3})
2.9166666666666665
"""

import operator
import re
import string
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import product
from typing import Any

import mpmath

from nope.checks import expect

MP: Any = mpmath.MPContext()
MP.dps = 30
"""Alternating sums cancel most of a float's digits."""

Function = Callable[..., Any]
Values = Mapping[str, Any]
Meaning = Callable[[Values], Any]
"""What a piece of text says: a number, given those of the symbols."""


def harmonic(last: Any, order: Any = 1) -> Any:
    return MP.fsum(k**-order for k in span(1, last))


def step(x: Any, at_zero: Any) -> Any:
    return at_zero if x == 0 else MP.mpf(x > 0)


def span(low: Any, high: Any) -> list[Any]:
    return [MP.mpf(k) for k in range(int(low), int(high) + 1)]


CONSTANTS = {r"\pi": MP.pi, "e": MP.e}
FUNCTIONS = {
    r"\max": max,
    r"\min": min,
    r"\log": MP.log,
    r"\Gamma": MP.gamma,
    r"\theta": step,
    r"\operatorname{erf}": MP.erf,
    r"\operatorname{asin}": MP.asin,
    r"\operatorname{atan}_{2}": MP.atan2,
    r"\operatorname{atanh}": MP.atanh,
}
"""Of arguments in brackets; a power may stand before them."""
BRACKETS = {r"\left(": r"\right)", r"{\left(": r"\right)}", r"\left[": r"\right]"}
FORMS: Mapping[str, tuple[tuple[str, ...], Function]] = {
    "{": (("}",), operator.pos),
    r"\left(": ((r"\right)",), operator.pos),
    r"\left|{": ((r"}\right|",), operator.abs),
    r"\frac{": (("}{", "}"), MP.fdiv),
    r"\sqrt{": (("}",), MP.sqrt),
    r"\binom{": (("}{", "}"), MP.binomial),
    "K_{": ((r"}\left(", r"\right)"), MP.besselk),
    r"{}_{2}F_{1}\left(\begin{matrix}": (
        (",", r"\\", r"\end{matrix}\middle| {", r"} \right)"),
        MP.hyp2f1,
    ),
}
"""By what opens them: what ends each argument, and the function of all."""

NUMBER = re.compile(r"\d+(\.\d+)?")
END = re.compile(r"$|[-+,}]|\\right|\\middle|\\end|\\leq|\\\\")
"""What a product ends before."""


def number(
    text: str, values: Mapping[str, float], functions: Mapping[str, Function] | None = None
) -> float:
    """The number of an expression, of symbols and of further functions by what prints them.

    Raises `ValueError` where the text goes on in another way than the grammar says.
    """
    known = {**CONSTANTS, **{name: MP.mpf(value) for name, value in values.items()}}
    reader = Reader(text, known, {**FUNCTIONS, **(functions or {})})
    meaning = reader.sum()
    expect(not reader.rest, "the end of the formula", reader.rest, "print it otherwise")
    return float(meaning(known))


def applied(function: Function, *arguments: Meaning) -> Meaning:
    return lambda values: function(*(argument(values) for argument in arguments))


def named(symbols: Iterable[str]) -> dict[str, Callable[[], Meaning]]:
    """Entries of a reader's table: a symbol's number is looked up."""
    return {name: partial(operator.itemgetter, name) for name in symbols}


class Reader:
    """Each method reads one piece of the text, after what opens it.

    `rest` is what is not read yet, `table` the method for each opening of an atom.
    """

    def __init__(
        self, text: str, symbols: Iterable[str], functions: Mapping[str, Function]
    ) -> None:
        self.rest = text.strip()
        self.table: dict[str, Callable[[], Meaning]] = {
            **named(symbols),
            **{opening: partial(self.form, *form) for opening, form in FORMS.items()},
            "H_{": lambda: applied(harmonic, *self.listed("}")),
            r"\delta_{": self.kronecker,
            r"\sum_{": self.single_sum,
            r"\sum_{\substack{": self.multiple_sum,
        }
        for name, function in functions.items():
            for opening in BRACKETS:
                self.table[name + opening] = partial(self.call, function, opening)
            if name.startswith("\\"):
                self.table[name + "^{"] = partial(self.power_of_call, function)

    def met(self, *tokens: str) -> str:
        """The longest of the tokens that comes next, which is read; empty if none does."""
        longest = max(filter(self.rest.startswith, tokens), key=len, default="")
        self.rest = self.rest[len(longest) :].lstrip()
        return longest

    def needed(self, *tokens: str) -> str:
        """The same, where one of them must come."""
        token = self.met(*tokens)
        expect(bool(token), " or ".join(tokens[:3]), self.rest[:40], "print it otherwise")
        return token

    # ------------------------------------------------------------------------ the grammar

    def sum(self) -> Meaning:
        terms, sign = [], self.met("-") or "+"
        while sign:
            term = self.product()
            terms.append(term if sign == "+" else applied(operator.neg, term))
            sign = self.met("+", "-")
        return lambda values: MP.fsum(term(values) for term in terms)

    def product(self) -> Meaning:
        factors = [self.power()]
        while not END.match(self.rest):
            self.met(r"\cdot")
            factors.append(self.power())
        return lambda values: MP.fprod(factor(values) for factor in factors)

    def power(self) -> Meaning:
        base = self.atom()
        if self.met("_{+}"):
            base = applied(partial(max, 0), base)
        return self.form(["}"], operator.pow, base) if self.met("^{") else base

    def atom(self) -> Meaning:
        if found := NUMBER.match(self.rest):
            value = MP.mpf(self.met(found[0]))
            return lambda _: value
        return self.table[self.needed(*self.table)]()

    # ------------------------------------------------------------------------------ atoms

    def form(self, ends: Iterable[str], function: Function, *before: Meaning) -> Meaning:
        """The function of arguments that have an end each, after those `before`."""
        arguments = list(before)
        for end in ends:
            arguments.append(self.sum())
            self.needed(end)
        return applied(function, *arguments)

    def listed(self, end: str) -> list[Meaning]:
        """Arguments between commas."""
        arguments = [self.sum()]
        while self.needed(",", end) != end:
            arguments.append(self.sum())
        return arguments

    def call(self, function: Function, opening: str) -> Meaning:
        return applied(function, *self.listed(BRACKETS[opening]))

    def power_of_call(self, function: Function) -> Meaning:
        exponent = self.form(["}"], operator.pos)
        return applied(operator.pow, self.call(function, self.needed(*BRACKETS)), exponent)

    def kronecker(self) -> Meaning:
        one, other, _ = self.atom(), self.atom(), self.needed("}")
        return applied(lambda x, y: MP.mpf(x == y), one, other)

    def single_sum(self) -> Meaning:
        r"""`\sum_{j=n}^{m}`"""
        index, _ = self.needed(*string.ascii_lowercase), self.needed("=")
        return self.summed({index: self.form(["}^{", "}"], span)})

    def multiple_sum(self) -> Meaning:
        r"""`\sum_{\substack{1 \leq i \leq m\\1 \leq j \leq n}}`"""
        spans, after = {}, r"\\"
        while after == r"\\":
            low, _ = self.sum(), self.needed(r"\leq")
            index, _ = self.needed(*string.ascii_lowercase), self.needed(r"\leq")
            spans[index] = applied(span, low, self.sum())
            after = self.needed(r"\\", "}}")
        return self.summed(spans)

    def summed(self, spans: Mapping[str, Meaning]) -> Meaning:
        """The terms, in which the indices are symbols, added up."""
        outside, self.table = self.table, {**self.table, **named(spans)}
        term = self.product()
        self.table = outside

        def total(values: Values) -> Any:
            every = product(*(each(values) for each in spans.values()))
            return MP.fsum(term({**values, **dict(zip(spans, at, strict=True))}) for at in every)

        return total
