"""`vswitch demo`: every claim holds, in time, for root and an ordinary user; a failure is told in full."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import vswitch_native
import vswitchlab.demo as demo
from vswitchctl.output import Format
from vswitchlab import processes
from vswitchlab.demo import checks
from vswitchlab.demo.stage import CheckFailed, Stage
from vswitchlab.doctor import Facts, gather

ROOT = Path(__file__).parents[2]
NOBODY = 65534
NAMES = [
    "no_shortcut",
    "ping_both_ways",
    "telnet_blocked",
    "capture_matches",
    "trace_agrees",
    "telnet_restored",
    "tcp_sha256",
    "nothing_left",
]

NATIVE = pytest.mark.skipif(not vswitch_native.AVAILABLE, reason=vswitch_native.WHY)

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def home() -> Iterator[Path]:
    """A short, world-writable place for the demo's temporary directory."""
    directory = Path(tempfile.mkdtemp(prefix="vd-"))
    directory.chmod(0o777)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def vswitch(home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "vswitchctl", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(home), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.alone
@pytest.mark.parametrize("engine", [pytest.param("native", marks=NATIVE), "python"])
def test_every_check_passes_in_under_half_a_minute_and_leaves_nothing(home: Path, engine: str) -> None:
    done = vswitch(home, "demo", "--engine", engine, "-o", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert [check["name"] for check in result["checks"]] == NAMES
    assert all(check["passed"] and check["detail"] for check in result["checks"])
    assert result["summary"] == f"demo: 8 checks passed, 0 failed (guests: netns, engine: {engine})"
    assert result["seconds"] < 30
    assert list(home.iterdir()) == []


def test_the_last_line_is_the_verdict_and_no_program_but_python_is_needed(home: Path) -> None:
    """No `ip`, `unshare` or `ping` of this machine is run for namespaces and links: none is on the path."""
    (home / "empty").mkdir()
    done = vswitch(home, "demo", PATH=str(home / "empty"))
    assert done.returncode == 0, done.stdout + done.stderr
    engine = "native" if vswitch_native.AVAILABLE else "python"
    lines = done.stdout.splitlines()
    assert lines[-1] == f"demo: 8 checks passed, 0 failed (guests: netns, engine: {engine})"
    assert lines[-2].startswith("ok     nothing_left")
    assert "[ 1/12] a daemon of its own runs" in done.stderr


def test_an_ordinary_user_without_capabilities_runs_the_demo(home: Path) -> None:
    """With this machine's /dev/net/tun as most distributions make it: open for all."""
    if os.getuid() != 0:
        pytest.skip("this run is an ordinary user's already: the other demo tests are this test")
    python = home / "venv" / "bin" / "python"
    base = next((each for each in (sys.executable, sysconfig_python()) if usable(each)), None)
    if base is None:
        pytest.skip(f"no Python {sys.version_info.major}.{sys.version_info.minor} that uid {NOBODY} may run")
    subprocess.run([base, "-m", "venv", "--without-pip", str(home / "venv")], check=True, timeout=60)
    site = next((home / "venv" / "lib").glob("python*")) / "site-packages"
    (site / "here.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    script = f"""
mknod -m 666 {home}/tun c 10 200 && mount --bind {home}/tun /dev/net/tun
exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups --inh-caps=-all --bounding-set=-all \
    {python} -P -m vswitchctl demo -o json
"""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "TMPDIR": str(home),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["failed"] == 0
    assert [check["name"] for check in result["checks"]] == NAMES
    assert "1 TAP" in result["checks"][0]["detail"]


def sysconfig_python() -> str:
    return f"/usr/bin/python3.{sys.version_info.minor}"


def usable(python: str) -> bool:
    """Whether an ordinary user may run it, with the packages that this one has."""
    paths = [str(ROOT), sysconfig.get_path("purelib")]
    code = f"import sys; sys.path[:0] = {paths!r}; import grpc, vswitchctl"
    # Through a shell: setpriv itself still has root's ways to reach a file.
    user = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"]
    command = [*user, "sh", "-c", 'exec "$@"', "sh", python, "-c", code]
    try:
        return subprocess.run(command, capture_output=True, cwd="/", timeout=30, check=False).returncode == 0
    except OSError:
        return False


async def test_another_kind_of_link_where_a_tap_works_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A veth pair would do, and is not what was promised."""
    held = {
        number: processes.Holdings(number, memory={number}, doors={number}, events=3, taps={"eth0"})
        for number in (1001, 1002)
    }
    monkeypatch.setattr(processes, "holdings", held.__getitem__)
    monkeypatch.setattr(processes, "namespace", lambda pid, kind: pid)
    monkeypatch.setattr(processes, "interfaces", lambda pid: ["eth0", "lo"])
    monkeypatch.setattr(Stage, "note_processes", nothing_to_note)
    unused: Any = None
    stage = Stage(unused, unused, "python", Path(), unused, tap_expected=True)
    stage.agents, stage.namespaces = {"a": 1001, "b": 1002}, {1001, 1002}
    assert "1 TAP" in await checks.no_shortcut(stage)
    held[1002].taps.clear()
    with pytest.raises(CheckFailed, match="guest b holds the TAPs none, not just that of eth0"):
        await checks.no_shortcut(stage)
    held[1002].taps.add("eth0")
    held[1002].others.append("a file /etc/passwd")
    with pytest.raises(CheckFailed, match=r"guest b .* also holds a file /etc/passwd"):
        await checks.no_shortcut(stage)


async def nothing_to_note(stage: Stage) -> None:
    """The processes of this test are made up."""


async def wrong(stage: Stage) -> str:
    """A claim that does not hold."""
    raise CheckFailed(f"guest {stage.a.name} did not do what was claimed")


def test_a_failed_check_says_what_happened_and_where_to_look(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    monkeypatch.setattr(demo, "DURING_CAPTURE", (wrong,))
    monkeypatch.setattr(demo, "STORY", ())
    assert asyncio.run(demo.run("python", Format.TABLE)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "FAILED wrong            guest a did not do what was claimed" in lines
    evidence = [Path(line.removeprefix("see ")) for line in lines if line.startswith("see ")]
    assert {"daemon.log", "a.log", "b.log"} <= {path.name for path in evidence}
    assert all(path.is_file() for path in evidence)
    assert lines[-1] == "demo: 2 checks passed, 1 failed (guests: netns, engine: python)"


def test_where_guests_cannot_run_the_doctors_remedy_is_the_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ubuntu() -> Facts:
        trial = {"memfd_seals": "ok", "user_namespace": "ok", "id_map": "EPERM"}
        sysctls = {"kernel.apparmor_restrict_unprivileged_userns": 1}
        return replace(gather(), uid=1000, trial=trial, sysctls=sysctls)

    monkeypatch.setattr(demo, "gather", ubuntu)
    assert asyncio.run(demo.run("python", Format.TABLE)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0" in lines[0]
    assert lines[-1] == "demo: 0 checks passed, 1 failed (guests: none, engine: python)"
