"""The command `nope`: verify claims, show formulas, write reports."""

from __future__ import annotations

import atexit
import errno
import gc
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import theory
from montecarlo import Campaign, Conditions
from montecarlo.engines import default_workers, device_of
from montecarlo.estimators import Asked
from montecarlo.plan import POWER
from nope import plugins
from nope.checks import is_refusal, line
from nope.devices import resolve_device
from nope.plugins import Plugin, PluginWarning
from reports import cells, estimates, grids, plan, suite, tables
from reports.sweep import require
from reports.sweep import sweep as hold_over
from reports.verdicts import REFUTED, Run, Verdict
from theory.claims import Claim, Setting, gather, select

INTERRUPTED, BAD_USAGE, UNFORESEEN, UNREAD = 130, 2, 70, 141
"""Exit statuses beside those of a run; that of a broken pipe is 128 and SIGPIPE's number."""
OF_THE_MACHINE = (OSError, MemoryError, RuntimeError, ImportError)
"""What a machine refuses, whatever it says."""
ELSEWHERE = "name a place that can be written"
REMEDIES = {
    errno.ENOENT: "correct the path, or make its directory",
    errno.ENOTDIR: "a file stands where a directory is wanted: name a directory",
    errno.EEXIST: "a file stands where a directory is wanted: name a directory",
    errno.EISDIR: "name a file",
    errno.ENAMETOOLONG: "shorten it",
    errno.ENOSPC: "make room",
    errno.EROFS: ELSEWHERE,
    errno.EACCES: ELSEWHERE,
    errno.EPERM: ELSEWHERE,
}
"""What to do where the operating system refuses a file."""
CURVE_ROWS = 8
REASONS = 3
"""So many of the commonest reasons are printed."""
WIDE = 170
"""Columns of a pipe."""
COLUMNS = {
    165: "claim;verdict;expected;worst at;theory;measured;interval;draws;s",
    144: "claim;verdict;worst at;theory;measured;interval;draws",
    110: "claim;verdict;worst at;theory;measured",
    0: "claim;verdict;theory;measured",
}
"""What the table of verdicts shows on a terminal of at least so many columns."""
COLOURS = {"CONFIRMED": "green", "REFUTED": "red", "UNDECIDED": "yellow"}

app = typer.Typer(
    help="Theory verification for causal transformers without positional encodings.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
formula_app = typer.Typer(help="Formulas: list them, show one.", no_args_is_help=True)
app.add_typer(formula_app, name="formula")


def _console() -> Console:
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else WIDE)


def _table(first: str, *others: str) -> Table:
    """A table whose first column, the names that are typed again, is never cut."""
    table = Table()
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name)
    return table


def main() -> None:
    """The entry point; a refusal is one line on standard error and exit status 2.

    Anything unforeseen keeps its traceback and ends with 70, never with the 1 of a surprise.  So
    does a pipe that nobody reads any more, with 141; by then what is to be saved has been.
    """
    warnings.simplefilter("ignore", PluginWarning)  # `_tell` does
    atexit.register(gc.freeze)  # a million SymPy objects are not looked through once more
    try:
        _run()
    except BrokenPipeError:
        status, words = UNREAD, ""
    except Exception as error:
        if is_refusal(error) or isinstance(error, OF_THE_MACHINE):
            status, words = BAD_USAGE, f"nope: {_said(error)}\n"
        else:
            status, words = UNFORESEEN, traceback.format_exc()
    with suppress(OSError):
        sys.stderr.write(words)
    _let_go()
    sys.exit(status)


def _tell(added: Iterable[Plugin]) -> None:
    """A line on standard error for each plugin that does not work."""
    for plugin in added:
        if plugin.trouble:
            print(f"nope: {plugin.trouble}", file=sys.stderr)


def _run() -> None:
    """Run the command and send off what it printed; typer and rich make a broken pipe an exit."""
    try:
        app()
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):
            raise ended.__context__ from None
        sys.stdout.flush()
        raise


