"""`vswitch nic ...`"""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from typing import Annotated

import typer

from vswitch_api.v1 import common_pb2, nic_pb2
from vswitchctl import names, session
from vswitchctl.commands.choices import short_enum
from vswitchctl.output import Columns, Format, write_list, write_one
from vswitchctl.session import Output, ShowRpc

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Synthetic NICs of partitions.")

Name = Annotated[str, typer.Argument(metavar="PARTITION/NIC", help="Name of the NIC, as a/eth0.")]

COLUMNS: Columns = {
    "name": lambda nic: names.short(nic.name),
    "port": lambda nic: names.short(nic.port),
    "mac": lambda nic: nic.mac,
    "addresses": lambda nic: list(nic.addresses),
    "link": lambda nic: short_enum(common_pb2.LinkState.Name(nic.link), "LINK_STATE_"),
    "state": lambda nic: short_enum(nic_pb2.NicState.Name(nic.state), "NIC_STATE_"),
    "nvsp": lambda nic: nic.nvsp_version,
}
DETAILS: Columns = {
    **COLUMNS,
    "mtu": lambda nic: nic.mtu,
    "gateway": lambda nic: nic.gateway,
    "queues": lambda nic: f"{nic.open_queues} of {nic.queues}" + (" (rss)" if nic.receive_scaling else ""),
    **{
        f"{way} by queue": partial(
            lambda field, nic: " ".join(str(getattr(queue, field)) for queue in nic.queue_counters), field
        )
        for way, field in (("received", "rx_packets"), ("sent", "tx_packets"))
    },
}


class Link(StrEnum):
    """States of a link."""

    UP = "up"
    DOWN = "down"


@app.command()
def create(
    name: Name,
    port: Annotated[str, typer.Option(metavar="SWITCH/PORT", help="Made with the NIC when missing.")],
    mac: Annotated[str, typer.Option(help="Default: one of Microsoft's range.")] = "",
    mtu: Annotated[int, typer.Option(help="Default: 1500; a virtual machine may choose up to 9000.")] = 0,
    queues: Annotated[int, typer.Option(help="Default: one per virtual processor, at most 8.")] = 0,
    address: Annotated[list[str] | None, typer.Option(help="As 10.0.0.1/24; may come again.")] = None,
    gateway: Annotated[str, typer.Option(help="The guest's default gateway.")] = "",
    existing_port: Annotated[bool, typer.Option("--existing-port", help="Do not make the port.")] = False,
    output: Output = Format.TABLE,
    show_rpc: ShowRpc = False,
) -> None:
    """Give a partition a NIC on a port of a switch."""
    with session.client(show_rpc) as client:
        made = client.create_nic(
            name,
            port=port,
            mac=mac,
            mtu=mtu,
            queues=queues,
            addresses=address or (),
            gateway=gateway,
            create_port=not existing_port,
        )
        write_one(made, DETAILS, output)


@app.command("list")
def list_(
    partition: Annotated[str, typer.Option(help="Only this partition.")] = "-",
    output: Output = Format.TABLE,
    show_rpc: ShowRpc = False,
) -> None:
    """All NICs."""
    with session.client(show_rpc) as client:
        write_list(client.list_nics(partition), COLUMNS, output)


@app.command()
def show(name: Name, output: Output = Format.TABLE, show_rpc: ShowRpc = False) -> None:
    """One NIC."""
    with session.client(show_rpc) as client:
        write_one(client.get_nic(name), DETAILS, output)


@app.command()
def link(name: Name, state: Link, output: Output = Format.TABLE, show_rpc: ShowRpc = False) -> None:
    """Plug the cable in, or out."""
    with session.client(show_rpc) as client:
        write_one(client.set_nic_link(name, up=state is Link.UP), DETAILS, output)


@app.command("set")
def set_(
    name: Name,
    link: Annotated[Link, typer.Option(help="Plug the cable in, or out.")],
    output: Output = Format.TABLE,
    show_rpc: ShowRpc = False,
) -> None:
    """Change a NIC."""
    with session.client(show_rpc) as client:
        write_one(client.set_nic_link(name, up=link is Link.UP), DETAILS, output)


@app.command()
def delete(name: Name, show_rpc: ShowRpc = False) -> None:
    """Take a NIC away from its guest."""
    with session.client(show_rpc) as client:
        client.delete_nic(name)
