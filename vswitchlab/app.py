"""The commands `vswitch lab ...`, `vswitch demo` and `vswitch doctor`.

Exit status: 0 all well; 1 something failed (reason and remedy are on stderr); 2 the command line or the lab
file is wrong. `lab exec` and `lab ping` give the status of what ran in the guest.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer

from vswitchctl import names, terminal
from vswitchctl.aio import AsyncClient
from vswitchctl.client import VswitchError
from vswitchctl.launch import LaunchError
from vswitchctl.output import Format
from vswitchctl.session import Output, report
from vswitchlab import graph as pictures
from vswitchlab import lifecycle, show
from vswitchlab.guests import environment
from vswitchlab.lifecycle import LabError
from vswitchlab.problems import LabFileError
from vswitchlab.progress import Reporter
from vswitchlab.resolve import resolve
from vswitchlab.schema import schema_text
from vswitchlab.source import load_file
from vswitchlab.topology import Lab

__all__ = ["demo", "doctor", "lab_app"]

T = TypeVar("T")

lab_app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Labs: bring up, use and take down what a YAML file describes.",
)


class Picture(StrEnum):
    """The forms of `lab graph`."""

    TEXT = "text"
    MERMAID = "mermaid"


class EngineName(StrEnum):
    """The two engines."""

    NATIVE = "native"
    PYTHON = "python"


FileArgument = Annotated[
    Path | None,
    typer.Argument(help="The lab file; default: the only lab.yaml or *.lab.yaml here.", show_default=False),
]
NameArgument = Annotated[
    str | None, typer.Argument(help="The lab's name or file; default: the only one up.", show_default=False)
]
LabOption = Annotated[
    str | None, typer.Option("--lab", help="The lab's name, where several are up.", show_default=False)
]

ROW = ("guest", "kind", "state", "nic", "port", "mac", "addresses", "nic_state")


def _run(action: Callable[[AsyncClient], Awaitable[T]]) -> T:
    """Runs `action` with a client; what goes wrong becomes one or two lines on stderr and an exit status."""

    async def with_client() -> T:
        async with AsyncClient() as client:
            return await action(client)

    try:
        return asyncio.run(with_client())
    except (VswitchError, LabError) as error:
        _fail(str(error), error.remedy)
    except LaunchError as error:
        _fail(f"the daemon did not start: {error}", "see `vswitch doctor`")


def _fail(message: str, remedy: str = "", status: int = 1) -> NoReturn:
    report(message, remedy)
    raise typer.Exit(status)


def _count(number: int, word: str, ending: str = "s") -> str:
    return f"{number} {word}{ending if number != 1 else ''}"


def _lab(file: Path | None) -> Lab:
    if file is None:
        here = sorted({*Path().glob("lab.yaml"), *Path().glob("*.lab.yaml")})
        if len(here) != 1:
            found = f"there are several here: {', '.join(map(str, here))}" if here else "there is none here"
            _fail(f"which lab file? {found}", "name it: vswitch lab up FILE", 2)
        file = here[0]
    try:
        return resolve(load_file(file))
    except LabFileError as error:
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(2) from None


def _name(name: str | None) -> str | None:
    """A lab's name; where a file is given, the name in it."""
    return _lab(Path(name)).name if name and name.endswith((".yaml", ".yml")) else name


@lab_app.command("up")
def lab_up(file: FileArgument = None, output: Output = Format.TABLE) -> None:
    """Bring a lab up; starts the daemon where none runs."""
    lab = _lab(file)

    async def act(client: AsyncClient) -> None:
        with Reporter() as progress:
            await lifecycle.ensure_daemon(client, lab.engine, progress)
            results = await lifecycle.up(client, lab, progress)
        for guest, done in results:
            for line in done.stdout.decode(errors="replace").splitlines():
                sys.stderr.write(f"{guest}: {line}\n")
        rows = await show.lab_rows(client, await lifecycle.find(client, lab.name))
        show.emit(output, {"lab": lab.name, "nics": rows}, rows, ROW)
        sys.stderr.write(f"next: {_next(lab)}\n")

    _run(act)


def _next(lab: Lab) -> str:
    """What can be done with a lab that is up: our commands run in process guests alone."""
    connected = [guest for guest in lab.guests if guest.nics and guest.hosts]
    source = next((guest for guest in connected if not guest.machine), None)
    target = next((guest for guest in connected if guest is not source), None)
    if source and target:
        return f"vswitch lab ping {source.name} {target.name}"
    first = lab.guests[0].name
    if lab.guests[0].machine:
        return f"vswitch partition console {first}"
    return f"vswitch lab exec {first} -- ip address"


@lab_app.command("down")
def lab_down(name: NameArgument = None) -> None:
    """Take a lab down; nothing of it is left, nor the daemon where a lab had started it."""
    wanted = _name(name)

    async def act(client: AsyncClient) -> None:
        with Reporter() as progress:
            lab = await lifecycle.find(client, wanted)
            await lifecycle.down(client, lab, progress)
            stopped = await lifecycle.stop_idle_daemon(client)
        ended = "; the daemon has ended too" if stopped else ""
        sys.stderr.write(f"lab {lab.name} is down{ended}\nnext: vswitch lab up {lab.file or 'FILE'}\n")

    _run(act)


