"""Packets that a guest sent to a host which is no more: completed as failed before the channel is rescinded.

A host that ends in good order completes everything first. One that was killed, or whose door broke, leaves in
the ring what it had not completed: the read index moves only with the completions. A driver may wait for them
without a limit when its device goes (Linux: netvsc_device_idle), so the next host gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vswitch_wire import packet
from vswitch_wire.errors import RingError
from vswitch_wire.memory import GuestMemory
from vswitch_wire.ring import RingReader, RingWriter
from vswitch_wire.vmbus import PAGE_SIZE

MOST_PACKETS = 8192
"""Read in one go, on the event loop: more than a stock driver has under way, and some 100 ms of a liar's."""

Answer = Callable[[bytes], bytes]
"""Payload of a packet -> payload of the completion that says it failed."""


@dataclass(frozen=True, slots=True)
class OpenRings:
    """The rings of a channel as its guest opened it; see `OpenedChannel.ring_pfns`."""

    pfns: tuple[int, ...]
    downstream_page_offset: int
    vp: int | None
    """Whom its interrupts are for."""

    def save(self) -> dict[str, Any]:
        """Plain values."""
        return {"pfns": list(self.pfns), "downstream": self.downstream_page_offset, "vp": self.vp}

    @classmethod
    def restore(cls, saved: dict[str, Any]) -> OpenRings:
        """From `save()`."""
        return cls(tuple(saved["pfns"]), saved["downstream"], saved["vp"])


def complete(memory: GuestMemory, rings: OpenRings, answer: Answer) -> int:
    """Completes what waits in the ring towards the host; how many packets were.

    Raises WireError (RingError, MemoryAccessError) when indices, packets or pages are not what they must be,
    or when the ring towards the guest has no room for all; what came before is completed.
    """
    split = rings.downstream_page_offset
    upstream, downstream = rings.pfns[:split], rings.pfns[split:]
    reader = RingReader(memory.view(upstream, 0, len(upstream) * PAGE_SIZE))
    writer = RingWriter(memory.view(downstream, 0, len(downstream) * PAGE_SIZE))
    completed = 0
    try:
        for raw in reader.read(MOST_PACKETS):
            sent = packet.decode(raw)
            if sent.completion_requested:
                if not writer.write(packet.encode_completion(sent.transaction_id, answer(sent.payload))):
                    raise RingError(f"no room for more than {completed} completions")
                completed += 1
    finally:
        writer.commit()
    return completed
