"""What is drawn is valid, shrinks to little, and prints as code that makes it again."""

import importlib.util
import inspect
import subprocess
import sys

import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

import nope
from nope import init, strategies
from nope.strategies import NAMES

SIMPLEST = nope.decoder(
    2,
    1,
    n_ctx=1,
    d_ff=0,
    norm_position="none",
    attention="uniform",
    tokens=nope.GaussianTokens(1.0),
)


def rebuilt(code):
    return eval(code, dict(NAMES))


@given(strategies.questions())
def test_a_question_has_an_answer_and_its_repr_makes_it_again(question):
    """All parts of it, too."""
    assert question.reason_not_applicable is None
    for each in (question, question.architecture, question.architecture.tokens, question.init):
        assert rebuilt(repr(each)) == each


@pytest.mark.parametrize(
    ("strategy", "simplest"),
    [
        (strategies.tokens(), nope.GaussianTokens(1.0)),
        (strategies.architectures(), SIMPLEST),
        (strategies.schemes(constructors=(init.normal, init.gpt2)), init.normal(0.1)),
        (
            strategies.questions(init=st.just(init.gpt2())),
            nope.Question(SIMPLEST, init.gpt2(), "embed", "second_moment"),
        ),
    ],
)
def test_everything_shrinks_to_the_simplest(strategy, simplest):
    """With nothing asked, the first of every list."""
    assert find(strategy, lambda example: True, settings=settings(max_examples=10)) == simplest


def test_a_failing_example_is_printed_as_short_code():
    """The decoder's own call, of nothing but what is unusual; run, it is the example again."""
    failed = []

    @settings(database=None, print_blob=False)
    @given(
        strategies.questions(
            st.just(SIMPLEST) | strategies.architectures(lengths=(2,)),
            observables=("second_moment", "cosine"),
        )
    )
    def narrow(question):
        if question.architecture.d_model >= 8 and question.observable == "cosine":
            failed.append(question)
            raise AssertionError

    with pytest.raises(AssertionError) as caught:
        narrow()
    code = next(note for note in caught.value.__notes__ if "narrow(" in note).partition(": ")[2]
    assert eval(code, {**NAMES, "narrow": lambda question: question}) == failed[-1]
    assert "decoder(" in code
    assert len(code.splitlines()) < 25


@given(st.data())
def test_arguments_narrow_what_is_drawn(data):
    """Each list of values is a promise."""
    narrow = strategies.architectures(
        widths=(6,),
        heads=(2, 4),
        depths=(2,),
        lengths=(5,),
        expansions=(1,),
        activation=("tanh",),
        norm_position=("pre",),
        norm=("rmsnorm",),
        eps=(0.1,),
        bias=(True,),
        causal=(True,),
        attention=("softmax",),
        residual_scale=(0.5,),
        tokens=strategies.tokens(vocabularies=(), units=(), stds=(2.0,), bos=(True,)),
    )
    scheme = strategies.schemes(constructors=(init.truncated_normal,), std=(0.2,), cut=(3.0,))
    drawn = data.draw(
        strategies.questions(narrow, scheme, places=("*.attn.k",), observables=("kernel",))
    )
    expected = nope.decoder(
        6,
        2,
        2,
        6,
        n_ctx=5,
        activation="tanh",
        norm="rmsnorm",
        eps=0.1,
        bias=True,
        residual_scale=0.5,
        tokens=nope.WithBos(nope.GaussianTokens(2.0)),
    )
    assert drawn.architecture == expected
    assert drawn.init == init.truncated_normal(0.2, 3.0)
    assert drawn.place in ("blocks.0.attn.k", "blocks.1.attn.k")
    assert drawn.observable == "kernel"


@pytest.mark.parametrize("made", strategies.CONSTRUCTORS)
def test_every_scheme_is_drawn(made):
    """With every argument that its constructor has: none is left to its default."""
    assert set(inspect.signature(made).parameters) <= {"std", "gain", *strategies.ARGUMENTS}
    some = strategies.schemes(constructors=(made,), std=(0.7,), gain=(0.7,))
    drawn = find(some, lambda scheme: True)
    assert drawn == find(strategies.schemes(std=(0.7,), gain=(0.7,)), lambda each: each == drawn)


def test_importing_the_package_imports_no_hypothesis():
    """It is an extra: `import nope` does without."""
    script = "import sys, nope; print('hypothesis' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_without_hypothesis_the_extra_is_named(monkeypatch):
    """One line with the remedy."""
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    found = importlib.util.find_spec("nope.strategies")
    with pytest.raises(ImportError, match=r"^expected Hypothesis .*nope-theory\[strategies\]'$"):
        found.loader.exec_module(importlib.util.module_from_spec(found))
