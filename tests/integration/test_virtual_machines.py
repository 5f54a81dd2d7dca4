"""Virtual machines under a real daemon and a stand-in for the VMM: life, console, death, return. No KVM
needed.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from waiting import eventually

from vswitch_api.v1 import partition_pb2
from vswitchctl.aio import AsyncClient, ConsoleStream
from vswitchctl.errors import VswitchError
from vswitchctl.launch import daemon_environment

if TYPE_CHECKING:
    from tests.conftest import RunningDaemon, StartDaemon

pytestmark = pytest.mark.timeout(120)

FAKE = Path(__file__).resolve().parents[1] / "support" / "fake_vmm.py"
RUNNING = partition_pb2.PARTITION_STATE_RUNNING
STOPPED = partition_pb2.PARTITION_STATE_STOPPED
FAILED = partition_pb2.PARTITION_STATE_FAILED


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """A file with the setup header of a bzImage, boot protocol 2.15."""
    head = bytearray(0x400)
    head[0x1FE:0x200] = b"\x55\xaa"
    head[0x202:0x208] = b"HdrS\x0f\x02"
    path = tmp_path / "vmlinuz"
    path.write_bytes(head)
    return path


@pytest.fixture
def machine(daemon_factory: StartDaemon, monkeypatch: pytest.MonkeyPatch, kernel: Path) -> RunningDaemon:
    """A daemon with one virtual machine, vm, that runs: two processors, 64 MiB, a NIC."""
    monkeypatch.setenv("VSWITCH_VMM", str(FAKE))
    daemon = daemon_factory()
    daemon.client.create_switch("s0")
    initrd = kernel.with_name("initrd")
    initrd.write_bytes(b"070701")
    daemon.client.create_kvm_partition(
        "vm", kernel=str(kernel), initrd=str(initrd), cmdline="quiet", memory_bytes=64 << 20, vp_count=2
    )
    daemon.client.create_nic(
        "vm/eth0", port="s0/vm", mac="00:15:5d:01:02:03", addresses=["10.0.0.1/24", "fd00::1/64"], mtu=1400
    )
    daemon.client.start_partition("vm")
    return daemon


async def until(console: ConsoleStream, what: bytes, seen: bytes = b"") -> bytes:
    """What the console writes up to `what`."""
    async with asyncio.timeout(20):
        async for data in console:
            seen += data
            if what in seen:
                return seen
    raise AssertionError(f"the console ended ({console.detail}) without {what!r}: {seen!r}")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_a_machine_gets_its_images_its_command_line_and_a_console(
    machine: RunningDaemon, kernel: Path
) -> None:
    digest = hashlib.sha256(kernel.read_bytes()).hexdigest().encode()  # noqa: ASYNC240
    partition = machine.client.get_partition("vm")
    assert (partition.state, partition.vp_count, partition.memory_bytes) == (RUNNING, 2, 64 << 20)
    assert partition.guest.boots == 1
    async with AsyncClient(machine.socket) as client, client.console("vm") as console:
        seen = (await until(console, b"Command line: ")).replace(b"\r\n", b"\n")
        seen += (await until(console, b"\n")) if not seen.endswith(b"\n") else b""
        assert b"2 processors, memory 0x0+0x4000000" in seen
        assert digest in seen
        assert hashlib.sha256(b"070701").hexdigest().encode() in seen
        line = "quiet vswitch.hostname=vm vswitch.nic=eth0,00:15:5d:01:02:03,10.0.0.1/24,fd00::1/64,mtu=1400"
        assert f"Command line: {line}\n".encode() in seen
        await console.write(b"hello world\n")
        await until(console, b"you typed: hello world")
    # What was said while nobody was there is said to the next one.
    async with AsyncClient(machine.socket) as client, client.console("vm") as console:
        await until(console, b"you typed: hello world")
    assert "you typed: hello world" in machine.cli("partition", "log", "vm").stdout


async def test_one_caller_at_a_console_unless_another_takes_it_over(machine: RunningDaemon) -> None:
    async with AsyncClient(machine.socket) as client, client.console("vm") as console:
        await until(console, b"Command line")
        with pytest.raises(VswitchError, match="another caller is at its console") as error:
            async with client.console("vm"):
                pass
        assert error.value.reason == "CONSOLE_BUSY"
        assert "--take-over" in error.value.remedy
        async with client.console("vm", take_over=True) as second:
            await second.write(b"mine\n")
            await until(second, b"you typed: mine")
            async for _ in console:
                pass
            assert console.detail == "another caller has taken the console over"


async def test_powering_off_and_crashing_are_states(machine: RunningDaemon) -> None:
    client = machine.client
    for command, state, detail in (
        (b"poweroff\n", STOPPED, "the guest powered off"),
        (b"crash\n", FAILED, "the guest crashed"),
        (b"abort\n", FAILED, "its virtual machine monitor was killed by SIG"),
        (b"refuse\n", FAILED, "its virtual machine monitor ended with status 1: KVM_CREATE_VCPU: no memory"),
    ):
        client.start_partition("vm")
        pid = client.get_partition("vm").agent_pid
        async with AsyncClient(machine.socket) as aio, aio.console("vm") as console:
            await console.write(command)
            async for _ in console:
                pass
        await asyncio.to_thread(eventually, lambda: client.get_partition("vm").state not in (RUNNING,))
        partition = client.get_partition("vm")
        assert (partition.state, partition.pid) == (state, 0)
        assert partition.detail.startswith(detail)
        assert not alive(pid)
    assert not list((machine.run_dir / "consoles").iterdir())
    client.start_partition("vm")
    os.kill(client.get_partition("vm").agent_pid, signal.SIGTERM)
    await asyncio.to_thread(eventually, lambda: client.get_partition("vm").state == FAILED)
    detail = client.get_partition("vm").detail
    assert detail == "its virtual machine monitor was told to end by a signal"


def test_the_console_command_joins_pipes_and_terminals(machine: RunningDaemon) -> None:
    piped = machine.cli("partition", "console", "vm", input="from a pipe\npoweroff\n")
    assert piped.returncode == 0, piped.stderr
    assert "you typed: from a pipe" in piped.stdout
    assert piped.stderr == "the guest has ended\n"
    machine.client.start_partition("vm")
    leader, follower = pty.openpty()
    command = [sys.executable, "-P", "-m", "vswitchctl.main", "partition", "console", "vm"]
    environment = {**daemon_environment(), "VSWITCH_SOCKET": str(machine.socket)}
    joined = subprocess.Popen(command, env=environment, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    try:
        seen = read_until(leader, b"Command line")
        assert b"Ctrl-] leaves it" in seen
        os.write(leader, b"\x03keys\r")  # Ctrl-C is a key like others
        read_until(leader, b"you typed: \x03keys")
        os.write(leader, b"\x1d")
        assert joined.wait(10) == 0
    finally:
        joined.kill()
        joined.wait()
    os.close(leader)
    assert machine.client.get_partition("vm").state == RUNNING


def read_until(fd: int, what: bytes) -> bytes:
    seen = b""
    deadline = time.monotonic() + 20
    while what not in seen:
        assert select.select([fd], [], [], deadline - time.monotonic())[0], seen
        seen += os.read(fd, 4096)
    return seen


def test_stopping_ends_it_and_leaves_nothing(machine: RunningDaemon) -> None:
    partition = machine.client.get_partition("vm")
    assert alive(partition.agent_pid)
    stopped = machine.cli("partition", "stop", "vm")
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped" in stopped.stdout
    assert not alive(partition.pid)
    assert not alive(partition.agent_pid)
    machine.client.start_partition("vm")
    with pytest.raises(VswitchError, match="partitions/vm runs"):
        machine.client.delete_partition("vm")
    machine.client.delete_partition("vm", force=True)
    assert machine.client.list_ports() == []
    for directory in ("doors", "consoles"):
        assert not list((machine.run_dir / directory).iterdir())


def test_a_restarted_daemon_finds_its_machine_again(machine: RunningDaemon) -> None:
    pid = machine.client.get_partition("vm").agent_pid
    machine.kill()
    assert alive(pid)
    machine.restart()
    partition = machine.client.get_partition("vm")
    assert (partition.state, partition.agent_pid, partition.guest.boots) == (RUNNING, pid, 1)
    joined = machine.cli("partition", "console", "vm", input="still here\npoweroff\n")
    assert "you typed: still here" in joined.stdout
    # Its end is known although this daemon is not its parent.
    eventually(lambda: machine.client.get_partition("vm").state != RUNNING)
    ended = machine.client.get_partition("vm")
    assert (ended.state, ended.detail) == (STOPPED, "the guest powered off")


def test_an_end_while_there_was_no_daemon_is_known_to_the_next(machine: RunningDaemon) -> None:
    pid = machine.client.get_partition("vm").agent_pid
    machine.kill()
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: not alive(pid))
    machine.restart()
    partition = machine.client.get_partition("vm")
    assert (partition.state, partition.pid) == (FAILED, 0)
    ended = "its virtual machine monitor was told to end by a signal"
    assert partition.detail == f"{ended} (while there was no daemon)"


def test_the_vmm_is_enclosed(machine: RunningDaemon) -> None:
    """What the launcher gives, whatever the VMM does for itself: namespaces, no capabilities, no new ones."""
    pid = machine.client.get_partition("vm").agent_pid
    for kind in ("user", "pid", "mnt", "net", "ipc", "uts"):
        assert os.stat(f"/proc/{pid}/ns/{kind}").st_ino != os.stat(f"/proc/self/ns/{kind}").st_ino, kind
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert status["NoNewPrivs"] == "1"
    assert os.listdir(f"/proc/{pid}/root{machine.run_dir}") == []
    assert Path(f"/proc/{pid}/root/proc/1/status").read_text().splitlines()[0].startswith("Name:\tpython")


def test_its_log_is_bounded_while_it_runs(machine: RunningDaemon) -> None:
    log = Path(machine.client.get_partition("vm").log_path)
    flooded = machine.cli("partition", "console", "vm", input="flood 6000\npoweroff\n")
    assert "flooded" in flooded.stdout[-2000:]
    # The console ends a moment before the process is seen to.
    eventually(lambda: machine.client.get_partition("vm").state == STOPPED)
    machine.client.start_partition("vm")
    eventually(lambda: "boot 1" in log.read_text())
    text = log.read_text()
    assert len(text) <= 4 << 20
    assert text.startswith("[the beginning was cut")


def test_what_needs_an_agent_is_refused_in_words(machine: RunningDaemon) -> None:
    ran = machine.cli("partition", "exec", "vm", "--", "true")
    assert ran.returncode == 5
    assert "partitions/vm is a virtual machine: no agent of ours runs in it" in ran.stderr
    assert "vswitch partition console vm" in ran.stderr
    with pytest.raises(VswitchError, match="no agent of ours"):
        machine.client.set_partition_hosts("vm", {"a": ["10.0.0.1"]})
    machine.client.create_partition("p")
    joined = machine.cli("partition", "console", "p", input="")
    assert joined.returncode == 5
    assert "is a process partition: it has no console" in joined.stderr
    machine.client.stop_partition("vm")
    joined = machine.cli("partition", "console", "vm", input="")
    assert "partitions/vm does not run" in joined.stderr


def test_the_command_line_makes_a_machine(machine: RunningDaemon, kernel: Path) -> None:
    made = machine.cli(
        *("partition", "create", "cli", "--kvm", "--kernel", kernel.name, "--memory", "256M", "--cpus", "2"),
        *("--cmdline", "console=ttyS0 ro -- single", "--host-cpus", "0", "--start"),
        cwd=kernel.parent,
    )
    assert made.returncode == 0, made.stderr
    shown = dict(line.split("  ", 1) for line in made.stdout.splitlines())
    shown = {key.strip(): value.strip() for key, value in shown.items()}
    assert shown["kind"] == "vm"
    assert shown["kernel"] == str(kernel)
    assert (shown["memory"], shown["processors"], shown["host cpus"]) == ("256 MiB", "2", "0")
    assert (shown["state"], shown["boots"], shown["heartbeat"]) == ("running", "1", "none")
    log = machine.cli("partition", "log", "cli").stdout
    assert "Command line: console=ttyS0 ro vswitch.hostname=cli -- single" in log
    assert "vm " in machine.cli("partition", "list").stdout


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--kvm"], 2, "--kernel FILE"),
        (["--kernel", "{kernel}"], 2, "need --kvm"),
        (["--kvm", "--kernel", "{kernel}", "--engine", "python"], 2, "are for process guests"),
        (["--kvm", "--kernel", "/nowhere/vmlinuz"], 7, "kernel /nowhere/vmlinuz does not exist"),
        (["--kvm", "--kernel", "/etc"], 7, "kernel /etc is not a regular file"),
        (["--kvm", "--kernel", "/etc/passwd"], 7, "/etc/passwd is no Linux kernel for x86"),
        (
            ["--kvm", "--kernel", "{kernel}", "--initrd", "/nowhere/initrd"],
            7,
            "initrd /nowhere/initrd does not",
        ),
        (["--kvm", "--kernel", "{kernel}", "--memory", "1M"], 7, "partition.memory_bytes"),
        (["--kvm", "--kernel", "{kernel}", "--memory", "much"], 2, "a size is needed, as 256M"),
        (["--kvm", "--kernel", "{kernel}", "--cpus", "65"], 7, "65 is more than 64"),
        (["--kvm", "--kernel", "{kernel}", "--host-cpus", "4000"], 7, "may not run on CPU 4000"),
        (["--kvm", "--kernel", "{kernel}", "--cmdline", "a\nb"], 7, "printable ASCII"),
    ],
)
def test_a_wrong_machine_is_refused_in_words(
    daemon: RunningDaemon, kernel: Path, options: list[str], status: int, words: str
) -> None:
    done = daemon.cli("partition", "create", "bad", *(each.format(kernel=kernel) for each in options))
    assert words in done.stderr
    assert done.returncode == status
    assert daemon.client.list_partitions() == []


def test_a_machine_that_cannot_start_says_why(machine: RunningDaemon, kernel: Path) -> None:
    client = machine.client
    client.create_kvm_partition("no", kernel=str(kernel), cmdline="refuse")
    with pytest.raises(
        VswitchError, match=r"/dev/kvm: permission denied; add yourself to group kvm"
    ) as error:
        client.start_partition("no")
    assert error.value.reason == "GUEST_DID_NOT_START"
    client.stop_partition("vm")
    kernel.unlink()
    with pytest.raises(
        VswitchError, match=f"partitions/vm cannot start: kernel {kernel} does not exist"
    ) as error:
        client.start_partition("vm")
    assert error.value.reason == "CANNOT_BOOT"
    assert client.get_partition("vm").state == FAILED


def test_without_a_vmm_a_machine_says_what_is_missing(
    daemon_factory: StartDaemon, monkeypatch: pytest.MonkeyPatch, kernel: Path
) -> None:
    monkeypatch.setenv("VSWITCH_VMM", "/nowhere/vswitch-vmm")
    daemon = daemon_factory()
    daemon.client.create_kvm_partition("vm", kernel=str(kernel))
    with pytest.raises(
        VswitchError, match="needs a virtual machine monitor: VSWITCH_VMM names /nowhere"
    ) as error:
        daemon.client.start_partition("vm")
    assert error.value.reason == "NO_VMM"


def test_a_lab_of_virtual_machines_comes_up_is_shown_and_leaves_nothing(
    machine: RunningDaemon, kernel: Path
) -> None:
    machine.client.delete_partition("vm", force=True)
    machine.client.delete_switch("s0", force=True)
    file = kernel.with_name("machines.yaml")
    file.write_text(
        "guests:\n"
        "  vm1: {kind: vm, kernel: vmlinuz, memory: 128M, cpus: 2}\n"
        "  vm2: {kind: vm, kernel: vmlinuz, initrd: initrd, cmdline: console=ttyS0 quiet}\n"
        "  box:\n"
    )
    up = machine.cli("lab", "up", str(file))
    assert up.returncode == 0, up.stderr
    assert "next: vswitch lab ping box vm1" in up.stderr
    shown = [line.split() for line in machine.cli("lab", "status").stdout.splitlines()]
    assert [line[:3] for line in shown[1:]] == [
        ["box", "netns", "running"],
        ["vm1", "vm", "running"],
        ["vm2", "vm", "running"],
    ]
    log = machine.cli("partition", "log", "vm1").stdout
    assert "2 processors, memory 0x0+0x8000000" in log
    assert "vswitch.hostname=vm1 vswitch.nic=eth0,00:15:5d:" in log
    assert ",10.77.0.1/24,fd77::1/64" in log
    refused = machine.cli("lab", "exec", "vm1", "--", "true")
    assert "no agent of ours runs in it" in refused.stderr
    pids = [pid for each in machine.client.list_partitions() for pid in (each.pid, each.agent_pid)]
    down = machine.cli("lab", "down")
    assert down.returncode == 0, down.stderr
    assert not any(map(alive, pids))
    for directory in ("doors", "consoles"):
        assert not list((machine.run_dir / directory).iterdir())
    kernel.write_bytes(b"not a kernel")
    up = machine.cli("lab", "up", str(file))
    assert "is no Linux kernel for x86" in up.stderr
    assert machine.client.list_partitions() == []


def test_an_idle_daemon_that_stops_leaves_its_logs_alone(machine: RunningDaemon) -> None:
    machine.client.delete_partition("vm", force=True)
    machine.client.delete_switch("s0", force=True)
    assert machine.process.terminate() == 0
    assert sorted(path.name for path in machine.run_dir.iterdir()) == ["daemon.log", "logs"]
