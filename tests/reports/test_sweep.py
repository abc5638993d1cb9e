"""Sweeps: grids become cells, cells rows; what fails is a row; what was killed goes on."""

import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from importlib import import_module, util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

import montecarlo
import nope
import reports
import theory
from montecarlo import sampler
from montecarlo.store import FILE as EVIDENCE
from reports import cli, estimates, grids, kept, phase, tables
from reports.cells import AXES, cells, read
from reports.forecasts import forecast
from theory.claims import Setting

sweep = import_module("reports.sweep")  # the package has the function by this name

ASKED = "second_moment at blocks.0.attn_out"
TINY = {"d_model": 64, "n_heads": 2, "n_ctx": 3, "d_ff": 0, "std": [0.02, 0.1], "question": ASKED}
BARE = {**TINY, "fidelity": ["uniform", "any_temperature"], "band": "tolerance"}
QUICK = {"draws": 2048, "workers": 1, "tolerance": 0.09}

# ------------------------------------------------------------------------------- grids


def test_a_grid_is_the_product_of_its_axes():
    """Values, ranges and lists of both; the last axis named varies fastest; nothing twice."""
    grid = {"std": ["0.1:0.3:0.1", 0.3], "d_model": "16:64:log3", "n_heads": 4}
    assert read(grid) == {"std": [0.1, 0.2, 0.3], "d_model": [16, 32, 64], "n_heads": [4]}
    found = [(c.at["std"], c.at["d_model"]) for c in cells(grid)]
    assert found == [(s, d) for s in (0.1, 0.2, 0.3) for d in (16, 32, 64)]
    assert {c.at["d_ff"] for c in cells(grid)} == {64, 128, 256}


def test_an_empty_grid_is_gpt2_small():
    """Defaults are those of verify."""
    (cell,) = cells({})
    setting = Setting()
    assert cell.question == setting.question("blocks.0.attn_out", "second_moment")


def test_what_a_scheme_ignores_makes_no_cells():
    """Xavier has no std: one cell, its column empty; normal has three."""
    found = [c.at for c in cells({"scheme": ["normal", "xavier_normal"], "std": [1, 2, 3]})]
    assert [(at["scheme"], at["std"], at["gain"]) for at in found] == [
        *(("normal", std, None) for std in (1.0, 2.0, 3.0)),
        ("xavier_normal", None, 1.0),
    ]


def test_the_last_layer_is_counted_from_the_end():
    """blocks.-1 of three layers is blocks.2; a depth too small for blocks.-2 is a reason."""
    grid = {**TINY, "std": 0.1, "n_layers": [1, 3], "question": "kernel at blocks.-2.attn_out"}
    shallow, deep = cells(grid)
    assert deep.question.place == "blocks.1.attn_out"
    assert "no place blocks.-1.attn_out" in forecast(shallow, 0.1).reason


