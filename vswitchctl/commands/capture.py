"""`vswitch capture ...`"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from vswitchctl import names, session
from vswitchctl.aio import AsyncClient
from vswitchctl.errors import VswitchError
from vswitchctl.output import Columns, Format, counted, write_list, write_plain
from vswitchctl.session import Output, ShowRpc

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Live pcapng of ports or of VMBus.")

COLUMNS: Columns = {
    "name": lambda capture: names.leaf(capture.name),
    "of": lambda capture: [names.short(source) for source in capture.sources],
    "vmbus": lambda capture: capture.vmbus,
    "packets": lambda capture: capture.packets,
    "drops": lambda capture: capture.drops,
    "lost": lambda capture: capture.lost,
}


@app.command()
def start(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="SWITCH/PORT or SWITCH; with --vmbus PARTITION[/NIC]."),
    ],
    write: Annotated[
        Path, typer.Option("--write", "-w", help="File, or - to pipe it: ... -w - | wireshark -k -i -")
    ],
    vmbus: Annotated[bool, typer.Option("--vmbus", help="Record channel messages and ring packets.")] = False,
    snap_length: Annotated[int, typer.Option(help="Bytes kept of each packet; 0 = all.")] = 0,
    no_drops: Annotated[bool, typer.Option("--no-drops", help="Leave out dropped frames.")] = False,
    count: Annotated[int, typer.Option("--count", "-c", help="End after so many packets.")] = 0,
    duration: Annotated[float | None, typer.Option(help="End after so many seconds.")] = None,
    show_rpc: ShowRpc = False,
) -> None:
    """Record until Ctrl-C, a limit or `capture stop`. Drops are recorded with their reason."""
    full = [_source(source, vmbus) for source in sources]
    to_pipe = str(write) == "-"
    with contextlib.ExitStack() as stack:
        target = sys.stdout.buffer if to_pipe else stack.enter_context(write.open("wb"))
        asyncio.run(_record(full, target, vmbus, snap_length, not no_drops, count, duration, show_rpc))


async def _record(
    sources: list[str],
    target: BinaryIO,
    vmbus: bool,
    snap_length: int,
    drops: bool,
    count: int,
    duration: float | None,
    show_rpc: bool,
) -> None:
    loop = asyncio.get_running_loop()
    async with (
        session.async_client(show_rpc) as client,
        client.capture(
            *sources, vmbus=vmbus, snap_length=snap_length, drops=drops, packet_limit=count
        ) as stream,
    ):
        name = stream.capture.name
        sys.stderr.write(f"capturing {', '.join(map(names.short, sources))}: Ctrl-C ends it\n")
        sys.stderr.flush()
        ending: set[asyncio.Task[None]] = set()

        def end() -> None:
            # The daemon ends the file in good order, with its statistics.
            ending.add(asyncio.create_task(_stop(client, name)))

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end)
        if duration is not None:
            loop.call_later(duration, end)
        async for piece in stream:
            await asyncio.to_thread(_write, target, piece)
        final = stream.capture
        seen = f"{counted(final.packets, 'packet')}, {counted(final.drops, 'drop')}, {final.lost} lost"
        sys.stderr.write(f"{seen}\n")


async def _stop(client: AsyncClient, name: str) -> None:
    # It may just have ended by itself.
    with contextlib.suppress(VswitchError):
        await client.stop_capture(name)


def _write(target: BinaryIO, piece: bytes) -> None:
    target.write(piece)
    target.flush()


def _source(text: str, vmbus: bool) -> str:
    """The full name of a source: what has a slash is a port or NIC, the rest a switch or partition."""
    if text.startswith(("switches/", "partitions/")):
        return text
    if vmbus:
        return names.nic(text) if "/" in text else names.partition(text)
    return names.port(text) if "/" in text else names.switch(text)


@app.command("list")
def list_(output: Output = Format.TABLE, show_rpc: ShowRpc = False) -> None:
    """The captures that run now."""
    with session.client(show_rpc) as client:
        write_list(client.list_captures(), COLUMNS, output)


@app.command()
def stop(
    name: Annotated[str, typer.Argument(metavar="CAPTURE", help="Its number, see `capture list`.")],
    show_rpc: ShowRpc = False,
) -> None:
    """End a capture; its file ends in good order."""
    with session.client(show_rpc) as client:
        client.stop_capture(name)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A pcapng or pcap file; - for standard input.")],
    filter_: Annotated[str, typer.Option("--filter", help="pcap filter expression, as for tcpdump.")] = "",
    drops: Annotated[bool, typer.Option("--drops", help="Only dropped frames.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """A file in words, a line per packet, drops with their reason."""
    from vswitchctl import capture_file, capture_show

    records = capture_file.read(sys.stdin.buffer) if str(file) == "-" else capture_file.read_file(file)
    if filter_:
        records = filter(capture_show.compile_filter(filter_), records)
    if drops:
        records = (record for record in records if record.drop_code is not None)
    if output is not Format.TABLE:
        write_plain([capture_show.plain(record) for record in records], output)
        return
    for line in capture_show.lines(records):
        typer.echo(line)
