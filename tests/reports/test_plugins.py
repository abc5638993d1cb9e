"""Other people's claims, layers and schemes in `nope verify`, reports and sweeps; what fails alone.

The example package is built and installed into a directory as pip does it, beside packages that
do not work; one process with that directory on its path runs the command several times.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import nope
import reports
import theory
from nope import plugins, transformer
from nope.layers import Scope
from nope.operations import Operation
from reports import cells, cli, document, kept
from reports.verdicts import Run, Verdict
from theory.claims import gather

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "examples" / "nope-example"
SIZES = {"d_model": 16, "n_heads": 2, "n_ctx": 4, "std": 0.2}
SMALL = ["--d-model", "16", "--n-heads", "2", "--n-ctx", "4", "--std", "0.2"]
ONE = ["--workers", "1"]
SWEPT = "scheme=neox,normal,d_model=16,n_ctx=4,std=0.2"

CLAIM = """
import theory
def claim(setting, name="{name}", **more):
    question = setting.question("blocks.0.attn.q", "second_moment")
    return theory.Claim(name, "Ours.", "a test", "exact", question, 1.0, **more)
"""
BROKEN = {  # what a module defines, and what is said of it
    "plug_import": ("import no_such_package", "ModuleNotFoundError"),
    "plug_raises": ("def claims(setting):\n    yield claim(setting)\n    1 / 0", "ZeroDivision"),
    "plug_clash": (
        "def claims(setting):\n    return [claim(setting), claim(setting, 'chi2023.lemma1')]",
        "expected every claim to have its own id, got 'chi2023.lemma1'",
    ),
    "plug_other": ("def claims(setting):\n    return ['a claim']", "expected theory.Claims"),
    "plug_nothing": ("def claims(setting):\n    claim(setting)", "TypeError"),
    "plug_old": (
        "def claims(setting):\n    return [claim(setting, tolerance=0.1)]",
        "unexpected keyword argument 'tolerance'",
    ),
    "plug_untold": ("def claims(setting):\n    return [claim(setting, None)]", "id of a claim"),
    "plug_sizes": ("def claims(d_model, n_ctx):\n    return []", "TypeError"),
}


def lay(folder: Path, package: str, source: str, group: str = plugins.CLAIMS) -> None:
    """A package with one entry point, as an installer lays it down."""
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0")
    (metadata / "entry_points.txt").write_text(f"[{group}]\nmine = {package}:claims\n")
    (folder / f"{package}.py").write_text(CLAIM.format(name=f"{package}.one") + source)


# -------------------------------------------------------------- the example, beside broken ones

DRIVER = """
import contextlib, io, json, sys
from reports import cli
from nope import plugins, testing, transformer
from reports.testing import ClaimContract
from theory.testing import KernelContract, LawContract

for words in json.load(sys.stdin):
    sys.argv, status, out, err = ["nope", *words], 0, io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as ended:
        status = ended.code or 0
    print(json.dumps([status, out.getvalue(), err.getvalue().splitlines()]), flush=True)
for contract in plugins.contracts():
    contract.check()
    print(json.dumps(contract.__name__))
for held in ([], plugins.contracts()):
    kinds = (testing.LayerContract, KernelContract, testing.SchemeContract, LawContract)
    kinds = (*kinds, ClaimContract)
    lines = [line for kind in kinds for line in testing.uncovered(kind, held)]
    words = "LayerScale", "Rescale", "neox", "nope-example"
    theirs = [line for line in lines if any(word in line for word in words)]
    print(json.dumps(theirs))
