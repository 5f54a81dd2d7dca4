"""`vswitch inject` and `vswitch trace`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vswitchctl import names, session
from vswitchctl.output import Format, to_plain, write_plain
from vswitchctl.session import Output, ShowRpc

MAX_TRACED = 256

Port = Annotated[str, typer.Argument(metavar="SWITCH/PORT", help="Where the frames enter.")]


def inject(
    port: Port,
    file: Annotated[Path, typer.Argument(help="A pcap or pcapng file of Ethernet frames.")],
    show_rpc: ShowRpc = False,
) -> None:
    """Let the frames of a file enter the switch as if the port's NIC had sent them."""
    from vswitchctl.capture_file import read_frames

    with session.client(show_rpc) as client:
        done = client.inject(port, read_frames(file))
    typer.echo(f"{done.frames} frames, {done.bytes} bytes")


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
    """Tell what would happen to a frame, stage by stage, without sending it."""
    from vswitchctl.capture_file import read_frames
    from vswitchctl.packets import parse_packet

    frames = [parse_packet(text) for text in packet or []]
    if pcap is not None:
        frames += list(read_frames(pcap))
    if not frames:
        raise typer.BadParameter("give --packet or --pcap")
    with session.client(show_rpc) as client:
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
            typer.echo(f"  {step.stage:<24} {step.verdict:<9} {step.detail}{reads}")
        if frame.delivered_to:
            typer.echo(f"  => delivered to {', '.join(map(names.short, frame.delivered_to))}")
        else:
            typer.echo(f"  => dropped: {frame.drop_reason}: {frame.drop_detail}")
