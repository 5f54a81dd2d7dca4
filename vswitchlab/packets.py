"""Reads our captures back with dpkt, a decoder that is not ours, and builds frames to trace."""

from __future__ import annotations

import io
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import dpkt
from dpkt import pcapng

__all__ = ["Sighting", "echo", "frame_to", "read", "summary", "syn_to"]

OPT_EPB_FLAGS = 2
OPT_EPB_PACKETID = 5


@dataclass(frozen=True, slots=True)
class Sighting:
    """One packet as seen at one port. `comment` is empty unless it was dropped."""

    interface: str
    direction: str
    packet_id: int
    comment: str
    frame: bytes


def read(data: bytes) -> list[Sighting]:
    """Every packet block of a pcapng file. Raises dpkt's errors where it is malformed."""
    reader = pcapng.Reader(io.BytesIO(data))
    count = sum(1 for _ in reader)
    sightings = list(_blocks(data))
    if count != len(sightings):
        raise ValueError(f"dpkt's reader finds {count} packets, its blocks are {len(sightings)}")
    return sightings


def _blocks(data: bytes) -> Iterator[Sighting]:
    names: list[str] = []
    offset = 0
    while offset < len(data):
        kind, length = struct.unpack_from("<II", data, offset)
        block = data[offset : offset + length]
        offset += length
        if kind == pcapng.PCAPNG_BT_IDB:
            options = {each.code: each.data for each in pcapng.InterfaceDescriptionBlockLE(block).opts}
            names.append(options.get(pcapng.PCAPNG_OPT_IF_NAME, b"").decode())
        elif kind == pcapng.PCAPNG_BT_EPB:
            packet = pcapng.EnhancedPacketBlockLE(block)
            options = {each.code: each.data for each in packet.opts}
            flags = struct.unpack("<I", options.get(OPT_EPB_FLAGS, bytes(4)))[0]
            yield Sighting(
                names[packet.iface_id],
                {1: "in", 2: "out"}.get(flags & 3, ""),
                struct.unpack("<Q", options.get(OPT_EPB_PACKETID, bytes(8)))[0],
                options.get(pcapng.PCAPNG_OPT_COMMENT, b"").decode(),
                bytes(packet.pkt_data),
            )


def echo(sighting: Sighting) -> tuple[int, int, int] | None:
    """(type, identifier, sequence) of an ICMP echo request (8) or reply (0), else None."""
    packet = dpkt.ethernet.Ethernet(sighting.frame).data
    if isinstance(packet, dpkt.ip.IP) and isinstance(packet.data, dpkt.icmp.ICMP):
        message = packet.data
        if message.type in (dpkt.icmp.ICMP_ECHO, dpkt.icmp.ICMP_ECHOREPLY):
            return message.type, message.data.id, message.data.seq
    return None


def syn_to(sighting: Sighting) -> int | None:
    """The destination port of a TCP SYN (without ACK), else None."""
    packet = dpkt.ethernet.Ethernet(sighting.frame).data
    if isinstance(packet, dpkt.ip.IP) and isinstance(packet.data, dpkt.tcp.TCP):
        segment = packet.data
        if segment.flags & (dpkt.tcp.TH_SYN | dpkt.tcp.TH_ACK) == dpkt.tcp.TH_SYN:
            return int(segment.dport)
    return None


def frame_to(source_mac: str, target_mac: str, source: str, target: str, dport: int) -> bytes:
    """A TCP SYN as a guest would send it."""
    segment = dpkt.tcp.TCP(sport=40000, dport=dport, seq=1, flags=dpkt.tcp.TH_SYN, win=64240)
    packet = dpkt.ip.IP(
        src=socket.inet_aton(source),
        dst=socket.inet_aton(target),
        p=dpkt.ip.IP_PROTO_TCP,
        ttl=64,
        data=segment,
    )
    packet.len = len(packet)
    mac = [bytes.fromhex(each.replace(":", "")) for each in (target_mac, source_mac)]
    return bytes(dpkt.ethernet.Ethernet(dst=mac[0], src=mac[1], type=dpkt.ethernet.ETH_TYPE_IP, data=packet))


def summary(sighting: Sighting) -> str:
    """One line for people: where, which way, who to whom, what; and why it was dropped."""
    where = f"{sighting.interface} {sighting.direction or '-'}"
    try:
        text = _what(dpkt.ethernet.Ethernet(sighting.frame))
    except (dpkt.UnpackError, IndexError):
        text = f"malformed, {len(sighting.frame)} bytes"
    return f"{where}: {text}" + (f" [{sighting.comment}]" if sighting.comment else "")


def _what(frame: dpkt.ethernet.Ethernet) -> str:
    packet = frame.data
    if isinstance(packet, dpkt.arp.ARP):
        source, target = socket.inet_ntoa(packet.spa), socket.inet_ntoa(packet.tpa)
        asks = packet.op == dpkt.arp.ARP_OP_REQUEST
        return f"ARP {source} asks for {target}" if asks else f"ARP {source} tells {target} where it is"
    if isinstance(packet, dpkt.ip.IP | dpkt.ip6.IP6):
        family = socket.AF_INET if isinstance(packet, dpkt.ip.IP) else socket.AF_INET6
        source, target = (socket.inet_ntop(family, each) for each in (packet.src, packet.dst))
        inner = packet.data
        if isinstance(inner, dpkt.tcp.TCP | dpkt.udp.UDP):
            source, target = f"{source}:{inner.sport}", f"{target}:{inner.dport}"
        name = type(inner).__name__ if not isinstance(inner, bytes) else f"protocol {packet.p}"
        detail = ""
        if isinstance(inner, dpkt.icmp.ICMP):
            detail = f" type {inner.type}"
            if isinstance(inner.data, dpkt.icmp.ICMP.Echo):
                detail += f" id {inner.data.id} seq {inner.data.seq}"
        elif isinstance(inner, dpkt.tcp.TCP):
            names = ["FIN", "SYN", "RST", "PSH", "ACK", "URG"]
            detail = " " + "+".join(each for bit, each in enumerate(names) if inner.flags >> bit & 1)
        return f"{name}{detail} {source} -> {target}, {len(bytes(frame))} bytes"
    return f"type 0x{frame.type:04x}, {len(bytes(frame))} bytes"
