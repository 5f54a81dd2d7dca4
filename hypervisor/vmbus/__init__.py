"""The host's side of VMBus: connection and channel state machines, GPADLs, the device seam."""

from hypervisor.vmbus.channel import Channel, ChannelState
from hypervisor.vmbus.device import ChannelRefused, OpenedChannel, VmbusDevice
from hypervisor.vmbus.server import Offer, VmbusServer

__all__ = [
    "Channel",
    "ChannelRefused",
    "ChannelState",
    "Offer",
    "OpenedChannel",
    "VmbusDevice",
    "VmbusServer",
]
