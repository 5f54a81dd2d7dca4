"""One frame in one line, decoded by dpkt: `10.0.0.1:4000 > 10.0.0.2:23 TCP SYN len 0`."""

from __future__ import annotations

import ipaddress
import struct

import dpkt

_TCP_FLAGS = (
    (0x02, "SYN"),
    (0x10, "ACK"),
    (0x01, "FIN"),
    (0x04, "RST"),
    (0x08, "PSH"),
    (0x20, "URG"),
    (0x40, "ECE"),
    (0x80, "CWR"),
)
_ICMP = {
    0: "echo reply",
    3: "unreachable",
    4: "source quench",
    5: "redirect",
    8: "echo request",
    11: "time exceeded",
    12: "parameter problem",
}
_ICMP6 = {
    1: "unreachable",
    2: "packet too big",
    3: "time exceeded",
    4: "parameter problem",
    128: "echo request",
    129: "echo reply",
    130: "listener query",
    131: "listener report",
    132: "listener done",
    133: "router solicitation",
    134: "router advertisement",
    135: "neighbour solicitation",
    136: "neighbour advertisement",
    137: "redirect",
    143: "listener report v2",
}
_ARP = {1: "request", 2: "reply"}


def describe(data: bytes) -> str:
    """The frame in one line. Anything that does not parse is shown as far as it does."""
    if len(data) < 14:
        return f"{len(data)} bytes, shorter than an Ethernet header: {data.hex(' ')}"
    try:
        frame = dpkt.ethernet.Ethernet(data)
    except (dpkt.Error, struct.error, IndexError, ValueError) as error:
        return f"{_mac(data[6:12])} > {_mac(data[0:6])} malformed ({_why(error)}), {len(data)} bytes"
    tags = "".join(f" vlan {tag.id}" for tag in getattr(frame, "vlan_tags", []))
    return _payload(frame, data) + tags


def _payload(frame: dpkt.ethernet.Ethernet, data: bytes) -> str:
    payload = frame.data
    if isinstance(payload, dpkt.arp.ARP):
        return _arp(payload)
    if isinstance(payload, dpkt.ip.IP | dpkt.ip6.IP6):
        return _ip(payload)
    pair = f"{_mac(frame.src)} > {_mac(frame.dst)}"
    kind = getattr(frame, "type", 0)
    if kind in (dpkt.ethernet.ETH_TYPE_IP, dpkt.ethernet.ETH_TYPE_IP6, dpkt.ethernet.ETH_TYPE_ARP):
        return f"{pair} malformed {_ethertype_name(kind)}, {len(data)} bytes"
    return f"{pair} ethertype {kind:#06x}, {len(data)} bytes"


def _ethertype_name(kind: int) -> str:
    names = {dpkt.ethernet.ETH_TYPE_IP: "IPv4", dpkt.ethernet.ETH_TYPE_IP6: "IPv6"}
    return names.get(kind, "ARP")


def _arp(arp: dpkt.arp.ARP) -> str:
    sender, target = _address(arp.spa), _address(arp.tpa)
    if arp.op == dpkt.arp.ARP_OP_REQUEST:
        return f"{sender} > {target} ARP request: who has {target}"
    if arp.op == dpkt.arp.ARP_OP_REPLY:
        return f"{sender} > {target} ARP reply: {sender} is at {_mac(arp.sha)}"
    return f"{sender} > {target} ARP operation {arp.op}"


def _ip(packet: dpkt.ip.IP | dpkt.ip6.IP6) -> str:
    source, target = _address(packet.src), _address(packet.dst)
    inner = packet.data
    if isinstance(inner, dpkt.tcp.TCP):
        pair = f"{_port(source, inner.sport)} > {_port(target, inner.dport)}"
        flags = "+".join(name for bit, name in _TCP_FLAGS if inner.flags & bit) or "no flags"
        return f"{pair} TCP {flags} seq {inner.seq} len {len(inner.data)}"
    if isinstance(inner, dpkt.udp.UDP):
        return f"{_port(source, inner.sport)} > {_port(target, inner.dport)} UDP len {len(inner.data)}"
    pair = f"{source} > {target}"
    if isinstance(inner, dpkt.icmp.ICMP):
        return (
            f"{pair} ICMP {_ICMP.get(inner.type, f'type {inner.type}')}{_echo(inner.type in (0, 8), inner)}"
        )
    if isinstance(inner, dpkt.icmp6.ICMP6):
        name = _ICMP6.get(inner.type, f"type {inner.type}")
        return f"{pair} ICMPv6 {name}{_echo(inner.type in (128, 129), inner)}"
    protocol = packet.p if isinstance(packet, dpkt.ip.IP) else packet.nxt
    offset = packet.offset * 8 if isinstance(packet, dpkt.ip.IP) else 0
    fragment = f" fragment at {offset}" if offset else ""
    return f"{pair} IP protocol {protocol}{fragment} len {len(bytes(inner))}"


def _echo(is_echo: bool, inner: dpkt.icmp.ICMP | dpkt.icmp6.ICMP6) -> str:
    body = bytes(inner)[4:8]
    if not is_echo or len(body) < 4:
        return f" code {inner.code}" if inner.code else ""
    identifier, sequence = struct.unpack(">HH", body)
    return f" id {identifier} seq {sequence}"


def _port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _address(raw: bytes) -> str:
    try:
        return str(ipaddress.ip_address(raw))
    except ValueError:
        return bytes(raw).hex()


def _mac(raw: bytes) -> str:
    return bytes(raw).hex(":")


def _why(error: Exception) -> str:
    return type(error).__name__ if not str(error) else str(error).splitlines()[0]
