"""Channels from OFFERCHANNEL to RELID_RELEASED: each transition, as the guest sees it."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from hypervisor_world import PAGE, EchoDevice, Guest, RawGuest, World, until

from hypervisor import ChannelState, Offer, Quotas
from hypervisor.vmbus import ChannelRefused, OpenedChannel
from netvsc.vmbus import ChannelRefusedError, ChannelRescinded, GuestChannel
from vswitch_wire import packet, vmbus
from vswitch_wire.gpadl import GpaRange, encode_gpadl
from vswitch_wire.memory import drain_fd, signal_fd
from vswitch_wire.ring import RingReader, RingWriter
from vswitch_wire.vmbus import VmbusVersion


class Rings:
    """The guest's ends of an open channel."""

    def __init__(self, channel: GuestChannel) -> None:
        self.channel = channel
        split, pages = channel.downstream_page_offset, channel.ring_pfns
        self.writer = RingWriter(channel.memory.view(pages[:split], 0, split * PAGE))
        self.reader = RingReader(channel.memory.view(pages[split:], 0, (len(pages) - split) * PAGE))
        self.seen: list[bytes] = []
        channel.on_interrupt = self.interrupted

    def interrupted(self) -> None:
        self.seen.extend(packet.decode(raw).payload for raw in self.reader.read())
        self.reader.commit()

    def send(self, payload: bytes) -> None:
        self.writer.write(packet.encode_inband(payload, 7, False))
        if self.writer.commit():
            signal_fd(self.channel.signal_fd)


async def booted(world: World, device: EchoDevice, **options: int) -> tuple[Guest, Offer]:
    guest = await (await world.guest(**options)).boot()  # type: ignore[arg-type]
    offer = await guest.partition.vmbus.offer(device)
    await until(lambda: bool(guest.offers))
    return guest, offer


async def test_a_packet_goes_through_an_open_channel_and_back(world: World) -> None:
    device = EchoDevice()
    guest, offer = await booted(world, device)
    channel = await guest.vmbus.open(guest.offers[0], ring_pages=4)
    assert offer.state is ChannelState.OPEN
    rings = Rings(channel)
    rings.send(b"through the ring")
    await until(lambda: bool(rings.seen))
    assert rings.seen == [b"through the ring"]
    free = guest.allocator.available
    await guest.vmbus.close(channel)
    assert device.events == ["open 0", "close 0"]
    assert guest.allocator.available == free + 8


async def test_a_refused_open_is_told_and_can_be_tried_again(world: World) -> None:
    device = EchoDevice()
    device.refuse = "not today"
    guest, offer = await booted(world, device)
    free = guest.allocator.available
    with pytest.raises(ChannelRefusedError):
        await guest.vmbus.open(guest.offers[0], ring_pages=2)
    assert offer.state is ChannelState.CLOSED
    assert guest.allocator.available == free
    device.refuse = ""
    await guest.vmbus.open(guest.offers[0], ring_pages=2)
    assert device.events == ["open 0", "open 0"]


async def test_a_rescind_closes_the_device_first_and_frees_the_relid_on_release(world: World) -> None:
    device = EchoDevice()
    guest, offer = await booted(world, device)
    guest.auto_release = False
    channel = await guest.vmbus.open(guest.offers[0], ring_pages=2)
    await guest.partition.vmbus.rescind(offer)
    assert device.events == ["open 0", "close 0"]
    await until(lambda: bool(guest.rescinds))
    # What a driver still does after a rescind is taken: close, teardown.
    await guest.vmbus.close(channel)
    assert guest.partition.vmbus.channels
    guest.vmbus.release(channel.relid)
    await until(lambda: not guest.partition.vmbus.channels)
    assert guest.partition.vmbus.protocol_errors == 0


