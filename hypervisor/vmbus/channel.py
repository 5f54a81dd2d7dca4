"""One channel of a partition: its state, and its life from OPENCHANNEL to the device's `close()`."""

from __future__ import annotations

import asyncio
import enum
import os
from dataclasses import dataclass, field
from uuid import UUID

from hypervisor.synic import BoundInterrupt
from hypervisor.vmbus.abandoned import OpenRings
from hypervisor.vmbus.device import OpenedChannel, VmbusDevice
from vswitch_wire import vmbus

ChannelKey = tuple[UUID, UUID, int]

# Above the fixed connection ids 1..4 and the message connection of VERSION_RESPONSE, within 24 bits.
CONNECTION_ID_BASE = 0x10000


class ChannelState(enum.Enum):
    """What the guest did with the channel; whether it is rescinded is apart (`Channel.revoked`)."""

    CLOSED = "closed"
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"


@dataclass(eq=False, slots=True)
class Channel:
    """A channel that has a relid. `device` is None for one that a restored partition knows from before."""

    relid: int
    class_id: UUID
    instance_id: UUID
    sub_channel_index: int
    device: VmbusDevice | None
    state: ChannelState = ChannelState.CLOSED
    offered: bool = False
    """The guest knows the relid: it got OFFERCHANNEL and has not released it."""
    revoking: asyncio.Future[None] | None = None
    """The host is taking the channel away: nothing is opened any more. Done when it has."""
    revoked: bool = False
    """RESCIND was sent; waiting for RELID_RELEASED."""
    withheld: str = ""
    """Why the channel is not offered again before the guest's next contact; empty when it is."""
    opened: OpenedChannel | None = None
    interrupt: BoundInterrupt | None = None
    rings: OpenRings | None = None
    """As the guest opened it last, until it closes it: also while the door is lost, and for the next host."""
    reopen: vmbus.OpenChannel | None = None
    task: asyncio.Task[None] | None = None
    faults: list[str] = field(default_factory=list)
    """Why the guest lost it, newest last, at most 16."""

    @property
    def key(self) -> ChannelKey:
        """What stays the same when the device is offered again."""
        return self.class_id, self.instance_id, self.sub_channel_index

    @property
    def leaving(self) -> bool:
        """Not open, or not for long: nothing may begin that outlives it, such as a sub-channel."""
        open_ = self.state in (ChannelState.OPENING, ChannelState.OPEN)
        return not open_ or self.revoking is not None or self.revoked

    @property
    def connection_id(self) -> int:
        """What the guest signals."""
        return CONNECTION_ID_BASE + self.relid

    def offer_message(self) -> vmbus.OfferChannel:
        """OFFERCHANNEL for this channel."""
        return vmbus.OfferChannel(
            class_id=self.class_id,
            instance_id=self.instance_id,
            relid=self.relid,
            connection_id=self.connection_id,
            sub_channel_index=self.sub_channel_index,
            flags=vmbus.VMBUS_CHANNEL_ENUMERATE_DEVICE_INTERFACE | getattr(self.device, "channel_flags", 0),
            user_data=getattr(self.device, "user_data", b"").ljust(vmbus.USER_DATA_SIZE, b"\0"),
        )

    def drop_resources(self) -> None:
        """Give back what `open` took; the device has let go of it."""
        if self.interrupt is not None:
            self.interrupt.close()
            self.interrupt = None
        if self.opened is not None:
            os.close(self.opened.doorbell_fd)
            self.opened = None
