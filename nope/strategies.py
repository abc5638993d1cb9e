"""Hypothesis strategies: architectures, initialisations and questions, for tests of one's own.

    import numpy as np
    from hypothesis import given, reject, settings

    import theory
    from nope import strategies

    UNIFORM = strategies.architectures(causal=(True,), attention=("uniform",), depths=(1, 2))

    @settings(deadline=None)
    @given(strategies.questions(UNIFORM, observables=("cosine",)))
    def test_cosines_are_correlations(question):
        try:
            prediction = theory.predict(question)
        except NotImplementedError:  # the theory has no answer
            reject()
        assert np.abs(prediction.values).max() <= 1 + 1e-12

Every keyword argument narrows what is drawn.  One that lists values has the simplest first: that
is where a failing example shrinks to.  An empty list leaves a kind out where there are several
(`vocabularies`, `units`, `points`); elsewhere it is refused, as is any value that cannot be: with
a `ValueError`, as the strategy is made.  The `repr` of what is drawn, and what Hypothesis prints
of it, is code that makes it again from the names in `NAMES`; NumPy's numbers are made Python's.

Needs the extra `strategies`: `pip install 'nope-theory[strategies]'`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from numbers import Real
from types import UnionType
from typing import Any, get_args

import numpy as np

import nope
from nope import init
from nope.architecture import Architecture, NormPosition, decoder
from nope.checks import expect, expect_choice, expect_count, expect_finite, expect_flag
from nope.init import Scheme
from nope.layers import ACTIVATIONS, ATTENTION_KINDS, NORMS
from nope.questions import OBSERVABLES, Question, Weights
from nope.tokens import UNITS, EmbeddingTokens, GaussianTokens, TextTokens, Tokens, WithBos

try:
    from hypothesis import assume
    from hypothesis import strategies as st
except ImportError:
    raise ImportError(
        "expected Hypothesis for nope.strategies, got none; pip install 'nope-theory[strategies]'"
    ) from None

NAMES: Mapping[str, Any] = {**vars(init), **{name: getattr(nope, name) for name in nope.__all__}}
"""What code that rebuilds an example is written in: `eval(repr(example), dict(NAMES))`."""


# ------------------------------------------------------------------------------- arguments


def _listed(
    name: str,
    values: Iterable[Any],
    check: Callable[[str, Any], None] | None = None,
    *,
    may_be_empty: bool = False,
) -> tuple[Any, ...]:
    """The values that an argument lists, NumPy's made Python's; `check` refuses one by one."""
    plain = _plain(values)
    ordered = isinstance(plain, Iterable) and not isinstance(plain, str | bytes | set | frozenset)
    expect(ordered, f"{name} to list values in order", plain, f"write {name}=(value, ...)")
    listed = tuple(_plain(each) for each in plain)
    remedy = f"leave {name} out for the usual ones"
    expect(may_be_empty or bool(listed), f"at least one value of {name}", listed, remedy)
    if check is not None:
        for each in listed:
            check(name, each)
    return listed


def _plain(value: Any) -> Any:
    """Python's own values: NumPy's do not print as code in `NAMES`."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _is(words: str, kind: type | UnionType) -> Callable[[str, Any], None]:
    """A check that a value is of a kind."""

    def check(name: str, value: Any) -> None:
        expect(isinstance(value, kind), f"{name} to be {words}", value, f"change {name}")

    return check


_expect_positive = partial(expect_finite, positive=True)


def _at_least(least: int) -> Callable[[str, Any], None]:
    return partial(expect_count, least=least)


def _among(names: Iterable[str]) -> Callable[[str, Any], None]:
    return partial(expect_choice, allowed=tuple(names))


def _expect_number(name: str, value: Any) -> None:
    """Refuse what is not a finite number, of either sign."""
    number = math.nan
    if not isinstance(value, bool) and isinstance(value, Real):
        number = float(value)
    expect(math.isfinite(number), f"{name} to be a finite number", value, f"change {name}")


def _expect_strategy(name: str, value: Any) -> None:
    """Refuse what is not a strategy, or None."""
    ok = value is None or isinstance(value, st.SearchStrategy)
    remedy = "give one, as hypothesis.strategies.just(value)"
    expect(ok, f"{name} to be a Hypothesis strategy", value, remedy)


