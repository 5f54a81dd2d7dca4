"""A guest's process: what it holds, what it can reach, how it lives and ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from netns_guests import Guest, World, world

import vswitch_native
from hypervisor import PartitionState
from hypervisor.agent import AgentError
from vswitch_wire import door
from vswitch_wire.engine import Engine

GUEST_ENGINES = [
    "python",
    pytest.param("native", marks=pytest.mark.skipif(not vswitch_native.AVAILABLE, reason=vswitch_native.WHY)),
]


def unix_sockets(table: str) -> dict[str, str]:
    """Inode -> path of the Unix sockets of a network namespace."""
    found: dict[str, str] = {}
    for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
        fields = line.split()
        found[fields[6]] = fields[7] if len(fields) > 7 else ""
    return found


def descriptors(pid: int) -> dict[int, str]:
    """What /proc says a process holds."""
    return {int(entry.name): os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}


def children(pid: int) -> list[int]:
    """Direct children of a process."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()]


def has_address(guest: Guest) -> bool:
    """Whether the guest's kernel still has its address."""
    return guest.address in Path(f"/proc/{guest.agent_pid}/net/fib_trie").read_text("ascii")


def state(pid: int) -> str:
    """One letter; "" when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def carrier(guest: Guest) -> str:
    """What the guest's kernel says of eth0, through the guest's own /sys."""
    return (
        Path(f"/proc/{guest.agent_pid}/root/sys/class/net/eth0/carrier").read_text(encoding="ascii").strip()
    )


async def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether the process ends in time."""
    for _ in range(int(seconds * 100)):
        if state(pid) in ("", "Z"):
            return True
        await asyncio.sleep(0.01)
    return False


def lose_door(lab: World, guest: Guest) -> None:
    """What the guest sees of a daemon's death."""
    link = guest.partition._link
    assert link is not None
    link.close("the test cuts the door", door.ErrorCode.GONE)


@pytest.mark.parametrize("engine", GUEST_ENGINES)
async def test_the_guest_holds_nothing_but_door_memory_events_and_its_tap(
    engine: Engine, tmp_path: Path
) -> None:
    async with world("python", tmp_path) as lab:
        guest = await lab.add("a", engine=engine)
        links = descriptors(guest.agent_pid)
        outside, inside = unix_sockets("/proc/net/unix"), unix_sockets(f"/proc/{guest.agent_pid}/net/unix")
        doors, memory = 0, set[int]()
        for number, target in links.items():
            if number <= 2 or target in ("anon_inode:[eventfd]", "anon_inode:[eventpoll]", "/dev/net/tun"):
                continue
            if target.startswith("/memfd:"):
                memory.add(os.stat(f"/proc/{guest.agent_pid}/fd/{number}").st_ino)
            elif target.startswith("socket:["):
                inode = target[8:-1]
                if inode in outside:
                    assert outside[inode].endswith(f"doors/{guest.partition.id}.sock"), outside[inode]
                    doors += 1
                else:
                    assert inside[inode] == "", "a named socket inside"  # the event loop's own pair
            else:
                pytest.fail(f"descriptor {number} is {target}")
        assert (doors, len(memory)) == (2, 1)


