"""A run that is killed goes on: the same command, the same bits, nothing committed is lost."""

import hashlib
import os
import random
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest

import reports
import theory
from montecarlo.store import FILE
from reports import cli
from reports.verdicts import Run
from theory.claims import select

CLAIMS = ("chi2023.lemma3", "zuo2025.cosine")
SIZES = {"d_model": 32, "n_heads": 2, "n_ctx": 48}
OPTIONS = {"draws": 40_000, "tolerance": 1e-4, "seed": 3}
"""A tolerance that these draws cannot decide, so that all are spent, in a second or more."""

COMMAND = [sys.executable, "-m", "nope", "verify", *CLAIMS, "--workers", "1"]
for name, value in {**SIZES, **OPTIONS}.items():
    COMMAND += [f"--{name.replace('_', '-')}", str(value)]


def committed(directory: Path) -> set[tuple[str, int, str]]:
    """The rows of a store: series, block and checksum."""
    if not (directory / FILE).exists():
        return set()
    with closing(sqlite3.connect(directory / FILE, 30)) as file:
        (tables,) = file.execute("SELECT count(*) FROM sqlite_master").fetchone()
        return set(file.execute("SELECT series, number, checksum FROM block") if tables else ())


def killed_at_work(directory: Path, moment: float) -> set[tuple[str, int, str]]:
    """Start the command, kill it `moment` seconds after a commit of its own; what it left."""
    before = committed(directory)
    words = [*COMMAND, "--out", str(directory)]
    environment = {**os.environ, "NOPE_CACHE_DIR": str(directory.parent / "cache")}
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=environment)
    try:
        while committed(directory) == before and process.poll() is None:
            time.sleep(0.02)
        time.sleep(moment)
    finally:
        process.kill()
        assert process.wait() == -9
    return committed(directory)


def bits(run: Run) -> list[tuple[object, ...]]:
    return [(v.claim, v.verdict, v.draws, v.estimate, v.simultaneous, v.words) for v in run]


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    """kill -9 at random moments: what was committed stays, and is not computed again."""
    clock = random.Random(hashlib.sha256(repr(COMMAND[3:]).encode()).digest())
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    kept: set[tuple[str, int, str]] = set()
    for _ in range(2):
        left = killed_at_work(torn, clock.uniform(0.0, 0.1))
        assert kept < left
        kept = left
    claims = select(theory.claims(**SIZES), CLAIMS)
    resumed, unbroken, again = (
        reports.verify(claims, out=out, workers=1, **OPTIONS) for out in (torn, whole, torn)
    )
    assert bits(resumed) == bits(unbroken) == bits(again)
    assert committed(torn) == committed(whole)
    every = len(committed(whole))
    assert kept < committed(whole)
    assert unbroken.info["blocks"] == {"computed": every, "recalled": 0}
    assert resumed.info["blocks"] == {"computed": every - len(kept), "recalled": len(kept)}
    assert again.info["blocks"] == {"computed": 0, "recalled": every}


def test_a_budget_goes_on_from_where_it_was(tmp_path, monkeypatch):
    """A second run of the same budget has the draws of the first and its own.

    By a clock that goes on when it is looked at, so that a slow machine does as much.
    """
    looks = count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(looks) / 100)
    claims = select(theory.claims(**SIZES), CLAIMS)
    options = {"tolerance": 1e-5, "budget": 0.4, "workers": 1, "out": tmp_path}
    first, second = (reports.verify(claims, **options) for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert 0 < one.draws < two.draws
    assert second.info["blocks"]["recalled"] == first.info["blocks"]["computed"]


def test_the_command_says_what_came_from_the_store(tmp_path, capsys, monkeypatch):
    """The closing summary, and one line for a store that cannot be used."""
    words = ["nope", "verify", "chi2023.lemma3", "--engine", "in-process", "--draws", "4096"]
    words += ["--d-model", "16", "--n-heads", "2", "--n-ctx", "4", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    for _ in range(2):
        with pytest.raises(SystemExit):
            cli.main()
    count = len(committed(tmp_path))
    assert count > 0
    first, second = capsys.readouterr().out.split("Saved in")[:2]
    assert "evidence store" not in first
    assert f"{count} of {count} blocks were in the evidence store." in second
    (tmp_path / FILE).write_text("no evidence")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nope: expected to open the evidence store {tmp_path / FILE}")
