"""A guest's command joined to this terminal: input, output, window size, Ctrl-C, exit status."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator, Mapping, Sequence

from vswitchctl.aio import AsyncClient, ExecStream
from vswitchctl.output import printable

__all__ = ["run"]

CHUNK = 65536


async def run(
    client: AsyncClient, partition: str, argv: Sequence[str], env: Mapping[str, str] | None = None
) -> int:
    """Runs `argv` in `partition`; its exit status, or 128 + the signal that ended it, as a shell reports it.

    With a terminal on both sides of this process the command gets one of its own and keys go to it unchanged.
    """
    interactive = os.isatty(0) and os.isatty(1)
    size = os.get_terminal_size() if interactive else None
    terminal = (size.lines, size.columns) if size else None
    async with client.exec(partition, argv, env=env, terminal=terminal) as command:
        with _raw_keys() if interactive else contextlib.nullcontext(), _signals(command, interactive):
            feeder = asyncio.create_task(_feed(command))
            try:
                async for response in command:
                    kind = response.WhichOneof("message")
                    if kind == "stdout":
                        _write(1, response.stdout)
                    elif kind == "stderr":
                        _write(2, response.stderr)
            finally:
                feeder.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await feeder
    end = command.exit
    assert end is not None
    if end.detail:
        sys.stderr.write(f"{printable(end.detail)}\n")
    return 128 + end.signal if end.signal else end.status or (127 if end.detail else 0)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


async def _feed(command: ExecStream) -> None:
    """Standard input to the command, as it comes."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    try:
        loop.add_reader(0, ready.set)
    except (OSError, ValueError):  # A regular file or a closed descriptor: reading does not wait.
        with contextlib.suppress(OSError):
            while data := os.read(0, CHUNK):
                await command.write(data)
        await command.close_stdin()
        return
    try:
        while True:
            await ready.wait()
            ready.clear()
            data = os.read(0, CHUNK)
            if not data:
                break
            await command.write(data)
    except OSError:
        pass
    finally:
        loop.remove_reader(0)
    await command.close_stdin()


@contextlib.contextmanager
def _raw_keys() -> Iterator[None]:
    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _signals(command: ExecStream, interactive: bool) -> Iterator[None]:
    """Ctrl-C goes to the command; so does a changed window."""
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    def send(number: int) -> None:
        if number == signal.SIGWINCH:
            size = os.get_terminal_size()
            action = command.resize(size.lines, size.columns)
        else:
            action = command.send_signal(number)
        task = asyncio.ensure_future(action)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGWINCH] if interactive else [])]
    for number in numbers:
        loop.add_signal_handler(number, send, int(number))
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
