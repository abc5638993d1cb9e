"""Plant every error of the catalogue in a copy of the sources, and ask its catcher.

    python -m tests.planted            all, with a table in results.json and results.md
    python -m tests.planted NAME ...   those whose names contain one of the words

Each plant has a copy of its own, in which nothing else differs.  A catcher must say nothing on a
copy without a plant and notice the plant on the other: the exit status is 1 where one does not.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nope.checks import expect
from tests.planted.catalogue import CATALOGUE, SIZES, Plant

ROOT = Path(__file__).parents[2]
COPIED = ("nope", "theory", "montecarlo", "reports", "tests", "examples", "pyproject.toml")
RESULTS = Path(__file__).with_name("results.json")
TABLE = Path(__file__).with_name("results.md")

SILENT, NOTICED = 0, 1
"""Exit status of a catcher, a test as well as a verdict; any other is no answer."""
SECONDS = 300
"""A catcher that takes longer has not answered."""
MOST_CHARACTERS = 200
"""Characters of an answer that are kept."""
AT_ONCE = min(2, os.cpu_count() or 1)


@dataclass(frozen=True)
class Answer:
    """What a catcher answered: its exit status, its last words, and the seconds it took."""

    status: int | None
    words: str
    seconds: float


@contextmanager
def copy(plant: Plant | None = None) -> Iterator[Path]:
    """The sources in a temporary directory, with an error planted or none."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name)
            elif source.exists():
                shutil.copy(source, root)
        if plant is not None:
            plant.apply(root)
        yield root


def environment(root: Path) -> Mapping[str, str]:
    """That of a process whose packages are the copy's, on one thread and without a cache."""
    inherited = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_")}
    return inherited | {
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_ADDOPTS": "-q -x -p no:randomly -p no:cacheprovider --hypothesis-profile=planted",
        "NOPE_CACHE_DIR": "",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "400",
    }


def ask(catchers: Sequence[str], root: Path) -> Answer:
    """What a command says in a copy; several tests are asked in one process."""
    module, *first = shlex.split(catchers[0])
    words = [*first, *(word for other in catchers[1:] for word in shlex.split(other)[1:])]
    begin = time.perf_counter()
    try:
        found = subprocess.run(
            [sys.executable, "-m", module, *words],
            cwd=root,
            env=dict(environment(root)),
            capture_output=True,
            text=True,
            timeout=SECONDS * len(catchers),
        )
    except subprocess.TimeoutExpired:
        seconds = time.perf_counter() - begin
        return Answer(None, f"no answer in {seconds:.0f} s", seconds)
    seconds = time.perf_counter() - begin
    return Answer(found.returncode, last_words(found.stdout + found.stderr), seconds)


def last_words(output: str) -> str:
    """What was noticed: the first test that failed, or the row of a verdict; else the last line."""
    lines = [line.strip(" │") for line in output.splitlines() if line.strip()]
    failed = (line for line in lines if line.startswith(("FAILED ", "ERROR ")))
    judged = (line for line in lines if line.startswith(("chi2023", "zuo2025")) and "│" in line)
    told = next(failed, None) or next(judged, None) or (lines or [""])[-1]
    return " ".join(told.replace("│", " ").split(r"\n")[0].split())[:MOST_CHARACTERS]


def planted(plant: Plant) -> Answer:
    """What its catcher says of a planted error; no answer where the plant does not apply."""
    try:
        with copy(plant) as root:
            return ask([plant.catcher], root)
    except ValueError as error:
        return Answer(None, str(error), 0.0)


def unplanted(catchers: Iterable[str]) -> dict[str, Answer]:
    """What catchers say where nothing is planted: all tests together, then each verdict."""
    asked = sorted(set(catchers))
    tests = [catcher for catcher in asked if catcher.startswith("pytest")]
    groups = [tests] * bool(tests) + [[one] for one in asked if one not in tests]
    with copy() as root:
        answers = [ask(group, root) for group in groups]
    return {one: a for group, a in zip(groups, answers, strict=True) for one in group}


# ---------------------------------------------------------------------------- the table


def row(plant: Plant, clean: Answer, found: Answer) -> dict[str, Any]:
    """A line of the table."""
    return {
        "error": plant.name,
        "wrong": plant.wrong,
        "area": plant.area,
        "module": plant.module,
        "change": plant.digest,
        "catcher": plant.catcher,
        "unnoticed by": plant.unnoticed_by,
        "caught": clean.status == SILENT and found.status == NOTICED,
        "says": found.words if clean.status == SILENT else f"without the plant: {clean.words}",
        "seconds": round(found.seconds, 1),
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for readers."""
    caught = sum(found["caught"] for found in rows)
    lines = [
        "# Planted errors",
        "",
        f"{caught} of {len(rows)} are caught; `make planted` wrote this.  Catchers were named",
        "before planting; where the first noticed nothing it is crossed out, and what notices was",
        "added.  A verdict is one opposite to what the best theory expects, at",
        f"`{SIZES}` where no others are given.",
        "",
        "| area | error | in | caught by | s |",
        "|---|---|---|---|---|",
        *map(_line, rows),
    ]
    return "\n".join(lines) + "\n"


def _line(found: Mapping[str, Any]) -> str:
    first, catcher = (_short(found[name]) for name in ("unnoticed by", "catcher"))
    by = f"`{catcher}`" if found["caught"] else f"**nothing** (`{catcher}`)"
    by = f"~~`{first}`~~ {by}" if first else by
    cells = (
        found["area"],
        f"{found['error']}: {found['wrong']}",
        f"`{found['module']}`",
        by,
        f"{found['seconds']}",
    )
    return f"| {' | '.join(cells)} |"


def _short(catcher: str) -> str:
    return catcher.replace(f" {SIZES}", "").removeprefix("pytest tests/")


def chosen(words: Sequence[str]) -> list[Plant]:
    """The plants whose names contain one of the words; all without words.

    Raises `ValueError` where there is none.
    """
    found = [plant for plant in CATALOGUE if not words or any(w in plant.name for w in words)]
    expect(bool(found), "a word of a plant's name", list(words), "see tests/planted/results.md")
    return found


def main(words: Sequence[str]) -> int:
    """Run them, print and write the table; 1 where something is not caught."""
    plants = chosen(words)
    rows = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        clean = pool.submit(unplanted, [plant.catcher for plant in plants])
        for plant, found in zip(plants, pool.map(planted, plants), strict=True):
            rows.append(row(plant, clean.result()[plant.catcher], found))
            told = "caught" if rows[-1]["caught"] else "NOT CAUGHT"
            print(f"{told:10} {found.seconds:5.1f} s  {plant.name}\n{'':20}{rows[-1]['says']}")
    missed = [found["error"] for found in rows if not found["caught"]]
    print(f"{len(rows) - len(missed)} of {len(rows)} caught; not caught: {missed or 'none'}")
    if not words:
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        TABLE.write_text(markdown(rows))
    return NOTICED if missed else SILENT
