"""Sequential measurement: `decide` holds one question against a region, `measure` spends draws.

Both are campaigns (`montecarlo.campaign`) of a few targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from montecarlo.campaign import Campaign
from montecarlo.engines import device_of
from montecarlo.estimators import best
from montecarlo.evidence import Decision, Target
from montecarlo.sampler import Conditions
from montecarlo.store import opened
from nope.checks import expect, expect_count
from nope.questions import Question

DEFAULT_DRAWS = 100_000
LEAST_RATE = 1e-100
"""Smaller error rates, shared over what is asked, leave the range of the normal distribution."""


def require_rate(error_rate: object) -> None:
    """Raise `ValueError` for what is no error rate, or one too small to compute with."""
    ok = isinstance(error_rate, Real) and LEAST_RATE <= float(error_rate) < 1
    form = f"error_rate from {LEAST_RATE:g} to less than 1"
    expect(ok, form, error_rate, "change error_rate")


def _require_question(question: Question) -> None:
    """Raise `ValueError` for what is no question, `LookupError` for one without an answer."""
    expect(isinstance(question, Question), "a nope.Question", question, "ask one")
    question.require_applicable()


def _bound(name: str, value: Any, question: Question) -> np.ndarray:
    """A bound in the shape of a question; `ValueError` where it has another."""
    given = np.asarray(value, dtype=float)
    try:
        return np.broadcast_to(given, question.shape)
    except ValueError:
        form = f"{name} to be a number or of shape {question.shape}"
        raise ValueError(f"expected {form}, got {given.shape}; change {name}") from None


def _require_finite(decision: Decision) -> Decision:
    measured = decision.measurement
    failure = decision.failure or (measured.failure if measured else None)
    if failure is not None:
        raise failure
    return decision


def measure(
    questions: Question | Sequence[Question],
    draws: int = 1024,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    workers: int | None = 1,
    engine: str = "local",
    store: str | Path | None = None,
    sampler: str = "auto",
    inputs: int = 1,
    integrate: bool = False,
) -> Any:
    """Estimate one question (a `Measurement`) or several (a list) from at least `draws` draws.

    Draws come in whole blocks, so `Measurement.draws` may be larger.  `store` is a directory
    whose evidence is used and added to, `engine` one of `montecarlo.engines`; `workers=None`
    takes all it has.  `sampler` is one of `montecarlo.collapsed.SAMPLERS`, `inputs` the inputs per
    draw of the weights, and `integrate` takes the gains of the last maps as known
    (`montecarlo.estimators`).

    Raises `LookupError` for a question without an answer, `ValueError` for arguments that cannot
    be, `MemoryError` for blocks that do not fit, `FloatingPointError` where an
    observable is not finite (which, where and in which draw), `OSError` for a store that cannot be
    used.
    """
    expect_count("draws", draws)
    asked = list(questions) if isinstance(questions, Iterable) else [questions]
    targets = []
    for question in asked:
        _require_question(question)
        anywhere = np.full(question.shape, np.inf)
        way = best(question) if integrate else None
        targets.append(Target(question, -anywhere, anywhere, 0.5, 0.5, integrated=way))
    conditions = Conditions(
        seed, device_of(engine, device, dtype), dtype, sampler=sampler, inputs=inputs
    )
    with opened(store) as kept:
        decisions = Campaign(targets, conditions, draws, store=kept).run(workers, engine=engine)
    found = [_require_finite(decision).measurement for decision in decisions]
    return found[0] if isinstance(questions, Question) else found


def decide(
    question: Question,
    low: Any,
    high: Any,
    error_rate: float = 1e-3,
    draws: int | None = None,
    budget: float | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    workers: int | None = None,
    engine: str = "local",
    store: str | Path | None = None,
    sampler: str = "auto",
    inputs: int = 1,
    integrate: bool = False,
) -> Decision:
    """Does the answer lie between `low` and `high`, at every entry?

    `low` and `high` broadcast to the question's shape; infinite where nothing is asked.
    `error_rate` bounds the probability of a wrong CONFIRMED or REFUTED, half each.  Stops at
    the decision, at `draws` (100,000 if neither limit is given) or after `budget` seconds.
    The other options are those of `measure`.

    Raises what `measure` does, and `ValueError` for an error rate below `LEAST_RATE` and for
    bounds of another shape or that no number of draws can decide: in the wrong order, or closer
    than the rounding of `dtype`.
    """
    require_rate(error_rate)
    _require_question(question)
    bottom, top = _bound("low", low, question), _bound("high", high, question)
    share, way = error_rate / 2, best(question) if integrate else None
    target = Target(question, bottom, top, share, share, integrated=way)
    conditions = Conditions(
        seed, device_of(engine, device, dtype), dtype, sampler=sampler, inputs=inputs
    )
    limit = DEFAULT_DRAWS if draws is None and budget is None else draws
    with opened(store) as kept:
        campaign = Campaign([target], conditions, limit, budget, store=kept)
        return _require_finite(campaign.run(workers, engine=engine)[0])
