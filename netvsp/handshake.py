"""The NVSP state machine of the host: what a guest may send when, and what it is answered.

Formats and order: Linux ``drivers/net/hyperv/hyperv_net.h``, ``netvsc.c``; openvmm
``netvsp/src/protocol.rs``. The order is: INIT (newest version first, one at a time), NDIS configuration,
NDIS version, receive buffer, send buffer, then RNDIS. A guest that repeats a step, goes back, or sends
what its version does not have, loses the channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from netvsp import limits
from vswitch_wire import nvsp
from vswitch_wire.errors import UnknownMessage, WireError
from vswitch_wire.gpadl import GpaRange

SUPPORTED_VERSIONS = frozenset(nvsp.NvspVersion)
CHIMNEY = range(109, 120)
DEPRECATED = (120, 121, 122, 123, 124, 126, 127, 130)
PACKET_DIRECT_API, PACKET_DIRECT_BATCH = 135, 136


class ProtocolError(Exception):
    """The guest broke the NVSP protocol; its channel is lost. The text says what it sent."""


class Step(IntEnum):
    """How far the guest has come; it only ever goes up."""

    INIT = 0
    VERSION_AGREED = 1
    CONFIGURED = 2
    NDIS_VERSION_SET = 3
    RECEIVE_BUFFER_SET = 4
    SEND_BUFFER_SET = 5


class Buffers(Protocol):
    """What the handshake needs of the data channel."""

    def set_receive_buffer(
        self, pfns: tuple[int, ...], byte_offset: int, byte_count: int, buffer_id: int, size: int, count: int
    ) -> None: ...
    def set_send_buffer(
        self, pfns: tuple[int, ...], byte_offset: int, byte_count: int, section_size: int
    ) -> None: ...
    def revoke_receive_buffer(self) -> None: ...
    def revoke_send_buffer(self) -> None: ...
    def set_mtu(self, mtu: int) -> None: ...


@dataclass(slots=True)
class Handshake:
    """NVSP state of one opened channel."""

    buffers: Buffers
    gpadl: Callable[[int], GpaRange]
    """Looks up an accepted GPADL of this channel; raises KeyError or ValueError if there is none."""
    query_oid: Callable[[int, bytes], tuple[int, bytes]]
    """Answers an OID query: (NDIS status, data)."""
    drop_gpadl: Callable[[bytes], None] = lambda kind: None
    """Lets go of the GPADL of a refused buffer (``receive`` or ``send``): the guest waits for that."""
    sub_channel_limit: int = 0
    host_mtu: int = limits.MTU_DEFAULT
    step: Step = Step.INIT
    version: int = 0
    mtu: int = limits.MTU_DEFAULT
    capabilities: int = 0
    ndis_version: tuple[int, int] = (0, 0)
    sub_channels: int = 0
    receive_buffer_id: int | None = None
    send_buffer_id: int | None = None

    @property
    def ready(self) -> bool:
        """Whether RNDIS may start: a receive buffer is there (a send buffer is the guest's choice)."""
        return self.receive_buffer_id is not None

    def handle(self, payload: bytes) -> bytes | None:
        """Acts on one NVSP message; the completion's payload (b"" = empty), if the guest asked for one.

        Raises ProtocolError.
        """
        try:
            message = nvsp.decode(payload)
        except UnknownMessage as error:
            return self._uncommon(error.number, payload)
        except WireError as error:
            raise ProtocolError(f"malformed NVSP message: {error}") from error
        if isinstance(message, nvsp.Init):
            return self._init(message)
        if self.step is Step.INIT:
            raise ProtocolError(f"NVSP message {message.TYPE} before INIT")
        match message:
            case nvsp.SendNdisConfig():
                self._configure(message)
                return b""
            case nvsp.SendNdisVersion():
                self._advance(Step.NDIS_VERSION_SET, "SEND_NDIS_VERSION")
                self.ndis_version = (message.major, message.minor)
                return b""
            case nvsp.SendReceiveBuffer():
                return self._receive_buffer(message)
            case nvsp.SendSendBuffer():
                return self._send_buffer(message)
            case nvsp.RevokeReceiveBuffer():
                self.buffers.revoke_receive_buffer()
                self.receive_buffer_id = None
                return b""
            case nvsp.RevokeSendBuffer():
                self.buffers.revoke_send_buffer()
                self.send_buffer_id = None
                return b""
            case nvsp.SwitchDataPath():
                self._require(nvsp.NvspVersion.V4, "SWITCH_DATA_PATH")
                # There is no VF to switch to: the path stays synthetic, and the answer is empty either way.
                return b""
            case nvsp.OidQueryEx():
                self._require(nvsp.NvspVersion.V5, "OID_QUERY_EX")
                status, data = self.query_oid(message.oid, b"")
                return self._pack(nvsp.OidQueryExComplete(status, data))
            case nvsp.SubchannelRequest():
                return self._sub_channels(message)
        raise ProtocolError(f"NVSP message {message.TYPE} from a guest")

    def _pack(self, message: nvsp.NvspMessage) -> bytes:
        return message.pack(nvsp.message_size(self.version))

    def _require(self, version: int, name: str) -> None:
        if self.version < version:
            raise ProtocolError(f"{name} in NVSP version {self.version:#x}, which does not have it")

    def _advance(self, step: Step, name: str) -> None:
        if self.step >= step:
            raise ProtocolError(f"{name} repeated or too late (the handshake is at {self.step.name})")
        self.step = step

    def _init(self, message: nvsp.Init) -> bytes:
        if self.step is not Step.INIT:
            raise ProtocolError("INIT after a version was agreed")
        version = message.min_version
        if version not in SUPPORTED_VERSIONS:
            # Anything but success refuses; the guest then tries its next version.
            return nvsp.InitComplete(nvsp.INIT_COMPLETE_VERSION, 0, nvsp.NVSP_STAT_NONE).pack(32)
        self.version = version
        self.step = Step.VERSION_AGREED
        agreed = nvsp.INIT_COMPLETE_VERSION
        if version == nvsp.NvspVersion.V1:
            agreed = nvsp.INIT_COMPLETE_VERSION_V1
        return self._pack(nvsp.InitComplete(agreed, nvsp.MAXIMUM_MDL_CHAIN, nvsp.NVSP_STAT_SUCCESS))

    def _configure(self, message: nvsp.SendNdisConfig) -> None:
        self._require(nvsp.NvspVersion.V2, "SEND_NDIS_CONFIG")
        self._advance(Step.CONFIGURED, "SEND_NDIS_CONFIG")
        asked = message.mtu if limits.MTU_MIN <= message.mtu <= limits.MTU_MAX else limits.MTU_DEFAULT
        self.mtu = min(asked, self.host_mtu)
        self.capabilities = message.capabilities
        self.buffers.set_mtu(self.mtu)

    def _receive_buffer(self, message: nvsp.SendReceiveBuffer) -> bytes:
        self._advance(Step.RECEIVE_BUFFER_SET, "SEND_RECV_BUF")
        largest = limits.MAX_RECEIVE_BUFFER
        if self.version <= nvsp.NvspVersion.V2:
            largest = limits.MAX_RECEIVE_BUFFER_V2
        size = limits.sub_allocation_size(self.mtu)
        try:
            pages = self.gpadl(message.gpadl_id)
            length = min(pages.byte_count, largest)
            count = length // size
            self.buffers.set_receive_buffer(pages.pfns, pages.byte_offset, length, message.id, size, count)
        except (KeyError, ValueError):
            self.drop_gpadl(b"receive")
            return self._pack(
                nvsp.SendReceiveBufferComplete(nvsp.NVSP_STAT_FAIL, (nvsp.ReceiveBufferSection(0, 0, 0, 0),))
            )
        self.receive_buffer_id = message.id
        section = nvsp.ReceiveBufferSection(0, size, count, size * count)
        return self._pack(nvsp.SendReceiveBufferComplete(nvsp.NVSP_STAT_SUCCESS, (section,)))

    def _send_buffer(self, message: nvsp.SendSendBuffer) -> bytes:
        self._advance(Step.SEND_BUFFER_SET, "SEND_SEND_BUF")
        try:
            pages = self.gpadl(message.gpadl_id)
            length = min(pages.byte_count, limits.MAX_SEND_BUFFER)
            if length < limits.SEND_SECTION_SIZE:
                raise ValueError(f"a send buffer of {length} bytes holds no section")
            self.buffers.set_send_buffer(pages.pfns, pages.byte_offset, length, limits.SEND_SECTION_SIZE)
        except (KeyError, ValueError):
            self.drop_gpadl(b"send")
            return self._pack(nvsp.SendSendBufferComplete(nvsp.NVSP_STAT_FAIL, 0))
        self.send_buffer_id = message.id
        return self._pack(nvsp.SendSendBufferComplete(nvsp.NVSP_STAT_SUCCESS, limits.SEND_SECTION_SIZE))

    def _sub_channels(self, message: nvsp.SubchannelRequest) -> bytes:
        self._require(nvsp.NvspVersion.V5, "SUBCHANNEL")
        # All or nothing: a guest waits without a limit for every sub-channel that it was granted.
        granted = (
            message.operation == nvsp.NVSP_SUBCHANNEL_ALLOCATE
            and 0 < message.count <= self.sub_channel_limit
            and not self.sub_channels
        )
        if not granted:
            return self._pack(nvsp.SubchannelComplete(nvsp.NVSP_STAT_FAIL, 0))
        self.sub_channels = message.count
        return self._pack(nvsp.SubchannelComplete(nvsp.NVSP_STAT_SUCCESS, message.count))

    def _uncommon(self, number: int, payload: bytes) -> bytes | None:
        """Messages that exist but that no stock guest sends to a host which offers none of their features."""
        if self.step is Step.INIT:
            raise ProtocolError(f"NVSP message {number} before INIT")
        if number in (PACKET_DIRECT_API, PACKET_DIRECT_BATCH) and self.version >= nvsp.NvspVersion.V6:
            operation = payload[4:8].ljust(4, b"\0")
            status = nvsp.NVSP_STAT_FAIL.to_bytes(4, "little")
            answer = number.to_bytes(4, "little") + operation + status
            return answer.ljust(nvsp.message_size(self.version), b"\0")
        if number in CHIMNEY or number in DEPRECATED:
            raise ProtocolError(f"NVSP message {number}, of a feature that this host never offers")
        raise ProtocolError(f"unknown NVSP message {number}")
