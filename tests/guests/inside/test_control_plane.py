"""A lab of two stock guests and a process guest as its user has it: up, seen, killed under, restarted,
stopped, down.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guests.inside.world import until
from tests.guests.stock_guest import Console, StockGuest
from vswitch_api.v1 import partition_pb2
from vswitchctl.client import Client
from vswitchctl.launch import daemon_environment, start_daemon

pytestmark = pytest.mark.timeout(300)
RUNNING = partition_pb2.PARTITION_STATE_RUNNING
STOPPED = partition_pb2.PARTITION_STATE_STOPPED


class Lab:
    """A daemon of its own with the lab in it, driven by the command line."""

    def __init__(self, folder: Path, kernel: str, initrd: str) -> None:
        self.folder = folder
        self.run_dir = Path(tempfile.mkdtemp(prefix="lab-"))
        self.daemon = start_daemon(self.run_dir, started_by="test", timeout=90)
        self.client = Client(self.daemon.socket)
        self.guests: dict[str, StockGuest] = {}
        self.environment = {
            **daemon_environment(),
            "VSWITCH_RUN_DIR": str(self.run_dir),
            "VSWITCH_SOCKET": str(self.daemon.socket),
        }
        self._joined = 0
        self.file = self.run_dir / "machines.yaml"
        vm = {"kind": "vm", "kernel": kernel, "initrd": initrd, "cmdline": "console=ttyS0 quiet panic=-1"}
        guests = {"m1": {**vm, "cpus": 2, "memory": "192M"}, "m2": {**vm, "memory": "192M"}, "n1": None}
        self.file.write_text(json.dumps({"guests": guests}))

    def cli(self, *arguments: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "vswitchctl", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == status, f"vswitch {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def show(self, name: str) -> dict[str, Any]:
        shown: dict[str, Any] = json.loads(self.cli("partition", "show", name, "-o", "json"))
        return shown

    def join(self, name: str) -> StockGuest:
        """Joins a guest's console by the command line."""
        self._joined += 1
        command = [sys.executable, "-P", "-m", "vswitchctl", "partition", "console", name, "--take-over"]
        log = self.folder / f"console-lab-{name}-{self._joined}.log"
        guest = self.guests[name] = StockGuest(name, Console.by(command, self.environment), log)
        return guest

    def end(self) -> None:
        for guest in self.guests.values():
            guest.close()
        pids = [pid for each in self.client.list_partitions() for pid in (each.pid, each.agent_pid) if pid]
        self.daemon.process.kill()
        self.daemon.process.wait()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.client.close()
        for log in sorted(self.run_dir.rglob("*.log")):
            shutil.copy(log, self.folder / f"lab-{log.name}")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """The lab's file and its daemon; the first test brings it up, the last takes it down."""
    told = Path(os.environ["VSWITCH_GUESTS_MANIFEST"])
    manifest = json.loads(told.read_text())
    lab = Lab(told.parent, manifest["kernel"]["path"], manifest["initrd"])
    try:
        yield lab
    finally:
        lab.end()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def reaches(guest: StockGuest, *addresses: str) -> None:
    """Waits until the guest's pings are answered."""
    for address in addresses:

        def answered(ping: str = f"ping -c 2 -W 2 {address}") -> bool:
            return guest.run(ping).status == 0

        until(answered, f"{guest.name} reaches {address}", 60)


def test_a_lab_of_stock_guests_comes_up_from_its_file(lab: Lab) -> None:
    said = lab.cli("lab", "up", str(lab.file))
    assert "next: vswitch lab ping n1 m1" in said
    kinds = {line.split()[0]: line.split()[1:3] for line in lab.cli("lab", "status").splitlines()[1:]}
    assert kinds == {"m1": ["vm", "running"], "m2": ["vm", "running"], "n1": ["netns", "running"]}
    for name in ("m1", "m2"):
        lab.join(name).wait_ready(160)
    # Names and addresses of the file reached the guests on their command line.
    assert lab.guests["m1"].sh("hostname").strip() == "m1"
    assert lab.guests["m1"].sh("nproc").strip() == "2"
    reaches(lab.guests["m1"], "10.77.0.2", "10.77.0.3")
    assert "0 lost" in lab.cli("lab", "ping", "n1", "m1", "--count", "5")


