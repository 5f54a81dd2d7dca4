"""What a switch port is connected to: frames with offload metadata, and the endpoint that yields and takes
them.

Life cycle: an endpoint is made by whoever owns the NIC, given to `Datapath.attach`, polled while it has work,
and let go of by `Datapath.detach`, after whose return the datapath touches neither the endpoint nor any
memory
behind it.

Threads: the Python engine calls an endpoint on the asyncio loop, the native engine on its worker thread
(`native/switch/src/endpoint.rs` is the same interface there). No call may block.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol, runtime_checkable

from vswitch.drops import DropReason

__all__ = ["NO_OFFLOAD", "Checksum", "Endpoint", "Frame", "Offload"]


class Checksum(IntEnum):
    """What is known of a checksum field in the frame."""

    NONE = 0
    """Nothing: the field holds what the sender wrote; whoever cares must verify it."""
    PARTIAL = 1
    """The sender left it to the device: the field holds at most the pseudo-header's sum and must be
    completed."""
    GOOD = 2
    """Verified or never at risk: a receiver need not look."""


@dataclass(frozen=True, slots=True)
class Offload:
    """Offload metadata that travels with a frame from one NIC to the next."""

    checksum: Checksum = Checksum.NONE
    """The TCP or UDP checksum."""
    ip_checksum: bool = False
    """The IPv4 header checksum is to be filled in by whoever completes the frame."""
    l4_offset: int = 0
    """Bytes from the frame's start to the transport header; 0 = find it by parsing."""
    mss: int = 0
    """TCP payload bytes per segment of a large send; 0 = an ordinary frame."""


NO_OFFLOAD = Offload()


@dataclass(slots=True)
class Frame:
    """One Ethernet frame without FCS, VLAN tag beside it (`vlan_tci`) or in it, as the sender gave it."""

    data: bytes | bytearray
    offload: Offload = NO_OFFLOAD
    vlan_tci: int | None = None
    """The 802.1Q tag control information that travels out of band (16 bits), or None."""
    hash: int | None = None
    """The sender's RSS hash of the flow (32 bits), if it gave one."""


@runtime_checkable
class Endpoint(Protocol):
    """A port's other side for the Python engine. All calls are non-blocking and come from the loop's
    thread."""

    @property
    def wake_fd(self) -> int:
        """An eventfd that becomes readable when the guest has signalled; the engine clears it."""
        ...

    def receive(self, limit: int) -> list[Frame]:
        """Takes up to `limit` frames that the guest sent; none means: nothing more now.

        An endpoint whose guest breaks the rules reports that itself and yields nothing from then on; it
        never raises.
        """
        ...

    def take_drops(self) -> dict[DropReason, int]:
        """Frames that the endpoint itself dropped on their way in since the last call (malformed ones,
        say)."""
        ...

    def transmit(self, frame: Frame) -> DropReason | None:
        """Hands `frame` towards the guest; the reason if it could not be taken (no buffer, link down,
        filter)."""
        ...

    def flush(self) -> None:
        """After a batch: publish rings, send completions for what `receive` returned, signal the guest if
        due."""
        ...

    def rearm(self) -> bool:
        """Asks to be woken for the next frame; True = work arrived meanwhile and there may be no wake-up
        for it."""
        ...
