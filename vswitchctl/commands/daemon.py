"""`vswitch daemon ...`"""

from __future__ import annotations

import os
import sys
import time
from typing import Annotated

import typer

from vswitch_api.v1 import daemon_pb2, partition_pb2
from vswitchctl import names, paths, session
from vswitchctl.commands.choices import EngineChoice, engine_text, short_enum
from vswitchctl.output import Columns, Format, write_one
from vswitchctl.session import Output, ShowRpc

app = typer.Typer(no_args_is_help=True, add_completion=False, help="The daemon that all this is asked of.")

Engine = Annotated[EngineChoice | None, typer.Option(help="Default: native where it is built.")]
Users = Annotated[list[str] | None, typer.Option(metavar="USER", help="Another user who may connect so.")]
StartedBy = Annotated[str, typer.Option(help="Free text for `daemon status`.")]

COLUMNS: Columns = {
    "version": lambda info: info.version,
    "pid": lambda info: info.pid,
    "engine": lambda info: engine_text(info.default_engine),
    "native": lambda info: info.native_missing or "available",
    "run dir": lambda info: info.run_dir,
    "socket": lambda info: info.socket_path,
    "since": lambda info: info.start_time.ToJsonString(),
    "role": lambda info: short_enum(daemon_pb2.Role.Name(info.role), "ROLE_"),
    "started by": lambda info: info.started_by,
    "reattached": lambda info: [names.short(name) for name in info.restore.reattached],
    "gone": lambda info: [names.short(name) for name in info.restore.gone],
}


def _options(
    engine: EngineChoice | None,
    viewer: list[str] | None,
    operator: list[str] | None,
    admin: list[str] | None,
    started_by: str,
) -> list[str]:
    options: list[str] = []
    if engine is not None:
        options += ["--engine", engine]
    for role, users in (("viewer", viewer), ("operator", operator), ("admin", admin)):
        for user in users or []:
            options += [f"--{role}", user]
    if started_by:
        options += ["--started-by", started_by]
    if socket := os.environ.get("VSWITCH_SOCKET"):
        options += ["--socket", socket]
    return options


@app.command()
def run(
    engine: Engine = None,
    viewer: Users = None,
    operator: Users = None,
    admin: Users = None,
    started_by: StartedBy = "",
) -> None:
    """Run the daemon here, until Ctrl-C. Guests live on for their grace period."""
    from vswitchctl import launch

    command = launch.daemon_command(
        paths.default_run_dir(), *_options(engine, viewer, operator, admin, started_by)
    )
    os.execve(command[0], command, launch.daemon_environment())


@app.command()
def start(
    engine: Engine = None,
    viewer: Users = None,
    operator: Users = None,
    admin: Users = None,
    started_by: StartedBy = "",
    output: Output = Format.TABLE,
    show_rpc: ShowRpc = False,
) -> None:
    """Start a daemon in the background. It finds the guests of one that was there before."""
    from vswitchctl import launch

    launch.start_daemon(options=_options(engine, viewer, operator, admin, started_by))
    status(output, show_rpc)


@app.command()
def stop(
    stop_guests: Annotated[
        bool, typer.Option("--stop-guests", help="End the guests too; else they wait for the next daemon.")
    ] = False,
    show_rpc: ShowRpc = False,
) -> None:
    """End the daemon."""
    with session.client(show_rpc) as client:
        pid = client.get_info().pid
        alive = partition_pb2.PARTITION_STATE_RUNNING
        running = [each for each in client.list_partitions() if each.state == alive]
        client.shutdown(stop_guests=stop_guests)
    deadline = time.monotonic() + 30.0
    while os.path.exists(f"/proc/{pid}") and not _is_zombie(pid):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the daemon (pid {pid}) has not ended within 30 s; see its log")
        time.sleep(0.02)
    if running and not stop_guests:
        shortest = min(each.process.grace.ToTimedelta().total_seconds() for each in running)
        guests = "1 guest lives" if len(running) == 1 else f"{len(running)} guests live"
        sys.stderr.write(f"{guests} on and wait {shortest:g} s for `vswitch daemon start`\n")


@app.command()
def status(output: Output = Format.TABLE, show_rpc: ShowRpc = False) -> None:
    """What runs, where, and what it found when it started."""
    with session.client(show_rpc) as client:
        write_one(client.get_info(), COLUMNS, output)


def _is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
