"""Claims against measurements: the one place where both routes meet.

`verify` splits the run's error rate over what is judged, lets `montecarlo.Campaign` decide
every region, and writes each verdict down with what a reader needs to believe it.
"""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import sympy as sp

from montecarlo import Campaign, Conditions, Decision, Target, exponent
from montecarlo.campaign import at_once, begin, require_limits
from montecarlo.decide import require_rate
from montecarlo.engines import device_of, ready
from montecarlo.engines import engine as engine_of
from montecarlo.estimators import Asked, Integrated, best
from montecarlo.plan import detectable, more_draws
from montecarlo.store import opened
from nope.checks import expect, expect_finite, line
from nope.plugins import packages
from nope.questions import Question
from reports.verdicts import NOT_APPLICABLE, UNDECIDED, UNINFORMATIVE, Run, Verdict
from theory.claims import UNINFORMATIVE_BAND, Claim, expect_own_ids, gather
from theory.claims import claims as all_claims
from theory.derivation import derive
from theory.formula import Formula
from theory.relations import Rate, Region

ERROR_RATE = 1e-3
TOLERANCE = 0.025
BUDGET = 600.0


@dataclass(frozen=True, eq=False)
class Case:
    """One question of a claim, with the region it is held against or why there is none."""

    claim: Claim
    question: Question
    region: Region | None
    tolerance: float
    expected: str | None = None
    reason: str = ""
    without: str = NOT_APPLICABLE

    @classmethod
    def of(cls, claim: Claim, question: Question, tolerance: float) -> Case:
        """Derive what the claim asserts of this question."""
        statistic = claim.relation.statistic(question)
        expected = None
        reason = question.reason_not_applicable or statistic.reason_not_applicable
        if reason:
            return cls(claim, question, None, tolerance, reason=reason)
        try:
            region = claim.region(question, tolerance)
        except NotImplementedError as error:
            return cls(claim, question, None, tolerance, reason=str(error))
        with suppress(NotImplementedError):
            expected = claim.expected_verdict(question, tolerance)
        if region.width > UNINFORMATIVE_BAND:
            reason = (
                f"the band, remainder included, is {region.width:.1%} wide and more than "
                f"{UNINFORMATIVE_BAND:.0%} counts as no knowledge"
            )
            return cls(claim, question, None, tolerance, expected, reason, UNINFORMATIVE)
        return cls(claim, question, region, tolerance, expected)


def cases_of(claims: Iterable[Claim], tolerance: float) -> list[Case]:
    """Every question of every claim.  Raises `ValueError` for a tolerance that is not positive.

    A claim whose prediction cannot be, or fails, is UNDECIDED with the reason, and the others go
    on: nothing is drawn for it, but it was to be judged.
    """
    expect_finite("tolerance", tolerance, positive=True)
    return [_case(claim, question, tolerance) for claim in claims for question in claim.asked]


def _case(claim: Claim, question: Question, tolerance: float) -> Case:
    try:
        return Case.of(claim, question, tolerance)
    except Exception as error:
        return Case(claim, question, None, tolerance, reason=line(error), without=UNDECIDED)


def targets_of(cases: Sequence[Case], error_rate: float, plain: bool = True) -> list[Target]:
    """Targets for the cases that are judged, each with its share of the run's error rate.

    Unless `plain`, a claim is measured by an estimator that spends what the claim assumes.
    """
    require_rate(error_rate)
    judged = [(case.claim, case.region) for case in cases if case.region is not None]
    share = error_rate / 2 / max(1, len(judged))
    return [
        Target(
            region.statistic,
            region.low,
            region.high,
            share,
            share,
            integrated=None if plain else estimator_of(claim, region.statistic),
        )
        for claim, region in judged
    ]


def _likely(claims: Iterable[Claim], plain: bool) -> list[Asked]:
    """What will be measured of claims if their predictions come to something, in order."""
    asked: list[Asked] = []
    for claim in claims:
        for question in claim.asked:
            with suppress(Exception):  # `cases_of` says what is wrong with it
                statistic = claim.relation.statistic(question)
                statistic.require_applicable()
                asked.append((None if plain else estimator_of(claim, statistic)) or statistic)
    return asked


