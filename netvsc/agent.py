"""The agent of a netns guest: PID 1 inside, host's counterpart of the door, owner of the interfaces.

Life: wait for the daemon to connect to the door, contact VMBus, bring up what is offered, obey CONFIGURE,
EXEC, KILL and SHUTDOWN. When the door is lost the carriers go off and everything runs on; a daemon that
connects again finds memory and interfaces as they were. Without a door for `grace` seconds the agent
exits, and with PID 1 everything inside ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from netvsc import confinement
from netvsc import link as links
from netvsc.datapath import DataPath, DataPathProtocol
from netvsc.door import DoorClient
from netvsc.interfaces import Interfaces
from netvsc.link import InterfaceConfig, Link
from netvsc.memory import PageAllocator
from netvsc.programs import Programs
from netvsc.synic import Synic
from netvsc.vmbus import GuestChannel, VmbusClient
from vswitch_wire import door as wire
from vswitch_wire.engine import Engine
from vswitch_wire.errors import WireError

if TYPE_CHECKING:
    from netvsc.native import NativeWorkers

__all__ = ["Agent", "Options"]

FIRST_SECONDS = 20.0
"""How long a new guest waits for the daemon that started it, be its grace period shorter."""
CONFIGURE_TIMEOUT = 25.0
TERMINATE_TIMEOUT = 1.0

_log = logging.getLogger("netvsc.agent")


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    name: str
    engine: Engine
    grace: float
    link: str


class Agent:
    """One guest."""

    def __init__(self, options: Options, door: DoorClient) -> None:
        self._options = options
        self._door = door
        self._ending = asyncio.Event()
        self._lost = asyncio.Event()
        self._entered = False
        self._programs = Programs(self._on_exit)
        self._vmbus: VmbusClient | None = None
        self._synic: Synic | None = None
        self._allocator: PageAllocator | None = None
        self._workers: NativeWorkers | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._interfaces = Interfaces(self._open_datapath, options.link)

    async def run(self) -> int:
        """Serve until SHUTDOWN, SIGTERM or the end of the grace period; returns the exit status."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self._programs.reap)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ending.set)
        self._door.on_lost.append(self._on_lost)
        self._door.handlers.update(
            {
                wire.FrameType.CONFIGURE: self._on_configure,
                wire.FrameType.EXEC: self._on_exec,
                wire.FrameType.KILL: self._on_kill,
                wire.FrameType.SHUTDOWN: self._on_shutdown,
            }
        )
        await links.loopback_up()
        while await self._attach():
            await self._either(self._lost, self._ending)
            if self._ending.is_set():
                await self._shut_down()
                return 0
        return 0 if self._ending.is_set() else 3

    async def _attach(self) -> bool:
        """Wait for the daemon; False when it is time to end."""
        accept = asyncio.ensure_future(self._door.accept())
        ending = asyncio.ensure_future(self._ending.wait())
        try:
            patience = self._options.grace if self._entered else max(self._options.grace, FIRST_SECONDS)
            done, _ = await asyncio.wait(
                {accept, ending}, timeout=patience, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            ending.cancel()
        if accept not in done:
            accept.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError, WireError):
                await accept
            if not self._ending.is_set():
                _log.warning("guest %s: no daemon for %g s, it ends", self._options.name, patience)
            return False
        self._lost.clear()
        self._entered = True
        resumed = accept.result()
        try:
            await self._enter(resumed)
        except (ConnectionError, WireError) as error:
            _log.error("guest %s: the daemon is lost again: %s", self._options.name, error)
            self._on_lost(str(error))
        return True

    async def _enter(self, resumed: bool) -> None:
        """After HELLO: the guest half of SynIC and VMBus."""
        if not resumed or self._vmbus is None:
            self._interfaces.memory_replaced()
            self._allocator = PageAllocator(self._door.regions)
            self._synic = Synic(self._door, self._allocator)
            await self._synic.start()
            self._vmbus = VmbusClient(self._door, self._synic, self._allocator)
            self._vmbus.on_offer = self._interfaces.on_offer
            self._vmbus.on_rescind = self._interfaces.on_rescind
            self._interfaces.use(self._vmbus, self._allocator)
            self._task(self._contact())

    async def _contact(self) -> None:
        assert self._vmbus is not None
        await self._vmbus.connect()

    # Data paths.

    def _open_datapath(self, channel: GuestChannel, link: Link) -> DataPathProtocol:
        if self._options.engine == "native":
            if self._workers is None:
                from netvsc.native import NativeWorkers

                assert self._synic is not None
                self._workers = NativeWorkers(self._synic)
            return self._workers.open(channel, link)
        path = DataPath(
            channel.memory, channel.ring_pfns, channel.downstream_page_offset, channel.signal_fd, link
        )
        channel.on_interrupt = path.on_interrupt
        return path

    # The door's frames.

    def _on_lost(self, why: str) -> None:
        _log.warning(
            "guest %s: the door is lost (%s); the link is down until the daemon is back",
            self._options.name,
            why,
        )
        self._programs.forget()
        self._interfaces.door_lost()
        if self._workers is not None:
            self._workers.close()
            self._workers = None
        self._lost.set()

    def _on_configure(self, sequence: int, message: wire.Configure, fds: list[int]) -> None:
        _close(fds)
        self._task(self._configure(sequence, message.document))

    async def _configure(self, sequence: int, document: dict[str, Any]) -> None:
        try:
            texts = await self._apply(document)
            status = 22 if texts else 0
        except (OSError, ValueError) as error:
            texts, status = [str(error)], getattr(error, "errno", None) or 22
        self._answer(wire.Configured(status, "; ".join(texts)), sequence)

    async def _apply(self, document: dict[str, Any]) -> list[str]:
        entries = document.get("interfaces") or []
        if not isinstance(entries, list) or len(entries) > 64:
            raise ValueError("configuration: interfaces must be a list of at most 64")
        configs = [InterfaceConfig.parse(entry) for entry in entries]
        name = document.get("hostname") or self._options.name
        if (
            not isinstance(name, str)
            or not 1 <= len(name) <= 64
            or not name.replace("-", "a").replace(".", "a").isalnum()
        ):
            raise ValueError(f"configuration: hostname {name!r} must be 1..64 letters, digits, '-' and '.'")
        confinement.set_host_name(name)
        confinement.write_hosts(hosts_file(name, document.get("hosts") or {}))
        return await self._interfaces.configure(configs, CONFIGURE_TIMEOUT)

    def _on_exec(self, sequence: int, message: wire.Exec, fds: list[int]) -> None:
        try:
            pid = self._programs.start(sequence, message.argv, message.env, message.cwd, message.tty, fds)
        except (OSError, ValueError) as error:
            text = f"guest {self._options.name}: cannot run {message.argv[0]!r}: {error}"
            self._answer(wire.ExecStarted(getattr(error, "errno", None) or 22, 0, text), sequence)
        else:
            self._answer(wire.ExecStarted(0, pid), sequence)
        finally:
            _close(fds)

    def _on_exit(self, sequence: int, status: int) -> None:
        self._answer(wire.ExecExit(status), sequence)

    def _on_kill(self, sequence: int, message: wire.Kill, fds: list[int]) -> None:
        _close(fds)
        self._programs.kill(message.exec_sequence, message.signal)

    def _on_shutdown(self, sequence: int, message: wire.Shutdown, fds: list[int]) -> None:
        _close(fds)
        self._ending.set()

    def _answer(self, message: wire.DoorMessage, sequence: int) -> None:
        with contextlib.suppress(ConnectionError, OSError):  # lost meanwhile: on_lost tells
            self._door.send(message, sequence)

    # The end.

    async def _shut_down(self) -> None:
        for number, patience in ((signal.SIGTERM, TERMINATE_TIMEOUT), (signal.SIGKILL, TERMINATE_TIMEOUT)):
            deadline = asyncio.get_running_loop().time() + patience
            if not Programs.signal_everything(number):
                break
            while os.getpid() == 1 and _has_processes() and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(0.01)
                self._programs.reap()
        if not self._lost.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(3.0):
                    await self._interfaces.stop()
                    if self._vmbus is not None:
                        await self._vmbus.unload()

    async def _either(self, *events: asyncio.Event) -> None:
        waits = [asyncio.ensure_future(event.wait()) for event in events]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _task(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("guest %s: %s", self._options.name, error, exc_info=error)


def _has_processes() -> bool:
    """Whether this process has children at all, running or not reaped."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def hosts_file(own: str, hosts: object) -> str:
    """/etc/hosts for a guest called `own` from {name: [address, ...]}. ValueError names what is wrong."""
    if not isinstance(hosts, dict):
        raise ValueError("configuration: hosts must be an object of name: [address, ...]")
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    named = False
    for name, addresses in hosts.items():
        if not isinstance(name, str) or not name or not name.isprintable() or set(name) & set(" \t#"):
            raise ValueError(f"configuration: host name {name!r} cannot stand in /etc/hosts")
        if not isinstance(addresses, list):
            raise ValueError(f"configuration: hosts: {name} must have a list of addresses")
        for address in addresses:
            lines.append(f"{ipaddress.ip_address(address)}\t{name}")
            named = named or name == own
    if not named:
        lines.append(f"127.0.1.1\t{own}")
    return "\n".join(lines) + "\n"
