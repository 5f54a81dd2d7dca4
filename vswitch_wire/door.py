"""Door frames: the seqpacket protocol between a partition's two sides (docs/door.md is its specification).

One frame is one SOCK_SEQPACKET message: a 16-byte header and a body of at most 65520 bytes. `pack()` makes a
frame, `decode()` checks one and returns (sequence, message). File descriptors travel beside the bytes as
SCM_RIGHTS; `fds_expected()` says how many a message must carry.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from vswitch_wire.door_agent import Configure, Configured, Exec, ExecExit, ExecStarted, Kill, Shutdown
from vswitch_wire.door_layout import (
    DOOR_VERSION,
    HEADER_SIZE,
    MAX_BODY,
    MAX_FRAME,
    MAX_REGIONS,
    MAX_TEXT,
    MAX_VPS,
    MESSAGE_SIZE,
    SINT_COUNT,
    ErrorCode,
    FrameType,
    HelloFlags,
    cut_text,
    exact,
    text_field,
    zero,
)
from vswitch_wire.errors import WireError

__all__ = [
    "DOOR_VERSION",
    "GUEST_TO_HOST",
    "HEADER_SIZE",
    "HOST_TO_GUEST",
    "MAX_BODY",
    "MAX_FRAME",
    "MAX_REGIONS",
    "MAX_TEXT",
    "MAX_VPS",
    "MESSAGE_SIZE",
    "SINT_COUNT",
    "Configure",
    "Configured",
    "Deliver",
    "DoorError",
    "DoorMessage",
    "Eom",
    "ErrorCode",
    "EventFd",
    "Exec",
    "ExecExit",
    "ExecStarted",
    "FrameType",
    "Hello",
    "HelloAck",
    "HelloFlags",
    "Hypercall",
    "HypercallResult",
    "Kill",
    "MsrRead",
    "MsrResult",
    "MsrWrite",
    "Park",
    "Parked",
    "RegionEntry",
    "Reset",
    "ResetDone",
    "Resume",
    "Shutdown",
    "Unsupported",
    "decode",
    "fds_expected",
    "pack",
]

_HEADER = struct.Struct("<HHIII")
_HELLO = struct.Struct("<HHIQIIQ")
_REGION = struct.Struct("<QQ")
_HELLO_ACK = struct.Struct("<HHI")
_REGISTERS = struct.Struct("<II3Q96s")
_RESULT = struct.Struct("<4Q96s")
_MSR_WRITE = struct.Struct("<IIQ")
_PAIR = struct.Struct("<II")
_U32 = struct.Struct("<I")


# Reserved numbers: a guest that uses one is told UNSUPPORTED rather than MALFORMED.
INTERCEPTS = frozenset(range(0x18, 0x20))

GUEST_TO_HOST = frozenset(
    {
        FrameType.HELLO_ACK,
        FrameType.HYPERCALL,
        FrameType.MSR_WRITE,
        FrameType.MSR_READ,
        FrameType.EOM,
        FrameType.PARKED,
        FrameType.RESET,
        FrameType.CONFIGURED,
        FrameType.EXEC_STARTED,
        FrameType.EXEC_EXIT,
        FrameType.ERROR,
    }
)
HOST_TO_GUEST = frozenset(
    {
        FrameType.HELLO,
        FrameType.RESULT,
        FrameType.MSR_RESULT,
        FrameType.DELIVER,
        FrameType.EVENTFD,
        FrameType.PARK,
        FrameType.RESUME,
        FrameType.RESET_DONE,
        FrameType.CONFIGURE,
        FrameType.EXEC,
        FrameType.KILL,
        FrameType.SHUTDOWN,
        FrameType.ERROR,
    }
)


class Unsupported(WireError):
    """A well-formed frame whose type this version reserves but does not serve."""


def _sint(vp: int, sint: int, name: str) -> None:
    if vp >= MAX_VPS:
        raise WireError(f"{name}: virtual processor {vp}, at most {MAX_VPS - 1} exists")
    if sint >= SINT_COUNT:
        raise WireError(f"{name}: SINT {sint}, at most {SINT_COUNT - 1} exists")


@dataclass(frozen=True, slots=True)
class RegionEntry:
    """One memory region: guest-physical address and size, both multiples of 4096 bytes."""

    gpa: int
    size: int


@dataclass(frozen=True, slots=True)
class Hello:
    """First frame of a connection, host to guest.

    The region memfds (not on resume) and one eventfd per VP ride on it.
    """

    TYPE: ClassVar[FrameType] = FrameType.HELLO
    partition_id: int
    vp_count: int
    regions: tuple[RegionEntry, ...]
    privileges: int
    flags: HelloFlags = HelloFlags.NONE
    version_min: int = DOOR_VERSION
    version_max: int = DOOR_VERSION

    def body(self) -> bytes:
        head = _HELLO.pack(
            self.version_min,
            self.version_max,
            self.flags,
            self.partition_id,
            self.vp_count,
            len(self.regions),
            self.privileges,
        )
        return head + b"".join(_REGION.pack(region.gpa, region.size) for region in self.regions)

    @classmethod
    def parse(cls, body: bytes) -> Hello:
        if len(body) < _HELLO.size:
            raise WireError(f"HELLO: body is {len(body)} bytes, at least {_HELLO.size} expected")
        low, high, flags, partition_id, vp_count, region_count, privileges = _HELLO.unpack_from(body)
        if low > high or low == 0:
            raise WireError(f"HELLO: version range {low}..{high} is empty")
        if flags & ~int(HelloFlags.RESUME):
            raise WireError(f"HELLO: unknown flags {flags:#x}")
        if not 1 <= vp_count <= MAX_VPS:
            raise WireError(f"HELLO: {vp_count} virtual processors, 1..{MAX_VPS} allowed")
        if not 1 <= region_count <= MAX_REGIONS:
            raise WireError(f"HELLO: {region_count} memory regions, 1..{MAX_REGIONS} allowed")
        exact(body, _HELLO.size + region_count * _REGION.size, "HELLO")
        regions: list[RegionEntry] = []
        end = 0
        for index in range(region_count):
            gpa, size = _REGION.unpack_from(body, _HELLO.size + index * _REGION.size)
            if gpa & 0xFFF or size & 0xFFF or size == 0 or gpa + size > 1 << 52:
                raise WireError(f"HELLO: region {index} ({gpa:#x}+{size:#x}) is not whole pages below 2^52")
            if gpa < end:
                raise WireError(f"HELLO: region {index} ({gpa:#x}) overlaps or precedes the one before")
            end = gpa + size
            regions.append(RegionEntry(gpa, size))
        return cls(partition_id, vp_count, tuple(regions), privileges, HelloFlags(flags), low, high)


@dataclass(frozen=True, slots=True)
class HelloAck:
    """The guest's side took the HELLO; on resume the region memfds come back with it."""

    TYPE: ClassVar[FrameType] = FrameType.HELLO_ACK
    version: int = DOOR_VERSION
    flags: HelloFlags = HelloFlags.NONE

    def body(self) -> bytes:
        return _HELLO_ACK.pack(self.version, 0, self.flags)

    @classmethod
    def parse(cls, body: bytes) -> HelloAck:
        exact(body, _HELLO_ACK.size, "HELLO_ACK")
        version, pad, flags = _HELLO_ACK.unpack(body)
        zero(pad, "HELLO_ACK")
        if flags & ~int(HelloFlags.RESUME):
            raise WireError(f"HELLO_ACK: unknown flags {flags:#x}")
        return cls(version, HelloFlags(flags))