def estimator_of(claim: Claim, question: Question) -> Integrated | None:
    """The estimator with the least variance that spends only what a claim assumes.

    None is the plain one.  Raises `ValueError` where a claim assumes what it asserts.
    """
    found = best(question, claim.assumes)
    if found is not None:
        require_independent(claim, found)
    return found


def require_independent(claim: Claim, estimator: Integrated) -> None:
    """Refuse to measure a claim by an estimator that takes for granted what is claimed."""
    overlap = sorted(set(claim.asserts).intersection(estimator.spent))
    got = f"one that spends {overlap}, which it asserts"
    expect(not overlap, f"an independent estimator of {claim.id}", got, "measure it plain")


def _chosen(claims: Claim | Iterable[Claim] | None) -> tuple[Claim, ...]:
    """The claims as a tuple.  Raises `ValueError` for what is none and for two of one id."""
    if claims is None:
        return all_claims()
    found = tuple(claims) if isinstance(claims, Iterable) else (claims,)
    for claim in found:
        if not isinstance(claim, Claim):
            raise ValueError(f"expected theory.Claims, got {claim!r}; see theory.claims()")
    expect_own_ids(found)
    return found


def verify(
    claims: Claim | Iterable[Claim] | None = None,
    error_rate: float = ERROR_RATE,
    budget: float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    *,
    tolerance: float = TOLERANCE,
    draws: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    workers: int | None = None,
    engine: str = "local",
    sampler: str = "auto",
    plain: bool = False,
    inputs: int = 1,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[Campaign], None] = lambda campaign: None,
) -> Run:
    """Hold claims against real layers.

    claims:     one or several; all of `theory.claims()` when None
    error_rate: probability of any wrong CONFIRMED or REFUTED in the run, half each
    budget:     seconds to spend; 600 unless `draws` is given
    draws:      draws per question at most, rounded up to whole blocks
    tolerance:  half-width of a band before its remainder, for claims without one of their own
    out:        directory to save the run and its evidence in; evidence it holds is used again
    sampler:    real, collapsed, or auto for what is faster (`montecarlo.collapsed`)
    plain:      no estimator with less variance, though a claim assumes what one spends
    inputs:     inputs per draw of the weights
    engine:     where blocks are computed, and by how many `workers`: see `montecarlo.engines`

    The evidence behind a decided verdict is the same bits for any `engine`, `workers` and
    `budget`, and for a run that was killed and called again.  A claim whose prediction or layers
    fail is UNDECIDED with the reason.  Raises `ValueError` for arguments that cannot be and bands
    lost in rounding, `OSError` for an evidence store that cannot be used, `MemoryError` where a
    block does not fit.
    """
    begun = time.perf_counter()
    chosen = _chosen(claims)
    conditions = Conditions(
        seed, device_of(engine, device, dtype), dtype, sampler=sampler, inputs=inputs
    )
    require_limits(draws, budget)
    require_rate(error_rate)
    if budget is None and draws is None:
        budget = BUDGET
    errors: dict[Asked, Exception] = {}
    start = engine_of(engine, workers, conditions.device)
    with opened(out) as store, ready(start) as (started, ahead):
        if store is None or store.empty:
            together = at_once(engine, workers, conditions.device)
            begin(ahead, together, _likely(chosen, plain), conditions)
        cases = cases_of(chosen, tolerance)
        targets = targets_of(cases, error_rate, plain)
        judged = [case for case in cases if case.region is not None]
        told = partial(note, errors)
        derivations = (_derivation(target.question) for target in targets)

        def between(campaign: Campaign) -> None:
            """Derive while the workers draw: a question's steps are kept for its verdict."""
            progress(campaign)
            next(derivations, None)

        campaign = Campaign(targets, conditions, draws, budget, stop, between, store, told)
        decisions = dict(
            zip(judged, campaign.run(workers, engine=engine, started=started), strict=True)
        )
    ended = "interrupted" if stop() else "a worker died" if campaign.broken else "stopped"
    failed = {c: errors[d.target.asked] for c, d in decisions.items() if d.target.asked in errors}
    verdicts = tuple(_verdict(c, decisions.get(c), failed.get(c), ended) for c in cases)
    verdicts = _with_exponents(verdicts, {c: d for c, d in decisions.items() if c not in failed})
    options = {
        "error_rate": error_rate,
        "tolerance": tolerance,
        "draws": draws,
        "budget": budget,
        "seed": seed,
        "device": conditions.device,
        "dtype": dtype,
        "sampler": sampler,
        "plain": plain,
        "inputs": inputs,
    }
    info = {
        **options,
        "interrupted": stop(),
        "broken": campaign.broken,
        "blocks": {"computed": campaign.computed, "recalled": store.recalled if store else 0},
        "seconds": time.perf_counter() - begun,
        "versions": versions(),
        "commit": commit(),
        "arguments": _arguments(chosen, options),
    }
    run = Run(info, verdicts)
    if out is not None:
        run.save(out)
    return run


