"""What the daemon makes of a virtual machine's integration services, reboots and endings."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hypervisor import Partition
from hypervisor.clock import SystemClock
from hypervisor.integration import HeartbeatState, IntegrationError
from vswitch_api.v1 import partition_pb2
from vswitch_native import vmm
from vswitchd.console import Console
from vswitchd.core import Core
from vswitchd.errors import ApiError
from vswitchd.kinds import kvm
from vswitchd.launcher import Ending
from vswitchd.rundir import RunDir


class Services:
    """Stands for `IntegrationServices`."""

    def __init__(self, partition: object, clock: object) -> None:
        self.on_changed: list[Callable[[], None]] = []
        self.heartbeat: datetime | None = None
        self.heartbeat_state = HeartbeatState.UNKNOWN
        self.guest_info: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self.refuses = False
        self.asked: list[str] = []

    async def offer(self) -> None:
        self.asked.append("offer")

    async def close(self) -> None:
        self.asked.append("close")

    async def shutdown(self, *, seconds: float) -> None:
        if self.refuses:
            raise IntegrationError("no driver")
        self.asked.append(f"shutdown {seconds:g}")

    async def sync_time(self) -> None:
        if self.refuses:
            raise IntegrationError("no driver")
        self.asked.append("sync")


class World:
    """A guest's side on a partition that is only looked at."""

    def __init__(self, directory: Path) -> None:
        self.told: list[str] = []
        self.ended: list[float] = []
        run_dir = RunDir(directory)
        run_dir.prepare()
        core = cast(Core, SimpleNamespace(config=SimpleNamespace(run_dir=run_dir)))
        self.message = partition_pb2.Partition(name="partitions/vm")
        self.message.guest.boots = 1
        self.partition = cast(
            Partition, SimpleNamespace(id=7, name="vm", on_reset=[], shutdown=self._shutdown)
        )
        self.guest = kvm.KvmGuest(core, self.message, SystemClock(), self.told.append)

    async def _shutdown(self, seconds: float) -> None:
        self.ended.append(seconds)

    @property
    def services(self) -> Services:
        return cast(Services, self.guest._services)

    def described(self, *, whole: bool = False) -> Any:
        message = partition_pb2.Partition()
        message.CopyFrom(self.message)
        self.guest.describe(message, whole=whole)
        return message.guest


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(kvm, "IntegrationServices", Services)
    monkeypatch.setattr(kvm, "TELL_SECONDS", 0.01)
    world = World(tmp_path / "run")
    await world.guest.offer(world.partition)
    return world


async def test_what_the_guest_tells_is_described_in_bounds(world: World) -> None:
    assert world.described().heartbeat == partition_pb2.HEARTBEAT_STATE_UNSPECIFIED
    beat = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    world.services.heartbeat, world.services.heartbeat_state = beat, HeartbeatState.OK
    world.services.versions = {"shutdown": "3.2"}
    world.services.guest_info = {
        "OSName": "Linux",
        "OSVersion": "6.1.0",
        "FullyQualifiedDomainName": "vm.example",
        "NetworkAddressIPv4": "10.0.0.1;10.0.0.2",
        "NetworkAddressIPv6": "fe80::1",
        **{f"key{number}": "x" * 5000 for number in range(100)},
    }
    guest = world.described(whole=True)
    assert (guest.boots, guest.os, guest.hostname) == (1, "Linux 6.1.0", "vm.example")
    assert list(guest.addresses) == ["10.0.0.1", "10.0.0.2", "fe80::1"]
    assert guest.heartbeat == partition_pb2.HEARTBEAT_STATE_OK
    assert guest.heartbeat_time.ToDatetime(UTC) == beat
    assert dict(guest.services) == {"shutdown": "3.2"}
    assert len(guest.values) == kvm.MAX_VALUES
    assert max(map(len, guest.values.values())) == kvm.MAX_TEXT
    assert not world.described().values
    world.services.guest_info = {"FullyQualifiedDomainName": "getaddrinfo failed: 0xfffffffe Name or service"}
    assert world.described().hostname == ""


async def test_watchers_hear_once_of_many_changes_and_of_many_reboots(world: World) -> None:
    for _ in range(1000):
        for callback in world.services.on_changed:
            callback()
    await asyncio.sleep(0.05)
    assert world.told == [""]
    for _ in range(1000):
        for callback in world.partition.on_reset:
            callback()
    await asyncio.sleep(0.05)
    assert world.told == ["", "guest_rebooted"]
    assert world.described().boots == 1001


async def test_stopping_asks_the_shutdown_service_and_else_the_vmm(world: World) -> None:
    await world.guest.ask_to_end(world.partition, 60.0)
    assert world.services.asked[-1] == "shutdown 10"
    assert world.ended == []
    world.services.refuses = True
    with pytest.raises(IntegrationError, match="no driver"):
        await world.guest.ask_to_end(world.partition, 3.0)
    assert world.ended == [3.0]


