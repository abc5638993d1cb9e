"""Refusals in the house form: what was expected, what was got, the remedy."""

from __future__ import annotations

import math
from numbers import Integral, Real


def expect(condition: bool, expected: str, got: object, remedy: str) -> None:
    """Raise `ValueError` in the house form unless `condition` holds."""
    if not condition:
        raise ValueError(f"expected {expected}, got {got!r}; {remedy}")


def is_refusal(error: Exception) -> bool:
    """Whether an error says why what was asked cannot be; any other is a fault of the program.

    An `IndexError` is a `LookupError` and much of what libraries raise is a `ValueError`: what is
    meant is of the plain class and in the house form.
    """
    plain = type(error) in (ValueError, LookupError, FloatingPointError)
    return (plain and str(error).startswith("expected ")) or isinstance(error, NotImplementedError)


def line(error: BaseException) -> str:
    """An error in one line; one that was not foreseen says its kind."""
    message = error.args[0] if isinstance(error, LookupError) and error.args else error
    (words, *_) = str(message).splitlines() or [""]
    refused = isinstance(error, Exception) and is_refusal(error)
    return words if refused else f"{type(error).__name__}: {words}"


def expect_count(name: str, value: object, least: int = 1) -> None:
    """Refuse what is not a whole number of at least `least` (a bool is none)."""
    ok = not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= least
    expect(ok, f"{name} to be a whole number of at least {least}", value, f"change {name}")


def expect_finite(name: str, value: object, *, positive: bool = False) -> None:
    """Refuse what is not a finite number of at least 0, or above 0 if `positive`."""
    number = math.nan
    if not isinstance(value, bool) and isinstance(value, Real):
        number = float(value)
    ok = math.isfinite(number) and (number > 0 if positive else number >= 0)
    kind = "positive" if positive else "non-negative"
    expect(ok, f"{name} to be a finite {kind} number", value, f"change {name}")


def expect_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse what is not one of `allowed`."""
    expect(value in allowed, f"{name} to be one of {', '.join(allowed)}", value, f"change {name}")


def expect_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False: a word would count as True, "False" too."""
    expect(isinstance(value, bool), f"{name} to be True or False", value, f"change {name}")
