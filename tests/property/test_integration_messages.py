"""Integration messages: what is packed comes back, and no bytes of a guest do anything but be understood or
refused."""

from __future__ import annotations

import asyncio
import os
import struct
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hypervisor.clock import ManualClock
from hypervisor.integration import icmsg, kvp_messages
from hypervisor.integration.heartbeat import Heartbeat, HeartbeatState
from hypervisor.integration.icmsg import FRAMEWORK_VERSIONS, IcMessage, Version
from hypervisor.integration.kvp_messages import KvpPool
from hypervisor.integration.service import STRAY_LIMIT, Answer, Session
from hypervisor.integration.shutdown import pack_shutdown
from hypervisor.integration.timesync import pack_sample
from vswitch_wire import packet
from vswitch_wire.errors import WireError

versions = st.builds(Version, st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
messages = st.builds(
    IcMessage,
    type=st.integers(0, 0xFFFF),
    framework=versions,
    version=versions,
    body=st.binary(max_size=300),
    status=st.integers(0, 0xFFFFFFFF),
    transaction_id=st.integers(0, 255),
    flags=st.integers(0, 255),
)
texts = st.text(st.characters(codec="utf-16", exclude_characters="\0"), max_size=100)


@given(messages, st.binary(max_size=7))
def test_a_message_comes_back_with_any_padding(message: IcMessage, padding: bytes) -> None:
    assert IcMessage.unpack(message.pack() + padding) == message


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(payload: bytes) -> None:
    try:
        message = IcMessage.unpack(payload)
    except WireError:
        return
    assert icmsg.OVERHEAD + len(message.body) <= len(payload)


@given(messages, st.integers(0, 400), st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFF))
def test_lengths_that_lie_are_refused(message: IcMessage, cut: int, size: int, body: int) -> None:
    payload = bytearray(message.pack())
    struct.pack_into("<I", payload, 4, size)
    struct.pack_into("<H", payload, 18, body)
    data = bytes(payload[:cut])
    fits = len(data) >= 28 and 20 <= size <= len(data) - 8 and body <= size - 20
    try:
        assert len(IcMessage.unpack(data).body) == body
        assert fits
    except WireError:
        assert not fits


@given(st.lists(versions, min_size=1, max_size=5), st.binary(max_size=40))
def test_a_choice_is_one_of_those_offered_or_none(offered: list[Version], body: bytes) -> None:
    try:
        chosen = icmsg.unpack_negotiation(body, FRAMEWORK_VERSIONS, offered)
    except WireError:
        return
    assert chosen is None or (chosen[0] in FRAMEWORK_VERSIONS and chosen[1] in offered)


@given(st.lists(versions, min_size=1, max_size=5), st.data())
def test_an_offer_is_laid_out_as_the_guest_reads_it(offered: list[Version], data: st.DataObject) -> None:
    body = icmsg.pack_negotiation(FRAMEWORK_VERSIONS, offered)
    assert struct.unpack_from("<HHI", body) == (len(FRAMEWORK_VERSIONS), len(offered), 0)
    assert list(struct.iter_unpack("<HH", body[8:])) == [*FRAMEWORK_VERSIONS, *offered]
    framework = data.draw(st.sampled_from(FRAMEWORK_VERSIONS))
    version = data.draw(st.sampled_from(offered))
    answer = struct.pack("<HHIHHHH", 1, 1, 0, *framework, *version)
    assert icmsg.unpack_negotiation(answer, FRAMEWORK_VERSIONS, offered) == (framework, version)


@given(texts, st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF))
def test_a_shutdown_body_has_the_drivers_size_for_any_text(text: str, flags: int, seconds: int) -> None:
    body = pack_shutdown(flags, text * 20, seconds)
    assert len(body) == 12 + 2048
    assert struct.unpack_from("<III", body) == (0x80000000, seconds, flags)
    assert body.endswith(b"\0\0")


