"""Limits and orders of predictions: where the theory must become something simpler, and how fast.

s -> 0 gives uniform attention; m = 1 knows none; d -> infinity gives the leading order, which is
the symbolic derivation's; fidelities differ by the powers of s that they claim, read off as
slopes between a step and its half.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from scipy.special import expit, roots_gegenbauer, roots_genlaguerre, roots_hermitenorm
from sympy.core.function import AppliedUndef

import theory
from nope import EmbeddingTokens, decoder, init, strategies
from nope.questions import Question
from theory.bindings import bindings
from theory.derivation import derive
from theory.laws.variance import matched
from theory.symbols import m, n

EXAMPLES = settings(max_examples=settings().max_examples // 5)
SMALL = {
    "widths": (8, 16, 64),
    "heads": (1, 2, 4),
    "lengths": range(1, 7),
    "causal": (True,),
    "attention": ("softmax",),
}
PLACES = ("*.z", "*.attn_out", "*.resid_*", "*.ln*", "*.mlp*")
VECTORS = ("kernel", "kernel_cosine", "second_moment")


def predicted(question, fidelity="best"):
    """The prediction; another example where the theory has none."""
    try:
        return theory.predict(question, fidelity)
    except NotImplementedError:
        reject()


def attending(layer, kind):
    """The layer with every attention of this kind."""
    if hasattr(layer, "layers"):
        return replace(layer, layers=tuple(attending(each, kind) for each in layer.layers))
    if hasattr(layer, "branch"):
        return replace(layer, branch=attending(layer.branch, kind))
    return replace(layer, kind=kind) if hasattr(layer, "n_heads") else layer


def uniform(question):
    architecture = question.architecture
    return replace(
        question,
        architecture=replace(architecture, body=attending(architecture.body, "uniform")),
    )


def relative_gap(question, one, other):
    return float((np.abs(one - other) / question.scale_of(one))[question.judged].max())


# ------------------------------------------------------------------------------ logits


@EXAMPLES
@given(
    strategies.questions(
        strategies.architectures(**SMALL, depths=(1, 2)),
        strategies.schemes(constructors=(init.normal, init.gpt2), std=(1e-4,)),
        places=("*.attn.z", "*.attn_out"),
        observables=VECTORS,
    ),
    st.sampled_from(("first_order", "any_temperature", "best")),
)
def test_vanishing_logits_give_uniform_attention(question, fidelity):
    """s^2 below 1e-10: what is predicted is what is predicted of a_mn = 1/m, on another way.

    Of the branch alone: at such weights a stream is what it was before.
    """
    limit = predicted(uniform(question)).values
    assert relative_gap(question, limit, predicted(question, fidelity).values) <= 1e-7


@EXAMPLES
@given(
    strategies.questions(
        strategies.architectures(**{**SMALL, "eps": (0.0,)}, depths=(1, 2)),
        strategies.schemes(constructors=(init.normal,), std=(0.1, 0.3)),
        places=PLACES,
        observables=("second_moment", "kurtosis"),
    ),
    st.sampled_from(("first_order", "any_temperature", "best")),
)
def test_the_first_position_is_exact_at_every_fidelity(question, fidelity):
    """m = 1: one key, whatever its logit; nothing is dropped that uniform attention keeps.

    In a longer context to a part of the remainder: the 1/d terms take means over positions.
    """
    expected, found = predicted(uniform(question)), predicted(question, fidelity)
    alone = question.architecture.n_ctx == 1
    for name in ("values", "remainder"):
        one, other = (getattr(each, name)[0] for each in (expected, found))
        slack = 0.0 if alone else found.remainder[0]
        assert abs(one - other) <= 1e-9 * abs(expected.values[0]) + slack, name


@EXAMPLES
@given(
    strategies.questions(
        strategies.architectures(**SMALL, depths=(1, 2)),
        strategies.schemes(constructors=(init.normal, init.xavier_uniform), std=(0.02, 0.1, 0.3)),
        places=("*.pattern", *PLACES),
        observables=(*VECTORS, "participation"),
    ),
    st.sampled_from(("uniform", "first_order")),
)
def test_fidelities_agree_to_what_they_state(question, fidelity):
    """What one drops is within its remainder, and that of `any_temperature`, all the way down."""
    one, other = predicted(question, fidelity), predicted(question, "any_temperature")
    allowed = one.remainder + other.remainder + 1e-9 * np.abs(other.values)
    assert (np.abs(one.values - other.values) <= allowed)[question.judged].all()


ORDERS = {"uniform": 1, "first_order": 2}
"""The power of s^2 that each fidelity drops first."""


@pytest.mark.parametrize("fidelity", ORDERS)
@EXAMPLES
@given(
    strategies.architectures(
        **{**SMALL, "lengths": range(2, 7), "widths": (32, 64)},
        depths=(1,),
        norm_position=("pre",),
        eps=(0.0,),
        bias=(False,),
        tokens=strategies.tokens(vocabularies=(), units=(), stds=(1.0,), bos=(False,)),
    )
)
def test_a_fidelity_is_wrong_by_the_order_it_claims(fidelity, architecture):
    """Half of s^2 leaves 2^-p of its distance to `any_temperature`, p = 1 or 2.

    At s^2 of .04 and less: the next order is some s^2 of this one.
    """
    gaps = []
    for variance in (0.04, 0.02):
        std = variance**0.25 / architecture.d_model**0.5  # s = d std^2
        question = Question(architecture, init.normal(std), "blocks.0.attn.z", "kernel")
        best = predicted(question, "any_temperature").values
        gaps.append(relative_gap(question, best, predicted(question, fidelity).values))
    slope = np.log2(gaps[0] / gaps[1])
    assert slope == pytest.approx(ORDERS[fidelity], abs=0.15)


def participation_of_two(d, n_heads, s):
    """E (a^2 + (1 - a)^2), a the weight of one of two keys over LN'd Gaussian tokens.

    Gauss's rules for all three variables: given the cosine rho of the tokens, which a sphere in
    d - 1 dimensions has, and the query, l_1 - l_2 is Gaussian of variance 2 s^2 (1 - rho) G, where
    d_h G is a chi-square of d_h degrees.
    """
    half = d / n_heads / 2
    rho, of_rho = roots_gegenbauer(40, (d - 3) / 2)
    g, of_g = roots_genlaguerre(40, half - 1)
    z, of_z = roots_hermitenorm(120)
    variance = 2 * s**2 * (1 - rho)[:, None, None] * g[:, None] / half
    a = expit(np.sqrt(variance) * z)
    weights = (each / each.sum() for each in (of_rho, of_g, of_z))
    return np.einsum("i,j,k,ijk->", *weights, a**2 + (1 - a) ** 2)


@EXAMPLES
@given(
    st.sampled_from([(16, 1), (16, 2), (64, 4), (64, 16), (32, 8)]),
    st.sampled_from((0.1, 0.3, 0.6, 1.0)),
)
def test_any_temperature_of_two_keys_by_quadrature(shape, s):
    """Exact at finite width, against three nested Gauss rules."""
    d, n_heads = shape
    layer, scheme = decoder(d, n_heads, n_ctx=2), init.normal((s / d) ** 0.5)
    asked = Question(layer, scheme, "blocks.0.attn.pattern", "participation")
    found = theory.predict(asked, "any_temperature")
    assert found.remainder[1] == 0
    assert found.values[1] == pytest.approx(participation_of_two(d, n_heads, s), rel=1e-9)


# ------------------------------------------------------------------------------ widths


def wide(architecture, times):
    """The same stack, so many times as wide."""

    def widened(layer):
        if hasattr(layer, "layers"):
            return replace(layer, layers=tuple(map(widened, layer.layers)))
        if hasattr(layer, "branch"):
            return replace(layer, branch=widened(layer.branch))
        return replace(layer, d_ff=layer.d_ff * times) if hasattr(layer, "d_ff") else layer

    return replace(
        architecture, d_model=architecture.d_model * times, body=widened(architecture.body)
    )


WIDE = strategies.architectures(
    **{**SMALL, "attention": ("uniform",), "widths": (16,), "lengths": range(2, 7)},
    depths=(1, 2),
    eps=(0.0,),
    bias=(False,),
    tokens=strategies.tokens(vocabularies=(), units=(), bos=(False,)),
)


@EXAMPLES
@given(
    strategies.questions(
        WIDE,
        strategies.schemes(constructors=(init.lecun_normal, init.xavier_normal, init.orthogonal)),
        places=PLACES,
        observables=("kernel_cosine", "cosine"),
    )
)
def test_what_width_adds_falls_as_one_over_d(question):
    """Each doubling of d leaves half of what there is to the limit, which two widths give.

    Richardson's extrapolation of d and 2d, and of 2d and 4d, meet to the next order; where an
    entry's own 1/d term nearly cancels that is seen, and a doubling leaves a quarter of it.
    """
    values = [
        predicted(replace(question, architecture=wide(question.architecture, times))).values
        for times in (16, 32, 64, 128)
    ]
    steps = np.diff([each[question.judged] for each in values], axis=0)
    assume(np.abs(steps[0]).max(initial=0.0) > 1e-9)  # there is something that width adds
    left = np.abs(steps[:-1] - 2 * steps[1:])
    halved = left[0] <= 0.1 * np.abs(steps[0]) + 1e-9
    assert (halved | (left[1] <= 0.3 * left[0])).all()


@EXAMPLES
@given(
    strategies.questions(
        strategies.architectures(
            **{**SMALL, "attention": ("uniform",), "lengths": range(1, 5)},
            depths=(1,),
            expansions=(0, 1),
            activation=("identity", "relu", "erf"),
            eps=(0.0,),
            bias=(False,),
            tokens=strategies.tokens(vocabularies=(), units=(), stds=(1.0,), bos=(False,)),
        ),
        strategies.schemes(constructors=(init.lecun_normal,)),
        places=PLACES,
        observables=("kernel",),
    )
)
def test_infinite_width_is_the_symbolic_derivation(question):
    """The derived kernel at d >= 2^20, by SymPy to 30 digits, is the prediction there."""
    at = replace(question, architecture=wide(question.architecture, 2**20 // 8))
    derivation = derive(at.architecture, at.init, at.place)
    kernel = derivation.result
    if derivation.stopped or kernel.atoms(AppliedUndef):
        reject()
    known, numbers = theory.predict(at).values, bindings(at.architecture, at.init)
    put = {symbol: numbers[symbol.name] for symbol in kernel.free_symbols - {m, n}}
    for row, column in zip(*np.nonzero(at.judged), strict=True):
        value = kernel.subs({m: int(row) + 1, n: int(column) + 1}).doit().subs(put).evalf(30)
        assert float(value) == pytest.approx(known[row, column], rel=1e-4)


# --------------------------------------------------------------- refusals that examples found


def test_a_variance_that_spans_too_many_orders_is_refused():
    """A deep stack of gated units without norms: once an array of 10^16 entries was asked for."""
    with pytest.raises(NotImplementedError, match="relative variance"):
        matched(1.0, 1e14)
    assert matched(1.0, 1e3).mean == pytest.approx(1.0)


def test_a_kernel_that_is_no_prefix_mean_is_refused_at_once():
    """With eps, biases and one token for all: once simplified until the stack was full."""
    one_token = EmbeddingTokens(1, 1.0)
    layer = decoder(64, 1, 1, n_ctx=9, norm_position="post", eps=1e-5, bias=True, tokens=one_token)
    asked = Question(layer, init.normal(0.02), "blocks.0.attn.z", "adjacency_score.steps")
    with pytest.raises(NotImplementedError, match=r"kernel is c/Max\(m, n\)"):
        theory.predict(asked)
