"""A host and guests in one process, over real sockets and memfds: what the hypervisor's tests stand on."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from hypervisor import ChannelRefused, Hypervisor, OpenedChannel, Partition, Quotas
from hypervisor.privileges import GUEST
from netvsc.door import DoorClient
from netvsc.memory import PageAllocator
from netvsc.synic import Synic
from netvsc.vmbus import VmbusClient
from vswitch_wire import door as wire
from vswitch_wire import hypercall, packet, synic, vmbus
from vswitch_wire.errors import WireError
from vswitch_wire.memory import GuestMemory, Region, drain_fd
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
        while not condition():  # noqa: ASYNC110 - conditions of any kind
            await asyncio.sleep(0.001)


class RawGuest:
    """A guest's side that sends whatever bytes a test wants, over a blocking-free socket."""

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.listener = socket.socket(fileno=partition.listen())
        self.listener.setblocking(False)
        self.sock: socket.socket | None = None
        self.hello: wire.Hello | None = None
        self.hello_sequence = 0
        self.fds: list[int] = []
        self.delivered: list[wire.Deliver] = []

    async def accept(self) -> wire.Hello:
        """Take the connection and the HELLO, without an answer."""
        loop = asyncio.get_running_loop()
        self.sock, _ = await loop.sock_accept(self.listener)
        self.sock.setblocking(False)
        sequence, message, fds = await self.receive()
        assert isinstance(message, wire.Hello)
        self.hello, self.hello_sequence, self.fds = message, sequence, fds
        return message

    async def attach(self) -> RawGuest:
        """Accept and answer as a good guest does; memory is mapped."""
        attaching = asyncio.ensure_future(self.partition.attach(5))
        hello = await self.accept()
        self.send(wire.HelloAck(), self.hello_sequence)
        await attaching
        pairs = zip(hello.regions, self.fds, strict=False)
        regions = [Region(entry.gpa, entry.size, fd) for entry, fd in pairs]
        self.memory = GuestMemory(regions)
        return self

    def send(self, message: wire.DoorMessage, sequence: int = 0, fds: list[int] | None = None) -> None:
        """One good frame."""
        self.send_bytes(wire.pack(message, sequence), fds)

    def send_bytes(self, frame: bytes, fds: list[int] | None = None) -> None:
        """One frame of any bytes."""
        assert self.sock is not None
        socket.send_fds(self.sock, [frame], fds or [])

    async def receive(self) -> tuple[int, wire.DoorMessage, list[int]]:
        """The next frame. EOFError at the end."""
        assert self.sock is not None
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self.sock, readable.set)
        try:
            async with asyncio.timeout(5):
                await readable.wait()
        finally:
            loop.remove_reader(self.sock)
        data, fds, _, _ = socket.recv_fds(self.sock, wire.MAX_FRAME, 80)
        if not data:
            raise EOFError
        sequence, message = wire.decode(data)
        return sequence, message, fds

    async def error(self) -> wire.DoorError:
        """The ERROR frame that ends this door, and the end behind it."""
        while True:
            _, message, _ = await self.receive()
            if isinstance(message, wire.DoorError):
                with pytest.raises((EOFError, ConnectionError)):
                    await self.receive()
                return message

    async def ask(self, message: wire.DoorMessage, sequence: int = 1) -> Any:
        """A request and its answer."""
        self.send(message, sequence)
        while True:
            answered, answer, _ = await self.receive()
            if answered == sequence and not isinstance(answer, wire.Deliver | wire.EventFd):
                return answer

    async def call(self, code: int, block: bytes = b"", *, fast: bool = False, output: int = 0) -> int:
        """A hypercall with its input at page 1 (or in registers); the status."""
        if fast:
            words = struct.unpack("<QQ", block.ljust(16, b"\0"))
            message = wire.Hypercall(0, code | 1 << 16, *words)
        else:
            self.memory.write(PAGE, block)
            message = wire.Hypercall(0, code, PAGE if block else 0, output)
        result = await self.ask(message)
        return int(result.rax) & 0xFFFF

    async def start_synic(self) -> RawGuest:
        """Message page at 3, flag page at 4, SINT 2 unmasked."""
        for msr, value in (
            (synic.HV_X64_MSR_GUEST_OS_ID, 1 << 63),
            (synic.HV_X64_MSR_SIMP, 3 * PAGE | 1),
            (synic.HV_X64_MSR_SIEFP, 4 * PAGE | 1),
            (synic.HV_X64_MSR_SINT0 + 2, 0x50),
            (synic.HV_X64_MSR_SCONTROL, 1),
        ):
            answer = await self.ask(wire.MsrWrite(0, msr, value))
            assert not answer.fault
        return self

    async def post(self, message: vmbus.ChannelMessage | bytes, connection: int = 1) -> int:
        """HvCallPostMessage with a channel message; the status. What comes meanwhile is in `delivered`."""
        payload = message if isinstance(message, bytes) else message.pack()
        self.memory.write(PAGE, hypercall.PostMessage(connection, 1, payload).pack())
        self.send(wire.Hypercall(0, hypercall.HvCallPostMessage, PAGE), 77)
        while True:
            sequence, answer, fds = await self.receive()
            if sequence == 77 and isinstance(answer, wire.HypercallResult):
                return answer.rax & 0xFFFF
            self._note(answer, fds)

    def _note(self, answer: wire.DoorMessage, fds: list[int]) -> None:
        self.fds.extend(fds)
        if isinstance(answer, wire.Deliver):
            self.delivered.append(answer)

    async def message(self, *, eom: bool = True) -> vmbus.ChannelMessage:
        """The next channel message from the host, ended at once unless told otherwise."""
        while not self.delivered:
            _, answer, fds = await self.receive()
            self._note(answer, fds)
        delivered = self.delivered.pop(0)
        if eom:
            self.send(wire.Eom(delivered.vp, delivered.sint))
        return vmbus.decode(synic.Message.unpack(delivered.message).payload)

    async def contact(self, version: int = vmbus.VmbusVersion.WIN10, **more: Any) -> vmbus.VersionResponse:
        """INITIATE_CONTACT and its answer."""
        message = vmbus.InitiateContact(version, more.pop("target_vp", 0), more.pop("target", 2), **more)
        assert await self.post(message, 4 if version >= vmbus.VmbusVersion.WIN10_RS3_1 else 1) == 0
        answer = await self.message()
        assert isinstance(answer, vmbus.VersionResponse)
        return answer

    async def silent(self, seconds: float = 0.05) -> bool:
        """Whether the host sends nothing for a while."""
        try:
            async with asyncio.timeout(seconds):
                while not self.delivered:
                    _, answer, fds = await self.receive()
                    self._note(answer, fds)
            return False
        except TimeoutError:
            return True

    def close(self) -> None:
        """Die."""
        for entry in (self.sock, self.listener):
            if entry is not None:
                entry.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []
