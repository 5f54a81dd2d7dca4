"""A capture tap of the Python engine: a bounded queue and an eventfd."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable

from vswitch.engine import CapturedFrame, Limits
from vswitch_wire.memory import drain_fd, signal_fd

__all__ = ["PythonTap"]


class PythonTap:
    """See `vswitch.engine.CaptureTap`."""

    def __init__(
        self,
        ports: Iterable[int] | None,
        snaplen: int,
        drops: bool,
        limits: Limits,
        closed: Callable[[PythonTap], None],
    ) -> None:
        self.ports = None if ports is None else frozenset(ports)
        self.snaplen = snaplen
        self.drops = drops
        self.lost = 0
        self._limits = limits
        self._bytes = 0
        self._closed = closed
        self._queue: deque[CapturedFrame] = deque()
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @property
    def fd(self) -> int:
        """Readable while frames wait. Raises ValueError after `close`."""
        if self._fd < 0:
            raise ValueError("the capture tap is closed")
        return self._fd

    def wants(self, port_id: int, dropped: bool) -> bool:
        """Whether a sighting at this port, or a drop there, is to be kept."""
        return (self.drops or not dropped) and (self.ports is None or port_id in self.ports)

    def put(self, sighting: CapturedFrame) -> None:
        """Keeps a sighting, or counts it lost."""
        full = len(self._queue) >= self._limits.capture_frames
        if full or self._bytes + len(sighting.data) > self._limits.capture_bytes:
            self.lost += 1
            return
        self._bytes += len(sighting.data)
        self._queue.append(sighting)
        if len(self._queue) == 1:
            signal_fd(self._fd)

    def read(self, limit: int = 1024) -> list[CapturedFrame]:
        """Takes up to `limit` sightings, oldest first; what waited before `close` can still be read."""
        taken = [self._queue.popleft() for _ in range(min(limit, len(self._queue)))]
        self._bytes -= sum(len(sighting.data) for sighting in taken)
        if not self._queue and self._fd >= 0:
            drain_fd(self._fd)
        return taken

    def close(self) -> None:
        if self._fd >= 0:
            self._closed(self)
            os.close(self._fd)
            self._fd = -1
