"""Laws, not only moments: the distribution of a coordinate, or of a logit, at a place.

>>> import nope, theory
>>> question = nope.Question(
...     nope.decoder(64, 16, n_ctx=8), nope.init.normal(0.1), "blocks.0.attn.scores", "kurtosis"
... )
>>> found = law(question)
>>> found.name, found.status.name, round(found.moment(2), 6), round(found.kurtosis, 6)
('symmetric variance-gamma', 'EXACT', 0.4096, 4.5)
>>> found.ppf([0.01, 0.5, 0.99]).round(3)
array([-1.661,  0.   ,  1.661])

SciPy's distributions are imported with the first law that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from nope.checks import expect
from nope.operations import Scores
from nope.questions import Question
from theory.laws.law import Family, Law

__all__ = ["LEVELS", "Family", "Law", "law", "quantile_points"]

LEVELS = tuple(np.linspace(0.01, 0.99, 16))
"""The levels of `quantile_points`."""


def law(question: Question, position: int | None = None) -> Law:
    """The law of one coordinate at the question's place and at `position`, the last by default.

    Of scores that of one logit: of a random key that the query at `position` sees.  The
    question's observable plays no part.

    Raises `LookupError` for a place that is not there, `ValueError` for a position that is not,
    `NotImplementedError` with the reason where no law is known: attention patterns, given
    weights.
    """
    operation, length = question.operation, question.architecture.n_ctx
    at = length if position is None else position
    expect(1 <= at <= length, f"a position from 1 to {length}", position, "change position")
    if question.given is not None:
        raise NotImplementedError(
            "expected a question over random weights, got given weights: laws average over them; "
            "drop given"
        )
    from theory.laws.places import Network, logit_family

    network = Network(question, at)
    if isinstance(operation, Scores):
        family, dropped = logit_family(operation, network)
    else:
        vector = network.vector(operation.place)
        family, dropped = vector.family(), vector.dropped
    return Law(operation.place, at, family, float(dropped), SOURCE)


SOURCE = "derived here: rotation invariance, and Gaussian weights given their input"


def quantile_points(question: Question, levels: Sequence[float] = LEVELS) -> Question:
    """The question for the CDF at the quantiles of its law, for a claim `theory.relations.Law`.

    A point that carries an atom is left out, except 0: rounding takes values to either side.
    """
    found = law(question)
    points = np.unique(found.ppf(np.asarray(levels)))
    at_atoms = np.isin(points, [atom for atom in found.atoms if atom])
    return replace(question, observable="cdf", points=tuple(map(float, points[~at_atoms])))
