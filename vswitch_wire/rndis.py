"""RNDIS: control messages, the PACKET message and its per-packet info (MS-RNDIS, Linux
include/linux/rndis.h).

Every message is `u32 type, u32 message length` (these 8 bytes included), then the body. Offsets inside a
message count from byte 8. OIDs and the NDIS objects they carry are in `ndis.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

from .errors import UnknownMessage, WireError
from .layout import Fixed, need

RNDIS_MSG_PACKET = 0x00000001
RNDIS_MSG_INIT = 0x00000002
RNDIS_MSG_INIT_C = 0x80000002
RNDIS_MSG_HALT = 0x00000003
RNDIS_MSG_QUERY = 0x00000004
RNDIS_MSG_QUERY_C = 0x80000004
RNDIS_MSG_SET = 0x00000005
RNDIS_MSG_SET_C = 0x80000005
RNDIS_MSG_RESET = 0x00000006
RNDIS_MSG_RESET_C = 0x80000006
RNDIS_MSG_INDICATE = 0x00000007
RNDIS_MSG_KEEPALIVE = 0x00000008
RNDIS_MSG_KEEPALIVE_C = 0x80000008
RNDIS_MSG_SET_EX = 0x00000009

RNDIS_MAJOR_VERSION = 1
RNDIS_MINOR_VERSION = 0
RNDIS_DF_CONNECTIONLESS = 1
RNDIS_MEDIUM_802_3 = 0

RNDIS_STATUS_SUCCESS = 0x00000000
RNDIS_STATUS_PENDING = 0x00000103
RNDIS_STATUS_FAILURE = 0xC0000001
RNDIS_STATUS_RESOURCES = 0xC000009A
RNDIS_STATUS_NOT_SUPPORTED = 0xC00000BB
RNDIS_STATUS_BAD_VERSION = 0xC0010004
RNDIS_STATUS_MULTICAST_FULL = 0xC0010009
RNDIS_STATUS_INVALID_LENGTH = 0xC0010014
RNDIS_STATUS_INVALID_DATA = 0xC0010015
RNDIS_STATUS_BUFFER_TOO_SHORT = 0xC0010016
RNDIS_STATUS_INVALID_OID = 0xC0010017
RNDIS_STATUS_BUFFER_OVERFLOW = 0x80000005
RNDIS_STATUS_MEDIA_CONNECT = 0x4001000B
RNDIS_STATUS_MEDIA_DISCONNECT = 0x4001000C
RNDIS_STATUS_LINK_SPEED_CHANGE = 0x40010013
RNDIS_STATUS_NETWORK_CHANGE = 0x40010018
RNDIS_STATUS_TASK_OFFLOAD_CURRENT_CONFIG = 0x40020006

HEADER_SIZE = 8
PACKET_HEADER_SIZE = 44
PACKET_BODY_SIZE = 36
PPI_HEADER_SIZE = 12
MAXIMUM_PACKETS_PER_MESSAGE = 8
ALIGNMENT_EXPONENT = 3
MAXIMUM_TRANSFER_SIZE = 0xEFFFFFFF

TCPIP_CHKSUM_PKTINFO = 0
IPSEC_PKTINFO = 1
TCP_LARGESEND_PKTINFO = 2
IEEE_8021Q_INFO = 6
NBL_HASH_VALUE = 8
NBL_HASH_INFO = 9
RNDIS_PKTINFO_INTERNAL = 0x80000000
RNDIS_PKTINFO_ID = 1

_HEADER = struct.Struct("<II")
_PACKET = struct.Struct("<IIIIIIIIIII")
_PPI = struct.Struct("<III")


class RndisMessage(Fixed):
    """A message; `pack()` gives it with its header."""

    __slots__ = ()
    TYPE: ClassVar[int]
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<")

    def pack(self) -> bytes:
        """The message's bytes. Raises WireError when a value does not fit its field."""
        body = self._pack_body()
        return _HEADER.pack(self.TYPE, HEADER_SIZE + len(body)) + body

    @classmethod
    def unpack(cls, message: bytes) -> Self:
        """Decodes `message`: exactly one message, type and length already checked."""
        return cls.unpack_fields(message, HEADER_SIZE)

    def _pack_body(self) -> bytes:
        return self.pack_fields()


