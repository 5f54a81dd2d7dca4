"""A frame as an extension sees it: headers parsed when they are looked at, every look recorded.

The bits recorded (`vswitch.fields.Field`) are the condition under which the verdict may be used again: the
switch caches it for all frames that agree in them. Looking at what no field stands for (payload, sequence
numbers, `raw`, the time) makes the verdict good for this one frame only.
"""

from __future__ import annotations

import ipaddress
import struct
import time
from collections.abc import Callable

from vswitch.extension.verdict import Verdict
from vswitch.fields import Field
from vswitch.upcall import UpcallRequest

ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_ARP = 0x0806
ETHERTYPE_VLAN = 0x8100
ETHERTYPE_IPV6 = 0x86DD
PROTOCOL_ICMP = 1
PROTOCOL_TCP = 6
PROTOCOL_UDP = 17
PROTOCOL_ICMPV6 = 58

_EXTENSION_HEADERS = frozenset((0, 43, 60))
_FRAGMENT_HEADER = 44
_MAX_EXTENSION_HEADERS = 8
_IS_IP = Field.ETH_TYPE.bit
_IS_L4 = Field.ETH_TYPE.bit | Field.IP_PROTO.bit | Field.IP_FRAG.bit

Recorder = Callable[[int], None]


class Ethernet:
    """The Ethernet header. Addresses are lower-case text, `02:00:00:00:00:01`."""

    def __init__(self, data: bytes, ethertype: int, record: Recorder) -> None:
        self._data = data
        self._ethertype = ethertype
        self._record = record

    @property
    def dst(self) -> str:
        self._record(Field.ETH_DST.bit)
        return mac_text(self._data[0:6])

    @property
    def src(self) -> str:
        self._record(Field.ETH_SRC.bit)
        return mac_text(self._data[6:12])

    @property
    def type(self) -> int:
        """The EtherType behind an 802.1Q tag, if there is one."""
        self._record(Field.ETH_TYPE.bit)
        return self._ethertype

    @property
    def is_multicast(self) -> bool:
        """Whether the destination is a group address, broadcast included."""
        self._record(Field.ETH_DST.bit)
        return bool(self._data[0] & 1)


class Arp:
    """An ARP packet for IPv4 over Ethernet (RFC 826)."""

    def __init__(self, body: bytes, record: Recorder) -> None:
        self._body = body
        self._record = record

    @property
    def op(self) -> int:
        """1 request, 2 reply."""
        self._record(_IS_IP | Field.ARP_OP.bit)
        return int.from_bytes(self._body[6:8], "big")

    @property
    def sender_mac(self) -> str:
        self._record(Field.RAW.bit)
        return mac_text(self._body[8:14])

    @property
    def sender_ip(self) -> str:
        self._record(_IS_IP | Field.IP_SRC.bit)
        return str(ipaddress.IPv4Address(self._body[14:18]))

    @property
    def target_mac(self) -> str:
        self._record(Field.RAW.bit)
        return mac_text(self._body[18:24])

    @property
    def target_ip(self) -> str:
        self._record(_IS_IP | Field.IP_DST.bit)
        return str(ipaddress.IPv4Address(self._body[24:28]))


