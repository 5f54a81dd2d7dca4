"""Between virtio-net header and RNDIS per-packet info, both ways."""

from __future__ import annotations

import struct

import pytest

from netvsc import frames
from vswitch_wire import rndis
from vswitch_wire.errors import WireError

MAC_A, MAC_B = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
PLAIN = frames.VNET.pack(0, 0, 0, 0, 0, 0)


def ones(data: bytes) -> int:
    data += b"\0" * (len(data) & 1)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def tcp4(payload: bytes, *, partial: bool) -> bytes:
    """An IPv4 TCP frame; its checksum is complete, or only the pseudo-header sum."""
    source, target = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
    tcp = bytearray(struct.pack(">HHIIBBHHH", 1000, 2000, 1, 2, 5 << 4, 0x18, 512, 0, 0) + payload)
    pseudo = ones(source + target + struct.pack(">BBH", 0, 6, len(tcp)))
    if partial:
        struct.pack_into(">H", tcp, 16, pseudo)
    else:
        check = ~ones(source + target + struct.pack(">BBH", 0, 6, len(tcp)) + bytes(tcp)) & 0xFFFF
        struct.pack_into(">H", tcp, 16, check)
    ip = bytearray(struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 7, 0x4000, 64, 6, 0, source, target))
    struct.pack_into(">H", ip, 10, ~ones(bytes(ip)) & 0xFFFF)
    return MAC_B + MAC_A + b"\x08\x00" + bytes(ip + tcp)


def checked(message: bytes) -> rndis.Packet:
    packet = rndis.decode(message)
    assert isinstance(packet, rndis.Packet)
    return packet


def test_a_plain_frame_crosses_unchanged_and_without_packet_info() -> None:
    frame = MAC_B + MAC_A + b"\x08\x06" + bytes(46)
    message = frames.transmit(PLAIN + frame, checksum=True)
    assert checked(message).data == frame
    assert checked(message).ppi == ()
    assert frames.reassemble([frames.receive(message)], 1500) == PLAIN + frame


def test_a_partial_checksum_becomes_the_checksum_packet_info() -> None:
    frame = tcp4(b"hello", partial=True)
    header = frames.VNET.pack(frames.NEEDS_CSUM, 0, 0, 0, 34, 16)
    packet = checked(frames.transmit(header + frame, checksum=True))
    assert packet.data == frame
    (info,) = packet.ppi
    assert info.type == rndis.TCPIP_CHKSUM_PKTINFO
    assert int.from_bytes(info.data, "little") == 0b101 | 34 << 16


def test_without_checksum_offload_the_checksum_is_completed_here() -> None:
    header = frames.VNET.pack(frames.NEEDS_CSUM, 0, 0, 0, 34, 16)
    packet = checked(frames.transmit(header + tcp4(b"hello", partial=True), checksum=False))
    assert packet.ppi == ()
    assert packet.data == tcp4(b"hello", partial=False)


def test_a_large_tcp_frame_becomes_a_large_send_as_the_stock_driver_forms_it() -> None:
    frame = tcp4(bytes(8000), partial=True)
    header = frames.VNET.pack(frames.NEEDS_CSUM, frames.GSO_TCPV4, 54, 1448, 34, 16)
    packet = checked(frames.transmit(header + frame, checksum=True))
    (info,) = packet.ppi
    value = int.from_bytes(info.data, "little")
    assert info.type == rndis.TCP_LARGESEND_PKTINFO
    assert (value & 0xFFFFF, value >> 20 & 0x3FF, value >> 30) == (1448, 34, 1)
    assert packet.data[16:18] == packet.data[24:26] == b"\0\0"
    pseudo = ones(bytes([10, 0, 0, 1, 10, 0, 0, 2, 0, 6]))
    assert packet.data[50:52] == pseudo.to_bytes(2, "big")


def test_a_vlan_tag_travels_out_of_band_and_comes_back_inline() -> None:
    inner = tcp4(b"x", partial=True)
    tagged = inner[:12] + struct.pack(">HH", 0x8100, 5 << 13 | 1 << 12 | 42) + inner[12:]
    header = frames.VNET.pack(frames.NEEDS_CSUM, 0, 0, 0, 38, 16)
    message = frames.transmit(header + tagged, checksum=True)
    packet = checked(message)
    assert packet.data == inner
    assert [info.type for info in packet.ppi] == [rndis.IEEE_8021Q_INFO, rndis.TCPIP_CHKSUM_PKTINFO]
    received = frames.receive(message)
    assert received.vlan == 5 << 13 | 1 << 12 | 42
    received.checksum = frames.RX_TCP_OK | frames.RX_VALUE_INVALID
    assert frames.reassemble([received], 1500) == header + tagged


@pytest.mark.parametrize(
    ("result", "flags"),
    [
        (0, 0),
        (frames.RX_TCP_OK, frames.DATA_VALID),
        (frames.RX_TCP_OK | frames.RX_VALUE_INVALID, frames.NEEDS_CSUM),
    ],
)
def test_the_hosts_checksum_result_reaches_the_guests_kernel(result: int, flags: int) -> None:
    received = frames.Received(tcp4(b"data", partial=True), checksum=result)
    head = frames.VNET.unpack_from(frames.reassemble([received], 1500))
    assert head[0] == flags
    assert head[4:] == ((34, 16) if flags == frames.NEEDS_CSUM else (0, 0))


def test_a_coalesced_run_becomes_one_segmentable_frame() -> None:
    whole = tcp4(bytes(range(256)) * 16, partial=True)
    pieces = [
        frames.Received(whole[:2000], frames.RX_TCP_OK, fragment=2),
        frames.Received(whole[2000:], fragment=4),
    ]
    data = frames.reassemble(pieces, 1500)
    flags, gso, length, mss, start, offset = frames.VNET.unpack_from(data)
    assert (flags, gso, length, mss, start, offset) == (frames.NEEDS_CSUM, frames.GSO_TCPV4, 54, 1460, 34, 16)
    assert data[frames.VNET.size :] == whole
    assert ones(data[24:44]) == 0xFFFF


@pytest.mark.parametrize("cut", [1, 20, 43, 44, 60])
def test_a_cut_message_is_refused(cut: int) -> None:
    message = frames.transmit(PLAIN + MAC_B + MAC_A + b"\x08\x06" + bytes(46), checksum=True)
    with pytest.raises(WireError):
        frames.receive(message[:cut])


@pytest.mark.parametrize(
    ("offset", "value"), [(8, 35), (8, 0xFFFFFFF0), (12, 0), (12, 0xFFFFFFFF), (28, 37), (32, 8)]
)
def test_lying_offsets_are_refused(offset: int, value: int) -> None:
    inner = tcp4(b"x", partial=True)
    header = frames.VNET.pack(frames.NEEDS_CSUM, 0, 0, 0, 34, 16)
    message = bytearray(frames.transmit(header + inner, checksum=True))
    struct.pack_into("<I", message, offset, value)
    with pytest.raises(WireError):
        frames.receive(bytes(message))
