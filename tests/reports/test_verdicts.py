"""Runs: the file, the table, the command that gives a run again."""

import json
import math
import shlex
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import reports
import theory
from reports.cli import app
from reports.verdicts import FILE, SCHEMA, Run

FIELDS = {
    "claim",
    "status",
    "verdict",
    "expected",
    "question",
    "positions",
    "shape",
    "prediction",
    "estimate",
    "low",
    "high",
    "band",
    "worst",
    "draws",
    "detectable",
    "error_rate",
    "seconds",
}
INFO = {"seed", "error_rate", "device", "dtype", "versions", "commit", "seconds"}


@pytest.fixture(scope="module")
def run() -> Run:
    claims = theory.claims(d_model=16, n_heads=2, n_ctx=5, std=0.2)
    return reports.verify(claims, seed=6, workers=1, draws=2048)


def refuse(constant: str) -> None:
    raise AssertionError(f"bare {constant}")


def test_the_json_has_the_schema_and_no_bare_nan(run):
    """Every promised field is there, and every number is a JSON number."""
    content = json.loads(run.to_json(), parse_constant=refuse)
    assert content["schema"] == SCHEMA
    assert content["run"].keys() >= INFO
    for entry in content["verdicts"]:
        assert entry.keys() >= FIELDS
        lists = [entry[name] for name in ("positions", "prediction", "estimate", "low", "high")]
        lists += [entry["band"]["low"], entry["band"]["high"]]
        assert len({len(values) for values in lists}) == 1


def test_a_saved_run_loads_as_it_was(run, tmp_path):
    """Save, load, save again: the same document."""
    run.save(tmp_path)
    again = Run.load(tmp_path)
    assert json.loads(again.to_json()) == json.loads(run.to_json())
    assert Run.load(tmp_path / FILE).exit_status == run.exit_status


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "other/1"}', '{"schema": "x"'])
def test_a_foreign_file_is_refused(text, tmp_path):
    """One line that says what was expected."""
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match=r"expected .* nope.verdicts/1"):
        Run.load(tmp_path)


def test_what_a_file_lacks_is_named(tmp_path):
    """Not by the bare key."""
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(ValueError, match="got one without 'schema'"):
        Run.load(tmp_path)


def test_a_damaged_run_is_refused(run, tmp_path):
    """Missing parts, lists of different lengths, words for numbers: one line each."""
    whole = json.loads(run.to_json())
    judged = next(k for k, entry in enumerate(whole["verdicts"]) if entry["positions"])
    damages = [
        lambda content: content["run"].pop("seconds"),
        lambda content: content["verdicts"][judged]["estimate"].pop(),
        lambda content: content["verdicts"][judged]["low"].__setitem__(0, "low"),
        lambda content: content["verdicts"][judged]["question"].pop("place"),
    ]
    for damage in damages:
        content = json.loads(run.to_json())
        damage(content)
        (tmp_path / FILE).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"expected .* nope.verdicts/1"):
            Run.load(tmp_path)


def test_the_printed_interval_is_the_one_that_decided(run):
    """CONFIRMED: all of it inside the band.  REFUTED: the worst lies wholly outside."""
    names = {verdict.verdict for verdict in run}
    assert {"CONFIRMED", "REFUTED"} <= names
    for verdict in run:
        low, high = verdict.band["low"], verdict.band["high"]
        if verdict.verdict == "CONFIRMED":
            for k in range(len(verdict.positions)):
                assert low[k] <= verdict.low[k]
                assert high[k] is None or verdict.high[k] <= high[k]
        if verdict.verdict == "REFUTED":
            k = verdict.positions.index(verdict.worst["position"])
            assert verdict.worst["high"] < low[k] or verdict.worst["low"] > high[k]


def test_a_changed_paper_claim_has_no_command():
    """A claim made from a paper's by `replace` is a user's own."""
    lemma1 = next(c for c in theory.claims(d_model=16, n_ctx=3) if c.id == "chi2023.lemma1")
    changed = replace(lemma1, prediction=1.0)
    with pytest.raises(ValueError, match="claims of your own"):
        reports.verify(changed, workers=1, draws=64).reproduce()


def test_a_missing_run_is_refused(tmp_path):
    """The remedy names the command."""
    with pytest.raises(FileNotFoundError, match="nope verify --out"):
        Run.load(tmp_path / "nothing")


def test_the_table_has_a_row_per_position(run):
    """One row per verdict and judged position."""
    table = run.to_dataframe()
    assert len(table) == sum(len(verdict.positions) for verdict in run)
    inside = table[table["verdict"] == "CONFIRMED"].dropna()
    assert (inside["estimate"] <= inside["band_high"]).all()


def test_reproduce_gives_the_same_bits(run, tmp_path):
    """The printed command, parsed by the command's own parser, repeats the estimates."""
    words = shlex.split(run.reproduce())
    assert words[:2] == ["nope", "verify"]
    target = tmp_path / "again.json"
    CliRunner().invoke(app, [*words[1:], "--workers", "1", "--json", str(target)])
    for first, second in zip(run, Run.load(target), strict=True):
        assert first.estimate == second.estimate
        assert first.draws == second.draws


def test_a_users_claim_has_no_command():
    """What a command line cannot name is refused, not guessed."""
    question = theory.Setting(d_model=16, n_ctx=3).question("blocks.0.ln1", "second_moment")
    claim = theory.Claim("user.one", "One.", "a test", "exact", question, 1.0)
    with pytest.raises(ValueError, match="claims of your own"):
        reports.verify(claim, workers=1).reproduce()


def test_surprise_undecided_and_quiet_have_their_exit_status(run):
    """1 before 3 before 0."""
    one = next(verdict for verdict in run if verdict.verdict == "CONFIRMED")
    quiet = replace(one, expected="CONFIRMED")
    surprise = replace(one, expected="REFUTED")
    undecided = replace(one, verdict="UNDECIDED")
    assert Run(run.info, (quiet,)).exit_status == 0
    assert Run(run.info, (quiet, undecided)).exit_status == 3
    assert Run(run.info, (undecided, surprise)).exit_status == 1


def test_words_say_the_claim_and_the_verdict(run):
    """Every verdict is a sentence of its own."""
    for verdict in run:
        assert verdict.statement in verdict.words
        assert verdict.verdict in verdict.words
        assert math.isfinite(verdict.seconds)
