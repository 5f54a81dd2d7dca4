"""Hypercalls as a guest makes them: statuses, privileges, alignment, both forms, partitions of its own."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from hypervisor_world import PAGE, EchoDevice, RawGuest, World, until

from hypervisor import Quotas
from hypervisor.privileges import GUEST, PARENT
from vswitch_wire import door as wire
from vswitch_wire import hypercall
from vswitch_wire.hypercall import HvStatus

OUTPUT = 2 * PAGE
SELF = hypercall.HV_PARTITION_ID_SELF


@pytest_asyncio.fixture
async def guest(world: World) -> AsyncIterator[RawGuest]:
    guest = await RawGuest(
        await world.host.create_partition("a", memory_bytes=1 << 20, privileges=PARENT)
    ).attach()
    yield guest
    guest.close()


async def run(guest: RawGuest, rcx: int, rdx: int = 0, r8: int = 0) -> int:
    result = await guest.ask(wire.Hypercall(0, rcx, rdx, r8))
    assert result.rax >> 16 == 0
    return int(result.rax)


@pytest.mark.parametrize("code", [0, 1, 0x41, 0x45, 0x47, 0x50, 0x57, 0x95, 0xC0, 0xFFFF])
async def test_a_call_that_is_not_served_is_an_invalid_code(guest: RawGuest, code: int) -> None:
    assert await run(guest, code) == HvStatus.INVALID_HYPERCALL_CODE


@pytest.mark.parametrize("bit", [17, 27, 31, 32, 44, 48, 60, 63])
async def test_reserved_bits_counts_and_headers_are_invalid_input(guest: RawGuest, bit: int) -> None:
    control = hypercall.HvCallGetPartitionId | 1 << bit
    assert await run(guest, control, 0, OUTPUT) == HvStatus.INVALID_HYPERCALL_INPUT


async def test_get_partition_id_writes_its_output(guest: RawGuest) -> None:
    assert await run(guest, hypercall.HvCallGetPartitionId, 0, OUTPUT) == 0
    assert guest.memory.read(OUTPUT, 8) == guest.partition.id.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("rdx", "r8", "status"),
    [
        (PAGE + 4, OUTPUT, HvStatus.INVALID_ALIGNMENT),
        (PAGE, OUTPUT + 1, HvStatus.INVALID_ALIGNMENT),
        (PAGE - 8, OUTPUT, HvStatus.INVALID_HYPERCALL_INPUT),
        (PAGE, PAGE + 8, HvStatus.INVALID_HYPERCALL_INPUT),
        (1 << 40, OUTPUT, HvStatus.INVALID_HYPERCALL_INPUT),
        (PAGE, 1 << 40, HvStatus.INVALID_HYPERCALL_INPUT),
        (PAGE, (1 << 64) - 8, HvStatus.INVALID_HYPERCALL_INPUT),
    ],
)
async def test_blocks_must_be_aligned_inside_one_page_and_apart(
    guest: RawGuest, rdx: int, r8: int, status: HvStatus
) -> None:
    guest.memory.write(PAGE, struct.pack("<QII", SELF, 0x00010000, 0))
    assert await run(guest, hypercall.HvCallGetPartitionProperty, rdx, r8) == status


@pytest.mark.parametrize(
    ("code", "privilege"),
    [
        (hypercall.HvCallPostMessage, hypercall.PRIVILEGE_POST_MESSAGES),
        (hypercall.HvCallSignalEvent, hypercall.PRIVILEGE_SIGNAL_EVENTS),
        (hypercall.HvCallGetPartitionId, hypercall.PRIVILEGE_ACCESS_PARTITION_ID),
        (hypercall.HvCallCreatePartition, hypercall.PRIVILEGE_CREATE_PARTITIONS),
    ],
)
async def test_a_missing_privilege_is_access_denied(world: World, code: int, privilege: int) -> None:
    partition = await world.host.create_partition("b", memory_bytes=1 << 20, privileges=PARENT & ~privilege)
    guest = await RawGuest(partition).attach()
    assert await run(guest, code, PAGE, OUTPUT) == HvStatus.ACCESS_DENIED
    guest.close()


def post(connection: int, kind: int = 1, size: int = 8, reserved: int = 0) -> bytes:
    return struct.pack("<IIII", connection, reserved, kind, size).ljust(256, b"\0")


@pytest.mark.parametrize(
    ("block", "status"),
    [
        (post(99), HvStatus.INVALID_CONNECTION_ID),
        (post(0x41), HvStatus.INVALID_CONNECTION_ID),
        (post(1 << 24 | 1), HvStatus.INVALID_HYPERCALL_INPUT),
        (post(1, kind=0), HvStatus.INVALID_PARAMETER),
        (post(1, kind=0x80000001), HvStatus.INVALID_PARAMETER),
        (post(1, size=241), HvStatus.INVALID_PARAMETER),
        (post(1, reserved=1), HvStatus.INVALID_PARAMETER),
        (post(1), HvStatus.SUCCESS),
    ],
)
async def test_post_message_checks_what_it_is_given(guest: RawGuest, block: bytes, status: HvStatus) -> None:
    assert await guest.call(hypercall.HvCallPostMessage, block) == status


async def test_post_message_has_no_fast_form(guest: RawGuest) -> None:
    status = await guest.call(hypercall.HvCallPostMessage, bytes(16), fast=True)
    assert status == HvStatus.INVALID_HYPERCALL_CODE


async def test_the_seventeenth_message_finds_no_buffer(guest: RawGuest) -> None:
    # The guest has no SynIC running, so the server's answers wait: once 64 do, it takes no further message.
    block = post(4)
    guest.partition.vmbus._resetting = object()  # type: ignore[assignment]
    statuses = [await guest.call(hypercall.HvCallPostMessage, block) for _ in range(18)]
    guest.partition.vmbus._resetting = None
    assert statuses == [HvStatus.SUCCESS] * 16 + [HvStatus.INSUFFICIENT_BUFFERS] * 2


@pytest.mark.parametrize("fast", [True, False])
async def test_signal_event_takes_flag_zero_of_a_known_connection(guest: RawGuest, fast: bool) -> None:
    async def signal(connection: int, flag: int = 0, reserved: int = 0) -> int:
        block = struct.pack("<IHH", connection, flag, reserved)
        return await guest.call(hypercall.HvCallSignalEvent, block, fast=fast)

    assert await signal(0x10001) == HvStatus.INVALID_CONNECTION_ID
    assert await signal(0x10001, flag=1) == HvStatus.INVALID_PARAMETER
    assert await signal(0x10001, reserved=1) == HvStatus.INVALID_PARAMETER
    assert await signal(1 << 31) == HvStatus.INVALID_HYPERCALL_INPUT


async def test_signal_event_rings_the_channels_doorbell(world: World) -> None:
    from vswitch_wire.memory import drain_fd

    guest = await (await world.guest("c")).boot()
    device = EchoDevice()
    await guest.partition.vmbus.offer(device)
    await until(lambda: bool(guest.offers))
    channel = await guest.vmbus.open(guest.offers[0], ring_pages=2)
    doorbell = device.channels[channel.relid].doorbell_fd
    import asyncio

    asyncio.get_running_loop().remove_reader(doorbell)
    connection = guest.offers[0].connection_id
    result = await guest.door.hypercall(hypercall.HvCallSignalEvent, fast=True, rdx=connection)
    assert result.rax == 0
    assert drain_fd(doorbell) == 1


async def test_properties_of_self_and_children_and_no_others(guest: RawGuest) -> None:
    async def query(target: int, code: int) -> tuple[int, int]:
        status = await guest.call(
            hypercall.HvCallGetPartitionProperty, struct.pack("<QII", target, code, 0), output=OUTPUT
        )
        return status, int.from_bytes(guest.memory.read(OUTPUT, 8), "little")

    assert await query(SELF, 0x00010000) == (0, PARENT)
    assert await query(guest.partition.id, 0x00010000) == (0, PARENT)
    assert (await query(SELF, 0x00030005))[1] > 0
    assert (await query(SELF, 0x00060006))[0] == HvStatus.UNKNOWN_PROPERTY
    assert (await query(1, 0x00010000))[0] == HvStatus.INVALID_PARTITION_ID
    assert (await query(guest.partition.id + 7, 0x00010000))[0] == HvStatus.INVALID_PARTITION_ID


async def test_a_guest_with_the_privilege_has_partitions_of_its_own(world: World, guest: RawGuest) -> None:
    create = hypercall.CreatePartition().pack()
    assert await guest.call(hypercall.HvCallCreatePartition, create, output=OUTPUT) == 0
    child_id = int.from_bytes(guest.memory.read(OUTPUT, 8), "little")
    child = world.host.partitions[child_id]
    assert child.parent is guest.partition
    assert child.privileges & ~guest.partition.privileges == 0
    # Memory and a door of its own: it boots and gets its own id.
    inner = await world.adopt(child).boot()
    assert inner.door.partition_id == child_id
    target = struct.pack("<Q", child_id)
    assert await guest.call(hypercall.HvCallDeletePartition, target) == HvStatus.INVALID_PARTITION_STATE
    assert await guest.call(hypercall.HvCallFinalizePartition, target) == 0
    assert await guest.call(hypercall.HvCallFinalizePartition, target) == HvStatus.INVALID_PARTITION_STATE
    assert await guest.call(hypercall.HvCallDeletePartition, target, fast=True) == 0
    assert await guest.call(hypercall.HvCallDeletePartition, target) == HvStatus.INVALID_PARTITION_ID
    await until(lambda: child_id not in world.host.partitions)
    assert not inner.door.connected


async def test_a_strangers_partition_cannot_be_deleted(world: World, guest: RawGuest) -> None:
    stranger = await world.host.create_partition("stranger", memory_bytes=1 << 20)
    target = struct.pack("<Q", stranger.id)
    assert await guest.call(hypercall.HvCallFinalizePartition, target) == HvStatus.INVALID_PARTITION_ID
    assert await guest.call(hypercall.HvCallDeletePartition, target) == HvStatus.INVALID_PARTITION_ID
    assert stranger.id in world.host.partitions


async def test_children_are_counted_and_depth_is_bounded(world: World) -> None:
    quotas = Quotas(children=2, depth=2, child_memory_bytes=1 << 20)
    partition = await world.host.create_partition("p", memory_bytes=1 << 20, privileges=PARENT, quotas=quotas)
    guest = await RawGuest(partition).attach()
    create = hypercall.CreatePartition().pack()
    statuses = [await guest.call(hypercall.HvCallCreatePartition, create, output=OUTPUT) for _ in range(3)]
    assert statuses == [0, 0, HvStatus.NO_RESOURCES]
    child = next(iter(partition.children.values()))
    inner = await RawGuest(child).attach()
    assert (
        await inner.call(hypercall.HvCallCreatePartition, create, output=OUTPUT)
        == HvStatus.PARTITION_TOO_DEEP
    )
    strange = hypercall.CreatePartition(flags=1).pack()
    assert (
        await guest.call(hypercall.HvCallCreatePartition, strange, output=OUTPUT)
        == HvStatus.INVALID_PARAMETER
    )
    await partition.delete()
    assert not [entry for entry in world.host.partitions.values() if entry.name.startswith("p")]
    guest.close()
    inner.close()


async def test_a_plain_guest_may_not_create_partitions(world: World) -> None:
    guest = await RawGuest(
        await world.host.create_partition("b", memory_bytes=1 << 20, privileges=GUEST)
    ).attach()
    status = await guest.call(
        hypercall.HvCallCreatePartition, hypercall.CreatePartition().pack(), output=OUTPUT
    )
    assert status == HvStatus.ACCESS_DENIED
    guest.close()


async def test_a_guest_may_delete_and_create_partitions_in_any_order(world: World) -> None:
    quotas = Quotas(children=2, child_memory_bytes=1 << 20)
    partition = await world.host.create_partition("p", memory_bytes=1 << 20, privileges=PARENT, quotas=quotas)
    taken = await world.host.create_partition("p.3", memory_bytes=1 << 20)
    guest = await RawGuest(partition).attach()
    create = hypercall.CreatePartition().pack()
    for _ in range(2):
        assert await guest.call(hypercall.HvCallCreatePartition, create, output=OUTPUT) == 0
    for _ in range(4):
        first = struct.pack("<Q", next(iter(partition.children)))
        assert await guest.call(hypercall.HvCallFinalizePartition, first) == 0
        assert await guest.call(hypercall.HvCallDeletePartition, first) == 0
        assert await guest.call(hypercall.HvCallCreatePartition, create, output=OUTPUT) == 0
    names = [entry.name for entry in world.host.partitions.values()]
    assert len(set(names)) == len(names)
    assert taken.parent is None
    guest.close()
