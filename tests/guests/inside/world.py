"""What one kernel's tests share: a daemon, a switch, two stock guests, a process guest, the evidence."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tests.guests.stock_guest import Console, StockGuest
from vswitchctl.client import Client
from vswitchctl.launch import DaemonProcess, daemon_environment, start_daemon

T = TypeVar("T")
MIB = 1 << 20
CMDLINE = "console=ttyS0 quiet panic=-1"


def until(check: Callable[[], T], what: str, timeout: float = 30, pause: float = 0.25) -> T:
    """Waits until `check` returns something true; what it returned."""
    end = time.monotonic() + timeout
    while True:
        found = check()
        if found:
            return found
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {timeout:.0f} s; last seen: {found!r}")
        time.sleep(pause)


@dataclass(frozen=True)
class Machine:
    """A stock guest's place in the lab."""

    name: str
    cpus: int
    address: str
    mac: str

    @property
    def nic(self) -> str:
        return f"{self.name}/eth0"

    @property
    def port(self) -> str:
        return f"s0/{self.name}"


VM1 = Machine("vm1", 4, "10.9.0.1", "00:15:5d:09:00:01")
VM2 = Machine("vm2", 1, "10.9.0.2", "00:15:5d:09:00:02")
BOX = Machine("box", 1, "10.9.0.3", "00:15:5d:09:00:03")


