"""VMBus channel messages (Linux include/linux/hyperv.h, openvmm vmbus_core/src/protocol.rs).

A channel message rides in a SynIC message of type 1, at most 240 bytes: `u32 type, u32 padding`, then the
body. Optional tails (Win7 offers, Copper opens and responses) are fields that are None when the bytes are not
there. Trailing bytes are ignored: UEFI posts 240 bytes whatever the message. So a tail of a message that came
from a guest means something only if the negotiated version and features say so; that is the VMBus server's
business.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Self
from uuid import UUID

from .errors import UnknownMessage, WireError
from .layout import Fixed, need

CHANNELMSG_INVALID = 0
CHANNELMSG_OFFERCHANNEL = 1
CHANNELMSG_RESCIND_CHANNELOFFER = 2
CHANNELMSG_REQUESTOFFERS = 3
CHANNELMSG_ALLOFFERS_DELIVERED = 4
CHANNELMSG_OPENCHANNEL = 5
CHANNELMSG_OPENCHANNEL_RESULT = 6
CHANNELMSG_CLOSECHANNEL = 7
CHANNELMSG_GPADL_HEADER = 8
CHANNELMSG_GPADL_BODY = 9
CHANNELMSG_GPADL_CREATED = 10
CHANNELMSG_GPADL_TEARDOWN = 11
CHANNELMSG_GPADL_TORNDOWN = 12
CHANNELMSG_RELID_RELEASED = 13
CHANNELMSG_INITIATE_CONTACT = 14
CHANNELMSG_VERSION_RESPONSE = 15
CHANNELMSG_UNLOAD = 16
CHANNELMSG_UNLOAD_RESPONSE = 17
CHANNELMSG_OPEN_RESERVED_CHANNEL = 18
CHANNELMSG_CLOSE_RESERVED_CHANNEL = 19
CHANNELMSG_CLOSE_RESERVED_RESPONSE = 20
CHANNELMSG_TL_CONNECT_REQUEST = 21
CHANNELMSG_MODIFYCHANNEL = 22
CHANNELMSG_TL_CONNECT_RESULT = 23
CHANNELMSG_MODIFYCHANNEL_RESPONSE = 24
CHANNELMSG_MODIFY_CONNECTION = 25
CHANNELMSG_MODIFY_CONNECTION_RESPONSE = 26
CHANNELMSG_PAUSE = 27
CHANNELMSG_PAUSE_RESPONSE = 28
CHANNELMSG_RESUME = 29

MAXIMUM_MESSAGE_SIZE = 240
HEADER_SIZE = 8
USER_DATA_SIZE = 120
GPADL_HEADER_MAX_PFNS = 26
GPADL_BODY_MAX_PFNS = 28
MAXIMUM_GPADL_BYTES = 0xFFFF
MAXIMUM_RELID = 2047
PAGE_SIZE = 4096

VMBUS_MESSAGE_CONNECTION_ID = 1
VMBUS_EVENT_CONNECTION_ID = 2
VMBUS_MONITOR_CONNECTION_ID = 3
VMBUS_MESSAGE_CONNECTION_ID_4 = 4
VMBUS_MESSAGE_SINT = 2
VMBUS_MESSAGE_TYPE = 1

TARGET_VP_DISABLED = 0xFFFFFFFF
MONITOR_ID_INVALID = 0xFF

VMBUS_CHANNEL_ENUMERATE_DEVICE_INTERFACE = 0x1
VMBUS_CHANNEL_CONFIDENTIAL_RING = 0x2
VMBUS_CHANNEL_CONFIDENTIAL_EXTERNAL_MEMORY = 0x4
VMBUS_CHANNEL_NAMED_PIPE_MODE = 0x10
VMBUS_CHANNEL_LOOPBACK_OFFER = 0x100
VMBUS_CHANNEL_PARENT_OFFER = 0x200
VMBUS_CHANNEL_REQUEST_MONITORED_NOTIFICATION = 0x400
VMBUS_CHANNEL_TLNPI_PROVIDER_OFFER = 0x2000

FEATURE_GUEST_SPECIFIED_SIGNAL_PARAMETERS = 0x01
FEATURE_CHANNEL_INTERRUPT_REDIRECTION = 0x02
FEATURE_MODIFY_CONNECTION = 0x04
FEATURE_CLIENT_ID = 0x08
FEATURE_CONFIDENTIAL_CHANNELS = 0x10
FEATURE_PAUSE_RESUME = 0x20
FEATURE_SERVER_SPECIFIED_MONITOR_PAGES = 0x40
FEATURE_GPA_PINNING = 0x80

STATUS_SUCCESS = 0
STATUS_UNSUCCESSFUL = 0x8000FFFF
STATUS_CONNECTION_REFUSED = 0xC0000236

CONNECTION_STATE_SUCCESSFUL = 0
CONNECTION_STATE_FAILED_LOW_RESOURCES = 1
CONNECTION_STATE_FAILED_UNKNOWN = 2

NETWORK_CLASS_ID = UUID("f8615163-df3e-46c5-913f-f2d2f965ed0e")
VPCI_CLASS_ID = UUID("44c4f61d-4444-4400-9d52-802e27ede19f")


class VmbusVersion(IntEnum):
    """Protocol versions: major << 16 | minor."""

    V1 = 0x0000000D
    WIN7 = 0x00010001
    WIN8 = 0x00020004
    WIN8_1 = 0x00030000
    WIN10 = 0x00040000
    WIN10_RS3_0 = 0x00040001
    WIN10_RS3_1 = 0x00050000
    WIN10_RS4 = 0x00050001
    WIN10_RS5 = 0x00050002
    IRON = 0x00050003
    COPPER = 0x00060000


_HEADER = struct.Struct("<II")
_PFN = struct.Struct("<Q")
_RANGE = struct.Struct("<II")


class ChannelMessage(Fixed):
    """A channel message; `pack()` gives it with its 8-byte header."""

    __slots__ = ()
    TYPE: ClassVar[int]
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<")

    def pack(self) -> bytes:
        """The message's bytes. Raises WireError when a value does not fit its field."""
        return _HEADER.pack(self.TYPE, 0) + self._pack_body()

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Decodes `payload`, whose type is already known to be `TYPE`."""
        return cls.unpack_fields(payload, HEADER_SIZE)

    def _pack_body(self) -> bytes:
        return self.pack_fields()


@dataclass(frozen=True, slots=True)
class OfferChannel(ChannelMessage):
    """1, host to guest, 196 bytes (190 below Win7: then `is_dedicated_interrupt` and `connection_id` are
    None)."""

    TYPE: ClassVar[int] = CHANNELMSG_OFFERCHANNEL
    _HEAD: ClassVar[struct.Struct] = struct.Struct("<16s16s16xHH120sHHIBB")
    _TAIL: ClassVar[struct.Struct] = struct.Struct("<HI")

    class_id: UUID
    instance_id: UUID
    relid: int
    connection_id: int | None
    sub_channel_index: int = 0
    flags: int = 0
    mmio_megabytes: int = 0
    mmio_megabytes_optional: int = 0
    user_data: bytes = bytes(USER_DATA_SIZE)
    monitor_id: int = MONITOR_ID_INVALID
    monitor_allocated: bool = False
    is_dedicated_interrupt: bool | None = True

    def _pack_body(self) -> bytes:
        if len(self.user_data) > USER_DATA_SIZE:
            raise WireError(
                f"OfferChannel: {len(self.user_data)} bytes of user data, at most {USER_DATA_SIZE}"
            )
        try:
            head = self._HEAD.pack(
                self.class_id.bytes_le,
                self.instance_id.bytes_le,
                self.flags,
                self.mmio_megabytes,
                self.user_data,
                self.sub_channel_index,
                self.mmio_megabytes_optional,
                self.relid,
                self.monitor_id,
                int(self.monitor_allocated),
            )
            if self.connection_id is None:
                return head
            return head + self._TAIL.pack(int(bool(self.is_dedicated_interrupt)), self.connection_id)
        except struct.error as error:
            raise WireError(f"OfferChannel: a value does not fit its field: {error}") from error

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        need("OfferChannel", payload, HEADER_SIZE + cls._HEAD.size)
        (
            class_id,
            instance_id,
            flags,
            mmio_megabytes,
            user_data,
            sub_channel_index,
            mmio_megabytes_optional,
            relid,
            monitor_id,
            monitor_allocated,
        ) = cls._HEAD.unpack_from(payload, HEADER_SIZE)
        dedicated: bool | None = None
        connection_id: int | None = None
        if len(payload) >= HEADER_SIZE + cls._HEAD.size + cls._TAIL.size:
            bits, connection_id = cls._TAIL.unpack_from(payload, HEADER_SIZE + cls._HEAD.size)
            dedicated = bool(bits & 1)
        return cls(
            class_id=UUID(bytes_le=class_id),
            instance_id=UUID(bytes_le=instance_id),
            relid=relid,
            connection_id=connection_id,
            sub_channel_index=sub_channel_index,
            flags=flags,
            mmio_megabytes=mmio_megabytes,
            mmio_megabytes_optional=mmio_megabytes_optional,
            user_data=user_data,
            monitor_id=monitor_id,
            monitor_allocated=bool(monitor_allocated & 1),
            is_dedicated_interrupt=dedicated,
        )


@dataclass(frozen=True, slots=True)
class RescindChannelOffer(ChannelMessage):
    """2, host to guest: the device goes; the guest answers RELID_RELEASED."""

    TYPE: ClassVar[int] = CHANNELMSG_RESCIND_CHANNELOFFER
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<I")
    relid: int


@dataclass(frozen=True, slots=True)
class RequestOffers(ChannelMessage):
    """3, guest to host."""

    TYPE: ClassVar[int] = CHANNELMSG_REQUESTOFFERS


@dataclass(frozen=True, slots=True)
class AllOffersDelivered(ChannelMessage):
    """4, host to guest: sent once, after the offers that answer REQUESTOFFERS."""

    TYPE: ClassVar[int] = CHANNELMSG_ALLOFFERS_DELIVERED


@dataclass(frozen=True, slots=True)
class OpenChannel(ChannelMessage):
    """5, guest to host, 148 bytes; 156 with the Copper tail (connection id, event flag, flags), else those
    are None."""

    TYPE: ClassVar[int] = CHANNELMSG_OPENCHANNEL
    _HEAD: ClassVar[struct.Struct] = struct.Struct("<IIIII120s")
    _TAIL: ClassVar[struct.Struct] = struct.Struct("<IHH")

    relid: int
    open_id: int
    ring_gpadl: int
    target_vp: int
    downstream_page_offset: int
    user_data: bytes = bytes(USER_DATA_SIZE)
    connection_id: int | None = None
    event_flag: int | None = None
    flags: int | None = None

    def _pack_body(self) -> bytes:
        if len(self.user_data) > USER_DATA_SIZE:
            raise WireError(
                f"OpenChannel: {len(self.user_data)} bytes of user data, at most {USER_DATA_SIZE}"
            )
        try:
            head = self._HEAD.pack(
                self.relid,
                self.open_id,
                self.ring_gpadl,
                self.target_vp,
                self.downstream_page_offset,
                self.user_data,
            )
            if self.connection_id is None:
                return head
            return head + self._TAIL.pack(self.connection_id, self.event_flag or 0, self.flags or 0)
        except struct.error as error:
            raise WireError(f"OpenChannel: a value does not fit its field: {error}") from error

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        need("OpenChannel", payload, HEADER_SIZE + cls._HEAD.size)
        head = cls._HEAD.unpack_from(payload, HEADER_SIZE)
        if len(payload) >= HEADER_SIZE + cls._HEAD.size + cls._TAIL.size:
            return cls(*head, *cls._TAIL.unpack_from(payload, HEADER_SIZE + cls._HEAD.size))
        return cls(*head)


@dataclass(frozen=True, slots=True)
class OpenChannelResult(ChannelMessage):
    """6, host to guest: status 0 is success; echoes relid and open id."""

    TYPE: ClassVar[int] = CHANNELMSG_OPENCHANNEL_RESULT
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<III")
    relid: int
    open_id: int
    status: int


@dataclass(frozen=True, slots=True)
class CloseChannel(ChannelMessage):
    """7, guest to host; has no answer."""

    TYPE: ClassVar[int] = CHANNELMSG_CLOSECHANNEL
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<I")
    relid: int


@dataclass(frozen=True, slots=True)
class GpadlHeader(ChannelMessage):
    """8, guest to host: `range_data` is what this message carries of the `range_bytes` of range
    descriptors."""

    TYPE: ClassVar[int] = CHANNELMSG_GPADL_HEADER
    _HEAD: ClassVar[struct.Struct] = struct.Struct("<IIHH")
    relid: int
    gpadl_id: int
    range_bytes: int
    range_count: int
    range_data: bytes

    def _pack_body(self) -> bytes:
        try:
            head = self._HEAD.pack(self.relid, self.gpadl_id, self.range_bytes, self.range_count)
        except struct.error as error:
            raise WireError(f"GpadlHeader: a value does not fit its field: {error}") from error
        return head + self.range_data

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        need("GpadlHeader", payload, HEADER_SIZE + cls._HEAD.size)
        relid, gpadl_id, range_bytes, range_count = cls._HEAD.unpack_from(payload, HEADER_SIZE)
        data = bytes(payload[HEADER_SIZE + cls._HEAD.size :])
        return cls(relid, gpadl_id, range_bytes, range_count, data[:range_bytes])


@dataclass(frozen=True, slots=True)
class GpadlBody(ChannelMessage):
    """9, guest to host: the next bytes of a GPADL's range descriptors; matched by id alone, the number is
    ignored."""

    TYPE: ClassVar[int] = CHANNELMSG_GPADL_BODY
    _HEAD: ClassVar[struct.Struct] = struct.Struct("<II")
    message_number: int
    gpadl_id: int
    range_data: bytes

    def _pack_body(self) -> bytes:
        try:
            return self._HEAD.pack(self.message_number, self.gpadl_id) + self.range_data
        except struct.error as error:
            raise WireError(f"GpadlBody: a value does not fit its field: {error}") from error

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        need("GpadlBody", payload, HEADER_SIZE + cls._HEAD.size)
        number, gpadl_id = cls._HEAD.unpack_from(payload, HEADER_SIZE)
        return cls(number, gpadl_id, bytes(payload[HEADER_SIZE + cls._HEAD.size :]))


@dataclass(frozen=True, slots=True)
class GpadlCreated(ChannelMessage):
    """10, host to guest: status 0 is success."""

    TYPE: ClassVar[int] = CHANNELMSG_GPADL_CREATED
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<III")
    relid: int
    gpadl_id: int
    status: int


@dataclass(frozen=True, slots=True)
class GpadlTeardown(ChannelMessage):
    """11, guest to host."""

    TYPE: ClassVar[int] = CHANNELMSG_GPADL_TEARDOWN
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<II")
    relid: int
    gpadl_id: int


@dataclass(frozen=True, slots=True)
class GpadlTorndown(ChannelMessage):
    """12, host to guest: sent only when nothing on the host touches the memory any more."""

    TYPE: ClassVar[int] = CHANNELMSG_GPADL_TORNDOWN
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<I")
    gpadl_id: int


@dataclass(frozen=True, slots=True)
class RelidReleased(ChannelMessage):
    """13, guest to host: the relid of a rescinded channel is free."""

    TYPE: ClassVar[int] = CHANNELMSG_RELID_RELEASED
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<I")
    relid: int


@dataclass(frozen=True, slots=True)
class InitiateContact(ChannelMessage):
    """14, guest to host, 40 bytes, 56 with a client id.

    `target_info` is the u64 at 16: below 5.0 the interrupt page's GPA, from 5.0 on SINT, VTL and feature
    flags.
    """

    TYPE: ClassVar[int] = CHANNELMSG_INITIATE_CONTACT
    _HEAD: ClassVar[struct.Struct] = struct.Struct("<IIQQQ")

    version: int
    target_vp: int
    target_info: int
    parent_to_child_monitor_gpa: int = 0
    child_to_parent_monitor_gpa: int = 0
    client_id: UUID | None = None

    @staticmethod
    def target(sint: int = VMBUS_MESSAGE_SINT, vtl: int = 0, feature_flags: int = 0) -> int:
        """The value of `target_info` from version 5.0 on."""
        return sint | vtl << 8 | feature_flags << 32

    @property
    def sint(self) -> int:
        """SINT for the host's messages (version 5.0 and later)."""
        return self.target_info & 0xFF

    @property
    def vtl(self) -> int:
        """Target VTL (version 5.1 and later)."""
        return self.target_info >> 8 & 0xFF

    @property
    def feature_flags(self) -> int:
        """Features the client asks for (version 6.0 and later)."""
        return self.target_info >> 32

    def _pack_body(self) -> bytes:
        try:
            head = self._HEAD.pack(
                self.version,
                self.target_vp,
                self.target_info,
                self.parent_to_child_monitor_gpa,
                self.child_to_parent_monitor_gpa,
            )
        except struct.error as error:
            raise WireError(f"InitiateContact: a value does not fit its field: {error}") from error
        return head if self.client_id is None else head + self.client_id.bytes_le

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        end = HEADER_SIZE + cls._HEAD.size
        need("InitiateContact", payload, end)
        client_id = UUID(bytes_le=bytes(payload[end : end + 16])) if len(payload) >= end + 16 else None
        version, vp, info, to_child, to_parent = cls._HEAD.unpack_from(payload, HEADER_SIZE)
        return cls(version, vp, info, to_child, to_parent, client_id)