async def test_a_rescind_while_the_guest_opens_fails_the_open(world: World) -> None:
    device = EchoDevice()
    device.gate.clear()
    guest, offer = await booted(world, device)
    opening = asyncio.ensure_future(guest.vmbus.open(guest.offers[0], ring_pages=2))
    await until(lambda: offer.state is ChannelState.OPENING)
    rescinding = asyncio.ensure_future(guest.partition.vmbus.rescind(offer))
    await asyncio.sleep(0.01)
    device.gate.set()
    await rescinding
    with pytest.raises(ChannelRescinded):
        await opening
    assert device.events == ["open 0", "close 0"]


async def test_the_interrupt_moves_to_another_processor(world: World) -> None:
    device = EchoDevice()
    guest, _ = await booted(world, device, vp_count=2)
    channel = await guest.vmbus.open(guest.offers[0], ring_pages=2)
    rings = Rings(channel)
    await guest.vmbus.modify(channel, 1)
    assert channel.irq_fd == guest.door.interrupts[1]
    # Only processor 1 is looked at now.
    guest.synic.take_interrupt(0)
    rings.send(b"to the other one")
    await until(lambda: bool(rings.seen))
    with pytest.raises(ConnectionError, match="cannot interrupt"):
        await guest.vmbus.modify(channel, 2)


async def test_sub_channels_are_offered_after_the_primary_and_vanish_with_it(world: World) -> None:
    device = EchoDevice()
    guest, offer = await booted(world, device)
    primary = await guest.vmbus.open(guest.offers[0], ring_pages=2)
    device.channels[offer.relid].offer_sub_channels(2)
    await until(lambda: len(guest.offers) == 3)
    assert [entry.sub_channel_index for entry in guest.offers] == [0, 1, 2]
    assert len({entry.instance_id for entry in guest.offers}) == 1
    assert len({entry.relid for entry in guest.offers}) == 3
    await guest.vmbus.open(guest.offers[1], ring_pages=2)
    with pytest.raises(ValueError, match="more than the device has"):
        device.channels[offer.relid].offer_sub_channels(4)
    await guest.vmbus.close(primary)
    await until(lambda: len(guest.partition.vmbus.channels) == 1)
    assert [entry.sub_channel_index for entry in guest.rescinds] == [1, 2]
    assert device.events == ["open 0", "open 1", "close 0", "close 1"]


async def test_a_guest_that_lies_loses_its_channel_and_gets_it_back_by_a_new_contact(world: World) -> None:
    device = EchoDevice()
    guest, offer = await booted(world, device)
    channel = await guest.vmbus.open(guest.offers[0], ring_pages=2)
    upstream = channel.ring_pfns[0] * PAGE
    channel.memory.store_u32(upstream, 4097)
    signal_fd(channel.signal_fd)
    await until(lambda: bool(guest.rescinds))
    assert device.events == ["open 0", "close 0"]
    assert "write index" in guest.partition.vmbus.last_error
    await until(lambda: not offer.channel.offered)
    guest.offers.clear()
    await guest.vmbus.connect()
    assert [entry.relid for entry in guest.offers] == [offer.relid]
    await guest.vmbus.open(guest.offers[0], ring_pages=2)


@pytest_asyncio.fixture
async def raw(world: World) -> AsyncIterator[tuple[RawGuest, EchoDevice, Offer]]:
    """A guest in raw bytes that has an offer and a ring GPADL of 4 pages (id 0xE1E10)."""
    partition = await world.host.create_partition("raw", memory_bytes=1 << 20)
    guest = await (await RawGuest(partition).attach()).start_synic()
    device = EchoDevice()
    offer = await partition.vmbus.offer(device)
    await guest.contact(VmbusVersion.WIN10)
    await guest.post(vmbus.RequestOffers())
    await guest.message()
    await guest.message()
    await share(guest, offer.relid, 0xE1E10, range(16, 20))
    yield guest, device, offer
    device.gate.set()
    guest.close()


async def share(guest: RawGuest, relid: int, gpadl: int, pages: range) -> None:
    for message in encode_gpadl(relid, gpadl, (GpaRange(len(pages) * PAGE, 0, tuple(pages)),)):
        await guest.post(message)
    assert await guest.message() == vmbus.GpadlCreated(relid, gpadl, 0)


