"""Reads a frame's headers into the fields that flows match on.

Looks at no byte beyond `HEAD_BYTES`. A frame whose headers are cut short or contradict themselves is
`irregular`: it is forwarded like any other, but its verdicts are never cached, because two parsers might
read it differently. IEEE 802.1Q (one tag, 0x8100), RFC 826, 791, 8200, 9293, 768, 792, 4443.
"""

from __future__ import annotations

from collections.abc import Sequence

from vswitch.endpoint import Frame
from vswitch.engine import HEAD_BYTES
from vswitch.fields import Field

__all__ = ["NO_VLAN", "Packet", "parse"]

NO_VLAN = 0xFFFF_FFFF
"""Value of `Field.VLAN_TCI` of an untagged frame."""
ETHERNET_HEADER = 14
VLAN_TAG = 4
FIELD_COUNT = 18

_TYPE_VLAN = 0x8100
_TYPE_IPV4 = 0x0800
_TYPE_IPV6 = 0x86DD
_TYPE_ARP = 0x0806
_PROTO_ICMP = 1
_PROTO_TCP = 6
_PROTO_UDP = 17
_PROTO_FRAGMENT = 44
_PROTO_ICMPV6 = 58
_EXTENSION_HEADERS = (0, 43, 60)
_MAX_EXTENSION_HEADERS = 8


class Packet:
    """A frame on its way through the switch, with its fields."""

    __slots__ = ("fields", "frame", "id", "in_port", "l3_length", "length", "regular")

    def __init__(self, frame: Frame, in_port: int, packet_id: int) -> None:
        self.frame = frame
        self.in_port = in_port
        self.id = packet_id
        self.length = len(frame.data)
        self.l3_length = 0
        """Bytes behind the Ethernet header and the VLAN tag."""
        self.fields: list[int] = [0] * FIELD_COUNT
        self.regular = True

    @property
    def vlan_id(self) -> int:
        """0 for untagged and priority-tagged frames."""
        tci = self.fields[Field.VLAN_TCI]
        return 0 if tci == NO_VLAN else tci & 0xFFF

    def key(self, bits: Sequence[int]) -> tuple[int, ...]:
        """The values of the fields with these numbers."""
        fields = self.fields
        return tuple([fields[bit] for bit in bits])


def parse(packet: Packet) -> None:
    """Fills in `packet.fields`. The frame must have at least 14 bytes."""
    frame = packet.frame
    head = bytes(frame.data[:HEAD_BYTES])
    fields = packet.fields
    fields[Field.IN_PORT] = packet.in_port
    fields[Field.FRAME_LEN] = packet.length
    fields[Field.ETH_DST] = int.from_bytes(head[0:6], "big")
    fields[Field.ETH_SRC] = int.from_bytes(head[6:12], "big")
    eth_type = int.from_bytes(head[12:14], "big")
    offset = ETHERNET_HEADER
    tci = NO_VLAN
    if frame.vlan_tci is not None:
        tci = frame.vlan_tci & 0xFFFF
    elif eth_type == _TYPE_VLAN:
        if packet.length >= offset + VLAN_TAG:
            tci = int.from_bytes(head[14:16], "big")
            eth_type = int.from_bytes(head[16:18], "big")
            offset += VLAN_TAG
        else:
            packet.regular = False
    fields[Field.VLAN_TCI] = tci
    fields[Field.ETH_TYPE] = eth_type
    packet.l3_length = packet.length - offset
    if eth_type == _TYPE_IPV4:
        packet.regular = _ipv4(packet, head, offset)
    elif eth_type == _TYPE_IPV6:
        packet.regular = _ipv6(packet, head, offset)
    elif eth_type == _TYPE_ARP:
        packet.regular = _arp(packet, head, offset)


def _arp(packet: Packet, head: bytes, offset: int) -> bool:
    arp = head[offset : offset + 28]
    if len(arp) < 28 or arp[0:6] != b"\x00\x01\x08\x00\x06\x04":
        return False
    fields = packet.fields
    fields[Field.ARP_OP] = int.from_bytes(arp[6:8], "big")
    fields[Field.IP_SRC] = int.from_bytes(arp[14:18], "big")
    fields[Field.IP_DST] = int.from_bytes(arp[24:28], "big")
    return True


