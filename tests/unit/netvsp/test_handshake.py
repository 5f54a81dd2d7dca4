"""The NVSP handshake as a guest sees it: every step, every refusal."""

from __future__ import annotations

import struct

import pytest
from scripted_guest import RECEIVE_GPADL, RECEIVE_ID, SEND_GPADL, ScriptedGuest

from vswitch_wire import nvsp, packet
from vswitch_wire.nvsp import NvspVersion


async def init(guest: ScriptedGuest, version: int) -> nvsp.InitComplete:
    answer = nvsp.decode(await guest.ask(nvsp.Init(version, version).pack(40)))
    assert isinstance(answer, nvsp.InitComplete)
    return answer


@pytest.mark.parametrize("version", list(NvspVersion))
async def test_every_version_is_accepted_with_the_version_word_stock_guests_check(
    guest: ScriptedGuest, version: NvspVersion
) -> None:
    await guest.open()
    answer = await init(guest, version)
    assert answer.status == 1
    assert answer.max_mdl_chain == 34
    assert answer.negotiated_version == (2 if version == NvspVersion.V1 else 0xFFFFFFFF)
    assert guest.nic.state.nvsp_version == version


async def test_an_unknown_version_is_refused_and_the_next_one_taken(guest: ScriptedGuest) -> None:
    await guest.open()
    for unknown in (0x00070000, 0x00030000, 0):
        assert (await init(guest, unknown)).status != 1
    assert (await init(guest, NvspVersion.V5)).status == 1
    assert not guest.faults


async def test_nothing_is_said_before_init(guest: ScriptedGuest) -> None:
    await guest.open()
    await guest.pump()
    assert guest.take() == []


@pytest.mark.parametrize("version", [NvspVersion.V1, NvspVersion.V5, NvspVersion.V61])
async def test_completions_have_the_size_of_the_version(guest: ScriptedGuest, version: int) -> None:
    await guest.open()
    raw = await guest.ask(nvsp.Init(version, version).pack(28))
    assert len(raw) == (40 if version == NvspVersion.V61 else 32)


async def test_the_receive_buffer_becomes_one_section_at_offset_0(guest: ScriptedGuest) -> None:
    await guest.open()
    await guest.negotiate()
    section = guest.section
    assert section is not None
    assert section.offset == 0
    assert section.sub_allocation_size % 64 == 0
    assert section.sub_allocation_size >= 1514 + 292
    assert section.sub_allocation_size * section.count <= 256 * 4096
    assert section.count == 256 * 4096 // section.sub_allocation_size


@pytest.mark.parametrize(
    ("asked", "agreed"), [(1514, 1514), (0, 1514), (1513, 1514), (9217, 1514), (9014, 1514)]
)
async def test_an_mtu_out_of_range_or_above_the_hosts_is_replaced(
    guest: ScriptedGuest, asked: int, agreed: int
) -> None:
    await guest.open()
    await guest.negotiate(mtu=asked)
    assert guest.nic.state.mtu == agreed


async def test_an_unknown_gpadl_fails_the_receive_buffer(guest: ScriptedGuest) -> None:
    await guest.open()
    await init(guest, NvspVersion.V5)
    reply = nvsp.decode(await guest.ask(nvsp.SendReceiveBuffer(0x999, RECEIVE_ID).pack(40)))
    assert isinstance(reply, nvsp.SendReceiveBufferComplete)
    assert reply.status == 2


async def test_a_receive_buffer_without_room_for_the_control_reserve_fails(guest: ScriptedGuest) -> None:
    guest.gpadls[RECEIVE_GPADL] = (64, 7)
    await guest.open()
    await init(guest, NvspVersion.V5)
    reply = nvsp.decode(await guest.ask(nvsp.SendReceiveBuffer(RECEIVE_GPADL, RECEIVE_ID).pack(40)))
    assert isinstance(reply, nvsp.SendReceiveBufferComplete)
    assert reply.status == 2


async def test_a_send_buffer_smaller_than_a_section_fails(guest: ScriptedGuest) -> None:
    guest.gpadls[SEND_GPADL] = (512, 1)
    await guest.open()
    await guest.negotiate(send_buffer=False)
    reply = nvsp.decode(await guest.ask(nvsp.SendSendBuffer(SEND_GPADL, 0).pack(40)))
    assert isinstance(reply, nvsp.SendSendBufferComplete)
    assert reply.status == 2


async def test_a_completion_comes_only_when_asked_for(guest: ScriptedGuest) -> None:
    await guest.open()
    await init(guest, NvspVersion.V5)
    guest.inband(nvsp.SendNdisConfig(1514, 3).pack(40), ask=False)
    await guest.pump()
    assert guest.take() == []
    assert await guest.ask(nvsp.SendNdisVersion(6, 30).pack(40)) == b""


