"""Offloads: what is offered, what the guest enables, and that every checksum and segment comes out right."""

from __future__ import annotations

import struct

import dpkt
import pytest
from scripted_guest import MAC, PEER, ScriptedGuest, ethernet, rndis_packet

from vswitch.drops import DropReason
from vswitch.endpoint import Checksum, Frame, Offload
from vswitch_wire import ndis, rndis

PARTIAL = Offload(Checksum.PARTIAL)
ALL_ON = ndis.OffloadParameters(4, 4, 4, 4, 4, 0, 0, 2, 2)
RSC_ON = ndis.OffloadParameters(4, 4, 4, 4, 4, 0, 0, 2, 2, rsc_ipv4=2, rsc_ipv6=2)
RSC_CAPABILITY = 0x80


def folded(data: bytes, initial: int = 0) -> int:
    """RFC 1071's sum, the slow way: this test's own."""
    data += b"\0" * (len(data) % 2)
    total = initial + sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def ip_frame(
    payload: bytes,
    *,
    version: int = 4,
    protocol: int = 6,
    partial: bool = True,
    flags: int = 0x18,
    towards: bytes = MAC,
    lso: bool = False,
    options: bytes = b"",
) -> bytes:
    """A TCP or UDP frame, its checksum the pseudo-header sum (partial) or 0, its lengths 0 for `lso`."""
    if protocol == 6:
        offset = (20 + len(options)) // 4 << 4
        transport = struct.pack(">HHIIBBHHH", 1234, 80, 0xFFFFFF00, 7, offset, flags, 512, 0, 0) + options
    else:
        transport = struct.pack(">HHHH", 1234, 53, 8 + len(payload), 0)
    length = len(transport) + len(payload)
    source, target = (
        (bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])) if version == 4 else (b"\xfd" * 16, b"\xfe" * 16)
    )
    if partial:
        at = 16 if protocol == 6 else 6
        pseudo = folded(source + target, protocol + (0 if lso else length))
        transport = transport[:at] + struct.pack(">H", pseudo) + transport[at + 2 :]
    if version == 4:
        head = struct.pack(">BBHHHBBH", 0x45, 0, 0 if lso else 20 + length, 77, 0x4000, 64, protocol, 0)
        head += source + target
        if not lso:
            head = head[:10] + struct.pack(">H", ~folded(head) & 0xFFFF) + head[12:]
        ethertype = 0x0800
    else:
        head = struct.pack(">IHBB", 6 << 28, 0 if lso else length, protocol, 64) + source + target
        ethertype = 0x86DD
    return ethernet(head + transport + payload, dst=towards, src=PEER, ethertype=ethertype)


def check(frame: bytes) -> dpkt.tcp.TCP | dpkt.udp.UDP:
    """Every checksum of the frame verifies; its transport layer by dpkt."""
    decoded = dpkt.ethernet.Ethernet(frame)
    ip = decoded.data
    raw = frame[14:]
    if isinstance(ip, dpkt.ip.IP):
        assert folded(raw[:20]) == 0xFFFF, "IPv4 header checksum"
        assert ip.len == len(raw)
        addresses, body = raw[12:20], raw[20 : ip.len]
    else:
        assert ip.plen == len(raw) - 40
        addresses, body = raw[8:40], raw[40:]
    assert folded(addresses + body, ip.p + len(body)) == 0xFFFF, "transport checksum"
    return ip.data


async def messages(guest: ScriptedGuest) -> list[list[rndis.Packet]]:
    await guest.pump()
    return [[rndis.Packet.unpack(message) for message in packets] for _, packets in guest.received()]


async def enable(guest: ScriptedGuest, parameters: ndis.OffloadParameters = ALL_ON) -> None:
    assert await guest.set(0xFC01020C, parameters.pack()) == 0


async def take_partial(guest: ScriptedGuest) -> None:
    """What our own guest says and no other: it takes partial checksums."""
    parameter = ndis.ConfigParameter("RxPartialChecksum", "1".encode("utf-16-le"))
    assert await guest.set(0x0001021B, parameter.pack()) == 0


def flags_of(packet: rndis.Packet) -> int:
    (record,) = [record for record in packet.ppi if record.type == rndis.TCPIP_CHKSUM_PKTINFO]
    return record.value


