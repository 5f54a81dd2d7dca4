"""Brings labs up and down through the API. What belongs to a lab is told by the label `lab` on it alone.

`up` either succeeds or takes back what it made. `down` takes away what carries the label, in an order in
which nothing is in use, and may be run again after any failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from vswitch_api.v1 import common_pb2, daemon_pb2, partition_pb2, switch_pb2
from vswitchctl import names
from vswitchctl.client import AsyncClient, CompletedExec, VswitchError
from vswitchctl.errors import DaemonUnavailable
from vswitchctl.launch import start_daemon
from vswitchlab.problems import did_you_mean
from vswitchlab.progress import Silent
from vswitchlab.topology import Guest, Lab, Switch

__all__ = [
    "LabError",
    "RunningLab",
    "down",
    "ensure_daemon",
    "find",
    "find_guest",
    "running",
    "stop_idle_daemon",
    "up",
]

LABEL = "lab"
FILE_LABEL = "lab-file"
STARTED_BY = "lab"
# How many guests start at once: each is a process that imports Python for a while.
STARTS_AT_ONCE = 8


class LabError(Exception):
    """A lab could not be brought up, found or used. `remedy` is the one line that helps; may be empty."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


@dataclass(slots=True)
class RunningLab:
    """What of a lab exists in a daemon."""

    name: str
    file: str = ""
    switches: list[switch_pb2.Switch] = field(default_factory=list)
    partitions: list[partition_pb2.Partition] = field(default_factory=list)


async def running(client: AsyncClient) -> dict[str, RunningLab]:
    """Every lab of which something exists, by name."""
    found: dict[str, RunningLab] = {}

    def lab(labels: dict[str, str]) -> RunningLab:
        one = found.setdefault(labels[LABEL], RunningLab(labels[LABEL]))
        one.file = one.file or labels.get(FILE_LABEL, "")
        return one

    for switch in await client.list_switches():
        if LABEL in switch.labels:
            lab(dict(switch.labels)).switches.append(switch)
    for partition in await client.list_partitions():
        if LABEL in partition.labels:
            lab(dict(partition.labels)).partitions.append(partition)
    return dict(sorted(found.items()))


async def find(client: AsyncClient, name: str | None) -> RunningLab:
    """The lab of that name, or the only one. Raises LabError with what there is."""
    labs = await running(client)
    if name is None:
        if len(labs) == 1:
            return next(iter(labs.values()))
        if not labs:
            raise LabError("no lab is up", "bring one up: vswitch lab up FILE")
        raise LabError(f"several labs are up: {', '.join(labs)}", "say which one")
    if name not in labs:
        there = f"up are: {', '.join(labs)}" if labs else "no lab is up"
        raise LabError(f"lab {name} is not up; {there}", did_you_mean(name, labs))
    return labs[name]


async def find_guest(client: AsyncClient, guest: str, lab: str | None = None) -> partition_pb2.Partition:
    """The partition that is a lab's guest. Raises LabError with the guests there are."""
    labs = [await find(client, lab)] if lab else list((await running(client)).values())
    if not labs:
        raise LabError("no lab is up", "bring one up: vswitch lab up FILE")
    partitions = {names.leaf(each.name): each for one in labs for each in one.partitions}
    if guest not in partitions:
        there = ", ".join(sorted(partitions)) or "none"
        raise LabError(f'there is no guest "{guest}"; guests: {there}', did_you_mean(guest, partitions))
    return partitions[guest]


async def ensure_daemon(
    client: AsyncClient, engine: str | None, report: Silent
) -> daemon_pb2.GetInfoResponse:
    """The daemon that `client` talks to; starts this user's when none answers."""
    try:
        return await client.get_info()
    except DaemonUnavailable:
        report.doing("starting the daemon")
        run_dir = client.socket.parent
        await asyncio.to_thread(start_daemon, run_dir, engine=engine, started_by=STARTED_BY)
        info = await _first_answer(client)
        report.note(f"daemon started (pid {info.pid}, run directory {info.run_dir})")
        return info