Raw = tuple[RawGuest, EchoDevice, Offer]


@pytest.mark.parametrize(
    ("gpadl", "vp", "offset"),
    [
        (0xE1E11, 0, 2),
        (0xE1E10, 1, 2),
        (0xE1E10, 0, 0),
        (0xE1E10, 0, 1),
        (0xE1E10, 0, 3),
        (0xE1E10, 0, 2**32 - 1),
    ],
)
async def test_an_open_with_bad_parameters_is_refused(raw: Raw, gpadl: int, vp: int, offset: int) -> None:
    guest, device, offer = raw
    await guest.post(vmbus.OpenChannel(offer.relid, 5, gpadl, vp, offset))
    assert await guest.message() == vmbus.OpenChannelResult(offer.relid, 5, vmbus.STATUS_UNSUCCESSFUL)
    assert device.events == []


async def test_an_open_without_interrupts_is_an_open(raw: Raw) -> None:
    guest, device, offer = raw
    await guest.post(vmbus.OpenChannel(offer.relid, 5, 0xE1E10, vmbus.TARGET_VP_DISABLED, 2))
    assert await guest.message() == vmbus.OpenChannelResult(offer.relid, 5, 0)
    device.channels[offer.relid].interrupt.signal()
    assert not any(guest.memory.take_flags(4 * PAGE + 512, 256))


async def test_opening_twice_is_an_error_and_the_first_open_lives(raw: Raw) -> None:
    guest, device, offer = raw
    device.gate.clear()
    message = vmbus.OpenChannel(offer.relid, 5, 0xE1E10, 0, 2)
    await guest.post(message)
    await guest.post(message)
    await guest.post(vmbus.RelidReleased(offer.relid))
    assert guest.partition.vmbus.protocol_errors == 2
    device.gate.set()
    assert await guest.message() == vmbus.OpenChannelResult(offer.relid, 5, 0)
    await guest.post(message)
    assert guest.partition.vmbus.protocol_errors == 3
    assert device.events == ["open 0"]


async def test_teardown_is_answered_only_when_the_device_let_go(raw: Raw) -> None:
    guest, device, offer = raw
    await guest.post(vmbus.OpenChannel(offer.relid, 5, 0xE1E10, 0, 2))
    await guest.message()
    await guest.post(vmbus.GpadlTeardown(offer.relid, 0xE1E10))
    device.gate.clear()
    await guest.post(vmbus.CloseChannel(offer.relid))
    assert await guest.silent()
    device.gate.set()
    assert await guest.message() == vmbus.GpadlTorndown(0xE1E10)
    assert device.events == ["open 0", "close 0"]


async def test_an_open_while_closing_is_remembered(raw: Raw) -> None:
    guest, device, offer = raw
    message = vmbus.OpenChannel(offer.relid, 5, 0xE1E10, 0, 2)
    await guest.post(message)
    await guest.message()
    device.gate.clear()
    await guest.post(vmbus.CloseChannel(offer.relid))
    await guest.post(vmbus.OpenChannel(offer.relid, 6, 0xE1E10, 0, 2))
    assert offer.state is ChannelState.CLOSING
    device.gate.set()
    assert await guest.message() == vmbus.OpenChannelResult(offer.relid, 6, 0)
    assert device.events == ["open 0", "close 0", "open 0"]


async def test_closing_a_closed_channel_is_an_error_without_an_answer(raw: Raw) -> None:
    guest, _, offer = raw
    await guest.post(vmbus.CloseChannel(offer.relid))
    assert await guest.silent()
    assert guest.partition.vmbus.protocol_errors == 1


async def test_a_guest_may_release_a_closed_channel_and_has_it_again_after_a_contact(raw: Raw) -> None:
    guest, _, offer = raw
    await guest.post(vmbus.RelidReleased(offer.relid))
    await guest.post(vmbus.OpenChannel(offer.relid, 5, 0xE1E10, 0, 2))
    assert await guest.silent()
    await guest.contact()
    await guest.post(vmbus.RequestOffers())
    assert isinstance(await guest.message(), vmbus.OfferChannel)


