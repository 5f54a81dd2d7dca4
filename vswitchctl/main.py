"""The command `vswitch`: groups that are imported when they are used, and one place where errors
become words.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

# Name -> where its typer application or function is, and what `vswitch --help` says of it.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "demo": ("vswitchlab.app", "demo", "Two guests, an extension, a capture: the whole story, checked."),
    "doctor": ("vswitchlab.app", "doctor", "What this machine lacks for guests, with a remedy for each."),
    "lab": ("vswitchlab.app", "lab_app", "Labs: several guests and switches from one YAML file."),
    "switch": ("vswitchctl.commands.switch", "app", "Switches, their MAC tables and flows."),
    "port": ("vswitchctl.commands.port", "app", "Ports of switches: counters and drops."),
    "nic": ("vswitchctl.commands.nic", "app", "Synthetic NICs of partitions."),
    "partition": (
        "vswitchctl.commands.partition",
        "app",
        "Guests, processes and VMs: start, stop, exec, console.",
    ),
    "extension": ("vswitchctl.commands.extension", "app", "Python plug-ins of switches."),
    "capture": ("vswitchctl.commands.capture", "app", "Live pcapng of ports or of VMBus."),
    "inject": ("vswitchctl.commands.frames", "inject", "Let the frames of a file enter at a port."),
    "trace": ("vswitchctl.commands.frames", "trace", "What would happen to a frame, stage by stage."),
    "watch": ("vswitchctl.commands.watch", "watch", "Changes and events as they happen."),
    "daemon": ("vswitchctl.commands.daemon", "app", "The daemon that all this is asked of."),
}


class LazyGroup(TyperGroup):
    """A group whose commands are imported when they are run: starting must not cost what is not used."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, text = COMMANDS[cmd_name]
        if ctx.resilient_parsing or _only_help():
            return TyperCommand(cmd_name, help=text)
        found: Any = getattr(import_module(module), attribute)
        if not isinstance(found, typer.Typer):
            single = typer.Typer(add_completion=False)
            single.command(cmd_name)(found)
            found = single
        command = typer.main.get_command(found)
        command.name = cmd_name
        return command


def _only_help() -> bool:
    """Whether it is the list of commands that is asked for: then their own words are not needed."""
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    return not words


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


@app.callback()
def root(
    run_dir: Annotated[
        Path | None, typer.Option(help="Run directory of the daemon (env: VSWITCH_RUN_DIR).")
    ] = None,
    socket: Annotated[Path | None, typer.Option(help="Socket of the daemon (env: VSWITCH_SOCKET).")] = None,
) -> None:
    """The Hyper-V networking stack on Linux: switches, guests, extensions, captures.

    `vswitch demo` shows it all; `vswitch daemon start` begins the work.
    """
    # Through the environment, so that labs and the daemons they start follow too.
    if run_dir is not None:
        os.environ["VSWITCH_RUN_DIR"] = str(run_dir.absolute())
        os.environ.pop("VSWITCH_SOCKET", None)
    if socket is not None:
        os.environ["VSWITCH_SOCKET"] = str(socket.absolute())


def main() -> None:
    """The entry point: a failed call is a message and a remedy, never a traceback."""
    try:
        app(prog_name="vswitch")
    except BrokenPipeError:
        # Whoever read standard output has left, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)
    except Exception as error:
        sys.exit(_report(error))


def _report(error: Exception) -> int:
    from vswitchctl import session
    from vswitchctl.errors import VswitchError
    from vswitchctl.launch import LaunchError

    if isinstance(error, VswitchError):
        session.report(error.message, error.remedy)
        return session.exit_code(error)
    if isinstance(error, LaunchError):
        session.report(str(error).removeprefix("vswitchd: "))
        return session.EXIT_FAILED
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        session.report(f"{os.fsdecode(error.filename)}: {error.strerror}")
        return session.EXIT_USAGE
    if isinstance(error, ValueError | OSError):
        session.report(str(error))
        return session.EXIT_USAGE
    raise error


if __name__ == "__main__":
    main()
