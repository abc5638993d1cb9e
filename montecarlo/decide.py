"""Sequential measurement: `decide` holds one question against a region, `measure` spends draws.

Both are campaigns (`montecarlo.campaign`) of a few targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from montecarlo.campaign import Campaign
from montecarlo.engines import device_of
from montecarlo.estimators import best
from montecarlo.evidence import Decision, Target
from montecarlo.sampler import Conditions
from montecarlo.store import opened
from nope.questions import Question

DEFAULT_DRAWS = 100_000


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

    Raises `LookupError` for a question without an answer, `ValueError` for a device or dtype
    that cannot be, `MemoryError` for blocks that do not fit, `FloatingPointError` where an
    observable is not finite (which, where and in which draw), `OSError` for a store that cannot be
    used.
    """
    asked = [questions] if isinstance(questions, Question) else list(questions)
    targets = []
    for question in asked:
        question.require_applicable()
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

    Raises what `measure` does, and `ValueError` for bounds that no number of draws can decide:
    in the wrong order, or closer than the rounding of `dtype`.
    """
    if not 0 < error_rate < 1:
        raise ValueError(f"expected error_rate between 0 and 1, got {error_rate}; change it")
    question.require_applicable()
    bottom, top = (np.broadcast_to(np.asarray(x, dtype=float), question.shape) for x in (low, high))
    share, way = error_rate / 2, best(question) if integrate else None
    target = Target(question, bottom, top, share, share, integrated=way)
    conditions = Conditions(
        seed, device_of(engine, device, dtype), dtype, sampler=sampler, inputs=inputs
    )
    limit = DEFAULT_DRAWS if draws is None and budget is None else draws
    with opened(store) as kept:
        campaign = Campaign([target], conditions, limit, budget, store=kept)
        return _require_finite(campaign.run(workers, engine=engine)[0])
