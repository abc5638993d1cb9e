"""Plugins: found by their entry points; one that does not work is a line and stops nothing."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from nope import plugins
from nope.init import SCHEMES, Same
from nope.plugins import CONTRACTS, LAYERS, OF_SCHEMES, PluginWarning
from nope.testing import LayerContract

Install = Callable[..., None]


def forget() -> None:
    """As a process that has imported no plugin yet."""
    plugins.load.cache_clear()
    plugins.entered.cache_clear()
    for name in [name for name in sys.modules if name.startswith("plug_")]:
        del sys.modules[name]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Lay a package down as an installer would: metadata with entry points, and one module."""
    monkeypatch.setattr(plugins, "SCHEMES", dict(SCHEMES))
    monkeypatch.syspath_prepend(tmp_path)

    def lay(package: str, group: str, points: dict[str, str], source: str) -> None:
        metadata = tmp_path / f"{package}-1.0.dist-info"
        metadata.mkdir()
        lines = [f"{name} = {target}" for name, target in points.items()]
        (metadata / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]))
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0")
        (tmp_path / f"{package}.py").write_text(source)

    forget()
    yield lay
    forget()


WIDER = "from nope import init\ndef wider(std=0.5):\n    return init.normal(2 * std)\n"


def test_a_scheme_is_known_by_the_name_of_its_entry_point(install):
    """With what a sweep gives it."""
    install("plug_good", OF_SCHEMES, {"wider": "plug_good:wider"}, WIDER)
    assert plugins.schemes()["wider"](std=0.1) == SCHEMES["normal"](0.2)
    (found,) = plugins.registered()
    assert (found.name, found.package, found.trouble) == ("wider", "plug_good 1.0", "")
    assert plugins.packages()["plug_good"] == "1.0"


def test_without_plugins_there_is_nothing_more(install):
    """The built-in schemes, no contracts, no warning."""
    assert plugins.load("nope.no_such_group") == ()
    plugins.warn(plugins.load("nope.no_such_group"))
    assert {"normal", "gpt2"} <= set(plugins.schemes())


BROKEN = {
    "a missing dependency": (OF_SCHEMES, "import no_such_package", "ModuleNotFoundError"),
    "a name that is gone": (OF_SCHEMES, "from nope.init import gone", "ImportError"),
    "no such object": (OF_SCHEMES, "", "AttributeError"),
    "a syntax error": (OF_SCHEMES, "def found(:", "SyntaxError"),
    "an exit": (OF_SCHEMES, "raise SystemExit(3)", "SystemExit"),
    "several lines": (OF_SCHEMES, "raise ValueError('one\\ntwo')", "ValueError: one"),
    "an error without words": (OF_SCHEMES, "raise ValueError", "ValueError"),
    "no function": (OF_SCHEMES, "found = 3", "TypeError"),
    "no scheme": (OF_SCHEMES, "def found():\n    return 3", "expected a nope.init.Scheme"),
    "a function that fails": (OF_SCHEMES, "def found():\n    return 1 / 0", "ZeroDivisionError"),
    "an argument that is not given": (OF_SCHEMES, "def found(x):\n    ...", "TypeError"),
    "no module": (LAYERS, "found = 3", "expected a module"),
    "a layer that fails": (LAYERS, "import nope\nfound = nope.Gone", "AttributeError"),
}


@pytest.mark.parametrize(("group", "source", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_is_one_line_and_the_others_work(install, group, source, reason):
    """It says which, of which package, and why; warned of, once asked."""
    install("plug_broken", group, {"bad": "plug_broken:found"}, source)
    install("plug_good", OF_SCHEMES, {"wider": "plug_good:wider"}, WIDER)
    bad, good = sorted(plugins.registered(), key=lambda plugin: plugin.package)
    assert bad.given is None
    assert bad.trouble.startswith("expected the plugin bad of plug_broken 1.0 (nope.")
    assert reason in bad.trouble
    assert "\n" not in bad.trouble
    assert not good.trouble
    assert "wider" in plugins.schemes()
    assert "bad" not in plugins.schemes()
    with pytest.warns(PluginWarning, match="plug_broken") as told:
        plugins.warn(plugins.registered())
    assert len(told) == 1


def test_a_scheme_does_not_take_the_name_of_another(install):
    """Neither ours nor, of two plugins, the first's."""
    install("plug_a", OF_SCHEMES, {"normal": "plug_a:wider", "wide": "plug_a:wider"}, WIDER)
    install("plug_b", OF_SCHEMES, {"wide": "plug_b:wider"}, WIDER)
    ours, first, second = plugins.registered()
    assert [bool(plugin.trouble) for plugin in (ours, first, second)] == [True, False, True]
    assert "a name of its own, got 'normal'" in ours.trouble
    assert plugins.schemes()["normal"] is SCHEMES["normal"]
    assert plugins.schemes()["wide"] is first.given


def test_contracts_are_found_and_a_broken_one_is_named(install):
    """It does not stop the others."""
    held = "from nope.contracts import Contract\nclass TestIt(Contract):\n    pass\n"
    install("plug_held", CONTRACTS, {"held": "plug_held"}, held)
    install("plug_unheld", CONTRACTS, {"unheld": "plug_unheld"}, "import no_such_package")
    assert [contract.__name__ for contract in plugins.contracts()] == ["TestIt"]
    good, bad = plugins.holding()
    assert not good.trouble
    assert bad.trouble.startswith("expected the plugin unheld of plug_unheld 1.0 (nope.contracts)")


UNHELD = """
from dataclasses import dataclass
import nope
@dataclass(frozen=True)
class Pair:
    def operations(self, scope, source):
        yield from nope.Norm("ln").operations(scope, source)
@dataclass(frozen=True)
class Ones:
    def weights(self, d_model):
        return ()
    def draw(self, source, shape):
        ...
"""


def test_a_layer_and_tokens_of_a_plugin_need_a_contract(install):
    """Though they are made of operations that have one."""
    install("plug_unheld", LAYERS, {"unheld": "plug_unheld"}, UNHELD)
    assert {"layer plug_unheld.Pair", "tokens plug_unheld.Ones"} <= set(LayerContract.registered())


def test_what_is_found_is_imported_once(install):
    """Twice asked, the same objects, and no second warning of a module's own."""
    noisy = "import warnings\nwarnings.warn('imported', UserWarning)\n" + WIDER
    install("plug_noisy", OF_SCHEMES, {"wider": "plug_noisy:wider"}, noisy)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert plugins.schemes() is plugins.schemes()
    assert [str(each.message) for each in told] == ["imported"]
    assert isinstance(plugins.schemes()["wider"](), Same)