async def test_after_a_rescind_the_guest_is_answered_until_it_releases(raw: Raw) -> None:
    guest, _, offer = raw
    await guest.partition.vmbus.rescind(offer)
    assert await guest.message() == vmbus.RescindChannelOffer(offer.relid)
    await guest.post(vmbus.OpenChannel(offer.relid, 5, 0xE1E10, 0, 2))
    assert await guest.silent()
    await share(guest, offer.relid, 0xE1E12, range(20, 22))
    await guest.post(vmbus.GpadlTeardown(offer.relid, 0xE1E10))
    assert await guest.message() == vmbus.GpadlTorndown(0xE1E10)
    await guest.post(vmbus.GpadlTeardown(offer.relid, 0xBAD))
    assert await guest.message() == vmbus.GpadlTorndown(0xBAD)
    await guest.post(vmbus.RelidReleased(offer.relid))
    assert not guest.partition.vmbus.channels
    assert guest.partition.vmbus.protocol_errors == 0
    assert len(guest.partition.vmbus.gpadls) == 0


async def test_a_rescind_answers_a_gpadl_that_is_half_made_first(raw: Raw) -> None:
    guest, _, offer = raw
    await guest.post(vmbus.GpadlHeader(offer.relid, 0xE1E13, 8 + 8 * 40, 1, bytes(8)))
    await guest.partition.vmbus.rescind(offer)
    assert await guest.message() == vmbus.GpadlCreated(offer.relid, 0xE1E13, vmbus.STATUS_UNSUCCESSFUL)
    assert await guest.message() == vmbus.RescindChannelOffer(offer.relid)


async def test_a_device_that_comes_back_is_offered_after_the_release_not_before(raw: Raw) -> None:
    guest, device, offer = raw
    await guest.partition.vmbus.rescind(offer)
    assert await guest.message() == vmbus.RescindChannelOffer(offer.relid)
    await guest.partition.vmbus.offer(device)
    assert await guest.silent()
    await guest.post(vmbus.RelidReleased(offer.relid))
    again = await guest.message()
    assert isinstance(again, vmbus.OfferChannel)
    assert (again.relid, again.instance_id) == (offer.relid, device.instance_id)


async def test_modify_channel_is_answered_from_5_3_on(world: World) -> None:
    for version, answered in ((VmbusVersion.WIN10_RS5, False), (VmbusVersion.IRON, True)):
        partition = await world.host.create_partition(f"v{version}", memory_bytes=1 << 20)
        guest = await (await RawGuest(partition).attach()).start_synic()
        offer = await partition.vmbus.offer(EchoDevice())
        await guest.contact(version)
        await guest.post(vmbus.RequestOffers())
        await guest.message()
        await guest.message()
        await guest.post(vmbus.ModifyChannel(offer.relid, 0))
        if answered:
            assert await guest.message() == vmbus.ModifyChannelResponse(
                offer.relid, vmbus.STATUS_UNSUCCESSFUL
            )
        else:
            assert await guest.silent()
        guest.close()


async def test_a_device_that_reports_faults_without_end_is_noted_a_few_times(world: World) -> None:
    device = EchoDevice()
    guest, offer = await booted(world, device)
    await guest.vmbus.open(guest.offers[0], ring_pages=2)
    opened = device.channels[offer.relid]
    for number in range(100):
        opened.report_fault(f"lie {number}")
    assert opened.faults == [f"lie {number}" for number in range(16)]
    await until(lambda: bool(guest.rescinds))
    assert offer.channel.faults == ["lie 0"]


