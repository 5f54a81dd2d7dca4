"""Commands in partitions by API: one bidirectional stream per command, over pipes or a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import struct
import termios
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from hypervisor import AgentError, DoorLost, GuestProcess
from hypervisor.partition import PartitionError
from vswitch_api.v1 import partition_pb2
from vswitchd.errors import ApiError, invalid, unavailable
from vswitchd.kinds import no_agent
from vswitchd.partitions import PartitionManager

CHUNK = 65536
MAX_ARGUMENTS = 4096
# What the agent takes rides in one frame of the door (64 KiB) as JSON.
MAX_COMMAND_BYTES = 48 << 10
# How long the output of a command that has ended is still followed when others hold it open.
LINGER_SECONDS = 0.2
# How long a caller that has been told the exit may take to end its side.
CALLER_SECONDS = 2.0
END_OF_TRANSMISSION = b"\x04"


class Executor:
    """Runs commands for the Exec method."""

    def __init__(self, partitions: PartitionManager) -> None:
        self._partitions = partitions

    async def stream(
        self, requests: AsyncIterator[partition_pb2.ExecRequest]
    ) -> AsyncIterator[partition_pb2.ExecResponse]:
        """The answer stream of one Exec call. When the caller goes away, the command is killed."""
        iterator = aiter(requests)
        first = await anext(iterator, None)
        if first is None or first.WhichOneof("message") != "start":
            raise invalid("start", "the first request must start a command")
        start = first.start
        _check(start)
        record = self._partitions.find(start.partition, "start.partition")
        if record.message.WhichOneof("spec") == "kvm":
            raise no_agent(record.message)
        partition = record.running()
        streams = CommandStreams(start.terminal if start.HasField("terminal") else None)
        process: GuestProcess | None = None
        feeding: asyncio.Task[None] | None = None
        ended: asyncio.Future[tuple[int, str]] | None = None
        try:
            try:
                process = await partition.exec(
                    list(start.argv),
                    dict(start.env),
                    *streams.inner,
                    tty=start.HasField("terminal"),
                    cwd=start.cwd or "/",
                )
            except AgentError as error:
                yield partition_pb2.ExecResponse(
                    exit=partition_pb2.ExecExit(status=127, detail=error.strerror or str(error))
                )
                await _caller_ends(iterator)
                return
            except (DoorLost, PartitionError) as error:
                raise _lost(record.name, error) from None
            finally:
                streams.close_inner()
            yield partition_pb2.ExecResponse(started=partition_pb2.ExecStarted())
            feeding = asyncio.create_task(_feed(iterator, streams, process))
            ended = asyncio.create_task(process.wait())
            # Closed here, not when it is collected: its readers go before the descriptors do.
            async with contextlib.aclosing(streams.output(ended)) as output:
                async for response in output:
                    yield response
                    if feeding.done():
                        feeding.result()
            try:
                code = os.waitstatus_to_exitcode((await ended)[0])
            except DoorLost as error:
                raise _lost(record.name, error) from None
            process = None
            yield partition_pb2.ExecResponse(
                exit=partition_pb2.ExecExit(status=code)
                if code >= 0
                else partition_pb2.ExecExit(signal=-code)
            )
            # The caller may be sending input still: a stream that ended under it would lose the exit for it.
            await asyncio.wait([feeding], timeout=CALLER_SECONDS)
        finally:
            if process is not None:
                with contextlib.suppress(PartitionError, DoorLost):
                    process.kill(signal.SIGKILL)
            try:
                # They let go of the descriptors before these are closed: the numbers are used again at once.
                await _cancelled(feeding, ended)
            finally:
                streams.close()


async def _cancelled(*tasks: asyncio.Future[Any] | None) -> None:
    """Cancels what still runs and waits for its end."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running)


