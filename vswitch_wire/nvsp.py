"""NVSP, the protocol between NetVSC and NetVSP (openvmm netvsp/src/protocol.rs, Linux hyperv_net.h).

Messages ride in VMBus packets; every message starts with `u32 type`. A receiver accepts any length that holds
the type's own fields; a sender pads to `message_size(version)`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Self

from .errors import UnknownMessage, WireError
from .layout import Fixed, need

NVSP_MSG_TYPE_INIT = 1
NVSP_MSG_TYPE_INIT_COMPLETE = 2
NVSP_MSG1_TYPE_SEND_NDIS_VER = 100
NVSP_MSG1_TYPE_SEND_RECV_BUF = 101
NVSP_MSG1_TYPE_SEND_RECV_BUF_COMPLETE = 102
NVSP_MSG1_TYPE_REVOKE_RECV_BUF = 103
NVSP_MSG1_TYPE_SEND_SEND_BUF = 104
NVSP_MSG1_TYPE_SEND_SEND_BUF_COMPLETE = 105
NVSP_MSG1_TYPE_REVOKE_SEND_BUF = 106
NVSP_MSG1_TYPE_SEND_RNDIS_PKT = 107
NVSP_MSG1_TYPE_SEND_RNDIS_PKT_COMPLETE = 108
NVSP_MSG2_TYPE_SEND_NDIS_CONFIG = 125
NVSP_MSG4_TYPE_SEND_VF_ASSOCIATION = 128
NVSP_MSG4_TYPE_SWITCH_DATA_PATH = 129
NVSP_MSG5_TYPE_OID_QUERY_EX = 131
NVSP_MSG5_TYPE_OID_QUERY_EX_COMPLETE = 132
NVSP_MSG5_TYPE_SUBCHANNEL = 133
NVSP_MSG5_TYPE_SEND_INDIRECTION_TABLE = 134

NVSP_STAT_NONE = 0
NVSP_STAT_SUCCESS = 1
NVSP_STAT_FAIL = 2
NVSP_STAT_PROTOCOL_TOO_NEW = 3
NVSP_STAT_PROTOCOL_TOO_OLD = 4
NVSP_STAT_INVALID_RNDIS_PKT = 5
NVSP_STAT_BUSY = 6
NVSP_STAT_PROTOCOL_UNSUPPORTED = 7

RMC_DATA = 0
RMC_CONTROL = 1
NVSP_INVALID_SECTION_INDEX = 0xFFFFFFFF
NVSP_SUBCHANNEL_ALLOCATE = 1
VRSS_SEND_TAB_SIZE = 16
SEND_TABLE_OFFSET = 12
DATA_PATH_SYNTHETIC = 0
DATA_PATH_VF = 1

INIT_COMPLETE_VERSION = 0xFFFFFFFF
INIT_COMPLETE_VERSION_V1 = 2
MAXIMUM_MDL_CHAIN = 34

NVSP_CAPABILITY_VMQ = 0x01
NVSP_CAPABILITY_CHIMNEY = 0x02
NVSP_CAPABILITY_SRIOV = 0x04
NVSP_CAPABILITY_IEEE8021Q = 0x08
NVSP_CAPABILITY_CORRELATION_ID = 0x10
NVSP_CAPABILITY_TEAMING = 0x20
NVSP_CAPABILITY_VIRTUAL_SUBNET_ID = 0x40
NVSP_CAPABILITY_RSC_OVER_VMBUS = 0x80

NETVSC_RECEIVE_BUFFER_ID = 0xCAFE
NETVSC_SEND_BUFFER_ID = 0


class NvspVersion(IntEnum):
    """NVSP protocol versions."""

    V1 = 0x00000002
    V2 = 0x00030002
    V4 = 0x00040000
    V5 = 0x00050000
    V6 = 0x00060000
    V61 = 0x00060001


def message_size(version: int) -> int:
    """Bytes a sender pads every message to: 32 below 6.1 (28 rounded up to 8), 40 from 6.1 on."""
    return 40 if version >= NvspVersion.V61 else 32


_TYPE = struct.Struct("<I")


class NvspMessage(Fixed):
    """A message; `pack(size)` pads it with zeros to `size` bytes."""

    __slots__ = ()
    TYPE: ClassVar[int]
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<")

    def pack(self, size: int = 0) -> bytes:
        """The message's bytes, at least `size` of them. Raises WireError when a value does not fit its
        field."""
        data = _TYPE.pack(self.TYPE) + self._pack_body()
        return data + bytes(max(0, size - len(data)))

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Decodes `payload`, whose type is already known to be `TYPE`."""
        return cls.unpack_fields(payload, 4)

    def _pack_body(self) -> bytes:
        return self.pack_fields()


@dataclass(frozen=True, slots=True)
class Init(NvspMessage):
    """1, guest to host. Guests put one version in both; the host uses `min_version`."""

    TYPE: ClassVar[int] = NVSP_MSG_TYPE_INIT
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<II")
    min_version: int
    max_version: int


