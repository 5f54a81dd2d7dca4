"""kill -9 of a guest, an extension, the daemon: the others lose nothing, and nothing of the dead is left.

Each time two bystanders carry 100 pings per second, sent on schedule whether or not replies come.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vswitch_native
from vswitch_api.v1 import extension_pb2, partition_pb2
from vswitchctl.aio import AsyncClient
from vswitchctl.client import Client
from vswitchctl.launch import DaemonProcess, start_daemon
from vswitchlab import lifecycle, processes
from vswitchlab.guests import environment
from vswitchlab.progress import Silent
from vswitchlab.resolve import resolve_mapping
from vswitchlab.shipped import example

pytestmark = [pytest.mark.timeout(120), pytest.mark.alone]

INTERVAL = 0.01


class World:
    """A daemon in a directory of its own, with what must be gone at the end."""

    def __init__(self, engine: str, directory: Path) -> None:
        self.engine = engine
        self.run_dir = directory / "run"
        self.pids: set[int] = set()
        self.namespaces: set[int] = set()
        self.start()

    def start(self) -> None:
        self.daemon: DaemonProcess = start_daemon(self.run_dir, engine=self.engine, started_by="test")
        self.client = Client(self.daemon.socket)
        self.pids.add(self.daemon.pid)

    def note(self) -> None:
        """Remembers the processes and namespaces there are now."""
        for partition in self.client.list_partitions():
            self.pids |= {partition.pid, partition.agent_pid, *processes.descendants(partition.pid)}
            self.namespaces.add(processes.namespace(partition.agent_pid, "net"))
        for extension in self.client.list_extensions():
            self.pids |= {extension.pid, *processes.descendants(extension.pid)}

    def lab(self, *guests: str) -> None:
        async def act() -> None:
            async with AsyncClient(self.daemon.socket) as client:
                await lifecycle.up(client, resolve_mapping({"guests": list(guests)}), Silent())

        asyncio.run(act())
        self.note()

    def lab_down(self) -> None:
        async def act() -> None:
            async with AsyncClient(self.daemon.socket) as client:
                await lifecycle.down(client, await lifecycle.find(client, None), Silent())

        asyncio.run(act())

    def partition(self, name: str) -> partition_pb2.Partition:
        return self.client.get_partition(name)

    def shutdown(self) -> None:
        self.client.shutdown(stop_guests=True)
        self.client.close()
        self.daemon.process.wait(20)

    def left(self) -> list[str]:
        """What of the run still exists, in words."""
        found = [f"process {pid}" for pid in processes.alive(self.pids - {self.daemon.pid})]
        found += [
            f"process {pid} in a guest's namespace"
            for pid in processes.members_of_namespaces(self.namespaces)
        ]
        return found

    def end(self) -> None:
        """Whatever the test did: no process outlives it."""
        with contextlib.suppress(Exception):
            self.shutdown()
        if self.daemon.process.poll() is None:
            self.daemon.kill()
        for pid in processes.mentioning(str(self.run_dir)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


NATIVE = pytest.mark.skipif(not vswitch_native.AVAILABLE, reason=vswitch_native.WHY)


@pytest.fixture(params=[pytest.param("native", marks=NATIVE), "python"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="vswitch-killed-") as directory:
        one = World(request.param, Path(directory))
        try:
            yield one
        finally:
            one.end()


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of `condition`; fails when there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    pytest.fail(f"not within {seconds} s: {what}")


def assert_nothing_left(world: World) -> None:
    deadline = time.monotonic() + 10
    while (left := world.left()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


class Pings:
    """100 pings a second from one guest to another, in the guest's background: they need no daemon."""

    def __init__(self, world: World, source: str, target: str) -> None:
        self.world, self.source = world, source
        self.file = world.run_dir.parent / f"pings-{source}-{target}"
        argv = f"{sys.executable} -m netvsc.probe ping {target} --count 0 --interval {INTERVAL} --json"
        script = f"{argv} > {self.file} 2>&1 < /dev/null & echo $!"
        done = world.client.run_in(source, ["sh", "-c", script], env=environment(), timeout=20)
        assert done.ok, done
        self.pid = int(done.stdout)
        self.started = time.monotonic()

    def finish(self) -> dict[str, Any]:
        """Stops them and reads their summary."""
        gone = f"while kill -0 {self.pid} 2>/dev/null; do sleep 0.05; done"
        script = f"kill -INT {self.pid}; {gone}; cat {self.file}"
        done = self.world.client.run_in(self.source, ["sh", "-c", script], env=environment(), timeout=20)
        result: dict[str, Any] = json.loads(done.stdout)
        due = (time.monotonic() - self.started - 2) / INTERVAL
        assert result["sent"] >= 0.8 * due, "pings fell behind their schedule"
        return result


