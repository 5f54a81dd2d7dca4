"""The receive buffer: guest memory in sub-allocations that the host fills and the guest gives back.

Twin of ``native/netvsp/src/receive_buffer.rs``. One section at offset 0; sub-allocation i starts at i *
size. A sub-allocation that has gone out belongs to the guest until its completion with the transaction id
of the packet, which is the index of the packet's first sub-allocation, on the queue that carried the packet.
All queues of a NIC share the one buffer.
"""

from __future__ import annotations

from netvsp.limits import CONTROL_RESERVE
from vswitch_wire.memory import BufferView


class ReceiveBufferError(ValueError):
    """The guest completed a receive packet that it does not hold."""


class ReceiveBuffer:
    """Sub-allocations of ``size`` bytes; the last `CONTROL_RESERVE` free ones are for control messages
    only."""

    def __init__(self, view: BufferView, buffer_id: int, size: int, count: int) -> None:
        self.view = view
        self.buffer_id = buffer_id
        self.size = size
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._held: dict[int, tuple[int, list[int]]] = {}

    @property
    def free_count(self) -> int:
        """Sub-allocations that the host may fill now."""
        return len(self._free)

    def take(self, *, control: bool = False) -> int | None:
        """A free sub-allocation, or None when only the control reserve (or nothing) is left."""
        if len(self._free) <= (0 if control else CONTROL_RESERVE):
            return None
        return self._free.pop()

    def write(self, index: int, message: bytes) -> None:
        """Puts one RNDIS message at the start of sub-allocation ``index``."""
        if len(message) > self.size:
            raise ValueError(f"a message of {len(message)} bytes for a sub-allocation of {self.size}")
        self.view.write(index * self.size, message)

    def put_back(self, index: int) -> None:
        """Returns a sub-allocation that was taken but never sent."""
        self._free.append(index)

    def sent(self, indices: list[int], queue: int) -> int:
        """Notes that ``indices`` went out in one packet of ``queue``; its transaction id."""
        self._held[indices[0]] = queue, indices
        return indices[0]

    def completed(self, transaction_id: int, queue: int) -> int:
        """The guest gave a packet's sub-allocations back on the queue it came by; how many. Raises
        ReceiveBufferError if it held none."""
        holder, indices = self._held.get(transaction_id, (-1, []))
        if holder != queue:
            raise ReceiveBufferError(f"receive completion {transaction_id:#x} matches no packet sent")
        del self._held[transaction_id]
        self._free.extend(reversed(indices))
        return len(indices)

    def reclaim(self, queue: int) -> None:
        """The queue is closed: what went out by it comes back by itself."""
        for transaction_id in sorted(number for number, held in self._held.items() if held[0] == queue):
            self.completed(transaction_id, queue)