@dataclass(frozen=True, slots=True)
class InitComplete(NvspMessage):
    """2, completion of 1."""

    TYPE: ClassVar[int] = NVSP_MSG_TYPE_INIT_COMPLETE
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<III")
    negotiated_version: int
    max_mdl_chain: int
    status: int


@dataclass(frozen=True, slots=True)
class SendNdisVersion(NvspMessage):
    """100, guest to host."""

    TYPE: ClassVar[int] = NVSP_MSG1_TYPE_SEND_NDIS_VER
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<II")
    major: int
    minor: int


@dataclass(frozen=True, slots=True)
class SendReceiveBuffer(NvspMessage):
    """101, guest to host."""

    TYPE: ClassVar[int] = NVSP_MSG1_TYPE_SEND_RECV_BUF
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<IHxx")
    gpadl_id: int
    id: int


@dataclass(frozen=True, slots=True)
class ReceiveBufferSection:
    """`count` sub-allocations of `sub_allocation_size` bytes starting at `offset`."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<IIII")
    offset: int
    sub_allocation_size: int
    count: int
    end_offset: int


@dataclass(frozen=True, slots=True)
class SendReceiveBufferComplete(NvspMessage):
    """102, completion of 101. Stock guests accept exactly one section, at offset 0."""

    TYPE: ClassVar[int] = NVSP_MSG1_TYPE_SEND_RECV_BUF_COMPLETE
    status: int
    sections: tuple[ReceiveBufferSection, ...]

    def _pack_body(self) -> bytes:
        try:
            data = struct.pack("<II", self.status, len(self.sections))
            for section in self.sections:
                data += ReceiveBufferSection.LAYOUT.pack(
                    section.offset, section.sub_allocation_size, section.count, section.end_offset
                )
        except struct.error as error:
            raise WireError(f"SendReceiveBufferComplete: a value does not fit its field: {error}") from error
        return data

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        need("SendReceiveBufferComplete", payload, 12)
        status, count = struct.unpack_from("<II", payload, 4)
        layout = ReceiveBufferSection.LAYOUT
        if count * layout.size > len(payload) - 12:
            raise WireError(f"SendReceiveBufferComplete: {count} sections do not fit in {len(payload)} bytes")
        sections = tuple(
            ReceiveBufferSection(*layout.unpack_from(payload, 12 + index * layout.size))
            for index in range(count)
        )
        return cls(status, sections)


@dataclass(frozen=True, slots=True)
class RevokeReceiveBuffer(NvspMessage):
    """103, guest to host."""

    TYPE: ClassVar[int] = NVSP_MSG1_TYPE_REVOKE_RECV_BUF
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<H")
    id: int


@dataclass(frozen=True, slots=True)
class SendSendBuffer(NvspMessage):
    """104, guest to host."""

    TYPE: ClassVar[int] = NVSP_MSG1_TYPE_SEND_SEND_BUF
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<IHxx")
    gpadl_id: int
    id: int


@dataclass(frozen=True, slots=True)
class SendSendBufferComplete(NvspMessage):
    """105, completion of 104: the host chooses the section size."""

    TYPE: ClassVar[int] = NVSP_MSG1_TYPE_SEND_SEND_BUF_COMPLETE
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<II")
    status: int
    section_size: int


@dataclass(frozen=True, slots=True)
class RevokeSendBuffer(NvspMessage):
    """106, guest to host."""

    TYPE: ClassVar[int] = NVSP_MSG1_TYPE_REVOKE_SEND_BUF
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<H")
    id: int


@dataclass(frozen=True, slots=True)
class SendRndisPacket(NvspMessage):
    """107, both directions. `section_index` NVSP_INVALID_SECTION_INDEX: nothing in the send buffer."""

    TYPE: ClassVar[int] = NVSP_MSG1_TYPE_SEND_RNDIS_PKT
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<III")
    channel_type: int
    section_index: int = NVSP_INVALID_SECTION_INDEX
    section_size: int = 0


@dataclass(frozen=True, slots=True)
class SendRndisPacketComplete(NvspMessage):
    """108, completion of 107."""

    TYPE: ClassVar[int] = NVSP_MSG1_TYPE_SEND_RNDIS_PKT_COMPLETE
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<I")
    status: int


@dataclass(frozen=True, slots=True)
class SendNdisConfig(NvspMessage):
    """125, guest to host. `mtu` includes the 14-byte Ethernet header; `capabilities` is packed, unaligned."""

    TYPE: ClassVar[int] = NVSP_MSG2_TYPE_SEND_NDIS_CONFIG
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<I4xQ")
    mtu: int
    capabilities: int


@dataclass(frozen=True, slots=True)
class SendVfAssociation(NvspMessage):
    """128, host to guest."""

    TYPE: ClassVar[int] = NVSP_MSG4_TYPE_SEND_VF_ASSOCIATION
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<II")
    allocated: int
    serial: int


@dataclass(frozen=True, slots=True)
class SwitchDataPath(NvspMessage):
    """129, guest to host; its completion, when asked for, is empty."""

    TYPE: ClassVar[int] = NVSP_MSG4_TYPE_SWITCH_DATA_PATH
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<I")
    path: int


@dataclass(frozen=True, slots=True)
class OidQueryEx(NvspMessage):
    """131, guest to host: NDIS object header (type, revision, size), then the OID."""

    TYPE: ClassVar[int] = NVSP_MSG5_TYPE_OID_QUERY_EX
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<BBHI")
    object_type: int
    object_revision: int
    object_size: int
    oid: int


@dataclass(frozen=True, slots=True)
class OidQueryExComplete(NvspMessage):
    """132, completion of 131."""

    TYPE: ClassVar[int] = NVSP_MSG5_TYPE_OID_QUERY_EX_COMPLETE
    status: int
    data: bytes

    def _pack_body(self) -> bytes:
        try:
            return struct.pack("<II", self.status, len(self.data)) + self.data
        except struct.error as error:
            raise WireError(f"OidQueryExComplete: a value does not fit its field: {error}") from error

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        need("OidQueryExComplete", payload, 12)
        status, count = struct.unpack_from("<II", payload, 4)
        need("OidQueryExComplete", payload, 12 + count)
        return cls(status, bytes(payload[12 : 12 + count]))


@dataclass(frozen=True, slots=True)
class SubchannelRequest(NvspMessage):
    """133, guest to host."""

    TYPE: ClassVar[int] = NVSP_MSG5_TYPE_SUBCHANNEL
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<II")
    operation: int
    count: int


@dataclass(frozen=True, slots=True)
class SubchannelComplete(NvspMessage):
    """133, completion of 133 (the same number)."""

    TYPE: ClassVar[int] = NVSP_MSG5_TYPE_SUBCHANNEL
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<II")
    status: int
    count: int


@dataclass(frozen=True, slots=True)
class SendIndirectionTable(NvspMessage):
    """134, host to guest: 16 channel indices, placed at `offset` from the message's start (12)."""

    TYPE: ClassVar[int] = NVSP_MSG5_TYPE_SEND_INDIRECTION_TABLE
    table: tuple[int, ...]
    offset: int = SEND_TABLE_OFFSET

    def _pack_body(self) -> bytes:
        if self.offset < SEND_TABLE_OFFSET:
            raise WireError(f"SendIndirectionTable: offset {self.offset}, at least {SEND_TABLE_OFFSET}")
        try:
            head = struct.pack("<II", len(self.table), self.offset)
            head += bytes(self.offset - SEND_TABLE_OFFSET)
            return head + struct.pack(f"<{len(self.table)}I", *self.table)
        except struct.error as error:
            raise WireError(f"SendIndirectionTable: a value does not fit its field: {error}") from error

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        need("SendIndirectionTable", payload, SEND_TABLE_OFFSET)
        count, offset = struct.unpack_from("<II", payload, 4)
        if offset < SEND_TABLE_OFFSET or offset + count * 4 > len(payload):
            raise WireError(
                f"SendIndirectionTable: {count} entries at {offset}, message of {len(payload)} bytes"
            )
        return cls(struct.unpack_from(f"<{count}I", payload, offset), offset)


