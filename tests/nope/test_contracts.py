"""What contracts of every kind share: equality to rounding, and values that can be made again."""

import enum
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from nope.contracts import assert_close, assert_survives, entries

APART = {
    "nan": ([1.0, math.nan], [1.0, 2.0], r"expected finite x, got nan at \(1,\)"),
    "inf": ([[1.0], [math.inf]], [[1.0], [2.0]], r"expected finite x, got inf at \(1, 0\)"),
    "a number": (math.nan, 2.0, "expected finite x, got nan$"),
    "no -inf": ([1.0, 2.0], [1.0, -math.inf], r"expected x to be -inf, got 2\.0 at \(1,\)"),
    "no nan": ([1.0, 2.0], [1.0, math.nan], r"expected x to be nan, got 2\.0 at \(1,\)"),
    "another sign": ([math.inf], [-math.inf], r"expected x to be -inf, got inf at \(0,\)"),
    "another shape": ([1.0], [1.0, 2.0], r"expected x of shape \(2,\), got \(1,\)"),
    "a gap": ([1.0, 2.1], [1.0, 2.0], "expected x to 1e-02, got a gap of 0.05"),
    "an imaginary part": ([1.0 + 1j], [1.0], "expected x real, got complex numbers"),
}


@pytest.mark.parametrize(("found", "expected", "message"), APART.values(), ids=APART)
def test_what_is_not_close_says_how(found, expected, message):
    with pytest.raises(AssertionError, match=message):
        assert_close(found, expected, 1e-2, "x")


def test_infinities_and_nans_in_place_are_close():
    values = [1.0, math.nan, math.inf, -math.inf]
    assert_close(values, values, 0.0, "x")
    assert_close([], [], 0.0, "x")


class Forgotten:
    """No dataclass."""


@dataclass
class Mutable:
    x: int = 1


class Colour(enum.Enum):
    RED = 1


@dataclass(frozen=True)
class Held:
    """Equal to what its `repr` makes if what it holds is."""

    x: Any


def local():
    @dataclass(frozen=True)
    class Local:
        x: int = 1

    return Local()


MORTAL = {
    "no dataclass": (Forgotten(), "expected a repr that makes it again, got <.*SyntaxError"),
    "not frozen": (Mutable(), "expected a repr that makes it again, got Mutable.*unhashable type"),
    "an enum": (Held(Colour.RED), "expected a repr that makes it again, got Held.*SyntaxError"),
    "a local class": (local(), "expected a repr that makes it again, got .*SyntaxError"),
    "an array": (Held(np.ones(2)), "expected a repr that makes it again, got Held.*NameError"),
    "no pickle": (Held(local), "expected a repr that makes it again, got Held"),
    "nan": (Held(math.nan), "equal to Held"),
}


@pytest.mark.parametrize(("value", "message"), MORTAL.values(), ids=MORTAL)
def test_what_cannot_be_made_again_says_what_to_do(value, message):
    """In one line."""
    with pytest.raises(AssertionError, match=message) as told:
        assert_survives(value)
    first, *_ = str(told.value).splitlines()  # pytest adds others to a rewritten assertion
    assert first.endswith("use @dataclass(frozen=True) in a module")


@pytest.mark.parametrize("x", [np.float64(0.5), math.inf, -math.inf, (1, "a"), None, Held(2)])
def test_fields_of_numbers_survive(x):
    assert_survives(Held(x))


def test_an_entry_has_the_module_of_classes_that_are_not_ours():
    assert entries("operation", [Held, object]) == [f"operation {__name__}.Held"]
