"""NVSP and RNDIS messages and NDIS objects, byte for byte as openvmm's protocol.rs and MS-RNDIS lay them out.

The vectors are written by hand from the field tables, never from our own encoder.
"""

from __future__ import annotations

import pytest

import vswitch_native
from vswitch_wire import ndis, nvsp, rndis
from vswitch_wire.errors import UnknownMessage, WireError


def wire(text: str) -> bytes:
    """Hex with spaces."""
    return bytes.fromhex(text)


NVSP: list[tuple[nvsp.NvspMessage, bytes, bool]] = [
    (nvsp.Init(0x60001, 0x60001), wire("01000000 01000600 01000600"), False),
    (
        nvsp.InitComplete(0xFFFFFFFF, 34, 1),
        wire("02000000 ffffffff 22000000 01000000"),
        True,
    ),
    (nvsp.SendNdisVersion(6, 30), wire("64000000 06000000 1e000000"), False),
    (nvsp.SendReceiveBuffer(0xE1E10, 0xCAFE), wire("65000000 101e0e00 feca 0000"), False),
    (
        nvsp.SendReceiveBufferComplete(1, (nvsp.ReceiveBufferSection(0, 1806, 9289, 16775934),)),
        wire("66000000 01000000 01000000 00000000 0e070000 49240000 fefaff00"),
        True,
    ),
    (nvsp.RevokeReceiveBuffer(0xCAFE), wire("67000000 feca"), False),
    (nvsp.SendSendBuffer(0xE1E11, 0), wire("68000000 111e0e00 0000 0000"), False),
    (nvsp.SendSendBufferComplete(1, 6144), wire("69000000 01000000 00180000"), True),
    (nvsp.RevokeSendBuffer(0), wire("6a000000 0000"), False),
    (nvsp.SendRndisPacket(0, 5, 108), wire("6b000000 00000000 05000000 6c000000"), False),
    (nvsp.SendRndisPacket(1), wire("6b000000 01000000 ffffffff 00000000"), False),
    (nvsp.SendRndisPacketComplete(1), wire("6c000000 01000000"), True),
    # The capabilities word is unaligned on purpose.
    (
        nvsp.SendNdisConfig(1514, 0xAC),
        wire("7d000000 ea050000 00000000 ac00000000000000"),
        False,
    ),
    (nvsp.SendVfAssociation(1, 7), wire("80000000 01000000 07000000"), False),
    (nvsp.SwitchDataPath(1), wire("81000000 01000000"), False),
    (nvsp.OidQueryEx(0x96, 1, 12, 0x00010106), wire("83000000 96 01 0c00 06010100"), False),
    (nvsp.OidQueryExComplete(0, b"\xea\x05"), wire("84000000 00000000 02000000 ea05"), True),
    (nvsp.SubchannelRequest(1, 3), wire("85000000 01000000 03000000"), False),
    (nvsp.SubchannelComplete(1, 3), wire("85000000 01000000 03000000"), True),
    (
        nvsp.SendIndirectionTable((0, 1) * 8),
        wire("86000000 10000000 0c000000" + " 00000000 01000000" * 8),
        False,
    ),
]


@pytest.mark.parametrize(("message", "data", "completion"), NVSP, ids=[type(e[0]).__name__ for e in NVSP])
def test_nvsp_messages_have_the_bytes_of_the_reference(
    message: nvsp.NvspMessage, data: bytes, completion: bool
) -> None:
    assert message.pack() == data
    assert nvsp.decode(data, completion) == message
    assert message.pack(40) == data.ljust(40, b"\0")
    assert nvsp.decode(data.ljust(40, b"\0"), completion) == message
    if vswitch_native.AVAILABLE:
        from vswitch_native import wire as native

        assert native.recode_nvsp(data, completion) == data
        assert native.recode_nvsp(data, completion, 40) == data.ljust(40, b"\0")


def test_nvsp_messages_are_padded_to_32_bytes_and_from_6_1_on_to_40() -> None:
    assert [nvsp.message_size(version) for version in nvsp.NvspVersion] == [32, 32, 32, 32, 32, 40]


@pytest.mark.parametrize("number", [0, 109, 120, 135, 136])
def test_nvsp_types_that_no_stock_guest_uses_are_unknown(number: int) -> None:
    with pytest.raises(UnknownMessage):
        nvsp.decode(number.to_bytes(4, "little").ljust(40, b"\0"))


