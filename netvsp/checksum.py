"""Internet checksums and TCP segmentation done in software, for destinations that cannot take the offload.

Twin of ``native/netvsp/src/checksum.rs``. Formats: RFC 1071 (checksum), RFC 9293 3.1 (TCP), RFC 768 (UDP: a
computed zero is sent as 0xFFFF), RFC 8200 (IPv6 extension headers).
"""

from __future__ import annotations

from dataclasses import dataclass

ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_IPV6 = 0x86DD
ETHERTYPE_VLAN = (0x8100, 0x88A8)
TCP = 6
UDP = 17
# Hop-by-hop, routing, destination options: each names its own length in 8-byte units beyond the first.
IPV6_EXTENSIONS = (0, 43, 60)
IPV6_EXTENSION_LIMIT = 8
TCP_FIN_PSH = 0x09
TCP_CWR = 0x80


@dataclass(slots=True, frozen=True)
class Transport:
    """Where the IP and transport headers of a frame are: offsets in bytes from the frame start."""

    ip_version: int
    ip_offset: int
    protocol: int
    l4_offset: int


def ones_complement_sum(data: bytes | bytearray | memoryview, initial: int = 0) -> int:
    """Folded 16-bit one's-complement sum (not inverted) of big-endian words; an odd last byte is padded."""
    # Summing 16-bit words modulo 0xFFFF equals reading the data as one big number modulo 0xFFFF.
    if len(data) % 2:
        data = bytes(data) + b"\0"
    number = int.from_bytes(data, "big") + initial
    if number == 0:
        return 0
    return number % 0xFFFF or 0xFFFF


def find_transport(frame: bytes | bytearray) -> Transport | None:
    """Locates the transport header of an unfragmented IPv4 or IPv6 frame; None if there is none."""
    if len(frame) < 14:
        return None
    ethertype = int.from_bytes(frame[12:14], "big")
    ip_offset = 14
    if ethertype in ETHERTYPE_VLAN:
        if len(frame) < 18:
            return None
        ethertype = int.from_bytes(frame[16:18], "big")
        ip_offset = 18
    if ethertype == ETHERTYPE_IPV4:
        if len(frame) < ip_offset + 20 or frame[ip_offset] >> 4 != 4:
            return None
        header = (frame[ip_offset] & 0x0F) * 4
        if header < 20 or len(frame) < ip_offset + header:
            return None
        if int.from_bytes(frame[ip_offset + 6 : ip_offset + 8], "big") & 0x3FFF:
            return None
        return Transport(4, ip_offset, frame[ip_offset + 9], ip_offset + header)
    if ethertype == ETHERTYPE_IPV6:
        if len(frame) < ip_offset + 40 or frame[ip_offset] >> 4 != 6:
            return None
        protocol = frame[ip_offset + 6]
        offset = ip_offset + 40
        for _ in range(IPV6_EXTENSION_LIMIT):
            if protocol not in IPV6_EXTENSIONS:
                return Transport(6, ip_offset, protocol, offset)
            if len(frame) < offset + 8:
                return None
            protocol, offset = frame[offset], offset + (frame[offset + 1] + 1) * 8
        return None
    return None


def fits(frame_length: int, transport: Transport) -> bool:
    """Whether the whole fixed transport header (TCP 20, UDP 8 bytes) lies inside the frame."""
    need = 20 if transport.protocol == TCP else 8
    return transport.l4_offset + need <= frame_length


def is_tcp_or_udp(frame: bytes | bytearray, transport: Transport) -> bool:
    """Whether the transport is one with a checksum that this module can complete, all of its header
    present."""
    return transport.protocol in (TCP, UDP) and fits(len(frame), transport)


def fill_ipv4_header_checksum(frame: bytearray, transport: Transport) -> None:
    """Computes the IPv4 header checksum in place; nothing to do for IPv6."""
    if transport.ip_version != 4:
        return
    start = transport.ip_offset
    end = start + (frame[start] & 0x0F) * 4
    frame[start + 10 : start + 12] = b"\0\0"
    value = ~ones_complement_sum(frame[start:end]) & 0xFFFF
    frame[start + 10 : start + 12] = value.to_bytes(2, "big")


