"""Two descriptions of the same bytes, written apart: vswitch's codecs and the scapy layers agree both ways.

Every message type of VMBus, NVSP and RNDIS and every kind of ring packet: bytes packed by `vswitch_wire`
dissect to equal field values, and bytes built by scapy decode to equal dataclasses.
"""

from __future__ import annotations

import dataclasses
import struct
import typing
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from netvsc.scapy_layers import NVSP, RNDIS, VMBusCaptured, VMBusMessage, VMBusPacket, summary
from netvsc.scapy_layers import nvsp as scapy_nvsp
from netvsc.scapy_layers import rndis as scapy_rndis
from netvsc.scapy_layers import vmbus as scapy_vmbus
from vswitch_wire import gpadl, nvsp, rndis, vmbus
from vswitch_wire import packet as ring

U32 = st.integers(0, 0xFFFFFFFF)
SMALL = st.integers(0, 255)

# Widths of integer fields that are not u32, by (class, field) or field.
WIDTHS: dict[str, int] = {
    "OfferChannel.flags": 16,
    "mmio_megabytes": 16,
    "mmio_megabytes_optional": 16,
    "sub_channel_index": 16,
    "monitor_id": 8,
    "event_flag": 16,
    "OpenChannel.flags": 16,
    "target_info": 64,
    "parent_to_child_monitor_gpa": 64,
    "child_to_parent_monitor_gpa": 64,
    "connection_state": 8,
    "SendReceiveBuffer.id": 16,
    "RevokeReceiveBuffer.id": 16,
    "SendSendBuffer.id": 16,
    "RevokeSendBuffer.id": 16,
    "capabilities": 64,
    "object_type": 8,
    "object_revision": 8,
    "object_size": 16,
    "range_bytes": 16,
    "range_count": 16,
}
# A tail that old senders leave out is there as a whole or not at all.
TAILS: dict[str, list[tuple[str, ...]]] = {
    "OfferChannel": [("is_dedicated_interrupt", "connection_id")],
    "OpenChannel": [("connection_id", "event_flag", "flags")],
    "VersionResponse": [("feature_flags",), ("parent_to_child_monitor_gpa", "child_to_parent_monitor_gpa")],
    "InitiateContact": [("client_id",)],
    "TlConnectRequest": [("silo_id",)],
}


def values(cls: type[Any], name: str, hint: Any) -> st.SearchStrategy[Any]:
    """Values of one field of a message."""
    width = WIDTHS.get(f"{cls.__name__}.{name}", WIDTHS.get(name, 32))
    options = typing.get_args(hint)
    if bool in options or hint is bool:
        return st.booleans()
    if UUID in options or hint is UUID:
        return st.uuids()
    if int in options or hint is int:
        return st.integers(0, (1 << width) - 1)
    if name == "user_data":
        return st.binary(min_size=120, max_size=120)
    if hint is bytes:
        return st.binary(max_size=64)
    raise AssertionError(f"{cls.__name__}.{name}: {hint}")


@st.composite
def messages(draw: Any, cls: type[Any]) -> Any:
    """A message of a class with flat fields, with or without the tails of newer versions."""
    hints = typing.get_type_hints(cls)
    given_values = {
        field.name: draw(values(cls, field.name, hints[field.name])) for field in dataclasses.fields(cls)
    }
    present = draw(st.integers(0, len(TAILS.get(cls.__name__, ()))))
    for tail in TAILS.get(cls.__name__, ())[present:]:
        given_values.update(dict.fromkeys(tail))
    return cls(**given_values)


def plain(value: Any) -> Any:
    """A scapy value as Python's: flags and enumerations are integers."""
    return int(value) if hasattr(value, "__int__") and not isinstance(value, UUID) else value


def compare(message: Any, layer: Any) -> None:
    for field in dataclasses.fields(message):
        assert plain(getattr(layer, field.name)) == plain(getattr(message, field.name)), field.name


def rebuild(layer: Any) -> bytes:
    """The same layers made anew from their values alone, so that scapy packs them."""
    fresh: Any = None
    while layer and layer.name not in ("Raw", "Padding", "NoPayload"):
        part = type(layer)(**{name: layer.getfieldval(name) for name in layer.fields})
        fresh = part if fresh is None else fresh / part
        layer = layer.payload
    return bytes(fresh)


FLAT_CHANNEL_MESSAGES = [
    cls for cls in vmbus.MESSAGES.values() if cls not in (vmbus.GpadlHeader, vmbus.GpadlBody)
]


