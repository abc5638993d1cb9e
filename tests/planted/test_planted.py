"""The catalogue of planted errors: its form on every run, a share of it each day."""

import json
import re
from collections import Counter
from datetime import date
from itertools import pairwise

import pytest

from tests.planted.catalogue import AREAS, CATALOGUE, Plant
from tests.planted.run import NOTICED, RESULTS, ROOT, SILENT, ask, planted

SHARE = 3
"""How many are planted each day: all of them, in turn, in a month."""


@pytest.mark.parametrize("plant", CATALOGUE, ids=lambda plant: plant.name)
def test_a_plant_applies_to_the_code_as_it_is(plant, tmp_path):
    """What it changes occurs once, what it makes of it is Python, and its catcher exists."""
    copied = tmp_path / plant.module
    copied.parent.mkdir(parents=True)
    copied.write_text((ROOT / plant.module).read_text())
    plant.apply(tmp_path)
    assert plant.new in copied.read_text()
    test = re.fullmatch(r"pytest (tests/\w+/test_\w+\.py)::(test_\w+)", plant.catcher)
    assert plant.catcher.startswith("nope verify ") or test
    assert not test or f"def {test[2]}(" in (ROOT / test[1]).read_text()


def test_the_catalogue_is_broad():
    """At least 40 errors, no two alike, in each part of the product."""
    assert len({plant.name for plant in CATALOGUE}) == len(CATALOGUE) >= 40
    assert len({(plant.module, plant.old, plant.new) for plant in CATALOGUE}) == len(CATALOGUE)
    assert min(Counter(plant.area for plant in CATALOGUE)[area] for area in AREAS) >= 10


def test_the_table_is_of_this_catalogue_and_all_are_caught():
    """`make planted` was run since the catalogue was changed."""
    rows = json.loads(RESULTS.read_text())
    assert [(row["error"], row["module"], row["catcher"]) for row in rows] == [
        (plant.name, plant.module, plant.catcher) for plant in CATALOGUE
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