_MESSAGES: dict[int, type[NvspMessage]] = {
    message.TYPE: message
    for message in (
        Init,
        InitComplete,
        SendNdisVersion,
        SendReceiveBuffer,
        SendReceiveBufferComplete,
        RevokeReceiveBuffer,
        SendSendBuffer,
        SendSendBufferComplete,
        RevokeSendBuffer,
        SendRndisPacket,
        SendRndisPacketComplete,
        SendNdisConfig,
        SendVfAssociation,
        SwitchDataPath,
        OidQueryEx,
        OidQueryExComplete,
        SubchannelRequest,
        SendIndirectionTable,
    )
}


def message_type(payload: bytes) -> int:
    """The type number. Raises WireError when the payload is shorter than 4 bytes."""
    need("NVSP message", payload, _TYPE.size)
    (number,) = _TYPE.unpack_from(payload)
    return int(number)


def decode(payload: bytes, completion: bool = False) -> NvspMessage:
    """The message in `payload`; `completion` tells 133's answer from its request. Trailing bytes are ignored.

    Raises WireError when it is short, UnknownMessage for other types (chimney, PacketDirect and what was
    never defined).
    """
    number = message_type(payload)
    if completion and number == NVSP_MSG5_TYPE_SUBCHANNEL:
        return SubchannelComplete.unpack(payload)
    message = _MESSAGES.get(number)
    if message is None:
        raise UnknownMessage("NVSP", number)
    return message.unpack(payload)
