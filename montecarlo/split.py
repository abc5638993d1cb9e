"""How many inputs each draw of the weights is best given.

A draw of the weights with n inputs has the variance V_b + V_w/n, V_b between weights and V_w
between inputs, and takes a time that grows with n from what the weights take
(`montecarlo.estimators`).  Both components are measured on a pilot of two inputs per draw, by the
analysis of variance of one random factor; the time is counted in operations, not taken by the
clock, so that the choice and with it the bits of a run are the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from montecarlo.collapsed import NORMAL, chosen, cost
from montecarlo.estimators import Asked, allows_inputs, per_draw, places_of, question_of
from montecarlo.observables import STATISTICS
from montecarlo.sampler import Conditions, Group, chunks, one_thread
from nope.operations import Mix
from nope.questions import Question

PILOT_DRAWS = 32
"""They come from blocks of negative number, so that none of them counts."""
MOST_INPUTS = 32
EXPONENTIAL = 50
"""What an entry of a pattern takes beside its products, in operations."""


@dataclass(frozen=True, eq=False)
class Split:
    """The best number of inputs, the components of variance, and the factor saved.

    `between` and `within` are V_b and V_w at every entry; `saved` is the time to a given precision
    on the average over entries, for one input over that for `inputs`.
    """

    inputs: int
    between: np.ndarray
    within: np.ndarray
    saved: float


def split(asked: Asked, conditions: Conditions, draws: int = PILOT_DRAWS) -> Split:
    """The number of inputs, a power of two, at which seconds times variance are least."""
    question = question_of(asked)
    nothing = np.zeros(question.shape)
    if not allows_inputs(question):
        return Split(1, nothing, nothing, 1.0)
    between, within, scale = _components(asked, replace(conditions, inputs=2), draws)
    judged = question.judged & (scale > 0)

    def work(inputs: int) -> float:
        variance = (between + within / inputs)[judged] / scale[judged] ** 2
        return _time(question, conditions, inputs) * float(variance.sum())

    counts = [2**k for k in range(MOST_INPUTS.bit_length())]
    best = min(counts, key=work)
    return Split(best, between, within, work(1) / work(best) if work(best) > 0 else 1.0)


def _components(
    asked: Asked, conditions: Conditions, draws: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """V_b, V_w and the observable's scale, from draws of two inputs each.

    A statistic of several means is followed along its gradient, as the delta method does.
    """
    question = question_of(asked)
    every = np.concatenate(_pilot(asked, conditions, 2 * draws))
    mean, statistic = every.mean(0), STATISTICS[question.observable]
    along = np.einsum("nk...,k...->n...", every, statistic.gradient(mean))
    pairs = along.reshape(-1, 2, *along.shape[1:])
    within = pairs.var(1, ddof=1).mean(0)
    between = np.maximum(pairs.mean(1).var(0, ddof=1) - within / 2, 0.0)
    return between, within, question.scale_of(statistic.value(mean))


def _pilot(asked: Asked, conditions: Conditions, rows: int) -> list[np.ndarray]:
    """The statistic of at least so many inputs, chunk by chunk."""
    group, found, had = Group.of(question_of(asked), conditions), list[np.ndarray](), 0
    with one_thread():
        for index in count(1):
            for values in chunks(group, places_of(asked), -index, conditions):
                found.append(per_draw(asked, {None: values}).cpu().double().numpy())
                had += len(found[-1])
                if had >= rows:
                    return found
    return found


def _time(question: Question, conditions: Conditions, inputs: int) -> float:
    """What a draw of the weights with so many inputs takes, in operations of a product."""
    architecture = question.architecture
    sampler = chosen(question, conditions.sampler, conditions.device, inputs)
    length, d, heads = architecture.n_ctx, architecture.d_model, architecture.n_heads
    attentions = sum(isinstance(operation, Mix) for operation in architecture.operations)
    pairs = attentions * length**2 * (4.0 * d + EXPONENTIAL * heads)
    maps = cost(architecture, question.init, sampler, inputs)
    return maps + inputs * (pairs + NORMAL * length * d)