def pseudo_header_sum(frame: bytes | bytearray, transport: Transport, l4_length: int) -> int:
    """Folded sum of the pseudo header: addresses, protocol, transport length."""
    start = transport.ip_offset
    addresses = frame[start + 12 : start + 20] if transport.ip_version == 4 else frame[start + 8 : start + 40]
    return ones_complement_sum(addresses, transport.protocol + l4_length)


def checksum_offset(transport: Transport) -> int:
    """Where the transport checksum is, bytes from the frame start."""
    return transport.l4_offset + (16 if transport.protocol == TCP else 6)


def transport_end(frame: bytes | bytearray, transport: Transport) -> int:
    """End of the IP packet in the frame: Ethernet padding behind it is not part of any checksum."""
    start = transport.ip_offset
    if transport.ip_version == 4:
        end = start + int.from_bytes(frame[start + 2 : start + 4], "big")
    else:
        end = start + 40 + int.from_bytes(frame[start + 4 : start + 6], "big")
    return end if transport.l4_offset < end <= len(frame) else len(frame)


def complete_transport_checksum(frame: bytearray, transport: Transport) -> None:
    """Replaces a partial (pseudo-header) checksum by the real one, in place."""
    end = transport_end(frame, transport)
    at = checksum_offset(transport)
    frame[at : at + 2] = b"\0\0"
    total = pseudo_header_sum(frame, transport, end - transport.l4_offset)
    # The pseudo-header sum is folded; summing it with the words again folds once more.
    value = ~ones_complement_sum(memoryview(frame)[transport.l4_offset : end], total) & 0xFFFF
    if value == 0 and transport.protocol == UDP:
        value = 0xFFFF
    frame[at : at + 2] = value.to_bytes(2, "big")


def segment(frame: bytes | bytearray, transport: Transport, mss: int) -> list[bytearray]:
    """Cuts a TCP super-frame into complete segments of at most ``mss`` payload bytes.

    Every length, IP checksum and TCP checksum is rebuilt: senders leave them zero or partial. FIN and PSH
    stay on the last segment only, CWR on the first only; IPv4 identification counts up. Raises ValueError
    when the TCP header does not fit in the frame.
    """
    l4 = transport.l4_offset
    if transport.protocol != TCP or l4 + 20 > len(frame):
        raise ValueError("a frame to be segmented must be TCP with its whole header present")
    payload_start = l4 + (frame[l4 + 12] >> 4) * 4
    if payload_start < l4 + 20 or payload_start > len(frame) or mss <= 0:
        raise ValueError(f"TCP header length {payload_start - l4} or MSS {mss} is impossible")
    head = bytes(frame[:payload_start])
    payload = memoryview(frame)[payload_start:]
    sequence = int.from_bytes(head[l4 + 4 : l4 + 8], "big")
    identification = int.from_bytes(head[transport.ip_offset + 4 : transport.ip_offset + 6], "big")
    segments: list[bytearray] = []
    starts = range(0, len(payload), mss) if len(payload) else range(1)
    for index, start in enumerate(starts):
        piece = payload[start : start + mss]
        out = bytearray(head)
        out += piece
        ip = transport.ip_offset
        if transport.ip_version == 4:
            out[ip + 2 : ip + 4] = (len(out) - ip).to_bytes(2, "big")
            out[ip + 4 : ip + 6] = ((identification + index) & 0xFFFF).to_bytes(2, "big")
            fill_ipv4_header_checksum(out, transport)
        else:
            out[ip + 4 : ip + 6] = (len(out) - ip - 40).to_bytes(2, "big")
        out[l4 + 4 : l4 + 8] = ((sequence + start) & 0xFFFFFFFF).to_bytes(4, "big")
        if index:
            out[l4 + 13] &= ~TCP_CWR & 0xFF
        if start + mss < len(payload):
            out[l4 + 13] &= ~TCP_FIN_PSH & 0xFF
        complete_transport_checksum(out, transport)
        segments.append(out)
    return segments
