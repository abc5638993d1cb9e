"""The command: what it prints, what it refuses, how it ends."""

import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

import reports
import theory
from montecarlo.store import FILE
from reports import cli, grids
from reports.verdicts import INFO, Run

QUICK = ["--d-model", "16", "--n-heads", "2", "--n-ctx", "4", "--std", "0.2", "--workers", "1"]


def nope(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    command = [sys.executable, "-m", "nope", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_verify_writes_a_run_and_a_report(tmp_path):
    """Verify, then report: one self-contained file without scripts or links to the network."""
    done = nope("verify", "chi2023.lemma*", *QUICK, "--draws", "20000", "--out", str(tmp_path))
    assert done.returncode in (0, 3), done.stderr
    assert "chi2023.lemma2.printed" in done.stdout
    assert "REFUTED" in done.stdout
    run = Run.load(tmp_path)
    assert {verdict.claim for verdict in run} >= {"chi2023.lemma1", "chi2023.lemma3.softmax"}
    assert nope("report", str(tmp_path)).returncode == 0
    page = (tmp_path / "report.html").read_text()
    for claim in ("chi2023.lemma1", "chi2023.lemma4.corrected"):
        assert claim in page
    assert "<script" not in page
    outside = [part.split('"')[0] for part in page.split('src="')[1:] + page.split('href="')[1:]]
    assert all(link.startswith("#") for link in outside)
    judged = [verdict for verdict in run if verdict.estimate]
    assert page.count('<div class="figure">') == len(judged)


@pytest.mark.parametrize(
    "words",
    [
        ["verify", "no.such.claim"],
        ["verify", "--d-model", "0"],
        ["verify", "--d-model", "10", "--n-heads", "3"],
        ["verify", "--d-model", "1"],
        ["verify", "--std", "-1"],
        ["verify", "--tolerance", "0"],
        ["verify", "--error-rate", "2"],
        ["verify", "--draws", "0"],
        ["verify", "--budget", "nan"],
        ["verify", "--device", "toaster"],
        ["verify", "--dtype", "float16"],
        ["formula", "show", "no.such.formula"],
        ["formula", "show", "attention.uniform_covariance", "--at", "d=768"],
        ["formula", "show", "attention.uniform_covariance", "--at", "d=0,sigma=1,m=1,n=1"],
        ["formula", "show", "attention.uniform_covariance", "--at", "d=__import__('os')"],
        ["formula", "show", "attention.uniform_covariance", "--latex", "--json"],
        ["report", "no/such/directory"],
    ],
)
def test_bad_usage_is_one_line_and_status_2(words):
    """No traceback, one line with what was expected."""
    done = nope(*words)
    assert done.returncode == 2, done.stdout
    assert done.stderr.count("\n") == 1
    assert "expected" in done.stderr
    assert "Traceback" not in done.stderr


def test_list_and_dry_run_draw_no_verdict():
    """Claims and bands; draws, memory and seconds."""
    listed = nope("verify", "--list", *QUICK)
    assert listed.returncode == 0
    assert all(claim.id in listed.stdout for claim in theory.claims())
    planned = nope("verify", "chi2023.lemma1", "--dry-run", *QUICK)
    assert planned.returncode == 0
    assert "seconds" in planned.stdout
    assert "CONFIRMED" in planned.stdout


def test_formula_show_evaluates_on_a_grid():
    """--at takes numbers and ranges; --json says everything."""
    at = "d=768,sigma=0.02,m=1:3,n=1"
    done = nope("formula", "show", "attention.uniform_covariance", "--at", at, "--json")
    content = json.loads(done.stdout)
    rows = [row["attention.uniform_covariance"] for row in content["values"]]
    assert rows == pytest.approx([0.09437184 / m for m in (1, 2, 3)], abs=1e-9)
    assert content["symbols"]["d"]["domain"] == "positive integer"
    assert r"\max" in nope("formula", "show", "attention.uniform_covariance", "--latex").stdout
    source = nope("formula", "show", "attention.uniform_covariance", "--python").stdout.strip()
    assert source == "d**2*sigma**4/Max(m, n)"
    assert "cosine.gaussian_pair" in nope("formula", "list").stdout


@pytest.mark.parametrize(
    "text",
    [
        "",
        "d",
        "d=",
        "=3",
        "d=1,d=2",
        "d=1:",
        "d=3:1",
        "d=1:2:0",
        "d=1:2:3:4",
        "d=nan",
        "d=1e9:2e9",
        "m=1:1000000:0.5",
        "d=inf",
    ],
)
def test_grids_refuse_what_is_not_a_number_or_a_range(text):
    """Nothing typed is evaluated; nothing absurd is computed."""
    with pytest.raises(ValueError, match="expected"):
        grids.parse(text)


def test_version_verbose_names_what_a_bug_report_needs():
    """Versions of everything a number depends on."""
    done = nope("--version", "--verbose")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("torch", "numpy", "sympy", "python", "commit"))


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path):
    """--out that is a file, --json that is a directory or in none: no draw is spent."""
    (tmp_path / "file").write_text("")
    places = [["--out", str(tmp_path / "file")], ["--json", str(tmp_path)]]
    for words in [*places, ["--json", str(tmp_path / "nothing" / "x.json")]]:
        done = nope("verify", "chi2023.lemma1", "--n-ctx", "2048", *words)
        assert done.returncode == 2
        assert "expected a" in done.stderr
        assert "draws" not in done.stdout + done.stderr


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words) -> str:
    """What is said by the command, run in this process, which ends with 2."""
    monkeypatch.setattr(sys, "argv", ["nope", *map(str, words)])
    with pytest.raises(SystemExit) as status:
        cli.main()
    assert status.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--error-rate", "5e-324"], "expected error_rate from 1e-100 to less than 1, got 5e-324"),
        (["--dry-run", "--draws", "0"], "expected draws to be a whole number of at least 1, got 0"),
        (["--dry-run", "--budget", "-1"], "expected budget to be a finite positive number"),
        (["--list", "--error-rate", "5"], "expected error_rate from 1e-100 to less than 1, got 5"),
        (["--list", "--tolerance", "0"], "expected tolerance to be a finite positive number"),
        (["--out", ""], "expected a path, got ''"),
        (["--json", ""], "expected a path, got ''"),
    ],
)
def test_options_are_refused_whatever_is_done_with_them(monkeypatch, capsys, words, said):
    """Also where they would not be used; an empty path is not the current directory."""
    assert said in refusal(monkeypatch, capsys, "verify", "chi2023.lemma1", *words)