async def test_a_rescind_waits_for_a_fault_in_progress_and_takes_the_device_too(
    world: World,
) -> None:
    device = EchoDevice()
    guest, offer = await booted(world, device)
    await guest.vmbus.open(guest.offers[0], ring_pages=2)
    device.gate.clear()
    device.channels[offer.relid].report_fault("it lied")
    await until(lambda: offer.state is ChannelState.CLOSING)
    rescinding = asyncio.ensure_future(guest.partition.vmbus.rescind(offer))
    await asyncio.sleep(0.02)
    assert not rescinding.done()
    device.gate.set()
    await rescinding
    assert device.events == ["open 0", "close 0"]
    await until(lambda: not guest.partition.vmbus.channels)
    # A fault alone only withholds the device until the guest's next contact.
    await guest.vmbus.connect(VmbusVersion.COPPER)
    assert guest.partition.vmbus.channels == []


async def test_sub_channels_are_offered_again_although_the_old_ones_are_not_released(world: World) -> None:
    device = EchoDevice()
    guest, offer = await booted(world, device)
    primary = await guest.vmbus.open(guest.offers[0], ring_pages=2)
    device.channels[offer.relid].offer_sub_channels(1)
    await until(lambda: len(guest.offers) == 2)
    guest.auto_release = False
    await guest.vmbus.close(primary)
    await until(lambda: bool(guest.rescinds))
    # A driver that changes its MTU opens anew at once; its bus releases the old sub-channel in its own time.
    await guest.vmbus.open(guest.offers[0], ring_pages=2)
    device.channels[offer.relid].offer_sub_channels(1)
    await until(lambda: len(guest.offers) == 3)
    assert guest.offers[2].sub_channel_index == 1
    assert guest.offers[2].relid != guest.offers[1].relid
    await guest.vmbus.open(guest.offers[2], ring_pages=2)
    guest.vmbus.release(guest.offers[1].relid)
    await until(lambda: len(guest.partition.vmbus.channels) == 2)
    assert guest.partition.vmbus.protocol_errors == 0


async def test_a_guest_that_releases_no_sub_channel_does_not_use_up_the_relids(world: World) -> None:
    device = EchoDevice()
    guest, offer = await booted(world, device)
    vmbus_server = guest.partition.vmbus
    guest.auto_release = False
    for _ in range(20):
        primary = await guest.vmbus.open(guest.offers[0], ring_pages=2)
        device.channels[offer.relid].offer_sub_channels(3)
        await guest.vmbus.close(primary)
        await until(lambda: offer.state is ChannelState.CLOSED and not offer.channel.task)
    assert len(vmbus_server.channels) == 1 + 3 * 3
    assert vmbus_server.protocol_errors == 17
    assert "9 rescinded ones are not released" in vmbus_server.last_error
    assert (await vmbus_server.offer(EchoDevice())).relid
    # It has them again once it lets go.
    for entry in list(guest.rescinds):
        guest.vmbus.release(entry.relid)
    await until(lambda: len(vmbus_server.channels) == 2)
    await guest.vmbus.open(guest.offers[0], ring_pages=2)
    device.channels[offer.relid].offer_sub_channels(3)
    assert len(vmbus_server.channels) == 5


async def test_sub_channels_beyond_the_relids_are_the_guests_error(world: World) -> None:
    quotas = Quotas(channels=3)
    partition = await world.host.create_partition("few", memory_bytes=1 << 20, quotas=quotas)
    guest = await (await RawGuest(partition).attach()).start_synic()
    device = EchoDevice()
    offer = await partition.vmbus.offer(device)
    await guest.contact(VmbusVersion.WIN10)
    await guest.post(vmbus.RequestOffers())
    await guest.message()
    await guest.message()
    await share(guest, offer.relid, 0xE1E10, range(16, 20))
    await guest.post(vmbus.OpenChannel(offer.relid, 5, 0xE1E10, 0, 2))
    await guest.message()
    device.channels[offer.relid].offer_sub_channels(3)
    assert len(partition.vmbus.channels) == 1
    assert "3 sub-channels are more than there are relids" in partition.vmbus.last_error
    device.channels[offer.relid].offer_sub_channels(2)
    assert len(partition.vmbus.channels) == 3
    guest.close()