def _said(error: Exception) -> str:
    """A refusal in one line; the operating system's in the house form."""
    if isinstance(error, OSError) and error.errno is not None:
        what = error.filename or "standard output or a file"
        remedy = REMEDIES.get(error.errno, "name another")
        return f"expected {what} to be usable, got {error.strerror!r}; {remedy}"
    message = error.args[0] if isinstance(error, LookupError) and error.args else error
    return (str(message).splitlines() or [repr(error)])[0]


def _let_go() -> None:
    """Drop what cannot be written: the interpreter would try it again and change the status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _path(text: str) -> Path:
    """A path that was typed; an empty one would be the current directory."""
    if not text:
        raise typer.BadParameter("expected a path, got ''; name one, or . for this directory")
    return Path(text)


TYPED: Any = {"parser": _path, "metavar": "PATH"}


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="With --version: everything.")] = False,
) -> None:
    if version:
        found = suite.versions()
        if not verbose:
            print(f"nope-theory {found['nope-theory']}")
        else:
            for name, value in {**found, "commit": suite.commit()}.items():
                print(f"{name} {value}")
        raise typer.Exit


# ------------------------------------------------------------------------------ verify


@app.command()
def verify(
    claims: Annotated[list[str] | None, typer.Argument(metavar="[CLAIM-GLOB]...")] = None,
    error_rate: Annotated[float, typer.Option(help="Of the whole run.")] = suite.ERROR_RATE,
    tolerance: Annotated[float, typer.Option(help="Half-width of a band.")] = suite.TOLERANCE,
    draws: Annotated[
        int | None, typer.Option(help="At most per question, rounded up to whole blocks.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Seconds; not deterministic. 600 without --draws.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per core.")] = None,
    engine: Annotated[
        str, typer.Option(help="local, in-process, or a Dask scheduler: tcp://HOST:PORT.")
    ] = "local",
    sampler: Annotated[str, typer.Option(help="real, collapsed, or auto: the faster.")] = "auto",
    plain: Annotated[bool, typer.Option("--plain", help="No variance reduction.")] = False,
    inputs: Annotated[
        int, typer.Option(help="Inputs per draw of the weights, where a question allows several.")
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(**TYPED, help="Directory of the run; one that was killed goes on."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", **TYPED, help="Also write the JSON.")
    ] = None,
    d_model: Annotated[int, typer.Option()] = 768,
    n_heads: Annotated[
        int | None, typer.Option(help="12, or its greatest common divisor with d_model.")
    ] = None,
    n_ctx: Annotated[int, typer.Option()] = 512,
    std: Annotated[float, typer.Option(help="Of every weight.")] = 0.02,
    token_std: Annotated[float, typer.Option(help="Of a token's coordinate.")] = 0.02,
    list_claims: Annotated[bool, typer.Option("--list", help="List claims and stop.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Estimate draws, memory, seconds.")] = False,
) -> None:
    """Hold claims against real layers.

    Exit status: 0 when no verdict is opposite to the expected one, 1 when one is, 3 when one
    is UNDECIDED, 2 on bad usage, 130 after Ctrl-C, 141 when nobody reads the output.
    """
    require(error_rate, tolerance, draws, budget)
    known, contributed = gather(Setting(d_model, n_heads, n_ctx, std, token_std))
    added = (*contributed, *plugins.registered())
    _tell(added)
    chosen = select(known, claims or ())
    if list_claims:
        _print_claims(chosen, tolerance, (*added, *plugins.holding()))
        return
    if dry_run:
        conditions = Conditions(seed, str(resolve_device(device, dtype)), dtype)
        _print_dry_run(chosen, tolerance, error_rate, conditions, workers)
        return
    _require_writable(out, json_file)
    with interruptible() as interrupted, progress_bar(len(chosen)) as progress:
        run = suite.verify(
            chosen,
            error_rate,
            budget,
            seed,
            out,
            tolerance=tolerance,
            draws=draws,
            device=device,
            dtype=dtype,
            workers=workers,
            engine=engine,
            sampler=sampler,
            plain=plain,
            inputs=inputs,
            stop=lambda: interrupted.flag,
            progress=progress,
        )
    if json_file is not None:
        json_file.write_text(run.to_json(), encoding="utf-8")
    print_run(run, out)
    raise typer.Exit(INTERRUPTED if interrupted.flag else run.exit_status)


def _require_writable(out: Path | None, json_file: Path | None) -> None:
    """Refuse before the work what could not be written after it."""
    folder = None if json_file is None else json_file.parent
    for place, made in ((out, True), (folder, False)):
        if place is None:
            continue
        if made and not place.exists():
            place.mkdir(parents=True)
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise ValueError(f"expected a directory to write in, got {place}; name another")
    if json_file is not None and json_file.is_dir():
        raise ValueError(f"expected a file for --json, got the directory {json_file}; name a file")


@dataclass
class Interrupted:
    """Whether Ctrl-C was pressed."""

    flag: bool = False


@contextmanager
def interruptible() -> Iterator[Interrupted]:
    """The first Ctrl-C or SIGTERM asks to stop at the end of a block; a second stops at once."""
    state = Interrupted()

    def handler(number: int, frame: FrameType | None) -> None:
        if state.flag:
            raise KeyboardInterrupt
        state.flag = True

    previous = {
        number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield state
    finally:
        for number, kept in previous.items():
            signal.signal(number, kept)


@contextmanager
def progress_bar(claims: int) -> Iterator[Callable[[Campaign], None]]:
    """A bar of decided questions on standard error, where someone is looking."""
    console = Console(stderr=True)
    columns = (
        TextColumn("drawing"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} decided, {task.fields[draws]} draws"),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("verify", total=claims, draws=0)

        def update(campaign: Campaign) -> None:
            total = len(campaign.targets)
            draws = sum(stream.draws for stream in campaign.streams)
            bar.update(task, completed=len(campaign.decisions), total=total, draws=draws)

        yield update


def _print_claims(claims: tuple[Claim, ...], tolerance: float, added: tuple[Plugin, ...]) -> None:
    """A row for each claim and each plugin that does not work; what every package adds."""
    table = _table("claim", "status", "band", "statement", "source")
    for claim in claims:
        band = f"{claim.band or tolerance:.3g}"
        band = "none" if claim.relation.name == "ordered" else band
        words = map(escape, (claim.statement, claim.credit))
        table.add_row(escape(claim.id), str(claim.status), band, *words)
    for plugin in (plugin for plugin in added if plugin.trouble):
        table.add_row(escape(plugin.name), "broken", "-", escape(plugin.trouble), plugin.package)
    console = _console()
    console.print(table)
    for package in dict.fromkeys(plugin.package for plugin in added):
        parts = [f"{p.name} of {p.group}" for p in added if p.package == package and not p.trouble]
        console.print(f"{package} adds {', '.join(parts) or 'nothing'}.", highlight=False)


def _print_dry_run(
    claims: tuple[Claim, ...],
    tolerance: float,
    error_rate: float,
    conditions: Conditions,
    workers: int | None,
) -> None:
    count = workers or default_workers(conditions.device)
    cases = suite.cases_of(claims, tolerance)
    errors: dict[Asked, Exception] = {}
    found, total = plan.dry_run(cases, conditions, error_rate, count, errors)
    estimates = {id(estimate.case): estimate for estimate in found}
    table = _table("claim", "judged at", "band", "expected", "draws", "sees", "seconds")
    for case in cases:
        place = f"{case.question.observable} at {case.question.place}"
        estimate = estimates.get(id(case))
        if estimate is None or case.region is None:
            reason = escape(_without_estimate(case, errors))
            table.add_row(escape(case.claim.id), place, "-", reason, "", "", "")
            continue
        numbers = (
            f"{estimate.draws:.0f}",
            f"{estimate.detectable:.2g}",
            f"{estimate.seconds:.1f}",
        )
        band = f"{case.region.width:.3g}"
        table.add_row(escape(case.claim.id), place, band, case.expected or "-", *numbers)
    console = _console()
    console.print(table)
    memory = max((estimate.megabytes for estimate in found), default=0.0)
    console.print(
        f"Estimated from {plan.PILOT_DRAWS} draws or one block each; about {total:.0f} s and "
        f"{memory:.0f} MiB together on {count} workers (claims on one architecture share draws). "
        "By these draws a verdict has fallen, and an error of the size in `sees` been found, "
        f"{POWER:.0%} of times."
    )


def _without_estimate(case: suite.Case, errors: Mapping[Asked, Exception]) -> str:
    """Why nothing was estimated: the case's own reason, or why its pilot failed."""
    if case.region is None:
        return f"{case.without}: {case.reason}"
    error = errors.get(case.region.statistic)
    return f"UNDECIDED: {line(error) if error else 'the pilot gives no number'}"


