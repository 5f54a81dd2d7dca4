"""GPADL assembly: what stock guests send, and what hostile ones do."""

from __future__ import annotations

import pytest

from vswitch_wire import gpadl, vmbus
from vswitch_wire.errors import WireError
from vswitch_wire.gpadl import GpadlAssembler, GpadlError, GpaRange, encode_gpadl


def pages(count: int, first: int = 0x100) -> tuple[GpaRange, ...]:
    return (GpaRange(count * 4096, 0, tuple(range(first, first + count))),)


def feed(assembler: GpadlAssembler, message: vmbus.ChannelMessage) -> gpadl.AssembledGpadl | None:
    if isinstance(message, vmbus.GpadlHeader):
        return assembler.header(message)
    assert isinstance(message, vmbus.GpadlBody)
    return assembler.body(message)


@pytest.mark.parametrize(
    ("count", "messages"), [(1, 1), (26, 1), (27, 2), (54, 2), (55, 3), (256, 10), (8190, 293)]
)
def test_26_pages_fit_the_header_and_28_each_body(count: int, messages: int) -> None:
    parts = encode_gpadl(3, 0xE1E10, pages(count))
    assert len(parts) == messages
    assert all(len(part.pack()) <= 240 for part in parts)
    assembler = GpadlAssembler()
    results = [feed(assembler, vmbus.decode(part.pack())) for part in parts]
    assert results[:-1] == [None] * (messages - 1)
    whole = results[-1]
    assert whole is not None
    assert (whole.relid, whole.gpadl_id, whole.ranges, whole.pages) == (3, 0xE1E10, pages(count), count)
    assert assembler.in_progress == 0


def test_more_than_8190_pages_do_not_fit_the_format() -> None:
    with pytest.raises(WireError, match="65535"):
        encode_gpadl(1, 1, pages(8191))


def test_bodies_of_two_gpadls_may_interleave() -> None:
    assembler = GpadlAssembler()
    one, two = encode_gpadl(1, 1, pages(80)), encode_gpadl(2, 2, pages(80, 0x9000))
    results = [feed(assembler, part) for couple in zip(one, two, strict=True) for part in couple]
    assert [result.ranges for result in results if result] == [pages(80), pages(80, 0x9000)]


def test_surplus_bytes_of_the_last_message_are_ignored() -> None:
    assembler = GpadlAssembler()
    header, body = encode_gpadl(1, 1, pages(27))
    feed(assembler, vmbus.decode(header.pack().ljust(240, b"\xcc")))
    whole = feed(assembler, vmbus.decode(body.pack().ljust(240, b"\xcc")))
    assert whole is not None
    assert whole.ranges == pages(27)


def test_several_ranges_with_offsets_are_read() -> None:
    ranges = (GpaRange(10, 4090, (1, 2)), GpaRange(4096, 0, (7,)))
    (header,) = encode_gpadl(1, 1, ranges)
    assembled = feed(GpadlAssembler(), header)
    assert assembled is not None
    assert assembled.ranges == ranges


def header(range_bytes: int, range_count: int, data: bytes, gpadl_id: int = 1) -> vmbus.GpadlHeader:
    return vmbus.GpadlHeader(5, gpadl_id, range_bytes, range_count, data)


RANGE = GpaRange(4096, 0, (1,)).pack()


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (header(16, 1, RANGE, gpadl_id=0), "id 0"),
        (header(16, 0, RANGE), "no range"),
        (header(17, 1, RANGE), "17 bytes cannot hold 1 ranges"),
        (header(8, 1, RANGE), "8 bytes cannot hold 1 ranges"),
        (header(16, 0xFFFF, RANGE), "cannot hold 65535 ranges"),
        (header(24, 1, RANGE + bytes(8)), "take 16 bytes, it announced 24"),
        (header(16, 1, GpaRange(0, 0, (1,)).pack()), "range 0 is empty"),
        (header(16, 1, GpaRange(1, 4096, (1,)).pack()), "starts at offset 4096"),
        (header(16, 1, GpaRange(4097, 0, (1,)).pack()), "its list is cut short"),
        (header(16, 1, GpaRange(4096, 0, (1 << 52,)).pack()), "beyond 52 bits"),
    ],
)
def test_a_header_that_lies_is_refused_with_the_ids_for_the_answer(
    message: vmbus.GpadlHeader, words: str
) -> None:
    assembler = GpadlAssembler()
    with pytest.raises(GpadlError, match=words) as caught:
        assembler.header(message)
    assert (caught.value.relid, caught.value.gpadl_id) == (5, message.gpadl_id)
    assert assembler.in_progress == 0


def test_a_body_that_adds_no_page_ends_its_gpadl() -> None:
    for data in (b"", b"1234567"):
        assembler = GpadlAssembler()
        feed(assembler, encode_gpadl(5, 1, pages(80))[0])
        with pytest.raises(GpadlError, match="without a page number"):
            assembler.body(vmbus.GpadlBody(1, 1, data))
        assert assembler.in_progress == 0


def test_a_body_of_no_known_gpadl_has_no_answer() -> None:
    with pytest.raises(WireError, match="no GPADL 0x9 is being made") as caught:
        GpadlAssembler().body(vmbus.GpadlBody(1, 9, bytes(8)))
    assert not isinstance(caught.value, GpadlError)


def test_an_id_in_the_making_is_not_started_twice() -> None:
    assembler = GpadlAssembler()
    first = encode_gpadl(1, 1, pages(80))[0]
    feed(assembler, first)
    with pytest.raises(GpadlError, match="already being made"):
        feed(assembler, first)
    assert assembler.in_progress == 1


def test_unfinished_gpadls_are_bounded_and_can_be_forgotten() -> None:
    assembler = GpadlAssembler(max_in_progress=3)
    for number in range(1, 4):
        feed(assembler, encode_gpadl(number, number, pages(80))[0])
    with pytest.raises(GpadlError, match="more than 3"):
        feed(assembler, encode_gpadl(4, 4, pages(80))[0])
    # One message that holds all of it takes no place.
    assert feed(assembler, encode_gpadl(4, 4, pages(2))[0]) is not None
    assert assembler.discard_channel(2) == [2]
    assert assembler.discard(3)
    assert not assembler.discard(3)
    assembler.clear()
    assert assembler.in_progress == 0
