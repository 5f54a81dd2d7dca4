"""The NIC's data channel: both engines make the same of any bytes a guest sends and any frame it is sent."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vswitch_native
from netvsp.channel import Channel
from vswitch.endpoint import Checksum, Frame, Offload
from vswitch_wire import nvsp, packet
from vswitch_wire.engine import Engine, interrupt_class, memory_class
from vswitch_wire.gpadl import GpaRange
from vswitch_wire.memory import GuestMemory, Region, create_region, signal_fd
from vswitch_wire.ring import RingReader, RingWriter

pytestmark = pytest.mark.skipif(not vswitch_native.AVAILABLE, reason=f"native engine: {vswitch_native.WHY}")

PAGE = 4096
RING = 8
QUEUES = 3
RECEIVE, RECEIVE_PAGES, SEND, SEND_PAGES, SCRATCH = 64, 64, 128, 16, 160
MAC = bytes.fromhex("02155d000001")
PEER = bytes.fromhex("02155d000002")
SIZE = 1 << 20


@dataclass
class Side:
    """One engine's channel on guest memory of its own."""

    channel: Any
    endpoint: Any
    memory: GuestMemory
    writers: list[RingWriter]
    readers: list[RingReader]
    close: Any
    seen: dict[str, Any] = field(default_factory=dict)


def make_side(engine: Engine, offload: int) -> Side:
    import os

    fd = create_region("twin", SIZE)
    regions = [Region(0, SIZE, fd)]
    mine, hosts = GuestMemory(regions), memory_class(engine)(regions)
    doorbell, *irqs = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(1 + QUEUES))
    interrupt, *others = (interrupt_class(engine)(hosts, irq) for irq in irqs)
    rings = [list(range(1 + 2 * RING * index, 1 + 2 * RING * (index + 1))) for index in range(QUEUES)]
    pfns = rings[0]
    if engine == "python":
        channel: Any = Channel(hosts, pfns, RING, doorbell, interrupt)
        endpoint: Any = channel.endpoint()
    else:
        from vswitch_native import netvsp

        channel = netvsp.Channel(hosts, pfns, RING, doorbell, interrupt)  # type: ignore[arg-type]
        endpoint = netvsp.EndpointDriver(channel.endpoint())
    pages = RECEIVE_PAGES * PAGE
    channel.set_receive_buffer(range(RECEIVE, RECEIVE + RECEIVE_PAGES), 0, pages, 0xCAFE, 1856, pages // 1856)
    channel.set_send_buffer(range(SEND, SEND + SEND_PAGES), 0, SEND_PAGES * PAGE, 6144)
    channel.set_data(True)
    channel.set_filter(0x2D, MAC)
    channel.set_offload(offload)
    for index, other in enumerate(others, 1):
        channel.open_queue(index, rings[index], RING, other)

    def close() -> None:
        if engine == "native":
            endpoint.drop()
        channel.close()
        hosts.close()
        mine.close()
        for number in (fd, doorbell, *irqs):
            os.close(number)

    writers = [RingWriter(mine.view(ring[:RING], 0, RING * PAGE)) for ring in rings]
    readers = [RingReader(mine.view(ring[RING:], 0, RING * PAGE)) for ring in rings]
    return Side(channel, endpoint, mine, writers, readers, close)


def pair(offload: int = 0) -> SimpleNamespace:
    return SimpleNamespace(python=make_side("python", offload), native=make_side("native", offload))


def sent_to_guest(side: Side) -> list[Any]:
    """What the guest reads by queue: completions, and the RNDIS messages of receive packets without their
    places."""
    out: list[Any] = []
    for index, reader in enumerate(side.readers):
        for raw in reader.read(10_000):
            entry = packet.decode(bytes(raw))
            if entry.type == packet.VM_PKT_DATA_USING_XFER_PAGES:
                ranges = [
                    side.memory.read(RECEIVE * PAGE + piece.byte_offset, piece.byte_count)
                    for piece in entry.transfer_ranges
                ]
                out.append((index, entry.transfer_set_id, entry.payload, ranges))
            else:
                out.append((index, entry))
        reader.commit()
    return out


def counters(side: Side) -> Any:
    """Counters that are not zero, of the channel and of each queue."""
    queues = [{name: count for name, count in queue.items() if count} for queue in side.channel.queue_stats()]
    return {name: count for name, count in side.channel.stats().items() if count}, queues


def run(side: Side, batches: list[tuple[int, list[bytes]]], scratch: bytes) -> dict[str, Any]:
    """Posts the packets and drains the host; everything that can be told apart from outside."""
    side.memory.write(SCRATCH * PAGE, scratch[: 16 * PAGE])
    side.memory.write(SEND * PAGE, scratch[: SEND_PAGES * PAGE])
    frames: list[Frame] = []
    drops: dict[int, int] = {}
    output: list[Any] = []
    for queue, batch in batches:
        for encoded in batch:
            side.writers[queue].write(encoded)
        side.writers[queue].commit()
        signal_fd(side.endpoint.wake_fd)
        for _ in range(8):
            while got := side.endpoint.receive(64):
                frames += got
                side.endpoint.flush()
            for reason, count in side.endpoint.take_drops().items():
                drops[int(reason)] = drops.get(int(reason), 0) + count
            if not side.endpoint.rearm():
                break
        output += sent_to_guest(side)
    control = [tuple(item) for item in side.channel.take_control()]
    fault = side.channel.fault()
    return {
        "frames": [(bytes(f.data), f.offload, f.vlan_tci, f.hash) for f in frames],
        "drops": drops,
        "total_drops": side.channel.drops(),
        "output": output,
        "control": control,
        "lost": fault is not None,
        "stats": counters(side),
    }


words = st.sampled_from(
    [0, 1, 2, 4, 7, 8, 12, 13, 14, 16, 35, 36, 37, 40, 44, 60, 100, 0xFFFFFFFF, 0xFFFFFFF8]
)


@st.composite
def ip_frames(draw: st.DrawFn) -> bytes:
    """Frames that are nearly always IP with TCP or UDP, some with a header that lies."""
    version = draw(st.sampled_from([4, 4, 6]))
    protocol = draw(st.sampled_from([6, 6, 17, 1, 0, 43]))
    payload = draw(st.binary(max_size=200))
    transport = struct.pack(">HHIIBBHHH", 1, 2, draw(st.integers(0, 2**32 - 1)), 4, 0x50, 0x9B, 7, 0, 0)
    transport = bytearray(transport if protocol == 6 else transport[:8] + b"\0" * 8)
    if draw(st.booleans()):
        transport[draw(st.integers(0, len(transport) - 1))] = draw(st.integers(0, 255))
    body = bytes(transport) + payload
    if version == 4:
        head = bytearray(struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 9, 0, 64, protocol, 0) + bytes(8))
    else:
        head = bytearray(struct.pack(">IHBB", 6 << 28, len(body), protocol, 64) + bytes(32))
    if draw(st.integers(0, 3)) == 0:
        head[draw(st.integers(0, 9))] = draw(st.integers(0, 255))
    tag = draw(st.sampled_from([b"", b"", b"\x81\x00\x20\x05"]))
    ethertype = b"\x08\x00" if version == 4 else b"\x86\xdd"
    cut = draw(st.sampled_from([None, None, None, 20, 34, 40, 54]))
    return (MAC + PEER + tag + ethertype + bytes(head) + body)[:cut]


