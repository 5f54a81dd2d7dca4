"""Captures of one NIC's rings side by side."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from vswitchd import captures
from vswitchd.captures import RingTaps


class Device:
    """What a NIC keeps for captures."""

    def __init__(self) -> None:
        self.on = False
        self.kept: list[tuple[int, str, bytes]] = []

    def tap(self, on: bool) -> None:
        self.on = on
        self.kept = []

    def take_tapped(self) -> list[tuple[int, str, bytes]]:
        taken, self.kept = self.kept, []
        return taken


class Capture:
    """Notes what it is given."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, bytes]] = []

    def observe_packet(self, direction: str, relid: int, packet: bytes, timestamp_ns: int) -> None:
        self.seen.append((direction, relid, packet))


def nic(relid: int) -> tuple[Any, Device]:
    device = Device()
    return SimpleNamespace(device=device, offer=SimpleNamespace(relid=relid)), device


async def test_captures_of_one_nic_each_get_every_packet_and_end_apart() -> None:
    taps = RingTaps()
    (one, device), (two, other) = nic(1), nic(2)
    first: Any = Capture()
    second: Any = Capture()
    taps.add(first, [one])
    device.kept.append((1, "in", b"a"))
    taps.add(second, [one, two])
    assert (device.on, other.on) == (True, True)
    device.kept.append((2, "out", b"b"))
    other.kept.append((3, "in", b"c"))
    await asyncio.sleep(3 * captures.TAP_SECONDS)
    taps.remove(first)
    assert (device.on, other.on) == (True, True), "the other capture goes on"
    device.kept.append((4, "in", b"d"))
    taps.remove(second)
    assert (device.on, other.on) == (False, False)
    assert first.seen == [("in", 1, b"a"), ("out", 1, b"b")]
    assert sorted(second.seen) == [("in", 1, b"d"), ("in", 2, b"c"), ("out", 1, b"b")]


async def test_a_nic_that_comes_back_is_tapped_again() -> None:
    taps = RingTaps()
    one, _ = nic(1)
    capture: Any = Capture()
    taps.add(capture, [one])
    one.device = one.offer = None
    await asyncio.sleep(3 * captures.TAP_SECONDS)
    again = one.device = Device()
    one.offer = SimpleNamespace(relid=7)
    await asyncio.sleep(3 * captures.TAP_SECONDS)
    assert again.on
    again.kept.append((1, "in", b"x"))
    taps.remove(capture)
    assert capture.seen == [("in", 7, b"x")]
