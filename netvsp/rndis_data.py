"""RNDIS PACKET messages to frames and back: the data half of RNDIS, twin of
``native/netvsp/src/rndis_data.rs``.

Formats: MS-RNDIS 2.2.14 (REMOTE_NDIS_PACKET_MSG), ntddndis.h (per-packet information). Offsets inside a
message are relative to its byte 8.
"""

from __future__ import annotations

from dataclasses import dataclass

from netvsp import checksum, limits
from netvsp.rss import TOEPLITZ
from vswitch.endpoint import NO_OFFLOAD, Checksum, Frame, Offload
from vswitch_wire import rndis
from vswitch_wire.errors import WireError

MAX_FRAME = 65535 + 18
MAX_PACKETS_PER_MESSAGE = 8
ETHERNET_HEADER = 14

TX_IPV4, TX_IPV6, TX_TCP, TX_UDP, TX_IP_HEADER = 1, 2, 4, 8, 16
RX_TCP_OK, RX_UDP_OK, RX_IP_OK = 1 << 3, 1 << 4, 1 << 5
RX_VALUE_INVALID = 1 << 7
"""The frame is good although the bytes of its transport checksum are not: they hold the
pseudo-header's sum."""
LSO_V2 = 1 << 30


class MalformedRndis(WireError):
    """A guest's RNDIS data message breaks the format; the packet is answered with NVSP status 2."""


@dataclass(slots=True, frozen=True)
class SendInfo:
    """The per-packet info that the data path acts upon; None where the sender put none."""

    checksum: int | None = None
    lso: int | None = None
    vlan: int | None = None
    hash: int | None = None


def parse_messages(data: bytes) -> tuple[list[Frame], str | None]:
    """Frames of the one to eight PACKET messages in a 107's data, and why the rest was refused (None =
    all good).

    Frames in front of a malformed message are good and are returned.
    """
    frames: list[Frame] = []
    offset = 0
    while offset < len(data):
        if len(frames) == MAX_PACKETS_PER_MESSAGE:
            return frames, f"more than {MAX_PACKETS_PER_MESSAGE} RNDIS messages in one packet"
        remaining = data[offset : offset + rndis.PACKET_HEADER_SIZE]
        try:
            header = rndis.PacketHeader.unpack(remaining, len(data) - offset)
            frames.append(parse_packet(data[offset : offset + header.message_length], header))
        except WireError as error:
            return frames, str(error)
        offset += header.message_length
    return (frames, None) if frames else (frames, "no RNDIS message in the packet")


def parse_packet(message: bytes, header: rndis.PacketHeader) -> Frame:
    """One whole PACKET message to a frame in private memory. Raises WireError."""
    if not ETHERNET_HEADER <= header.data_length <= MAX_FRAME:
        raise MalformedRndis(f"an Ethernet frame of {header.data_length} bytes")
    records = rndis.PacketHeader.parse_ppi(message[header.ppi_start : header.ppi_start + header.ppi_length])
    # Of two records of one type the later one counts.
    values = {record.type: record for record in records}
    info = SendInfo(
        checksum=_value(values.get(rndis.TCPIP_CHKSUM_PKTINFO)),
        lso=_value(values.get(rndis.TCP_LARGESEND_PKTINFO)),
        vlan=_value(values.get(rndis.IEEE_8021Q_INFO)),
        hash=_value(values.get(rndis.NBL_HASH_VALUE)),
    )
    return apply_info(message[header.data_start : header.data_start + header.data_length], info)


def _value(record: rndis.PerPacketInfo | None) -> int | None:
    return None if record is None else record.value


def apply_info(data: bytes, info: SendInfo) -> Frame:
    """A frame with its offloads as metadata; an IPv4 header checksum asked for is computed here, in
    the copy."""
    offload = NO_OFFLOAD
    out: bytes | bytearray = data
    if info.lso is not None and info.lso & 0xFFFFF:
        out, offload = _large_send(data, info.lso)
    elif info.checksum is not None and info.checksum & (TX_TCP | TX_UDP | TX_IP_HEADER):
        out, offload = _partial_checksum(data, info.checksum)
    tci = None if info.vlan is None else rndis.vlan_tci_from_info(info.vlan)
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
    if header < 20 or payload < 0 or payload > mss * limits.MAX_SEGMENTS:
        raise MalformedRndis(f"large send of {payload} bytes with MSS {mss} and a TCP header of {header}")
    return data, Offload(Checksum.PARTIAL, l4_offset=transport.l4_offset, mss=mss)


def build_packet(
    frame: Frame,
    data: bytes | bytearray,
    checksum_flags: int = 0,
    packet_id: rndis.PacketId | None = None,
    hashed: tuple[int, int] | None = None,
) -> bytes:
    """One PACKET message towards a guest: ``data`` with the tag of ``frame``, checksum, hash (value, type)
    and coalescing info.

    Its length is exact, without padding, because guests copy by it.
    """
    records: list[rndis.PerPacketInfo] = []
    if frame.vlan_tci is not None:
        records.append(rndis.ppi_u32(rndis.IEEE_8021Q_INFO, rndis.vlan_info_from_tci(frame.vlan_tci)))
    if checksum_flags:
        records.append(rndis.ppi_u32(rndis.TCPIP_CHKSUM_PKTINFO, checksum_flags))
    if hashed is not None:
        records.append(rndis.ppi_u32(rndis.NBL_HASH_VALUE, hashed[0]))
        records.append(rndis.ppi_u32(rndis.NBL_HASH_INFO, hashed[1] | TOEPLITZ))
    if packet_id is not None:
        kind = rndis.RNDIS_PKTINFO_INTERNAL | rndis.RNDIS_PKTINFO_ID
        records.append(rndis.PerPacketInfo(kind, packet_id.pack()))
    return rndis.Packet(bytes(data), tuple(records)).pack()