async def _first_answer(client: AsyncClient) -> daemon_pb2.GetInfoResponse:
    """The channel has seen the socket refuse; it tries again by itself after a moment."""
    for _ in range(100):
        with contextlib.suppress(DaemonUnavailable):
            return await client.get_info()
        await asyncio.sleep(0.02)
    return await client.get_info()


async def stop_idle_daemon(client: AsyncClient) -> bool:
    """Ends a daemon that a lab started once nothing is left in it; True when it did."""
    info = await client.get_info()
    if info.started_by != STARTED_BY:
        return False
    if await client.list_switches() or await client.list_partitions():
        return False
    await client.shutdown(stop_guests=True)
    for _ in range(200):
        if not _alive(info.pid):
            return True
        await asyncio.sleep(0.05)
    raise LabError(f"the daemon (pid {info.pid}) did not end within 10 s", f"see {info.run_dir}/daemon.log")


def _alive(pid: int) -> bool:
    """A zombie counts as gone: its parent may be this very process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    if stat.rpartition(")")[2].split()[0] in ("Z", "X"):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        return False
    return True


async def up(client: AsyncClient, lab: Lab, report: Silent) -> list[tuple[str, CompletedExec]]:
    """Brings `lab` up; what its commands gave. Raises LabError, after taking back what it had made."""
    if lab.name in await running(client):
        raise LabError(f"lab {lab.name} is up already", f"take it down first: vswitch lab down {lab.name}")
    commands = sum(len(guest.commands) for guest in lab.guests)
    extensions = sum(len(switch.extensions) for switch in lab.switches)
    report.begin(len(lab.switches) + extensions + len(lab.guests) + commands)
    try:
        for switch in lab.switches:
            await _make_switch(client, lab, switch, report)
        # Process guests first: what boots a kernel takes all the processors it is given.
        for machines in (False, True):
            chosen = [guest for guest in lab.guests if bool(guest.machine) is machines]
            await _each([_start_of(client, lab, guest, report) for guest in chosen])
        return await _run_commands(client, lab, report)
    except BaseException as error:
        with contextlib.suppress(VswitchError, LabError):
            await _undo(client, lab.name)
        if isinstance(error, VswitchError):
            raise LabError(f"lab {lab.name}: {error}", error.remedy or _remedy(error)) from error
        raise


async def _undo(client: AsyncClient, name: str) -> None:
    labs = await running(client)
    if name in labs:
        await down(client, labs[name], Silent())


def _remedy(error: VswitchError) -> str:
    if error.code == grpc.StatusCode.ALREADY_EXISTS:
        return "rename it in the lab file, or see what is there: vswitch lab list, vswitch switch list"
    return ""


def _labels(lab: Lab) -> dict[str, str]:
    file = str(Path(lab.file).resolve()) if not lab.file.startswith("<") else ""
    return {LABEL: lab.name, **({FILE_LABEL: file} if 0 < len(file.encode()) <= 255 else {})}


async def _make_switch(client: AsyncClient, lab: Lab, switch: Switch, report: Silent) -> None:
    report.doing(f"making switch {switch.name}")
    await client.create_switch(switch.name, engine=lab.engine, labels=_labels(lab))
    report.done(f"switch {switch.name} is there")
    for extension in switch.extensions:
        report.doing(f"loading extension {extension.name}")
        try:
            source = extension.file.read_bytes()
        except OSError as error:
            raise LabError(
                f"extension {extension.name}: cannot read {extension.file}: {error.strerror}"
            ) from None
        await client.load_extension(
            switch.name,
            extension.name,
            source,
            file_name=str(extension.file),
            on_failure=extension.on_failure,
            labels=_labels(lab),
        )
        report.done(f"extension {extension.name} watches switch {switch.name}")


def _start_of(client: AsyncClient, lab: Lab, guest: Guest, report: Silent) -> Callable[[], Awaitable[None]]:
    async def start() -> None:
        report.doing(f"starting guest {guest.name}")
        await _make_partition(client, lab, guest)
        for nic in guest.nics:
            await client.create_nic(
                f"{guest.name}/{nic.name}",
                port=f"{nic.switch}/{nic.port}",
                mac=nic.mac,
                mtu=nic.mtu,
                addresses=[str(address) for address in nic.addresses],
                gateway=str(nic.gateway or ""),
            )
        await client.start_partition(guest.name)
        report.done(f"guest {guest.name} runs")

    return start


async def _make_partition(client: AsyncClient, lab: Lab, guest: Guest) -> None:
    memory = (guest.memory or 0) << 20
    machine = guest.machine
    if machine is None:
        await client.create_partition(
            guest.name,
            hostname=guest.name,
            hosts=guest.hosts,
            engine=lab.engine,
            memory_bytes=memory,
            labels=_labels(lab),
        )
        return
    await client.create_kvm_partition(
        guest.name,
        kernel=str(machine.kernel),
        initrd=str(machine.initrd or ""),
        cmdline=machine.cmdline,
        hostname=guest.name,
        host_cpus=machine.host_cpus,
        memory_bytes=memory,
        vp_count=machine.cpus,
        labels=_labels(lab),
    )


async def _each(actions: Iterable[Callable[[], Awaitable[None]]]) -> None:
    """Runs all, a few at a time; the first error stops what has not begun and is raised at the end."""
    gate = asyncio.Semaphore(STARTS_AT_ONCE)
    failed: list[BaseException] = []

    async def one(action: Callable[[], Awaitable[None]]) -> None:
        async with gate:
            if failed:
                return
            try:
                await action()
            except (VswitchError, LabError) as error:
                failed.append(error)

    await asyncio.gather(*(one(action) for action in actions))
    if failed:
        raise failed[0]


async def _run_commands(client: AsyncClient, lab: Lab, report: Silent) -> list[tuple[str, CompletedExec]]:
    results = []
    for guest in lab.guests:
        for command in guest.commands:
            text = command[2] if command[:2] == ("sh", "-c") else " ".join(command)
            report.doing(f"{guest.name}: {text}")
            done = await client.run_in(guest.name, command, timeout=60)
            if not done.ok:
                said = (done.stderr or done.stdout).decode(errors="replace").strip() or done.detail
                how = f"signal {done.signal}" if done.signal else f"status {done.status}"
                message = f"guest {guest.name}: `{text}` ended with {how}: {said or 'no output'}"
                raise LabError(message, f"mend guests.{guest.name}.commands in {lab.file}")
            results.append((guest.name, done))
            report.done(f"{guest.name}: {text}")
    return results


async def down(client: AsyncClient, lab: RunningLab, report: Silent) -> None:
    """Takes away everything of `lab`; what is gone already is no error."""
    report.begin(len(lab.partitions) + len(lab.switches))

    def away(partition: str) -> Callable[[], Awaitable[None]]:
        async def act() -> None:
            report.doing(f"ending guest {partition}")
            await _gone_is_fine(client.delete_partition(partition, force=True))
            report.done(f"guest {partition} is gone")

        return act

    await _each([away(names.leaf(partition.name)) for partition in lab.partitions])
    for switch in lab.switches:
        short = names.leaf(switch.name)
        report.doing(f"removing switch {short}")
        await _gone_is_fine(client.delete_switch(short, force=True))
        report.done(f"switch {short} is gone")


async def _gone_is_fine(call: Awaitable[None]) -> None:
    try:
        await call
    except VswitchError as error:
        if error.code != grpc.StatusCode.NOT_FOUND:
            raise


def engine_name(value: common_pb2.Engine.ValueType) -> str:
    """`native`, `python` or an empty text."""
    return {common_pb2.ENGINE_NATIVE: "native", common_pb2.ENGINE_PYTHON: "python"}.get(value, "")