@lab_app.command("list")
def lab_list(output: Output = Format.TABLE) -> None:
    """The labs that are up."""

    async def act(client: AsyncClient) -> None:
        rows = show.labs_rows(await lifecycle.running(client))
        show.emit(output, {"labs": rows}, rows, ("lab", "guests", "switches", "engine", "file"))

    _run(act)


@lab_app.command("status")
@lab_app.command("show")
def lab_show(name: NameArgument = None, output: Output = Format.TABLE) -> None:
    """The guests of a lab that is up, their states, NICs, ports and addresses."""
    wanted = _name(name)

    async def act(client: AsyncClient) -> None:
        lab = await lifecycle.find(client, wanted)
        rows = await show.lab_rows(client, lab)
        show.emit(output, {"lab": lab.name, "nics": rows}, rows, ROW)

    _run(act)


@lab_app.command("exec", context_settings={"ignore_unknown_options": True})
def lab_exec(
    guest: Annotated[str, typer.Argument(help="The guest.")],
    command: Annotated[list[str], typer.Argument(help="The command, after --.", metavar="-- COMMAND...")],
    lab: LabOption = None,
) -> None:
    """Run a command in a guest; gives its exit status."""

    async def act(client: AsyncClient) -> int:
        partition = await lifecycle.find_guest(client, guest, lab)
        return await terminal.run(client, names.leaf(partition.name), command)

    raise typer.Exit(_run(act))


@lab_app.command("ping")
def lab_ping(
    source: Annotated[str, typer.Argument(help="The guest that asks.")],
    target: Annotated[str, typer.Argument(help="A guest's name or an address.")],
    count: Annotated[int, typer.Option("--count", "-c", min=1, max=1_000_000, help="Echo requests.")] = 5,
    interval: Annotated[float, typer.Option("--interval", "-i", min=0.001, max=3600, help="Seconds.")] = 0.2,
    lab: LabOption = None,
) -> None:
    """Ping from a guest with our own prober, so that no ping need be installed; status 1 when one is lost."""
    options = ["--count", str(count), "--interval", str(interval)]

    async def act(client: AsyncClient) -> int:
        partition = await lifecycle.find_guest(client, source, lab)
        argv = [sys.executable, "-m", "netvsc.probe", "ping", target, *options]
        return await terminal.run(client, names.leaf(partition.name), argv, environment())

    raise typer.Exit(_run(act))


@lab_app.command("graph")
def lab_graph(
    file: FileArgument = None,
    form: Annotated[Picture, typer.Option("--format", "-f", help="What to draw with.")] = Picture.TEXT,
) -> None:
    """Draw a lab file as text or as a mermaid diagram."""
    lab = _lab(file)
    typer.echo(pictures.mermaid(lab) if form is Picture.MERMAID else pictures.text(lab))


@lab_app.command("validate")
def lab_validate(file: FileArgument = None, output: Output = Format.TABLE) -> None:
    """Check a lab file without bringing it up; -o yaml shows it with every default filled in."""
    lab = _lab(file)
    if output is Format.TABLE:
        nics = sum(len(guest.nics) for guest in lab.guests)
        parts = (
            _count(len(lab.switches), "switch", "es"),
            _count(len(lab.guests), "guest"),
            _count(nics, "NIC"),
        )
        counts = ", ".join(parts)
        typer.echo(f"{lab.file} is a valid lab: {lab.name}, {counts}\nnext: vswitch lab up {lab.file}")
    else:
        show.emit(output, lab.as_dict(), (), ())


@lab_app.command("schema")
def lab_schema() -> None:
    """Print the JSON Schema of lab files, for editors and other programs."""
    typer.echo(schema_text())


def doctor(output: Output = Format.TABLE) -> None:
    """Say what this machine lacks, what that costs and what mends it; status 1 when guests cannot run."""
    from vswitchlab.doctor import blockers, diagnose, gather

    findings = diagnose(gather())
    rows = [finding.as_dict() for finding in findings]
    bad = blockers(findings)
    if output is Format.TABLE:
        for finding in findings:
            typer.echo(f"{finding.level.value:7} {finding.check}: {finding.text}")
            if finding.remedy:
                typer.echo(f"        remedy: {finding.remedy}")
        verdict = (
            f"guests cannot run: mend {', '.join(each.check for each in bad)}" if bad else "guests can run"
        )
        typer.echo(verdict)
    else:
        show.emit(output, {"findings": rows, "guests_can_run": not bad}, (), ())
    raise typer.Exit(1 if bad else 0)


def demo(
    engine: Annotated[EngineName | None, typer.Option(help="Default: native where it is installed.")] = None,
    output: Output = Format.TABLE,
) -> None:
    """The whole story in under half a minute, each claim checked; status 1 when a check fails."""
    from vswitchlab.demo import run

    raise typer.Exit(asyncio.run(run(engine.value if engine else None, output)))