async def test_an_open_for_which_the_host_has_no_descriptors_is_refused_and_keeps_nothing(
    raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest, _, offer = raw
    message = vmbus.OpenChannel(offer.relid, 5, 0xE1E10, 0, 2)
    before = sorted(os.listdir("/proc/self/fd"))
    real = os.eventfd
    for failing in (1, 2):
        made = 0

        def few(*arguments: int, failing: int = failing) -> int:
            nonlocal made
            made += 1
            if made == failing:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return real(*arguments)

        monkeypatch.setattr(os, "eventfd", few)
        await guest.post(message)
        answer = await guest.message()
        monkeypatch.undo()
        assert answer == vmbus.OpenChannelResult(offer.relid, 5, vmbus.STATUS_UNSUCCESSFUL)
        assert "Too many open files" in guest.partition.vmbus.last_error
        assert sorted(os.listdir("/proc/self/fd")) == before
    # It can be opened, and its GPADL is free once it is closed.
    await guest.post(message)
    assert await guest.message() == vmbus.OpenChannelResult(offer.relid, 5, 0)
    await guest.post(vmbus.CloseChannel(offer.relid))
    await guest.post(vmbus.GpadlTeardown(offer.relid, 0xE1E10))
    assert await guest.message() == vmbus.GpadlTorndown(0xE1E10)


async def test_a_primary_that_is_taken_away_offers_and_opens_no_sub_channel(world: World) -> None:
    device = EchoDevice()
    guest, offer = await booted(world, device)
    await guest.vmbus.open(guest.offers[0], ring_pages=2)
    opened = device.channels[offer.relid]
    opened.offer_sub_channels(2)
    await until(lambda: len(guest.offers) == 3)
    await guest.vmbus.open(guest.offers[1], ring_pages=2)
    device.gate.clear()
    opened.report_fault("it lied")
    await until(lambda: guest.partition.vmbus.channels[1].state is ChannelState.CLOSING)
    # Whoever still asks on behalf of the guest gets nothing; what the guest opens now waits for its RESCIND.
    opened.offer_sub_channels(3)
    assert [entry.sub_channel_index for entry in guest.partition.vmbus.channels] == [0, 1, 2]
    opening = asyncio.ensure_future(guest.vmbus.open(guest.offers[2], ring_pages=2))
    await until(lambda: "is not open" in guest.partition.vmbus.last_error)
    device.gate.set()
    with pytest.raises(ChannelRescinded):
        await opening
    await until(lambda: len(guest.rescinds) == 3)
    assert device.events == ["open 0", "open 1", "close 1", "close 0"]


async def test_a_primary_that_fails_to_open_takes_its_sub_channels_along(world: World) -> None:
    class Failing(EchoDevice):
        async def open(self, channel: OpenedChannel) -> None:
            channel.offer_sub_channels(1)
            raise ChannelRefused("not today")

    guest, _ = await booted(world, Failing())
    with pytest.raises(ConnectionError):
        await guest.vmbus.open(guest.offers[0], ring_pages=2)
    await until(lambda: [entry.sub_channel_index for entry in guest.rescinds] == [1])
    await until(lambda: len(guest.partition.vmbus.channels) == 1)


async def test_a_device_may_have_one_doorbell_for_all_its_channels(world: World) -> None:
    device = EchoDevice()
    device.shares_doorbell = True  # type: ignore[attr-defined]
    guest, offer = await booted(world, device)
    await guest.vmbus.open(guest.offers[0], ring_pages=2)
    opened = device.channels[offer.relid]
    asyncio.get_running_loop().remove_reader(opened.doorbell_fd)
    opened.offer_sub_channels(1)
    await until(lambda: len(guest.offers) == 2)
    channel = await guest.vmbus.open(guest.offers[1], ring_pages=2)
    drain_fd(opened.doorbell_fd)
    signal_fd(channel.signal_fd)
    assert os.eventfd_read(opened.doorbell_fd) == 1