"""


@dataclass(frozen=True)
class Told:
    """What a process said: of each command status, output and errors; contracts that held; of the
    example, what has no contract without its own, and with them."""

    folder: Path
    commands: list[tuple[int, str, list[str]]]
    contracts: list[str]
    unheld: list[str]
    left: list[str]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """The example and the broken packages, installed for another process."""
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("runs")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(site), str(EXAMPLE)]
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*pip, *offline], check=True, timeout=300)
    for package, (source, _) in BROKEN.items():
        lay(site, package, source)
    lay(site, "plug_scheme", "def claims():\n    return 3", plugins.OF_SCHEMES)
    lay(site, "plug_contracts", "import no_such_package", plugins.CONTRACTS)
    run = str(folder / "run")
    commands = [
        ["verify", "example.*", *SMALL, "--workers", "2", "--draws", "60000", "--out", run],
        ["report", run],
        ["verify", "--list", "example.*", "chi2023.lemma1", *SMALL],
        ["verify", "chi2023.lemma1", *SMALL, *ONE, "--draws", "256", "--out", str(folder / "as")],
        ["sweep", "--list"],
        ["sweep", "--over", SWEPT, *ONE, "--draws", "512", "--out", str(folder / "sweep")],
        ["verify", "plug_clash.one", *SMALL],
    ]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(site), "COLUMNS": "400"},
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    *contracts, unheld, left = said[len(commands) :]
    return Told(folder, said[: len(commands)], contracts, unheld, left)


def test_claims_of_a_package_are_verified_and_reported(told):
    """What is expected comes from the package's own kernel rule; workers know its layer."""
    status, output, _ = told.commands[0]
    assert status == 0, output
    run = Run.load(told.folder / "run")
    assert {verdict.claim: (verdict.verdict, verdict.expected) for verdict in run} == {
        "example.layerscale": ("CONFIRMED", "CONFIRMED"),
        "example.layerscale.unsquared": ("REFUTED", "REFUTED"),
        "example.neox.logits": ("CONFIRMED", "CONFIRMED"),
    }
    assert run.info["versions"]["nope-example"] == "0.1.0"
    assert "nope verify example.layerscale example.layerscale.unsquared" in run.reproduce()
    status, *_ = told.commands[1]
    assert status == 0
    page = (told.folder / "run" / "report.html").read_text()
    for part in ("example.layerscale", "(nope-example 0.1.0)", "<strong>LayerScale</strong>"):
        assert part in page


def test_the_list_says_which_package_a_claim_is_from_and_which_are_broken(told):
    """A row each; what is ours is as ever."""
    status, output, _ = told.commands[2]
    assert status == 0
    rows = {row.split("│")[1].strip(): row for row in output.splitlines() if row.startswith("│")}
    assert "(nope-example 0.1.0)" in rows["example.layerscale"]
    assert "(" not in rows["chi2023.lemma1"].replace("(arXiv 2305.13571)", "")
    broken = [row for row in output.splitlines() if "broken" in row]
    assert len(broken) == len(BROKEN) + 2
    assert any("plug_contracts 1.0 (nope.contracts)" in row for row in broken)
    assert any("plug_scheme 1.0 (nope.schemes)" in row for row in broken)
    for package, (_, reason) in BROKEN.items():
        (row,) = (row for row in broken if f"of {package} 1.0 (nope.claims)" in row)
        assert reason in row
    assert "nope-example 0.1.0 adds example of nope.claims, layerscale of nope.layers" in output


def test_a_broken_plugin_is_one_line_and_changes_nothing_else(told):
    """On standard error; our claims are judged by the same bits as without."""
    status, output, lines = told.commands[3]
    assert status == 3, output  # 256 draws are too few
    assert len(lines) == len(BROKEN) + 1  # and the scheme
    for package, (_, reason) in BROKEN.items():
        (line,) = (line for line in lines if f"of {package} 1.0 (nope.claims)" in line)
        assert line.startswith("nope: expected the plugin mine of ")
        assert reason in line
    (claim,) = (c for c in theory.claims(**SIZES) if c.id == "chi2023.lemma1")
    alone = reports.verify(claim, workers=1, draws=256)
    pairs = zip(Run.load(told.folder / "as"), alone, strict=True)
    assert all(replace(a, seconds=0.0) == replace(read_back(b), seconds=0.0) for a, b in pairs)


def test_no_claim_of_a_broken_plugin_is_there(told):
    """Also not those that it gave before it failed; asking for one is bad usage as ever."""
    status, _, lines = told.commands[6]
    assert status == 2
    assert len(lines) == len(BROKEN) + 2
    assert lines[-1].startswith("nope: expected a claim id or glob, got 'plug_clash.one'")


