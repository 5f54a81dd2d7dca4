"""What all door frames share: type numbers, codes, limits, and the checks of their fields (docs/door.md)."""

from __future__ import annotations

import json
from enum import IntEnum, IntFlag
from typing import Any

from vswitch_wire.errors import WireError

DOOR_VERSION = 1
HEADER_SIZE = 16
MAX_FRAME = 65536
MAX_BODY = MAX_FRAME - HEADER_SIZE
MAX_TEXT = 4096  # bytes of UTF-8 in any text field
MAX_REGIONS = 16
MAX_VPS = 64
MAX_STRINGS = 1024  # argv or env entries
MESSAGE_SIZE = 256  # one SynIC message slot
SINT_COUNT = 16


class FrameType(IntEnum):
    """The `type` word of a frame header."""

    HELLO = 0x01
    HELLO_ACK = 0x02
    HYPERCALL = 0x10
    RESULT = 0x11
    MSR_WRITE = 0x12
    MSR_READ = 0x13
    MSR_RESULT = 0x14
    PORT_READ = 0x18
    PORT_WRITE = 0x19
    MMIO_READ = 0x1A
    MMIO_WRITE = 0x1B
    PCI_READ = 0x1C
    PCI_WRITE = 0x1D
    INTERCEPT_RESULT = 0x1E
    DELIVER = 0x20
    EOM = 0x21
    EVENTFD = 0x22
    PARK = 0x30
    PARKED = 0x31
    RESUME = 0x32
    RESET = 0x33
    RESET_DONE = 0x34
    CONFIGURE = 0x40
    CONFIGURED = 0x41
    EXEC = 0x42
    EXEC_STARTED = 0x43
    EXEC_EXIT = 0x44
    KILL = 0x45
    SHUTDOWN = 0x46
    ERROR = 0x7F


class HelloFlags(IntFlag):
    """HELLO flags and HELLO_ACK flags."""

    NONE = 0
    RESUME = 1


class ErrorCode(IntEnum):
    """The code of an ERROR frame; the sender closes the socket behind it."""

    MALFORMED = 1
    UNSUPPORTED = 2
    VERSION = 3
    STATE = 4
    RESUME = 5
    QUOTA = 6
    GONE = 7
    INTERNAL = 8


def exact(body: bytes, size: int, name: str) -> None:
    if len(body) != size:
        raise WireError(f"{name}: body is {len(body)} bytes, must be {size}")


def zero(value: int, name: str) -> None:
    if value:
        raise WireError(f"{name}: reserved word is {value:#x}, must be 0")


def text_field(data: bytes, name: str) -> str:
    if len(data) > MAX_TEXT:
        raise WireError(f"{name}: text is {len(data)} bytes, at most {MAX_TEXT} are allowed")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise WireError(f"{name}: text is not UTF-8 ({error.reason} at byte {error.start})") from None


def cut_text(text: str) -> bytes:
    return text.encode("utf-8", "replace")[:MAX_TEXT].decode("utf-8", "ignore").encode("utf-8")


def json_object(body: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise WireError(f"{name}: body is not a JSON document ({error})") from None
    if not isinstance(value, dict):
        raise WireError(f"{name}: body is a JSON {type(value).__name__}, must be an object")
    return value
