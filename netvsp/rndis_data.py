"""RNDIS PACKET messages to frames and back: the data half of RNDIS, twin of ``native/netvsp/src/rndis_data.rs``.

Formats: MS-RNDIS 2.2.14 (REMOTE_NDIS_PACKET_MSG), ntddndis.h (per-packet information). Offsets inside a message are
relative to its byte 8.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from netvsp import checksum
from vswitch.endpoint import NO_OFFLOAD, Checksum, Frame, Offload
from vswitch_wire import rndis

HEADER = struct.Struct("<11I")
PPI_HEADER = struct.Struct("<3I")
OFFSET_BASE = 8
MAX_FRAME = 65535 + 18
MAX_PACKETS_PER_MESSAGE = 8
MAX_SEGMENTS = 562
ETHERNET_HEADER = 14

TX_IPV4, TX_IPV6, TX_TCP, TX_UDP, TX_IP_HEADER = 1, 2, 4, 8, 16
RX_TCP_OK, RX_UDP_OK, RX_IP_OK, RX_VALUE_INVALID = 1 << 3, 1 << 4, 1 << 5, 1 << 7
LSO_V2 = 1 << 30
LSO_IPV6 = 1 << 31
RSC_MULTIPLE, RSC_FIRST, RSC_LAST = 1, 2, 4
INTERNAL_PPI = 1 << 31


class MalformedRndis(ValueError):
    """A guest's RNDIS data message breaks the format; the packet is answered with NVSP status 2."""


@dataclass(slots=True, frozen=True)
class PerPacketInfo:
    """The per-packet information that the data path acts upon; None where the sender put none."""

    checksum: int | None = None
    lso: int | None = None
    vlan: int | None = None
    hash: int | None = None


def parse_messages(data: bytes) -> tuple[list[Frame], str | None]:
    """Frames of the one to eight PACKET messages in a 107's data, and why the rest was refused (None = all good).

    Frames in front of a malformed message are good and are returned.
    """
    frames: list[Frame] = []
    offset = 0
    while offset < len(data):
        if len(frames) == MAX_PACKETS_PER_MESSAGE:
            return frames, f"more than {MAX_PACKETS_PER_MESSAGE} RNDIS messages in one packet"
        remaining = len(data) - offset
        if remaining < HEADER.size:
            return frames, f"{remaining} bytes are too short for an RNDIS PACKET message"
        message_type, length = struct.unpack_from("<2I", data, offset)
        if message_type != rndis.RNDIS_PACKET_MSG:
            return frames, f"RNDIS message type {message_type:#x} on the data channel"
        if not HEADER.size <= length <= remaining:
            return frames, f"RNDIS message length {length} with {remaining} bytes present"
        try:
            frames.append(parse_packet(data[offset : offset + length]))
        except MalformedRndis as error:
            return frames, str(error)
        offset += length
    return (frames, None) if frames else (frames, "no RNDIS message in the packet")


def parse_packet(message: bytes) -> Frame:
    """One whole PACKET message (header included) to a frame in private memory. Raises MalformedRndis."""
    (
        _type,
        _length,
        data_offset,
        data_length,
        oob_offset,
        oob_length,
        oob_count,
        ppi_offset,
        ppi_length,
        vc_handle,
        _reserved,
    ) = HEADER.unpack_from(message)
    if oob_offset or oob_length or oob_count or vc_handle:
        raise MalformedRndis("out-of-band data or a VC handle in an RNDIS PACKET message")
    body = len(message) - OFFSET_BASE
    if data_offset < HEADER.size - OFFSET_BASE or data_offset + data_length > body:
        raise MalformedRndis(f"RNDIS data at {data_offset}+{data_length} lies outside a body of {body} bytes")
    if not ETHERNET_HEADER <= data_length <= MAX_FRAME:
        raise MalformedRndis(f"an Ethernet frame of {data_length} bytes")
    info = PerPacketInfo()
    if ppi_length:
        if ppi_offset < HEADER.size - OFFSET_BASE or ppi_offset % 4 or ppi_offset + ppi_length > body:
            raise MalformedRndis(f"RNDIS per-packet info at {ppi_offset}+{ppi_length} of a body of {body} bytes")
        start = ppi_offset + OFFSET_BASE
        info = parse_info(message[start : start + ppi_length])
    start = data_offset + OFFSET_BASE
    return apply_info(message[start : start + data_length], info)


