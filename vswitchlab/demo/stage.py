"""What the demo's checks share: the running lab, ways to run things in guests, what must be gone later."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vswitchctl.aio import AsyncClient, CompletedExec
from vswitchctl.launch import DaemonProcess
from vswitchlab import processes
from vswitchlab.guests import environment
from vswitchlab.topology import Guest, Lab

__all__ = ["Check", "CheckFailed", "Stage", "expect"]


class CheckFailed(Exception):
    """A claim that is not true; the message says what was expected and what happened."""


def expect(condition: bool, message: str) -> None:
    """Raises CheckFailed with `message` unless `condition`."""
    if not condition:
        raise CheckFailed(message)


@dataclass(slots=True)
class Check:
    """The outcome of one check. `evidence` names files to look at when it failed."""

    name: str
    passed: bool
    detail: str
    seconds: float
    evidence: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Stage:
    """The demo's world. Checks run in order and leave here what later ones compare with."""

    client: AsyncClient
    lab: Lab
    engine: str
    run_dir: Path
    daemon: DaemonProcess
    tap_expected: bool
    agents: dict[str, int] = field(default_factory=dict)
    pids: set[int] = field(default_factory=set)
    namespaces: set[int] = field(default_factory=set)
    echoes: dict[int, int] = field(default_factory=dict)  # ICMP identifier -> number of requests
    capture: bytearray = field(default_factory=bytearray)
    dropped_frame: bytes = b""
    dropped_comment: str = ""
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def a(self) -> Guest:
        return self.lab.guests[0]

    @property
    def b(self) -> Guest:
        return self.lab.guests[1]

    def port(self, guest: Guest) -> str:
        """The guest's first port as the client takes it."""
        return f"{guest.nics[0].switch}/{guest.nics[0].port}"

    def address(self, guest: Guest) -> str:
        """The guest's IPv4 address."""
        return next(str(each.ip) for each in guest.nics[0].addresses if each.version == 4)

    async def note_processes(self) -> None:
        """Remembers every process and namespace of the run, so that `nothing_left` can look for each."""
        for partition in await self.client.list_partitions():
            self.agents[partition.name.rsplit("/", 1)[1]] = partition.agent_pid
            self.pids |= {partition.pid, partition.agent_pid, *processes.descendants(partition.pid)}
            self.namespaces.add(processes.namespace(partition.agent_pid, "net"))
        for extension in await self.client.list_extensions():
            self.pids |= {extension.pid, *processes.descendants(extension.pid)}
        self.pids |= {self.daemon.pid, *processes.descendants(self.daemon.pid)}
        self.pids.discard(0)

    async def run(self, guest: Guest, argv: Sequence[str], seconds: float = 20.0) -> CompletedExec:
        """Runs a Python command line in a guest: `-m module ...` or `-c source ...`."""
        return await self.client.run_in(
            guest.name, [sys.executable, *argv], env=environment(), timeout=seconds
        )

    async def run_json(self, guest: Guest, argv: Sequence[str], seconds: float = 20.0) -> dict[str, Any]:
        """As `run`, for commands whose last line of output is a JSON object."""
        done = await self.run(guest, argv, seconds)
        try:
            value = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            value = None
        if not isinstance(value, dict):
            said = (done.stderr or done.stdout).decode(errors="replace").strip()[-600:] or done.detail
            raise CheckFailed(
                f"`{' '.join(argv)[:80]}` in guest {guest.name} gave status {done.status}: {said}"
            )
        return value

    @contextlib.asynccontextmanager
    async def listening(self, guest: Guest, argv: Sequence[str]) -> AsyncIterator[asyncio.Future[bytes]]:
        """A server in a guest: entered at its first line of output; the future is all that it prints."""
        finished: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        ready = asyncio.Event()

        async def serve() -> None:
            output = bytearray()
            try:
                async with self.client.exec(
                    guest.name, [sys.executable, *argv], env=environment()
                ) as command:
                    async for response in command:
                        if response.WhichOneof("message") in ("stdout", "stderr"):
                            output += response.stdout or response.stderr
                            if b"\n" in output:
                                ready.set()
                if not finished.done():
                    finished.set_result(bytes(output))
            except Exception as error:
                if not finished.done():
                    finished.set_exception(error)
            finally:
                ready.set()

        task = asyncio.create_task(serve())
        try:
            await asyncio.wait_for(ready.wait(), 10)
            yield finished
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if finished.done():
                finished.exception()

    @contextlib.asynccontextmanager
    async def capturing(self) -> AsyncIterator[None]:
        """Records what passes the lab's switch, drops included, into `capture` while the block runs."""
        source = f"switches/{self.lab.switches[0].name}"
        async with self.client.capture(source) as stream:
            name = stream.capture.name

            async def drain() -> None:
                async for piece in stream:
                    self.capture += piece

            task = asyncio.create_task(drain())
            try:
                yield
            finally:
                # What the guests have sent is in the tap at once; the daemon hands it on within this time.
                await asyncio.sleep(0.3)
                await self.client.stop_capture(name)
                await asyncio.wait_for(task, 10)
