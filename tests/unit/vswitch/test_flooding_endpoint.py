"""A guest that never stops sending, or signals without need, takes its share of the Python engine, no more.

The native engine's worker has the same tests in native/switch/tests/worker.rs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from vswitch import Switch
from vswitch.drops import DropReason
from vswitch.endpoint import Frame

BROADCAST = bytes.fromhex("ffffffffffff020000000009 88b5".replace(" ", "")) + bytes(46)


class Flood:
    """Has frames always, and signals at every turn."""

    def __init__(self) -> None:
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.taken = 0

    def receive(self, limit: int) -> list[Frame]:
        self.taken += 1
        os.eventfd_write(self.wake_fd, 1)
        return [Frame(BROADCAST)]

    def take_drops(self) -> dict[DropReason, int]:
        return {}

    def transmit(self, frame: Frame) -> DropReason | None:
        return None

    def flush(self) -> None:
        pass

    def rearm(self) -> bool:
        return True


@pytest.fixture
def flood() -> Iterator[Flood]:
    endpoint = Flood()
    yield endpoint
    os.close(endpoint.wake_fd)


async def test_a_barrier_ends_although_a_guest_never_stops_sending(flood: Flood) -> None:
    switch = Switch("s0", engine="python")
    port = switch.add_port("p0")
    await port.attach(flood)
    await asyncio.wait_for(switch.datapath.barrier(), 20)
    taken = flood.taken
    await asyncio.sleep(0.05)
    assert flood.taken > taken, "the guest is served on after the barrier"
    await switch.close()


async def test_a_guest_that_signals_without_need_gets_one_batch_a_turn(flood: Flood) -> None:
    switch = Switch("s0", engine="python")
    port = switch.add_port("p0")
    await port.attach(flood)
    for _ in range(20):
        await asyncio.sleep(0)
    before = flood.taken
    turns = 100
    for _ in range(turns):
        await asyncio.sleep(0)
    # One more for a signal that comes between two shares.
    assert 0 < flood.taken - before <= turns + 1
    await switch.close()


async def test_a_port_that_gets_another_endpoint_in_the_middle_of_a_flood_is_served(flood: Flood) -> None:
    switch = Switch("s0", engine="python")
    port = switch.add_port("p0")
    await port.attach(flood)
    await asyncio.sleep(0)
    await port.detach()
    again = Flood()
    await port.attach(again)
    for _ in range(5):
        await asyncio.sleep(0)
    assert again.taken > 1
    await switch.close()
    os.close(again.wake_fd)
