"""Two netns guests on one switch: ping and TCP, both engines, as root and as an ordinary user."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from guests import world

from vswitch_wire.engine import Engine


@pytest.mark.parametrize("engine", ["python"])
async def test_two_guests_ping_each_other_without_loss(engine: Engine, tmp_path: Path) -> None:
    async with world(engine, tmp_path) as lab:
        a, b = await lab.add("a"), await lab.add("b")
        for source, target in ((a, b), (b, a)):
            result = await source.probe("ping", target.address, "--count", "20", "--interval", "0.02")
            assert (result["sent"], result["lost"]) == (20, 0), source.log.read_text()


@pytest.mark.parametrize("engine", ["python"])
async def test_64_mib_over_tcp_arrive_unchanged(engine: Engine, tmp_path: Path) -> None:
    async with world(engine, tmp_path) as lab:
        a, b = await lab.add("a"), await lab.add("b")
        serving = asyncio.ensure_future(b.probe("tcp-serve", "--port", "5001"))
        await asyncio.sleep(0.5)
        sent = await a.probe("tcp-send", b.address, "--port", "5001", "--bytes", str(64 << 20))
        received = await serving
        assert (sent["bytes"], sent["sha256"]) == (received["bytes"], received["sha256"])
        assert received["bytes"] == 64 << 20
        print(sent)