def _ipv4(packet: Packet, head: bytes, offset: int) -> bool:
    if len(head) < offset + 20 or head[offset] >> 4 != 4:
        return False
    header = (head[offset] & 0xF) * 4
    total = int.from_bytes(head[offset + 2 : offset + 4], "big")
    if packet.frame.offload.mss:
        total = packet.l3_length  # senders of large sends leave the length to the device
    if header < 20 or total < header or total > packet.l3_length:
        return False
    fields = packet.fields
    fields[Field.IP_DSCP] = head[offset + 1] >> 2
    fields[Field.IP_TTL] = head[offset + 8]
    fields[Field.IP_PROTO] = proto = head[offset + 9]
    fields[Field.IP_SRC] = int.from_bytes(head[offset + 12 : offset + 16], "big")
    fields[Field.IP_DST] = int.from_bytes(head[offset + 16 : offset + 20], "big")
    fragment = int.from_bytes(head[offset + 6 : offset + 8], "big")
    if fragment & 0x1FFF:
        fields[Field.IP_FRAG] = 2
        return True
    fields[Field.IP_FRAG] = 1 if fragment & 0x2000 else 0
    return _l4(packet, head, proto, offset + header, total - header)


def _ipv6(packet: Packet, head: bytes, offset: int) -> bool:
    if len(head) < offset + 40 or head[offset] >> 4 != 6:
        return False
    left = int.from_bytes(head[offset + 4 : offset + 6], "big")
    if packet.frame.offload.mss:
        left = packet.l3_length - 40
    if left > packet.l3_length - 40:
        return False
    fields = packet.fields
    fields[Field.IP_DSCP] = (head[offset] & 0xF) << 2 | head[offset + 1] >> 6
    fields[Field.IP_TTL] = head[offset + 7]
    fields[Field.IP_SRC] = int.from_bytes(head[offset + 8 : offset + 24], "big")
    fields[Field.IP_DST] = int.from_bytes(head[offset + 24 : offset + 40], "big")
    proto = head[offset + 6]
    offset += 40
    for _ in range(_MAX_EXTENSION_HEADERS):
        if proto in _EXTENSION_HEADERS:
            if left < 8 or len(head) < offset + 8:
                return False
            size = (head[offset + 1] + 1) * 8
        elif proto == _PROTO_FRAGMENT:
            if left < 8 or len(head) < offset + 8:
                return False
            size = 8
            fragment = int.from_bytes(head[offset + 2 : offset + 4], "big")
            if fragment & 0xFFF8:
                fields[Field.IP_PROTO] = head[offset]
                fields[Field.IP_FRAG] = 2
                return True
            if fragment & 1:
                fields[Field.IP_FRAG] = 1
        else:
            fields[Field.IP_PROTO] = proto
            return _l4(packet, head, proto, offset, left)
        if size > left:
            return False
        proto = head[offset]
        offset += size
        left -= size
    return False


def _l4(packet: Packet, head: bytes, proto: int, offset: int, left: int) -> bool:
    """`left` bytes of the IP packet begin at `offset`."""
    fields = packet.fields
    if proto == _PROTO_TCP:
        if left < 20 or len(head) < offset + 20:
            return False
        header = (head[offset + 12] >> 4) * 4
        if header < 20 or header > left:
            return False
        fields[Field.TCP_FLAGS] = head[offset + 13]
    elif proto == _PROTO_UDP:
        if left < 8 or len(head) < offset + 8:
            return False
    elif proto in (_PROTO_ICMP, _PROTO_ICMPV6):
        if left < 4 or len(head) < offset + 4:
            return False
        fields[Field.ICMP_TYPE] = head[offset]
        fields[Field.ICMP_CODE] = head[offset + 1]
        return True
    else:
        return True
    fields[Field.L4_SRC] = int.from_bytes(head[offset : offset + 2], "big")
    fields[Field.L4_DST] = int.from_bytes(head[offset + 2 : offset + 4], "big")
    return True
