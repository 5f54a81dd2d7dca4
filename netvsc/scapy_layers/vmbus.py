"""VMBus: channel messages, GPADL ranges, and the packets of a channel's ring.

Channel messages are payloads of SynIC messages of type 1 (Linux include/linux/hyperv.h, `enum
vmbus_channel_message_type`; openvmm vmbus_core/src/protocol.rs). Ring packets: Linux `struct
vmpacket_descriptor`, without the 8-byte trailer that belongs to the ring.
"""

from __future__ import annotations

import struct
from typing import Any

from scapy.fields import (
    ByteField,
    ConditionalField,
    FieldListField,
    FlagsField,
    LEIntEnumField,
    LEIntField,
    LELongField,
    LEShortEnumField,
    LEShortField,
    PacketListField,
    StrFixedLenField,
    StrLenField,
    XByteField,
    XLEIntField,
    XLELongField,
)
from scapy.packet import Packet, bind_layers

from netvsc.scapy_layers.fields import (
    GuidField,
    OptionalGuidField,
    OptionalLEIntField,
    OptionalLELongField,
    OptionalLEShortField,
    OptionalXLEIntField,
)

PAGE = 4096
VERSIONS = {
    0x0000000D: "WS2008",
    0x00010001: "Win7",
    0x00020004: "Win8",
    0x00030000: "Win8.1",
    0x00040000: "Win10",
    0x00040001: "Win10 RS3 4.1",
    0x00050000: "Win10 RS3 5.0",
    0x00050001: "Win10 RS4",
    0x00050002: "Win10 RS5",
    0x00050003: "Iron",
    0x00060000: "Copper",
}
OFFER_FLAGS = {
    0x1: "enumerate",
    0x2: "confidential_ring",
    0x4: "confidential_memory",
    0x8: "pinned_memory",
    0x10: "named_pipe",
    0x100: "loopback",
    0x200: "parent",
    0x400: "monitored",
    0x2000: "tlnpi",
}


class PfnsField(FieldListField):
    """Page frame numbers: as many as there are whole ones, since firmware posts 4 spare bytes behind them."""

    def getfield(self, pkt: Any, s: bytes) -> tuple[bytes, list[Any]]:
        whole = len(s) // 8 * 8
        rest, pfns = super().getfield(pkt, s[:whole])
        return rest + s[whole:], pfns


class GpaRange(Packet):
    """A range of guest memory: byte count, offset into the first page, page frame numbers."""

    name = "GPA range"
    fields_desc = [
        LEIntField("byte_count", 0),
        LEIntField("byte_offset", 0),
        PfnsField(
            "pfns",
            [],
            XLELongField("pfn", 0),
            count_from=lambda pkt: (pkt.byte_offset + pkt.byte_count + PAGE - 1) // PAGE,
        ),
    ]

    def extract_padding(self, s: bytes) -> tuple[bytes, bytes]:
        return b"", s


class VMBusMessage(Packet):
    """The header of every channel message: type and padding."""

    name = "VMBus message"
    fields_desc = [LEIntEnumField("type", 0, {}), LEIntField("padding", 0)]


class VMBusOfferChannel(Packet):
    """OFFERCHANNEL (1), host to guest."""

    name = "VMBus OFFERCHANNEL"
    fields_desc = [
        GuidField("class_id", None),
        GuidField("instance_id", None),
        LELongField("reserved1", 0),
        LELongField("reserved2", 0),
        FlagsField("flags", 0, -16, OFFER_FLAGS),
        LEShortField("mmio_megabytes", 0),
        StrFixedLenField("user_data", bytes(120), 120),
        LEShortField("sub_channel_index", 0),
        LEShortField("mmio_megabytes_optional", 0),
        LEIntField("relid", 0),
        XByteField("monitor_id", 0xFF),
        ByteField("monitor_allocated", 0),
        OptionalLEShortField("is_dedicated_interrupt", 1),
        OptionalXLEIntField("connection_id", 0),
    ]


class VMBusRescindChannelOffer(Packet):
    """RESCIND_CHANNELOFFER (2), host to guest."""

    name = "VMBus RESCIND_CHANNELOFFER"
    fields_desc = [
        LEIntField("relid", 0),
    ]