@pytest.mark.parametrize("cls", FLAT_CHANNEL_MESSAGES, ids=lambda cls: cls.__name__)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_channel_messages(cls: type[Any], data: st.DataObject) -> None:
    message = data.draw(messages(cls))
    packed = message.pack()
    layer = VMBusMessage(packed)
    assert (
        type(layer.payload if layer.payload else scapy_vmbus.MESSAGES[cls.TYPE - 1]())
        is (scapy_vmbus.MESSAGES[cls.TYPE - 1])
    )
    if dataclasses.fields(message):
        compare(message, layer.payload)
    assert vmbus.decode(rebuild(layer)) == message


def test_every_channel_message_has_a_layer_of_the_same_name() -> None:
    assert len(scapy_vmbus.MESSAGES) == len(vmbus.MESSAGES) == 29
    for number, cls in vmbus.MESSAGES.items():
        assert scapy_vmbus.MESSAGES[number - 1].__name__ == f"VMBus{cls.__name__}"


ranges = st.builds(
    lambda offset, count, first: gpadl.GpaRange(
        count, offset, tuple(range(first, first + gpadl.page_count(offset, count)))
    ),
    st.integers(0, 4095),
    st.integers(1, 40_000),
    st.integers(0, 1 << 40),
)


@settings(max_examples=30, deadline=None)
@given(relid=U32, gpadl_id=U32, entry=ranges)
def test_a_gpadl_header_and_its_bodies(relid: int, gpadl_id: int, entry: gpadl.GpaRange) -> None:
    data = entry.pack()
    header = vmbus.GpadlHeader(relid, gpadl_id, len(data), 1, data[: 8 + 8 * 26])
    layer = VMBusMessage(header.pack()).payload
    assert (layer.relid, layer.gpadl_id, layer.range_bytes, layer.range_count) == (
        relid,
        gpadl_id,
        len(data),
        1,
    )
    first = layer.ranges[0]
    assert (first.byte_count, first.byte_offset, tuple(first.pfns)) == (
        entry.byte_count,
        entry.byte_offset,
        entry.pfns[:26],
    )
    assert vmbus.decode(rebuild(VMBusMessage(header.pack()))) == header
    body = vmbus.GpadlBody(0, gpadl_id, struct.pack(f"<{len(entry.pfns)}Q", *entry.pfns)[: 8 * 28])
    layer = VMBusMessage(body.pack()).payload
    assert (layer.gpadl_id, tuple(layer.pfns)) == (gpadl_id, entry.pfns[:28])
    assert vmbus.decode(rebuild(VMBusMessage(body.pack()))) == body


def test_spare_bytes_that_firmware_posts_are_no_page_number() -> None:
    pfns = tuple(range(16, 42))
    whole = gpadl.GpaRange(60 * 4096, 0, tuple(range(16, 76))).pack()
    header = vmbus.GpadlHeader(3, 7, len(whole), 1, whole[: 8 + 8 * 26]).pack()
    layer = VMBusMessage(header + bytes(240 - len(header))).payload
    assert type(layer) is scapy_vmbus.VMBusGpadlHeader
    assert tuple(layer.ranges[0].pfns) == pfns


SPECIAL_NVSP = (nvsp.SendReceiveBufferComplete, nvsp.SendIndirectionTable, nvsp.OidQueryExComplete)
FLAT_NVSP = [
    cls
    for cls in vars(nvsp).values()
    if isinstance(cls, type)
    and issubclass(cls, nvsp.NvspMessage)
    and cls is not nvsp.NvspMessage
    and cls not in (*SPECIAL_NVSP, nvsp.SubchannelRequest, nvsp.SubchannelComplete)
]


@pytest.mark.parametrize("cls", FLAT_NVSP, ids=lambda cls: cls.__name__)
@settings(max_examples=20, deadline=None)
@given(data=st.data(), size=st.sampled_from([0, 32, 40]))
def test_nvsp_messages(cls: type[Any], data: st.DataObject, size: int) -> None:
    message = data.draw(messages(cls))
    layer = NVSP(message.pack(size))
    assert type(layer.payload).__name__ == f"NVSP{cls.__name__}"
    compare(message, layer.payload)
    assert nvsp.decode(rebuild(layer)) == message


def test_every_nvsp_message_has_a_layer() -> None:
    classes = [*FLAT_NVSP, *SPECIAL_NVSP, nvsp.SubchannelRequest]
    assert {cls.TYPE for cls in classes} == set(scapy_nvsp.MESSAGES)