class Ip:
    """An IPv4 or IPv6 header. Addresses are text in canonical form, `10.0.0.1`, `2001:db8::1`."""

    def __init__(self, header: bytes, proto: int, fragment: int, record: Recorder) -> None:
        self._header = header
        self._proto = proto
        self._fragment = fragment
        self._record = record

    @property
    def version(self) -> int:
        self._record(_IS_IP)
        return self._header[0] >> 4

    @property
    def src(self) -> str:
        self._record(_IS_IP | Field.IP_SRC.bit)
        return str(self._address(0))

    @property
    def dst(self) -> str:
        self._record(_IS_IP | Field.IP_DST.bit)
        return str(self._address(1))

    def src_in(self, network: str) -> bool:
        """Whether the source is in a network, `10.0.0.0/8`. ValueError when the text is no network."""
        self._record(_IS_IP | Field.IP_SRC.bit)
        return self._address(0) in ipaddress.ip_network(network)

    def dst_in(self, network: str) -> bool:
        """Whether the destination is in a network. ValueError when the text is no network."""
        self._record(_IS_IP | Field.IP_DST.bit)
        return self._address(1) in ipaddress.ip_network(network)

    @property
    def proto(self) -> int:
        """The protocol of the payload, behind IPv6 extension headers: 1 ICMP, 6 TCP, 17 UDP, 58 ICMPv6."""
        self._record(_IS_IP | Field.IP_PROTO.bit)
        return self._proto

    @property
    def dscp(self) -> int:
        self._record(_IS_IP | Field.IP_DSCP.bit)
        if self._header[0] >> 4 == 4:
            return self._header[1] >> 2
        return (int.from_bytes(self._header[0:2], "big") >> 6) & 0x3F

    @property
    def ttl(self) -> int:
        """Time to live, hop limit in IPv6."""
        self._record(_IS_IP | Field.IP_TTL.bit)
        return self._header[8] if self._header[0] >> 4 == 4 else self._header[7]

    @property
    def is_fragment(self) -> bool:
        """Whether this is a piece of a larger packet; only the first piece has a TCP, UDP or ICMP header."""
        self._record(_IS_IP | Field.IP_FRAG.bit)
        return self._fragment != 0

    @property
    def length(self) -> int:
        """Bytes of the IP packet by its header. Not a field of the flow key: the verdict is not cached."""
        self._record(Field.RAW.bit)
        if self._header[0] >> 4 == 4:
            return int.from_bytes(self._header[2:4], "big")
        return 40 + int.from_bytes(self._header[4:6], "big")

    def _address(self, which: int) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        if self._header[0] >> 4 == 4:
            start = 12 + 4 * which
            return ipaddress.IPv4Address(self._header[start : start + 4])
        start = 8 + 16 * which
        return ipaddress.IPv6Address(self._header[start : start + 16])


class _Ports:
    """The two port numbers that TCP and UDP begin with."""

    def __init__(self, header: bytes, record: Recorder) -> None:
        self._header = header
        self._record = record

    @property
    def sport(self) -> int:
        self._record(_IS_L4 | Field.L4_SRC.bit)
        return int.from_bytes(self._header[0:2], "big")

    @property
    def dport(self) -> int:
        self._record(_IS_L4 | Field.L4_DST.bit)
        return int.from_bytes(self._header[2:4], "big")


class Tcp(_Ports):
    """A TCP header (RFC 9293)."""

    @property
    def flags(self) -> int:
        """FIN 1, SYN 2, RST 4, PSH 8, ACK 16, URG 32, ECE 64, CWR 128."""
        self._record(_IS_L4 | Field.TCP_FLAGS.bit)
        return self._header[13]

    @property
    def fin(self) -> bool:
        return bool(self.flags & 1)

    @property
    def syn(self) -> bool:
        return bool(self.flags & 2)

    @property
    def rst(self) -> bool:
        return bool(self.flags & 4)

    @property
    def ack(self) -> bool:
        return bool(self.flags & 16)

    @property
    def seq(self) -> int:
        """Sequence number; the verdict is not cached."""
        self._record(Field.RAW.bit)
        return int.from_bytes(self._header[4:8], "big")


class Udp(_Ports):
    """A UDP header (RFC 768)."""


class Icmp:
    """An ICMP or ICMPv6 header (RFC 792, RFC 4443)."""

    def __init__(self, header: bytes, record: Recorder) -> None:
        self._header = header
        self._record = record

    @property
    def type(self) -> int:
        self._record(_IS_L4 | Field.ICMP_TYPE.bit)
        return self._header[0]

    @property
    def code(self) -> int:
        self._record(_IS_L4 | Field.ICMP_CODE.bit)
        return self._header[1]


