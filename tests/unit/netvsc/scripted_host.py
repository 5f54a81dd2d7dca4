"""The host's half of one NetVSC channel, scripted: real memfds, real rings, the plain wire codecs."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from netvsc.driver import NETVSC_CLASS
from vswitch_wire import ndis, nvsp, packet, rndis
from vswitch_wire.memory import GuestMemory, Region, create_region
from vswitch_wire.ring import RingReader, RingWriter

PAGE = 4096
SECTION = 6144
SLOT = 1856
MAC = bytes.fromhex("00155d010203")
INSTANCE = UUID(int=7)


async def until(condition: Callable[[], bool], *, seconds: float = 20.0) -> None:
    """Wait for something another task or process brings about; TimeoutError when it does not."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@dataclass
class Offer:
    """What the driver reads of an offer."""

    relid: int = 5
    class_id: UUID = NETVSC_CLASS
    instance_id: UUID = INSTANCE
    sub_channel_index: int = 0


class Allocator:
    """Pages of the one region, first fit in order."""

    def __init__(self, pages: int) -> None:
        self.free_pages = list(range(16, 16 + pages))

    def alloc(self, pages: int) -> list[int]:
        if pages > len(self.free_pages):
            raise MemoryError(f"{pages} pages")
        taken, self.free_pages = self.free_pages[:pages], self.free_pages[pages:]
        return taken

    def free(self, pfns: Sequence[int]) -> None:
        self.free_pages = sorted([*self.free_pages, *pfns])


class FakeLink:
    """An interface made of a packet socket pair: one end for the data path, the other plays the kernel."""

    kind = "fake"
    name = "fake0"
    is_packet_socket = False

    def __init__(self) -> None:
        kernel, path = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        kernel.setblocking(False)
        path.setblocking(False)
        self._kernel, self._path = kernel, path
        self.fd = path.fileno()
        self.outgoing: deque[bytes] = deque()
        self._received: list[bytes] = []

    def send(self, frame: bytes, header: bytes = bytes(10)) -> None:
        """The guest's kernel transmits; what its queue does not take waits in `outgoing`."""
        self.outgoing.append(header + frame)
        self._flush()

    def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        while self.outgoing:
            try:
                self._kernel.send(self.outgoing[0])
            except BlockingIOError:
                loop.add_writer(self._kernel, self._flush)
                return
            self.outgoing.popleft()
        loop.remove_writer(self._kernel)

    @property
    def received(self) -> list[bytes]:
        """All that the guest's kernel was given."""
        while True:
            try:
                self._received.append(self._kernel.recv(1 << 17))
            except BlockingIOError:
                return self._received

    @property
    def waiting(self) -> bool:
        """Whether the data path left something in the kernel's queue."""
        return bool(select.select([self._path], [], [], 0)[0])

    def read(self) -> bytes | None:
        try:
            return self._path.recv(1 << 17)
        except BlockingIOError:
            return None

    def write(self, data: bytes) -> bool:
        self._path.send(data)
        return True

    def close(self) -> None:
        self._kernel.close()
        self._path.close()


@dataclass
class Channel:
    """What VMBus gives for an opened channel."""

    relid: int
    memory: GuestMemory
    ring_pfns: list[int]
    downstream_page_offset: int
    signal_fd: int
    on_interrupt: Callable[[], None] = lambda: None


