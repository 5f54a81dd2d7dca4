"""A host and guests in one process, over real sockets and memfds: what the hypervisor's tests stand on."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from hypervisor import ChannelRefused, Hypervisor, OpenedChannel, Partition, Quotas
from hypervisor.privileges import GUEST
from netvsc.door import DoorClient
from netvsc.memory import PageAllocator
from netvsc.synic import Synic
from netvsc.vmbus import VmbusClient
from vswitch_wire import packet
from vswitch_wire.errors import WireError
from vswitch_wire.memory import drain_fd
from vswitch_wire.ring import RingReader, RingWriter
from vswitch_wire.vmbus import VmbusVersion

PAGE = 4096
CLASS = UUID("f8615163-df3e-46c5-913f-f2d2f965ed0e")


class EchoDevice:
    """Answers every in-band packet with its own payload; notes what is asked of it."""

    def __init__(self, instance_id: UUID | None = None) -> None:
        self.class_id = CLASS
        self.instance_id = instance_id or uuid4()
        self.sub_channel_limit = 3
        self.events: list[str] = []
        self.refuse = ""
        self.gate = asyncio.Event()
        self.gate.set()
        self.channels: dict[int, OpenedChannel] = {}
        self._rings: dict[int, tuple[RingReader, RingWriter]] = {}

    async def open(self, channel: OpenedChannel) -> None:
        self.events.append(f"open {channel.sub_channel_index}")
        await self.gate.wait()
        if self.refuse:
            raise ChannelRefused(self.refuse)
        split = channel.downstream_page_offset
        upstream, downstream = channel.ring_pfns[:split], channel.ring_pfns[split:]
        reader = RingReader(channel.memory.view(upstream, 0, len(upstream) * PAGE))
        writer = RingWriter(channel.memory.view(downstream, 0, len(downstream) * PAGE))
        self._rings[channel.relid] = reader, writer
        self.channels[channel.relid] = channel
        asyncio.get_running_loop().add_reader(channel.doorbell_fd, self._ring, channel)

    def _ring(self, channel: OpenedChannel) -> None:
        drain_fd(channel.doorbell_fd)
        reader, writer = self._rings[channel.relid]
        try:
            for raw in reader.read():
                received = packet.decode(raw)
                writer.write(packet.encode_inband(received.payload, received.transaction_id, False))
            reader.commit()
            if writer.commit():
                channel.interrupt.signal()
        except WireError as error:
            asyncio.get_running_loop().remove_reader(channel.doorbell_fd)
            channel.report_fault(str(error))

    async def close(self, channel: OpenedChannel) -> None:
        asyncio.get_running_loop().remove_reader(channel.doorbell_fd)
        await self.gate.wait()
        self.events.append(f"close {channel.sub_channel_index}")
        self._rings.pop(channel.relid, None)
        self.channels.pop(channel.relid, None)


class Guest:
    """One partition with its guest's side in this process."""

    def __init__(self, partition: Partition, door: DoorClient) -> None:
        self.partition = partition
        self.door = door
        self.offers: list[Any] = []
        self.rescinds: list[Any] = []
        self.auto_release = True

    async def attach(self) -> bool:
        """Both halves at once; whether it was a resume."""
        resumed, _ = await asyncio.gather(self.door.accept(), self.partition.attach(5))
        return resumed

    async def boot(self, version: VmbusVersion | None = VmbusVersion.COPPER) -> Guest:
        """Attach, SynIC, VMBus."""
        await self.attach()
        self.allocator = PageAllocator(self.door.regions)
        self.synic = Synic(self.door, self.allocator)
        await self.synic.start()
        self.vmbus = VmbusClient(self.door, self.synic, self.allocator)
        self.vmbus.on_offer = self.offers.append
        self.vmbus.on_rescind = self._rescinded
        if version is not None:
            await self.vmbus.connect(version)
        return self

    def _rescinded(self, offer: Any) -> None:
        self.rescinds.append(offer)
        if self.auto_release:
            self.vmbus.release(offer.relid)


class World:
    """A hypervisor and its guests."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.host = Hypervisor(engine=options.pop("engine", "python"), run_dir=directory, **options)
        self.guests: list[Guest] = []

    async def guest(
        self,
        name: str = "a",
        *,
        memory_bytes: int = 4 << 20,
        vp_count: int = 1,
        privileges: int = GUEST,
        quotas: Quotas | None = None,
    ) -> Guest:
        """A partition and the client behind its door, not attached yet."""
        partition = await self.host.create_partition(
            name, memory_bytes=memory_bytes, vp_count=vp_count, privileges=privileges, quotas=quotas
        )
        return self.adopt(partition)

    def adopt(self, partition: Partition) -> Guest:
        """A client for a partition that exists."""
        guest = Guest(partition, DoorClient(socket.socket(fileno=partition.listen())))
        self.guests.append(guest)
        return guest

    async def close(self) -> None:
        """Everything ends."""
        for guest in self.guests:
            guest.door.close()
        await self.host.close()


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until the condition holds; TimeoutError names nothing, the assertion at the call does."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)
