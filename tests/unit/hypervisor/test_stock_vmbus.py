"""VMBus in the order and with the demands of stock Linux (drivers/hv/connection.c, channel.c, channel_mgmt.c,
vmbus_drv.c): what it waits for without a limit comes, and nothing comes that it would warn of."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TypeVar

import pytest
import pytest_asyncio
from hypervisor_world import PAGE, EchoDevice, RawGuest, World, until

from hypervisor import ChannelState, Offer
from vswitch_wire import door as wire
from vswitch_wire import synic, vmbus
from vswitch_wire.gpadl import GpaRange, encode_gpadl
from vswitch_wire.hypercall import HvStatus
from vswitch_wire.vmbus import VmbusVersion

M = TypeVar("M", bound=vmbus.ChannelMessage)

VERSIONS = [
    VmbusVersion.COPPER,
    VmbusVersion.IRON,
    VmbusVersion.WIN10_RS5,
    VmbusVersion.WIN10_RS4,
    VmbusVersion.WIN10_RS3_1,
    VmbusVersion.WIN10_RS3_0,
    VmbusVersion.WIN10,
    VmbusVersion.WIN8_1,
    VmbusVersion.WIN8,
]
MINIMUM_PAYLOAD = {
    vmbus.OfferChannel: 196,
    vmbus.RescindChannelOffer: 12,
    vmbus.OpenChannelResult: 20,
    vmbus.GpadlCreated: 20,
    vmbus.GpadlTorndown: 12,
    vmbus.VersionResponse: 16,
    vmbus.ModifyChannelResponse: 16,
}
"""channel_message_table[]: a shorter message is dropped with a WARN."""
KNOWN_FROM = {vmbus.TlConnectResult: VmbusVersion.WIN10_RS3_0, vmbus.ModifyChannelResponse: VmbusVersion.IRON}
"""The first version whose guests know the message; others warn of it."""


class StockVmbus:
    """hv_vmbus in one processor: `connect()` to `unload()`, with its checks on what the host sends."""

    def __init__(self, guest: RawGuest) -> None:
        self.guest = guest
        self.version = VmbusVersion.COPPER
        self.connection = 1
        self.offers: dict[int, vmbus.OfferChannel] = {}
        self.rescinded: list[int] = []
        self.handle = 0xE1E10
        self.next_page = 64

    async def take(self) -> vmbus.ChannelMessage:
        """vmbus_on_msg_dpc: the next message, which must be one this version knows, of its full length."""
        message = await self.guest.message()
        assert len(message.pack()) >= MINIMUM_PAYLOAD.get(type(message), 8)
        assert self.version >= KNOWN_FROM.get(type(message), VmbusVersion.WIN8)
        return message

    async def wait(self, kind: type[M]) -> M:
        """wait_for_completion(): offers and rescinds that come meanwhile go to their work queue."""
        while True:
            message = await self.take()
            if isinstance(message, kind):
                return message
            if isinstance(message, vmbus.OfferChannel):
                self.offered(message)
            elif isinstance(message, vmbus.RescindChannelOffer):
                self.rescinded.append(message.relid)
            else:
                assert isinstance(message, vmbus.AllOffersDelivered), message

    def offered(self, offer: vmbus.OfferChannel) -> None:
        """vmbus_onoffer: a second primary of an instance that lives is a WARN."""
        if not offer.sub_channel_index:
            assert offer.instance_id not in [
                entry.instance_id for entry in self.offers.values() if not entry.sub_channel_index
            ]
        assert offer.relid not in self.offers
        assert 1 <= offer.relid <= 2047
        # Otherwise the driver signals through pages that this host does not serve, or ignores the offer.
        assert offer.is_dedicated_interrupt
        assert offer.connection_id
        assert offer.connection_id < 1 << 24
        assert not offer.monitor_allocated
        assert not offer.flags & 6
        self.offers[offer.relid] = offer

    async def post(self, message: vmbus.ChannelMessage) -> None:
        """vmbus_post_msg: only full buffers and unknown connections are tried again; others are errors."""
        for _ in range(100):
            status = await self.guest.post(message, self.connection)
            if status == HvStatus.SUCCESS:
                return
            assert status in (HvStatus.INSUFFICIENT_BUFFERS, HvStatus.INVALID_CONNECTION_ID)
            while self.guest.delivered:
                await self.take()
        raise AssertionError("hv_post_message() failed")

    async def connect(self, max_version: VmbusVersion) -> None:
        """vmbus_connect: newest first, one step down per refusal; interrupt and monitor pages are passed."""
        for version in VERSIONS:
            if version > max_version:
                continue
            self.version = version
            modern = version >= VmbusVersion.WIN10_RS3_1
            self.connection = 4 if modern else 1
            contact = vmbus.InitiateContact(
                version, 0, 2 if modern else 8 * PAGE, 9 * PAGE, 10 * PAGE, client_id=None
            )
            await self.post(contact)
            answer = await self.wait(vmbus.VersionResponse)
            if answer.version_supported:
                if modern:
                    self.connection = answer.selected_version_or_connection_id
                return
        raise AssertionError("no version was accepted")

    async def request_offers(self, count: int) -> list[vmbus.OfferChannel]:
        """vmbus_request_offers, and what comes of it."""
        self.offers.clear()
        await self.post(vmbus.RequestOffers())
        await self.wait(vmbus.AllOffersDelivered)
        assert len(self.offers) == count
        return list(self.offers.values())

    async def establish_gpadl(self, relid: int, pages: int) -> int:
        """__vmbus_establish_gpadl: every message posted before the answer is looked at."""
        self.handle += 1
        pfns = tuple(self.next_page + number for number in range(pages))
        self.next_page += pages
        for message in encode_gpadl(relid, self.handle, (GpaRange(pages * PAGE, 0, pfns),)):
            await self.post(message)
        assert await self.wait(vmbus.GpadlCreated) == vmbus.GpadlCreated(relid, self.handle, 0)
        return self.handle

    async def teardown_gpadl(self, relid: int, handle: int) -> None:
        """vmbus_teardown_gpadl."""
        await self.post(vmbus.GpadlTeardown(relid, handle))
        assert await self.wait(vmbus.GpadlTorndown) == vmbus.GpadlTorndown(handle)

    async def open(self, relid: int, pages: int = 8, vp: int = 0) -> int:
        """vmbus_open: the ring's GPADL; the open id is the relid."""
        handle = await self.establish_gpadl(relid, pages)
        await self.post(vmbus.OpenChannel(relid, relid, handle, vp, pages // 2))
        assert await self.wait(vmbus.OpenChannelResult) == vmbus.OpenChannelResult(relid, relid, 0)
        return handle

    async def close(self, relid: int, ring: int) -> None:
        """vmbus_close_internal."""
        await self.post(vmbus.CloseChannel(relid))
        await self.teardown_gpadl(relid, ring)

    async def release(self, relid: int) -> None:
        """hv_process_channel_removal."""
        self.offers.pop(relid)
        await self.post(vmbus.RelidReleased(relid))

    async def sub_channels(self, count: int) -> list[vmbus.OfferChannel]:
        """The sub-channels of the only device, once there are so many."""
        while True:
            found = [entry for entry in self.offers.values() if entry.sub_channel_index]
            if len(found) >= count:
                return found
            message = await self.take()
            if isinstance(message, vmbus.RescindChannelOffer):
                self.rescinded.append(message.relid)
            else:
                assert isinstance(message, vmbus.OfferChannel)
                self.offered(message)

    async def initiate_unload(self) -> None:
        """vmbus_initiate_unload: below 8.1 nothing is sent."""
        if self.version >= VmbusVersion.WIN8_1:
            await self.post(vmbus.Unload())
            await self.wait(vmbus.UnloadResponse)


@pytest_asyncio.fixture
async def stock(world: World) -> AsyncIterator[StockVmbus]:
    partition = await world.host.create_partition("stock", memory_bytes=64 << 20, vp_count=2)
    guest = await (await RawGuest(partition).attach()).start_synic()
    yield StockVmbus(guest)
    guest.close()


async def offer(stock: StockVmbus) -> tuple[EchoDevice, Offer]:
    device = EchoDevice()
    return device, await stock.guest.partition.vmbus.offer(device)


@pytest.mark.parametrize("version", VERSIONS)
async def test_every_version_a_kernel_can_be_held_to_connects_opens_and_closes(
    stock: StockVmbus, version: VmbusVersion
) -> None:
    device, offered = await offer(stock)
    await stock.connect(version)
    assert stock.version is version
    (channel,) = await stock.request_offers(1)
    ring = await stock.open(channel.relid)
    assert offered.state is ChannelState.OPEN
    if version >= VmbusVersion.WIN10_RS3_0:
        await stock.post(vmbus.ModifyChannel(channel.relid, 1))
        if version >= VmbusVersion.IRON:
            answer = await stock.wait(vmbus.ModifyChannelResponse)
            assert answer == vmbus.ModifyChannelResponse(channel.relid, 0)
    await stock.close(channel.relid, ring)
    await stock.initiate_unload()
    assert device.events == ["open 0", "close 0"]
    assert stock.guest.partition.vmbus.protocol_errors == 0


async def test_the_receive_buffer_of_a_stock_nic_fits_several_times(stock: StockVmbus) -> None:
    # 16 MiB is hv_netvsc's default, 31 MiB what ethtool -G can make of it; the pages may repeat.
    _, offered = await offer(stock)
    await stock.connect(VmbusVersion.IRON)
    await stock.request_offers(1)
    handles = []
    for pages in (4096, 7936, 4096, 256):
        stock.next_page = 64
        handles.append(await stock.establish_gpadl(offered.relid, pages))
    for handle in handles:
        await stock.teardown_gpadl(offered.relid, handle)
    assert stock.guest.partition.vmbus.protocol_errors == 0


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_kernel_that_starts_in_place_of_another_finds_everything_anew(
    stock: StockVmbus, version: VmbusVersion
) -> None:
    # kexec: UNLOAD from 8.1 on, nothing before; the new kernel's contact alone must do.
    device, _ = await offer(stock)
    await stock.connect(version)
    (channel,) = await stock.request_offers(1)
    await stock.open(channel.relid)
    await stock.initiate_unload()
    again = StockVmbus(stock.guest)
    await again.connect(version)
    assert device.events == ["open 0", "close 0"]
    (channel,) = await again.request_offers(1)
    await again.open(channel.relid)
    assert device.events == ["open 0", "close 0", "open 0"]


async def test_hv_vmbus_unloaded_with_a_message_in_its_slot_loads_again(stock: StockVmbus) -> None:
    # vmbus_exit marks itself disconnected first, so it sends no UNLOAD, only the relids it lets go; the
    # message page goes with whatever lies in it.
    guest = stock.guest
    _, offered = await offer(stock)
    await stock.connect(VmbusVersion.IRON)
    (channel,) = await stock.request_offers(1)
    ring = await stock.open(channel.relid)
    await stock.close(channel.relid, ring)
    await stock.release(offered.relid)
    await guest.partition.vmbus.offer(EchoDevice())
    late = await guest.message(eom=False)
    assert isinstance(late, vmbus.OfferChannel)
    for msr, value in (
        (synic.HV_X64_MSR_SINT0 + 2, synic.HV_SINT_MASKED),
        (synic.HV_X64_MSR_SIMP, 0),
        (synic.HV_X64_MSR_SCONTROL, 0),
    ):
        await guest.ask(wire.MsrWrite(0, msr, value))
    guest.send(wire.Eom(0, 2))
    await guest.start_synic()
    again = StockVmbus(guest)
    await again.connect(VmbusVersion.IRON)
    await again.request_offers(2)


async def test_a_rescind_in_the_middle_of_a_probe_leaves_nobody_waiting(stock: StockVmbus) -> None:
    device, offered = await offer(stock)
    await stock.connect(VmbusVersion.IRON)
    (channel,) = await stock.request_offers(1)
    ring = await stock.establish_gpadl(channel.relid, 8)
    device.gate.clear()
    await stock.post(vmbus.OpenChannel(channel.relid, channel.relid, ring, 0, 4))
    await until(lambda: device.events == ["open 0"])
    stock.guest.partition.vmbus._fault(offered.channel, offered.channel.opened, "rescinded by the test")  # type: ignore[arg-type]
    device.gate.set()
    rescind = await stock.take()
    assert rescind == vmbus.RescindChannelOffer(channel.relid)
    # The open ends with the rescind; what its error path still sends is answered.
    await stock.teardown_gpadl(channel.relid, ring)
    await stock.release(channel.relid)
    assert await stock.guest.silent()


async def test_sub_channels_asked_for_before_the_old_ones_are_released_are_offered(
    stock: StockVmbus,
) -> None:
    # A change of MTU closes the primary and asks again; the old sub-channels go by a work queue, later.
    device, offered = await offer(stock)
    await stock.connect(VmbusVersion.IRON)
    (channel,) = await stock.request_offers(1)
    ring = await stock.open(channel.relid)
    device.channels[offered.relid].offer_sub_channels(2)
    rings = {entry.relid: await stock.open(entry.relid) for entry in await stock.sub_channels(2)}
    old = list(rings)
    for relid in old:
        await stock.close(relid, rings[relid])
    await stock.close(channel.relid, ring)
    await stock.open(channel.relid)
    device.channels[offered.relid].offer_sub_channels(2)
    fresh = [entry for entry in await stock.sub_channels(4) if entry.relid not in old]
    assert stock.rescinded == old
    assert [entry.sub_channel_index for entry in fresh] == [1, 2]
    for relid in old:
        await stock.release(relid)
    for entry in fresh:
        await stock.open(entry.relid)
    assert len(stock.guest.partition.vmbus.channels) == 3
    assert stock.guest.partition.vmbus.protocol_errors == 0


async def test_a_primary_opened_while_its_close_is_not_done_opens_after_it(stock: StockVmbus) -> None:
    device, offered = await offer(stock)
    await stock.connect(VmbusVersion.IRON)
    (channel,) = await stock.request_offers(1)
    ring = await stock.open(channel.relid)
    device.channels[offered.relid].offer_sub_channels(1)
    sub = await stock.take()
    assert isinstance(sub, vmbus.OfferChannel)
    await stock.open(sub.relid)
    # The primary's rings are let go at once, the sub-channel's only when its device closes.
    closing = device.close
    first = True

    async def close(opened):  # type: ignore[no-untyped-def]
        nonlocal first
        if first:
            first = False
            await closing(opened)
            device.gate.clear()
        else:
            await closing(opened)

    device.close = close  # type: ignore[method-assign]
    await stock.post(vmbus.CloseChannel(channel.relid))
    await until(lambda: "close 0" in device.events)
    await stock.post(vmbus.OpenChannel(channel.relid, channel.relid, ring, 0, 4))
    assert offered.state is ChannelState.CLOSING
    device.gate.set()
    assert await stock.wait(vmbus.OpenChannelResult) == vmbus.OpenChannelResult(
        channel.relid, channel.relid, 0
    )
    assert device.events == ["open 0", "open 1", "close 0", "close 1", "open 0"]
    await stock.guest.partition.vmbus.rescind(offered)
    assert device.events[-1] == "close 0"


@pytest.mark.parametrize("version", [VmbusVersion.WIN8_1, VmbusVersion.WIN10])
async def test_a_guest_that_does_not_know_the_answer_for_sockets_gets_none(
    stock: StockVmbus, version: VmbusVersion
) -> None:
    await stock.connect(version)
    await stock.post(vmbus.TlConnectRequest(*[entry.class_id for entry in (EchoDevice(), EchoDevice())]))
    assert await stock.guest.silent()
    assert stock.guest.partition.vmbus.protocol_errors == 1
