"""Between a TAP's virtio-net header and RNDIS per-packet info: what a frame leaves to the other side.

Transmit follows what the stock Linux driver sends (drivers/net/hyperv/netvsc_drv.c: 802.1Q, then LSO or
checksum); receive understands checksum results, VLAN tags and runs of coalesced segments (RSC). virtio
1.2, "struct virtio_net_hdr".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vswitch_wire.errors import WireError

__all__ = ["Received", "complete_checksum", "reassemble", "receive", "transmit"]

VNET = struct.Struct("<BBHHHH")  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
NEEDS_CSUM, DATA_VALID = 1, 2
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_ECN = 0, 1, 4, 0x80

RNDIS_PACKET = struct.Struct("<11I")
PPI_HEAD = struct.Struct("<III")
PPI_CHECKSUM, PPI_LSO, PPI_8021Q = 0, 2, 6
PPI_PACKET_ID = 0x80000001
PPI_DATA = 12
TX_IPV4, TX_IPV6, TX_TCP, TX_UDP = 1, 2, 4, 8
RX_TCP_OK, RX_UDP_OK, RX_VALUE_INVALID = 1 << 3, 1 << 4, 1 << 7
LSO_V2, LSO_IPV6 = 1 << 30, 1 << 31
RSC_FIRST, RSC_LAST = 2, 4

ETH_HEADER = 14
ETH_P_8021Q, ETH_P_IP, ETH_P_IPV6 = 0x8100, 0x0800, 0x86DD
TCP, UDP = 6, 17
_TCP_CHECK, _UDP_CHECK = 16, 6


def _ppi(kind: int, value: int) -> bytes:
    return PPI_HEAD.pack(PPI_DATA + 4, kind, PPI_DATA) + value.to_bytes(4, "little")


def _sum16(data: bytes | bytearray | memoryview, start: int = 0) -> int:
    """Ones' complement sum of big-endian 16-bit words, folded; an odd last byte counts as the high half of
    a word."""
    size = len(data) & ~1
    total: int = start + sum(struct.unpack(f">{size // 2}H", data[:size]))
    if len(data) & 1:
        total += data[-1] << 8
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def complete_checksum(frame: bytearray, start: int, offset: int) -> None:
    """Fill in a checksum that was left to us: sum everything from `start`, store it at `start + offset`."""
    check = ~_sum16(memoryview(frame)[start:]) & 0xFFFF
    struct.pack_into(">H", frame, start + offset, check or 0xFFFF)


def transmit(data: bytes, *, checksum: bool) -> bytes:
    """The RNDIS PACKET message for one frame read from the interface behind its 10-byte header.

    `checksum` says whether the host completes TCP and UDP checksums. WireError for what is no frame.
    """
    if len(data) < VNET.size + ETH_HEADER:
        raise WireError(f"interface gave {len(data)} bytes, less than a frame")
    flags, gso, _header, mss, start, offset = VNET.unpack_from(data)
    frame: bytes | bytearray = data[VNET.size :]
    infos = b""
    if frame[12:14] == b"\x81\x00" and len(frame) >= ETH_HEADER + 4:
        tci = int.from_bytes(frame[14:16], "big")
        infos += _ppi(PPI_8021Q, (tci >> 13) | (tci >> 12 & 1) << 3 | (tci & 0xFFF) << 4)
        frame = frame[:12] + frame[16:]
        start -= 4
    if flags & NEEDS_CSUM:
        if not start >= ETH_HEADER or start + offset + 2 > len(frame):
            raise WireError(
                f"interface gave a checksum field at {start}+{offset} of a frame of {len(frame)} bytes"
            )
        ipv6 = frame[12:14] == b"\x86\xdd"
        if gso & ~GSO_ECN in (GSO_TCPV4, GSO_TCPV6) and mss:
            if start < ETH_HEADER + (40 if ipv6 else 20) or start + _TCP_CHECK + 2 > len(frame):
                raise WireError(f"interface gave a large send whose TCP header is at {start} of {len(frame)}")
            frame = _for_large_send(frame, start, ipv6)
            infos += _ppi(PPI_LSO, mss & 0xFFFFF | (start & 0x3FF) << 20 | LSO_V2 | (LSO_IPV6 if ipv6 else 0))
        elif checksum and offset in (_TCP_CHECK, _UDP_CHECK) and start < 0x400:
            bits = (TX_IPV6 if ipv6 else TX_IPV4) | (TX_TCP if offset == _TCP_CHECK else TX_UDP)
            infos += _ppi(PPI_CHECKSUM, bits | start << 16)
        else:
            frame = bytearray(frame)
            complete_checksum(frame, start, offset)
    data_offset = 36 + len(infos)
    head = RNDIS_PACKET.pack(
        1,
        8 + data_offset + len(frame),
        data_offset,
        len(frame),
        0,
        0,
        0,
        36 if infos else 0,
        len(infos),
        0,
        0,
    )
    return head + infos + frame


def _for_large_send(frame: bytes | bytearray, start: int, ipv6: bool) -> bytearray:
    """LSOv2 wants lengths of 0 and a pseudo-header sum without length: the host rebuilds them per segment."""
    out = bytearray(frame)
    if ipv6:
        struct.pack_into(">H", out, ETH_HEADER + 4, 0)
        pseudo = _sum16(out[ETH_HEADER + 8 : ETH_HEADER + 40], TCP)
    else:
        struct.pack_into(">H", out, ETH_HEADER + 2, 0)
        struct.pack_into(">H", out, ETH_HEADER + 10, 0)
        pseudo = _sum16(out[ETH_HEADER + 12 : ETH_HEADER + 20], TCP)
    struct.pack_into(">H", out, start + _TCP_CHECK, pseudo)
    return out


@dataclass(slots=True)
class Received:
    """One RNDIS PACKET message from the host, checked: the frame and what the host said of it."""

    frame: bytes
    checksum: int = 0
    vlan: int | None = None
    fragment: int | None = None


def receive(message: bytes) -> Received:
    """Check a PACKET message (as long as its range) and take it apart. WireError when offsets or lengths
    lie."""
    if len(message) < RNDIS_PACKET.size:
        raise WireError(f"RNDIS packet of {len(message)} bytes, at least {RNDIS_PACKET.size} expected")
    kind, length, offset, size, _, _, _, info_offset, info_size, _, _ = RNDIS_PACKET.unpack_from(message)
    if kind != 1 or length > len(message):
        raise WireError(f"RNDIS packet: type {kind}, length {length} in a range of {len(message)}")
    if offset < 36 or size == 0 or 8 + offset + size > length:
        raise WireError(f"RNDIS packet: {size} bytes of data at {offset} do not lie in {length}")
    result = Received(message[8 + offset : 8 + offset + size])
    if info_size:
        if info_offset < 36 or info_offset % 4 or 8 + info_offset + info_size > length:
            raise WireError(
                f"RNDIS packet: {info_size} bytes of packet info at {info_offset} do not lie in {length}"
            )
        _read_infos(message[8 + info_offset : 8 + info_offset + info_size], result)
    if result.fragment is None and size < ETH_HEADER:
        raise WireError(f"RNDIS packet: a frame of {size} bytes")
    return result


def _read_infos(infos: bytes, result: Received) -> None:
    position = 0
    while position < len(infos):
        if position + PPI_HEAD.size + 4 > len(infos):
            raise WireError(f"RNDIS packet info: record at {position} is cut short")
        size, kind, _ = PPI_HEAD.unpack_from(infos, position)
        if size % 4 or size < PPI_DATA + 4 or position + size > len(infos):
            raise WireError(f"RNDIS packet info: record of {size} bytes at {position}")
        value = int.from_bytes(infos[position + PPI_DATA : position + PPI_DATA + 4], "little")
        if kind == PPI_CHECKSUM:
            result.checksum = value
        elif kind == PPI_8021Q:
            result.vlan = (value & 7) << 13 | (value >> 3 & 1) << 12 | value >> 4 & 0xFFF
        elif kind == PPI_PACKET_ID:
            result.fragment = value >> 8 & 0xFF
        position += size


def reassemble(run: list[Received], mtu: int) -> bytes:
    """One write to the interface (header and frame) from one message, or from a whole run of coalesced
    segments."""
    first = run[0]
    frame = first.frame if len(run) == 1 else b"".join(piece.frame for piece in run)
    header = _vnet_header(frame, first.checksum, mtu)
    if first.vlan is not None:
        flags, gso, head, mss, start, offset = VNET.unpack(header[0])
        if flags & NEEDS_CSUM:
            start, head = start + 4, head + 4 if head else 0
        body = header[1]
        tag = struct.pack(">HH", ETH_P_8021Q, first.vlan)
        return VNET.pack(flags, gso, head, mss, start, offset) + body[:12] + tag + body[12:]
    return header[0] + header[1]


_PLAIN = VNET.pack(0, GSO_NONE, 0, 0, 0, 0)
_VALID = VNET.pack(DATA_VALID, GSO_NONE, 0, 0, 0, 0)


def _vnet_header(frame: bytes, checksum: int, mtu: int) -> tuple[bytes, bytes]:
    """The header for a frame and the frame as it must be written."""
    known_good = checksum & (RX_TCP_OK | RX_UDP_OK)
    oversize = len(frame) > mtu + ETH_HEADER
    if not known_good:
        return _PLAIN, frame
    if not checksum & RX_VALUE_INVALID and not oversize:
        return _VALID, frame
    place = _transport(frame)
    if place is None:
        return _VALID, frame
    start, protocol, ipv6 = place
    if not oversize:
        offset = _TCP_CHECK if protocol == TCP else _UDP_CHECK
        return VNET.pack(NEEDS_CSUM, GSO_NONE, 0, 0, start, offset), frame
    if protocol != TCP:
        return _VALID, frame
    return _large_receive(frame, start, ipv6, mtu)


def _large_receive(frame: bytes, start: int, ipv6: bool, mtu: int) -> tuple[bytes, bytes]:
    """A coalesced TCP run becomes one GSO frame, so that a guest that routes can cut it again."""
    header_length = start + (frame[start + 12] >> 4) * 4
    mss = max(0, mtu - (header_length - ETH_HEADER))
    out = bytearray(frame)
    tcp_length = len(frame) - start
    if ipv6:
        struct.pack_into(">H", out, ETH_HEADER + 4, len(frame) - ETH_HEADER - 40 & 0xFFFF)
        pseudo = _sum16(out[ETH_HEADER + 8 : ETH_HEADER + 40], TCP + tcp_length)
    else:
        struct.pack_into(">H", out, ETH_HEADER + 2, len(frame) - ETH_HEADER & 0xFFFF)
        struct.pack_into(">H", out, ETH_HEADER + 10, 0)
        check = ~_sum16(out[ETH_HEADER:start]) & 0xFFFF
        struct.pack_into(">H", out, ETH_HEADER + 10, check)
        pseudo = _sum16(out[ETH_HEADER + 12 : ETH_HEADER + 20], TCP + tcp_length)
    struct.pack_into(">H", out, start + _TCP_CHECK, pseudo)
    gso = GSO_TCPV6 if ipv6 else GSO_TCPV4
    return VNET.pack(NEEDS_CSUM, gso, header_length, mss, start, _TCP_CHECK), bytes(out)


def _transport(frame: bytes) -> tuple[int, int, bool] | None:
    """Where TCP or UDP starts in an unfragmented IP frame: (offset, protocol, is IPv6); None when it has
    none."""
    kind = int.from_bytes(frame[12:14], "big")
    if kind == ETH_P_IP and len(frame) >= ETH_HEADER + 20:
        start = ETH_HEADER + (frame[ETH_HEADER] & 0xF) * 4
        if start < ETH_HEADER + 20:
            return None
        fragment = int.from_bytes(frame[ETH_HEADER + 6 : ETH_HEADER + 8], "big") & 0x3FFF
        protocol, ipv6 = frame[ETH_HEADER + 9], False
        if fragment:
            return None
    elif kind == ETH_P_IPV6 and len(frame) >= ETH_HEADER + 40:
        start, protocol, ipv6 = ETH_HEADER + 40, frame[ETH_HEADER + 6], True
    else:
        return None
    need = {TCP: 20, UDP: 8}.get(protocol)
    if need is None or start + need > len(frame):
        return None
    return start, protocol, ipv6
