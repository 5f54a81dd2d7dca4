"""The VMBus ring: one writer, one reader, over shared pages (Linux drivers/hv/ring_buffer.c, openvmm
vmbus_ring).

A ring is a control page and a data area of D bytes. Control page: write index @0, read index @4, interrupt
mask @8, pending send size @12, feature bits @64. Indices are byte offsets below D, multiples of 8; equal
means empty, so a ring is never filled completely.

Each side keeps its own index in private memory and checks the peer's index each time it reads it: below D, a
multiple of 8, and never behind where it was. A peer that breaks this, or a packet whose length does not fit
what is there, raises RingError, and the channel is lost.
"""

from __future__ import annotations

import struct
import threading
from typing import Protocol

from .errors import RingError, WireError

CONTROL_SIZE = 4096
WRITE_INDEX = 0
READ_INDEX = 4
INTERRUPT_MASK = 8
PENDING_SEND_SIZE = 12
FEATURE_BITS = 64
FEATURE_PENDING_SEND_SIZE = 1
DESCRIPTOR_SIZE = 16
TRAILER_SIZE = 8

_LENGTHS = struct.Struct("<HHH")
_TRAILER = struct.Struct("<II")


class View(Protocol):
    """What a ring needs of shared memory; `memory.BufferView` and its native twin have it."""

    def __len__(self) -> int: ...
    def read(self, offset: int, length: int, /) -> bytes: ...
    def write(self, offset: int, data: bytes, /) -> None: ...
    def load_u32(self, offset: int, /) -> int: ...
    def store_u32(self, offset: int, value: int, /) -> None: ...


_fence_lock = threading.Lock()


def full_fence() -> None:
    """A full memory barrier: taking a lock is an acquire, leaving it a release, and on every CPU that CPython
    runs on at least one of the two is a read-modify-write that orders earlier stores before later loads."""
    with _fence_lock:
        pass


def data_size(view: View) -> int:
    """Bytes of the data area of the ring in `view`. Raises WireError unless it is a positive multiple of
    4096."""
    size = len(view) - CONTROL_SIZE
    if size <= 0 or size % CONTROL_SIZE:
        raise WireError(
            f"ring of {len(view)} bytes: expected a control page and at least one whole data page"
        )
    return size


def _index(value: int, size: int, name: str) -> int:
    if value >= size or value % 8:
        raise RingError(f"ring: the peer's {name} index {value} is not a multiple of 8 below {size}")
    return value


class _Cursor:
    """Byte-wise access modulo the data area."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._size = data_size(view)

    @property
    def size(self) -> int:
        """Bytes of the data area (D)."""
        return self._size

    def _copy_out(self, index: int, length: int) -> bytes:
        first = min(length, self._size - index)
        data = self._view.read(CONTROL_SIZE + index, first)
        return data if first == length else data + self._view.read(CONTROL_SIZE, length - first)

    def _copy_in(self, index: int, data: bytes) -> None:
        first = min(len(data), self._size - index)
        self._view.write(CONTROL_SIZE + index, data[:first])
        if first < len(data):
            self._view.write(CONTROL_SIZE, data[first:])


class RingWriter(_Cursor):
    """The producing side. Not thread-safe: one owner."""

    def __init__(self, view: View) -> None:
        super().__init__(view)
        self._published = _index(view.load_u32(WRITE_INDEX), self._size, "write")
        self._write = self._published
        self._peer_read = _index(view.load_u32(READ_INDEX), self._size, "read")
        self._blocked = False
        view.store_u32(PENDING_SEND_SIZE, 0)
        view.store_u32(FEATURE_BITS, view.load_u32(FEATURE_BITS) | FEATURE_PENDING_SEND_SIZE)

    @property
    def free(self) -> int:
        """Bytes free in the data area now; a packet of n bytes needs n + 8 below this. Raises RingError."""
        self._load_read()
        return self._known_free()

    @property
    def capacity(self) -> int:
        """Largest packet that can ever be written, without trailer."""
        return self._size - 8 - TRAILER_SIZE

    def write(self, packet: bytes) -> bool:
        """Puts a packet (descriptor to padding, no trailer) behind those not yet committed.

        False when it does not fit: then the pending send size is set and the reader will signal when space is
        there. Raises WireError when it could never fit or is not a packet, RingError when the peer's read
        index lies.
        """
        if len(packet) % 8 or len(packet) < DESCRIPTOR_SIZE:
            raise WireError(f"ring: a packet of {len(packet)} bytes; expected a multiple of 8, at least 16")
        if len(packet) > self.capacity:
            raise WireError(f"ring: a packet of {len(packet)} bytes never fits, at most {self.capacity}")
        needed = len(packet) + TRAILER_SIZE
        if self._known_free() <= needed and self.free <= needed:
            self._view.store_u32(PENDING_SEND_SIZE, needed)
            self._blocked = True
            full_fence()
            if self.free <= needed:
                return False
        if self._blocked:
            self._view.store_u32(PENDING_SEND_SIZE, 0)
            self._blocked = False
        start = self._write
        self._copy_in(start, packet + _TRAILER.pack(0, start))
        self._write = (start + needed) % self._size
        return True

    def commit(self) -> bool:
        """Publishes what was written. True when the peer must be signalled (empty became non-empty, not
        masked)."""
        before = self._published
        if self._write == before:
            return False
        # Checked against the old write index: that is all the reader could have consumed until now.
        self._load_read()
        full_fence()
        self._view.store_u32(WRITE_INDEX, self._write)
        self._published = self._write
        full_fence()
        if self._view.load_u32(INTERRUPT_MASK):
            return False
        return self._load_read() == before

    def _known_free(self) -> int:
        """At least this is free: the peer's index only grows. Looked at anew only when it is too little."""
        return self._size - (self._write - self._peer_read) % self._size

    def _load_read(self) -> int:
        read = _index(self._view.load_u32(READ_INDEX), self._size, "read")
        if (self._published - read) % self._size > (self._published - self._peer_read) % self._size:
            raise RingError(
                f"ring: the peer's read index went from {self._peer_read} to {read}, past the write index"
            )
        self._peer_read = read
        return read


