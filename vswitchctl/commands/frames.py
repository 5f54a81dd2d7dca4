"""`vswitch inject` and `vswitch trace`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vswitchctl import names, session
from vswitchctl.output import Format, counted, printable, to_plain, write_plain
from vswitchctl.session import Output, ShowRpc

if TYPE_CHECKING:
    from vswitchctl.client import Client
    from vswitchctl.packets import Sender

MAX_TRACED = 256

Port = Annotated[str, typer.Argument(metavar="SWITCH/PORT", help="Where the frames enter.")]


def inject(
    port: Port,
    file: Annotated[Path, typer.Argument(help="A pcap or pcapng file of Ethernet frames.")],
    output: Output = Format.TABLE,
    show_rpc: ShowRpc = False,
) -> None:
    """Let the frames of a file enter the switch as if the port's NIC had sent them."""
    from vswitchctl.capture_file import read_frames

    with session.client(show_rpc) as client:
        done = client.inject(port, read_frames(file))
    if output is not Format.TABLE:
        write_plain(to_plain(done), output)
        return
    typer.echo(f"{counted(done.frames, 'frame')}, {counted(done.bytes, 'byte')}")


def trace(
    port: Port,
    packet: Annotated[
        list[str] | None,
        typer.Option(help="Hex, or as scapy writes it: Ether()/IP(dst='10.0.0.2')/TCP(dport=23)"),
    ] = None,
    pcap: Annotated[Path | None, typer.Option(help="Trace the frames of a file.")] = None,
    output: Output = Format.TABLE,
    show_rpc: ShowRpc = False,
) -> None:
    """Tell what would happen to a frame, stage by stage, without sending it.

    What a packet leaves open (`Ether()`, `IP(dst=...)`) is as the port's NIC would send it.
    """
    from vswitchctl.capture_file import read_frames
    from vswitchctl.packets import is_hex, parse_packet

    texts = packet or []
    for text in texts:
        parse_packet(text)  # what is wrong in itself is told before anyone is asked
    if not texts and pcap is None:
        raise typer.BadParameter("give --packet or --pcap")
    with session.client(show_rpc) as client:
        sender = None if all(map(is_hex, texts)) else _sender(client, port)
        frames = [parse_packet(text, sender) for text in texts]
        if pcap is not None:
            frames += list(read_frames(pcap))
        traced = [
            frame
            for start in range(0, len(frames), MAX_TRACED)
            for frame in client.trace(port, frames[start : start + MAX_TRACED])
        ]
    if output is not Format.TABLE:
        write_plain([to_plain(frame) for frame in traced], output)
        return
    for number, frame in enumerate(traced, 1):
        typer.echo(f"frame {number}: {len(frames[number - 1])} bytes into {names.short(names.port(port))}")
        for step in frame.steps:
            reads = f"  (reads {', '.join(step.fields_read)})" if step.fields_read else ""
            typer.echo(printable(f"  {step.stage:<24} {step.verdict:<9} {step.detail}{reads}"))
        if frame.delivered_to:
            typer.echo(f"  => delivered to {', '.join(map(names.short, frame.delivered_to))}")
        else:
            typer.echo(printable(f"  => dropped: {frame.drop_reason}: {frame.drop_detail}"))


def _sender(client: Client, port: str) -> Sender:
    """The NIC at a port, and the addresses of all NICs on its switch."""
    from vswitchctl.packets import Sender

    full = names.port(port)
    nic = client.get_port(full).nic
    ports = full.rpartition("/")[0] + "/"
    on_switch = [each for each in client.list_nics() if each.port.startswith(ports)]
    neighbours = {address.split("/")[0]: each.mac for each in on_switch for address in each.addresses}
    own = next((each for each in on_switch if each.name == nic), None)
    if own is None:
        return Sender(neighbours=neighbours)
    return Sender(own.mac, tuple(address.split("/")[0] for address in own.addresses), neighbours)
