"""The door thread by itself: what it hands over, what it holds back, and how a door ends."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
import pytest_asyncio

import vswitch_native
from hypervisor.native_door import NativeDoorLink, NativeDoors
from hypervisor.quotas import Quotas
from vswitch_wire import door

pytestmark = pytest.mark.skipif(not vswitch_native.AVAILABLE, reason=vswitch_native.WHY)


@dataclass
class Notes:
    """A handler that writes down what it gets."""

    messages: list[door.DoorMessage] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)

    def door_message(self, sequence: int, message: door.DoorMessage, fds: list[int]) -> None:
        self.messages.append(message)
        self.fds += fds

    def door_closed(self, reason: str) -> None:
        self.ends.append(reason)


@dataclass
class Door:
    guest: socket.socket
    link: NativeDoorLink
    notes: Notes


class Doors:
    """NativeDoors and the guests' ends of its sockets."""

    def __init__(self) -> None:
        self.doors = NativeDoors()
        self._guests: list[socket.socket] = []

    def open(self, quotas: Quotas | None = None) -> Door:
        host, guest = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        guest.settimeout(5)
        self._guests.append(guest)
        notes = Notes()
        return Door(guest, self.doors.open(host, "a", notes, quotas or Quotas()), notes)

    async def close(self) -> None:
        await asyncio.wait_for(self.doors.close(), 5)
        for guest in self._guests:
            guest.close()


@pytest_asyncio.fixture
async def doors() -> AsyncIterator[Doors]:
    made = Doors()
    yield made
    await made.close()


async def until(condition: object, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


READ = door.pack(door.MsrRead(0, 0x40000002), 1)


async def test_frames_arrive_in_order_and_the_end_exactly_once(doors: Doors) -> None:
    entry = doors.open()
    for number in range(300):
        entry.guest.send(door.pack(door.MsrWrite(0, number, 7), number))
        await asyncio.sleep(0)
    await until(lambda: len(entry.notes.messages) == 300)
    assert entry.notes.messages == [door.MsrWrite(0, number, 7) for number in range(300)]
    entry.guest.close()
    await until(lambda: bool(entry.notes.ends))
    entry.link.close("again", door.ErrorCode.GONE)
    await asyncio.sleep(0.02)
    assert entry.notes.ends == ["the guest's side closed the door"]
    assert entry.link.closed


async def test_a_flood_is_read_at_its_quota_and_slows_only_its_sender(doors: Doors) -> None:
    flood = doors.open(Quotas(frames_per_second=1000, frames_burst=10))
    calm = doors.open()
    flood.guest.setblocking(False)
    started = time.monotonic()
    for _ in range(10):
        try:
            while True:
                flood.guest.send(READ)
        except BlockingIOError:
            pass
        asked = time.monotonic()
        seen = len(calm.notes.messages)
        calm.guest.send(READ)
        await until(lambda seen=seen: len(calm.notes.messages) > seen)  # type: ignore[misc]
        assert time.monotonic() - asked < 1
        await asyncio.sleep(0.01)
    allowed = 10 + 1000 * (time.monotonic() - started)
    assert 10 <= len(flood.notes.messages) <= allowed + 1


async def test_a_held_door_hands_over_nothing_until_it_is_released(doors: Doors) -> None:
    entry = doors.open()
    entry.link.hold(True)
    for _ in range(20):
        entry.guest.send(READ)
    await asyncio.sleep(0.05)
    assert entry.notes.messages == []
    entry.link.hold(False)
    await until(lambda: len(entry.notes.messages) == 20)


async def test_a_guest_that_takes_nothing_is_not_read_and_at_last_closed(doors: Doors) -> None:
    entry = doors.open(Quotas(send_backlog=1, send_limit=40))
    big = door.Configured(0, "x" * 4000)
    for _ in range(2000):
        entry.link.send(big)
    await until(lambda: bool(entry.notes.ends))
    assert entry.notes.ends == ["the guest has not taken 40 frames"]


@pytest.mark.parametrize(
    ("frame", "code", "words"),
    [
        (b"\x10", door.ErrorCode.MALFORMED, "needs 16 bytes"),
        (READ + b"\0", door.ErrorCode.MALFORMED, "length differs"),
        (door.pack(door.Park()), door.ErrorCode.MALFORMED, "from host to guest only"),
        (
            door.pack(door.Configured(0, "x" * 4096))[:16] + bytes(5000),
            door.ErrorCode.MALFORMED,
            "longer than",
        ),
        (b"\x18" + bytes(15), door.ErrorCode.UNSUPPORTED, "intercepts are reserved"),
    ],
)
async def test_a_bad_frame_gets_its_error_and_reaches_nobody(
    doors: Doors, frame: bytes, code: door.ErrorCode, words: str
) -> None:
    entry = doors.open()
    entry.guest.send(frame)
    await until(lambda: bool(entry.notes.ends))
    _, answer = door.decode(entry.guest.recv(65536))
    assert isinstance(answer, door.DoorError)
    assert answer.code == code
    assert words in answer.text
    assert entry.guest.recv(16) == b""
    assert entry.notes.messages == []


async def test_descriptors_pass_only_when_expected_and_none_is_left_open(doors: Doors) -> None:
    entry = doors.open()
    before = len(os.listdir("/proc/self/fd"))
    entry.link.expect_fds(2)
    await asyncio.sleep(0.02)
    ack = door.pack(door.HelloAck())
    socket.send_fds(entry.guest, [ack], [0, 1])
    await until(lambda: len(entry.notes.messages) == 1)
    assert len(entry.notes.fds) == 2
    for fd in entry.notes.fds:
        os.close(fd)
    socket.send_fds(entry.guest, [READ], [0])
    await until(lambda: bool(entry.notes.ends))
    assert "carries descriptors" in entry.notes.ends[0]
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_descriptors_sent_ride_on_their_frame(doors: Doors) -> None:
    entry = doors.open()
    wake = os.eventfd(0)
    entry.link.send(door.EventFd(5, True), 9, (wake,))
    os.close(wake)
    frame, fds, _, _ = socket.recv_fds(entry.guest, 65536, 4)
    assert door.decode(frame) == (9, door.EventFd(5, True))
    os.eventfd_write(fds[0], 3)
    assert os.eventfd_read(fds[0]) == 3
    os.close(fds[0])


async def test_frames_that_come_one_by_one_cost_a_token_each(doors: Doors) -> None:
    """That there is nothing more to read is found out at no cost to the guest."""
    entry = doors.open(Quotas(frames_per_second=1, frames_burst=20))
    for number in range(20):
        entry.guest.send(READ)
        await until(lambda number=number: len(entry.notes.messages) > number)  # type: ignore[misc]
