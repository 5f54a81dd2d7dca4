"""NVSP, the protocol of a synthetic NIC's channels.

Linux drivers/net/hyperv/hyperv_net.h; openvmm netvsp/src/protocol.rs. A message is the payload of a VMBus
packet and may be followed by zeros: senders pad to a fixed size.
"""

from __future__ import annotations

from typing import Any

from scapy.fields import (
    ByteField,
    FieldLenField,
    FieldListField,
    FlagsField,
    LEIntEnumField,
    LEIntField,
    LEShortField,
    PacketListField,
    StrLenField,
    XByteField,
    XLEIntField,
)
from scapy.packet import Packet, bind_layers

VERSIONS = {
    0x00000002: "1",
    0x00030002: "2",
    0x00040000: "4",
    0x00050000: "5",
    0x00060000: "6",
    0x00060001: "6.1",
}
STATUS = {
    0: "none",
    1: "success",
    2: "failure",
    3: "too new",
    4: "too old",
    5: "invalid RNDIS packet",
    6: "busy",
    7: "unsupported version",
}
CAPABILITIES = [
    "vmq",
    "chimney",
    "sriov",
    "ieee8021q",
    "correlation_id",
    "teaming",
    "virtual_subnet_id",
    "rsc",
]
NO_SECTION = 0xFFFFFFFF


class NVSP(Packet):
    """The header of every NVSP message: its type."""

    name = "NVSP"
    fields_desc = [
        LEIntEnumField("type", 0, {}),
    ]


class _Message(Packet):
    """What follows a message's own fields is padding."""

    def extract_padding(self, s: bytes) -> tuple[bytes, bytes]:
        return b"", s


class NVSPInit(_Message):
    """INIT (1), guest to host; guests put the same version twice."""

    name = "NVSP INIT"
    fields_desc = [
        LEIntEnumField("min_version", 0x00060001, VERSIONS),
        LEIntEnumField("max_version", 0x00060001, VERSIONS),
    ]


class NVSPInitComplete(_Message):
    """INIT_COMPLETE (2)."""

    name = "NVSP INIT_COMPLETE"
    fields_desc = [
        XLEIntField("negotiated_version", 0xFFFFFFFF),
        LEIntField("max_mdl_chain", 34),
        LEIntEnumField("status", 1, STATUS),
    ]


class NVSPSendNdisVersion(_Message):
    """SEND_NDIS_VERSION (100), guest to host."""

    name = "NVSP SEND_NDIS_VERSION"
    fields_desc = [LEIntField("major", 6), LEIntField("minor", 30)]


class NVSPSendReceiveBuffer(_Message):
    """SEND_RECV_BUF (101), guest to host."""

    name = "NVSP SEND_RECV_BUF"
    fields_desc = [XLEIntField("gpadl_id", 0), LEShortField("id", 0xCAFE), LEShortField("reserved", 0)]


class NVSPSection(Packet):
    """`count` sub-allocations of `sub_allocation_size` bytes from `offset` on."""

    name = "NVSP receive buffer section"
    fields_desc = [
        LEIntField("offset", 0),
        LEIntField("sub_allocation_size", 0),
        LEIntField("count", 0),
        LEIntField("end_offset", 0),
    ]

    def extract_padding(self, s: bytes) -> tuple[bytes, bytes]:
        return b"", s


class NVSPSendReceiveBufferComplete(_Message):
    """SEND_RECV_BUF_COMPLETE (102)."""

    name = "NVSP SEND_RECV_BUF_COMPLETE"
    fields_desc = [
        LEIntEnumField("status", 1, STATUS),
        FieldLenField("section_count", None, count_of="sections", fmt="<I"),
        PacketListField("sections", [], NVSPSection, count_from=lambda pkt: pkt.section_count),
    ]


class NVSPRevokeReceiveBuffer(_Message):
    """REVOKE_RECV_BUF (103), guest to host."""

    name = "NVSP REVOKE_RECV_BUF"
    fields_desc = [
        LEShortField("id", 0xCAFE),
    ]


class NVSPSendSendBuffer(_Message):
    """SEND_SEND_BUF (104), guest to host."""

    name = "NVSP SEND_SEND_BUF"
    fields_desc = [XLEIntField("gpadl_id", 0), LEShortField("id", 0), LEShortField("reserved", 0)]


class NVSPSendSendBufferComplete(_Message):
    """SEND_SEND_BUF_COMPLETE (105)."""

    name = "NVSP SEND_SEND_BUF_COMPLETE"
    fields_desc = [LEIntEnumField("status", 1, STATUS), LEIntField("section_size", 6144)]


