"""The guest's half against a good host, an old one and a bad one: fallback, retries, pages, bad frames."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from hypervisor_world import EchoDevice, World, until
from hypothesis import given
from hypothesis import strategies as st

from hypervisor import Quotas
from netvsc.door import DoorClient, DoorLostError
from netvsc.memory import PageAllocator
from netvsc.vmbus import VmbusError
from vswitch_wire import door as wire
from vswitch_wire import vmbus
from vswitch_wire.door import ErrorCode, RegionEntry
from vswitch_wire.memory import create_region
from vswitch_wire.vmbus import VmbusVersion


@pytest.mark.parametrize(
    ("newest", "agreed"),
    [
        (VmbusVersion.IRON, VmbusVersion.IRON),
        (VmbusVersion.WIN10_RS3_1, VmbusVersion.WIN10_RS3_1),
        # From here on the host has no connection 4: the contact fails and an older version follows.
        (VmbusVersion.WIN10_RS3_0, VmbusVersion.WIN10_RS3_0),
        (VmbusVersion.WIN8, VmbusVersion.WIN8),
    ],
)
async def test_the_newest_version_both_know_is_agreed_on(
    world: World, newest: VmbusVersion, agreed: VmbusVersion
) -> None:
    guest = await world.guest()
    guest.partition.vmbus._newest = newest
    await guest.boot()
    assert guest.vmbus.version == agreed
    await guest.partition.vmbus.offer(EchoDevice())
    await until(lambda: bool(guest.offers))
    await guest.vmbus.open(guest.offers[0], ring_pages=2)


async def test_a_host_without_a_common_version_is_an_error(world: World) -> None:
    guest = await world.guest()
    guest.partition.vmbus._newest = VmbusVersion.WIN7
    with pytest.raises(VmbusError, match="no VMBus version"):
        await guest.boot()


async def test_posts_are_repeated_while_the_host_has_no_buffer(world: World) -> None:
    guest = await (await world.guest(quotas=Quotas(port_messages=1))).boot()
    device = EchoDevice()
    offer = await guest.partition.vmbus.offer(device)
    await until(lambda: bool(guest.offers))
    await guest.vmbus.open(guest.offers[0], ring_pages=2)
    device.gate.clear()
    # The unload waits for the device, what is posted behind it for a buffer of the port.
    unloading = asyncio.ensure_future(guest.vmbus.unload())
    await until(lambda: guest.partition.vmbus.resetting)
    guest.partition.vmbus._queue.append(b"")
    guest.vmbus._connection_id = vmbus.VMBUS_MESSAGE_CONNECTION_ID_4
    again = asyncio.ensure_future(guest.vmbus._post(vmbus.RequestOffers()))
    await asyncio.sleep(0.02)
    assert not again.done()
    device.gate.set()
    await unloading
    await again
    assert offer.channel.opened is None


async def test_an_eventfd_replaces_the_one_before_and_all_go_with_the_door(world: World) -> None:
    guest = await (await world.guest()).boot()
    before = len(os.listdir("/proc/self/fd"))
    link = guest.partition._link
    assert link is not None
    fd = os.eventfd(0)
    for _ in range(3):
        link.send(wire.EventFd(77, True), 0, (fd,))
    os.close(fd)
    await guest.door.read_msr(0, 0x40000002)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    link.send(wire.EventFd(77, False))
    await guest.door.read_msr(0, 0x40000002)
    assert len(os.listdir("/proc/self/fd")) == before


class BadHost:
    """A host in raw frames."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "door"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(self.path))
        listener.listen(4)
        self.client = DoorClient(listener)
        self.region = create_region("region", 1 << 20)
        self.irq = os.eventfd(0)

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(str(self.path))
        sock.settimeout(2)
        return sock

    def greet(self, sock: socket.socket, size: int = 1 << 20, fds: list[int] | None = None) -> None:
        hello = wire.Hello(2, 1, (RegionEntry(0, size),), 0)
        socket.send_fds(sock, [wire.pack(hello, 1)], [self.region, self.irq] if fds is None else fds)

    def close(self) -> None:
        self.client.close()
        os.close(self.region)
        os.close(self.irq)


