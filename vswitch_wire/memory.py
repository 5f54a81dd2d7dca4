"""A partition's memory as this process sees it: mapped regions, page lists, event flags, eventfds.

Regions are memfds that the daemon made and sealed against shrinking, so a mapping can never fault. One
mapping per region; views over page lists are lists of runs inside those mappings.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from . import aio
from .errors import MemoryAccessError
from .vmbus import PAGE_SIZE

REGION_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
EVENT_FLAGS_PER_SINT = 2048
EVENT_FLAG_BYTES_PER_SINT = 256


class Region(NamedTuple):
    """`size` bytes of guest memory at guest-physical address `gpa`, backed by the memfd `fd`."""

    gpa: int
    size: int
    fd: int


def create_region(name: str, size: int) -> int:
    """A new memfd of `size` bytes (a multiple of 4096), sealed against any change of size; close-on-exec."""
    if size <= 0 or size % PAGE_SIZE:
        raise MemoryAccessError(f"region {name}: {size} bytes; expected a positive multiple of {PAGE_SIZE}")
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, REGION_SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_region(region: Region) -> None:
    """Raises MemoryAccessError unless the fd is a memfd that cannot shrink and holds `size` bytes."""
    if (
        region.gpa % PAGE_SIZE
        or region.size <= 0
        or region.size % PAGE_SIZE
        or region.gpa + region.size > 1 << 52
    ):
        raise MemoryAccessError(
            f"region at {region.gpa:#x} of {region.size} bytes is not made of whole pages"
        )
    try:
        seals = fcntl.fcntl(region.fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise MemoryAccessError(
            f"region at {region.gpa:#x}: fd {region.fd} is not a memfd: {error}"
        ) from error
    if not seals & fcntl.F_SEAL_SHRINK:
        raise MemoryAccessError(f"region at {region.gpa:#x}: its memfd is not sealed against shrinking")
    size = os.fstat(region.fd).st_size
    if size < region.size:
        raise MemoryAccessError(
            f"region at {region.gpa:#x}: {region.size} bytes wanted, its memfd has {size}"
        )


class _Mapping:
    """One region's mapping, as bytes and as aligned 32-bit words."""

    __slots__ = ("_map", "data", "gpa", "size", "words")

    def __init__(self, region: Region) -> None:
        self.gpa = region.gpa
        self.size = region.size
        self._map = mmap.mmap(region.fd, region.size, flags=mmap.MAP_SHARED)
        self.data = memoryview(self._map)
        # An item of a "I" view is loaded and stored as one aligned 32-bit word; bytes of a "B" view may tear.
        self.words = self.data.cast("I")

    def close(self) -> None:
        self.words.release()
        self.data.release()
        self._map.close()