@dataclass(frozen=True, slots=True)
class VersionResponse(ChannelMessage):
    """15, host to guest. 16 bytes; 20 with `feature_flags` (Copper); 40 with monitor pages as well.

    `selected_version_or_connection_id`: below 5.0 the version, from 5.0 on the message connection id.
    A refusal always takes the 16-byte form with `version_supported` False.
    """

    TYPE: ClassVar[int] = CHANNELMSG_VERSION_RESPONSE
    _HEAD: ClassVar[struct.Struct] = struct.Struct("<BBxxI")
    _MONITORS: ClassVar[struct.Struct] = struct.Struct("<4xQQ")

    version_supported: bool
    connection_state: int = CONNECTION_STATE_SUCCESSFUL
    selected_version_or_connection_id: int = 0
    feature_flags: int | None = None
    parent_to_child_monitor_gpa: int | None = None
    child_to_parent_monitor_gpa: int | None = None

    def _pack_body(self) -> bytes:
        try:
            body = self._HEAD.pack(
                int(self.version_supported), self.connection_state, self.selected_version_or_connection_id
            )
            if self.feature_flags is None:
                return body
            body += struct.pack("<I", self.feature_flags)
            if self.parent_to_child_monitor_gpa is None:
                return body
            return body + self._MONITORS.pack(
                self.parent_to_child_monitor_gpa, self.child_to_parent_monitor_gpa or 0
            )
        except struct.error as error:
            raise WireError(f"VersionResponse: a value does not fit its field: {error}") from error

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        need("VersionResponse", payload, 16)
        supported, state, selected = cls._HEAD.unpack_from(payload, HEADER_SIZE)
        flags = int.from_bytes(payload[16:20], "little") if len(payload) >= 20 else None
        monitors: tuple[int | None, int | None] = (None, None)
        if len(payload) >= 40:
            monitors = cls._MONITORS.unpack_from(payload, 20)
        return cls(bool(supported), state, selected, flags, *monitors)


