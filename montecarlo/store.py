"""Evidence that survives: every finished block of draws, kept in one SQLite file per run directory.

A row holds the moments of one question over one block, exact to the bit.  Its key is all that
its bits depend on (`provenance.Series`, and the number of the block), so what is found is what
would be computed again; evidence of another code, kind of machine or precision lies beside it.

One process writes a store, the one that merges blocks; workers never see it.  Rows are committed
together, at least once a second while any wait, so a process that is killed loses no more.
SQLite's rollback journal keeps the file whole through that, on network file systems too (a
write-ahead log would not work there).  Two processes may share a store: what both compute is the
same row, and the second is dropped.

What cannot be read or written is an `OSError` in one line, and leaves the file as it was.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np

from montecarlo.moments import Moments
from montecarlo.provenance import Series, digest_of

FILE = "evidence.sqlite"
APPLICATION = int.from_bytes(b"nope", "big")
"""SQLite's `application_id`: what tells a store from other programs' databases."""
VERSION = 2
"""SQLite's `user_version`: that of the tables below."""

COMMIT_SECONDS = 1.0
"""A finished block waits at most this long for its commit."""
BUSY_SECONDS = 60.0
"""How long one process waits while another commits."""

TABLES = """
CREATE TABLE series (
    digest TEXT PRIMARY KEY, question TEXT NOT NULL, seed TEXT NOT NULL, dtype TEXT NOT NULL,
    sources TEXT NOT NULL, build TEXT NOT NULL, device TEXT NOT NULL, estimator TEXT NOT NULL
);
CREATE TABLE block (
    series TEXT NOT NULL REFERENCES series, number INTEGER NOT NULL, draws INTEGER NOT NULL,
    mean BLOB NOT NULL, second BLOB NOT NULL, third BLOB NOT NULL, checksum TEXT NOT NULL,
    PRIMARY KEY (series, number)
);
CREATE TABLE note (key TEXT PRIMARY KEY, content BLOB NOT NULL, checksum TEXT NOT NULL);
"""
"""`mean`, `second` and `third` are those of `Moments`: float64, little-endian, in C order.

A note is whatever else a run need not find out twice, under a key of its maker's.
"""

HEADER = (
    "PRAGMA application_id",
    "PRAGMA user_version",
    "SELECT count(*) FROM sqlite_master",
)

REMEDIES = {
    "SQLITE_FULL": "make room on the disk and run again",
    "SQLITE_READONLY": "make the directory and the file writable, or name another directory",
    "SQLITE_CANTOPEN": "make the directory and the file writable, or name another directory",
    "SQLITE_BUSY": "wait for the other process to end and run again",
    "SQLITE_NOTADB": "move it away or name another directory",
    "SQLITE_CORRUPT": "move it away or name another directory",
}


