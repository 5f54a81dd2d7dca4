"""Channels from OFFERCHANNEL to RELID_RELEASED, host and guest half over a real door."""

from __future__ import annotations

import pytest
from hypervisor_world import PAGE, EchoDevice, World, until

from hypervisor import ChannelState
from netvsc.vmbus import ChannelRefusedError
from vswitch_wire import packet
from vswitch_wire.memory import signal_fd
from vswitch_wire.ring import RingReader, RingWriter


async def test_a_packet_goes_through_an_open_channel_and_back(world: World) -> None:
    guest = await (await world.guest()).boot()
    device = EchoDevice()
    await guest.partition.vmbus.offer(device)
    await until(lambda: bool(guest.offers))
    channel = await guest.vmbus.open(guest.offers[0], ring_pages=4)
    pages = channel.ring_pfns
    writer = RingWriter(channel.memory.view(pages[:4], 0, 4 * PAGE))
    reader = RingReader(channel.memory.view(pages[4:], 0, 4 * PAGE))
    seen: list[bytes] = []

    def interrupted() -> None:
        seen.extend(packet.decode(raw).payload for raw in reader.read())
        reader.commit()

    channel.on_interrupt = interrupted
    writer.write(packet.encode_inband(b"through the ring", 7, False))
    assert writer.commit()
    signal_fd(channel.signal_fd)
    await until(lambda: bool(seen))
    assert seen == [b"through the ring"]
    await guest.vmbus.close(channel)
    assert device.events == ["open 0", "close 0"]


async def test_a_refused_open_is_told_to_the_guest(world: World) -> None:
    guest = await (await world.guest()).boot()
    device = EchoDevice()
    device.refuse = "not today"
    offer = await guest.partition.vmbus.offer(device)
    await until(lambda: bool(guest.offers))
    with pytest.raises(ChannelRefusedError):
        await guest.vmbus.open(guest.offers[0], ring_pages=2)
    assert offer.state is ChannelState.CLOSED
