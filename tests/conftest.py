"""Fixtures for all tests: private daemons as real processes, killed and cleaned away at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vswitchctl.client import Client
from vswitchctl.errors import VswitchError
from vswitchctl.launch import DaemonProcess, daemon_environment, start_daemon


@dataclass
class RunningDaemon:
    """A daemon of one test, in a directory of its own. `client` is connected to it, over restarts too."""

    run_dir: Path
    process: DaemonProcess
    client: Client
    options: Sequence[str] = ()
    engine: str | None = None
    guests: set[int] = field(default_factory=set)

    @property
    def socket(self) -> Path:
        return self.process.socket

    @property
    def log(self) -> str:
        return self.process.log_path.read_text()

    def cli(self, *arguments: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
        """Runs `vswitch ARGUMENTS` against this daemon; output is captured, the status is not checked."""
        command = [sys.executable, "-P", "-m", "vswitchctl.main", *arguments]
        environment = {
            **daemon_environment(),
            "VSWITCH_RUN_DIR": str(self.run_dir),
            "VSWITCH_SOCKET": str(self.socket),
        }
        return subprocess.run(  # type: ignore[call-overload,no-any-return]
            command, env=environment, capture_output=True, text=True, timeout=50, **kwargs
        )

    def kill(self) -> None:
        """kill -9."""
        self.note_guests()
        self.process.kill()

    def restart(self) -> None:
        """A new daemon in the place of one that has ended."""
        self.process = start_daemon(self.run_dir, engine=self.engine, options=self.options)

    def note_guests(self) -> None:
        """Remembers the guests' processes, so that none is left whatever the test does."""
        with contextlib.suppress(VswitchError):
            self.guests |= {partition.pid for partition in self.client.list_partitions() if partition.pid}

    def end(self) -> None:
        """Ends the daemon, its guests, and removes its directory."""
        self.note_guests()
        with contextlib.suppress(VswitchError):
            self.client.shutdown(stop_guests=True)
        self.client.close()
        try:
            self.process.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for pid in self.guests:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.run_dir, ignore_errors=True)


StartDaemon = Callable[..., RunningDaemon]


@pytest.fixture
def daemon_factory() -> Iterator[StartDaemon]:
    """`daemon_factory(engine=None, options=())` starts a private daemon; all are ended after the test."""
    running: list[RunningDaemon] = []

    def start(engine: str | None = None, options: Sequence[str] = ()) -> RunningDaemon:
        # Not pytest's own directory: sockets in it would have names that are too long.
        run_dir = Path(tempfile.mkdtemp(prefix="vswitch-test-"))
        try:
            process = start_daemon(run_dir, engine=engine, options=options, started_by="test")
        except BaseException:
            shutil.rmtree(run_dir, ignore_errors=True)
            raise
        daemon = RunningDaemon(run_dir, process, Client(process.socket), options, engine)
        running.append(daemon)
        return daemon

    yield start
    for daemon in running:
        daemon.end()


@pytest.fixture
def daemon(daemon_factory: StartDaemon) -> RunningDaemon:
    """A private daemon with the default engine."""
    return daemon_factory()
