"""Captures are read back by two independent readers, dpkt and scapy, with every field that was put in."""

from __future__ import annotations

import asyncio
import io
import os
import struct
from pathlib import Path
from typing import Any

import dpkt
import pytest
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.l2 import Ether
from scapy.utils import PcapNgReader
from taps import FedTap

from vswitch.capture import PortCapture, VmbusCapture
from vswitch.drops import DropReason
from vswitch.endpoint import Checksum, Offload
from vswitch.engine import CapturedFrame
from vswitchctl.capture_file import Record, read

PING = bytes(Ether(dst="02:00:00:00:00:02", src="02:00:00:00:00:01") / IP() / ICMP(id=7, seq=1))
SYN = bytes(Ether(dst="02:00:00:00:00:02", src="02:00:00:00:00:01") / IP() / TCP(dport=23))
NAMES = {1: "a", 2: "b", 3: "übergabe"}
T0 = 1_795_310_281_744_392_697


def sighting(port: int, direction: Any, packet_id: int, data: bytes = PING, **more: Any) -> CapturedFrame:
    return CapturedFrame(T0 + packet_id, port, direction, packet_id, data, len(data), **more)


async def collect(capture: PortCapture | VmbusCapture) -> bytes:
    return b"".join([piece async for piece in capture])


async def capture_of(*frames: CapturedFrame, **options: Any) -> bytes:
    tap = FedTap()
    capture = PortCapture(tap, NAMES.__getitem__, **options)
    tap.feed(*frames)
    capture.stop()
    return await collect(capture)


def records(data: bytes) -> list[Record]:
    return list(read(io.BytesIO(data)))


def blocks(data: bytes) -> list[tuple[int, bytes]]:
    """(type, whole block) of each block; both length words of a block agree and cover it."""
    found, offset = [], 0
    while offset < len(data):
        kind, length = struct.unpack_from("<II", data, offset)
        assert struct.unpack_from("<I", data, offset + length - 4) == (length,)
        found.append((kind, data[offset : offset + length]))
        offset += length
    return found


async def test_one_frame_is_joined_by_its_packet_id_at_the_port_where_it_came_in_and_where_it_went_out() -> (
    None
):
    data = await capture_of(sighting(1, "in", 5), sighting(2, "out", 5, queue=3))
    first, second = records(data)
    assert (first.interface, first.direction, first.packet_id, first.queue) == ("a", "in", 5, 0)
    assert (second.interface, second.direction, second.packet_id, second.queue) == ("b", "out", 5, 3)
    assert first.data == second.data == PING
    assert first.timestamp_ns == T0 + 5, "to the nanosecond"


async def test_a_drop_carries_its_reason_as_verdict_and_in_words() -> None:
    data = await capture_of(
        sighting(1, "in", 1, SYN, drop_reason=DropReason.FILTERED, dropped_by="t", detail="no telnet"),
        sighting(2, "out", 2, drop_reason=DropReason.RESOURCES),
    )
    first, second = records(data)
    assert (first.drop_code, first.comment) == (8, "dropped: Filtered (8) by t: no telnet")
    assert (second.drop_code, second.comment) == (3, "dropped: Resources (3)")


async def test_dpkt_s_own_reader_reads_the_file() -> None:
    data = await capture_of(sighting(1, "in", 1), sighting(2, "out", 1), sighting(1, "in", 2, SYN))
    reader = dpkt.pcapng.Reader(io.BytesIO(data))
    assert reader.datalink() == dpkt.pcapng.DLT_EN10MB
    packets = list(reader)
    assert [bytes(buffer) for _, buffer in packets] == [PING, PING, SYN]
    assert packets[0][0] == pytest.approx(T0 / 1e9, abs=1e-5)


