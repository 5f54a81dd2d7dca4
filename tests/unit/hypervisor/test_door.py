"""The door's host end: what a stranger may send, and what he is told when it is wrong."""

from __future__ import annotations

import asyncio
import os
import struct
from pathlib import Path

import pytest
from hypervisor_world import RawGuest, World, until

from hypervisor import ManualClock, PartitionError, PartitionState, Quotas
from vswitch_wire import door as wire
from vswitch_wire import synic
from vswitch_wire.door import ErrorCode


def header(
    kind: int, body: bytes = b"", *, flags: int = 0, length: int | None = None, reserved: int = 0
) -> bytes:
    return struct.pack("<HHIII", kind, flags, 1, len(body) if length is None else length, reserved) + body


BAD_FRAMES = {
    "short header": b"\x10\x00",
    "unknown type": header(0x60),
    "flags": header(0x21, bytes(8), flags=1),
    "reserved": header(0x21, bytes(8), reserved=1),
    "length": header(0x21, bytes(8), length=9),
    "short body": header(0x10, bytes(100)),
    "wrong direction": header(0x20, bytes(264)),
    "padding": header(0x10, struct.pack("<II", 0, 1) + bytes(120)),
    "sint": header(0x21, struct.pack("<II", 0, 16)),
    "vp": header(0x10, struct.pack("<II", 5, 0) + bytes(120)),
    "too long": header(0x41, bytes(5000)),
    "text": header(0x41, struct.pack("<I", 0) + b"\xff\xfe"),
    "nobody asked": header(0x41, bytes(4)),
    "unknown hello flag": header(0x02, struct.pack("<HHI", 1, 0, 2)),
    "second hello ack": header(0x02, struct.pack("<HHI", 1, 0, 0)),
}


@pytest.mark.parametrize("frame", BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
async def test_a_malformed_frame_gets_an_error_and_costs_the_door_alone(world: World, frame: bytes) -> None:
    partition = await world.host.create_partition("a", memory_bytes=1 << 20)
    other = await (await world.guest("b")).boot()
    reasons: list[str] = []
    partition.on_detached.append(reasons.append)
    guest = await RawGuest(partition).attach()
    guest.send_bytes(frame)
    assert (await guest.error()).code == ErrorCode.MALFORMED
    await until(lambda: bool(reasons))
    assert partition.state is PartitionState.DETACHED
    assert await other.door.read_msr(0, synic.HV_X64_MSR_VP_INDEX) == 0
    guest.close()


@pytest.mark.parametrize("kind", range(0x18, 0x20))
async def test_reserved_intercepts_are_refused_as_unsupported(world: World, kind: int) -> None:
    guest = await RawGuest(await world.host.create_partition("a", memory_bytes=1 << 20)).attach()
    guest.send_bytes(header(kind, bytes(16)))
    assert (await guest.error()).code == ErrorCode.UNSUPPORTED
    guest.close()


async def test_descriptors_on_a_frame_that_has_none_are_refused_and_not_kept(world: World) -> None:
    guest = await RawGuest(await world.host.create_partition("a", memory_bytes=1 << 20)).attach()
    before = len(os.listdir("/proc/self/fd"))
    guest.send_bytes(wire.pack(wire.MsrRead(0, 0x40000002), 1), [0, 1, 2])
    assert (await guest.error()).code == ErrorCode.MALFORMED
    assert len(os.listdir("/proc/self/fd")) <= before
    guest.close()


async def test_a_frame_before_hello_ack_is_a_state_error(world: World) -> None:
    partition = await world.host.create_partition("a", memory_bytes=1 << 20)
    guest = RawGuest(partition)
    attaching = asyncio.ensure_future(partition.attach(5))
    await guest.accept()
    guest.send(wire.MsrRead(0, 0x40000002), 1)
    assert (await guest.error()).code == ErrorCode.STATE
    with pytest.raises(PartitionError, match="before HELLO_ACK"):
        await attaching
    assert partition.state is PartitionState.CREATED
    guest.close()


async def test_an_eom_with_nothing_outstanding_is_a_state_error(world: World) -> None:
    guest = await RawGuest(await world.host.create_partition("a", memory_bytes=1 << 20)).attach()
    guest.send(wire.Eom(0, 2))
    assert (await guest.error()).code == ErrorCode.STATE
    guest.close()


async def test_an_unknown_version_is_refused(world: World) -> None:
    partition = await world.host.create_partition("a", memory_bytes=1 << 20)
    guest = RawGuest(partition)
    attaching = asyncio.ensure_future(partition.attach(5))
    await guest.accept()
    guest.send(wire.HelloAck(version=2), guest.hello_sequence)
    assert (await guest.error()).code == ErrorCode.VERSION
    with pytest.raises(PartitionError, match="version 2"):
        await attaching
    guest.close()


async def test_a_silent_guest_is_given_up_when_the_clock_says_so(tmp_path: Path) -> None:
    clock = ManualClock()
    world = World(tmp_path, clock=clock)
    partition = await world.host.create_partition("a", memory_bytes=1 << 20)
    guest = RawGuest(partition)
    attaching = asyncio.ensure_future(partition.attach(10))
    await guest.accept()
    clock.advance(9.9)
    await asyncio.sleep(0)
    assert not attaching.done()
    clock.advance(0.2)
    with pytest.raises(TimeoutError, match="answer to HELLO"):
        await attaching
    guest.close()
    await world.close()


async def test_a_door_without_a_guest_says_so(world: World) -> None:
    partition = await world.host.create_partition("a", memory_bytes=1 << 20)
    with pytest.raises(PartitionError, match="call listen"):
        await partition.attach(1)
    os.close(partition.listen())
    with pytest.raises(PartitionError, match="its guest has ended"):
        await partition.attach(1)


async def test_memory_handed_out_is_sealed_zeroed_and_of_exact_size(world: World) -> None:
    import fcntl

    partition = await world.host.create_partition("a", memory_bytes=(1 << 20) + 1)
    guest = await RawGuest(partition).attach()
    assert guest.hello is not None
    assert [(region.gpa, region.size) for region in guest.hello.regions] == [(0, (1 << 20) + 4096)]
    fd = guest.fds[0]
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    assert seals & fcntl.F_SEAL_SHRINK
    assert seals & fcntl.F_SEAL_GROW
    assert seals & fcntl.F_SEAL_SEAL
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 4096)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 1 << 24)
    assert guest.memory.read(0, 4096) == bytes(4096)
    guest.close()