@dataclass(frozen=True, slots=True)
class Unload(ChannelMessage):
    """16, guest to host: forget everything."""

    TYPE: ClassVar[int] = CHANNELMSG_UNLOAD


@dataclass(frozen=True, slots=True)
class UnloadResponse(ChannelMessage):
    """17, host to guest: all guest memory is released."""

    TYPE: ClassVar[int] = CHANNELMSG_UNLOAD_RESPONSE


@dataclass(frozen=True, slots=True)
class OpenReservedChannel(ChannelMessage):
    """18, guest to host."""

    TYPE: ClassVar[int] = CHANNELMSG_OPEN_RESERVED_CHANNEL
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<IIIII")
    relid: int
    target_vp: int
    target_sint: int
    ring_gpadl: int
    downstream_page_offset: int


@dataclass(frozen=True, slots=True)
class CloseReservedChannel(ChannelMessage):
    """19, guest to host."""

    TYPE: ClassVar[int] = CHANNELMSG_CLOSE_RESERVED_CHANNEL
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<III")
    relid: int
    target_vp: int
    target_sint: int


@dataclass(frozen=True, slots=True)
class CloseReservedResponse(ChannelMessage):
    """20, host to guest."""

    TYPE: ClassVar[int] = CHANNELMSG_CLOSE_RESERVED_RESPONSE
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<I")
    relid: int


