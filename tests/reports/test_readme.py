"""The README does what it says: its code runs, its numbers are what is computed."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from reports.verdicts import Run

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SHORT = [code for code in BLOCKS if "reports.verify" not in code]


def told(line: str) -> str | None:
    """The number that a comment begins with."""
    found = re.search(r"#\s*(\d+\.\d+)", line)
    return found[1] if found else None


@pytest.mark.parametrize("code", SHORT, ids=range(len(SHORT)))
def test_code_runs_and_gives_the_numbers_beside_it(code):
    """Every statement; a value to as many digits as its comment has."""
    names: dict[str, object] = {}
    for statement in ast.parse(code).body:
        source, line = ast.unparse(statement), code.splitlines()[(statement.end_lineno or 1) - 1]
        if isinstance(statement, ast.Expr):
            value, number = eval(source, names), told(line)
            if number is not None:
                digits = len(number.partition(".")[2])
                assert f"{value:.{digits}f}" == number, source
        else:
            exec(source, names)


def test_the_numbers_of_the_readme_are_looked_at():
    assert len(SHORT) == 3
    assert sum(told(line) is not None for code in SHORT for line in code.splitlines()) == 2


def typed(words: list[str], folder: Path) -> str:
    """What a command of this environment prints."""
    command = [str(Path(sys.executable).with_name(words[0])), *words[1:]]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_verifies_a_theorem_in_under_30_lines(tmp_path):
    """Copied into a file of a fresh directory and run, with worker processes; then the report."""
    (section,) = re.findall(
        r"^## Verify your own theorem$(.*?)^## ",
        README,
        re.MULTILINE | re.DOTALL,
    )
    code, commands = re.findall(r"^```(?:python)?\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert len(code.splitlines()) < 30
    (tmp_path / "my_theorem.py").write_text(code)
    words = (line.split("#")[0].split() for line in commands.splitlines())
    theorem, report = (typed(command, tmp_path) for command in words)
    assert theorem.count("REFUTED") == 2
    found = {(v.claim, v.verdict, v.expected) for v in Run.load(tmp_path / "runs" / "mine")}
    assert found == {
        ("mine.half", "CONFIRMED", "CONFIRMED"),
        ("mine.third", "REFUTED", "REFUTED"),
    }
    assert "report.html" in report
    assert "mine.third" in (tmp_path / "runs" / "mine" / "report.html").read_text()