async def test_the_host_is_out_of_reach_from_inside(tmp_path: Path) -> None:
    async with world("python", tmp_path) as lab:
        guest = await lab.add("a")
        secret = lab.hypervisor.run_dir / "api.sock"
        with socket.socket(socket.AF_UNIX) as api, socket.socket(socket.AF_UNIX) as abstract:
            api.bind(str(secret))
            api.listen()
            abstract.bind("\0vswitch-test-api")
            abstract.listen()
            script = f"""
import ctypes, os, socket
def fails(act):
    try:
        act()
    except OSError as error:
        return error.errno
    return 0
def reach(path):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
libc = ctypes.CDLL(None, use_errno=True)
def umount(path):
    if libc.umount2(path.encode(), 2):
        raise OSError(ctypes.get_errno(), "umount2")
print(fails(lambda: reach({str(secret)!r})), fails(lambda: umount({str(lab.hypervisor.run_dir)!r})),
      fails(lambda: reach({str(secret)!r})), fails(lambda: reach("\\0vswitch-test-api")),
      fails(lambda: os.kill({os.getpid()}, 0)),
      len([p for p in os.listdir("/proc") if p.isdigit()]), os.listdir({str(lab.hypervisor.run_dir)!r}),
      sorted(os.listdir("/sys/class/net")), os.listdir("/dev/shm"))
"""
            output = await guest.run(guest.python, "-c", script)
        # ENOENT, EINVAL (a locked mount), ENOENT still, ECONNREFUSED, ESRCH; PID 1 and the script alone.
        assert output.split() == ["2", "22", "2", "111", "3", "2", "[]", "['eth0',", "'lo']", "[]"]


async def test_programs_run_with_their_own_streams_status_and_terminal(tmp_path: Path) -> None:
    async with world("python", tmp_path) as lab:
        guest = await lab.add("a")
        reader, writer = os.pipe()
        process = await guest.partition.exec(["sh", "-c", "echo out; exit 7"], {}, writer, writer, writer)
        status, _ = await process.wait()
        assert (os.waitstatus_to_exitcode(status), os.read(reader, 100)) == (7, b"out\n")
        process = await guest.partition.exec(["sleep", "1000"], {}, writer, writer, writer)
        process.kill(signal.SIGTERM)
        status, _ = await process.wait()
        assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
        with pytest.raises(AgentError, match="guest a: cannot run 'no-such-program'"):
            await guest.partition.exec(["no-such-program"], {}, writer, writer, writer)
        os.close(writer)
        os.close(reader)
        outer, inner = os.openpty()
        process = await guest.partition.exec(
            ["sh", "-c", "tty; test -t 0"], {}, inner, inner, inner, tty=True
        )
        assert os.waitstatus_to_exitcode((await process.wait())[0]) == 0
        os.close(inner)
        os.close(outer)


async def test_orphans_inside_are_reaped(tmp_path: Path) -> None:
    async with world("python", tmp_path) as lab:
        guest = await lab.add("a")
        await guest.run("sh", "-c", "for i in 1 2 3 4 5; do (sleep 0.05 &) ; done")
        await asyncio.sleep(0.3)
        states = await guest.run("sh", "-c", "cat /proc/[0-9]*/stat | cut -d' ' -f3")
        assert "Z" not in states.split()


@pytest.mark.parametrize("engine", GUEST_ENGINES)
async def test_a_lost_door_takes_the_carrier_alone_and_a_resumed_one_brings_traffic_back(
    engine: Engine, tmp_path: Path
) -> None:
    async with world("python", tmp_path) as lab:
        a, b = await lab.add("a", engine=engine), await lab.add("b", engine=engine)
        assert carrier(a) == "1"
        lose_door(lab, a)
        for _ in range(200):
            if carrier(a) == "0":
                break
            await asyncio.sleep(0.01)
        assert carrier(a) == "0"
        assert has_address(a)
        for _ in range(200):
            if a.partition.state is not PartitionState.RUNNING:  # the host's own thread tells it
                break
            await asyncio.sleep(0.01)
        await a.partition.attach()
        for _ in range(500):
            if carrier(a) == "1":
                break
            await asyncio.sleep(0.01)
        for source, target in ((a, b), (b, a)):
            result = await source.probe("ping", target.address, "--count", "10", "--interval", "0.02")
            assert result["lost"] == 0, a.log.read_text()
        assert b.log.read_text() == ""


