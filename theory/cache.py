"""Derivations kept on disk: what the same code made of the same input is read, not made again.

`recall(name, key, derive)` is `derive()`, from the disk where it has been before.  An entry lies
in a folder named by a digest of every source file of `theory` and `nope`, SymPy's version and
Python's: with a byte of the code changed, nothing that the old code made is found.  Entries are
SymPy expressions, in tuples or dictionaries; rules, classes and functions are always the code's.

The folder is the user's cache folder (`NOPE_CACHE_DIR` names another, and switches the cache off
where it is empty) and may be deleted at any time.  It is never needed: where it cannot be
written, or a file in it is damaged, the derivation is made.

Entries are pickles, of which only SymPy's classes and those of this module are ever looked up.
SymPy's own text form, `srepr`, is no safer: reading it is `eval`.  As with any cache of pickles,
who may write into the folder may run code, so it is the user's own.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache, lru_cache, wraps
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import sympy as sp
from sympy.core.function import Application, UndefinedFunction

from nope.checks import expect

T = TypeVar("T")
P = ParamSpec("P")

SOURCES = tuple(Path(__file__).parents[1] / package for package in ("nope", "theory"))
"""The packages whose code makes derivations."""

VERSIONS = 8
"""Folders that are kept, the latest; one is made for each state of the code."""

_IMPORTED = time.time()


def recall(name: str, key: object, derive: Callable[[], T]) -> T:
    """`derive()`, or what it was before for the same `name`, `key` and code.

    `key` holds all that the result depends on but the code: SymPy expressions, strings, numbers,
    None, classes and tuples of these.  Raises `ValueError` for any other key.
    """
    described = _described(key)
    folder = _folder()
    if folder is None:
        return derive()
    entry = folder / f"{name}-{_digest([described.encode()])}.pickle"
    found = _read(entry)
    if found is None:
        found = (derive(),)
        _write(entry, found[0])
    result: T = found[0]
    return result


def kept(function: Callable[P, T]) -> Callable[P, T]:
    """A function whose results are recalled; its arguments are the key.

    >>> @kept
    ... def double(x):
    ...     return 2 * x
    >>> double(sp.Symbol("x"))
    2*x
    """
    name = f"{function.__module__}.{function.__qualname__}"

    @wraps(function)
    def recalled(*args: P.args, **kwargs: P.kwargs) -> T:
        key = (*args, *sorted(kwargs.items()))
        return recall(name, key, lambda: function(*args, **kwargs))

    return recalled


# ---------------------------------------------------------------------------- where


def directory() -> Path | None:
    """The cache's folder; None where it is switched off or the user has no home."""
    chosen = os.environ.get("NOPE_CACHE_DIR")
    if chosen is not None:
        return Path(chosen) if chosen else None
    try:
        return _user_folder() / "nope-theory"
    except RuntimeError:
        return None


def _user_folder() -> Path:
    """Where programs put what can be made again: by platform, as platformdirs has it."""
    home = Path.home()
    usual: dict[str, str | Path | None] = {
        "win32": os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local",
        "darwin": home / "Library" / "Caches",
    }
    other = os.environ.get("XDG_CACHE_HOME") or home / ".cache"
    return Path(usual.get(sys.platform) or other)


def _folder() -> Path | None:
    """The folder of this code's entries."""
    above, code = directory(), code_digest()
    return None if above is None or code is None else above / code


@cache
def code_digest() -> str | None:
    """A digest of the code; None where it is not what this process runs.

    That is so where a file was changed after this process read it, and where there are no files
    (an archive, compiled modules only).
    """
    files = sorted(path for package in SOURCES for path in package.rglob("*.py"))
    if not files or max(path.stat().st_mtime for path in files) > _IMPORTED:
        return None
    versions = f"{sp.__version__} {sys.implementation.name} {sys.version}"
    root = SOURCES[0].parent
    named = ((path.relative_to(root).as_posix().encode(), path.read_bytes()) for path in files)
    return _digest([versions.encode(), *chain.from_iterable(named)])


def _digest(parts: Iterable[bytes]) -> str:
    """Of the parts one by one: their lengths count, so that no byte can move between them."""
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _described(key: object) -> str:
    """A key as text, the same in every process."""
    match key:
        case tuple():
            return f"({', '.join(map(_described, key))})"
        case type():
            return f"{key.__module__}.{key.__qualname__}"
        case sp.Basic():
            return _source(key)
    plain = key is None or isinstance(key, str | int | float)
    expect(plain, "a key of SymPy expressions, strings and numbers", key, "spell it out in these")
    return repr(key)


@lru_cache(maxsize=1024)
def _source(expr: sp.Basic) -> str:
    """SymPy source, assumptions included."""
    text: str = sp.srepr(expr)
    return text


# --------------------------------------------------------------------------- entries


def unevaluated(kind: Callable[..., sp.Expr], *arguments: sp.Expr) -> sp.Expr:
    """The node as it was: to evaluate it again takes ten times as long and might alter it."""
    return kind(*arguments, evaluate=False)


def undefined_function(name: str, assumptions: dict[str, bool]) -> Any:
    """A function that is only a name, as K is; pickle looks for it in a module, in vain."""
    return sp.Function(name, **assumptions)


class _Writer(pickle.Pickler):
    def reducer_override(self, node: Any) -> Any:
        match node:
            case sp.Dummy():
                raise pickle.PicklingError(f"expected symbols, got {node!r}, known to one process")
            case UndefinedFunction():
                return undefined_function, (node.__name__, node._kwargs)
            case sp.Add() | sp.Mul() | sp.Pow() | Application():
                return unevaluated, (type(node), *node.args)
        return NotImplemented


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if isinstance(found, type) and issubclass(found, sp.Basic):
            return found
        if found in (unevaluated, undefined_function):
            return found
        raise pickle.UnpicklingError(f"expected SymPy's classes, got {module}.{name}")


def _read(entry: Path) -> tuple[Any] | None:
    """What an entry holds; None where there is none or it is not whole."""
    try:
        digest, content = entry.read_bytes().split(b"\n", 1)
        if digest.decode() == _digest([content]):
            return (_Reader(io.BytesIO(content)).load(),)
    except Exception:  # what a foreign file may raise has no end, and an unread entry costs little
        return None
    return None


def _write(entry: Path, value: object) -> None:
    """Make an entry in one step, so that no process ever reads half of it."""
    buffer = io.BytesIO()
    try:
        _Writer(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError):
        return  # not all that is derived can be kept
    content = buffer.getvalue()
    with suppress(OSError):
        if not entry.parent.exists():
            _forget(entry.parent.parent)
            entry.parent.mkdir(parents=True, exist_ok=True)
        _replace(entry, _digest([content]).encode() + b"\n" + content)


def _replace(entry: Path, content: bytes) -> None:
    handle, part = tempfile.mkstemp(dir=entry.parent, suffix=".part")
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.replace(part, entry)
    finally:
        Path(part).unlink(missing_ok=True)


def _forget(above: Path) -> None:
    """Leave the folders of the latest `VERSIONS` - 1 states of the code."""
    folders = sorted(above.glob("[0-9a-f]" * 32), key=lambda path: path.stat().st_mtime)
    for folder in folders[: 1 - VERSIONS]:
        shutil.rmtree(folder, ignore_errors=True)
