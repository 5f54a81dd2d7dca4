"""The switch's end of an upcall channel, for tests: asks an extension's process about frames, one by one."""

from __future__ import annotations

import asyncio
import os
import select
import time
from collections.abc import Callable, Iterable

from vswitch.upcall import (
    MEMFD_BYTES,
    REPLY_OFFSET,
    REQUEST_OFFSET,
    RING_BYTES,
    ExtensionChannel,
    UpcallReply,
    UpcallRequest,
)
from vswitch_wire import packet as ring_packet
from vswitch_wire.memory import GuestMemory, Region, drain_fd, signal_fd
from vswitch_wire.ring import RingReader, RingWriter


class Asker:
    """Writes requests and reads replies as a datapath does."""

    def __init__(self, channel: ExtensionChannel) -> None:
        self._channel = channel
        self._memory = GuestMemory([Region(0, MEMFD_BYTES, channel.memfd)])
        pages = list(range(MEMFD_BYTES // 4096))
        self.writer = RingWriter(self._memory.view(pages, REQUEST_OFFSET, RING_BYTES))
        self.reader = RingReader(self._memory.view(pages, REPLY_OFFSET, RING_BYTES))
        self._next = 1

    def send(self, request: UpcallRequest) -> int:
        transaction, self._next = self._next, self._next + 1
        assert self.writer.write(ring_packet.encode_inband(request.pack(), transaction, True))
        self.writer.commit()
        signal_fd(self._channel.request_fd)
        return transaction

    def receive(self, timeout: float = 5.0) -> dict[int, UpcallReply]:
        poll = select.poll()
        poll.register(self._channel.reply_fd, select.POLLIN)
        poll.poll(timeout * 1000)
        drain_fd(self._channel.reply_fd)
        replies = {}
        for data in self.reader.read(1000):
            packet = ring_packet.decode(data)
            assert packet.type == ring_packet.VM_PKT_COMP
            replies[packet.transaction_id] = UpcallReply.decode(packet.payload)
        self.reader.commit()
        return replies

    async def ask(self, frame: bytes, *, egress: bool = False, trace: bool = False) -> UpcallReply:
        transaction = self.send(request_for(frame, egress=egress, trace=trace))
        replies = await asyncio.to_thread(self.receive)
        return replies[transaction]


def request_for(
    frame: bytes, *, egress: bool = False, trace: bool = False, vlan_tci: int | None = None
) -> UpcallRequest:
    """A request as a switch makes it for a frame from port 1, on egress to port 2."""
    out_port = 2 if egress else None
    name = "p2" if egress else "p1"
    return UpcallRequest(egress, 1, out_port, vlan_tci, len(frame), name, frame[:2048], trace)


class RecordingStack:
    """A stack without frames: remembers what the host told it."""

    def __init__(self) -> None:
        self.channels: list[ExtensionChannel] = []
        self.failures: list[tuple[int, str]] = []
        self.flushes = 0

    async def set_extensions(self, channels: Iterable[ExtensionChannel]) -> None:
        await asyncio.sleep(0)
        self.channels = list(channels)

    def fail_extension(self, extension_id: int, why: str) -> None:
        self.failures.append((extension_id, why))

    def flush_flows(self) -> None:
        self.flushes += 1

    def asker(self, index: int = 0) -> Asker:
        return Asker(self.channels[index])


async def until(condition: Callable[[], object], patience: float = 10.0) -> None:
    """Wait until `condition` is true; what it looks at (processes, /proc) has no event to wait for."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        await asyncio.sleep(0.01)


def status_of(pid: int) -> dict[str, str]:
    """The lines of /proc/<pid>/status."""
    with open(f"/proc/{pid}/status") as stream:
        return dict(line.rstrip("\n").split(":\t", 1) for line in stream)


def alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")
