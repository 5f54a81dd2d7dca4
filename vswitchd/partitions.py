"""Partitions and what is in them: life cycle of guests, their NICs, and finding them again after a restart.

Each partition has a lock that orders its life: start, stop, delete, NICs. What happens by itself (a guest
ends, a door breaks) is noted at once and settled under that lock.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypervisor import Hypervisor, Partition
from vswitch_api.v1 import nic_pb2, partition_pb2
from vswitchd import kinds
from vswitchd.core import Core, new_uid, now
from vswitchd.errors import (
    ApiError,
    already_exists,
    exhausted,
    invalid,
    not_found,
    precondition,
    unavailable,
)
from vswitchd.kinds import GuestSide
from vswitchd.kinds.process import check_hosts
from vswitchd.launcher import Ending, GuestProcess, agent_pid, cut_log, exit_status, log_end, log_tail
from vswitchd.nics import NicRecord, NicWorkshop, require
from vswitchd.resources import check_id, check_labels, check_mask, parse
from vswitchd.switches import SwitchManager

log = logging.getLogger("vswitchd.partition")

MAX_PARTITIONS = 1024
ATTACH_SECONDS = 50.0
"""Below the deadline of a client's call. A guest that ends is noticed at once; one on a busy machine
takes its time.
"""
LAST_WORDS_SECONDS = 1.0
REATTACH_SECONDS = 10.0
MAX_STOP_SECONDS = 60.0
LOG_LOOK_SECONDS = 2.0
"""How often the logs of running guests are held to their bound."""
RUNS = partition_pb2.PARTITION_STATE_RUNNING
STOPPED = partition_pb2.PARTITION_STATE_STOPPED
FAILED = partition_pb2.PARTITION_STATE_FAILED


@dataclass
class PartitionRecord:
    """A partition that exists; `partition` and `guest` while it runs."""

    message: partition_pb2.Partition
    side: GuestSide
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

    def describe(self, *, whole: bool = False) -> partition_pb2.Partition:
        """As callers see it; the `whole` has everything that its guest tells of itself."""
        message = partition_pb2.Partition()
        message.CopyFrom(self.message)
        message.nics.extend(sorted(nic.name for nic in self.nics.values()))
        if self.guest is not None:
            message.pid = self.guest.pid
            message.agent_pid = agent_pid(self.guest.pid)
            self.side.describe(message, whole=whole)
        return message

    def nic_messages(self) -> list[nic_pb2.Nic]:
        """Its NICs in the order of their names."""
        return [nic.message for _, nic in sorted(self.nics.items())]

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

    @asynccontextmanager
    async def _held(self, record: PartitionRecord) -> AsyncIterator[None]:
        """The record's lock; NOT_FOUND when the partition was deleted while it was waited for."""
        async with record.lock:
            if self.records.get(record.id) is not record:
                raise not_found(record.name, "see `vswitch partition list`")
            yield

    # --- partitions -----------------------------------------------------------------------------------------

    async def create(self, request: partition_pb2.CreatePartitionRequest) -> PartitionRecord:
        message = await self._checked(request)
        async with self._lock:
            if request.partition_id in self.records:
                raise already_exists(message.name)
            if len(self.records) >= MAX_PARTITIONS:
                raise exhausted(f"{MAX_PARTITIONS} partitions exist", "delete one that is not needed")
            record = self._record(message)
            await self._core.save(message)
            self.records[request.partition_id] = record
            self._core.hub.added(record.describe())
        return record

    def _record(self, message: partition_pb2.Partition) -> PartitionRecord:
        def changed(event: str) -> None:
            record = self.records.get(message.name.rpartition("/")[2])
            if record is not None and record.message is message:
                if event:
                    self._core.hub.event(event, message.name, "")
                self._core.hub.modified(record.describe())
                self._save_soon(record)

        return PartitionRecord(message, kinds.side_of(self._core, message, self._hypervisor.clock, changed))

    async def _checked(self, request: partition_pb2.CreatePartitionRequest) -> partition_pb2.Partition:
        partition_id = check_id("partition_id", request.partition_id)
        wanted = request.partition
        check_labels("partition.labels", wanted.labels)
        # Files are looked at: not on the loop.
        message = await asyncio.to_thread(kinds.checked, self._core, partition_id, wanted)
        message.name = f"partitions/{partition_id}"
        message.uid = new_uid()
        message.state = STOPPED
        message.create_time.CopyFrom(now())
        message.log_path = str(self._core.config.run_dir.logs / f"{partition_id}.log")
        message.labels.update(wanted.labels)
        return message

    async def update(self, request: partition_pb2.UpdatePartitionRequest) -> PartitionRecord:
        record = self.find(request.partition.name, "partition.name")
        check_mask(request.update_mask.paths, ["process.hosts"])
        check_hosts("partition.process.hosts", request.partition.process)
        if record.message.WhichOneof("spec") != "process":
            raise kinds.no_agent(record.message)
        async with self._held(record):
            record.message.process.ClearField("hosts")
            record.message.process.MergeFrom(partition_pb2.ProcessSpec(hosts=request.partition.process.hosts))
            if record.message.state == RUNS:
                await record.side.configure(record.running(), record.nic_messages())
            await self._save(record)
            self._core.hub.modified(record.describe())
        return record

    async def delete(self, name: str, *, force: bool) -> None:
        record = self.find(name)
        async with self._held(record):
            if record.guest is not None:
                if not force:
                    raise precondition(
                        name,
                        f"{name} runs",
                        reason="PARTITION_RUNS",
                        remedy="stop it first, or delete it with `force`",
                    )
                await self._stop(record, record.side.end_seconds, STOPPED, "")
            for nic in list(record.nics.values()):
                await self._workshop.delete(nic, record.nics)
            self.records.pop(record.id, None)
            await self._core.store.delete(record.name)
            self._core.hub.removed(record.describe())

    # --- life -----------------------------------------------------------------------------------------------

    async def start(self, name: str) -> PartitionRecord:
        record = self.find(name)
        async with self._held(record):
            if record.message.state == RUNS:
                return record
            self._set_state(record, partition_pb2.PARTITION_STATE_STARTING, "")
            log_path = Path(record.message.log_path)
            begin = log_end(log_path)
            try:
                await self._start(record)
            except BaseException as error:
                words = log_tail(log_path, begin)
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
            async with record.side.launch(partition, door, record.nic_messages()) as what:
                record.guest = await GuestProcess.launch(what, self._guest_ended(record))
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
        await record.side.offer(partition)
        for nic in record.nics.values():
            await self._workshop.offer(nic, partition)
        attaching = asyncio.create_task(partition.attach(seconds))
        ending: list[asyncio.Future[Any]] = [attaching, record.guest.ended]
        try:
            await asyncio.wait(ending, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            attaching.cancel()
            await asyncio.gather(attaching, return_exceptions=True)
            raise
        if attaching.done() and attaching.exception() is not None:
            # A guest that refuses to start breaks its door a moment before it ends, and says why.
            await asyncio.wait([record.guest.ended], timeout=LAST_WORDS_SECONDS)
        if record.guest.ended.done():
            attaching.cancel()
            raise RuntimeError(f"the guest {record.guest.ended.result()}")
        await attaching
        await record.side.configure(partition, record.nic_messages())

    async def sync_time(self, name: str) -> None:
        """Sets the clock of a virtual machine."""
        record = self.find(name)
        side = kinds.require_kvm(record.message, record.side, "clock of its own")
        record.running()
        await side.sync_time()

    async def stop(self, name: str, seconds: float | None) -> PartitionRecord:
        record = self.find(name)
        patience = record.side.stop_seconds if seconds is None else seconds
        if not 0.0 <= patience <= MAX_STOP_SECONDS:
            raise invalid("timeout", f"{patience:g} s is not within 0 to {MAX_STOP_SECONDS:g} s")
        async with self._held(record):
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
        refused = ""
        if partition is not None and guest is not None and not guest.ended.done() and patience > 0:
            try:
                await record.side.ask_to_end(partition, patience)
            except Exception as error:
                log.info("shutdown_refused", extra={"resource": record.name, "error": str(error)})
                refused = f"it was ended without its own doing: {error or type(error).__name__}"
        if guest is not None:
            if not await guest.end(patience):
                refused = refused or f"it was ended after {patience:g} s in which it did not end by itself"
            guest.forget()
        if state == STOPPED and patience > 0:
            detail = detail or refused
        record.guest = None
        for nic in record.nics.values():
            nic.offer = None
            nic.device = None
        record.partition = None
        if partition is not None:
            await record.side.clear(partition.id)
            await partition.delete()
        record.message.partition_id = 0
        self._set_state(record, state, detail)
        await self._save(record)
        for nic in record.nics.values():
            self._core.hub.modified(nic.describe())

    # --- NICs -----------------------------------------------------------------------------------------------

    async def create_nic(self, request: nic_pb2.CreateNicRequest, at: str = "") -> NicRecord:
        record = self.find(request.parent, f"{at}parent")
        message = self._workshop.check(at, request, record.message)
        async with self._held(record):
            nic = await self._workshop.create(message, record.nics, create_port=request.create_port)
            if record.message.state == RUNS:
                partition = record.running()
                await self._workshop.offer(nic, partition)
                await record.side.configure(partition, record.nic_messages())
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
        async with self._held(record):
            require(record.nics, nic.name, nic)
            await self._workshop.set_link(nic, request)
        return nic

    async def delete_nic(self, name: str) -> None:
        record, nic = self.find_nic(name)
        async with self._held(record):
            require(record.nics, nic.name, nic)
            await self._workshop.rescind(nic, record.partition)
            await self._workshop.delete(nic, record.nics)
            if record.message.state == RUNS:
                await self._save(record)
            self._core.hub.modified(record.describe())

    # --- what happens by itself -----------------------------------------------------------------------------

    def _guest_ended(self, record: PartitionRecord) -> Callable[[Ending], None]:
        def ended(how: Ending) -> None:
            self._settle(record, how)

        return ended

    def _door_lost(self, record: PartitionRecord, partition: Partition) -> Callable[[str], None]:
        def lost(why: str) -> None:
            if record.partition is partition:
                self._settle(record, why)

        return lost

    def _settle(self, record: PartitionRecord, why: Ending | str) -> None:
        if record.message.state != RUNS:
            return  # Whoever starts or stops it is looking.
        self._spawn(self._settled(record, record.guest, why))

    async def _settled(self, record: PartitionRecord, guest: GuestProcess | None, why: Ending | str) -> None:
        """A guest ended, or its door broke for the reason given."""
        async with record.lock:
            if record.guest is not guest or record.message.state != RUNS:
                return
            if guest is not None and isinstance(why, str):
                # A dying guest's door breaks a moment before its process is seen to end: say the better
                # reason.
                done, _ = await asyncio.wait([guest.ended], timeout=0.5)
                why = guest.ended.result() if done else why
            if isinstance(why, str):
                kind, state, text = "door_lost", FAILED, f"its door is lost: {why}"
            else:
                state, text = record.side.verdict(why)
                kind = "guest_ended" if state == STOPPED else "guest_lost"
            self._core.hub.event(kind, record.name, text)
            await self._stop(record, 0.0, state, text)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

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
        self._spawn(self._save_later(record))

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
            record = self._record(message)
            self.records[record.id] = record
            try:
                for nic in await self._workshop.restore(record.name):
                    record.nics[nic.name.rpartition("/")[2]] = nic
            except ApiError as error:
                self._core.hub.event("nic_lost", record.name, error.message)
        await asyncio.gather(
            *(self._find_again(self.records[row.name.rpartition("/")[2]], row.private) for row in rows)
        )

        await self._sweep()
        self._spawn(self._bound_logs())

    async def _sweep(self) -> None:
        """Removes what guests that are gone have left in the run directory, or such as were never stored
        and end by themselves when nobody connects.
        """
        used = {str(partition.id) for partition in self._hypervisor.partitions.values()}
        run_dir = self._core.config.run_dir

        def sweep() -> None:
            for directory in (run_dir.doors, run_dir.consoles):
                for path in directory.glob("*.*"):
                    if path.stem not in used:
                        path.unlink(missing_ok=True)

        await asyncio.to_thread(sweep)

    async def _bound_logs(self) -> None:
        """Holds the logs of running guests to their bound: what a guest says may be without end."""
        while True:
            await asyncio.sleep(LOG_LOOK_SECONDS)
            paths = [Path(record.message.log_path) for record in self.records.values() if record.guest]
            for path in paths:
                await asyncio.to_thread(cut_log, path)

    async def _find_again(self, record: PartitionRecord, private: dict[str, Any]) -> None:
        if not private:
            if record.message.state not in (STOPPED, FAILED):
                self._set_state(record, FAILED, "the daemon ended while it was starting or stopping")
                await self._save(record)
            return
        async with record.lock:
            status_path = record.side.status_path(int(private["saved"]["id"]))
            guest = GuestProcess.find(
                int(private["pid"]), int(private["started"]), self._guest_ended(record), status_path
            )
            if guest is None:
                self.restored.gone.append(record.name)
                state, why = FAILED, "the guest ended while there was no daemon"
                code = exit_status(status_path)
                if code is not None:
                    state, why = record.side.verdict(Ending(code))
                    why += " (while there was no daemon)"
                self._core.hub.event("guest_gone", record.name, why)
                self._set_state(record, state, why)
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
            await self._sweep()
            return
        for record in self.records.values():
            async with record.lock:
                if record.guest is not None:
                    await self._save(record)
                    record.guest.forget()
        await self._sweep()

    @property
    def any_runs(self) -> bool:
        """Whether a guest lives on when this daemon ends."""
        return any(record.guest is not None for record in self.records.values())

    async def _end_for_good(self, record: PartitionRecord) -> None:
        async with record.lock:
            if record.guest is not None:
                await self._stop(record, record.side.end_seconds, STOPPED, "")