@given(st.integers(0, 1 << 61), st.integers(0, (1 << 64) - 1), st.integers(0, 3))
def test_a_time_sample_has_the_drivers_size(wall_ns: int, reference: int, flags: int) -> None:
    host = 116444736000000000 + wall_ns // 100
    for version in (Version(1, 0), Version(3, 0)):
        assert pack_sample(version, wall_ns, reference, flags) == struct.pack("<QQQB", host, 0, 0, flags)
    assert pack_sample(Version(4, 0), wall_ns, reference, flags) == struct.pack(
        "<QQBBB3x", host, reference, flags, 0, 0
    )


@given(st.binary(max_size=2600) | st.binary(min_size=2580, max_size=2580))
def test_any_answer_to_an_enumeration_is_an_entry_or_refused(body: bytes) -> None:
    try:
        key, value = kvp_messages.unpack_enumerate(body)
    except WireError:
        return
    assert len(key) <= 256
    assert len(value) <= 1024
    assert (key + value).isprintable() or "\ufffd" in key + value


@given(texts, texts)
def test_an_entry_comes_back_printable(key: str, value: str) -> None:
    body = bytearray(kvp_messages.pack_enumerate(KvpPool.AUTO, 3))
    assert body[:8] == struct.pack("<BBHI", 3, 2, 0, 3)
    for offset, text in ((20, key), (532, value)):
        encoded = text.encode("utf-16-le") + b"\0\0"
        body[offset : offset + len(encoded)] = encoded
    sizes = [len(text.encode("utf-16-le")) + 2 for text in (key, value)]
    struct.pack_into("<III", body, 8, 1, *sizes)
    shown = tuple("".join(c if c.isprintable() else "\ufffd" for c in text) for text in (key, value))
    assert kvp_messages.unpack_enumerate(bytes(body)) == shown


@given(st.binary(max_size=100) | st.binary(min_size=7428, max_size=7428))
def test_any_answer_about_an_adapter_is_understood_or_refused(body: bytes) -> None:
    try:
        info = kvp_messages.unpack_ip_info(body)
    except WireError:
        assert len(body) < 7428
        return
    for entry in (*info.addresses, *info.subnets, *info.gateways, *info.dns):
        assert entry
        assert entry.isprintable() or "\ufffd" in entry


@given(st.binary(max_size=60), st.integers(0, 0xFFFFFFFF))
def test_no_answer_to_a_heartbeat_harms_the_host(body: bytes, status: int) -> None:
    heartbeat = Heartbeat(ManualClock())
    heartbeat._beat(Answer(status, body))
    good = status == 0 and body[:8] == struct.pack("<Q", 1)
    assert heartbeat.state is (HeartbeatState.OK if good else HeartbeatState.LOST)


class _Reader:
    """A ring's reading end that holds what a test put in it."""

    def __init__(self, packets: list[bytes]) -> None:
        self.packets = packets

    def read(self, limit: int) -> list[bytes]:
        taken, self.packets = self.packets[:limit], self.packets[limit:]
        return taken

    def commit(self) -> bool:
        return False


junk = st.binary(max_size=80) | st.builds(
    packet.encode_inband, st.binary(max_size=60) | messages.map(IcMessage.pack), st.integers(0, 5)
)


@given(st.lists(junk, max_size=100))
def test_whatever_a_guest_puts_into_its_ring_is_counted_and_bounded(packets: list[bytes]) -> None:
    faults: list[str] = []
    service = Heartbeat(ManualClock())

    async def drain() -> None:
        doorbell = os.eventfd(0)
        channel: Any = SimpleNamespace(
            report_fault=faults.append, doorbell_fd=doorbell, interrupt=SimpleNamespace(signal=lambda: None)
        )
        reader: Any = _Reader(packets)
        session = Session(channel, reader, None)  # type: ignore[arg-type]
        while reader.packets and not session.closed:
            service._read(session)
        os.close(doorbell)

    asyncio.run(drain())
    assert service.strays == min(len(packets), STRAY_LIMIT)
    assert bool(faults) == (len(packets) >= STRAY_LIMIT)
