"""`--packet`: hex or a scapy expression that is parsed and never run as Python."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Raw

from vswitchctl.packets import PacketTextError, Sender, parse_packet

MACS = 'dst="02:00:00:00:00:02", src="02:00:00:00:00:01"'
ETHER = Ether(dst="02:00:00:00:00:02", src="02:00:00:00:00:01")


@pytest.mark.parametrize(
    "text",
    [
        "020000000002 020000000001 0806 00",
        "02:00:00:00:00:02:02:00:00:00:00:01:08:06:00",
        "0x020000000002020000000001080600",
        "020000.000002.020000.000001.0806.00",
    ],
)
def test_hex_is_taken_as_it_stands(text: str) -> None:
    assert parse_packet(text).hex() == "020000000002020000000001080600"


@pytest.mark.parametrize(
    ("text", "frame"),
    [
        (
            f'Ether({MACS})/IP(src="10.0.0.1", dst="10.0.0.2")/TCP(sport=1, dport=23, flags="S")',
            ETHER / IP(src="10.0.0.1", dst="10.0.0.2") / TCP(sport=1, dport=23, flags="S"),
        ),
        (
            f'Ether({MACS})/Dot1Q(vlan=7)/ARP(op=2)/"hello"',
            ETHER / Dot1Q(vlan=7) / ARP(op=2, hwsrc="00:00:00:00:00:00", psrc="0.0.0.0") / Raw(b"hello"),
        ),
        (f"Ether({MACS})/IP()/Raw(b'\\x00\\xff')", ETHER / IP(src="0.0.0.0") / Raw(b"\x00\xff")),
        (
            f'Ether({MACS})/IP()/TCP(options=[("MSS", 1460), ("NOP", None)])',
            ETHER / IP(src="0.0.0.0") / TCP(options=[("MSS", 1460), ("NOP", None)]),
        ),
        (f"Ether({MACS}, type=-1 + 0x88B6)", None),
    ],
)
def test_an_expression_is_what_scapy_makes_of_it(text: str, frame: Raw | None) -> None:
    if frame is None:
        with pytest.raises(PacketTextError, match="a field takes a literal"):
            parse_packet(text)
    else:
        assert parse_packet(text) == bytes(frame)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "neither hex nor an expression"),
        ("zz", "expected a layer such as IP(...)"),
        ("Ether(", "neither hex nor an expression at character 6"),
        ("0011", "a frame of 2 bytes; an Ethernet frame has 14 to 65535"),
        ("IP()/TCP()", "the outermost layer is IP; a port takes Ethernet frames: Ether()/..."),
        ('"text"/IP()', "an expression begins with a layer"),
        ("Ether()/Ipp()", "at character 9: no layer is named Ipp"),
        ("Ether()+IP()", "layers are joined by / only"),
        ("Ether()/IP(destination='1.2.3.4')", "IP has no field destination; it has version, ihl"),
        ("Ether()/IP('1.2.3.4')", "name the fields of IP"),
        ("Ether()/IP(**{})", "IP(**...) is not allowed"),
        ("Ether()/TCP(dport=foo)", "a field takes a literal"),
        ("Ether()/TCP(dport=999999)", "scapy cannot build"),
    ],
)
def test_what_describes_no_frame_is_told_where_and_why(text: str, words: str) -> None:
    with pytest.raises(PacketTextError) as caught:
        parse_packet(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch {}')",
        "open('{}', 'w')",
        "Ether(dst=open('{}', 'w').name)",
        "Ether(dst=__import__('pathlib').Path('{}').touch())",
        "(lambda: open('{}', 'w'))()",
        "[open('{}', 'w') for x in (1,)]",
        "Ether()/Raw(load=open('{}', 'w'))",
        "Ether().show2.__globals__['open']('{}', 'w')",
        'exec(\'open("{}", "w")\')',
        'Ether(dst=f\'{{open("{}", "w")}}\')',
    ],
)
def test_nothing_that_a_description_says_is_run(text: str, tmp_path: Path) -> None:
    target = tmp_path / "ran"
    with pytest.raises(PacketTextError):
        parse_packet(text.replace("{}", str(target)).replace("{{", "{").replace("}}", "}"))
    assert not target.exists()


def test_deep_nesting_is_refused_and_not_suffered() -> None:
    for text in ("(" * 5000 + "Ether()" + ")" * 5000, "Ether()/" * 9000 + "IP()", "Raw(load=" * 3000):
        with pytest.raises(PacketTextError):
            parse_packet(text)


def test_without_scapy_hex_works_and_an_expression_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scapy.packet", None)
    assert len(parse_packet("00" * 14)) == 14
    with pytest.raises(PacketTextError, match=r"pip install 'vswitch\[scapy\]'; or give the frame in hex"):
        parse_packet("Ether()")


SENDER = Sender(
    "02:00:00:00:00:01",
    ("10.0.0.1", "fd77::1"),
    {"10.0.0.2": "02:00:00:00:00:02", "fd77::2": "02:00:00:00:00:02"},
)


@pytest.mark.parametrize(
    ("text", "frame"),
    [
        (
            'Ether()/IP(dst="10.0.0.2")/TCP(dport=23)',
            ETHER / IP(src="10.0.0.1", dst="10.0.0.2") / TCP(dport=23),
        ),
        ('Ether()/IPv6(dst="fd77::2")/TCP()', ETHER / IPv6(src="fd77::1", dst="fd77::2") / TCP()),
        (
            'Ether()/ARP(pdst="10.0.0.2")',
            Ether(src="02:00:00:00:00:01", dst="ff:ff:ff:ff:ff:ff")
            / ARP(hwsrc="02:00:00:00:00:01", psrc="10.0.0.1", pdst="10.0.0.2"),
        ),
        (
            'Ether()/Dot1Q(vlan=7)/IP(src="10.9.9.9", dst="10.0.0.9")',
            Ether(src="02:00:00:00:00:01", dst="ff:ff:ff:ff:ff:ff")
            / Dot1Q(vlan=7)
            / IP(src="10.9.9.9", dst="10.0.0.9"),
        ),
    ],
)
def test_what_is_left_open_is_as_the_nic_would_send_it(
    text: str, frame: Raw, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("scapy asked this machine's network")

    monkeypatch.setattr("scapy.layers.l2.getmacbyip", never)
    monkeypatch.setattr("scapy.layers.inet6.getmacbyip6", never)
    assert parse_packet(text, SENDER) == bytes(frame)
    assert capfd.readouterr().err == ""
