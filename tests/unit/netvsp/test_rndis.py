"""RNDIS control and OIDs as stock guests use them: exact sizes, statuses, refusals."""

from __future__ import annotations

import struct

import pytest
from scripted_guest import MAC, PEER, ScriptedGuest, ethernet, rndis_packet

from vswitch.drops import DropReason
from vswitch.endpoint import Frame
from vswitch_wire import ndis, nvsp, rndis
from vswitch_wire.nvsp import NvspVersion

NOT_SUPPORTED = 0xC00000BB
INVALID_DATA = 0xC0010015


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


async def test_initialize_is_answered_with_the_limits_guests_aggregate_by(guest: ScriptedGuest) -> None:
    await guest.open()
    await guest.negotiate()
    sent = guest.send_rndis(struct.pack("<6I", 2, 24, 0xABC0000, 1, 0, 0x4000), channel_type=1)
    await guest.pump()
    assert guest.completion_status(sent) == 1
    ((_, (answer,)),) = guest.received()
    assert struct.unpack("<13I", answer) == (
        *(0x80000002, 52, 0xABC0000, 0, 1, 0, 1, 0),
        *(8, 0xEFFFFFFF, 3, 0, 0),
    )


async def test_initialize_with_another_major_version_is_refused(guest: ScriptedGuest) -> None:
    await guest.open()
    await guest.negotiate()
    (answer,) = await guest.control(rndis.Initialize(3, major_version=2))
    assert isinstance(answer, rndis.InitializeComplete)
    assert (answer.request_id, answer.status) == (3, 0xC0010004)
    assert not guest.nic.state.initialised


async def test_requests_before_initialize_fail_and_keep_their_id(guest: ScriptedGuest) -> None:
    await guest.open()
    await guest.negotiate()
    answers = await guest.control(rndis.Query(0x1234, ndis.OID_802_3_PERMANENT_ADDRESS))
    assert answers == [rndis.QueryComplete(0x1234, 0xC0000001)]


async def test_halt_has_no_answer_and_shuts_the_data_path(guest: ScriptedGuest) -> None:
    await guest.up()
    assert await guest.control(rndis.Halt(5)) == []
    sent = guest.send_rndis(rndis_packet(ethernet()))
    await guest.pump()
    assert guest.completion_status(sent) == 2
    assert guest.deliver(Frame(ethernet(dst=MAC, src=PEER))) == [DropReason.NOT_READY]
    assert not guest.nic.state.initialised
    (answer,) = await guest.control(rndis.Initialize(6))
    assert isinstance(answer, rndis.InitializeComplete)
    assert guest.nic.state.packet_filter == 0


async def test_keepalive_is_answered_and_reset_refused(guest: ScriptedGuest) -> None:
    await guest.up()
    assert await guest.control(rndis.KeepAlive(0x77)) == [rndis.KeepAliveComplete(0x77, 0)]
    assert await guest.control(rndis.Reset()) == [rndis.ResetComplete(NOT_SUPPORTED, 0)]


@pytest.mark.parametrize("kind", [1, 7, 9, 0x80000002, 0xFF000001, 0])
async def test_control_messages_that_no_guest_may_send_are_status_2(guest: ScriptedGuest, kind: int) -> None:
    await guest.up()
    sent = guest.send_rndis(struct.pack("<5I", kind, 20, 1, 0, 0), channel_type=1)
    await guest.pump()
    assert guest.completion_status(sent) == 2
    assert guest.received() == []
    assert not guest.faults


@pytest.mark.parametrize(
    "message",
    [
        struct.pack("<4I", 4, 16, 0x55, 0x01010101),  # QUERY cut short
        struct.pack("<7I", 4, 28, 0x55, 0x01010101, 64, 20, 0),  # input outside the message
        struct.pack("<7I", 4, 28, 0x55, 0x01010101, 0xFFFFFFFF, 0xFFFFFFF0, 0),
    ],
)
async def test_a_malformed_query_is_answered_with_invalid_length(
    guest: ScriptedGuest, message: bytes
) -> None:
    await guest.up()
    guest.send_rndis(message, channel_type=1)
    await guest.pump()
    assert await guest.answers() == [rndis.QueryComplete(0x55, 0xC0010014)]


