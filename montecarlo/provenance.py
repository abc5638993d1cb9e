"""What the bits of a block depend on, as values and as text: the key of kept evidence.

A `Series` is the blocks of one question drawn in one way.  Beside the question, the seed, the
dtype and the estimator that is where they are computed, an `Origin`: the sources of `nope` and
`montecarlo`, the builds of the libraries that do the arithmetic, the kind of device.  The same
series and block number are the same bits, whoever computes them.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import cache, cached_property
from hashlib import blake2b
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch

from montecarlo.sampler import Conditions, Group
from nope.devices import resolve_device
from nope.questions import Question


def digest_of(parts: Iterable[bytes]) -> str:
    """Of the parts one by one: their lengths count, so that no byte can move between them."""
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _digest_of_sources(*packages: Path) -> str:
    """Of every source file in sibling folders, by name."""
    files = sorted(chain.from_iterable(package.rglob("*.py") for package in packages))
    root = packages[0].parent
    named = ((path.relative_to(root).as_posix().encode(), path.read_bytes()) for path in files)
    return digest_of(chain.from_iterable(named))


SOURCES = _digest_of_sources(*(Path(__file__).parents[1] / p for p in ("nope", "montecarlo")))
"""Of every source file of `nope` and `montecarlo`, read as this process imported them."""
BUILD = f"torch {torch.__version__}, numpy {np.__version__}, scipy {scipy.__version__}"


@dataclass(frozen=True)
class Origin:
    """Where a block is computed: the code, the libraries and the kind of device."""

    sources: str
    build: str
    device: str

    @classmethod
    @cache
    def here(cls, device: str) -> Origin:
        """That of blocks which this process computes on a torch device."""
        return cls(SOURCES, BUILD, _kind(resolve_device(device)))

    def making(self, group: Group) -> Origin:
        """The same with the sources, here, of what a group is made of: a plugin's may differ."""
        try:
            told = describe((group.architecture, group.init))
        except TypeError:  # nothing of it is kept
            return self
        return replace(self, sources=digest_of([self.sources.encode(), told.encode()]))


def _kind(device: torch.device) -> str:
    """Devices of one kind add in one order: a CPU by its vector units, a GPU by its model."""
    match device.type:
        case "cpu":
            return f"cpu {torch.backends.cpu.get_cpu_capability()}"
        case "cuda":
            return f"cuda {torch.cuda.get_device_name(device)}"
    return device.type


@dataclass(frozen=True)
class Series:
    """The blocks of one question drawn in one way: all that their bits depend on but a number."""

    question: Question
    conditions: Conditions
    origin: Origin
    estimator: str = "plain"

    @cached_property
    def row(self) -> dict[str, str]:
        """The series as text.  Raises `TypeError` for a question that text cannot tell."""
        key = {
            "question": describe(self.question),
            "seed": self.conditions.stream,
            "dtype": self.conditions.dtype,
            **asdict(self.origin),
            "estimator": self.estimator,
        }
        return {"digest": digest_of([json.dumps(key).encode()]), **key}

    @cached_property
    def digest(self) -> str | None:
        """The key of its rows; None where it cannot be kept."""
        try:
            return self.row["digest"]
        except TypeError:
            return None


def describe(value: object) -> str:
    """A value as text, the same in every process; equal values have equal texts.

    Told are numbers, strings, None, NumPy arrays, tuples and dataclasses of these (by the fields
    that they are compared by).  A class from outside `nope` counts with the sources of the package
    that defines it, or of the module that is in none.  Raises `TypeError` for anything else.

    >>> from nope import GaussianTokens
    >>> describe((GaussianTokens(std=1), 0.5, "q"))
    "(nope.tokens.GaussianTokens(std=1), 0.5, 'q')"
    """
    match value:
        case None:
            return "None"
        case str():
            return repr(str(value))
        case Real():
            return _number(float(value), value)
        case tuple():
            return f"({', '.join(map(describe, value))})"
        case np.ndarray():
            content = digest_of([value.tobytes()])
            return f"array({value.dtype.str}, {value.shape}, {content})"
    if not is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"expected a value that text can tell, got {value!r}; use a dataclass")
    compared = (field.name for field in fields(value) if field.compare)
    told = ", ".join(f"{name}={describe(getattr(value, name))}" for name in compared)
    return f"{_class(type(value))}({told})"


def _number(near: float, value: Any) -> str:
    """Exact, and the same for 1, 1.0 and True, which are equal."""
    whole = math.isfinite(near) and value == int(value)
    return repr(int(value)) if whole else repr(near)


@cache
def _class(kind: type) -> str:
    """A class's name, with a digest of the sources outside `nope` that it is made from."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    modules = dict.fromkeys(each.__module__ for each in kind.__mro__ if each is not object)
    foreign = [module for module in modules if module.partition(".")[0] != "nope"]
    return f"{name}<{digest_of(map(_sources, foreign))}>" if foreign else name


def _sources(module: str) -> bytes:
    """A module's file, and of one in a package all that it may have imported from there."""
    file, package = _file(module), _file(module.partition(".")[0])
    if file is None:
        raise TypeError(f"expected a class with a source file, got one of {module}; write a file")
    if package is not None and package.name == "__init__.py":
        return _digest_of_sources(package.parent).encode()
    return file.read_bytes()


def _file(module: str) -> Path | None:
    """The source file of a module that was imported; None for one without."""
    path = Path(getattr(sys.modules.get(module), "__file__", None) or "")
    return path if path.is_file() else None
