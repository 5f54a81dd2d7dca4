"""Who stands around the hostile guest: the daemon, two process guests, the VMM's traces in /proc and KVM."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vswitch_api.v1 import partition_pb2
from vswitchctl.client import Client
from vswitchctl.errors import VswitchError
from vswitchctl.launch import daemon_environment, start_daemon

EVIL = "evil"
MEMORY = 64 << 20
PROCESSORS = 2
DEBUG = Path("/sys/kernel/debug")
STATISTICS = DEBUG / "kvm"
_BEGAN = time.monotonic()


class Scene:
    """One daemon and its guests. `seed` and `seconds` are the run's."""

    def __init__(self) -> None:
        self.image = Path(os.environ["VSWITCH_HOSTILE_IMAGE"])
        self.seconds = float(os.environ["VSWITCH_HOSTILE_SECONDS"])
        self.seed = int(os.environ["VSWITCH_HOSTILE_SEED"])
        self.folder = self.image.parent
        self._pinging: subprocess.Popen[bytes] | None = None
        self._read = 0
        self.run_dir = Path(tempfile.mkdtemp(prefix="hostile-"))
        self.daemon = start_daemon(self.run_dir, started_by="test", timeout=120)
        self.client = Client(self.daemon.socket)
        say("the daemon serves")

    def up(self) -> None:
        """The switch and the two who ping each other."""
        self.client.create_switch("s0")
        for number, name in enumerate(("a", "b"), start=1):
            self.client.create_partition(name)
            self.client.create_nic(
                f"{name}/eth0",
                port=f"s0/{name}",
                mac=f"02:00:00:00:00:{number:02x}",
                addresses=[address(number)],
            )
            self.start(name)
            say(f"guest {name} runs")
        self._pinging = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "vswitchctl", "partition", "exec", "a", "--"),
                *(sys.executable, "-P", "-m", "netvsc.probe", "ping", address(2).split("/")[0]),
                *("--interval", "0.01", "--count", "0", "--until-eof", "--json"),
            ],
            env={**daemon_environment(), "VSWITCH_SOCKET": str(self.daemon.socket)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, name: str) -> None:
        """Starts a partition; again if an emulated processor that others use as well was too slow for it."""
        for attempts_left in reversed(range(5)):
            try:
                self.client.start_partition(name)
                return
            except VswitchError as error:
                if "nothing within" not in str(error) or not attempts_left:
                    raise
                say(f"{name} is slow to start: {error}")

    # --- the hostile guest ---

    def create(self, seed: int) -> None:
        """The partition of the payload, with a NIC on the others' switch."""
        self.client.create_kvm_partition(
            EVIL,
            kernel=str(self.image),
            cmdline=f"seed={seed} cpus={PROCESSORS}",
            memory_bytes=MEMORY,
            vp_count=PROCESSORS,
        )
        self.client.create_nic(f"{EVIL}/eth0", port=f"s0/{EVIL}", mac="02:00:00:00:00:66")

    def partition(self) -> partition_pb2.Partition:
        """What the daemon says of it."""
        return self.client.get_partition(EVIL)

    def vmm(self) -> int | None:
        """The process id of the hostile guest's VMM; None while it has none."""
        return self.partition().agent_pid or None

    def console(self) -> str:
        """What the VMM wrote of the guest's console since the last call: its log outlives each start."""
        try:
            with Path(self.partition().log_path).open("rb") as log:
                # One that has become shorter was begun anew.
                size = log.seek(0, os.SEEK_END)
                log.seek(self._read if self._read <= size else 0)
                text = log.read()
                self._read = log.tell()
        except OSError:
            return ""
        return text.decode(errors="replace")

    # --- the bystanders ---

    def pings(self) -> dict[str, Any]:
        """Ends the bystanders' pings; their summary."""
        assert self._pinging is not None
        output, _ = self._pinging.communicate(timeout=30)
        summary: dict[str, Any] = json.loads(output.decode().strip().splitlines()[-1])
        return summary

    def daemon_log(self) -> str:
        """What the daemon wrote."""
        return self.daemon.log_path.read_text(errors="replace")

    def keep(self, name: str, text: str) -> None:
        """Evidence."""
        (self.folder / name).write_text(text)

    def end(self) -> None:
        """Everything ends; its logs are kept."""
        if self._pinging is not None and self._pinging.poll() is None:
            self._pinging.kill()
        try:
            self.client.shutdown(stop_guests=True)
            self.daemon.process.wait(30)
        finally:
            self.client.close()
            self.daemon.process.kill()
            for log in sorted(self.run_dir.rglob("*.log")):
                name = "-".join(log.relative_to(self.run_dir).parts)
                (self.folder / f"host-{name}").write_bytes(log.read_bytes()[-(4 << 20) :])


def say(text: str) -> None:
    """Progress, for whoever waits."""
    print(f"hostile: [{time.monotonic() - _BEGAN:4.0f} s] {text}", flush=True)


def address(number: int) -> str:
    """A bystander's address with its prefix."""
    return f"10.9.0.{number}/24"


class Exits:
    """Counts a virtual machine's exits over its lives, from KVM's own statistics where root may read them."""

    def __init__(self) -> None:
        self.total = 0
        self._lives: dict[int, int] = {}
        if not STATISTICS.is_dir() and os.geteuid() == 0:
            subprocess.run(
                ["mount", "-t", "debugfs", "debugfs", str(DEBUG)], check=False, capture_output=True
            )
        self.known = STATISTICS.is_dir()

    def look(self, vmm: int | None) -> None:
        """Reads the counters of the VMM's machine."""
        if vmm is None or not self.known:
            return
        # A guest's reset gives it a new virtual machine, whose counters begin anew.
        now = sum(int(path.read_text()) for path in STATISTICS.glob(f"{vmm}-*/exits") if path.exists())
        before = self._lives.get(vmm, 0)
        self.total += now - before if now >= before else now
        self._lives[vmm] = now


def tasks(pid: int) -> dict[str, dict[str, str]]:
    """`/proc/PID/task/*/status` as fields, by thread."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        text = (task / "status").read_text()
        found[f"{task.name} {_field(text, 'Name')}"] = {
            name: _field(text, name) for name in ("Seccomp", "CapEff", "CapPrm", "NoNewPrivs")
        }
    return found


def _field(text: str, name: str) -> str:
    match = re.search(rf"^{name}:\s*(.*)$", text, re.M)
    return match[1].strip() if match else ""


def wait_for(what: str, check: Any, seconds: float) -> Any:
    """What `check` gave once it was true. AssertionError with `what` when the time is up."""
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)
    return found
