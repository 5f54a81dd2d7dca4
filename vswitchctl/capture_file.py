"""Capture files read back: pcapng (ours and others') and classic pcap, as records with all that they say.

Blocks and options are decoded by dpkt. A file is not trusted: lengths are checked before they are used, and
errors name the file's offset.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import dpkt

LINKTYPE_ETHERNET = 1
LINKTYPE_USER0 = 147
MAX_BLOCK = 16 << 20

_SECTION = 0x0A0D0D0A
_INTERFACE = 1
_PACKET = 6
_PCAP_MAGICS = (0xA1B2C3D4, 0xA1B23C4D, 0xD4C3B2A1, 0x4D3CB2A1)
_OPT_COMMENT = 1
_IF_NAME = 2
_IF_TSRESOL = 9
_EPB_FLAGS = 2
_EPB_DROPCOUNT = 4
_EPB_PACKETID = 5
_EPB_QUEUE = 6
_EPB_VERDICT = 7


class CaptureFileError(ValueError):
    """The file is no capture, or is broken at the offset that the text names."""


@dataclass(frozen=True, slots=True)
class Record:
    """One packet of a capture."""

    timestamp_ns: int
    interface: str
    """The interface's name: of our captures the port's or the partition's."""
    link_type: int
    data: bytes
    original_length: int
    direction: Literal["in", "out", ""] = ""
    packet_id: int | None = None
    queue: int | None = None
    drop_code: int | None = None
    """The drop reason's code; None when the packet was not dropped."""
    comment: str = ""
    lost: int = 0
    """Packets that the capture missed just before this one."""


@dataclass(slots=True)
class _Interface:
    name: str
    link_type: int
    ticks_per_second: int


@dataclass(slots=True)
class _Section:
    order: Literal["<", ">"] = "<"
    interfaces: list[_Interface] = field(default_factory=list)


def read(stream: BinaryIO) -> Iterator[Record]:
    """All packets of a pcapng or pcap stream, which may be a pipe. Raises CaptureFileError."""
    start = stream.read(4)
    if len(start) < 4:
        raise CaptureFileError("the capture is empty: fewer than 4 bytes")
    if start == struct.pack("<I", _SECTION):
        yield from _read_pcapng(stream, start)
    elif struct.unpack("<I", start)[0] in _PCAP_MAGICS:
        yield from _read_pcap(stream, start)
    else:
        raise CaptureFileError(f"this is neither pcapng nor pcap: it begins with {start.hex(' ')}")


def read_file(path: str | Path) -> Iterator[Record]:
    """All packets of a file. Raises CaptureFileError with the file's name, OSError."""
    with Path(path).open("rb") as stream:
        try:
            yield from read(stream)
        except CaptureFileError as error:
            raise CaptureFileError(f"{path}: {error}") from None


def read_frames(path: str | Path) -> Iterator[bytes]:
    """The Ethernet frames of a file, for `inject` and `trace`: drops are left out, each frame comes once.

    In captures of ours one frame is seen at several ports: only its first sighting counts. Raises
    CaptureFileError for other link types and for frames that were cut by a snap length.
    """
    seen: set[int] = set()
    for number, record in enumerate(read_file(path), 1):
        if record.link_type != LINKTYPE_ETHERNET:
            raise CaptureFileError(
                f"{path}: packet {number} has link type {record.link_type}; a port takes Ethernet (1) only"
            )
        if len(record.data) < record.original_length:
            raise CaptureFileError(
                f"{path}: packet {number} was cut to {len(record.data)} of {record.original_length} bytes; "
                "capture again without a snap length"
            )
        if record.packet_id is not None:
            if record.packet_id in seen:
                continue
            seen.add(record.packet_id)
        elif record.drop_code is not None:
            continue
        yield record.data


def _read_pcapng(stream: BinaryIO, start: bytes) -> Iterator[Record]:
    section = _Section()
    offset = 0
    while start:
        head = start + stream.read(8 - len(start))
        if len(head) < 8:
            raise CaptureFileError(f"cut short at offset {offset}: a block's head has {len(head)} of 8 bytes")
        (kind,) = struct.unpack(section.order + "I", head[:4])
        if kind == _SECTION:  # the same in both byte orders
            magic = stream.read(4)
            section = _Section("<" if magic == b"\x4d\x3c\x2b\x1a" else ">")
            head += magic
        (length,) = struct.unpack_from(section.order + "I", head, 4)
        if length % 4 or not 12 <= length <= MAX_BLOCK:
            raise CaptureFileError(f"at offset {offset}: a block of {length} bytes")
        block = head + stream.read(length - len(head))
        if len(block) < length:
            raise CaptureFileError(
                f"cut short at offset {offset}: a block has {len(block)} of {length} bytes"
            )
        try:
            record = _decode(section, kind, block)
        except (dpkt.Error, struct.error, ValueError, IndexError, OverflowError) as error:
            raise CaptureFileError(f"at offset {offset}: a broken block: {error}") from None
        if record is not None:
            yield record
        offset += length
        start = stream.read(4)


