"""Hypothesis strategies: architectures, initialisations and questions, for tests of one's own.

    @given(nope.strategies.questions(observables=("cosine",)))
    def test_cosines_are_correlations(question):
        assert np.abs(theory.predict(question).values).max() <= 1

Every keyword argument narrows what is drawn.  One that lists values has the simplest first: that
is where a failing example shrinks to, and an empty list leaves a kind out where there are
several.  The `repr` of what is drawn, and what Hypothesis prints of it, is code that makes it
again from the names in `NAMES`.

Needs the extra `strategies`: `pip install 'nope-theory[strategies]'`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, get_args

import nope
from nope import init
from nope.architecture import Architecture, NormPosition, decoder
from nope.checks import expect
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


@st.composite
def tokens(
    draw: st.DrawFn,
    *,
    stds: Sequence[float] = (1.0, 0.02),
    vocabularies: Sequence[int] = (1, 2, 16, 1000),
    exponents: Sequence[float] = (0.0, 1.0),
    units: Sequence[str] = tuple(UNITS),
    bos: Sequence[bool] = (False, True),
) -> Tokens:
    """Gaussian tokens; a table of `vocabularies` rows; CPython's own text in `units`; a BOS."""
    std = st.sampled_from(stds)
    kinds: list[st.SearchStrategy[Tokens]] = [st.builds(GaussianTokens, std)]
    if vocabularies:
        rows, exponent = st.sampled_from(vocabularies), st.sampled_from(exponents)
        kinds.append(st.builds(EmbeddingTokens, rows, std, exponent))
    if units:
        kinds.append(st.builds(TextTokens, st.none(), std, st.sampled_from(units)))
    drawn = draw(st.one_of(kinds))
    return draw(st.builds(WithBos, st.just(drawn))) if draw(st.sampled_from(bos)) else drawn


@st.composite
def architectures(
    draw: st.DrawFn,
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
) -> Architecture:
    """`nope.decoder` of these widths (at least 2), of those `heads` that divide the width, of
    MLPs of `expansions` times the width; the other arguments are the decoder's own.

    What an architecture does without is not told: no activation without an MLP.
    """
    d_model = draw(st.sampled_from(widths))
    told: dict[str, Any] = {}

    def tell(**choices: Sequence[Any]) -> None:
        told.update({name: draw(st.sampled_from(each)) for name, each in choices.items()})

    tell(n_heads=[count for count in heads if d_model % count == 0], n_layers=depths)
    tell(n_ctx=lengths, d_ff=[d_model * times for times in expansions])
    tell(attention=attention, norm_position=norm_position, bias=bias, causal=causal)
    tell(residual_scale=residual_scale)
    if told["norm_position"] != "none":
        tell(norm=norm, eps=eps)
    if told["d_ff"]:
        tell(activation=activation)
    told["tokens"] = draw(_tokens() if tokens is None else tokens)
    usual = {**DEFAULTS, "d_ff": 4 * d_model, "tokens": GaussianTokens()}
    unusual = {name: st.just(value) for name, value in told.items() if value != usual[name]}
    return draw(st.builds(decoder, st.just(d_model), **unusual))


_tokens = tokens  # where an argument has the name
DEFAULTS = {name: each.default for name, each in inspect.signature(decoder).parameters.items()}
"""What the decoder's arguments are where they are not told."""


def schemes(
    *,
    constructors: Sequence[Callable[..., Scheme]] | None = None,
    std: Sequence[float] = (0.1, 0.02, 0.3),
    gain: Sequence[float] = (1.0, 0.5),
    **others: Sequence[Any],
) -> st.SearchStrategy[Scheme]:
    """What `constructors` make of these standard deviations and gains.

    By default all of `nope.init`; a plugin's schemes are drawn where they are named, as their names
    are not in `NAMES`.  `others` are values of other arguments that constructors have, as
    `cut=(2.0, 3.0)`.  Raises `ValueError` for one that none of them has.
    """
    made = CONSTRUCTORS if constructors is None else constructors
    known = {name for each in made for name in inspect.signature(each).parameters}
    expect(known.issuperset(others), f"arguments of {sorted(known)}", list(others), "rename them")
    values = {**ARGUMENTS, "std": std, "gain": gain, **others}
    return st.one_of([_made(constructor, values) for constructor in made])


CONSTRUCTORS: Sequence[Callable[..., Scheme]] = (
    *(each for each in init.SCHEMES.values() if each.__module__ == init.__name__),
    init.VarianceScaling,
)
"""Of every scheme of `nope.init`."""
ARGUMENTS: Mapping[str, Sequence[Any]] = {
    "cut": (2.0, 1.0, 10.0),
    "mode": tuple(init.FANS),
    "nonlinearity": tuple(init.GAINS_SQUARED),
    "distribution": tuple(init.OF_VARIANCE),
    "scale": (1.0, 0.25),
    "base_width": (64, 256),
    "packed": (True, False),
}
"""Values of the constructors' other arguments; one that is not here keeps its default."""


def _made(
    constructor: Callable[..., Scheme], values: Mapping[str, Sequence[Any]]
) -> st.SearchStrategy[Scheme]:
    known = [name for name in inspect.signature(constructor).parameters if name in values]
    return st.builds(constructor, **{name: st.sampled_from(values[name]) for name in known})


@st.composite
def questions(
    draw: st.DrawFn,
    architecture: st.SearchStrategy[Architecture] | None = None,
    init: st.SearchStrategy[Scheme] | None = None,
    *,
    places: Sequence[str] = ("*",),
    observables: Sequence[str] = tuple(OBSERVABLES),
    given: Sequence[Weights | None] = (None,),
    points: Sequence[float] = (0.0, 0.1, -0.1, 1.0, -1.0),
) -> Question:
    """Questions with an answer: `question.reason_not_applicable` is None.

    `places` are globs, as `"*.attn.scores"`; `points` are those at which `cdf` may ask.
    """
    of = draw(architectures() if architecture is None else architecture)
    scheme = draw(schemes() if init is None else init)

    def asked(place: str) -> Iterator[str]:
        return (name for name in observables if _has_answer(of, scheme, place, name))

    named = [place for place in of.places() if any(fnmatchcase(place, glob) for glob in places)]
    known = [place for place in named if any(asked(place))]
    assume(known)
    place = draw(st.sampled_from(known))
    observable = draw(st.sampled_from(list(asked(place))))
    told: dict[str, Any] = {"given": draw(st.sampled_from(given))}
    if OBSERVABLES[observable].shape == "points":
        some = st.lists(st.sampled_from(points), min_size=1, unique=True)
        told["points"] = tuple(sorted(draw(some)))
    unusual = {name: st.just(value) for name, value in told.items() if value is not None}
    parts = (of, scheme, place, observable)
    return draw(st.builds(Question, *map(st.just, parts), **unusual))


def _has_answer(of: Architecture, scheme: Scheme, place: str, observable: str) -> bool:
    points = (0.0,) if OBSERVABLES[observable].shape == "points" else ()
    return not Question(of, scheme, place, observable, points=points).reason_not_applicable