def note(errors: dict[Asked, Exception], asked: Asked, error: Exception) -> None:
    """Keep why a question's block failed; that there is no room for it ends the run."""
    if isinstance(error, MemoryError):
        raise error
    errors[asked] = error


# ------------------------------------------------------------------------ one verdict


def describe(question: Question) -> dict[str, Any]:
    """A question as plain data."""
    given = f"Weights(seed={question.given.seed})" if question.given else None
    return {
        "place": question.place,
        "observable": question.observable,
        "given": given,
        "points": list(question.points),
        "init": repr(question.init),
        "architecture": repr(question.architecture),
        "d_model": int(question.architecture.d_model),
        "n_ctx": int(question.architecture.n_ctx),
    }


def _common(case: Case) -> dict[str, Any]:
    claim = case.claim
    return {
        "claim": claim.id,
        "statement": claim.statement,
        "source": claim.credit,
        "status": str(claim.status),
        "expected": case.expected,
        "remark": claim.remark,
        "relation": claim.relation.name,
        "reason": case.reason,
    }


def _verdict(case: Case, decision: Decision | None, error: Exception | None, ended: str) -> Verdict:
    """What a case came to; `error` is why its draws failed."""
    if error is not None:
        case = replace(case, region=None, reason=line(error), without=UNDECIDED)
    if decision is None or case.region is None:
        return _not_judged(case)
    return _judged(case, case.region, decision, ended)


def _not_judged(case: Case) -> Verdict:
    words = f"{case.claim.statement} {case.without}: {case.reason}."
    return Verdict(
        verdict=case.without, words=words, question=describe(case.question), **_common(case)
    )


def _judged(case: Case, region: Region, decision: Decision, ended: str) -> Verdict:
    question, judged = region.statistic, region.statistic.judged
    prediction = case.claim.predict(case.question)
    measured = decision.measurement
    estimate = measured.mean if measured else np.full(question.shape, np.nan)
    lowest, highest = decision.simultaneous()
    worst = _worst(region, estimate, decision)
    remainder = float(np.max(prediction.remainder, initial=0.0))
    derivation, aside = _derivation(question)
    return Verdict(
        verdict=decision.verdict,
        words=_words(case, decision, worst, remainder, ended) + aside,
        question=describe(question),
        positions=question.positions,
        shape=list(question.shape),
        prediction=_list(region.prediction, judged),
        estimate=_list(estimate, judged),
        low=_list(decision.low, judged),
        high=_list(decision.high, judged),
        simultaneous={"low": _list(lowest, judged), "high": _list(highest, judged)},
        band={"low": _list(region.low, judged), "high": _list(region.high, judged)},
        worst=worst,
        draws=measured.draws if measured else 0,
        detectable=_detectable(region, decision),
        error_rate=2 * decision.target.confirm_error,
        seconds=decision.seconds,
        formula=prediction.formula.latex() if isinstance(prediction.formula, Formula) else None,
        derivation=derivation,
        **_common(case),
    )