def _decode(section: _Section, kind: int, block: bytes) -> Record | None:
    little = section.order == "<"
    if kind == _INTERFACE:
        reader = dpkt.pcapng.InterfaceDescriptionBlockLE if little else dpkt.pcapng.InterfaceDescriptionBlock
        described = reader(block)
        options = _options(described)
        name = options.get(_IF_NAME, b"").decode("utf-8", "replace") or f"interface {len(section.interfaces)}"
        resolution = options.get(_IF_TSRESOL, b"\x06")[0]
        ticks = 2 ** (resolution & 0x7F) if resolution & 0x80 else 10**resolution
        section.interfaces.append(_Interface(name, described.linktype, ticks))
        return None
    if kind != _PACKET:
        return None
    packet = (dpkt.pcapng.EnhancedPacketBlockLE if little else dpkt.pcapng.EnhancedPacketBlock)(block)
    if len(packet.pkt_data) != packet.caplen:
        raise ValueError(f"a packet of {packet.caplen} bytes in a block of {len(block)}")
    interface = section.interfaces[packet.iface_id]
    options = _options(packet)
    word, long = section.order + "I", section.order + "Q"
    flags = struct.unpack(word, options[_EPB_FLAGS])[0] if _EPB_FLAGS in options else 0
    directions: dict[int, Literal["in", "out", ""]] = {1: "in", 2: "out"}
    verdict = options.get(_EPB_VERDICT, b"")
    return Record(
        timestamp_ns=(packet.ts_high << 32 | packet.ts_low) * 1_000_000_000 // interface.ticks_per_second,
        interface=interface.name,
        link_type=interface.link_type,
        data=packet.pkt_data,
        original_length=packet.pkt_len,
        direction=directions.get(flags & 3, ""),
        packet_id=struct.unpack(long, options[_EPB_PACKETID])[0] if _EPB_PACKETID in options else None,
        queue=struct.unpack(word, options[_EPB_QUEUE])[0] if _EPB_QUEUE in options else None,
        # Type 0 (hardware) with a u32 is what vswitch writes; other tools' verdicts are none of ours.
        drop_code=struct.unpack(word, verdict[1:])[0] if len(verdict) == 5 and verdict[0] == 0 else None,
        comment=options.get(_OPT_COMMENT, b"").decode("utf-8", "replace"),
        lost=struct.unpack(long, options[_EPB_DROPCOUNT])[0] if _EPB_DROPCOUNT in options else 0,
    )


def _options(block: dpkt.Packet) -> dict[int, bytes]:
    return {option.code: bytes(option.data) for option in block.opts}


def _read_pcap(stream: BinaryIO, start: bytes) -> Iterator[Record]:
    order: Literal["<", ">"] = "<" if start in (b"\xd4\xc3\xb2\xa1", b"\x4d\x3c\xb2\xa1") else ">"
    nanoseconds = start in (b"\x4d\x3c\xb2\xa1", b"\xa1\xb2\x3c\x4d")
    head = start + stream.read(20)
    if len(head) < 24:
        raise CaptureFileError(f"cut short: a pcap header has {len(head)} of 24 bytes")
    header = (dpkt.pcap.LEFileHdr if order == "<" else dpkt.pcap.FileHdr)(head)
    offset = 24
    while packet_head := stream.read(16):
        if len(packet_head) < 16:
            raise CaptureFileError(f"cut short at offset {offset}")
        seconds, fraction, captured, original = struct.unpack(order + "IIII", packet_head)
        if captured > MAX_BLOCK:
            raise CaptureFileError(f"at offset {offset}: a packet of {captured} bytes")
        data = stream.read(captured)
        if len(data) < captured:
            raise CaptureFileError(f"cut short at offset {offset}: {len(data)} of {captured} bytes")
        time_ns = seconds * 1_000_000_000 + fraction * (1 if nanoseconds else 1000)
        yield Record(time_ns, "", header.linktype & 0xFFFF, data, original)
        offset += 16 + captured
