"""The guest's half of the SynIC: message slots and event flags in its own memory (TLFS, Inter-Partition
Communication).

What a hypervisor does in virtual-processor context on a real machine - write the slot, obeying the slot
rule - this half does for the host, and then reads the slot as a kernel's driver would.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable

from netvsc.door import DoorClient
from netvsc.memory import PAGE, PageAllocator
from vswitch_wire import door, synic
from vswitch_wire.memory import drain_fd
from vswitch_wire.ring import full_fence
from vswitch_wire.vmbus import VMBUS_MESSAGE_SINT

# An open-source system (bit 63) of no registered type: neither Linux nor another that hosts know quirks of.
GUEST_OS_ID = 1 << 63 | 0x7F << 56 | 1
VECTOR = 0x50


class Synic:
    """SynIC of all virtual processors."""

    def __init__(self, client: DoorClient, allocator: PageAllocator) -> None:
        self._door = client
        self._allocator = allocator
        self._loop = asyncio.get_running_loop()
        self._memory = client.memory
        self._simp: list[int] = []
        self._siefp: list[int] = []
        self._waiting: dict[tuple[int, int], deque[bytes]] = {}
        self._eventfds: dict[int, int] = {}
        self._reading: dict[int, int] = {}
        self._taken: set[int] = set()
        self.on_message: Callable[[synic.Message], None] = lambda message: None
        """Each VMBus message, copied out of its slot."""
        self.on_flags: Callable[[set[int]], None] = lambda flags: None
        """Event flags that were set; empty after a wake-up without any."""
        client.on_deliver = self._deliver
        client.on_eventfd = self._eventfd
        client.on_lost.append(self._door_lost)
        client.on_resumed.append(self._resumed)
        client.on_replaced.append(self.close)

    async def start(self) -> None:
        """Set GUEST_OS_ID, the hypercall page, and per VP the message page, flag page, SINT 2 and
        SCONTROL.
        """
        write = self._door.write_msr
        self._hypercall_page = self._page()
        await write(0, synic.HV_X64_MSR_GUEST_OS_ID, GUEST_OS_ID)
        await write(0, synic.HV_X64_MSR_HYPERCALL, synic.PageRegister(True, self._hypercall_page).pack())
        for vp in range(self._door.vp_count):
            simp, siefp = self._page(), self._page()
            self._simp.append(simp)
            self._siefp.append(siefp)
            await write(vp, synic.HV_X64_MSR_SIMP, synic.PageRegister(True, simp).pack())
            await write(vp, synic.HV_X64_MSR_SIEFP, synic.PageRegister(True, siefp).pack())
            await write(vp, synic.HV_X64_MSR_SINT0 + VMBUS_MESSAGE_SINT, synic.Sint(VECTOR).pack())
            await write(vp, synic.HV_X64_MSR_SCONTROL, synic.HV_SYNIC_ENABLE)
        self._read_interrupts()

    def _page(self) -> int:
        (pfn,) = self._allocator.alloc(1)
        self._memory.write(pfn * PAGE, bytes(PAGE))
        return pfn * PAGE

    # --- messages ---

    def _deliver(self, message: door.Deliver) -> None:
        if message.vp >= len(self._simp):
            return
        self._waiting.setdefault((message.vp, message.sint), deque()).append(message.message)
        self._fill(message.vp, message.sint)

    def _fill(self, vp: int, sint: int) -> None:
        waiting = self._waiting.get((vp, sint))
        slot = self._simp[vp] + sint * synic.HV_MESSAGE_SIZE
        while waiting and self._memory.load_u32(slot) == synic.HVMSG_NONE:
            message = waiting.popleft()
            # The type word last: it is what makes the slot full.
            self._memory.write(slot + 4, message[4:])
            full_fence()
            self._memory.store_u32(slot, int.from_bytes(message[:4], "little"))
            self._take(vp, sint, slot)

    def _take(self, vp: int, sint: int, slot: int) -> None:
        """The driver's part: copy the message out, empty the slot, end the message."""
        message = synic.Message.unpack(self._memory.read(slot, synic.HV_MESSAGE_SIZE))
        self._memory.store_u32(slot, synic.HVMSG_NONE)
        full_fence()
        if self._door.connected:
            self._door.send(door.Eom(vp, sint))
        if message.type == synic.HVMSG_VMBUS and sint == VMBUS_MESSAGE_SINT:
            self.on_message(message)

    # --- events to the host ---

    def _eventfd(self, connection_id: int, fd: int | None) -> None:
        old = self._eventfds.pop(connection_id, None)
        if old is not None:
            os.close(old)
        if fd is not None:
            self._eventfds[connection_id] = fd

    def eventfd(self, connection_id: int) -> int:
        """The eventfd that signals this connection; the SynIC's, valid until the channel is closed.

        KeyError.
        """
        return self._eventfds[connection_id]

    # --- events from the host ---

    def siefp_gpa(self, vp: int) -> int:
        """Guest-physical address of the VP's event flag page."""
        return self._siefp[vp]

    def take_interrupt(self, vp: int) -> int:
        """Hand the VP's interrupt eventfd to somebody who reads it from now on (not closes it) and
        clears flags.

        After a resume there is a new one: take it again. Flags of relids that are not the taker's go to
        `dispatch_flags()`.
        """
        self._taken.add(vp)
        self._stop_reading(vp)
        return self._door.interrupts[vp]

    def give_back_interrupt(self, vp: int) -> None:
        """The taker is done."""
        self._taken.discard(vp)
        self._read_interrupts()

    def dispatch_flags(self, flags: set[int]) -> None:
        """Flags that somebody else took off the page."""
        self.on_flags(flags)

    def _read_interrupts(self) -> None:
        for vp, fd in enumerate(self._door.interrupts[: len(self._siefp)]):
            if vp not in self._taken and vp not in self._reading:
                self._reading[vp] = fd
                self._loop.add_reader(fd, self._interrupt, vp, fd)
                # Whatever was set before anybody read.
                self._loop.call_soon(self._interrupt, vp, fd)

    def _stop_reading(self, vp: int) -> None:
        fd = self._reading.pop(vp, None)
        if fd is not None:
            self._loop.remove_reader(fd)

    def _interrupt(self, vp: int, fd: int) -> None:
        if self._reading.get(vp) != fd:
            return
        drain_fd(fd)
        block = self._siefp[vp] + VMBUS_MESSAGE_SINT * synic.HV_EVENT_FLAGS_BYTE_COUNT
        flags = self._memory.take_flags(block, synic.HV_EVENT_FLAGS_BYTE_COUNT)
        self.on_flags(
            {
                index * 8 + bit
                for index, byte in enumerate(flags)
                if byte
                for bit in range(8)
                if byte >> bit & 1
            }
        )

    # --- loss and resume ---

    def _door_lost(self, reason: str) -> None:
        for vp in list(self._reading):
            self._stop_reading(vp)
        self._taken.clear()
        self._waiting.clear()
        for fd in self._eventfds.values():
            os.close(fd)
        self._eventfds.clear()

    def _resumed(self) -> None:
        self._read_interrupts()

    def close(self) -> None:
        """Take no more part in the door's life (a fresh partition replaces this one)."""
        self._door_lost("")
        if self._door_lost in self._door.on_lost:
            self._door.on_lost.remove(self._door_lost)
        if self._resumed in self._door.on_resumed:
            self._door.on_resumed.remove(self._resumed)
