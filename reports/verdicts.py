"""What a verdict and a run are, and the file they are kept in.

`run.json` has the schema `nope.verdicts/1`: `run` says how it was made, `verdicts` lists one
entry per claim and question.  Lists run over the judged positions.  A number that is not
finite is null (an open end of a band or interval); bare NaN never appears.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd

SCHEMA = "nope.verdicts/1"
FILE = "run.json"

INFO = ("seed", "error_rate", "tolerance", "device", "dtype", "versions", "seconds", "interrupted")
"""What `Run.info` always says."""

CONFIRMED, REFUTED, UNDECIDED = "CONFIRMED", "REFUTED", "UNDECIDED"
NOT_APPLICABLE, UNINFORMATIVE = "NOT_APPLICABLE", "UNINFORMATIVE"

Numbers = list[float | None]


@dataclass(frozen=True)
class Verdict:
    """The verdict on one question of a claim.

    `prediction`, `estimate`, `low` and `high` (the interval that the verdict was read from: for
    CONFIRMED each position's own, else the simultaneous one), `simultaneous` and `band` (a `low`
    and a `high` each) run over `positions`.  `worst` names the position furthest out and what was
    found there.  `detectable` is the smallest error of the prediction, as a fraction of its
    scale, that so many draws refute with a chance of 90%.  `error_rate` is this verdict's
    share of the run's.  `exponent` is the interval (`low`, `high`) of a rate's exponent, from
    all widths of the claim; its ends are crossed where no power fits.
    """

    claim: str
    statement: str
    source: str
    status: str
    verdict: str
    expected: str | None
    words: str
    question: dict[str, Any]
    positions: list[Any] = field(default_factory=list)
    shape: list[int] = field(default_factory=list)
    prediction: Numbers = field(default_factory=list)
    estimate: Numbers = field(default_factory=list)
    low: Numbers = field(default_factory=list)
    high: Numbers = field(default_factory=list)
    simultaneous: dict[str, Numbers] = field(default_factory=lambda: {"low": [], "high": []})
    band: dict[str, Numbers] = field(default_factory=lambda: {"low": [], "high": []})
    worst: dict[str, Any] | None = None
    draws: int = 0
    detectable: float | None = None
    error_rate: float | None = None
    seconds: float = 0.0
    reason: str = ""
    remark: str = ""
    relation: str = "equals"
    exponent: dict[str, float | None] | None = None
    formula: str | None = None
    derivation: list[dict[str, str]] = field(default_factory=list)

    @property
    def surprising(self) -> bool:
        """Whether the verdict is the opposite of what the best theory expects."""
        knowledge = (CONFIRMED, REFUTED)
        return (
            self.verdict in knowledge
            and self.expected in knowledge
            and self.verdict != self.expected
        )

    @property
    def name(self) -> str:
        """The claim with the place and observable it was judged at."""
        return f"{self.claim} ({self.question['observable']} at {self.question['place']})"


@dataclass(frozen=True)
class Run:
    """Verdicts and how they were made.

    `info` holds seed, error_rate, tolerance, device, dtype, versions, commit, seconds and the
    arguments.
    """

    info: dict[str, Any]
    verdicts: tuple[Verdict, ...]

    def __iter__(self) -> Any:
        return iter(self.verdicts)

    @property
    def exit_status(self) -> int:
        """1 if a verdict is opposite to the expected one, else 3 if one is UNDECIDED, else 0."""
        if any(verdict.surprising for verdict in self.verdicts):
            return 1
        return 3 if any(verdict.verdict == UNDECIDED for verdict in self.verdicts) else 0

    def to_json(self) -> str:
        """The document of schema `nope.verdicts/1`."""
        content = {
            "schema": SCHEMA,
            "run": self.info,
            "verdicts": [asdict(v) for v in self.verdicts],
        }
        return json.dumps(expect_finite(content), indent=1, allow_nan=False)

    def save(self, directory: str | Path) -> Path:
        """Write `run.json` into `directory`, made when missing; returns the file."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        partial, target = folder / f".{FILE}.part", folder / FILE
        partial.write_text(self.to_json(), encoding="utf-8")
        partial.replace(target)
        return target

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read a run directory or its `run.json`.

        Raises `FileNotFoundError` where there is none and `ValueError` for a file that is not
        one of ours.
        """
        file = Path(path)
        file = file / FILE if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(
                f"expected a run in {path}, got no {FILE}; make one with nope verify --out"
            )
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']!r}")
            known = {entry.name for entry in fields(Verdict)}
            verdicts = tuple(
                Verdict(**{key: value for key, value in entry.items() if key in known})
                for entry in content["verdicts"]
            )
            run = cls(dict(content["run"]), verdicts)
            run._require_whole()
            return run
        except (ValueError, TypeError, KeyError) as error:
            got = f"one without {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"expected {file} to be a {SCHEMA} document, got {got}; run nope verify again"
            ) from error

    def _require_whole(self) -> None:
        """Raise `ValueError` for a document that was damaged or written by hand."""
        missing = [name for name in INFO if name not in self.info]
        if missing:
            raise ValueError(f"no {', '.join(missing)} in run")
        for verdict in self.verdicts:
            lists = [verdict.prediction, verdict.estimate, verdict.low, verdict.high]
            for pair in (verdict.band, verdict.simultaneous):
                lists += [pair["low"], pair["high"]]
            if any(len(values) != len(verdict.positions) for values in lists):
                raise ValueError(f"lists of different lengths in {verdict.claim}")
            if not all(isinstance(x, int | float | None) for values in lists for x in values):
                raise ValueError(f"something other than numbers in {verdict.claim}")
            if not {"place", "observable", "architecture", "init"} <= verdict.question.keys():
                raise ValueError(f"a question without its parts in {verdict.claim}")

    def to_dataframe(self) -> pd.DataFrame:
        """One row per verdict and judged position: claim, place, observable, verdict, expected,
        position, prediction, estimate, low, high, band_low, band_high, draws."""
        rows = [
            {
                "claim": verdict.claim,
                "place": verdict.question["place"],
                "observable": verdict.question["observable"],
                "verdict": verdict.verdict,
                "expected": verdict.expected,
                "position": tuple(label) if isinstance(label, list) else label,
                "prediction": verdict.prediction[k],
                "estimate": verdict.estimate[k],
                "low": verdict.low[k],
                "high": verdict.high[k],
                "band_low": verdict.band["low"][k],
                "band_high": verdict.band["high"][k],
                "draws": verdict.draws,
            }
            for verdict in self.verdicts
            for k, label in enumerate(verdict.positions)
        ]
        return pd.DataFrame(rows)

    def reproduce(self) -> str:
        """The command that gives this run again.

        The same bits on the same kind of device, dtype and torch build.  A verdict left
        UNDECIDED by a time budget may get further or less far.  Raises `ValueError` for runs
        of claims that no command line can name (a user's own, or of several sizes).
        """
        arguments: Mapping[str, Any] | None = self.info.get("arguments")
        if not arguments:
            raise ValueError(
                "expected a run of the papers' claims at one size, got claims of your own; "
                "call reports.verify again"
            )
        words = ["nope", "verify", *arguments["claims"]]
        for name, value in arguments["options"].items():
            flag = f"--{name.replace('_', '-')}"
            if value is True:
                words += [flag]
            elif value is not None and value is not False:
                words += [flag, str(value)]
        return shlex.join(words)


def expect_finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: expect_finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [expect_finite(entry) for entry in value]
    return value
