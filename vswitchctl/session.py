"""What every command needs: its options, a client that can print the calls it makes, and errors as exit
statuses.

Exit statuses: 0 done; 1 failed; 2 wrong command line; 3 no daemon answers; 4 no such resource; 5 the
resource's state does not allow it, or the name is taken; 6 not permitted; 7 a value was refused; 8 deadline
or limit. `partition exec` ends with the status of the command it ran (128 and the signal's number when one
ended it).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vswitchctl import paths
from vswitchctl.output import Format, printable

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from vswitchctl.aio import AsyncClient
    from vswitchctl.client import Client, VswitchError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NO_DAEMON = 3
# By the name of the gRPC status.
EXIT_CODES = {
    "UNAVAILABLE": EXIT_NO_DAEMON,
    "NOT_FOUND": 4,
    "ALREADY_EXISTS": 5,
    "FAILED_PRECONDITION": 5,
    "ABORTED": 5,
    "PERMISSION_DENIED": 6,
    "UNAUTHENTICATED": 6,
    "INVALID_ARGUMENT": 7,
    "OUT_OF_RANGE": 7,
    "DEADLINE_EXCEEDED": 8,
    "RESOURCE_EXHAUSTED": 8,
}

Output = Annotated[
    Format, typer.Option("--output", "-o", help="How to write the result.", rich_help_panel="Common")
]
ShowRpc = Annotated[
    bool,
    typer.Option(
        "--show-rpc", help="Print each call (service, method, request) on stderr.", rich_help_panel="Common"
    ),
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Also take away what depends on it.")]


def client(show_rpc: bool = False) -> Client:
    """A synchronous client of the daemon that the command line or the environment names."""
    from vswitchctl.client import Client

    return Client(paths.socket_path(), on_call=print_call if show_rpc else None)


def async_client(show_rpc: bool = False) -> AsyncClient:
    """The same, for asyncio; to be made on the loop."""
    from vswitchctl.aio import AsyncClient

    return AsyncClient(paths.socket_path(), on_call=print_call if show_rpc else None)


def print_call(method: str, request: Message) -> None:
    """One line on standard error: what a program would call to get the same."""
    from google.protobuf.json_format import MessageToDict

    values = MessageToDict(request, preserving_proto_field_name=True)
    for value in values.values():
        if isinstance(value, dict) and len(str(value.get("source", ""))) > 200:
            value["source"] = f"{value['source'][:60]}..."
    sys.stderr.write(f"{method} {json.dumps(values, ensure_ascii=False)}\n")


def exit_code(error: VswitchError) -> int:
    """The exit status for a failed call."""
    if error.reason == "DAEMON_UNAVAILABLE":
        return EXIT_NO_DAEMON
    if error.code.name == "UNAVAILABLE" and error.reason:
        return EXIT_FAILED  # The daemon answered; what it needed for the work did not.
    return EXIT_CODES.get(error.code.name, EXIT_FAILED)


def report(message: str, remedy: str = "") -> None:
    """An error for people: what happened and what to do."""
    sys.stderr.write(f"error: {printable(message)}\n")
    if remedy:
        sys.stderr.write(f"remedy: {printable(remedy)}\n")


def read_bytes(path: Path) -> bytes:
    """A whole file, or standard input for "-"; a plain error when it cannot be read."""
    if str(path) == "-":
        return sys.stdin.buffer.read()
    try:
        return path.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}") from None
