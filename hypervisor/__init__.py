"""Partitions and what the hypervisor gives them: memory, a door, hypercalls, a SynIC, VMBus."""

from hypervisor.agent import AgentError, DoorLost, GuestProcess
from hypervisor.clock import Clock, ManualClock, SystemClock
from hypervisor.host import Hypervisor
from hypervisor.partition import Partition, PartitionError, PartitionState
from hypervisor.quotas import Quotas
from hypervisor.vmbus import ChannelRefused, ChannelState, Offer, OpenedChannel, VmbusDevice, VmbusServer

__all__ = [
    "AgentError",
    "ChannelRefused",
    "ChannelState",
    "Clock",
    "DoorLost",
    "GuestProcess",
    "Hypervisor",
    "ManualClock",
    "Offer",
    "OpenedChannel",
    "Partition",
    "PartitionError",
    "PartitionState",
    "Quotas",
    "SystemClock",
    "VmbusDevice",
    "VmbusServer",
]