@contextlib.contextmanager
def bystanders(world: World) -> Iterator[None]:
    """a and b ping each other meanwhile; they must lose nothing, in either direction."""
    both = [Pings(world, "a", "b"), Pings(world, "b", "a")]
    time.sleep(0.5)
    yield
    time.sleep(0.5)
    results = [pings.finish() for pings in both]
    for result in results:
        print(
            f"{world.engine}: {result['sent']} sent, {result['lost']} lost, gap {result['largest_gap_ms']} ms"
        )
        assert result["sent"] > 100
        assert result["lost"] == 0


@pytest.mark.parametrize("victim", ["pid", "agent_pid"])
def test_a_killed_guest_takes_nothing_along_and_can_be_started_again(world: World, victim: str) -> None:
    world.lab("a", "b", "c")
    before = world.partition("c")
    namespace = processes.namespace(before.agent_pid, "net")
    with bystanders(world):
        world.client.run_in(
            "c", [sys.executable, "-m", "netvsc.probe", "ping", "a", "--count", "1"], env=environment()
        )
        os.kill(getattr(before, victim), signal.SIGKILL)
        failed = until(
            lambda: world.partition("c").state == partition_pb2.PARTITION_STATE_FAILED,
            10,
            "c is known to be dead",
        )
        assert failed
        until(lambda: not processes.members_of_namespaces({namespace}), 5, "c's namespace is empty")
    assert world.partition("c").detail
    assert not processes.alive([before.pid, before.agent_pid])
    world.client.start_partition("c")
    world.note()
    again = world.client.run_in(
        "c",
        [sys.executable, "-m", "netvsc.probe", "ping", "a", "--count", "3", "--interval", "0.05"],
        env=environment(),
    )
    assert again.ok, again
    world.lab_down()
    assert_nothing_left(world)


@pytest.mark.parametrize("on_failure", ["open", "closed"])
def test_a_killed_extension_takes_nothing_along_and_comes_back(world: World, on_failure: str) -> None:
    world.lab("a", "b")
    file = example("extensions/block_telnet.py")
    loaded = world.client.load_extension("s0", "block_telnet", file.read_bytes(), on_failure=on_failure)
    world.note()
    with bystanders(world):
        os.kill(loaded.pid, signal.SIGKILL)

        def back() -> bool:
            now = world.client.get_extension("s0/block_telnet")
            return (
                now.restarts >= 1
                and now.state == extension_pb2.EXTENSION_STATE_RUNNING
                and now.pid not in (0, loaded.pid)
            )

        until(back, 15, "the extension runs again")
        assert not processes.alive([loaded.pid])
        world.note()
    world.lab_down()
    assert_nothing_left(world)


def test_guests_outlive_a_killed_daemon_and_pings_resume_with_the_next(world: World) -> None:
    world.lab("a", "b")
    before = {name: world.partition(name).agent_pid for name in ("a", "b")}
    pings = Pings(world, "a", "b")
    time.sleep(1)
    world.client.close()
    world.daemon.kill()
    killed = time.monotonic()
    time.sleep(1)
    assert sorted(processes.alive(before.values())) == sorted(before.values())
    world.start()
    started = time.monotonic()
    info = world.client.get_info()
    assert sorted(name.rsplit("/", 1)[-1] for name in info.restore.reattached) == ["a", "b"]
    assert not info.restore.gone
    assert {name: world.partition(name).agent_pid for name in before} == before
    time.sleep(2)
    result = pings.finish()
    away, gap = f"{started - killed:.2f} s", f"{result['largest_gap_ms']:.0f} ms"
    print(f"{world.engine}: daemon away for {away}; gap {gap}, {result['lost']} of {result['sent']} lost")
    assert result["received"] > 100
    assert result["largest_gap_ms"] < (started - killed + 3) * 1000
    assert result["lost"] * INTERVAL < result["largest_gap_ms"] / 1000 + 1, "pings are lost in the gap alone"
    with bystanders(world):
        time.sleep(1)
    world.lab_down()
    assert_nothing_left(world)


def test_guests_that_no_daemon_reclaims_end_after_their_grace_period(world: World) -> None:
    world.client.create_switch("s0")
    for index, name in enumerate(("a", "b"), 1):
        world.client.create_partition(name, grace_seconds=2)
        world.client.create_nic(f"{name}/eth0", port=f"s0/{name}", addresses=[f"10.77.0.{index}/24"])
        world.client.start_partition(name)
    world.note()
    world.client.close()
    world.daemon.kill()
    killed = time.monotonic()
    time.sleep(1)
    assert len(processes.members_of_namespaces(world.namespaces)) >= 2, (
        "guests ended before their grace period"
    )
    assert_nothing_left(world)
    assert time.monotonic() - killed < 8
    assert not processes.mentioning(str(world.run_dir))
