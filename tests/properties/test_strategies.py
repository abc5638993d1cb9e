"""What is drawn is valid, shrinks to little, and prints as code that makes it again."""

import importlib.util
import inspect
import subprocess
import sys
import textwrap

import numpy as np
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
        (strategies.schemes(), init.normal(0.1)),
        (strategies.schemes(std=(0.3,)), init.normal(0.3)),
        (strategies.schemes(constructors=(init.mup, init.lecun_normal)), init.mup(0.1, 64)),
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
    parameters = set(inspect.signature(made).parameters)
    assert parameters <= set(strategies.ARGUMENTS)
    given = {name: (0.7,) for name in ("std", "gain") if name in parameters}
    some = strategies.schemes(constructors=(made,), **given)
    drawn = find(some, lambda scheme: True)
    assert drawn == find(strategies.schemes(std=(0.7,), gain=(0.7,)), lambda each: each == drawn)


def test_the_example_of_the_docstring_runs():
    """As it is written there."""
    indented = [line for line in strategies.__doc__.splitlines() if line[:4].strip() == ""]
    names = {}
    exec(textwrap.dedent("\n".join(indented)), names)
    names["test_cosines_are_correlations"]()


@pytest.mark.parametrize(
    ("heads", "widths", "fitting"),
    [((2,), (2, 3, 4, 5), {2, 4}), ((8,), (4, 8), {8}), ((4, 3), (2, 3, 5, 8), {3, 8})],
)
def test_only_widths_that_heads_divide_are_drawn(heads, widths, fitting):
    """And every one of them."""
    drawn = set()

    @settings(database=None)
    @given(strategies.architectures(heads=heads, widths=widths))
    def collect(architecture):
        drawn.add(architecture.d_model)

    collect()
    assert drawn == fitting


def unlisted(depth):
    """A constructor that requires what no list has."""


def no_scheme(std=0.1):
    """A constructor of something else."""
    return {"std": std}


WHOLE = "expected {0} to be a whole number of at least {1}, got {2}; change {0}"
LISTS = r"expected {0} to list values in order, got {1}; write {0}=\(value, ...\)"
REFUSED = [
    *[
        (make, {name: value}, LISTS.format(name, got))
        for make, name, value, got in (
            (strategies.architectures, "widths", "48", "'48'"),
            (strategies.architectures, "heads", 2, "2"),
            (strategies.architectures, "heads", np.array(2), "2"),
            (strategies.architectures, "depths", {1}, r"\{1\}"),
            (strategies.questions, "observables", "cosine", "'cosine'"),
            (strategies.questions, "places", "embed", "'embed'"),
            (strategies.questions, "points", 0.0, "0.0"),
            (strategies.schemes, "constructors", init.normal, "<function normal at .*>"),
            (strategies.schemes, "std", 0.1, "0.1"),
            (strategies.schemes, "cut", 2.0, "2.0"),
            (strategies.tokens, "bos", True, "True"),
        )
    ],
    *[
        (strategies.architectures, {name: (value,)}, WHOLE.format(name, least, repr(value)))
        for name, least, value in (
            ("widths", 2, 1),
            ("widths", 2, "4"),
            ("widths", 2, None),
            ("widths", 2, 4.5),
            ("widths", 2, True),
            ("heads", 1, 0),
            ("depths", 0, -1),
            ("lengths", 1, 0),
            ("expansions", 0, -1),
        )
    ],
    (strategies.tokens, {"vocabularies": (0,)}, WHOLE.format("vocabularies", 1, 0)),
    *[
        (make, {name: ()}, f"expected at least one value of {name}, got .*; leave {name} out .*")
        for make, names in (
            (strategies.tokens, ("stds", "exponents", "bos")),
            (strategies.schemes, ("constructors", "std", "gain", "cut")),
            (strategies.questions, ("places", "observables", "given")),
            (
                strategies.architectures,
                set(inspect.signature(strategies.architectures).parameters) - {"tokens"},
            ),
        )
        for name in sorted(names)
    ],
    *[
        (make, {name: ("no",)}, f"expected {name} to be True or False, got 'no'; change {name}")
        for make, name in (
            (strategies.architectures, "bias"),
            (strategies.architectures, "causal"),
            (strategies.tokens, "bos"),
        )
    ],
    *[
        (make, {name: ("x",)}, f"expected {name} to be one of .*, got 'x'; change {name}")
        for make, name in (
            (strategies.architectures, "attention"),
            (strategies.architectures, "norm"),
            (strategies.architectures, "norm_position"),
            (strategies.architectures, "activation"),
            (strategies.tokens, "units"),
            (strategies.questions, "observables"),
        )
    ],
    *[
        (make, {name: (value,)}, f"expected {name} to be a finite .*number, got .*; change {name}")
        for make, name, value in (
            (strategies.architectures, "eps", -1.0),
            (strategies.architectures, "residual_scale", "a"),
            (strategies.tokens, "stds", 0.0),
            (strategies.tokens, "exponents", -1.0),
            (strategies.schemes, "std", "a"),
            (strategies.schemes, "gain", True),
            (strategies.questions, "points", "a"),
            (strategies.questions, "points", float("nan")),
        )
    ],
    *[
        (make, {name: value}, f"expected {name} to be a Hypothesis strategy, got .*; give one, .*")
        for make, name, value in (
            (strategies.questions, "architecture", SIMPLEST),
            (strategies.questions, "init", init.normal(0.1)),
            (strategies.architectures, "tokens", nope.GaussianTokens()),
        )
    ],
    (
        strategies.architectures,
        {"widths": (3, 5), "heads": (2, 4)},
        r"expected widths that some of heads=\(2, 4\) divides, got \(3, 5\); change either",
    ),
    (strategies.questions, {"places": (3,)}, "expected places to be a name .*, got 3; .*"),
    (strategies.questions, {"given": (7,)}, r"expected given to be None or .*, got 7; .*"),
    (
        strategies.questions,
        {"points": (), "observables": ("cdf",)},
        r"expected points for cdf, got \(\); give points=.*",
    ),
    (
        strategies.schemes,
        {"constructors": ("normal",)},
        "expected constructors whose arguments can be read, got 'normal'; .*",
    ),
    (
        strategies.schemes,
        {"constructors": (dict,)},
        "expected constructors whose arguments can be read, got <class 'dict'>; .*",
    ),
    (
        strategies.schemes,
        {"constructors": (init.normal,), "gain": (2.0,)},
        r"expected arguments of \['std'\], got \['gain'\]; rename or drop them",
    ),
    (
        strategies.schemes,
        {"constructors": (init.lecun_normal,), "std": (0.1, 0.02, 0.3)},
        r"expected arguments of \[\], got \['std'\]; .*",
    ),
    (
        strategies.schemes,
        {"constructors": (unlisted,)},
        r"expected unlisted to require only arguments .*, got \['depth'\]; list their values",
    ),
]


