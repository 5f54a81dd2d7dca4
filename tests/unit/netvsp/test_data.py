"""Frames through the data channel: what the guest sends, what it gets, and what is refused why."""

from __future__ import annotations

import asyncio
import os
import struct

import pytest
from scripted_guest import (
    MAC,
    PAGE,
    PEER,
    RECEIVE_GPADL,
    RING_PAGES,
    SECTION,
    SEND_PAGE,
    ScriptedGuest,
    ethernet,
    rndis_packet,
)

from vswitch.drops import DropReason
from vswitch.endpoint import Frame
from vswitch_wire import nvsp, packet, rndis

TOWARDS = ethernet(dst=MAC, src=PEER)
ONE_RANGE = 72
"""Bytes in the ring of a receive packet of one frame, with its trailer; each further frame takes 8."""


def padded(message: bytes, size: int) -> bytes:
    """The message with its RNDIS length raised to `size`, as a sender that aggregates does."""
    return message[:4] + size.to_bytes(4, "little") + message[8:].ljust(size - 8, b"\0")


async def test_a_frame_in_a_send_section_reaches_the_switch_and_is_completed_once(
    guest: ScriptedGuest,
) -> None:
    await guest.up()
    sent = guest.send_rndis(rndis_packet(ethernet()))
    await guest.pump()
    assert [bytes(frame.data) for frame in guest.frames] == [ethernet()]
    assert guest.completion_status(sent) == 1
    assert guest.take() == []


@pytest.mark.parametrize(("pieces", "section_bytes"), [(1, 0), (3, 0), (1, 44), (4, 60)])
async def test_section_bytes_and_gpa_ranges_make_one_message(
    guest: ScriptedGuest, pieces: int, section_bytes: int
) -> None:
    await guest.up()
    frame = ethernet(bytes(range(256)) * 5)
    sent = guest.send_direct(rndis_packet(frame), pieces=pieces, section_bytes=section_bytes)
    await guest.pump()
    assert [bytes(f.data) for f in guest.frames] == [frame]
    assert guest.completion_status(sent) == 1


