"""One queue of a NIC: the ring pair of one channel and what waits for room in it.

Twin of ``native/netvsp/src/queue.rs``. Queue 0 is the primary channel and alone carries control messages; the
others are sub-channels. A queue is used by the `Channel` that owns it and by nobody else.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from netvsp import limits, receive_path
from netvsp.receive_buffer import ReceiveBuffer
from netvsp.tape import Tape
from vswitch_wire import packet
from vswitch_wire.errors import WireError
from vswitch_wire.memory import GuestMemory, Interrupt
from vswitch_wire.ring import TRAILER_SIZE, RingReader, RingWriter

PAGE = 4096
PADDED_MESSAGE = 32
"""Bytes of an NVSP message in the ring: the fixed 28 of versions 1 to 6, padded."""


class RingShrank(WireError):
    """There is less room than there was: the guest moved its read index back."""


class Queue:
    """Rings, completions that wait, received frames that were placed and not sent."""

    def __init__(
        self,
        index: int,
        memory: GuestMemory,
        ring_pfns: Sequence[int],
        downstream_page_offset: int,
        interrupt: Interrupt,
        tape: Tape,
    ) -> None:
        """Maps the rings; ``tape`` records each packet written.

        Raises ValueError or MemoryAccessError if they are not inside the guest's memory.
        """
        pages = len(ring_pfns)
        if not 2 <= downstream_page_offset <= pages - 2:
            raise ValueError(
                f"downstream ring at page {downstream_page_offset} of {pages}: each ring needs two"
            )
        upstream = list(ring_pfns[:downstream_page_offset])
        downstream = list(ring_pfns[downstream_page_offset:])
        self.index = index
        self.reader = RingReader(memory.view(upstream, 0, len(upstream) * PAGE))
        self.writer = RingWriter(memory.view(downstream, 0, len(downstream) * PAGE))
        self.interrupt = interrupt
        self.counters: Counter[str] = Counter()
        self.masked = False
        self.completions: deque[bytes] = deque()
        """Encoded."""
        self._completion_bytes = 0
        self.groups: list[list[tuple[int, int]]] = []
        """(sub-allocation, length) of each range, by packet."""
        self._tape = tape

    def complete(self, transaction_id: int, payload: bytes) -> None:
        """Owes the guest the completion of its packet."""
        encoded = packet.encode_completion(transaction_id, payload)
        self.completions.append(encoded)
        self._completion_bytes += len(encoded) + TRAILER_SIZE

    @property
    def stalled(self) -> bool:
        """Too many completions wait: the guest's packets stay unread."""
        return len(self.completions) >= limits.MAX_COMPLETIONS_QUEUED

    def read(self, limit: int) -> list[bytes]:
        """Packets from the guest, at most ``limit``; the guest need not signal from here on. Raises
        WireError."""
        if not self.masked:
            self.reader.mask()
            self.masked = True
        return self.reader.read(limit)

    def rearm(self) -> bool:
        """Lets the guest signal again; True = packets arrived meanwhile. Raises WireError."""
        self.masked = False
        arrived = self.reader.unmask()
        # While completions wait for room, new packets stay unread: the guest's next read wakes us.
        return arrived and not self.stalled

    def group_for(self, run: receive_path.Run, number: int) -> list[tuple[int, int]]:
        """The transfer-pages packet that the next range belongs to; a coalesced run never spans two."""
        need = len(run.messages) if run.coalesced and number == 0 else 1
        limit = limits.MAX_RSC_RANGES if run.coalesced else limits.MAX_RANGES_PER_PACKET
        if not self.groups or len(self.groups[-1]) + need > limit:
            self.groups.append([])
        return self.groups[-1]

    def room_for(self, run: receive_path.Run) -> bool:
        """Whether the ring will surely take all that is pending and this run, even if it starts packets
        anew. Raises WireError."""
        ranges = sum(map(len, self.groups)) + len(run.messages)
        packets = len(self.groups) + 1 + len(run.messages) // limits.MAX_RANGES_PER_PACKET
        needed = packets * (24 + PADDED_MESSAGE + TRAILER_SIZE) + 8 * ranges + self._completion_bytes
        return self.writer.free > needed

    def write(self, encoded: bytes) -> bool:
        """Puts a packet into the ring; False = no room now. Raises WireError."""
        if not self.writer.write(encoded):
            return False
        self._tape.record("out", encoded)
        return True

    def write_completions(self) -> bool:
        """Writes what waits, as far as there is room; whether that was all. Raises WireError."""
        while self.completions:
            if not self.write(self.completions[0]):
                return False
            self._completion_bytes -= len(self.completions.popleft()) + TRAILER_SIZE
        return True

    def write_groups(self, receive: ReceiveBuffer | None, message: bytes) -> None:
        """Sends the received frames that were placed. Raises WireError."""
        groups, self.groups = self.groups, []
        for group in groups:
            if receive is None:
                return
            transaction_id = receive.sent([index for index, _ in group], self.index)
            if not self.write(encode_transfer(receive, transaction_id, group, message)):
                # room_for was wrong only if the guest moved its read index back: a lie.
                raise RingShrank("the ring towards the guest shrank while frames were on their way")

    def commit(self) -> None:
        """Publishes both indices and signals the guest if it waits. Raises WireError."""
        data = self.writer.commit()
        space = self.reader.commit()
        if data or space:
            self.counters["signals"] += 1
            self.interrupt.signal()


def encode_transfer(
    receive: ReceiveBuffer, transaction_id: int, group: list[tuple[int, int]], message: bytes
) -> bytes:
    """A receive packet: ranges of the receive buffer with the 107 ``message``."""
    ranges = [packet.TransferRange(length, index * receive.size) for index, length in group]
    return packet.encode_transfer_pages(transaction_id, receive.buffer_id, ranges, message, True)
