"""VMBus channel messages and ring packets, byte for byte as Linux include/linux/hyperv.h lays them out.

The vectors are written by hand from the field tables, never from our own encoder; both engines must read and
write them.
"""

from __future__ import annotations

from uuid import UUID

import pytest

import vswitch_native
from vswitch_wire import gpadl, packet, vmbus
from vswitch_wire.errors import UnknownMessage, WireError

NIC = UUID("f8615163-df3e-46c5-913f-f2d2f965ed0e")
INSTANCE = UUID("00112233-4455-6677-8899-aabbccddeeff")
NIC_WIRE = "63 51 61 f8 3e df c5 46 91 3f f2 d2 f9 65 ed 0e"
INSTANCE_WIRE = "33 22 11 00 55 44 77 66 88 99 aa bb cc dd ee ff"


def wire(text: str) -> bytes:
    """Hex with spaces; `NNx00` repeats a byte NN times (decimal)."""
    out = bytearray()
    for word in text.split():
        if "x" in word:
            count, byte = word.split("x")
            out += bytes.fromhex(byte) * int(count)
        else:
            out += bytes.fromhex(word)
    return bytes(out)


GOLDEN: list[tuple[str, vmbus.ChannelMessage, bytes]] = [
    (
        "offer",
        vmbus.OfferChannel(
            class_id=NIC,
            instance_id=INSTANCE,
            relid=5,
            connection_id=0x00002005,
            sub_channel_index=2,
            flags=0x0001,
            mmio_megabytes=0x0102,
            mmio_megabytes_optional=0x0304,
            monitor_id=7,
            monitor_allocated=True,
        ),
        wire(
            f"01000000 00000000 {NIC_WIRE} {INSTANCE_WIRE} 16x00 0100 0201 120x00 0200 0403"
            f" 05000000 07 01 0100"
            " 05200000"
        ),
    ),
    (
        "offer below Win7",
        vmbus.OfferChannel(NIC, INSTANCE, relid=1, connection_id=None, is_dedicated_interrupt=None),
        wire(f"01000000 00000000 {NIC_WIRE} {INSTANCE_WIRE} 16x00 0000 0000 120x00 0000 0000 01000000 ff 00"),
    ),
    ("rescind", vmbus.RescindChannelOffer(0x1234), wire("02000000 00000000 34120000")),
    ("request offers", vmbus.RequestOffers(), wire("03000000 00000000")),
    ("all offers delivered", vmbus.AllOffersDelivered(), wire("04000000 00000000")),
    (
        "open",
        vmbus.OpenChannel(5, 6, 0xE1E10, 0, 128, b"\xaa" + bytes(119)),
        wire("05000000 00000000 05000000 06000000 101e0e00 00000000 80000000 aa 119x00"),
    ),
    (
        "open, Copper",
        vmbus.OpenChannel(5, 6, 0xE1E10, 1, 64, bytes(120), connection_id=0x2005, event_flag=9, flags=1),
        wire("05000000 00000000 05000000 06000000 101e0e00 01000000 40000000 120x00 05200000 0900 0100"),
    ),
    (
        "open result",
        vmbus.OpenChannelResult(5, 6, 0xC0000236),
        wire("06000000 00000000 05000000 06000000 360200c0"),
    ),
    ("close", vmbus.CloseChannel(5), wire("07000000 00000000 05000000")),
    (
        "GPADL header",
        vmbus.GpadlHeader(5, 0xE1E10, 24, 1, wire("00200000 00000000 0110000000000000 0210000000000000")),
        wire(
            "08000000 00000000 05000000 101e0e00 1800 0100 00200000 00000000 0110000000000000"
            " 0210000000000000"
        ),
    ),
    (
        "GPADL body",
        vmbus.GpadlBody(1, 0xE1E10, wire("0310000000000000")),
        wire("09000000 00000000 01000000 101e0e00 0310000000000000"),
    ),
    (
        "GPADL created",
        vmbus.GpadlCreated(5, 0xE1E10, 0),
        wire("0a000000 00000000 05000000 101e0e00 00000000"),
    ),
    ("GPADL teardown", vmbus.GpadlTeardown(5, 0xE1E10), wire("0b000000 00000000 05000000 101e0e00")),
    ("GPADL torndown", vmbus.GpadlTorndown(0xE1E10), wire("0c000000 00000000 101e0e00")),
    ("relid released", vmbus.RelidReleased(5), wire("0d000000 00000000 05000000")),
    (
        "initiate contact 5.2",
        vmbus.InitiateContact(0x00050002, 3, vmbus.InitiateContact.target(2, 0, 0), 0x1000, 0x2000),
        wire("0e000000 00000000 02000500 03000000 02 00 0000 00000000 0010000000000000 0020000000000000"),
    ),
    (
        "initiate contact 6.0 with client id",
        vmbus.InitiateContact(
            0x00060000, 0, vmbus.InitiateContact.target(2, 1, vmbus.FEATURE_CLIENT_ID), client_id=INSTANCE
        ),
        wire(f"0e000000 00000000 00000600 00000000 02 01 0000 08000000 16x00 {INSTANCE_WIRE}"),
    ),
    (
        "version response",
        vmbus.VersionResponse(True, 0, 4),
        wire("0f000000 00000000 01 00 0000 04000000"),
    ),
    (
        "version response, Copper",
        vmbus.VersionResponse(True, 0, 0x2A, feature_flags=0x11),
        wire("0f000000 00000000 01 00 0000 2a000000 11000000"),
    ),
    (
        "version response, server monitor pages",
        vmbus.VersionResponse(True, 0, 4, 0x40, 0x5000, 0x6000),
        wire("0f000000 00000000 01 00 0000 04000000 40000000 00000000 0050000000000000 0060000000000000"),
    ),
    ("unload", vmbus.Unload(), wire("10000000 00000000")),
    ("unload response", vmbus.UnloadResponse(), wire("11000000 00000000")),
    (
        "open reserved",
        vmbus.OpenReservedChannel(1, 2, 3, 4, 5),
        wire("12000000 00000000 01000000 02000000 03000000 04000000 05000000"),
    ),
    (
        "close reserved",
        vmbus.CloseReservedChannel(1, 2, 3),
        wire("13000000 00000000 01000000 02000000 03000000"),
    ),
    ("close reserved response", vmbus.CloseReservedResponse(1), wire("14000000 00000000 01000000")),
    (
        "TL connect",
        vmbus.TlConnectRequest(NIC, INSTANCE, NIC),
        wire(f"15000000 00000000 {NIC_WIRE} {INSTANCE_WIRE} {NIC_WIRE}"),
    ),
    ("modify channel", vmbus.ModifyChannel(5, 1), wire("16000000 00000000 05000000 01000000")),
    (
        "TL connect result",
        vmbus.TlConnectResult(NIC, INSTANCE, 0xC0000236),
        wire(f"17000000 00000000 {NIC_WIRE} {INSTANCE_WIRE} 360200c0"),
    ),
    (
        "modify channel response",
        vmbus.ModifyChannelResponse(5, 0),
        wire("18000000 00000000 05000000 00000000"),
    ),
    (
        "modify connection",
        vmbus.ModifyConnection(0x1000, 0x2000),
        wire("19000000 00000000 0010000000000000 0020000000000000"),
    ),
    ("modify connection response", vmbus.ModifyConnectionResponse(1), wire("1a000000 00000000 01")),
    ("pause", vmbus.Pause(), wire("1b000000 00000000")),
    ("pause response", vmbus.PauseResponse(), wire("1c000000 00000000")),
    ("resume", vmbus.Resume(), wire("1d000000 00000000")),
]