# ------------------------------------------------------------------------------ strategies


def tokens(
    *,
    stds: Sequence[float] = (1.0, 0.02),
    vocabularies: Sequence[int] = (1, 2, 16, 1000),
    exponents: Sequence[float] = (0.0, 1.0),
    units: Sequence[str] = tuple(UNITS),
    bos: Sequence[bool] = (False, True),
) -> st.SearchStrategy[Tokens]:
    """Gaussian tokens; a table of `vocabularies` rows; CPython's own text in `units`; a BOS."""
    std = st.sampled_from(_listed("stds", stds, _expect_positive))
    exponent = st.sampled_from(_listed("exponents", exponents, expect_finite))
    rows = _listed("vocabularies", vocabularies, _at_least(1), may_be_empty=True)
    cuts = _listed("units", units, _among(UNITS), may_be_empty=True)
    kinds: list[st.SearchStrategy[Tokens]] = [st.builds(GaussianTokens, std)]
    if rows:
        kinds.append(st.builds(EmbeddingTokens, st.sampled_from(rows), std, exponent))
    if cuts:
        kinds.append(st.builds(TextTokens, st.none(), std, st.sampled_from(cuts)))
    return _after_bos(st.one_of(kinds), _listed("bos", bos, expect_flag))


@st.composite
def _after_bos(draw: st.DrawFn, kinds: st.SearchStrategy[Tokens], bos: tuple[bool, ...]) -> Tokens:
    drawn = draw(kinds)
    return draw(st.builds(WithBos, st.just(drawn))) if draw(st.sampled_from(bos)) else drawn


_tokens = tokens  # where an argument has the name


def architectures(
    *,
    widths: Sequence[int] = (2, 3, 4, 8, 16, 32, 64),
    heads: Sequence[int] = range(1, 9),
    depths: Sequence[int] = range(1, 5),
    lengths: Sequence[int] = range(1, 33),
    expansions: Sequence[int] = (0, 1, 4),
    attention: Sequence[str] = ATTENTION_KINDS[::-1],
    norm: Sequence[str] = NORMS[::-1],
    norm_position: Sequence[str] = get_args(NormPosition)[::-1],
    activation: Sequence[str] = tuple(dict.fromkeys(("identity", *ACTIVATIONS))),
    eps: Sequence[float] = (0.0, 1e-5, 0.1),
    bias: Sequence[bool] = (False, True),
    causal: Sequence[bool] = (True, False),
    residual_scale: Sequence[float] = (1.0, 0.5),
    tokens: st.SearchStrategy[Tokens] | None = None,
) -> st.SearchStrategy[Architecture]:
    """`nope.decoder` of these widths (at least 2), of those `heads` that divide the width, of
    MLPs of `expansions` times the width; the other arguments are the decoder's own.

    A width that no number of heads divides is left out.  What an architecture does without is not
    told: no activation without an MLP.
    """
    _expect_strategy("tokens", tokens)
    choices = {
        "heads": _listed("heads", heads, _at_least(1)),
        "expansions": _listed("expansions", expansions, _at_least(0)),
        "n_layers": _listed("depths", depths, _at_least(0)),
        "n_ctx": _listed("lengths", lengths, _at_least(1)),
        "attention": _listed("attention", attention, _among(ATTENTION_KINDS)),
        "norm": _listed("norm", norm, _among(NORMS)),
        "norm_position": _listed("norm_position", norm_position, _among(get_args(NormPosition))),
        "activation": _listed("activation", activation, _among(ACTIVATIONS)),
        "eps": _listed("eps", eps, expect_finite),
        "bias": _listed("bias", bias, expect_flag),
        "causal": _listed("causal", causal, expect_flag),
        "residual_scale": _listed("residual_scale", residual_scale, expect_finite),
    }
    wide = _divided(_listed("widths", widths, _at_least(2)), choices["heads"])
    return _architectures(wide, choices, _tokens() if tokens is None else tokens)


def _divided(widths: tuple[int, ...], heads: tuple[int, ...]) -> tuple[int, ...]:
    """The widths that some number of heads divides; refused if there is none."""
    some = tuple(width for width in widths if any(width % count == 0 for count in heads))
    expect(bool(some), f"widths that some of heads={heads} divides", widths, "change either")
    return some


