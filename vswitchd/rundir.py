"""The run directory: private to its user, owned by one daemon at a time, with everything the daemon
leaves on disk.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

# sun_path is 108 bytes with its NUL, unix(7); the longest name below is "consoles/" and a partition id.
MAX_PATH_BYTES = 107
LONGEST_NAME = len("/consoles/18446744073709551615.sock")


class StartError(RuntimeError):
    """The daemon cannot start; the message says why and what to do."""


@dataclass(frozen=True)
class RunDir:
    """Paths of one daemon."""

    root: Path

    @property
    def store(self) -> Path:
        return self.root / "store.db"

    @property
    def internal(self) -> Path:
        """Sockets of the roles' servers."""
        return self.root / "internal"

    @property
    def logs(self) -> Path:
        """What guests and extensions write to their standard streams."""
        return self.root / "logs"

    @property
    def doors(self) -> Path:
        """Sockets that guests listen on."""
        return self.root / "doors"

    @property
    def consoles(self) -> Path:
        """Sockets that virtual machines' consoles listen on, and how the machines ended."""
        return self.root / "consoles"

    @property
    def lock(self) -> Path:
        return self.root / "daemon.lock"

    def prepare(self) -> None:
        """Makes the directory, or checks that the one there is ours alone."""
        if len(os.fsencode(self.root)) + LONGEST_NAME > MAX_PATH_BYTES:
            raise StartError(
                f"run directory {self.root} has too long a path: a Unix socket in it would not fit "
                f"{MAX_PATH_BYTES} bytes; choose a shorter one with --run-dir or VSWITCH_RUN_DIR"
            )
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.root.lstat()
        except OSError as error:
            raise StartError(
                f"run directory {self.root} cannot be made ({error.strerror}); "
                "choose another with --run-dir or VSWITCH_RUN_DIR"
            ) from None
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise StartError(
                f"run directory {self.root} is not a directory of user {os.geteuid()}; "
                "remove it, or choose another with --run-dir or VSWITCH_RUN_DIR"
            )
        if stat.S_IMODE(status.st_mode) != 0o700:
            self.root.chmod(0o700)
        for path in (self.internal, self.logs, self.consoles):
            path.mkdir(mode=0o700, exist_ok=True)

    def clean(self) -> None:
        """Leaves nothing but logs behind: for the end of a daemon that had nothing to keep."""
        for path in (self.internal, self.doors, self.consoles):
            shutil.rmtree(path, ignore_errors=True)
        for suffix in ("", "-wal", "-shm"):
            self.store.with_name(self.store.name + suffix).unlink(missing_ok=True)
        self.lock.unlink(missing_ok=True)


def take_lock(path: Path, what: str) -> int:
    """The descriptor that holds the lock until it is closed; StartError when another daemon holds it."""
    while True:
        fd = _lock(path, what)
        # An ending daemon removes its lock file: one that is not there any more locks nothing.
        try:
            if os.fstat(fd).st_ino == path.stat().st_ino:
                break
        except FileNotFoundError:
            pass
        os.close(fd)
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _lock(path: Path, what: str) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise StartError(
            f"a vswitch daemon (pid {holder}) already serves {what}; stop it with `vswitch daemon stop`, "
            "or start this one with another --run-dir"
        ) from None
    return fd


def listen(path: Path, mode: int) -> socket.socket:
    """A listening Unix socket at `path`; a stale one is replaced. The caller holds the lock."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Between bind and chmod nobody else may connect, so the mode is narrow from the first moment.
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise StartError(f"cannot serve on {path}: {error.strerror}; choose another --socket") from None
    finally:
        os.umask(before)
    path.chmod(mode)
    listener.listen(64)
    return listener
