"""Which transformations of the inputs a network cannot see, read off its operations.

A third interpreter of the operation list, beside the torch modules and the kernel rules: it
follows what the vector x_m at a place depends on.  By induction over the operations x_m is a
function, the same one at every m, of the token m and of

    nothing else                        before any attention;
    the multiset of all tokens          after attention without a mask;
    the multiset of the tokens n <= m   after attention with the causal mask;
    the order of those tokens too       after attention, of either kind, over keys or values that
                                        depend on the tokens n <= m.

Pointwise operations add nothing.  Attention sums over keys and values with weights that a query
sets: a sum over positions forgets their order, unless each term carries some of it.

Three theorems follow, for every weight and every input.  Source: derived here; equivariance
without a mask is classical (Lee et al. 2019, Set Transformer).

>>> import nope
>>> for n_layers in (1, 2):
...     stack = nope.decoder(8, 2, n_layers, n_ctx=4)
...     print(past_permutation(stack, "ln_final"))
Invariance(holds=True, reason='x_L depends on token L and the multiset of the others it sees')
Invariance(holds=False, reason='blocks.1.attn.z reads vectors that depend on their prefixes')
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce, singledispatch
from operator import or_
from typing import Any

from nope.architecture import Architecture
from nope.checks import expect
from nope.init import law_of
from nope.operations import (
    Activate,
    Add,
    Average,
    Embed,
    Linear,
    Mix,
    Multiply,
    Normalise,
    Operation,
    Scores,
    Softmax,
    Uniform,
)
from nope.questions import OBSERVABLES, Question

# ------------------------------------------------------------------------ the interpreter


@dataclass(frozen=True)
class Dependence:
    """What x_m depends on besides token m; each a place where it first entered, or "".

    others: on tokens at other positions
    prefix: on which of them lie before m
    order:  on the order of those
    """

    others: str = ""
    prefix: str = ""
    order: str = ""

    def __or__(self, other: Dependence) -> Dependence:
        return Dependence(
            self.others or other.others, self.prefix or other.prefix, self.order or other.order
        )


ALONE = Dependence()


@dataclass(frozen=True)
class Pattern:
    """What attention weights a_mn depend on: through the query m, and through each key n."""

    query: Dependence
    key: Dependence
    causal: bool


@singledispatch
def dependence(operation: Operation, inputs: list[Any]) -> Any:
    """What the operation's place depends on: a `Dependence`, or a `Pattern` at a pair place.

    Raises `NotImplementedError` for an operation without a rule: one may look at m itself.
    """
    raise NotImplementedError(
        f"expected an operation whose symmetries are known, got {type(operation).__name__}; "
        "register it with theory.symmetry.dependence"
    )


@dependence.register
def _(operation: Embed, inputs: list[Dependence]) -> Dependence:
    return ALONE


@dependence.register
def _(operation: Normalise | Linear | Activate | Multiply, inputs: list[Dependence]) -> Dependence:
    return reduce(or_, inputs)


@dependence.register
def _(operation: Add, inputs: list[Dependence]) -> Dependence:
    """A branch of scale 0 is not there."""
    stream, branch = inputs
    return stream | branch if operation.scale else stream


@dependence.register
def _(operation: Scores, inputs: list[Dependence]) -> Pattern:
    query, key = inputs
    return Pattern(query, key, operation.causal)


@dependence.register
def _(operation: Softmax, inputs: list[Pattern]) -> Pattern:
    """a_mn depends on every key as the sum of the exponentials, which has no order."""
    return inputs[0]


@dependence.register
def _(operation: Uniform, inputs: list[Dependence]) -> Pattern:
    return Pattern(ALONE, ALONE, operation.causal)


@dependence.register
def _(operation: Mix, inputs: list[Any]) -> Dependence:
    pattern, values = inputs
    return _attended(operation.place, pattern, values)


@dependence.register
def _(operation: Average, inputs: list[Dependence]) -> Dependence:
    return _attended(operation.place, Pattern(ALONE, ALONE, causal=True), inputs[0])


def _attended(place: str, pattern: Pattern, values: Dependence) -> Dependence:
    """A sum over n of terms that depend on query m and on what lies at n.

    A query may depend on its prefix, as one and the same query meets every term; a key or value
    that does makes the sum tell orders apart.
    """
    terms = pattern.key | values
    new = Dependence(place, place if pattern.causal else "", place if terms.prefix else "")
    return pattern.query | terms | new


def dependence_at(architecture: Architecture, place: str) -> Dependence:
    """What x_m at `place` depends on besides token m.

    Raises `LookupError` for an unknown place, `ValueError` for one of pairs.
    """
    found: dict[str, Any] = {}
    for operation in architecture.upstream(place):
        inputs = [found[name] for name in operation.inputs]
        found[operation.place] = dependence(operation, inputs)
    vector = isinstance(found[place], Dependence)
    expect(vector, "a place with one vector per position", place, "ask at attn.z or attn_out")
    return found[place]  # type: ignore[no-any-return]


# --------------------------------------------------------------------------- the theorems


@dataclass(frozen=True)
class Invariance:
    """Whether a theorem applies at a place, and the operation or the fact that decides it."""

    holds: bool
    reason: str


def past_permutation(architecture: Architecture, place: str) -> Invariance:
    """x_L(t_pi(1), ..., t_pi(L-1), t_L) = x_L(t_1, ..., t_L) for every permutation pi.

    Holds up to one causal attention, and without a mask at any depth.  Where it does not, x_L
    tells some orders apart; up to two positions there is one order only.
    """
    found = dependence_at(architecture, place)
    if too_few := _too_few("past_permutation", architecture):
        return Invariance(True, too_few)
    if found.order:
        return Invariance(False, f"{found.order} reads vectors that depend on their prefixes")
    others = "and the multiset of the others it sees" if found.others else "alone"
    return Invariance(True, f"x_L depends on token L {others}")


def permutation(architecture: Architecture, place: str) -> Invariance:
    """x_m(t_pi(1), ..., t_pi(L)) = x_pi(m)(t_1, ..., t_L) for every m and permutation pi.

    Equivariance: holds at any depth, unless a causal mask shows position m the tokens n <= m only.
    """
    found = dependence_at(architecture, place)
    if too_few := _too_few("permutation", architecture):
        return Invariance(True, too_few)
    if found.prefix:
        return Invariance(False, f"{found.prefix} is masked: m sees the tokens n <= m only")
    others = "and the multiset of all tokens" if found.others else "alone"
    return Invariance(True, f"x_m depends on token m {others}")


def equal_tokens(architecture: Architecture, place: str) -> Invariance:
    """t_1 = ... = t_L implies x_1 = ... = x_L: the mask alone, without content, says nothing.

    Holds at any depth: attention weights sum to one, so a mean of equal values is that value,
    over however many keys; every other operation does the same at every position.
    """
    dependence_at(architecture, place)  # refuses an operation that might look at m itself
    return Invariance(True, "attention weights sum to one: means of equal vectors are equal")


def _too_few(name: str, architecture: Architecture) -> str:
    least, n_ctx = OBSERVABLES[name].least, architecture.n_ctx
    return f"n_ctx is {n_ctx}: there is nothing to permute" if n_ctx < least else ""


THEOREMS: Mapping[str, Callable[[Architecture, str], Invariance]] = {
    "past_permutation": past_permutation,
    "permutation": permutation,
    "equal_tokens": equal_tokens,
}
"""The theorem that each observable with a transformed input puts to the test."""


def theorem(question: Question) -> Invariance:
    """What the theorem of the question's observable says at its place; `LookupError` without."""
    if question.observable not in THEOREMS:
        raise LookupError(
            f"expected an observable with a theorem ({', '.join(THEOREMS)}), "
            f"got {question.observable}; ask for one of these"
        )
    return THEOREMS[question.observable](question.architecture, question.place)


def share_broken(question: Question) -> float:
    """The share of draws in which the transformation is seen: 0 where the theorem holds, else 1.

    1 because the gap is an analytic function of weights and inputs (piecewise with a ReLU):
    where it is not 0 everywhere it is 0 almost nowhere.  In exact arithmetic: a gap may be real
    and smaller than the rounding that the measurement allows for.

    Raises `NotImplementedError` where the theorem does not hold and draws are not generic:
    tokens that may repeat, matrices that are 0, norms over one or two coordinates.
    """
    if theorem(question).holds:
        return 0.0
    architecture, d = question.architecture, question.architecture.d_model
    maps = [o for o in architecture.upstream(question.place) if isinstance(o, Linear)]
    variances = [law_of(question.init, o.weight, architecture).variance for o in maps]
    generic = {
        "tokens that never repeat": not architecture.tokens.weights(d),
        "matrices other than 0": all(variances),
        "d_model of at least 3": d > 2,
    }
    for requirement, met in generic.items():
        if not met:
            raise NotImplementedError(
                f"expected {requirement} to predict a {question.observable} that is not 0, got "
                f"{architecture} and {question.init}; measure it with montecarlo.measure"
            )
    return 1.0