@dataclass(frozen=True, slots=True)
class TlConnectRequest(ChannelMessage):
    """21, guest to host, 40 bytes; 56 with a silo id (5.2 and later)."""

    TYPE: ClassVar[int] = CHANNELMSG_TL_CONNECT_REQUEST
    endpoint_id: UUID
    service_id: UUID
    silo_id: UUID | None = None

    def _pack_body(self) -> bytes:
        body = self.endpoint_id.bytes_le + self.service_id.bytes_le
        return body if self.silo_id is None else body + self.silo_id.bytes_le

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        need("TlConnectRequest", payload, 40)
        silo_id = UUID(bytes_le=bytes(payload[40:56])) if len(payload) >= 56 else None
        return cls(UUID(bytes_le=bytes(payload[8:24])), UUID(bytes_le=bytes(payload[24:40])), silo_id)


@dataclass(frozen=True, slots=True)
class ModifyChannel(ChannelMessage):
    """22, guest to host: moves the channel's interrupt to another VP."""

    TYPE: ClassVar[int] = CHANNELMSG_MODIFYCHANNEL
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<II")
    relid: int
    target_vp: int


@dataclass(frozen=True, slots=True)
class TlConnectResult(ChannelMessage):
    """23, host to guest."""

    TYPE: ClassVar[int] = CHANNELMSG_TL_CONNECT_RESULT
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<16s16sI")
    endpoint_id: UUID
    service_id: UUID
    status: int


