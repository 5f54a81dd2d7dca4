"""The ring, in every pairing of engines: packets, signalling rules, and peers that lie."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import vswitch_native
from vswitch_wire import memory, packet, ring
from vswitch_wire.engine import memory_class
from vswitch_wire.errors import RingError, WireError

PAGES = 3
SIZE = (PAGES - 1) * 4096
WRITE, READ, MASK, PENDING, FEATURES = 0, 4, 8, 12, 64


@dataclass
class Side:
    """One engine's view of the ring."""

    reader: Callable[[Any], Any]
    writer: Callable[[Any], Any]
    view: Any


def sides() -> list[str]:
    return ["python", "native"] if vswitch_native.AVAILABLE else ["python"]


def make_side(engine: str, regions: list[memory.Region]) -> Side:
    # Scattered and out of order: the ring is linear only in its view.
    view = memory_class("native" if engine == "native" else "python")(regions).view(
        [7, 2, 5], 0, PAGES * 4096
    )
    if engine == "native":
        from vswitch_native import ring as native

        return Side(native.RingReader, native.RingWriter, view)
    return Side(ring.RingReader, ring.RingWriter, view)


@dataclass
class Pair:
    writer: Any
    reader: Any
    control: memory.BufferView


@pytest.fixture(params=[(w, r) for w in sides() for r in sides()], ids=lambda pair: f"{pair[0]}-{pair[1]}")
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A writer and a reader over the same pages; `control` is the hand of a peer that does as it likes."""
    fd = memory.create_region("ring-test", 8 * 4096)
    regions = [memory.Region(0, 8 * 4096, fd)]
    writing, reading = (make_side(engine, regions) for engine in request.param)
    control = memory.GuestMemory(regions).view([7, 2, 5], 0, PAGES * 4096)
    yield Pair(writing.writer(writing.view), reading.reader(reading.view), control)
    os.close(fd)


def inband(size: int, fill: int = 0x5A) -> bytes:
    return packet.encode_inband(bytes([fill]) * size, 1)


def test_packets_come_out_as_they_went_in_across_many_wraps(pair: Pair) -> None:
    for number in range(500):
        data = packet.encode_inband(number.to_bytes(2, "little") * (number % 400 + 1), number, True)
        assert pair.writer.write(data)
        pair.writer.commit()
        assert pair.reader.read() == [data]
        pair.reader.commit()


def test_a_trailer_holds_the_start_offset_of_its_packet(pair: Pair) -> None:
    pair.writer.write(inband(8))
    pair.writer.write(inband(8))
    pair.writer.commit()
    assert pair.control.read(4096 + 24, 8) == bytes(8)
    assert pair.control.read(4096 + 32 + 24, 8) == bytes(4) + (32).to_bytes(4, "little")


def test_nothing_is_visible_before_commit_and_a_batch_is_published_once(pair: Pair) -> None:
    pair.writer.write(inband(8))
    pair.writer.write(inband(16))
    assert not pair.reader.pending()
    assert pair.control.load_u32(WRITE) == 0
    assert pair.writer.commit()
    assert pair.control.load_u32(WRITE) == 32 + 40
    assert len(pair.reader.read()) == 2
    assert pair.control.load_u32(READ) == 0
    pair.reader.commit()
    assert pair.control.load_u32(READ) == 72


def test_read_takes_no_more_than_its_limit(pair: Pair) -> None:
    for _ in range(5):
        pair.writer.write(inband(8))
    pair.writer.commit()
    assert [len(pair.reader.read(2)), len(pair.reader.read(2)), len(pair.reader.read(2))] == [2, 2, 1]


def test_the_writer_signals_only_when_empty_becomes_non_empty(pair: Pair) -> None:
    pair.writer.write(inband(8))
    assert pair.writer.commit() is True
    pair.writer.write(inband(8))
    assert pair.writer.commit() is False
    pair.reader.read()
    pair.reader.commit()
    pair.writer.write(inband(8))
    assert pair.writer.commit() is True
    assert pair.writer.commit() is False


def test_a_batch_signals_by_the_index_before_the_batch(pair: Pair) -> None:
    for _ in range(3):
        pair.writer.write(inband(8))
    assert pair.writer.commit() is True


def test_a_masked_reader_is_not_signalled_and_unmask_tells_of_data(pair: Pair) -> None:
    pair.reader.mask()
    pair.writer.write(inband(8))
    assert pair.writer.commit() is False
    assert pair.reader.unmask() is True
    pair.reader.read()
    pair.reader.commit()
    assert pair.reader.unmask() is False


def test_a_ring_is_never_filled_completely(pair: Pair) -> None:
    assert pair.writer.size == pair.reader.size == SIZE
    assert pair.writer.capacity == SIZE - 16
    assert pair.writer.write(inband(SIZE - 32))
    assert pair.writer.free == 8
    pair.writer.commit()
    assert pair.control.load_u32(WRITE) != pair.control.load_u32(READ)


def test_what_can_never_fit_is_refused(pair: Pair) -> None:
    with pytest.raises(WireError, match=r"never fit"):
        pair.writer.write(inband(SIZE - 24))
    with pytest.raises(WireError, match="multiple of 8"):
        pair.writer.write(bytes(20))


def test_a_blocked_writer_asks_for_a_signal_and_gets_it_when_the_space_is_there(pair: Pair) -> None:
    assert pair.control.load_u32(FEATURES) & 1
    while pair.writer.write(inband(1000)):
        pass
    pair.writer.commit()
    assert pair.control.load_u32(PENDING) == 1016 + 8
    assert len(pair.reader.read(1)) == 1
    assert pair.reader.commit() is True
    assert pair.writer.write(inband(1000))
    assert pair.control.load_u32(PENDING) == 0
    pair.reader.read(1)
    assert pair.reader.commit() is False


def test_a_reader_does_not_signal_for_space_that_is_still_too_little(pair: Pair) -> None:
    for _ in range(40):
        pair.writer.write(inband(100))
    pair.writer.commit()
    pair.control.store_u32(PENDING, SIZE - 1)
    for _ in range(39):
        pair.reader.read(1)
        assert pair.reader.commit() is False
    pair.reader.read(1)
    # Ring size - 1 means "all of it": rounded down to 8.
    assert pair.reader.commit() is True


def test_without_the_feature_bit_nobody_waits_for_space(pair: Pair) -> None:
    pair.control.store_u32(FEATURES, 0)
    pair.control.store_u32(PENDING, 64)
    while pair.writer.write(inband(1000)):
        pass
    pair.control.store_u32(FEATURES, 0)
    pair.writer.commit()
    pair.reader.read()
    assert pair.reader.commit() is False


@pytest.mark.parametrize("value", [SIZE, SIZE + 8, 4, 0xFFFFFFFF, 0xFFFFFFF8])
def test_a_write_index_beyond_the_ring_or_unaligned_loses_the_channel(pair: Pair, value: int) -> None:
    pair.control.store_u32(WRITE, value)
    with pytest.raises(RingError, match="write index"):
        pair.reader.read()


@pytest.mark.parametrize("value", [SIZE, SIZE + 8, 4, 0xFFFFFFFF])
def test_a_read_index_beyond_the_ring_or_unaligned_loses_the_channel(pair: Pair, value: int) -> None:
    pair.control.store_u32(READ, value)
    pair.writer.write(inband(8))
    with pytest.raises(RingError, match="read index"):
        pair.writer.commit()


def test_a_read_index_past_what_was_published_loses_the_channel(pair: Pair) -> None:
    pair.writer.write(inband(8))
    pair.writer.commit()
    pair.control.store_u32(READ, 64)
    with pytest.raises(RingError, match="read index went"):
        _ = pair.writer.free


def test_a_write_index_that_goes_back_loses_the_channel(pair: Pair) -> None:
    for _ in range(3):
        pair.writer.write(inband(8))
    pair.writer.commit()
    assert len(pair.reader.read(1)) == 1
    pair.control.store_u32(WRITE, 32)
    with pytest.raises(RingError, match="write index went back"):
        pair.reader.unmask()


@pytest.mark.parametrize(
    ("offset8", "length8"),
    [(2, 0), (2, 1), (1, 3), (0, 3), (4, 3), (2, 0xFFFF), (2, 4)],
    ids=[
        "length 0",
        "length 8",
        "data in the descriptor",
        "data at 0",
        "data beyond",
        "huge",
        "one word too long",
    ],
)
def test_a_packet_whose_lengths_lie_loses_the_channel(pair: Pair, offset8: int, length8: int) -> None:
    pair.writer.write(inband(8))
    pair.writer.commit()
    pair.control.write(4096 + 2, offset8.to_bytes(2, "little") + length8.to_bytes(2, "little"))
    with pytest.raises(RingError):
        pair.reader.read()


def test_packets_in_front_of_one_that_lies_are_given_out(pair: Pair) -> None:
    for fill in (1, 2, 3):
        pair.writer.write(inband(8, fill))
    pair.writer.commit()
    third = 2 * (len(inband(8)) + 8)
    pair.control.write(4096 + third + 2, bytes(4))
    assert pair.reader.read() == [inband(8, 1), inband(8, 2)]
    for _ in range(2):
        with pytest.raises(RingError):
            pair.reader.read()


def test_what_was_read_does_not_change_when_the_writer_rewrites_it(pair: Pair) -> None:
    data = inband(64)
    pair.writer.write(data)
    pair.writer.commit()
    packets = pair.reader.read()
    pair.control.write(4096, b"\xff" * 96)
    assert packets == [data]


@pytest.mark.parametrize("length", [4096, 4096 + 100, 0])
def test_a_ring_needs_a_control_page_and_whole_data_pages(length: int) -> None:
    fd = memory.create_region("ring-test", 8 * 4096)
    regions = [memory.Region(0, 8 * 4096, fd)]
    for engine in sides():
        view = memory_class("native" if engine == "native" else "python")(regions).view([0, 1, 2], 0, length)
        side = make_side(engine, regions)
        with pytest.raises(WireError, match="whole data page"):
            side.writer(view)
        with pytest.raises(WireError, match="whole data page"):
            side.reader(view)
    os.close(fd)
