"""Scaling laws of predictions: what a factor in front of a weight or a token multiplies.

Held on the theory, exactly; `test_layers.py` has those of the layers.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

import theory
from nope import EmbeddingTokens, GaussianTokens, decoder, init, strategies
from nope.questions import Question

EXAMPLES = settings(max_examples=settings().max_examples // 5)
ROUNDING = 1e-9
FACTORS = st.sampled_from((2.0, 0.25, 3.0))
SMALL = {
    "widths": (8, 16, 64),
    "heads": (1, 2, 4),
    "lengths": range(1, 7),
    "causal": (True,),
    "depths": (1, 2),
}
SQUARES = ("second_moment", "kernel", "mean_second_moment")
"""Observables of degree two in what is looked at."""
RATIOS = ("kernel_cosine", "cosine", "kurtosis", "participation")
"""Those of degree zero."""

LINEAR = {
    init.normal: (0.1, 0.05),
    init.truncated_normal: (0.1, 0.05),
    init.gpt2: (0.1, 0.05),
    init.mup: (0.1, 0.05),
    init.orthogonal: (1.0, 0.5),
    init.xavier_normal: (1.0, 0.5),
    init.xavier_uniform: (1.0, 0.5),
}
"""Schemes whose every matrix is proportional to their first argument, and values of it."""

WEIGHTS_ABOVE = {
    "attn.q": 1,
    "attn.k": 1,
    "attn.v": 1,
    "attn.scores": 2,
    "attn.z": 1,
    "attn_out": 2,
}
"""How many matrices are multiplied on the way from the first block's input."""


def predicted(question):
    """The prediction; another example where the theory has none."""
    try:
        return theory.predict(question)
    except NotImplementedError:
        reject()


def scales(before, after, factor):
    """Whether values and remainders are multiplied by a factor.

    A remainder that is 0 is a difference of terms as large as the values, to rounding.
    """
    rounding = ROUNDING * np.abs(after.values).max(initial=0.0)
    return all(
        np.allclose(factor * getattr(before, name), getattr(after, name), ROUNDING, rounding)
        for name in ("values", "remainder")
    )


@EXAMPLES
@given(
    strategies.architectures(**SMALL, attention=("uniform",), bias=(False,)),
    st.sampled_from([(made, value) for made, values in LINEAR.items() for value in values]),
    st.sampled_from(("attn.v", "attn.z", "attn_out")),
    st.sampled_from(SQUARES),
    FACTORS,
)
def test_every_matrix_multiplies_once(architecture, scheme, name, observable, factor):
    """Weights times c: second moments behind k matrices of the first block are times c^(2k)."""
    make, value = scheme
    place, power = f"blocks.0.{name}", WEIGHTS_ABOVE[name]
    before, after = (
        predicted(Question(architecture, make(each), place, observable))
        for each in (value, factor * value)
    )
    assert scales(before, after, factor ** (2 * power))


@EXAMPLES
@given(
    strategies.architectures(**SMALL, attention=("softmax",), bias=(False,)),
    st.sampled_from([(made, value) for made, values in LINEAR.items() for value in values]),
    st.sampled_from(["attn.q", "attn.k", "attn.scores"]),
    FACTORS,
)
def test_logits_are_bilinear(architecture, scheme, name, factor):
    """Weights times c: queries and keys have c^2, logits c^4."""
    make, value = scheme
    before, after = (
        predicted(Question(architecture, make(each), f"blocks.0.{name}", "second_moment"))
        for each in (value, factor * value)
    )
    assert scales(before, after, factor ** (2 * WEIGHTS_ABOVE[name]))


def louder(tokens, factor):
    return replace(tokens, std=factor * tokens.std)


TOKENS = st.sampled_from([GaussianTokens(1.0), EmbeddingTokens(16), EmbeddingTokens(16, 1.0, 1.0)])


@EXAMPLES
@given(
    strategies.questions(
        strategies.architectures(
            **SMALL,
            attention=("uniform",),
            norm_position=("none",),
            activation=("identity", "relu"),
            bias=(False,),
            tokens=TOKENS,
        ),
        observables=SQUARES + RATIOS,
    ),
    FACTORS,
)
def test_without_norms_a_piecewise_linear_network_is_homogeneous(question, factor):
    """Tokens times c: every vector is times c, second moments c^2, ratios as they were."""
    architecture = question.architecture
    assume(architecture.places()[question.place].axes == "vector")
    more = replace(architecture, tokens=louder(architecture.tokens, factor))
    before, after = predicted(question), predicted(replace(question, architecture=more))
    assert scales(before, after, factor**2 if question.observable in SQUARES else 1.0)


@EXAMPLES
@given(
    strategies.questions(
        strategies.architectures(
            **SMALL, norm_position=("pre",), eps=(0.0,), residual_scale=(1.0,), tokens=TOKENS
        ),
        observables=SQUARES + RATIOS,
    ),
    FACTORS,
)
def test_norms_make_what_is_behind_them_free_of_scale(question, factor):
    """Tokens and branches times c: the stream is times c, and what a norm has read is the same."""
    architecture = question.architecture
    more = replace(
        architecture,
        tokens=louder(architecture.tokens, factor),
        body=turned_up(architecture.body, factor),
    )
    before, after = predicted(question), predicted(replace(question, architecture=more))
    stream = question.place == "embed" or "resid" in question.place
    power = 2 if stream and question.observable in SQUARES else 0
    assert scales(before, after, factor**power)


def turned_up(layer, factor):
    """Every branch of a layer times a factor."""
    if hasattr(layer, "layers"):
        return replace(layer, layers=tuple(turned_up(each, factor) for each in layer.layers))
    return replace(layer, scale=factor) if hasattr(layer, "branch") else layer


@EXAMPLES
@given(
    strategies.architectures(
        **SMALL, attention=("uniform",), norm_position=("none", "pre"), expansions=(0,)
    ),
    st.sampled_from((0.1, 0.5)),
    st.sampled_from((0.5, 2.0)),
)
def test_a_branch_adds_the_square_of_its_scale(architecture, std, scale):
    """K(x + c b) = K(x) + c^2 K(b): what a scale adds to the first residual sum."""
    named = replace(architecture, body=turned_up(architecture.body, scale))
    stream, branch, total = (
        predicted(Question(named, init.normal(std), place, "kernel")).values
        for place in ("embed", "blocks.0.attn_out", "blocks.0.resid_post")
    )
    assert np.allclose(total, stream + scale**2 * branch, rtol=ROUNDING, atol=0.0)


@pytest.mark.parametrize("make", LINEAR)
def test_schemes_are_proportional_to_their_first_argument(make):
    """What the scaling laws of weights rest on: variances of every matrix are times c^2."""
    architecture = decoder(8, 2, n_ctx=2)
    for weight in architecture.weights:
        one, other = (make(each).law(weight, architecture).variance for each in (0.5, 1.5))
        assert other == pytest.approx(9 * one, rel=1e-12)