@pytest.mark.parametrize("place", ["file/sub", "a" * 300, "/proc/nothing"])
def test_what_the_system_refuses_is_one_line(monkeypatch, capsys, tmp_path, place):
    """Which file, what was wrong with it, what to do: not a bare number of an error."""
    (tmp_path / "file").write_text("")
    asked = ["sweep", "--over", "d_model=8,n_heads=2", "--out", tmp_path / place]
    (line,) = refusal(monkeypatch, capsys, *asked).splitlines()
    assert line.startswith(f"nope: expected {tmp_path / place} to be usable, got '")
    assert "; " in line
    assert "Errno" not in line


def test_files_to_read_and_to_write_are_refused_alike(monkeypatch, capsys, tmp_path):
    """A grid that is not there, a picture for no directory, a report in place of a file."""
    grid = {"d_model": 8, "n_heads": 2, "n_ctx": 3, "d_ff": 0, "std": [0.02, 0.1]}
    reports.sweep(grid, draws=1, workers=1, out=tmp_path, stop=lambda: True)
    (tmp_path / "file").write_text("")
    Run({"versions": {}, **dict.fromkeys(INFO, 0)}, ()).save(tmp_path)
    drawn = ["phase", tmp_path, "--x", "std", "--y", "d_model", "--out", tmp_path / "no" / "x.svg"]
    for words, name in (
        (["sweep", tmp_path / "no.toml", "--out", tmp_path], "no.toml"),
        (drawn, "x.svg"),
        (["report", tmp_path, "--out", tmp_path / "file"], "file"),
    ):
        (line,) = refusal(monkeypatch, capsys, *words).splitlines()
        assert f"{name} to be usable, got '" in line


def test_a_fault_of_the_program_is_no_bad_usage(monkeypatch, capsys):
    """An error of a library keeps its traceback and ends with 70, though it is a `ValueError`."""

    def broken(*_, **__):
        raise ValueError("operands could not be broadcast")

    monkeypatch.setattr(cli.suite, "verify", broken)
    monkeypatch.setattr(sys, "argv", ["nope", "verify", "chi2023.lemma1"])
    with pytest.raises(SystemExit) as status:
        cli.main()
    assert status.value.code == 70
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("number", cli.REMEDIES)
def test_each_remedy_is_said(number):
    """As where the file system is read-only, which a test cannot make it."""
    said = cli._said(OSError(number, os.strerror(number), "x"))
    assert said == f"expected x to be usable, got {os.strerror(number)!r}; {cli.REMEDIES[number]}"


def test_every_refusal_of_a_place_to_write_has_its_remedy():
    """Those that an ordinary mistake brings about."""
    ordinary = {errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EROFS, errno.EACCES, errno.ENOSPC}
    assert ordinary <= set(cli.REMEDIES)