def _buffer(name: str, message: bytes, offset: int, length: int, fixed: int) -> bytes:
    """An information buffer: `offset` counts from byte 8. Without bytes any offset will do."""
    if length == 0:
        return b""
    start = HEADER_SIZE + offset
    if start < fixed or start + length > len(message):
        raise WireError(
            f"{name}: {length} bytes at offset {offset} do not fit in a message of {len(message)}"
        )
    return bytes(message[start : start + length])


@dataclass(frozen=True, slots=True)
class Initialize(RndisMessage):
    """INITIALIZE, guest to host, 24 bytes."""

    TYPE: ClassVar[int] = RNDIS_MSG_INIT
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<IIII")
    request_id: int
    major_version: int = RNDIS_MAJOR_VERSION
    minor_version: int = RNDIS_MINOR_VERSION
    max_transfer_size: int = 0x4000


@dataclass(frozen=True, slots=True)
class InitializeComplete(RndisMessage):
    """INITIALIZE_CMPLT, host to guest, 52 bytes."""

    TYPE: ClassVar[int] = RNDIS_MSG_INIT_C
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<IIIIIIIIIII")
    request_id: int
    status: int = RNDIS_STATUS_SUCCESS
    major_version: int = RNDIS_MAJOR_VERSION
    minor_version: int = RNDIS_MINOR_VERSION
    device_flags: int = RNDIS_DF_CONNECTIONLESS
    medium: int = RNDIS_MEDIUM_802_3
    max_packets_per_message: int = MAXIMUM_PACKETS_PER_MESSAGE
    max_transfer_size: int = MAXIMUM_TRANSFER_SIZE
    packet_alignment_factor: int = ALIGNMENT_EXPONENT
    af_list_offset: int = 0
    af_list_size: int = 0


@dataclass(frozen=True, slots=True)
class Halt(RndisMessage):
    """HALT, guest to host; has no RNDIS answer."""

    TYPE: ClassVar[int] = RNDIS_MSG_HALT
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<I")
    request_id: int


class _OidRequest(RndisMessage):
    """What QUERY and SET share: request id, OID, buffer, VC handle."""

    __slots__ = ()
    _HEAD: ClassVar[struct.Struct] = struct.Struct("<IIIII")

    def _pack_request(self, request_id: int, oid: int, info: bytes) -> bytes:
        try:
            return self._HEAD.pack(request_id, oid, len(info), self._HEAD.size, 0) + info
        except struct.error as error:
            raise WireError(f"{type(self).__name__}: a value does not fit its field: {error}") from error

    @classmethod
    def _unpack_request(cls, message: bytes) -> tuple[int, int, bytes]:
        fixed = HEADER_SIZE + cls._HEAD.size
        need(cls.__name__, message, fixed)
        request_id, oid, length, offset, _ = cls._HEAD.unpack_from(message, HEADER_SIZE)
        return request_id, oid, _buffer(cls.__name__, message, offset, length, fixed)


@dataclass(frozen=True, slots=True)
class Query(_OidRequest):
    """QUERY, guest to host, 28 bytes and the input."""

    TYPE: ClassVar[int] = RNDIS_MSG_QUERY
    request_id: int
    oid: int
    info: bytes = b""

    def _pack_body(self) -> bytes:
        return self._pack_request(self.request_id, self.oid, self.info)

    @classmethod
    def unpack(cls, message: bytes) -> Self:
        return cls(*cls._unpack_request(message))


@dataclass(frozen=True, slots=True)
class QueryComplete(RndisMessage):
    """QUERY_CMPLT, host to guest, 24 bytes and the answer."""

    TYPE: ClassVar[int] = RNDIS_MSG_QUERY_C
    _HEAD: ClassVar[struct.Struct] = struct.Struct("<IIII")
    request_id: int
    status: int
    info: bytes = b""

    def _pack_body(self) -> bytes:
        try:
            head = self._HEAD.pack(self.request_id, self.status, len(self.info), self._HEAD.size)
        except struct.error as error:
            raise WireError(f"QueryComplete: a value does not fit its field: {error}") from error
        return head + self.info

    @classmethod
    def unpack(cls, message: bytes) -> Self:
        fixed = HEADER_SIZE + cls._HEAD.size
        need("QueryComplete", message, fixed)
        request_id, status, length, offset = cls._HEAD.unpack_from(message, HEADER_SIZE)
        return cls(request_id, status, _buffer("QueryComplete", message, offset, length, fixed))