RNDIS: list[tuple[rndis.RndisMessage, bytes]] = [
    (
        rndis.Initialize(2, 1, 0, 0x4000),
        wire("02000000 18000000 02000000 01000000 00000000 00400000"),
    ),
    (
        rndis.InitializeComplete(2),
        wire(
            "02000080 34000000 02000000 00000000 01000000 00000000 01000000 00000000 08000000"
            " ffffffef 03000000"
            " 00000000 00000000"
        ),
    ),
    (rndis.Halt(9), wire("03000000 0c000000 09000000")),
    (
        rndis.Query(3, ndis.OID_802_3_PERMANENT_ADDRESS),
        wire("04000000 1c000000 03000000 01010101 00000000 14000000 00000000"),
    ),
    (
        rndis.QueryComplete(3, 0, wire("00155d010203")),
        wire("04000080 1e000000 03000000 00000000 06000000 10000000 00155d010203"),
    ),
    (
        rndis.Set(4, ndis.OID_GEN_CURRENT_PACKET_FILTER, wire("0d000000")),
        wire("05000000 20000000 04000000 0e010100 04000000 14000000 00000000 0d000000"),
    ),
    (rndis.SetComplete(4, 0xC00000BB), wire("05000080 10000000 04000000 bb0000c0")),
    (rndis.Reset(), wire("06000000 0c000000 00000000")),
    (rndis.ResetComplete(0, 1), wire("06000080 10000000 00000000 01000000")),
    (rndis.IndicateStatus(0x4001000B), wire("07000000 14000000 0b000140 00000000 00000000")),
    (
        rndis.IndicateStatus(0x40010013, wire("80969800")),
        wire("07000000 18000000 13000140 04000000 0c000000 80969800"),
    ),
    (rndis.KeepAlive(5), wire("08000000 0c000000 05000000")),
    (rndis.KeepAliveComplete(5, 0), wire("08000080 10000000 05000000 00000000")),
    (
        rndis.Packet(b"\xff" * 14),
        wire(
            "01000000 3a000000 24000000 0e000000 00000000 00000000 00000000 00000000 00000000"
            " 00000000 00000000" + " ff" * 14
        ),
    ),
    (
        rndis.Packet(
            b"\xee" * 14,
            (
                rndis.ppi_u32(rndis.NBL_HASH_VALUE, 0x12345678),
                rndis.ppi_u32(rndis.IEEE_8021Q_INFO, rndis.vlan_info_from_tci(0xB00A)),
            ),
        ),
        # 5 << 13 | 1 << 12 | 10: priority 5, DEI, VLAN 10 -> 10 << 4 | 1 << 3 | 5
        wire(
            "01000000 5a000000 44000000 0e000000 00000000 00000000 00000000 24000000 20000000"
            " 00000000 00000000"
            " 10000000 08000000 0c000000 78563412 10000000 06000000 0c000000 ad000000" + " ee" * 14
        ),
    ),
]


@pytest.mark.parametrize(("message", "data"), RNDIS, ids=[type(e[0]).__name__ for e in RNDIS])
def test_rndis_messages_have_the_bytes_of_the_reference(message: rndis.RndisMessage, data: bytes) -> None:
    assert message.pack() == data
    assert rndis.decode(data) == message
    if vswitch_native.AVAILABLE:
        from vswitch_native import wire as native

        assert native.recode_rndis(data) == data


def test_a_query_without_input_may_give_any_offset() -> None:
    for offset in ("00000000", "14000000", "ffffffff"):
        data = wire(f"04000000 1c000000 03000000 06010100 00000000 {offset} 00000000")
        assert rndis.decode(data) == rndis.Query(3, ndis.OID_GEN_MAXIMUM_FRAME_SIZE)


def test_ppi_data_is_at_12_whatever_the_offset_field_says() -> None:
    records = rndis.PacketHeader.parse_ppi(wire("10000000 00000000 08000000 05000000"))
    assert records[0].value == 5


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (4, 59, "length 59, expected 8..58"),
        (8, 32, "do not fit"),
        (8, 0xFFFFFFF0, "do not fit"),
        (12, 0, "the frame is empty"),
        (12, 15, "do not fit"),
        (16, 1, "out-of-band"),
        (20, 1, "out-of-band"),
        (24, 1, "out-of-band"),
        (32, 4, "per-packet info"),
        (36, 1, "VC handle"),
    ],
)
def test_lying_packet_headers_are_refused_with_the_rule_they_break(at: int, value: int, words: str) -> None:
    data = bytearray(RNDIS[13][1])
    data[at : at + 4] = value.to_bytes(4, "little")
    with pytest.raises(WireError, match=words):
        rndis.decode(bytes(data))
    if vswitch_native.AVAILABLE:
        from vswitch_native import wire as native

        with pytest.raises(WireError):
            native.decode_rndis(bytes(data))


def test_aggregates_are_walked_by_message_length_and_hold_only_packets_after_the_first() -> None:
    frame, halt = RNDIS[13][1], RNDIS[2][1]
    padded = bytearray(frame + bytes(6))
    padded[4] += 6
    assert list(rndis.split(bytes(padded) + frame)) == [bytes(padded), frame]
    assert rndis.decode(bytes(padded)) == RNDIS[13][0]
    with pytest.raises(WireError, match="only PACKET may follow"):
        list(rndis.split(frame + halt))


