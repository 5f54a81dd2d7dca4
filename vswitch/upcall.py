"""The upcall channel between a datapath and one extension's process: its ring pair and its two messages.

One memfd of 512 KiB holds two rings in the VMBus ring format (`vswitch_wire.ring`), control page included:
requests (switch -> extension) at offset 0, replies at 256 KiB. Each has an eventfd that its writer signals.
A request is an in-band packet whose transaction id is the upcall's id; its reply is a completion with the
same id.
All integers are little-endian.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "MAX_FRAME",
    "MEMFD_BYTES",
    "RING_BYTES",
    "VERSION",
    "ExtensionChannel",
    "ExtensionKind",
    "FailureMode",
    "Pass",
    "UpcallError",
    "UpcallReply",
    "UpcallRequest",
    "check_channels",
]

VERSION = 1
RING_BYTES = 256 * 1024
"""One ring with its control page."""
REQUEST_OFFSET = 0
REPLY_OFFSET = RING_BYTES
MEMFD_BYTES = 2 * RING_BYTES
MAX_FRAME = 2048
"""Bytes of a frame that an extension is shown at most."""
MAX_REASON = 256
NONE_U32 = 0xFFFF_FFFF
# What an extension says ends up on terminals.
_BLANKS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)], " ")

ExtensionKind = Literal["capture", "filter", "forwarding"]
FailureMode = Literal["open", "closed"]
Pass = Literal["ingress", "egress"]

_REQUEST = struct.Struct("<HBBIIIIHH")
_REPLY = struct.Struct("<HBBIQHH")

PASS_INGRESS = 0
PASS_EGRESS = 1
REQUEST_FLAG_TRACE = 1
REQUEST_FLAG_LARGE_SEND = 2
VERDICT_ALLOW = 0
VERDICT_DROP = 1
VERDICT_ERROR = 2
REPLY_FLAG_CACHEABLE = 1


class UpcallError(ValueError):
    """Bytes on an upcall channel that are no valid message."""


@dataclass(frozen=True, slots=True)
class UpcallRequest:
    """One frame that an extension is asked about (24 bytes, then the port's name, then the frame)."""

    egress: bool
    in_port: int
    out_port: int | None
    """The destination on the egress pass, None on ingress."""
    vlan_tci: int | None
    frame_length: int
    """Length on the wire; `data` holds at most `MAX_FRAME` bytes of it."""
    port_name: str
    """Name of the source port on ingress, of the destination on egress."""
    data: bytes
    trace: bool = False
    """Nothing will happen to this frame: answer as for a real one, but count and change nothing."""
    large_send: bool = False
    """To be segmented on delivery: the length in its IP header is the sender's fancy and means nothing."""

    def pack(self) -> bytes:
        name = self.port_name.encode()
        header = _REQUEST.pack(
            VERSION,
            PASS_EGRESS if self.egress else PASS_INGRESS,
            (REQUEST_FLAG_TRACE if self.trace else 0) | (REQUEST_FLAG_LARGE_SEND if self.large_send else 0),
            self.in_port,
            NONE_U32 if self.out_port is None else self.out_port,
            NONE_U32 if self.vlan_tci is None else self.vlan_tci,
            self.frame_length,
            len(name),
            len(self.data),
        )
        return header + name + self.data

    @classmethod
    def decode(cls, payload: bytes) -> UpcallRequest:
        if len(payload) < _REQUEST.size:
            raise UpcallError(f"upcall request of {len(payload)} bytes, at least {_REQUEST.size} expected")
        version, which, flags, in_port, out_port, tci, length, name_length, data_length = (
            _REQUEST.unpack_from(payload)
        )
        if version != VERSION:
            raise UpcallError(f"upcall request of version {version}, {VERSION} expected")
        end = _REQUEST.size + name_length + data_length
        if end > len(payload):
            raise UpcallError(f"upcall request of {len(payload)} bytes says that it has {end}")
        name = bytes(payload[_REQUEST.size : _REQUEST.size + name_length]).decode("utf-8", "replace")
        data = bytes(payload[_REQUEST.size + name_length : end])
        return cls(
            egress=which == PASS_EGRESS,
            in_port=in_port,
            out_port=None if out_port == NONE_U32 else out_port,
            vlan_tci=None if tci == NONE_U32 else tci,
            frame_length=length,
            port_name=name,
            data=data,
            trace=bool(flags & REQUEST_FLAG_TRACE),
            large_send=bool(flags & REQUEST_FLAG_LARGE_SEND),
        )


@dataclass(frozen=True, slots=True)
class UpcallReply:
    """An extension's verdict (20 bytes, then the reason)."""

    verdict: int
    """`VERDICT_ALLOW`, `VERDICT_DROP` or `VERDICT_ERROR`."""
    fields: int = 0
    """Bits of `vswitch.fields.Field` that the verdict depends on."""
    cacheable: bool = False
    ttl_ms: int = 0
    """Milliseconds for which the verdict holds; 0 = no limit."""
    reason: str = ""
    """Why it dropped or what it raised; at most 256 bytes of UTF-8 are carried."""

    def pack(self) -> bytes:
        reason = self.reason.encode()[:MAX_REASON].decode("utf-8", "ignore").encode()
        flags = REPLY_FLAG_CACHEABLE if self.cacheable else 0
        return _REPLY.pack(VERSION, self.verdict, flags, self.ttl_ms, self.fields, len(reason), 0) + reason

    @classmethod
    def decode(cls, payload: bytes) -> UpcallReply:
        """Reads a reply; padding behind the reason is allowed, since ring packets are padded to 8 bytes.

        Control characters in the reason become blanks.
        """
        if len(payload) < _REPLY.size:
            raise UpcallError(f"reply of {len(payload)} bytes, at least {_REPLY.size} expected")
        version, verdict, flags, ttl_ms, fields, reason_length, _ = _REPLY.unpack_from(payload)
        if version != VERSION:
            raise UpcallError(f"reply of version {version}, {VERSION} expected")
        if verdict > VERDICT_ERROR:
            raise UpcallError(f"reply with verdict {verdict}, 0 to {VERDICT_ERROR} expected")
        if reason_length > MAX_REASON or _REPLY.size + reason_length > len(payload):
            raise UpcallError(f"reply of {len(payload)} bytes with a reason of {reason_length}")
        text = bytes(payload[_REPLY.size : _REPLY.size + reason_length])
        try:
            reason = text.decode()
        except UnicodeDecodeError:
            raise UpcallError("reply whose reason is not UTF-8") from None
        reason = reason.translate(_BLANKS)
        return cls(verdict, fields, bool(flags & REPLY_FLAG_CACHEABLE), ttl_ms, reason)


@dataclass(frozen=True, slots=True)
class ExtensionChannel:
    """One extension as the datapath sees it. The fds stay the creator's; the datapath duplicates what it
    keeps."""

    id: int
    """Unique among the channels of a switch's whole life: a restarted extension gets a new one."""
    name: str
    kind: ExtensionKind
    on_failure: FailureMode
    memfd: int
    request_fd: int
    """Eventfd that the datapath signals after writing requests."""
    reply_fd: int
    """Eventfd that the extension signals after writing replies."""
    passes: frozenset[Pass] = frozenset(("ingress", "egress"))

    @classmethod
    def create(
        cls,
        id: int,
        name: str,
        *,
        kind: ExtensionKind = "filter",
        on_failure: FailureMode = "closed",
        passes: Iterable[Pass] = ("ingress", "egress"),
    ) -> ExtensionChannel:
        """Makes the sealed memfd and both eventfds, all close-on-exec. Whoever calls this calls `close`."""
        memfd = os.memfd_create(f"vswitch-upcall-{id}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(memfd, MEMFD_BYTES)
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        request_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        reply_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return cls(id, name, kind, on_failure, memfd, request_fd, reply_fd, frozenset(passes))

    def close(self) -> None:
        """Closes the three fds."""
        for fd in (self.memfd, self.request_fd, self.reply_fd):
            os.close(fd)


def check_channels(channels: Iterable[ExtensionChannel]) -> list[ExtensionChannel]:
    """The channels as a list. Raises ValueError if two have one id, or one is of a kind that no engine
    runs."""
    wanted = list(channels)
    if len({channel.id for channel in wanted}) != len(wanted):
        raise ValueError("two extension channels have the same id")
    for channel in wanted:
        if channel.kind != "filter":
            text = f"extension {channel.name} is of kind {channel.kind}: this switch runs filter extensions"
            raise ValueError(f"{text}; load it as a filter")
    return wanted