class Packet:
    """One frame on its way through the switch.

    A header that is not there is None, and that look counts too.
    """

    def __init__(self, request: UpcallRequest) -> None:
        self._request = request
        self._data = request.data
        self._ethertype, self._l3 = _ethertype(self._data, request.vlan_tci is None)
        self._fields = 0
        self._cacheable = True
        self._ip_parsed: tuple[int, int, int, int] | bool | None = False

    # What the frame is and where it is.

    @property
    def in_port(self) -> int:
        """The number of the port where the frame came in."""
        self._record(Field.IN_PORT.bit)
        return self._request.in_port

    @property
    def out_port(self) -> int | None:
        """On egress the number of the port that it goes to: each destination is judged apart.

        None on ingress.
        """
        return self._request.out_port

    @property
    def port(self) -> str:
        """On ingress the name of the port where it came in, on egress of the port that it goes to."""
        if self._request.out_port is None:
            self._record(Field.IN_PORT.bit)
        return self._request.port_name

    @property
    def length(self) -> int:
        """Bytes of the frame on the wire, without FCS."""
        self._record(Field.FRAME_LEN.bit)
        return self._request.frame_length

    @property
    def tracing(self) -> bool:
        """True when nothing will happen to this frame and the answer is for a trace: change no state."""
        return self._request.trace

    @property
    def now(self) -> float:
        """Seconds on a clock that never goes back. The verdict is cached only if it is given a `ttl`."""
        self._clock_read = True
        return time.monotonic()

    # Headers.

    @property
    def eth(self) -> Ethernet:
        return Ethernet(self._data.ljust(14, b"\0"), self._ethertype, self._record)

    @property
    def vlan(self) -> int | None:
        """The VLAN id of the frame's 802.1Q tag, None when it has none."""
        tci = self.vlan_tci
        return None if tci is None else tci & 0xFFF

    @property
    def vlan_tci(self) -> int | None:
        """The whole tag control information: priority 15:13, DEI 12, VLAN id 11:0."""
        self._record(Field.VLAN_TCI.bit)
        if self._request.vlan_tci is not None:
            return self._request.vlan_tci
        if self._l3 == 18:  # a tag in the frame was skipped
            return int.from_bytes(self._data[14:16], "big")
        return None

    @property
    def arp(self) -> Arp | None:
        self._record(_IS_IP)
        if self._ethertype != ETHERTYPE_ARP:
            return None
        body = self._data[self._l3 : self._l3 + 28]
        if len(body) < 28 or body[:6] != b"\x00\x01\x08\x00\x06\x04":
            self._malformed()
            return None
        return Arp(body, self._record)

    @property
    def ip(self) -> Ip | None:
        """The IPv4 or IPv6 header."""
        self._record(_IS_IP)
        if self._ethertype not in (ETHERTYPE_IPV4, ETHERTYPE_IPV6):
            return None
        parsed = self._parse_ip()
        if parsed is None:
            self._malformed()
            return None
        proto, fragment, _, _ = parsed
        return Ip(self._data[self._l3 : self._l3 + 40], proto, fragment, self._record)

    @property
    def ipv4(self) -> Ip | None:
        self._record(_IS_IP)
        return self.ip if self._ethertype == ETHERTYPE_IPV4 else None

    @property
    def ipv6(self) -> Ip | None:
        self._record(_IS_IP)
        return self.ip if self._ethertype == ETHERTYPE_IPV6 else None

    @property
    def tcp(self) -> Tcp | None:
        header = self._l4(PROTOCOL_TCP, 20)
        return None if header is None else Tcp(header, self._record)

    @property
    def udp(self) -> Udp | None:
        header = self._l4(PROTOCOL_UDP, 8)
        return None if header is None else Udp(header, self._record)

    @property
    def icmp(self) -> Icmp | None:
        header = self._l4(PROTOCOL_ICMP, 8, ETHERTYPE_IPV4)
        return None if header is None else Icmp(header, self._record)

    @property
    def icmpv6(self) -> Icmp | None:
        header = self._l4(PROTOCOL_ICMPV6, 4, ETHERTYPE_IPV6)
        return None if header is None else Icmp(header, self._record)

    @property
    def raw(self) -> bytes:
        """The frame's bytes, at most the first 2048. The verdict is not cached."""
        self._record(Field.RAW.bit)
        return self._data

    # Verdicts.

    def allow(self, *, ttl: float | None = None, cache: bool = True) -> Verdict:
        """Let the frame pass.

        `ttl` in seconds bounds how long that holds; `cache=False`: for this frame only.
        """
        return Verdict(False, "", ttl, cache)

    def drop(self, reason: str, *, ttl: float | None = None, cache: bool = True) -> Verdict:
        """Drop the frame; `reason` is for whoever asks why."""
        return Verdict(True, reason, ttl, cache)

    # For the runner.

    @property
    def fields_read(self) -> int:
        """Bits of `vswitch.fields.Field` that were looked at."""
        return self._fields

    def may_be_cached(self, verdict: Verdict) -> bool:
        """Whether the fields read are all that this verdict depends on."""
        timed = self._clock_read and verdict.ttl is None
        return verdict.cacheable and not timed and not self._fields & Field.RAW.bit

    def depends_on_state(self) -> None:
        """The verdict depends on something that is not in the frame."""
        self._record(Field.RAW.bit)

    _clock_read = False

    def _record(self, bits: int) -> None:
        self._fields |= bits

    def _malformed(self) -> None:
        """A header that its type promises is cut short or broken: what was seen is true of this frame
        only.
        """
        self._record(Field.RAW.bit)

    def _parse_ip(self) -> tuple[int, int, int, int] | None:
        """(protocol, fragment bits, offset of the next header, end of the packet), None when malformed."""
        if isinstance(self._ip_parsed, bool):
            parse = _parse_ipv4 if self._ethertype == ETHERTYPE_IPV4 else _parse_ipv6
            self._ip_parsed = parse(self._data, self._l3, self._request.large_send)
        return self._ip_parsed

    def _l4(self, protocol: int, size: int, ethertype: int | None = None) -> bytes | None:
        self._record(_IS_IP)
        if self._ethertype not in (ETHERTYPE_IPV4, ETHERTYPE_IPV6) or ethertype not in (
            None,
            self._ethertype,
        ):
            return None
        parsed = self._parse_ip()
        if parsed is None:
            self._malformed()
            return None
        proto, fragment, offset, end = parsed
        self._record(Field.IP_PROTO.bit)
        if proto != protocol:
            return None
        self._record(Field.IP_FRAG.bit)
        if fragment & 0x1FFF:
            return None
        header = self._data[offset : min(offset + 60, end)]
        if len(header) < size:
            self._malformed()
            return None
        return header


