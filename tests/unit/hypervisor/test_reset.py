"""RESET: the guest's side starts its guest anew, and the host lets go of everything the old one had."""

from __future__ import annotations

import asyncio

from hypervisor_world import PAGE, EchoDevice, RawGuest, World, until

from hypervisor import PartitionState
from vswitch_wire import door as wire
from vswitch_wire import hypercall, synic, vmbus
from vswitch_wire.door import ErrorCode
from vswitch_wire.vmbus import VmbusVersion

RING_PAGES = 4


async def boot(guest: RawGuest) -> vmbus.OfferChannel:
    """SynIC, contact, and the first offer."""
    await guest.start_synic()
    assert (await guest.contact(VmbusVersion.COPPER)).version_supported
    await guest.post(vmbus.RequestOffers())
    offer = await guest.message()
    assert isinstance(offer, vmbus.OfferChannel)
    assert isinstance(await guest.message(), vmbus.AllOffersDelivered)
    return offer


async def open_channel(guest: RawGuest, relid: int) -> None:
    """A ring of pages 8 and up, opened."""
    ranges = hypercall_range(list(range(8, 8 + RING_PAGES)))
    await guest.post(vmbus.GpadlHeader(relid, 0x10, len(ranges), 1, ranges))
    assert isinstance(await guest.message(), vmbus.GpadlCreated)
    await guest.post(vmbus.OpenChannel(relid, relid, 0x10, 0, RING_PAGES // 2, bytes(120)))
    answer = await guest.message()
    assert isinstance(answer, vmbus.OpenChannelResult)
    assert answer.status == 0


def hypercall_range(pfns: list[int]) -> bytes:
    """One GPA range of whole pages, as a GPADL carries it."""
    head = (len(pfns) * PAGE).to_bytes(4, "little") + bytes(4)
    return head + b"".join(pfn.to_bytes(8, "little") for pfn in pfns)


async def reset(guest: RawGuest, sequence: int = 9) -> None:
    """RESET, and everything up to its answer."""
    guest.send(wire.Reset(), sequence)
    while True:
        answered, message, fds = await guest.receive()
        guest._note(message, fds)
        if isinstance(message, wire.ResetDone):
            assert answered == sequence
            break
    guest.delivered.clear()


async def test_a_guest_that_starts_anew_finds_a_new_host(world: World) -> None:
    partition = await world.host.create_partition("a", memory_bytes=1 << 20)
    device = EchoDevice()
    await partition.vmbus.offer(device)
    guest = await RawGuest(partition).attach()
    offer = await boot(guest)
    await open_channel(guest, offer.relid)
    calls: list[list[str]] = []
    partition.on_reset.append(lambda: calls.append(list(device.events)))
    await reset(guest)
    # The callback came after the device was closed.
    assert calls == [["open 0", "close 0"]]
    assert partition.vmbus.connection is None
    assert partition.state is PartitionState.RUNNING
    assert partition.synic.guest_os_id == 0
    answer = await guest.ask(wire.MsrRead(0, synic.HV_X64_MSR_SCONTROL))
    assert (answer.fault, answer.value) == (False, 0)
    # The next boot is as the first one: the same GPADL id, the same relid, the channel opens.
    again = await boot(guest)
    assert again.relid == offer.relid
    await open_channel(guest, again.relid)
    assert device.events == ["open 0", "close 0", "open 0"]
    guest.close()


async def test_what_was_delivered_and_not_ended_is_forgotten(world: World) -> None:
    partition = await world.host.create_partition("a", memory_bytes=1 << 20)
    guest = await (await RawGuest(partition).attach()).start_synic()
    message = vmbus.InitiateContact(VmbusVersion.WIN10, 0, 2)
    assert await guest.post(message) == 0
    assert isinstance(await guest.message(eom=False), vmbus.VersionResponse)
    await reset(guest)
    # No EOM was sent for it, and none is due: the next message comes all the same.
    await guest.start_synic()
    assert (await guest.contact(VmbusVersion.WIN10)).version_supported
    guest.close()


async def test_requests_while_a_reset_is_under_way_are_refused(world: World) -> None:
    partition = await world.host.create_partition("a", memory_bytes=1 << 20)
    device = EchoDevice()
    await partition.vmbus.offer(device)
    guest = await RawGuest(partition).attach()
    offer = await boot(guest)
    await open_channel(guest, offer.relid)
    device.gate.clear()
    guest.send(wire.Reset(), 9)
    guest.send(wire.Hypercall(0, hypercall.HvCallPostMessage, PAGE), 10)
    error = await guest.error()
    assert error.code == ErrorCode.STATE
    assert "RESET_DONE" in error.text
    device.gate.set()
    await until(lambda: partition.state is PartitionState.DETACHED and device.events[-1] == "close 0")
    guest.close()


async def test_a_reset_cut_short_by_the_doors_loss_is_asked_for_again(world: World) -> None:
    partition = await world.host.create_partition("a", memory_bytes=1 << 20)
    device = EchoDevice()
    await partition.vmbus.offer(device)
    guest = await RawGuest(partition).attach()
    offer = await boot(guest)
    await open_channel(guest, offer.relid)
    device.gate.clear()
    guest.send(wire.Reset(), 9)
    await until(lambda: partition.vmbus.resetting)
    assert partition._link is not None
    partition._link.close("cut")
    device.gate.set()
    await until(lambda: partition.state is PartitionState.DETACHED)
    attaching = asyncio.ensure_future(partition.attach(5))
    memfd = guest.fds[0]
    await guest.accept()
    guest.send(wire.HelloAck(flags=wire.HelloFlags.RESUME), guest.hello_sequence, [memfd])
    await attaching
    await reset(guest)
    await boot(guest)
    guest.close()