class NVSPRevokeSendBuffer(_Message):
    """REVOKE_SEND_BUF (106), guest to host."""

    name = "NVSP REVOKE_SEND_BUF"
    fields_desc = [
        LEShortField("id", 0),
    ]


class NVSPSendRndisPacket(_Message):
    """SEND_RNDIS_PKT (107), both directions; the RNDIS message is in a buffer section or in the packet's
    ranges.
    """

    name = "NVSP SEND_RNDIS_PKT"
    fields_desc = [
        LEIntEnumField("channel_type", 0, {0: "data", 1: "control"}),
        XLEIntField("section_index", NO_SECTION),
        LEIntField("section_size", 0),
    ]


class NVSPSendRndisPacketComplete(_Message):
    """SEND_RNDIS_PKT_COMPLETE (108), both directions."""

    name = "NVSP SEND_RNDIS_PKT_COMPLETE"
    fields_desc = [
        LEIntEnumField("status", 1, STATUS),
    ]


class NVSPSendNdisConfig(_Message):
    """SEND_NDIS_CONFIG (125), guest to host; the MTU counts the Ethernet header."""

    name = "NVSP SEND_NDIS_CONFIG"
    fields_desc = [
        LEIntField("mtu", 1514),
        LEIntField("reserved", 0),
        FlagsField("capabilities", 0, -64, CAPABILITIES),
    ]


class NVSPSendVfAssociation(_Message):
    """SEND_VF_ASSOCIATION (128), host to guest."""

    name = "NVSP SEND_VF_ASSOCIATION"
    fields_desc = [LEIntField("allocated", 0), LEIntField("serial", 0)]


class NVSPSwitchDataPath(_Message):
    """SWITCH_DATA_PATH (129)."""

    name = "NVSP SWITCH_DATA_PATH"
    fields_desc = [
        LEIntEnumField("path", 0, {0: "synthetic", 1: "VF"}),
    ]


class NVSPOidQueryEx(_Message):
    """OID_QUERY_EX (131), guest to host."""

    name = "NVSP OID_QUERY_EX"
    fields_desc = [
        XByteField("object_type", 0x96),
        ByteField("object_revision", 1),
        LEShortField("object_size", 0),
        XLEIntField("oid", 0),
    ]


class NVSPOidQueryExComplete(_Message):
    """OID_QUERY_EX_COMPLETE (132)."""

    name = "NVSP OID_QUERY_EX_COMPLETE"
    fields_desc = [
        XLEIntField("status", 0),
        FieldLenField("length", None, length_of="data", fmt="<I"),
        StrLenField("data", b"", length_from=lambda pkt: pkt.length),
    ]


class NVSPSubchannel(_Message):
    """SUBCHANNEL (133): operation 1 asks for `count`; in the completion the first word is the status."""

    name = "NVSP SUBCHANNEL"
    fields_desc = [LEIntField("operation_or_status", 1), LEIntField("count", 0)]


class NVSPSendIndirectionTable(_Message):
    """SEND_INDIRECTION_TABLE (134), host to guest; `offset` counts from the message's start."""

    name = "NVSP SEND_INDIRECTION_TABLE"
    fields_desc = [
        FieldLenField("count", None, count_of="table", fmt="<I"),
        LEIntField("offset", 12),
        StrLenField("gap", b"", length_from=lambda pkt: max(0, pkt.offset - 12)),
        FieldListField("table", [], LEIntField("channel", 0), count_from=lambda pkt: pkt.count),
    ]


MESSAGES: dict[int, type[Packet]] = {
    1: NVSPInit,
    2: NVSPInitComplete,
    100: NVSPSendNdisVersion,
    101: NVSPSendReceiveBuffer,
    102: NVSPSendReceiveBufferComplete,
    103: NVSPRevokeReceiveBuffer,
    104: NVSPSendSendBuffer,
    105: NVSPSendSendBufferComplete,
    106: NVSPRevokeSendBuffer,
    107: NVSPSendRndisPacket,
    108: NVSPSendRndisPacketComplete,
    125: NVSPSendNdisConfig,
    128: NVSPSendVfAssociation,
    129: NVSPSwitchDataPath,
    131: NVSPOidQueryEx,
    132: NVSPOidQueryExComplete,
    133: NVSPSubchannel,
    134: NVSPSendIndirectionTable,
}

for _number, _message in MESSAGES.items():
    bind_layers(NVSP, _message, type=_number)
_names: Any = NVSP.fields_desc[0]
_names.i2s.update({number: str(message.name).removeprefix("NVSP ") for number, message in MESSAGES.items()})
