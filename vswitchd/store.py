"""Desired state and what a successor needs to find its guests again: one SQLite database, off the event loop.

A row is a resource: its name, its kind, its message of the API in wire format, and `private` facts (JSON)
that the API does not show. Threads: all access happens on one thread of its own; the methods are awaited on
the event loop.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vswitchd.rundir import StartError

T = TypeVar("T")

VERSION = 1
SCHEMA = """
CREATE TABLE resource (
    name TEXT PRIMARY KEY,
    kind TEXT NOT NULL,
    body BLOB NOT NULL,
    private TEXT NOT NULL
) STRICT;
"""


@dataclass(frozen=True)
class Row:
    """One stored resource."""

    name: str
    kind: str
    body: bytes
    private: dict[str, Any] = field(default_factory=dict)


class Store:
    """The database at `path`; made when it is not there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._connection: sqlite3.Connection | None = None

    async def open(self) -> None:
        """StartError when the file is no store, or one of a newer vswitch."""
        try:
            await self._run(self._open)
        except sqlite3.DatabaseError as error:
            raise StartError(
                f"the store {self._path} cannot be read ({error}); move it away to start with an empty one"
            ) from None

    async def put(self, *rows: Row) -> None:
        """Adds or replaces rows, all in one transaction."""
        await self._run(lambda: self._put(rows))

    async def delete(self, *names: str) -> None:
        """Removes rows, all in one transaction; names that are not there do no harm."""
        await self._run(lambda: self._delete(names))

    async def load(self, kind: str) -> list[Row]:
        """All rows of one kind, by name."""
        return await self._run(lambda: self._load(kind))

    async def is_empty(self) -> bool:
        """Whether no resource is stored."""
        return await self._run(
            lambda: self._opened().execute("SELECT 1 FROM resource LIMIT 1").fetchone() is None
        )

    async def close(self) -> None:
        await self._run(self._close)
        self._thread.shutdown()

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _open(self) -> None:
        connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            connection.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version={VERSION}; COMMIT;")
        elif version != VERSION:
            connection.close()
            raise StartError(
                f"the store {self._path} is of version {version}, this vswitch writes version {VERSION}; "
                "use the newer vswitch, or move the file away to start with an empty one"
            )
        self._connection = connection

    def _put(self, rows: Iterable[Row]) -> None:
        connection = self._opened()
        with _transaction(connection):
            connection.executemany(
                "INSERT INTO resource VALUES (?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET "
                "kind = excluded.kind, body = excluded.body, private = excluded.private",
                [(row.name, row.kind, row.body, json.dumps(row.private)) for row in rows],
            )

    def _delete(self, names: Iterable[str]) -> None:
        connection = self._opened()
        with _transaction(connection):
            connection.executemany("DELETE FROM resource WHERE name = ?", [(name,) for name in names])

    def _load(self, kind: str) -> list[Row]:
        found = self._opened().execute(
            "SELECT name, kind, body, private FROM resource WHERE kind = ? ORDER BY name", (kind,)
        )
        return [Row(name, kind, body, json.loads(private)) for name, kind, body, private in found]

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            raise RuntimeError("the store is closed")
        return self._connection


class _transaction:
    """BEGIN on entry; COMMIT, or ROLLBACK when the block raises."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self._connection.execute("COMMIT")
        finally:
            # A COMMIT that fails (a full disk) leaves it open, and nothing could be stored any more.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