async def test_a_nic_taken_out_takes_its_interface_along_and_one_put_in_brings_its_own(
    tmp_path: Path,
) -> None:
    async with world("python", tmp_path) as lab:
        a, b = await lab.add("a"), await lab.add("b")
        await a.partition.vmbus.rescind(a.offer)
        for _ in range(100):
            if "eth0" not in await a.run("ls", "/sys/class/net"):
                break
            await asyncio.sleep(0.1)
        assert await a.run("ls", "/sys/class/net") == "lo\n"
        await a.partition.vmbus.offer(a.nic)
        await lab.configure(a)
        assert (await b.probe("ping", a.address, "--count", "5", "--interval", "0.05"))["lost"] == 0


async def test_without_a_daemon_the_guest_ends_after_its_grace_period(tmp_path: Path) -> None:
    async with world("python", tmp_path) as lab:
        guest = await lab.add("a", "--grace", "0.5")
        agent = guest.agent_pid
        process = await guest.partition.exec(["sleep", "1000"], {}, 0, 1, 2)
        assert process.pid > 1
        lose_door(lab, guest)
        async with asyncio.timeout(5):
            assert await guest.keeper.wait() == 3
        assert await gone(agent)
        assert "no daemon for 0.5 s" in guest.log.read_text()


async def test_without_a_grace_period_the_guest_starts_and_ends_with_its_door(tmp_path: Path) -> None:
    async with world("python", tmp_path) as lab:
        guest = await lab.add("a", "--grace", "0")
        lose_door(lab, guest)
        async with asyncio.timeout(5):
            assert await guest.keeper.wait() == 3


@pytest.mark.parametrize("victim", ["agent", "keeper"])
async def test_killing_either_process_of_a_guest_ends_all_of_it_and_nothing_else(
    victim: str, tmp_path: Path
) -> None:
    async with world("python", tmp_path) as lab:
        a, b = await lab.add("a"), await lab.add("b")
        agent = a.agent_pid
        await a.partition.exec(["sleep", "1000"], {}, 0, 1, 2)
        inside = children(agent)
        os.kill(agent if victim == "agent" else a.keeper.pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            await a.keeper.wait()
        for pid in (agent, *inside):
            assert await gone(pid)
        assert (await b.run("echo", "alive")).strip() == "alive"


async def test_shutdown_ends_programs_orderly_and_exits_with_0(tmp_path: Path) -> None:
    async with world("python", tmp_path) as lab:
        guest = await lab.add("a")
        # One process: a shell would also tell of its own child's end by the same signal.
        script = (
            "from signal import *; pthread_sigmask(SIG_BLOCK, {SIGTERM}); print('ready', flush=True); "
            "sigwait({SIGTERM}); print('bye', flush=True)"
        )
        reader, writer = os.pipe()
        await guest.partition.exec([guest.python, "-c", script], {}, writer, writer, writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as output:
            assert output.readline() == b"ready\n"
            await guest.partition.shutdown()
            async with asyncio.timeout(5):
                assert await guest.keeper.wait() == 0
            assert output.readline() == b"bye\n"


async def test_a_configuration_that_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    async with world("python", tmp_path) as lab:
        guest = await lab.add("a")
        for document, words in (
            ({"hostname": "a b"}, "hostname 'a b'"),
            ({"interfaces": [{"mac": "nonsense", "name": "eth0"}]}, "mac 'nonsense'"),
            ({"hosts": {"x": ["10.0.0.300"]}}, "10.0.0.300"),
            (
                {
                    "interfaces": [
                        {
                            "mac": guest.mac,
                            "name": "eth0",
                            "addresses": ["10.9.0.1/24"],
                            "gateway": "10.77.0.1",
                        }
                    ]
                },
                "gateway 10.77.0.1 is not reachable from 10.9.0.1/24",
            ),
        ):
            with pytest.raises(AgentError, match=words) as refusal:
                await guest.partition.configure(document)
            assert "was offered" not in str(refusal.value), "told of a NIC that is there"


def test_a_guest_without_a_door_says_who_starts_guests() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "VSWITCH_DOOR_FD"}
    command = [sys.executable, "-m", "netvsc"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=20, check=False)
    assert result.returncode == 125
    assert "VSWITCH_DOOR_FD must name the door's listening socket" in result.stderr
