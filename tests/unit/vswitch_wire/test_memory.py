"""Guest memory in both engines: bounds, scattered views, flags, eventfds that a peer tampers with."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import vswitch_native
from vswitch_wire import aio, memory
from vswitch_wire import engine as engines
from vswitch_wire.errors import MemoryAccessError

ENGINES: list[engines.Engine] = ["python", "native"] if vswitch_native.AVAILABLE else ["python"]
LOW, HIGH = 0x1000, 0x100000
LOW_SIZE, HIGH_SIZE = 8 * 4096, 4 * 4096


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> engines.Engine:
    chosen: engines.Engine = request.param
    return chosen


@pytest.fixture
def regions() -> Iterator[list[memory.Region]]:
    fds = [memory.create_region("low", LOW_SIZE), memory.create_region("high", HIGH_SIZE)]
    yield [memory.Region(LOW, LOW_SIZE, fds[0]), memory.Region(HIGH, HIGH_SIZE, fds[1])]
    for fd in fds:
        os.close(fd)


@pytest.fixture
def guest(engine: engines.Engine, regions: list[memory.Region]) -> memory.GuestMemory:
    return engines.memory_class(engine)(regions)


def test_bytes_written_are_bytes_read_up_to_the_regions_edges(guest: memory.GuestMemory) -> None:
    assert guest.size == LOW_SIZE + HIGH_SIZE
    for gpa, data in ((LOW, b"first"), (LOW + LOW_SIZE - 4, b"last"), (HIGH + HIGH_SIZE - 1, b"x")):
        guest.write(gpa, data)
        assert guest.read(gpa, len(data)) == data


@pytest.mark.parametrize(
    ("gpa", "length"),
    [
        (0, 1),
        (LOW - 1, 2),
        (LOW + LOW_SIZE - 1, 2),
        (LOW + LOW_SIZE, 1),
        (HIGH - 1, 1),
        (HIGH + HIGH_SIZE, 1),
        ((1 << 64) - 1, 1),
        (LOW, 1 << 40),
        (LOW, -1),
    ],
)
def test_nothing_outside_the_regions_can_be_touched(guest: memory.GuestMemory, gpa: int, length: int) -> None:
    with pytest.raises(MemoryAccessError):
        guest.read(gpa, length)
    if length in (1, 2):
        with pytest.raises(MemoryAccessError):
            guest.write(gpa, bytes(length))


def test_both_engines_see_the_same_memory(regions: list[memory.Region]) -> None:
    maps = [engines.memory_class(engine)(regions) for engine in ENGINES]
    maps[0].write(HIGH + 5, b"shared")
    assert all(each.read(HIGH + 5, 6) == b"shared" for each in maps)


def test_a_view_is_linear_over_scattered_pages_of_several_regions(guest: memory.GuestMemory) -> None:
    pfns = [(HIGH >> 12) + 1, (LOW >> 12) + 3, (LOW >> 12) + 4, HIGH >> 12, (HIGH >> 12) + 1]
    view = guest.view(pfns, 100, 4 * 4096)
    assert len(view) == 4 * 4096
    data = bytes(range(256)) * 62
    view.write(50, data)
    assert view.read(50, len(data)) == data
    assert guest.read(HIGH + 0x1000 + 150, 100) == data[:100]
    start = 4096 - 150
    assert guest.read(LOW + 3 * 4096, 8192) == data[start : start + 8192]
    part = view.slice(4000, 300)
    assert part.read(0, 300) == view.read(4000, 300)
    part.store_u32(4, 0xDEADBEEF)
    assert view.load_u32(4004) == 0xDEADBEEF


@pytest.mark.parametrize(
    ("pfns", "offset", "count"),
    [
        ([0], 0, 1),
        ([LOW >> 12], 0, 4097),
        ([LOW >> 12], 4000, 100),
        ([LOW >> 12, 0], 0, 8192),
        ([(1 << 52) - 1], 0, 1),
        ([(1 << 64) - 1], 0, 1),
        ([LOW >> 12], -1, 1),
        ([LOW >> 12], 0, -1),
        ([], 0, 1),
    ],
)
def test_a_view_of_pages_outside_the_memory_is_refused(
    guest: memory.GuestMemory, pfns: list[int], offset: int, count: int
) -> None:
    with pytest.raises(MemoryAccessError):
        guest.view(pfns, offset, count)


def test_a_view_keeps_its_bounds(guest: memory.GuestMemory) -> None:
    view = guest.view([LOW >> 12, HIGH >> 12], 10, 5000)
    for offset, length in ((5000, 1), (4999, 2), (-1, 1), (0, 5001), (1 << 40, 1)):
        with pytest.raises(MemoryAccessError):
            view.read(offset, length)
    with pytest.raises(MemoryAccessError):
        view.write(4990, bytes(11))
    with pytest.raises(MemoryAccessError, match="not aligned"):
        view.load_u32(0)
    with pytest.raises(MemoryAccessError):
        view.slice(4000, 2000)
    assert view.read(5000, 0) == b""


def test_after_close_neither_memory_nor_views_can_be_used(guest: memory.GuestMemory) -> None:
    view = guest.view([LOW >> 12], 0, 4096)
    guest.close()
    assert guest.closed
    for access in (lambda: guest.read(LOW, 1), lambda: view.read(0, 1), lambda: view.store_u32(0, 1)):
        with pytest.raises(MemoryAccessError, match="released"):
            access()


def test_memory_that_could_shrink_is_refused(engine: engines.Engine) -> None:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    with pytest.raises(MemoryAccessError, match="not sealed"):
        engines.memory_class(engine)([memory.Region(0, 4096, fd)])
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(MemoryAccessError, match="8192 bytes wanted, its memfd has 4096"):
        engines.memory_class(engine)([memory.Region(0, 8192, fd)])
    os.close(fd)
    read_end, write_end = os.pipe()
    with pytest.raises(MemoryAccessError, match="memfd"):
        engines.memory_class(engine)([memory.Region(0, 4096, read_end)])
    os.close(read_end)
    os.close(write_end)


def test_regions_made_here_cannot_change_size() -> None:
    fd = memory.create_region("sealed", 8192)
    for size in (4096, 16384):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_overlapping_or_ragged_regions_are_refused(
    engine: engines.Engine, regions: list[memory.Region]
) -> None:
    fd = regions[0].fd
    for bad in (
        [memory.Region(0, 8192, fd), memory.Region(4096, 8192, fd)],
        [memory.Region(100, 4096, fd)],
        [memory.Region(0, 100, fd)],
        [memory.Region(0, 0, fd)],
        [memory.Region(1 << 52, 4096, fd)],
    ):
        with pytest.raises(MemoryAccessError):
            engines.memory_class(engine)(bad)


def test_flag_k_is_bit_k_mod_8_of_byte_k_div_8(guest: memory.GuestMemory) -> None:
    assert guest.set_flag(LOW, 0)
    assert not guest.set_flag(LOW, 0)
    for flag in (9, 37, 2047):
        assert guest.set_flag(LOW, flag)
    block = guest.read(LOW, 256)
    assert block == bytes([1, 2, 0, 0, 0x20]) + bytes(250) + b"\x80"
    assert guest.take_flags(LOW, 256) == block
    assert guest.read(LOW, 256) == bytes(256)
    guest.write(LOW, b"\xff" * 8)
    assert guest.take_flags(LOW + 1, 2) == b"\xff\xff"
    assert guest.read(LOW, 8) == b"\xff\x00\x00" + b"\xff" * 5


@pytest.mark.skipif(not vswitch_native.AVAILABLE, reason=vswitch_native.WHY)
def test_native_flags_lose_nothing_between_two_threads(regions: list[memory.Region]) -> None:
    guests = [engines.memory_class("native")(regions) for _ in range(2)]
    rounds = 4000
    taken = 0

    def take() -> None:
        nonlocal taken
        while taken < rounds:
            taken += sum(byte.bit_count() for byte in guests[1].take_flags(LOW, 8))

    thread = threading.Thread(target=take)
    thread.start()
    for number in range(rounds):
        while not guests[0].set_flag(LOW, number % 64):
            pass
    thread.join(30)
    assert taken == rounds


def test_an_interrupt_sets_its_flag_then_wakes_whoever_polls(
    engine: engines.Engine, guest: memory.GuestMemory
) -> None:
    first, second = memory.Eventfd(), memory.Eventfd()
    interrupt: Any = engines.interrupt_class(engine)(guest, first.fileno())
    interrupt.signal()
    assert first.drain() == 1
    assert guest.read(LOW, 4096) == bytes(4096)
    interrupt.target(LOW, 2, 37)
    interrupt.signal()
    interrupt.signal()
    assert first.drain() == 2
    assert guest.take_flags(LOW + 512, 256) == bytes(4) + b"\x20" + bytes(251)
    interrupt.target(HIGH, 2, 1, second.fileno())
    interrupt.signal()
    assert (first.drain(), second.drain()) == (0, 1)
    assert guest.read(HIGH + 512, 1) == b"\x02"
    interrupt.close()
    interrupt.signal()
    assert second.drain() == 0
    for fd in (None, first.fileno()):
        with pytest.raises(memory.MemoryAccessError, match="closed"):
            interrupt.target(LOW, 2, 37, fd)
    first.close()
    second.close()


@pytest.mark.parametrize(
    ("page", "sint", "flag"),
    [(LOW, 16, 0), (LOW, 0, 2048), (0, 2, 1), (LOW + LOW_SIZE, 2, 1), (1 << 52, 2, 1)],
)
def test_an_interrupt_flag_outside_the_memory_is_refused(
    engine: engines.Engine, guest: memory.GuestMemory, page: int, sint: int, flag: int
) -> None:
    wake = memory.Eventfd()
    interrupt = engines.interrupt_class(engine)(guest, wake.fileno())
    with pytest.raises(MemoryAccessError):
        interrupt.target(page, sint, flag)
    interrupt.close()
    wake.close()


def test_an_eventfd_that_the_peer_filled_and_made_blocking_blocks_nobody(
    engine: engines.Engine, guest: memory.GuestMemory
) -> None:
    wake = memory.Eventfd()
    os.eventfd_write(wake.fileno(), 0xFFFFFFFFFFFFFFFE)
    os.set_blocking(wake.fileno(), True)
    interrupt = engines.interrupt_class(engine)(guest, wake.fileno())
    interrupt.signal()
    assert wake.drain() >= 0xFFFFFFFFFFFFFFFE
    assert wake.drain() == 0
    interrupt.signal()
    assert wake.drain() == 1
    interrupt.close()
    wake.close()


def test_a_peer_that_fills_a_blocking_counter_again_and_again_holds_no_interrupt(
    engine: engines.Engine, guest: memory.GuestMemory
) -> None:
    wake = memory.Eventfd()
    fd = wake.fileno()
    interrupt = engines.interrupt_class(engine)(guest, fd)
    hostile = """