class Store:
    """The evidence in one directory, made when missing.

    `recalled` and `added` count the rows taken and committed since it was opened.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory) / FILE
        self.recalled = self.added = 0
        self._waiting: list[tuple[Series, int, Moments]] = []
        self._notes: list[tuple[str, bytes, str]] = []
        self._committed = -math.inf
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            remedy = "make it writable, or name another directory"
            raise self._refusal("to open", str(error), remedy) from error
        with self._refused("to open"):
            self._file = sqlite3.connect(self.path, BUSY_SECONDS, isolation_level=None)
        try:
            self._require_ours()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Commit what waits, and close the file."""
        try:
            self.commit()
        finally:
            self._file.close()

    @property
    def empty(self) -> bool:
        """Whether no block has been committed."""
        with self._refused("to read"):
            return not self._number("SELECT EXISTS (SELECT 1 FROM block)")

    def recall(self, series: Series, number: int) -> Moments | None:
        """The moments of a question over a block; None where they are not known."""
        query = "SELECT draws, mean, second, third, checksum FROM block WHERE series=? AND number=?"
        with self._refused("to read"):
            row = self._file.execute(query, (series.digest, number)).fetchone()
        if row is None:
            return None
        draws, *arrays, checksum = row
        if not _intact([str(draws).encode(), *arrays], checksum):
            raise self._refusal("to read", f"a damaged block {number}", REMEDIES["SQLITE_CORRUPT"])
        mean, second, third = (np.frombuffer(array, "<f8") for array in arrays)
        shape = series.question.shape
        parts = (mean.size // math.prod(shape),)
        self.recalled += 1
        return Moments(
            draws,
            mean.reshape(parts + shape),
            second.reshape(2 * parts + shape),
            third.reshape(3 * parts + shape),
        )

    def keep(self, series: Series, number: int, moments: Moments) -> None:
        """Have a block committed, by the next `settle` that is due or by `commit`."""
        if series.digest is not None:
            self._waiting.append((series, number, moments))

    def noted(self, key: str) -> bytes | None:
        """What was noted under a key; None where nothing was."""
        with self._refused("to read"):
            query = "SELECT content, checksum FROM note WHERE key=?"
            row = self._file.execute(query, (key,)).fetchone()
        if row is None:
            return None
        content, checksum = row
        if not _intact([content], checksum):
            raise self._refusal("to read", f"a damaged note {key}", REMEDIES["SQLITE_CORRUPT"])
        return cast(bytes, content)

    def note(self, key: str, content: bytes) -> None:
        """Have a note committed, as a block is."""
        self._notes.append((key, content, digest_of([content])))

    @property
    def patience(self) -> float | None:
        """Seconds until a commit is due; None where there is nothing to commit."""
        due = self._committed + COMMIT_SECONDS
        return max(0.0, due - time.monotonic()) if self._waiting or self._notes else None

    def settle(self) -> None:
        """Commit if it is due."""
        if self.patience == 0.0:
            self.commit()

    def commit(self) -> None:
        """Write what waits, all of it or nothing."""
        if not self._waiting and not self._notes:
            return
        series = {series.digest: series.row for series, _, _ in self._waiting}
        with self._refused("to write"), self._transaction():
            self._insert("series", (tuple(row.values()) for row in series.values()))
            self._insert("block", (_row(*waiting) for waiting in self._waiting))
            self._insert("note", self._notes)
        self.added += len(self._waiting)
        self._waiting.clear()
        self._notes.clear()
        self._committed = time.monotonic()

    def _insert(self, table: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Add rows; one that is there already is the same."""
        for row in rows:
            holes = ", ".join("?" * len(row))
            self._file.execute(f"INSERT INTO {table} VALUES ({holes}) ON CONFLICT DO NOTHING", row)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._file.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._file.execute("COMMIT")
        except BaseException:
            if self._file.in_transaction:
                self._file.execute("ROLLBACK")
            raise

    def _require_ours(self) -> None:
        """Refuse a file that is no store of this version; make the tables of an empty one.

        The version is written in any case, so that what cannot be written is refused now.
        """
        with self._refused("to open"), self._transaction():
            application, version, tables = map(self._number, HEADER)
            if application == version == tables == 0:
                for statement in TABLES.split(";"):
                    self._file.execute(statement)
                self._file.execute(f"PRAGMA application_id = {APPLICATION}")
                application, version = APPLICATION, VERSION
            if (application, version) == (APPLICATION, VERSION):
                self._file.execute(f"PRAGMA user_version = {VERSION}")
                return
        if application != APPLICATION:
            remedy = REMEDIES["SQLITE_NOTADB"]
            raise self._refusal("to open", "another program's database", remedy)
        remedy = "use the nope-theory that made it or name another directory"
        raise self._refusal("to open", f"one of version {version}, not {VERSION}", remedy)

    def _number(self, query: str) -> int:
        (number,) = self._file.execute(query).fetchone()
        return int(number)

    @contextmanager
    def _refused(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            name = "_".join(getattr(error, "sqlite_errorname", "").split("_")[:2])
            remedy = REMEDIES.get(name, "see whether the disk and the directory are well")
            raise self._refusal(what, str(error), remedy) from error

    def _refusal(self, what: str, got: str, remedy: str) -> OSError:
        return OSError(
            f"expected {what} the evidence store {self.path}, got {got}; "
            f"{remedy}: what it holds is unchanged"
        )


def _row(series: Series, number: int, moments: Moments) -> tuple[Any, ...]:
    arrays = [
        np.asarray(array, "<f8").tobytes()
        for array in (moments.mean, moments.second, moments.third)
    ]
    checksum = digest_of([str(moments.count).encode(), *arrays])
    return series.digest, number, moments.count, *arrays, checksum


def _intact(parts: Sequence[Any], checksum: Any) -> bool:
    """SQLite trusts the disk; a number that decides a claim is not taken on trust."""
    return all(isinstance(part, bytes) for part in parts) and digest_of(parts) == checksum


@contextmanager
def opened(directory: str | Path | None) -> Iterator[Store | None]:
    """The store in a directory; None where none is wanted."""
    if directory is None:
        yield None
        return
    with Store(directory) as store:
        yield store