async def test_the_capability_object_is_156_bytes_and_passes_every_guests_gate(guest: ScriptedGuest) -> None:
    await guest.up()
    answer = await guest.query(0xFC01020D)
    assert (answer.status, len(answer.info)) == (0, 156)
    offload = ndis.Offload.unpack(answer.info)
    assert offload.v4_tx_checksum == offload.v4_rx_checksum == 0x155
    assert offload.v6_tx_checksum == offload.v6_rx_checksum == 0x55
    assert (offload.lso_v4_maximum, offload.lso_v4_minimum_segments) == (0xF53C, 2)
    assert (offload.lso_v6_maximum, offload.lso_v6_options) == (0xF53C, 5)
    assert not offload.rsc_v4
    assert not offload.rsc_v6


@pytest.mark.parametrize(
    ("version", "capabilities", "offered"),
    [(0x60001, 0x83, True), (0x60001, 0x03, False), (0x60000, 0x83, False)],
)
async def test_coalescing_is_offered_only_to_6_1_guests_that_announce_it(
    guest: ScriptedGuest, version: int, capabilities: int, offered: bool
) -> None:
    await guest.up(version=version, capabilities=capabilities)
    info = (await guest.query(0xFC01020D)).info
    assert info[144:146] == bytes([offered, offered])
    await enable(guest, RSC_ON)
    assert (await guest.query(0xFC01020B)).info[144:146] == bytes([offered, offered])


@pytest.mark.parametrize("size", [20, 22, 28])
async def test_offload_parameters_are_judged_by_size_and_the_result_is_indicated(
    guest: ScriptedGuest, size: int
) -> None:
    await guest.up()
    assert ndis.Offload.unpack((await guest.query(0xFC01020B)).info) == ndis.Offload()
    wanted = ndis.OffloadParameters(3, 4, 1, 2, 0, 1, 0, 2, 1)
    assert await guest.set(0xFC01020C, wanted.pack(size)) == 0
    current = (await guest.query(0xFC01020B)).info
    assert guest.indications == [rndis.IndicateStatus(0x40020006, current)]
    offload = ndis.Offload.unpack(current)
    assert (offload.v4_tx_checksum, offload.v4_rx_checksum) == (0x15, 0x115)
    assert (offload.v6_tx_checksum, offload.v6_rx_checksum) == (0x15, 0)
    assert (offload.lso_v4_maximum, offload.lso_v6_maximum) == (0xF53C, 0)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (ndis.OffloadParameters(lso_v1=2).pack(), 0xC00000BB),
        (ndis.OffloadParameters(tcp4_checksum=5).pack(), 0xC0010015),
        (ndis.OffloadParameters(lso_v2_ipv4=3).pack(), 0xC0010015),
        (b"\x80\x03\x13\x00" + bytes(15), 0xC0010015),
        (b"\x81\x03\x14\x00" + bytes(16), 0xC0010015),
    ],
)
async def test_offload_parameters_that_cannot_be_are_refused(
    guest: ScriptedGuest, data: bytes, status: int
) -> None:
    await guest.up()
    before = (await guest.query(0xFC01020B)).info
    assert await guest.set(0xFC01020C, data) == status
    assert guest.indications == []
    assert (await guest.query(0xFC01020B)).info == before


TX = [
    (4, 6, rndis.TxChecksum(ipv4=True, tcp=True, header_offset=34)),
    (4, 17, rndis.TxChecksum(ipv4=True, udp=True, header_offset=34)),
    (6, 6, rndis.TxChecksum(ipv6=True, tcp=True, header_offset=54)),
    (6, 17, rndis.TxChecksum(ipv6=True, udp=True, header_offset=0)),
]


@pytest.mark.parametrize(("version", "protocol", "request_bits"), TX)
async def test_a_partial_checksum_from_the_guest_travels_as_metadata(
    guest: ScriptedGuest, version: int, protocol: int, request_bits: rndis.TxChecksum
) -> None:
    await guest.up()
    data = ip_frame(b"payload", version=version, protocol=protocol)
    record = rndis.ppi_u32(rndis.TCPIP_CHKSUM_PKTINFO, request_bits.pack())
    sent = guest.send_rndis(rndis_packet(data, record))
    await guest.pump()
    assert guest.completion_status(sent) == 1
    (frame,) = guest.frames
    assert bytes(frame.data) == data
    assert frame.offload.checksum is Checksum.PARTIAL
    assert frame.offload.l4_offset == (34 if version == 4 else 54)