def print_run(run: Run, out: Path | None) -> None:
    """The table of verdicts, the measured curves of what was refuted, and what to do next."""
    console = _console()
    shown = next(names for least, names in COLUMNS.items() if console.width >= least)
    table = Table()
    for name in shown.split(";"):
        table.add_column(name, no_wrap=True, overflow="fold")
    for verdict in run:
        cells = _cells(verdict)
        table.add_row(*(cells[str(column.header)] for column in table.columns))
    console.print(table)
    for verdict in run:
        if verdict.verdict == REFUTED and len(verdict.positions) > 1:
            console.print(f"{escape(verdict.claim)}, measured against theory:", highlight=False)
            console.print(_curve(verdict))
    for claim, remark in {v.claim: v.remark for v in run if v.remark}.items():
        console.print(f"{claim}: {remark}", highlight=False, markup=False)
    for verdict in run:
        if verdict.reason or verdict.verdict == "UNDECIDED" or verdict.surprising:
            console.print(f"{verdict.name}: {verdict.words}", highlight=False, markup=False)
    info = run.info
    undecided = any(v.verdict == "UNDECIDED" and not v.reason for v in run)
    if undecided and info["budget"] is not None:
        console.print("How far an UNDECIDED claim gets in a time budget varies; --draws does not.")
    console.print(
        f"Error rate of the run {info['error_rate']:g}, tolerance {info['tolerance']:g}, seed "
        f"{info['seed']}, {info['device']} {info['dtype']}, {info['seconds']:.0f} s."
        + (" Interrupted." if info["interrupted"] else "")
        + (" Workers died again and again: what was known is kept." if info["broken"] else ""),
        highlight=False,
    )
    blocks = info["blocks"]
    if blocks["recalled"]:
        total = blocks["computed"] + blocks["recalled"]
        known = f"{blocks['recalled']} of {total} blocks were in the evidence store."
        console.print(known, highlight=False)
    if out is not None:
        console.print(f"Saved in {out}; nope report {out} writes the report.", highlight=False)


