"""The daemon put together: hypervisor, switches, partitions, store, servers and front; started, run,
ended.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Iterator

import grpc.aio

from hypervisor import Hypervisor
from vswitchd import rundir
from vswitchd.access import AccessPolicy, Role
from vswitchd.captures import CaptureManager
from vswitchd.core import Config, Core
from vswitchd.extensions import ExtensionManager
from vswitchd.front import Front
from vswitchd.partitions import PartitionManager
from vswitchd.server import Servicers, serve
from vswitchd.services.daemon import CaptureServicer, DaemonServicer, WatchServicer, version
from vswitchd.services.partitions import NicServicer, PartitionServicer
from vswitchd.services.switches import (
    ExtensionServicer,
    PortServicer,
    SwitchServicer,
    TraceServicer,
)
from vswitchd.store import Store
from vswitchd.switches import SwitchManager
from vswitchd.watching import Resource, WatchHub

log = logging.getLogger("vswitchd")

# What a call that runs when the daemon is told to end may still take.
DRAIN_SECONDS = 0.5


class Daemon:
    """One daemon. `start`, then `run` until it is told to end, then `stop`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._locks: list[int] = []
        self._servers: list[grpc.aio.Server] = []
        self._front: Front | None = None
        self._end = asyncio.Event()
        self._stop_guests = False
        self._hub = WatchHub(self._snapshot)
        self._store = Store(config.run_dir.store)
        core = Core(config, self._store, self._hub)
        self._hypervisor = Hypervisor(engine=config.engine, run_dir=config.run_dir.root)
        self._switches = SwitchManager(core)
        self._extensions = ExtensionManager(core, self._switches)
        self._partitions = PartitionManager(core, self._switches, self._hypervisor)
        self._captures = CaptureManager(self._switches, self._partitions)

    def _snapshot(self) -> Iterator[Resource]:
        yield from self._switches.snapshot()
        yield from self._extensions.snapshot()
        yield from self._partitions.snapshot()

    async def start(self) -> None:
        """Takes the run directory, finds what an earlier daemon left, and serves. StartError when it
        cannot.
        """
        config = self._config
        own = config.run_dir.root / "api.sock"
        self._locks.append(rundir.take_lock(config.run_dir.lock, str(config.run_dir.root)))
        if config.socket != own:
            path = config.socket.with_name(f".{config.socket.name}.lock")
            self._locks.append(rundir.take_lock(path, str(config.socket)))
        await self._store.open()
        await self._switches.restore()
        await self._extensions.restore()
        await self._partitions.restore()
        servicers = self._servicers()
        paths = {role: config.run_dir.internal / f"{role.name.lower()}.sock" for role in Role}
        for role, path in paths.items():
            self._servers.append(await serve(role, path, servicers))
        # With other users allowed in, anybody may knock: the front asks the kernel who it is.
        listener = rundir.listen(config.socket, 0o666 if config.roles else 0o600)
        self._front = Front(listener, AccessPolicy(config.roles), paths)
        self._front.start()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.shut_down, False)
        log.info(
            "serving",
            extra={
                "version": version(),
                "pid": os.getpid(),
                "socket": str(config.socket),
                "engine": config.engine,
                "reattached": self._partitions.restored.reattached,
                "gone": self._partitions.restored.gone,
            },
        )

    def _servicers(self) -> Servicers:
        return Servicers(
            capture=CaptureServicer(self._captures),
            daemon=lambda role: DaemonServicer(role, self._config, self._partitions.restored, self.shut_down),
            extension=ExtensionServicer(self._switches, self._extensions),
            nic=NicServicer(self._partitions),
            partition=PartitionServicer(self._partitions),
            port=PortServicer(self._switches, self._partitions),
            switch=SwitchServicer(self._switches, self._partitions, self._extensions),
            trace=TraceServicer(self._switches),
            watch=WatchServicer(self._hub),
        )

    def shut_down(self, stop_guests: bool) -> None:
        """Tells the daemon to end: soon, not now."""
        self._stop_guests = self._stop_guests or stop_guests
        self._end.set()

    async def run(self) -> None:
        """Returns when the daemon has been told to end."""
        await self._end.wait()

    async def stop(self) -> None:
        """Ends in good order. Guests live on for their grace period, unless they are to be stopped too."""
        log.info("ending", extra={"stop_guests": self._stop_guests})
        self._config.socket.unlink(missing_ok=True)
        self._captures.stop_all()
        # Guests first: a caller that waits for the end of this daemon then finds nothing left.
        await self._partitions.close(stop_guests=self._stop_guests)
        await asyncio.gather(*(server.stop(DRAIN_SECONDS) for server in self._servers))
        if self._front is not None:
            await self._front.close()
        await self._switches.close_extensions()
        if self._stop_guests:
            await self._switches.close()
            await self._hypervisor.close()
        nothing_left = not self._partitions.any_runs and await self._store.is_empty()
        await self._store.close()
        if nothing_left:
            await asyncio.to_thread(self._config.run_dir.clean)
        for lock in self._locks:
            os.close(lock)
