"""Programs that run inside the guest for the host (EXEC): started, signalled, reaped, their ends told.

The agent is PID 1 of the guest, so every orphan becomes its child: all are reaped here, and only those
that EXEC started are told of. A program is started in a session of its own and is signalled as a process
group.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import termios
from collections.abc import Callable, Mapping

__all__ = ["Programs"]

_PRIVATE = ("VSWITCH_DOOR_FD",)


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Programs:
    """`on_exit(sequence, wait_status)` is called for each program that `start` started."""

    def __init__(self, on_exit: Callable[[int, int], None]) -> None:
        self._on_exit = on_exit
        self._sequence_of: dict[int, int] = {}
        self._pid_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._sequence_of)

    def start(
        self,
        sequence: int,
        argv: tuple[str, ...],
        env: Mapping[str, str],
        cwd: str | None,
        tty: bool,
        stdio: list[int],
    ) -> int:
        """Start one; returns its pid inside the guest. OSError when it cannot be started. `stdio` stays
        the caller's."""
        environment = {key: value for key, value in os.environ.items() if key not in _PRIVATE}
        environment.update(env)
        child = subprocess.Popen(
            list(argv),
            stdin=stdio[0],
            stdout=stdio[1],
            stderr=stdio[2],
            env=environment,
            cwd=cwd,
            start_new_session=True,
            # Only a terminal needs code in the child; this process has no Python threads that could hold a
            # lock.
            preexec_fn=_take_terminal if tty else None,
        )
        child.returncode = 0  # we reap it ourselves: keep Popen's destructor from waiting for it
        self._sequence_of[child.pid] = sequence
        self._pid_of[sequence] = child.pid
        return child.pid

    def reap(self) -> None:
        """Collect every child that ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            sequence = self._sequence_of.pop(pid, None)
            if sequence is not None:
                self._pid_of.pop(sequence, None)
                self._on_exit(sequence, status)

    def kill(self, sequence: int, number: int) -> bool:
        """Signal a program and its group; False when it ended already."""
        pid = self._pid_of.get(sequence)
        if pid is None:
            return False
        try:
            os.killpg(pid, number)
        except ProcessLookupError:
            return False
        return True

    def forget(self) -> None:
        """The host that started them is gone: they run on, nobody is told of their ends."""
        self._sequence_of.clear()
        self._pid_of.clear()

    @staticmethod
    def signal_everything(number: signal.Signals) -> bool:
        """Signal every process of the guest but the agent; False when there is none."""
        if os.getpid() != 1:  # anywhere else -1 would mean the user's whole session
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, number)
            return True
        return False