@st.composite
def _architectures(
    draw: st.DrawFn,
    widths: tuple[int, ...],
    choices: Mapping[str, tuple[Any, ...]],
    tokens: st.SearchStrategy[Tokens],
) -> Architecture:
    d_model = draw(st.sampled_from(widths))
    fitting = [count for count in choices["heads"] if d_model % count == 0]
    told: dict[str, Any] = {"n_heads": draw(st.sampled_from(fitting))}

    def tell(*names: str) -> None:
        told.update({name: draw(st.sampled_from(choices[name])) for name in names})

    tell("n_layers", "n_ctx")
    told["d_ff"] = d_model * draw(st.sampled_from(choices["expansions"]))
    tell("attention", "norm_position", "bias", "causal", "residual_scale")
    if told["norm_position"] != "none":
        tell("norm", "eps")
    if told["d_ff"]:
        tell("activation")
    told["tokens"] = draw(tokens)
    usual = {**DEFAULTS, "d_ff": 4 * d_model, "tokens": GaussianTokens()}
    unusual = {name: st.just(value) for name, value in told.items() if value != usual[name]}
    return draw(st.builds(decoder, st.just(d_model), **unusual))


DEFAULTS = {name: each.default for name, each in inspect.signature(decoder).parameters.items()}
"""What the decoder's arguments are where they are not told."""


def schemes(
    *,
    constructors: Sequence[Callable[..., Scheme]] | None = None,
    std: Sequence[float] | None = None,
    gain: Sequence[float] | None = None,
    **others: Sequence[Any],
) -> st.SearchStrategy[Scheme]:
    """What `constructors` make of these standard deviations and gains.

    By default all of `nope.init`, of the values in `ARGUMENTS`; a plugin's schemes are drawn where
    they are named, as their names are not in `NAMES`.  `others` are values of other arguments that
    constructors have, as `cut=(2.0, 3.0)`.  Raises `ValueError` for one that none of them has, and
    for a constructor that requires one without values.
    """
    numbers = {"std": std, "gain": gain}
    values = {
        **{name: _listed(name, each) for name, each in others.items()},
        **{n: _listed(n, each, _expect_number) for n, each in numbers.items() if each is not None},
    }
    made = _listed("constructors", CONSTRUCTORS if constructors is None else constructors)
    known = {name for each in made for name in _parameters(each)}
    unknown = [name for name in values if name not in known]
    expect(not unknown, f"arguments of {sorted(known)}", unknown, "rename or drop them")
    told = [_choices(each, {**ARGUMENTS, **values}) for each in made]
    pairs = zip(made, told, strict=True)
    return st.one_of([_made(each, choices, _open(told[0])) for each, choices in pairs])


CONSTRUCTORS: Sequence[Callable[..., Scheme]] = (
    *(each for each in init.SCHEMES.values() if each.__module__ == init.__name__),
    init.VarianceScaling,
)
"""Of every scheme of `nope.init`."""
ARGUMENTS: Mapping[str, Sequence[Any]] = {
    "std": (0.1, 0.02, 0.3),
    "gain": (1.0, 0.5),
    "cut": (2.0, 1.0, 10.0),
    "mode": tuple(init.FANS),
    "nonlinearity": tuple(init.GAINS_SQUARED),
    "distribution": tuple(init.OF_VARIANCE),
    "scale": (1.0, 0.25),
    "base_width": (64, 256),
    "packed": (True, False),
}
"""Values of the constructors' arguments; one that is not here keeps its default."""


VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _parameters(constructor: Callable[..., Scheme]) -> dict[str, inspect.Parameter]:
    """The arguments of a constructor that have a name of their own."""
    try:
        found = inspect.signature(constructor).parameters
    except (TypeError, ValueError):
        remedy = "take one of nope.init, or wrap it in a function"
        expect(False, "constructors whose arguments can be read", constructor, remedy)
    return {name: each for name, each in found.items() if each.kind not in VARIADIC}