class VMBusRequestOffers(Packet):
    """REQUESTOFFERS (3), guest to host."""

    name = "VMBus REQUESTOFFERS"


class VMBusAllOffersDelivered(Packet):
    """ALLOFFERS_DELIVERED (4), host to guest."""

    name = "VMBus ALLOFFERS_DELIVERED"


class VMBusOpenChannel(Packet):
    """OPENCHANNEL (5), guest to host; the last three fields only from version 6.0."""

    name = "VMBus OPENCHANNEL"
    fields_desc = [
        LEIntField("relid", 0),
        LEIntField("open_id", 0),
        XLEIntField("ring_gpadl", 0),
        LEIntField("target_vp", 0),
        LEIntField("downstream_page_offset", 0),
        StrFixedLenField("user_data", bytes(120), 120),
        OptionalXLEIntField("connection_id", None),
        OptionalLEShortField("event_flag", None),
        OptionalLEShortField("flags", None),
    ]


class VMBusOpenChannelResult(Packet):
    """OPENCHANNEL_RESULT (6), host to guest."""

    name = "VMBus OPENCHANNEL_RESULT"
    fields_desc = [LEIntField("relid", 0), LEIntField("open_id", 0), XLEIntField("status", 0)]


class VMBusCloseChannel(Packet):
    """CLOSECHANNEL (7), guest to host."""

    name = "VMBus CLOSECHANNEL"
    fields_desc = [
        LEIntField("relid", 0),
    ]


class VMBusGpadlHeader(Packet):
    """GPADL_HEADER (8), guest to host; further page numbers follow in bodies."""

    name = "VMBus GPADL_HEADER"
    fields_desc = [
        LEIntField("relid", 0),
        XLEIntField("gpadl_id", 0),
        LEShortField("range_bytes", 0),
        LEShortField("range_count", 0),
        PacketListField("ranges", [], GpaRange, count_from=lambda pkt: pkt.range_count),
    ]


class VMBusGpadlBody(Packet):
    """GPADL_BODY (9), guest to host."""

    name = "VMBus GPADL_BODY"
    fields_desc = [
        LEIntField("message_number", 0),
        XLEIntField("gpadl_id", 0),
        PfnsField("pfns", [], XLELongField("pfn", 0), count_from=lambda _pkt: 28),
    ]


class VMBusGpadlCreated(Packet):
    """GPADL_CREATED (10), host to guest."""

    name = "VMBus GPADL_CREATED"
    fields_desc = [LEIntField("relid", 0), XLEIntField("gpadl_id", 0), XLEIntField("status", 0)]


class VMBusGpadlTeardown(Packet):
    """GPADL_TEARDOWN (11), guest to host."""

    name = "VMBus GPADL_TEARDOWN"
    fields_desc = [LEIntField("relid", 0), XLEIntField("gpadl_id", 0)]


class VMBusGpadlTorndown(Packet):
    """GPADL_TORNDOWN (12), host to guest."""

    name = "VMBus GPADL_TORNDOWN"
    fields_desc = [
        XLEIntField("gpadl_id", 0),
    ]


class VMBusRelidReleased(Packet):
    """RELID_RELEASED (13), guest to host."""

    name = "VMBus RELID_RELEASED"
    fields_desc = [
        LEIntField("relid", 0),
    ]


class VMBusInitiateContact(Packet):
    """INITIATE_CONTACT (14), guest to host; `target_info` from 5.0: SINT, VTL << 8, feature flags << 32."""

    name = "VMBus INITIATE_CONTACT"
    fields_desc = [
        LEIntEnumField("version", 0x00050003, VERSIONS),
        LEIntField("target_vp", 0),
        XLELongField("target_info", 2),
        XLELongField("parent_to_child_monitor_gpa", 0),
        XLELongField("child_to_parent_monitor_gpa", 0),
        OptionalGuidField("client_id"),
    ]


class VMBusVersionResponse(Packet):
    """VERSION_RESPONSE (15), host to guest; the field at 12 is the version below 5.0, from then on a
    connection id.
    """

    name = "VMBus VERSION_RESPONSE"
    fields_desc = [
        ByteField("version_supported", 1),
        ByteField("connection_state", 0),
        LEShortField("padding", 0),
        XLEIntField("selected_version_or_connection_id", 0),
        OptionalXLEIntField("feature_flags", None),
        OptionalLEIntField("padding2", None),
        OptionalLELongField("parent_to_child_monitor_gpa", None),
        OptionalLELongField("child_to_parent_monitor_gpa", None),
    ]


