"""Cells: the settings that a sweep goes through, and what is asked in each.

A *grid* gives each axis of `AXES` one value or several; its *cells* are their product.  A cell is
an architecture, an initialisation, a place, an observable and a fidelity of the theory.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from inspect import signature
from math import gcd
from pathlib import Path
from sys import float_info
from typing import Any, get_args

import numpy as np

import nope
from nope.architecture import NormPosition
from nope.checks import expect
from nope.init import Scheme
from nope.layers import GATES, AttentionKind
from nope.operations import ActivationName, NormKind
from nope.plugins import entered, schemes, warn
from nope.questions import OBSERVABLES, Question
from nope.tokens import GaussianTokens
from reports import grids
from theory.claims import Claim, PredictionLike, best_theory
from theory.predict import Asked, Prediction, predict

LARGEST = 1_000_000
"""More cells than this are a mistake."""
LARGEST_COUNT = 2**63 - 1
"""Sizes are numbers of 64 bits to the theory, to the layers and in the table."""


@dataclass(frozen=True)
class Axis:
    """What a grid may vary.

    `read` makes values of what was written, or raises `ValueError`; `known` gives all words there
    are, none for an axis of numbers.
    """

    meaning: str
    default: Any
    read: Callable[[str, Any], list[Any]]
    known: Callable[[], Collection[str]] = tuple


def _numbers(name: str, written: Any) -> list[float]:
    """A number, or text that `grids.values` reads."""
    if isinstance(written, str):
        return grids.values(written)
    number = isinstance(written, int | float) and not isinstance(written, bool)
    finite = number and abs(written) <= float_info.max
    expect(finite, f"finite numbers for {name}", written, 'write 0.02 or "0.01:0.1:log9"')
    return [float(written)]


def _counts(name: str, written: Any) -> list[int]:
    """Whole numbers; a geometric progression is rounded to them."""
    found = _numbers(name, written)
    if isinstance(written, str) and "log" in written:
        found = [float(round(value)) for value in found]
    whole = all(value.is_integer() for value in found)
    expect(whole, f"whole numbers for {name}", written, 'write 64 or "16:64:16"')
    return [int(value) for value in found]


def _choice(meaning: str, default: str, *words: str) -> Axis:
    """An axis of these words."""
    return _named(meaning, default, lambda: words)


def _named(meaning: str, default: str, known: Callable[[], Collection[str]]) -> Axis:
    """An axis of the words that there are when it is read."""

    def read(name: str, written: Any) -> list[str]:
        fits = isinstance(written, str) and written in known()
        expect(fits, f"{name} of {', '.join(known())}", written, f"change {name}")
        return [written]

    return Axis(meaning, default, read, known)


def _questions(name: str, written: Any) -> list[str]:
    """`OBSERVABLE at PLACE`."""
    words = written.split() if isinstance(written, str) else []
    known = [kind.name for kind in OBSERVABLES.values() if kind.shape != "points"]
    form = f"a {name} OBSERVABLE at PLACE, the observable one of {', '.join(known)}"
    right = len(words) == 3 and words[1] == "at" and words[0] in known
    expect(right, form, written, 'write "second_moment at blocks.0.attn_out"')
    return [" ".join(words)]


AXES: Mapping[str, Axis] = {
    "d_model": Axis("width", 768, _counts),
    "n_heads": Axis("heads; 12, or its greatest common divisor with d_model", None, _counts),
    "n_layers": Axis("layers", 1, _counts),
    "n_ctx": Axis("positions", 512, _counts),
    "d_ff": Axis("width of the MLP, 0 for none; 4 d_model", None, _counts),
    "attention": _choice("the layers' attention", "softmax", *get_args(AttentionKind)),
    "activation": _choice("of the MLP", "gelu", *get_args(ActivationName), *GATES),
    "norm": _choice("kind of norm", "layernorm", *get_args(NormKind)),
    "norm_position": _choice("where the norm stands", "pre", *get_args(NormPosition)),
    "token_std": Axis("standard deviation of a token's coordinate", 0.02, _numbers),
    "scheme": _named("initialisation, of nope.init or a plugin", "normal", schemes),
    "std": Axis("standard deviation of a weight; empty for schemes without one", 0.02, _numbers),
    "gain": Axis("gain of a scheme; empty for schemes without one", 1.0, _numbers),
    "question": Axis(
        "OBSERVABLE at PLACE; blocks.-1 is the last layer",
        "second_moment at blocks.-1.attn_out",
        _questions,
    ),
    "fidelity": _choice("how the theory treats a softmax", "best", *get_args(Asked)),
    "band": _choice(
        "half its width: the tolerance and the theory's own remainder, or the tolerance alone",
        "remainder",
        "remainder",
        "tolerance",
    ),
}
"""What a grid may vary, what each means and stands at where it is not given: GPT-2 small's."""

DECODER = tuple(name for name in AXES if name in signature(nope.decoder).parameters)
OF_SCHEME = ("std", "gain")
OF_THEORY = ("question", "fidelity", "band")
"""Cells that differ in nothing else share their draws."""

Grid = Mapping[str, Sequence[Any]]


