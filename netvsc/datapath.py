"""The guest end of a synthetic NIC's data path, in plain Python: interface frames to the ring and back.

The document of record for `vswitch_native.netvsc.DataPath`, which has the same surface and runs on a thread
of its own.

Transmit: frames go, as RNDIS PACKET messages, into sections of the send buffer - several per section when
several are there - or, when larger than a section, into a bounce buffer that a GPA-direct packet names. A
section belongs to the host until its completion; without a free one the interface is not read, so that the
kernel's queue and not memory holds what waits.

Receive: every range of a transfer-page packet is one RNDIS
message; PACKETs go to the interface (runs of coalesced segments as one GSO frame), the rest to
`take_control`; each packet is completed exactly once.

All methods run on the event loop's thread; none blocks.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from netvsc import frames
from netvsc.link import MAX_READ, Link
from vswitch_wire import nvsp, packet
from vswitch_wire.errors import WireError
from vswitch_wire.gpadl import GpaRange
from vswitch_wire.memory import BufferView, GuestMemory, drain_fd, signal_fd
from vswitch_wire.ring import RingReader, RingWriter

__all__ = ["ControlPacket", "DataPath", "DataPathProtocol"]

PAGE = 4096
NO_SECTION = 0xFFFFFFFF
CHANNEL_DATA, CHANNEL_CONTROL = 0, 1
STATUS_SUCCESS, STATUS_FAILURE = 1, 2
RNDIS_PACKET_MSG = 1

# Transaction ids of our own packets: what completes in the upper half, which one in the lower.
_ID_SECTION, _ID_BOUNCE, _ID_CONTROL = 1 << 32, 2 << 32, 3 << 32
_CONTROL_SECTION = 0
_BOUNCE_PAGES = 17  # a 64 KiB frame with its RNDIS header
_TURN = 256  # packets or frames per turn of the event loop
_CONTROL_LIMIT = 1024  # control messages the driver has not taken; a host that sends more loses the channel
_BACKLOG_LIMIT = 4096  # packets that wait for upstream space before the downstream ring is read no more

_SEND_RNDIS = struct.Struct("<4I")
_RNDIS_COMPLETE = struct.Struct("<2I")
_HEAD = struct.Struct("<2I")


class ControlPacket(NamedTuple):
    """What the data path hands to the driver: an NVSP message ("inband"), the answer to one
    ("completion"), an RNDIS control message ("rndis"), or the reason why the channel is lost ("fault")."""

    kind: Literal["inband", "completion", "rndis", "fault"]
    transaction_id: int
    completion_requested: bool
    payload: bytes


class DataPathProtocol(Protocol):
    """The surface of both engines."""

    control_fd: int

    def take_control(self) -> list[ControlPacket]: ...
    def send_inband(self, payload: bytes, transaction_id: int, completion_requested: bool) -> None: ...
    def send_completion(self, transaction_id: int, payload: bytes) -> None: ...
    def send_rndis(self, message: bytes) -> None: ...
    def set_receive_buffer(self, pfns: Sequence[int], set_id: int, slot_size: int, slots: int) -> None: ...
    def set_send_buffer(self, pfns: Sequence[int], section_size: int, bounce_pfns: Sequence[int]) -> None: ...
    def set_aggregation(self, messages: int, alignment: int) -> None: ...
    def set_offload(self, checksum: bool, mtu: int) -> None: ...
    def set_running(self, running: bool) -> None: ...
    def stats(self) -> dict[str, int]: ...
    def close(self) -> None: ...


class DataPath:
    """One open channel. `on_interrupt` must be called for every interrupt of its VP."""

    def __init__(
        self,
        memory: GuestMemory,
        ring_pfns: Sequence[int],
        downstream_page_offset: int,
        signal_fd: int,
        link: Link,
    ) -> None:
        """`signal_fd` (guest to host) and `link` stay the caller's. WireError when the rings cannot be."""
        self._memory = memory
        pages = len(ring_pfns)
        upstream, downstream = ring_pfns[:downstream_page_offset], ring_pfns[downstream_page_offset:]
        self._writer = RingWriter(memory.view(upstream, 0, len(upstream) * PAGE))
        self._reader = RingReader(memory.view(downstream, 0, (pages - downstream_page_offset) * PAGE))
        self._signal_fd = signal_fd
        self._link = link
        self._loop = asyncio.get_running_loop()
        self.control_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._control: deque[ControlPacket] = deque()
        self._backlog: deque[bytes] = deque()
        self._closed = False
        self._dead = False
        self._again: asyncio.Handle | None = None
        self._running = False
        self._reading_link = False
        self._checksum, self._mtu = False, 1500
        self._receive_view: BufferView | None = None
        self._set_id, self._slot_size, self._slots = 0, 0, 0
        self._send_view: BufferView | None = None
        self._section_size = 0
        self._free_sections: list[int] = []
        self._busy_sections: set[int] = set()
        self._bounce: list[tuple[BufferView, tuple[int, ...]]] = []
        self._free_bounces: list[int] = []
        self._busy_bounces: set[int] = set()
        self._per_message, self._alignment = 1, 8
        self._rndis: deque[bytes] = deque()
        self._rndis_busy = False
        self._counters = dict.fromkeys(
            (
                "tx_packets",
                "tx_bytes",
                "tx_messages",
                "tx_errors",
                "tx_stopped",
                "rx_packets",
                "rx_bytes",
                "rx_dropped",
                "rx_errors",
                "stray_completions",
            ),
            0,
        )

    # What the driver sets.

    def set_receive_buffer(self, pfns: Sequence[int], set_id: int, slot_size: int, slots: int) -> None:
        """The buffer the host carves: `slots` sub-allocations of `slot_size` bytes from offset 0."""
        self._receive_view = self._memory.view(pfns, 0, len(pfns) * PAGE)
        self._set_id, self._slot_size, self._slots = set_id, slot_size, slots

    def set_send_buffer(self, pfns: Sequence[int], section_size: int, bounce_pfns: Sequence[int]) -> None:
        """Sections of `section_size` bytes, the first of them for control; 17 pages per bounce buffer."""
        view = self._memory.view(pfns, 0, len(pfns) * PAGE)
        sections = len(view) // section_size
        if sections < 2:
            raise WireError(f"send buffer: {sections} sections of {section_size} bytes, at least 2 expected")
        self._send_view, self._section_size = view, section_size
        self._free_sections = list(range(sections - 1, _CONTROL_SECTION, -1))
        for start in range(0, len(bounce_pfns) - _BOUNCE_PAGES + 1, _BOUNCE_PAGES):
            pages = tuple(bounce_pfns[start : start + _BOUNCE_PAGES])
            self._bounce.append((self._memory.view(pages, 0, _BOUNCE_PAGES * PAGE), pages))
        self._free_bounces = list(range(len(self._bounce)))

    def set_aggregation(self, messages: int, alignment: int) -> None:
        """At most `messages` RNDIS packets per section, each padded to `alignment` bytes."""
        self._per_message, self._alignment = max(1, messages), max(1, alignment)

    def set_offload(self, checksum: bool, mtu: int) -> None:
        """Whether the host completes checksums; the layer 3 size above which a received frame is a
        coalesced one."""
        self._checksum, self._mtu = checksum, mtu

    def set_running(self, running: bool) -> None:
        """Frames flow (both ways) or not; control always does."""
        self._running = running
        self._watch_link()

    def stats(self) -> dict[str, int]:
        """Counters since the channel was opened; "in_flight": sends that the host has not completed."""
        waiting = len(self._rndis) + self._rndis_busy
        return {
            **self._counters,
            "in_flight": len(self._busy_sections) + len(self._busy_bounces) + waiting,
        }

    def close(self) -> None:
        """Let go of the rings and buffers: nothing touches guest memory afterwards."""
        if self._closed:
            return
        self._closed = True
        self._running = False
        self._watch_link()
        if self._again is not None:
            self._again.cancel()
        os.close(self.control_fd)

    # Control, towards and from the driver.

    def take_control(self) -> list[ControlPacket]:
        """Everything that waits, oldest first; clears `control_fd`."""
        drain_fd(self.control_fd)
        taken = list(self._control)
        self._control.clear()
        return taken

    def send_inband(self, payload: bytes, transaction_id: int, completion_requested: bool) -> None:
        """An NVSP message; `transaction_id` below 2^32."""
        self._put(packet.encode_inband(payload, transaction_id, completion_requested))
        self._publish()

    def send_completion(self, transaction_id: int, payload: bytes) -> None:
        """The answer to an "inband" that asked for one."""
        self._put(packet.encode_completion(transaction_id, payload))
        self._publish()

    def send_rndis(self, message: bytes) -> None:
        """An RNDIS control message, through the section kept for it; one at a time, in order."""
        if self._send_view is None or len(message) > self._section_size:
            raise WireError(f"RNDIS control message of {len(message)} bytes: no send section takes it")
        self._rndis.append(message)
        self._next_rndis()
        self._publish()

    def _next_rndis(self) -> None:
        if self._rndis_busy or not self._rndis or self._send_view is None:
            return
        message = self._rndis.popleft()
        self._rndis_busy = True
        self._send_view.write(_CONTROL_SECTION * self._section_size, message)
        body = _SEND_RNDIS.pack(
            nvsp.NVSP_MSG1_TYPE_SEND_RNDIS_PKT, CHANNEL_CONTROL, _CONTROL_SECTION, len(message)
        )
        self._put(packet.encode_inband(body, _ID_CONTROL, True))

    def _tell(self, item: ControlPacket) -> None:
        if len(self._control) >= _CONTROL_LIMIT and item.kind != "fault":
            raise WireError("control messages: the host sends more than the driver takes")
        self._control.append(item)
        signal_fd(self.control_fd)

    def _fault(self, error: Exception) -> None:
        """The host broke the ring's rules: nothing on this channel can be believed any more."""
        self._running = False
        self._watch_link()
        self._dead = True
        self._tell(ControlPacket("fault", 0, False, str(error).encode()))

    # The upstream ring.

    def _put(self, data: bytes) -> None:
        if self._backlog or not self._writer.write(data):
            self._backlog.append(data)

    def _drain_backlog(self) -> None:
        while self._backlog and self._writer.write(self._backlog[0]):
            self._backlog.popleft()

    def _publish(self) -> None:
        if self._writer.commit():
            signal_fd(self._signal_fd)

    # Transmit.

    def _watch_link(self) -> None:
        """Read the interface while there is where to put a frame."""
        wanted = (
            self._running and not self._backlog and bool(self._free_sections) and bool(self._free_bounces)
        )
        if wanted and not self._reading_link:
            self._loop.add_reader(self._link.fd, self._on_link)
        elif not wanted and self._reading_link:
            self._loop.remove_reader(self._link.fd)
            self._counters["tx_stopped"] += self._running
        self._reading_link = wanted

    def _on_link(self) -> None:
        try:
            self._transmit(_TURN)
            self._publish()
        except WireError as error:
            self._fault(error)
            return
        self._watch_link()

    def _transmit(self, limit: int) -> None:
        batch: list[bytes] = []
        filled = 0
        for _ in range(limit):
            # A section for what is gathered and one more for the frame to be read, or it stays with the
            # kernel.
            if len(self._free_sections) <= bool(batch) or self._backlog or not self._free_bounces:
                break
            data = self._link.read()
            if data is None:
                break
            try:
                message = frames.transmit(data, checksum=self._checksum)
            except WireError:
                self._counters["tx_errors"] += 1
                continue
            self._counters["tx_packets"] += 1
            self._counters["tx_bytes"] += len(data) - frames.VNET.size
            if len(message) > self._section_size:
                self._send_section(batch)
                batch, filled = [], 0
                self._send_bounce(message)
                continue
            if batch and (len(batch) >= self._per_message or filled + len(message) > self._section_size):
                self._send_section(batch)
                batch, filled = [], 0
            batch.append(message)
            filled += len(message) + (-len(message) % self._alignment)
        self._send_section(batch)

    def _send_section(self, batch: list[bytes]) -> None:
        if not batch or self._send_view is None:
            return
        for index, message in enumerate(batch[:-1]):
            padding = -len(message) % self._alignment
            if padding:
                kind, length = _HEAD.unpack_from(message)
                batch[index] = _HEAD.pack(kind, length + padding) + message[_HEAD.size :] + bytes(padding)
        data = b"".join(batch)
        section = self._free_sections.pop()
        self._busy_sections.add(section)
        self._send_view.write(section * self._section_size, data)
        self._counters["tx_messages"] += 1
        body = _SEND_RNDIS.pack(nvsp.NVSP_MSG1_TYPE_SEND_RNDIS_PKT, CHANNEL_DATA, section, len(data))
        self._put(packet.encode_inband(body, _ID_SECTION | section, True))

    def _send_bounce(self, message: bytes) -> None:
        if not self._free_bounces or len(message) > _BOUNCE_PAGES * PAGE:
            self._counters["tx_errors"] += 1
            return
        index = self._free_bounces.pop()
        self._busy_bounces.add(index)
        view, pages = self._bounce[index]
        view.write(0, message)
        self._counters["tx_messages"] += 1
        used = pages[: (len(message) + PAGE - 1) // PAGE]
        body = _SEND_RNDIS.pack(nvsp.NVSP_MSG1_TYPE_SEND_RNDIS_PKT, CHANNEL_DATA, NO_SECTION, 0)
        self._put(packet.encode_gpa_direct(_ID_BOUNCE | index, [GpaRange(len(message), 0, used)], body, True))

    # Receive.

    def on_interrupt(self) -> None:
        """The VP was interrupted: read what the host wrote, send what waited for space."""
        if self._closed or self._dead:
            return
        try:
            # First: a full backlog stops the reading, and the host announces space only once.
            self._drain_backlog()
            self._reader.mask()
            budget = _TURN
            while budget > 0:
                if len(self._backlog) >= _BACKLOG_LIMIT:
                    self._reader.unmask()  # the host signals when it made room for what waits
                    break
                packets = self._reader.read(min(64, budget))
                for data in packets:
                    self._on_packet(data)
                budget -= len(packets)
                if packets and self._reader.commit():
                    signal_fd(self._signal_fd)
                if not packets and not self._reader.unmask():
                    break
            else:
                self._again = self._loop.call_soon(self.on_interrupt)
            self._next_rndis()
            self._publish()
        except WireError as error:
            self._fault(error)
            return
        self._watch_link()

    def _on_packet(self, data: bytes) -> None:
        item = packet.decode(data)
        if item.type == packet.VM_PKT_DATA_USING_XFER_PAGES:
            self._on_receive(item)
        elif item.type == packet.VM_PKT_COMP:
            self._on_completion(item)
        elif item.type == packet.VM_PKT_DATA_INBAND:
            self._tell(ControlPacket("inband", item.transaction_id, item.completion_requested, item.payload))
        else:
            raise WireError(f"packet of type {item.type} from the host on a network channel")

    def _on_completion(self, item: packet.Packet) -> None:
        identity, index = item.transaction_id & ~0xFFFFFFFF, item.transaction_id & 0xFFFFFFFF
        if identity == _ID_SECTION and index in self._busy_sections:
            self._busy_sections.remove(index)
            self._free_sections.append(index)
        elif identity == _ID_BOUNCE and index in self._busy_bounces:
            self._busy_bounces.remove(index)
            self._free_bounces.append(index)
        elif item.transaction_id == _ID_CONTROL and self._rndis_busy:
            self._rndis_busy = False
        elif identity == 0:
            self._tell(ControlPacket("completion", item.transaction_id, False, item.payload))
            return
        else:
            self._counters["stray_completions"] += 1
            return
        if len(item.payload) >= 8 and _RNDIS_COMPLETE.unpack_from(item.payload)[1] != STATUS_SUCCESS:
            self._counters["tx_errors"] += 1

    def _on_receive(self, item: packet.Packet) -> None:
        """Every range is one RNDIS message; whatever it is, the packet is completed once."""
        status = STATUS_SUCCESS
        run: list[frames.Received] = []
        view, size = self._receive_view, self._slot_size * self._slots
        for byte_count, byte_offset in item.transfer_ranges:
            if view is None or item.transfer_set_id != self._set_id or byte_offset + byte_count > size:
                self._counters["rx_errors"] += 1
                status = STATUS_FAILURE
                continue
            try:
                self._on_message(view.read(byte_offset, byte_count), run)
            except WireError:
                self._counters["rx_errors"] += 1
                status = STATUS_FAILURE
        if run:  # a run must end inside its packet
            self._counters["rx_errors"] += 1
            status = STATUS_FAILURE
        if item.completion_requested:
            body = _RNDIS_COMPLETE.pack(nvsp.NVSP_MSG1_TYPE_SEND_RNDIS_PKT_COMPLETE, status)
            self._put(packet.encode_completion(item.transaction_id, body))

    def _on_message(self, message: bytes, run: list[frames.Received]) -> None:
        if len(message) < 8:
            raise WireError(f"RNDIS message of {len(message)} bytes")
        kind, length = _HEAD.unpack_from(message)
        if not 8 <= length <= len(message):
            raise WireError(f"RNDIS message of {len(message)} bytes says it has {length}")
        if kind != RNDIS_PACKET_MSG:
            self._tell(ControlPacket("rndis", 0, False, message[:length]))
            return
        received = frames.receive(message)
        fragment = received.fragment
        if fragment is None:
            run.clear()
            self._deliver([received])
            return
        if fragment & frames.RSC_FIRST:
            run.clear()
        elif not run or sum(len(piece.frame) for piece in run) + len(received.frame) > MAX_READ:
            run.clear()
            raise WireError("RSC fragment without a first one, or more than a frame holds")
        run.append(received)
        if fragment & frames.RSC_LAST:
            whole = list(run)
            run.clear()
            self._deliver(whole)

    def _deliver(self, pieces: list[frames.Received]) -> None:
        if not self._running:
            self._counters["rx_dropped"] += 1
            return
        if self._link.write(frames.reassemble(pieces, self._mtu)):
            self._counters["rx_packets"] += 1
            self._counters["rx_bytes"] += sum(len(piece.frame) for piece in pieces)
        else:
            self._counters["rx_dropped"] += 1
