"""A command's stream that ends early leaves nothing behind in the event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vswitch_api.v1 import partition_pb2
from vswitchd import executing
from vswitchd.partitions import PartitionManager


class Process:
    """A program that neither reads nor ends."""

    def __init__(self) -> None:
        self.signals: list[int] = []

    async def wait(self) -> tuple[int, str]:
        await asyncio.Event().wait()
        raise AssertionError

    def kill(self, signal: int) -> None:
        self.signals.append(signal)


@pytest.mark.parametrize("terminal", [False, True])
async def test_a_caller_that_goes_away_leaves_no_reader_and_no_writer(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Process()
    made: list[executing.CommandStreams] = []
    kept: list[int] = []
    watched: list[set[int]] = []
    selector = cast(Any, asyncio.get_running_loop())._selector

    class Streams(executing.CommandStreams):
        def __init__(self, size: partition_pb2.TerminalSize | None) -> None:
            super().__init__(size)
            made.append(self)

        def close(self) -> None:
            watched.append(self._ours & set(selector.get_map()))
            super().close()

    async def run(argv: list[str], env: dict[str, str], *inner: int, **_more: Any) -> Process:
        kept.extend(os.dup(fd) for fd in inner)
        return process

    async def requests() -> AsyncIterator[partition_pb2.ExecRequest]:
        start = partition_pb2.ExecStart(partition="partitions/a", argv=["sleep"])
        if terminal:
            start.terminal.rows = 24
        yield partition_pb2.ExecRequest(start=start)
        for _ in range(100):
            yield partition_pb2.ExecRequest(stdin=bytes(65536))
        await asyncio.Event().wait()

    monkeypatch.setattr(executing, "CommandStreams", Streams)
    message = partition_pb2.Partition(name="partitions/a")
    running = SimpleNamespace(exec=run)
    record = SimpleNamespace(name=message.name, message=message, running=lambda: running)
    partitions = cast(PartitionManager, SimpleNamespace(find=lambda *_names: record))
    stream = executing.Executor(partitions).stream(requests())
    assert (await anext(stream)).WhichOneof("message") == "started"

    async def read_on() -> None:
        async for _ in stream:
            pass

    reading = asyncio.create_task(read_on())
    await asyncio.sleep(0.05)
    fds = set(made[0]._ours)
    assert fds & set(selector.get_map())
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert watched == [set()], "a closed descriptor is still watched"
    assert made[0]._ours == set()
    assert process.signals == [9]
    for fd in kept:
        os.close(fd)
