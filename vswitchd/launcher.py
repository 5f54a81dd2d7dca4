"""Starting guests: `python -m netvsc` by exec, in a session of its own, so that it outlives the daemon.

A guest is given its door's listening socket and its standard streams, and nothing else: a clean environment,
no other descriptor, its words appended to a log file of this user. It is known again after a restart by its
process id and start time together, and watched through a pidfd.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOOR_VARIABLE = "VSWITCH_DOOR_FD"
LOG_TAIL_BYTES = 2000
LOG_KEEP_BYTES = 1 << 20
"""What a guest has said in earlier runs is kept up to this size."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class GuestSpec:
    """What to start."""

    name: str
    kind: str
    engine: str
    grace_seconds: float
    link: str
    hide: Path
    log_path: Path


def command(spec: GuestSpec) -> list[str]:
    """The guest's command line. `-P`: nothing is imported from the current directory."""
    return [
        sys.executable,
        "-P",
        "-m",
        "netvsc",
        "--kind",
        spec.kind,
        "--name",
        spec.name,
        "--engine",
        spec.engine,
        "--grace",
        f"{spec.grace_seconds:g}",
        "--hide",
        str(spec.hide),
        "--link",
        spec.link,
    ]


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

    def __init__(self, pid: int, pidfd: int, started: int, on_exit: Callable[[str], None]) -> None:
        """`started` is the kernel's start time of the process, in clock ticks after boot."""
        self.pid = pid
        self.started = started
        self._pidfd = pidfd
        self._on_exit = on_exit
        self._child: subprocess.Popen[bytes] | None = None
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(pidfd, self._exited)

    @classmethod
    async def launch(cls, spec: GuestSpec, door_fd: int, on_exit: Callable[[str], None]) -> GuestProcess:
        """Starts a guest with its door. OSError when the interpreter cannot be started."""
        child = await asyncio.to_thread(_spawn, spec, door_fd)
        guest = cls(child.pid, os.pidfd_open(child.pid), start_time(child.pid), on_exit)
        guest._child = child
        return guest

    @classmethod
    def find(cls, pid: int, started: int, on_exit: Callable[[str], None]) -> GuestProcess | None:
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
        return cls(pid, pidfd, started, on_exit)

    def signal(self, number: int) -> None:
        """To the guest's outer process; its death ends everything inside."""
        if not self.ended.done():
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                return

    async def end(self, patience: float) -> None:
        """Waits `patience` seconds for it to end by itself, then asks (SIGTERM), then kills it."""
        for number, seconds in ((None, patience), (signal.SIGTERM, 1.0), (signal.SIGKILL, 10.0)):
            if number is not None:
                self.signal(number)
            done, _ = await asyncio.wait([self.ended], timeout=seconds)
            if done:
                return

    def forget(self) -> None:
        """Stops watching; the guest lives on."""
        self._close()

    def _exited(self) -> None:
        how = "ended"
        if self._child is not None:
            status = self._child.wait()
            how = f"was killed by {_signal_name(-status)}" if status < 0 else f"ended with status {status}"
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


def log_tail(path: Path) -> str:
    """The last words of a guest."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            return log.read().decode(errors="replace").strip()
    except OSError:
        return ""


def _spawn(spec: GuestSpec, door_fd: int) -> subprocess.Popen[bytes]:
    if spec.log_path.is_file() and spec.log_path.stat().st_size > LOG_KEEP_BYTES:
        os.truncate(spec.log_path, 0)
    log = os.open(spec.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        return subprocess.Popen(
            command(spec),
            env=environment(door_fd),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(door_fd,),
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
