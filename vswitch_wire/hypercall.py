"""The hypercall ABI: control and result words, statuses, inputs (TLFS, Hypercall Interface; openvmm hvdef).

Memory-based calls pass the GPAs of an 8-byte aligned input and output block that do not cross a page; fast
calls pass the input in RDX, R8 and, for up to 112 bytes, XMM0..XMM5.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, NamedTuple, Self

from .errors import WireError
from .layout import Fixed, need

HvCallCreatePartition = 0x40
HvCallInitializePartition = 0x41
HvCallFinalizePartition = 0x42
HvCallDeletePartition = 0x43
HvCallGetPartitionProperty = 0x44
HvCallSetPartitionProperty = 0x45
HvCallGetPartitionId = 0x46
HvCallGetNextChildPartition = 0x47
HvCallDepositMemory = 0x48
HvCallWithdrawMemory = 0x49
HvCallGetMemoryBalance = 0x4A
HvCallMapGpaPages = 0x4B
HvCallUnmapGpaPages = 0x4C
HvCallCreateVp = 0x4E
HvCallDeleteVp = 0x4F
HvCallGetVpRegisters = 0x50
HvCallSetVpRegisters = 0x51
HvCallDeletePort = 0x58
HvCallDisconnectPort = 0x5B
HvCallPostMessage = 0x5C
HvCallSignalEvent = 0x5D
HvCallRetargetDeviceInterrupt = 0x7E
HvCallCreatePort = 0x95
HvCallConnectPort = 0x96
HvCallSignalEventDirect = 0xC0
HvCallPostMessageDirect = 0xC1

HV_PARTITION_ID_SELF = 0xFFFFFFFFFFFFFFFF
HV_PARTITION_ID_INVALID = 0
HV_VP_INDEX_SELF = 0xFFFFFFFE
HV_ANY_VP = 0xFFFFFFFF
HV_MESSAGE_PAYLOAD_BYTE_COUNT = 240
HV_MESSAGE_BUFFERS_PER_PORT = 16
CONNECTION_ID_MASK = 0xFFFFFF
FAST_INPUT_SIZE = 16
XMM_FAST_INPUT_SIZE = 112

HvPartitionPropertyPrivilegeFlags = 0x00010000
HvPartitionPropertySyntheticProcFeatures = 0x00010001
HvPartitionPropertySuspend = 0x00020000
HvPartitionPropertyTimeFreeze = 0x00030003
HvPartitionPropertyReferenceTime = 0x00030005
HvPartitionPropertyPhysicalAddressWidth = 0x00060006
HvPartitionPropertyGuestOsId = 0x00070000

# Privilege mask, CPUID 0x40000003: EAX is bits 31:0, EBX bits 63:32.
PRIVILEGE_ACCESS_VP_RUNTIME = 1 << 0
PRIVILEGE_ACCESS_PARTITION_REFERENCE_COUNTER = 1 << 1
PRIVILEGE_ACCESS_SYNIC_REGS = 1 << 2
PRIVILEGE_ACCESS_SYNTHETIC_TIMER_REGS = 1 << 3
PRIVILEGE_ACCESS_HYPERCALL_MSRS = 1 << 5
PRIVILEGE_ACCESS_VP_INDEX = 1 << 6
PRIVILEGE_ACCESS_PARTITION_REFERENCE_TSC = 1 << 9
PRIVILEGE_CREATE_PARTITIONS = 1 << 32
PRIVILEGE_ACCESS_PARTITION_ID = 1 << 33
PRIVILEGE_ACCESS_MEMORY_POOL = 1 << 34
PRIVILEGE_POST_MESSAGES = 1 << 36
PRIVILEGE_SIGNAL_EVENTS = 1 << 37
PRIVILEGE_CREATE_PORT = 1 << 38
PRIVILEGE_CONNECT_PORT = 1 << 39
PRIVILEGE_CPU_MANAGEMENT = 1 << 44


class HvStatus(IntEnum):
    """Hypercall statuses, bits 15:0 of the result word."""

    SUCCESS = 0x0
    INVALID_HYPERCALL_CODE = 0x2
    INVALID_HYPERCALL_INPUT = 0x3
    INVALID_ALIGNMENT = 0x4
    INVALID_PARAMETER = 0x5
    ACCESS_DENIED = 0x6
    INVALID_PARTITION_STATE = 0x7
    OPERATION_DENIED = 0x8
    UNKNOWN_PROPERTY = 0x9
    PROPERTY_VALUE_OUT_OF_RANGE = 0xA
    INSUFFICIENT_MEMORY = 0xB
    PARTITION_TOO_DEEP = 0xC
    INVALID_PARTITION_ID = 0xD
    INVALID_VP_INDEX = 0xE
    NOT_FOUND = 0x10
    INVALID_PORT_ID = 0x11
    INVALID_CONNECTION_ID = 0x12
    INSUFFICIENT_BUFFERS = 0x13
    NOT_ACKNOWLEDGED = 0x14
    INVALID_VP_STATE = 0x15
    ACKNOWLEDGED = 0x16
    INVALID_SAVE_RESTORE_STATE = 0x17
    INVALID_SYNIC_STATE = 0x18
    OBJECT_IN_USE = 0x19
    INVALID_PROXIMITY_DOMAIN_INFO = 0x1A
    NO_DATA = 0x1B
    INACTIVE = 0x1C
    NO_RESOURCES = 0x1D
    FEATURE_UNAVAILABLE = 0x1E
    PARTIAL_PACKET = 0x1F
    PROCESSOR_FEATURE_NOT_SUPPORTED = 0x20
    INSUFFICIENT_BUFFER = 0x33
    INSUFFICIENT_DEVICE_DOMAINS = 0x38
    CPUID_FEATURE_VALIDATION_ERROR = 0x3C
    CPUID_XSAVE_FEATURE_VALIDATION_ERROR = 0x3D
    INVALID_LP_INDEX = 0x41
    INVALID_REGISTER_VALUE = 0x50
    INVALID_VTL_STATE = 0x51
    INVALID_DEVICE_ID = 0x57
    INVALID_DEVICE_STATE = 0x58
    KEY_ALREADY_EXISTS = 0x65
    DEVICE_ALREADY_IN_DOMAIN = 0x66
    OPERATION_FAILED = 0x71
    INSUFFICIENT_ROOT_MEMORY = 0x73
    TIME_OUT = 0x78
    CALL_PENDING = 0x79
    VTL_ALREADY_ENABLED = 0x86


_RESERVED = 0b1111 << 27 | 0b1111 << 44 | 0b1111 << 60


class ControlWord(NamedTuple):
    """The hypercall input value (RCX). `variable_header` counts 8-byte units."""

    call_code: int
    fast: bool = False
    variable_header: int = 0
    nested: bool = False
    rep_count: int = 0
    rep_start: int = 0

    def pack(self) -> int:
        """The u64."""
        return (
            self.call_code
            | int(self.fast) << 16
            | self.variable_header << 17
            | int(self.nested) << 31
            | self.rep_count << 32
            | self.rep_start << 48
        )

    @classmethod
    def unpack(cls, value: int) -> Self:
        """Decodes the u64. Raises WireError when reserved bits are set (INVALID_HYPERCALL_INPUT)."""
        if value & _RESERVED:
            raise WireError(
                f"hypercall control word {value:#x}: reserved bits {value & _RESERVED:#x} are set"
            )
        return cls(
            value & 0xFFFF,
            bool(value >> 16 & 1),
            value >> 17 & 0x3FF,
            bool(value >> 31 & 1),
            value >> 32 & 0xFFF,
            value >> 48 & 0xFFF,
        )


def result_word(status: int, reps_completed: int = 0) -> int:
    """The result value (RAX): status in bits 15:0, the absolute index of completed repetitions in bits
    43:32."""
    return int(status) | reps_completed << 32


def split_result(value: int) -> tuple[int, int]:
    """(status, reps completed) of a result value; reserved bits are ignored."""
    return value & 0xFFFF, value >> 32 & 0xFFF


class HypercallInput(Fixed):
    """An input block; `pack()` and `unpack()` at their offsets in the block."""

    __slots__ = ()

    def pack(self) -> bytes:
        """The block's bytes. Raises WireError when a value does not fit its field."""
        return self.pack_fields()

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Raises WireError when `data` is too short."""
        return cls.unpack_fields(data)


@dataclass(frozen=True, slots=True)
class PostMessage(HypercallInput):
    """HvCallPostMessage, 256 bytes, never fast. `payload` is the message alone, without the block's
    padding."""

    SIZE: ClassVar[int] = 256
    _HEAD: ClassVar[struct.Struct] = struct.Struct("<IIII")
    connection_id: int
    message_type: int
    payload: bytes

    def pack(self) -> bytes:
        if len(self.payload) > HV_MESSAGE_PAYLOAD_BYTE_COUNT:
            raise WireError(
                f"PostMessage: {len(self.payload)} bytes, at most {HV_MESSAGE_PAYLOAD_BYTE_COUNT}"
            )
        try:
            head = self._HEAD.pack(self.connection_id, 0, self.message_type, len(self.payload))
        except struct.error as error:
            raise WireError(f"PostMessage: a value does not fit its field: {error}") from error
        return head + self.payload.ljust(HV_MESSAGE_PAYLOAD_BYTE_COUNT, b"\0")

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Raises WireError when the block is short or the message type or payload size is not allowed."""
        need("PostMessage", data, cls.SIZE)
        connection_id, _, message_type, size = cls._HEAD.unpack_from(data)
        if message_type == 0 or message_type & 0x80000000:
            raise WireError(
                f"PostMessage: message type {message_type:#x}; expected non-zero with bit 31 clear"
            )
        if size > HV_MESSAGE_PAYLOAD_BYTE_COUNT:
            raise WireError(f"PostMessage: {size} bytes, at most {HV_MESSAGE_PAYLOAD_BYTE_COUNT}")
        return cls(connection_id, message_type, bytes(data[16 : 16 + size]))