@dataclass(frozen=True, slots=True)
class ModifyChannelResponse(ChannelMessage):
    """24, host to guest (5.3 and later)."""

    TYPE: ClassVar[int] = CHANNELMSG_MODIFYCHANNEL_RESPONSE
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<II")
    relid: int
    status: int


@dataclass(frozen=True, slots=True)
class ModifyConnection(ChannelMessage):
    """25, guest to host (Copper): new monitor pages, both 0 to reset."""

    TYPE: ClassVar[int] = CHANNELMSG_MODIFY_CONNECTION
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<QQ")
    parent_to_child_monitor_gpa: int
    child_to_parent_monitor_gpa: int


@dataclass(frozen=True, slots=True)
class ModifyConnectionResponse(ChannelMessage):
    """26, host to guest."""

    TYPE: ClassVar[int] = CHANNELMSG_MODIFY_CONNECTION_RESPONSE
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<B")
    connection_state: int


@dataclass(frozen=True, slots=True)
class Pause(ChannelMessage):
    """27, guest to host (Copper)."""

    TYPE: ClassVar[int] = CHANNELMSG_PAUSE


@dataclass(frozen=True, slots=True)
class PauseResponse(ChannelMessage):
    """28, host to guest."""

    TYPE: ClassVar[int] = CHANNELMSG_PAUSE_RESPONSE