@pytest.mark.parametrize(("message", "data"), [entry[1:] for entry in GOLDEN], ids=[e[0] for e in GOLDEN])
def test_channel_messages_have_the_bytes_of_the_reference(message: vmbus.ChannelMessage, data: bytes) -> None:
    assert message.pack() == data
    assert vmbus.decode(data) == message
    if vswitch_native.AVAILABLE:
        from vswitch_native import wire as native

        assert native.recode_channel_message(data) == data


def test_every_channel_message_has_a_golden_vector() -> None:
    assert {type(message) for _, message, _ in GOLDEN} == set(vmbus.MESSAGES.values())


def test_sizes_are_those_of_the_reference() -> None:
    sizes = {name: len(data) for name, _, data in GOLDEN}
    assert sizes["offer"] == 196
    assert sizes["offer below Win7"] == 190
    assert sizes["open"] == 148
    assert sizes["open, Copper"] == 156
    assert sizes["initiate contact 5.2"] == 40
    assert sizes["initiate contact 6.0 with client id"] == 56
    assert sizes["version response"] == 16
    assert sizes["version response, Copper"] == 20
    assert sizes["version response, server monitor pages"] == 40


def test_contact_fields_of_5_0_and_later_share_the_interrupt_page_word() -> None:
    contact = vmbus.decode(wire("0e000000 00000000 00000600 00000000 02 01 0000 18000000 16x00"))
    assert isinstance(contact, vmbus.InitiateContact)
    assert (contact.sint, contact.vtl, contact.feature_flags) == (2, 1, 0x18)


def test_firmware_may_post_240_bytes_whatever_the_message() -> None:
    padded = wire("0d000000 00000000 05000000").ljust(240, b"\xcc")
    assert vmbus.decode(padded) == vmbus.RelidReleased(5)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "needs 8 bytes, has 0"),
        (wire("0d000000 00000000 050000"), "RelidReleased: needs 12 bytes, has 11"),
        (bytes(241), "241 bytes, at most 240"),
    ],
)
def test_short_and_long_messages_are_refused_by_name(data: bytes, words: str) -> None:
    with pytest.raises(WireError, match=words):
        vmbus.decode(data)


@pytest.mark.parametrize("number", [0, 30, 0xFFFFFFFF])
def test_unknown_numbers_are_told_apart_from_malformed_messages(number: int) -> None:
    with pytest.raises(UnknownMessage) as caught:
        vmbus.decode(number.to_bytes(4, "little") + bytes(4))
    assert caught.value.number == number


