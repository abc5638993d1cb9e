"""Estimators of a question: the plain one, and those with less variance for the same mean.

**Integrating a map out.**  Let y = x W + b with W (fan_in x fan_out) of independent entries of mean
0 and variance s^2, b likewise of variance t^2, both independent of x.  Then E W W' = fan_out s^2 I,
so for any positions m and n

    E[<y_m, y_n> / fan_out | x] = fan_in s^2 <x_m, x_n> / fan_in + t^2.

By the tower rule the mean kernel at y is that at x times the gain fan_in s^2, plus t^2, and by
Rao and Blackwell the conditional mean has no more variance than what it replaces.  A residual sum
x + a y adds <x_m, x_n>/d, the cross terms being 0 on average.  Where y reads a mix of values
z_m = sum_n a_mn v_n, v = u V + c, with a pattern that is independent of V given u, the values are
integrated too: rows of a sum to 1, and V's columns are dealt to the H heads, so

    E[<z_m, z_n> / d | u, a] = fan_in s_V^2 (1/H) sum_h a^h_m (u u' / fan_in) a^h_n' + t_V^2.

At m = n these are second moments.  So second moments and kernels, which are linear in inner
products, can be had from an earlier place; cosines, fourth moments and shares cannot.

**Facts.**  The gains are no longer measured then but spent.  Every estimator lists what it spends
(`spent`), in the words of `nope.facts` in which claims list what they assume and assert: a claim
that assumes a gain may be measured with it, one that asserts it may not.  What is spent comes from
`nope.init`, the law of a weight; nothing here knows a prediction.

**Several inputs per draw.**  With V_b the variance of a statistic between draws of the weights and
V_w that between inputs within one, a draw with n inputs has variance V_b + V_w/n and takes time
c_b + n c_w: the product is least at n = sqrt(c_b V_w / (c_w V_b)), with components that
`montecarlo.split` measures.  The draw of the weights stays the unit.

Antithetic inputs -x are left out: norms and maps are odd, scores even, so without biases an
attention layer gives -y for -x, and second moments and kernels learn nothing from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from montecarlo.observables import STATISTICS, gram, vectors
from nope import facts
from nope.architecture import Architecture
from nope.init import law_of
from nope.operations import Add, Linear, Mix, Operation, Weight
from nope.questions import Question, Transform
from nope.transformer import Product

LINEAR_IN_KERNELS = ("second_moment", "mean_second_moment", "kernel")
"""Observables whose mean is linear in the mean of <x_m, x_n>."""
TILE = 64
"""Rows of a pattern, and columns of a kernel, that are multiplied at a time, to skip zeros."""

PLAIN = "plain"

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Term:
    """`factor` times the observable of a place, or of its mix at the place `mix`, unprojected."""

    factor: float
    place: str
    mix: str | None = None


@dataclass(frozen=True)
class Integrated:
    """A question's answer with the last maps integrated out: terms at earlier places, + offset.

    `spent` are the facts that take the maps' place, in the words of `nope.facts`.
    """

    question: Question
    terms: tuple[Term, ...]
    offset: float
    weights: tuple[str, ...]
    spent: tuple[str, ...]


Asked = Question | Integrated
"""How a question is answered: a question stands for its own, plain estimator."""


def question_of(asked: Asked) -> Question:
    return asked.question if isinstance(asked, Integrated) else asked


def spent(asked: Asked) -> tuple[str, ...]:
    """The facts that an estimator takes for granted; the plain one takes none."""
    return asked.spent if isinstance(asked, Integrated) else ()


def places_of(asked: Asked) -> tuple[str, ...]:
    """The places that an estimator observes."""
    if isinstance(asked, Question):
        return (asked.place,)
    places = asked.question.architecture.places()
    patterns = [pattern for term in asked.terms if (pattern := _pattern(places, term))]
    return tuple(dict.fromkeys([*(term.place for term in asked.terms), *patterns]))


def words(asked: Asked) -> str:
    """What an estimator is called, as part of the key of kept evidence."""
    if isinstance(asked, Question):
        return PLAIN
    return f"{' and '.join(asked.weights)} integrated out"


# ------------------------------------------------------------------------- which are there


def best(question: Question, granted: Iterable[str] | None = None) -> Integrated | None:
    """The estimator that integrates most, two maps or one, and spends only what is granted.

    All facts are granted where none are named; None where nothing can be integrated.
    """
    found = [one for maps in (2, 1) if (one := integrated(question, maps)) is not None]
    if granted is None:
        return next(iter(found), None)
    return next((one for one in found if set(one.spent) <= set(granted)), None)


def integrated(question: Question, maps: int = 1) -> Integrated | None:
    """The estimator with so many maps integrated out; None where there is none.

    Two are the map at the place and the value map before it.
    """
    architecture = question.architecture
    allowed = question.given is None and question.observable in LINEAR_IN_KERNELS
    if not allowed or question.place not in architecture.places():
        return None
    return _integrated(question, question.operation, maps)


def _integrated(question: Question, operation: Operation, maps: int) -> Integrated | None:
    match operation:
        case Linear():
            return _through_map(question, operation, maps)
        case Add():
            return _through_sum(question, operation, maps)
        case Mix() if maps == 1:
            return _through_mix(question, operation)
    return None


def _through_map(question: Question, linear: Linear, maps: int) -> Integrated | None:
    """E <y_m, y_n> / fan_out = fan_in s^2 <x_m, x_n> / fan_in + t^2."""
    gain, offset = _moments(question, linear)
    if gain is None:
        return None
    source = question.architecture.places()[linear.inputs[0]]
    own = (linear.weight.path,), (facts.gain(linear.weight.role),)
    if maps == 1:
        return Integrated(question, (Term(gain, source.place),), offset, *own)
    inner = _integrated(question, source, maps - 1) if isinstance(source, Mix) else None
    return None if inner is None else _scaled(inner, gain, offset, *own)


def _through_mix(question: Question, mix: Mix) -> Integrated | None:
    """The values integrated out of their mix, where nothing but the mix has read them."""
    architecture = question.architecture
    pattern, value = mix.inputs
    linear = architecture.places()[value]
    if not isinstance(linear, Linear) or not (mix.uniform or _unread(architecture, pattern, value)):
        return None
    gain, offset = _moments(question, linear)
    if gain is None:
        return None
    term = Term(gain, linear.inputs[0], mix.place)
    return Integrated(
        question, (term,), offset, (linear.weight.path,), (facts.gain(linear.weight.role),)
    )


def _through_sum(question: Question, add: Add, maps: int) -> Integrated | None:
    """E <x_m + a y_m, x_n + a y_n> = <x_m, x_n> + a^2 E <y_m, y_n>, if x has not read W."""
    source, branch = add.inputs
    places = question.architecture.places()
    last = places[branch]
    if not isinstance(last, Linear) or not _unread(question.architecture, source, branch):
        return None
    inner = _through_map(question, last, maps)
    if inner is None:
        return None
    whole = _scaled(inner, add.scale**2, 0.0, (), ())
    return Integrated(
        question,
        (Term(1.0, source), *whole.terms),
        whole.offset,
        whole.weights,
        whole.spent,
    )


def _scaled(
    inner: Integrated, gain: float, offset: float, weights: tuple[str, ...], spent: tuple[str, ...]
) -> Integrated:
    """gain times an estimator, plus offset, spending more facts."""
    return Integrated(
        inner.question,
        tuple(Term(gain * term.factor, term.place, term.mix) for term in inner.terms),
        gain * inner.offset + offset,
        (*inner.weights, *weights),
        (*inner.spent, *spent),
    )


def _moments(question: Question, linear: Linear) -> tuple[float | None, float]:
    """fan_in s^2 of a map and t^2 of its bias; None where its entries are not independent, or tied.

    Every weight is read by one place, so that it is independent of all that comes before.
    """
    architecture = question.architecture
    uses = Counter(weight.path for weight in architecture.weights)
    laws = [law_of(question.init, weight, architecture) for weight in linear.weights]
    free = all(law.independent for law in laws) and all(uses[w.path] == 1 for w in linear.weights)
    offset = sum(law.variance for law in laws[1:])
    return (linear.weight.fan_in * laws[0].variance if free else None), offset


def _unread(architecture: Architecture, place: str, map_place: str) -> bool:
    """Whether a place is computed without a map's output."""
    return map_place not in {operation.place for operation in architecture.upstream(place)}


