"""`vswitch watch`"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from vswitch_api.v1 import watch_pb2
from vswitchctl import names, session
from vswitchctl.commands.choices import short_enum
from vswitchctl.output import Format, printable, to_plain
from vswitchctl.session import Output, ShowRpc


def watch(
    prefixes: Annotated[
        list[str] | None, typer.Argument(metavar="[PREFIX...]", help="As switches/s0 or partitions/.")
    ] = None,
    no_snapshot: Annotated[bool, typer.Option("--no-snapshot", help="Only what happens from now.")] = False,
    until_synced: Annotated[bool, typer.Option("--until-synced", help="End after the snapshot.")] = False,
    output: Output = Format.TABLE,
    show_rpc: ShowRpc = False,
) -> None:
    """Show what exists, then changes and events as they happen, one per line, until Ctrl-C."""
    with session.client(show_rpc) as client:
        for response in client.watch(prefixes or (), snapshot=not no_snapshot):
            if output is Format.TABLE:
                typer.echo(printable(_line(response)))
            else:
                typer.echo(json.dumps(to_plain(response), ensure_ascii=False))
            if until_synced and response.HasField("synced"):
                return


def _line(response: watch_pb2.WatchResponse) -> str:
    kind = response.WhichOneof("message")
    if kind == "event":
        event = response.event
        moment = event.time.ToDatetime().strftime("%H:%M:%S.%f")[:-3]
        return f"{moment}  {event.kind}  {names.short(event.resource)}  {event.text}"
    if kind == "change":
        change = response.change
        what = short_enum(watch_pb2.ChangeType.Name(change.type), "CHANGE_TYPE_")
        return f"{what:<9} {change.name}"
    return "synced"