def test_values_that_do_not_fit_are_refused_when_packing() -> None:
    with pytest.raises(WireError, match="RescindChannelOffer"):
        vmbus.RescindChannelOffer(1 << 32).pack()
    with pytest.raises(WireError, match="121 bytes of user data"):
        vmbus.OpenChannel(1, 1, 1, 0, 1, bytes(121)).pack()


PACKETS: list[tuple[str, packet.Packet, bytes]] = [
    (
        "in-band with completion",
        packet.Packet(6, 0x1122334455667788, True, b"abcdefgh"),
        wire("0600 0200 0300 0100 8877665544332211 6162636465666768"),
    ),
    (
        "completion without payload",
        packet.Packet(0xB, 7, False, b""),
        wire("0b00 0200 0200 0000 0700000000000000"),
    ),
    (
        "transfer pages",
        packet.Packet(
            7,
            3,
            True,
            b"12345678",
            transfer_set_id=0xCAFE,
            transfer_ranges=(packet.TransferRange(100, 1806), packet.TransferRange(60, 3612)),
        ),
        wire(
            "0700 0500 0600 0100 0300000000000000 feca 00 00 02000000"
            " 64000000 0e070000 3c000000 1c0e0000 3132333435363738"
        ),
    ),
    (
        "GPA direct, one run over three pages",
        packet.Packet(9, 1, True, b"12345678", (gpadl.GpaRange(0x2000, 0xF00, (0x10, 0x11, 0x12)),)),
        wire(
            "0900 0700 0800 0100 0100000000000000 00000000 01000000"
            " 00200000 000f0000 1000000000000000 1100000000000000 1200000000000000 3132333435363738"
        ),
    ),
]


def _encode(entry: packet.Packet) -> bytes:
    if entry.type == packet.VM_PKT_COMP:
        return packet.encode_completion(entry.transaction_id, entry.payload)
    if entry.type == packet.VM_PKT_DATA_USING_XFER_PAGES:
        return packet.encode_transfer_pages(
            entry.transaction_id,
            entry.transfer_set_id,
            entry.transfer_ranges,
            entry.payload,
            entry.completion_requested,
        )
    if entry.type == packet.VM_PKT_DATA_USING_GPA_DIRECT:
        return packet.encode_gpa_direct(
            entry.transaction_id, entry.ranges, entry.payload, entry.completion_requested
        )
    return packet.encode_inband(entry.payload, entry.transaction_id, entry.completion_requested)


@pytest.mark.parametrize(("entry", "data"), [e[1:] for e in PACKETS], ids=[e[0] for e in PACKETS])
def test_ring_packets_have_the_bytes_of_the_reference(entry: packet.Packet, data: bytes) -> None:
    assert _encode(entry) == data
    assert packet.decode(data) == entry
    if vswitch_native.AVAILABLE:
        from vswitch_native import wire as native

        assert native.recode_packet(data) == data


def test_garbage_in_reserved_words_of_stock_senders_is_ignored() -> None:
    data = bytearray(PACKETS[3][2])
    data[16:20] = b"\xde\xad\xbe\xef"
    assert packet.decode(bytes(data)) == PACKETS[3][1]
    data = bytearray(PACKETS[2][2])
    data[18:20] = b"\xff\xff"
    assert packet.decode(bytes(data)) == PACKETS[2][1]


def test_payload_is_padded_to_eight_and_seen_padded() -> None:
    assert packet.decode(packet.encode_inband(b"abc")).payload == b"abc" + bytes(5)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (wire("0600 0200 0300 0000 0000000000000000"), "length field says 24, it has 16"),
        (wire("0600 0100 0200 0000 0000000000000000"), "data offset 8 outside 16..16"),
        (wire("0600 0300 0200 0000 0000000000000000"), "data offset 24 outside 16..16"),
        (wire("0900 0300 0300 0000 0000000000000000 00000000 00000000"), "GPA-direct packet: no range"),
        (wire("0900 0300 0300 0000 0000000000000000 00000000 ffffffff"), "4294967295 ranges do not fit"),
        (
            wire("0900 0500 0500 0000 0000000000000000 00000000 01000000 00000000 00000000 0000000000000000"),
            "range 0 is empty",
        ),
        (
            wire("0900 0500 0500 0000 0000000000000000 00000000 01000000 01000000 00100000 0000000000000000"),
            "starts at offset 4096",
        ),
        (
            wire("0900 0500 0500 0000 0000000000000000 00000000 01000000 01100000 00000000 0000000000000000"),
            "needs 2 pages, its list is cut short",
        ),
        (
            wire("0900 0500 0500 0000 0000000000000000 00000000 01000000 01000000 00000000 0000000000001000"),
            "beyond 52 bits",
        ),
        (wire("0700 0300 0300 0000 0000000000000000 feca 0000 01000000"), "1 ranges do not fit"),
    ],
)
def test_lying_packets_are_refused_with_the_rule_they_break(data: bytes, words: str) -> None:
    with pytest.raises(WireError, match=words):
        packet.decode(data)
    if vswitch_native.AVAILABLE:
        from vswitch_native import wire as native

        with pytest.raises(WireError):
            native.decode_packet(data)
