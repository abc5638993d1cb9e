"""What is written down can be read back: a run's questions from their JSON, formulas by name."""

import json

import numpy as np
from hypothesis import given

import theory
from nope import strategies
from nope.questions import Question, Weights
from nope.strategies import NAMES
from reports.suite import describe

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


def test_the_latex_of_a_formula_is_that_of_no_other():
    """What is printed leads back to one name, and by that to its numbers."""
    names = {formula.latex(): name for name, formula in theory.formulas().items()}
    assert sorted(names.values()) == sorted(theory.formulas())
