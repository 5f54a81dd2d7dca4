"""A scripted guest for the NIC's tests: real memfds, rings and eventfds; the test spells the messages."""

from __future__ import annotations

import asyncio
import os
import struct
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import pytest

import vswitch_native
from hypervisor.vmbus.device import OpenedChannel
from netvsp.nic import SyntheticNic
from vswitch.drops import DropReason
from vswitch.endpoint import Frame
from vswitch_wire import nvsp, packet, rndis
from vswitch_wire.engine import Engine, interrupt_class, memory_class
from vswitch_wire.errors import WireError
from vswitch_wire.gpadl import GpaRange
from vswitch_wire.memory import GuestMemory, Region, create_region
from vswitch_wire.ring import RingReader, RingWriter

ENGINES = [
    "python",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(not vswitch_native.AVAILABLE, reason=f"native engine: {vswitch_native.WHY}"),
    ),
]
PAGE = 4096
MEMORY_BYTES = 4 << 20
RING_PAGES = 8
RECEIVE_GPADL, SEND_GPADL = 0xE1E10, 0xE1E11
RECEIVE_PAGE, RECEIVE_PAGES = 64, 256
SEND_PAGE, SEND_PAGES = 512, 64
SCRATCH_PAGE = 640
SUB_RING_PAGE = 768
RECEIVE_ID = 0xCAFE
MAC = bytes.fromhex("02155d000001")
PEER = bytes.fromhex("02155d000002")
SECTION = 6144


class FakePort:
    """Stands for a switch port: the test plays the engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.endpoint: Any = None

    async def attach(self, endpoint: Any) -> None:
        if self.engine == "native":
            from vswitch_native.netvsp import EndpointDriver

            endpoint = EndpointDriver(endpoint)
        self.endpoint = endpoint

    async def detach(self) -> None:
        if self.engine == "native" and self.endpoint is not None:
            self.endpoint.drop()
        self.endpoint = None


@dataclass
class SubChannel:
    """The guest's end of a sub-channel."""

    opened: OpenedChannel
    irq: int
    writer: RingWriter
    reader: RingReader
    inbox: list[packet.Packet] = field(default_factory=list)

    def post(self, encoded: bytes) -> None:
        assert self.writer.write(encoded), "the sub-channel's ring is full"
        self.writer.commit()

    def take(self) -> list[packet.Packet]:
        taken, self.inbox = self.inbox, []
        return taken