@dataclass(frozen=True, slots=True)
class Set(_OidRequest):
    """SET, guest to host, 28 bytes and the value."""

    TYPE: ClassVar[int] = RNDIS_MSG_SET
    request_id: int
    oid: int
    info: bytes = b""

    def _pack_body(self) -> bytes:
        return self._pack_request(self.request_id, self.oid, self.info)

    @classmethod
    def unpack(cls, message: bytes) -> Self:
        return cls(*cls._unpack_request(message))


@dataclass(frozen=True, slots=True)
class SetComplete(RndisMessage):
    """SET_CMPLT, host to guest, 16 bytes."""

    TYPE: ClassVar[int] = RNDIS_MSG_SET_C
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<II")
    request_id: int
    status: int


@dataclass(frozen=True, slots=True)
class Reset(RndisMessage):
    """RESET, guest to host."""

    TYPE: ClassVar[int] = RNDIS_MSG_RESET
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<I")
    reserved: int = 0


@dataclass(frozen=True, slots=True)
class ResetComplete(RndisMessage):
    """RESET_CMPLT, host to guest; carries no request id."""

    TYPE: ClassVar[int] = RNDIS_MSG_RESET_C
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<II")
    status: int
    addressing_reset: int


@dataclass(frozen=True, slots=True)
class IndicateStatus(RndisMessage):
    """INDICATE_STATUS, host to guest, 20 bytes and the status buffer."""

    TYPE: ClassVar[int] = RNDIS_MSG_INDICATE
    _HEAD: ClassVar[struct.Struct] = struct.Struct("<III")
    status: int
    buffer: bytes = b""

    def _pack_body(self) -> bytes:
        try:
            offset = self._HEAD.size if self.buffer else 0
            return self._HEAD.pack(self.status, len(self.buffer), offset) + self.buffer
        except struct.error as error:
            raise WireError(f"IndicateStatus: a value does not fit its field: {error}") from error

    @classmethod
    def unpack(cls, message: bytes) -> Self:
        fixed = HEADER_SIZE + cls._HEAD.size
        need("IndicateStatus", message, fixed)
        status, length, offset = cls._HEAD.unpack_from(message, HEADER_SIZE)
        return cls(status, _buffer("IndicateStatus", message, offset, length, fixed))


@dataclass(frozen=True, slots=True)
class KeepAlive(RndisMessage):
    """KEEPALIVE, both directions."""

    TYPE: ClassVar[int] = RNDIS_MSG_KEEPALIVE
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<I")
    request_id: int


@dataclass(frozen=True, slots=True)
class KeepAliveComplete(RndisMessage):
    """KEEPALIVE_CMPLT, both directions."""

    TYPE: ClassVar[int] = RNDIS_MSG_KEEPALIVE_C
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<II")
    request_id: int
    status: int


class PerPacketInfo(NamedTuple):
    """One per-packet-info record. `type` has bit 31 set in the internal namespace
    (RNDIS_PKTINFO_INTERNAL)."""

    type: int
    data: bytes

    @property
    def value(self) -> int:
        """The record's first u32. Raises WireError when the data is shorter."""
        need("per-packet info", self.data, 4)
        return int.from_bytes(self.data[:4], "little")

    def pack(self) -> bytes:
        """The record; its size is rounded up to 4."""
        data = self.data + bytes(-len(self.data) % 4)
        return _PPI.pack(PPI_HEADER_SIZE + len(data), self.type, PPI_HEADER_SIZE) + data


def ppi_u32(kind: int, value: int) -> PerPacketInfo:
    """A record whose data is one u32."""
    return PerPacketInfo(kind, value.to_bytes(4, "little"))


@dataclass(frozen=True, slots=True)
class Packet(RndisMessage):
    """PACKET, both directions: per-packet info and one Ethernet frame without FCS and without VLAN tag."""

    TYPE: ClassVar[int] = RNDIS_MSG_PACKET
    data: bytes
    ppi: tuple[PerPacketInfo, ...] = ()

    def _pack_body(self) -> bytes:
        info = b"".join(record.pack() for record in self.ppi)
        offset = PACKET_BODY_SIZE
        head = struct.pack(
            "<IIIIIIIII",
            offset + len(info),
            len(self.data),
            0,
            0,
            0,
            offset if info else 0,
            len(info),
            0,
            0,
        )
        return head + info + self.data

    @classmethod
    def unpack(cls, message: bytes) -> Self:
        header = PacketHeader.unpack(message, len(message))
        ppi = header.parse_ppi(bytes(message[header.ppi_start : header.ppi_start + header.ppi_length]))
        start = header.data_start
        return cls(bytes(message[start : start + header.data_length]), ppi)


