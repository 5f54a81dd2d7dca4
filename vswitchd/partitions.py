"""Partitions and what is in them: life cycle of guests, their NICs, and finding them again after a restart.

Each partition has a lock that orders its life: start, stop, delete, NICs. What happens by itself (a guest
ends, a door breaks) is noted at once and settled under that lock.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from hypervisor import Hypervisor, Partition
from vswitch_api.v1 import nic_pb2, partition_pb2
from vswitchd.core import Core, engine_value, new_uid, now
from vswitchd.errors import (
    ApiError,
    already_exists,
    exhausted,
    invalid,
    not_found,
    precondition,
    unavailable,
)
from vswitchd.launcher import GuestProcess, GuestSpec, agent_pid, log_tail
from vswitchd.nics import NicRecord, NicWorkshop, interface_config, require
from vswitchd.resources import check_address, check_id, check_labels, check_mask, parse
from vswitchd.switches import SwitchManager

log = logging.getLogger("vswitchd.partition")

MAX_PARTITIONS = 1024
PAGE = 4096
DEFAULT_MEMORY = 32 << 20
MEMORY_RANGE = range(4 << 20, (1 << 30) + 1)
MAX_VPS = 64
MAX_GRACE_SECONDS = 86400.0
DEFAULT_GRACE_SECONDS = 30.0
MAX_HOSTS = 4096
ATTACH_SECONDS = 20.0
REATTACH_SECONDS = 10.0
STOP_SECONDS = 2.0
MAX_STOP_SECONDS = 60.0
KINDS = {
    partition_pb2.PROCESS_KIND_NETNS: "netns",
}
LINKS = {
    partition_pb2.GUEST_LINK_UNSPECIFIED: "auto",
    partition_pb2.GUEST_LINK_TAP: "tap",
    partition_pb2.GUEST_LINK_VETH: "veth",
}
RUNS = partition_pb2.PARTITION_STATE_RUNNING
STOPPED = partition_pb2.PARTITION_STATE_STOPPED
FAILED = partition_pb2.PARTITION_STATE_FAILED


@dataclass
class PartitionRecord:
    """A partition that exists; `partition` and `guest` while it runs."""

    message: partition_pb2.Partition
    nics: dict[str, NicRecord] = field(default_factory=dict)
    partition: Partition | None = None
    guest: GuestProcess | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def name(self) -> str:
        return self.message.name

    @property
    def id(self) -> str:
        return self.message.name.rpartition("/")[2]

    def describe(self) -> partition_pb2.Partition:
        message = partition_pb2.Partition()
        message.CopyFrom(self.message)
        message.nics.extend(sorted(nic.name for nic in self.nics.values()))
        if self.guest is not None:
            message.pid = self.guest.pid
            message.agent_pid = agent_pid(self.guest.pid)
        return message

    def running(self) -> Partition:
        """The hypervisor's partition; FAILED_PRECONDITION when the guest does not run."""
        if self.partition is None or self.message.state != RUNS:
            detail = f": {self.message.detail}" if self.message.detail else ""
            raise precondition(
                self.name,
                f"{self.name} does not run{detail}",
                reason="NOT_RUNNING",
                remedy=f"start it with `vswitch partition start {self.id}`",
            )
        return self.partition


@dataclass
class Restored:
    """What a daemon found of its predecessor's guests."""

    reattached: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    orphans_ended: int = 0