async def test_memory_above_three_gigabytes_goes_around_the_device_hole() -> None:
    from hypervisor.regions import create_regions

    regions = create_regions("big", 4 << 30)
    assert [(region.gpa, region.size) for region in regions] == [(0, 3 << 30), (4 << 30, 1 << 30)]
    for region in regions:
        os.close(region.fd)


async def test_a_flood_of_frames_slows_only_its_sender(world: World) -> None:
    quotas = Quotas(frames_per_second=2000, frames_burst=100)
    flooder = await RawGuest(
        await world.host.create_partition("a", memory_bytes=1 << 20, quotas=quotas)
    ).attach()
    other = await (await world.guest("b")).boot()
    frame = wire.pack(wire.MsrRead(0, synic.HV_X64_MSR_VP_INDEX), 1)
    loop = asyncio.get_running_loop()
    assert flooder.sock is not None
    sent = blocked = 0
    slowest = 0.0
    end = loop.time() + 1.0
    while loop.time() < end:
        for _ in range(200):
            try:
                flooder.sock.send(frame)
                sent += 1
            except BlockingIOError:
                blocked += 1
                break
        before = loop.time()
        await other.door.read_msr(0, synic.HV_X64_MSR_VP_INDEX)
        slowest = max(slowest, loop.time() - before)
    print(f"flood: {sent} frames taken in 1 s, blocked {blocked} times, slowest other {slowest * 1e3:.1f} ms")
    # What the host took: burst, rate, and what the socket's buffer holds.
    assert sent < 4000
    assert blocked
    assert slowest < 0.5
    flooder.close()


async def test_a_guest_that_takes_no_answers_is_not_read_any_more(world: World) -> None:
    quotas = Quotas(send_backlog=8, frames_per_second=10**6, frames_burst=10**6)
    guest = await RawGuest(
        await world.host.create_partition("a", memory_bytes=1 << 20, quotas=quotas)
    ).attach()
    frame = wire.pack(wire.MsrRead(0, synic.HV_X64_MSR_VP_INDEX), 1)
    assert guest.sock is not None
    sent = idle = 0
    while idle < 20:
        try:
            guest.sock.send(frame)
            sent, idle = sent + 1, 0
        except BlockingIOError:
            idle += 1
            await asyncio.sleep(0.005)
    answers = 0
    while answers < sent:
        _, message, _ = await guest.receive()
        assert isinstance(message, wire.MsrResult)
        answers += 1
    assert guest.partition.state is PartitionState.RUNNING
    guest.close()


async def test_frames_that_come_one_by_one_cost_a_token_each(world: World) -> None:
    """That there is nothing more to read is found out at no cost to the guest."""
    quotas = Quotas(frames_per_second=1, frames_burst=22)
    guest = await RawGuest(
        await world.host.create_partition("a", memory_bytes=1 << 20, quotas=quotas)
    ).attach()
    frame = wire.pack(wire.MsrRead(0, synic.HV_X64_MSR_VP_INDEX), 1)
    loop = asyncio.get_running_loop()
    assert guest.sock is not None
    guest.sock.setblocking(False)
    for _ in range(20):
        guest.sock.send(frame)
        assert await asyncio.wait_for(loop.sock_recv(guest.sock, 4096), 2)
    guest.close()