def _cells(verdict: Verdict) -> dict[str, str]:
    """A row of the table by column."""
    asked, colour = verdict.question, COLOURS.get(verdict.verdict, "dim")
    mark = " (!)" if verdict.surprising else ""
    cells = {
        "claim": f"{escape(verdict.claim)}\n[dim]{asked['observable']} at {asked['place']}[/]",
        "verdict": f"[{colour}]{verdict.verdict}[/]{mark}",
        "expected": verdict.expected or "-",
        "draws": str(verdict.draws),
        "s": f"{verdict.seconds:.1f}",
    }
    worst = verdict.worst
    if worst is None:
        return {**dict.fromkeys(("worst at", "theory", "measured", "interval"), "-"), **cells}
    return {
        **cells,
        "worst at": suite.position_name(worst["position"], asked["observable"]),
        "theory": f"{worst['prediction']:.4g}",
        "measured": f"{worst['estimate']:.4g}",
        "interval": f"{_end(worst['low'])} to {_end(worst['high'])}",
    }


def _end(value: float | None) -> str:
    return "open" if value is None or not np.isfinite(value) else f"{value:.4g}"


def _curve(verdict: Verdict) -> Table:
    """A refuted curve at a few positions: theory, measurement and their ratio."""
    keep = _worth_showing(verdict)
    chosen = [keep[k] for k in np.unique(np.geomspace(1, len(keep), CURVE_ROWS).astype(int) - 1)]
    table = Table("position")
    for k in chosen:
        label = verdict.positions[k]
        shown = tuple(label) if isinstance(label, list) else label
        table.add_column(str(shown), justify="right")
    rows = {"theory": verdict.prediction, "measured": verdict.estimate}
    for name, values in rows.items():
        table.add_row(name, *(f"{_end(values[k])}" for k in chosen))
    ratios = []
    for k in chosen:
        top, bottom = verdict.estimate[k], verdict.prediction[k]
        ratios.append(f"{top / bottom:.3f}" if top is not None and bottom else "-")
    table.add_row("ratio", *ratios)
    return table


