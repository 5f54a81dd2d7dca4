"""The VMBus server under any sequence of hypercalls, MSR writes, device and host actions: a stateful target.

The input is a program: each step is one byte that chooses and some that say how. Steps make well-formed
messages of the connection as it stands, so that runs get deep, or post raw bytes. After every step the rules
are checked: no exception but the protocol's own, bounded queues, every GPADL accounted for, devices opened
and closed in turn. At the end everything closes and nothing is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import struct
from typing import Any
from uuid import UUID

from hypervisor.clock import SystemClock
from hypervisor.hypercalls import dispatch
from hypervisor.privileges import GUEST
from hypervisor.quotas import Quotas
from hypervisor.synic import GeneralProtection, Synic
from hypervisor.vmbus import ChannelRefused, ChannelState, Offer, OpenedChannel, VmbusServer
from vswitch_wire import door, hypercall, synic, vmbus
from vswitch_wire.engine import Engine, guest_codecs, interrupt_class, memory_class
from vswitch_wire.errors import WireError
from vswitch_wire.gpadl import GpaRange, encode_gpadl
from vswitch_wire.hypercall import HvStatus
from vswitch_wire.memory import GuestMemory, Region, create_region, signal_shared_fd
from vswitch_wire.vmbus import VmbusVersion

PAGE = 4096
MEMORY_PAGES = 64
BLOCK = PAGE
"""Where the guest builds its hypercalls' input."""
VPS = 2
QUOTAS = Quotas(
    port_messages=4, queued_messages=6, channels=6, gpadls=6, gpadls_in_progress=2, gpadl_pages=48
)
STEPS = 200
VERSIONS = tuple(VmbusVersion)
LOOP = asyncio.new_event_loop()
MEMORY_FD = create_region("fuzz", MEMORY_PAGES * PAGE)