class PartitionManager:
    """All partitions of the daemon."""

    def __init__(self, core: Core, switches: SwitchManager, hypervisor: Hypervisor) -> None:
        self._core = core
        self._workshop = NicWorkshop(core, switches)
        self._hypervisor = hypervisor
        self._lock = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self._unsaved: set[str] = set()
        self.records: dict[str, PartitionRecord] = {}
        self.restored = Restored()

    # --- looking --------------------------------------------------------------------------------------------

    def find(self, name: str, field_name: str = "name") -> PartitionRecord:
        (partition_id,) = parse(field_name, name, "partitions")
        record = self.records.get(partition_id)
        if record is None:
            raise not_found(name, "see `vswitch partition list`")
        return record

    def of_parent(self, parent: str) -> Sequence[PartitionRecord]:
        """The partition of this name, or all for "partitions/-"."""
        return list(self.records.values()) if parent == "partitions/-" else [self.find(parent, "parent")]

    def find_nic(self, name: str, field_name: str = "name") -> tuple[PartitionRecord, NicRecord]:
        partition_id, _ = parse(field_name, name, "partitions", "nics")
        record = self.find(f"partitions/{partition_id}", field_name)
        return record, require(record.nics, name)

    def snapshot(self) -> Iterator[partition_pb2.Partition | nic_pb2.Nic]:
        for record in self.records.values():
            yield record.describe()
            for nic in record.nics.values():
                yield nic.describe()

    # --- partitions -----------------------------------------------------------------------------------------

    async def create(self, request: partition_pb2.CreatePartitionRequest) -> PartitionRecord:
        message = self._checked(request)
        async with self._lock:
            if request.partition_id in self.records:
                raise already_exists(message.name)
            if len(self.records) >= MAX_PARTITIONS:
                raise exhausted(f"{MAX_PARTITIONS} partitions exist", "delete one that is not needed")
            record = PartitionRecord(message)
            await self._core.save(message)
            self.records[request.partition_id] = record
            self._core.hub.added(record.describe())
        return record

    def _checked(self, request: partition_pb2.CreatePartitionRequest) -> partition_pb2.Partition:
        partition_id = check_id("partition_id", request.partition_id)
        wanted = request.partition
        if wanted.WhichOneof("spec") not in (None, "process"):
            raise invalid("partition.spec", "unknown kind of partition", "use `process`")
        memory = wanted.memory_bytes or DEFAULT_MEMORY
        if memory not in MEMORY_RANGE or memory % PAGE:
            raise invalid(
                "partition.memory_bytes",
                f"{memory} is not a multiple of {PAGE} from {MEMORY_RANGE.start} to {MEMORY_RANGE.stop - 1}",
            )
        if wanted.vp_count > MAX_VPS:
            raise invalid("partition.vp_count", f"{wanted.vp_count} is more than {MAX_VPS}")
        check_labels("partition.labels", wanted.labels)
        process = partition_pb2.ProcessSpec()
        process.CopyFrom(wanted.process)
        process.kind = process.kind or partition_pb2.PROCESS_KIND_NETNS
        if process.kind not in KINDS:
            raise invalid("partition.process.kind", f"unknown value {process.kind}")
        if process.guest_link not in LINKS:
            raise invalid("partition.process.guest_link", f"unknown value {process.guest_link}")
        process.hostname = check_id("partition.process.hostname", process.hostname or partition_id)
        process.engine = engine_value(self._core.engine_of(process.engine, "partition.process.engine"))
        if not process.HasField("grace"):
            process.grace.FromTimedelta(timedelta(seconds=DEFAULT_GRACE_SECONDS))
        grace = process.grace.ToTimedelta().total_seconds()
        if not 0.0 <= grace <= MAX_GRACE_SECONDS:
            raise invalid(
                "partition.process.grace", f"{grace:g} s is not within 0 to {MAX_GRACE_SECONDS:g} s"
            )
        _check_hosts("partition.process.hosts", process)
        return partition_pb2.Partition(
            name=f"partitions/{partition_id}",
            uid=new_uid(),
            memory_bytes=memory,
            vp_count=wanted.vp_count or 1,
            process=process,
            state=STOPPED,
            create_time=now(),
            log_path=str(self._core.config.run_dir.logs / f"{partition_id}.log"),
            labels=wanted.labels,
        )

    async def update(self, request: partition_pb2.UpdatePartitionRequest) -> PartitionRecord:
        record = self.find(request.partition.name, "partition.name")
        check_mask(request.update_mask.paths, ["process.hosts"])
        _check_hosts("partition.process.hosts", request.partition.process)
        async with record.lock:
            record.message.process.ClearField("hosts")
            record.message.process.MergeFrom(partition_pb2.ProcessSpec(hosts=request.partition.process.hosts))
            if record.message.state == RUNS:
                await self._configure(record, record.running())
            await self._save(record)
            self._core.hub.modified(record.describe())
        return record

    async def delete(self, name: str, *, force: bool) -> None:
        record = self.find(name)
        async with record.lock:
            if record.guest is not None:
                if not force:
                    raise precondition(
                        name,
                        f"{name} runs",
                        reason="PARTITION_RUNS",
                        remedy="stop it first, or delete it with `force`",
                    )
                await self._stop(record, STOP_SECONDS, STOPPED, "")
            for nic in list(record.nics.values()):
                await self._workshop.delete(nic, record.nics)
            self.records.pop(record.id, None)
            await self._core.store.delete(record.name)
            self._core.hub.removed(record.describe())

    # --- life -----------------------------------------------------------------------------------------------

    async def start(self, name: str) -> PartitionRecord:
        record = self.find(name)
        async with record.lock:
            if record.message.state == RUNS:
                return record
            self._set_state(record, partition_pb2.PARTITION_STATE_STARTING, "")
            try:
                await self._start(record)
            except BaseException as error:
                words = log_tail(self._log_path(record))
                last = f"; its last words: {words.splitlines()[-1]}" if words else ""
                why = f"{error or type(error).__name__}{last}"
                await asyncio.shield(self._stop(record, 0.0, FAILED, why))
                if isinstance(error, ApiError) or not isinstance(error, Exception):
                    raise
                log.warning("start_failed", extra={"resource": name}, exc_info=error)
                raise unavailable(
                    name,
                    f"{name} did not start: {why}",
                    reason="GUEST_DID_NOT_START",
                    remedy=f"read {record.message.log_path}; `vswitch doctor` checks what guests need",
                ) from error
            self._set_state(record, RUNS, "")
            await self._save(record)
        return record

    async def _start(self, record: PartitionRecord) -> None:
        message = record.message
        partition = await self._hypervisor.create_partition(
            record.id, memory_bytes=message.memory_bytes, vp_count=message.vp_count
        )
        record.partition = partition
        message.partition_id = partition.id
        door = partition.listen()
        try:
            record.guest = await GuestProcess.launch(self._spec(record), door, self._guest_ended(record))
        finally:
            os.close(door)
        # From here on a successor finds the guest, whatever happens to this daemon.
        await self._save(record)
        await self._attach(record, partition, ATTACH_SECONDS)

    async def _attach(self, record: PartitionRecord, partition: Partition, seconds: float) -> None:
        """Offers the NICs, connects the door, has the agent configure what it finds."""
        assert record.guest is not None
        partition.on_detached.append(self._door_lost(record, partition))
        partition.on_changed.append(lambda: self._save_soon(record))
        for nic in record.nics.values():
            await self._workshop.offer(nic, partition)
        attaching = asyncio.create_task(partition.attach(seconds))
        ending: list[asyncio.Future[Any]] = [attaching, record.guest.ended]
        await asyncio.wait(ending, return_when=asyncio.FIRST_COMPLETED)
        if not attaching.done():
            attaching.cancel()
            raise RuntimeError(f"the guest {record.guest.ended.result()}")
        await attaching
        await self._configure(record, partition)

    async def _configure(self, record: PartitionRecord, partition: Partition) -> None:
        process = record.message.process
        document = {
            "hostname": process.hostname,
            "hosts": {name: list(entry.addresses) for name, entry in sorted(process.hosts.items())},
            "interfaces": [interface_config(nic) for _, nic in sorted(record.nics.items())],
        }
        try:
            await partition.configure(document)
        except TimeoutError as error:
            raise unavailable(
                record.name,
                f"{record.name}: its guest does not answer: {error}",
                reason="GUEST_SILENT",
                remedy=f"read {record.message.log_path}; stop it and start it again",
            ) from error

    async def stop(self, name: str, seconds: float | None) -> PartitionRecord:
        record = self.find(name)
        patience = STOP_SECONDS if seconds is None else seconds
        if not 0.0 <= patience <= MAX_STOP_SECONDS:
            raise invalid("timeout", f"{patience:g} s is not within 0 to {MAX_STOP_SECONDS:g} s")
        async with record.lock:
            if record.guest is not None or record.partition is not None:
                self._set_state(record, partition_pb2.PARTITION_STATE_STOPPING, "")
                await self._stop(record, patience, STOPPED, "")
        return record

    async def _stop(
        self,
        record: PartitionRecord,
        patience: float,
        state: partition_pb2.PartitionState.ValueType,
        detail: str,
    ) -> None:
        """Ends the guest and takes the partition apart. The caller holds the record's lock."""
        partition, guest = record.partition, record.guest
        if partition is not None and guest is not None and not guest.ended.done() and patience > 0:
            try:
                await partition.shutdown(patience)
            except Exception as error:
                log.info("shutdown_refused", extra={"resource": record.name, "error": str(error)})
        if guest is not None:
            await guest.end(patience)
            guest.forget()
        record.guest = None
        for nic in record.nics.values():
            nic.offer = None
            nic.device = None
        record.partition = None
        if partition is not None:
            await partition.delete()
        record.message.partition_id = 0
        self._set_state(record, state, detail)
        await self._save(record)
        for nic in record.nics.values():
            self._core.hub.modified(nic.describe())

    # --- NICs -----------------------------------------------------------------------------------------------

    async def create_nic(self, request: nic_pb2.CreateNicRequest, at: str = "") -> NicRecord:
        record = self.find(request.parent, f"{at}parent")
        message = self._workshop.check(at, request, record.name)
        async with record.lock:
            nic = await self._workshop.create(message, record.nics, create_port=request.create_port)
            if record.message.state == RUNS:
                partition = record.running()
                await self._workshop.offer(nic, partition)
                await self._configure(record, partition)
                await self._save(record)
            self._core.hub.modified(record.describe())
        return nic

    async def create_nics(self, requests: Sequence[nic_pb2.CreateNicRequest]) -> list[NicRecord]:
        """All of them, or none."""
        made: list[NicRecord] = []
        try:
            for index, request in enumerate(requests):
                made.append(await self.create_nic(request, f"requests[{index}]."))
        except BaseException:
            for nic in reversed(made):
                await self.delete_nic(nic.name)
            raise
        return made

    async def update_nic(self, request: nic_pb2.UpdateNicRequest) -> NicRecord:
        record, nic = self.find_nic(request.nic.name, "nic.name")
        async with record.lock:
            await self._workshop.set_link(nic, request)
        return nic

    async def delete_nic(self, name: str) -> None:
        record, nic = self.find_nic(name)
        async with record.lock:
            await self._workshop.rescind(nic, record.partition)
            await self._workshop.delete(nic, record.nics)
            if record.message.state == RUNS:
                await self._save(record)
            self._core.hub.modified(record.describe())

    # --- what happens by itself -----------------------------------------------------------------------------

    def _guest_ended(self, record: PartitionRecord) -> Callable[[str], None]:
        def ended(how: str) -> None:
            self._settle(record, f"the guest {how}", "guest_lost")

        return ended

    def _door_lost(self, record: PartitionRecord, partition: Partition) -> Callable[[str], None]:
        def lost(why: str) -> None:
            if record.partition is partition:
                self._settle(record, f"its door is lost: {why}", "door_lost")

        return lost

    def _settle(self, record: PartitionRecord, why: str, kind: str) -> None:
        if record.message.state != RUNS:
            return  # Whoever starts or stops it is looking.
        task = asyncio.create_task(self._settled(record, record.guest, why, kind))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _settled(
        self, record: PartitionRecord, guest: GuestProcess | None, why: str, kind: str
    ) -> None:
        async with record.lock:
            if record.guest is not guest or record.message.state != RUNS:
                return
            if guest is not None and kind == "door_lost":
                # A dying guest's door breaks a moment before its process is seen to end: say the better
                # reason.
                done, _ = await asyncio.wait([guest.ended], timeout=0.5)
                why = f"the guest {guest.ended.result()}" if done else why
                kind = "guest_lost" if done else kind
            self._core.hub.event(kind, record.name, why)
            await self._stop(record, 0.0, FAILED, why)

    def _set_state(
        self, record: PartitionRecord, state: partition_pb2.PartitionState.ValueType, detail: str
    ) -> None:
        record.message.state = state
        record.message.detail = detail
        self._core.hub.modified(record.describe())

    # --- the store ------------------------------------------------------------------------------------------

    def _save_soon(self, record: PartitionRecord) -> None:
        """Stores the hypervisor's state once for all changes of this turn of the loop."""
        if record.name in self._unsaved:
            return
        self._unsaved.add(record.name)
        task = asyncio.create_task(self._save_later(record))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _save_later(self, record: PartitionRecord) -> None:
        await asyncio.sleep(0.05)
        self._unsaved.discard(record.name)
        if record.id in self.records:
            await self._save(record)
            for nic in record.nics.values():
                if nic.has_changed():
                    self._core.hub.modified(nic.describe())

    async def _save(self, record: PartitionRecord) -> None:
        private: dict[str, object] = {}
        if record.partition is not None and record.guest is not None:
            private = {
                "pid": record.guest.pid,
                "started": record.guest.started,
                "saved": record.partition.save(),
            }
        await self._core.save(record.message, private)

    # --- after a restart ------------------------------------------------------------------------------------

    async def restore(self) -> None:
        """Finds the guests of an earlier daemon, side by side; what is gone or does not answer is
        reported.
        """
        rows = await self._core.store.load("partition")
        for row in rows:
            message = partition_pb2.Partition.FromString(row.body)
            record = PartitionRecord(message)
            self.records[record.id] = record
            try:
                for nic in await self._workshop.restore(record.name):
                    record.nics[nic.name.rpartition("/")[2]] = nic
            except ApiError as error:
                self._core.hub.event("nic_lost", record.name, error.message)
        await asyncio.gather(
            *(self._find_again(self.records[row.name.rpartition("/")[2]], row.private) for row in rows)
        )

        doors = {partition.door_path for partition in self._hypervisor.partitions.values()}
        for path in await asyncio.to_thread(lambda: list(self._core.config.run_dir.doors.glob("*.sock"))):
            if path not in doors:
                # Its guest is gone, or was never stored and ends by itself when nobody connects.
                path.unlink(missing_ok=True)

    async def _find_again(self, record: PartitionRecord, private: dict[str, Any]) -> None:
        if not private:
            if record.message.state not in (STOPPED, FAILED):
                self._set_state(record, FAILED, "the daemon ended while it was starting or stopping")
                await self._save(record)
            return
        async with record.lock:
            guest = GuestProcess.find(int(private["pid"]), int(private["started"]), self._guest_ended(record))
            if guest is None:
                self.restored.gone.append(record.name)
                why = "the guest ended while there was no daemon"
                self._core.hub.event("guest_gone", record.name, why)
                self._set_state(record, FAILED, why)
                await self._save(record)
                return
            record.guest = guest
            try:
                record.partition = self._hypervisor.restore(private["saved"])
                await self._attach(record, record.partition, REATTACH_SECONDS)
            except Exception as error:
                why = f"the guest could not be attached again: {error}"
                log.warning("reattach_failed", extra={"resource": record.name}, exc_info=error)
                self.restored.gone.append(record.name)
                self.restored.orphans_ended += 1
                self._core.hub.event("guest_lost", record.name, why)
                await self._stop(record, 0.0, FAILED, why)
                return
            self.restored.reattached.append(record.name)
            self._set_state(record, RUNS, "")
            await self._save(record)
            self._core.hub.event("guest_reattached", record.name, f"pid {guest.pid}")

    async def close(self, *, stop_guests: bool) -> None:
        """Lets go of all guests, which then count their grace period down, or ends them."""
        for task in list(self._background):
            task.cancel()
        if stop_guests:
            await asyncio.gather(*(self._end_for_good(record) for record in self.records.values()))
            return
        for record in self.records.values():
            async with record.lock:
                if record.guest is not None:
                    await self._save(record)
                    record.guest.forget()

    async def _end_for_good(self, record: PartitionRecord) -> None:
        async with record.lock:
            if record.guest is not None:
                await self._stop(record, STOP_SECONDS, STOPPED, "")

    def _spec(self, record: PartitionRecord) -> GuestSpec:
        process = record.message.process
        return GuestSpec(
            name=record.id,
            kind=KINDS[process.kind],
            engine=self._core.engine_of(process.engine, "partition.process.engine"),
            grace_seconds=process.grace.ToTimedelta().total_seconds(),
            link=LINKS[process.guest_link],
            hide=self._core.config.run_dir.root,
            log_path=self._log_path(record),
        )

    def _log_path(self, record: PartitionRecord) -> Path:
        return self._core.config.run_dir.logs / f"{record.id}.log"


def _check_hosts(field_name: str, process: partition_pb2.ProcessSpec) -> None:
    if len(process.hosts) > MAX_HOSTS:
        raise invalid(field_name, f"{len(process.hosts)} names; at most {MAX_HOSTS} are taken")
    for name, entry in process.hosts.items():
        if not name or len(name) > 253 or any(character.isspace() for character in name):
            raise invalid(field_name, f"{name[:80]!r} is not a host name")
        for address in entry.addresses:
            check_address(f"{field_name}[{name}]", address)
