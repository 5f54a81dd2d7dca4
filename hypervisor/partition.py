"""A partition: memory, virtual processors, its door, its VMBus; created, attached, detached, resumed,
deleted.

Life cycle: `created` -> `listen()` and start the guest's process with the descriptor -> `attach()` ->
`running` -> (guest dead, door broken) `detached`, channels closed, callbacks called -> `attach()` again
resumes -> `delete()`. Everything runs on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypervisor.agent import AgentRequests, DoorLost, GuestProcess
from hypervisor.clock import deadline
from hypervisor.door import DoorLink
from hypervisor.hypercalls import HypercallFailure, dispatch
from hypervisor.quotas import Quotas
from hypervisor.regions import RegionIdentity
from hypervisor.socket_path import ShortPath
from hypervisor.synic import GeneralProtection, Synic
from hypervisor.vmbus.server import VmbusServer
from vswitch_wire import door, hypercall
from vswitch_wire.engine import guest_codecs, memory_class
from vswitch_wire.errors import WireError
from vswitch_wire.hypercall import HvStatus
from vswitch_wire.memory import GuestMemory, Region

if TYPE_CHECKING:
    from hypervisor.host import Hypervisor

_log = logging.getLogger("hypervisor.partition")

SAVE_VERSION = 1


class PartitionError(RuntimeError):
    """An operation that the partition's state does not allow.

    The message names partition, state and remedy.
    """


class PartitionState(enum.Enum):
    """Where a partition is in its life."""

    CREATED = "created"
    RUNNING = "running"
    PARKED = "parked"
    DETACHED = "detached"
    FINALIZED = "finalized"
    DELETED = "deleted"


class Partition:
    """One partition. Made by `Hypervisor.create_partition()` or `Hypervisor.restore()`."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        partition_id: int,
        name: str,
        *,
        vp_count: int,
        privileges: int,
        quotas: Quotas,
        parent: Partition | None,
        regions: list[Region],
        identities: list[RegionIdentity],
    ) -> None:
        self.id = partition_id
        self.name = name
        self.privileges = privileges
        self.quotas = quotas
        self.parent = parent
        self.children: dict[int, Partition] = {}
        self.state = PartitionState.CREATED
        self.on_detached: list[Callable[[str], None]] = []
        """Called with the reason when the guest died or its door broke, after its channels were closed."""
        self.on_reset: list[Callable[[], None]] = []
        """Called when the guest starts anew, after its channels were closed."""
        self.on_changed: list[Callable[[], None]] = []
        """Called when `save()` would give something else.

        Store it, so that a killed daemon can go on from there.
        """
        self._hypervisor = hypervisor
        self._regions = regions
        self._identities = identities
        self._memory: GuestMemory | None = None
        self._link: DoorLink | None = None
        self._known = not regions
        self._sequence = 0
        self._greeting: asyncio.Future[None] | None = None
        self._hello_sequence = 0
        self._hello_resume = False
        self._parking: dict[int, asyncio.Future[None]] = {}
        self._detaching: asyncio.Task[None] | None = None
        self._detached = asyncio.Event()
        self._resetting = False
        self._deleting = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.codecs = guest_codecs(hypervisor.engine)
        """What reads the guest's control messages."""
        self.synic = Synic(
            vp_count,
            privileges,
            hypervisor.engine,
            hypervisor.clock,
            self._deliver,
            self._changed,
        )
        if regions:
            self._map(regions)
        self.vmbus = VmbusServer(
            name, self.synic, quotas, hypervisor.clock, self._send_eventfd, self._changed, codecs=self.codecs
        )
        self._agent = AgentRequests(self._send_request, self._next_sequence)

    def _map(self, regions: list[Region]) -> None:
        self._memory = memory_class(self._hypervisor.engine)(regions)
        self.synic.memory = self._memory

    @property
    def memory(self) -> GuestMemory:
        """The partition's memory. PartitionError before a restored partition was attached."""
        if self._memory is None:
            raise PartitionError(
                f"partition {self.name}: its memory comes back with attach(), which has not succeeded yet"
            )
        return self._memory

    @property
    def vp_count(self) -> int:
        """Virtual processors."""
        return len(self.synic.processors)

    @property
    def depth(self) -> int:
        """1 for a partition of the root, 2 for its child."""
        return 1 if self.parent is None else self.parent.depth + 1

    @property
    def attached(self) -> bool:
        """Whether a guest's side has answered HELLO and its door is open."""
        return self.state in (PartitionState.RUNNING, PartitionState.PARKED)

    @property
    def door_path(self) -> Path:
        """The listening socket, in the private run directory."""
        return self._hypervisor.run_dir / "doors" / f"{self.id}.sock"

    # --- the door's socket ---

    def listen(self) -> int:
        """Make the door's listening socket.

        Its descriptor is the caller's to pass to the guest's process and close.
        """
        if self.state is not PartitionState.CREATED:
            raise PartitionError(
                f"partition {self.name} is {self.state.value}: only a new one can be started"
            )
        directory = self.door_path.parent
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.door_path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            with ShortPath(self.door_path) as path:
                listener.bind(path)
            listener.listen(4)
        except BaseException:
            listener.close()
            raise
        return listener.detach()

    def _connect(self) -> socket.socket:
        sock = socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        )
        try:
            with ShortPath(self.door_path) as path:
                sock.connect(path)
        except FileNotFoundError:
            sock.close()
            raise PartitionError(
                f"partition {self.name}: no door at {self.door_path}; call listen() first"
            ) from None
        except ConnectionRefusedError:
            sock.close()
            raise PartitionError(
                f"partition {self.name}: its guest has ended; create the partition anew"
            ) from None
        except BlockingIOError:
            sock.close()
            raise PartitionError(f"partition {self.name}: its guest does not accept connections") from None
        except BaseException:
            sock.close()
            raise
        return sock

    async def attach(self, timeout: float = 10.0) -> None:  # noqa: ASYNC109 - the clock is injected
        """Connect to the guest's side: a fresh start, or a resume when it was attached before.

        PartitionError when it cannot be reached or does not know its memory any more; TimeoutError when it
        does not answer.
        """
        if self._link is not None and self._link.closed:
            # Closed already; `door_closed` comes with one of the loop's next turns.
            await self._detached.wait()
        if self._detaching is not None:
            await asyncio.wait({self._detaching})
        if self._deleting:
            raise PartitionError(f"partition {self.name} is being deleted: it cannot be attached")
        if self._link is not None or self.state not in (PartitionState.CREATED, PartitionState.DETACHED):
            raise PartitionError(f"partition {self.name} is {self.state.value}: it cannot be attached")
        sock = self._connect()
        self._detached.clear()
        interrupts = self.synic.new_interrupt_fds()
        self._hello_resume = self._known
        self._hello_sequence = self._next_sequence()
        greeting = self._greeting = asyncio.get_running_loop().create_future()
        # Failing before anyone waits is legal: attach() below is the one who asks.
        greeting.add_done_callback(lambda future: future.cancelled() or future.exception())
        link = self._link = self._hypervisor.doors.open(sock, self.name, self, self.quotas)
        if self._hello_resume:
            link.expect_fds(len(self._identities))
        hello = door.Hello(
            partition_id=self.id,
            vp_count=self.vp_count,
            regions=tuple(door.RegionEntry(entry.gpa, entry.size) for entry in self._identities),
            privileges=self.privileges,
            flags=door.HelloFlags.RESUME if self._hello_resume else door.HelloFlags.NONE,
        )
        memfds = [] if self._hello_resume else [region.fd for region in self._regions]
        link.send(hello, self._hello_sequence, [*memfds, *interrupts])
        try:
            await deadline(
                self._hypervisor.clock, timeout, greeting, f"partition {self.name}: answer to HELLO"
            )
        except BaseException as error:
            link.close(f"no attachment: {error}", door.ErrorCode.STATE)
            await self._detached.wait()
            raise

    # --- what comes through the door ---

    def door_message(self, sequence: int, message: door.DoorMessage, fds: list[int]) -> None:
        """One checked message from the guest's side."""
        link = self._link
        if link is None:
            _close_all(fds)
            return
        if isinstance(message, door.HelloAck):
            self._on_hello_ack(link, sequence, message, fds)
            return
        if fds:
            _close_all(fds)
            raise WireError(f"{message.TYPE.name}: carries descriptors")
        if not self.attached:
            link.close(f"{message.TYPE.name} before HELLO_ACK", door.ErrorCode.STATE)
        elif isinstance(message, door.Hypercall):
            self._on_hypercall(link, sequence, message)
        elif isinstance(message, door.MsrWrite | door.MsrRead):
            self._on_msr(link, sequence, message)
        elif isinstance(message, door.Eom):
            self._on_eom(link, message)
        elif isinstance(message, door.Parked):
            self._on_parked(sequence)
        elif isinstance(message, door.Reset):
            self._on_reset(link, sequence)
        elif isinstance(message, door.Configured):
            self._agent.configured(sequence, message)
        elif isinstance(message, door.ExecStarted):
            self._agent.exec_started(sequence, message)
        elif isinstance(message, door.ExecExit):
            self._agent.exec_exit(sequence, message)

    def _on_hello_ack(self, link: DoorLink, sequence: int, ack: door.HelloAck, fds: list[int]) -> None:
        greeting = self._greeting
        try:
            if greeting is None or greeting.done() or sequence != self._hello_sequence:
                raise WireError("HELLO_ACK: no HELLO waits for it")
            if ack.version != door.DOOR_VERSION:
                self._refuse(link, door.ErrorCode.VERSION, f"door version {ack.version} was not offered")
                return
            if bool(ack.flags & door.HelloFlags.RESUME) != self._hello_resume:
                self._refuse(link, door.ErrorCode.RESUME, "HELLO_ACK and HELLO disagree on resume")
                return
            if self._hello_resume:
                if len(fds) != len(self._identities):
                    text = f"{len(fds)} region descriptors came back, {len(self._identities)} were handed out"
                    self._refuse(link, door.ErrorCode.RESUME, text)
                    return
                try:
                    regions = [entry.check(fd) for entry, fd in zip(self._identities, fds, strict=True)]
                except ValueError as error:
                    self._refuse(link, door.ErrorCode.RESUME, str(error))
                    return
                if self._memory is None:
                    self._regions, fds = regions, []
                    self._map(regions)
        finally:
            _close_all(fds)
        self._known = True
        self.state = PartitionState.RUNNING
        if self._hello_resume:
            self.vmbus.resumed()
        else:
            self.vmbus.attached()
        self._changed()
        greeting.set_result(None)

    def _refuse(self, link: DoorLink, code: door.ErrorCode, text: str) -> None:
        if self._greeting is not None and not self._greeting.done():
            self._greeting.set_exception(PartitionError(f"partition {self.name}: {text}"))
        link.close(text, code)

    def _on_hypercall(self, link: DoorLink, sequence: int, message: door.Hypercall) -> None:
        if self._refuse_while_still(link, "HYPERCALL"):
            return
        if message.vp >= self.vp_count:
            raise WireError(f"HYPERCALL: virtual processor {message.vp} does not exist")
        link.send(dispatch(self, message), sequence)

    def _on_msr(self, link: DoorLink, sequence: int, message: door.MsrWrite | door.MsrRead) -> None:
        if self._refuse_while_still(link, message.TYPE.name):
            return
        try:
            if isinstance(message, door.MsrWrite):
                self.synic.write_msr(message.vp, message.msr, message.value)
                answer = door.MsrResult(False)
            else:
                answer = door.MsrResult(False, self.synic.read_msr(message.vp, message.msr))
        except GeneralProtection:
            answer = door.MsrResult(True)
        link.send(answer, sequence)

    def _refuse_while_still(self, link: DoorLink, what: str) -> bool:
        why = "parked" if self.state is PartitionState.PARKED else "the reset waits for RESET_DONE"
        if self.state is PartitionState.PARKED or self._resetting:
            link.close(f"{what} while {why}", door.ErrorCode.STATE)
            return True
        return False

    def _on_reset(self, link: DoorLink, sequence: int) -> None:
        if not self._refuse_while_still(link, "RESET"):
            self._resetting = True
            self._spawn(self._reset(link, sequence))

    async def _reset(self, link: DoorLink, sequence: int) -> None:
        await self.vmbus.reset()
        if self._link is not link or link.closed:
            # The guest's side asks again on its next connection.
            return
        self.synic.reset()
        self._resetting = False
        self._changed()
        for callback in list(self.on_reset):
            try:
                callback()
            except Exception:
                _log.exception("partition %s: a callback failed", self.name)
        link.send(door.ResetDone(), sequence)

    def _on_eom(self, link: DoorLink, message: door.Eom) -> None:
        if self._resetting:
            link.close("EOM while the reset waits for RESET_DONE", door.ErrorCode.STATE)
            return
        try:
            self.synic.end_of_message(message.vp, message.sint)
        except WireError as error:
            link.close(str(error), door.ErrorCode.STATE)

    def _on_parked(self, sequence: int) -> None:
        parked = self._parking.pop(sequence, None)
        if parked is None:
            raise WireError(f"PARKED: no PARK {sequence} waits for it")
        self.state = PartitionState.PARKED
        if not parked.done():
            parked.set_result(None)

    def door_closed(self, reason: str) -> None:
        """The door is gone."""
        self._link = None
        self._detached.set()
        if self.state is not PartitionState.FINALIZED:
            self.state = PartitionState.DETACHED if self._known else PartitionState.CREATED
        if self._greeting is not None and not self._greeting.done():
            self._greeting.set_exception(PartitionError(f"partition {self.name}: {reason}"))
        for future in self._parking.values():
            if not future.done():
                future.set_exception(DoorLost(reason))
        self._parking.clear()
        self._resetting = False
        self._agent.lost(reason)
        self.synic.door_lost()
        self._detaching = self._spawn(self._detach(reason))

    async def _detach(self, reason: str) -> None:
        try:
            await self.vmbus.detached()
        finally:
            self._detaching = None
        if self._deleting:
            return
        for callback in list(self.on_detached):
            try:
                callback(reason)
            except Exception:
                _log.exception("partition %s: a callback failed", self.name)

    # --- towards the guest ---

    def _next_sequence(self) -> int:
        self._sequence = self._sequence % 0xFFFFFFFF + 1
        return self._sequence

    def _deliver(self, message: door.Deliver) -> bool:
        if self._link is None or self._link.closed or not self.attached:
            return False
        self._link.send(message)
        return True

    def _send_eventfd(self, connection_id: int, fd: int | None) -> None:
        if self._link is not None:
            self._link.send(door.EventFd(connection_id, fd is not None), 0, () if fd is None else (fd,))

    def _send_request(self, message: door.DoorMessage, sequence: int, fds: Sequence[int]) -> None:
        if self._link is None or not self.attached:
            raise PartitionError(f"partition {self.name} is {self.state.value}: it has no open door")
        self._link.send(message, sequence, fds)

    async def configure(
        self,
        config: Mapping[str, Any],
        timeout: float = 30.0,  # noqa: ASYNC109 - the clock is injected
    ) -> None:
        """Give the agent host name, hosts and addresses. AgentError with the agent's text, DoorLost.

        TimeoutError when the agent does not answer: no guest may hold whoever configures it.
        """
        asking = asyncio.ensure_future(self._agent.configure(config))
        try:
            await deadline(
                self._hypervisor.clock, timeout, asking, f"partition {self.name}: answer to CONFIGURE"
            )
        finally:
            asking.cancel()

    async def exec(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        stdin: int,
        stdout: int,
        stderr: int,
        tty: bool = False,
        cwd: str | None = None,
    ) -> GuestProcess:
        """Start a program in the guest; returns when it runs. The descriptors stay the caller's.

        AgentError with the agent's text when it cannot be started, DoorLost.
        """
        return await self._agent.start(argv, env, stdin, stdout, stderr, tty=tty, cwd=cwd)

    async def park(self, timeout: float = 10.0) -> None:  # noqa: ASYNC109 - the clock is injected
        """Stop the guest's virtual processors."""
        sequence = self._next_sequence()
        parked: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._parking[sequence] = parked
        try:
            self._send_request(door.Park(), sequence, ())
            await deadline(self._hypervisor.clock, timeout, parked, f"partition {self.name}: answer to PARK")
        finally:
            self._parking.pop(sequence, None)

    def resume(self) -> None:
        """Run the guest's virtual processors again."""
        if self.state is PartitionState.PARKED:
            self._send_request(door.Resume(), 0, ())
            self.state = PartitionState.RUNNING

    async def shutdown(self, timeout: float = 10.0) -> None:  # noqa: ASYNC109 - the clock is injected
        """Ask the guest to end and wait until its door closed. TimeoutError when it does not."""
        if self._link is not None:
            gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

            def ended(reason: str) -> None:
                if not gone.done():
                    gone.set_result(None)

            self.on_detached.append(ended)
            try:
                self._send_request(door.Shutdown(), 0, ())
                await deadline(self._hypervisor.clock, timeout, gone, f"partition {self.name}: shutdown")
            finally:
                self.on_detached.remove(ended)

    async def delete(self) -> None:
        """Close the door and everything behind it, children first; give memory and socket back."""
        if self.state is PartitionState.DELETED:
            return
        self._deleting = True
        for child in list(self.children.values()):
            await child.delete()
        await self._finalize("the partition is being deleted")
        self.state = PartitionState.DELETED
        await self.vmbus.close()
        self.synic.close()
        if self._memory is not None:
            self._memory.close()
        _close_all([region.fd for region in self._regions])
        self._regions = []
        self.door_path.unlink(missing_ok=True)
        if self.parent is not None:
            self.parent.children.pop(self.id, None)
        self._hypervisor.forget(self)

    async def _finalize(self, reason: str) -> None:
        if self._link is not None:
            self._link.close(reason, door.ErrorCode.GONE)
            await self._detached.wait()
        if self._detaching is not None:
            await asyncio.wait({self._detaching})

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- hypercalls ---

    def post_message(self, connection_id: int, message_type: int, payload: bytes) -> HvStatus:
        """HvCallPostMessage."""
        return self.vmbus.post_message(connection_id, message_type, payload)

    def signal_event(self, connection_id: int) -> HvStatus:
        """HvCallSignalEvent."""
        return self.vmbus.signal_event(connection_id)

    def create_child(self) -> int:
        """HvCallCreatePartition: a partition with memory and a door of its own; its id."""
        if self.depth >= self.quotas.depth:
            raise HypercallFailure(HvStatus.PARTITION_TOO_DEEP)
        if len(self.children) >= self.quotas.children:
            raise HypercallFailure(HvStatus.NO_RESOURCES)
        taken = {partition.name for partition in self._hypervisor.partitions.values()}
        name = next(name for number in itertools.count(1) if (name := f"{self.name}.{number}") not in taken)
        try:
            child = self._hypervisor.new_partition(
                name,
                memory_bytes=self.quotas.child_memory_bytes,
                vp_count=1,
                privileges=self.privileges,
                quotas=self.quotas,
                parent=self,
            )
        except OSError:
            raise HypercallFailure(HvStatus.INSUFFICIENT_MEMORY) from None
        return child.id

    def _child(self, partition_id: int) -> Partition:
        child = self.children.get(partition_id)
        if child is None:
            raise HypercallFailure(HvStatus.INVALID_PARTITION_ID)
        return child

    def finalize_child(self, partition_id: int) -> None:
        """HvCallFinalizePartition: the child's guest is cut off, its channels are closed."""
        child = self._child(partition_id)
        if child.state is PartitionState.FINALIZED:
            raise HypercallFailure(HvStatus.INVALID_PARTITION_STATE)
        child.state = PartitionState.FINALIZED
        child._spawn(child._finalize("the partition was finalized by its parent"))

    def delete_child(self, partition_id: int) -> None:
        """HvCallDeletePartition."""
        child = self._child(partition_id)
        if child.state is not PartitionState.FINALIZED:
            raise HypercallFailure(HvStatus.INVALID_PARTITION_STATE)
        del self.children[partition_id]
        self._spawn(child.delete())

    def property_of(self, partition_id: int, code: int) -> int:
        """HvCallGetPartitionProperty of this partition or of a child."""
        target = self if partition_id == self.id else self._child(partition_id)
        if code == hypercall.HvPartitionPropertyPrivilegeFlags:
            return target.privileges
        if code == hypercall.HvPartitionPropertyReferenceTime:
            return target.synic.reference_time()
        if code == hypercall.HvPartitionPropertyGuestOsId:
            return target.synic.guest_os_id
        raise HypercallFailure(HvStatus.UNKNOWN_PROPERTY)

    # --- save ---

    def _changed(self) -> None:
        for callback in list(self.on_changed):
            callback()

    def restore_state(self, saved: dict[str, Any]) -> None:
        """Registers and VMBus state from `save()`."""
        self.state = PartitionState.DETACHED
        self.synic.restore(saved["synic"])
        self.vmbus.restore(saved["vmbus"])

    def save(self) -> dict[str, Any]:
        """Everything that `Hypervisor.restore()` needs, as plain values (JSON)."""
        return {
            "version": SAVE_VERSION,
            "id": self.id,
            "name": self.name,
            "parent": None if self.parent is None else self.parent.id,
            "vp_count": self.vp_count,
            "privileges": self.privileges,
            "quotas": self.quotas.save(),
            "regions": [entry.save() for entry in self._identities],
            "attached_before": self._known,
            "synic": self.synic.save(),
            "vmbus": self.vmbus.save(),
        }


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