def read_back(verdict: Verdict) -> Verdict:
    """As JSON tells it."""
    document = json.loads(Run({}, (verdict,)).to_json())
    return Verdict(**document["verdicts"][0])


def test_schemes_of_a_package_are_swept_by_name(told):
    """Listed, drawn and predicted; `std` is nothing to a scheme without it."""
    (listed, words, _), (status, output, lines) = told.commands[4], told.commands[5]
    assert (listed, "neox" in words) == (0, True)
    assert status in (0, 3), output
    assert ["plug_scheme 1.0 (nope.schemes)" in line for line in lines] == [True]
    table = pd.read_parquet(told.folder / "sweep" / "sweep.parquet")
    first = table[table["position"] == 1].set_index("scheme")
    assert np.isnan(first.loc["neox", "std"])
    assert first.loc["normal", "std"] == 0.2
    copied = (16 * 2 / (5 * 16)) * (16 * 2**2 / 16)  # fan_in times a variance, of W_V and of W_O
    assert first.loc["neox", "prediction"] == pytest.approx(copied)
    assert first.loc["neox", "low"] < copied < first.loc["neox", "high"]


def test_the_contracts_of_a_package_hold(told):
    """The layer's, its kernel rule's, its law's, the scheme's and the claims'."""
    layer = [f"TestLayerScale{part}" for part in ("", "Kernel", "Law")]
    assert told.contracts == [*layer, "TestNeoX", "TestClaims"]


def test_what_a_package_registers_needs_its_contracts(told):
    """Each of its kinds, for the torch module, the kernel, the symmetries and the law; claims."""
    entries = {line.removeprefix("expected a contract for ").split(",")[0] for line in told.unheld}
    assert len(entries) == 8, entries
    assert told.left == []


