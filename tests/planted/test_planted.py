"""The catalogue of planted errors: its form on every run, a share of it each day."""

import inspect
import json
from collections import Counter
from datetime import date
from importlib import import_module
from itertools import pairwise

import pytest

from tests.planted.catalogue import AREAS, CATALOGUE, Plant
from tests.planted.run import NOTICED, RESULTS, ROOT, SILENT, ask, planted

SHARE = 3
"""How many are planted each day: all of them, in turn, in five weeks."""


@pytest.mark.parametrize("plant", CATALOGUE, ids=lambda plant: plant.name)
def test_a_plant_applies_to_the_code_as_it_is(plant, tmp_path):
    """What it changes occurs once, what it makes of it is Python, and its catcher exists."""
    copied = tmp_path / plant.module
    copied.parent.mkdir(parents=True)
    copied.write_text((ROOT / plant.module).read_text())
    plant.apply(tmp_path)
    assert plant.new in copied.read_text()
    assert plant.catcher.startswith("nope verify ") or is_collected(plant.catcher)


def is_collected(catcher):
    """Whether pytest finds tests by the catcher: those of a file, of a class in it, or one.

    Asked of the module itself, as classes of contracts are made in loops.
    """
    kind, _, address = catcher.partition(" ")
    path, *names = address.split("::")
    if kind != "pytest" or not (ROOT / path).is_file():
        return False
    found = import_module(path.removesuffix(".py").replace("/", "."))
    for name in names:
        found = getattr(found, name, None)
        if not holds_tests(name, found):
            return False
    return bool(names) or any(holds_tests(*member) for member in vars(found).items())


def holds_tests(name, found):
    """Whether pytest takes what has this name for a test, or for a class with some."""
    if not inspect.isclass(found):
        return name.startswith("test_") and callable(found)
    return name.startswith("Test") and any(holds_tests(n, getattr(found, n)) for n in dir(found))


@pytest.mark.parametrize(
    ("catcher", "expected"),
    [
        ("pytest tests/planted/test_planted.py", True),
        ("pytest tests/planted/test_planted.py::test_every_plant_has_its_day", True),
        ("pytest tests/contracts/test_layers.py::TestMLP_swigluLayerContract", True),
        ("pytest tests/contracts/test_layers.py::TestRMSNormLayerContract::test_draws_do_not_meet",
         True),
        ("pytest tests/contracts/test_layers.py::TestRMSNormLayerContract::test_draws_meet", False),
        ("pytest tests/contracts/test_layers.py::RMSNorm", False),
        ("pytest tests/contracts/test_layers.py::TestNothing", False),
        ("pytest tests/planted/test_planted.py::todays", False),
        ("pytest tests/planted/catalogue.py", False),
        ("pytest tests/no_such_file.py", False),
        ("python tests/planted/test_planted.py", False),
    ],
)  # fmt: skip
def test_a_catcher_is_what_pytest_collects(catcher, expected):
    """Classes made in a loop among it; no helper, no class without tests, no other command."""
    assert is_collected(catcher) == expected


def test_the_catalogue_is_broad():
    """At least 40 errors, no two alike, in each part of the product."""
    assert len({plant.name for plant in CATALOGUE}) == len(CATALOGUE) >= 40
    assert len({(plant.module, plant.old, plant.new) for plant in CATALOGUE}) == len(CATALOGUE)
    assert min(Counter(plant.area for plant in CATALOGUE)[area] for area in AREAS) >= 10


def test_the_table_is_of_this_catalogue_and_all_are_caught():
    """`make planted` was run since a plant or its catcher was changed."""
    rows = json.loads(RESULTS.read_text())
    assert [(row["error"], row.get("change"), row["catcher"]) for row in rows] == [
        (plant.name, plant.digest, plant.catcher) for plant in CATALOGUE
    ]
    assert all(row["caught"] for row in rows)


def todays(turn: int, day: int) -> Plant:
    """The plant of a day's turn: the next of the catalogue from turn to turn and day to day."""
    return CATALOGUE[(SHARE * day + turn) % len(CATALOGUE)]


def test_every_plant_has_its_day():
    """Turns follow each other without a gap, also over the end of the catalogue."""
    following = [todays(turn, day) for day in range(len(CATALOGUE)) for turn in range(SHARE)]
    assert set(following) == set(CATALOGUE)
    assert all(one != other for one, other in pairwise(following))


@pytest.mark.parametrize("turn", range(SHARE))
def test_todays_plants_are_caught(turn):
    plant = todays(turn, date.today().toordinal())
    found = planted(plant)
    assert found.status == NOTICED, (plant.name, plant.catcher, found.words)


def test_a_plant_that_changes_nothing_is_not_caught():
    """The runner tells a catcher that is silent from one that notices, and both from none."""
    idle = Plant(
        "nothing",
        "a comment",
        "statistics",
        "montecarlo/moments.py",
        "    count: int\n",
        "    count: int  # of draws\n",
        "pytest tests/planted/test_catchers.py::test_blocks_merge_in_index_order",
    )
    assert planted(idle).status == SILENT
    assert ask(["pytest tests/no_such_file.py"], ROOT).status not in (SILENT, NOTICED)
