"""`python -m netvsc`: one guest. Run by the daemon with stdio and the door's listening socket
(VSWITCH_DOOR_FD), no more.

This process makes the namespaces, forks the guest's PID 1 and stays outside as its keeper: it holds
neither door nor memory, passes SIGTERM on, and ends with the guest's status. Killed itself, it takes the
guest with it.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from pathlib import Path

from netvsc import confinement
from vswitch_confine.errors import ConfinementRefused

DOOR = "VSWITCH_DOOR_FD"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m netvsc", description="Run one netns guest behind its door."
    )
    parser.add_argument(
        "--name", default="guest", help="the guest's name, for messages and as its first host name"
    )
    parser.add_argument("--kind", choices=["netns"], default="netns")
    parser.add_argument("--engine", choices=["native", "python"], help="default: native where it is built")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds to live without a daemon")
    parser.add_argument(
        "--link", choices=["auto", "tap", "veth"], default="auto", help="the interface's kind"
    )
    parser.add_argument(
        "--hide", type=Path, action="append", help="a directory to cover (default: the run directory)"
    )
    return parser.parse_args(arguments)


def main() -> int:
    """Returns the guest's exit status; 125 when it could not be set up."""
    options = parse(sys.argv[1:])
    try:
        door = int(os.environ[DOOR])
        listener = socket.socket(fileno=door)
    except (KeyError, ValueError, OSError):
        print(
            f"netvsc: {DOOR} must name the door's listening socket; guests are started by vswitchd",
            file=sys.stderr,
        )
        return 125
    try:
        hidden = options.hide
        if hidden is None:
            run_directory = confinement.run_directory_of(listener)
            hidden = [run_directory] if run_directory is not None and run_directory.is_dir() else []
        child = confinement.enter(hidden)
    except ConfinementRefused as refused:
        print(f"netvsc: guest {options.name}: {refused.strerror}", file=sys.stderr)
        return 125
    if child:
        listener.close()
        return keep(child)
    return guest(options, listener)


def keep(child: int) -> int:
    """The keeper: nothing but a signal and an exit status."""
    signal.signal(signal.SIGTERM, lambda _number, _frame: os.kill(child, signal.SIGTERM))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def guest(options: argparse.Namespace, listener: socket.socket) -> int:
    """PID 1 of the guest."""
    warnings = confinement.isolate_files()
    door = listener.detach()
    os.closerange(3, door)
    os.closerange(door + 1, os.sysconf("SC_OPEN_MAX"))
    os.set_inheritable(door, False)

    import asyncio
    import logging

    from netvsc.agent import Agent, Options
    from netvsc.door import DoorClient
    from netvsc.link import tap_refusal
    from vswitch_wire.engine import check_engine, default_engine

    logging.basicConfig(
        level=logging.INFO, format=f"{options.name}: %(levelname)s: %(message)s", stream=sys.stderr
    )
    log = logging.getLogger("netvsc")
    for warning in warnings:
        log.warning("%s", warning)
    kind = options.link
    if kind == "auto":
        refusal = tap_refusal()
        kind = "tap" if refusal is None else "veth"
        if refusal is not None:
            log.warning("no TAP, the interface is a veth pair joined by AF_PACKET: %s", refusal)
    engine = check_engine(options.engine) if options.engine else default_engine()

    async def run() -> int:
        client = DoorClient(socket.socket(fileno=door), engine=engine)
        return await Agent(Options(options.name, engine, options.grace, kind), client).run()

    return asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main())
