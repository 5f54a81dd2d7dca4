"""Starting guests and watching them: by exec, in a session of their own, so that they outlive the daemon.

What is started is a kind's business (`vswitchd.kinds`): a `Launch` says it. A guest is given the
descriptors named there and its standard streams, and nothing else: a clean environment, no other
descriptor, its words appended to a log file of this user. It is known again after a restart by its
process id and start time together, and watched through a pidfd.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOOR_VARIABLE = "VSWITCH_DOOR_FD"
LOG_TAIL_BYTES = 2000
LOG_MOST_BYTES = 4 << 20
"""A log longer than this is cut, at a start and while the guest runs."""
LOG_KEEP_BYTES = 1 << 20
"""What stays of it: the end."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Launch:
    """What to start: `fds` keep their numbers in the guest."""

    argv: list[str]
    env: dict[str, str]
    fds: tuple[int, ...]
    log_path: Path
    status_path: Path | None = None
    """Where a keeper writes the guest's exit status, for a daemon that is not its parent."""


@dataclass(frozen=True)
class Ending:
    """How a guest ended: its exit status, or the negative number of the signal that killed it; None when
    nobody can say.
    """

    code: int | None

    def __str__(self) -> str:
        if self.code is None:
            return "ended"
        return (
            f"was killed by {_signal_name(-self.code)}" if self.code < 0 else f"ended with status {self.code}"
        )


def environment(door_fd: int) -> dict[str, str]:
    """All that a guest inherits: nothing of the caller's but where programs and modules are."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    search = [str(ROOT), *(entry for entry in inherited if entry.startswith("/"))]
    return {
        "PATH": os.environ.get("PATH", PATH),
        "HOME": os.environ.get("HOME", "/"),
        "LANG": "C.UTF-8",
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(search)),
        DOOR_VARIABLE: str(door_fd),
    }


class GuestProcess:
    """A running guest: started by this daemon, or by an earlier one and found again."""

    def __init__(
        self,
        pid: int,
        pidfd: int,
        started: int,
        on_exit: Callable[[Ending], None],
        status_path: Path | None = None,
    ) -> None:
        """`started` is the kernel's start time of the process, in clock ticks after boot."""
        self.pid = pid
        self.started = started
        self._pidfd = pidfd
        self._on_exit = on_exit
        self._status_path = status_path
        self._child: subprocess.Popen[bytes] | None = None
        self.ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(pidfd, self._exited)

    @classmethod
    async def launch(cls, what: Launch, on_exit: Callable[[Ending], None]) -> GuestProcess:
        """Starts a guest. OSError when its program cannot be started."""
        spawning = asyncio.ensure_future(asyncio.to_thread(_spawn, what))
        try:
            child = await asyncio.shield(spawning)
        except asyncio.CancelledError:
            # The thread goes on: until it is done the descriptors must stay what they are.
            child = await spawning
            child.kill()
            await asyncio.to_thread(child.wait)
            raise
        try:
            pidfd = os.pidfd_open(child.pid)
        except OSError:
            # Nobody could watch it.
            child.kill()
            await asyncio.to_thread(child.wait)
            raise
        guest = cls(child.pid, pidfd, start_time(child.pid), on_exit, what.status_path)
        guest._child = child
        return guest

    @classmethod
    def find(
        cls, pid: int, started: int, on_exit: Callable[[Ending], None], status_path: Path | None = None
    ) -> GuestProcess | None:
        """The guest that an earlier daemon started, when it still lives and the pid is not another's
        by now.
        """
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return None
        try:
            # One that has ended and that nobody has waited for yet is gone too.
            ended, _, _ = select.select([pidfd], [], [], 0)
            if ended or start_time(pid) != started:
                raise ProcessLookupError
        except OSError:
            os.close(pidfd)
            return None
        return cls(pid, pidfd, started, on_exit, status_path)

    def signal(self, number: int) -> None:
        """To the guest's outer process; its death ends everything inside."""
        if not self.ended.done():
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                return

    async def end(self, patience: float) -> bool:
        """Waits `patience` seconds for it to end by itself, then asks (SIGTERM), then kills it; True when it
        did by itself.
        """
        for number, seconds in ((None, patience), (signal.SIGTERM, 1.0), (signal.SIGKILL, 10.0)):
            if number is not None:
                self.signal(number)
            done, _ = await asyncio.wait([self.ended], timeout=seconds)
            if done:
                return number is None
        return False

    def forget(self) -> None:
        """Stops watching; the guest lives on."""
        self._close()

    def _exited(self) -> None:
        told = exit_status(self._status_path)
        how = Ending(self._child.wait() if self._child is not None else None)
        if told is not None:
            how = Ending(told)  # The guest's own end, which a keeper passes on as well as an exit status can.
        self._close()
        if not self.ended.done():
            self.ended.set_result(how)
            self._on_exit(how)

    def _close(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1


def agent_pid(pid: int) -> int:
    """PID 1 of the guest: the only child of the outer process; 0 while there is none."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    return int(children[0]) if children else 0


def start_time(pid: int) -> int:
    """Clock ticks after boot at which a process started (proc(5), stat, field 22). OSError when it is
    gone.
    """
    text = Path(f"/proc/{pid}/stat").read_text()
    # The second field is the command in parentheses and may hold anything.
    return int(text.rpartition(")")[2].split()[19])


def log_end(path: Path) -> int:
    """How long the log of a guest that is about to start is."""
    cut_log(path)
    try:
        return path.stat().st_size
    except OSError:
        return 0


def log_tail(path: Path, begin: int = 0) -> str:
    """The last words of a guest, of those after `begin`."""
    try:
        with path.open("rb") as log:
            log.seek(max(begin, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            return log.read().decode(errors="replace").strip()
    except OSError:
        return ""


def exit_status(path: Path | None) -> int | None:
    """What a keeper wrote of its guest's end; None where there is none, or it has not ended."""
    if path is None:
        return None
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def cut_log(path: Path, most: int = LOG_MOST_BYTES, keep: int = LOG_KEEP_BYTES) -> bool:
    """Takes the beginning away from a log of more than `most` bytes; True when it did.

    Guests append (O_APPEND), so what they write next follows what is left. A line that is written in
    between may be lost.
    """
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            size = os.fstat(fd).st_size
            if size <= most:
                return False
            tail = os.pread(fd, keep, size - keep)
            os.ftruncate(fd, 0)
            os.write(fd, b"[the beginning was cut: the log had passed its bound]\n" + tail)
            return True
        finally:
            os.close(fd)
    return False


def _spawn(what: Launch) -> subprocess.Popen[bytes]:
    log = os.open(what.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        return subprocess.Popen(
            what.argv,
            env=what.env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=what.fds,
            start_new_session=True,
            cwd="/",
        )
    finally:
        os.close(log)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