@pytest.mark.parametrize(("make", "arguments", "message"), REFUSED)
def test_arguments_that_cannot_be_are_refused_at_once(make, arguments, message):
    """In one line that names the argument, before anything is drawn."""
    with pytest.raises(ValueError, match=f"^{message}$"):
        make(**arguments)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (
            strategies.schemes(constructors=(no_scheme,)),
            "expected no_scheme to make a Scheme, got .*; give it a law and a hash",
        ),
        (
            strategies.questions(st.just(3)),
            "expected architecture to be drawn from nope.decoder or the like, got 3; .*",
        ),
    ],
)
def test_what_is_drawn_is_what_was_meant(strategy, message):
    """Said of the first example, in the first line."""
    with pytest.raises(ValueError, match=f"^{message}"):
        find(strategy, lambda example: True)


def test_without_points_no_question_needs_them():
    """An empty list leaves a kind out."""

    @given(strategies.questions(st.just(SIMPLEST), points=(), observables=("kernel", "cdf")))
    def holds(question):
        assert question.observable == "kernel"

    holds()


def test_what_is_listed_may_be_read_once():
    """A generator is not used up by the first example."""

    @given(strategies.architectures(widths=(width for width in (4, 8)), depths=iter((1, 2))))
    def holds(architecture):
        assert architecture.d_model in (4, 8)

    holds()


@given(
    strategies.questions(
        strategies.architectures(
            widths=np.array([4, 8]),
            heads=np.arange(1, 3),
            activation=np.array(["tanh"]),
            eps=(np.float64(0.1),),
            bias=np.array([True]),
            residual_scale=np.array([0.5]),
            tokens=strategies.tokens(stds=np.array([2.0]), vocabularies=np.array([3])),
        ),
        strategies.schemes(
            constructors=(init.truncated_normal,), std=(np.float64(0.1),), cut=np.array([3.0])
        ),
        points=np.linspace(-1.0, 1.0, 3),
        observables=("cdf", "kernel"),
    )
)
def test_values_of_numpy_are_made_pythons(question):
    """Their own `repr` is no code in `NAMES`."""
    assert "np." not in repr(question)
    assert rebuilt(repr(question)) == question


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