# --------------------------------------------------------------------- what they compute


def per_draw(asked: Asked, values: Mapping[Transform | None, Values]) -> Tensor:
    """The statistic of every draw, draws x K x entries, from the values of each look."""
    question = question_of(asked)
    if isinstance(asked, Integrated):
        total = sum(term.factor * _observed(asked, term, values[None]) for term in asked.terms)
        return total + torch.as_tensor(asked.offset)
    looks = dict.fromkeys((None, question.kind.transform))
    arrays = [values[look][question.place] for look in looks]
    return STATISTICS[question.observable].components(*arrays, question)


def _observed(asked: Integrated, term: Term, values: Values) -> Tensor:
    """The observable at a term's place, as `montecarlo.observables` shapes it."""
    question = asked.question
    index = torch.as_tensor(question.grid - 1)
    rows, kernel = _inner_products(question.architecture, term, values)
    match question.observable:
        case "kernel":
            return kernel(index).unsqueeze(1)
        case "second_moment":
            return rows().unsqueeze(1)
        case _:
            return rows().cpu().double().mean(-1)[:, None, None]


def _inner_products(
    architecture: Architecture, term: Term, values: Values
) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
    """<x_m, x_m>/d at every position, and <x_m, x_n>/d on a grid, of a place or of its mix."""
    x = vectors(values[term.place])
    places = architecture.places()
    pattern = _pattern(places, term)
    if pattern is None:
        x = x if term.mix is None else _running_mean(x)
        return (lambda: x.square().mean(-1)), (lambda grid: _kernel(x[:, grid.to(x.device)]))
    a, inner = values[pattern], _kernel(x)
    read = (pattern, *places[pattern].inputs)
    causal = all(getattr(places[name], "causal", True) for name in read)
    return (lambda: quadratic(a, inner, causal)), (lambda grid: bilinear(a, inner, grid))


