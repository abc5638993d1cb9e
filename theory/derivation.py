"""A derivation is a value: the steps from the tokens to a place, each one re-checkable.

A step keeps the rule it used, the expression before (the rule with the earlier kernels put
in, nothing simplified) and after.  `Derivation.check` puts the rule in again and compares it
with `before`, then evaluates `before` and `after` at random points with exact integers for
positions and 50 digits for the rest, sums written out term by term.

>>> import nope
>>> layer = nope.decoder(64, 4, n_ctx=8, d_ff=0)
>>> steps = derive(layer, None, "blocks.0.attn_out").steps
>>> steps[-1].after
d**2*sigma_o**2*sigma_v**2/Max(m, n)
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import sympy as sp

from nope.architecture import Architecture
from nope.init import Scheme
from theory import symbols
from theory.bindings import local_bindings
from theory.cache import recall
from theory.formula import compile_number_form
from theory.kernel import Fidelity, J, K, Q, Rule, Traits
from theory.propagation import VIEWS, compiled
from theory.rules import rule_for
from theory.symbols import i, j, m, n

READABLE = 40
"""A kernel of more operations than this gets a name of its own before it is used further."""

CHECK_POSITIONS = ((4, 4), (2, 5), (6, 3))
CHECK_DIGITS = 50
ZERO_IN_FLOATS = 1e-12

Point = Mapping[sp.Symbol, Any]


@dataclass(frozen=True)
class Step:
    """One rule applied: `after` is `before` simplified, at `place`.

    `used` are the kernels that went in, in the order of the rule's sources.
    """

    place: str
    rule: Rule
    used: tuple[sp.Expr, ...]
    before: sp.Expr
    after: sp.Expr

    @cached_property
    def exact(self) -> bool:
        """Whether the rule drops nothing on the kernels it was used on."""
        if self.rule.remainder == 0:
            return True
        if self.rule.algorithm is not None:
            return False
        return _vanishes_on(self.rule.remainder, self.used)

    @cached_property
    def failures(self) -> list[str]:
        """What is wrong with this step; empty when it holds."""
        found = []
        if self.rule.apply(list(self.used)) != self.before:
            found.append(f"{self.place}: the step does not start from its rule")
        if self.before == self.after:
            return found
        for point in _points(self.place, self.before, self.after):
            left, right = (_number(expr, point) for expr in (self.before, self.after))
            if abs(left - right) > sp.Float(10) ** (-CHECK_DIGITS // 2) * (1 + abs(left)):
                found.append(f"{self.place}: {self.before} and {self.after} differ at {point}")
                break
        return found


@dataclass(frozen=True)
class Derivation:
    """The steps to a place in order, with the names given to long kernels on the way."""

    place: str
    steps: tuple[Step, ...]
    names: Mapping[str, sp.Expr]

    @property
    def result(self) -> sp.Expr:
        return self.steps[-1].after

    def kernels(self) -> dict[str, sp.Expr]:
        """The kernel after each step, by place."""
        return {step.place: step.after for step in self.steps}

    def rules(self) -> dict[str, Rule]:
        return {step.place: step.rule for step in self.steps}

    def closed(self) -> dict[str, sp.Expr]:
        """The kernels that need neither a sum nor a named kernel."""
        return {
            place: kernel
            for place, kernel in self.kernels().items()
            if not kernel.has(sp.Sum) and not kernel.atoms(sp.core.function.AppliedUndef)
        }

    @property
    def stopped(self) -> tuple[str, ...]:
        """Where the derivation ceased to be one expression, and why; empty when it did not."""
        named = tuple(
            f"{place}: {sp.count_ops(self.kernels()[place])} operations, called {name} from here on"
            for place, name in self.names.items()
        )
        computed = tuple(
            f"{step.place}: sums over pairs of positions that an algorithm computes"
            for step in self.steps
            if step.rule.algorithm is not None and step.rule.expression.has(sp.Sum)
        )
        return named + computed

    def exact_places(self) -> frozenset[str]:
        """Places that no step up to them has dropped anything for."""
        found: set[str] = set()
        for step in self.steps:
            if step.exact and found.issuperset(step.rule.sources):
                found.add(step.place)
        return frozenset(found)

    def check(self) -> list[str]:
        """Every step re-derived and re-evaluated, and the chain's links; empty when all hold."""
        kernels = {place: {kernel} for place, kernel in self.kernels().items()}
        for place, name in self.names.items():
            kernels[place].add(name)
        found = [failure for step in self.steps for failure in step.failures]
        for step in self.steps:
            if len(step.used) != len(step.rule.sources):
                found.append(f"{step.place}: uses more or fewer kernels than its rule reads")
            for source, used in zip(step.rule.sources, step.used, strict=False):
                if used not in kernels.get(source, ()):
                    found.append(f"{step.place}: uses a kernel that is not the one of {source}")
        return found


