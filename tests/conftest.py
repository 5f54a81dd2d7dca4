"""Fixtures for all tests: private daemons as real processes, killed and cleaned away at the end.

Tests marked `alone` measure gaps or flood something: `make test` runs them one by one after the others, which
share the processors (pytest-xdist). A plain `pytest` runs all of them one by one.
"""

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

# The tests start some hundred interpreters: without their bytecode each would compile the same sources again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


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
        try:
            self.client.shutdown(stop_guests=True)
        except VswitchError:  # it has ended, or the test took its socket away
            self.process.process.terminate()
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
def tmp_path() -> Iterator[Path]:
    """A directory of the test's own, as pytest's, but with a name short enough for Unix sockets in it whoever
    runs the tests and however many workers there are.
    """
    with tempfile.TemporaryDirectory(prefix="vswitch-test-", ignore_cleanup_errors=True) as directory:
        yield Path(directory).resolve()


@contextlib.contextmanager
def daemons() -> Iterator[StartDaemon]:
    """Gives what starts private daemons; all are ended after the block."""
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

    try:
        yield start
    finally:
        for daemon in running:
            daemon.end()


@pytest.fixture
def daemon_factory() -> Iterator[StartDaemon]:
    """`daemon_factory(engine=None, options=())` starts a private daemon; all are ended after the test."""
    with daemons() as start:
        yield start


@pytest.fixture
def daemon(daemon_factory: StartDaemon) -> RunningDaemon:
    """A private daemon with the default engine."""
    return daemon_factory()


@pytest.fixture(scope="module")
def module_daemon() -> Iterator[RunningDaemon]:
    """The daemon behind `shared_daemon`."""
    with daemons() as start:
        yield start()


@pytest.fixture
def shared_daemon(module_daemon: RunningDaemon) -> Iterator[RunningDaemon]:
    """A daemon without any resource that the tests of one module use one after the other; for tests that do
    not touch its process.
    """
    yield module_daemon
    client = module_daemon.client
    client.on_call = None
    for partition in client.list_partitions():
        client.delete_partition(partition.name, force=True)
    for switch in client.list_switches():
        client.delete_switch(switch.name, force=True)
    assert client.list_ports() == []
