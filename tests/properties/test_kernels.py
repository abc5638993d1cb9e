"""What every predicted kernel is, and what predictions of one architecture say of another's."""

from dataclasses import replace

import numpy as np
from hypothesis import given, reject, settings
from hypothesis import strategies as st

import theory
from nope import strategies

EXAMPLES = settings(max_examples=settings().max_examples // 5)
ROUNDING = 1e-9

INDEPENDENT_OF_LENGTH = strategies.tokens(units=())
"""A text's windows fit in the text: where they begin depends on their length."""
ARCHITECTURES = strategies.architectures(
    widths=(8, 16, 64),
    heads=(1, 2, 4),
    depths=(1, 2),
    lengths=range(1, 8),
    causal=(True,),
    tokens=INDEPENDENT_OF_LENGTH,
)
ALONG = ("second_moment", "kernel", "kernel_cosine", "cosine", "participation", "cosine_steps")
"""Observables of which a longer context has more entries and the same first ones."""


def predicted(question, fidelity="best"):
    """The prediction; another example where the theory has none."""
    try:
        return theory.predict(question, fidelity)
    except NotImplementedError:
        reject()


def close(one, other, size):
    return np.abs(one - other).max(initial=0.0) <= ROUNDING * np.abs(size).max(initial=0.0)


@EXAMPLES
@given(strategies.questions(ARCHITECTURES, observables=("kernel",)))
def test_a_kernel_is_symmetric_and_positive(question):
    """K = K', K_mm > 0, |K_mn| <= sqrt(K_mm K_nn) and no negative eigenvalue, up to what is
    stated to be dropped."""
    found = predicted(question)
    kernel, dropped = found.values, found.remainder
    size = question.scale_of(kernel)
    assert close(kernel, kernel.T, kernel)
    assert close(dropped, dropped.T, dropped)
    assert (np.diagonal(kernel) > 0).all()
    assert (np.abs(kernel) <= size * (1 + ROUNDING) + dropped).all()
    if np.isfinite(dropped).all():
        least = np.linalg.eigvalsh(kernel).min()
        assert least >= -ROUNDING * kernel.max() - np.linalg.norm(dropped, 2)


@EXAMPLES
@given(strategies.questions(ARCHITECTURES, observables=("kernel",)))
def test_observables_of_a_kernel_agree(question):
    """Its diagonal, its correlation, the mean of its diagonal: each asked on its own.

    At one fidelity: the best is that of the smallest remainder, which two observables may differ
    in.
    """
    found = predicted(question)
    kernel = found.values

    def asked(observable):
        return predicted(replace(question, observable=observable), found.fidelity).values

    moments, mean = asked("second_moment"), asked("mean_second_moment")
    assert close(moments, np.diagonal(kernel), moments)
    assert close(mean, moments.mean(), mean)
    if question.architecture.n_ctx > 1:
        rho = asked("kernel_cosine")
        assert close(rho, kernel / question.scale_of(kernel), np.ones(1))


@EXAMPLES
@given(strategies.questions(ARCHITECTURES, observables=ALONG), st.integers(1, 6))
def test_later_tokens_change_no_earlier_prediction(question, more):
    """Causality: in a longer context the first entries are those of the shorter one, exactly where
    nothing is dropped, and otherwise to what both state to drop: the 1/d terms take variances that
    depend on the position for their mean."""
    n_ctx = question.architecture.n_ctx
    longer = replace(question.architecture, n_ctx=n_ctx + more)
    short, long = predicted(question), predicted(replace(question, architecture=longer))
    shown = tuple(slice(length) for length in question.shape)
    gap = np.abs(short.values - long.values[shown])[question.judged]
    dropped = np.maximum(short.remainder, long.remainder[shown])[question.judged]
    assert np.isfinite(dropped).all()
    assert (gap <= ROUNDING * np.abs(short.values).max() + dropped).all()


@EXAMPLES
@given(
    strategies.questions(
        strategies.architectures(
            widths=(8, 16),
            heads=(2, 4, 8),
            depths=(1, 2),
            lengths=range(1, 8),
            attention=("uniform",),
            causal=(True,),
        ),
        places=("embed", "*.resid_*", "*.attn_out", "*.z", "*.ln*"),
        observables=("kernel", "second_moment", "kernel_cosine", "cosine"),
    )
)
def test_heads_that_attend_alike_are_predicted_as_one(question):
    """Under uniform attention nothing behind the heads depends on their number."""
    one = replace(question.architecture, body=single(question.architecture.body))
    many, alone = predicted(question), predicted(replace(question, architecture=one))
    assert close(many.values, alone.values, many.values)
    assert close(many.remainder, alone.remainder, many.remainder)


def single(layer):
    """The layer with one head in each attention."""
    changes = {}
    if hasattr(layer, "n_heads"):
        changes["n_heads"] = 1
    if hasattr(layer, "branch"):
        changes["branch"] = single(layer.branch)
    if hasattr(layer, "layers"):
        changes["layers"] = tuple(map(single, layer.layers))
    return replace(layer, **changes)