def _worth_showing(verdict: Verdict) -> list[int]:
    """All entries of a curve; of pairs, those next to the diagonal; of coordinates, one row."""
    positions = verdict.positions
    if not isinstance(positions[0], list):
        return list(range(len(positions)))
    if verdict.question["observable"].startswith("coordinate"):
        return [k for k, (row, _) in enumerate(positions) if row == positions[0][0]]
    nearest: dict[Any, int] = {}
    for k, (row, column) in enumerate(positions):
        if row not in nearest or positions[nearest[row]][1] < column:
            nearest[row] = k
    return list(nearest.values())


# ------------------------------------------------------------------------------ sweeps


@app.command()
def sweep(
    grid: Annotated[
        Path | None, typer.Argument(help="A TOML file: an axis and its values a line.")
    ] = None,
    over: Annotated[
        str,
        typer.Option(help="Axes that are not in the file, or instead: d_model=64,std=0.01:1:log9"),
    ] = "",
    error_rate: Annotated[float, typer.Option(help="Of the whole table.")] = suite.ERROR_RATE,
    tolerance: Annotated[float, typer.Option(help="Half-width of a band.")] = suite.TOLERANCE,
    draws: Annotated[int | None, typer.Option(help="At most per cell.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Seconds to draw; not deterministic. 600 without --draws.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per core.")] = None,
    engine: Annotated[
        str, typer.Option(help="local, in-process, or a Dask scheduler: tcp://HOST:PORT.")
    ] = "local",
    sampler: Annotated[str, typer.Option(help="real, collapsed, or auto: the faster.")] = "auto",
    inputs: Annotated[int, typer.Option(help="Per draw of the weights.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(**TYPED, help="Directory of the table; a sweep that was killed goes on."),
    ] = None,
    worst_only: Annotated[bool, typer.Option(help="One row per cell: the worst position.")] = False,
    list_axes: Annotated[bool, typer.Option("--list", help="List axes and columns.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Count cells, estimate draws and seconds.")] = False,
) -> None:
    """Hold the theory against real layers in every cell of a grid; write one table.

    The exit status is that of verify, and 2 where every cell is NOT_APPLICABLE.
    """
    _tell(plugins.entered())
    if list_axes:
        _print_axes()
        return
    require(error_rate, tolerance, draws, budget)
    asked = {**(cells.read(grid) if grid else {}), **(grids.split(over) if over else {})}
    if dry_run:
        where = device_of(engine, device, dtype)
        count = workers or default_workers(where)
        conditions = Conditions(seed, where, dtype, sampler=sampler, inputs=inputs)
        options: Any = {"tolerance": tolerance, "draws": draws, "conditions": conditions}
        _print_estimate(estimates.estimate(asked, error_rate, workers=count, **options), count)
        return
    if out is None:
        raise ValueError("expected --out, a directory for the table, got none; name one")
    _require_writable(out, None)
    with interruptible() as interrupted, share_bar() as progress:
        table = hold_over(
            asked,
            error_rate,
            budget,
            seed,
            out,
            tolerance=tolerance,
            draws=draws,
            device=device,
            dtype=dtype,
            workers=workers,
            engine=engine,
            sampler=sampler,
            inputs=inputs,
            worst_only=worst_only,
            stop=lambda: interrupted.flag,
            progress=progress,
        )
    _print_sweep(table, out)
    raise typer.Exit(INTERRUPTED if interrupted.flag else tables.exit_status(table))


@contextmanager
def share_bar() -> Iterator[Callable[[str, float], None]]:
    """A bar with the time left at most, on standard error, where someone is looking."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("at most"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=1.0)

        def update(words: str, share: float) -> None:
            bar.update(task, description=words, completed=share)

        yield update


def _print_axes() -> None:
    table = _table("axis", "values", "default", "meaning")
    for name, axis in cells.AXES.items():
        default = "" if axis.default is None else str(axis.default)
        table.add_row(name, ", ".join(axis.known()) or "numbers", default, axis.meaning)
    console = _console()
    console.print(table)
    columns = _table("column", "meaning")
    for name, meaning in tables.COLUMNS.items():
        columns.add_row(name, meaning)
    console.print(columns)


def _print_estimate(found: estimates.Estimate, workers: int) -> None:
    print(f"{found.cells:,} cells, {found.groups:,} groups that share draws.")
    for reason, count in found.impossible.most_common(REASONS):
        print(f"{count:,} cells cannot be: {reason}")
    print(
        f"By {found.sampled} groups: {found.judged:.0%} of the cells would be judged, in about "
        f"{found.draws:.2g} draws and {found.seconds:.0f} s on {workers} workers, after "
        f"{found.predicting:.0f} s for the theory."
    )
    for reason, count in found.refused.most_common(REASONS):
        print(f"{count:,} cells of these groups would not be judged: {reason}")
    if found.endless:
        print(
            f"{found.endless:.0%} of the cells lie on an edge of their band, where no number of "
            "draws decides: --draws or --budget ends them, and they are counted up to --draws."
        )


def _print_sweep(found: pd.DataFrame, out: Path) -> None:
    """Verdicts counted by question and fidelity, the commonest reasons, where the table is."""
    worst = found[found["worst"]]
    by = ["observable", "place", "fidelity", "band"]
    counts = worst.groupby([*by, "verdict"], observed=True).size().unstack(fill_value=0)
    shown = _table(*by, *map(str, counts.columns))
    for key, row in counts.iterrows():
        shown.add_row(*map(str, key), *map(str, row))  # type: ignore[call-overload]
    console = _console()
    console.print(shown)
    reasons = worst["reason"].astype(str)
    failed = reasons[(worst["verdict"] != "UNINFORMATIVE") & (reasons != "")]
    for reason, count in failed.value_counts().head(REASONS).items():
        console.print(f"{count} cells: {reason}", highlight=False)
    info = found.attrs
    blocks = info["blocks"]
    console.print(
        f"{len(worst):,} cells in {info['seconds']:.0f} s; error rate of the table "
        f"{info['error_rate']:g}, tolerance {info['tolerance']:g}, seed {info['seed']}, "
        f"{info['device']} {info['dtype']}; {blocks['recalled']:,} of "
        f"{blocks['computed'] + blocks['recalled']:,} blocks were in the evidence store."
        + (" Interrupted." if info["interrupted"] else "")
        + (" Workers died again and again: what was known is kept." if info["broken"] else ""),
        highlight=False,
    )
    console.print(f"Saved in {out / tables.FILE}; nope phase {out} draws it.", highlight=False)


@app.command()
def phase(
    table: Annotated[Path, typer.Argument(help="What nope sweep --out made.")],
    x: Annotated[str, typer.Option(help="The axis to the right.")],
    y: Annotated[str, typer.Option(help="The axis upwards.")],
    show: Annotated[str, typer.Option(help="verdict or error.")] = "verdict",
    where: Annotated[str, typer.Option(help="Only these cells: fidelity=uniform,n_ctx=8,16")] = "",
    out: Annotated[
        Path | None,
        typer.Option(**TYPED, help="A file .svg, .png or .pdf; phase.svg beside the table."),
    ] = None,
) -> None:
    """Draw the phase diagram of a sweep."""
    from reports import phase as diagrams

    figure = diagrams.phase(tables.load(table), x, y, show, where)
    folder = table if table.is_dir() else table.parent
    print(diagrams.write(figure, out or folder / "phase.svg"))


# ---------------------------------------------------------------------------- formulas


@formula_app.command("list")
def formula_list() -> None:
    """Every formula: name, status, symbols, statement."""
    table = _table("formula", "status", "symbols", "statement")
    for found in theory.formulas().values():
        table.add_row(found.name, str(found.status), " ".join(found.symbols), found.statement)
    _console().print(table)


@formula_app.command("show")
def formula_show(
    name: str,
    latex: Annotated[bool, typer.Option("--latex", help="Only the LaTeX.")] = False,
    python: Annotated[bool, typer.Option("--python", help="Only the SymPy source.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
    at: Annotated[
        str | None, typer.Option(help="Evaluate: d=768,sigma=0.02,m=1:8 (both ends included).")
    ] = None,
) -> None:
    """One formula, and its values at the symbols given."""
    if latex + python + as_json > 1:
        raise ValueError("expected one of --latex, --python, --json, got several; drop the others")
    found = theory.formula(name)
    values = None if at is None else grids.evaluate(found, grids.parse(at))
    if as_json:
        print(json.dumps(_formula_json(found, values), indent=1, allow_nan=False))
    elif latex or python:
        print(found.latex() if latex else found.python())
    else:
        _print_formula(found)
    if values is not None and not as_json:
        print(values.to_string(index=False))


@formula_app.command("validity")
def formula_validity(
    name: str,
    over: Annotated[
        str, typer.Option(help="Where to ask: sigma=0.01:0.03:0.01,d=768,m=1:8 (both ends).")
    ] = "",
    tolerance: Annotated[float, typer.Option(help="Largest error.")] = suite.TOLERANCE,
    along: Annotated[str | None, typer.Option(help="Ranges of this symbol; of m if any.")] = None,
) -> None:
    """Where one formula agrees with the best that is known; GPT-2 small where nothing is given."""
    found = theory.validity(name, grids.parse(over) if over else {}, tolerance)
    lines = found.ranges(along)
    table = _table(*lines[0].at, "agrees", "undecided", "largest error")
    for row in lines:
        point = (f"{value:.6g}" for value in row.at.values())
        table.add_row(*point, row.agrees, row.undecided or "-", f"{row.worst:.3g}")
    console = _console()
    console.print(table)
    console.print(f"{found.title}.", highlight=False)
    if found.boundary is not None:
        console.print(f"It ends at {found.boundary.words}", highlight=False)


def _formula_json(found: theory.Formula, values: Any) -> dict[str, Any]:
    return {
        "name": found.name,
        "statement": found.statement,
        "status": str(found.status),
        "source": found.source,
        "latex": found.latex(),
        "python": found.python(),
        "symbols": {
            key: {"meaning": entry.meaning, "unit": entry.unit, "domain": entry.domain.text}
            for key, entry in found.symbols.items()
        },
        "values": None if values is None else json.loads(values.to_json(orient="records")),
    }


def _print_formula(found: theory.Formula) -> None:
    print(f"{found.name} ({str(found.status).replace('_', ' ')}; {found.source})")
    print(found.statement)
    print(f"  {found.python()}")
    if found.status is theory.Status.LEADING_ORDER:
        print(f"  remainder about {found.remainder}")
    for key, entry in found.symbols.items():
        names = ", ".join((key, *entry.aliases))
        print(f"  {names}: {entry.meaning} [{entry.unit}], {entry.domain.text}")


# ----------------------------------------------------------------------------- reports


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="A directory that nope verify --out made.")],
    out: Annotated[Path | None, typer.Option(**TYPED, help="Where to write report.html.")] = None,
) -> None:
    """Write one self-contained HTML file about a run."""
    from reports import document

    run = Run.load(run_dir)
    folder = out or (run_dir if run_dir.is_dir() else run_dir.parent)
    print(document.write(run, folder))
