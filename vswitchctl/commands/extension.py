"""`vswitch extension ...`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vswitch_api.v1 import extension_pb2
from vswitchctl import names, session
from vswitchctl.commands.choices import OnFailureChoice, short_enum
from vswitchctl.output import Columns, Format, write_list, write_one
from vswitchctl.session import Output, ShowRpc

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Python plug-ins of switches.")

Name = Annotated[str, typer.Argument(metavar="SWITCH/EXTENSION", help="As s0/block_telnet.")]

COLUMNS: Columns = {
    "name": lambda extension: names.short(extension.name),
    "kind": lambda extension: short_enum(extension_pb2.ExtensionKind.Name(extension.kind), "EXTENSION_KIND_"),
    "state": lambda extension: short_enum(
        extension_pb2.ExtensionState.Name(extension.state), "EXTENSION_STATE_"
    ),
    "on failure": lambda extension: short_enum(
        extension_pb2.OnFailure.Name(extension.on_failure), "ON_FAILURE_"
    ),
    "pid": lambda extension: extension.pid or "",
    "restarts": lambda extension: extension.restarts,
    "detail": lambda extension: extension.detail,
}


@app.command()
def load(
    file: Annotated[Path, typer.Argument(help="The plug-in, a Python file; - for standard input.")],
    switch: Annotated[str, typer.Option(help="The switch to load it into.")],
    name: Annotated[str, typer.Option(help="Default: the file's name without .py.")] = "",
    on_failure: Annotated[
        OnFailureChoice, typer.Option(help="Let frames pass (open) or drop them (closed) when it fails.")
    ] = OnFailureChoice.OPEN,
    output: Output = Format.TABLE,
    show_rpc: ShowRpc = False,
) -> None:
    """Load a plug-in: the switch asks it about the first frame of each flow."""
    source = session.read_bytes(file)
    with session.client(show_rpc) as client:
        made = client.load_extension(
            switch, name or file.stem, source, file_name=file.name, on_failure=on_failure
        )
        write_one(made, COLUMNS, output)


@app.command("list")
def list_(
    switch: Annotated[str, typer.Option(help="Only this switch.")] = "-",
    output: Output = Format.TABLE,
    show_rpc: ShowRpc = False,
) -> None:
    """All extensions, in the order in which they see a frame."""
    with session.client(show_rpc) as client:
        write_list(client.list_extensions(switch), COLUMNS, output)


@app.command()
def show(name: Name, output: Output = Format.TABLE, show_rpc: ShowRpc = False) -> None:
    """One extension."""
    with session.client(show_rpc) as client:
        write_one(client.get_extension(name), COLUMNS, output)


@app.command("set")
def set_(
    name: Name,
    on_failure: Annotated[OnFailureChoice, typer.Option(help="What to do with frames when it fails.")],
    output: Output = Format.TABLE,
    show_rpc: ShowRpc = False,
) -> None:
    """Change an extension."""
    with session.client(show_rpc) as client:
        write_one(client.update_extension(name, on_failure=on_failure), COLUMNS, output)


@app.command()
def unload(name: Name, show_rpc: ShowRpc = False) -> None:
    """Take an extension out; its process ends."""
    with session.client(show_rpc) as client:
        client.unload_extension(name)
