"""The examples of the API run as they are, against a real daemon."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vswitchctl import capture_file
from vswitchctl.launch import ROOT, daemon_environment

if TYPE_CHECKING:
    from tests.conftest import RunningDaemon

pytestmark = pytest.mark.timeout(120)


def run(daemon: RunningDaemon, example: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "api" / example)],
        env={**daemon_environment(), "VSWITCH_RUN_DIR": str(daemon.run_dir)},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert daemon.client.list_partitions() == []
    assert daemon.client.list_switches() == []
    return done.stdout


def test_the_synchronous_example_pings_and_leaves_nothing(
    shared_daemon: RunningDaemon, tmp_path: Path
) -> None:
    output = run(shared_daemon, "two_guests.py", tmp_path)
    assert "guest a runs as process" in output
    assert output.count("is behind switches/example/ports/") == 2
    assert "as expected: switches/example/ports/nowhere does not exist (NOT_FOUND)" in output


def test_the_asyncio_example_captures_its_ping(shared_daemon: RunningDaemon, tmp_path: Path) -> None:
    output = run(shared_daemon, "live_capture.py", tmp_path)
    assert "changed: partitions/live1" in output
    records = list(capture_file.read_file(tmp_path / "ping.pcapng"))
    echoes = [record for record in records if record.data[12:14] == b"\x08\x00" and record.data[23] == 1]
    assert len(echoes) == 10


def test_the_scapy_example_is_a_host_that_a_guest_answers(
    shared_daemon: RunningDaemon, tmp_path: Path
) -> None:
    output = run(shared_daemon, "scapy_host.py", tmp_path)
    assert "10.9.0.1 is at 00:15:5d:" in output
    assert "ping: 10.9.0.1 answered" in output