def _choices(
    constructor: Callable[..., Scheme], values: Mapping[str, Sequence[Any]]
) -> dict[str, Sequence[Any]]:
    """The values of a constructor's arguments; refused if it requires one that has none."""
    known = _parameters(constructor)
    required = [name for name, each in known.items() if each.default is each.empty]
    missing = [name for name in required if name not in values]
    wanted = f"{_name(constructor)} to require only arguments that have values"
    expect(not missing, wanted, missing, "list their values")
    return {name: values[name] for name in known if name in values}


def _name(constructor: Callable[..., Scheme]) -> str:
    return getattr(constructor, "__name__", repr(constructor))


def _open(choices: Mapping[str, Sequence[Any]]) -> int:
    """How many choices there are: of one value there is none."""
    return sum(len(each) > 1 for each in choices.values())


@st.composite
def _made(
    draw: st.DrawFn,
    constructor: Callable[..., Scheme],
    choices: Mapping[str, Sequence[Any]],
    least: int,
) -> Scheme:
    """What a constructor makes, drawn as `least` choices or more.

    Hypothesis shrinks to what takes the fewest: none may take fewer than the first constructor.
    """
    made = draw(
        st.builds(constructor, **{name: st.sampled_from(each) for name, each in choices.items()})
    )
    for _ in range(least - _open(choices)):
        draw(st.integers(0, 0))
    remedy = "give it a law and a hash"
    expect(isinstance(made, Scheme), f"{_name(constructor)} to make a Scheme", made, remedy)
    return made


def questions(
    architecture: st.SearchStrategy[Architecture] | None = None,
    init: st.SearchStrategy[Scheme] | None = None,
    *,
    places: Sequence[str] = ("*",),
    observables: Sequence[str] = tuple(OBSERVABLES),
    given: Sequence[Weights | None] = (None,),
    points: Sequence[float] = (0.0, 0.1, -0.1, 1.0, -1.0),
) -> st.SearchStrategy[Question]:
    """Questions with an answer: `question.reason_not_applicable` is None.

    `places` are globs, as `"*.attn.scores"`; `points` are those at which `cdf` may ask, and
    without them it is left out.
    """
    _expect_strategy("architecture", architecture)
    _expect_strategy("init", init)
    at = _listed("points", points, _expect_number, may_be_empty=True)
    named = _listed("observables", observables, _among(OBSERVABLES))
    asked = tuple(name for name in named if at or not _has_points(name))
    expect(bool(asked), f"points for {', '.join(named)}", at, "give points=(x_1, x_2, ...)")
    return _questions(
        architectures() if architecture is None else architecture,
        schemes() if init is None else init,
        _listed("places", places, _is("a name or a glob of names", str)),
        asked,
        _listed("given", given, _is("None or Weights(seed)", Weights | None)),
        at,
    )


@st.composite
def _questions(
    draw: st.DrawFn,
    architectures: st.SearchStrategy[Architecture],
    schemes: st.SearchStrategy[Scheme],
    places: tuple[str, ...],
    observables: tuple[str, ...],
    given: tuple[Weights | None, ...],
    points: tuple[float, ...],
) -> Question:
    of, scheme = draw(architectures), draw(schemes)
    _is("drawn from nope.decoder or the like", Architecture)("architecture", of)

    def asked(place: str) -> Iterator[str]:
        return (name for name in observables if _has_answer(of, scheme, place, name))

    named = [place for place in of.places() if any(fnmatchcase(place, glob) for glob in places)]
    known = [place for place in named if any(asked(place))]
    assume(known)
    place = draw(st.sampled_from(known))
    observable = draw(st.sampled_from(list(asked(place))))
    told: dict[str, Any] = {"given": draw(st.sampled_from(given))}
    if _has_points(observable):
        some = st.lists(st.sampled_from(points), min_size=1, unique=True)
        told["points"] = tuple(sorted(draw(some)))
    unusual = {name: st.just(value) for name, value in told.items() if value is not None}
    parts = (of, scheme, place, observable)
    return draw(st.builds(Question, *map(st.just, parts), **unusual))


def _has_points(observable: str) -> bool:
    return OBSERVABLES[observable].shape == "points"


def _has_answer(of: Architecture, scheme: Scheme, place: str, observable: str) -> bool:
    points = (0.0,) if _has_points(observable) else ()
    return not Question(of, scheme, place, observable, points=points).reason_not_applicable
