"""Access is the kernel's word on who the peer is: real other users against a real daemon."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vswitchctl.launch import LaunchError, daemon_command, daemon_environment, start_daemon

if TYPE_CHECKING:
    from tests.conftest import RunningDaemon, StartDaemon

VIEWER, OPERATOR, STRANGER = 64201, 64202, 64203

other_users = pytest.mark.skipif(
    os.geteuid() != 0, reason="becoming another user needs root; the unit tests cover the front without it"
)

# Becomes another user for good, after its imports: where the interpreter lives need not be open to that user.
ATTEMPT = """
import json, os, sys
from vswitchctl.client import Client
from vswitchctl.errors import VswitchError

if len(sys.argv) > 2:
    uid = int(sys.argv[2])
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
outcomes = {}
with Client(sys.argv[1], timeout=10) as client:
    for name, call in {
        "list": lambda: client.list_switches(),
        "delete": lambda: client.delete_switch("s0"),
        "flush": lambda: client.flush_flows("s0"),
        "info": lambda: client.get_info(),
        "capture": lambda: client.capture("switches/s0").__enter__(),
        "shutdown": lambda: client.shutdown(),
    }.items():
        try:
            call()
            outcomes[name] = "OK"
        except VswitchError as error:
            outcomes[name] = [error.code.name, error.reason, error.message]
print(json.dumps(outcomes))
"""


@pytest.fixture
def open_socket() -> Iterator[Path]:
    """A socket's path in a directory that everybody may enter."""
    directory = Path(tempfile.mkdtemp(prefix="vswitch-open-"))
    directory.chmod(0o755)
    yield directory / "api.sock"
    shutil.rmtree(directory)


def attempt(uid: int, socket: Path) -> dict[str, object]:
    """What a process of user `uid` gets for each of the calls."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", ATTEMPT, str(socket), str(uid)],
        env=daemon_environment(),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcomes: dict[str, object] = json.loads(done.stdout)
    return outcomes


@other_users
def test_a_viewer_may_list_and_is_denied_delete(daemon_factory: StartDaemon, open_socket: Path) -> None:
    daemon = daemon_factory(
        options=["--socket", str(open_socket), "--viewer", str(VIEWER), "--operator", str(OPERATOR)]
    )
    daemon.client.create_switch("s0")
    seen = attempt(VIEWER, open_socket)
    assert (seen["list"], seen["info"]) == ("OK", "OK")
    assert seen["delete"] == [
        "PERMISSION_DENIED",
        "ROLE_TOO_SMALL",
        "DeleteSwitch needs the role admin; yours is viewer",
    ]
    assert [seen[name][0] for name in ("flush", "capture", "shutdown")] == ["PERMISSION_DENIED"] * 3  # type: ignore[index]
    assert [switch.name for switch in daemon.client.list_switches()] == ["switches/s0"]


@other_users
def test_an_operator_may_use_and_may_not_make_or_delete(
    daemon_factory: StartDaemon, open_socket: Path
) -> None:
    daemon = daemon_factory(options=["--socket", str(open_socket), "--operator", str(OPERATOR)])
    daemon.client.create_switch("s0")
    seen = attempt(OPERATOR, open_socket)
    assert [seen[name] for name in ("list", "flush", "capture", "info")] == ["OK"] * 4
    assert [seen[name][0] for name in ("delete", "shutdown")] == ["PERMISSION_DENIED"] * 2  # type: ignore[index]


@other_users
def test_a_stranger_is_denied_everything_and_logged(daemon_factory: StartDaemon, open_socket: Path) -> None:
    daemon = daemon_factory(options=["--socket", str(open_socket), "--viewer", str(VIEWER)])
    daemon.client.create_switch("s0")
    seen = attempt(STRANGER, open_socket)
    assert {outcome[0] for outcome in seen.values()} == {"PERMISSION_DENIED"}  # type: ignore[index]
    assert seen["list"] == [
        "PERMISSION_DENIED",
        "NO_ROLE",
        "your user has no role at this daemon, which serves another user",
    ]
    lines = [json.loads(line) for line in daemon.log.splitlines() if line.startswith("{")]
    assert [line["uid"] for line in lines if line["event"] == "refused_user"] == [STRANGER]


@other_users
def test_without_grants_another_user_cannot_even_reach_the_socket(daemon: RunningDaemon) -> None:
    seen = attempt(STRANGER, daemon.socket)
    assert {outcome[0] for outcome in seen.values()} == {"UNAVAILABLE"}  # type: ignore[index]


@other_users
def test_no_other_user_can_reach_the_sockets_behind_the_front(
    daemon_factory: StartDaemon, open_socket: Path
) -> None:
    daemon = daemon_factory(options=["--socket", str(open_socket), "--viewer", str(VIEWER)])
    seen = attempt(VIEWER, daemon.run_dir / "internal" / "admin.sock")
    assert {outcome[0] for outcome in seen.values()} == {"UNAVAILABLE"}  # type: ignore[index]


def test_a_guest_cannot_use_the_api_though_it_runs_under_the_daemons_uid(
    daemon_factory: StartDaemon, open_socket: Path
) -> None:
    daemon = daemon_factory(options=["--socket", str(open_socket)])
    daemon.client.create_switch("s0")
    daemon.client.create_partition("a")
    daemon.client.start_partition("a")
    command = [sys.executable, "-P", "-c", ATTEMPT, str(open_socket)]
    done = daemon.client.run_in("a", command, timeout=60)
    assert done.status == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert {outcome[0] for outcome in outcomes.values()} == {"PERMISSION_DENIED"}, outcomes
    assert [switch.name for switch in daemon.client.list_switches()] == ["switches/s0"]


def test_everything_that_the_daemon_writes_is_private(daemon: RunningDaemon) -> None:
    daemon.client.create_switch("s0")
    for path in [daemon.run_dir, *daemon.run_dir.rglob("*")]:
        assert path.lstat().st_mode & 0o077 == 0, path


def test_a_second_daemon_in_the_same_directory_is_refused_by_its_words(daemon: RunningDaemon) -> None:
    expected = (
        rf"^vswitchd: a vswitch daemon \(pid {daemon.process.pid}\) already serves {daemon.run_dir}; "
        "stop it with `vswitch daemon stop`, or start this one with another --run-dir$"
    )
    with pytest.raises(LaunchError, match=expected):
        start_daemon(daemon.run_dir)
    again = daemon.cli("daemon", "start")
    assert again.returncode == 1
    assert again.stderr.startswith("error: a vswitch daemon (pid ")
    assert "already serves" in again.stderr
    assert daemon.client.get_info().pid == daemon.process.pid


def test_a_second_daemon_on_the_same_socket_is_refused(
    daemon_factory: StartDaemon, open_socket: Path
) -> None:
    first = daemon_factory(options=["--socket", str(open_socket)])
    with pytest.raises(LaunchError, match=rf"\(pid {first.process.pid}\) already serves {open_socket}"):
        daemon_factory(options=["--socket", str(open_socket)])
    assert first.client.get_info().pid == first.process.pid


def test_an_engine_that_cannot_run_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    done = subprocess.run(
        [*daemon_command(tmp_path / "run"), "--engine", "quantum"],
        env=daemon_environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert "invalid choice: 'quantum'" in done.stderr
    assert not (tmp_path / "run").exists()
