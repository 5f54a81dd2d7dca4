"""What reads a guest's control messages: a set of decoders per engine, chosen by `engine.guest_codecs()`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from . import gpadl, hypercall, vmbus


class Assembler(Protocol):
    """Collects the headers and bodies of one connection's GPADLs (`gpadl.GpadlAssembler` has the words)."""

    @property
    def in_progress(self) -> int: ...
    def header(self, message: vmbus.GpadlHeader) -> gpadl.AssembledGpadl | None: ...
    def body(self, message: vmbus.GpadlBody) -> gpadl.AssembledGpadl | None: ...
    def discard(self, gpadl_id: int) -> bool: ...
    def discard_channel(self, relid: int) -> list[int]: ...
    def clear(self) -> None: ...


class GuestCodecs(NamedTuple):
    """The decoders of what a guest posts. Each raises WireError for bytes that no conforming guest sends."""

    post_message: Callable[[bytes], hypercall.PostMessage]
    """HvCallPostMessage's 256-byte input block."""
    channel_message: Callable[[bytes], vmbus.ChannelMessage]
    """A posted payload of message type 1."""
    gpadl_assembler: Callable[[int], Assembler]
    """A new assembler that keeps at most so many unfinished GPADLs."""


PYTHON = GuestCodecs(
    post_message=hypercall.PostMessage.unpack,
    channel_message=vmbus.decode,
    gpadl_assembler=lambda most: gpadl.GpadlAssembler(max_in_progress=most),
)