@pytest.mark.parametrize("offset", [0, 20])
async def test_a_query_without_input_may_have_any_offset(guest: ScriptedGuest, offset: int) -> None:
    await guest.up()
    guest.send_rndis(struct.pack("<7I", 4, 28, 9, 0x01010101, 0, offset, 0), channel_type=1)
    await guest.pump()
    assert await guest.answers() == [rndis.QueryComplete(9, 0, MAC)]


@pytest.mark.parametrize(
    ("oid", "expected"),
    [
        (0x00010102, u32(0)),
        (0x00010103, u32(0)),
        (0x00010104, u32(0)),
        (0x00010105, u32(1500)),
        (0x00010106, u32(1500)),
        (0x00010107, u32(100_000_000)),
        (0x00010108, u32(262144)),
        (0x00010109, u32(262144)),
        (0x0001010A, u32(1514)),
        (0x0001010B, u32(1514)),
        (0x0001010C, u32(0x155D)),
        (0x0001010D, b"Microsoft Corporation"),
        (0x0001010E, u32(0x0D)),
        (0x0001010F, u32(1500)),
        (0x00010110, b"\x00\x01"),
        (0x00010111, u32(1514)),
        (0x00010113, u32(0x24D)),
        (0x00010114, u32(0)),
        (0x00010115, u32(0xFFFFFFFF)),
        (0x00010116, b"\x00\x01"),
        (0x00010203, struct.pack("<BBHIIIH", 0x88, 2, 18, 0x301, 1, 1, 128)),
        (0x00010206, struct.pack("<2Q", 10**10, 10**10)),
        (0x00010207, struct.pack("<BBHIIIQQII", 0x80, 1, 40, 1, 2, 0, 10**10, 10**10, 0, 0)),
        (0x00020216, "Network Adapter".encode("utf-16-le").ljust(512, b"\0")),
        (0x01010101, MAC),
        (0x01010102, MAC),
        (0x01010104, u32(0)),
        (0x01020101, u32(0)),
        (0x0101010A, struct.pack("<BBH6I", 0xA8, 1, 28, 1, 2, 14, 1, 2, 14)),
    ],
)
async def test_every_oid_a_stock_guest_queries_has_its_exact_answer(
    guest: ScriptedGuest, oid: int, expected: bytes
) -> None:
    await guest.up()
    answer = await guest.query(oid)
    assert (answer.status, answer.info) == (0, expected)


async def test_an_unknown_oid_is_not_supported(guest: ScriptedGuest) -> None:
    await guest.up()
    assert (await guest.query(0x0D010101)).status == NOT_SUPPORTED
    assert await guest.set(0x00010106, u32(9000)) == NOT_SUPPORTED


@pytest.mark.parametrize(
    ("version", "has_ndis6", "has_rss"), [(NvspVersion.V61, True, True), (NvspVersion.V4, True, False)]
)
async def test_the_supported_list_follows_the_ndis_version_and_every_entry_answers(
    guest: ScriptedGuest, version: int, has_ndis6: bool, has_rss: bool
) -> None:
    await guest.up(version=version)
    info = (await guest.query(0x00010101)).info
    oids = struct.unpack(f"<{len(info) // 4}I", info)
    assert (0xFC01020D in oids, 0x00010204 in oids) == (has_ndis6, has_rss)
    set_only = {0x00010118, 0x00010204, 0x0001021B, 0xFC01020C, 0x01010103}
    for oid in oids:
        status = (await guest.query(oid)).status
        assert (status == 0) == (oid not in set_only), hex(oid)


async def test_an_ndis_version_of_another_major_is_a_bad_version(guest: ScriptedGuest) -> None:
    await guest.open()
    await guest.ask(nvsp.Init(0x40000, 0x40000).pack(40))
    guest.inband(nvsp.SendNdisVersion(7, 0).pack(40), ask=False)
    await guest.ask(nvsp.SendReceiveBuffer(0xE1E10, 0xCAFE).pack(40))
    await guest.ask(nvsp.SendSendBuffer(0xE1E11, 0).pack(40))
    await guest.control(rndis.Initialize(1))
    assert (await guest.query(0x00010101)).status == 0xC0010004