@dataclass(frozen=True, slots=True)
class SignalEvent(HypercallInput):
    """HvCallSignalEvent, 8 bytes, usually fast. `reserved` must be zero."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("<IHH")
    connection_id: int
    flag: int = 0
    reserved: int = 0


@dataclass(frozen=True, slots=True)
class CreatePartition(HypercallInput):
    """HvCallCreatePartition, x64, 56 bytes; output u64 partition id. Version is major << 8 | minor."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("<QQI4xQQQQ")
    flags: int = 0
    proximity: int = 0
    compatibility_version: int = 0x0609
    disabled_features_0: int = 0
    disabled_features_1: int = 0
    disabled_xsave_features: int = 0
    isolation: int = 0


@dataclass(frozen=True, slots=True)
class PartitionId(HypercallInput):
    """HvCallInitializePartition, HvCallFinalizePartition, HvCallDeletePartition."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("<Q")
    partition_id: int


@dataclass(frozen=True, slots=True)
class GetPartitionProperty(HypercallInput):
    """HvCallGetPartitionProperty; output u64 value."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("<QI4x")
    partition_id: int
    property_code: int


@dataclass(frozen=True, slots=True)
class SetPartitionProperty(HypercallInput):
    """HvCallSetPartitionProperty."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("<QI4xQ")
    partition_id: int
    property_code: int
    value: int


@dataclass(frozen=True, slots=True)
class GetNextChildPartition(HypercallInput):
    """HvCallGetNextChildPartition; output u64 id, 0 at the end."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("<QQ")
    parent_id: int
    previous_id: int