@dataclass(frozen=True, slots=True)
class Hypercall:
    """The x64 register image at a hypercall (TLFS, Hypercall Interface); xmm is XMM0..XMM5, 96 bytes."""

    TYPE: ClassVar[FrameType] = FrameType.HYPERCALL
    vp: int
    rcx: int
    rdx: int = 0
    r8: int = 0
    xmm: bytes = bytes(96)

    def body(self) -> bytes:
        return _REGISTERS.pack(self.vp, 0, self.rcx, self.rdx, self.r8, self.xmm)

    @classmethod
    def parse(cls, body: bytes) -> Hypercall:
        exact(body, _REGISTERS.size, "HYPERCALL")
        vp, pad, rcx, rdx, r8, xmm = _REGISTERS.unpack(body)
        zero(pad, "HYPERCALL")
        return cls(vp, rcx, rdx, r8, xmm)


@dataclass(frozen=True, slots=True)
class HypercallResult:
    """The register image after the hypercall.

    Rax is the result value, the others are as the call left them.
    """

    TYPE: ClassVar[FrameType] = FrameType.RESULT
    rax: int
    rcx: int = 0
    rdx: int = 0
    r8: int = 0
    xmm: bytes = bytes(96)

    def body(self) -> bytes:
        return _RESULT.pack(self.rax, self.rcx, self.rdx, self.r8, self.xmm)

    @classmethod
    def parse(cls, body: bytes) -> HypercallResult:
        exact(body, _RESULT.size, "RESULT")
        return cls(*_RESULT.unpack(body))


