"""Requests to a process partition's agent.

CONFIGURE, EXEC, KILL, and what comes back (docs/door.md section 9).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vswitch_wire import door
from vswitch_wire.errors import WireError

Send = Callable[[door.DoorMessage, int, Sequence[int]], None]


class AgentError(OSError):
    """The agent refused; errno and text are the agent's."""


class DoorLost(ConnectionError):
    """The door closed before the answer came."""


class GuestProcess:
    """A program that runs inside a process partition."""

    def __init__(self, sequence: int, pid: int, ended: asyncio.Future[tuple[int, str]], send: Send) -> None:
        self.sequence = sequence
        self.pid = pid
        self._ended = ended
        self._send = send

    async def wait(self) -> tuple[int, str]:
        """(wait status as waitpid(2) gives it, the agent's text).

        DoorLost when the guest or its door is gone.
        """
        return await asyncio.shield(self._ended)

    def kill(self, signal: int) -> None:
        """Signal its process group; nothing happens when it has ended."""
        if not self._ended.done():
            self._send(door.Kill(self.sequence, signal), 0, ())


class AgentRequests:
    """Requests that wait for an answer, by sequence number."""

    def __init__(self, send: Send, next_sequence: Callable[[], int]) -> None:
        self._send = send
        self._next_sequence = next_sequence
        self._configuring: dict[int, asyncio.Future[None]] = {}
        self._starting: dict[int, asyncio.Future[int]] = {}
        self._running: dict[int, asyncio.Future[tuple[int, str]]] = {}

    async def configure(self, document: Mapping[str, Any]) -> None:
        """Send CONFIGURE and wait. AgentError, DoorLost."""
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        sequence = self._next_sequence()
        self._configuring[sequence] = answer
        try:
            self._send(door.Configure(dict(document)), sequence, ())
            await answer
        finally:
            self._configuring.pop(sequence, None)

    async def start(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        stdin: int,
        stdout: int,
        stderr: int,
        *,
        tty: bool,
        cwd: str | None,
    ) -> GuestProcess:
        """Send EXEC and wait until the program runs. AgentError, DoorLost.

        The descriptors stay the caller's.
        """
        loop = asyncio.get_running_loop()
        started: asyncio.Future[int] = loop.create_future()
        ended: asyncio.Future[tuple[int, str]] = loop.create_future()
        # A program nobody waits for may end badly without a word.
        ended.add_done_callback(lambda future: future.cancelled() or future.exception())
        sequence = self._next_sequence()
        self._starting[sequence], self._running[sequence] = started, ended
        try:
            self._send(door.Exec(tuple(argv), dict(env), cwd, tty), sequence, (stdin, stdout, stderr))
            pid = await started
        except asyncio.CancelledError:
            # A door that closed at the same moment has ended the program as well.
            with contextlib.suppress(Exception):
                self._send(door.Kill(sequence, 9), 0, ())
            raise
        except BaseException:
            self._running.pop(sequence, None)
            raise
        return GuestProcess(sequence, pid, ended, self._send)

    def configured(self, sequence: int, message: door.Configured) -> None:
        """CONFIGURED came."""
        answer = self._configuring.pop(sequence, None)
        if answer is None:
            raise WireError(f"CONFIGURED: no CONFIGURE {sequence} waits for it")
        if answer.done():
            return
        if message.status:
            answer.set_exception(AgentError(message.status, message.text))
        else:
            answer.set_result(None)

    def exec_started(self, sequence: int, message: door.ExecStarted) -> None:
        """EXEC_STARTED came."""
        started = self._starting.pop(sequence, None)
        if started is None:
            raise WireError(f"EXEC_STARTED: no EXEC {sequence} waits for it")
        if message.status:
            self._running.pop(sequence, None)
        if started.done():
            return
        if message.status:
            started.set_exception(AgentError(message.status, message.text))
        else:
            started.set_result(message.pid)

    def exec_exit(self, sequence: int, message: door.ExecExit) -> None:
        """EXEC_EXIT came."""
        ended = self._running.get(sequence)
        if ended is None or sequence in self._starting:
            raise WireError(f"EXEC_EXIT: no program of EXEC {sequence} runs")
        del self._running[sequence]
        if not ended.done():
            ended.set_result((message.wait_status, message.text))

    def lost(self, reason: str) -> None:
        """The door is gone: nobody answers any more."""
        waiting: list[asyncio.Future[Any]] = [
            *self._configuring.values(),
            *self._starting.values(),
            *self._running.values(),
        ]
        self._configuring.clear()
        self._starting.clear()
        self._running.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(DoorLost(reason))
