"""Virtual machines: the VMM (`vswitch-vmm`) behind the door, its console, and what its guest tells of
itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path

from hypervisor import Partition
from hypervisor.clock import Clock
from hypervisor.integration import HeartbeatState, IntegrationError, IntegrationServices
from vswitch_api.v1 import nic_pb2, partition_pb2
from vswitch_native import vmm
from vswitchd.console import Console
from vswitchd.core import Core
from vswitchd.errors import ApiError, invalid, precondition
from vswitchd.kinds import command_line, images
from vswitchd.kinds.images import ImageProblem
from vswitchd.kinds.limits import checked_grace
from vswitchd.launcher import Ending, Launch, environment, log_tail
from vswitchd.resources import check_id

DEFAULT_MEMORY = 256 << 20
MEMORY_RANGE = range(16 << 20, (64 << 30) + 1)
MAX_HOST_CPUS = 4096

ANSWER_SECONDS = 10.0
"""How long a guest's kernel may take to agree to a shutdown."""
TELL_SECONDS = 0.5
MAX_VALUES = 64
MAX_TEXT = 512
HEARTBEATS = {
    HeartbeatState.UNKNOWN: partition_pb2.HEARTBEAT_STATE_UNSPECIFIED,
    HeartbeatState.OK: partition_pb2.HEARTBEAT_STATE_OK,
    HeartbeatState.LOST: partition_pb2.HEARTBEAT_STATE_LOST,
}

# Exit statuses of the VMM (native/vmm/README.md).
POWERED_OFF, REFUSED, CRASHED, GRACE_OVER, TERMINATED, FAULT = 0, 1, 3, 4, 5, 6
SPEAKS = "vswitch-vmm: "
"""What the VMM begins its own last words with, behind whatever its guest has written."""


def check(core: Core, partition_id: str, wanted: partition_pb2.KvmSpec) -> partition_pb2.KvmSpec:
    """The specification complete with defaults; its files must be there now already. INVALID_ARGUMENT."""
    spec = partition_pb2.KvmSpec()
    spec.CopyFrom(wanted)
    if not spec.kernel:
        raise invalid("partition.kvm.kernel", "missing", f"give {images.BZIMAGE}")
    for field, path, opener in (
        ("kernel", spec.kernel, images.open_kernel),
        ("initrd", spec.initrd, images.open_initrd),
    ):
        if path:
            try:
                os.close(opener(path))
            except ImageProblem as problem:
                raise invalid(f"partition.kvm.{field}", str(problem), problem.remedy) from None
    wrong = command_line.problem(spec.cmdline)
    if wrong:
        raise invalid("partition.kvm.cmdline", wrong)
    spec.hostname = check_id("partition.kvm.hostname", spec.hostname or partition_id)
    cpus = sorted(set(spec.host_cpus))
    missing = [cpu for cpu in cpus if cpu not in os.sched_getaffinity(0)]
    if missing:
        there = ",".join(map(str, sorted(os.sched_getaffinity(0))[:MAX_HOST_CPUS]))
        raise invalid(
            "partition.kvm.host_cpus", f"the daemon may not run on CPU {missing[0]}", f"choose of {there}"
        )
    del spec.host_cpus[:]
    spec.host_cpus.extend(cpus)
    grace = checked_grace("partition.kvm.grace", wanted.grace if wanted.HasField("grace") else None)
    spec.grace.CopyFrom(grace)
    return spec