@dataclass(frozen=True, slots=True)
class MsrWrite:
    """WRMSR of a synthetic MSR on one virtual processor."""

    TYPE: ClassVar[FrameType] = FrameType.MSR_WRITE
    vp: int
    msr: int
    value: int

    def body(self) -> bytes:
        return _MSR_WRITE.pack(self.vp, self.msr, self.value)

    @classmethod
    def parse(cls, body: bytes) -> MsrWrite:
        exact(body, _MSR_WRITE.size, "MSR_WRITE")
        return cls(*_MSR_WRITE.unpack(body))


@dataclass(frozen=True, slots=True)
class MsrRead:
    """RDMSR of a synthetic MSR on one virtual processor."""

    TYPE: ClassVar[FrameType] = FrameType.MSR_READ
    vp: int
    msr: int

    def body(self) -> bytes:
        return _PAIR.pack(self.vp, self.msr)

    @classmethod
    def parse(cls, body: bytes) -> MsrRead:
        exact(body, _PAIR.size, "MSR_READ")
        return cls(*_PAIR.unpack(body))


@dataclass(frozen=True, slots=True)
class MsrResult:
    """Answer to MSR_WRITE and MSR_READ; fault = the instruction raises #GP, value is 0 then."""

    TYPE: ClassVar[FrameType] = FrameType.MSR_RESULT
    fault: bool
    value: int = 0

    def body(self) -> bytes:
        return _MSR_WRITE.pack(int(self.fault), 0, self.value)

    @classmethod
    def parse(cls, body: bytes) -> MsrResult:
        exact(body, _MSR_WRITE.size, "MSR_RESULT")
        status, pad, value = _MSR_WRITE.unpack(body)
        zero(pad, "MSR_RESULT")
        if status > 1:
            raise WireError(f"MSR_RESULT: status {status}, must be 0 or 1")
        return cls(bool(status), value)


@dataclass(frozen=True, slots=True)
class Deliver:
    """A message for the slot of (vp, sint): 256 bytes, as the guest finds them in its SIMP page."""

    TYPE: ClassVar[FrameType] = FrameType.DELIVER
    vp: int
    sint: int
    message: bytes

    def body(self) -> bytes:
        if len(self.message) != MESSAGE_SIZE:
            raise WireError(f"DELIVER: message is {len(self.message)} bytes, must be {MESSAGE_SIZE}")
        return _PAIR.pack(self.vp, self.sint) + self.message

    @classmethod
    def parse(cls, body: bytes) -> Deliver:
        exact(body, _PAIR.size + MESSAGE_SIZE, "DELIVER")
        vp, sint = _PAIR.unpack_from(body)
        _sint(vp, sint, "DELIVER")
        return cls(vp, sint, body[_PAIR.size :])