@lru_cache(maxsize=256)
def derive(
    architecture: Architecture,
    init: Scheme | None,
    place: str,
    fidelity: Fidelity = "uniform",
) -> Derivation:
    """The kernel at `place`, from the tokens on, symbolic as long as it stays readable.

    `init` says which weights have one standard deviation, then called sigma, and which biases
    are 0; None keeps them apart.  Kernels of more than `READABLE` operations get a name K_1,
    K_2, ... before they are used further, and a rule that only an algorithm computes is left
    as it stands; `Derivation.stopped` says where and why.  Raises `LookupError` for an unknown
    place and `NotImplementedError` with the reason where an operation has no rule.
    """
    known = {} if init is None else _simplifications(architecture, init)
    traits: dict[str, Traits] = {}
    rules: dict[str, Rule] = {}
    for operation in architecture.upstream(place):
        rules[operation.place] = _with(rule_for(operation, traits, fidelity), known)
        traits[operation.place] = rules[operation.place].traits
    key = tuple((name, r.sources, r.expression, r.algorithm is None) for name, r in rules.items())
    kernels, names = recall("derivation", key, lambda: _kernels(rules))
    steps = tuple(Step(name, rule, *kernels[name]) for name, rule in rules.items())
    return Derivation(place, steps, names)


Kernels = tuple[tuple[sp.Expr, ...], sp.Expr, sp.Expr]
"""The kernels that a rule was used on, what it makes of them, and that simplified."""


def _kernels(rules: Mapping[str, Rule]) -> tuple[dict[str, Kernels], dict[str, sp.Expr]]:
    """The kernels at each place, and the names of the long ones; rules in order of computation."""
    found: dict[str, Kernels] = {}
    names: dict[str, sp.Expr] = {}
    for place, rule in rules.items():
        used = tuple(names.get(source, found[source][-1]) for source in rule.sources)
        before = rule.apply(list(used))
        after = before if rule.algorithm is not None else simplify_kernel(before)
        if sp.count_ops(after) > READABLE:
            names[place] = sp.Function(f"K_{len(names) + 1}")(m, n)
        found[place] = used, before, after
    return found, names


def _simplifications(architecture: Architecture, init: Scheme) -> dict[sp.Symbol, sp.Expr]:
    """Symbols that an initialisation makes 0 or equal."""
    stds: dict[sp.Symbol, set[float]] = {}
    for numbers in local_bindings(architecture, init).values():
        for symbol in (*symbols.WEIGHT_STD.values(), symbols.sigma_b):
            if symbol.name in numbers:
                stds.setdefault(symbol, set()).add(numbers[symbol.name])
    biases = stds.pop(symbols.sigma_b, {0.0})
    known = {symbols.sigma_b: sp.Integer(0)} if biases == {0.0} else {}
    if len(set().union(*stds.values())) == 1:
        known |= dict.fromkeys(stds, symbols.sigma)
    return known


def _with(rule: Rule, known: Mapping[sp.Symbol, sp.Expr]) -> Rule:
    if not known:
        return rule
    return replace(rule, expression=_with_values(rule.expression, tuple(known.items())))


@lru_cache(maxsize=1024)
def _with_values(expression: sp.Expr, known: tuple[tuple[sp.Symbol, sp.Expr], ...]) -> sp.Expr:
    return expression.subs(known)


@lru_cache(maxsize=1024)
def simplify_kernel(expr: sp.Expr) -> sp.Expr:
    """Carry out the sums over Kronecker deltas and write Min(m, n)/(m n) as 1/Max(m, n)."""
    expr = expr.replace(lambda e: isinstance(e, sp.Sum), _prefix_sum)
    expr = sp.powdenest(expr, force=True)
    expr = expr.replace(
        sp.Min, lambda *of: sp.Mul(*of) / sp.Max(*of) if set(of) == {m, n} else sp.Min(*of)
    )
    return sp.factor_terms(sp.powsimp(expr))


