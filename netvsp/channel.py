"""The data channel of a synthetic NIC, Python twin: ring packets from the guest to frames, and frames to
the guest.

Document of record for ``native/netvsp/src/channel.rs``, which has the same surface as
``vswitch_native.netvsp.Channel``. It owns the ring pairs of all the NIC's queues (`netvsp.queue`): data 107s
become frames for the switch, control messages wait in `Channel.take_control` for the NIC's control plane, and
every packet that asks for a completion gets exactly one, on its own queue.

Life cycle: made when the guest opens the primary channel; `set_receive_buffer` / `set_send_buffer` /
`set_data` as the handshake goes on; `open_queue` and `close_queue` as the guest opens and closes
sub-channels; the endpoint is attached to a switch port all along, because control packets arrive on the same
ring; after the port's detach, `close`.

Threads: all calls on the event loop's thread. Hostile guest: every packet is copied out of the ring once,
checked, then used; frames are private copies, so that what a guest rewrites later is never delivered. A
guest that breaks a ring or the protocol loses this channel, with all its queues, alone (`fault`).
"""

from __future__ import annotations

import itertools
import os
import struct
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

from netvsp import limits, receive_path, rndis_data
from netvsp.queue import PADDED_MESSAGE, Queue, encode_transfer
from netvsp.receive_buffer import ReceiveBuffer, ReceiveBufferError
from netvsp.rss import Rss
from netvsp.tape import Tape
from vswitch.drops import DropReason
from vswitch.endpoint import Frame
from vswitch_wire import nvsp, packet, rndis
from vswitch_wire.errors import WireError
from vswitch_wire.memory import BufferView, GuestMemory, Interrupt, drain_fd, signal_fd

NO_SECTION = 0xFFFFFFFF
NVSP_SUCCESS, NVSP_FAILURE = 1, 2
CONTROL_ID_BIT = 1 << 63
"""Transaction ids of the host's own in-band requests have it; receive packets are numbered below 2^32."""
DATA_107 = struct.pack("<4I", nvsp.NVSP_MSG1_TYPE_SEND_RNDIS_PKT, 0, NO_SECTION, 0).ljust(
    PADDED_MESSAGE, b"\0"
)
CONTROL_107 = struct.pack("<4I", nvsp.NVSP_MSG1_TYPE_SEND_RNDIS_PKT, 1, NO_SECTION, 0).ljust(
    PADDED_MESSAGE, b"\0"
)
GUEST_CONTROL_TYPES = frozenset(
    (
        rndis.RNDIS_MSG_INIT,
        rndis.RNDIS_MSG_HALT,
        rndis.RNDIS_MSG_QUERY,
        rndis.RNDIS_MSG_SET,
        rndis.RNDIS_MSG_RESET,
        rndis.RNDIS_MSG_KEEPALIVE,
    )
)


class ControlPacket(NamedTuple):
    """One control message from the guest, whole and inside private memory."""

    kind: str
    """``inband`` (an NVSP message), ``completion`` (of the host's in-band request), ``rndis``,
    ``revoked``: the data path let go of the buffer whose kind is the payload (``receive`` or
    ``send``), or ``closed``: it let go of the queue whose index is the transaction id."""
    transaction_id: int
    completion_requested: bool
    """Already answered by the channel for ``rndis``."""
    payload: bytes


class _SendBuffer(NamedTuple):
    view: BufferView
    section_size: int


class Malformed(ValueError):
    """A 107 that is answered with NVSP status 2."""


