"""VMBus ring packets: descriptor, ranges, payload (Linux include/linux/hyperv.h, struct vmpacket_descriptor).

Layout: `u16 type, u16 data offset / 8, u16 length / 8, u16 flags, u64 transaction id`, the type's own header,
payload, padding to 8. The 8-byte trailer belongs to the ring. A receiver sees the payload rounded up to 8
bytes: message lengths come from inner headers.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .errors import UnknownMessage, WireError
from .gpadl import GpaRange, parse_ranges
from .layout import need, pad8

VM_PKT_DATA_INBAND = 0x6
VM_PKT_DATA_USING_XFER_PAGES = 0x7
VM_PKT_DATA_USING_GPA_DIRECT = 0x9
VM_PKT_COMP = 0xB
VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED = 1

DESCRIPTOR_SIZE = 16
RANGES_OFFSET = 24
TRAILER_SIZE = 8
MAXIMUM_PACKET_SIZE = 0xFFFF * 8

_DESCRIPTOR = struct.Struct("<HHHHQ")
_TRANSFER = struct.Struct("<HBxI")
_GPA_DIRECT = struct.Struct("<4xI")
_TRANSFER_RANGE = struct.Struct("<II")


class TransferRange(NamedTuple):
    """`byte_count` bytes at `byte_offset` of the transfer page set (NetVSC: of the receive buffer)."""

    byte_count: int
    byte_offset: int


@dataclass(frozen=True, slots=True)
class Packet:
    """A decoded packet. `ranges` belong to GPA-direct packets, `transfer_*` to transfer-page packets."""

    type: int
    transaction_id: int
    completion_requested: bool
    payload: bytes
    ranges: tuple[GpaRange, ...] = ()
    transfer_set_id: int = 0
    transfer_ranges: tuple[TransferRange, ...] = ()


def _encode(
    kind: int, header: bytes, payload: bytes, transaction_id: int, completion_requested: bool
) -> bytes:
    offset = DESCRIPTOR_SIZE + len(header)
    length = offset + len(payload) + (-len(payload) % 8)
    if length > MAXIMUM_PACKET_SIZE:
        raise WireError(f"VMBus packet: {length} bytes, at most {MAXIMUM_PACKET_SIZE}")
    flags = VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED if completion_requested else 0
    try:
        descriptor = _DESCRIPTOR.pack(kind, offset // 8, length // 8, flags, transaction_id)
    except struct.error as error:
        raise WireError(f"VMBus packet: transaction id {transaction_id} is not a u64") from error
    return descriptor + header + pad8(payload)


def encode_inband(payload: bytes, transaction_id: int = 0, completion_requested: bool = False) -> bytes:
    """An in-band packet (type 6), without trailer."""
    return _encode(VM_PKT_DATA_INBAND, b"", payload, transaction_id, completion_requested)


def encode_completion(transaction_id: int, payload: bytes = b"") -> bytes:
    """A completion (type 0xB) of the packet with the same transaction id."""
    return _encode(VM_PKT_COMP, b"", payload, transaction_id, False)


def encode_transfer_pages(
    transaction_id: int,
    set_id: int,
    ranges: Sequence[TransferRange],
    payload: bytes,
    completion_requested: bool = True,
) -> bytes:
    """A packet that refers to ranges of a transfer page set (type 7, host to guest)."""
    try:
        header = _TRANSFER.pack(set_id, 0, len(ranges))
        header += b"".join(_TRANSFER_RANGE.pack(*entry) for entry in ranges)
    except struct.error as error:
        raise WireError(f"transfer-page packet: a value does not fit its field: {error}") from error
    return _encode(VM_PKT_DATA_USING_XFER_PAGES, header, payload, transaction_id, completion_requested)


def encode_gpa_direct(
    transaction_id: int,
    ranges: Sequence[GpaRange],
    payload: bytes,
    completion_requested: bool = True,
) -> bytes:
    """A packet that refers to guest pages (type 9, guest to host)."""
    header = _GPA_DIRECT.pack(len(ranges)) + b"".join(entry.pack() for entry in ranges)
    return _encode(VM_PKT_DATA_USING_GPA_DIRECT, header, payload, transaction_id, completion_requested)


def decode(packet: bytes) -> Packet:
    """The packet in `packet`, which is exactly one packet without its trailer.

    Raises WireError for lengths or ranges that do not fit, UnknownMessage for types that networking does not
    use.
    """
    need("VMBus packet", packet, DESCRIPTOR_SIZE)
    kind, offset8, length8, flags, transaction_id = _DESCRIPTOR.unpack_from(packet)
    offset, length = offset8 * 8, length8 * 8
    if length != len(packet):
        raise WireError(f"VMBus packet: its length field says {length}, it has {len(packet)} bytes")
    if not DESCRIPTOR_SIZE <= offset <= length:
        raise WireError(f"VMBus packet: data offset {offset} outside {DESCRIPTOR_SIZE}..{length}")
    completion = bool(flags & VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED)
    payload = bytes(packet[offset:])
    if kind in (VM_PKT_DATA_INBAND, VM_PKT_COMP):
        return Packet(kind, transaction_id, completion, payload)
    if kind == VM_PKT_DATA_USING_XFER_PAGES:
        if offset < RANGES_OFFSET:
            raise WireError(f"transfer-page packet: data offset {offset}, ranges start at {RANGES_OFFSET}")
        set_id, _, count = _TRANSFER.unpack_from(packet, DESCRIPTOR_SIZE)
        if count == 0 or count * _TRANSFER_RANGE.size > offset - RANGES_OFFSET:
            raise WireError(f"transfer-page packet: {count} ranges do not fit before its data at {offset}")
        ranges = tuple(
            TransferRange(*_TRANSFER_RANGE.unpack_from(packet, RANGES_OFFSET + index * _TRANSFER_RANGE.size))
            for index in range(count)
        )
        return Packet(kind, transaction_id, completion, payload, (), set_id, ranges)
    if kind == VM_PKT_DATA_USING_GPA_DIRECT:
        if offset < RANGES_OFFSET:
            raise WireError(f"GPA-direct packet: data offset {offset}, ranges start at {RANGES_OFFSET}")
        (count,) = _GPA_DIRECT.unpack_from(packet, DESCRIPTOR_SIZE)
        gpa_ranges, _ = parse_ranges(bytes(packet[RANGES_OFFSET:offset]), count, "GPA-direct packet")
        return Packet(kind, transaction_id, completion, payload, gpa_ranges)
    raise UnknownMessage("VMBus packet", kind)
