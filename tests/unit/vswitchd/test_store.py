"""The store keeps what it was given, refuses what it cannot read, and says so."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from vswitchd.rundir import StartError
from vswitchd.store import Row, Store


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = Store(tmp_path / "store.db")
    await opened.open()
    yield opened
    await opened.close()


async def test_rows_come_back_by_kind_in_the_order_of_their_names(store: Store) -> None:
    await store.put(
        Row("switches/b", "switch", b"2"),
        Row("switches/a", "switch", b"1", {"pid": 3}),
        Row("p", "port", b""),
    )
    assert await store.load("switch") == [
        Row("switches/a", "switch", b"1", {"pid": 3}),
        Row("switches/b", "switch", b"2", {}),
    ]


async def test_putting_again_replaces(store: Store) -> None:
    await store.put(Row("a", "switch", b"1"))
    await store.put(Row("a", "switch", b"2"))
    assert [row.body for row in await store.load("switch")] == [b"2"]


async def test_a_batch_is_stored_as_a_whole_or_not_at_all(store: Store) -> None:
    broken = Row("b", "switch", b"", {"x": object()})
    with pytest.raises(TypeError):
        await store.put(Row("a", "switch", b""), broken)
    assert await store.load("switch") == []


async def test_deleting_what_is_not_there_does_no_harm(store: Store) -> None:
    await store.put(Row("a", "switch", b""))
    await store.delete("a", "b")
    assert await store.load("switch") == []


async def test_what_was_put_is_there_after_a_crash(tmp_path: Path) -> None:
    first = Store(tmp_path / "store.db")
    await first.open()
    await first.put(Row("a", "switch", b"1"))
    second = Store(tmp_path / "store.db")  # the first was never closed
    await second.open()
    assert [row.name for row in await second.load("switch")] == ["a"]
    await second.close()
    await first.close()


async def test_a_file_that_is_no_store_is_refused_by_name_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(b"not a database, and long enough to be looked at" * 100)
    with pytest.raises(StartError, match=r"store\.db cannot be read .*move it away"):
        await Store(path).open()


async def test_a_store_of_a_newer_vswitch_is_refused_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StartError, match="of version 99, this vswitch writes version 1; use the newer"):
        await Store(path).open()


class FullDisk:
    """A connection that cannot commit."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def __getattr__(self, name: str) -> object:
        return getattr(self.connection, name)

    def execute(self, statement: str, *parameters: Any) -> object:
        if statement == "COMMIT":
            raise sqlite3.OperationalError("database or disk is full")
        return self.connection.execute(statement, *parameters)


async def test_a_row_that_could_not_be_stored_does_not_keep_others_from_it(store: Store) -> None:
    real = store._connection
    assert real is not None
    store._connection = FullDisk(real)  # type: ignore[assignment]
    with pytest.raises(sqlite3.OperationalError, match="disk is full"):
        await store.put(Row("a", "switch", b"1"))
    store._connection = real
    await store.put(Row("b", "switch", b"2"))
    assert [row.name for row in await store.load("switch")] == ["b"]
