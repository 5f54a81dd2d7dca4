"""A guest in the test's own process that drives one NIC by hand: the test spells every byte, bad ones too."""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
from typing import Any
from uuid import UUID

from netns_guests import World

from hypervisor import Partition, Quotas
from netvsc.door import DoorClient
from netvsc.memory import PageAllocator
from netvsc.synic import Synic
from netvsc.vmbus import GuestChannel, VmbusClient
from netvsp.nic import SyntheticNic
from vswitch_wire import nvsp, packet, rndis
from vswitch_wire.gpadl import GpaRange
from vswitch_wire.memory import signal_fd
from vswitch_wire.ring import RingReader, RingWriter
from vswitch_wire.rndis import RndisMessage

PAGE = 4096
MEMORY = 8 << 20
RING_PAGES = 16
RECEIVE_ID = 0xCAFE
OID_GEN_CURRENT_PACKET_FILTER = 0x0001010E


class RawNic:
    """One partition, one NIC, no interface. `boot()` to VMBus, `up()` to a set packet filter."""

    def __init__(self, lab: World, name: str, partition: Partition, mac: bytes) -> None:
        self.lab = lab
        self.name = name
        self.partition = partition
        self.mac = mac
        self.rescinded = asyncio.Event()
        self.frames: list[bytes] = []
        self._control: list[RndisMessage] = []
        self._completions: dict[int, bytes] = {}
        self._progress = asyncio.Event()
        self._ids = itertools.count(1)

    @classmethod
    async def boot(cls, lab: World, name: str, number: int, *, quotas: Quotas | None = None) -> RawNic:
        """A new partition on the lab's switch, its VMBus connected and its NIC offered."""
        partition = await lab.hypervisor.create_partition(name, memory_bytes=MEMORY, quotas=quotas)
        mac = bytes.fromhex(f"02155d00ff{number:02x}")
        self = cls(lab, name, partition, mac)
        self.port = lab.switch.add_port(name)
        self.nic = SyntheticNic(f"{name}-eth0", mac, UUID(int=0xE00 + number), self.port, engine=lab.engine)
        await partition.vmbus.offer(self.nic)
        self.door = DoorClient(socket.socket(fileno=partition.listen()))
        await asyncio.gather(self.door.accept(), partition.attach())
        self.allocator = PageAllocator(self.door.regions)
        self.synic = Synic(self.door, self.allocator)
        await self.synic.start()
        self.vmbus = VmbusClient(self.door, self.synic, self.allocator)
        self.vmbus.on_rescind = self._on_rescind
        await self.vmbus.connect()
        (self.offer,) = self.vmbus.offers.values()
        return self

    def _on_rescind(self, offer: Any) -> None:
        self.rescinded.set()
        self.vmbus.release(offer.relid)

    async def open(self) -> GuestChannel:
        """The channel alone."""
        self.channel = await self.vmbus.open(self.offer, ring_pages=RING_PAGES)
        pages = self.channel.ring_pfns
        memory = self.channel.memory
        self.writer = RingWriter(memory.view(pages[:RING_PAGES], 0, RING_PAGES * PAGE))
        self.reader = RingReader(memory.view(pages[RING_PAGES:], 0, RING_PAGES * PAGE))
        self.channel.on_interrupt = self._interrupted
        return self.channel

    async def up(self) -> RawNic:
        """Open, NVSP 6.1, both buffers, RNDIS, packet filter."""
        await self.open()
        version = nvsp.NvspVersion.V61
        answer = nvsp.decode(await self.ask(nvsp.Init(version, version).pack(40)), completion=True)
        assert isinstance(answer, nvsp.InitComplete)
        assert answer.status == 1
        self.put(packet.encode_inband(nvsp.SendNdisConfig(1514, 3).pack(40), next(self._ids), False))
        self.put(packet.encode_inband(nvsp.SendNdisVersion(6, 30).pack(40), next(self._ids), False))
        self.receive_pages = self.allocator.alloc(256)
        gpadl = await self.vmbus.create_gpadl(self.offer.relid, self.receive_pages)
        shared = nvsp.decode(
            await self.ask(nvsp.SendReceiveBuffer(gpadl, RECEIVE_ID).pack(40)), completion=True
        )
        assert isinstance(shared, nvsp.SendReceiveBufferComplete)
        assert shared.status == 1
        self.send_pages = self.allocator.alloc(64)
        gpadl = await self.vmbus.create_gpadl(self.offer.relid, self.send_pages)
        sent = nvsp.decode(await self.ask(nvsp.SendSendBuffer(gpadl, 0).pack(40)), completion=True)
        assert isinstance(sent, nvsp.SendSendBufferComplete)
        assert sent.status == 1
        await self.request(rndis.Initialize(1))
        await self.request(rndis.Set(2, OID_GEN_CURRENT_PACKET_FILTER, (0x0D).to_bytes(4, "little")))
        return self

    def put(self, encoded: bytes) -> None:
        """One packet into the ring, the host signalled."""
        assert self.writer.write(encoded), f"{self.name}: the ring is full"
        if self.writer.commit():
            signal_fd(self.channel.signal_fd)

    async def ask(self, payload: bytes) -> bytes:
        """An in-band packet and its completion's payload."""
        number = next(self._ids)
        self.put(packet.encode_inband(payload, number, True))
        return await self.completion(number)

    async def completion(self, number: int) -> bytes:
        """The payload of the completion of packet `number`."""
        async with asyncio.timeout(10):
            while number not in self._completions:
                self._progress.clear()
                await self._progress.wait()
        return self._completions.pop(number)

    async def request(self, message: RndisMessage) -> RndisMessage:
        """An RNDIS control message and its answer."""
        data = message.pack()
        self.channel.memory.write(self.send_pages[0] * PAGE, data)
        await self.ask(nvsp.SendRndisPacket(1, 0, len(data)).pack(40))
        async with asyncio.timeout(10):
            while not self._control:
                self._progress.clear()
                await self._progress.wait()
        return self._control.pop(0)

    def transmit(self, at: int, frame: bytes) -> int:
        """Send a frame that stays in this guest's memory at guest-physical address `at`; the packet's id."""
        message = rndis.Packet(frame, ()).pack()
        self.channel.memory.write(at, message)
        number = next(self._ids)
        entry = GpaRange(len(message), at % PAGE, (at // PAGE,))
        body = nvsp.SendRndisPacket(0, nvsp.NVSP_INVALID_SECTION_INDEX, 0).pack(32)
        self.put(packet.encode_gpa_direct(number, (entry,), body))
        return number

    def _interrupted(self) -> None:
        while packets := self.reader.read():
            self._take(packets)
            if self.reader.commit():
                signal_fd(self.channel.signal_fd)
        self._progress.set()

    def _take(self, packets: list[bytes]) -> None:
        for raw in packets:
            item = packet.decode(raw)
            if item.type == packet.VM_PKT_COMP:
                self._completions[item.transaction_id] = item.payload
            elif item.type == packet.VM_PKT_DATA_USING_XFER_PAGES:
                for piece in item.transfer_ranges:
                    self._received(piece.byte_offset, piece.byte_count)
                done = nvsp.SendRndisPacketComplete(1).pack(32)
                self.put(packet.encode_completion(item.transaction_id, done))

    def _received(self, offset: int, length: int) -> None:
        view = self.channel.memory.view(self.receive_pages, 0, len(self.receive_pages) * PAGE)
        data = view.read(offset, length)
        if struct.unpack_from("<I", data)[0] == 1:
            self.frames.append(bytes(rndis.Packet.unpack(data).data))
        else:
            message = rndis.decode(data)
            if not isinstance(message, rndis.IndicateStatus):
                self._control.append(message)

    async def close(self) -> None:
        """The partition goes."""
        self.door.close()
        await self.partition.delete()
