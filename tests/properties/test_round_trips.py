"""What is written down can be read back: a run's questions from their JSON, formulas by name."""

import json

import numpy as np
import pytest
import sympy as sp
from hypothesis import given

import theory
from nope import strategies
from nope.questions import Question, Weights
from nope.strategies import NAMES
from reports.suite import describe
from tests.contracts.test_formulas import CONTRACTS
from tests.properties import latex
from theory.formula import Formula, Numeric, Status
from theory.formulas import depth, duals, laws, outputs, softmax, tokens
from theory.symbols import beta, c, d, d_h, ell, i, j, k, m, n, nu, s, x
from theory.testing import FormulaContract

RUNS = strategies.questions(given=(None, Weights(0), Weights(7)))


def read(text):
    """The question that a run's JSON describes."""
    told = json.loads(text)
    architecture, init, given = (
        eval(told[name], dict(NAMES)) if told[name] else None
        for name in ("architecture", "init", "given")
    )
    points = tuple(told["points"])
    return Question(architecture, init, told["place"], told["observable"], given, points)


@given(RUNS)
def test_a_question_comes_back_from_a_runs_json(question):
    """Through text and back: the same value, the same hash, the same shape of answer."""
    again = read(json.dumps(describe(question)))
    assert again == question
    assert hash(again) == hash(question)
    assert again.shape == question.shape
    assert np.array_equal(again.judged, question.judged)


LETTERS = {
    "A": (softmax.Participation,),
    "P": (softmax.ParticipationFiniteHead,),
    r"\tilde{P}": (outputs.GaussianKeysParticipation,),
    "P_2": (softmax.ParticipationSecondMoment,),
    "B": (softmax.Tilt,),
    r"\tilde{B}": (outputs.GaussianKeysTilt,),
    r"B_{\mathrm{off}}": (softmax.SharedTilt, outputs.SharedTiltFiniteHead),
    "S": (softmax.WeightedSquare, outputs.WeightedSquareFiniteHead),
    "C": (softmax.SharedWithLonger,),
    "H": (softmax.Entropy,),
    "m_*": (softmax.BreakdownLength,),
    r"\operatorname{RootBias}": (outputs.RootBias,),
    r"\operatorname{GeluTanhDual}": (duals.GeluTanhDual,),
    r"\operatorname{SiluDual}": (duals.SiluDual,),
    r"\operatorname{TanhDual}": (duals.TanhDual,),
    r"\operatorname{Shrinkage}": (laws.Shrinkage,),
}
"""The functions without a closed form by what prints them; two of a letter differ in `nargs`."""


def own(*kinds):
    """The numbers of the one of these functions that takes so many arguments."""

    def numbers(*arguments):
        (kind,) = (kind for kind in kinds if len(arguments) in kind.nargs)
        return float(kind.numbers(*(np.asarray(float(x)) for x in arguments)))

    return numbers


OWN = {letter: own(*kinds) for letter, kinds in LETTERS.items()}
HELD = {held.name: held for held in CONTRACTS if issubclass(held, FormulaContract)}
ROUNDING = 1e-10
"""Relative, of floats against 30 digits: powers of a gain below 0 cancel five of their digits."""


def points(name):
    """Those of the formula's contract and any in its symbols' domains.

    Each as it is, with m and n exchanged, and with one for both.
    """
    for contract in (HELD[name], FormulaContract.named("drawn", name=name)):
        for point in contract().places:
            yield point
            if {"m", "n"} <= set(point):
                yield {**point, "m": point["n"], "n": point["m"]}
                yield {**point, "n": point["m"]}


def assert_is_read_back(formula, point):
    """The number of what is printed, by the symbols' printed names, is the formula's."""
    printed = {key: entry.latex or sp.latex(entry.symbol) for key, entry in formula.symbols.items()}
    assert len(set(printed.values())) == len(printed), printed
    values = {printed[key]: point[key] for key in printed}
    _, _, right = formula.latex().partition(" = ")
    expected = pytest.approx(formula(**point), rel=ROUNDING, abs=0)
    assert latex.number(right, values, OWN) == expected, point


