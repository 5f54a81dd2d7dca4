"""One run of an extension's process, from the host's side: spawn, wait until ready, watch, kill.

Everything that arrives from the process is bounded: control messages are checked by `control`, output is
kept to its last lines and logged up to a limit. All callbacks run on the asyncio loop that spawned it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

from vswitch.extension import control
from vswitch.extension.loader import MAX_SOURCE, ExtensionLoadError
from vswitch.upcall import ExtensionChannel

MAX_STALE = 1000
"""More changes of watched attributes than a class has are a flood."""
KEPT_LINES = 50
LOGGED_LINES = 1000
LINE_BYTES = 1024
OUTPUT_BYTES = 16384
"""Bytes of output taken at a time; who prints more than that at once waits a while."""
OUTPUT_PAUSE = 0.05
PIPE_BYTES = 65536
KILL_PATIENCE = 2.0
"""Seconds until a parent that does not react is killed itself; the kernel then kills its child."""

_log = logging.getLogger("vswitch.extension")


class ExtensionProcess:
    """A running extension. Made by `spawn`; `ended` is done when it is gone, its result says how it ended."""

    def __init__(self, child: subprocess.Popen[bytes], connection: socket.socket, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._child = child
        self._connection = connection
        self._name = name
        self._pidfd = os.pidfd_open(child.pid)
        self._answer: asyncio.Future[control.Ready] = self._loop.create_future()
        self._stale = 0
        self._lines = 0
        self._partial = b""
        self._misbehaved = ""
        self.pid = 0
        """The confined process; its parent is ours and waits for it."""
        self.output: deque[str] = deque(maxlen=KEPT_LINES)
        """The last lines that it printed."""
        self.ended: asyncio.Future[str] = self._loop.create_future()
        self.on_stale: Callable[[str], None] = lambda _attribute: None
        assert child.stdout is not None
        self._stdout = child.stdout.fileno()
        os.set_blocking(self._stdout, False)
        connection.setblocking(False)
        self._loop.add_reader(self._pidfd, self._reap)
        self._loop.add_reader(connection, self._receive)
        self._loop.add_reader(self._stdout, self._read_output)

    @classmethod
    async def spawn(
        cls, channel: ExtensionChannel, source: bytes, file_name: str, patience: float
    ) -> tuple[ExtensionProcess, control.Ready]:
        """Start the process and wait until the extension is loaded.

        Raises ExtensionLoadError, after which nothing of it is left, when the file is no extension, when it
        takes more than `patience` seconds, or when the process cannot be confined.
        """
        if len(source) > MAX_SOURCE:
            text = f"{file_name} has {len(source)} bytes, an extension has at most {MAX_SOURCE}"
            raise ExtensionLoadError(text)
        process = cls._start(channel, source, file_name)
        try:
            async with asyncio.timeout(patience):
                ready = await process._answer
        except TimeoutError:
            await process.kill()
            raise ExtensionLoadError(
                f"{file_name} was not loaded within {patience:g} s: "
                "its top level or its __init__ waits or computes for too long"
            ) from None
        except BaseException:
            await process.kill()
            raise
        return process, ready

    @classmethod
    def _start(cls, channel: ExtensionChannel, source: bytes, file_name: str) -> ExtensionProcess:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        source_fd = os.memfd_create("vswitch-extension-source", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(source_fd), "wb") as stream:
                stream.write(source)
            os.lseek(source_fd, 0, os.SEEK_SET)
            arguments = {
                "file_name": file_name,
                "memfd": channel.memfd,
                "request_fd": channel.request_fd,
                "reply_fd": channel.reply_fd,
                "control_fd": theirs.fileno(),
            }
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "vswitch.extension.runner", json.dumps(arguments)],
                stdin=source_fd,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(channel.memfd, channel.request_fd, channel.reply_fd, theirs.fileno()),
                env=_environment(),
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(source_fd)
        return cls(child, ours, channel.name)

    async def kill(self) -> str:
        """End it now, and return how it ended: then the confined process is gone as well."""
        if not self.ended.done():
            self._hang_up()
            try:
                async with asyncio.timeout(KILL_PATIENCE):
                    return await asyncio.shield(self.ended)
            except TimeoutError:
                self._child.send_signal(signal.SIGKILL)
        return await asyncio.shield(self.ended)

    def _hang_up(self) -> None:
        """The parent of the confined process kills it when this end of the socket closes, and follows it."""
        self._loop.remove_reader(self._connection)
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _reap(self) -> None:
        code = self._child.poll()
        if code is None:
            return
        # What it said last is still in the socket and the pipe.
        self._receive()
        for _ in range(PIPE_BYTES // OUTPUT_BYTES + 1):
            self._read_output()
        for descriptor in (self._pidfd, self._connection, self._stdout):
            self._loop.remove_reader(descriptor)
        os.close(self._pidfd)
        self._connection.close()
        assert self._child.stdout is not None
        self._child.stdout.close()
        how = self._misbehaved or _how_it_ended(code)
        if self.output and not self._misbehaved:
            how = f"{how}; it said: {self.output[-1]}"
        if not self._answer.done():
            self._answer.set_exception(ExtensionLoadError(f"the process of extension {self._name} {how}"))
            self._answer.exception()  # `spawn` may have been cancelled: then nobody else looks at it
        self.ended.set_result(how)

    def _receive(self) -> None:
        for _ in range(16):
            try:
                data = self._connection.recv(control.MAX_MESSAGE + 1)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._loop.remove_reader(self._connection)
                return
            try:
                self._handle(control.decode(data))
            except control.ControlError as error:
                self._misbehave(f"broke its protocol: {error}")
                return

    def _handle(self, message: control.Message) -> None:
        if isinstance(message, control.Started) and not self.pid:
            self.pid = message.pid
        elif isinstance(message, control.Refused) and not self._answer.done():
            self._answer.set_exception(ExtensionLoadError(message.text))
        elif isinstance(message, control.Ready) and self.pid and not self._answer.done():
            self._answer.set_result(message)
        elif isinstance(message, control.Stale) and self._answer.done() and self._stale < MAX_STALE:
            self._stale += 1
            self.on_stale(message.attribute)
        else:
            raise control.ControlError(f"{type(message).__name__} message out of turn")

    def _misbehave(self, why: str) -> None:
        self._misbehaved = why
        self._hang_up()

    def _read_on(self) -> None:
        if not self.ended.done():
            self._loop.add_reader(self._stdout, self._read_output)

    def _read_output(self) -> None:
        try:
            data = os.read(self._stdout, OUTPUT_BYTES)
        except BlockingIOError:
            return
        if len(data) in (0, OUTPUT_BYTES):
            self._loop.remove_reader(self._stdout)
        if len(data) == OUTPUT_BYTES:
            # It floods: its pipe fills meanwhile, and it waits, not this loop.
            self._loop.call_later(OUTPUT_PAUSE, self._read_on)
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > LINE_BYTES or (not data and self._partial):
            lines.append(self._partial)
            self._partial = b""
        for line in lines:
            decoded = line[:LINE_BYTES].decode("utf-8", "replace")
            text = "".join(c if c.isprintable() else " " for c in decoded)
            self.output.append(text)
            self._lines += 1
            if self._lines <= LOGGED_LINES:
                _log.info("%s: %s", self._name, text)
            if self._lines == LOGGED_LINES:
                _log.warning("%s printed %d lines; more are not logged", self._name, LOGGED_LINES)


def _environment() -> dict[str, str]:
    """Nothing of the daemon's environment but what finding the interpreter's files needs."""
    root = str(Path(__file__).resolve().parent.parent.parent)
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    switches = ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED", "PYTHONNOUSERSITE")
    return {**kept, "PYTHONPATH": root, **dict.fromkeys(switches, "1")}


def _how_it_ended(code: int) -> str:
    """From an exit status: the runner gives 128 + n for a child that signal n ended."""
    number = -code if code < 0 else code - 128 if code > 128 else 0
    if number:
        try:
            return f"was killed by {signal.Signals(number).name}"
        except ValueError:
            return f"was killed by signal {number}"
    return f"ended with exit status {code}"
