"""The header values that an extension sees are those that the switch matches flows on, for any frame."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet as ScapyPacket
from scapy.packet import Raw

from vswitch.endpoint import Frame, Offload
from vswitch.engine.python import parse as switch_parser
from vswitch.extension.packet import Packet
from vswitch.fields import Field
from vswitch.upcall import UpcallRequest

port = st.integers(0, 65535)
byte = st.integers(0, 255)
payload = st.binary(max_size=40)
tags = st.sampled_from([None, 7, 0x6005])
tcp = st.builds(lambda s, d, f, p: TCP(sport=s, dport=d, flags=f) / Raw(p), port, port, byte, payload)
udp = st.builds(lambda s, d, p: UDP(sport=s, dport=d) / Raw(p), port, port, payload)
icmp = st.builds(lambda t, c: ICMP(type=t, code=c), byte, byte)
other = st.builds(Raw, payload)
ipv4 = st.builds(
    lambda ttl, tos, flags, frag, inner: IP(ttl=ttl, tos=tos, flags=flags, frag=frag) / inner,
    byte,
    byte,
    st.sampled_from(["", "MF", "DF"]),
    st.sampled_from([0, 0, 0, 1, 8191]),
    st.one_of(tcp, udp, icmp, other),
)
extension = st.sampled_from([IPv6ExtHdrHopByHop, IPv6ExtHdrDestOpt])
fragment = st.builds(
    lambda o, m: IPv6ExtHdrFragment(offset=o, m=m), st.sampled_from([0, 0, 5]), st.integers(0, 1)
)


def stack(hops: int, traffic: int, layers: list[ScapyPacket], inner: ScapyPacket) -> ScapyPacket:
    packet = IPv6(hlim=hops, tc=traffic)
    for layer in (*layers, inner):
        packet = packet / layer
    return packet


ipv6 = st.builds(
    stack,
    byte,
    byte,
    st.lists(st.one_of(extension.map(lambda kind: kind()), fragment), max_size=4),
    st.one_of(tcp, udp, st.just(ICMPv6EchoRequest()), other),
)
arp = st.builds(lambda op: ARP(op=op, psrc="10.1.2.3", pdst="10.4.5.6"), st.integers(0, 65535))
frames = st.builds(
    lambda tag, inner: bytes(Ether(dst="02:00:00:00:00:02") / (Dot1Q(vlan=tag) / inner if tag else inner)),
    st.sampled_from([None, None, 9]),
    st.one_of(ipv4, ipv6, arp, other),
)


@st.composite
def damaged(draw: Callable[[st.SearchStrategy[object]], object]) -> bytes:
    """A frame that may be cut or have a byte of its headers changed."""
    frame = draw(frames)
    assert isinstance(frame, bytes)
    if draw(st.booleans()):
        at, value = draw(st.integers(12, max(12, len(frame) - 1))), draw(byte)
        assert isinstance(at, int)
        assert isinstance(value, int)
        frame = frame[:at] + bytes([value]) + frame[at + 1 :]
    cut = draw(st.one_of(st.none(), st.integers(14, max(14, len(frame)))))
    return frame if cut is None else frame[:cut]  # type: ignore[misc]


def number(address: str) -> int:
    return int(ipaddress.ip_address(address))


def looked_at(packet: Packet) -> dict[Field, int]:
    """All that the view shows, by field."""
    seen = {
        Field.ETH_DST: int(packet.eth.dst.replace(":", ""), 16),
        Field.ETH_SRC: int(packet.eth.src.replace(":", ""), 16),
        Field.ETH_TYPE: packet.eth.type,
        Field.FRAME_LEN: packet.length,
        Field.IN_PORT: packet.in_port,
        Field.VLAN_TCI: switch_parser.NO_VLAN if packet.vlan_tci is None else packet.vlan_tci,
    }
    if packet.ip:
        seen[Field.IP_SRC], seen[Field.IP_DST] = number(packet.ip.src), number(packet.ip.dst)
        seen[Field.IP_PROTO], seen[Field.IP_DSCP] = packet.ip.proto, packet.ip.dscp
        seen[Field.IP_TTL] = packet.ip.ttl
    if packet.arp:
        seen[Field.ARP_OP] = packet.arp.op
        seen[Field.IP_SRC], seen[Field.IP_DST] = number(packet.arp.sender_ip), number(packet.arp.target_ip)
    if ports := packet.tcp or packet.udp:
        seen[Field.L4_SRC], seen[Field.L4_DST] = ports.sport, ports.dport
    if packet.tcp:
        seen[Field.TCP_FLAGS] = packet.tcp.flags
    if icmp := packet.icmp or packet.icmpv6:
        seen[Field.ICMP_TYPE], seen[Field.ICMP_CODE] = icmp.type, icmp.code
    return seen


@settings(max_examples=200, deadline=None)
@given(data=damaged(), tag=tags, mss=st.sampled_from([0, 0, 1400]))
def test_the_view_and_the_switch_s_parser_agree_on_every_frame_whose_verdict_may_be_cached(
    data: bytes, tag: int | None, mss: int
) -> None:
    parsed = switch_parser.Packet(Frame(data, Offload(mss=mss), vlan_tci=tag), 3, 1)
    switch_parser.parse(parsed)
    view = Packet(UpcallRequest(False, 3, None, tag, len(data), "a", data[:2048], large_send=mss > 0))
    seen = looked_at(view)
    if not parsed.regular or not view.may_be_cached(view.allow()):
        return
    for field, value in seen.items():
        assert value == parsed.fields[field], field.name
    fragment = parsed.fields[Field.IP_FRAG]
    if view.ip:
        assert view.ip.is_fragment is (fragment != 0)
    if fragment != 2 and mss:
        # What a large send's header says of its length hides nothing.
        assert (view.tcp is not None) == (parsed.fields[Field.IP_PROTO] == 6)
    if fragment == 2:
        assert view.tcp is view.udp is view.icmp is view.icmpv6 is None


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200))
def test_no_bytes_make_the_view_raise(data: bytes) -> None:
    looked_at(Packet(UpcallRequest(False, 3, None, None, len(data), "a", data)))
