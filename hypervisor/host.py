"""The hypervisor: creates, keeps and restores partitions. In-process use needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypervisor import privileges as privilege_masks
from hypervisor.clock import Clock, SystemClock
from hypervisor.door import AsyncioDoors, DoorBackend
from hypervisor.native_door import NativeDoors
from hypervisor.partition import SAVE_VERSION, Partition, PartitionError
from hypervisor.quotas import Quotas
from hypervisor.regions import RegionIdentity, create_regions
from vswitch_wire import door
from vswitch_wire.engine import Engine, check_engine

ROOT_PARTITION_ID = 1
"""The host itself; partitions count from 2."""


class Hypervisor:
    """All partitions of one host process. Make it on the event loop that will run it."""

    def __init__(
        self,
        *,
        engine: Engine,
        run_dir: Path,
        clock: Clock | None = None,
        doors: DoorBackend | None = None,
    ) -> None:
        """`run_dir` holds the doors' sockets and must be private to this user.

        RuntimeError if the engine cannot run.
        """
        self.engine = check_engine(engine)
        self.run_dir = run_dir
        self.clock: Clock = clock or SystemClock()
        self.doors: DoorBackend = doors or _doors_of(engine, clock)
        self.partitions: dict[int, Partition] = {}
        self.on_created: list[Callable[[Partition], None]] = []
        """Called for every partition, also those that a guest creates by hypercall."""
        self._last_id = ROOT_PARTITION_ID
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def create_partition(
        self,
        name: str,
        *,
        memory_bytes: int,
        vp_count: int = 1,
        privileges: int = privilege_masks.GUEST,
        quotas: Quotas | None = None,
        parent: Partition | None = None,
    ) -> Partition:
        """A new partition; `listen()`, start the guest, `attach()`.

        ValueError for a taken name or impossible sizes.
        """
        return self.new_partition(
            name,
            memory_bytes=memory_bytes,
            vp_count=vp_count,
            privileges=privileges,
            quotas=quotas or Quotas(),
            parent=parent,
        )

    def new_partition(
        self,
        name: str,
        *,
        memory_bytes: int,
        vp_count: int,
        privileges: int,
        quotas: Quotas,
        parent: Partition | None,
    ) -> Partition:
        """`create_partition()` without waiting."""
        if any(partition.name == name for partition in self.partitions.values()):
            raise ValueError(f"partition {name} exists; delete it first or choose another name")
        if not 1 <= vp_count <= door.MAX_VPS:
            raise ValueError(f"partition {name}: {vp_count} virtual processors, choose 1 to {door.MAX_VPS}")
        regions = create_regions(name, memory_bytes)
        try:
            partition = Partition(
                self,
                self._next_id(),
                name,
                vp_count=vp_count,
                privileges=privileges,
                quotas=quotas,
                parent=parent,
                regions=regions,
                identities=[RegionIdentity.of(region) for region in regions],
            )
        except BaseException:
            for region in regions:
                os.close(region.fd)
            raise
        self._add(partition)
        return partition

    def restore(self, saved: dict[str, Any]) -> Partition:
        """A partition from `Partition.save()` of an earlier process. Offer its devices again, then
        `attach()`.

        ValueError for another save version, or when its parent was not restored before it.
        """
        if saved["version"] != SAVE_VERSION:
            raise ValueError(
                f"partition {saved.get('name')}: saved with version {saved['version']}, not {SAVE_VERSION}"
            )
        if not saved["attached_before"]:
            raise ValueError(
                f"partition {saved['name']} was never attached: its memory is gone, create it anew"
            )
        if saved["id"] in self.partitions:
            raise ValueError(f"partition {saved['name']}: id {saved['id']} is taken")
        parent = None if saved["parent"] is None else self.partitions.get(saved["parent"])
        if saved["parent"] is not None and parent is None:
            raise ValueError(f"partition {saved['name']}: restore its parent {saved['parent']} first")
        partition = Partition(
            self,
            saved["id"],
            saved["name"],
            vp_count=saved["vp_count"],
            privileges=saved["privileges"],
            quotas=Quotas.restore(saved["quotas"]),
            parent=parent,
            regions=[],
            identities=[RegionIdentity.restore(entry) for entry in saved["regions"]],
        )
        partition.restore_state(saved)
        self._last_id = max(self._last_id, partition.id)
        self._add(partition)
        return partition

    def _add(self, partition: Partition) -> None:
        self.partitions[partition.id] = partition
        if partition.parent is not None:
            partition.parent.children[partition.id] = partition
        for callback in list(self.on_created):
            callback(partition)

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def forget(self, partition: Partition) -> None:
        """The partition was deleted."""
        self.partitions.pop(partition.id, None)

    def partition(self, name: str) -> Partition:
        """The partition of this name. PartitionError when there is none."""
        for entry in self.partitions.values():
            if entry.name == name:
                return entry
        raise PartitionError(f"partition {name} does not exist")

    async def close(self) -> None:
        """Delete all partitions. A daemon that restarts and wants its guests back just ends instead."""
        for partition in list(self.partitions.values()):
            await partition.delete()
        await self.doors.close()


def _doors_of(engine: Engine, clock: Clock | None) -> DoorBackend:
    """The engine's own doors; the native thread keeps real time, so an injected clock gets the twin."""
    if engine == "native" and clock is None:
        return NativeDoors()
    return AsyncioDoors(clock)
