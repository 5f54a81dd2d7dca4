"""`capture show`: what a line tells, what a broken file is answered, and which packets a filter picks."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoReply, IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet as ScapyPacket
from scapy.packet import Raw
from scapy.utils import wrpcap, wrpcapng

from vswitchctl.capture_file import CaptureFileError, Record, read, read_file, read_frames
from vswitchctl.capture_show import FilterError, compile_filter, line, lines, plain
from vswitchctl.frame_text import describe

ETHER = Ether(dst="02:00:00:00:00:02", src="02:00:00:00:00:01")
SYN = ETHER / IP(src="10.0.0.1", dst="10.0.0.2") / TCP(sport=4000, dport=23, seq=9)
T0 = 1_795_310_281_744_392_697


def record(data: ScapyPacket | bytes, **more: object) -> Record:
    raw = bytes(data)
    given = {"timestamp_ns": T0, "interface": "a", "link_type": 1, "data": raw, "original_length": len(raw)}
    return Record(**{**given, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (SYN, "10.0.0.1:4000 > 10.0.0.2:23 TCP SYN seq 9 len 0"),
        (
            ETHER / IP(src="1.1.1.1", dst="2.2.2.2") / TCP(sport=1, dport=2, flags="PA") / Raw(b"hello"),
            "1.1.1.1:1 > 2.2.2.2:2 TCP ACK+PSH seq 0 len 5",
        ),
        (
            ETHER / IP(src="1.1.1.1", dst="2.2.2.2") / UDP(sport=5, dport=53) / Raw(b"abc"),
            "1.1.1.1:5 > 2.2.2.2:53 UDP len 3",
        ),
        (
            ETHER / IP(src="1.1.1.1", dst="2.2.2.2") / ICMP(id=77, seq=3),
            "1.1.1.1 > 2.2.2.2 ICMP echo request id 77 seq 3",
        ),
        (
            ETHER / IP(src="1.1.1.1", dst="2.2.2.2") / ICMP(type=3, code=4),
            "1.1.1.1 > 2.2.2.2 ICMP unreachable code 4",
        ),
        (
            ETHER / IPv6(src="2001:db8::1", dst="2001:db8::2") / ICMPv6EchoReply(id=1, seq=2),
            "2001:db8::1 > 2001:db8::2 ICMPv6 echo reply id 1 seq 2",
        ),
        (
            ETHER / IPv6(src="2001:db8::1", dst="2001:db8::2") / UDP(sport=1, dport=2),
            "[2001:db8::1]:1 > [2001:db8::2]:2 UDP len 0",
        ),
        (ETHER / ARP(psrc="10.0.0.1", pdst="10.0.0.2"), "10.0.0.1 > 10.0.0.2 ARP request: who has 10.0.0.2"),
        (
            ETHER / ARP(op=2, psrc="10.0.0.1", pdst="10.0.0.2", hwsrc="02:00:00:00:00:01"),
            "10.0.0.1 > 10.0.0.2 ARP reply: 10.0.0.1 is at 02:00:00:00:00:01",
        ),
        (
            ETHER / Dot1Q(vlan=7) / IP(src="1.1.1.1", dst="2.2.2.2") / UDP(sport=5, dport=53),
            "1.1.1.1:5 > 2.2.2.2:53 UDP len 0 vlan 7",
        ),
        (
            ETHER / IP(src="1.1.1.1", dst="2.2.2.2", frag=4, proto=17) / Raw(b"12345678"),
            "1.1.1.1 > 2.2.2.2 IP protocol 17 fragment at 32 len 8",
        ),
        (
            Ether(dst="02:00:00:00:00:02", src="02:00:00:00:00:01", type=0x88CC) / Raw(bytes(50)),
            "02:00:00:00:00:01 > 02:00:00:00:00:02 ethertype 0x88cc, 64 bytes",
        ),
        (bytes(5), "5 bytes, shorter than an Ethernet header: 00 00 00 00 00"),
    ],
)
def test_a_frame_is_one_line_with_its_addresses_and_what_it_is(frame: ScapyPacket | bytes, text: str) -> None:
    assert describe(bytes(frame)) == text


def test_every_cut_of_a_frame_is_still_one_line() -> None:
    for whole in (bytes(SYN), bytes(ETHER / ARP()), bytes(ETHER / IPv6() / UDP())):
        for size in range(len(whole)):
            text = describe(whole[:size])
            assert text
            assert "\n" not in text


def test_a_line_has_time_port_direction_frame_and_drop() -> None:
    shown = line(
        record(SYN, direction="in", drop_code=8, comment="dropped: Filtered (8) by t: no telnet", packet_id=1)
    )
    assert shown == (
        "01:18:01.744392697 a in   10.0.0.1:4000 > 10.0.0.2:23 TCP SYN seq 9 len 0"
        "  [dropped: Filtered (8) by t: no telnet]"
    )
    assert line(record(SYN, drop_code=8)).endswith("[dropped: reason 8]")


def test_programs_get_the_same_as_plain_values() -> None:
    shown = plain(record(SYN, direction="in", drop_code=8, comment="dropped", packet_id=1))
    assert shown["summary"] == "10.0.0.1:4000 > 10.0.0.2:23 TCP SYN seq 9 len 0"
    assert (shown["drop_code"], shown["comment"], shown["packet_id"]) == (8, "dropped", 1)
    assert bytes.fromhex(str(shown["data"])) == bytes(SYN)


def test_terminal_control_characters_of_a_capture_are_not_printed() -> None:
    assert "\x1b" not in line(record(SYN, interface="\x1b[31mred", comment="\x1b[0m"))


def test_what_the_capture_missed_is_said_where_it_happened() -> None:
    shown = list(lines([record(SYN), record(SYN, lost=4)]))
    assert shown[1] == "... 4 packets lost here: the capture's reader was too slow"
    assert len(shown) == 3


@pytest.mark.parametrize("nano", [False, True])
def test_classic_pcap_is_read_with_its_resolution(tmp_path: Path, nano: bool) -> None:
    path = tmp_path / "x.pcap"
    SYN.time = 1_700_000_000.25
    wrpcap(str(path), [SYN], nano=nano)
    (found,) = read_file(path)
    assert (found.data, found.timestamp_ns, found.link_type) == (bytes(SYN), 1_700_000_000_250_000_000, 1)


def test_a_pcapng_of_scapy_s_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.pcapng"
    wrpcapng(str(path), [SYN])
    (found,) = read_file(path)
    assert found.data == bytes(SYN)


def test_a_big_endian_pcapng_is_read() -> None:
    data = bytes(SYN).ljust(56, b"\0")
    section = struct.pack(">IIIHHqI", 0x0A0D0D0A, 28, 0x1A2B3C4D, 1, 0, -1, 28)
    interface = struct.pack(">IIHHII", 1, 20, 1, 0, 0, 20)
    length = 32 + len(data)
    packet = struct.pack(">IIIIIII", 6, length, 0, 0, 1_000_000, 56, 56) + data + struct.pack(">I", length)
    (found,) = read(io.BytesIO(section + interface + packet))
    assert (found.data, found.timestamp_ns, found.interface) == (data, 1_000_000_000, "interface 0")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the capture is empty"),
        (b"hello world", "this is neither pcapng nor pcap: it begins with 68 65 6c 6c"),
        (struct.pack("<IIIHHq", 0x0A0D0D0A, 28, 0x1A2B3C4D, 1, 0, -1), "cut short at offset 0"),
        (struct.pack("<III", 0x0A0D0D0A, 1 << 30, 0x1A2B3C4D), "at offset 0: a block of 1073741824 bytes"),
        (
            struct.pack("<IIIHHqI", 0x0A0D0D0A, 28, 0x1A2B3C4D, 1, 0, -1, 28)
            + struct.pack("<IIIIIIII", 6, 32, 7, 0, 0, 0, 0, 32),
            "at offset 28: a broken block",
        ),
        (struct.pack("<IHHIIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1) + b"x", "cut short at offset 24"),
        (
            struct.pack("<IHHIIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)
            + struct.pack("<IIII", 0, 0, 1 << 30, 0),
            "at offset 24: a packet of 1073741824 bytes",
        ),
    ],
)
def test_a_broken_capture_is_an_error_that_names_the_place(data: bytes, words: str) -> None:
    with pytest.raises(CaptureFileError) as caught:
        list(read(io.BytesIO(data)))
    assert words in str(caught.value)


def test_frames_for_injection_come_once_each_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.pcap"
    wrpcap(str(path), [SYN, SYN, ETHER / ARP()])
    assert list(read_frames(path)) == [bytes(SYN), bytes(SYN), bytes(ETHER / ARP())]


def test_a_cut_frame_cannot_be_injected(tmp_path: Path) -> None:
    path = tmp_path / "x.pcap"
    cut = Raw(bytes(SYN)[:20])
    cut.wirelen = len(SYN)
    wrpcap(str(path), [cut], linktype=1)
    with pytest.raises(CaptureFileError, match=r"x\.pcap: packet 1 was cut to 20 of 54 bytes"):
        list(read_frames(path))


def test_only_ethernet_can_be_injected(tmp_path: Path) -> None:
    path = tmp_path / "x.pcap"
    wrpcap(str(path), [SYN], linktype=147)
    with pytest.raises(
        CaptureFileError, match=r"packet 1 has link type 147; a port takes Ethernet \(1\) only"
    ):
        list(read_frames(path))


def test_a_filter_picks_what_libpcap_would() -> None:
    matches = compile_filter("tcp port 23 and src host 10.0.0.1")
    assert matches(record(SYN))
    assert not matches(record(ETHER / IP(src="10.0.0.1") / TCP(dport=80)))
    assert not matches(record(ETHER / ARP()))
    assert not matches(record(SYN, link_type=147))


def test_a_wrong_filter_is_named() -> None:
    with pytest.raises(FilterError, match="filter 'tcp prt 23'"):
        compile_filter("tcp prt 23")


def test_without_libpcap_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cypcap", None)
    with pytest.raises(FilterError, match=r"pip install 'vswitch\[filter\]'"):
        compile_filter("tcp")