class KvmGuest:
    """The guest's side of a virtual machine."""

    stop_seconds = 20.0
    end_seconds = 5.0

    def __init__(
        self,
        core: Core,
        message: partition_pb2.Partition,
        clock: Clock,
        changed: Callable[[str], None],
    ) -> None:
        self._core = core
        self._message = message
        self._clock = clock
        self._changed = changed
        self._event = ""
        self._telling: asyncio.TimerHandle | None = None
        self._services: IntegrationServices | None = None
        self.console = Console()

    # --- the start ------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def launch(
        self, partition: Partition, door: int, nics: Sequence[nic_pb2.Nic]
    ) -> AsyncIterator[Launch]:
        program = await asyncio.to_thread(vmm.find)
        if program is None:
            raise precondition(
                self._message.name,
                f"{self._message.name} needs a virtual machine monitor: {vmm.why()}",
                reason="NO_VMM",
                remedy="`vswitch doctor` says what this machine lacks for virtual machines",
            )
        spec = self._message.kvm
        line = self._command_line(nics)
        status_path = self.status_path(partition.id)
        with contextlib.ExitStack() as held:

            def hold(fd: int) -> int:
                if fd >= 0:
                    held.callback(os.close, fd)
                return fd

            kernel, initrd = map(hold, await self._images())
            self.console = Console(self._console_path(partition.id))
            console = hold(self.console.listen())
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            status = hold(os.open(status_path, flags, 0o600))
            argv = [sys.executable, "-P", "-m", "vswitch_confine.enclosure"]
            argv += ["--cover", str(self._core.config.run_dir.root), "--status-fd", str(status), "--"]
            argv += [str(program.absolute()), "--name", partition.name, "--kernel-fd", str(kernel)]
            if initrd >= 0:
                argv += ["--initrd-fd", str(initrd)]
            argv += ["--cmdline", line, "--console-fd", str(console)]
            argv += ["--grace", f"{spec.grace.ToTimedelta().total_seconds():g}"]
            if spec.host_cpus:
                argv += ["--host-cpus", ",".join(map(str, spec.host_cpus))]
            fds = (door, kernel, console, status, *((initrd,) if initrd >= 0 else ()))
            self._message.ClearField("guest")
            self._message.guest.boots = 1
            yield Launch(argv, environment(door), fds, Path(self._message.log_path), status_path)

    def _command_line(self, nics: Sequence[nic_pb2.Nic]) -> str:
        line = command_line.build(self._message.kvm.cmdline, self._message.kvm.hostname, nics)
        wrong = command_line.problem(line)
        if wrong:
            raise self._refused(
                f"its command line, with host name and NICs added, does not fit: {wrong}",
                "shorten it, or give its NICs fewer addresses",
            )
        return line

    async def _images(self) -> tuple[int, int]:
        """`_open_images` beside the loop."""
        opening = asyncio.ensure_future(asyncio.to_thread(self._open_images))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            # The thread goes on, and nobody takes what it opens.
            opening.add_done_callback(_close_images)
            raise

    def _open_images(self) -> tuple[int, int]:
        """Kernel and RAM disk, -1 for none."""
        spec = self._message.kvm
        held: list[int] = []
        try:
            held.append(images.open_kernel(spec.kernel))
            if spec.initrd:
                held.append(images.open_initrd(spec.initrd))
            total = sum(map(images.size_of, held))
            memory = self._message.memory_bytes
            if total >= memory:
                raise ImageProblem(
                    f"kernel and initrd have {total >> 20} MiB and its memory {memory >> 20} MiB",
                    "give it more memory (--memory)",
                )
        except BaseException as error:
            for fd in held:
                os.close(fd)
            if isinstance(error, ImageProblem):
                raise self._refused(str(error), error.remedy) from None
            raise
        return held[0], held[1] if spec.initrd else -1

    def _refused(self, why: str, remedy: str) -> ApiError:
        name = self._message.name
        return precondition(name, f"{name} cannot start: {why}", reason="CANNOT_BOOT", remedy=remedy)

    def _console_path(self, partition_id: int) -> Path:
        return self._core.config.run_dir.consoles / f"{partition_id}.sock"

    def status_path(self, partition_id: int) -> Path:
        return self._core.config.run_dir.consoles / f"{partition_id}.exit"

    # --- the run --------------------------------------------------------------------------------------------

    async def offer(self, partition: Partition) -> None:
        self.console = Console(self._console_path(partition.id))
        partition.on_reset.append(self._rebooted)
        self._services = IntegrationServices(partition, self._clock)
        self._services.on_changed.append(self._told)
        await self._services.offer()

    def _rebooted(self) -> None:
        self._message.guest.boots += 1
        self._event = "guest_rebooted"
        self._told()

    def _told(self) -> None:
        """The guest told something of itself: watchers hear of it, however often it does."""
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(TELL_SECONDS, self._tell)

    def _tell(self) -> None:
        event, self._event, self._telling = self._event, "", None
        self._changed(event)

    async def configure(self, partition: Partition, nics: Sequence[nic_pb2.Nic]) -> None:
        """Nothing: a stock kernel has its command line, and its NICs speak for themselves."""

    async def ask_to_end(self, partition: Partition, seconds: float) -> None:
        """Through its shutdown service, so that its init runs its hooks; else the VMM is told to end."""
        try:
            await self._integration().shutdown(seconds=min(seconds, ANSWER_SECONDS))
        except IntegrationError:
            await partition.shutdown(min(seconds, ANSWER_SECONDS))
            raise

    async def sync_time(self) -> None:
        """Sets the guest's clock. FAILED_PRECONDITION when it has no driver for that."""
        try:
            await self._integration().sync_time()
        except IntegrationError as error:
            raise precondition(
                self._message.name,
                f"{self._message.name}: its clock cannot be set: {error}",
                reason="NO_TIME_SERVICE",
                remedy="load hv_utils in the guest",
            ) from None

    def _integration(self) -> IntegrationServices:
        if self._services is None:
            raise IntegrationError("it does not run")
        return self._services

    def verdict(self, ending: Ending) -> tuple[partition_pb2.PartitionState.ValueType, str]:
        if ending.code == POWERED_OFF:
            return partition_pb2.PARTITION_STATE_STOPPED, "the guest powered off"
        if ending.code == CRASHED:
            why = "the guest crashed; its last words are in its log"
        elif ending.code == GRACE_OVER:
            why = "the guest ended: no daemon had come back to it in time"
        elif ending.code == TERMINATED:
            why = "its virtual machine monitor was told to end by a signal"
        else:
            why = f"its virtual machine monitor {ending}"
            if ending.code in (REFUSED, FAULT):
                why += self._last_words()
        return partition_pb2.PARTITION_STATE_FAILED, why

    def _last_words(self) -> str:
        """What the VMM said last of itself, behind a colon."""
        _, spoke, words = log_tail(Path(self._message.log_path)).rpartition(SPEAKS)
        line = " ".join(words.split())[:MAX_TEXT]
        # The guest writes into the same log.
        return f": {''.join(filter(str.isprintable, line))}" if spoke and line else ""

    def describe(self, message: partition_pb2.Partition, *, whole: bool) -> None:
        services, guest = self._services, message.guest
        if services is None:
            return
        guest.heartbeat = HEARTBEATS[services.heartbeat_state]
        if services.heartbeat is not None:
            guest.heartbeat_time.FromDatetime(services.heartbeat)
        values = {key[:MAX_TEXT]: value[:MAX_TEXT] for key, value in services.guest_info.items()}
        guest.os = " ".join(filter(None, (values.get("OSName"), values.get("OSVersion"))))
        # What Linux' daemon says instead of a name that does not resolve inside (tools/hv/hv_kvp_daemon.c).
        hostname = values.get("FullyQualifiedDomainName", "")
        guest.hostname = "" if hostname.startswith("getaddrinfo failed") else hostname
        for key in ("NetworkAddressIPv4", "NetworkAddressIPv6"):
            guest.addresses.extend(filter(None, values.get(key, "").split(";")))
        guest.services.update(services.versions)
        if whole:
            guest.values.update(islice(values.items(), MAX_VALUES))

    async def clear(self, partition_id: int) -> None:
        self.console.close("the guest has ended")
        self.console = Console()
        services, self._services = self._services, None
        if services is not None:
            await services.close()
        # Last: services that go away tell that they have.
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        for path in (self._console_path(partition_id), self.status_path(partition_id)):
            path.unlink(missing_ok=True)


def _close_images(opening: asyncio.Future[tuple[int, int]]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        for fd in opening.result():
            if fd >= 0:
                os.close(fd)