def test_what_a_guest_tells_of_itself_is_shown(lab: Lab) -> None:
    def told() -> dict[str, Any]:
        guest: dict[str, Any] = lab.show("m1")["guest"]
        return guest if guest.get("addresses") else {}

    guest = until(told, "m1 tells its addresses", 60)
    assert guest["boots"] == 1
    assert guest["heartbeat"] == "HEARTBEAT_STATE_OK"
    assert "10.77.0.1" in guest["addresses"]
    assert "Linux" in guest["os"]
    assert {"shutdown", "heartbeat", "time sync"} <= {name.replace("_", " ") for name in guest["services"]}
    table = lab.cli("partition", "show", "m1")
    assert "10.77.0.1" in table
    assert "ok, last" in table


def test_a_reboot_is_counted_and_the_guest_comes_back(lab: Lab) -> None:
    before = lab.client.get_partition("m1")
    lab.guests["m1"].sh("echo forgotten >/run/note")
    lab.guests["m1"].start("reboot")
    until(lambda: lab.client.get_partition("m1").guest.boots == 2, "m1 has booted twice", 60)
    m1 = lab.join("m1")
    m1.wait_ready(160)
    assert m1.run("cat /run/note").status != 0
    reaches(m1, "10.77.0.3")
    after = lab.client.get_partition("m1")
    assert (after.state, after.agent_pid) == (RUNNING, before.agent_pid)


def test_stopping_asks_the_guest_and_powering_off_is_a_state(lab: Lab) -> None:
    shown = lab.client.stop_partition("m1", timeout=60)
    assert (shown.state, shown.detail) == (STOPPED, "")
    lab.guests["m1"].wait_console("shutdown hooks", 10)
    m2 = lab.join("m2")
    m2.wait_ready(30)
    m2.start("poweroff")
    until(lambda: lab.client.get_partition("m2").state != RUNNING, "m2 powers off", 60)
    ended = lab.client.get_partition("m2")
    assert (ended.state, ended.detail) == (STOPPED, "the guest powered off")


def test_guests_live_on_when_the_daemon_is_killed_and_a_new_one_finds_them(lab: Lab) -> None:
    lab.client.start_partition("m2")
    m2 = lab.join("m2")
    m2.wait_ready(160)
    reaches(m2, "10.77.0.3")
    pids = {each.name: each.agent_pid for each in lab.client.list_partitions() if each.state == RUNNING}
    assert len(pids) == 2
    m2.sh("echo remembered >/run/note")
    lab.daemon.kill()
    assert all(map(alive, pids.values()))
    lab.daemon = start_daemon(lab.run_dir, started_by="test", timeout=90)
    again = {each.name: each for each in lab.client.list_partitions() if each.state == RUNNING}
    assert {name: each.agent_pid for name, each in again.items()} == pids
    m2 = lab.join("m2")
    m2.wait_ready(60)
    assert m2.sh("cat /run/note").strip() == "remembered"
    until(lambda: lab.show("m2")["guest"].get("heartbeat") == "HEARTBEAT_STATE_OK", "m2's heart beats", 60)


def test_the_network_of_a_stock_guest_comes_back_with_a_new_daemon(lab: Lab) -> None:
    reaches(lab.guests["m2"], "10.77.0.3")


def test_nothing_is_left_of_a_lab_that_is_down(lab: Lab) -> None:
    pids = [pid for each in lab.client.list_partitions() for pid in (each.pid, each.agent_pid) if pid]
    assert len(pids) == 4
    lab.cli("lab", "down")
    assert not any(map(alive, pids))
    assert lab.client.list_partitions() == []
    assert lab.client.list_switches() == []
    for directory in ("doors", "consoles"):
        assert list((lab.run_dir / directory).iterdir()) == []
