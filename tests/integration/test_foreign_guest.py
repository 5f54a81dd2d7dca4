"""A guest written from docs/door.md alone has an ARP and a ping answered through the switch."""

from __future__ import annotations

import ast
import asyncio
import os
import sys
from pathlib import Path
from uuid import UUID

import pytest
from netns_guests import world

import vswitch_native
from netvsp.nic import SyntheticNic
from vswitch_wire.engine import Engine

PROGRAM = Path(__file__).with_name("foreign_guest.py")
ADDRESS = "10.9.0.99"
MAC = bytes.fromhex("02155d0000ff")
needs_native = pytest.mark.skipif(not vswitch_native.AVAILABLE, reason=vswitch_native.WHY)
engines = pytest.mark.parametrize("engine", ["python", pytest.param("native", marks=needs_native)])


def test_the_foreign_guest_is_short_and_imports_nothing_of_ours() -> None:
    text = PROGRAM.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    imported: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or ".")
    assert imported == {"struct", "socket", "mmap", "os"}
    assert "__import__" not in text
    assert "exec(" not in text


@engines
async def test_a_stranger_has_an_arp_and_a_ping_answered_through_the_switch(
    engine: Engine, tmp_path: Path
) -> None:
    async with world(engine, tmp_path) as lab:
        peer = await lab.add("peer")
        partition = await lab.hypervisor.create_partition("foreign", memory_bytes=4 << 20)
        port = lab.switch.add_port("foreign")
        nic = SyntheticNic("foreign-eth0", MAC, UUID(int=0xFFF), port, engine=engine)
        await partition.vmbus.offer(nic)
        door = partition.listen()
        stranger = await asyncio.create_subprocess_exec(
            # -I: no import path of ours, no environment of ours.
            *(sys.executable, "-I", str(PROGRAM)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=[door],
            env={"VSWITCH_DOOR_FD": str(door), "FOREIGN_ADDRESS": ADDRESS, "FOREIGN_PEER": peer.address},
        )
        os.close(door)
        await partition.attach()
        output, _ = await asyncio.wait_for(stranger.communicate(), 45)
        text = output.decode()
        print(text)
        assert stranger.returncode == 0, (text, partition.vmbus.last_error, peer.log.read_text())
        assert text.splitlines() == [
            f"arp: {peer.address} is at {peer.mac}",
            "ping: answered, 49 bytes",
            "closed",
        ]
        assert partition.vmbus.protocol_errors == 0, partition.vmbus.last_error
        await partition.delete()