CONFIG = nvsp.SendNdisConfig(1514, 3).pack(40)
NDIS_VERSION = nvsp.SendNdisVersion(6, 30).pack(40)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([CONFIG], "before INIT"),
        ([b"\x01\0\0\0"], "malformed"),
        ([nvsp.Init(2, 2).pack(40), CONFIG], "does not have it"),
        ([nvsp.Init(0x50000, 0x50000).pack(40)] * 2, "INIT after"),
        ([nvsp.Init(0x50000, 0x50000).pack(40), CONFIG, CONFIG], "repeated or too late"),
        ([nvsp.Init(0x50000, 0x50000).pack(40), NDIS_VERSION, CONFIG], "repeated or too late"),
        ([nvsp.Init(0x50000, 0x50000).pack(40), struct.pack("<I", 109).ljust(40, b"\0")], "never offers"),
        ([nvsp.Init(0x50000, 0x50000).pack(40), struct.pack("<I", 9999).ljust(40, b"\0")], "unknown NVSP"),
        ([nvsp.Init(0x50000, 0x50000).pack(40), struct.pack("<I", 102).ljust(40, b"\0")], "from a guest"),
        ([nvsp.Init(2, 2).pack(40), nvsp.SubchannelRequest(1, 1).pack(40)], "does not have it"),
        ([nvsp.Init(2, 2).pack(40), nvsp.SwitchDataPath(0).pack(40)], "does not have it"),
    ],
)
async def test_wrong_order_or_unknown_messages_cost_the_channel(
    guest: ScriptedGuest, messages: list[bytes], words: str
) -> None:
    await guest.open()
    for message in messages:
        guest.inband(message)
    await guest.pump()
    assert len(guest.faults) == 1
    assert words in guest.faults[0]
    assert "eth0" in guest.faults[0]


async def test_rndis_before_the_receive_buffer_costs_the_channel(guest: ScriptedGuest) -> None:
    await guest.open()
    await init(guest, NvspVersion.V5)
    body = nvsp.SendRndisPacket(1, 0, 24).pack(32)
    guest.inband(body)
    await guest.pump()
    # Without a send buffer the message does not even exist: NVSP status 2, and the channel lives.
    assert guest.completion_status(guest.next_id - 1) == 2
    guest.send_direct(struct.pack("<6I", 2, 24, 1, 1, 0, 0x4000), channel_type=1)
    await guest.pump()
    assert len(guest.faults) == 1
    assert "before the receive buffer" in guest.faults[0]


async def test_sub_channels_are_refused_with_count_0(guest: ScriptedGuest) -> None:
    await guest.up()
    for count in (1, 64):
        answer = nvsp.decode(await guest.ask(nvsp.SubchannelRequest(1, count).pack(40)), completion=True)
        assert isinstance(answer, nvsp.SubchannelComplete)
        assert (answer.status, answer.count) == (2, 0)


@pytest.mark.parametrize("path", [0, 1])
async def test_switching_the_data_path_is_answered_empty(guest: ScriptedGuest, path: int) -> None:
    await guest.up()
    assert await guest.ask(nvsp.SwitchDataPath(path).pack(40)) == b""
    guest.inband(nvsp.SwitchDataPath(path).pack(40), ask=False)
    await guest.pump()
    assert guest.take() == []
    assert guest.nic.state.path == "synthetic"


async def test_packet_direct_is_refused(guest: ScriptedGuest) -> None:
    await guest.up()
    answer = await guest.ask(struct.pack("<2I", 135, 3).ljust(40, b"\0"))
    assert struct.unpack_from("<3I", answer) == (135, 3, 2)


async def test_an_oid_query_by_nvsp_is_answered(guest: ScriptedGuest) -> None:
    await guest.up()
    answer = nvsp.decode(await guest.ask(nvsp.OidQueryEx(0x96, 1, 12, 0x01010101).pack(40)))
    assert isinstance(answer, nvsp.OidQueryExComplete)
    assert (answer.status, answer.data) == (0, guest.nic.mac)


async def test_revoked_buffers_are_released_and_never_written_again(guest: ScriptedGuest) -> None:
    await guest.up()
    guest.inband(nvsp.RevokeReceiveBuffer(RECEIVE_ID).pack(40), ask=False)
    guest.inband(nvsp.RevokeSendBuffer(0).pack(40), ask=False)
    await guest.pump()
    assert sorted(guest.released) == [RECEIVE_GPADL, SEND_GPADL]
    from scripted_guest import MAC, PEER, ethernet

    from vswitch.drops import DropReason
    from vswitch.endpoint import Frame

    before = guest.memory.read(64 * 4096, 256 * 4096)
    assert guest.deliver(Frame(ethernet(dst=MAC, src=PEER))) == [DropReason.NOT_READY]
    assert guest.memory.read(64 * 4096, 256 * 4096) == before
    assert not guest.faults


