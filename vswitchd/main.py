"""The daemon's command line: `python -m vswitchd`, or `vswitch daemon run`."""

from __future__ import annotations

import argparse
import asyncio
import os
import pwd
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import vswitch_native
from vswitch_wire.engine import Engine, check_engine, default_engine
from vswitchd import logs
from vswitchd.access import Role
from vswitchd.core import Config
from vswitchd.rundir import RunDir, StartError

EXIT_CANNOT_START = 1


def parser() -> argparse.ArgumentParser:
    """The options of the daemon."""
    options = argparse.ArgumentParser(prog="vswitchd", description="The vswitch daemon, in the foreground.")
    options.add_argument("--run-dir", type=Path, required=True, help="private directory of this daemon")
    options.add_argument("--socket", type=Path, help="where to serve the API (default: RUN_DIR/api.sock)")
    options.add_argument("--engine", choices=get_args(Engine), help="default: native where it is built")
    for role in (Role.VIEWER, Role.OPERATOR, Role.ADMIN):
        options.add_argument(
            f"--{role.name.lower()}",
            action="append",
            default=[],
            metavar="USER",
            help=f"user name or uid that may connect as {role.name.lower()}; needs --socket",
        )
    options.add_argument("--started-by", default="", help="free text for `vswitch daemon status`")
    options.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    options.add_argument("--ready-fd", type=int, help="a descriptor to write a line to when serving")
    return options


def config_of(arguments: argparse.Namespace) -> Config:
    """The configuration that the options give. StartError when they contradict each other."""
    run_dir = RunDir(arguments.run_dir.absolute())
    socket = (arguments.socket or run_dir.root / "api.sock").absolute()
    roles = {
        _uid(user): role
        for role in (Role.VIEWER, Role.OPERATOR, Role.ADMIN)
        for user in getattr(arguments, role.name.lower())
    }
    if roles and socket.parent == run_dir.root:
        raise StartError(
            f"other users are to connect, but {socket} lies in a directory that only this user can enter; "
            "give --socket a path that they can reach, as /run/vswitch/api.sock"
        )
    try:
        engine = check_engine(arguments.engine) if arguments.engine else default_engine()
    except RuntimeError as error:
        raise StartError(str(error)) from None
    # Said here in a sentence, not by whatever call first misses something.
    outdated = vswitch_native.outdated() if engine == "native" else ""
    if outdated:
        raise StartError(f"{outdated}, or start with --engine python")
    return Config(run_dir, socket, engine, roles, arguments.started_by)


def _uid(user: str) -> int:
    if user.isdecimal():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise StartError(f"there is no user {user!r}; give a user name or a uid") from None


async def _run(config: Config, ready_fd: int | None) -> None:
    # Imported late, so that a wrong option is told at once.
    from vswitchd.daemon import Daemon

    daemon = Daemon(config)
    await daemon.start()
    if ready_fd is not None:
        os.write(ready_fd, b"ready\n")
        os.close(ready_fd)
    await daemon.run()
    await daemon.stop()


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    os.umask(0o077)
    logs.set_up(arguments.log_level)
    try:
        config = config_of(arguments)
        config.run_dir.prepare()
        asyncio.run(_run(config, arguments.ready_fd))
    except StartError as error:
        print(f"vswitchd: {error}", file=sys.stderr)
        return EXIT_CANNOT_START
    return 0
