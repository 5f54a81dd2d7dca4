"""The datapath's side of one extension's upcall channel: requests out, replies in, and all that may go wrong.

A reply that is malformed, answers nothing that was asked or comes after its deadline fails the link: all
that waits for it, and all that would ask it later, gets what its `on_failure` says, until the owner
replaces the channel.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from vswitch.drops import DropReason
from vswitch.engine import ExtensionChannel, ExtensionCounters
from vswitch.engine.python.pipeline import Answer, Drop
from vswitch.fields import ALL_BITS
from vswitch.upcall import (
    MEMFD_BYTES,
    REPLY_OFFSET,
    REQUEST_OFFSET,
    RING_BYTES,
    VERDICT_ALLOW,
    VERDICT_DROP,
    UpcallReply,
    UpcallRequest,
)
from vswitch_wire import packet as ring_packet
from vswitch_wire.memory import GuestMemory, Region, drain_fd, signal_shared_fd
from vswitch_wire.ring import RingReader, RingWriter

__all__ = ["ExtensionLink", "Settled"]

_PAGE = 4096
REPLIES_PER_TURN = 64

W = TypeVar("W")


@dataclass(frozen=True, slots=True)
class Settled(Generic[W]):
    """An upcall that has its answer."""

    waiter: W
    answer: Answer


@dataclass(slots=True)
class _Pending(Generic[W]):
    waiter: W
    deadline_ns: int


class ExtensionLink(Generic[W]):
    """One extension. `W` is whoever waits for an answer; the link hands it back with the answer."""

    def __init__(self, channel: ExtensionChannel, deadline_ns: int) -> None:
        """Maps the channel's rings and duplicates its fds.

        Raises OSError or WireError for a broken channel.
        """
        self.channel = channel
        self.counters = ExtensionCounters()
        self._memory = GuestMemory([Region(0, MEMFD_BYTES, channel.memfd)])
        pages = RING_BYTES // _PAGE
        first = REQUEST_OFFSET // _PAGE
        self._writer = RingWriter(self._memory.view(range(first, first + pages), 0, RING_BYTES))
        first = REPLY_OFFSET // _PAGE
        self._reader = RingReader(self._memory.view(range(first, first + pages), 0, RING_BYTES))
        self.request_fd = os.dup(channel.request_fd)
        self.reply_fd = os.dup(channel.reply_fd)
        self._deadline_ns = deadline_ns
        self._next_id = 1
        self._pending: dict[int, _Pending[W]] = {}
        self._given_up: dict[int, int] = {}
        """Ids whose reply is to come but no longer wanted, and when it is due all the same: what changes in
        the switch gives an extension that hangs no new time."""
        self._backlog: deque[tuple[int, bytes]] = deque()
        """Requests that are not in the ring yet, in order."""
        self.dirty = False
        """Whether `push` may have something to do."""

    @property
    def failed(self) -> bool:
        return self.counters.failed

    def ask(self, request: UpcallRequest, waiter: W, now_ns: int) -> Answer | None:
        """Queues a request; None = `waiter` comes back from `replies` or `fail`. A failed link answers at
        once."""
        if self.failed:
            return self.on_failure(f"extension {self.channel.name} has failed: {self.counters.why}")
        upcall_id = self._next_id
        self._next_id += 1
        self.counters.upcalls += 1
        self._pending[upcall_id] = _Pending(waiter, now_ns + self._deadline_ns)
        self._backlog.append((upcall_id, request.pack()))
        self.dirty = True
        return None

    def push(self) -> None:
        """Moves what was asked into the ring and wakes the extension. Raises WireError when the ring lies."""
        self.dirty = False
        if self.failed:
            return
        while self._backlog:
            upcall_id, payload = self._backlog[0]
            if upcall_id in self._pending:
                data = ring_packet.encode_inband(payload, upcall_id, completion_requested=True)
                if not self._writer.write(data):
                    break
            else:
                self._given_up.pop(upcall_id, None)
            self._backlog.popleft()
        if self._writer.commit():
            signal_shared_fd(self.request_fd)

    def replies(self, settled: list[Settled[W]]) -> None:
        """Appends what the extension answered, in its order. Raises ValueError at the first that is no
        answer."""
        drain_fd(self.reply_fd)
        if self.failed:
            return
        self.dirty = bool(self._backlog)
        while True:
            packets = self._reader.read(REPLIES_PER_TURN)
            for data in packets:
                self._take(data, settled)
            if self._reader.commit():
                signal_shared_fd(self.request_fd)
            if not packets and not self._reader.unmask():
                return

    def give_up(self, wanted: Callable[[W], bool]) -> None:
        """Forgets the waiters that `wanted` picks; their replies will be ignored."""
        for upcall_id, pending in list(self._pending.items()):
            if wanted(pending.waiter):
                self._given_up[upcall_id] = self._pending.pop(upcall_id).deadline_ns
        # Those that are not in the ring yet never get there.
        self.dirty = self.dirty or bool(self._backlog)

    def fail(self, why: str) -> list[Settled[W]]:
        """Marks the link failed and answers all that waits by `on_failure`."""
        self.counters.failed = True
        self.counters.why = why
        text = f"extension {self.channel.name} has failed: {why}"
        settled = [Settled(pending.waiter, self.on_failure(text)) for pending in self._pending.values()]
        self._pending.clear()
        self._given_up.clear()
        self._backlog.clear()
        return settled

    def overdue(self, now_ns: int) -> bool:
        """Whether some request has passed its deadline."""
        due = self.next_deadline_ns()
        return due is not None and now_ns >= due

    def next_deadline_ns(self) -> int | None:
        """When the oldest request has to be answered."""
        first = next(iter(self._pending.values()), None)  # ids, and so deadlines, are in order
        given_up = next(iter(self._given_up.values()), None)
        if first is None or given_up is None:
            return given_up if first is None else first.deadline_ns
        return min(first.deadline_ns, given_up)

    def on_failure(self, text: str) -> Answer:
        """The answer that stands in for a verdict."""
        if self.channel.on_failure == "open":
            return Answer(None)
        return Answer(Drop(DropReason.REQUIRED_EXTENSION_MISSING, text, self.channel.name))

    def close(self) -> None:
        self._memory.close()
        os.close(self.request_fd)
        os.close(self.reply_fd)

    def _take(self, data: bytes, settled: list[Settled[W]]) -> None:
        packet = ring_packet.decode(data)
        if packet.type != ring_packet.VM_PKT_COMP:
            raise ValueError(f"a packet of type {packet.type} came where replies are expected")
        upcall_id = packet.transaction_id
        if self._given_up.pop(upcall_id, None) is not None:
            return
        pending = self._pending.get(upcall_id)
        if pending is None:
            raise ValueError(f"a reply to upcall {upcall_id}, which was not asked")
        reply = UpcallReply.decode(packet.payload)
        if reply.fields & ~ALL_BITS:
            raise ValueError(f"a reply names unknown fields {reply.fields & ~ALL_BITS:#x}")
        del self._pending[upcall_id]
        settled.append(Settled(pending.waiter, self._answer(reply)))

    def _answer(self, reply: UpcallReply) -> Answer:
        if reply.verdict == VERDICT_ALLOW:
            self.counters.allowed += 1
            return Answer(None, reply.fields, reply.cacheable, reply.ttl_ms * 1_000_000)
        if reply.verdict == VERDICT_DROP:
            self.counters.dropped += 1
            drop = Drop(DropReason.FILTERED, reply.reason or "no reason given", self.channel.name)
            return Answer(drop, reply.fields, reply.cacheable, reply.ttl_ms * 1_000_000)
        self.counters.errors += 1
        self.counters.why = reply.reason
        return self.on_failure(f"extension {self.channel.name} raised: {reply.reason}")
