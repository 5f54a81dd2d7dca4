"""The run directory is private, has one owner at a time, and its errors say what to do."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from vswitchd import rundir
from vswitchd.main import config_of, parser
from vswitchd.rundir import RunDir, StartError


def test_it_is_made_private_and_an_open_one_is_closed(tmp_path: Path) -> None:
    RunDir(tmp_path / "new").prepare()
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    RunDir(tmp_path / "open").prepare()
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o700


def test_a_symbolic_link_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(StartError, match="is not a directory of user"):
        RunDir(tmp_path / "link").prepare()


def test_a_path_too_long_for_a_socket_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"too long a path.*VSWITCH_RUN_DIR"):
        RunDir(tmp_path / ("x" * 100)).prepare()


def test_the_second_owner_is_told_who_the_first_is(tmp_path: Path) -> None:
    fd = rundir.take_lock(tmp_path / "daemon.lock", str(tmp_path))
    with pytest.raises(StartError, match=rf"\(pid {os.getpid()}\) already serves .*vswitch daemon stop"):
        rundir.take_lock(tmp_path / "daemon.lock", str(tmp_path))
    os.close(fd)
    os.close(rundir.take_lock(tmp_path / "daemon.lock", str(tmp_path)))


def test_a_stale_socket_is_replaced_and_the_new_one_is_private(tmp_path: Path) -> None:
    rundir.listen(tmp_path / "api.sock", 0o600).close()
    with rundir.listen(tmp_path / "api.sock", 0o600):
        assert stat.S_IMODE((tmp_path / "api.sock").stat().st_mode) == 0o600


def test_letting_others_in_needs_a_socket_that_they_can_reach(tmp_path: Path) -> None:
    arguments = parser().parse_args(["--run-dir", str(tmp_path), "--viewer", "4242"])
    with pytest.raises(StartError, match="directory that only this user can enter; give --socket"):
        config_of(arguments)


def test_an_unknown_user_is_refused_by_name(tmp_path: Path) -> None:
    arguments = parser().parse_args(["--run-dir", str(tmp_path), "--viewer", "no-such-user"])
    with pytest.raises(StartError, match="there is no user 'no-such-user'"):
        config_of(arguments)