class PacketHeader(NamedTuple):
    """Where the parts of a PACKET message are, in bytes from the message's start, all checked against its
    length."""

    message_length: int
    data_start: int
    data_length: int
    ppi_start: int
    ppi_length: int

    @classmethod
    def unpack(cls, header: bytes, available: int) -> Self:
        """Checks the 44-byte header of a message of which `available` bytes are there.

        Raises WireError when the frame is empty or a part lies outside the message or inside the header, when
        frame and per-packet info together do not fit, or when out-of-band or VC fields are set.
        """
        need("RNDIS PACKET", header, PACKET_HEADER_SIZE)
        (
            kind,
            length,
            data_offset,
            data_length,
            oob_offset,
            oob_length,
            oobs,
            ppi_offset,
            ppi_length,
            vc,
            _,
        ) = _PACKET.unpack_from(header)
        if kind != RNDIS_MSG_PACKET:
            raise WireError(f"RNDIS PACKET: message type {kind:#x}")
        if not PACKET_HEADER_SIZE <= length <= available:
            raise WireError(f"RNDIS PACKET: length {length}, expected {PACKET_HEADER_SIZE}..{available}")
        if oob_offset or oob_length or oobs or vc:
            raise WireError("RNDIS PACKET: out-of-band data or a VC handle, expected none")
        if data_length == 0:
            raise WireError("RNDIS PACKET: the frame is empty")
        if data_offset < PACKET_BODY_SIZE or HEADER_SIZE + data_offset + data_length > length:
            raise WireError(
                f"RNDIS PACKET: {data_length} bytes at offset {data_offset} do not fit"
                f" in a message of {length}"
            )
        if ppi_length == 0:
            ppi_offset = PACKET_BODY_SIZE
        elif (
            ppi_offset < PACKET_BODY_SIZE
            or ppi_offset % 4
            or HEADER_SIZE + ppi_offset + ppi_length > length
            or PACKET_HEADER_SIZE + ppi_length + data_length > length
        ):
            raise WireError(
                f"RNDIS PACKET: {ppi_length} bytes of per-packet info at offset {ppi_offset} do not fit"
                f" in a message of {length}"
            )
        return cls(length, HEADER_SIZE + data_offset, data_length, HEADER_SIZE + ppi_offset, ppi_length)

    @staticmethod
    def parse_ppi(info: bytes) -> tuple[PerPacketInfo, ...]:
        """The records of the per-packet info area `info`.

        A record's data is at 12 whatever its offset field says, as stock receivers take it. Raises WireError
        when a record is shorter than its header, not a multiple of 4, or leaves the area.
        """
        records: list[PerPacketInfo] = []
        position = 0
        while position < len(info):
            need("per-packet info", info, position + PPI_HEADER_SIZE)
            size, kind, _ = _PPI.unpack_from(info, position)
            if size < PPI_HEADER_SIZE or size % 4 or position + size > len(info):
                raise WireError(f"per-packet info: record of {size} bytes at {position} of {len(info)}")
            records.append(PerPacketInfo(kind, info[position + PPI_HEADER_SIZE : position + size]))
            position += size
        return tuple(records)


class TxChecksum(NamedTuple):
    """TCPIP_CHKSUM_PKTINFO on transmit. `header_offset` is the transport header's, 0 for a minimal IP
    header."""

    ipv4: bool = False
    ipv6: bool = False
    tcp: bool = False
    udp: bool = False
    ip_header: bool = False
    header_offset: int = 0

    def pack(self) -> int:
        """The u32."""
        bits = self.ipv4 | self.ipv6 << 1 | self.tcp << 2 | self.udp << 3 | self.ip_header << 4
        return int(bits) | (self.header_offset & 0x3FF) << 16

    @classmethod
    def unpack(cls, value: int) -> Self:
        """Decodes the u32."""
        bits = [bool(value >> bit & 1) for bit in range(5)]
        return cls(bits[0], bits[1], bits[2], bits[3], bits[4], value >> 16 & 0x3FF)


