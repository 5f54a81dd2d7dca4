"""RNDIS as synthetic NICs speak it (MS-RNDIS; Linux include/linux/rndis.h, drivers/net/hyperv/hyperv_net.h).

Offsets inside messages count from byte 8, behind type and length. Messages may stand one behind the other.
"""

from __future__ import annotations

import struct
from typing import Any

from scapy.fields import (
    FieldLenField,
    LEIntEnumField,
    LEIntField,
    PacketListField,
    StrLenField,
    XLEIntField,
)
from scapy.layers.l2 import Ether
from scapy.packet import Packet, bind_layers

STATUS = {
    0x00000000: "success",
    0x00000103: "pending",
    0xC0000001: "failure",
    0xC000009A: "resources",
    0xC00000BB: "not supported",
    0xC0010004: "bad version",
    0xC0010014: "invalid length",
    0xC0010015: "invalid data",
    0xC0010016: "buffer too short",
    0xC0010017: "invalid OID",
    0x80000005: "buffer overflow",
    0xC0010009: "multicast full",
}
INDICATIONS = {
    0x4001000B: "media connect",
    0x4001000C: "media disconnect",
    0x40010013: "link speed change",
    0x40010018: "network change",
    0x40020006: "task offload current config",
    0x40010004: "reset start",
    0x40010005: "reset end",
}
OIDS = {
    0x00010101: "SUPPORTED_LIST",
    0x00010102: "HARDWARE_STATUS",
    0x00010103: "MEDIA_SUPPORTED",
    0x00010104: "MEDIA_IN_USE",
    0x00010106: "MAXIMUM_FRAME_SIZE",
    0x00010107: "LINK_SPEED",
    0x0001010C: "VENDOR_ID",
    0x0001010D: "VENDOR_DESCRIPTION",
    0x0001010E: "CURRENT_PACKET_FILTER",
    0x0001010F: "CURRENT_LOOKAHEAD",
    0x00010111: "MAXIMUM_TOTAL_SIZE",
    0x00010113: "MAC_OPTIONS",
    0x00010114: "MEDIA_CONNECT_STATUS",
    0x00010115: "MAXIMUM_SEND_PACKETS",
    0x00010118: "NETWORK_LAYER_ADDRESSES",
    0x00010203: "RECEIVE_SCALE_CAPABILITIES",
    0x00010204: "RECEIVE_SCALE_PARAMETERS",
    0x00010206: "MAX_LINK_SPEED",
    0x00010207: "LINK_STATE",
    0x0001021B: "RNDIS_CONFIG_PARAMETER",
    0x00020216: "FRIENDLY_NAME",
    0x01010101: "PERMANENT_ADDRESS",
    0x01010102: "CURRENT_ADDRESS",
    0x01010103: "MULTICAST_LIST",
    0x01010104: "MAXIMUM_LIST_SIZE",
    0x0101010A: "OFFLOAD_ENCAPSULATION",
    0xFC01020B: "TCP_OFFLOAD_CURRENT_CONFIG",
    0xFC01020C: "TCP_OFFLOAD_PARAMETERS",
    0xFC01020D: "TCP_OFFLOAD_HARDWARE_CAPABILITIES",
}
PPI_TYPES = {
    0: "TCP/IP checksum",
    1: "IPsec",
    2: "TCP large send",
    6: "802.1Q",
    8: "hash value",
    9: "hash info",
    0x80000001: "packet id",
}


class RNDIS(Packet):
    """Type and length (of the whole message, these 8 bytes included)."""

    name = "RNDIS"
    fields_desc = [LEIntEnumField("type", 1, {}), LEIntField("length", None)]

    def post_build(self, pkt: bytes, pay: bytes) -> bytes:
        if self.length is None:
            pkt = pkt[:4] + struct.pack("<I", len(pkt) + len(pay))
        return pkt + pay

    def extract_padding(self, s: bytes) -> tuple[bytes, bytes | None]:
        size = len(s) if self.length is None else max(0, self.length - 8)
        return s[:size], s[size:]


class _Message(Packet):
    """What follows a message's own fields is padding."""

    def extract_padding(self, s: bytes) -> tuple[bytes, bytes]:
        return b"", s


class RNDISPerPacketInfo(Packet):
    """One per-packet-info record; its data is at 12 whatever the offset field says."""

    name = "RNDIS per-packet info"
    fields_desc = [
        FieldLenField("size", None, length_of="data", fmt="<I", adjust=lambda _pkt, length: length + 12),
        LEIntEnumField("type", 0, PPI_TYPES),
        LEIntField("offset", 12),
        StrLenField("data", bytes(4), length_from=lambda pkt: max(0, pkt.size - 12)),
    ]

    def extract_padding(self, s: bytes) -> tuple[bytes, bytes]:
        return b"", s

    @property
    def value(self) -> int:
        """The data as one u32."""
        return int.from_bytes(self.data[:4], "little")


class RNDISPacket(Packet):
    """PACKET (1), both directions: per-packet info, then an Ethernet frame."""

    name = "RNDIS PACKET"
    fields_desc = [
        LEIntField("data_offset", None),
        LEIntField("data_length", None),
        LEIntField("oob_offset", 0),
        LEIntField("oob_length", 0),
        LEIntField("oob_count", 0),
        LEIntField("ppi_offset", None),
        LEIntField("ppi_length", None),
        LEIntField("vc", 0),
        LEIntField("reserved", 0),
        PacketListField("ppi", [], RNDISPerPacketInfo, length_from=lambda pkt: pkt.ppi_length),
        StrLenField("gap", b"", length_from=lambda pkt: max(0, pkt.data_offset - 36 - pkt.ppi_length)),
    ]

    def post_build(self, pkt: bytes, pay: bytes) -> bytes:
        records = len(pkt) - 36 - len(self.gap)
        filled = (
            (0, self.data_offset, len(pkt)),
            (4, self.data_length, len(pay)),
            (20, self.ppi_offset, 36 if records else 0),
            (24, self.ppi_length, records),
        )
        for offset, given, value in filled:
            if given is None:
                pkt = pkt[:offset] + struct.pack("<I", value) + pkt[offset + 4 :]
        return pkt + pay

    def extract_padding(self, s: bytes) -> tuple[bytes, bytes | None]:
        size = len(s) if self.data_length is None else self.data_length
        return s[:size], s[size:]


