"""What a device behind VMBus implements and what it is given: `VmbusDevice`, `OpenedChannel`.

Life cycle: `VmbusServer.offer(device)`; each time the guest opens the channel, `open()`; when the guest
closes it, starts a new contact, unloads or dies, and when the host rescinds it, `close()`. `open()` and
`close()` of one channel never overlap. `close()` returns only when nothing of the device touches guest
memory any more: the answers that give the memory back to the guest wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol
from uuid import UUID

from vswitch_wire.gpadl import GpaRange
from vswitch_wire.memory import GuestMemory, Interrupt
from vswitch_wire.vmbus import STATUS_UNSUCCESSFUL


class ChannelRefused(Exception):
    """The device does not open; the guest gets OPENCHANNEL_RESULT with this status (not 0)."""

    def __init__(self, why: str, status: int = STATUS_UNSUCCESSFUL) -> None:
        super().__init__(why)
        self.status = status or STATUS_UNSUCCESSFUL


@dataclass(eq=False, slots=True)
class OpenedChannel:
    """An open channel. The ring: pages 0..downstream_page_offset-1 guest to host, the rest host to guest."""

    relid: int
    open_id: int
    sub_channel_index: int
    memory: GuestMemory
    ring_pfns: list[int]
    downstream_page_offset: int
    doorbell_fd: int
    """Eventfd that the guest (or its SignalEvent hypercall) writes.

    The server's; valid until `close()` returned.
    """
    interrupt: Interrupt
    """Signals the guest; follows the guest's choice of processor by itself."""
    user_data: bytes
    gpadl: Callable[[int], GpaRange]
    """The one range of a GPADL of this channel, held until `release_gpadl` or close. Raises WireError."""
    release_gpadl: Callable[[int], None]
    """The device let go of the GPADL's memory (its buffer was revoked); unknown ids are ignored."""
    report_fault: Callable[[str], None]
    """The guest lied (ring indices, packets): the channel is closed and rescinded.

    From any thread, any number of times.
    """
    offer_sub_channels: Callable[[int], None]
    """Offer sub-channels 1..count behind this primary channel; they vanish when it closes."""
    faults: list[str] = field(default_factory=list)


class VmbusDevice(Protocol):
    """A device that can be offered.

    It may also have `user_data: bytes` (120 at most) and `channel_flags: int` for its offers, and
    `shares_doorbell: bool`: True = its sub-channels' doorbells are the primary channel's, so that one wake-up
    serves all its rings; `abandoned(payload: bytes) -> bytes`: what completes, as failed, a packet that a
    host before this one left uncompleted (nothing: an empty completion).
    """

    class_id: UUID
    instance_id: UUID
    sub_channel_limit: int

    async def open(self, channel: OpenedChannel) -> None:
        """The guest opened the channel. ChannelRefused: it stays closed, and `close()` is not called."""

    async def close(self, channel: OpenedChannel) -> None:
        """Let go of the channel's rings, buffers and fds; returns when nothing touches them any more."""
