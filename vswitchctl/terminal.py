"""A guest's command or console joined to this terminal: input, output, window size, Ctrl-C, exit status."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

from vswitchctl.aio import AsyncClient, ExecStream
from vswitchctl.output import printable

__all__ = ["console", "run"]

CHUNK = 65536
LEAVE = b"\x1d"
"""Ctrl-], as in telnet and virsh."""


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
            feeder = asyncio.create_task(_feed(command.write, command.close_stdin))
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


async def console(client: AsyncClient, partition: str, *, take_over: bool = False) -> str:
    """Joins a virtual machine's console until it ends or Ctrl-] is pressed; why it ended, empty when left.

    Without a terminal input goes in as it comes, and its end leaves the output running.
    """
    interactive = os.isatty(0) and os.isatty(1)
    async with client.console(partition, take_over=take_over) as joined:
        left = asyncio.Event()

        async def keys(data: bytes) -> None:
            before, escape, _ = data.partition(LEAVE) if interactive else (data, b"", b"")
            if before:
                await joined.write(before)
            if escape:
                left.set()

        async def no_more() -> None:
            if interactive:
                left.set()

        async def show() -> None:
            async for data in joined:
                _write(1, data)

        if interactive:
            sys.stderr.write(f"at the console of {partition}; Ctrl-] leaves it\r\n")
        with _raw_keys() if interactive else contextlib.nullcontext():
            tasks = [asyncio.create_task(work) for work in (show(), _feed(keys, no_more), left.wait())]
            shown, feeder, leaving = tasks
            try:
                await asyncio.wait([shown, leaving], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (feeder, leaving, *(() if shown.done() else (shown,))):
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        if not shown.cancelled():
            await shown
        return "" if left.is_set() else joined.detail


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


async def _feed(write: Callable[[bytes], Awaitable[None]], end: Callable[[], Awaitable[None]]) -> None:
    """Standard input to a command or console, as it comes; `end` is told when there is no more."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    try:
        loop.add_reader(0, ready.set)
    except (OSError, ValueError):  # A regular file or a closed descriptor: reading does not wait.
        with contextlib.suppress(OSError):
            while data := os.read(0, CHUNK):
                await write(data)
        await end()
        return
    try:
        while True:
            await ready.wait()
            ready.clear()
            # The loop may say twice what was there once; reading then would stop everything until the next
            # key. The descriptor itself is shared with the shell and stays blocking.
            if not select.select([0], [], [], 0)[0]:
                continue
            data = os.read(0, CHUNK)
            if not data:
                break
            await write(data)
    except OSError:
        pass
    finally:
        loop.remove_reader(0)
    await end()


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
