"""Netns guests on a switch in this process: what the integration tests stand on. No daemon."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from hypervisor import Hypervisor, Partition
from netvsp.nic import SyntheticNic
from vswitch import Switch
from vswitch_wire.engine import Engine

REPOSITORY = Path(__file__).resolve().parents[2]
MEMORY = 32 << 20


def environment() -> dict[str, str]:
    """So that a guest's Python finds what this one has."""
    return {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)])}


@dataclass
class Guest:
    """One partition with one NIC and its process."""

    name: str
    mac: str
    address: str
    partition: Partition
    nic: SyntheticNic
    port: Any
    keeper: asyncio.subprocess.Process
    log: Path
    python: str
    offer: Any

    @property
    def agent_pid(self) -> int:
        """The guest's PID 1, seen from outside."""
        keeper = self.keeper.pid
        children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text(encoding="ascii").split()
        return int(children[0])

    async def run(self, *argv: str, seconds: float = 60.0, check: bool = True) -> str:
        """Run a program inside by EXEC; its standard output. AssertionError with its output when it fails."""
        reader, writer = os.pipe()
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            process = await self.partition.exec(argv, environment(), nothing, writer, writer)
        finally:
            os.close(writer)
            os.close(nothing)
        try:
            async with asyncio.timeout(seconds):
                output = await _read_all(reader)
                status, text = await process.wait()
        except TimeoutError:
            process.kill(signal.SIGKILL)
            raise
        if check and status:
            raise AssertionError(
                f"{self.name}: {argv} ended with {status} {text}\n{output}\n{self.log.read_text()}"
            )
        return output

    async def start(self, *arguments: str) -> Running:
        """Start a probe inside; it runs until it ends by itself, or `process.kill` is called."""
        descriptor, writer = os.pipe()
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        argv = (self.python, "-m", "netvsc.probe", *arguments)
        try:
            process = await self.partition.exec(argv, environment(), nothing, writer, writer)
        finally:
            os.close(writer)
            os.close(nothing)
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb")
        )
        return Running(self, process, reader, transport)

    async def probe(self, *arguments: str, seconds: float = 60.0, check: bool = True) -> dict[str, Any]:
        """`python -m netvsc.probe` inside; its last JSON line."""
        output = await self.run(
            self.python, "-m", "netvsc.probe", *arguments, "--json", seconds=seconds, check=check
        )
        result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
        return result


@dataclass
class Running:
    """A probe inside a guest, read line by line while it runs."""

    guest: Guest
    process: Any
    reader: asyncio.StreamReader
    transport: asyncio.BaseTransport

    async def line(self, seconds: float = 20.0) -> str:
        """The next line of its output."""
        async with asyncio.timeout(seconds):
            return (await self.reader.readline()).decode()

    async def result(self, seconds: float = 60.0) -> dict[str, Any]:
        """Its last JSON line, when it ended well."""
        async with asyncio.timeout(seconds):
            output = (await self.reader.read()).decode()
            status, text = await self.process.wait()
        self.transport.close()
        assert status == 0, f"{self.guest.name}: probe ended with {status} {text}\n{output}"
        found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
        return found


async def _read_all(fd: int) -> str:
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb")
    )
    try:
        return (await reader.read()).decode()
    finally:
        transport.close()


@dataclass
class World:
    """A hypervisor, a switch, and the guests on it."""

    engine: Engine
    directory: Path
    hypervisor: Hypervisor
    switch: Switch
    launcher: Sequence[str] = ()
    python: str = sys.executable
    guests: dict[str, Guest] = field(default_factory=dict)

    async def add(self, name: str, *options: str, mtu: int = 1500, engine: Engine | None = None) -> Guest:
        """Start a guest and wait until its address is set. `options` go to `python -m netvsc`."""
        number = len(self.guests) + 1
        mac, address = f"02:15:5d:00:00:{number:02x}", f"10.9.0.{number}"
        partition = await self.hypervisor.create_partition(name, memory_bytes=MEMORY)
        port = self.switch.add_port(name, mtu=mtu)
        nic = SyntheticNic(
            f"{name}-eth0",
            bytes.fromhex(mac.replace(":", "")),
            UUID(int=0xF00 + number),
            port,
            mtu=mtu,
            engine=self.engine,
        )
        offer = await partition.vmbus.offer(nic)
        door = partition.listen()
        log = self.directory / f"{name}.log"
        command = [
            *self.launcher,
            *(self.python, "-m", "netvsc", "--name", name),
            *("--engine", engine or self.engine, "--grace", "5", "--hide", str(self.hypervisor.run_dir)),
            *options,
        ]
        with log.open("wb") as output:
            keeper = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[door],
                start_new_session=True,
                env={**os.environ, **environment(), "VSWITCH_DOOR_FD": str(door)},
                cwd="/",
            )
        os.close(door)
        guest = Guest(name, mac, address, partition, nic, port, keeper, log, self.python, offer)
        self.guests[name] = guest
        try:
            await partition.attach(30)
            await self.configure(guest, mtu=mtu)
        except BaseException:
            sys.stderr.write(log.read_text())
            raise
        return guest

    async def configure(self, guest: Guest, *, mtu: int = 1500) -> None:
        """Host name, hosts and address, as the daemon would."""
        hosts = {other.name: [other.address] for other in self.guests.values()}
        interface = {"mac": guest.mac, "name": "eth0", "addresses": [f"{guest.address}/24"], "mtu": mtu}
        await guest.partition.configure({"hostname": guest.name, "hosts": hosts, "interfaces": [interface]})

    async def close(self) -> None:
        """End everything; no process is left."""
        for guest in self.guests.values():
            if guest.keeper.returncode is None:
                guest.keeper.send_signal(signal.SIGTERM)
        for guest in self.guests.values():
            try:
                async with asyncio.timeout(8):
                    await guest.keeper.wait()
            except TimeoutError:
                guest.keeper.kill()
                await guest.keeper.wait()
        await self.hypervisor.close()
        await self.switch.close()


@asynccontextmanager
async def world(engine: Engine, directory: Path, **options: Any) -> AsyncIterator[World]:
    """A world that ends with the block."""
    run = directory / "run"
    made = World(
        engine, directory, Hypervisor(engine=engine, run_dir=run), Switch("s0", engine=engine), **options
    )
    try:
        yield made
    finally:
        await made.close()
