"""The native decoders of a guest's control messages, behind the surface of their Python twins.

Rust checks and takes the bytes apart; what comes out are the same classes that the twins give.
"""

from __future__ import annotations

from uuid import UUID

from vswitch_native import wire as native

from . import vmbus
from .gpadl import AssembledGpadl, GpaRange
from .guest_codecs import GuestCodecs
from .hypercall import PostMessage

_CLASSES = {message.__name__: message for message in vmbus.MESSAGES.values()}
_GUIDS = frozenset({"class_id", "instance_id", "client_id", "endpoint_id", "service_id", "silo_id"})


def post_message(block: bytes) -> PostMessage:
    """HvCallPostMessage's input block. Raises WireError."""
    return PostMessage(*native.decode_post_message(block))


def channel_message(payload: bytes) -> vmbus.ChannelMessage:
    """`vmbus.decode`. Raises WireError, UnknownMessage."""
    name, fields = native.decode_channel_message(payload)
    for guid in _GUIDS & fields.keys():
        if fields[guid] is not None:
            fields[guid] = UUID(bytes_le=fields[guid])
    return _CLASSES[name](**fields)


class GpadlAssembler:
    """`gpadl.GpadlAssembler`, whose page lists are kept and checked in Rust."""

    def __init__(self, max_in_progress: int) -> None:
        self._native = native.GpadlAssembler(max_in_progress=max_in_progress)
        self.discard = self._native.discard
        self.discard_channel = self._native.discard_channel
        self.clear = self._native.clear

    @property
    def in_progress(self) -> int:
        """Unfinished GPADLs."""
        return self._native.in_progress

    def header(self, message: vmbus.GpadlHeader) -> AssembledGpadl | None:
        """Starts a GPADL; gives it when this one message held all of it. Raises GpadlError."""
        return _assembled(
            self._native.header(
                message.relid, message.gpadl_id, message.range_bytes, message.range_count, message.range_data
            )
        )

    def body(self, message: vmbus.GpadlBody) -> AssembledGpadl | None:
        """Adds a body; gives the GPADL when it is whole. Raises GpadlError, WireError for an unknown one."""
        return _assembled(self._native.body(message.gpadl_id, message.range_data))


def _assembled(
    whole: tuple[int, int, list[tuple[int, int, tuple[int, ...]]]] | None,
) -> AssembledGpadl | None:
    if whole is None:
        return None
    relid, gpadl_id, ranges = whole
    return AssembledGpadl(relid, gpadl_id, tuple(GpaRange(*entry) for entry in ranges))


NATIVE = GuestCodecs(
    post_message=post_message, channel_message=channel_message, gpadl_assembler=GpadlAssembler
)