def parse_info(area: bytes) -> PerPacketInfo:
    """The per-packet info records of one message. A record's data is at 12, whatever its offset field says."""
    values: dict[int, int] = {}
    offset = 0
    while offset < len(area):
        if len(area) - offset < PPI_HEADER.size:
            raise MalformedRndis("a per-packet info record is cut off")
        size, kind, _ = PPI_HEADER.unpack_from(area, offset)
        if size < PPI_HEADER.size or size % 4 or size > len(area) - offset:
            raise MalformedRndis(f"a per-packet info record of {size} bytes")
        known = kind in (
            rndis.PPI_TCP_IP_CHECKSUM,
            rndis.PPI_LSO,
            rndis.PPI_IEEE_8021Q,
            rndis.PPI_HASH_VALUE,
        )
        if known:
            if size < PPI_HEADER.size + 4:
                raise MalformedRndis(f"per-packet info type {kind} without its value")
            values[kind] = int.from_bytes(area[offset + 12 : offset + 16], "little")
        offset += size
    return PerPacketInfo(
        checksum=values.get(rndis.PPI_TCP_IP_CHECKSUM),
        lso=values.get(rndis.PPI_LSO),
        vlan=values.get(rndis.PPI_IEEE_8021Q),
        hash=values.get(rndis.PPI_HASH_VALUE),
    )


def apply_info(data: bytes, info: PerPacketInfo) -> Frame:
    """A frame with its offloads as metadata; an IPv4 header checksum asked for is computed here, in the copy."""
    offload = NO_OFFLOAD
    out: bytes | bytearray = data
    if info.lso is not None and info.lso & 0xFFFFF:
        out, offload = _large_send(data, info.lso)
    elif info.checksum is not None and info.checksum & (TX_TCP | TX_UDP | TX_IP_HEADER):
        out, offload = _partial_checksum(data, info.checksum)
    tci = None
    if info.vlan is not None:
        tci = (info.vlan & 7) << 13 | (info.vlan >> 3 & 1) << 12 | (info.vlan >> 4 & 0xFFF)
    return Frame(out, offload, tci, info.hash)


def _transport_of(data: bytes, header_offset: int) -> checksum.Transport:
    transport = checksum.find_transport(data)
    if transport is None:
        raise MalformedRndis("an offload was asked for a frame without an IP transport header")
    if header_offset not in (0, transport.l4_offset):
        raise MalformedRndis(f"transport header said at {header_offset}, found at {transport.l4_offset}")
    return transport


def _partial_checksum(data: bytes, request: int) -> tuple[bytes | bytearray, Offload]:
    transport = _transport_of(data, request >> 16 & 0x3FF)
    out: bytes | bytearray = data
    if request & TX_IP_HEADER:
        out = bytearray(data)
        checksum.fill_ipv4_header_checksum(out, transport)
    if not request & (TX_TCP | TX_UDP):
        return out, NO_OFFLOAD
    wanted = checksum.TCP if request & TX_TCP else checksum.UDP
    if transport.protocol != wanted or not checksum.fits(len(data), transport):
        raise MalformedRndis("a checksum was asked for a transport header that the frame does not hold")
    return out, Offload(Checksum.PARTIAL, l4_offset=transport.l4_offset)


def _large_send(data: bytes, request: int) -> tuple[bytes | bytearray, Offload]:
    if not request & LSO_V2:
        raise MalformedRndis("large send version 1 was never offered")
    transport = _transport_of(data, request >> 20 & 0x3FF)
    mss = request & 0xFFFFF
    if transport.protocol != checksum.TCP or not checksum.fits(len(data), transport):
        raise MalformedRndis("large send of a frame that is not TCP")
    header = (data[transport.l4_offset + 12] >> 4) * 4
    payload = len(data) - transport.l4_offset - header
    if header < 20 or payload < 0 or payload > mss * MAX_SEGMENTS:
        raise MalformedRndis(f"large send of {payload} bytes with MSS {mss} and a TCP header of {header}")
    return data, Offload(Checksum.PARTIAL, l4_offset=transport.l4_offset, mss=mss)


def _info_record(kind: int, value: int) -> bytes:
    return struct.pack("<4I", 16, kind, 12, value)


def receive_info(frame: Frame, checksum_flags: int, packet_id: int | None = None) -> bytes:
    """Per-packet info of a message towards a guest: 802.1Q, receive checksum, hash, RSC packet id."""
    out = b""
    if frame.vlan_tci is not None:
        tci = frame.vlan_tci
        vlan = (tci >> 13) | (tci >> 12 & 1) << 3 | (tci & 0xFFF) << 4
        out += _info_record(rndis.PPI_IEEE_8021Q, vlan)
    if checksum_flags:
        out += _info_record(rndis.PPI_TCP_IP_CHECKSUM, checksum_flags)
    if packet_id is not None:
        out += _info_record(INTERNAL_PPI | 1, packet_id)
    return out


def build_packet(info: bytes, data: bytes | bytearray | memoryview) -> bytes:
    """One PACKET message: header, per-packet info, frame; its length is exact, without padding."""
    data_offset = HEADER.size - OFFSET_BASE + len(info)
    header = HEADER.pack(
        rndis.RNDIS_PACKET_MSG,
        HEADER.size + len(info) + len(data),
        data_offset,
        len(data),
        0,
        0,
        0,
        HEADER.size - OFFSET_BASE if info else 0,
        len(info),
        0,
        0,
    )
    return header + info + bytes(data)
