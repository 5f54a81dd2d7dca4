"""A running capture of a partition's VMBus as pcapng: channel messages and ring packets, link type USER0.

Nothing here knows what the bytes mean. Each record begins with a pseudo header of 8 bytes, little-endian:

| @ | size | field | |---|---|---| | 0 | 1 | version, 1 | | 1 | 1 | direction: 0 guest to host, 1 host to
guest | | 2 | 1 | kind: 1 channel message (payload of a SynIC message), 2 ring packet (descriptor to
padding) | | 3 | 1 | 0 | | 4 | 4 | relid of the ring packet's channel, 0 for channel messages
|

The scapy layers dissect it. In Wireshark, USER0 shows as bytes until a dissector is assigned to it.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from typing import Literal

from vswitch.capture import pcapng

KIND_MESSAGE = 1
KIND_RING_PACKET = 2
QUEUED_RECORDS = 8192
"""Records waiting to be read; more are counted as lost."""
QUEUED_BYTES = 16 << 20
"""Their bytes in all: a ring packet may have half a megabyte."""
_PSEUDO_HEADER = struct.Struct("<BBBBI")

VmbusDirection = Literal["in", "out"]
"""`in` from the guest, `out` to it."""


class VmbusCapture:
    """One capture; its `observe_*` methods are given to whoever carries the messages.

    One asyncio loop.
    """

    def __init__(self, partition: str, *, snaplen: int = 0, packet_limit: int = 0) -> None:
        self._partition = partition
        self._snaplen = snaplen
        self._packet_limit = packet_limit
        self._queue: deque[tuple[int, bytes, int, VmbusDirection]] = deque()
        """Time, what is kept, length of the whole, direction."""
        self._queued_bytes = 0
        self._waiting = asyncio.Event()
        self._stopped = False
        self._writer = pcapng.PcapngWriter()
        self._start_ns = time.time_ns()
        self._lost_told = 0
        self.packets = 0
        self.lost = 0

    def observe_message(self, direction: VmbusDirection, payload: bytes, timestamp_ns: int) -> None:
        """A channel message passed."""
        self._put(direction, KIND_MESSAGE, 0, payload, timestamp_ns)

    def observe_packet(self, direction: VmbusDirection, relid: int, packet: bytes, timestamp_ns: int) -> None:
        """A packet passed through a channel's ring."""
        self._put(direction, KIND_RING_PACKET, relid, packet, timestamp_ns)

    def stop(self) -> None:
        """End it; what waits is still delivered, then the statistics."""
        self._stopped = True
        self._waiting.set()

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        """Pieces of the file, whole blocks each; the first one comes at once."""
        number, interface = self._writer.interface(
            self._partition,
            f"VMBus of partition {self._partition}",
            link_type=pcapng.LINKTYPE_USER0,
            snaplen=self._snaplen,
        )
        yield self._writer.section() + interface
        while not 0 < self._packet_limit <= self.packets:
            self._waiting.clear()
            if self._queue:
                for piece in pcapng.in_pieces(self._encode(number)):
                    yield piece
            elif self._stopped:
                break
            else:
                await self._waiting.wait()
        yield self._writer.statistics(
            number,
            self._start_ns,
            time.time_ns(),
            received=self.packets + self.lost,
            lost=self.lost,
            delivered=self.packets,
        )

    def _put(self, direction: VmbusDirection, kind: int, relid: int, data: bytes, timestamp_ns: int) -> None:
        if self._stopped:
            return
        header = _PSEUDO_HEADER.pack(1, 0 if direction == "in" else 1, kind, 0, relid)
        length = len(header) + len(data)
        kept = (header + bytes(data))[: self._snaplen or length]
        if len(self._queue) >= QUEUED_RECORDS or self._queued_bytes + len(kept) > QUEUED_BYTES:
            self.lost += 1
            return
        self._queue.append((timestamp_ns, kept, length, direction))
        self._queued_bytes += len(kept)
        self._waiting.set()

    def _encode(self, number: int) -> Iterator[bytes]:
        while self._queue and not 0 < self._packet_limit <= self.packets:
            timestamp_ns, kept, length, direction = self._queue.popleft()
            self._queued_bytes -= len(kept)
            self.packets += 1
            lost, self._lost_told = self.lost - self._lost_told, self.lost
            flags = pcapng.DIRECTION_INBOUND if direction == "in" else pcapng.DIRECTION_OUTBOUND
            yield self._writer.packet(
                number, timestamp_ns, kept, length, flags=flags, packet_id=self.packets, lost=lost
            )