async def test_an_ip_header_checksum_is_filled_in_at_once(guest: ScriptedGuest) -> None:
    await guest.up()
    good = ip_frame(b"payload", protocol=1, partial=False)
    request_bits = rndis.TxChecksum(ipv4=True, ip_header=True).pack()
    zeroed = good[:24] + b"\0\0" + good[26:]
    guest.send_rndis(rndis_packet(zeroed, rndis.ppi_u32(rndis.TCPIP_CHKSUM_PKTINFO, request_bits)))
    await guest.pump()
    assert [bytes(frame.data) for frame in guest.frames] == [good]
    assert guest.frames[0].offload == Offload()


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (ethernet(), rndis.TxChecksum(ipv4=True, tcp=True).pack()),
        (ip_frame(b""), rndis.TxChecksum(ipv4=True, udp=True).pack()),
        (ip_frame(b""), rndis.TxChecksum(ipv4=True, tcp=True, header_offset=40).pack()),
        (ip_frame(b"")[:50], rndis.TxChecksum(ipv4=True, tcp=True).pack()),
    ],
)
async def test_a_checksum_that_the_frame_cannot_have_is_status_2(
    guest: ScriptedGuest, data: bytes, value: int
) -> None:
    await guest.up()
    sent = guest.send_rndis(rndis_packet(data, rndis.ppi_u32(rndis.TCPIP_CHKSUM_PKTINFO, value)))
    await guest.pump()
    assert guest.completion_status(sent) == 2
    assert guest.frames == []


@pytest.mark.parametrize("size", [0, 1, 2, 7, 1000, 1443])
@pytest.mark.parametrize(("version", "protocol"), [(4, 6), (4, 17), (6, 6), (6, 17)])
async def test_a_partial_checksum_is_completed_for_a_guest_without_the_offload(
    guest: ScriptedGuest, version: int, protocol: int, size: int
) -> None:
    await guest.up()
    payload = bytes(range(7, 207)) * 8
    data = ip_frame(payload[: size - 20 if size > 1000 else size], version=version, protocol=protocol)
    assert guest.deliver(Frame(data, PARTIAL)) == [None]
    ((packet,),) = await messages(guest)
    assert packet.ppi == ()
    check(packet.data)
    assert guest.nic.stats()["checksums_completed"] == 1


async def test_ethernet_padding_is_no_part_of_a_checksum(guest: ScriptedGuest) -> None:
    await guest.up()
    data = ip_frame(b"x", protocol=17)
    guest.deliver(Frame(data + b"\xaa" * (60 - len(data)), PARTIAL))
    ((packet,),) = await messages(guest)
    check(packet.data[: len(data)])
    assert packet.data[len(data) :] == b"\xaa" * (60 - len(data))


async def test_a_udp_checksum_that_comes_out_zero_is_sent_as_ffff(guest: ScriptedGuest) -> None:
    await guest.up()

    def whole(data: bytes) -> int:
        return folded(data[26:34] + data[34:40] + b"\0\0" + data[42:], 17 + 10)

    filler = 0xFFFF - whole(ip_frame(b"\0\0", protocol=17))
    data = ip_frame(struct.pack(">H", filler), protocol=17)
    assert whole(data) == 0xFFFF
    guest.deliver(Frame(data, PARTIAL))
    ((packet,),) = await messages(guest)
    assert packet.data[40:42] == b"\xff\xff"


@pytest.mark.parametrize(
    ("version", "protocol", "flags"), [(4, 6, 0x28), (4, 17, 0x30), (6, 6, 0x08), (6, 17, 0x10)]
)
async def test_a_guest_with_the_offload_is_told_and_gets_the_checksum_all_the_same(
    guest: ScriptedGuest, version: int, protocol: int, flags: int
) -> None:
    """Linux says nothing when its user switches receive checksums off, and forwards what it got."""
    await guest.up()
    await enable(guest)
    data = ip_frame(b"payload", version=version, protocol=protocol)
    guest.deliver(Frame(data, PARTIAL), Frame(data, Offload(Checksum.GOOD)), Frame(data))
    ((partial, good, unknown),) = await messages(guest)
    check(partial.data)
    assert good.data == unknown.data == data
    assert flags_of(partial) == flags_of(good) == flags
    assert unknown.ppi == ()
    assert guest.nic.stats()["checksums_completed"] == 1


@pytest.mark.parametrize(
    ("version", "protocol", "flags"), [(4, 6, 0x28), (4, 17, 0x30), (6, 6, 0x08), (6, 17, 0x10)]
)
async def test_a_guest_that_takes_partial_checksums_is_told_instead(
    guest: ScriptedGuest, version: int, protocol: int, flags: int
) -> None:
    await guest.up()
    await enable(guest)
    await take_partial(guest)
    data = ip_frame(b"payload", version=version, protocol=protocol)
    guest.deliver(Frame(data, PARTIAL), Frame(data, Offload(Checksum.GOOD)), Frame(data))
    ((partial, good, unknown),) = await messages(guest)
    assert partial.data == good.data == unknown.data == data
    # Bit 7: the frame is good, the value in its checksum field is not.
    assert flags_of(partial) == flags | 0x80
    assert flags_of(good) == flags
    assert unknown.ppi == ()
    assert guest.nic.stats()["checksums_passed_on"] == 1