async def test_up_to_eight_messages_of_one_packet_are_eight_frames_and_one_completion(
    guest: ScriptedGuest,
) -> None:
    await guest.up()
    frames = [ethernet(bytes([number]) * 51) for number in range(8)]
    messages = [rndis_packet(frame) for frame in frames]
    size = -(-len(messages[0]) // 8) * 8
    data = b"".join(padded(message, size) for message in messages[:-1]) + messages[-1]
    sent = guest.send_rndis(data)
    await guest.pump()
    assert [bytes(f.data) for f in guest.frames] == frames
    assert guest.completion_status(sent) == 1


async def test_a_ninth_message_is_malformed_and_the_eight_before_it_go_through(guest: ScriptedGuest) -> None:
    await guest.up()
    sent = guest.send_rndis(rndis_packet(ethernet(b"y" * 50)) * 9)
    await guest.pump()
    assert len(guest.frames) == 8
    assert guest.completion_status(sent) == 2
    assert guest.ingress_drops == {DropReason.INVALID_PACKET: 1}


async def test_out_of_band_tag_and_hash_travel_with_the_frame(guest: ScriptedGuest) -> None:
    await guest.up()
    tag = rndis.ppi_u32(rndis.IEEE_8021Q_INFO, rndis.vlan_info_from_tci(0xB064))
    value = rndis.ppi_u32(rndis.NBL_HASH_VALUE, 0xDEADBEEF)
    guest.send_rndis(rndis_packet(ethernet(), value, tag))
    await guest.pump()
    (frame,) = guest.frames
    assert (frame.vlan_tci, frame.hash) == (0xB064, 0xDEADBEEF)
    assert guest.deliver(Frame(TOWARDS, vlan_tci=0xB064)) == [None]
    await guest.pump()
    ((_, (message,)),) = guest.received()
    received = rndis.Packet.unpack(message)
    assert received.data == TOWARDS
    assert [(record.type, rndis.vlan_tci_from_info(record.value)) for record in received.ppi] == [(6, 0xB064)]


HEADER = 44


@pytest.mark.parametrize(
    ("change", "at"),
    [
        (struct.pack("<I", 2), 0),  # not a PACKET
        (struct.pack("<I", 43), 4),  # length below the header
        (struct.pack("<I", 0xFFFFFFFF), 4),  # length beyond the data
        (struct.pack("<I", 35), 8),  # frame inside the header
        (struct.pack("<I", 0xFFFFFFF0), 8),  # offset + length overflow 32 bits
        (struct.pack("<I", 13), 12),  # shorter than an Ethernet header
        (struct.pack("<I", 0), 12),
        (struct.pack("<I", 0xFFFFFFFF), 12),
        (struct.pack("<I", 8), 16),  # out-of-band data
        (struct.pack("<I", 1), 24),
        (struct.pack("<2I", 36, 16), 28),  # per-packet info over the frame's end
        (struct.pack("<2I", 37, 4), 28),  # unaligned
        (struct.pack("<2I", 0xFFFFFFFC, 8), 28),
        (struct.pack("<I", 1), 36),  # VC handle
    ],
)
async def test_a_malformed_data_message_is_status_2_a_drop_and_nothing_more(
    guest: ScriptedGuest, change: bytes, at: int
) -> None:
    await guest.up()
    good = bytearray(rndis_packet(ethernet()))
    good[at : at + len(change)] = change
    sent = guest.send_rndis(bytes(good))
    after = guest.send_rndis(rndis_packet(ethernet(b"after" * 10)), section=1)
    await guest.pump()
    assert guest.completion_status(sent) == 2
    assert guest.completion_status(after) == 1
    assert [bytes(f.data) for f in guest.frames] == [ethernet(b"after" * 10)]
    assert guest.ingress_drops == {DropReason.INVALID_PACKET: 1}
    assert not guest.faults


@pytest.mark.parametrize(
    "body",
    [
        nvsp.SendRndisPacket(0, 64 * 4096 // SECTION + 1, 60),
        nvsp.SendRndisPacket(0, 0xFFFFFFFE, 60),
        nvsp.SendRndisPacket(0, 0, 64 * 4096 + 1),
        nvsp.SendRndisPacket(0, 0, 0xFFFFFFFF),
        nvsp.SendRndisPacket(0, 0x80000000, 0),
        nvsp.SendRndisPacket(0, 0, 0),
        nvsp.SendRndisPacket(0, 0xFFFFFFFF, 60),
        nvsp.SendRndisPacket(2, 0, 100),
        nvsp.SendRndisPacket(1, 0, 7),
    ],
)
async def test_a_section_outside_the_send_buffer_is_status_2(
    guest: ScriptedGuest, body: nvsp.SendRndisPacket
) -> None:
    await guest.up()
    guest.put_section(0, rndis_packet(ethernet()))
    sent = guest.inband(body.pack(32))
    await guest.pump()
    assert guest.completion_status(sent) == 2
    assert guest.frames == []
    assert not guest.faults


async def test_gpa_ranges_outside_guest_memory_or_too_many_are_status_2(guest: ScriptedGuest) -> None:
    from vswitch_wire.gpadl import GpaRange

    await guest.up()
    body = nvsp.SendRndisPacket(0).pack(32)
    for number, ranges in enumerate(
        [
            (GpaRange(60, 0, (1 << 40,)),),
            (GpaRange(60, 4090, (700, 1 << 30)),),
            tuple(GpaRange(1, 0, (700,)) for _ in range(65)),
            (GpaRange(4096 * 129, 0, (700,) * 129),),
        ]
    ):
        guest.post(packet.encode_gpa_direct(5000 + number, ranges, body))
        await guest.pump()
        assert guest.completion_status(5000 + number) == 2
    assert guest.frames == []
    assert not guest.faults


async def test_a_gpa_direct_packet_with_a_lying_range_count_is_status_2(guest: ScriptedGuest) -> None:
    await guest.up()
    for number, count in enumerate((0, 2, 0xFFFFFFFF)):
        head = struct.pack("<HHHHQ", 9, 5, 9, 1, 600 + number) + struct.pack("<2I", 0, count)
        guest.post(head + struct.pack("<2IQ", 60, 0, 700)[:16] + nvsp.SendRndisPacket(0).pack(32))
        await guest.pump()
        assert guest.completion_status(600 + number) == 2
    assert not guest.faults


async def test_data_before_rndis_is_initialised_is_refused_as_not_ready(guest: ScriptedGuest) -> None:
    await guest.open()
    await guest.negotiate()
    sent = guest.send_rndis(rndis_packet(ethernet()))
    await guest.pump()
    assert guest.completion_status(sent) == 2
    assert guest.ingress_drops == {DropReason.NOT_READY: 1}
    assert guest.deliver(Frame(TOWARDS)) == [DropReason.NOT_READY]


async def test_a_header_rewritten_after_the_verdict_is_not_delivered(guest: ScriptedGuest) -> None:
    await guest.up()
    guest.send_rndis(rndis_packet(ethernet()))
    guest.send_direct(rndis_packet(ethernet(b"direct" * 40)))
    frames = guest.port.endpoint.receive(64)
    guest.memory.write(SEND_PAGE * 4096, b"\xee" * 4096)
    guest.memory.write(640 * 4096, b"\xee" * 8192)
    assert [bytes(frame.data)[:14] for frame in frames] == [ethernet()[:14]] * 2
    guest.port.endpoint.flush()


async def test_frames_towards_the_guest_arrive_batched_and_their_slots_come_back(
    guest: ScriptedGuest,
) -> None:
    await guest.up()
    frames = [ethernet(bytes([number]) * 60, dst=MAC, src=PEER) for number in range(10)]
    assert guest.deliver(*(Frame(data) for data in frames)) == [None] * 10
    await guest.pump()
    ((transaction_id, messages),) = guest.received()
    assert [rndis.Packet.unpack(message).data for message in messages] == frames
    assert guest.section is not None
    assert transaction_id < guest.section.count
    guest.give_back(transaction_id)
    await guest.pump()
    assert guest.nic.stats()["frames_to_guest"] == 10
    assert guest.nic.stats()["bytes_to_guest"] == 740


async def test_out_of_slots_is_a_counted_drop_and_control_still_gets_through(guest: ScriptedGuest) -> None:
    await guest.up()
    assert guest.section is not None
    verdicts: list[DropReason | None] = []
    for _ in range(guest.section.count):
        verdicts += guest.deliver(Frame(TOWARDS))
        guest.read()
    taken = guest.section.count - 16
    assert verdicts == [None] * taken + [DropReason.RESOURCES] * 16
    held = guest.received()
    assert (await guest.query(0x01010101)).info == guest.nic.mac
    assert struct.unpack("<Q", (await guest.query(0x00020105)).info) == (16,)
    for number, (transaction_id, _) in enumerate(held):
        guest.give_back(transaction_id)
        if number % 32 == 31:  # before the ring is full of them
            await guest.pump()
    await guest.pump()
    assert guest.deliver(Frame(TOWARDS)) == [None]


async def test_a_full_ring_towards_the_guest_drops_frames_and_keeps_completions(guest: ScriptedGuest) -> None:
    await guest.up()
    verdicts = []
    while not verdicts or verdicts[-1] is None:
        verdicts += guest.deliver(Frame(TOWARDS))
        assert len(verdicts) < 2000
    assert verdicts[-1] == DropReason.RESOURCES
    sent = [guest.send_rndis(rndis_packet(ethernet()), section=0) for _ in range(20)]
    await guest.pump()
    await guest.pump()
    assert [guest.completion_status(number) for number in sent] == [1] * 20
    assert len(guest.frames) == 20
    assert not guest.faults


def room(guest: ScriptedGuest) -> int:
    """Bytes free in the ring towards the guest."""
    size = (RING_PAGES - 1) * PAGE
    write, read = (guest.memory.load_u32((1 + RING_PAGES) * PAGE + at) for at in (0, 4))
    return size - (write - read) % size


def leave_room(guest: ScriptedGuest, wanted: int) -> None:
    """Fills the ring towards the guest until just `wanted` bytes are free."""
    while room(guest) - wanted >= 2 * ONE_RANGE:
        assert guest.deliver(Frame(TOWARDS)) == [None]
    more = (room(guest) - wanted - ONE_RANGE) // 8
    assert guest.deliver(*[Frame(TOWARDS)] * (1 + more)) == [None] * (1 + more)
    assert room(guest) == wanted


async def ask_the_name(guest: ScriptedGuest) -> int:
    """The guest asks for the longest answer there is, and the host hands it to the data path."""
    sent = guest.inband(nvsp.OidQueryEx(0x96, 1, 12, 0x00020216).pack(40))
    guest.port.endpoint.receive(64)
    await asyncio.sleep(0.005)
    return sent


async def test_a_long_answer_takes_no_room_that_frames_were_promised(guest: ScriptedGuest) -> None:
    await guest.up()
    sent = await ask_the_name(guest)
    await guest.pump()
    (answer,) = [entry for entry in guest.take() if entry.transaction_id == sent]
    length = len(packet.encode_completion(sent, answer.payload)) + 8
    assert length > 500
    leave_room(guest, length + 48)
    await ask_the_name(guest)
    assert guest.deliver(Frame(TOWARDS)) == [DropReason.RESOURCES]
    assert not guest.faults
    assert room(guest) == 48
    guest.read()
    await guest.pump()
    assert guest.deliver(Frame(TOWARDS)) == [None]
    assert not guest.faults


async def test_nothing_goes_past_an_answer_that_waits_for_room(guest: ScriptedGuest) -> None:
    await guest.up()
    leave_room(guest, 200)
    sent = await ask_the_name(guest)
    guest.port.endpoint.flush()
    await guest.nic.set_link(False)
    await guest.nic.set_link(True)
    assert guest.deliver(Frame(TOWARDS)) == [DropReason.RESOURCES]
    assert room(guest) == 200
    wanted = guest.memory.load_u32((1 + RING_PAGES) * PAGE + 12)
    before = len(guest.read().inbox)
    await guest.pump()
    answer, *told = guest.take()[before:]
    assert answer.transaction_id == sent
    assert wanted == len(packet.encode_completion(sent, answer.payload)) + 8
    assert len(told) == 2
    assert not guest.faults


async def test_sub_allocations_that_came_back_are_filled_in_the_same_order(guest: ScriptedGuest) -> None:
    await guest.up()
    orders = []
    for _ in range(3):
        assert guest.deliver(*[Frame(TOWARDS)] * 4) == [None] * 4
        (entry,) = guest.read().take()
        orders.append([piece.byte_offset for piece in entry.transfer_ranges])
        guest.give_back(entry.transaction_id)
        await guest.pump()
    assert orders[0] == sorted(orders[0])
    assert orders[1:] == orders[:1] * 2


async def test_messages_with_long_headers_are_taken_one_by_one(guest: ScriptedGuest) -> None:
    await guest.up()
    # Info that nobody acts upon, longer than what is copied of a message at first.
    record = rndis.PerPacketInfo(0x7FFFFFFF, bytes(400))
    frames = [ethernet(bytes([number]) * (60 + 8 * number)) for number in range(8)]
    whole = b"".join(padded(rndis_packet(frame, record), 600) for frame in frames)
    sent = guest.send_rndis(whole)
    await guest.pump()
    assert guest.completion_status(sent) == 1
    assert [bytes(frame.data) for frame in guest.frames] == frames


@pytest.mark.parametrize(
    ("bits", "destination", "taken"),
    [
        (0x0D, MAC, True),
        (0x0D, b"\xff" * 6, True),
        (0x0D, bytes.fromhex("333300000001"), True),
        (0x0D, PEER, False),
        (0x20, PEER, True),
        (0x01, b"\xff" * 6, False),
        (0x08, MAC, False),
        (0x02, bytes.fromhex("01005e000001"), True),
        (0x01, bytes.fromhex("01005e000001"), False),
    ],
)
async def test_the_packet_filter_decides_what_is_delivered(
    guest: ScriptedGuest, bits: int, destination: bytes, taken: bool
) -> None:
    await guest.up(packet_filter=bits)
    verdict = guest.deliver(Frame(ethernet(dst=destination, src=PEER)))
    assert verdict == [None if taken else DropReason.FAILED_PACKET_FILTER]


async def test_without_a_filter_nothing_is_delivered_and_control_is_answered(guest: ScriptedGuest) -> None:
    await guest.up(packet_filter=0)
    assert guest.deliver(Frame(TOWARDS)) == [DropReason.NOT_READY]
    assert (await guest.query(0x00010114)).info == bytes(4)


async def test_a_frame_above_the_mtu_is_dropped_as_such(guest: ScriptedGuest) -> None:
    await guest.up()
    assert guest.deliver(Frame(ethernet(bytes(1500), dst=MAC))) == [None]
    assert guest.deliver(Frame(ethernet(bytes(1501), dst=MAC))) == [DropReason.MTU_MISMATCH]
    tagged = MAC + PEER + b"\x81\x00\x00\x05\x88\xb5" + bytes(1500)
    assert guest.deliver(Frame(tagged)) == [None]
    assert guest.nic.drops() == {int(DropReason.MTU_MISMATCH): 1}


async def test_a_link_that_is_down_drops_and_tells_the_guest(guest: ScriptedGuest) -> None:
    await guest.up()
    await guest.nic.set_link(False)
    await guest.pump()
    (told,) = await guest.answers()
    assert told == rndis.IndicateStatus(0x4001000C)
    assert (await guest.query(0x00010114)).info == b"\1\0\0\0"
    assert guest.deliver(Frame(TOWARDS)) == [DropReason.DISCONNECTED]
    await guest.nic.set_link(True)
    await guest.nic.set_link(True)
    await guest.pump()
    assert await guest.answers() == [rndis.IndicateStatus(0x4001000B)]
    assert guest.deliver(Frame(TOWARDS)) == [None]


@pytest.mark.parametrize("transaction_id", [0, 5, 0xFFFFFFFF])
async def test_completing_a_receive_packet_that_was_never_sent_costs_the_channel(
    guest: ScriptedGuest, transaction_id: int
) -> None:
    await guest.up()
    guest.give_back(transaction_id)
    await guest.pump()
    assert len(guest.faults) == 1
    assert "matches no packet" in guest.faults[0]
    assert guest.deliver(Frame(TOWARDS)) == [DropReason.VMBUS_ERROR]


async def test_one_signal_per_batch_and_none_while_the_guest_masks(guest: ScriptedGuest) -> None:
    await guest.up()
    os.eventfd_read(guest.irq)
    guest.deliver(*(Frame(TOWARDS) for _ in range(20)))
    assert os.eventfd_read(guest.irq) == 1
    await guest.pump()
    guest.reader.mask()
    guest.deliver(Frame(TOWARDS))
    with pytest.raises(BlockingIOError):
        os.eventfd_read(guest.irq)


async def test_the_tap_records_ring_packets_both_ways_and_nothing_when_off(guest: ScriptedGuest) -> None:
    await guest.up()
    assert guest.nic.take_tapped() == []
    guest.nic.tap(True)
    sent = guest.send_rndis(rndis_packet(ethernet()))
    await guest.pump()
    tapped = guest.nic.take_tapped()
    assert [direction for _, direction, _ in tapped] == ["in", "out"]
    assert all(timestamp > 0 for timestamp, _, _ in tapped)
    kinds = [packet.decode(data) for _, _, data in tapped]
    assert [(entry.type, entry.transaction_id) for entry in kinds] == [(6, sent), (11, sent)]
    guest.nic.tap(False)
    guest.send_rndis(rndis_packet(ethernet()))
    await guest.pump()
    assert guest.nic.take_tapped() == []


async def test_a_flood_of_control_messages_is_refused_and_answered_in_order(guest: ScriptedGuest) -> None:
    await guest.up()
    message = rndis.KeepAlive(1).pack()
    guest.put_section(0, message)
    body = nvsp.SendRndisPacket(1, 0, len(message)).pack(32)
    first = guest.next_id
    for _ in range(300):
        guest.inband(body)
    endpoint = guest.port.endpoint
    for _ in range(20):
        endpoint.receive(64)
    endpoint.flush()
    guest.inbox += [packet.decode(bytes(raw)) for raw in guest.reader.read(10_000)]
    guest.reader.commit()
    statuses = [guest.completion_status(first + number) for number in range(300)]
    assert statuses == [1] * 256 + [2] * 44
    # However much the guest has sent: it waits for its buffer.
    session = guest.nic._session
    assert session is not None
    session.data.revoke_send_buffer()
    endpoint.receive(64)
    *messages, notice = session.data.take_control()
    assert (len(messages), notice[0], notice[3]) == (256, "revoked", b"send")
    assert not guest.faults


async def test_close_lets_go_of_memory_while_frames_are_on_their_way(guest: ScriptedGuest) -> None:
    await guest.up()
    guest.deliver(Frame(TOWARDS))
    guest.send_rndis(rndis_packet(ethernet()))
    endpoint = guest.port.endpoint
    await guest.nic.close(guest.opened)
    assert guest.port.endpoint is None
    assert endpoint.receive(64) == []
    assert endpoint.transmit(Frame(TOWARDS)) == DropReason.VMBUS_ERROR
    assert guest.gpadls[RECEIVE_GPADL]
