"""Sub-channels and receive-side scaling: granted, opened, used, closed in any order."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator

import pytest
from scripted_guest import (
    ENGINES,
    MAC,
    PEER,
    RECEIVE_PAGE,
    RING_PAGES,
    SUB_RING_PAGE,
    ScriptedGuest,
    SubChannel,
    ethernet,
    rndis_packet,
)

from hypervisor.vmbus.device import ChannelRefused
from netvsp.rss import Rss
from vswitch.drops import DropReason
from vswitch.endpoint import Checksum, Frame, Offload
from vswitch_wire import ndis, nvsp, packet, rndis

PAGE = 4096
# "Verifying the RSS hash calculation", Windows driver documentation.
KEY = bytes.fromhex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")
TYPES = 0x1 | 0x100 | 0x200 | 0x400 | 0x1000
RSS_PARAMETERS = 0x00010204
INVALID_DATA = 0xC0010015


@pytest.fixture(params=ENGINES)
async def guest(request: pytest.FixtureRequest) -> AsyncIterator[ScriptedGuest]:
    scripted = ScriptedGuest(request.param, queues=4)
    yield scripted
    await scripted.close()


def tcp(source: int, sport: int, *, payload: bytes = b"hello") -> bytes:
    """TCP over IPv4 from 10.0.0.`source` to the guest."""
    head = struct.pack(
        ">BBHHHBBH4B4B", 0x45, 0, 40 + len(payload), 1, 0, 64, 6, 0, 10, 0, 0, source, 10, 0, 0, 99
    )
    return ethernet(
        head + struct.pack(">HHIIBBHHH", sport, 80, 1, 1, 0x50, 0x18, 99, 0, 0) + payload,
        dst=MAC,
        src=PEER,
        ethertype=0x800,
    )


def parameters(table: tuple[int, ...], *, flags: int = 0, key: bytes = KEY, types: int = TYPES) -> bytes:
    return ndis.RssParameters(flags, 0, types, table, key).pack()


async def grant(guest: ScriptedGuest, count: int) -> tuple[int, int]:
    answer = nvsp.decode(await guest.ask(nvsp.SubchannelRequest(1, count).pack(40)))
    # Request and answer have one number.
    status, granted = struct.unpack_from("<2I", answer.pack(40), 4)
    return status, granted


async def spread(guest: ScriptedGuest, count: int = 3) -> list[SubChannel]:
    """Up with `count` sub-channels open, RSS set as Linux does."""
    await guest.up()
    assert await grant(guest, count) == (1, count)
    assert guest.offered == [count]
    subs = [await guest.open_sub(index) for index in range(1, count + 1)]
    table = tuple(entry % (count + 1) for entry in range(128))
    assert await guest.set(RSS_PARAMETERS, parameters(table, flags=0x10)) == 0
    assert await guest.set(RSS_PARAMETERS, parameters(table)) == 0
    await guest.pump()
    guest.take()
    return subs


def data_of(guest: ScriptedGuest, inbox: list[packet.Packet]) -> list[tuple[int, list[rndis.Packet]]]:
    out = []
    for entry in inbox:
        assert entry.type == packet.VM_PKT_DATA_USING_XFER_PAGES
        messages = [
            rndis.Packet.unpack(guest.memory.read(RECEIVE_PAGE * PAGE + piece.byte_offset, piece.byte_count))
            for piece in entry.transfer_ranges
        ]
        out.append((entry.transaction_id, messages))
    return out


def record(message: rndis.Packet, kind: int) -> int | None:
    values = [entry.value for entry in message.ppi if entry.type == kind]
    return values[0] if values else None


async def test_capabilities_tell_how_many_queues_there_are(guest: ScriptedGuest) -> None:
    await guest.up()
    answer = await guest.query(0x00010203)
    assert len(answer.info) == 18
    assert ndis.RssCapabilities.unpack(answer.info).receive_queues == 4


@pytest.mark.parametrize("count", [0, 4, 0xFFFFFFFF])
async def test_a_request_for_none_or_too_many_is_refused_whole(guest: ScriptedGuest, count: int) -> None:
    await guest.up()
    assert await grant(guest, count) == (2, 0)
    assert guest.offered == []
    assert await grant(guest, 3) == (1, 3)
    assert await grant(guest, 1) == (2, 0)


async def test_the_send_table_follows_when_every_sub_channel_is_open(guest: ScriptedGuest) -> None:
    await guest.up()
    assert await grant(guest, 2) == (1, 2)
    await guest.open_sub(2)
    await guest.pump()
    assert guest.take() == []
    await guest.open_sub(1)
    await guest.pump()
    (entry,) = guest.take()
    assert (entry.type, entry.completion_requested) == (packet.VM_PKT_DATA_INBAND, False)
    message = nvsp.decode(entry.payload)
    assert isinstance(message, nvsp.SendIndirectionTable)
    assert message.table == (0, 1, 2) * 5 + (0,)
    # Linux before NVSP 6.1 takes a message of 104 bytes or more for one with its table at 40.
    assert (message.offset, len(entry.payload)) == (12, 80)


async def test_one_that_was_not_granted_is_not_opened(guest: ScriptedGuest) -> None:
    with pytest.raises(ChannelRefused, match="primary channel is closed"):
        await guest.open_sub(1)
    await guest.up()
    with pytest.raises(ChannelRefused, match="sub-channel 1 of 0"):
        await guest.open_sub(1)
    assert await grant(guest, 1) == (1, 1)
    with pytest.raises(ChannelRefused, match="sub-channel 2 of 1"):
        await guest.open_sub(2)
    await guest.open_sub(1)
    with pytest.raises(ChannelRefused, match="open already"):
        await guest.nic.open(guest.subs[1].opened)
    assert guest.nic.state.open_queues == 2


async def test_frames_go_where_hash_and_table_say_and_carry_the_hash(guest: ScriptedGuest) -> None:
    subs = await spread(guest)
    rss = Rss(KEY, tuple(entry % 4 for entry in range(128)), TYPES)
    frames = [tcp(source, 1000 + source * source * 37) for source in range(1, 33)]
    assert guest.deliver(*[Frame(frame) for frame in frames]) == [None] * 32
    await guest.pump()
    found = 0
    for index, inbox in enumerate([guest.take()] + [sub.take() for sub in subs]):
        for _, messages in data_of(guest, inbox):
            for message in messages:
                placed = rss.place(message.data)
                assert placed is not None
                assert placed[0] == index
                assert record(message, rndis.NBL_HASH_VALUE) == placed[1]
                assert record(message, rndis.NBL_HASH_INFO) == 0x200 | 1
                found += 1
    assert found == 32
    counters = guest.nic.queue_stats()
    assert [queue.get("frames_to_guest", 0) > 0 for queue in counters] == [True] * 4
    assert sum(queue["frames_to_guest"] for queue in counters) == guest.nic.stats()["frames_to_guest"] == 32


async def test_what_has_no_hash_and_all_without_rss_goes_to_the_primary(guest: ScriptedGuest) -> None:
    subs = await spread(guest)
    arp = ethernet(dst=MAC, src=PEER, ethertype=0x806)
    assert guest.deliver(Frame(arp)) == [None]
    await guest.pump()
    ((transaction_id, (message,)),) = data_of(guest, guest.take())
    assert record(message, rndis.NBL_HASH_VALUE) is None
    guest.give_back(transaction_id)
    assert await guest.set(RSS_PARAMETERS, parameters((1,) * 128, flags=0x10)) == 0
    assert guest.deliver(*[Frame(tcp(source, 7)) for source in range(1, 17)]) == [None] * 16
    await guest.pump()
    messages = [message for _, group in data_of(guest, guest.take()) for message in group]
    assert len(messages) == 16
    assert {record(message, rndis.NBL_HASH_VALUE) for message in messages} == {None}
    assert [sub.take() for sub in subs] == [[], [], []]


async def test_a_table_may_be_kept_and_the_key_changed(guest: ScriptedGuest) -> None:
    await spread(guest)
    assert await guest.set(RSS_PARAMETERS, parameters((4,))) == INVALID_DATA
    assert await guest.set(RSS_PARAMETERS, parameters((), flags=0x4, key=bytes(39) + b"\1")) == 0
    assert await guest.set(RSS_PARAMETERS, parameters((3,) * 16, flags=0x8, key=b"")) == 0
    assert await guest.set(RSS_PARAMETERS, parameters((1,), types=2)) == INVALID_DATA
    assert guest.deliver(*[Frame(tcp(source, 7)) for source in range(1, 5)]) == [None] * 4
    await guest.pump()
    assert sum(len(group) for _, group in data_of(guest, guest.subs[3].take())) == 4


async def test_a_sub_channel_sends_and_is_completed_on_itself(guest: ScriptedGuest) -> None:
    subs = await spread(guest)
    for index, sub in enumerate(subs):
        message = rndis_packet(ethernet(bytes([index]) * 60))
        guest.put_section(index, message)
        body = nvsp.SendRndisPacket(0, index, len(message)).pack(32)
        sub.post(packet.encode_inband(body, 77, True))
    await guest.pump()
    assert sorted(bytes(frame.data)[14] for frame in guest.frames) == [0, 1, 2]
    for sub in subs:
        (answer,) = sub.take()
        assert (answer.type, answer.transaction_id) == (packet.VM_PKT_COMP, 77)
        assert struct.unpack_from("<2I", answer.payload) == (108, 1)
    assert guest.take() == []
    assert [queue.get("frames_from_guest", 0) for queue in guest.nic.queue_stats()] == [0, 1, 1, 1]


async def test_control_belongs_on_the_primary(guest: ScriptedGuest) -> None:
    (sub,) = await spread(guest, 1)
    message = rndis.KeepAlive(1).pack()
    guest.put_section(0, message)
    sub.post(packet.encode_inband(nvsp.SendRndisPacket(1, 0, len(message)).pack(32), 5, True))
    await guest.pump()
    (answer,) = sub.take()
    assert struct.unpack_from("<2I", answer.payload) == (108, 2)
    assert guest.faults == []
    sub.post(packet.encode_inband(nvsp.SwitchDataPath(0).pack(40), 6, True))
    await guest.pump()
    assert len(guest.faults) == 1
    assert "sub-channel" in guest.faults[0]


async def test_receive_packets_are_given_back_where_they_came(guest: ScriptedGuest) -> None:
    subs = await spread(guest)
    assert await guest.set(RSS_PARAMETERS, parameters((2,))) == 0
    assert guest.deliver(Frame(tcp(1, 1))) == [None]
    await guest.pump()
    ((transaction_id, _),) = data_of(guest, subs[1].take())
    body = nvsp.SendRndisPacketComplete(1).pack(32)
    subs[1].post(packet.encode_completion(transaction_id, body))
    await guest.pump()
    assert guest.faults == []
    subs[0].post(packet.encode_completion(transaction_id, body))
    await guest.pump()
    assert len(guest.faults) == 1
    assert "matches no packet" in guest.faults[0]


async def test_a_closed_sub_channel_gives_its_buffers_back_and_its_frames_go_to_the_primary(
    guest: ScriptedGuest,
) -> None:
    await spread(guest)
    assert guest.section is not None
    assert await guest.set(RSS_PARAMETERS, parameters((3,))) == 0
    room = guest.section.count - 16
    for _ in range(3):
        # All that the receive buffer holds goes out by sub-channel 3 and never comes back by itself.
        verdicts: list[DropReason | None] = []
        for number in range(room):
            verdicts += guest.deliver(Frame(tcp(1, number)))
            if number % 50 == 0:
                await guest.pump()
        assert verdicts == [None] * room
        assert guest.deliver(Frame(tcp(1, 1))) == [DropReason.RESOURCES]
        await guest.close_sub(3)
        ring = guest.memory.read((SUB_RING_PAGE + 4 * RING_PAGES) * PAGE, 2 * RING_PAGES * PAGE)
        assert guest.deliver(Frame(tcp(1, 2))) == [None]
        await guest.pump()
        ((transaction_id, _),) = data_of(guest, guest.take())
        guest.give_back(transaction_id)
        await guest.pump()
        assert guest.memory.read((SUB_RING_PAGE + 4 * RING_PAGES) * PAGE, 2 * RING_PAGES * PAGE) == ring
        await guest.open_sub(3)
        await guest.pump()
        guest.take()
    assert guest.faults == []


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2,)])
async def test_sub_channels_close_in_any_order_under_traffic(
    guest: ScriptedGuest, order: tuple[int, ...]
) -> None:
    await spread(guest)
    for index in order:
        for source in range(1, 40):
            guest.deliver(Frame(tcp(source, index)))
        message = rndis_packet(ethernet(b"x" * 60))
        guest.put_section(0, message)
        body = nvsp.SendRndisPacket(0, 0, len(message)).pack(32)
        for sub in guest.subs.values():
            if sub.opened.sub_channel_index not in order[: order.index(index)]:
                sub.post(packet.encode_inband(body, 9, True))
        await guest.close_sub(index)
    assert guest.nic.state.open_queues == 4 - len(order)
    assert guest.deliver(Frame(tcp(1, 1))) == [None]
    await guest.pump()
    assert guest.faults == []


async def test_the_primary_may_close_first_or_meanwhile(guest: ScriptedGuest) -> None:
    await spread(guest)
    closing = asyncio.ensure_future(guest.nic.close(guest.subs[1].opened))
    await asyncio.sleep(0)
    await guest.nic.close(guest.opened)
    await asyncio.wait_for(closing, 1)
    await asyncio.wait_for(guest.nic.close(guest.subs[2].opened), 1)
    assert not guest.nic.state.open


async def test_a_lost_channel_closes_its_sub_channels_before_the_primary(guest: ScriptedGuest) -> None:
    subs = await spread(guest)
    # A write index that is no multiple of 8.
    guest.memory.write((SUB_RING_PAGE + 2 * RING_PAGES) * PAGE, struct.pack("<I", 12))
    await guest.pump()
    assert len(guest.faults) == 1
    for index in (1, 2, 3):
        await asyncio.wait_for(guest.close_sub(index), 2)
    assert subs[0].take() == []


async def test_a_reopened_nic_negotiates_its_queues_anew(guest: ScriptedGuest) -> None:
    await spread(guest)
    for index in (1, 2, 3):
        await guest.close_sub(index)
    await guest.nic.close(guest.opened)
    assert guest.nic.queue_stats() == []
    state = guest.nic.state
    assert (state.queues, state.open_queues, state.rss) == (4, 0, False)


async def test_a_nic_retires_when_its_guest_is_quiet(guest: ScriptedGuest) -> None:
    subs = await spread(guest)
    message = rndis_packet(ethernet(b"x" * 60))
    guest.put_section(0, message)
    body = nvsp.SendRndisPacket(0, 0, len(message)).pack(32)
    retiring = asyncio.ensure_future(guest.nic.retire())
    for _ in range(5):
        subs[0].post(packet.encode_inband(body, 9, True))
        await guest.pump()
        await asyncio.sleep(0.1)
        assert not retiring.done()
    while not retiring.done():
        await guest.pump()
    # Every packet was completed, and the guest was told that its link is down.
    assert len(subs[0].take()) == 5
    told = [rndis.decode(entry) for _, group in guest.received() for entry in group]
    assert told == [rndis.IndicateStatus(rndis.RNDIS_STATUS_MEDIA_DISCONNECT, b"")]
    assert guest.ingress_drops[DropReason.DISCONNECTED] >= 4


async def test_a_large_send_stays_on_one_queue(guest: ScriptedGuest) -> None:
    subs = await spread(guest)
    assert await guest.set(RSS_PARAMETERS, parameters((1,))) == 0
    large = Frame(tcp(1, 1, payload=b"p" * 5000), Offload(Checksum.PARTIAL, l4_offset=34, mss=1000))
    assert guest.deliver(large) == [None]
    await guest.pump()
    ((_, messages),) = data_of(guest, subs[0].take())
    assert len(messages) == 5
    assert len({record(message, rndis.NBL_HASH_VALUE) for message in messages}) == 1