class Host:
    """Memory, both rings, and answers as a conforming NetVSP gives them; what is odd is set by the test."""

    def __init__(self, pages: int = 4096, *, ring_pages: int = 16) -> None:
        self.ring_pages = ring_pages  # of either ring, whatever the driver asks for
        fd = create_region("guest", (16 + pages) * PAGE)
        self.region = Region(0, (16 + pages) * PAGE, fd)
        self.memory = GuestMemory([self.region])
        self.interrupt_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.allocator = Allocator(pages)
        self.offer = Offer()
        self.log: list[str] = []
        self.gpadls: dict[int, list[int]] = {}
        self.refuse_above = nvsp.NvspVersion.V61
        self.offload = ndis.Offload()
        self.mtu = 1514
        self.section = SECTION
        self.oids: list[int] = []
        self.sets: dict[int, bytes] = {}
        self.sent: list[packet.Packet] = []
        self.messages: list[bytes] = []
        self.completed: list[tuple[int, int]] = []
        self.hold_completions = False
        self.held: list[int] = []
        self.version = 0
        self.receive: list[int] = []
        self.send_pages: list[int] = []
        self.next_slot = 0
        self.channel: Channel | None = None
        self.signalled = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    # VmbusClient's surface.

    async def open(self, offer: Offer, ring_pages: int = 0) -> Channel:
        size = self.ring_pages
        pfns = self.allocator.alloc(2 * size)
        upstream, downstream = pfns[:size], pfns[size:]
        for pages in (upstream, downstream):
            self.memory.write(pages[0] * PAGE, bytes(PAGE))
        self.reader = RingReader(self.memory.view(upstream, 0, size * PAGE))
        self.writer = RingWriter(self.memory.view(downstream, 0, size * PAGE))
        self.channel = Channel(offer.relid, self.memory, pfns, size, self.signalled)
        asyncio.get_running_loop().add_reader(self.signalled, self.on_signal)
        self.log.append("open")
        return self.channel

    async def close(self, channel: Channel) -> None:
        asyncio.get_running_loop().remove_reader(self.signalled)
        self.allocator.free(channel.ring_pfns)
        self.log.append("close")

    async def create_gpadl(self, relid: int, pages: list[int]) -> int:
        number = 0xE1E10 + len(self.gpadls)
        self.gpadls[number] = pages
        return number

    async def teardown_gpadl(self, relid: int, gpadl_id: int) -> None:
        self.log.append(f"teardown {gpadl_id:#x}")

    # The channel's other end.

    def on_signal(self) -> None:
        os.eventfd_read(self.signalled)
        self.serve()

    def serve(self) -> None:
        """Read everything the guest sent, answer it."""
        while data := self.reader.read(64):
            for entry in data:
                self.on_packet(packet.decode(entry))
            self.reader.commit()
        self.interrupt()

    def interrupt(self) -> None:
        """Publish, then interrupt always: spurious interrupts are legal."""
        self.writer.commit()
        self.wake()

    def wake(self) -> None:
        """The interrupt by itself."""
        os.eventfd_write(self.interrupt_fd, 1)
        if self.channel is not None:
            asyncio.get_running_loop().call_soon(self.channel.on_interrupt)

    def put(self, data: bytes) -> None:
        assert self.writer.write(data)

    def complete(self, item: packet.Packet, message: nvsp.NvspMessage) -> None:
        assert item.completion_requested
        self.put(packet.encode_completion(item.transaction_id, message.pack(40)))

    def on_packet(self, item: packet.Packet) -> None:
        if item.type == packet.VM_PKT_COMP:
            self.completed.append((item.transaction_id, struct.unpack_from("<2I", item.payload)[1]))
            return
        message = nvsp.decode(item.payload)
        if isinstance(message, nvsp.SendRndisPacket):
            self.on_rndis_packet(item, message)
            return
        self.log.append(type(message).__name__)
        if isinstance(message, nvsp.Init):
            accepted = message.min_version <= self.refuse_above
            self.version = message.min_version
            self.complete(item, nvsp.InitComplete(0xFFFFFFFF, 34, int(accepted)))
        elif isinstance(message, nvsp.SendReceiveBuffer):
            self.receive = self.gpadls[message.gpadl_id]
            slots = len(self.receive) * PAGE // SLOT
            section = nvsp.ReceiveBufferSection(0, SLOT, slots, SLOT * slots)
            self.complete(item, nvsp.SendReceiveBufferComplete(1, (section,)))
        elif isinstance(message, nvsp.SendSendBuffer):
            self.send_pages = self.gpadls[message.gpadl_id]
            self.complete(item, nvsp.SendSendBufferComplete(1, self.section))

    def on_rndis_packet(self, item: packet.Packet, message: nvsp.SendRndisPacket) -> None:
        data = b""
        if message.section_index != nvsp.NVSP_INVALID_SECTION_INDEX:
            view = self.memory.view(self.send_pages, 0, len(self.send_pages) * PAGE)
            data = view.read(message.section_index * self.section, message.section_size)
        for entry in item.ranges:
            data += self.memory.view(entry.pfns, entry.byte_offset, entry.byte_count).read(
                0, entry.byte_count
            )
        self.sent.append(item)
        if self.hold_completions and message.channel_type == nvsp.RMC_DATA:
            self.held.append(item.transaction_id)
        else:
            self.release(item.transaction_id)
        for part in rndis.split(data):
            decoded = rndis.decode(part)
            if isinstance(decoded, rndis.Packet):
                self.messages.append(decoded.data)
            else:
                self.on_control(decoded)

    def release(self, transaction_id: int) -> None:
        """Complete a 107 of the guest."""
        self.put(packet.encode_completion(transaction_id, nvsp.SendRndisPacketComplete(1).pack(40)))

    def on_control(self, message: rndis.RndisMessage) -> None:
        if isinstance(message, rndis.Initialize):
            self.log.append("INITIALIZE")
            self.send_rndis(rndis.InitializeComplete(message.request_id).pack())
        elif isinstance(message, rndis.Query):
            self.oids.append(message.oid)
            self.send_rndis(rndis.QueryComplete(message.request_id, 0, self.answer(message.oid)).pack())
        elif isinstance(message, rndis.Set):
            self.oids.append(message.oid)
            self.sets[message.oid] = message.info
            self.send_rndis(rndis.SetComplete(message.request_id, 0).pack())
        elif isinstance(message, rndis.Halt):
            self.log.append("HALT")

    def answer(self, oid: int) -> bytes:
        answers: dict[int, Any] = {
            ndis.OID_GEN_MAXIMUM_FRAME_SIZE: (self.mtu - 14).to_bytes(4, "little"),
            ndis.OID_802_3_PERMANENT_ADDRESS: MAC,
            ndis.OID_TCP_OFFLOAD_HARDWARE_CAPABILITIES: self.offload.pack(),
            ndis.OID_GEN_MEDIA_CONNECT_STATUS: bytes(4),
            ndis.OID_GEN_LINK_SPEED: (100_000_000).to_bytes(4, "little"),
            ndis.OID_GEN_RECEIVE_SCALE_CAPABILITIES: ndis.RssCapabilities().pack(),
        }
        return bytes(answers[oid])

    def send_rndis(self, *messages: bytes, transaction_id: int | None = None) -> int:
        """Put messages into receive slots and refer to them by one transfer-page packet."""
        view = self.memory.view(self.receive, 0, len(self.receive) * PAGE)
        ranges = []
        first = self.next_slot
        for message in messages:
            view.write(self.next_slot * SLOT, message)
            ranges.append(packet.TransferRange(len(message), self.next_slot * SLOT))
            self.next_slot = (self.next_slot + 1) % (len(self.receive) * PAGE // SLOT)
        identity = first if transaction_id is None else transaction_id
        body = nvsp.SendRndisPacket(nvsp.RMC_DATA).pack(40)
        self.put(packet.encode_transfer_pages(identity, nvsp.NETVSC_RECEIVE_BUFFER_ID, ranges, body))
        return identity

    def tear(self) -> None:
        """End of the test."""
        self.memory.close()
        for fd in (self.region.fd, self.interrupt_fd, self.signalled):
            os.close(fd)
