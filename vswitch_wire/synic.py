"""The synthetic interrupt controller: message slots, event flags, SINT and MSR layouts (TLFS, Inter-Partition
Communication; Linux include/hyperv/hvgdk_mini.h).

SIMP is a page of 16 message slots of 256 bytes, SIEFP a page of 16 blocks of 2048 event flags; slot and block
n belong to SINT n.
"""

from __future__ import annotations

import struct
from typing import NamedTuple, Self

from .errors import WireError
from .layout import need

HV_X64_MSR_GUEST_OS_ID = 0x40000000
HV_X64_MSR_HYPERCALL = 0x40000001
HV_X64_MSR_VP_INDEX = 0x40000002
HV_X64_MSR_RESET = 0x40000003
HV_X64_MSR_VP_RUNTIME = 0x40000010
HV_X64_MSR_TIME_REF_COUNT = 0x40000020
HV_X64_MSR_REFERENCE_TSC = 0x40000021
HV_X64_MSR_TSC_FREQUENCY = 0x40000022
HV_X64_MSR_APIC_FREQUENCY = 0x40000023
HV_X64_MSR_EOI = 0x40000070
HV_X64_MSR_ICR = 0x40000071
HV_X64_MSR_TPR = 0x40000072
HV_X64_MSR_VP_ASSIST_PAGE = 0x40000073
HV_X64_MSR_SCONTROL = 0x40000080
HV_X64_MSR_SVERSION = 0x40000081
HV_X64_MSR_SIEFP = 0x40000082
HV_X64_MSR_SIMP = 0x40000083
HV_X64_MSR_EOM = 0x40000084
HV_X64_MSR_SIRBP = 0x40000085
HV_X64_MSR_SINT0 = 0x40000090
HV_X64_MSR_SINT15 = 0x4000009F
HV_X64_MSR_CRASH_P0 = 0x40000100
HV_X64_MSR_CRASH_CTL = 0x40000105

HV_SYNIC_SINT_COUNT = 16
HV_MESSAGE_SIZE = 256
HV_MESSAGE_HEADER_SIZE = 16
HV_MESSAGE_PAYLOAD_BYTE_COUNT = 240
HV_EVENT_FLAGS_COUNT = 2048
HV_EVENT_FLAGS_BYTE_COUNT = 256
HV_SYNIC_VERSION = 1

HVMSG_NONE = 0
HVMSG_VMBUS = 1
HVMSG_TIMER_EXPIRED = 0x80000010
HV_MESSAGE_FLAG_PENDING = 1

HV_SYNIC_ENABLE = 1
HV_PAGE_PFN_SHIFT = 12
HV_SINT_MASKED = 1 << 16
HV_SINT_AUTO_EOI = 1 << 17
HV_SINT_POLLING = 1 << 18
HV_SINT_RESET_VALUE = HV_SINT_MASKED

_SLOT = struct.Struct("<IBBHQ")


class Message(NamedTuple):
    """One message slot's content; `sender` is the sending partition or port id."""

    type: int
    payload: bytes
    sender: int = 0
    flags: int = 0

    def pack(self) -> bytes:
        """The 256 bytes of the slot. Raises WireError when the payload is longer than 240 bytes."""
        if len(self.payload) > HV_MESSAGE_PAYLOAD_BYTE_COUNT:
            raise WireError(
                f"SynIC message: {len(self.payload)} bytes, at most {HV_MESSAGE_PAYLOAD_BYTE_COUNT}"
            )
        try:
            head = _SLOT.pack(self.type, len(self.payload), self.flags, 0, self.sender)
        except struct.error as error:
            raise WireError(f"SynIC message: a value does not fit its field: {error}") from error
        return (head + self.payload).ljust(HV_MESSAGE_SIZE, b"\0")

    @classmethod
    def unpack(cls, slot: bytes) -> Self:
        """Decodes a slot of 256 bytes. Raises WireError when it is short or its payload size is above 240."""
        need("SynIC message", slot, HV_MESSAGE_SIZE)
        kind, size, flags, _, sender = _SLOT.unpack_from(slot)
        if size > HV_MESSAGE_PAYLOAD_BYTE_COUNT:
            raise WireError(f"SynIC message: {size} bytes, at most {HV_MESSAGE_PAYLOAD_BYTE_COUNT}")
        return cls(kind, bytes(slot[HV_MESSAGE_HEADER_SIZE : HV_MESSAGE_HEADER_SIZE + size]), sender, flags)


class Sint(NamedTuple):
    """A SINT register."""

    vector: int
    masked: bool = False
    auto_eoi: bool = False
    polling: bool = False

    def pack(self) -> int:
        """The u64."""
        return self.vector | int(self.masked) << 16 | int(self.auto_eoi) << 17 | int(self.polling) << 18

    @classmethod
    def unpack(cls, value: int) -> Self:
        """Decodes the u64. Raises WireError for vectors 0..15 unless the SINT is masked (#GP)."""
        sint = cls(value & 0xFF, bool(value >> 16 & 1), bool(value >> 17 & 1), bool(value >> 18 & 1))
        if sint.vector < 16 and not sint.masked:
            raise WireError(f"SINT register {value:#x}: vector {sint.vector}, expected 16..255")
        return sint


class PageRegister(NamedTuple):
    """SIMP, SIEFP and the like: an enable bit and a page."""

    enabled: bool
    gpa: int

    def pack(self) -> int:
        """The u64."""
        return self.gpa | int(self.enabled)

    @classmethod
    def unpack(cls, value: int) -> Self:
        """Decodes the u64; bits 11:1 are preserved by nobody."""
        return cls(bool(value & HV_SYNIC_ENABLE), value >> HV_PAGE_PFN_SHIFT << HV_PAGE_PFN_SHIFT)