@dataclass(frozen=True, slots=True)
class Eom:
    """The message of the last DELIVER to (vp, sint) has been taken out of its slot."""

    TYPE: ClassVar[FrameType] = FrameType.EOM
    vp: int
    sint: int

    def body(self) -> bytes:
        return _PAIR.pack(self.vp, self.sint)

    @classmethod
    def parse(cls, body: bytes) -> Eom:
        exact(body, _PAIR.size, "EOM")
        vp, sint = _PAIR.unpack(body)
        _sint(vp, sint, "EOM")
        return cls(vp, sint)


@dataclass(frozen=True, slots=True)
class EventFd:
    """Writing the eventfd that comes with `add` equals HvCallSignalEvent(connection id, flag 0)."""

    TYPE: ClassVar[FrameType] = FrameType.EVENTFD
    connection_id: int
    add: bool

    def body(self) -> bytes:
        return _PAIR.pack(self.connection_id, int(self.add))

    @classmethod
    def parse(cls, body: bytes) -> EventFd:
        exact(body, _PAIR.size, "EVENTFD")
        connection_id, operation = _PAIR.unpack(body)
        if operation > 1:
            raise WireError(f"EVENTFD: operation {operation}, must be 0 (remove) or 1 (add)")
        return cls(connection_id, bool(operation))


@dataclass(frozen=True, slots=True)
class Park:
    """Stop all virtual processors; answered by PARKED."""

    TYPE: ClassVar[FrameType] = FrameType.PARK

    def body(self) -> bytes:
        return b""

    @classmethod
    def parse(cls, body: bytes) -> Park:
        exact(body, 0, "PARK")
        return cls()


@dataclass(frozen=True, slots=True)
class Parked:
    """Every virtual processor has stopped; the guest's side touches no guest memory until RESUME."""

    TYPE: ClassVar[FrameType] = FrameType.PARKED

    def body(self) -> bytes:
        return b""

    @classmethod
    def parse(cls, body: bytes) -> Parked:
        exact(body, 0, "PARKED")
        return cls()


@dataclass(frozen=True, slots=True)
class Resume:
    """Run the virtual processors again."""

    TYPE: ClassVar[FrameType] = FrameType.RESUME

    def body(self) -> bytes:
        return b""

    @classmethod
    def parse(cls, body: bytes) -> Resume:
        exact(body, 0, "RESUME")
        return cls()


@dataclass(frozen=True, slots=True)
class Reset:
    """The guest starts anew and stands still until RESET_DONE: let go of all that it had."""

    TYPE: ClassVar[FrameType] = FrameType.RESET

    def body(self) -> bytes:
        return b""

    @classmethod
    def parse(cls, body: bytes) -> Reset:
        exact(body, 0, "RESET")
        return cls()


@dataclass(frozen=True, slots=True)
class ResetDone:
    """Channels, GPADLs and registers are as for a partition that was just created."""

    TYPE: ClassVar[FrameType] = FrameType.RESET_DONE

    def body(self) -> bytes:
        return b""

    @classmethod
    def parse(cls, body: bytes) -> ResetDone:
        exact(body, 0, "RESET_DONE")
        return cls()


@dataclass(frozen=True, slots=True)
class DoorError:
    """Why the sender is about to close the socket."""

    TYPE: ClassVar[FrameType] = FrameType.ERROR
    code: int
    text: str

    def body(self) -> bytes:
        return _U32.pack(self.code) + cut_text(self.text)

    @classmethod
    def parse(cls, body: bytes) -> DoorError:
        if len(body) < 4:
            raise WireError(f"ERROR: body is {len(body)} bytes, at least 4 expected")
        return cls(_U32.unpack_from(body)[0], text_field(body[4:], "ERROR"))


