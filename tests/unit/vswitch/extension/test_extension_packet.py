"""What an extension sees of a frame, and which looks are recorded as the condition of its verdict."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet as ScapyPacket
from scapy.packet import Raw

from vswitch.extension import Packet
from vswitch.fields import RAW_BIT, Field, mask_of, names
from vswitch.upcall import UpcallRequest

ETHER = Ether(dst="02:00:00:00:00:02", src="02:00:00:00:00:01")
TELNET = (
    ETHER / IP(src="10.0.0.1", dst="10.0.0.2", ttl=9, tos=0xB8) / TCP(sport=4000, dport=23, flags="SA", seq=7)
)


def packet(frame: ScapyPacket | bytes, **changes: object) -> Packet:
    data = bytes(frame)
    request = {
        "egress": False,
        "in_port": 3,
        "out_port": None,
        "vlan_tci": None,
        "frame_length": len(data),
        "port_name": "a",
        "data": data,
    }
    return Packet(UpcallRequest(**{**request, **changes}))  # type: ignore[arg-type]


def looks(frame: ScapyPacket | bytes, look: Callable[[Packet], object]) -> tuple[object, set[str]]:
    """What a look gives and the names of the fields that it recorded."""
    seen = packet(frame)
    value = look(seen)
    return value, set(names(seen.fields_read))


L3 = {"eth_type"}
L4 = {"eth_type", "ip_proto", "ip_frag"}

LOOKS: list[tuple[str, ScapyPacket, Callable[[Packet], object], object, set[str]]] = [
    ("port", TELNET, lambda p: p.in_port, 3, {"in_port"}),
    ("port name", TELNET, lambda p: p.port, "a", {"in_port"}),
    ("length", TELNET, lambda p: p.length, 54, {"frame_len"}),
    ("destination", TELNET, lambda p: p.eth.dst, "02:00:00:00:00:02", {"eth_dst"}),
    ("source", TELNET, lambda p: p.eth.src, "02:00:00:00:00:01", {"eth_src"}),
    ("ethertype", TELNET, lambda p: p.eth.type, 0x0800, {"eth_type"}),
    ("multicast", TELNET, lambda p: p.eth.is_multicast, False, {"eth_dst"}),
    ("no tag", TELNET, lambda p: p.vlan, None, {"vlan_tci"}),
    ("tag in band", ETHER / Dot1Q(vlan=7, prio=5) / IP(), lambda p: p.vlan, 7, {"vlan_tci"}),
    ("type behind tag", ETHER / Dot1Q(vlan=7) / ARP(), lambda p: p.eth.type, 0x0806, {"eth_type"}),
    ("ip", TELNET, lambda p: p.ip and p.ip.version, 4, L3),
    ("ip source", TELNET, lambda p: p.ip and p.ip.src, "10.0.0.1", L3 | {"ip_src"}),
    ("ip destination", TELNET, lambda p: p.ip and p.ip.dst, "10.0.0.2", L3 | {"ip_dst"}),
    ("source network", TELNET, lambda p: p.ip and p.ip.src_in("10.0.0.0/8"), True, L3 | {"ip_src"}),
    ("destination network", TELNET, lambda p: p.ip and p.ip.dst_in("10.1.0.0/16"), False, L3 | {"ip_dst"}),
    ("protocol", TELNET, lambda p: p.ip and p.ip.proto, 6, L3 | {"ip_proto"}),
    ("dscp", TELNET, lambda p: p.ip and p.ip.dscp, 46, L3 | {"ip_dscp"}),
    ("ttl", TELNET, lambda p: p.ip and p.ip.ttl, 9, L3 | {"ip_ttl"}),
    ("whole", TELNET, lambda p: p.ip and p.ip.is_fragment, False, L3 | {"ip_frag"}),
    ("tcp", TELNET, lambda p: p.tcp is not None, True, L4),
    ("source port", TELNET, lambda p: p.tcp and p.tcp.sport, 4000, L4 | {"l4_src"}),
    ("destination port", TELNET, lambda p: p.tcp and p.tcp.dport, 23, L4 | {"l4_dst"}),
    (
        "flags",
        TELNET,
        lambda p: p.tcp and (p.tcp.syn, p.tcp.ack, p.tcp.fin, p.tcp.rst, p.tcp.flags),
        (True, True, False, False, 0x12),
        L4 | {"tcp_flags"},
    ),
    ("udp of tcp", TELNET, lambda p: p.udp, None, {"eth_type", "ip_proto"}),
    ("tcp of arp", ETHER / ARP(), lambda p: p.tcp, None, L3),
    ("ip of arp", ETHER / ARP(), lambda p: p.ip, None, L3),
    ("arp of ip", TELNET, lambda p: p.arp, None, L3),
    ("arp operation", ETHER / ARP(op=2), lambda p: p.arp and p.arp.op, 2, L3 | {"arp_op"}),
    (
        "arp sender",
        ETHER / ARP(psrc="10.0.0.9"),
        lambda p: p.arp and p.arp.sender_ip,
        "10.0.0.9",
        L3 | {"ip_src"},
    ),
    (
        "arp target",
        ETHER / ARP(pdst="10.0.0.8"),
        lambda p: p.arp and p.arp.target_ip,
        "10.0.0.8",
        L3 | {"ip_dst"},
    ),
    ("udp port", ETHER / IP() / UDP(dport=53), lambda p: p.udp and p.udp.dport, 53, L4 | {"l4_dst"}),
    (
        "icmp",
        ETHER / IP() / ICMP(type=3, code=4),
        lambda p: p.icmp and (p.icmp.type, p.icmp.code),
        (3, 4),
        L4 | {"icmp_type", "icmp_code"},
    ),
    ("icmp of icmpv6", ETHER / IPv6() / ICMPv6EchoRequest(), lambda p: p.icmp, None, L3),
    (
        "icmpv6",
        ETHER / IPv6() / ICMPv6EchoRequest(),
        lambda p: p.icmpv6 and p.icmpv6.type,
        128,
        L4 | {"icmp_type"},
    ),
    (
        "ipv6",
        ETHER / IPv6(src="2001:db8::1", hlim=3) / TCP(),
        lambda p: p.ipv6 and (p.ipv6.src, p.ipv6.ttl),
        ("2001:db8::1", 3),
        L3 | {"ip_src", "ip_ttl"},
    ),
    ("ipv4 of ipv6", ETHER / IPv6() / TCP(), lambda p: p.ipv4, None, L3),
    (
        "tcp behind ipv6 options",
        ETHER / IPv6() / IPv6ExtHdrHopByHop() / TCP(dport=99),
        lambda p: p.tcp and p.tcp.dport,
        99,
        L4 | {"l4_dst"},
    ),
    (
        "first fragment",
        ETHER / IP(flags="MF") / UDP(dport=53) / Raw(b"x" * 16),
        lambda p: p.udp and p.udp.dport,
        53,
        L4 | {"l4_dst"},
    ),
    ("later fragment", ETHER / IP(frag=9, proto=6) / Raw(b"x" * 40), lambda p: p.tcp, None, L4),
    (
        "later ipv6 fragment",
        ETHER / IPv6() / IPv6ExtHdrFragment(offset=9, nh=6) / Raw(b"x" * 40),
        lambda p: p.tcp,
        None,
        L4,
    ),
]


@pytest.mark.parametrize(("name", "frame", "look", "value", "fields"), LOOKS, ids=[look[0] for look in LOOKS])
def test_a_look_gives_the_header_s_value_and_records_what_it_depends_on(
    name: str, frame: ScapyPacket, look: Callable[[Packet], object], value: object, fields: set[str]
) -> None:
    assert looks(frame, look) == (value, fields)


@pytest.mark.parametrize(
    "look",
    [
        lambda p: p.raw,
        lambda p: p.tcp.seq,
        lambda p: p.ip.length,
    ],
    ids=["raw", "sequence number", "ip length"],
)
def test_what_no_field_stands_for_makes_the_verdict_good_for_one_frame_only(
    look: Callable[[Packet], object],
) -> None:
    seen = packet(TELNET)
    look(seen)
    assert seen.fields_read & RAW_BIT
    assert not seen.may_be_cached(seen.allow())


@pytest.mark.parametrize(
    ("frame", "look"),
    [
        (bytes(TELNET)[:40], lambda p: p.tcp),
        (bytes(TELNET)[:30], lambda p: p.ip),
        (bytes(TELNET)[:30], lambda p: p.tcp),
        (bytes(ETHER / ARP())[:30], lambda p: p.arp),
        (bytes(ETHER / IP(ihl=3) / TCP()), lambda p: p.ip),
        (bytes(ETHER / IPv6(nh=0) / Raw(b"\x00\x00")), lambda p: p.ip),
        (bytes(ETHER / IP(len=30) / TCP()), lambda p: p.tcp),
    ],
    ids=[
        "tcp cut",
        "ip cut",
        "tcp of ip cut",
        "arp cut",
        "header length",
        "ipv6 options cut",
        "ip says shorter",
    ],
)
def test_a_header_that_is_cut_short_is_none_and_is_never_the_condition_of_a_cached_verdict(
    frame: bytes, look: Callable[[Packet], object]
) -> None:
    seen = packet(frame)
    assert look(seen) is None
    assert not seen.may_be_cached(seen.allow())


def test_a_frame_shorter_than_an_ethernet_header_is_survived() -> None:
    for size in range(15):
        seen = packet(bytes(size))
        assert (seen.eth.type, seen.ip, seen.arp, seen.tcp, seen.vlan) == (0, None, None, None, None)


def test_a_tag_out_of_band_is_the_frame_s_tag() -> None:
    seen = packet(TELNET, vlan_tci=0xA005)
    assert (seen.vlan, seen.vlan_tci) == (5, 0xA005)


def test_on_egress_the_port_is_the_destination_and_no_field_is_recorded_for_it() -> None:
    seen = packet(TELNET, egress=True, out_port=9, port_name="b")
    assert (seen.port, seen.out_port, seen.fields_read) == ("b", 9, 0)


def test_the_time_is_no_condition_unless_the_verdict_has_a_time_to_live() -> None:
    seen = packet(TELNET)
    assert seen.now > 0
    assert not seen.may_be_cached(seen.allow())
    assert seen.may_be_cached(seen.allow(ttl=1.5))


def test_a_verdict_says_that_it_is_not_to_be_cached() -> None:
    seen = packet(TELNET)
    assert seen.may_be_cached(seen.drop("x"))
    assert not seen.may_be_cached(seen.drop("x", cache=False))
    assert seen.drop("x").reason == "x"
    assert seen.drop("x").dropped
    assert not seen.allow().dropped


def test_every_recordable_field_but_raw_can_be_reached() -> None:
    recorded = 0
    for _, frame, look, _, _ in LOOKS:
        seen = packet(frame)
        look(seen)
        recorded |= seen.fields_read
    assert recorded == mask_of(field for field in Field if field is not Field.RAW)