def _prefix_sum(total: sp.Sum) -> sp.Expr:
    """sum over i <= m, j <= n, term by term: c delta_ij -> c Min(m, n), c -> c m n."""
    delta = sp.KroneckerDelta(i, j)
    upper = {variable: high for variable, _, high in total.limits}
    result = sp.Integer(0)
    for term in sp.Add.make_args(sp.expand(total.function)):
        rest = term.coeff(delta)
        if rest and not rest.has(i, j):
            result += rest * sp.Min(upper[i], upper[j])
        elif not term.has(i, j):
            result += term * upper[i] * upper[j]
        else:
            result += sp.Sum(term, *total.limits)
    return result


def _points(seed: str, *exprs: sp.Expr) -> list[dict[sp.Symbol, Any]]:
    """Random points, the same for the same step: positions on, above and below the diagonal,
    small widths and heads, rationals for the rest."""
    digest = hashlib.blake2b(repr((seed, exprs)).encode(), digest_size=8).digest()
    rng = random.Random(int.from_bytes(digest, "little"))
    free = sorted(set().union(*(expr.free_symbols for expr in exprs)) | {m, n}, key=str)

    def value(symbol: sp.Symbol) -> Any:
        if symbols.describe(symbol).domain.integer:
            return sp.Integer(rng.randint(2, 7))
        return sp.Rational(rng.randint(1, 40), rng.randint(41, 80))

    points = [{symbol: value(symbol) for symbol in free} for _ in CHECK_POSITIONS]
    for point, (left, right) in zip(points, CHECK_POSITIONS, strict=True):
        shift = rng.randint(0, 3)
        point[m], point[n] = sp.Integer(left + shift), sp.Integer(right + shift)
    return points


@lru_cache(maxsize=4096)
def _vanishes_on(remainder: sp.Expr, kernels: tuple[sp.Expr, ...]) -> bool:
    """Whether a rule's remainder is 0 at random points on these kernels.

    In floats, since duals are slow in exact numbers, and from the kernels' numbers: to put one
    expression into the other takes longer.
    """
    read = {
        function.__name__: kernel
        for function, kernel in zip((K, J, Q), kernels, strict=False)
        if remainder.has(function)
    }
    if any(kernel.has(sp.Sum) for kernel in (remainder, *read.values())):
        return False  # kernels that kept a sum are no kernels for which a remainder vanishes
    function, arguments = compiled(remainder)

    def value(argument: sp.Symbol, point: Point) -> float:
        head, _, view = argument.name.partition("_")
        if view not in VIEWS:
            return float(point[argument])
        left, right = (point[{"m": m, "n": n}[side]] for side in view)
        return _kernel_number(read[head], {**point, m: left, n: right})

    return all(
        abs(function(*(value(argument, point) for argument in arguments))) <= ZERO_IN_FLOATS
        for point in _points("remainder", remainder, *read.values())
    )


def _kernel_number(kernel: sp.Expr, point: Point) -> float:
    function, arguments, calls = _number_form(kernel)
    known = {**point, **{name: _named(call, point) for call, name in calls.items()}}
    return float(function(*(float(known[argument]) for argument in arguments)))


@lru_cache(maxsize=1024)
def _number_form(
    kernel: sp.Expr,
) -> tuple[Callable[..., Any], tuple[sp.Symbol, ...], Mapping[sp.Expr, sp.Symbol]]:
    """The kernel's number form, in which calls of named kernels are arguments."""
    calls = sorted(kernel.atoms(sp.core.function.AppliedUndef), key=str)
    names = dict(zip(calls, sp.symbols(f"call:{len(calls)}"), strict=True))
    flat = kernel.subs(names)
    arguments = tuple(sorted(flat.free_symbols, key=str))
    return compile_number_form(flat, arguments), arguments, names


def _named(call: sp.Expr, point: Point) -> sp.Rational:
    """A named kernel is a fixed random function, larger on its diagonal."""
    at = [argument.subs(point) for argument in call.args]
    text = f"{call.func.__name__}{sorted(map(int, at))}"
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
    return sp.Rational(digest % 97 + 100, 100) * (2 if at[0] == at[1] else 1)


def _number(expr: sp.Expr, point: Mapping[sp.Symbol, Any]) -> sp.Float:
    """The expression at a point, sums written out; a named kernel is a fixed random function."""
    value = expr.subs(point, simultaneous=True).doit()
    for call in value.atoms(sp.core.function.AppliedUndef):
        value = value.subs(call, _named(call, {}))
    return sp.N(value, CHECK_DIGITS)
