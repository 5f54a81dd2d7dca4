"""One caller's stream at a console: what ends it, and when."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from hypervisor.clock import SystemClock
from vswitch_api.v1 import partition_pb2
from vswitchd.console import Console
from vswitchd.consoles import ConsoleJoiner
from vswitchd.core import Core
from vswitchd.errors import ApiError
from vswitchd.kinds.kvm import KvmGuest
from vswitchd.partitions import PartitionManager

Request = partition_pb2.ConsoleRequest


async def test_a_caller_that_breaks_the_rules_is_told_although_the_guest_is_silent(tmp_path: Path) -> None:
    message = partition_pb2.Partition(name="partitions/vm")
    side = KvmGuest(cast(Core, None), message, SystemClock(), lambda event: None)
    side.console = Console(tmp_path / "console")
    listener = side.console.listen()
    record = SimpleNamespace(message=message, side=side, name=message.name, id="vm", running=lambda: None)
    partitions = cast(PartitionManager, SimpleNamespace(find=lambda name, field: record))

    async def requests() -> AsyncIterator[Request]:
        yield Request(open=partition_pb2.ConsoleOpen(partition="vm"))
        yield Request(input=b"keys")
        yield Request(open=partition_pb2.ConsoleOpen(partition="vm"))
        await asyncio.sleep(60)

    answers = aiter(ConsoleJoiner(partitions).stream(requests()))
    async with asyncio.timeout(10):
        assert (await anext(answers)).WhichOneof("message") == "opened"
        with pytest.raises(ApiError, match="a stream opens one console, once"):
            await anext(answers)
    with socket.socket(fileno=listener) as at_the_vmm:
        served, _ = at_the_vmm.accept()
        with served:
            assert served.recv(100) == b"keys"
            # The VMM sees its end, and may serve the next one.
            assert served.recv(100) == b""
    assert side.console._link is None
