"""What differs between the kinds of guest: how one is started, told its configuration, asked to end, and
judged.

Everything else (doors, NICs, the store, finding guests again) is the same for all and lives in
`vswitchd.partitions`. A kind here is a folder's module with a `check` for requests and a class that is a
`GuestSide`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from hypervisor import Partition
from hypervisor.clock import Clock
from vswitch_api.v1 import nic_pb2, partition_pb2
from vswitchd.core import Core
from vswitchd.errors import ApiError, invalid, precondition
from vswitchd.kinds import kvm, process
from vswitchd.launcher import Ending, Launch

__all__ = ["GuestSide", "checked", "no_agent", "require_kvm", "side_of"]

PAGE = 4096
MAX_VPS = 64

Verdict = tuple[partition_pb2.PartitionState.ValueType, str]


class GuestSide(Protocol):
    """One partition's guest, running or not."""

    stop_seconds: float
    """What StopPartition gives it to end by itself, unless the caller says otherwise."""
    end_seconds: float
    """The same, when it goes together with something else: deleted by force, or with the daemon."""

    def launch(
        self, partition: Partition, door: int, nics: Sequence[nic_pb2.Nic]
    ) -> AbstractAsyncContextManager[Launch]:
        """What to start; descriptors made for it are closed at the block's end. ApiError when it cannot
        start.
        """

    def status_path(self, partition_id: int) -> Path | None:
        """Where the keeper of the guest with this hypervisor's id writes its exit status."""

    async def offer(self, partition: Partition) -> None:
        """Before the door is attached, at a start and after a restart of the daemon: devices of the
        kind's own.
        """

    async def configure(self, partition: Partition, nics: Sequence[nic_pb2.Nic]) -> None:
        """Tells a running guest its names and addresses, where that goes through the door."""

    async def ask_to_end(self, partition: Partition, seconds: float) -> None:
        """Asks it to end within `seconds`; an exception says why it could not be asked."""

    def verdict(self, ending: Ending) -> Verdict:
        """State and words for a guest that ended without being told to."""

    def describe(self, message: partition_pb2.Partition, *, whole: bool) -> None:
        """Fills in what only the running guest's side knows; long things where the `whole` is asked for."""

    async def clear(self, partition_id: int) -> None:
        """The guest has ended: forgets what was its run's."""


def side_of(
    core: Core, message: partition_pb2.Partition, clock: Clock, changed: Callable[[str], None]
) -> GuestSide:
    """The guest's side of a partition. `changed` is told when what it describes has; its argument names
    an event for watchers, or is empty.
    """
    if message.WhichOneof("spec") == "kvm":
        return kvm.KvmGuest(core, message, clock, changed)
    return process.ProcessGuest(core, message)


def checked(core: Core, partition_id: str, wanted: partition_pb2.Partition) -> partition_pb2.Partition:
    """Specification, memory and processors of a new partition, complete with defaults. INVALID_ARGUMENT."""
    spec = wanted.WhichOneof("spec")
    made = partition_pb2.Partition()
    if spec == "kvm":
        made.kvm.CopyFrom(kvm.check(core, partition_id, wanted.kvm))
        memory, memory_range = wanted.memory_bytes or kvm.DEFAULT_MEMORY, kvm.MEMORY_RANGE
    else:
        made.process.CopyFrom(process.check(core, partition_id, wanted.process))
        memory, memory_range = wanted.memory_bytes or process.DEFAULT_MEMORY, process.MEMORY_RANGE
    if memory not in memory_range or memory % PAGE:
        raise invalid(
            "partition.memory_bytes",
            f"{memory} is not a multiple of {PAGE} from {memory_range.start} to {memory_range.stop - 1}",
            "give it in whole MiB, for example 256M",
        )
    if wanted.vp_count > MAX_VPS:
        raise invalid("partition.vp_count", f"{wanted.vp_count} is more than {MAX_VPS}")
    made.memory_bytes = memory
    made.vp_count = wanted.vp_count or 1
    return made


def no_agent(message: partition_pb2.Partition) -> ApiError:
    """A virtual machine is asked for something that only an agent can do."""
    leaf = message.name.rpartition("/")[2]
    return precondition(
        message.name,
        f"{message.name} is a virtual machine: no agent of ours runs in it",
        reason="NO_AGENT",
        remedy=f"use `vswitch partition console {leaf}`, or ssh into it",
    )


def require_kvm(message: partition_pb2.Partition, side: GuestSide, what: str) -> kvm.KvmGuest:
    """The side of a virtual machine; FAILED_PRECONDITION for another kind, which lacks `what`."""
    if isinstance(side, kvm.KvmGuest):
        return side
    leaf = message.name.rpartition("/")[2]
    raise precondition(
        message.name,
        f"{message.name} is a process partition: it has no {what}",
        reason="NOT_A_VIRTUAL_MACHINE",
        remedy=f"run commands in it: `vswitch partition exec {leaf} -- sh`",
    )
