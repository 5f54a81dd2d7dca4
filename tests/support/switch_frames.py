"""Frames for tests of the switch, made with struct alone."""

from __future__ import annotations

import struct


def mac(number: int) -> bytes:
    """A unicast, locally administered address."""
    return b"\x02" + number.to_bytes(5, "big")


BROADCAST = b"\xff" * 6


def ethernet(dst: bytes, src: bytes, eth_type: int = 0x88B5, payload: bytes = b"x" * 46) -> bytes:
    return dst + src + eth_type.to_bytes(2, "big") + payload


def tagged(dst: bytes, src: bytes, vlan: int, payload: bytes = b"x" * 46) -> bytes:
    return dst + src + struct.pack(">HHH", 0x8100, vlan, 0x88B5) + payload


def ipv4(
    dst: bytes,
    src: bytes,
    ip_src: str = "10.0.0.1",
    ip_dst: str = "10.0.0.2",
    proto: int = 6,
    payload: bytes = b"",
    fragment: int = 0,
    ttl: int = 64,
) -> bytes:
    header = struct.pack(
        ">BBHHHBBH4s4s",
        0x45,
        0,
        20 + len(payload),
        1,
        fragment,
        ttl,
        proto,
        0,
        bytes(map(int, ip_src.split("."))),
        bytes(map(int, ip_dst.split("."))),
    )
    return ethernet(dst, src, 0x0800, header + payload)


def tcp(sport: int, dport: int, flags: int = 0x02, payload: bytes = b"") -> bytes:
    return struct.pack(">HHIIBBHHH", sport, dport, 0, 0, 0x50, flags, 64240, 0, 0) + payload


def udp(sport: int, dport: int, payload: bytes = b"") -> bytes:
    return struct.pack(">HHHH", sport, dport, 8 + len(payload), 0) + payload