@pytest.mark.parametrize(
    ("grid", "named"),
    [
        ({"sigma": 1}, "std"),
        ({"d_model": 16.5}, "whole numbers"),
        ({"d_model": "16:17:0.5"}, "whole numbers"),
        ({"d_model": "__import__('os')"}, "numbers"),
        ({"n_ctx": True}, "numbers"),
        ({"std": []}, "a value of std"),
        ({"std": float("nan")}, "finite"),
        ({"scheme": "normale"}, "normal"),
        ({"fidelity": "exact"}, "any_temperature"),
        ({"question": "second_moment"}, "OBSERVABLE at PLACE"),
        ({"question": "cdf at embed"}, "OBSERVABLE at PLACE"),
        ({"std": "0.1:0.2:1e-6", "token_std": "0.1:0.2:1e-3"}, "at most"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_by_name(grid, named):
    """Unknown keys and values: the known ones are named, nothing is evaluated."""
    with pytest.raises(ValueError, match="expected") as refused:
        cells(grid)
    assert named in str(refused.value)


def test_a_toml_file_is_the_same_grid(tmp_path):
    """The examples are grids; what is no TOML is refused."""
    for example in sorted(Path(__file__).parents[2].glob("examples/*.toml")):
        assert len(cells(example)) > 1
    (tmp_path / "grid.toml").write_text('d_model = [16, "32:64:log2"]\nquestion = "' + ASKED + '"')
    assert cells(tmp_path / "grid.toml") == cells({"d_model": [16, 32, 64], "question": ASKED})
    (tmp_path / "grid.toml").write_text("d_model = ")
    with pytest.raises(ValueError, match="to be TOML"):
        cells(tmp_path / "grid.toml")
    for value in ('"x"', "1" + "0" * 400):
        (tmp_path / "grid.toml").write_text(f"d_model = {value}")
        with pytest.raises(ValueError, match=r"expected .*\(axis d_model of .*grid.toml\)"):
            cells(tmp_path / "grid.toml")


def test_lists_and_geometric_ranges_are_typed_like_any_other():
    """A piece without a name belongs to the name before it."""
    assert grids.parse("d=16,32,m=1:3,std=1e-2:1:log3") == {
        "d": [16, 32],
        "m": [1, 2, 3],
        "std": [0.01, 0.1, 1.0],
    }
    for wrong in ("d=0:1:log3", "d=1:2:log0", "d=2:1:log3", "d=1,,2", "1,d=2", "d=1:2:log"):
        with pytest.raises(ValueError, match="expected"):
            grids.parse(wrong)


# ------------------------------------------------------------------------------- cells


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Two standard deviations, two fidelities, bare, and heads that do not divide the width."""
    return reports.sweep({**BARE, "n_heads": [2, 3]}, **QUICK)


def test_rows_are_tidy(table):
    """Every column documented; one worst row a cell; in it the position furthest out."""
    assert list(table.columns) == list(tables.COLUMNS) == list(table.attrs["columns"])
    assert (table.groupby("cell")["worst"].sum() == 1).all()
    assert len(table) == 4 * 3 + 4
    judged = table[table["n_heads"] == 2]
    assert judged.groupby("cell")["position"].apply(list).tolist() == [[1, 2, 3]] * 4
    assert judged["other_position"].isna().all()
    error = judged["estimate"] / judged["prediction"] - 1
    assert np.allclose(judged["error"], error)
    band = judged["band_high"] / judged["prediction"] - 1
    assert np.allclose(band, QUICK["tolerance"])
    assert (judged["low"] < judged["estimate"]).all()
    assert (judged["estimate"] < judged["high"]).all()


def test_the_numbers_are_the_theorys_and_the_measurements(table):
    """Prediction and remainder as theory.predict, estimate as montecarlo.measure."""
    for cell in cells({**BARE, "n_heads": 2}):
        rows = table[
            (table["std"] == cell.at["std"])
            & (table["fidelity"] == cell.at["fidelity"])
            & (table["n_heads"] == 2)
        ]
        found = theory.predict(cell.question, cell.at["fidelity"])
        assert np.array_equal(rows["prediction"], found.values)
        assert np.array_equal(rows["remainder"], found.remainder)
        measured = montecarlo.measure(cell.question, int(rows["draws"].iloc[0]))
        assert np.array_equal(rows["estimate"], measured.mean)


def test_a_phase_boundary_is_found(table):
    """Uniform attention is right at small logits and wrong at large ones, and expected to be."""
    worst = table[table["worst"]].set_index(["n_heads", "std", "fidelity"])
    for std, verdict in ((0.02, "CONFIRMED"), (0.1, "REFUTED")):
        row = worst.loc[(2, std, "uniform")]
        assert (row["verdict"], row["expected"]) == (verdict, verdict)


def test_a_failing_cell_is_a_row_with_its_reason(table):
    """The others have been judged."""
    failed = table[table["n_heads"] == 3]
    assert (failed["verdict"] == "NOT_APPLICABLE").all()
    assert failed["reason"].str.contains("n_heads to divide d_model=64, got 3").all()
    assert failed["position"].isna().all()
    assert (failed["draws"] == 0).all()


@pytest.mark.parametrize(
    ("change", "verdict", "reason"),
    [
        ({"d_model": 0}, "NOT_APPLICABLE", "d_model to be a whole number"),
        ({"std": -1.0}, "NOT_APPLICABLE", "std to be a finite"),
        ({"question": "cosine at blocks.7.q"}, "NOT_APPLICABLE", "no place blocks.7.q"),
        ({"question": "kurtosis at blocks.0.attn_out"}, "NOT_APPLICABLE", "whose kurtosis has"),
        ({"question": "kernel at blocks.0.attn.pattern"}, "NOT_APPLICABLE", "is not defined on"),
        ({"std": 0.5, "band": "remainder"}, "UNINFORMATIVE", "counts as no knowledge"),
        ({"std": 0.0}, "UNDECIDED", "0 or an underflow"),
    ],
)
def test_each_way_to_fail_is_told_apart(change, verdict, reason):
    """Sizes, schemes, places, formulas, remainders, numbers: each with its own reason."""
    (row,) = reports.sweep({**BARE, "std": 0.1, "fidelity": "uniform", **change}, **QUICK).pipe(
        lambda found: [row for _, row in found[found["worst"]].iterrows()]
    )
    assert row["verdict"] == verdict
    assert reason in row["reason"]


BUGS = {
    "TypeError: a bug": TypeError("a bug"),
    "IndexError: tuple index out of range": IndexError("tuple index out of range"),
    "ValueError: could not be broadcast": ValueError("could not be broadcast"),
}


@pytest.mark.parametrize(("reason", "error"), BUGS.items(), ids=BUGS)
def test_an_unforeseen_error_stays_in_its_cell(monkeypatch, reason, error):
    """A bug of the theory at one cell is no refusal: it is named there, the status tells of it.

    The next cell is judged.
    """
    from reports import cells as module

    ask = module.predict

    def broken(question, fidelity):
        if fidelity == "any_temperature":
            raise error
        return ask(question, fidelity)

    monkeypatch.setattr(module, "predict", broken)
    found = reports.sweep({**BARE, "std": 0.02}, worst_only=True, **QUICK)
    assert found["reason"].tolist() == ["", reason]
    assert found["verdict"].tolist() == ["CONFIRMED", "UNDECIDED"]
    assert tables.exit_status(found) == 3


def test_a_size_beyond_64_bits_is_refused_in_its_cell(tmp_path):
    """The other cells go on, and the table is written."""
    grid = {**BARE, "d_model": [10**26, 64], "std": 0.02, "fidelity": "uniform"}
    reports.sweep(grid, out=tmp_path, worst_only=True, **QUICK)
    found = tables.load(tmp_path)
    assert found["verdict"].tolist() == ["NOT_APPLICABLE", "CONFIRMED"]
    assert found["d_model"].tolist() == [1e26, 64]
    assert "expected d_model of at most 9.22e+18, got 1" in found["reason"][0]


def test_what_no_draw_can_decide_is_refused_in_its_cell():
    """A band lost in rounding and a block beyond all memory."""
    grid = {**BARE, "std": 0.02, "fidelity": "uniform"}
    (row,) = reports.sweep(grid, draws=64, workers=1, tolerance=1e-9, worst_only=True).itertuples()
    assert "rounding of float32" in row.reason
    grid |= {"d_model": [64, 2**22], "n_heads": 1, "std": 1e-4}
    found = reports.sweep(grid, **QUICK, sampler="real", worst_only=True)
    assert found["verdict"].tolist() == ["CONFIRMED", "NOT_APPLICABLE"]
    assert "GiB" in found["reason"][1]


@pytest.mark.parametrize("error", [MemoryError("no room"), TypeError("a bug")], ids=repr)
def test_a_cell_whose_draws_fail_is_told_and_the_others_go_on(monkeypatch, error):
    """Where a block fails, in memory or otherwise; the other cells are as they would have been."""
    grid = {**BARE, "fidelity": "uniform"}
    expected = reports.sweep(grid, worst_only=True, **QUICK)
    compute = sampler.block

    def broken(group, *task):
        if group.init == nope.init.normal(0.1):
            raise error
        return compute(group, *task)

    monkeypatch.setattr(sampler, "block", broken)
    found = reports.sweep(grid, worst_only=True, **QUICK)
    assert found["reason"].tolist() == ["", f"{type(error).__name__}: {error}"]
    assert found["verdict"].tolist() == ["CONFIRMED", "UNDECIDED"]
    assert found["estimate"].isna().tolist() == [False, True]
    same = ["prediction", "estimate", "low", "high", "draws"]
    assert_frame_equal(found[same][:1], expected[same][:1], check_exact=True)


def test_fidelities_and_questions_share_their_draws(tmp_path):
    """Four cells, two questions, one group: two series of blocks, and one setting drawn."""
    grid = {**BARE, "std": 0.02, "question": [ASKED, "adjacent_cosine at blocks.0.attn_out"]}
    found = reports.sweep(grid, out=tmp_path, **QUICK)
    assert found["cell"].nunique() == 4
    assert found.attrs["blocks"]["computed"] == 2
    pairs = found[found["observable"] == "second_moment"].groupby("position")["estimate"]
    assert (pairs.nunique() == 1).all()


# ------------------------------------------------------------------- files, going on


def test_a_sweep_goes_on_from_its_evidence_to_the_same_table(tmp_path):
    """Half a sweep, then all of it: what is known is not drawn again; without it, the same bits."""
    half = reports.sweep({**BARE, "std": 0.02}, out=tmp_path, **QUICK)
    whole = reports.sweep(BARE, out=tmp_path, **QUICK)
    fresh = reports.sweep(BARE, **QUICK)
    assert whole.attrs["blocks"]["recalled"] == half.attrs["blocks"]["computed"] > 0
    assert fresh.attrs["blocks"] == {"computed": 2, "recalled": 0}
    assert_frame_equal(whole, fresh, check_exact=True)
    assert whole["estimate"].equals(fresh["estimate"])
    kept = tables.load(tmp_path)
    assert_frame_equal(kept.astype(whole.dtypes), whole, check_exact=True)
    assert kept.attrs["grid"] == whole.attrs["grid"]
    assert kept.attrs["columns"] == dict(tables.COLUMNS)


MIXED = {**BARE, "band": ["tolerance", "remainder"], "n_heads": [2, 3]}


def test_the_theory_is_asked_once(tmp_path, monkeypatch):
    """The same command again: nothing is predicted, nothing drawn, and the table is the same.

    Of what is judged, what is not for its wide band, and what cannot be.
    """
    first = reports.sweep(MIXED, out=tmp_path, **QUICK)
    assert set(first["verdict"]) >= {"CONFIRMED", "REFUTED", "NOT_APPLICABLE"}
    monkeypatch.setattr("reports.cells.predict", None)
    monkeypatch.setattr(sampler, "block", None)
    assert_frame_equal(reports.sweep(MIXED, out=tmp_path, **QUICK), first, check_exact=True)


def test_the_theory_is_asked_again_by_other_code_and_for_another_band(tmp_path, monkeypatch):
    """The key of a forecast has all that it depends on."""
    grid, asked = {**BARE, "std": 0.02, "fidelity": "uniform"}, []
    forecasts = sweep.forecasts

    def counting(cells, *options):
        asked.append(len(cells))
        return forecasts(cells, *options)

    monkeypatch.setattr(sweep, "forecasts", counting)
    for change in ({}, {}, {"tolerance": 0.08}, {"draws": 1024}):
        reports.sweep(grid, out=tmp_path, **{**QUICK, **change})
    assert asked == [1, 1]
    for name in ("REPORTS", "BUILD"):
        monkeypatch.setattr(kept, name, "another")
        reports.sweep(grid, out=tmp_path, **QUICK)
    monkeypatch.setattr(kept, "code_digest", lambda: "another")
    reports.sweep(grid, out=tmp_path, **QUICK)
    assert asked == [1] * 5
    monkeypatch.setattr(kept, "code_digest", lambda: None)  # a source was edited meanwhile
    for _ in range(2):
        reports.sweep(grid, out=tmp_path, **QUICK)
    assert asked == [1] * 7


def test_what_the_theory_said_survives_the_end_of_the_process(tmp_path, monkeypatch):
    """Part by part: the second of three parts fails, and the first is not asked again."""
    grid = {**BARE, "std": [0.01, 0.02, 0.03], "fidelity": "uniform"}
    forecasts, asked = sweep.forecasts, []

    def dying(cells, *options):
        if len(asked) == 1:
            asked.append(cells)
            raise KeyboardInterrupt
        asked.append(cells)
        return forecasts(cells, *options)

    monkeypatch.setattr(kept, "PART", 1)
    monkeypatch.setattr(sweep, "forecasts", dying)
    told = []
    with pytest.raises(KeyboardInterrupt):
        reports.sweep(grid, out=tmp_path, **QUICK)
    reports.sweep(grid, out=tmp_path, progress=lambda *what: told.append(what), **QUICK)
    assert [cell.at["std"] for cells in asked for cell in cells] == [0.01, 0.02, 0.02, 0.03]
    shares = [share for what, share in told if what == "predicting"]
    assert shares == pytest.approx([2 / 3, 1])


def test_stopping_keeps_every_cell(tmp_path):
    """Ctrl-C before the first forecast: a row per cell that says so."""
    found = reports.sweep(BARE, out=tmp_path, stop=lambda: True, **QUICK)
    assert found["verdict"].tolist() == ["UNDECIDED"] * 4
    assert found["reason"].str.startswith("interrupted").all()
    assert found.attrs["interrupted"]


def test_worst_only_is_the_worst_rows(table):
    """The same rows, fewer."""
    short = reports.sweep({**BARE, "n_heads": [2, 3]}, worst_only=True, **QUICK)
    assert_frame_equal(short, table[table["worst"]].reset_index(drop=True), check_exact=True)


def test_pairs_have_two_positions():
    """A kernel's rows are pairs n <= m."""
    grid = {**BARE, "std": 0.02, "fidelity": "uniform", "question": "kernel at blocks.0.attn_out"}
    found = reports.sweep(grid, **QUICK)
    pairs = list(zip(found["position"], found["other_position"], strict=True))
    assert pairs == [(m, n) for m in (1, 2, 3) for n in range(1, m + 1)]


def test_without_pyarrow_the_remedy_is_named(tmp_path, monkeypatch):
    """Before any work; without a file there is no need of it."""
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'nope-theory\[sweep\]'"):
        reports.sweep(BARE, out=tmp_path, **QUICK)
    assert not (tmp_path / EVIDENCE).exists()
    assert util.find_spec("pyarrow") is not None


def test_files_of_another_kind_are_refused(tmp_path):
    """No file, no Parquet, no sweep."""
    with pytest.raises(FileNotFoundError, match="nope sweep --out"):
        tables.load(tmp_path)
    (tmp_path / "x.parquet").write_text("nothing")
    with pytest.raises(ValueError, match="to be Parquet"):
        tables.load(tmp_path / "x.parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "y.parquet")
    with pytest.raises(ValueError, match=tables.SCHEMA):
        tables.load(tmp_path / "y.parquet")


@pytest.mark.parametrize(
    "options",
    [{"tolerance": 0}, {"error_rate": 2}, {"draws": 0}, {"budget": float("nan")}, {"seed": -1}],
)
def test_bad_options_are_refused_before_the_theory_is_asked(options):
    """No forecast is made."""
    asked = []
    with pytest.raises(ValueError, match="expected"):
        reports.sweep(BARE, **{**QUICK, **options}, progress=lambda *told: asked.append(told))
    assert not asked


# -------------------------------------------------------------------------- beforehand


def test_an_estimate_counts_and_projects():
    """Cells, groups and the impossible are counted; draws are those that are made."""
    grid = {**TINY, "d_model": 8, "n_heads": [2, 3], "std": "0.01:0.02:log18", "band": "tolerance"}
    found = estimates.estimate(grid, draws=4096, tolerance=0.09)
    assert (found.cells, found.groups, found.sampled) == (36, 18, estimates.SAMPLED)
    assert list(found.impossible.values()) == [18]
    assert found.judged == 1.0
    assert 18 * 2048 <= found.draws <= 18 * 4096
    assert found.seconds > 0 < found.predicting


# ------------------------------------------------------------------------------ pictures


def squares(figure) -> list[np.ndarray]:
    """What each panel shows, row by row from below."""
    return [axes.collections[0].get_array() for axes in figure.axes if axes.get_title()]


def test_a_phase_diagram_shows_every_verdict(table):
    """A panel per fidelity, a square per cell, the colour of its verdict, the expected edge."""
    figure = phase.phase(table, "std", "n_heads")
    order = list(phase.COLOURS)
    uniform, softmax = squares(figure)
    assert order[int(uniform[0, 0])] == "CONFIRMED"
    assert order[int(uniform[0, 1])] == "REFUTED"
    assert order[int(softmax[1, 0])] == "NOT_APPLICABLE"
    edge = figure.axes[0].collections[1].get_segments()
    assert [segment.tolist() for segment in edge] == [[[1, 0], [1, 1]]]


def test_an_error_map_shows_the_worst_error(table):
    """|error| of the worst position; nothing where nothing was drawn."""
    uniform, _ = squares(phase.phase(table, "std", "n_heads", "error"))
    worst = table[table["worst"] & (table["fidelity"] == "uniform")]
    error = np.abs(worst["error"]).to_numpy().reshape(2, 2)
    assert np.ma.allequal(uniform, np.maximum(error, phase.LEAST_ERROR))
    assert uniform.mask[1].all()


def test_a_diagram_is_the_same_bytes_every_time(table, tmp_path):
    """SVG with text as text; PNG by its name; another ending is refused."""
    first, second = (
        phase.write(phase.phase(table, "std", "n_heads"), tmp_path / f"{k}.svg").read_bytes()
        for k in (1, 2)
    )
    assert first == second
    assert b"expected edge" in first
    phase.write(phase.phase(table, "std", "n_heads", where="fidelity=uniform"), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="ends in one of"):
        phase.write(phase.phase(table, "std", "n_heads"), tmp_path / "x.toml")


def test_a_diagram_that_cannot_be_is_refused(table):
    """Axes that are none, two that are one, no cells, words for numbers, too many panels."""
    wrong = [("std", "sigma", ""), ("std", "std", ""), ("std", "n_heads", "fidelity=best")]
    wrong += [("std", "n_heads", "n_ctx=few"), ("std", "n_heads", "sigma=1")]
    for x, y, where in wrong:
        with pytest.raises(ValueError, match="expected"):
            phase.phase(table, x, y, where=where)
    copies = [table.assign(token_std=float(k)) for k in range(13)]
    with pytest.raises(ValueError, match="at most 12 panels"):
        phase.phase(pd.concat(copies), "std", "n_heads", where="fidelity=uniform")


# --------------------------------------------------------------------------- the command


def ended(monkeypatch, *words: str) -> int:
    """The status of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["nope", *words])
    with pytest.raises(SystemExit) as status:
        cli.main()
    code = status.value.code
    return code if isinstance(code, int) else 0


def test_the_command_sweeps_and_draws(tmp_path, monkeypatch, capsys):
    """A file, options over it, a table, a picture; again: all of it from the store."""
    (tmp_path / "grid.toml").write_text(f'question = "{ASKED}"\nd_model = 64\nn_ctx = 3\nd_ff = 0')
    over = "d_model=16,n_heads=2,std=0.02,0.1,fidelity=uniform,best,band=tolerance"
    words = ["sweep", str(tmp_path / "grid.toml"), "--over", over, "--tolerance", "0.09"]
    words += ["--draws", "2048", "--workers", "1"]
    assert ended(monkeypatch, *words, "--dry-run") == 0
    assert "4 cells, 2 groups" in capsys.readouterr().out
    assert ended(monkeypatch, *words) == 2
    assert "expected --out" in capsys.readouterr().err
    for known in (0, 2):
        assert ended(monkeypatch, *words, "--out", str(tmp_path / "run")) in (0, 3)
        assert f"{known} of 2 blocks were in the evidence store" in capsys.readouterr().out
    assert len(tables.load(tmp_path / "run")) == 4 * 3
    shown = ["phase", str(tmp_path / "run"), "--x", "std", "--y", "fidelity"]
    assert ended(monkeypatch, *shown) == 0
    assert (tmp_path / "run" / "phase.svg").read_text().count("<svg") == 1
    assert ended(monkeypatch, "sweep", "--list") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*AXES, *tables.COLUMNS))


def test_a_mistyped_place_is_bad_usage(tmp_path, monkeypatch, capsys):
    """Where no cell can be asked the status is 2, and the estimate says why beforehand."""
    over = "d_model=8,n_heads=2,n_ctx=4,d_ff=0,question=second_moment at blocks.0.att_out"
    words = ["sweep", "--over", over, "--draws", "64", "--workers", "1"]
    assert ended(monkeypatch, *words, "--dry-run") == 0
    assert "no place blocks.0.att_out" in capsys.readouterr().out
    assert ended(monkeypatch, *words, "--out", str(tmp_path)) == 2
    assert len(tables.load(tmp_path)) == 1


def test_an_axis_that_is_empty_has_no_picture():
    """Xavier has no std, normal no gain: which axis, before anything is drawn."""
    for scheme, axis in (("xavier_uniform", "std"), ("normal", "gain")):
        grid = {**TINY, "d_model": [4, 8], "std": 0.1, "scheme": scheme}
        found = reports.sweep(grid, stop=lambda: True, **QUICK)
        for pair in ((axis, "d_model"), ("d_model", axis)):
            with pytest.raises(ValueError, match=f"axis with values in these cells, got '{axis}'"):
                phase.phase(found, *pair)


def test_a_killed_sweep_goes_on(tmp_path):
    """kill -9 while it draws, then the same command: what was committed is not drawn again."""
    over = "d_model=8,n_heads=2,n_ctx=4,d_ff=0,fidelity=uniform"
    words = [sys.executable, "-m", "nope", "sweep", "--over", over, "--tolerance", "1e-3"]
    words += ["--draws", "200000", "--workers", "1", "--out", str(tmp_path)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(words, **quiet)
    try:
        while process.poll() is None and not _committed(tmp_path):
            time.sleep(0.02)
    finally:
        process.kill()
        assert process.wait() == -9
    before = _committed(tmp_path)
    assert before > 0
    grid = {"d_model": 8, "n_heads": 2, "n_ctx": 4, "d_ff": 0, "fidelity": "uniform"}
    found = reports.sweep(grid, draws=200_000, tolerance=1e-3, workers=1, out=tmp_path)
    assert found.attrs["blocks"]["recalled"] == before
    assert found["draws"].min() >= 200_000


def _committed(directory: Path) -> int:
    if not (directory / EVIDENCE).exists():
        return 0
    with closing(sqlite3.connect(directory / EVIDENCE, 30)) as file:
        (count,) = file.execute("SELECT count(*) FROM sqlite_master").fetchone()
        return file.execute("SELECT count(*) FROM block").fetchone()[0] if count else 0


def test_the_exit_status_is_that_of_a_run(table):
    """1 for a surprise, 3 for what is undecided, else 0."""
    calm = table[table["verdict"] != "UNDECIDED"]
    assert tables.exit_status(calm) == 0
    assert tables.exit_status(calm.assign(verdict="UNDECIDED")) == 3
    assert tables.exit_status(calm.assign(verdict="NOT_APPLICABLE")) == 2
    assert tables.exit_status(calm.assign(verdict="REFUTED", expected="CONFIRMED")) == 1