import fcntl, os, sys
fd = int(sys.argv[1])
for _ in range(20000):
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK)
    try:
        os.eventfd_read(fd)
        os.eventfd_write(fd, 0xFFFFFFFFFFFFFFFE)
    except BlockingIOError:
        pass
    fcntl.fcntl(fd, fcntl.F_SETFL, 0)
fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK)
try:
    os.eventfd_write(fd, 0xFFFFFFFFFFFFFFFE)
except BlockingIOError:
    pass
fcntl.fcntl(fd, fcntl.F_SETFL, 0)
"""
    peer = subprocess.Popen([sys.executable, "-c", hostile, str(fd)], pass_fds=[fd])
    try:
        longest = 0
        while peer.poll() is None:
            start = time.monotonic_ns()
            interrupt.signal()
            longest = max(longest, time.monotonic_ns() - start)
    finally:
        peer.kill()
        peer.wait()
    assert longest < 2e9
    for _ in range(300):
        interrupt.signal()  # full for good, and blocking
    interrupt.close()
    wake.close()


def test_a_signal_of_a_shared_eventfd_counts() -> None:
    wake = memory.Eventfd()
    assert aio.available()
    for _ in range(300):
        memory.signal_shared_fd(wake.fileno())
    assert wake.drain() == 300
    wake.close()


def test_without_aio_a_shared_eventfd_is_signalled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aio, "_context", lambda: None)
    wake = memory.Eventfd()
    memory.signal_shared_fd(wake.fileno())
    assert wake.drain() == 1
    wake.close()


def test_an_engine_that_cannot_run_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vswitch_native, "AVAILABLE", False)
    monkeypatch.setattr(vswitch_native, "WHY", "the native module is not built; install cargo")
    with pytest.raises(RuntimeError, match="install cargo; or choose engine python"):
        engines.memory_class("native")
    assert engines.default_engine() == "python"
    with pytest.raises(ValueError, match="choose one of native, python"):
        engines.check_engine("rust")  # type: ignore[arg-type]


def test_a_missing_native_module_is_said_once_with_its_cost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vswitch_native, "AVAILABLE", False)
    monkeypatch.setattr(vswitch_native, "WHY", "not built")
    monkeypatch.setattr(engines, "_said", False)
    engines.default_engine()
    engines.default_engine()
    assert [record.getMessage() for record in caplog.records] == [
        f"running the Python engine: not built; until then {engines.COST}"
    ]