@settings(max_examples=20, deadline=None)
@given(status=U32, rows=st.lists(st.tuples(U32, U32, U32, U32), max_size=3))
def test_nvsp_receive_buffer_sections(status: int, rows: list[tuple[int, int, int, int]]) -> None:
    message = nvsp.SendReceiveBufferComplete(status, tuple(nvsp.ReceiveBufferSection(*row) for row in rows))
    layer = NVSP(message.pack(40)).payload
    assert plain(layer.status) == status
    shown = [(s.offset, s.sub_allocation_size, s.count, s.end_offset) for s in layer.sections]
    assert shown == rows
    sections = [
        scapy_nvsp.NVSPSection(offset=a, sub_allocation_size=b, count=c, end_offset=d) for a, b, c, d in rows
    ]
    built = NVSP(type=102) / scapy_nvsp.NVSPSendReceiveBufferComplete(status=status, sections=sections)
    assert nvsp.decode(bytes(built)) == message


@settings(max_examples=20, deadline=None)
@given(table=st.lists(U32, max_size=16), gap=st.sampled_from([0, 28]))
def test_nvsp_indirection_table(table: list[int], gap: int) -> None:
    message = nvsp.SendIndirectionTable(tuple(table), 12 + gap)
    layer = NVSP(message.pack()).payload
    assert (layer.count, layer.offset, layer.table) == (len(table), 12 + gap, table)
    built = NVSP(type=134) / scapy_nvsp.NVSPSendIndirectionTable(offset=12 + gap, gap=bytes(gap), table=table)
    assert nvsp.decode(bytes(built)) == message


@given(status=U32, data=st.binary(max_size=60), count=U32)
@settings(max_examples=20, deadline=None)
def test_nvsp_oid_answers_and_sub_channels(status: int, data: bytes, count: int) -> None:
    message = nvsp.OidQueryExComplete(status, data)
    layer = NVSP(message.pack(40)).payload
    assert (layer.status, layer.data) == (status, data)
    assert (
        nvsp.decode(bytes(NVSP(type=132) / scapy_nvsp.NVSPOidQueryExComplete(status=status, data=data)))
        == message
    )
    built = bytes(NVSP(type=133) / scapy_nvsp.NVSPSubchannel(operation_or_status=status, count=count))
    assert nvsp.decode(built) == nvsp.SubchannelRequest(status, count)
    assert nvsp.decode(built, completion=True) == nvsp.SubchannelComplete(status, count)
    layer = NVSP(nvsp.SubchannelComplete(status, count).pack()).payload
    assert (layer.operation_or_status, layer.count) == (status, count)


RNDIS_CONTROL = [
    cls
    for cls in vars(rndis).values()
    if isinstance(cls, type)
    and issubclass(cls, rndis.RndisMessage)
    and hasattr(cls, "TYPE")
    and cls is not rndis.Packet
]


@pytest.mark.parametrize("cls", RNDIS_CONTROL, ids=lambda cls: cls.__name__)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_rndis_control_messages(cls: type[Any], data: st.DataObject) -> None:
    message = data.draw(messages(cls))
    packed = message.pack()
    layer = RNDIS(packed)
    assert layer.length == len(packed)
    assert type(layer.payload).__name__ == f"RNDIS{cls.__name__}"
    compare(message, layer.payload)
    assert rndis.decode(rebuild(layer)) == message


def test_every_rndis_message_has_a_layer() -> None:
    assert {cls.TYPE for cls in RNDIS_CONTROL} | {rndis.Packet.TYPE} == set(scapy_rndis.MESSAGES)


records = st.lists(
    st.tuples(st.sampled_from([0, 2, 6, 8, 9, 0x80000001]), U32.map(lambda v: v.to_bytes(4, "little"))),
    max_size=4,
)


@settings(max_examples=30, deadline=None)
@given(info=records, payload=st.binary(max_size=100))
def test_rndis_packets_with_per_packet_info(info: list[tuple[int, bytes]], payload: bytes) -> None:
    frame = Ether(dst="02:00:00:00:00:02", src="02:00:00:00:00:01") / IP() / TCP(dport=23) / payload
    message = rndis.Packet(bytes(frame), tuple(rndis.PerPacketInfo(*record) for record in info))
    layer = RNDIS(message.pack())
    assert [(plain(r.type), r.data) for r in layer.payload.ppi] == info
    assert bytes(layer[Ether]) == bytes(frame)
    assert layer[TCP].dport == 23
    built = RNDIS(type=1) / scapy_rndis.RNDISPacket(
        ppi=[scapy_rndis.RNDISPerPacketInfo(type=kind, data=value) for kind, value in info]
    )
    assert rndis.decode(bytes(built / frame)) == message


def test_aggregated_rndis_messages_are_dissected_one_by_one() -> None:
    frames = [bytes(Ether() / IP() / bytes([n])) for n in range(3)]
    data = b"".join(rndis.Packet(frame).pack() for frame in frames)
    found = []
    while data:
        length = RNDIS(data).length
        found.append(bytes(RNDIS(data[:length])[Ether]))
        data = data[length:]
    assert found == frames