class VMBusUnload(Packet):
    """UNLOAD (16), guest to host."""

    name = "VMBus UNLOAD"


class VMBusUnloadResponse(Packet):
    """UNLOAD_RESPONSE (17), host to guest."""

    name = "VMBus UNLOAD_RESPONSE"


class VMBusOpenReservedChannel(Packet):
    """OPEN_RESERVED_CHANNEL (18), guest to host."""

    name = "VMBus OPEN_RESERVED_CHANNEL"
    fields_desc = [
        LEIntField("relid", 0),
        LEIntField("target_vp", 0),
        LEIntField("target_sint", 0),
        XLEIntField("ring_gpadl", 0),
        LEIntField("downstream_page_offset", 0),
    ]


class VMBusCloseReservedChannel(Packet):
    """CLOSE_RESERVED_CHANNEL (19), guest to host."""

    name = "VMBus CLOSE_RESERVED_CHANNEL"
    fields_desc = [LEIntField("relid", 0), LEIntField("target_vp", 0), LEIntField("target_sint", 0)]


class VMBusCloseReservedResponse(Packet):
    """CLOSE_RESERVED_RESPONSE (20), host to guest."""

    name = "VMBus CLOSE_RESERVED_RESPONSE"
    fields_desc = [
        LEIntField("relid", 0),
    ]


class VMBusTlConnectRequest(Packet):
    """TL_CONNECT_REQUEST (21), guest to host."""

    name = "VMBus TL_CONNECT_REQUEST"
    fields_desc = [
        GuidField("endpoint_id", None),
        GuidField("service_id", None),
        OptionalGuidField("silo_id"),
    ]


class VMBusModifyChannel(Packet):
    """MODIFYCHANNEL (22), guest to host."""

    name = "VMBus MODIFYCHANNEL"
    fields_desc = [LEIntField("relid", 0), LEIntField("target_vp", 0)]


class VMBusTlConnectResult(Packet):
    """TL_CONNECT_RESULT (23), host to guest."""

    name = "VMBus TL_CONNECT_RESULT"
    fields_desc = [GuidField("endpoint_id", None), GuidField("service_id", None), XLEIntField("status", 0)]


class VMBusModifyChannelResponse(Packet):
    """MODIFYCHANNEL_RESPONSE (24), host to guest."""

    name = "VMBus MODIFYCHANNEL_RESPONSE"
    fields_desc = [LEIntField("relid", 0), XLEIntField("status", 0)]


class VMBusModifyConnection(Packet):
    """MODIFYCONNECTION (25), guest to host."""

    name = "VMBus MODIFYCONNECTION"
    fields_desc = [
        XLELongField("parent_to_child_monitor_gpa", 0),
        XLELongField("child_to_parent_monitor_gpa", 0),
    ]


class VMBusModifyConnectionResponse(Packet):
    """MODIFYCONNECTION_RESPONSE (26), host to guest."""

    name = "VMBus MODIFYCONNECTION_RESPONSE"
    fields_desc = [
        ByteField("connection_state", 0),
    ]


class VMBusPause(Packet):
    """PAUSE (27), guest to host."""

    name = "VMBus PAUSE"


class VMBusPauseResponse(Packet):
    """PAUSE_RESPONSE (28), host to guest."""

    name = "VMBus PAUSE_RESPONSE"


class VMBusResume(Packet):
    """RESUME (29), guest to host."""

    name = "VMBus RESUME"


