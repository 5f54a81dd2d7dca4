"""Ring packets that a capture has not asked for yet: the newest ones, bounded in number and in bytes."""

from __future__ import annotations

import time
from collections import deque

from netvsp import limits


class Tape:
    """(nanoseconds since the epoch, ``in`` from the guest or ``out`` to it, packet) in order."""

    def __init__(self) -> None:
        self.running = False
        self._packets: deque[tuple[int, str, bytes]] = deque()
        self._bytes = 0

    def run(self, on: bool) -> None:
        """Starts or stops; what was kept is forgotten."""
        self.running = on
        self.take()

    def record(self, direction: str, packet: bytes) -> None:
        """Keeps a packet that passes now, while it runs."""
        if self.running:
            self.push(time.time_ns(), direction, packet)

    def push(self, timestamp_ns: int, direction: str, packet: bytes) -> None:
        """Keeps a packet; the oldest go when there are too many, or too long ones."""
        self._packets.append((timestamp_ns, direction, packet))
        self._bytes += len(packet)
        while len(self._packets) > limits.TAP_PACKETS or self._bytes > limits.TAP_BYTES:
            self._bytes -= len(self._packets.popleft()[2])

    def take(self) -> list[tuple[int, str, bytes]]:
        """All that is kept, which is forgotten."""
        taken = list(self._packets)
        self._packets.clear()
        self._bytes = 0
        return taken
