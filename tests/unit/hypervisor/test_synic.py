"""MSRs, the slot rule, and where event flags go."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypervisor_world import PAGE, EchoDevice, RawGuest, World, until

from hypervisor import ManualClock
from hypervisor.privileges import GUEST
from vswitch_wire import door as wire
from vswitch_wire import hypercall, synic, vmbus
from vswitch_wire.memory import drain_fd

MEMORY = 1 << 20


async def started(world: World, *, vp_count: int = 1, privileges: int = GUEST) -> RawGuest:
    partition = await world.host.create_partition(
        "a", memory_bytes=MEMORY, vp_count=vp_count, privileges=privileges
    )
    return await RawGuest(partition).attach()


async def write(guest: RawGuest, msr: int, value: int, vp: int = 0) -> bool:
    return not (await guest.ask(wire.MsrWrite(vp, msr, value))).fault


async def read(guest: RawGuest, msr: int, vp: int = 0) -> int | None:
    answer = await guest.ask(wire.MsrRead(vp, msr))
    return None if answer.fault else int(answer.value)


async def test_registers_reset_as_documented(world: World) -> None:
    guest = await started(world, vp_count=2)
    assert await read(guest, synic.HV_X64_MSR_VP_INDEX, 1) == 1
    assert await read(guest, synic.HV_X64_MSR_SVERSION) == 1
    assert await read(guest, synic.HV_X64_MSR_SCONTROL) == 0
    assert await read(guest, synic.HV_X64_MSR_EOM) == 0
    for sint in range(16):
        assert await read(guest, synic.HV_X64_MSR_SINT0 + sint) == 0x10000
    guest.close()


@pytest.mark.parametrize(
    ("msr", "value"),
    [
        (synic.HV_X64_MSR_VP_INDEX, 0),
        (synic.HV_X64_MSR_SVERSION, 1),
        (synic.HV_X64_MSR_TIME_REF_COUNT, 0),
        (synic.HV_X64_MSR_SCONTROL, 2),
        (synic.HV_X64_MSR_SIMP, MEMORY | 1),
        (synic.HV_X64_MSR_SIEFP, 1 << 60 | 1),
        (synic.HV_X64_MSR_SINT0, 15),
        (synic.HV_X64_MSR_SINT0 + 2, 1 << 20 | 0x50),
        (synic.HV_X64_MSR_RESET, 1),
        (0x40000085, 0),
        (0x174, 0),
    ],
)
async def test_a_bad_msr_write_faults_and_changes_nothing(world: World, msr: int, value: int) -> None:
    guest = await started(world)
    before = await read(guest, msr)
    assert not await write(guest, msr, value)
    if msr != synic.HV_X64_MSR_TIME_REF_COUNT:
        assert await read(guest, msr) == before
    guest.close()


async def test_a_virtual_processor_that_does_not_exist_faults(world: World) -> None:
    guest = await started(world)
    assert not await write(guest, synic.HV_X64_MSR_SCONTROL, 1, vp=1)
    assert await read(guest, synic.HV_X64_MSR_SCONTROL, vp=63) is None
    guest.close()


async def test_msrs_need_their_privilege(world: World) -> None:
    guest = await started(world, privileges=GUEST & ~hypercall.PRIVILEGE_ACCESS_SYNIC_REGS)
    assert await read(guest, synic.HV_X64_MSR_SCONTROL) is None
    assert await read(guest, synic.HV_X64_MSR_VP_INDEX) == 0
    guest.close()


async def test_the_hypercall_page_needs_a_guest_os_id_and_can_be_locked(world: World) -> None:
    guest = await started(world)
    assert await write(guest, synic.HV_X64_MSR_HYPERCALL, 5 * PAGE | 1)
    assert await read(guest, synic.HV_X64_MSR_HYPERCALL) == 5 * PAGE
    assert await write(guest, synic.HV_X64_MSR_GUEST_OS_ID, 1 << 63)
    assert await write(guest, synic.HV_X64_MSR_HYPERCALL, 5 * PAGE | 1)
    assert await read(guest, synic.HV_X64_MSR_HYPERCALL) == 5 * PAGE | 1
    assert await write(guest, synic.HV_X64_MSR_GUEST_OS_ID, 0)
    assert await read(guest, synic.HV_X64_MSR_HYPERCALL) == 5 * PAGE
    assert await write(guest, synic.HV_X64_MSR_HYPERCALL, 5 * PAGE | 2)
    assert not await write(guest, synic.HV_X64_MSR_HYPERCALL, 6 * PAGE)
    guest.close()


async def test_reference_time_counts_100_ns_units_of_the_injected_clock(tmp_path: Path) -> None:
    clock = ManualClock()
    world = World(tmp_path, clock=clock)
    guest = await started(world)
    assert await read(guest, synic.HV_X64_MSR_TIME_REF_COUNT) == 0
    clock.advance(2.5)
    assert await read(guest, synic.HV_X64_MSR_TIME_REF_COUNT) == 25_000_000
    guest.close()
    await world.close()


async def test_one_message_is_outstanding_and_the_next_comes_after_eom(world: World) -> None:
    guest = await (await started(world)).start_synic()
    for _ in range(2):
        await guest.partition.vmbus.offer(EchoDevice())
    await guest.contact()
    await guest.post(vmbus.RequestOffers())
    first = await guest.message(eom=False)
    assert isinstance(first, vmbus.OfferChannel)
    assert await guest.silent()
    guest.send(wire.Eom(0, 2))
    second = await guest.message()
    assert isinstance(second, vmbus.OfferChannel)
    assert isinstance(await guest.message(), vmbus.AllOffersDelivered)
    guest.close()


async def test_pending_is_set_while_more_messages_wait(world: World) -> None:
    guest = await (await started(world)).start_synic()
    await guest.partition.vmbus.offer(EchoDevice())
    await guest.contact()
    await guest.post(vmbus.RequestOffers())
    await until(lambda: guest.partition.synic.queued() == 1)
    # The offer went before anything waited; the marker is the last: neither has anything behind it.
    flags = []
    for _ in range(2):
        while not guest.delivered:
            _, answer, fds = await guest.receive()
            guest._note(answer, fds)
        delivered = guest.delivered.pop(0)
        flags.append(synic.Message.unpack(delivered.message).flags)
        guest.partition.synic.post(0, 2, synic.Message(1, bytes(8)))
        guest.send(wire.Eom(0, 2))
    assert flags == [0, 1]
    guest.close()


async def test_messages_wait_until_simp_and_scontrol_are_enabled(world: World) -> None:
    guest = await started(world)
    guest.partition.synic.post(0, 2, synic.Message(1, bytes(8)))
    assert await guest.silent()
    assert await write(guest, synic.HV_X64_MSR_SIMP, 3 * PAGE | 1)
    assert await guest.silent()
    guest.send(wire.MsrWrite(0, synic.HV_X64_MSR_SCONTROL, 1), 5)
    assert not await guest.silent()
    guest.close()


async def test_an_event_sets_its_flag_and_writes_the_eventfd_of_its_processor(world: World) -> None:
    guest = await (await started(world, vp_count=2)).start_synic()
    bound = guest.partition.synic.bind(17, 2, 0)
    bound.interrupt.signal()
    flags = guest.memory.take_flags(4 * PAGE + 2 * 256, 256)
    assert flags == (1 << 17).to_bytes(256, "little")
    irq = guest.fds[1:]
    assert drain_fd(irq[0]) == 1
    # Another processor without SIEFP: the eventfd alone. Masked: nothing.
    bound.move(1)
    bound.interrupt.signal()
    assert (drain_fd(irq[0]), drain_fd(irq[1])) == (0, 0)
    assert await write(guest, synic.HV_X64_MSR_SCONTROL, 1, vp=1)
    assert await write(guest, synic.HV_X64_MSR_SINT0 + 2, 0x50, vp=1)
    bound.interrupt.signal()
    assert drain_fd(irq[1]) == 1
    assert guest.memory.take_flags(4 * PAGE + 2 * 256, 256) == bytes(256)
    bound.move(None)
    bound.interrupt.signal()
    assert (drain_fd(irq[0]), drain_fd(irq[1])) == (0, 0)
    guest.close()
