"""`vswitch partition ...`"""

from __future__ import annotations

import asyncio
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vswitch_api.v1 import partition_pb2
from vswitchctl import names, session
from vswitchctl.commands.choices import (
    EngineChoice,
    cpu_list,
    engine_text,
    mebibytes,
    pairs,
    short_enum,
)
from vswitchctl.output import Columns, Format, write_list, write_one
from vswitchctl.session import Force, Output, ShowRpc

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Guests, processes and virtual machines: start, stop, run commands, consoles.",
)

Name = Annotated[str, typer.Argument(metavar="PARTITION", help="Name of the partition.")]


def _is_vm(partition: partition_pb2.Partition) -> bool:
    return partition.WhichOneof("spec") == "kvm"


def _kind(partition: partition_pb2.Partition) -> str:
    if _is_vm(partition):
        return "vm"
    return short_enum(partition_pb2.ProcessKind.Name(partition.process.kind), "PROCESS_KIND_")


def _heartbeat(partition: partition_pb2.Partition) -> str:
    guest = partition.guest
    if guest.heartbeat == partition_pb2.HEARTBEAT_STATE_UNSPECIFIED:
        return "none"
    state = short_enum(partition_pb2.HeartbeatState.Name(guest.heartbeat), "HEARTBEAT_STATE_")
    return f"{state}, last {guest.heartbeat_time.ToDatetime():%H:%M:%S} UTC"


COLUMNS: Columns = {
    "name": lambda partition: names.leaf(partition.name),
    "kind": _kind,
    "state": lambda partition: short_enum(
        partition_pb2.PartitionState.Name(partition.state), "PARTITION_STATE_"
    ),
    "pid": lambda partition: partition.pid or "",
    "engine": lambda partition: "" if _is_vm(partition) else engine_text(partition.process.engine),
    "nics": lambda partition: [names.leaf(nic) for nic in partition.nics],
    "detail": lambda partition: partition.detail,
}
DETAILS: Columns = {
    **COLUMNS,
    "hostname": lambda partition: (partition.kvm if _is_vm(partition) else partition.process).hostname,
    "processors": lambda partition: partition.vp_count,
    "memory": lambda partition: f"{partition.memory_bytes >> 20} MiB",
    "agent pid": lambda partition: partition.agent_pid or "",
    "log": lambda partition: partition.log_path,
}
VM_DETAILS: Columns = {
    **{name: column for name, column in DETAILS.items() if name not in ("engine", "agent pid")},
    "vmm pid": lambda partition: partition.agent_pid or "",
    "kernel": lambda partition: partition.kvm.kernel,
    "initrd": lambda partition: partition.kvm.initrd,
    "command line": lambda partition: partition.kvm.cmdline,
    "host cpus": lambda partition: list(partition.kvm.host_cpus) or "all",
    "boots": lambda partition: partition.guest.boots or "",
    "heartbeat": _heartbeat,
    "guest os": lambda partition: partition.guest.os,
    "guest hostname": lambda partition: partition.guest.hostname,
    "guest addresses": lambda partition: list(partition.guest.addresses),
    "services": lambda partition: [
        f"{name} {version}" for name, version in sorted(partition.guest.services.items())
    ],
}


def _write(partition: partition_pb2.Partition, output: Format) -> None:
    write_one(partition, VM_DETAILS if _is_vm(partition) else DETAILS, output)


class Kind(StrEnum):
    """What runs in a process partition."""

    NETNS = "netns"


class GuestLink(StrEnum):
    """How a netns guest's interface is joined to its driver."""

    TAP = "tap"
    VETH = "veth"


@app.command()
def create(
    name: Name,
    kind: Annotated[Kind, typer.Option(help="What runs inside.")] = Kind.NETNS,
    hostname: Annotated[str, typer.Option(help="Default: the partition's name.")] = "",
    host: Annotated[list[str] | None, typer.Option(help="A line of /etc/hosts: b=10.0.0.2,fd00::2")] = None,
    engine: Annotated[EngineChoice | None, typer.Option(help="Default: the daemon's.")] = None,
    grace: Annotated[float | None, typer.Option(help="Seconds it lives on without a daemon.")] = None,
    link: Annotated[GuestLink | None, typer.Option(help="Default: tap where there is one.")] = None,
    memory: Annotated[str, typer.Option(help="As 256M or 1G; default 32M, 256M with --kvm.")] = "",
    kvm: Annotated[bool, typer.Option("--kvm", help="A virtual machine that boots a kernel.")] = False,
    kernel: Annotated[Path | None, typer.Option(help="With --kvm: a bzImage.")] = None,
    initrd: Annotated[Path | None, typer.Option(help="With --kvm: its initial RAM disk.")] = None,
    cmdline: Annotated[str, typer.Option(help="With --kvm: default console=ttyS0.")] = "",
    cpus: Annotated[int, typer.Option(min=0, help="Virtual processors; default 1.")] = 0,
    host_cpus: Annotated[str, typer.Option(help="With --kvm: where they run, as 0,2-3; default all.")] = "",
    start: Annotated[bool, typer.Option("--start", help="Start it at once.")] = False,
    output: Output = Format.TABLE,
    show_rpc: ShowRpc = False,
) -> None:
    """Make a partition. Give it NICs, then start it."""
    hosts = {key: value.split(",") for key, value in pairs(host or [], "NAME=ADDRESS[,ADDRESS...]").items()}
    size = mebibytes(memory) if memory else 0
    _check_options(kvm, hosts, engine, link, kernel, [initrd, cmdline, host_cpus])
    with session.client(show_rpc) as client:
        if kernel is not None:
            made = client.create_kvm_partition(
                name,
                kernel=str(kernel.absolute()),
                initrd=str(initrd.absolute()) if initrd else "",
                cmdline=cmdline,
                hostname=hostname,
                host_cpus=cpu_list(host_cpus),
                grace_seconds=grace,
                memory_bytes=size,
                vp_count=cpus,
            )
        else:
            made = client.create_partition(
                name,
                kind=kind,
                hostname=hostname,
                hosts=hosts,
                engine=engine,
                grace_seconds=grace,
                guest_link=link,
                memory_bytes=size,
                vp_count=cpus,
            )
        if start:
            made = client.start_partition(name)
        _write(made, output)