class Input:
    """The fuzzer's bytes, taken one by one; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        """The next `count` bytes, fewer at the end."""
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def byte(self) -> int:
        """One byte."""
        return self.take(1)[0] if self else 0

    def word(self) -> int:
        """Eight bytes, little-endian."""
        return int.from_bytes(self.take(8), "little")


class Device:
    """Opens and closes as the input says; asserts that the server keeps the order it promises."""

    def __init__(self, number: int) -> None:
        self.class_id = vmbus.NETWORK_CLASS_ID
        self.instance_id = UUID(int=number)
        self.sub_channel_limit = 2
        self.mood = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.opened: dict[int, OpenedChannel] = {}
        self.opening: set[int] = set()
        self.closing: set[int] = set()

    async def open(self, channel: OpenedChannel) -> None:
        """VmbusDevice."""
        index = channel.sub_channel_index
        assert index not in self.opened
        assert index not in self.opening | self.closing
        assert len(channel.ring_pfns) - channel.downstream_page_offset >= 2
        self.opening.add(index)
        try:
            mood, self.mood = self.mood, 0
            await self.gate.wait()
            if mood == 1:
                raise ChannelRefused("as the input says")
            if mood == 2:
                raise WireError("as the input says")
            self.opened[index] = channel
        finally:
            self.opening.discard(index)

    async def close(self, channel: OpenedChannel) -> None:
        """VmbusDevice."""
        index = channel.sub_channel_index
        assert self.opened.get(index) is channel
        assert index not in self.opening | self.closing
        self.closing.add(index)
        await self.gate.wait()
        self.closing.discard(index)
        del self.opened[index]


class Ledger:
    """What the guest was told about its GPADLs, against what the server holds."""

    def __init__(self, server: VmbusServer) -> None:
        self._server = server
        self._known: set[tuple[int, int]] = set()
        self._created: set[tuple[int, int]] = set()
        self._torn: list[int] = []
        self._released: set[int] = set()
        self._reset = False
        self._asked = self._answered = self._forgotten = 0
        server.tap.append(self._saw)

    def reset(self) -> None:
        """The connection or the door ends: what it had is forgotten without an answer."""
        self._reset = True

    def _saw(self, direction: str, payload: bytes, _: int) -> None:
        try:
            message = vmbus.decode(payload)
        except WireError:
            assert direction == "in", "the server sent what it cannot read itself"
            return
        if direction == "in":
            if isinstance(message, vmbus.InitiateContact | vmbus.Unload):
                self._reset = True
            elif isinstance(message, vmbus.RelidReleased):
                self._released.add(message.relid)
            elif isinstance(message, vmbus.GpadlHeader) and self._server.connection is not None:
                self._asked += 1
        elif isinstance(message, vmbus.GpadlCreated):
            self._answered += 1
            if message.status == 0:
                assert (message.relid, message.gpadl_id) not in self._created
                self._created.add((message.relid, message.gpadl_id))
        elif isinstance(message, vmbus.GpadlTorndown):
            self._torn.append(message.gpadl_id)

    def check(self) -> None:
        """After a step."""
        table = self._server.gpadls
        held = table._gpadls
        assert table.pages == sum(entry.pages for entry in held.values()) <= QUOTAS.gpadl_pages
        assert len(table) <= QUOTAS.gpadls
        assert table._assembler.in_progress <= QUOTAS.gpadls_in_progress
        assert set(held) - self._known <= self._created, "a GPADL that the guest was not told of"
        for relid, gpadl_id in (self._known | self._created) - set(held):
            assert self._reset or gpadl_id in self._torn or relid in self._released, "a GPADL vanished"
        forgotten = self._asked - self._answered - table._assembler.in_progress
        assert forgotten >= 0
        assert forgotten == self._forgotten or self._reset or self._released, "a GPADL has no answer"
        busy = {entry.relid for entry in self._server.channels if entry.opened is not None}
        for (relid, _), entry in held.items():
            assert not entry.uses or relid in busy, "a GPADL is held for a channel that is closed"
        self._known, self._created, self._torn = set(held), set(), []
        self._forgotten = forgotten
        self._released.clear()
        self._reset = self._server.resetting


class Bench:
    """One partition without its door: SynIC, server and devices, driven from both sides."""

    id = 2
    privileges = GUEST

    def __init__(self, engine: Engine) -> None:
        self.codecs = guest_codecs(engine)
        self.memory: GuestMemory = memory_class(engine)([Region(0, MEMORY_PAGES * PAGE, MEMORY_FD)])
        self.outstanding: list[tuple[int, int]] = []
        self.synic = Synic(VPS, GUEST, engine, SystemClock(), self._deliver, lambda: None)
        self.synic.memory = self.memory
        self.server = VmbusServer(
            "fuzz",
            self.synic,
            QUOTAS,
            SystemClock(),
            self._doorbell,
            lambda: None,
            codecs=self.codecs,
        )
        self.doorbells: dict[int, int] = {}
        self.ledger = Ledger(self.server)
        self.devices = [Device(number) for number in range(3)]
        self.offers: dict[int, Offer] = {}
        self.tasks: list[asyncio.Task[Any]] = []
        self.parts: list[vmbus.GpadlHeader | vmbus.GpadlBody] = []
        self.server.attached()
        for msr, value in (
            (synic.HV_X64_MSR_SIMP, 3 * PAGE | 1),
            (synic.HV_X64_MSR_SIEFP, 4 * PAGE | 1),
            (synic.HV_X64_MSR_SINT0 + 2, 0x50),
            (synic.HV_X64_MSR_SCONTROL, 1),
        ):
            self.synic.write_msr(0, msr, value)

    def _deliver(self, message: door.Deliver) -> bool:
        assert (message.vp, message.sint) not in self.outstanding, "a second message in one slot"
        self.outstanding.append((message.vp, message.sint))
        return True

    def _doorbell(self, connection_id: int, fd: int | None) -> None:
        if fd is not None:
            os.fstat(fd)

    # --- what a hypercall may ask (hypervisor.hypercalls.Caller) ---

    def post_message(self, connection_id: int, message_type: int, payload: bytes) -> HvStatus:
        """HvCallPostMessage."""
        return self.server.post_message(connection_id, message_type, payload)

    def signal_event(self, connection_id: int) -> HvStatus:
        """HvCallSignalEvent."""
        return self.server.signal_event(connection_id)

    def create_child(self) -> int:
        """Guests have not the privilege: never called."""
        raise AssertionError("a guest created a partition")

    def finalize_child(self, partition_id: int) -> None:
        """HvCallFinalizePartition."""

    def delete_child(self, partition_id: int) -> None:
        """HvCallDeletePartition."""

    def property_of(self, partition_id: int, code: int) -> int:
        """HvCallGetPartitionProperty."""
        return code

    # --- steps ---

    def call(self, registers: door.Hypercall) -> None:
        """One hypercall: whatever it holds there is a result."""
        result = dispatch(self, registers)
        assert HvStatus(result.rax & 0xFFFF) in HvStatus

    def post(self, payload: bytes, connection: int | None = None) -> None:
        """HvCallPostMessage, by its 256-byte block in memory."""
        if connection is None:
            known = self.server.connection
            connection = 1 if known is None or known.version < VmbusVersion.WIN10_RS3_1 else 4
        block = struct.pack("<IIII", connection, 0, 1, len(payload)) + payload[:240].ljust(240, b"\0")
        self.memory.write(BLOCK, block)
        self.call(door.Hypercall(0, hypercall.HvCallPostMessage, BLOCK))

    def relid(self, choice: int) -> int:
        """A relid the guest knows, or nearly."""
        known = [entry.relid for entry in self.server.channels]
        return known[choice % len(known)] if known and choice < 0xF0 else choice

    def spawn(self, work: Any) -> None:
        """A host's request that may take its time."""
        self.tasks.append(LOOP.create_task(work))

    async def turns(self, count: int) -> None:
        """Some turns of the loop."""
        for _ in range(count):
            await asyncio.sleep(0)

    async def step(self, source: Input) -> None:
        """One step of the program."""
        kind = source.byte()
        choice, more = source.byte(), source.byte()
        match kind % 20:
            case 0:
                self.post(source.take(choice % 241), more)
            case 1:
                version = VERSIONS[choice % len(VERSIONS)]
                # Far enough for the next message to be taken.
                target = vmbus.InitiateContact.target(2 + more % 3, 0, more)
                self.post(vmbus.InitiateContact(version, more % 3, target).pack(), 4 if choice & 0x80 else 1)
                await self.turns(4)
            case 2:
                self.post(vmbus.RequestOffers().pack())
            case 3 | 4:
                pages = 1 + more % 40
                range_ = GpaRange(pages * PAGE - (more & 1), 0, tuple(range(20, 20 + pages)))
                self.parts = list(encode_gpadl(self.relid(choice), 1 + choice % 5, (range_,)))
                self.post(self.parts.pop(0).pack())
            case 5:
                if self.parts:
                    self.post(self.parts.pop(0 if more < 0x80 else -1).pack())
            case 6 | 7:
                vp = (0, 1, vmbus.TARGET_VP_DISABLED, 7)[more >> 6]
                self.post(
                    vmbus.OpenChannel(self.relid(choice), more, 1 + choice % 5, vp, 2 + more % 8).pack()
                )
            case 8:
                self.post(vmbus.CloseChannel(self.relid(choice)).pack())
            case 9:
                self.post(vmbus.GpadlTeardown(self.relid(choice), 1 + more % 5).pack())
            case 10:
                self.post(vmbus.RelidReleased(self.relid(choice)).pack())
            case 11:
                self.post(vmbus.ModifyChannel(self.relid(choice), more % 4).pack())
            case 12:
                self.post(
                    (vmbus.Unload() if choice & 1 else vmbus.TlConnectRequest(*[UUID(int=1)] * 2)).pack()
                )
            case 13:
                for _ in range(1 + more % 8):
                    if self.outstanding:
                        self.synic.end_of_message(*self.outstanding.pop(choice % len(self.outstanding)))
            case 14:
                await self.turns(choice % 8)
            case 15:
                self._write_msr(choice, more, source)
            case 16:
                self._device(self.devices[choice % 3], more, source)
            case 17:
                self._host(choice % 3, more)
            case 18:
                if choice & 1:
                    self.ledger.reset()
                    await self._detach()
                else:
                    self.call(door.Hypercall(more, source.word(), source.word(), source.word()))
            case _:
                self.memory.write(BLOCK, source.take(choice))
                self.call(
                    door.Hypercall(0, hypercall.HvCallPostMessage if more & 1 else more, BLOCK, 2 * PAGE)
                )

    def _write_msr(self, choice: int, more: int, source: Input) -> None:
        value = (1, 0, 3 * PAGE | 1, 4 * PAGE | 1, 0x50, 0x10050, 1 << 63, source.word())[more % 8]
        msr = (
            synic.HV_X64_MSR_SCONTROL,
            synic.HV_X64_MSR_SIMP,
            synic.HV_X64_MSR_SIEFP,
            synic.HV_X64_MSR_SINT0 + 2,
            synic.HV_X64_MSR_SINT0 + 3,
            synic.HV_X64_MSR_GUEST_OS_ID,
            synic.HV_X64_MSR_EOM,
            synic.HV_X64_MSR_HYPERCALL,
            0x40000000 + more,
        )[choice % 9]
        try:
            self.synic.write_msr(choice >> 6, msr, value)
            self.synic.read_msr(choice >> 6, msr)
        except GeneralProtection:
            pass

    def _device(self, device: Device, more: int, source: Input) -> None:
        if more % 6 == 0:
            device.mood = more >> 4 & 3
        elif more % 6 == 1:
            device.gate.clear()
        elif more % 6 == 2:
            device.gate.set()
        for channel in list(device.opened.values()):
            if channel.sub_channel_index in device.closing:
                continue
            if more % 6 == 3:
                with contextlib.suppress(WireError):
                    channel.gpadl(1 + source.byte() % 5)
            elif more % 6 == 4:
                channel.release_gpadl(1 + source.byte() % 5)
            elif more % 6 == 5:
                channel.report_fault("as the input says")
        primary = device.opened.get(0)
        if more % 6 == 0 and more & 0x80 and primary is not None and 0 not in device.closing:
            primary.offer_sub_channels(1 + (more >> 6 & 1))

    def _host(self, number: int, more: int) -> None:
        offer = self.offers.pop(number, None)
        if offer is not None:
            self.spawn(self.server.rescind(offer))
            return
        if any(entry.device is self.devices[number] for entry in self.server.channels):
            return  # still being taken away
        self.spawn(self._offer(number))

    async def _offer(self, number: int) -> None:
        # No relid may be left, and the device may have been offered meanwhile.
        with contextlib.suppress(RuntimeError, ValueError):
            self.offers[number] = await self.server.offer(self.devices[number])

    async def _detach(self) -> None:
        """The door breaks and comes back."""
        for device in self.devices:
            device.gate.set()
        await self.server.detached()
        self.synic.door_lost()
        self.outstanding.clear()
        self.server.resumed()

    def check(self) -> None:
        """The rules that hold after every step."""
        server = self.server
        self.ledger.check()
        assert len(server._queue) <= QUOTAS.port_messages
        # One message is taken while there is room; its answers may be one per channel and GPADL.
        assert self.synic.queued() <= QUOTAS.queued_messages + 4 * (QUOTAS.channels + QUOTAS.gpadls)
        assert len(server.channels) <= QUOTAS.channels
        for channel in server.channels:
            assert 1 <= channel.relid <= vmbus.MAXIMUM_RELID
            assert (channel.opened is None) == (channel.interrupt is None)
            assert (channel.opened is None) == (channel.state is ChannelState.CLOSED)
            assert len(channel.faults) <= 16
            same = [entry for entry in server.channels if entry.key[:2] == channel.key[:2]]
            # Two rounds that the guest has not released, the one that made it too many, and those in use.
            assert len(same) <= 1 + 4 * self.devices[0].sub_channel_limit
            if channel.sub_channel_index and channel.opened is not None and not server.resetting:
                primaries = [entry for entry in server.channels if entry.key == (*channel.key[:2], 0)]
                assert primaries, "a sub-channel outlives its primary"
                primary = primaries[0]
                assert primary.opened or primary.task or primary.revoking, "a sub-channel of a closed primary"
        for task in [task for task in self.tasks if task.done()]:
            self.tasks.remove(task)
            task.result()

    async def end(self) -> None:
        """Everything closes; nothing is left."""
        for device in self.devices:
            device.gate.set()
        if self.tasks:
            await asyncio.wait(self.tasks)
        self.ledger.reset()
        await self.server.close()
        await self.turns(4)
        self.check()
        assert not self.server.channels
        assert len(self.server.gpadls) == 0
        for device in self.devices:
            assert not device.opened
            assert not device.opening | device.closing
        self.synic.close()
        assert not self.synic._bound
        self.memory.close()


async def _run(data: bytes, engine: Engine) -> None:
    bench = Bench(engine)
    for number in range(2):
        await bench._offer(number)
    source = Input(data)
    for _ in range(STEPS):
        if not source:
            break
        await bench.step(source)
        bench.check()
    await bench.end()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@functools.cache
def _settle(engine: Engine) -> None:
    """Opens what the process keeps once it has signalled."""
    memory = memory_class(engine)([Region(0, MEMORY_PAGES * PAGE, MEMORY_FD)])
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    interrupt = interrupt_class(engine)(memory, fd)
    interrupt.signal()
    interrupt.close()
    memory.close()
    signal_shared_fd(fd)
    os.close(fd)


def vmbus_server(data: bytes, engine: Engine = "python") -> None:
    """Runs one program against a server of its own."""
    failures: list[dict[str, Any]] = []
    LOOP.set_exception_handler(lambda _, context: failures.append(context))
    _settle(engine)
    before = set(os.listdir("/proc/self/fd"))
    LOOP.run_until_complete(_run(data, engine))
    assert not failures, failures
    left = set(os.listdir("/proc/self/fd")) - before
    assert not left, f"left open: {[os.readlink(f'/proc/self/fd/{name}') for name in left]}"
