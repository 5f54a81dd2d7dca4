"""`vswitch port ...`"""

from __future__ import annotations

from typing import Annotated

import typer

from vswitchctl import names, session
from vswitchctl.output import Columns, Format, counted, write_list, write_one
from vswitchctl.session import Force, Output, ShowRpc

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Ports of switches: counters and drops.")

Name = Annotated[str, typer.Argument(metavar="SWITCH/PORT", help="Name of the port, as s0/p0.")]

COLUMNS: Columns = {
    "name": lambda port: names.short(port.name),
    "number": lambda port: port.number,
    "nic": lambda port: names.short(port.nic),
    "in": lambda port: _traffic(port.counters.in_packets, port.counters.in_bytes),
    "out": lambda port: _traffic(port.counters.out_packets, port.counters.out_bytes),
    "dropped": lambda port: [f"{drop.packets} {drop.reason}" for drop in port.counters.drops],
}
DETAILS: Columns = {**COLUMNS, "friendly name": lambda port: port.friendly_name}


@app.command()
def create(
    ports: Annotated[list[str], typer.Argument(metavar="SWITCH/PORT...", help="As s0/p0 s0/p1.")],
    friendly_name: Annotated[str, typer.Option(help="A text for humans.")] = "",
    output: Output = Format.TABLE,
    show_rpc: ShowRpc = False,
) -> None:
    """Make ports; several of one switch are made all or none."""
    full = [names.port(name) for name in ports]
    with session.client(show_rpc) as client:
        if len(full) == 1:
            write_one(client.create_port(full[0], friendly_name=friendly_name), DETAILS, output)
            return
        if friendly_name:
            raise ValueError("--friendly-name is for one port")
        switches = {name.rsplit("/", 2)[0] for name in full}
        if len(switches) > 1:
            raise ValueError("ports made together must be of one switch")
        made = client.create_ports(switches.pop(), [names.leaf(name) for name in full])
        write_list(made, COLUMNS, output)


@app.command("list")
def list_(
    switch: Annotated[str, typer.Option(help="Only this switch.")] = "-",
    output: Output = Format.TABLE,
    show_rpc: ShowRpc = False,
) -> None:
    """All ports."""
    with session.client(show_rpc) as client:
        write_list(client.list_ports(switch), COLUMNS, output)


@app.command()
def show(name: Name, output: Output = Format.TABLE, show_rpc: ShowRpc = False) -> None:
    """One port: its counters, and why it dropped what it dropped."""
    with session.client(show_rpc) as client:
        write_one(client.get_port(name), DETAILS, output)


@app.command("set")
def set_(
    name: Name,
    friendly_name: Annotated[str, typer.Option(help="A text for humans.")],
    output: Output = Format.TABLE,
    show_rpc: ShowRpc = False,
) -> None:
    """Change a port."""
    with session.client(show_rpc) as client:
        write_one(client.update_port(name, friendly_name=friendly_name), DETAILS, output)


@app.command()
def delete(name: Name, force: Force = False, show_rpc: ShowRpc = False) -> None:
    """Take a port away; with --force also the NIC that is connected to it."""
    with session.client(show_rpc) as client:
        client.delete_port(name, force=force)


def _traffic(packets: int, octets: int) -> str:
    return f"{counted(packets, 'packet')}, {counted(octets, 'byte')}"