DoorMessage = (
    Hello
    | HelloAck
    | Hypercall
    | HypercallResult
    | MsrWrite
    | MsrRead
    | MsrResult
    | Deliver
    | Eom
    | EventFd
    | Park
    | Parked
    | Resume
    | Reset
    | ResetDone
    | Configure
    | Configured
    | Exec
    | ExecStarted
    | ExecExit
    | Kill
    | Shutdown
    | DoorError
)

_PARSERS: dict[int, Callable[[bytes], DoorMessage]] = {
    FrameType.HELLO: Hello.parse,
    FrameType.HELLO_ACK: HelloAck.parse,
    FrameType.HYPERCALL: Hypercall.parse,
    FrameType.RESULT: HypercallResult.parse,
    FrameType.MSR_WRITE: MsrWrite.parse,
    FrameType.MSR_READ: MsrRead.parse,
    FrameType.MSR_RESULT: MsrResult.parse,
    FrameType.DELIVER: Deliver.parse,
    FrameType.EOM: Eom.parse,
    FrameType.EVENTFD: EventFd.parse,
    FrameType.PARK: Park.parse,
    FrameType.PARKED: Parked.parse,
    FrameType.RESUME: Resume.parse,
    FrameType.RESET: Reset.parse,
    FrameType.RESET_DONE: ResetDone.parse,
    FrameType.CONFIGURE: Configure.parse,
    FrameType.CONFIGURED: Configured.parse,
    FrameType.EXEC: Exec.parse,
    FrameType.EXEC_STARTED: ExecStarted.parse,
    FrameType.EXEC_EXIT: ExecExit.parse,
    FrameType.KILL: Kill.parse,
    FrameType.SHUTDOWN: Shutdown.parse,
    FrameType.ERROR: DoorError.parse,
}


def pack(message: DoorMessage, sequence: int = 0) -> bytes:
    """One frame, ready for sendmsg(2). WireError if the body does not fit in 65520 bytes."""
    body = message.body()
    if len(body) > MAX_BODY:
        raise WireError(f"{message.TYPE.name}: body is {len(body)} bytes, at most {MAX_BODY} fit in a frame")
    return _HEADER.pack(message.TYPE, 0, sequence & 0xFFFFFFFF, len(body), 0) + body


def decode(frame: bytes) -> tuple[int, DoorMessage]:
    """Check one whole frame and return (sequence, message).

    WireError on anything else; Unsupported for intercepts.
    """
    if len(frame) < HEADER_SIZE:
        raise WireError(f"door frame: {len(frame)} bytes, a header has {HEADER_SIZE}")
    if len(frame) > MAX_FRAME:
        raise WireError(f"door frame: {len(frame)} bytes, at most {MAX_FRAME} are allowed")
    kind, flags, sequence, length, reserved = _HEADER.unpack_from(frame)
    if flags or reserved:
        raise WireError(f"door frame type {kind:#x}: flags {flags:#x} and reserved {reserved:#x} must be 0")
    if length != len(frame) - HEADER_SIZE:
        raise WireError(
            f"door frame type {kind:#x}: length says {length}, body has {len(frame) - HEADER_SIZE} bytes"
        )
    if kind in INTERCEPTS:
        raise Unsupported(
            f"door frame type {kind:#x}: intercepts are reserved and not served by door version 1"
        )
    parser = _PARSERS.get(kind)
    if parser is None:
        raise WireError(f"door frame type {kind:#x} is unknown")
    return sequence, parser(bytes(frame[HEADER_SIZE:]))


def fds_expected(message: DoorMessage) -> int:
    """How many descriptors this message carries (HELLO_ACK on resume.

    As many as HELLO named regions, not known here).
    """
    if isinstance(message, Hello):
        regions = 0 if message.flags & HelloFlags.RESUME else len(message.regions)
        return regions + message.vp_count
    if isinstance(message, EventFd):
        return int(message.add)
    return 3 if isinstance(message, Exec) else 0