def mac_text(address: bytes) -> str:
    """`02:00:00:00:00:01`."""
    return address.hex(":")


def _ethertype(data: bytes, may_be_tagged: bool) -> tuple[int, int]:
    """The EtherType, behind the tag of a frame that has none beside it, and the offset of what follows."""
    if len(data) < 14:
        return 0, len(data)
    ethertype = int.from_bytes(data[12:14], "big")
    if may_be_tagged and ethertype == ETHERTYPE_VLAN and len(data) >= 18:
        return int.from_bytes(data[16:18], "big"), 18
    return ethertype, 14


def _parse_ipv4(data: bytes, start: int, large_send: bool) -> tuple[int, int, int, int] | None:
    if len(data) < start + 20 or data[start] >> 4 != 4:
        return None
    header_length = (data[start] & 0xF) * 4
    if header_length < 20 or len(data) < start + header_length:
        return None
    total_length, fragment = struct.unpack_from(">HxxH", data, start + 2)
    # A large send's segments get lengths of their own: what its header says would only hide what follows.
    end = len(data) if large_send else start + total_length
    return data[start + 9], fragment & 0x3FFF, start + header_length, end


def _parse_ipv6(data: bytes, start: int, large_send: bool) -> tuple[int, int, int, int] | None:
    if len(data) < start + 40 or data[start] >> 4 != 6:
        return None
    payload_length = int.from_bytes(data[start + 4 : start + 6], "big")
    end = len(data) if large_send else start + 40 + payload_length
    proto, offset, fragment = data[start + 6], start + 40, 0
    for _ in range(_MAX_EXTENSION_HEADERS):
        if proto in _EXTENSION_HEADERS:
            if len(data) < offset + 8:
                return None
            proto, offset = data[offset], offset + 8 * (data[offset + 1] + 1)
        elif proto == _FRAGMENT_HEADER:
            if len(data) < offset + 8:
                return None
            word = int.from_bytes(data[offset + 2 : offset + 4], "big")
            fragment |= word >> 3 | (word & 1) << 13
            proto, offset = data[offset], offset + 8
            if word >> 3:
                break
        else:
            break
    else:
        return None
    return proto, fragment, offset, end