async def _caller_ends(requests: AsyncIterator[partition_pb2.ExecRequest]) -> None:
    """Lets a caller that has been told the exit end its side."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CALLER_SECONDS):
            async for _ in requests:
                pass


async def _feed(
    requests: AsyncIterator[partition_pb2.ExecRequest], streams: CommandStreams, process: GuestProcess
) -> None:
    async for request in requests:
        kind = request.WhichOneof("message")
        if kind == "stdin":
            await streams.write(request.stdin)
        elif kind == "stdin_end":
            streams.end_input()
        elif kind == "resize":
            streams.resize(request.resize)
        elif kind == "signal":
            if not 1 <= request.signal < signal.NSIG:
                raise invalid("signal", f"{request.signal} is not a signal number")
            process.kill(request.signal)
        else:
            raise invalid("start", "a stream starts one command, once")


class CommandStreams:
    """The descriptors of a command: three pipes, or a terminal. `inner` is for the command; the rest
    is ours.
    """

    def __init__(self, terminal: partition_pb2.TerminalSize | None) -> None:
        self.inner: tuple[int, int, int]
        self._terminal = terminal is not None
        if terminal is not None:
            master, slave = os.openpty()
            self.inner = (slave, slave, slave)
            self._input = master
            self._outputs = {master: "stdout"}
            self.resize(terminal)
        else:
            stdin, self._input = os.pipe()
            stdout_reader, stdout = os.pipe()
            stderr_reader, stderr = os.pipe()
            self.inner = (stdin, stdout, stderr)
            self._outputs = {stdout_reader: "stdout", stderr_reader: "stderr"}
        self._inner_open = True
        self._ours = {self._input, *self._outputs}
        for fd in self._ours:
            os.set_blocking(fd, False)

    async def write(self, data: bytes) -> None:
        """To the command's standard input; what it does not want any more is lost, as in a shell."""
        view = memoryview(data)
        while view and self._input >= 0:
            try:
                view = view[os.write(self._input, view) :]
            except BlockingIOError:
                await _writable(self._input)
            except OSError:
                return

    def end_input(self) -> None:
        if self._terminal:
            with contextlib.suppress(OSError):
                os.write(self._input, END_OF_TRANSMISSION)
        elif self._input >= 0:
            self._ours.discard(self._input)
            os.close(self._input)
            self._input = -1

    def resize(self, size: partition_pb2.TerminalSize) -> None:
        """Only a terminal has a size; the kernel tells the programs on it (SIGWINCH)."""
        if self._terminal:
            rows, columns = min(size.rows or 24, 0xFFFF), min(size.columns or 80, 0xFFFF)
            fcntl.ioctl(self._input, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    async def output(
        self, ended: asyncio.Future[tuple[int, str]]
    ) -> AsyncGenerator[partition_pb2.ExecResponse, None]:
        """What the command writes, until it and all that share its output are done.

        When the command has `ended` and something else keeps its output open, that is not waited for.
        """
        ready = asyncio.Event()
        loop = asyncio.get_running_loop()
        open_fds = dict(self._outputs)
        for fd in open_fds:
            loop.add_reader(fd, ready.set)
        ended.add_done_callback(lambda _: ready.set())
        try:
            while open_fds:
                ready.clear()
                quiet = True
                for fd, kind in list(open_fds.items()):
                    try:
                        data = os.read(fd, CHUNK)
                    except BlockingIOError:
                        continue
                    except OSError:
                        data = b""  # EIO: the terminal's last user has gone.
                    if data:
                        quiet = False
                        yield (
                            partition_pb2.ExecResponse(stdout=data)
                            if kind == "stdout"
                            else partition_pb2.ExecResponse(stderr=data)
                        )
                    else:
                        loop.remove_reader(fd)
                        del open_fds[fd]
                if quiet and open_fds:
                    try:
                        await asyncio.wait_for(ready.wait(), LINGER_SECONDS if ended.done() else None)
                    except TimeoutError:
                        return
        finally:
            for fd in open_fds:
                loop.remove_reader(fd)

    def close_inner(self) -> None:
        if self._inner_open:
            self._inner_open = False
            for fd in set(self.inner):
                os.close(fd)

    def close(self) -> None:
        self.close_inner()
        for fd in self._ours:
            os.close(fd)
        self._ours = set()
        self._input = -1


async def _writable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_writer(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(fd)


def _check(start: partition_pb2.ExecStart) -> None:
    if not start.argv or not start.argv[0]:
        raise invalid("start.argv", "empty", "name a command")
    if len(start.argv) > MAX_ARGUMENTS:
        raise invalid("start.argv", f"{len(start.argv)} arguments; at most {MAX_ARGUMENTS} are taken")
    size = sum(len(argument.encode()) for argument in start.argv)
    size += sum(len(key.encode()) + len(value.encode()) for key, value in start.env.items())
    if size > MAX_COMMAND_BYTES:
        raise invalid("start", f"{size} bytes of arguments and environment; at most {MAX_COMMAND_BYTES}")
    for text in (*start.argv, *start.env.keys(), *start.env.values(), start.cwd):
        if "\0" in text:
            raise invalid("start", "a NUL character in an argument, a variable or the directory")


def _lost(name: str, error: Exception) -> ApiError:
    return unavailable(
        name,
        f"{name}: its guest went away: {error}",
        reason="GUEST_LOST",
        remedy="see `vswitch partition list`, and start it again",
    )
