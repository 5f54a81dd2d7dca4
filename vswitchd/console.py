"""Consoles of virtual machines by API: one caller at a time joined to the socket that the VMM listens on."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from hypervisor.socket_path import ShortPath

CHUNK = 65536
BACKLOG = 4


class ConsoleBusy(Exception):
    """Another caller has the console."""


class Console:
    """The console of one virtual machine; without a path, that of one which does not run."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._link: ConsoleLink | None = None

    def listen(self) -> int:
        """The listening socket that the VMM inherits; the caller's to close."""
        assert self._path is not None
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with ShortPath(self._path) as path:
                listener.bind(path)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener.detach()

    async def join(self, *, take_over: bool) -> ConsoleLink:
        """A link to the console. ConsoleBusy, or OSError when the VMM does not take it."""
        if self._path is None:
            raise ConnectionRefusedError("it does not run")
        if self._link is not None:
            if not take_over:
                raise ConsoleBusy
            self._link.end("another caller has taken the console over")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            with ShortPath(self._path) as path:
                sock.connect(path)
        except BaseException:
            sock.close()
            raise
        link = self._link = ConsoleLink(self, sock)
        return link

    def close(self, why: str) -> None:
        """Ends what is joined."""
        if self._link is not None:
            self._link.end(why)

    def left(self, link: ConsoleLink) -> None:
        """A link has ended."""
        if self._link is link:
            self._link = None


class ConsoleLink:
    """One caller at a console."""

    def __init__(self, console: Console, sock: socket.socket) -> None:
        self._console = console
        self._sock = sock
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def output(self) -> AsyncGenerator[bytes, None]:
        """What the console writes, what it wrote lately first, until one side ends."""
        loop = asyncio.get_running_loop()
        while not self._ended.done():
            reading = asyncio.ensure_future(loop.sock_recv(self._sock, CHUNK))
            try:
                both: list[asyncio.Future[Any]] = [reading, self._ended]
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not reading.done():
                    reading.cancel()
                    with contextlib.suppress(asyncio.CancelledError, OSError):
                        await reading
            if not reading.done() or reading.cancelled():
                return
            try:
                data = reading.result()
            except OSError as error:
                data = b""
                self.end(f"the console broke: {error.strerror}")
            if not data:
                self.end("the guest has ended")
                return
            yield data

    async def write(self, data: bytes) -> None:
        """Keys for the guest; nothing when the console has ended."""
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().sock_sendall(self._sock, data)

    @property
    def why(self) -> str:
        """Why it ended; empty while it has not."""
        return self._ended.result() if self._ended.done() else ""

    def end(self, why: str) -> None:
        """Tells the caller's stream to end, and lets go of the console at once."""
        if not self._ended.done():
            self._ended.set_result(why)
            # The VMM serves the next one when it sees this end of file.
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
        self._console.left(self)

    def close(self) -> None:
        """The caller has gone."""
        self.end("closed")
        self._sock.close()