MESSAGES: tuple[type[Packet], ...] = (
    VMBusOfferChannel,
    VMBusRescindChannelOffer,
    VMBusRequestOffers,
    VMBusAllOffersDelivered,
    VMBusOpenChannel,
    VMBusOpenChannelResult,
    VMBusCloseChannel,
    VMBusGpadlHeader,
    VMBusGpadlBody,
    VMBusGpadlCreated,
    VMBusGpadlTeardown,
    VMBusGpadlTorndown,
    VMBusRelidReleased,
    VMBusInitiateContact,
    VMBusVersionResponse,
    VMBusUnload,
    VMBusUnloadResponse,
    VMBusOpenReservedChannel,
    VMBusCloseReservedChannel,
    VMBusCloseReservedResponse,
    VMBusTlConnectRequest,
    VMBusModifyChannel,
    VMBusTlConnectResult,
    VMBusModifyChannelResponse,
    VMBusModifyConnection,
    VMBusModifyConnectionResponse,
    VMBusPause,
    VMBusPauseResponse,
    VMBusResume,
)
"""In the order of their numbers, 1 to 29."""

for _number, _message in enumerate(MESSAGES, 1):
    bind_layers(VMBusMessage, _message, type=_number)
_names: Any = VMBusMessage.fields_desc[0]
_names.i2s.update(
    {number: str(message.name).removeprefix("VMBus ") for number, message in enumerate(MESSAGES, 1)}
)


class TransferRange(Packet):
    """A range of a transfer page set: of the receive buffer, for NetVSC."""

    name = "transfer range"
    fields_desc = [LEIntField("byte_count", 0), LEIntField("byte_offset", 0)]

    def extract_padding(self, s: bytes) -> tuple[bytes, bytes]:
        return b"", s


PACKET_TYPES = {
    6: "in-band",
    7: "transfer pages",
    9: "GPA direct",
    0xA: "cancel",
    0xB: "completion",
}


class VMBusPacket(Packet):
    """A ring packet: descriptor, the type's header, payload, padding to 8.

    Offset and length are in units of 8 bytes; `gap` is what lies in front of the payload of a type that has
    no header.
    """

    name = "VMBus packet"
    fields_desc = [
        LEShortEnumField("type", 6, PACKET_TYPES),
        LEShortField("offset8", None),
        LEShortField("length8", None),
        FlagsField("flags", 0, -16, {1: "completion_requested"}),
        XLELongField("transaction_id", 0),
        ConditionalField(LEShortField("transfer_set_id", 0), lambda pkt: pkt.type == 7),
        ConditionalField(ByteField("sender_owns_set", 0), lambda pkt: pkt.type == 7),
        ConditionalField(ByteField("reserved7", 0), lambda pkt: pkt.type == 7),
        ConditionalField(
            StrLenField("gap", b"", length_from=lambda pkt: max(0, (pkt.offset8 or 2) - 2) * 8),
            lambda pkt: pkt.type not in (7, 9),
        ),
        ConditionalField(LEIntField("reserved9", 0), lambda pkt: pkt.type == 9),
        ConditionalField(LEIntField("range_count", None), lambda pkt: pkt.type in (7, 9)),
        ConditionalField(
            PacketListField("transfer_ranges", [], TransferRange, count_from=lambda pkt: pkt.range_count),
            lambda pkt: pkt.type == 7,
        ),
        ConditionalField(
            PacketListField("ranges", [], GpaRange, count_from=lambda pkt: pkt.range_count),
            lambda pkt: pkt.type == 9,
        ),
    ]

    def post_build(self, pkt: bytes, pay: bytes) -> bytes:
        """Fill in the range count, the data offset and the length, and pad to 8 bytes."""
        if self.type in (7, 9) and self.range_count is None:
            count = len(self.transfer_ranges if self.type == 7 else self.ranges)
            pkt = pkt[:20] + struct.pack("<I", count) + pkt[24:]
        offset8 = len(pkt) // 8 if self.offset8 is None else self.offset8
        whole = pkt + pay
        whole += bytes(-len(whole) % 8)
        length8 = len(whole) // 8 if self.length8 is None else self.length8
        return whole[:2] + struct.pack("<HH", offset8, length8) + whole[6:]

    def extract_padding(self, s: bytes) -> tuple[bytes, bytes | None]:
        if self.length8 is None or self.offset8 is None:
            return s, None
        size = max(0, (self.length8 - self.offset8) * 8)
        return s[:size], s[size:]

    def guess_payload_class(self, payload: bytes) -> Any:
        """Channels of a synthetic NIC carry NVSP; an empty completion carries nothing."""
        from netvsc.scapy_layers.nvsp import NVSP

        return NVSP if len(payload) >= 4 else super().guess_payload_class(payload)