def read(grid: Mapping[str, Any] | str | Path) -> Grid:
    """A grid from a mapping or a TOML file: axes to a value, a range as text, or a list of these.

    Raises `ValueError` for what is no TOML, an unknown axis and a value that an axis cannot have
    (which axis, and of which file), `OSError` for a file that cannot be read.  A plugin's scheme
    that does not work is a `nope.plugins.PluginWarning`.

    >>> read({"d_model": "16:48:16", "std": [0.02, "0.1:1:log2"]})
    {'d_model': [16, 32, 48], 'std': [0.02, 0.1, 1.0]}
    """
    warn(entered())
    written = grid if isinstance(grid, Mapping) else _toml(Path(grid))
    unknown = [name for name in written if name not in AXES]
    expect(not unknown, f"axes of {', '.join(AXES)}", ", ".join(unknown), "correct the name")
    file = "" if isinstance(grid, Mapping) else f" of {grid}"
    found = {name: _values(name, given, file) for name, given in written.items()}
    for name, values in found.items():
        expect(bool(values), f"a value of {name}", written[name], "give one or drop the axis")
    return found


def _toml(path: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"expected {path} to be TOML, got {error}; correct it") from error


def _values(name: str, given: Any, file: str) -> list[Any]:
    parts = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    try:
        return list(dict.fromkeys(value for part in parts for value in AXES[name].read(name, part)))
    except ValueError as error:
        raise ValueError(f"{error} (axis {name}{file})") from error


@dataclass(frozen=True)
class Cell:
    """A point of the grid: the value of every axis, in the order of `AXES`."""

    values: tuple[Any, ...]

    @property
    def at(self) -> dict[str, Any]:
        return dict(zip(AXES, self.values, strict=True))

    @property
    def setting(self) -> tuple[Any, ...]:
        """What it shares with the cells that are answered by the same draws."""
        return tuple(value for name, value in self.at.items() if name not in OF_THEORY)

    @property
    def init(self) -> Scheme:
        """The initialisation.  Raises `ValueError` for sizes that cannot be."""
        return _setting(self.setting)[1]

    @property
    def question(self) -> Question:
        """What is measured.  Raises `ValueError` for sizes that cannot be."""
        at = self.at
        architecture, init = _setting(self.setting)
        observable, _, place = at["question"].split()
        return Question(architecture, init, _counted(place, at["n_layers"]), observable)

    def prediction(self, question: Question) -> Prediction:
        """What the theory says at the cell's fidelity.  Raises as `theory.predict` does."""
        return predict(question, self.at["fidelity"])

    def claim(self, question: Question) -> Claim:
        """That the theory at the cell's fidelity is right, within the cell's band."""
        found, bare = self.prediction(question), self.at["band"] == "tolerance"
        banded = partial(predict, fidelity=self.at["fidelity"])
        return self.asserting(question, found.status, found.values if bare else banded)

    def asserting(self, question: Question, status: str, prediction: PredictionLike) -> Claim:
        """That a prediction is right."""
        return Claim(
            id=f"theory.{self.at['fidelity']}",
            statement="The theory is right.",
            source="theory.predict",
            status=status,
            questions=question,
            prediction=prediction,
            expected=best_theory,
        )


@lru_cache(maxsize=16)
def _setting(setting: tuple[Any, ...]) -> tuple[nope.Architecture, Scheme]:
    """The architecture and the initialisation of cells, one object for those that share it."""
    at = dict(zip((name for name in AXES if name not in OF_THEORY), setting, strict=True))
    sizes = {name: at[name] for name in DECODER}
    for name, size in sizes.items():
        ok = not isinstance(size, int) or size <= LARGEST_COUNT
        expect(ok, f"{name} of at most {LARGEST_COUNT:.3g}", size, f"lower {name}")
    taken = {name: at[name] for name in OF_SCHEME if at[name] is not None}
    architecture = nope.decoder(**sizes, tokens=GaussianTokens(at["token_std"]))
    return architecture, schemes()[at["scheme"]](**taken)


def _counted(place: str, n_layers: int) -> str:
    """`blocks.-1.attn_out` as `blocks.11.attn_out` in 12 layers."""
    return re.sub(r"^blocks\.-(\d+)\.", lambda found: f"blocks.{n_layers - int(found[1])}.", place)


def cells(grid: Mapping[str, Any] | str | Path) -> list[Cell]:
    """The cells of a grid, the last axis that it names varying fastest; none occurs twice.

    Raises `ValueError` as `read` does, and for more than a million.
    """
    found = read(grid)
    size = int(np.prod([len(values) for values in found.values()], dtype=float))
    expect(size <= LARGEST, f"at most {LARGEST:,} cells", size, "shorten an axis")
    default = {name: axis.default for name, axis in AXES.items()}
    points = itertools.product(*found.values())
    chosen = (default | dict(zip(found, point, strict=True)) for point in points)
    return list(dict.fromkeys(_settled(at) for at in chosen))


def _settled(at: dict[str, Any]) -> Cell:
    """A cell whose defaults are filled in, and which says nothing of what its scheme ignores."""
    taken = signature(schemes()[at["scheme"]]).parameters
    if at["n_heads"] is None:
        at["n_heads"] = gcd(12, at["d_model"])
    if at["d_ff"] is None:
        at["d_ff"] = 4 * at["d_model"]
    at |= {name: None for name in OF_SCHEME if name not in taken}
    return Cell(tuple(at.values()))


def by_setting(asked: Sequence[Cell]) -> list[list[int]]:
    """The numbers of the cells, those of one setting together."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for number, cell in enumerate(asked):
        found.setdefault(cell.setting, []).append(number)
    return list(found.values())
