"""Two netns guests on one switch: ping and TCP, both engines, as root and as an ordinary user."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from netns_guests import Guest, world

import vswitch_native
from vswitch_wire.engine import Engine

needs_native = pytest.mark.skipif(not vswitch_native.AVAILABLE, reason=vswitch_native.WHY)
# (host, guests): what runs in the daemon's process, and what runs in the guests'.
ENGINES = [
    pytest.param("python", "python", id="python"),
    pytest.param("python", "native", id="native-guests", marks=needs_native),
    pytest.param("native", "native", id="native", marks=needs_native),
]


def readable_python() -> str:
    """An interpreter of this version that every user can run."""
    own = Path(sys.executable).resolve()
    if all(os.stat(parent).st_mode & 0o001 for parent in own.parents):
        return sys.executable
    found = shutil.which(f"python{sys.version_info[0]}.{sys.version_info[1]}", path="/usr/bin:/usr/local/bin")
    assert found is not None, f"{own} is private to root, and /usr/bin has no Python of its version"
    return found


def open_to_all(directory: Path) -> None:
    """Let other users reach a test's files."""
    for parent in (directory, *directory.parents):
        if "pytest" in parent.name or parent == directory:
            parent.chmod(0o755)


def owner(pid: int) -> int:
    """The uid a process runs under, seen from here."""
    return os.stat(f"/proc/{pid}").st_uid


def tap_for_all() -> bool:
    """Whether an ordinary user may open /dev/net/tun."""
    return os.path.exists("/dev/net/tun") and bool(os.stat("/dev/net/tun").st_mode & 0o006)


async def both_ways(a: Guest, b: Guest, count: int = 20) -> None:
    for source, target in ((a, b), (b, a)):
        result = await source.probe("ping", target.address, "--count", str(count), "--interval", "0.02")
        assert (result["sent"], result["lost"]) == (count, 0), source.log.read_text()


async def transfer(sender: Guest, receiver: Guest, size: int) -> None:
    server = await receiver.start("tcp-serve", "--port", "5001", "--json")
    await server.line()  # {"listening": ...}
    sent = await sender.probe("tcp-send", receiver.address, "--port", "5001", "--bytes", str(size))
    received = await server.result()
    assert received["bytes"] == sent["bytes"] == size
    assert received["sha256"] == sent["sha256"]


@pytest.mark.parametrize(("host", "guest"), ENGINES)
async def test_two_guests_ping_each_other_without_loss(host: Engine, guest: Engine, tmp_path: Path) -> None:
    async with world(host, tmp_path) as lab:
        a, b = await lab.add("a", engine=guest), await lab.add("b", engine=guest)
        await both_ways(a, b)


@pytest.mark.parametrize(("host", "guest"), ENGINES)
async def test_64_mib_over_tcp_arrive_unchanged_in_large_sends(
    host: Engine, guest: Engine, tmp_path: Path
) -> None:
    async with world(host, tmp_path) as lab:
        a, b = await lab.add("a", engine=guest), await lab.add("b", engine=guest)
        await transfer(a, b, 64 << 20)
        packets = int(await b.run("cat", "/sys/class/net/eth0/statistics/rx_packets"))
        assert packets < (64 << 20) / (2 * 1448), f"{packets} frames for 64 MiB: segments, not large sends"


async def test_where_there_is_no_tap_a_veth_pair_carries_the_same(tmp_path: Path) -> None:
    async with world("python", tmp_path) as lab:
        a, b = await lab.add("a", "--link", "veth"), await lab.add("b")
        await both_ways(a, b)
        await transfer(a, b, 8 << 20)
        await transfer(b, a, 8 << 20)


@needs_native
async def test_the_native_data_path_carries_a_veth_pair_too(tmp_path: Path) -> None:
    async with world("python", tmp_path) as lab:
        a = await lab.add("a", "--link", "veth", engine="native")
        b = await lab.add("b", engine="native")
        await both_ways(a, b)
        await transfer(a, b, 8 << 20)
        await transfer(b, a, 8 << 20)


async def test_guests_find_each_other_by_name(tmp_path: Path) -> None:
    async with world("python", tmp_path) as lab:
        a, _ = await lab.add("a"), await lab.add("b")
        await lab.configure(a)
        assert (await a.probe("ping", "b", "--count", "2", "--interval", "0.1"))["lost"] == 0
        missing = await a.probe("ping", "10.9.0.77", "--count", "2", "--interval", "0.05", check=False)
        assert (missing["sent"], missing["lost"]) == (2, 2)
        assert (await a.run("uname", "-n")).strip() == "a"
        assert "10.9.0.2\tb\n" in await a.run("cat", "/etc/hosts")


@pytest.mark.parametrize(("host", "guest"), ENGINES)
async def test_an_ordinary_user_runs_the_same(host: Engine, guest: Engine, tmp_path: Path) -> None:
    """Started by root, the guests run as nobody, who has no TAP where udev did not open it to all."""
    async with world(host, tmp_path) as lab:
        if os.getuid() == 0:
            lab.launcher = (
                "setpriv",
                "--reuid=65534",
                "--regid=65534",
                "--clear-groups",
                "--bounding-set=-all",
            )
            lab.python = readable_python()
            open_to_all(tmp_path)
        a, b = await lab.add("a", engine=guest), await lab.add("b", engine=guest)
        assert owner(a.agent_pid) == (65534 if os.getuid() == 0 else os.getuid())
        await both_ways(a, b)
        await transfer(a, b, 8 << 20)
        assert ("no TAP, the interface is a veth pair" in a.log.read_text()) is (not tap_for_all())


@pytest.mark.parametrize("mtu", [576, 9000])
async def test_another_mtu_is_negotiated_on_the_same_offer(mtu: int, tmp_path: Path) -> None:
    async with world("python", tmp_path) as lab:
        a, b = await lab.add("a", mtu=mtu), await lab.add("b", mtu=mtu)
        assert (await a.run("cat", "/sys/class/net/eth0/mtu")).strip() == str(mtu)
        size = str(mtu - 28)
        result = await a.probe("ping", b.address, "--count", "5", "--interval", "0.05", "--size", size)
        assert result["lost"] == 0
        await transfer(a, b, 4 << 20)