# ------------------------------------------------------------------------------ in this process


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory whose packages are found, for as long as the test lasts."""
    monkeypatch.syspath_prepend(tmp_path)
    plugins.load.cache_clear()
    yield tmp_path
    plugins.load.cache_clear()
    for name in [name for name in sys.modules if name.startswith("plug_")]:
        del sys.modules[name]


def test_claims_come_with_their_package_and_setting(site):
    """By package after ours; the broken are warned of and left out whole."""
    lay(site, "plug_good", "def claims(setting):\n    yield claim(setting)")
    lay(site, "plug_raises", BROKEN["plug_raises"][0])
    with pytest.warns(plugins.PluginWarning, match="plug_raises"):
        found = theory.claims(**SIZES)
    (claim,) = (c for c in found if c.id.startswith("plug_"))
    assert claim.credit == "a test (plug_good 1.0)"
    assert claim.setting == theory.Setting(**SIZES)
    assert found[-1] is claim
    (ours, *_) = found
    assert ours.credit == ours.source


def test_plugins_are_asked_at_every_setting(site):
    """One that fails at some sizes is there at the others."""
    source = "def claims(setting):\n    1 / (setting.d_model - 16)\n    yield claim(setting)"
    lay(site, "plug_sizes", source)
    for d_model, there in ((16, False), (32, True), (16, False)):
        found, (plugin,) = gather(theory.Setting(d_model))
        assert ("plug_sizes.one" in [claim.id for claim in found]) is there
        assert bool(plugin.trouble) is not there


def test_a_kept_forecast_is_that_of_the_scheme_and_not_of_its_name(monkeypatch):
    """A package that changes what a name stands for is asked again."""
    (cell,) = cells.cells({"d_model": 16, "n_ctx": 4, "std": 0.2})

    def key(scheme: Callable[[float], nope.init.Scheme]) -> str | None:
        monkeypatch.setattr(cells, "schemes", lambda: {"normal": scheme})
        cells._setting.cache_clear()
        return kept._key(cell, 0.025)

    one, other = key(nope.init.normal), key(lambda std: nope.init.normal(2 * std))
    assert one is not None
    assert one == key(nope.init.normal) != other
    assert key(lambda std: 1 / 0) is None
    cells._setting.cache_clear()


# ------------------------------------------------------------------------- what fails alone


@dataclass(frozen=True)
class Triple(Operation):
    """y = 3 x, of which nothing is registered."""


@dataclass(frozen=True)
class TripleLayer:
    def operations(self, scope: Scope, source: str) -> Iterator[Operation]:
        yield Triple(scope.place("triple"), (source,))


def claim_on(body: nope.layers.Layer, place: str, prediction: object, **more) -> theory.Claim:
    architecture = nope.Architecture(16, 4, nope.GaussianTokens(1.0), body)
    question = nope.Question(architecture, nope.init.normal(0.2), place, "second_moment")
    name = more.pop("id", "user.one")
    return theory.Claim(name, "One.", "a test", "exact", question, prediction, **more)


def good() -> theory.Claim:
    return claim_on(nope.Norm("ln"), "ln", 1.0, id="user.good")


def fails(question: nope.Question) -> np.ndarray:
    return np.ones(1)[7]


def refuses(question: nope.Question) -> np.ndarray:
    raise NotImplementedError("expected something else, got this; ask for that")


NEGATIVE = theory.Prediction(np.ones(4), np.full(4, -0.1), theory.Status.LEADING_ORDER)
FAILING = {
    "a prediction": ({"prediction": fails}, "UNDECIDED", "IndexError: index 7"),
    "a best theory": ({"expected": fails}, "UNDECIDED", "IndexError: index 7"),
    "a refusal": ({"prediction": refuses}, "NOT_APPLICABLE", "expected something else"),
    "a shape": ({"prediction": np.ones(3)}, "UNDECIDED", "expected the prediction of user.one"),
    "a remainder": ({"prediction": lambda _: NEGATIVE}, "UNDECIDED", "expected the remainder"),
    "a number": ({"prediction": np.nan}, "UNDECIDED", "expected a finite prediction"),
    "a relation": ({"relation": theory.Ordered()}, "UNDECIDED", "expected an Ordered claim"),
}


@pytest.mark.parametrize(("changed", "verdict", "reason"), FAILING.values(), ids=FAILING)
def test_a_theory_that_fails_is_a_row_with_the_reason(tmp_path, changed, verdict, reason):
    """Unforeseen errors say their kind, refusals speak for themselves; the others are judged."""
    bad = replace(claim_on(nope.Norm("ln"), "ln", 1.0), **changed)
    run = reports.verify([bad, good()], workers=1, draws=512, out=tmp_path)
    failed, other = run
    assert (failed.verdict, other.verdict) == (verdict, "CONFIRMED")
    assert failed.reason.startswith(reason)
    assert failed.reason in failed.words
    assert run.exit_status == (3 if verdict == "UNDECIDED" else 0)
    assert [v.reason for v in Run.load(tmp_path)] == [failed.reason, ""]
    cli.print_run(run, None)
    assert "user.one" in document.render(run)


def broken(inputs: list[torch.Tensor]) -> torch.Tensor:
    raise RuntimeError("broken")


LAYERS = {
    "no torch module": (None, "UNDECIDED", "no torch layer for Triple"),
    "one that raises": (broken, "UNDECIDED", "RuntimeError: broken"),
    "no kernel rule": (lambda inputs: 3 * inputs[0], "CONFIRMED", ""),
}


@pytest.mark.parametrize(("module", "verdict", "reason"), LAYERS.values(), ids=LAYERS)
def test_a_layer_that_fails_is_a_row_with_the_reason(monkeypatch, module, verdict, reason):
    """A claim with numbers of its own does without a kernel rule; the others are judged."""

    def apply(operation, inputs, weights):
        mine = module is not None and isinstance(operation, Triple)
        return module(inputs) if mine else known(operation, inputs, weights)

    known = transformer.apply
    monkeypatch.setattr(transformer, "apply", apply)
    asked, other = reports.verify(
        [claim_on(TripleLayer(), "triple", 9.0), good()], workers=1, draws=40_000
    )
    assert (asked.verdict, other.verdict) == (verdict, "CONFIRMED")
    assert asked.reason.startswith(reason)
    assert asked.derivation == []