class ScriptedGuest:
    """Guest memory and one NIC channel; `pump` lets the host side run as a switch engine would."""

    def __init__(
        self, engine: Engine, *, mtu: int = 1500, memory_bytes: int = MEMORY_BYTES, queues: int = 1
    ) -> None:
        self.engine: Engine = engine
        self.fd = create_region("guest", memory_bytes)
        region = Region(0, memory_bytes, self.fd)
        self.memory = GuestMemory([region])
        self.host_memory = memory_class(engine)([region])
        self.doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.irq = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.faults: list[str] = []
        self.released: list[int] = []
        self.offered: list[int] = []
        """Counts of sub-channels that were offered."""
        ring_pfns = list(range(1, 1 + 2 * RING_PAGES))
        self.gpadls = {
            RECEIVE_GPADL: (RECEIVE_PAGE, RECEIVE_PAGES),
            SEND_GPADL: (SEND_PAGE, SEND_PAGES),
        }
        interrupt = interrupt_class(engine)(self.host_memory, self.irq)
        self.opened = OpenedChannel(
            relid=1,
            open_id=1,
            sub_channel_index=0,
            memory=self.host_memory,
            ring_pfns=ring_pfns,
            downstream_page_offset=RING_PAGES,
            doorbell_fd=self.doorbell,
            interrupt=interrupt,
            user_data=b"",
            gpadl=self._gpadl,
            release_gpadl=self.released.append,
            report_fault=self.faults.append,
            offer_sub_channels=self.offered.append,
        )
        self.subs: dict[int, SubChannel] = {}
        self.writer = RingWriter(self.memory.view(ring_pfns[:RING_PAGES], 0, RING_PAGES * PAGE))
        self.reader = RingReader(self.memory.view(ring_pfns[RING_PAGES:], 0, RING_PAGES * PAGE))
        self.port = FakePort(engine)
        self.nic = SyntheticNic("eth0", MAC, UUID(int=1), self.port, mtu=mtu, queues=queues, engine=engine)
        self.inbox: list[packet.Packet] = []
        self.frames: list[Frame] = []
        self.ingress_drops: dict[DropReason, int] = {}
        self.section: nvsp.ReceiveBufferSection | None = None
        self.next_id = 1

    def _gpadl(self, gpadl_id: int) -> GpaRange:
        if gpadl_id not in self.gpadls:
            raise WireError(f"no GPADL {gpadl_id:#x}")
        first, count = self.gpadls[gpadl_id]
        return GpaRange(count * PAGE, 0, tuple(range(first, first + count)))

    async def open(self) -> None:
        await self.nic.open(self.opened)

    async def close(self) -> None:
        await self.nic.close(self.opened)
        for sub in self.subs.values():
            os.close(sub.irq)
        self.host_memory.close()
        self.memory.close()
        for fd in (self.fd, self.doorbell, self.irq):
            os.close(fd)

    # Packets.

    def post(self, encoded: bytes) -> None:
        assert self.writer.write(encoded), "the scripted guest's ring is full"
        self.writer.commit()

    def inband(self, payload: bytes, *, ask: bool = True) -> int:
        transaction_id, self.next_id = self.next_id, self.next_id + 1
        self.post(packet.encode_inband(payload, transaction_id, ask))
        return transaction_id

    async def pump(self) -> None:
        """The host runs until nothing more happens; the inbox gets what it sent."""
        for _ in range(6):
            endpoint = self.port.endpoint
            if endpoint is not None:
                while got := endpoint.receive(64):
                    self.frames += got
                    endpoint.flush()
                for reason, count in endpoint.take_drops().items():
                    reason = DropReason(reason)
                    self.ingress_drops[reason] = self.ingress_drops.get(reason, 0) + count
                endpoint.rearm()
            await asyncio.sleep(0.001)
        self.read()

    def read(self) -> ScriptedGuest:
        """Takes what lies in the ring into the inbox."""
        self.inbox += [packet.decode(bytes(raw)) for raw in self.reader.read(10_000)]
        self.reader.commit()
        for sub in self.subs.values():
            sub.inbox += [packet.decode(bytes(raw)) for raw in sub.reader.read(10_000)]
            sub.reader.commit()
        return self

    def take(self) -> list[packet.Packet]:
        taken, self.inbox = self.inbox, []
        return taken

    async def ask(self, payload: bytes) -> bytes:
        """Sends an in-band NVSP message that asks for a completion; the completion's payload."""
        transaction_id = self.inband(payload)
        await self.pump()
        answers = [
            p for p in self.inbox if p.type == packet.VM_PKT_COMP and p.transaction_id == transaction_id
        ]
        self.inbox = [p for p in self.inbox if p not in answers]
        assert len(answers) == 1, f"{len(answers)} completions, faults {self.faults}"
        return answers[0].payload

    # Sub-channels.

    def make_sub(self, index: int) -> SubChannel:
        """Rings of a sub-channel, not yet opened."""
        first = SUB_RING_PAGE + 2 * RING_PAGES * (index - 1)
        pfns = list(range(first, first + 2 * RING_PAGES))
        irq = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        opened = OpenedChannel(
            relid=1 + index,
            open_id=1 + index,
            sub_channel_index=index,
            memory=self.host_memory,
            ring_pfns=pfns,
            downstream_page_offset=RING_PAGES,
            doorbell_fd=self.doorbell,
            interrupt=interrupt_class(self.engine)(self.host_memory, irq),
            user_data=b"",
            gpadl=self._gpadl,
            release_gpadl=self.released.append,
            report_fault=self.faults.append,
            offer_sub_channels=self.offered.append,
        )
        self.memory.write(first * PAGE, bytes(2 * RING_PAGES * PAGE))
        writer = RingWriter(self.memory.view(pfns[:RING_PAGES], 0, RING_PAGES * PAGE))
        reader = RingReader(self.memory.view(pfns[RING_PAGES:], 0, RING_PAGES * PAGE))
        return SubChannel(opened, irq, writer, reader)

    async def open_sub(self, index: int) -> SubChannel:
        if index in self.subs:
            os.close(self.subs.pop(index).irq)
        sub = self.make_sub(index)
        self.subs[index] = sub
        await self.nic.open(sub.opened)
        return sub

    async def close_sub(self, index: int) -> None:
        """Closes it while the host's engine runs."""
        closing = asyncio.ensure_future(self.nic.close(self.subs[index].opened))
        while not closing.done():
            await self.pump()
        await closing

    # RNDIS.

    def put_section(self, index: int, data: bytes) -> None:
        self.memory.write(SEND_PAGE * PAGE + index * SECTION, data)

    def send_rndis(
        self,
        message: bytes,
        *,
        channel_type: int = 0,
        section: int = 0,
        size: int | None = None,
        ask: bool = True,
    ) -> int:
        """A 107 whose message lies in a send section."""
        self.put_section(section, message)
        body = nvsp.SendRndisPacket(channel_type, section, len(message) if size is None else size)
        return self.inband(body.pack(32), ask=ask)

    def send_direct(
        self, message: bytes, *, pieces: int = 1, section_bytes: int = 0, channel_type: int = 0
    ) -> int:
        """A 107 by GPA ranges, its first `section_bytes` in send section 0."""
        index = nvsp.NVSP_INVALID_SECTION_INDEX
        if section_bytes:
            index = 0
            self.put_section(0, message[:section_bytes])
        rest = message[section_bytes:]
        at = SCRATCH_PAGE * PAGE + 128
        self.memory.write(at, rest)
        step = -(-len(rest) // pieces)
        ranges = []
        for start in range(0, len(rest), step):
            length = min(step, len(rest) - start)
            first = (at + start) // PAGE
            last = (at + start + length - 1) // PAGE
            ranges.append(GpaRange(length, (at + start) % PAGE, tuple(range(first, last + 1))))
        body = nvsp.SendRndisPacket(channel_type, index, section_bytes)
        transaction_id, self.next_id = self.next_id, self.next_id + 1
        self.post(packet.encode_gpa_direct(transaction_id, tuple(ranges), body.pack(32)))
        return transaction_id

    def completion_status(self, transaction_id: int) -> int:
        """NVSP status of the one 108 for a packet; it leaves the inbox."""
        found = [p for p in self.inbox if p.type == packet.VM_PKT_COMP and p.transaction_id == transaction_id]
        assert len(found) == 1, f"{len(found)} completions of {transaction_id}"
        self.inbox = [p for p in self.inbox if p is not found[0]]
        kind, status = struct.unpack_from("<2I", found[0].payload)
        assert kind == 108
        return int(status)

    def received(self) -> list[tuple[int, list[bytes]]]:
        """(transaction id, RNDIS messages) of every receive packet in the inbox; they leave it."""
        out = []
        for entry in [p for p in self.inbox if p.type == packet.VM_PKT_DATA_USING_XFER_PAGES]:
            assert entry.transfer_set_id == RECEIVE_ID
            assert entry.completion_requested
            messages = []
            for piece in entry.transfer_ranges:
                data = self.memory.read(RECEIVE_PAGE * PAGE + piece.byte_offset, piece.byte_count)
                assert struct.unpack_from("<I", data, 4)[0] == len(data), "range and message length differ"
                messages.append(data)
            out.append((entry.transaction_id, messages))
        self.inbox = [p for p in self.inbox if p.type != packet.VM_PKT_DATA_USING_XFER_PAGES]
        return out

    def give_back(self, transaction_id: int, status: int = 1) -> None:
        """The receive completion of one packet."""
        body = nvsp.SendRndisPacketComplete(status).pack(32)
        self.post(packet.encode_completion(transaction_id, body))

    async def control(self, message: rndis.RndisMessage) -> list[rndis.RndisMessage]:
        """Sends an RNDIS control message, completes what comes back, and gives the answers."""
        transaction_id = self.send_rndis(message.pack(), channel_type=1)
        await self.pump()
        assert self.completion_status(transaction_id) == 1
        return await self.answers()

    async def answers(self) -> list[rndis.RndisMessage]:
        out = []
        for receive_id, messages in self.received():
            out += [rndis.decode(message) for message in messages]
            self.give_back(receive_id)
        await self.pump()
        return out

    async def query(self, oid: int, info: bytes = b"") -> rndis.QueryComplete:
        (answer,) = await self.control(rndis.Query(7, oid, info))
        assert isinstance(answer, rndis.QueryComplete)
        assert answer.request_id == 7
        return answer

    async def set(self, oid: int, info: bytes) -> int:
        """The status of a set; indications that follow stay unread by the caller."""
        answers = await self.control(rndis.Set(9, oid, info))
        assert isinstance(answers[0], rndis.SetComplete)
        assert answers[0].request_id == 9
        self.indications = answers[1:]
        return answers[0].status

    # Whole handshakes.

    async def negotiate(
        self,
        version: int = nvsp.NvspVersion.V61,
        *,
        mtu: int = 1514,
        capabilities: int = 0x3,
        send_buffer: bool = True,
    ) -> None:
        """INIT to the send buffer."""
        answer = nvsp.decode(await self.ask(nvsp.Init(version, version).pack(40)))
        assert isinstance(answer, nvsp.InitComplete)
        assert answer.status == 1
        if version >= nvsp.NvspVersion.V2:
            self.inband(nvsp.SendNdisConfig(mtu, capabilities).pack(40), ask=False)
        self.inband(nvsp.SendNdisVersion(6, 30 if version >= nvsp.NvspVersion.V5 else 1).pack(40), ask=False)
        reply = nvsp.decode(await self.ask(nvsp.SendReceiveBuffer(RECEIVE_GPADL, RECEIVE_ID).pack(40)))
        assert isinstance(reply, nvsp.SendReceiveBufferComplete)
        assert reply.status == 1
        (self.section,) = reply.sections
        if send_buffer:
            sent = nvsp.decode(await self.ask(nvsp.SendSendBuffer(SEND_GPADL, 0).pack(40)))
            assert isinstance(sent, nvsp.SendSendBufferComplete)
            assert (sent.status, sent.section_size) == (1, SECTION)

    async def up(self, *, packet_filter: int = 0x0D, **keywords: Any) -> None:
        """Open to a set packet filter."""
        await self.open()
        await self.negotiate(**keywords)
        (answer,) = await self.control(rndis.Initialize(1))
        assert isinstance(answer, rndis.InitializeComplete)
        assert answer.status == 0
        if packet_filter:
            assert await self.set(0x0001010E, packet_filter.to_bytes(4, "little")) == 0

    def deliver(self, *frames: Frame) -> list[DropReason | None]:
        """The switch hands frames to the NIC and flushes."""
        verdicts = [self.port.endpoint.transmit(frame) for frame in frames]
        self.port.endpoint.flush()
        return [None if verdict is None else DropReason(verdict) for verdict in verdicts]


def ethernet(
    payload: bytes = b"x" * 46, *, dst: bytes = PEER, src: bytes = MAC, ethertype: int = 0x88B5
) -> bytes:
    return dst + src + ethertype.to_bytes(2, "big") + payload


def rndis_packet(data: bytes, *records: rndis.PerPacketInfo) -> bytes:
    return rndis.Packet(data, records).pack()