class RxChecksum(NamedTuple):
    """TCPIP_CHKSUM_PKTINFO on receive."""

    tcp_failed: bool = False
    udp_failed: bool = False
    ip_failed: bool = False
    tcp_succeeded: bool = False
    udp_succeeded: bool = False
    ip_succeeded: bool = False
    loopback: bool = False

    def pack(self) -> int:
        """The u32."""
        return sum(int(bit) << index for index, bit in enumerate(self))

    @classmethod
    def unpack(cls, value: int) -> Self:
        """Decodes the u32."""
        return cls(*(bool(value >> bit & 1) for bit in range(7)))


class LargeSend(NamedTuple):
    """TCP_LARGESEND_PKTINFO. `version` 1 or 2; `ipv6` means something only in version 2."""

    mss: int
    tcp_header_offset: int
    version: int = 2
    ipv6: bool = False

    def pack(self) -> int:
        """The u32."""
        value = self.mss & 0xFFFFF | (self.tcp_header_offset & 0x3FF) << 20
        return value | (1 << 30 if self.version == 2 else 0) | int(self.ipv6) << 31

    @classmethod
    def unpack(cls, value: int) -> Self:
        """Decodes the u32."""
        version = 2 if value >> 30 & 1 else 1
        return cls(value & 0xFFFFF, value >> 20 & 0x3FF, version, version == 2 and bool(value >> 31))


def vlan_info_from_tci(tci: int) -> int:
    """IEEE_8021Q_INFO of an 802.1Q tag control information (priority 15:13, DEI 12, VLAN id 11:0)."""
    return tci >> 13 & 7 | (tci >> 12 & 1) << 3 | (tci & 0xFFF) << 4


def vlan_tci_from_info(value: int) -> int:
    """The 802.1Q tag control information of an IEEE_8021Q_INFO value."""
    return (value & 7) << 13 | (value >> 3 & 1) << 12 | value >> 4 & 0xFFF


PACKET_ID_MULTI_SUB_ALLOCATION = 1
PACKET_ID_FIRST_FRAGMENT = 2
PACKET_ID_LAST_FRAGMENT = 4


class PacketId(NamedTuple):
    """Internal record 1: a fragment of a coalesced (RSC) packet."""

    flags: int
    id: int
    version: int = 1

    def pack(self) -> bytes:
        """The record's 4 bytes of data."""
        return struct.pack("<BBH", self.version, self.flags, self.id)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Raises WireError when `data` is short."""
        need("packet id", data, 4)
        version, flags, number = struct.unpack_from("<BBH", data)
        return cls(flags, number, version)


_MESSAGES: dict[int, type[RndisMessage]] = {
    message.TYPE: message
    for message in (
        Packet,
        Initialize,
        InitializeComplete,
        Halt,
        Query,
        QueryComplete,
        Set,
        SetComplete,
        Reset,
        ResetComplete,
        IndicateStatus,
        KeepAlive,
        KeepAliveComplete,
    )
}


def message_header(data: bytes) -> tuple[int, int]:
    """(type, message length) of the message at the start of `data`.

    Raises WireError when the header is cut short or its length is below 8 or beyond `data`.
    """
    need("RNDIS message", data, HEADER_SIZE)
    kind, length = _HEADER.unpack_from(data)
    if not HEADER_SIZE <= length <= len(data):
        raise WireError(f"RNDIS message: length {length}, expected {HEADER_SIZE}..{len(data)}")
    return kind, length


def decode(data: bytes) -> RndisMessage:
    """The first message in `data`; bytes beyond its length are ignored.

    Raises WireError when it is malformed, UnknownMessage for other types.
    """
    kind, length = message_header(data)
    message = _MESSAGES.get(kind)
    if message is None:
        raise UnknownMessage("RNDIS", kind)
    return message.unpack(data[:length])


def split(data: bytes) -> Iterator[bytes]:
    """The messages in an aggregate, in order: each message's length leads to the next.

    Raises WireError when a length lies, or when anything but PACKET follows the first message.
    """
    position = 0
    while position < len(data):
        kind, length = message_header(data[position:])
        if position and kind != RNDIS_MSG_PACKET:
            raise WireError(
                f"RNDIS aggregate: message type {kind:#x} after the first, only PACKET may follow"
            )
        yield data[position : position + length]
        position += length
