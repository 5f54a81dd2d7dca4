"""`python -m vswitch_confine.enclosure -- PROGRAM ARGUMENTS...`: runs one program enclosed, with a keeper
outside.

The program becomes PID 1 of its own user, PID, mount, network, UTS and IPC namespaces: without
capabilities, without a way to new ones, with no network, and with the `--cover`ed directories empty. The
keeper holds none of the program's descriptors. It passes SIGTERM on, writes how the program ended to
`--status-fd`, and ends with its status; killed itself, it takes the program with it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from vswitch_confine import libc, limits, namespaces
from vswitch_confine.errors import ConfinementRefused

CANNOT_SET_UP = 125
CANNOT_EXECUTE = 127


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vswitch_confine.enclosure", description="Run one program in namespaces of its own."
    )
    parser.add_argument("--cover", type=Path, action="append", default=[], help="a directory to empty inside")
    parser.add_argument("--status-fd", type=int, help="where to write how the program ended")
    parser.add_argument("program", nargs="+", metavar="PROGRAM", help="the program and its arguments")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the program's exit status, 128 and the signal's number when one ended it; 125 and 127 are
    this program's own.
    """
    options = parse(sys.argv[1:] if arguments is None else arguments)
    program: list[str] = options.program
    try:
        child = namespaces.enter(options.cover)
    except ConfinementRefused as refused:
        print(f"{program[0]}: {refused.strerror}", file=sys.stderr)
        return CANNOT_SET_UP
    if child:
        return keep(child, options.status_fd)
    if options.status_fd is not None:
        os.close(options.status_fd)
    try:
        confine()
        os.execv(program[0], program)
    except OSError as error:
        print(f"{program[0]}: {error.strerror}", file=sys.stderr)
    os._exit(CANNOT_EXECUTE)


def confine() -> None:
    """As PID 1: an own /proc, no core dumps, no capabilities now or later."""
    try:
        namespaces.mount_proc()
    except ConfinementRefused:
        # A container that masks parts of /proc: what the host runs stays out of sight all the same.
        namespaces.cover(Path("/proc"), size="4k")
    limits.set_limits()
    limits.no_new_privileges()
    # The bounding set goes too: the program starts as root of its namespace and would get all of it back.
    libc.drop_capabilities()


def keep(child: int, status_fd: int | None) -> int:
    """The keeper: nothing but a signal and an exit status."""

    def pass_on(_number: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not by what /proc lists: the program mounts its own there, in the mount namespace that both are in.
    middle = 2 if status_fd is None else status_fd
    os.closerange(3, middle)
    os.closerange(middle + 1, os.sysconf("SC_OPEN_MAX"))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if status_fd is not None:
        os.write(status_fd, f"{code}\n".encode())
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
