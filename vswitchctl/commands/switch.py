"""`vswitch switch ...`"""

from __future__ import annotations

from typing import Annotated

import typer

from vswitchctl import names, session
from vswitchctl.commands.choices import EngineChoice, engine_text
from vswitchctl.output import Columns, Format, write_list, write_one
from vswitchctl.session import Force, Output, ShowRpc

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Switches, their MAC tables and flows.")

Name = Annotated[str, typer.Argument(metavar="SWITCH", help="Name of the switch.")]

COLUMNS: Columns = {
    "name": lambda switch: names.leaf(switch.name),
    "engine": lambda switch: engine_text(switch.engine),
    "ports": lambda switch: switch.port_count,
    "extensions": lambda switch: [names.leaf(name) for name in switch.extensions],
}


@app.command()
def create(
    name: Name,
    engine: Annotated[EngineChoice | None, typer.Option(help="Default: the daemon's.")] = None,
    output: Output = Format.TABLE,
    show_rpc: ShowRpc = False,
) -> None:
    """Make a switch."""
    with session.client(show_rpc) as client:
        write_one(client.create_switch(name, engine=engine), COLUMNS, output)


@app.command("list")
def list_(output: Output = Format.TABLE, show_rpc: ShowRpc = False) -> None:
    """All switches."""
    with session.client(show_rpc) as client:
        write_list(client.list_switches(), COLUMNS, output)


@app.command()
def show(name: Name, output: Output = Format.TABLE, show_rpc: ShowRpc = False) -> None:
    """One switch."""
    with session.client(show_rpc) as client:
        write_one(client.get_switch(name), COLUMNS, output)


@app.command()
def delete(name: Name, force: Force = False, show_rpc: ShowRpc = False) -> None:
    """Take a switch away; with --force also its ports, NICs and extensions."""
    with session.client(show_rpc) as client:
        client.delete_switch(name, force=force)


@app.command()
def macs(name: Name, output: Output = Format.TABLE, show_rpc: ShowRpc = False) -> None:
    """Which address the switch has learned behind which port."""
    columns: Columns = {"mac": lambda entry: entry.mac, "port": lambda entry: names.leaf(entry.port)}
    with session.client(show_rpc) as client:
        write_list(client.list_mac_entries(name), columns, output)


@app.command()
def flows(name: Name, output: Output = Format.TABLE, show_rpc: ShowRpc = False) -> None:
    """The cached verdicts."""
    columns: Columns = {
        "packets": lambda flow: flow.packets,
        "bytes": lambda flow: flow.bytes,
        "match": lambda flow: flow.match,
        "action": lambda flow: flow.action,
    }
    with session.client(show_rpc) as client:
        write_list(client.list_flows(name), columns, output)


@app.command()
def flush(name: Name, show_rpc: ShowRpc = False) -> None:
    """Forget all cached verdicts."""
    with session.client(show_rpc) as client:
        client.flush_flows(name)
