"""What the input positions hold: Gaussian vectors, rows of an embedding table, a real text.

The law of the inputs has two parts.  What all inputs share are weights (an embedding table, the
row of a BOS token): like all weights they are drawn once for each draw, or once for all where a
question fixes them, but their law is N(0, std^2) whatever the initialisation scheme.  What
varies from input to input is drawn by `Tokens.draw`: vectors, or the ids of rows of the table.

>>> zipf = EmbeddingTokens(vocabulary=4, exponent=1.0)
>>> zipf.probabilities.round(2)
array([0.48, 0.24, 0.16, 0.12])
>>> [weight.path for weight in WithBos(zipf).weights(d_model=8)]
['embed.W_E', 'embed.bos']
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from nope.checks import expect, expect_choice, expect_count, expect_finite
from nope.operations import Weight
from nope.sources import Source

Unit = Literal["bytes", "characters"]

TABLE = "embed.W_E"
"""The path of the embedding table: a row per token of the vocabulary."""
BOS = "embed.bos"
"""The path of the one row that every input starts with."""


@runtime_checkable
class Tokens(Protocol):
    """The law of the inputs x_m: Gaussian coordinates of standard deviation `std`."""

    @property
    def std(self) -> float:
        """The standard deviation of one coordinate."""

    @property
    def longest(self) -> float:
        """The largest n_ctx that the tokens can fill; infinity where there is no end."""

    def weights(self, d_model: int) -> tuple[Weight, ...]:
        """What all inputs share, of role `embedding`."""

    def draw(self, source: Source, draws: int, n_ctx: int, d_model: int) -> Any:
        """What varies: vectors (draws, n_ctx, d_model), or ids of rows (draws, n_ctx)."""


@dataclass(frozen=True)
class GaussianTokens:
    """x_m ~ N(0, std^2 I), independent over positions: no token occurs twice."""

    std: float = 0.02
    longest: ClassVar[float] = math.inf

    def __post_init__(self) -> None:
        _expect_std(self.std)

    def weights(self, d_model: int) -> tuple[Weight, ...]:
        return ()

    def draw(self, source: Source, draws: int, n_ctx: int, d_model: int) -> Any:
        return source.normal((draws, n_ctx, d_model), self.std)


@dataclass(frozen=True)
class EmbeddingTokens:
    """Ids independent over positions, p_v proportional to v^-exponent for v = 1..vocabulary.

    Exponent 0 is a uniform vocabulary, 1 is Zipf's law.  Equal ids are the same vector, a row
    of a table with entries N(0, std^2); ids are counted from 0.
    """

    vocabulary: int
    std: float = 0.02
    exponent: float = 0.0
    longest: ClassVar[float] = math.inf

    def __post_init__(self) -> None:
        expect_count("vocabulary", self.vocabulary)
        _expect_std(self.std)
        expect_finite("the exponent", self.exponent)

    @property
    def probabilities(self) -> np.ndarray:
        """p_v, (vocabulary,), read-only."""
        return _power_law(self.vocabulary, self.exponent)

    def weights(self, d_model: int) -> tuple[Weight, ...]:
        return (_table(self.vocabulary, d_model),)

    def draw(self, source: Source, draws: int, n_ctx: int, d_model: int) -> Any:
        return source.categorical(self.probabilities, (draws, n_ctx))


@dataclass(frozen=True)
class TextTokens:
    """A window of n_ctx consecutive units of a text, every start equally likely.

    `path` is that of any file, or None for the topics of the Python documentation that CPython
    carries in `pydoc_data`.  A unit is a byte, or a character of UTF-8; the vocabulary is what
    occurs, in order of byte or code point, each with a row of a table of N(0, std^2).

    `digest` is the content's: equal texts are equal wherever they lie, and one that has changed
    since, or is not the one a given digest names, is refused.  Raises `ValueError` for such a
    text and for one that cannot be read, is empty or, in characters, is not UTF-8.
    """

    path: str | os.PathLike[str] | None = field(default=None, compare=False)
    std: float = 0.02
    unit: Unit = "bytes"
    digest: str = ""

    def __post_init__(self) -> None:
        _expect_std(self.std)
        expect_choice("unit", self.unit, tuple(UNITS))
        if self.path is not None:
            object.__setattr__(self, "path", _path(self.path))
        found = self._unchanged() if self.digest else self._read()
        object.__setattr__(self, "digest", found.digest)

    @property
    def ids(self) -> np.ndarray:
        """The whole text as ids, (length,), read-only."""
        return self._unchanged().ids

    @property
    def vocabulary(self) -> int:
        """How many different units occur."""
        return self._unchanged().vocabulary

    @property
    def longest(self) -> float:
        return len(self.ids)

    def weights(self, d_model: int) -> tuple[Weight, ...]:
        return (_table(self.vocabulary, d_model),)

    def draw(self, source: Source, draws: int, n_ctx: int, d_model: int) -> Any:
        return source.windows(self.ids, (draws, n_ctx))

    def _unchanged(self) -> Text:
        text = self._read()
        remedy = "ask a new question of the new text"
        expect(text.digest == self.digest, f"a text of digest {self.digest}", text.digest, remedy)
        return text

    def _read(self) -> Text:
        path = None if self.path is None else os.fspath(self.path)
        try:
            return _text(path, self.unit, _stamp(path))
        except OSError as error:
            reason, remedy = error.strerror, "change path"
        except UnicodeDecodeError as error:
            reason, remedy = str(error), "use unit='bytes'"
        except ImportError as error:
            reason, remedy = str(error), "give the path of a text"
        raise ValueError(f"expected a text of {self.unit}, got {path} ({reason}); {remedy}")


@dataclass(frozen=True)
class WithBos:
    """Position 1 holds a token of its own, the same in every input; `tokens` hold the others."""

    tokens: Tokens

    def __post_init__(self) -> None:
        kind = "GaussianTokens() or others of nope.tokens after a BOS"
        expect(isinstance(self.tokens, Tokens), kind, self.tokens, "change tokens")
        one = not isinstance(self.tokens, WithBos)
        expect(one, "tokens without a BOS of their own", self.tokens, "drop one of the two")

    @property
    def std(self) -> float:
        return self.tokens.std

    @property
    def longest(self) -> float:
        return 1 + self.tokens.longest

    def weights(self, d_model: int) -> tuple[Weight, ...]:
        return (*self.tokens.weights(d_model), Weight(BOS, "embedding", 1, d_model))

    def draw(self, source: Source, draws: int, n_ctx: int, d_model: int) -> Any:
        """What follows the BOS: one position less."""
        return self.tokens.draw(source, draws, n_ctx - 1, d_model)


def may_repeat(tokens: Tokens) -> bool:
    """Whether two positions may hold one vector: rows of a table, whatever starts them.

    >>> may_repeat(EmbeddingTokens(50_000)), may_repeat(WithBos(GaussianTokens()))
    (True, False)
    """
    return any(weight.path != BOS for weight in tokens.weights(1))


def _expect_std(std: float) -> None:
    expect_finite("the tokens' std", std, positive=True)


def _path(path: object) -> str:
    """The path as a string; one of bytes is refused, as what is no path."""
    named = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    expect(isinstance(named, str), "path to be that of a text, or None", path, "change path")
    return str(named)


def _table(vocabulary: int, d_model: int) -> Weight:
    return Weight(TABLE, "embedding", vocabulary, d_model)


@lru_cache(maxsize=16)
def _power_law(size: int, exponent: float) -> np.ndarray:
    powers = np.arange(1, size + 1, dtype=np.float64) ** -exponent
    powers /= powers.sum()
    powers.flags.writeable = False
    return powers


# --------------------------------------------------------------------------------- texts


@dataclass(frozen=True, eq=False)
class Text:
    """A text as numbers: `ids` are ranks, from 0, among the `vocabulary` units that occur."""

    ids: np.ndarray
    vocabulary: int
    digest: str


def _code_points(content: bytes) -> np.ndarray:
    return np.frombuffer(content.decode("utf-8").encode("utf-32-le"), dtype="<u4")


UNITS: Mapping[str, Callable[[bytes], np.ndarray]] = {
    "bytes": lambda content: np.frombuffer(content, dtype=np.uint8),
    "characters": _code_points,
}
"""What a text is cut into, as numbers."""


@lru_cache(maxsize=4)
def _text(path: str | None, unit: Unit, stamp: tuple[int, ...]) -> Text:
    """The text at `path`, read once while its `stamp` stays the same."""
    content = _python_documentation() if path is None else Path(path).read_bytes()
    expect(len(content) > 0, "a text of at least one unit", path, "give a longer file")
    units, ranks = np.unique(UNITS[unit](content), return_inverse=True)
    ids = ranks.astype(np.int32)
    ids.flags.writeable = False
    return Text(ids, len(units), hashlib.blake2b(content, digest_size=8).hexdigest())


def _stamp(path: str | None) -> tuple[int, ...]:
    """What tells one state of a file from another without reading it."""
    if path is None:
        return ()
    found = os.stat(path)
    return (found.st_ino, found.st_size, found.st_mtime_ns)


def _python_documentation() -> bytes:
    """The topics of the language reference in CPython's `pydoc_data`, in order of their keys."""
    from pydoc_data.topics import topics

    return "".join(topics[key] for key in sorted(topics)).encode()