class GuestMemory:
    """All regions of a partition. Every access is bounds-checked; nothing crosses a region's end."""

    def __init__(self, regions: Sequence[Region]) -> None:
        """Maps `regions`, which stay owned (and may be closed) by the caller. Raises MemoryAccessError."""
        self._mappings: list[_Mapping] = []
        self._closed = False
        previous_end = 0
        try:
            for region in sorted(regions):
                check_region(region)
                if region.gpa < previous_end:
                    raise MemoryAccessError(f"region at {region.gpa:#x} overlaps the one before it")
                previous_end = region.gpa + region.size
                self._mappings.append(_Mapping(region))
        except BaseException:
            self.close()
            raise
        self._starts = [mapping.gpa for mapping in self._mappings]

    @property
    def size(self) -> int:
        """Bytes over all regions."""
        return sum(mapping.size for mapping in self._mappings)

    def read(self, gpa: int, length: int) -> bytes:
        """A private copy of `length` bytes at `gpa`. Raises MemoryAccessError."""
        mapping, offset = self._find(gpa, length)
        return bytes(mapping.data[offset : offset + length])

    def write(self, gpa: int, data: bytes) -> None:
        """Copies `data` to `gpa`. Raises MemoryAccessError."""
        mapping, offset = self._find(gpa, len(data))
        mapping.data[offset : offset + len(data)] = data

    def load_u32(self, gpa: int) -> int:
        """One aligned 32-bit load. Raises MemoryAccessError."""
        mapping, offset = self._find(gpa, 4)
        if offset % 4:
            raise MemoryAccessError(f"32-bit word at {gpa:#x} is not aligned")
        return int(mapping.words[offset // 4])

    def store_u32(self, gpa: int, value: int) -> None:
        """One aligned 32-bit store. Raises MemoryAccessError."""
        mapping, offset = self._find(gpa, 4)
        if offset % 4:
            raise MemoryAccessError(f"32-bit word at {gpa:#x} is not aligned")
        mapping.words[offset // 4] = value & 0xFFFFFFFF

    def view(self, pfns: Sequence[int], byte_offset: int, byte_count: int) -> BufferView:
        """`byte_count` bytes, starting `byte_offset` into the first of `pfns`, as one linear window.

        Raises MemoryAccessError when a page is outside the regions or the pages are too few.
        """
        if byte_offset < 0 or byte_count < 0 or byte_offset + byte_count > len(pfns) * PAGE_SIZE:
            raise MemoryAccessError(
                f"{byte_count} bytes at offset {byte_offset} do not fit in a list of {len(pfns)} pages"
            )
        runs: list[tuple[_Mapping, int, int]] = []
        skip, left = byte_offset, byte_count
        for pfn in pfns:
            if skip >= PAGE_SIZE:
                skip -= PAGE_SIZE
                continue
            if not left:
                break
            take = min(PAGE_SIZE - skip, left)
            mapping, offset = self._find(pfn * PAGE_SIZE, PAGE_SIZE)
            offset += skip
            if runs and runs[-1][0] is mapping and runs[-1][1] + runs[-1][2] == offset:
                runs[-1] = (mapping, runs[-1][1], runs[-1][2] + take)
            else:
                runs.append((mapping, offset, take))
            left -= take
            skip = 0
        return BufferView(self, runs)

    def set_flag(self, gpa: int, bit: int) -> bool:
        """Sets bit `bit % 8` of byte `gpa + bit // 8`. True when it was clear.

        Not atomic in plain Python, so a bit that the other side sets or clears at this moment may be lost or
        come back: who signals must signal anyway, and who is woken must look at everything.
        """
        mapping, offset = self._find(gpa + bit // 8, 1)
        value = mapping.data[offset]
        mask = 1 << bit % 8
        mapping.data[offset] = value | mask
        return not value & mask

    def take_flags(self, gpa: int, length: int) -> bytes:
        """Reads and clears `length` bytes of flags; see `set_flag` for what plain Python cannot promise."""
        mapping, offset = self._find(gpa, length)
        flags = bytes(mapping.data[offset : offset + length])
        for index, value in enumerate(flags):
            if value:
                mapping.data[offset + index] = 0
        return flags

    def close(self) -> None:
        """Unmaps everything. Views made from this memory raise MemoryAccessError from then on."""
        self._closed = True
        for mapping in self._mappings:
            mapping.close()
        self._mappings = []
        self._starts = []

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def _find(self, gpa: int, length: int) -> tuple[_Mapping, int]:
        if self._closed:
            raise MemoryAccessError("the partition's memory was released")
        index = bisect_right(self._starts, gpa) - 1
        if index >= 0 and length >= 0:
            mapping = self._mappings[index]
            offset = gpa - mapping.gpa
            if offset + length <= mapping.size:
                return mapping, offset
        raise MemoryAccessError(f"{length} bytes at {gpa:#x} are outside the partition's memory")


class BufferView:
    """A linear window over scattered pages."""

    def __init__(self, memory: GuestMemory, runs: list[tuple[_Mapping, int, int]]) -> None:
        self._memory = memory
        self._runs = runs
        self._starts: list[int] = []
        position = 0
        for _, _, length in runs:
            self._starts.append(position)
            position += length
        self._length = position

    def __len__(self) -> int:
        return self._length

    def read(self, offset: int, length: int) -> bytes:
        """A private copy of `length` bytes. Raises MemoryAccessError."""
        pieces = [bytes(m.data[start : start + n]) for m, start, n in self._pieces(offset, length)]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def write(self, offset: int, data: bytes) -> None:
        """Copies `data` to `offset`. Raises MemoryAccessError."""
        position = 0
        for mapping, start, length in self._pieces(offset, len(data)):
            mapping.data[start : start + length] = data[position : position + length]
            position += length

    def load_u32(self, offset: int) -> int:
        """One aligned 32-bit load. Raises MemoryAccessError."""
        mapping, start = self._word(offset)
        return int(mapping.words[start])

    def store_u32(self, offset: int, value: int) -> None:
        """One aligned 32-bit store. Raises MemoryAccessError."""
        mapping, start = self._word(offset)
        mapping.words[start] = value & 0xFFFFFFFF

    def slice(self, offset: int, length: int) -> BufferView:
        """A window over `length` bytes at `offset`. Raises MemoryAccessError."""
        return BufferView(self._memory, self._pieces(offset, length))

    def _word(self, offset: int) -> tuple[_Mapping, int]:
        pieces = self._pieces(offset, 4)
        if len(pieces) != 1 or pieces[0][1] % 4:
            raise MemoryAccessError(f"32-bit word at offset {offset} of a view is not aligned")
        return pieces[0][0], pieces[0][1] // 4

    def _pieces(self, offset: int, length: int) -> list[tuple[_Mapping, int, int]]:
        if self._memory.closed:
            raise MemoryAccessError("the partition's memory was released")
        if offset < 0 or length < 0 or offset + length > self._length:
            raise MemoryAccessError(f"{length} bytes at offset {offset} are outside a view of {self._length}")
        pieces: list[tuple[_Mapping, int, int]] = []
        index = bisect_right(self._starts, offset) - 1
        while length:
            mapping, start, size = self._runs[index]
            skip = offset - self._starts[index]
            take = min(size - skip, length)
            pieces.append((mapping, start + skip, take))
            offset += take
            length -= take
            index += 1
        return pieces


class Eventfd:
    """An eventfd: a counter that wakes whoever polls it."""

    def __init__(self, fd: int | None = None) -> None:
        """Takes over `fd`, or makes a new one (non-blocking, close-on-exec)."""
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) if fd is None else fd

    def fileno(self) -> int:
        """The fd, for polling."""
        return self._fd

    def signal(self) -> None:
        """Wakes the other side; never blocks (a full counter is already a wake-up)."""
        signal_fd(self._fd)

    def drain(self) -> int:
        """Signals since the last drain; 0 when there were none."""
        return drain_fd(self._fd)

    def close(self) -> None:
        """Closes the fd."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def signal_fd(fd: int) -> None:
    """Adds 1 to the eventfd `fd`, which no hostile peer shares; a full counter is already a wake-up."""
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    if poller.poll(0):
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(fd, 1)


def signal_shared_fd(fd: int) -> None:
    """As `signal_fd`, for an eventfd that a hostile peer shares: nothing it does makes this wait.

    Where the kernel has no AIO, this is `signal_fd`, and a peer that fills the counter between poll and write
    can hold the caller.
    """
    if not aio.signal(fd):
        signal_fd(fd)


def drain_fd(fd: int) -> int:
    """Reads and clears the eventfd `fd`; 0 when it was clear. The peer may have changed O_NONBLOCK."""
    counter = bytearray(8)
    try:
        os.preadv(fd, [counter], -1, os.RWF_NOWAIT)
    except BlockingIOError:
        return 0
    return int.from_bytes(counter, "little")


class Interrupt:
    """Host to guest: sets the channel's event flag on its VP, then writes the VP's interrupt eventfd."""

    def __init__(self, memory: GuestMemory, fd: int) -> None:
        """`fd` is duplicated: the caller keeps and closes its own."""
        aio.available()
        self._memory = memory
        self._fd = os.dup(fd)
        self._flag: tuple[int, int] | None = None

    def target(self, siefp_gpa: int | None, sint: int, flag: int, fd: int | None = None) -> None:
        """Where the flag lives: the VP's SIEFP page (None: not enabled, then only the eventfd is written).

        `fd`, duplicated too, replaces the eventfd: the channel moved to another VP, or the door was resumed.
        """
        if not 0 <= sint < 16 or not 0 <= flag < EVENT_FLAGS_PER_SINT:
            raise MemoryAccessError(f"event flag {flag} of SINT {sint} does not exist")
        if self._fd < 0:
            raise MemoryAccessError("the interrupt was closed")
        if fd is not None:
            replacement = os.dup(fd)
            os.close(self._fd)
            self._fd = replacement
        if siefp_gpa is None:
            self._flag = None
            return
        base = siefp_gpa + sint * EVENT_FLAG_BYTES_PER_SINT
        self._memory.read(base, EVENT_FLAG_BYTES_PER_SINT)
        self._flag = (base, flag)

    def signal(self) -> None:
        """Interrupts the guest. Spurious interrupts are legal, lost ones are not: the eventfd is always
        written."""
        if self._flag is not None:
            self._memory.set_flag(*self._flag)
        if self._fd >= 0:
            signal_shared_fd(self._fd)

    def close(self) -> None:
        """Closes the duplicate of the eventfd; signals are no-ops from then on."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