@st.composite
def records(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from([0, 0, 2, 6, 8, 9, 5, 0x80000001]))
    value = draw(
        st.one_of(
            st.sampled_from([4 | 1, 8 | 1, 16 | 1, 0x1D | 34 << 16, 5 | 54 << 16]),
            st.sampled_from(
                [1 << 30 | 100 | 34 << 20, 1 << 30 | 1400, 100, 1 << 30 | 1 << 31 | 90 | 54 << 20]
            ),
            st.integers(0, 2**32 - 1),
        )
    )
    size = draw(st.sampled_from([16, 16, 16, 16, 12, 20, 8, 15, 0]))
    return struct.pack("<3I", size, kind, 12) + struct.pack("<2I", value, 0)[: max(0, min(size, 20) - 12)]


@st.composite
def rndis_messages(draw: st.DrawFn) -> bytes:
    """PACKET messages, most of them valid, with a header word or a record replaced in some."""
    info = b"".join(draw(st.lists(records(), max_size=3)))
    data = draw(st.one_of(ip_frames(), st.binary(max_size=80)))
    pad = b"\0" * draw(st.sampled_from([0, 0, 4, 7]))
    head = [1, 44 + len(info) + len(data) + len(pad), 36 + len(info), len(data), 0, 0, 0, 36, len(info), 0, 0]
    if draw(st.integers(0, 3)) == 0:
        head[draw(st.integers(0, 10))] = draw(words)
    return struct.pack("<11I", *head) + info + data + pad