async def test_the_guest_may_change_its_address_and_is_filtered_by_it(guest: ScriptedGuest) -> None:
    await guest.up()
    value = "02155D00AA01".encode("utf-16-le")
    parameter = ndis.ConfigParameter("NetworkAddress", value).pack()
    assert len(parameter) == 72
    assert await guest.set(0x0001021B, parameter) == 0
    assert (await guest.query(0x01010102)).info == bytes.fromhex("02155d00aa01")
    assert (await guest.query(0x01010101)).info == MAC
    verdicts = guest.deliver(
        Frame(ethernet(dst=MAC, src=PEER)), Frame(ethernet(dst=bytes.fromhex("02155d00aa01"), src=PEER))
    )
    assert verdicts == [DropReason.FAILED_PACKET_FILTER, None]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NetworkAddress", "02155D00AA0"),
        ("NetworkAddress", "02155D00AAZZ"),
        ("NetworkAddress", "01155D00AA01"),
        ("NetworkAddress", "000000000000"),
        ("*LsoV2IPv4", "2"),
        ("*TCPChecksumOffloadIPv4", "x"),
    ],
)
async def test_a_bad_config_parameter_is_refused_and_changes_nothing(
    guest: ScriptedGuest, name: str, value: str
) -> None:
    await guest.up()
    before = (await guest.query(0xFC01020B)).info
    parameter = ndis.ConfigParameter(name, value.encode("utf-16-le")).pack()
    assert await guest.set(0x0001021B, parameter) == INVALID_DATA
    assert (await guest.query(0x01010102)).info == MAC
    assert (await guest.query(0xFC01020B)).info == before


async def test_a_config_parameter_of_an_unknown_name_is_accepted(guest: ScriptedGuest) -> None:
    await guest.up()
    parameter = ndis.ConfigParameter("*JumboPacket", "1514".encode("utf-16-le")).pack()
    assert await guest.set(0x0001021B, parameter) == 0
    assert await guest.set(0x0001021B, parameter[:19]) == INVALID_DATA
    assert await guest.set(0x0001021B, struct.pack("<5I", 20, 400, 2, 20, 0)) == INVALID_DATA


def rss(table: tuple[int, ...], *, flags: int = 0, key: bytes = bytes(40)) -> bytes:
    return ndis.RssParameters(flags, 0, 0x201, table, key).pack()


async def test_rss_with_one_queue_may_be_disabled_and_set_but_names_no_other_queue(
    guest: ScriptedGuest,
) -> None:
    await guest.up()
    assert await guest.set(0x00010204, rss((0,) * 128, flags=0x10)) == 0
    assert await guest.set(0x00010204, rss((0,) * 128)) == 0
    assert await guest.set(0x00010204, rss((0, 1))) == INVALID_DATA
    assert await guest.set(0x00010204, rss((0,), key=b"")) == INVALID_DATA
    assert await guest.set(0x00010204, rss((0,))[:30]) == INVALID_DATA
    assert await guest.set(0x00010204, bytes(10)) == INVALID_DATA


async def test_the_counters_are_those_of_the_channel(guest: ScriptedGuest) -> None:
    await guest.up()
    guest.send_rndis(rndis_packet(ethernet()))
    guest.send_rndis(b"\1" * 50, section=1)
    await guest.pump()
    guest.take()
    guest.deliver(Frame(ethernet(dst=MAC, src=PEER)))
    await guest.pump()
    for receive_id, _ in guest.received():
        guest.give_back(receive_id, status=2)
    values = {}
    for oid in (0x00020101, 0x00020102, 0x00020103, 0x00020104, 0x00020105, 0x00020219, 0x0002021A):
        (values[oid],) = struct.unpack("<Q", (await guest.query(oid)).info)
    assert values == {
        0x00020101: 1,
        0x00020102: 1,
        0x00020103: 1,
        0x00020104: 1,
        0x00020105: 0,
        0x00020219: 60,
        0x0002021A: 60,
    }


async def test_answers_too_many_for_the_receive_buffer_wait_and_keep_their_order(
    guest: ScriptedGuest,
) -> None:
    await guest.up()
    assert guest.section is not None
    held = []
    while guest.deliver(Frame(ethernet(dst=MAC, src=PEER))) == [None]:
        held += guest.read().received()
    for number in range(40):
        guest.send_rndis(rndis.KeepAlive(1000 + number).pack(), channel_type=1, section=number)
    await guest.pump()
    answers = guest.received()
    assert len(answers) == 16
    for receive_id, _ in held[:60]:
        guest.give_back(receive_id)
    await guest.pump()
    answers += guest.received()
    assert [rndis.decode(message).pack() for _, (message,) in answers] == [
        rndis.KeepAliveComplete(1000 + number, 0).pack() for number in range(40)
    ]