class Box:
    """The process guest, driven through one program of ours that stays in it (box_agent.py)."""

    def __init__(self, world: World) -> None:
        self._child = subprocess.Popen(
            [*world.command("partition", "exec", BOX.name), "--", sys.executable, "-P", str(_AGENT)],
            env=world.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._rest = b""
        assert self.ask(verb="hello") == {"hello": "box"}

    def ask(self, timeout: float = 120, **request: object) -> dict[str, Any]:
        """One request and its answer; AssertionError when the program has ended or is late."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps(request).encode() + b"\n")
        end = time.monotonic() + timeout
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._child.stdout], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"box: no answer to {request} within {timeout:.0f} s"
            some = os.read(self._child.stdout.fileno(), 65536)
            assert some, f"box: its program ended during {request}"
            self._rest += some
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        assert "error" not in answer, f"box: {request}: {answer['error']}"
        return answer

    def close(self) -> None:
        """Ends the program."""
        self._child.kill()
        self._child.wait()


class World:
    """One kernel's lab, and where its evidence goes."""

    def __init__(self, manifest: dict[str, Any], folder: Path, volume: int) -> None:
        self.manifest = manifest
        self.folder = folder
        self.volume = volume * MIB
        self.guests: dict[str, StockGuest] = {}
        self.box: Box
        self._boots = 0
        self.run_dir = Path(tempfile.mkdtemp(prefix="guests-"))
        self.daemon: DaemonProcess = start_daemon(self.run_dir, started_by="test", timeout=120)
        self.client = Client(self.daemon.socket)
        self.environment = {
            **daemon_environment(),
            "VSWITCH_RUN_DIR": str(self.run_dir),
            "VSWITCH_SOCKET": str(self.daemon.socket),
        }

    # --- the command line, as a user has it ---

    def command(self, *arguments: str) -> list[str]:
        """`vswitch ARGUMENTS` as a command."""
        return [sys.executable, "-P", "-m", "vswitchctl", *arguments]

    def cli(self, *arguments: str, timeout: float = 60) -> str:
        """Runs `vswitch ARGUMENTS`, which must succeed; its output."""
        done = subprocess.run(
            self.command(*arguments),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"vswitch {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    # --- guests ---

    def create(self, machine: Machine, cmdline: str = "", memory_mib: int = 256) -> None:
        """A partition for a stock guest, with a NIC on the switch."""
        self.client.create_kvm_partition(
            machine.name,
            kernel=self.manifest["kernel"]["path"],
            initrd=self.manifest["initrd"],
            cmdline=f"{CMDLINE} {cmdline}".strip(),
            memory_bytes=memory_mib * MIB,
            vp_count=machine.cpus,
        )
        self.client.create_nic(
            machine.nic, port=machine.port, mac=machine.mac, addresses=[f"{machine.address}/24"]
        )

    def boot(self, machine: Machine) -> StockGuest:
        """Starts a stock guest and joins its console."""
        self.client.start_partition(machine.name)
        return self.join(machine)

    def join(self, machine: Machine) -> StockGuest:
        """The guest's console, into a log of its own for each boot.

        Joined where the VMM serves it: daemon and command line, which give it to a user, have tests of their
        own (test_docs.py, test_control_plane.py), and every answer through them costs an emulated machine.
        """
        self._boots += 1
        number = self.client.get_partition(machine.name).partition_id
        console = Console.at(self.run_dir / "consoles" / f"{number}.sock")
        log = self.folder / f"console-{machine.name}-{self._boots}.log"
        guest = StockGuest(machine.name, console, log)
        self.guests[machine.name] = guest
        return guest

    def remove(self, machine: Machine) -> None:
        """The guest and its partition are gone."""
        guest = self.guests.pop(machine.name, None)
        if guest:
            guest.close()
        self.client.delete_partition(machine.name, force=True)

    def keep(self, name: str, what: object) -> None:
        """Puts a piece of evidence beside the console logs."""
        text = what if isinstance(what, str) else json.dumps(what, indent=1)
        (self.folder / name).write_text(text)

    def counters(self, machine: Machine) -> Any:
        """The switch port's view of a guest."""
        return self.client.get_port(machine.port)

    def end(self) -> None:
        """Ends the lab; keeps what the daemon and the VMMs wrote."""
        for guest in self.guests.values():
            guest.close()
        if hasattr(self, "box"):
            self.box.close()
        try:
            self.client.shutdown(stop_guests=True)
            self.daemon.process.wait(30)
        finally:
            self.client.close()
            self.daemon.process.kill()
            for log in sorted(self.run_dir.rglob("*.log")):
                name = "-".join(log.relative_to(self.run_dir).parts)
                (self.folder / f"host-{name}").write_bytes(log.read_bytes()[-(4 << 20) :])


def has_address(guest: StockGuest, timeout: float = 60) -> None:
    """Waits until the guest's adapter is there (again) and has its address."""
    look = "ip -4 address show dev eth0 2>/dev/null | grep -q inet"
    until(lambda: guest.run(look).status == 0, f"{guest.name} has an address", timeout)


def pings(text: str) -> tuple[int, int]:
    """(sent, received) out of what ping prints at its end."""
    found = re.search(r"(\d+) packets transmitted, (\d+) (?:packets )?received", text)
    assert found, f"ping printed no summary: {text!r}"
    return int(found[1]), int(found[2])


# One line of what the pings of a script did: replies, the highest sequence number answered, duplicates.
_COUNT = (
    "awk -F'icmp_seq=' '/transmitted/{print} /DUP/{d++; next} "
    '/icmp_seq=/{split($2, n, " "); r++; if (n[1] + 0 > m) m = n[1] + 0} '
    'END{print "replies " r + 0 " last " m + 0 " duplicates " d + 0}\''
)


class Pinging:
    """A stock guest's ping every 10 ms for as long as the block lasts; nothing may be lost.

    A reply that is missing below the last one that came was lost. What was sent behind that was under way
    when ping was told to end: not lost, unless it is more than a second's.
    """

    def __init__(
        self, guest: StockGuest, to: Sequence[str], interval: float = 0.01, lost: bool = False
    ) -> None:
        self._guest = guest
        self._to = to
        self._interval = interval
        self._may_lose = lost
        self.sent = 0
        self.received = 0

    def __enter__(self) -> Pinging:
        self._jobs = [
            self._guest.start(f"iping -i {self._interval} {address} | {_COUNT}") for address in self._to
        ]
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        # Replies that came and that a starved ping did not fetch in time are counted at its socket.
        sockets = self._guest.run("cat /proc/net/raw; killall -INT iping").output
        for job in self._jobs:
            output = job.wait(20).output
            sent, received = pings(output)
            self.sent += sent
            self.received += received
            if kind is None and not self._may_lose:
                found = re.search(r"replies (\d+) last (\d+) duplicates (\d+)", output)
                assert found, f"no count of pings: {output!r}"
                replies, last, duplicates = map(int, found.groups())
                lost = last - replies
                assert (lost, duplicates) == (0, 0), (
                    f"{lost} of {sent} pings from {self._guest.name} lost, {duplicates} came twice; "
                    f"its sockets (drops last): {sockets}"
                )
                assert sent - received <= 1 / self._interval, f"the last {sent - received} pings are missing"
                assert sent >= 5, f"only {sent} pings were sent"


_AGENT = Path(__file__).with_name("box_agent.py")