def _list(values: np.ndarray, judged: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values[judged]]


def _worst(region: Region, estimate: np.ndarray, decision: Decision) -> dict[str, Any] | None:
    """The position furthest out of its band, in units of its half-width.

    For a REFUTED claim the one whose interval lies furthest outside.  A one-sided band has no
    width; there the standard error is the unit.
    """
    question, judged = region.statistic, region.statistic.judged
    measured = decision.measurement
    if measured is None or not judged.any():
        return None
    low, high, mean = decision.low[judged], decision.high[judged], estimate[judged]
    bottom, top = region.low[judged], region.high[judged]
    one_sided = ~np.isfinite(top - bottom)
    unit = np.where(one_sided, measured.standard_error[judged], (top - bottom) / 2)
    if decision.verdict == "REFUTED":
        room = np.minimum(high - bottom, top - low)
    else:
        room = np.minimum(mean - bottom, top - mean)
    k = int(np.argmin(np.divide(room, unit, out=room.copy(), where=unit > 0)))
    columns = {"prediction": region.prediction[judged], "estimate": mean, "low": low, "high": high}
    found = {name: float(column[k]) for name, column in columns.items()}
    ratio = found["estimate"] / found["prediction"] if found["prediction"] else None
    return {"position": question.positions[k], **found, "ratio": ratio}


def _detectable(region: Region, decision: Decision) -> float | None:
    """The smallest error common to all positions, over their scale, that would be refuted."""
    if decision.measurement is None:
        return None
    return detectable(decision.target, decision.measurement, region.prediction)


def _words(
    case: Case, decision: Decision, worst: dict[str, Any] | None, remainder: float, ended: str
) -> str:
    """The verdict as a sentence."""
    claim, kind = case.claim, case.question.kind
    rule = claim.relation.words(claim.band or case.tolerance, kind.scale, remainder)
    if decision.measurement is None or worst is None:
        return f"{claim.statement} {UNDECIDED}: {decision.failure or f'{ended}, nothing drawn'}."
    where = f"at {position_name(worst['position'], case.question.observable)}"
    ends = (worst["low"], worst["high"])
    span = f"[{ends[0]:.4g}, {ends[1]:.4g}]" if np.isfinite(ends).all() else "(no interval yet)"
    found = f"{worst['estimate']:.4g} {span}"
    aside, entries = decision.measurement.aside, decision.target.entries
    draws = f"{decision.measurement.draws} draws"
    evidence = f"{draws}, {aside}" if aside else draws
    if decision.verdict == "CONFIRMED":
        every = f"every one of {entries} entries is" if entries > 1 else "it is"
        return f"{claim.statement} CONFIRMED: {every} {rule} ({evidence})."
    if decision.verdict == "REFUTED":
        return (
            f"{claim.statement} REFUTED: {where} it is {found}, predicted "
            f"{worst['prediction']:.4g}, and not {rule} ({evidence})."
        )
    return (
        f"{claim.statement} UNDECIDED: {ended} after {draws} with {found} {where}, predicted "
        f"{worst['prediction']:.4g}; {_more(decision)} would decide whether it is {rule}."
    )


def _more(decision: Decision) -> str:
    """How many more draws a verdict takes if the claim may still hold, in words."""
    assert decision.measurement is not None
    more = more_draws(decision.target, decision.measurement)
    return f"about {more:.2g} more draws" if np.isfinite(more) else "no number of draws"


def _with_exponents(
    verdicts: Sequence[Verdict], decisions: Mapping[Case, Decision]
) -> tuple[Verdict, ...]:
    """The verdicts, those on a rate with the interval that all widths together give it."""
    found: dict[str, tuple[float, float]] = {}
    for claim in {case.claim.id: case.claim for case in decisions}.values():
        if isinstance(claim.relation, Rate):
            ends = _exponent(
                claim.relation, [(c, d) for c, d in decisions.items() if c.claim.id == claim.id]
            )
            found |= {} if ends is None else {claim.id: ends}
    return tuple(
        _with_exponent(verdict, *found[verdict.claim])
        if verdict.positions and verdict.claim in found
        else verdict
        for verdict in verdicts
    )