@pytest_asyncio.fixture
async def host(tmp_path: Path) -> AsyncIterator[BadHost]:
    host = BadHost(tmp_path)
    yield host
    host.close()


async def refused(host: BadHost, sock: socket.socket) -> wire.DoorError:
    accepting = asyncio.ensure_future(host.client.accept())
    await asyncio.sleep(0.02)
    assert not accepting.done()
    _, message = wire.decode(sock.recv(65536))
    assert isinstance(message, wire.DoorError)
    sock.close()
    # The next host is served.
    good = host.connect()
    host.greet(good)
    assert await accepting is False
    good.close()
    return message


async def test_a_hello_with_the_wrong_descriptors_is_refused_and_the_next_host_served(host: BadHost) -> None:
    sock = host.connect()
    host.greet(sock, fds=[host.region])
    assert (await refused(host, sock)).code == ErrorCode.MALFORMED


async def test_memory_smaller_than_announced_or_not_sealed_is_refused(host: BadHost) -> None:
    sock = host.connect()
    host.greet(sock, size=1 << 21)
    assert "1048576" in (await refused(host, sock)).text


async def test_anything_before_hello_is_refused(host: BadHost) -> None:
    sock = host.connect()
    sock.send(wire.pack(wire.Park(), 1))
    assert "PARK came before HELLO" in (await refused(host, sock)).text


@pytest.mark.parametrize(
    "frame",
    [
        wire.pack(wire.MsrResult(False, 1), 99),
        wire.pack(wire.HelloAck(), 1),
        wire.pack(wire.MsrRead(0, 0), 1),
        b"\x01",
        wire.pack(wire.EventFd(5, True)),
    ],
    ids=["answer nobody asked for", "guest's frame", "guest's request", "short", "no descriptor"],
)
async def test_a_bad_frame_from_the_host_costs_the_door_and_nothing_else(host: BadHost, frame: bytes) -> None:
    lost: list[str] = []
    host.client.on_lost.append(lost.append)
    sock = host.connect()
    host.greet(sock)
    assert await host.client.accept() is False
    sock.send(frame)
    await until(lambda: bool(lost))
    assert not host.client.connected
    with pytest.raises(DoorLostError):
        await host.client.read_msr(0, 0)
    sock.close()


async def test_without_an_inherited_door_the_guest_says_what_it_is_for() -> None:
    for value in ("", "no number", "9999"):
        with pytest.raises(RuntimeError, match="guests are started by the daemon"):
            DoorClient.from_environment({"VSWITCH_DOOR_FD": value})


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
def test_pages_are_handed_out_once_and_come_back(steps: list[tuple[bool, int]]) -> None:
    allocator = PageAllocator([RegionEntry(0, 64 * 4096), RegionEntry(1 << 20, 64 * 4096)])
    total = allocator.available
    assert total == 127
    held: list[list[int]] = []
    for take, number in steps:
        if take:
            used = {pfn for pages in held for pfn in pages}
            try:
                pages = allocator.alloc(number)
            except MemoryError:
                assert allocator.available < number
                continue
            assert len(set(pages)) == number
            assert not used & set(pages)
            assert all(1 <= pfn < 64 or 256 <= pfn < 320 for pfn in pages)
            held.append(pages)
        elif held:
            allocator.free(held.pop(number % len(held)))
        assert allocator.available == total - sum(map(len, held))
    for pages in held:
        allocator.free(pages)
    assert allocator.alloc(64) == list(range(256, 320))


def test_pages_that_are_not_in_use_cannot_be_given_back() -> None:
    allocator = PageAllocator([RegionEntry(0, 1 << 20)])
    pages = allocator.alloc(2)
    for wrong in ([0], [pages[0], pages[0]], [pages[1] + 1]):
        with pytest.raises(ValueError, match="not in use, or given back twice"):
            allocator.free(wrong)
    allocator.free(pages)
    with pytest.raises(ValueError, match="not in use"):
        allocator.free(pages)
