"""Guests start with a clean environment, are found again, and are watched to their end."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vswitchd import launcher
from vswitchd.launcher import Ending, GuestProcess, Launch, cut_log, start_time


def program(text: str, directory: Path, *fds: int) -> Launch:
    return Launch([sys.executable, "-c", text], {}, fds, directory / "a.log")


def children() -> set[str]:
    """Those of every thread of this process."""
    lists = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {pid for each in lists for pid in each.read_text().split()}


@pytest.fixture
def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def test_a_guest_inherits_nothing_but_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("PYTHONPATH", "relative:/opt/packages")
    environment = launcher.environment(7)
    assert set(environment) == {"PATH", "HOME", "LANG", "PYTHONPATH", "VSWITCH_DOOR_FD"}
    assert environment["VSWITCH_DOOR_FD"] == "7"
    assert environment["PYTHONPATH"] == f"{launcher.ROOT}:/opt/packages"


async def test_a_launched_guest_holds_its_door_and_its_streams_alone(tmp_path: Path) -> None:
    listing = (
        "import os; print(sorted(int(fd) for fd in os.listdir('/proc/self/fd') if fd != '3'), os.getsid(0))"
    )
    door, other = os.pipe()
    os.set_inheritable(other, True)
    how: list[Ending] = []
    guest = await GuestProcess.launch(program(listing, tmp_path, door), how.append)
    assert str(await guest.ended) == "ended with status 0"
    assert how == [Ending(0)]
    fds, _, session = (tmp_path / "a.log").read_text().rpartition(" ")
    assert {0, 1, 2, door} - {3} == set(map(int, fds.strip("[]").split(","))) - {3}
    assert int(session) == guest.pid
    os.close(door)
    os.close(other)


async def test_a_guest_that_cannot_be_watched_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", full)
    before = children()
    with pytest.raises(OSError, match="Too many open files"):
        await GuestProcess.launch(program("import time; time.sleep(60)", tmp_path), lambda how: None)
    assert children() <= before


async def test_a_log_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="Too many levels"):
        await GuestProcess.launch(program("", tmp_path), lambda how: None)
    assert not (tmp_path / "elsewhere").exists()


async def test_a_guest_is_found_again_by_pid_and_start_time(sleeper: subprocess.Popen[bytes]) -> None:
    how: list[Ending] = []
    found = GuestProcess.find(sleeper.pid, start_time(sleeper.pid), how.append)
    assert found is not None
    found.signal(signal.SIGKILL)
    assert await found.ended == Ending(None)
    assert str(Ending(None)) == "ended"
    sleeper.wait()


async def test_another_process_with_the_same_pid_is_not_taken_for_the_guest(
    sleeper: subprocess.Popen[bytes],
) -> None:
    assert GuestProcess.find(sleeper.pid, start_time(sleeper.pid) - 1, lambda how: None) is None
    sleeper.kill()
    sleeper.wait()
    assert GuestProcess.find(sleeper.pid, 0, lambda how: None) is None


async def test_a_guest_that_ended_and_was_not_waited_for_is_gone(sleeper: subprocess.Popen[bytes]) -> None:
    started = start_time(sleeper.pid)
    sleeper.kill()
    await asyncio.to_thread(os.waitid, os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert GuestProcess.find(sleeper.pid, started, lambda how: None) is None
    sleeper.wait()


async def test_a_guest_that_ignores_being_asked_is_killed() -> None:
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True)"
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", f"{ignore}; time.sleep(60)", stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    await child.stdout.readline()
    guest = GuestProcess.find(child.pid, start_time(child.pid), lambda how: None)
    assert guest is not None
    await guest.end(0.0)
    assert await child.wait() == -signal.SIGKILL


async def test_a_keeper_s_note_tells_how_a_guest_of_an_earlier_daemon_ended(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    note = tmp_path / "exit"
    found = GuestProcess.find(sleeper.pid, start_time(sleeper.pid), lambda how: None, note)
    assert found is not None
    note.write_text("3\n")
    sleeper.kill()
    assert str(await found.ended) == "ended with status 3"
    sleeper.wait()
    assert str(Ending(-9)) == "was killed by SIGKILL"


def test_a_log_is_cut_from_its_beginning_and_written_on(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    with path.open("ab", buffering=0) as log:
        log.write(b"0123456789" * 100)
        assert not cut_log(path, 1000, 10)
        log.write(b"end")
        assert cut_log(path, 1000, 10)
        log.write(b" and on")
    assert path.read_bytes().splitlines()[-1] == b"3456789end and on"
    assert path.read_bytes().startswith(b"[the beginning was cut")
    (tmp_path / "link").symlink_to(path)
    assert not cut_log(tmp_path / "link", 1, 1)