async def test_a_partial_checksum_in_a_frame_without_one_is_dropped(guest: ScriptedGuest) -> None:
    await guest.up()
    assert guest.deliver(Frame(ethernet(dst=MAC), PARTIAL)) == [DropReason.INVALID_PACKET]
    assert guest.deliver(Frame(ethernet(dst=MAC), Offload(Checksum.GOOD))) == [None]


async def test_a_large_send_by_gpa_ranges_is_one_frame_with_its_mss(guest: ScriptedGuest) -> None:
    await guest.up()
    data = ip_frame(bytes(60000), lso=True)
    value = rndis.LargeSend(1448, 34).pack()
    sent = guest.send_direct(rndis_packet(data, rndis.ppi_u32(rndis.TCP_LARGESEND_PKTINFO, value)), pieces=3)
    await guest.pump()
    assert guest.completion_status(sent) == 1
    (frame,) = guest.frames
    assert bytes(frame.data) == data
    assert (frame.offload.mss, frame.offload.checksum) == (1448, Checksum.PARTIAL)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (ip_frame(bytes(3000), lso=True), rndis.LargeSend(1448, 34, version=1).pack()),
        (ip_frame(bytes(3000), lso=True), rndis.LargeSend(1448, 36).pack()),
        (ip_frame(bytes(3000), lso=True), rndis.LargeSend(1, 34).pack()),
        (ip_frame(bytes(3000), protocol=17), rndis.LargeSend(1448, 34).pack()),
        (ethernet(bytes(3000)), rndis.LargeSend(1448, 0).pack()),
        (ip_frame(b"")[:46] + b"\x10" + ip_frame(b"")[47:], rndis.LargeSend(1448, 34).pack()),
    ],
)
async def test_an_impossible_large_send_is_status_2(guest: ScriptedGuest, data: bytes, value: int) -> None:
    await guest.up()
    sent = guest.send_rndis(rndis_packet(data, rndis.ppi_u32(rndis.TCP_LARGESEND_PKTINFO, value)))
    await guest.pump()
    assert guest.completion_status(sent) == 2
    assert guest.frames == []


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [1, 1400, 1401, 14000, 60000])
async def test_a_large_send_is_cut_into_right_segments_for_a_guest_without_coalescing(
    guest: ScriptedGuest, version: int, size: int
) -> None:
    await guest.up()
    payload = bytes((number * 7) & 0xFF for number in range(size))
    data = ip_frame(payload, version=version, lso=True, flags=0x99, options=b"\x01" * 12)
    assert guest.deliver(Frame(data, Offload(Checksum.PARTIAL, mss=1400))) == [None]
    (packets,) = await messages(guest)
    assert len(packets) == -(-size // 1400)
    segments = [check(packet.data) for packet in packets]
    assert b"".join(segment.data for segment in segments) == payload
    assert [segment.seq for segment in segments] == [
        (0xFFFFFF00 + 1400 * number) & 0xFFFFFFFF for number in range(len(segments))
    ]
    # CWR on the first only, FIN and PSH on the last only, ACK on all.
    expected = [0x10] * len(segments)
    expected[0] |= 0x80
    expected[-1] |= 0x09
    assert [segment.flags for segment in segments] == expected
    if version == 4:
        numbers = [dpkt.ethernet.Ethernet(packet.data).data.id for packet in packets]
        assert numbers == [77 + number for number in range(len(packets))]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [1401, 14000, 60000])