class RingReader(_Cursor):
    """The consuming side. Not thread-safe: one owner."""

    def __init__(self, view: View) -> None:
        super().__init__(view)
        self._published = _index(view.load_u32(READ_INDEX), self._size, "read")
        self._read = self._published
        self._peer_write = self._read

    def pending(self) -> bool:
        """Whether there is something to read. Raises RingError."""
        return self._available() != 0

    def read(self, limit: int = 64) -> list[bytes]:
        """Up to `limit` packets (descriptor to padding, no trailer), copied out once.

        Their space returns to the writer with `commit`. Raises RingError when indices or lengths lie, once
        what came before the lie was given out.
        """
        packets: list[bytes] = []
        while len(packets) < limit:
            try:
                available = self._available()
                if not available:
                    break
                packet = self._read_one(available)
            except RingError:
                if packets:
                    break
                raise
            self._read = (self._read + len(packet) + TRAILER_SIZE) % self._size
            packets.append(packet)
        return packets

    def commit(self) -> bool:
        """Returns the space of all packets read. True when the writer waits for space and now has enough."""
        freed = (self._read - self._published) % self._size
        if not freed:
            return False
        full_fence()
        self._view.store_u32(READ_INDEX, self._read)
        self._published = self._read
        full_fence()
        if not self._view.load_u32(FEATURE_BITS) & FEATURE_PENDING_SEND_SIZE:
            return False
        # Some guests ask for ring size - 1: sizes count in eights.
        wanted = self._view.load_u32(PENDING_SEND_SIZE) & ~7
        if not wanted:
            return False
        free_after = self._size - (self._load_write() - self._read) % self._size
        free_before = free_after - freed
        # Stock readers differ in which of the two comparisons is strict; signalling in both cases suits every
        # writer.
        return free_before <= wanted <= free_after

    def mask(self) -> None:
        """Tells the writer not to signal while this side drains."""
        self._view.store_u32(INTERRUPT_MASK, 1)

    def unmask(self) -> bool:
        """Asks for signals again. True when data arrived meanwhile: mask again and read on."""
        self._view.store_u32(INTERRUPT_MASK, 0)
        full_fence()
        return self._load_write() != self._read

    def _available(self) -> int:
        """Bytes known to be there; looks at the shared index only when none are."""
        known = (self._peer_write - self._read) % self._size
        return known or (self._load_write() - self._read) % self._size

    def _load_write(self) -> int:
        write = _index(self._view.load_u32(WRITE_INDEX), self._size, "write")
        if (write - self._read) % self._size < (self._peer_write - self._read) % self._size:
            raise RingError(f"ring: the peer's write index went back from {self._peer_write} to {write}")
        self._peer_write = write
        return write

    def _read_one(self, available: int) -> bytes:
        if available < DESCRIPTOR_SIZE + TRAILER_SIZE:
            raise RingError(f"ring: {available} bytes at {self._read}, less than a packet")
        descriptor = self._copy_out(self._read, DESCRIPTOR_SIZE)
        _, offset8, length8 = _LENGTHS.unpack_from(descriptor)
        length = length8 * 8
        if length < DESCRIPTOR_SIZE or length + TRAILER_SIZE > available:
            raise RingError(f"ring: packet of {length} bytes at {self._read}, {available} bytes are there")
        if not DESCRIPTOR_SIZE <= offset8 * 8 <= length:
            raise RingError(f"ring: packet of {length} bytes at {self._read} has its data at {offset8 * 8}")
        # The descriptor that was checked is the one that is used: the writer may change the shared one.
        rest = (self._read + DESCRIPTOR_SIZE) % self._size
        return descriptor + self._copy_out(rest, length - DESCRIPTOR_SIZE)
