"""`vswitch partition ...`"""

from __future__ import annotations

import asyncio
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vswitch_api.v1 import partition_pb2
from vswitchctl import names, session
from vswitchctl.commands.choices import EngineChoice, engine_text, pairs, short_enum
from vswitchctl.output import Columns, Format, write_list, write_one
from vswitchctl.session import Force, Output, ShowRpc

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Guests: start, stop, run commands inside."
)

Name = Annotated[str, typer.Argument(metavar="PARTITION", help="Name of the partition.")]

COLUMNS: Columns = {
    "name": lambda partition: names.leaf(partition.name),
    "kind": lambda partition: short_enum(
        partition_pb2.ProcessKind.Name(partition.process.kind), "PROCESS_KIND_"
    ),
    "state": lambda partition: short_enum(
        partition_pb2.PartitionState.Name(partition.state), "PARTITION_STATE_"
    ),
    "pid": lambda partition: partition.pid or "",
    "engine": lambda partition: engine_text(partition.process.engine),
    "nics": lambda partition: [names.leaf(nic) for nic in partition.nics],
    "detail": lambda partition: partition.detail,
}
DETAILS: Columns = {
    **COLUMNS,
    "hostname": lambda partition: partition.process.hostname,
    "memory": lambda partition: f"{partition.memory_bytes >> 20} MiB",
    "agent pid": lambda partition: partition.agent_pid or "",
    "log": lambda partition: partition.log_path,
}


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
    memory: Annotated[int, typer.Option(help="MiB; default 32.")] = 0,
    start: Annotated[bool, typer.Option("--start", help="Start it at once.")] = False,
    output: Output = Format.TABLE,
    show_rpc: ShowRpc = False,
) -> None:
    """Make a partition. Give it NICs, then start it."""
    hosts = {key: value.split(",") for key, value in pairs(host or [], "NAME=ADDRESS[,ADDRESS...]").items()}
    with session.client(show_rpc) as client:
        made = client.create_partition(
            name,
            kind=kind,
            hostname=hostname,
            hosts=hosts,
            engine=engine,
            grace_seconds=grace,
            guest_link=link,
            memory_bytes=memory << 20,
        )
        if start:
            made = client.start_partition(name)
        write_one(made, DETAILS, output)


@app.command("list")
def list_(output: Output = Format.TABLE, show_rpc: ShowRpc = False) -> None:
    """All partitions."""
    with session.client(show_rpc) as client:
        write_list(client.list_partitions(), COLUMNS, output)


@app.command()
def show(name: Name, output: Output = Format.TABLE, show_rpc: ShowRpc = False) -> None:
    """One partition."""
    with session.client(show_rpc) as client:
        write_one(client.get_partition(name), DETAILS, output)


@app.command()
def start(name: Name, output: Output = Format.TABLE, show_rpc: ShowRpc = False) -> None:
    """Start the guest; returns when its NICs are configured."""
    with session.client(show_rpc) as client:
        write_one(client.start_partition(name), DETAILS, output)


@app.command()
def stop(
    name: Name,
    timeout: Annotated[float | None, typer.Option(help="Seconds it may take to end by itself.")] = None,
    output: Output = Format.TABLE,
    show_rpc: ShowRpc = False,
) -> None:
    """End the guest."""
    with session.client(show_rpc) as client:
        write_one(client.stop_partition(name, timeout=timeout), DETAILS, output)


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


@app.command()
def log(name: Name, show_rpc: ShowRpc = False) -> None:
    """What the guest itself has said."""
    with session.client(show_rpc) as client:
        path = Path(client.get_partition(name).log_path)
    typer.echo(path.read_text(errors="replace"), nl=False)
