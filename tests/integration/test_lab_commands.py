"""`vswitch lab` as a user types it: up, table, next command, exec, ping, clear refusals, and nothing left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vswitchlab import processes

ROOT = Path(__file__).parents[2]
TWO = "examples/labs/two-guests.yaml"

pytestmark = pytest.mark.timeout(90)


class Shell:
    """Runs `vswitch ...` with a run directory of its own."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def __call__(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "vswitchctl", *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "VSWITCH_RUN_DIR": str(self.run_dir)},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def vswitch() -> Iterator[Shell]:
    directory = Path(tempfile.mkdtemp(prefix="vswitch-cli-"))
    shell = Shell(directory / "run")
    try:
        yield shell
    finally:
        shell("daemon", "stop", "--stop-guests")
        shutil.rmtree(directory)


def test_up_exec_ping_down_without_a_daemon_running(vswitch: Shell) -> None:
    up = vswitch("lab", "up", TWO)
    assert up.returncode == 0, up.stderr
    table = up.stdout.splitlines()
    assert table[0].split()[:5] == ["GUEST", "KIND", "STATE", "NIC", "PORT"]
    assert table[1].split() == ["a", "netns", "running", "eth0", "s0/a-eth0", *table[1].split()[5:6],
                                "10.77.0.1/24", "fd77::1/64", "open"]  # fmt: skip
    assert "[1/3] switch s0 is there" in up.stderr
    assert up.stderr.splitlines()[-1] == "next: vswitch lab ping a b"

    ping = vswitch("lab", "ping", "a", "b", "-c", "3")
    assert ping.returncode == 0, ping.stderr
    assert "3 sent, 3 received, 0 lost" in ping.stdout

    said = vswitch(
        "lab", "exec", "b", "--", "sh", "-c", "cat; cat /proc/sys/kernel/hostname; exit 7", stdin="in\n"
    )
    assert (said.returncode, said.stdout) == (7, "in\nb\n")

    labs = json.loads(vswitch("lab", "list", "-o", "json").stdout)["labs"]
    assert [(each["lab"], each["guests"]) for each in labs] == [("two-guests", ["a", "b"])]
    assert processes.mentioning(str(vswitch.run_dir))

    down = vswitch("lab", "down")
    assert down.returncode == 0, down.stderr
    assert "lab two-guests is down; the daemon has ended too" in down.stderr
    assert processes.mentioning(str(vswitch.run_dir)) == []
    assert not [each for each in processes.unix_sockets(os.getpid()) if str(vswitch.run_dir) in each.path]
    assert not list(vswitch.run_dir.rglob("*.sock"))


def test_refusals_name_the_object_and_the_remedy(vswitch: Shell, tmp_path: Path) -> None:
    vswitch("lab", "up", TWO)
    again = vswitch("lab", "up", TWO)
    assert again.returncode == 1
    assert again.stderr.splitlines()[-2:] == [
        "error: lab two-guests is up already",
        "remedy: take it down first: vswitch lab down two-guests",
    ]
    other = tmp_path / "other.yaml"
    other.write_text("switches: [s7]\nguests: [c, a]\n", encoding="utf-8")
    taken = vswitch("lab", "up", str(other))
    assert taken.returncode == 1
    assert "error: lab other: " in taken.stderr
    assert "partitions/a" in taken.stderr
    assert "remedy: " in taken.stderr
    assert [each["lab"] for each in json.loads(vswitch("lab", "list", "-o", "json").stdout)["labs"]] == [
        "two-guests"
    ]
    nobody = vswitch("lab", "exec", "bb", "--", "true")
    assert nobody.stderr.splitlines() == [
        'error: there is no guest "bb"; guests: a, b',
        'remedy: did you mean "b"?',
    ]


def test_a_failed_command_or_extension_takes_the_lab_back(vswitch: Shell, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("guests:\n  a:\n    commands: ['echo no good >&2; exit 4']\n", encoding="utf-8")
    bad = vswitch("lab", "up", str(file))
    assert bad.returncode == 1
    assert "guest a: `echo no good >&2; exit 4` ended with status 4: no good" in bad.stderr
    assert json.loads(vswitch("lab", "list", "-o", "json").stdout)["labs"] == []
    (tmp_path / "broken.py").write_text("raise RuntimeError('not today')\n", encoding="utf-8")
    file.write_text("switches: {s0: {extensions: [broken.py]}}\nguests: [a]\n", encoding="utf-8")
    bad = vswitch("lab", "up", str(file))
    assert bad.returncode == 1
    assert "not today" in bad.stderr
    assert "broken.py" in bad.stderr
    assert json.loads(vswitch("switch", "list", "-o", "json").stdout) == []