# --------------------------------------------------------------------- where output goes

RUN = ["verify", "chi2023.lemma1", *QUICK, "--draws", "64", "--out"]


def redirected(how: str, *words: str) -> tuple[int, str]:
    """The status of the command with its output redirected by a shell, and what it said of it."""
    command = ["sh", "-c", f'exec "$@" {how}', "sh", sys.executable, "-m", "nope", *words]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    return done.returncode, done.stderr


PRINTED = ["formula", "show", "cosine.uniform"]


@pytest.mark.parametrize("words", [RUN, PRINTED], ids=["verify", "formula"])
def test_a_pipe_that_nobody_reads_is_no_verdict(tmp_path, words):
    """141 and not the 1 of a verdict opposite to the expected one; what was found is saved."""
    reading, writing = os.pipe()
    os.close(reading)
    where = [str(tmp_path)] if words is RUN else []
    command = [sys.executable, "-m", "nope", *words, *where]
    try:
        done = subprocess.run(
            command, stdout=writing, stderr=subprocess.PIPE, timeout=300, check=False
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
    assert not where or len(Run.load(tmp_path).verdicts) == 3


def test_without_output_the_run_is_saved(tmp_path):
    """Closed streams: nothing is printed, all is computed, and no file takes their number."""
    status, _ = redirected(">&- 2>&-", *RUN, str(tmp_path))
    assert status in (0, 3)
    assert len(Run.load(tmp_path).verdicts) == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="writes to /dev/full")
@pytest.mark.parametrize("words", [["formula", "list"], PRINTED], ids=["list", "show"])
def test_a_full_disk_is_a_refusal(words):
    """Status 2, whether it is noticed at once or at the end."""
    status, said = redirected(">/dev/full", *words)
    assert status == 2
    assert said.startswith("nope: expected standard output or a file to be usable, got 'No space")
    assert said.count("\n") == 1


def status_of(pid: int | str) -> list[str]:
    """State, parent and the rest of a process, as Linux tells it."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


def workers_of(pid: int) -> list[int]:
    """The worker processes of a coordinator."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and int(status_of(entry.name)[1]) == pid:
                found.append(int(entry.name))
    return found


def until(condition: Callable[[], bool], seconds: float = 200.0) -> None:
    """Wait for what must come, on a slow machine later."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def blocks(directory: Path) -> int:
    """How many blocks a run's store holds."""
    if not (directory / FILE).exists():
        return 0
    with closing(sqlite3.connect(directory / FILE, 30)) as file:
        (tables,) = file.execute("SELECT count(*) FROM sqlite_master").fetchone()
        return file.execute("SELECT count(*) FROM block").fetchone()[0] if tables else 0


def started(directory: Path) -> subprocess.Popen[bytes]:
    """A long run with two workers that are at work."""
    command = [sys.executable, "-m", "nope", "verify", "chi2023.lemma3", "--d-model", "64"]
    command += ["--n-ctx", "64", "--tolerance", "1e-5", "--workers", "2", "--out", str(directory)]
    with (directory / "errors").open("w") as errors:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": errors}
        process = subprocess.Popen(command, start_new_session=True, **quiet)
    until(lambda: blocks(directory) > 0 or process.poll() is not None)
    return process


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return status_of(pid)[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="reads /proc")
def test_kill_9_of_the_coordinator_leaves_no_worker(tmp_path):
    """Workers end with their coordinator, however it went."""
    process = started(tmp_path)
    workers = workers_of(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    until(lambda: not any(alive(pid) for pid in workers))


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="reads /proc")
def test_killed_workers_do_not_end_the_run(tmp_path):
    """New ones go on; Ctrl-C then ends it as always, and what was known is saved."""
    process = started(tmp_path)
    workers = workers_of(process.pid)
    for pid in workers:
        command = Path(f"/proc/{pid}/cmdline").read_text()
        if "tracker" not in command:
            os.kill(pid, signal.SIGKILL)
    until(lambda: len(set(workers_of(process.pid)) - set(workers)) >= 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=200) == 130
    run = Run.load(tmp_path)
    assert not run.info["broken"]
    assert run.info["interrupted"]


def test_ctrl_c_stops_at_a_block_and_writes_the_run(tmp_path):
    """SIGINT: the run so far is saved and the status is 130."""
    process = started(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=200) == 130, (tmp_path / "errors").read_text()
    (verdict,) = Run.load(tmp_path).verdicts
    assert verdict.verdict == "UNDECIDED"
    assert Run.load(tmp_path).info["interrupted"]