async def test_a_clock_is_set_where_there_is_a_driver_for_it(world: World) -> None:
    await world.guest.sync_time()
    assert world.services.asked[-1] == "sync"
    world.services.refuses = True
    with pytest.raises(ApiError, match="partitions/vm: its clock cannot be set: no driver") as error:
        await world.guest.sync_time()
    assert error.value.remedy == "load hv_utils in the guest"
    services = world.services
    await world.guest.clear(7)
    assert services.asked[-1] == "close"
    with pytest.raises(ApiError, match="it does not run"):
        await world.guest.sync_time()


@pytest.mark.parametrize(
    ("code", "state", "words"),
    [
        (0, partition_pb2.PARTITION_STATE_STOPPED, "the guest powered off"),
        (1, partition_pb2.PARTITION_STATE_FAILED, "its virtual machine monitor ended with status 1"),
        (3, partition_pb2.PARTITION_STATE_FAILED, "the guest crashed; its last words are in its log"),
        (4, partition_pb2.PARTITION_STATE_FAILED, "the guest ended: no daemon had come back to it in time"),
        (5, partition_pb2.PARTITION_STATE_FAILED, "its virtual machine monitor was told to end by a signal"),
        (-31, partition_pb2.PARTITION_STATE_FAILED, "its virtual machine monitor was killed by SIGSYS"),
        (None, partition_pb2.PARTITION_STATE_FAILED, "its virtual machine monitor ended"),
    ],
)
async def test_each_ending_is_a_state_with_words(
    world: World, code: int | None, state: partition_pb2.PartitionState.ValueType, words: str
) -> None:
    assert world.guest.verdict(Ending(code)) == (state, words)


@pytest.mark.parametrize(
    ("code", "written", "words"),
    [
        (
            1,
            "login: \x1b[2Jvswitch-vmm: KVM_CREATE_VCPU: no memory\n",
            "status 1: KVM_CREATE_VCPU: no memory",
        ),
        (
            6,
            "vswitch-vmm: old\nvswitch-vmm: a fault of its own: panicked at x.rs:1:2:\nbad\x1b[2J\n",
            "status 6: a fault of its own: panicked at x.rs:1:2: bad[2J",
        ),
        (1, "nothing of its own", "status 1"),
        (7, "vswitch-vmm: said before\n", "status 7"),
    ],
)
async def test_a_monitor_that_says_why_it_ends_is_quoted(
    world: World, tmp_path: Path, code: int, written: str, words: str
) -> None:
    log = tmp_path / "vm.log"
    log.write_text(written)
    world.message.log_path = str(log)
    _, text = world.guest.verdict(Ending(code))
    assert text == f"its virtual machine monitor ended with {words}"


async def test_services_that_go_away_tell_nobody_afterwards(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = world.services

    async def close() -> None:
        for callback in services.on_changed:
            callback()

    monkeypatch.setattr(services, "close", close)
    await world.guest.clear(7)
    await asyncio.sleep(0.05)
    assert world.told == []


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def launched(world: World) -> None:
    async with world.guest.launch(world.partition, 0, []):
        pass


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    """A partition whose kernel and RAM disk open."""
    head = bytearray(0x400)
    head[0x1FE:0x200] = b"\x55\xaa"
    head[0x202:0x208] = b"HdrS\x0f\x02"
    (tmp_path / "kernel").write_bytes(head)
    (tmp_path / "initrd").write_bytes(b"070701")
    world.message.memory_bytes = 64 << 20
    world.message.kvm.kernel = str(tmp_path / "kernel")
    world.message.kvm.initrd = str(tmp_path / "initrd")
    monkeypatch.setattr(vmm, "find", lambda: Path("/bin/true"))


@pytest.mark.usefixtures("images")
async def test_a_start_that_fails_half_way_leaves_nothing_open(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await launched(world)
    before = open_files()

    def listen(console: object) -> int:
        raise OSError("no room for the console")

    with monkeypatch.context() as patched:
        patched.setattr(Console, "listen", listen)
        with pytest.raises(OSError, match="no room for the console"):
            await launched(world)
    assert open_files() == before
    status = world.guest.status_path(7)
    status.unlink()
    status.mkdir()
    with pytest.raises(IsADirectoryError):
        await launched(world)
    assert open_files() == before


@pytest.mark.usefixtures("images")
async def test_a_start_that_is_given_up_while_its_images_are_opened_leaves_none_open(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await launched(world)
    before = open_files()
    reached, go_on = threading.Event(), threading.Event()
    opening = world.guest._open_images

    def slowly() -> tuple[int, int]:
        opened = opening()
        reached.set()
        assert go_on.wait(10)
        return opened

    monkeypatch.setattr(world.guest, "_open_images", slowly)
    starting = asyncio.ensure_future(launched(world))
    await asyncio.to_thread(reached.wait, 10)
    assert open_files() == before + 2
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    go_on.set()
    # The callback runs when the thread's result has come to the loop.
    for _ in range(500):
        if open_files() == before:
            break
        await asyncio.sleep(0.01)
    assert open_files() == before