def _with_exponent(verdict: Verdict, low: float, high: float) -> Verdict:
    words = f"The exponent of the rate lies in [{low:.3g}, {high:.3g}]."
    if low > high:
        words = "No power of d fits the gaps."
    return replace(verdict, exponent={"low": low, "high": high}, words=f"{verdict.words} {words}")


def _exponent(
    relation: Rate, judged: Sequence[tuple[Case, Decision]]
) -> tuple[float, float] | None:
    """The ends of the interval for a rate's exponent, one for all positions; None if unmeasured.

    The intervals behind it are the simultaneous ones of the verdicts, so it costs no error rate.
    """
    ordered = sorted(judged, key=lambda pair: int(pair[0].question.architecture.d_model))
    widths = [int(case.question.architecture.d_model) for case, _ in ordered]
    measured = [decision.measurement for _, decision in ordered if decision.measurement]
    if not len(measured) == len(widths) == len(set(widths)) >= 2:
        return None
    limits = [relation.limit(case.question) for case, _ in ordered]
    each = min(decision.target.refute_error / decision.target.entries for _, decision in ordered)
    low, high = exponent(widths, measured, limits, each * len(widths))
    entries = ordered[0][1].target.judged
    return float(low[entries].max()), float(high[entries].min())


def position_name(position: Any, observable: str) -> str:
    """A judged entry's label in words."""
    if observable.startswith("coordinate"):
        return "m = {}, j = {}".format(*position)
    if observable == "cdf":
        return f"x = {position:.4g}"
    if isinstance(position, list | tuple):
        return f"({', '.join(map(str, position))})"
    return "all positions" if position == "all" else f"m = {position}"


LEFT_SIDES = {"vector": r"K(m, n)", "pair": r"\mathbb{E}\,x_{mn}^2"}
"""What a derivation is about: a kernel, or the second moment of a score or a weight."""


@lru_cache(maxsize=1024)
def _derivation(question: Question) -> tuple[list[dict[str, str]], str]:
    """The steps, and in words why they fail; a claim with its own numbers may do without rules."""
    try:
        return derivation_of(question), ""
    except NotImplementedError:
        return [], ""
    except Exception as error:
        return [], f" Its derivation fails: {line(error)}."


def derivation_of(question: Question) -> list[dict[str, str]]:
    """The kernel's derivation at a question's place, in LaTeX; a symmetry rests on none."""
    if question.kind.transform is not None:
        return []
    derivation = derive(question.architecture, question.init, question.place)
    operations = question.architecture.places()
    return [
        {
            "place": step.place,
            "rule": step.rule.name,
            "statement": step.rule.statement,
            "left": LEFT_SIDES[operations[step.place].axes],
            "before": sp.latex(step.before),
            "after": sp.latex(step.after),
            "assumption": step.rule.assumption,
            "source": step.rule.source,
            "exact": "yes" if step.exact else "leading order",
        }
        for step in derivation.steps
    ]


# ------------------------------------------------------------------- how a run was made


def versions() -> dict[str, str]:
    """Versions of everything a number may depend on, plugins among it."""
    needed = ("nope-theory", "torch", "numpy", "scipy", "sympy")
    found = {package: metadata.version(package) for package in needed}
    machine = {"python": platform.python_version(), "machine": platform.machine()}
    return {**found, **packages(), **machine}


def commit() -> str | None:
    """The git commit of the source, `+` marking uncommitted changes; None without one."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # not somebody else's repository around us
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _arguments(claims: Sequence[Claim], options: dict[str, Any]) -> dict[str, Any] | None:
    """What `nope verify` needs to ask the same; None for claims a command line cannot name."""
    settings = {claim.setting for claim in claims}
    if len(settings) != 1 or None in settings:
        return None
    (setting,) = settings
    assert setting is not None
    chosen = [claim.id for claim in claims]
    if {claim.id for claim in gather(setting)[0]} == set(chosen):
        chosen = []
    return {"claims": chosen, "options": {**asdict(setting), **options}}