def test_checksum_and_lso_words_have_the_bits_of_ndis() -> None:
    assert rndis.TxChecksum(ipv4=True, tcp=True, ip_header=True, header_offset=34).pack() == 0x00220015
    assert rndis.RxChecksum(tcp_succeeded=True, ip_succeeded=True).pack() == 0x28
    assert rndis.LargeSend(1460, 54, 2, False).pack() == 0x436005B4
    assert rndis.LargeSend(1440, 74, 2, True).pack() == 0xC4A005A0
    assert rndis.LargeSend.unpack(0x036005B4).version == 1
    assert rndis.PacketId(6, 0x1234).pack() == wire("01 06 3412")


def test_vlan_words_round_trip() -> None:
    assert all(rndis.vlan_tci_from_info(rndis.vlan_info_from_tci(tci)) == tci for tci in range(0, 65536, 7))


def test_rss_capabilities_are_18_bytes() -> None:
    assert ndis.RssCapabilities(0x301, 1, 8, 128).pack() == wire("88 02 1200 01030000 01000000 08000000 8000")


def test_offload_objects_have_the_offsets_of_ndis() -> None:
    data = ndis.Offload(
        v4_tx_checksum=0x155,
        v6_tx_checksum=0x55,
        lso_v4_maximum=0xF53C,
        lso_v4_minimum_segments=2,
        lso_v6_maximum=0xF53C,
        lso_v6_minimum_segments=2,
        lso_v6_options=5,
        rsc_v4=True,
    ).pack()
    assert len(data) == 156
    assert data[:4] == wire("a7 03 9c00")
    assert data[4:20] == wire("02000000 55010000 00000000 00000000")
    assert data[20:36] == wire("02000000 55000000 00000000 00000000")
    assert data[80:108] == wire("02000000 3cf50000 02000000 02000000 3cf50000 02000000 05000000")
    assert data[144:146] == wire("01 00")


def test_offload_parameters_are_read_by_size_not_by_revision() -> None:
    # 22 bytes with revision byte 3, as Linux sends them below NVSP 5.
    data = wire("80 03 1600 04 04 04 04 04 00 00 02 02 00 00 00 00000000 0000")
    parameters = ndis.OffloadParameters.unpack(data)
    assert (parameters.ipv4_checksum, parameters.udp6_checksum, parameters.lso_v2_ipv6) == (4, 4, 2)
    assert parameters.rsc_ipv4 == 0
    longer = wire("80 03 1c00 00 00 00 00 00 00 00 00 00 00 00 00 00000000 0000 02 01 00 00 0000")
    assert (
        ndis.OffloadParameters.unpack(longer).rsc_ipv4,
        ndis.OffloadParameters.unpack(longer).rsc_ipv6,
    ) == (
        2,
        1,
    )


def test_rss_parameters_of_linux_and_of_freebsd_are_read() -> None:
    table, key = tuple(index % 4 for index in range(128)), bytes(range(40))
    linux = ndis.RssParameters(0, 0, 0x1201, table, key)
    data = linux.pack()
    assert len(data) == 592
    assert data[:4] == wire("89 02 2800")
    assert ndis.RssParameters.unpack(data) == linux
    # Key first, table behind it; the header size says the whole object.
    freebsd = wire(
        "89 02 5002 0000 0000 01120000 0002 0000 50000000 2800 0000 28000000 00000000 00000000 00000000"
    )
    freebsd += key + b"".join(entry.to_bytes(4, "little") for entry in table)
    assert ndis.RssParameters.unpack(freebsd) == linux
    assert not ndis.RssParameters.unpack(wire("89 02 2800 1000") + bytes(34)).enabled


def test_where_an_absent_table_or_key_would_be_is_nobodys_business() -> None:
    nowhere = wire("0000 0000 FFFFFFFF 0000 0000 FFFFFFFF 00000000 00000000 00000000")
    kept = ndis.RssParameters.unpack(wire("89 02 2800 0C00 0000 01120000") + nowhere)
    assert (kept.enabled, kept.indirection_table, kept.key) == (True, (), b"")
    lies = wire("0002 0000 FFFFFFFF 2800 0000 FFFFFFFF 00000000 00000000 00000000")
    off = ndis.RssParameters.unpack(wire("89 02 2800 1000 0000 01120000") + lies)
    assert (off.enabled, off.indirection_table, off.key) == (False, (), b"")
    with pytest.raises(WireError, match="table of 512 bytes"):
        ndis.RssParameters.unpack(wire("89 02 2800 0000 0000 01120000") + lies)


def test_config_parameters_are_utf16_and_bounded() -> None:
    data = wire("14000000 04000000 02000000 18000000 02000000 6100 6200 3100")
    parameter = ndis.ConfigParameter.unpack(data)
    assert (parameter.name, parameter.text) == ("ab", "1")
    assert parameter.pack() == data
    with pytest.raises(WireError, match="name of 256 bytes"):
        ndis.ConfigParameter.unpack(wire("14000000 00010000 02000000 14000000 00000000") + bytes(300))
    with pytest.raises(WireError, match="not UTF-16"):
        ndis.ConfigParameter.unpack(wire("14000000 02000000 02000000 14000000 00000000 00d8"))
