"""A formula: a SymPy expression in registered symbols that knows how true it is.

LaTeX, MathML, Python source and the number form all come from the one expression; nothing
is typed a second time.

>>> import theory
>>> f = theory.formula("attention.uniform_covariance")
>>> f.expr
d**2*sigma**4/Max(m, n)
>>> f(d=768, sigma=0.02, m=[1, 2, 4], n=1).round(6)
array([0.094372, 0.047186, 0.023593])
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache, reduce
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import sympy as sp
from sympy.printing.numpy import SciPyPrinter

from theory import symbols

if TYPE_CHECKING:
    from theory.derivation import Derivation


SERIES_TERMS = 60


class Status(enum.StrEnum):
    """How true a statement is."""

    EXACT = "exact"
    """A theorem for every finite size."""
    LEADING_ORDER = "leading_order"
    """True up to a remainder that the object computes."""
    PRINTED = "printed"
    """What a paper prints, as far as its text could be read; possibly wrong."""


class Numeric(sp.Function):
    """A function without a closed form: `numbers` computes it on arrays that broadcast.

    `by` says how (quadrature, recursion, ...).  A subclass gives both; its name is what is
    printed, and `compile_number_form` finds the numbers by the class itself.
    """

    by: ClassVar[str]

    @staticmethod
    def numbers(*arrays: np.ndarray) -> np.ndarray:
        """The values, in float64."""
        raise NotImplementedError

    def _eval_evalf(self, prec: int) -> sp.Expr | None:
        if not all(argument.is_number for argument in self.args):
            return None
        return sp.Float(_number(self), 15)


@lru_cache(maxsize=4096)
def _number(call: Any) -> float:
    """The value of a `Numeric` at numbers: SymPy asks again and again for one."""
    return float(call.numbers(*(np.array(float(x)) for x in call.args)))


class LogGamma(sp.Function):
    """log Gamma, left alone: SymPy's own turns log Gamma(d/2), d whole, back into Gammas."""


class NumberPrinter(SciPyPrinter):
    """SciPy code that broadcasts, and keeps inverse cosines of correlations real."""

    def _fold(self, function: str, expr: sp.Expr) -> str:
        printed = [str(self._print(argument)) for argument in expr.args]
        return reduce(lambda code, argument: f"{function}({code}, {argument})", printed)

    def _print_Max(self, expr: sp.Expr) -> str:  # noqa: N802 (SymPy's naming)
        return self._fold("numpy.maximum", expr)

    def _print_Min(self, expr: sp.Expr) -> str:  # noqa: N802
        return self._fold("numpy.minimum", expr)

    def _print_KroneckerDelta(self, expr: sp.Expr) -> str:  # noqa: N802
        left, right = (self._print(argument) for argument in expr.args)
        return f"numpy.equal({left}, {right}).astype(float)"

    def _print_acos(self, expr: sp.Expr) -> str:
        # A correlation of 1 arrives as 1 + 1e-16.
        return f"numpy.arccos(numpy.clip({self._print(expr.args[0])}, -1.0, 1.0))"

    def _print_LogGamma(self, expr: sp.Expr) -> str:  # noqa: N802
        return f"{self._module_format('scipy.special.gammaln')}({self._print(expr.args[0])})"

    def _print_hyper(self, expr: sp.Expr) -> str:
        (left, right), (below,) = expr.ap, expr.bq
        arguments = ", ".join(self._print(part) for part in (left, right, below, expr.argument))
        return f"hypergeometric({arguments})"


def hypergeometric(a: Any, b: Any, c: Any, z: Any) -> Any:
    """2F1(a, b; c; z): SciPy's, and its own series where SciPy overflows (z > 0.9, c > 171).

    There, with a = b = 1/2, the terms fall like k!/c^k: `SERIES_TERMS` of them are exact.
    """
    from scipy.special import hyp2f1  # most of the time that importing all of this would take

    arrays = np.broadcast_arrays(*(np.asarray(x, dtype=float) for x in (a, b, c, z)))
    with np.errstate(all="ignore"):
        values = np.atleast_1d(hyp2f1(*arrays))
    missing = ~np.isfinite(values)
    a, b, c, z = (np.atleast_1d(array)[missing] for array in arrays)
    term = total = np.ones(len(z))
    for k in range(SERIES_TERMS):
        term = term * (a + k) * (b + k) / ((c + k) * (k + 1)) * z
        total = total + term
    values[missing] = total
    return values.reshape(arrays[0].shape)


_NAMESPACE = {"numpy": np, "hypergeometric": hypergeometric}


