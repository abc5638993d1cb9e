"""The cache of derivations: what is read back equals what was made, and only for the same code."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sympy as sp

import nope
import theory
from theory import cache, derivation, symbols
from theory.cache import kept, recall
from theory.kernel import J, K
from theory.symbols import d, m, n, sigma

CODE = "0" * 32
ROOT = Path(__file__).parents[2]
LAYER = nope.decoder(64, 4, n_ctx=8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache for a code that no other test changes."""
    monkeypatch.setenv("NOPE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache, "code_digest", lambda: CODE)
    return tmp_path


class Counted:
    """A derivation that counts how often it is made."""

    def __init__(self, value):
        self.value, self.made = value, 0

    def __call__(self):
        self.made += 1
        return self.value


def entries(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def there_and_back(folder, value):
    recall("test", str(value), lambda: value)
    return recall("test", str(value), lambda: pytest.fail("it was not kept"))


# ------------------------------------------------------------------------- recall


def test_what_was_derived_is_not_derived_again(folder):
    derive = Counted(d * sigma**2)
    assert [recall("test", (d, "x", 1), derive) for _ in range(3)] == [d * sigma**2] * 3
    assert derive.made == 1


@pytest.mark.parametrize("other", [("other", (d, 1)), ("test", (d, 2)), ("test", (d, "1"))])
def test_another_name_or_key_is_another_entry(folder, other):
    recall("test", (d, 1), lambda: d)
    assert recall(*other, lambda: m) == m


def test_a_symbol_of_other_assumptions_is_another_key(folder):
    recall("test", d, lambda: d)
    assert recall("test", sp.Symbol("d"), lambda: m) == m


@pytest.mark.parametrize("key", [object(), [d], {"d": d}, (d, object())])
def test_a_key_that_may_hide_something_is_refused(folder, key):
    with pytest.raises(ValueError, match="expected a key of SymPy expressions"):
        recall("test", key, lambda: d)


def test_a_kept_function_is_called_once_for_the_same_arguments(folder):
    calls = []

    @kept
    def power(x, exponent=1):
        calls.append((x, exponent))
        return x**exponent

    assert [power(d), power(d), power(d, exponent=2), power(d, exponent=2)] == [d, d, d**2, d**2]
    assert calls == [(d, 1), (d, 2)]
    assert power.__name__ == "power"


# --------------------------------------------------------------- what comes back


def test_the_registrys_symbols_come_back(folder):
    every = tuple(entry.symbol for entry in symbols.REGISTRY.values())
    back = there_and_back(folder, every)
    assert back == every
    assert hash(back) == hash(every)
    assert [symbols.describe(symbol) for symbol in back] == list(symbols.REGISTRY.values())


def test_undefined_functions_come_back(folder):
    real = sp.Function("f", real=True)
    every = (K(m, n), J(n, n), sp.Function("K_12")(m, n), real(m))
    back = there_and_back(folder, every)
    assert back == every
    assert hash(back) == hash(every)
    assert back[0].func == K
    assert back[0].replace(K, lambda left, right: left * right) == m * n
    assert back[-1].is_real


def test_every_formula_comes_back_as_it_was(folder):
    every = [
        expr
        for formula in theory.formulas().values()
        for expr in (formula.expr, formula.remainder)
        if not expr.atoms(sp.Dummy)
    ]
    assert len(every) > 80
    for expr in every:
        back = there_and_back(folder, expr)
        assert back == expr
        assert hash(back) == hash(expr)
        assert sp.srepr(back) == sp.srepr(expr)


def test_what_was_left_unevaluated_stays_so(folder):
    expr = sp.Add(d, sp.Pow(sp.Integer(2), 3, evaluate=False), d, evaluate=False)
    assert there_and_back(folder, expr).args == expr.args != sp.Add(*expr.args).args


def test_dummies_are_one_processs_own_and_not_kept(folder):
    derive = Counted(sp.Dummy("x") + 1)
    assert [recall("test", 1, derive) for _ in range(2)] == [derive.value] * 2
    assert derive.made == 2
    assert not entries(folder)


def test_what_cannot_be_pickled_is_returned_and_not_kept(folder):
    derive = Counted(lambda: d)
    assert recall("test", 1, derive) is derive.value
    assert not entries(folder)


# ------------------------------------------------------------------------ derivations


def fresh(place="ln_final", fidelity="any_temperature"):
    derivation.derive.cache_clear()
    return derivation.derive(LAYER, None, place, fidelity)


def test_a_derivation_read_back_is_the_one_that_was_made(folder, monkeypatch):
    made = fresh()
    monkeypatch.setattr(derivation, "simplify_kernel", lambda expr: pytest.fail("made again"))
    back = fresh()
    for old, new in zip(made.steps, back.steps, strict=True):
        assert (old.place, old.used, old.before, old.after) == (
            new.place,
            new.used,
            new.before,
            new.after,
        )
        assert hash(old.after) == hash(new.after)
    assert made.names == back.names
    assert made.stopped == back.stopped


def test_a_derivation_read_back_still_checks(folder):
    fresh("blocks.0.resid_mid", "uniform")
    assert fresh("blocks.0.resid_mid", "uniform").check() == []


def test_a_changed_rule_is_another_derivation(folder, monkeypatch):
    """A rule of a user's own is outside the code that is digested: its expression is in the key."""
    honest = fresh("blocks.0.attn.v", "uniform").result
    monkeypatch.setattr("theory.rules.linear.variance_of", lambda weight: symbols.s)
    assert fresh("blocks.0.attn.v", "uniform").result == honest.subs(symbols.sigma_v, 1) * symbols.s
    derivation.derive.cache_clear()


# ------------------------------------------------------------------------------- code


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The packages in a folder of their own."""
    root = tmp_path_factory.mktemp("code")
    for package in ("nope", "theory"):
        shutil.copytree(
            ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    return root


def digest_of(root, monkeypatch):
    monkeypatch.setattr(cache, "SOURCES", (root / "nope", root / "theory"))
    monkeypatch.setattr(cache, "_IMPORTED", float("inf"))
    return cache.code_digest.__wrapped__()


def test_a_byte_of_any_module_changes_the_digest(copied, monkeypatch):
    files = sorted(copied.rglob("*.py"))
    assert copied / "theory" / "rules" / "linear.py" in files
    digests = {digest_of(copied, monkeypatch)}
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if content else b"#")
        digests.add(digest_of(copied, monkeypatch))
        path.write_bytes(content)
    assert len(digests) == len(files) + 1
    assert digest_of(copied, monkeypatch) in digests


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": b"x", "b": b"y"}, {"a": b"x", "c": b"y"}),
        ({"a": b"x", "b": b"y"}, {"a": b"y", "b": b"x"}),
        ({"a": b"x", "b": b"y"}, {"a": b"xnope/b.pyy"}),
    ],
)
def test_a_module_renamed_or_joined_changes_the_digest(tmp_path, monkeypatch, one, other):
    digests = set()
    for root, contents in ((tmp_path / "one", one), (tmp_path / "other", other)):
        (root / "nope").mkdir(parents=True)
        for name, content in contents.items():
            (root / "nope" / f"{name}.py").write_bytes(content)
        digests.add(digest_of(root, monkeypatch))
    assert len(digests) == 2


@pytest.mark.parametrize("version", ["sympy", "python"])
def test_another_version_is_another_digest(copied, monkeypatch, version):
    before = digest_of(copied, monkeypatch)
    monkeypatch.setattr(
        *{"sympy": (sp, "__version__", "9"), "python": (sys, "version", "9")}[version]
    )
    assert digest_of(copied, monkeypatch) != before


def test_code_changed_since_it_was_read_keeps_nothing(copied, tmp_path, monkeypatch):
    """Else what the old code makes would be taken for the new code's."""
    assert digest_of(copied, monkeypatch) is not None
    monkeypatch.setattr(cache, "_IMPORTED", 0.0)
    assert cache.code_digest.__wrapped__() is None
    monkeypatch.setattr(cache, "code_digest", lambda: None)
    monkeypatch.setenv("NOPE_CACHE_DIR", str(tmp_path))
    assert recall("test", 1, lambda: d) == d
    assert not entries(tmp_path)


def test_packages_without_sources_have_no_digest(tmp_path, monkeypatch):
    assert digest_of(tmp_path, monkeypatch) is None


DERIVE = """
import nope, theory
print(theory.derive(nope.decoder(64, 4, n_ctx=8), None, "ln_final", "any_temperature").result)
"""


def test_processes_share_entries_until_the_code_changes(copied, tmp_path, monkeypatch):
    environment = {**os.environ, "NOPE_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(copied)}

    def derive_elsewhere():
        command = [sys.executable, "-c", DERIVE]
        subprocess.run(command, env=environment, cwd=copied, check=True, capture_output=True)
        return {path: path.stat().st_mtime_ns for path in entries(tmp_path)}

    first = derive_elsewhere()
    assert first
    (code,) = {path.parent.name for path in first}
    assert derive_elsewhere() == first

    monkeypatch.setenv("NOPE_CACHE_DIR", "")
    made = fresh()
    monkeypatch.setenv("NOPE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache, "code_digest", lambda: code)
    monkeypatch.setattr(derivation, "simplify_kernel", lambda expr: pytest.fail("made again"))
    assert fresh().kernels() == made.kernels()

    path = copied / "theory" / "kernel.py"
    content = path.read_bytes()
    path.write_bytes(content + b"\n")
    os.utime(path, (0, 0))
    assert len({path.parent for path in derive_elsewhere()}) == 2
    path.write_bytes(content)


def test_the_latest_states_of_the_code_are_kept(folder, monkeypatch):
    foreign = folder / "thesis"
    foreign.mkdir()
    for number in range(12):
        monkeypatch.setattr(cache, "code_digest", lambda name=f"{number:032x}": name)
        recall("test", 1, lambda: d)
        os.utime(folder / f"{number:032x}", (number, number))
    left = sorted(path.name for path in folder.iterdir())
    assert left == [f"{number:032x}" for number in range(4, 12)] + ["thesis"]


# ---------------------------------------------------------------------- damaged, unwritable


class Foreign:
    """A pickle that would run code."""

    def __reduce__(self):
        return print, ("it was run",)


def sealed(content):
    return cache._digest([content]).encode() + b"\n" + content


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"\n",
        lambda content: b"\xff\n" + content,
        lambda content: content[:-3],
        lambda content: content[:-3] + b"?" + content[-2:],
        lambda content: content.replace(b"\x01d", b"\x01e"),
        lambda content: pickle.dumps(d),
        lambda content: sealed(b"no pickle"),
        lambda content: sealed(pickle.dumps(Foreign())),
        lambda content: sealed(b"cno_such_module\nname\n."),
    ],
)
def test_a_damaged_or_foreign_entry_is_ignored_and_replaced(folder, capsys, damage):
    recall("test", 1, lambda: d)
    (entry,) = entries(folder)
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    derive = Counted(d)
    assert [recall("test", 1, derive), recall("test", 1, derive)] == [d, d]
    assert derive.made == 1
    assert entries(folder) == [entry]
    assert entry.read_bytes() == whole
    assert not capsys.readouterr().out


@pytest.mark.parametrize("where", ["a file/cache", "a file"])
def test_a_folder_that_cannot_be_made_means_no_cache(tmp_path, monkeypatch, where):
    (tmp_path / "a file").write_text("")
    monkeypatch.setattr(cache, "code_digest", lambda: CODE)
    monkeypatch.setenv("NOPE_CACHE_DIR", str(tmp_path / where))
    derive = Counted(d)
    assert [recall("test", 1, derive) for _ in range(2)] == [d, d]
    assert derive.made == 2


def test_a_disk_that_cannot_be_written_means_no_cache(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    derive = Counted(d)
    assert [recall("test", 1, derive) for _ in range(2)] == [d, d]
    assert derive.made == 2
    assert not entries(folder)


def test_an_entry_that_is_written_while_it_is_read_is_read_whole(folder):
    """Every write replaces the entry with one of another length; a torn one would fail to load."""
    values = [sp.Function(f"K_{k}")(m, n) ** k for k in range(2, 40)]
    recall("test", 1, lambda: values[0])
    (entry,) = entries(folder)

    def work(value):
        cache._write(entry, value)
        return cache._read(entry)

    with ThreadPoolExecutor(4) as workers:
        found = list(workers.map(work, values * 5))
    assert all(one is not None and one[0] in values for one in found)
    assert entries(folder) == [entry]


# -------------------------------------------------------------------------------- where


def test_an_empty_setting_switches_the_cache_off(monkeypatch):
    monkeypatch.setenv("NOPE_CACHE_DIR", "")
    assert cache.directory() is None
    derive = Counted(d)
    assert [recall("test", 1, derive) for _ in range(2)] == [d, d]
    assert derive.made == 2


@pytest.mark.parametrize(
    ("platform", "settings", "expected"),
    [
        ("linux", {}, "home/.cache/nope-theory"),
        ("linux", {"XDG_CACHE_HOME": "xdg"}, "xdg/nope-theory"),
        ("darwin", {"XDG_CACHE_HOME": "xdg"}, "home/Library/Caches/nope-theory"),
        ("win32", {"LOCALAPPDATA": "local"}, "local/nope-theory"),
        ("win32", {}, "home/AppData/Local/nope-theory"),
        ("linux", {"NOPE_CACHE_DIR": "here"}, "here"),
    ],
)
def test_the_folder_is_the_platforms(monkeypatch, platform, settings, expected):
    for name in ("NOPE_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("home"))
    assert cache.directory() == Path(expected)


def test_without_a_home_there_is_no_cache(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("NOPE_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache.directory() is None