def _check_options(
    kvm: bool, hosts: object, engine: object, link: object, kernel: Path | None, vm_only: list[object]
) -> None:
    """Options that belong to the other kind of guest are a mistake, not a silence."""
    if kvm and kernel is None:
        raise typer.BadParameter("--kvm needs a kernel to boot: --kernel FILE")
    if kvm and (hosts or engine or link):
        raise typer.BadParameter("--host, --engine and --link are for process guests, not for --kvm")
    if not kvm and (kernel is not None or any(vm_only)):
        raise typer.BadParameter("--kernel, --initrd, --cmdline and --host-cpus need --kvm")


@app.command("list")
def list_(output: Output = Format.TABLE, show_rpc: ShowRpc = False) -> None:
    """All partitions."""
    with session.client(show_rpc) as client:
        write_list(client.list_partitions(), COLUMNS, output)


@app.command()
def show(name: Name, output: Output = Format.TABLE, show_rpc: ShowRpc = False) -> None:
    """One partition."""
    with session.client(show_rpc) as client:
        _write(client.get_partition(name), output)


@app.command()
def start(name: Name, output: Output = Format.TABLE, show_rpc: ShowRpc = False) -> None:
    """Start the guest; returns when its NICs are configured, or a virtual machine's kernel begins to boot."""
    with session.client(show_rpc) as client:
        _write(client.start_partition(name), output)


@app.command()
def stop(
    name: Name,
    timeout: Annotated[float | None, typer.Option(help="Seconds it may take to end by itself.")] = None,
    output: Output = Format.TABLE,
    show_rpc: ShowRpc = False,
) -> None:
    """End the guest: a virtual machine is asked to shut down first."""
    with session.client(show_rpc) as client:
        _write(client.stop_partition(name, timeout=timeout), output)


@app.command()
def delete(name: Name, force: Force = False, show_rpc: ShowRpc = False) -> None:
    """Take a partition away with its NICs; with --force also when it runs."""
    with session.client(show_rpc) as client:
        client.delete_partition(name, force=force)


@app.command("exec", context_settings={"allow_interspersed_args": False})
def exec_(
    name: Name,
    argv: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="After --.")],
    env: Annotated[list[str] | None, typer.Option("--env", "-e", help="NAME=VALUE")] = None,
    show_rpc: ShowRpc = False,
) -> None:
    """Run a command inside, joined to this terminal; ends with the command's status."""
    from vswitchctl import terminal

    command = argv[1:] if argv[0] == "--" else argv
    if not command:
        raise typer.BadParameter("name a command after --")
    variables = pairs(env or [], "NAME=VALUE")

    async def run() -> int:
        async with session.async_client(show_rpc) as client:
            return await terminal.run(client, name, command, variables)

    raise typer.Exit(asyncio.run(run()))


@app.command("sync-time")
def sync_time(name: Name, show_rpc: ShowRpc = False) -> None:
    """Set a virtual machine's clock to the host's now."""
    with session.client(show_rpc) as client:
        client.sync_partition_time(name)


@app.command()
def console(
    name: Name,
    take_over: Annotated[bool, typer.Option("--take-over", help="End another caller's console.")] = False,
    show_rpc: ShowRpc = False,
) -> None:
    """Join a virtual machine's serial console; Ctrl-] leaves it."""
    from vswitchctl import terminal

    async def join() -> str:
        async with session.async_client(show_rpc) as client:
            return await terminal.console(client, name, take_over=take_over)

    why = asyncio.run(join())
    if why:
        typer.echo(why, err=True)


@app.command()
def log(name: Name, show_rpc: ShowRpc = False) -> None:
    """What the guest itself has said."""
    with session.client(show_rpc) as client:
        path = Path(client.get_partition(name).log_path)
    typer.echo(path.read_text(errors="replace"), nl=False)