def _on_arrays(numbers: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The same for plain numbers too."""
    return lambda *given: numbers(*(np.asarray(x, dtype=float) for x in given))


def compile_number_form(expr: sp.Expr, arguments: tuple[sp.Symbol, ...]) -> Callable[..., Any]:
    """The NumPy function of an expression.

    Quotients of Gamma functions go through their logarithms: Gamma itself overflows at 172.
    Common subexpressions are computed once.
    """
    if expr.has(sp.gamma):
        expr = expr.replace(sp.gamma, lambda argument: sp.exp(LogGamma(argument)))
        expr = sp.powsimp(expr, combine="exp")
    numeric = {type(call).__name__: _on_arrays(type(call).numbers) for call in expr.atoms(Numeric)}
    printer = NumberPrinter(
        {
            "fully_qualified_modules": False,
            "inline": True,
            "user_functions": {name: name for name in numeric},
        }
    )
    compiled: Callable[..., Any] = sp.lambdify(
        arguments,
        expr,
        modules=[{**_NAMESPACE, **numeric}, "scipy", "numpy"],
        printer=printer,
        cse=not expr.has(sp.erfc),  # it would turn erfc(-x) into 2 - erfc(x), losing the tail
    )
    return compiled


@dataclass(frozen=True, eq=False)
class Formula:
    """A named expression.

    `expr` is in the symbols of `theory.symbols`; `remainder` is an estimate of what a
    leading-order formula drops, in the same symbols and units (0 for the others).  Calling
    the formula with every symbol by name evaluates it on scalars or arrays.
    """

    name: str
    expr: sp.Expr
    statement: str
    status: Status
    source: str
    left: str = ""
    remainder: sp.Expr = field(default_factory=lambda: sp.Integer(0))
    derivation: Derivation | None = None

    @cached_property
    def symbols(self) -> Mapping[str, symbols.Described]:
        """Meaning, unit and domain of each free symbol, by name."""
        free = sorted(self.expr.free_symbols | self.remainder.free_symbols, key=str)
        return {symbol.name: symbols.describe(symbol) for symbol in free}

    def latex(self) -> str:
        """The equation in LaTeX."""
        names = {entry.symbol: entry.latex for entry in self.symbols.values() if entry.latex}
        right: str = sp.latex(self.expr, symbol_names=names)
        return f"{self.left} = {right}" if self.left else right

    def mathml(self) -> str:
        """The expression in presentation MathML."""
        printed: str = sp.mathml(self.expr, printer="presentation")
        return printed

    def python(self) -> str:
        """The expression as SymPy source that names its symbols."""
        return str(self.expr)

    def _repr_latex_(self) -> str:
        return f"$\\displaystyle {self.latex()}$"

    def subs(self, **values: Any) -> sp.Expr:
        """The expression with symbols, by name or alias, replaced by numbers or expressions."""
        return self.expr.subs({self._known(name): value for name, value in values.items()})

    def _known(self, name: str) -> sp.Symbol:
        try:
            found = symbols.symbol(name)
        except LookupError:
            found = None
        if found is None or found.name not in self.symbols:
            wanted = ", ".join(self.symbols) or "none"
            raise ValueError(f"expected symbols of {self.name}: {wanted}; got {name!r}; drop it")
        return found

    def __call__(self, **values: Any) -> Any:
        """Evaluate on scalars or arrays that broadcast.

        Raises `ValueError` naming the symbols that are unknown, missing, given twice or out
        of their domain.
        """
        return self._evaluate(_number_form, values)

    def remainder_at(self, **values: Any) -> Any:
        """The remainder's estimate, for the same arguments as a call."""
        return self._evaluate(_remainder_form, values)

    def _evaluate(self, form: Callable[[Formula], Callable[..., Any]], values: Any) -> Any:
        arrays: dict[str, Any] = {}
        for name, value in values.items():
            symbol = self._known(name)
            if symbol.name in arrays:
                raise ValueError(f"expected {symbol.name} once, got it again as {name!r}; drop one")
            arrays[symbol.name] = _in_domain(symbol, value)
        missing = [name for name in self.symbols if name not in arrays]
        if missing:
            raise ValueError(
                f"expected values for {', '.join(self.symbols)}, got none for "
                f"{', '.join(missing)}; add them"
            )
        result = form(self)(*(arrays[name] for name in self.symbols))
        shape = np.broadcast_shapes(*(np.shape(array) for array in arrays.values()))
        return np.broadcast_to(np.asarray(result, dtype=float), shape)[()]


@cache
def _number_form(formula: Formula) -> Callable[..., Any]:
    arguments = tuple(entry.symbol for entry in formula.symbols.values())
    return compile_number_form(formula.expr, arguments)


@cache
def _remainder_form(formula: Formula) -> Callable[..., Any]:
    arguments = tuple(entry.symbol for entry in formula.symbols.values())
    return compile_number_form(formula.remainder, arguments)


def _in_domain(symbol: sp.Symbol, value: Any) -> Any:
    domain = symbols.describe(symbol).domain
    try:
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(f"expected numbers for {symbol.name}, got {value!r}; change it") from None
    if not domain.contains(array):
        shown = f"{value!r}" if array.size < 9 else f"an array of {array.size} numbers"
        raise ValueError(f"expected {symbol.name} {domain.text}, got {shown}; change {symbol.name}")
    return array
