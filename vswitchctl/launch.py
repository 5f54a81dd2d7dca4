"""Starting a daemon as a process of its own, for the command line, labs, the demo and tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vswitchctl import paths

ROOT = Path(__file__).resolve().parent.parent


class LaunchError(RuntimeError):
    """The daemon did not come up; the message holds its own words."""


@dataclass
class DaemonProcess:
    """A daemon that this process has started. `pid` is the daemon itself."""

    process: subprocess.Popen[bytes]
    run_dir: Path
    socket: Path
    log_path: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def terminate(self, timeout: float = 20.0) -> int:
        """Ends it in good order (guests stay for their grace period); its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def kill(self) -> None:
        """SIGKILL, as in a crash."""
        self.process.kill()
        self.process.wait()


def daemon_command(run_dir: Path, *options: str) -> list[str]:
    """The command line of a daemon. `-P`: nothing is imported from the current directory."""
    return [sys.executable, "-P", "-m", "vswitchd", "--run-dir", str(run_dir), *options]


def daemon_environment() -> dict[str, str]:
    """The caller's environment, with the packages found where this one was."""
    search = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(search))}


def start_daemon(
    run_dir: Path | None = None,
    *,
    engine: str | None = None,
    started_by: str = "",
    options: Sequence[str] = (),
    timeout: float = 30.0,
) -> DaemonProcess:
    """Starts a daemon in its own session and returns when it serves; LaunchError with its last words
    otherwise.
    """
    run_dir = (run_dir or paths.default_run_dir()).absolute()
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    log_path = run_dir / "daemon.log"
    arguments = list(options)
    if engine is not None:
        arguments += ["--engine", engine]
    if started_by:
        arguments += ["--started-by", started_by]
    ready, tell = os.pipe()
    try:
        with open(log_path, "ab", opener=_private) as log:
            begin = log.tell()
            process = subprocess.Popen(
                daemon_command(run_dir, "--ready-fd", str(tell), *arguments),
                env=daemon_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(tell,),
                start_new_session=True,
                cwd="/",
            )
        os.close(tell)
        tell = -1
        _await_ready(process, ready, timeout, log_path, begin)
    finally:
        os.close(ready)
        if tell >= 0:
            os.close(tell)
    socket = run_dir / paths.SOCKET_NAME
    if "--socket" in arguments:
        socket = Path(arguments[arguments.index("--socket") + 1])
    return DaemonProcess(process, run_dir, socket, log_path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _await_ready(
    process: subprocess.Popen[bytes], ready: int, timeout: float, log_path: Path, begin: int
) -> None:
    os.set_blocking(ready, False)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            if os.read(ready, 16):
                return
            break  # Its end of the pipe is closed: the daemon has given up.
        except BlockingIOError:
            time.sleep(0.01)
    else:
        process.kill()
    status = process.wait()
    with log_path.open("rb") as log:
        log.seek(begin)
        lines = log.read()[-8000:].decode(errors="replace").strip().splitlines()
    # Its log is JSON; what it says to whoever starts it is not.
    words = "\n".join(line for line in lines if not line.startswith("{")) or "\n".join(lines)
    raise LaunchError(words or f"the daemon ended with status {status} and said nothing; see {log_path}")