class RNDISInitialize(_Message):
    """INITIALIZE (2), guest to host."""

    name = "RNDIS INITIALIZE"
    fields_desc = [
        LEIntField("request_id", 1),
        LEIntField("major_version", 1),
        LEIntField("minor_version", 0),
        LEIntField("max_transfer_size", 0x4000),
    ]


class RNDISInitializeComplete(_Message):
    """INITIALIZE_CMPLT, host to guest."""

    name = "RNDIS INITIALIZE_CMPLT"
    fields_desc = [
        LEIntField("request_id", 1),
        LEIntEnumField("status", 0, STATUS),
        LEIntField("major_version", 1),
        LEIntField("minor_version", 0),
        LEIntField("device_flags", 1),
        LEIntField("medium", 0),
        LEIntField("max_packets_per_message", 8),
        XLEIntField("max_transfer_size", 0xEFFFFFFF),
        LEIntField("packet_alignment_factor", 3),
        LEIntField("af_list_offset", 0),
        LEIntField("af_list_size", 0),
    ]


class RNDISHalt(_Message):
    """HALT (3), guest to host."""

    name = "RNDIS HALT"
    fields_desc = [
        LEIntField("request_id", 1),
    ]


class RNDISQuery(_Message):
    """QUERY (4), guest to host."""

    name = "RNDIS QUERY"
    fields_desc = [
        LEIntField("request_id", 1),
        LEIntEnumField("oid", 0, OIDS),
        FieldLenField("info_length", None, length_of="info", fmt="<I"),
        LEIntField("info_offset", 20),
        LEIntField("vc", 0),
        StrLenField("info", b"", length_from=lambda pkt: pkt.info_length),
    ]


class RNDISQueryComplete(_Message):
    """QUERY_CMPLT, host to guest."""

    name = "RNDIS QUERY_CMPLT"
    fields_desc = [
        LEIntField("request_id", 1),
        LEIntEnumField("status", 0, STATUS),
        FieldLenField("info_length", None, length_of="info", fmt="<I"),
        LEIntField("info_offset", 16),
        StrLenField("info", b"", length_from=lambda pkt: pkt.info_length),
    ]


class RNDISSet(_Message):
    """SET (5), guest to host."""

    name = "RNDIS SET"
    fields_desc = RNDISQuery.fields_desc


class RNDISSetComplete(_Message):
    """SET_CMPLT, host to guest."""

    name = "RNDIS SET_CMPLT"
    fields_desc = [LEIntField("request_id", 1), LEIntEnumField("status", 0, STATUS)]


class RNDISReset(_Message):
    """RESET (6), guest to host."""

    name = "RNDIS RESET"
    fields_desc = [
        LEIntField("reserved", 0),
    ]


class RNDISResetComplete(_Message):
    """RESET_CMPLT, host to guest."""

    name = "RNDIS RESET_CMPLT"
    fields_desc = [LEIntEnumField("status", 0, STATUS), LEIntField("addressing_reset", 0)]


class RNDISIndicateStatus(_Message):
    """INDICATE_STATUS (7), host to guest."""

    name = "RNDIS INDICATE_STATUS"
    fields_desc = [
        LEIntEnumField("status", 0x4001000B, INDICATIONS),
        FieldLenField("buffer_length", None, length_of="buffer", fmt="<I"),
        LEIntField("buffer_offset", None),
        StrLenField("buffer", b"", length_from=lambda pkt: pkt.buffer_length),
    ]

    def post_build(self, pkt: bytes, pay: bytes) -> bytes:
        if self.buffer_offset is None:
            pkt = pkt[:8] + struct.pack("<I", 12 if self.buffer else 0) + pkt[12:]
        return pkt + pay


class RNDISKeepAlive(_Message):
    """KEEPALIVE (8), both directions."""

    name = "RNDIS KEEPALIVE"
    fields_desc = [
        LEIntField("request_id", 1),
    ]


class RNDISKeepAliveComplete(_Message):
    """KEEPALIVE_CMPLT, both directions."""

    name = "RNDIS KEEPALIVE_CMPLT"
    fields_desc = [LEIntField("request_id", 1), LEIntEnumField("status", 0, STATUS)]


MESSAGES: dict[int, type[Packet]] = {
    0x00000001: RNDISPacket,
    0x00000002: RNDISInitialize,
    0x80000002: RNDISInitializeComplete,
    0x00000003: RNDISHalt,
    0x00000004: RNDISQuery,
    0x80000004: RNDISQueryComplete,
    0x00000005: RNDISSet,
    0x80000005: RNDISSetComplete,
    0x00000006: RNDISReset,
    0x80000006: RNDISResetComplete,
    0x00000007: RNDISIndicateStatus,
    0x00000008: RNDISKeepAlive,
    0x80000008: RNDISKeepAliveComplete,
}

for _number, _message in MESSAGES.items():
    bind_layers(RNDIS, _message, type=_number)
bind_layers(RNDISPacket, Ether)
_names: Any = RNDIS.fields_desc[0]
_names.i2s.update({number: str(message.name).removeprefix("RNDIS ") for number, message in MESSAGES.items()})