async def test_a_reopened_channel_starts_from_nothing(guest: ScriptedGuest) -> None:
    await guest.up()
    await guest.nic.close(guest.opened)
    assert not guest.nic.state.open
    for page in range(1, 17):
        guest.memory.write(page * 4096, bytes(4096))
    from vswitch_wire.ring import RingReader, RingWriter

    pfns = guest.opened.ring_pfns
    guest.writer = RingWriter(guest.memory.view(pfns[:8], 0, 8 * 4096))
    guest.reader = RingReader(guest.memory.view(pfns[8:], 0, 8 * 4096))
    await guest.up(version=NvspVersion.V5)
    assert guest.nic.state.nvsp_version == NvspVersion.V5
    assert guest.nic.state.initialised


@pytest.mark.parametrize("kind", [1, 7, 8, 10, 13])
async def test_packet_types_that_no_guest_sends_cost_the_channel(guest: ScriptedGuest, kind: int) -> None:
    await guest.open()
    guest.post(struct.pack("<HHHHQ", kind, 2, 3, 0, 5) + bytes(8))
    await guest.pump()
    assert guest.faults == [f"NIC eth0: VMBus packet type {kind} on a network channel"]


async def test_lying_ring_indices_cost_the_channel_and_nothing_else(guest: ScriptedGuest) -> None:
    await guest.up()
    guest.memory.store_u32(1 * 4096, 0xFFFFFFF8)
    await guest.pump()
    assert len(guest.faults) == 1
    assert "write" in guest.faults[0]
    assert packet.VM_PKT_COMP not in [entry.type for entry in guest.take()]


@pytest.mark.parametrize("mtu", [68, 576, 1500, 9000])
async def test_every_mtu_leaves_room_for_control_answers(mtu: int) -> None:
    guest = ScriptedGuest("python", mtu=mtu)
    await guest.up(mtu=9014)
    assert guest.nic.state.mtu == min(mtu + 14, 9014)
    assert guest.section is not None
    assert guest.section.sub_allocation_size >= max(mtu, 1500) + 14 + 292
    assert len((await guest.query(0x00020216)).info) == 512
    assert (await guest.query(0x00010106)).info == mtu.to_bytes(4, "little")
    await guest.close()


async def test_a_control_message_longer_than_any_costs_the_channel(guest: ScriptedGuest) -> None:
    await guest.open()
    guest.inband(nvsp.Init(0x50000, 0x50000).pack(40).ljust(9000, b"\0"))
    await guest.pump()
    assert len(guest.faults) == 1
    assert "at most 8192 expected" in guest.faults[0]


async def test_a_refused_buffer_is_given_back_at_once(guest: ScriptedGuest) -> None:
    await guest.open()
    await guest.ask(nvsp.Init(NvspVersion.V61, NvspVersion.V61).pack(40))
    guest.gpadls[RECEIVE_GPADL] = (64, 4)
    reply = nvsp.decode(await guest.ask(nvsp.SendReceiveBuffer(RECEIVE_GPADL, 0xCAFE).pack(40)))
    assert isinstance(reply, nvsp.SendReceiveBufferComplete)
    assert reply.status == nvsp.NVSP_STAT_FAIL
    assert guest.released == [RECEIVE_GPADL]
    guest.gpadls[SEND_GPADL] = (512, 1)
    sent = nvsp.decode(await guest.ask(nvsp.SendSendBuffer(SEND_GPADL, 0).pack(40)))
    assert isinstance(sent, nvsp.SendSendBufferComplete)
    assert sent.status == nvsp.NVSP_STAT_FAIL
    assert guest.released == [RECEIVE_GPADL, SEND_GPADL]


async def test_what_the_host_fails_to_do_costs_the_channel_and_not_the_guests_patience(
    guest: ScriptedGuest,
) -> None:
    await guest.up()

    def none_left(count: int) -> None:
        raise RuntimeError(f"{count} channels, no more are allowed")

    guest.opened.offer_sub_channels = none_left
    guest.nic.sub_channel_limit = 1
    session = guest.nic._session
    assert session is not None
    session.handshake.sub_channel_limit = 1
    guest.inband(nvsp.SubchannelRequest(1, 1).pack(40))
    await guest.pump()
    assert guest.faults == ["NIC eth0: the host failed on a message (inband)"]
