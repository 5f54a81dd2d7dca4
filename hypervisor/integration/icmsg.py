"""Integration messages: the header every service shares and the negotiation of versions (Linux
include/linux/hyperv.h, struct icmsg_hdr and icmsg_negotiate; drivers/hv/channel_mgmt.c,
vmbus_prep_negotiate_resp).

An in-band packet of a pipe in message mode: `u32 1, u32 size of what follows`, then the header `version of
the framework, u16 type, version of the service, u16 body size, u32 status, u8 transaction id, u8 flags,
u16 0`, then the body. A version is `u16 major, u16 minor`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple, Self

from vswitch_wire.errors import WireError
from vswitch_wire.layout import need

ICMSGTYPE_NEGOTIATE = 0
ICMSGTYPE_HEARTBEAT = 1
ICMSGTYPE_KVPEXCHANGE = 2
ICMSGTYPE_SHUTDOWN = 3
ICMSGTYPE_TIMESYNC = 4

ICMSGHDRFLAG_TRANSACTION = 1
ICMSGHDRFLAG_REQUEST = 2
ICMSGHDRFLAG_RESPONSE = 4

HV_S_OK = 0
HV_E_FAIL = 0x80004005
HV_S_CONT = 0x80070103
"""No more items."""
STATUS_NAMES = {
    HV_E_FAIL: "failed",
    HV_S_CONT: "no such item",
    0x80070032: "not supported",
    0x800704F7: "machine locked",
    0x8007048F: "device not connected",
    0x80070057: "invalid argument",
    0x80041002: "no such adapter",
    0x80070050: "already exists",
    0x80070070: "disk full",
    0x800700AA: "busy",
}

PIPE_DATA = 1
PIPE_HEADER_SIZE = 8
HEADER_SIZE = 20
OVERHEAD = PIPE_HEADER_SIZE + HEADER_SIZE
MAXIMUM_BODY = 0xFFFF

_PIPE = struct.Struct("<II")
_HEADER = struct.Struct("<HHHHHHIBBH")
_COUNTS = struct.Struct("<HHI")
_VERSION = struct.Struct("<HH")


class Version(NamedTuple):
    """A version of the framework or of a service."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


FRAMEWORK_VERSIONS = (Version(1, 0), Version(3, 0))


class IcMessage(NamedTuple):
    """One integration message."""

    type: int
    framework: Version
    version: Version
    body: bytes
    status: int = HV_S_OK
    transaction_id: int = 0
    flags: int = ICMSGHDRFLAG_TRANSACTION | ICMSGHDRFLAG_REQUEST

    def pack(self) -> bytes:
        """The packet's payload. Raises WireError when a value does not fit its field."""
        try:
            header = _HEADER.pack(
                *self.framework,
                self.type,
                *self.version,
                len(self.body),
                self.status,
                self.transaction_id,
                self.flags,
                0,
            )
        except struct.error as error:
            raise WireError(f"integration message: a value does not fit its field: {error}") from error
        return _PIPE.pack(PIPE_DATA, HEADER_SIZE + len(self.body)) + header + self.body

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """The message in a packet's payload, which may be padded. Raises WireError for lengths that lie."""
        need("integration message", payload, OVERHEAD)
        _, size = _PIPE.unpack_from(payload)
        if not HEADER_SIZE <= size <= len(payload) - PIPE_HEADER_SIZE:
            raise WireError(
                f"integration message: says {size} bytes, {len(payload) - PIPE_HEADER_SIZE} are there"
            )
        (
            framework_major,
            framework_minor,
            kind,
            major,
            minor,
            body_size,
            status,
            transaction_id,
            flags,
            _,
        ) = _HEADER.unpack_from(payload, PIPE_HEADER_SIZE)
        if body_size > size - HEADER_SIZE:
            raise WireError(f"integration message: a body of {body_size} bytes in {size - HEADER_SIZE}")
        return cls(
            kind,
            Version(framework_major, framework_minor),
            Version(major, minor),
            bytes(payload[OVERHEAD : OVERHEAD + body_size]),
            status,
            transaction_id,
            flags,
        )


def status_text(status: int) -> str:
    """A status in words, with its number."""
    return f"{STATUS_NAMES.get(status, 'an error')} ({status:#010x})"


def pack_negotiation(frameworks: Sequence[Version], versions: Sequence[Version]) -> bytes:
    """The body by which a host offers versions."""
    return _COUNTS.pack(len(frameworks), len(versions), 0) + b"".join(
        _VERSION.pack(*version) for version in (*frameworks, *versions)
    )


def unpack_negotiation(
    body: bytes, frameworks: Sequence[Version], versions: Sequence[Version]
) -> tuple[Version, Version] | None:
    """What the guest chose, or None when it knows none of those offered.

    Raises WireError for an answer that is none, or a choice that was not offered.
    """
    need("integration negotiation", body, _COUNTS.size)
    framework_count, version_count, _ = _COUNTS.unpack_from(body)
    if not framework_count or not version_count:
        return None
    if framework_count != 1 or version_count != 1:
        raise WireError(
            f"integration negotiation: {framework_count} and {version_count} versions, one each expected"
        )
    need("integration negotiation", body, _COUNTS.size + 2 * _VERSION.size)
    framework = Version(*_VERSION.unpack_from(body, _COUNTS.size))
    version = Version(*_VERSION.unpack_from(body, _COUNTS.size + _VERSION.size))
    if framework not in frameworks or version not in versions:
        raise WireError(f"integration negotiation: {framework} and {version} were not offered")
    return framework, version