def _pattern(places: Mapping[str, Operation], term: Term) -> str | None:
    """The place of the weights of a term's mix; None if they are 1/m, or nothing is mixed."""
    mix = places[term.mix] if term.mix is not None else None
    return mix.inputs[0] if isinstance(mix, Mix) and not mix.uniform else None


def _kernel(x: Float[Tensor, "draws n d"]) -> Float[Tensor, "draws n n"]:
    return gram(x) / x.shape[-1]


def _running_mean(x: Tensor) -> Tensor:
    counts = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
    return x.cumsum(1) / counts.unsqueeze(-1)


def quadratic(
    a: Float[Tensor, "draws heads queries keys"],
    K: Float[Tensor, "draws keys keys"],
    causal: bool,
) -> Float[Tensor, "draws queries"]:
    """The mean over heads of a_m K a_m' = 2 a_m T a_m', tile by tile.

    T is the lower triangle of K with half its diagonal; keys after a causal tile are not read.
    """
    draws, heads, length, _ = a.shape
    half = K.tril()
    half.diagonal(dim1=1, dim2=2).mul_(0.5)
    tiles = []
    for start in range(0, length, TILE):
        stop = min(start + TILE, length)
        keys = stop if causal else length
        rows = a[:, :, start:stop, :keys].reshape(draws, -1, keys)
        forms = [_form(rows, half, at, min(at + TILE, keys)) for at in range(0, keys, TILE)]
        tiles.append(2 * torch.stack(forms).sum(0).view(draws, heads, -1).mean(1))
    return torch.cat(tiles, 1)


def _form(
    rows: Float[Tensor, "draws m keys"], half: Float[Tensor, "draws n n"], start: int, stop: int
) -> Float[Tensor, "draws m"]:
    """The part of a T a' that has these columns of T, which is 0 above them."""
    columns = half[:, start : rows.shape[-1], start:stop]
    return torch.bmm(rows[:, :, start:], columns).mul_(rows[:, :, start:stop]).sum(-1)


def bilinear(a: Tensor, K: Tensor, grid: Tensor) -> Float[Tensor, "draws grid grid"]:
    """The mean over heads of a_m K a_n', m and n on the grid."""
    rows = a[:, :, grid.to(a.device)]
    return (rows @ K.unsqueeze(1) @ rows.transpose(2, 3)).mean(1)


# ------------------------------------------------------------------ several inputs per draw


def allows_inputs(question: Question) -> bool:
    """Whether a draw may have several inputs.

    With given weights the input is the unit; a symmetry holds in a draw or not, which an average
    over inputs would blur; a table of tokens is read by every input, and is not kept once for each.
    """
    shared_tokens = question.architecture.tokens.weights(question.architecture.d_model)
    return question.given is None and not question.kind.is_event and not shared_tokens


def shared(
    weight: Callable[[Weight], Tensor], product: Product, inputs: int
) -> tuple[Callable[[Weight], Tensor], Product]:
    """Weights and products for `inputs` inputs of each draw, one after the other on the first axis.

    A product takes them as so many more positions; an array is repeated.
    """
    if inputs == 1:
        return weight, product

    def multiply(x: Tensor, linear: Linear) -> Tensor:
        y = product(x.reshape(-1, inputs * x.shape[1], x.shape[2]), linear)
        return y.view(*x.shape[:2], -1)

    return (lambda asked: weight(asked).repeat_interleave(inputs, 0)), multiply