@st.composite
def guest_packets(draw: st.DrawFn) -> tuple[list[tuple[int, list[bytes]]], bytes]:
    """Batches of ring packets, each for a queue, and what lies in the send buffer and the scratch pages."""
    memory = bytearray(16 * PAGE)
    batches: list[tuple[int, list[bytes]]] = []
    number = 1
    place = 0
    for _ in range(draw(st.integers(1, 3))):
        batch = []
        for _ in range(draw(st.integers(1, 4))):
            message = b"".join(draw(st.lists(rndis_messages(), min_size=1, max_size=3)))
            kind = draw(st.sampled_from(["section", "section", "direct", "both", "control", "odd"]))
            section = place % 8
            place += 1
            memory[section * 6144 : section * 6144 + len(message)] = message[:6144]
            at = section * 6144
            ask = draw(st.booleans())
            if kind == "odd":
                index, size, channel = draw(words), draw(words), draw(st.sampled_from([0, 1, 2]))
                body = nvsp.SendRndisPacket(channel, index, size).pack(32)
                batch.append(packet.encode_inband(body[: draw(st.sampled_from([32, 16, 8]))], number, ask))
            elif kind == "control":
                body = draw(st.binary(min_size=4, max_size=40))
                batch.append(packet.encode_inband(nvsp.SendRndisPacket(1, section, 24).pack(32), number, ask))
                batch.append(packet.encode_inband(struct.pack("<I", 129) + body, number + 1, ask))
            elif kind == "section":
                body = nvsp.SendRndisPacket(0, section, len(message)).pack(32)
                batch.append(packet.encode_inband(body, number, ask))
            else:
                # The same bytes lie in the scratch pages, whose first page follows at the same offsets.
                split = draw(st.integers(0, len(message) - 1)) if kind == "both" else 0
                body = nvsp.SendRndisPacket(0, section if split else 0xFFFFFFFF, split).pack(32)
                ranges = []
                start = split
                while start < len(message):
                    length = min(draw(st.sampled_from([7, 44, 60, 5000])), len(message) - start)
                    first, last = (at + start) // PAGE, (at + start + length - 1) // PAGE
                    pfns = tuple(SCRATCH + page for page in range(first, last + 1))
                    if draw(st.integers(0, 40)) == 0:
                        pfns = (1 << 45, *pfns[1:])
                    ranges.append(GpaRange(length, (at + start) % PAGE, pfns))
                    start += length
                batch.append(packet.encode_gpa_direct(number, tuple(ranges[:40]), body, ask))
            number += 2
        batches.append((draw(st.sampled_from([0, 0, 1, 2])), batch))
    return batches, bytes(memory)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(guest_packets())
def test_any_packets_from_a_guest_mean_the_same_to_both_engines(
    given_packets: tuple[list[tuple[int, list[bytes]]], bytes],
) -> None:
    batches, memory = given_packets
    both = pair()
    try:
        assert run(both.python, batches, memory) == run(both.native, batches, memory)
    finally:
        both.python.close()
        both.native.close()


offloads = st.builds(
    Offload,
    checksum=st.sampled_from(Checksum),
    mss=st.sampled_from([0, 0, 0, 1, 20, 100, 1400]),
)
frames = st.builds(
    Frame,
    data=st.one_of(
        ip_frames(), ip_frames().map(lambda data: data + bytes(range(256)) * 20), st.binary(max_size=60)
    ),
    offload=offloads,
    vlan_tci=st.one_of(st.none(), st.integers(0, 0xFFFF)),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(frames, max_size=12),
    st.integers(0, 255),
    st.booleans(),
    st.tuples(
        st.binary(min_size=40, max_size=40),
        st.lists(st.integers(0, QUEUES), max_size=8),
        st.one_of(st.just(0x1701), st.integers(0, 0x1FFFF)),
    ),
    st.booleans(),
)
def test_any_frames_reach_a_guest_alike_from_both_engines(
    sequence: list[Frame], offload: int, link: bool, rss: tuple[bytes, list[int], int], closes: bool
) -> None:
    both = pair(offload)
    try:
        results = []
        for side in (both.python, both.native):
            side.channel.set_link(link)
            side.channel.set_rss(*rss)
            verdicts = [side.endpoint.transmit(frame) for frame in sequence]
            early = []
            if closes:
                side.endpoint.flush()
                early = sent_to_guest(side)
                side.channel.close_queue(1)
                assert side.endpoint.receive(1) == []
                verdicts += [side.endpoint.transmit(frame) for frame in sequence]
            side.endpoint.flush()
            results.append(
                (
                    [None if verdict is None else int(verdict) for verdict in verdicts],
                    early + sent_to_guest(side),
                    counters(side),
                    side.channel.drops(),
                    [tuple(item) for item in side.channel.take_control()],
                )
            )
        assert results[0] == results[1]
    finally:
        both.python.close()
        both.native.close()