@settings(max_examples=30, deadline=None)
@given(
    transaction=st.integers(0, (1 << 64) - 1),
    ask=st.booleans(),
    kind=st.sampled_from(["inband", "completion", "transfer", "direct"]),
    transfer=st.lists(st.tuples(U32, U32), min_size=1, max_size=4),
    direct=st.lists(ranges, min_size=1, max_size=3),
    set_id=st.integers(0, 65535),
)
def test_ring_packets(
    transaction: int,
    ask: bool,
    kind: str,
    transfer: list[tuple[int, int]],
    direct: list[gpadl.GpaRange],
    set_id: int,
) -> None:
    payload = nvsp.SendRndisPacket(0).pack()
    scapy_payload = NVSP(type=107) / scapy_nvsp.NVSPSendRndisPacket(channel_type=0)
    flags = 1 if ask else 0
    if kind == "inband":
        packed = ring.encode_inband(payload, transaction, ask)
        built = VMBusPacket(type=6, flags=flags, transaction_id=transaction)
    elif kind == "completion":
        packed = ring.encode_completion(transaction, payload)
        built = VMBusPacket(type=0xB, transaction_id=transaction)
    elif kind == "transfer":
        entries = [ring.TransferRange(*entry) for entry in transfer]
        packed = ring.encode_transfer_pages(transaction, set_id, entries, payload, ask)
        built = VMBusPacket(
            type=7,
            flags=flags,
            transaction_id=transaction,
            transfer_set_id=set_id,
            transfer_ranges=[scapy_vmbus.TransferRange(byte_count=a, byte_offset=b) for a, b in transfer],
        )
    else:
        packed = ring.encode_gpa_direct(transaction, direct, payload, ask)
        built = VMBusPacket(
            type=9,
            flags=flags,
            transaction_id=transaction,
            ranges=[
                scapy_vmbus.GpaRange(byte_count=r.byte_count, byte_offset=r.byte_offset, pfns=list(r.pfns))
                for r in direct
            ],
        )
    assert bytes(built / scapy_payload) == packed
    layer = VMBusPacket(packed)
    decoded = ring.decode(packed)
    assert (plain(layer.type), layer.transaction_id) == (decoded.type, decoded.transaction_id)
    assert bool(layer.flags) is decoded.completion_requested
    assert plain(layer[NVSP].type) == 107
    if kind == "transfer":
        assert layer.transfer_set_id == decoded.transfer_set_id
        assert tuple((r.byte_count, r.byte_offset) for r in layer.transfer_ranges) == decoded.transfer_ranges
    if kind == "direct":
        shown = tuple((r.byte_count, r.byte_offset, tuple(r.pfns)) for r in layer.ranges)
        assert shown == decoded.ranges


@pytest.mark.parametrize("kind", [6, 0xB])
def test_a_payload_begins_where_the_descriptor_says(kind: int) -> None:
    payload = nvsp.SendRndisPacket(0).pack()
    descriptor = struct.pack("<HHHHQ", kind, 4, 4 + len(payload) // 8, 0, 9)
    packed = descriptor + b"\xee" * 16 + payload
    layer = VMBusPacket(packed)
    assert (ring.decode(packed).payload, bytes(layer[NVSP])) == (payload, payload)
    assert layer.gap == b"\xee" * 16
    assert rebuild(layer) == packed


@settings(max_examples=100, deadline=None)
@given(kind=st.integers(0, 4), data=st.binary(max_size=300))
def test_no_bytes_make_the_layers_raise(kind: int, data: bytes) -> None:
    record = bytes([1, 0, kind, 0, 5, 0, 0, 0]) + data
    VMBusCaptured(record).show(dump=True)
    for size in (0, 3, 8, len(record)):
        assert summary(record[:size])


def test_a_captured_record_is_told_in_one_line() -> None:
    contact = vmbus.InitiateContact(0x50003, 0, 2).pack()
    assert summary(bytes([1, 0, 1, 0, 0, 0, 0, 0]) + contact).startswith(
        "VMBus INITIATE_CONTACT version=Iron target_vp=0"
    )
    packet = ring.encode_inband(nvsp.Init(0x60001, 0x60001).pack(), 1, True)
    assert summary(bytes([1, 0, 2, 0, 5, 0, 0, 0]) + packet).startswith("NVSP INIT min_version=6.1")
    assert summary(b"\x01\x00\x09\x00\x00\x00\x00\x00zz") == "nothing known"
