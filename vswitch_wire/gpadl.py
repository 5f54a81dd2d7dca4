"""GPADLs: page lists that a guest hands over in one header and any number of body messages.

Linux include/linux/hyperv.h (struct vmbus_channel_gpadl_header, struct gpa_range); openvmm
vmbus_ring/src/gparange.rs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from .errors import WireError
from .vmbus import GPADL_BODY_MAX_PFNS, GPADL_HEADER_MAX_PFNS, PAGE_SIZE, GpadlBody, GpadlHeader

_RANGE = struct.Struct("<II")
MAXIMUM_PFN = (1 << 52) - 1


class GpaRange(NamedTuple):
    """`byte_count` bytes of guest memory starting `byte_offset` bytes into the first page of `pfns`."""

    byte_count: int
    byte_offset: int
    pfns: tuple[int, ...]

    def pack(self) -> bytes:
        """The range as it stands in a GPADL or in a GPA-direct packet."""
        try:
            head = _RANGE.pack(self.byte_count, self.byte_offset)
            return head + struct.pack(f"<{len(self.pfns)}Q", *self.pfns)
        except struct.error as error:
            raise WireError(f"GPA range: a value does not fit its field: {error}") from error


def page_count(byte_offset: int, byte_count: int) -> int:
    """Pages that a range touches."""
    return (byte_offset + byte_count + PAGE_SIZE - 1) // PAGE_SIZE


def parse_ranges(data: bytes, count: int, what: str) -> tuple[tuple[GpaRange, ...], int]:
    """`count` ranges from the start of `data`, and how many bytes they took.

    Raises WireError for no range, an empty range, an offset of a page or more, a PFN above 52 bits, or too
    few bytes.
    """
    if count == 0:
        raise WireError(f"{what}: no range")
    # A range takes at least 16 bytes, so a lying count is refused before it costs anything.
    if count * (_RANGE.size + 8) > len(data):
        raise WireError(f"{what}: {count} ranges do not fit in {len(data)} bytes")
    ranges: list[GpaRange] = []
    position = 0
    for index in range(count):
        if position + _RANGE.size > len(data):
            raise WireError(f"{what}: range {index} is cut short")
        byte_count, byte_offset = _RANGE.unpack_from(data, position)
        position += _RANGE.size
        if byte_count == 0:
            raise WireError(f"{what}: range {index} is empty")
        if byte_offset >= PAGE_SIZE:
            raise WireError(f"{what}: range {index} starts at offset {byte_offset}, beyond its first page")
        pages = page_count(byte_offset, byte_count)
        if position + pages * 8 > len(data):
            raise WireError(f"{what}: range {index} needs {pages} pages, its list is cut short")
        pfns = struct.unpack_from(f"<{pages}Q", data, position)
        position += pages * 8
        for pfn in pfns:
            if pfn > MAXIMUM_PFN:
                raise WireError(f"{what}: range {index} names page {pfn:#x}, beyond 52 bits")
        ranges.append(GpaRange(byte_count, byte_offset, pfns))
    return tuple(ranges), position


class GpadlError(WireError):
    """A GPADL that cannot be made; the answer is GPADL_CREATED with these ids and a non-zero status."""

    def __init__(self, relid: int, gpadl_id: int, why: str) -> None:
        super().__init__(f"GPADL {gpadl_id:#x}: {why}")
        self.relid = relid
        self.gpadl_id = gpadl_id


@dataclass(frozen=True, slots=True)
class AssembledGpadl:
    """A GPADL whose every range has arrived."""

    relid: int
    gpadl_id: int
    ranges: tuple[GpaRange, ...]

    @property
    def pages(self) -> int:
        """Pages over all ranges."""
        return sum(len(entry.pfns) for entry in self.ranges)


def _whole(data: bytes, room: int) -> bytes:
    """What of a message belongs to the GPADL: no more than `room`, in whole page numbers.

    Firmware posts 240 bytes always, and a full header has 236: four bytes of it mean nothing.
    """
    data = data[:room]
    return data[: len(data) & ~7]


@dataclass(slots=True)
class _Partial:
    relid: int
    range_bytes: int
    range_count: int
    data: bytearray


class GpadlAssembler:
    """Collects headers and bodies of one connection until a GPADL is whole.

    Bounded: at most `max_in_progress` unfinished GPADLs of at most 64 KiB each. Bodies of several may
    interleave.
    """

    def __init__(self, *, max_in_progress: int = 64) -> None:
        self._max_in_progress = max_in_progress
        self._partial: dict[int, _Partial] = {}

    @property
    def in_progress(self) -> int:
        """Unfinished GPADLs."""
        return len(self._partial)

    def header(self, message: GpadlHeader) -> AssembledGpadl | None:
        """Starts a GPADL; gives it when this one message held all of it. Raises GpadlError."""
        relid, gpadl_id = message.relid, message.gpadl_id
        if gpadl_id == 0:
            raise GpadlError(relid, gpadl_id, "id 0 is not allowed")
        if gpadl_id in self._partial:
            raise GpadlError(relid, gpadl_id, "a GPADL with this id is already being made")
        if message.range_count == 0:
            raise GpadlError(relid, gpadl_id, "no range")
        if message.range_bytes % 8 or message.range_bytes < 16 * message.range_count:
            raise GpadlError(
                relid, gpadl_id, f"{message.range_bytes} bytes cannot hold {message.range_count} ranges"
            )
        partial = _Partial(relid, message.range_bytes, message.range_count, bytearray())
        partial.data += _whole(message.range_data, partial.range_bytes)
        if len(partial.data) >= partial.range_bytes:
            return self._finish(gpadl_id, partial)
        if len(self._partial) >= self._max_in_progress:
            raise GpadlError(relid, gpadl_id, f"more than {self._max_in_progress} GPADLs are unfinished")
        self._partial[gpadl_id] = partial
        return None

    def body(self, message: GpadlBody) -> AssembledGpadl | None:
        """Adds a body; gives the GPADL when it is whole.

        Raises GpadlError for bad ranges, WireError for a body of no known GPADL (which has no answer).
        """
        partial = self._partial.get(message.gpadl_id)
        if partial is None:
            raise WireError(f"GPADL_BODY: no GPADL {message.gpadl_id:#x} is being made")
        data = _whole(message.range_data, partial.range_bytes - len(partial.data))
        if not data:
            del self._partial[message.gpadl_id]
            raise GpadlError(partial.relid, message.gpadl_id, "a body message without a page number")
        partial.data += data
        if len(partial.data) < partial.range_bytes:
            return None
        del self._partial[message.gpadl_id]
        return self._finish(message.gpadl_id, partial)

    def discard(self, gpadl_id: int) -> bool:
        """Forgets an unfinished GPADL; False if there was none."""
        return self._partial.pop(gpadl_id, None) is not None

    def discard_channel(self, relid: int) -> list[int]:
        """Forgets a channel's unfinished GPADLs and gives their ids in ascending order."""
        gone = sorted(gpadl_id for gpadl_id, partial in self._partial.items() if partial.relid == relid)
        for gpadl_id in gone:
            del self._partial[gpadl_id]
        return gone

    def clear(self) -> None:
        """Forgets everything (new contact, unload)."""
        self._partial.clear()

    @staticmethod
    def _finish(gpadl_id: int, partial: _Partial) -> AssembledGpadl:
        try:
            ranges, used = parse_ranges(bytes(partial.data), partial.range_count, "ranges")
        except WireError as error:
            raise GpadlError(partial.relid, gpadl_id, str(error)) from error
        if used != partial.range_bytes:
            raise GpadlError(
                partial.relid, gpadl_id, f"its ranges take {used} bytes, it announced {partial.range_bytes}"
            )
        return AssembledGpadl(partial.relid, gpadl_id, ranges)


def encode_gpadl(relid: int, gpadl_id: int, ranges: tuple[GpaRange, ...]) -> list[GpadlHeader | GpadlBody]:
    """The messages by which a guest creates a GPADL: a header with up to 26 PFNs, bodies with up to 28.

    Raises WireError when the ranges do not fit the format (65535 bytes, so 8190 pages in one range).
    """
    data = b"".join(entry.pack() for entry in ranges)
    if not ranges or len(data) > 0xFFFF:
        raise WireError(f"GPADL {gpadl_id:#x}: {len(data)} bytes of ranges, expected 16..65535")
    first = 8 + GPADL_HEADER_MAX_PFNS * 8
    messages: list[GpadlHeader | GpadlBody] = [
        GpadlHeader(relid, gpadl_id, len(data), len(ranges), data[:first])
    ]
    step = GPADL_BODY_MAX_PFNS * 8
    for number, start in enumerate(range(first, len(data), step), start=1):
        messages.append(GpadlBody(number, gpadl_id, data[start : start + step]))
    return messages