@pytest.mark.parametrize("partial", [True, False])
async def test_a_large_send_stays_one_run_for_a_guest_that_coalesces(
    guest: ScriptedGuest, version: int, size: int, partial: bool
) -> None:
    await guest.up(capabilities=0x83)
    await enable(guest, RSC_ON)
    if partial:
        await take_partial(guest)
    payload = bytes((number * 3) & 0xFF for number in range(size))
    data = ip_frame(payload, version=version, lso=True)
    assert guest.deliver(Frame(data, Offload(Checksum.PARTIAL, mss=1400), vlan_tci=0x2005)) == [None]
    (packets,) = await messages(guest)
    count = -(-size // 1400)
    assert len(packets) == count
    marks = []
    for packet in packets:
        (record,) = [entry for entry in packet.ppi if entry.type == 0x80000001]
        marks.append(rndis.PacketId.unpack(record.data))
    assert all(mark.version == 1 for mark in marks)
    assert [mark.flags for mark in marks] == [3] + [1] * (count - 2) + [5]
    whole = b"".join(packet.data for packet in packets)
    assert whole[14 + (20 if version == 4 else 40) + 20 :] == payload
    flags = 0x28 if version == 4 else 0x08
    if partial:
        true = ip_frame(payload, version=version)
        assert whole == true, "headers of the run are those of the whole packet, its checksum partial"
        assert flags_of(packets[0]) == flags | 0x80
    else:
        check(whole)
        assert flags_of(packets[0]) == flags
    assert guest.nic.stats()["large_sends_coalesced"] == 1


async def test_runs_and_plain_frames_share_packets_without_splitting_a_run(guest: ScriptedGuest) -> None:
    guest.gpadls[0xE1E10] = (64, 400)
    await guest.up(capabilities=0x83)
    await enable(guest, RSC_ON)
    run = Frame(ip_frame(bytes(60000), lso=True), Offload(Checksum.PARTIAL, mss=120))
    plain = Frame(ethernet(dst=MAC, src=PEER))
    assert guest.deliver(plain, run, plain) == [None, None, None]
    packets = await messages(guest)
    assert [len(packet) for packet in packets] == [501, 1]
    for packet in packets:
        marks = [
            rndis.PacketId.unpack(entry.data).flags
            for message in packet
            for entry in message.ppi
            if entry.type == 0x80000001
        ]
        assert marks.count(3) == marks.count(5)


async def test_a_large_send_of_more_segments_than_a_run_holds_is_cut(guest: ScriptedGuest) -> None:
    """A peer may announce an MSS of 48: Linux then makes more than 562 segments of one send."""
    guest.gpadls[0xE1E10] = (64, 400)
    await guest.up(capabilities=0x83)
    await enable(guest, RSC_ON)
    payload = bytes(number & 0xFF for number in range(600 * 48))
    data = ip_frame(payload, lso=True)
    sent = guest.send_direct(
        rndis_packet(data, rndis.ppi_u32(rndis.TCP_LARGESEND_PKTINFO, rndis.LargeSend(48, 34).pack())),
        pieces=3,
    )
    await guest.pump()
    assert guest.completion_status(sent) == 1
    back = Frame(MAC + PEER + bytes(guest.frames[0].data)[12:], guest.frames[0].offload)
    assert guest.deliver(back) == [None]
    packets = [packet for group in await messages(guest) for packet in group]
    assert len(packets) == 600
    assert b"".join(check(packet.data).data for packet in packets) == payload
    assert guest.nic.stats()["large_sends_segmented"] == 1


async def test_a_link_that_is_down_passes_nothing_either_way(guest: ScriptedGuest) -> None:
    await guest.up()
    await guest.nic.set_link(False)
    sent = guest.send_rndis(rndis_packet(ethernet()))
    await guest.pump()
    assert guest.completion_status(sent) == 1
    assert guest.frames == []
    assert guest.ingress_drops == {DropReason.DISCONNECTED: 1}
    assert guest.deliver(Frame(ethernet(dst=MAC, src=PEER))) == [DropReason.DISCONNECTED]


async def test_a_large_send_that_needs_more_slots_than_there_are_is_dropped_whole(
    guest: ScriptedGuest,
) -> None:
    guest.gpadls[0xE1E10] = (64, 20)
    await guest.up()
    data = ip_frame(bytes(60000), lso=True)
    assert guest.deliver(Frame(data, Offload(Checksum.PARTIAL, mss=1400))) == [DropReason.RESOURCES]
    assert await messages(guest) == []
    assert guest.deliver(Frame(ethernet(dst=MAC, src=PEER))) == [None]


async def test_segments_above_the_guests_mtu_are_dropped_as_such(guest: ScriptedGuest) -> None:
    await guest.up()
    data = ip_frame(bytes(9000), lso=True)
    assert guest.deliver(Frame(data, Offload(Checksum.PARTIAL, mss=8000))) == [DropReason.MTU_MISMATCH]


@pytest.mark.parametrize("tagged", [False, True])
async def test_a_tag_does_not_count_as_a_segments_length(guest: ScriptedGuest, tagged: bool) -> None:
    await guest.up()
    data = ip_frame(bytes(9000), lso=True)
    if tagged:
        data = data[:12] + b"\x81\x00\x00\x05" + data[12:]
    for mss, verdict in ((1460, None), (1464, DropReason.MTU_MISMATCH)):
        assert guest.deliver(Frame(data, Offload(Checksum.PARTIAL, mss=mss))) == [verdict]