class Channel:
    """Queues, buffers and counters of one NIC; `endpoint` is what a switch port is attached to."""

    def __init__(
        self,
        memory: GuestMemory,
        ring_pfns: Sequence[int],
        downstream_page_offset: int,
        doorbell_fd: int,
        interrupt: Interrupt,
    ) -> None:
        """Maps the primary channel's rings. Raises ValueError or MemoryAccessError if they are not inside
        the guest's memory. ``doorbell_fd`` is signalled for all queues."""
        self._memory = memory
        self._tape = Tape()
        primary = Queue(0, memory, ring_pfns, downstream_page_offset, interrupt, self._tape)
        self._queues: dict[int, Queue] = {0: primary}
        self._primary = primary
        self._per_queue: dict[int, Counter[str]] = {0: primary.counters}
        self._turn = 0
        self._rss: Rss | None = None
        self.wake_fd = doorbell_fd
        self.control_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._control: deque[ControlPacket] = deque()
        self._receive: ReceiveBuffer | None = None
        self._send: _SendBuffer | None = None
        self._settings = receive_path.Settings()
        self._data = False
        self._frames: deque[Frame] = deque()
        self._backlog: deque[tuple[bool, bytes]] = deque()
        self._backlog_bytes = 0
        self._closed = False
        self._fault: str | None = None
        self._counters: Counter[str] = Counter()
        self._drops: Counter[DropReason] = Counter()
        self._untold_drops: Counter[DropReason] = Counter()

    # Control plane: what the NIC calls.

    def endpoint(self) -> Channel:
        """The switch port's side; this object itself."""
        return self

    def take_control(self) -> list[ControlPacket]:
        """Control messages since the last call; `control_fd` is readable while there are any."""
        drain_fd(self.control_fd)
        taken = list(self._control)
        self._control.clear()
        return taken

    def fault(self) -> str | None:
        """Why the guest lost this channel, or None."""
        return self._fault

    def send_inband(self, payload: bytes, transaction_id: int, completion_requested: bool) -> None:
        """Sends an NVSP message of the host's own; ids have bit 63 set."""
        self._post(False, packet.encode_inband(payload, transaction_id, completion_requested))

    def send_completion(self, transaction_id: int, payload: bytes) -> None:
        """Completes a guest's in-band packet."""
        self._primary.complete(transaction_id, payload)
        self.flush()

    def send_rndis(self, message: bytes) -> None:
        """Sends an RNDIS control message through the receive buffer, in order, as soon as there is room."""
        self._post(True, message)

    def set_receive_buffer(
        self, pfns: Sequence[int], byte_offset: int, byte_count: int, buffer_id: int, size: int, count: int
    ) -> None:
        """Takes the guest's receive buffer into use: ``count`` sub-allocations of ``size`` bytes."""
        if size * count > byte_count or count <= limits.CONTROL_RESERVE:
            raise ValueError(f"{count} sub-allocations of {size} bytes in a receive buffer of {byte_count}")
        view = self._memory.view(list(pfns), byte_offset, byte_count)
        self._receive = ReceiveBuffer(view, buffer_id, size, count)

    def set_send_buffer(
        self, pfns: Sequence[int], byte_offset: int, byte_count: int, section_size: int
    ) -> None:
        """Takes the guest's send buffer into use."""
        self._send = _SendBuffer(self._memory.view(list(pfns), byte_offset, byte_count), section_size)

    def revoke_receive_buffer(self) -> None:
        """The guest takes its receive buffer back: nothing is written to it from here on."""
        self._forget_groups()
        self._backlog = deque(item for item in self._backlog if not item[0])
        self._backlog_bytes = sum(len(item[1]) for item in self._backlog)
        self._receive = None
        self._hand_up(ControlPacket("revoked", 0, False, b"receive"))

    def revoke_send_buffer(self) -> None:
        """The guest takes its send buffer back."""
        self._send = None
        self._hand_up(ControlPacket("revoked", 0, False, b"send"))

    def set_data(self, enabled: bool) -> None:
        """Opens or shuts the data path (RNDIS initialised or halted)."""
        self._data = enabled

    def set_link(self, up: bool) -> None:
        """Frames to and from a NIC whose link is down are dropped."""
        self._settings.link = up

    def set_filter(self, bits: int, address: bytes) -> None:
        """The packet filter (ntddndis.h NDIS_PACKET_TYPE_*) and the station address that "directed" means."""
        self._settings.filter = bits
        self._settings.address = bytes(address)

    def set_offload(self, bits: int) -> None:
        """What the guest enabled for receive: `receive_path.RX_*` bits."""
        self._settings.offload = bits

    def set_mtu(self, mtu: int) -> None:
        """Largest frame with Ethernet header, tag not counted."""
        self._settings.mtu = mtu

    def set_rss(self, key: bytes, table: Sequence[int], types: int) -> None:
        """Spreads frames over the queues by the guest's RSS parameters; an empty table ends that."""
        self._rss = Rss(key, table, types) if table else None

    def open_queue(
        self,
        index: int,
        ring_pfns: Sequence[int],
        downstream_page_offset: int,
        interrupt: Interrupt,
    ) -> None:
        """Takes the rings of sub-channel ``index`` into use. Raises ValueError or MemoryAccessError."""
        if not 0 < index < limits.MAX_QUEUES or index in self._queues:
            raise ValueError(f"queue {index} is open already or out of range")
        queue = Queue(index, self._memory, ring_pfns, downstream_page_offset, interrupt, self._tape)
        queue.counters = self._per_queue.setdefault(index, queue.counters)
        self._queues[index] = queue

    def close_queue(self, index: int) -> None:
        """Lets go of a sub-channel's rings; the control message ``closed`` says that it has happened. What
        the guest has not completed there counts as lost: it gets no completion."""
        self.flush()
        if index and index in self._queues:
            queue = self._queues.pop(index)
            if self._receive is not None:
                for sub_allocation, _ in itertools.chain.from_iterable(queue.groups):
                    self._receive.put_back(sub_allocation)
                self._receive.reclaim(index)
        self._hand_up(ControlPacket("closed", index, False, b""))

    def stats(self) -> dict[str, int]:
        """Counters since the channel was opened, over all queues."""
        return dict(sum(self._per_queue.values(), Counter(self._counters)))

    def queue_stats(self) -> list[dict[str, int]]:
        """Counters of each queue that was ever open, by index; empty where one was skipped."""
        return [dict(self._per_queue.get(index, Counter())) for index in range(max(self._per_queue) + 1)]

    def drops(self) -> dict[int, int]:
        """Frames that this channel itself refused, by drop-reason code, both directions."""
        return {int(reason): count for reason, count in self._drops.items()}

    def tap(self, on: bool) -> None:
        """Starts or stops keeping a copy of every ring packet."""
        self._tape.run(on)

    def take_tapped(self) -> list[tuple[int, str, bytes]]:
        """(nanoseconds since the epoch, ``in`` from the guest or ``out`` to it, packet bytes) since
        the last call."""
        return self._tape.take()

    def close(self) -> None:
        """Lets go of the rings and buffers; the port must be detached before."""
        if self._closed:
            return
        self._closed = True
        self._receive = None
        self._send = None
        self._frames.clear()
        self._queues.clear()
        os.close(self.control_fd)

    # Data plane: what the switch's engine calls.

    def receive(self, limit: int) -> list[Frame]:
        """Frames from the guest, at most ``limit``; fewer means that nothing more is there now."""
        if not self._alive():
            # What came before the fault was good.
            return [self._frames.popleft() for _ in range(min(limit, len(self._frames)))]
        frames: list[Frame] = []
        try:
            taken = 0
            while True:
                while self._frames and len(frames) < limit:
                    frames.append(self._frames.popleft())
                # Control packets and completions count as work, so that no flood of them holds the engine.
                if len(frames) == limit or taken >= limit:
                    break
                packets = self._read(min(limit - len(frames), limit - taken))
                if not packets:
                    break
                taken += len(packets)
        except WireError as error:
            self._lose(str(error))
        if not frames:
            self.flush()
        return frames

    def _read(self, limit: int) -> list[bytes]:
        """Packets of the next queue that has any, taken in; the queues have turns."""
        order = list(self._queues.values())
        for offset in range(len(order)):
            place = (self._turn + offset) % len(order)
            queue = order[place]
            if queue.stalled:
                continue
            packets = queue.read(limit)
            if packets:
                self._turn = place + 1
                for raw in packets:
                    self._take_packet(queue, bytes(raw))
                return packets
        return []

    def take_drops(self) -> dict[DropReason, int]:
        """Drops on the way in since the last call, for the port's counters."""
        told = dict(self._untold_drops)
        self._untold_drops.clear()
        return told

    def transmit(self, frame: Frame) -> DropReason | None:
        """Puts a frame into the receive buffer; it goes out with the next `flush`."""
        reason = self._transmit(frame)
        if reason is not None:
            self._drops[reason] += 1
        return reason

    def flush(self) -> None:
        """Publishes completions, control messages and received frames; one signal for all of them."""
        if not self._alive():
            return
        try:
            for queue in list(self._queues.values()):
                # A completion without room has said how much it needs: a smaller packet would go through
                # and clear that.
                if queue.write_completions():
                    queue.write_groups(self._receive, DATA_107)
                    if queue is self._primary:
                        self._write_backlog()
                queue.commit()
        except WireError as error:
            self._lose(str(error))

    def rearm(self) -> bool:
        """Lets the guest signal again; True = packets arrived meanwhile."""
        if not self._alive():
            return False
        try:
            arrived = [queue.rearm() for queue in self._queues.values()]
        except WireError as error:
            self._lose(str(error))
            return False
        return bool(self._frames) or any(arrived)

    # From the guest.

    def _alive(self) -> bool:
        return not self._closed and self._fault is None

    def _forget_groups(self) -> None:
        for queue in self._queues.values():
            queue.groups.clear()

    def _lose(self, text: str) -> None:
        if self._fault is None:
            self._fault = text
            self._forget_groups()
            signal_fd(self.control_fd)

    def _take_packet(self, queue: Queue, raw: bytes) -> None:
        if not self._alive():
            return
        self._tape.record("in", raw)
        kind, flags, transaction_id = struct.unpack_from("<H4xHQ", raw)
        requested = bool(flags & packet.VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED)
        if kind not in (packet.VM_PKT_DATA_INBAND, packet.VM_PKT_DATA_USING_GPA_DIRECT, packet.VM_PKT_COMP):
            self._lose(f"VMBus packet type {kind} on a network channel")
            return
        try:
            decoded = packet.decode(raw)
        except WireError as error:
            if kind != packet.VM_PKT_DATA_USING_GPA_DIRECT:
                self._lose(str(error))
                return
            self._refuse(queue, transaction_id, requested)
            return
        if kind == packet.VM_PKT_COMP:
            self._take_completion(queue, transaction_id, decoded.payload)
            return
        message_type = int.from_bytes(decoded.payload[:4], "little")
        if len(decoded.payload) < 4:
            self._lose("an NVSP message shorter than its type")
        elif message_type == nvsp.NVSP_MSG1_TYPE_SEND_RNDIS_PKT:
            self._take_rndis(queue, decoded, requested)
        elif kind == packet.VM_PKT_DATA_USING_GPA_DIRECT:
            self._lose(f"NVSP message {message_type} in a GPA-direct packet")
        elif queue is not self._primary:
            self._lose(f"NVSP message {message_type} on sub-channel {queue.index}")
        else:
            self._queue_control(ControlPacket("inband", transaction_id, requested, decoded.payload))

    def _take_completion(self, queue: Queue, transaction_id: int, payload: bytes) -> None:
        if transaction_id & CONTROL_ID_BIT and queue is self._primary:
            self._queue_control(ControlPacket("completion", transaction_id, False, payload))
            return
        message_type = int.from_bytes(payload[:4], "little")
        if len(payload) < 8 or message_type != nvsp.NVSP_MSG1_TYPE_SEND_RNDIS_PKT_COMPLETE:
            self._lose(f"completion {transaction_id:#x} without an NVSP receive status")
            return
        if self._receive is None:
            return
        try:
            self._receive.completed(transaction_id, queue.index)
        except ReceiveBufferError as error:
            self._lose(str(error))
            return
        if int.from_bytes(payload[4:8], "little") != NVSP_SUCCESS:
            self._counters["receive_failures"] += 1

    def _take_rndis(self, queue: Queue, decoded: packet.Packet, requested: bool) -> None:
        status = NVSP_SUCCESS
        try:
            channel_type, data = self._gather(decoded)
            if channel_type == 0:
                status = self._take_data(queue, data)
            elif channel_type == 1 and queue is self._primary:
                self._take_control_message(decoded.transaction_id, data)
            else:
                raise Malformed(f"RNDIS channel type {channel_type} on queue {queue.index}")
        except (Malformed, WireError):
            self._refuse(queue, decoded.transaction_id, requested)
            return
        if requested:
            self._complete(queue, decoded.transaction_id, status)

    def _gather(self, decoded: packet.Packet) -> tuple[int, bytes]:
        """The RNDIS bytes of a 107: its send section, then its GPA ranges."""
        if len(decoded.payload) < 16:
            raise Malformed("a 107 shorter than 16 bytes")
        channel_type, index, size = struct.unpack_from("<3I", decoded.payload, 4)
        ranges = decoded.ranges if decoded.type == packet.VM_PKT_DATA_USING_GPA_DIRECT else ()
        if len(ranges) > limits.MAX_GPA_RANGES:
            raise Malformed(f"{len(ranges)} GPA ranges in one packet")
        total = sum(piece.byte_count for piece in ranges) + (size if index != NO_SECTION else 0)
        if total > limits.MAX_MESSAGE_BYTES:
            raise Malformed(f"{total} RNDIS bytes in one packet")
        data = bytearray()
        if index != NO_SECTION:
            if self._send is None:
                raise Malformed(f"send section {index} without a send buffer")
            start = index * self._send.section_size
            if start + size > len(self._send.view):
                raise Malformed(f"send section {index} of {size} bytes lies outside the send buffer")
            data += self._send.view.read(start, size)
        for piece in ranges:
            if piece.byte_count:
                view = self._memory.view(piece.pfns, piece.byte_offset, piece.byte_count)
                data += view.read(0, piece.byte_count)
        return channel_type, bytes(data)

    def _take_data(self, queue: Queue, data: bytes) -> int:
        if not self._data:
            self._drop(DropReason.NOT_READY)
            return NVSP_FAILURE
        frames, malformed = rndis_data.parse_messages(data)
        if self._settings.link:
            self._frames.extend(frames)
        else:
            for _ in frames:
                self._drop(DropReason.DISCONNECTED)
        queue.counters["frames_from_guest"] += len(frames)
        queue.counters["bytes_from_guest"] += sum(len(frame.data) for frame in frames)
        if malformed is None:
            return NVSP_SUCCESS
        self._counters["malformed"] += 1
        self._drop(DropReason.INVALID_PACKET)
        return NVSP_FAILURE

    def _take_control_message(self, transaction_id: int, data: bytes) -> None:
        if len(data) < 8:
            raise Malformed("an RNDIS control message shorter than its header")
        message_type, length = struct.unpack_from("<2I", data)
        if message_type not in GUEST_CONTROL_TYPES:
            raise Malformed(f"RNDIS message type {message_type:#x} from a guest")
        if not 8 <= length <= min(len(data), limits.MAX_CONTROL_BYTES):
            raise Malformed(f"an RNDIS control message of {length} bytes")
        if len(self._control) >= limits.MAX_CONTROL_QUEUED:
            raise Malformed("too many RNDIS control messages at once")
        self._queue_control(ControlPacket("rndis", transaction_id, False, data[:length]))

    def _queue_control(self, item: ControlPacket) -> None:
        if len(item.payload) > limits.MAX_CONTROL_BYTES:
            self._lose(
                f"control message of {len(item.payload)} bytes, at most {limits.MAX_CONTROL_BYTES} expected"
            )
            return
        if len(self._control) >= limits.MAX_CONTROL_QUEUED:
            self._lose(
                f"more than {limits.MAX_CONTROL_QUEUED} control messages without waiting for an answer"
            )
            return
        self._hand_up(item)

    def _hand_up(self, item: ControlPacket) -> None:
        """Without the bound on what a guest sends: somebody waits for the data path's own notices."""
        self._control.append(item)
        signal_fd(self.control_fd)

    def _refuse(self, queue: Queue, transaction_id: int, requested: bool) -> None:
        self._counters["malformed"] += 1
        self._drop(DropReason.INVALID_PACKET)
        if requested:
            self._complete(queue, transaction_id, NVSP_FAILURE)

    def _drop(self, reason: DropReason) -> None:
        self._drops[reason] += 1
        self._untold_drops[reason] += 1

    def _complete(self, queue: Queue, transaction_id: int, status: int) -> None:
        message = struct.pack("<2I", nvsp.NVSP_MSG1_TYPE_SEND_RNDIS_PKT_COMPLETE, status)
        queue.complete(transaction_id, message.ljust(PADDED_MESSAGE, b"\0"))

    # To the guest.

    def _transmit(self, frame: Frame) -> DropReason | None:
        if not self._alive():
            return DropReason.VMBUS_ERROR
        if not self._data or self._receive is None:
            return DropReason.NOT_READY
        reason = receive_path.refusal(frame, self._settings)
        if reason is not None:
            return reason
        queue, hashed = self._place(frame)
        run = receive_path.messages(frame, self._settings, self._counters, hashed)
        if isinstance(run, DropReason):
            return run
        if max(map(len, run.messages)) > self._receive.size:
            return DropReason.MTU_MISMATCH
        if self._receive.free_count - len(run.messages) < limits.CONTROL_RESERVE:
            return DropReason.RESOURCES
        try:
            if not queue.room_for(run):
                return DropReason.RESOURCES
        except WireError as error:
            self._lose(str(error))
            return DropReason.RESOURCES
        for number, message in enumerate(run.messages):
            index = self._receive.take()
            if index is None:
                raise AssertionError("the receive buffer lost sub-allocations that were just counted")
            self._receive.write(index, message)
            queue.group_for(run, number).append((index, len(message)))
        queue.counters["frames_to_guest"] += 1
        queue.counters["bytes_to_guest"] += len(frame.data)
        return None

    def _place(self, frame: Frame) -> tuple[Queue, tuple[int, int] | None]:
        """The frame's queue, and its hash value and type; queue 0 where there is no other."""
        placed = None if self._rss is None else self._rss.place(frame.data)
        if placed is None:
            return self._primary, None
        index, value, kind = placed
        return self._queues.get(index, self._primary), (value, kind)

    def _post(self, is_rndis: bool, item: bytes) -> None:
        if self._backlog_bytes + len(item) > limits.MAX_CONTROL_BACKLOG_BYTES:
            self._counters["control_dropped"] += 1
            return
        self._backlog.append((is_rndis, item))
        self._backlog_bytes += len(item)
        self.flush()

    def _write_backlog(self) -> None:
        while self._backlog:
            is_rndis, item = self._backlog[0]
            if not (self._write_control(item) if is_rndis else self._primary.write(item)):
                return
            self._backlog.popleft()
            self._backlog_bytes -= len(item)

    def _write_control(self, message: bytes) -> bool:
        if self._receive is None or len(message) > self._receive.size:
            self._counters["control_dropped"] += 1
            return True
        index = self._receive.take(control=True)
        if index is None:
            return False
        self._receive.write(index, message)
        encoded = encode_transfer(self._receive, index, [(index, len(message))], CONTROL_107)
        if not self._primary.write(encoded):
            self._receive.put_back(index)
            return False
        self._receive.sent([index], 0)
        return True
