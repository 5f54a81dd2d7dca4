"""The Toeplitz hash against the published values; what is hashed of which frame."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest

from netvsp.rss import Rss, flow

# "Verifying the RSS hash calculation", Windows driver documentation.
KEY = bytes.fromhex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")
PUBLISHED = [
    ("66.9.149.187", 2794, "161.142.100.80", 1766, 0x323E8FC2, 0x51CCC178),
    ("199.92.111.2", 14230, "65.69.140.83", 4739, 0xD718262A, 0xC626B0EA),
    ("24.19.198.95", 12898, "12.22.207.184", 38024, 0xD2D0A5DE, 0x5C2B394A),
    ("38.27.205.30", 48228, "209.142.163.6", 2217, 0x82989176, 0xAFC7327F),
    ("153.39.163.191", 44251, "202.188.127.2", 1303, 0x5D1809C5, 0x10E828A2),
    ("3ffe:2501:200:1fff::7", 2794, "3ffe:2501:200:3::1", 1766, 0x2CC18CD5, 0x40207D3D),
    ("3ffe:501:8::260:97ff:fe40:efab", 14230, "ff02::1", 4739, 0x0F0C461C, 0xDDE51BBF),
    ("3ffe:1900:4545:3:200:f8ff:fe21:67cf", 44251, "fe80::200:f8ff:fe21:67cf", 38024, 0x4B61E985, 0x02D1FEEF),
]
ALL = 0x100 | 0x200 | 0x400 | 0x1000


def frame(source: str, sport: int, target: str, dport: int, *, protocol: int = 6, tag: bytes = b"") -> bytes:
    addresses = ip_address(source).packed + ip_address(target).packed
    if len(addresses) == 8:
        head = b"\x08\x00" + struct.pack(">BBHHHBBH", 0x45, 0, 40, 0, 0, 64, protocol, 0)
    else:
        head = b"\x86\xdd" + struct.pack(">IHBB", 6 << 28, 20, protocol, 64)
    return bytes(12) + tag + head + addresses + struct.pack(">HH16x", sport, dport)


@pytest.mark.parametrize(("source", "sport", "target", "dport", "plain", "ports"), PUBLISHED)
def test_published_values(source: str, sport: int, target: str, dport: int, plain: int, ports: int) -> None:
    for tag in (b"", b"\x81\x00\x00\x05"):
        for protocol, expected in ((6, ports), (17, plain)):
            data = frame(source, sport, target, dport, protocol=protocol, tag=tag)
            placed = Rss(KEY, [3], ALL).place(data)
            assert placed is not None
            assert placed[:2] == (3, expected)
    fragment = bytearray(frame(source, sport, target, dport))
    if "." in source:
        fragment[20] |= 0x20
        placed = Rss(KEY, [0], ALL).place(fragment)
        assert placed is not None
        assert placed[1:] == (plain, 0x100)


def test_what_the_guest_did_not_ask_for_is_not_hashed() -> None:
    data = frame(*PUBLISHED[0][:4])
    assert flow(data, 0x400) is None
    assert flow(data, 0x200) is not None
    assert flow(frame(*PUBLISHED[0][:4], protocol=17), 0x200) is None
    assert flow(frame(*PUBLISHED[5][:4]), 0x2000) is not None
    assert flow(data[:33], ALL) is None
    assert flow(bytes(60), ALL) is None


def test_a_key_or_table_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="39 bytes"):
        Rss(KEY[:39], [0], ALL)
    with pytest.raises(ValueError, match="0 entries"):
        Rss(KEY, [], ALL)