async def test_scapy_s_reader_agrees_on_interfaces_directions_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "c.pcapng"
    path.write_bytes(
        await capture_of(
            sighting(3, "in", 1), sighting(2, "out", 1, SYN, drop_reason=DropReason.BUSY, detail="queue full")
        )
    )
    with PcapNgReader(str(path)) as reader:
        first, second = list(reader)
    assert (first.sniffed_on, first.direction, bytes(first)) == ("übergabe", 1, PING)
    assert (second.sniffed_on, second.direction) == ("b", 2)
    assert second.comment == b"dropped: Busy (7): queue full"


async def test_the_section_names_the_maker_and_each_interface_counts_at_the_end() -> None:
    data = await capture_of(sighting(1, "in", 1), sighting(1, "in", 2), sighting(2, "out", 1))
    found = blocks(data)
    assert [kind for kind, _ in found] == [0x0A0D0D0A, 1, 6, 6, 1, 6, 5, 5]
    section = dpkt.pcapng.SectionHeaderBlockLE(found[0][1])
    options = {option.code: option.data for option in section.opts}
    assert options[4] == b"vswitch"
    assert options[3].startswith(b"Linux ")
    assert options[2]
    received = [
        struct.unpack_from("<Q", block, block.index(b"\x04\x00\x08\x00") + 4)[0] for _, block in found[-2:]
    ]
    assert received == [2, 1]


async def test_what_a_slow_reader_missed_is_counted_at_the_next_packet_and_at_the_end() -> None:
    tap = FedTap()
    capture = PortCapture(tap, NAMES.__getitem__)
    tap.lost = 3
    tap.feed(sighting(1, "in", 1), sighting(1, "in", 2))
    capture.stop()
    data = await collect(capture)
    assert [record.lost for record in records(data)] == [3, 0]
    assert capture.lost == 3
    assert b"\x05\x00\x08\x00" + struct.pack("<Q", 3) in blocks(data)[-1][1], "isb_ifdrop"


async def test_a_tag_beside_the_frame_is_put_into_it() -> None:
    (record,) = records(await capture_of(sighting(1, "in", 1, vlan_tci=0x6007)))
    assert record.data == PING[:12] + b"\x81\x00\x60\x07" + PING[12:]
    assert record.original_length == len(PING) + 4


@pytest.mark.parametrize(
    ("destination", "offload", "flags"),
    [
        ("02:00:00:00:00:02", Offload(), 0b001_01),
        ("ff:ff:ff:ff:ff:ff", Offload(), 0b011_01),
        ("01:00:5e:00:00:01", Offload(Checksum.GOOD), 0b010_01 | 1 << 10),
        ("02:00:00:00:00:02", Offload(Checksum.PARTIAL, mss=1400), 0b001_01 | 1 << 9 | 1 << 11),
    ],
)
async def test_flags_tell_reception_and_the_state_of_the_checksum(
    destination: str, offload: Offload, flags: int
) -> None:
    data = await capture_of(sighting(1, "in", 1, bytes(Ether(dst=destination)) + bytes(8), offload=offload))
    packet = dpkt.pcapng.EnhancedPacketBlockLE(blocks(data)[2][1])
    options = {option.code: option.data for option in packet.opts}
    assert struct.unpack("<I", options[2]) == (flags,)


async def test_a_cut_frame_keeps_its_original_length() -> None:
    frame = CapturedFrame(T0, 1, "in", 1, PING[:20], len(PING))
    (record,) = records(await capture_of(frame, snaplen=20))
    assert (len(record.data), record.original_length) == (20, len(PING))


async def test_frames_stream_as_they_come_and_the_limit_ends_the_capture() -> None:
    tap = FedTap()
    capture = PortCapture(tap, NAMES.__getitem__, packet_limit=2)
    pieces = aiter(capture)
    assert blocks(await anext(pieces))[0][0] == 0x0A0D0D0A, "the header comes before any frame"
    waiting = asyncio.ensure_future(anext(pieces))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    tap.feed(sighting(1, "in", 1))
    assert [kind for kind, _ in blocks(await waiting)] == [1, 6]
    tap.feed(sighting(1, "in", 2), sighting(1, "in", 3))
    assert [kind for kind, _ in blocks(await anext(pieces))] == [6]
    assert [kind for kind, _ in blocks(await anext(pieces))] == [5]
    with pytest.raises(StopAsyncIteration):
        await anext(pieces)
    assert tap.closed
    assert capture.packets == 2