@dataclass(frozen=True, slots=True)
class Resume(ChannelMessage):
    """29, guest to host."""

    TYPE: ClassVar[int] = CHANNELMSG_RESUME


MESSAGES: dict[int, type[ChannelMessage]] = {
    message.TYPE: message
    for message in (
        OfferChannel,
        RescindChannelOffer,
        RequestOffers,
        AllOffersDelivered,
        OpenChannel,
        OpenChannelResult,
        CloseChannel,
        GpadlHeader,
        GpadlBody,
        GpadlCreated,
        GpadlTeardown,
        GpadlTorndown,
        RelidReleased,
        InitiateContact,
        VersionResponse,
        Unload,
        UnloadResponse,
        OpenReservedChannel,
        CloseReservedChannel,
        CloseReservedResponse,
        TlConnectRequest,
        ModifyChannel,
        TlConnectResult,
        ModifyChannelResponse,
        ModifyConnection,
        ModifyConnectionResponse,
        Pause,
        PauseResponse,
        Resume,
    )
}


def decode(payload: bytes) -> ChannelMessage:
    """The channel message in `payload` (a SynIC message's payload, header included).

    Raises WireError when it is short or longer than 240 bytes, UnknownMessage for a type number VMBus does
    not have.
    """
    if len(payload) > MAXIMUM_MESSAGE_SIZE:
        raise WireError(f"VMBus channel message: {len(payload)} bytes, at most {MAXIMUM_MESSAGE_SIZE}")
    need("VMBus channel message", payload, HEADER_SIZE)
    (number, _) = _HEADER.unpack_from(payload)
    message = MESSAGES.get(number)
    if message is None:
        raise UnknownMessage("VMBus", number)
    return message.unpack(payload)