@pytest.mark.parametrize("name", theory.formulas())
def test_a_formula_comes_back_from_its_latex(name):
    """What is printed leads back to the numbers, wherever there is one."""
    formula = theory.formula(name)
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = [point for point in points(name) if np.isfinite(formula(**point))]
    assert inside
    for point in inside:
        assert_is_read_back(formula, point)


POSITIONS = {"m": 5, "n": 2, "i": 2, "j": 4, "k": 3}
NUMBERS = {"ell": 3, "s": 0.7, "d": 6, "d_h": 4, "x": 0.3, "nu": 2.5, "c": 0.6, "beta": -0.2}


@pytest.mark.parametrize(
    "expr",
    [
        softmax.Participation(m, s) ** 2 / s,
        -(softmax.BreakdownLength(s, m) ** (ell - 1)),
        outputs.second_moment(s, d, x),
        outputs.RootBias(m, s, d_h, n) ** 2,
        duals.PositivePart(c - x) ** 3,
        duals.PositivePart(c) ** (x / 2) * duals.PositivePart(c - x),
        laws.LogBesselK(nu, x + 1) ** 2,
        s * (depth.Harmonic(m) - 1) ** 3 / depth.Harmonic(n) ** 2,
        tokens.GeneralHarmonic(m, 1 + nu) ** ell,
        depth.CesaroPower(m, n, ell) ** 2,
        depth.CesaroPower(j, i, ell) * depth.StackKernel(i, j, 2) * j,
        (depth.ResidualPower(m, n, ell, beta) + s) * depth.CesaroPower(m, 1, 2),
        depth.RandomValueKernel(m, k, ell, s) / depth.StackKernel(j, m, 1) - 1,
        sp.gamma(nu) ** (-s) * sp.Heaviside(c - x, 0),
        3 * 2 ** (-ell) * sp.KroneckerDelta(i, n) * sp.Max(m, i, j),
    ],
)
def test_what_may_be_built_of_their_functions_comes_back(expr):
    """Powers and products of them, and arguments that are sums, are printed without ambiguity."""
    formula = Formula("mine.built", expr, "Built.", Status.EXACT, "definition", "x")
    known = {**POSITIONS, **NUMBERS}
    assert_is_read_back(formula, {name: known[name] for name in formula.symbols})


def printed_as(text):
    """m (m + n), and that text for it."""
    members = {
        "by": "multiplication",
        "numbers": staticmethod(lambda m, n: m * (m + n)),
        "_latex": lambda self, printer: text,
    }
    call = type("Product", (Numeric,), members)(m, n)
    return Formula("mine.product", call, "A product.", Status.EXACT, "definition", "x")


def test_a_formula_that_prints_itself_is_read_back():
    assert_is_read_back(printed_as(r"m \left(m + n\right)"), {"m": 3, "n": 2})


@pytest.mark.parametrize(
    "text",
    [
        "m m + n",
        r"n \left(m + n\right)",
        r"m \left(m - n\right)",
        r"m^{\left(m + n\right)}",
        r"\frac{m}{m + n}",
        r"\sum_{j=1}^{m} m + n",
    ],
)
def test_a_formula_that_prints_another_is_caught(text):
    with pytest.raises(AssertionError):
        assert_is_read_back(printed_as(text), {"m": 3, "n": 2})


@pytest.mark.parametrize(
    "text",
    [
        r"m \left(m + n",
        r"m \left(m + n\right))",
        r"m \left(m + k\right)",
        r"m^{2}^{2}",
        r"n \sum_{j=1}^{m} j + j",
        r"\operatorname{Product}{\left(m,n \right)}",
        r"H\left(m\right)",
    ],
)
def test_a_formula_that_says_nothing_is_refused(text):
    with pytest.raises(ValueError, match="expected"):
        assert_is_read_back(printed_as(text), {"m": 3, "n": 2})


def test_the_latex_of_a_formula_is_that_of_no_other():
    """What is printed leads back to one name."""
    names = {formula.latex(): name for name, formula in theory.formulas().items()}
    assert sorted(names.values()) == sorted(theory.formulas())