async def test_pieces_are_bounded_in_bytes() -> None:
    tap = FedTap()
    capture = PortCapture(tap, NAMES.__getitem__)
    tap.feed(*[sighting(1, "in", number, bytes(60_000)) for number in range(40)])
    capture.stop()
    vmbus = VmbusCapture("a")
    for number in range(20):
        vmbus.observe_packet("in", 1, bytes(200_000), T0 + number)
    vmbus.stop()
    for running, count in ((capture, 40), (vmbus, 20)):
        pieces = [piece async for piece in running]
        assert max(map(len, pieces)) <= 1 << 20
        assert len(records(b"".join(pieces))) == count


async def test_a_stop_delivers_what_waits_and_the_statistics() -> None:
    tap = FedTap()
    capture = PortCapture(tap, NAMES.__getitem__)
    collecting = asyncio.ensure_future(collect(capture))
    await asyncio.sleep(0.02)
    tap.feed(sighting(1, "in", 1))
    capture.stop()
    data = await asyncio.wait_for(collecting, 5)
    assert [kind for kind, _ in blocks(data)] == [0x0A0D0D0A, 1, 6, 5]


async def test_a_capture_goes_to_a_pipe_and_ends_when_its_reader_hangs_up() -> None:
    reader, writer = os.pipe()
    tap = FedTap()
    capture = PortCapture(tap, NAMES.__getitem__)
    with os.fdopen(writer, "wb", buffering=0) as stream:
        writing = asyncio.ensure_future(capture.write_to(stream))
        assert (await asyncio.to_thread(os.read, reader, 4)) == b"\n\r\r\n"
        os.close(reader)
        tap.feed(sighting(1, "in", 1))
        await asyncio.wait_for(writing, 5)
    assert tap.closed


async def test_vmbus_records_have_a_pseudo_header_with_direction_kind_and_channel() -> None:
    capture = VmbusCapture("partitions/a")
    capture.observe_message("in", b"\x0e\0\0\0\0\0\0\0" + bytes(32), T0)
    capture.observe_packet("out", 5, b"p" * 24, T0 + 1)
    capture.stop()
    capture.observe_packet("out", 5, b"late", T0 + 2)
    first, second = records(await collect(capture))
    assert (first.interface, first.link_type, first.direction) == ("partitions/a", 147, "in")
    assert first.data[:8] == bytes([1, 0, 1, 0, 0, 0, 0, 0])
    assert first.data[8:16] == b"\x0e\0\0\0\0\0\0\0"
    assert (second.data[:8], second.direction) == (bytes([1, 1, 2, 0, 5, 0, 0, 0]), "out")
    assert second.timestamp_ns == T0 + 1


async def test_a_vmbus_capture_holds_a_bounded_number_of_records_and_counts_the_rest() -> None:
    capture = VmbusCapture("a", snaplen=16)
    for _ in range(8200):
        capture.observe_message("in", bytes(40), T0)
    capture.stop()
    found = records(await collect(capture))
    assert (len(found), capture.lost, found[0].lost) == (8192, 8, 8)
    assert (len(found[0].data), found[0].original_length) == (16, 48)


async def test_what_waits_in_a_vmbus_capture_is_bounded_in_bytes() -> None:
    capture = VmbusCapture("a")
    for number in range(100):
        capture.observe_packet("in", 1, bytes(512 << 10), T0 + number)
    assert capture.lost == 100 - 31
    short = VmbusCapture("a", snaplen=16)
    for number in range(100):
        short.observe_packet("in", 1, bytes(512 << 10), T0 + number)
    assert short.lost == 0
    short.stop()
    kept = records(await collect(short))
    assert {(len(record.data), record.original_length) for record in kept} == {(16, 8 + (512 << 10))}
