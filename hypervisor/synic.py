"""The host's half of the SynIC: MSRs, message queues with the slot rule, where event flags live (TLFS,
Inter-Partition Communication).

The host never writes a message slot. It hands a message to the guest's side (DELIVER) and takes the next
one of that (VP, SINT) only after EOM. Event flags it does set itself, in the guest's SIEFP page, through
`Interrupt` objects that follow the guest's MSR writes.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from typing import Any

from hypervisor.clock import Clock
from vswitch_wire import door, hypercall, synic
from vswitch_wire.engine import Engine, interrupt_class
from vswitch_wire.errors import MemoryAccessError, WireError
from vswitch_wire.memory import GuestMemory, Interrupt

_log = logging.getLogger("hypervisor.synic")

_PRIVILEGE_OF_MSR = {
    synic.HV_X64_MSR_GUEST_OS_ID: hypercall.PRIVILEGE_ACCESS_HYPERCALL_MSRS,
    synic.HV_X64_MSR_HYPERCALL: hypercall.PRIVILEGE_ACCESS_HYPERCALL_MSRS,
    synic.HV_X64_MSR_VP_INDEX: hypercall.PRIVILEGE_ACCESS_VP_INDEX,
    synic.HV_X64_MSR_TIME_REF_COUNT: hypercall.PRIVILEGE_ACCESS_PARTITION_REFERENCE_COUNTER,
    **dict.fromkeys(
        range(synic.HV_X64_MSR_SCONTROL, synic.HV_X64_MSR_EOM + 1), hypercall.PRIVILEGE_ACCESS_SYNIC_REGS
    ),
    **dict.fromkeys(
        range(synic.HV_X64_MSR_SINT0, synic.HV_X64_MSR_SINT15 + 1), hypercall.PRIVILEGE_ACCESS_SYNIC_REGS
    ),
}
_PAGE = 4096
_HYPERCALL_LOCKED = 2
_SINT_BITS = 0xFF | synic.HV_SINT_MASKED | synic.HV_SINT_AUTO_EOI | synic.HV_SINT_POLLING


class GeneralProtection(Exception):
    """The MSR access raises #GP in the guest."""


class BoundInterrupt:
    """A channel's interrupt: follows the guest's SIEFP and SINT registers, and may move to another VP."""

    def __init__(self, synic_state: Synic, flag: int, sint: int, vp: int | None) -> None:
        self._synic = synic_state
        self._flag = flag
        self._sint = sint
        self.vp = vp
        # An eventfd nobody reads stands in while the guest wants no interrupts: the data path needs no
        # second case.
        self._parked_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self.interrupt: Interrupt = synic_state.interrupt_type(synic_state.memory, self._parked_fd)
        except BaseException:
            os.close(self._parked_fd)
            raise
        try:
            self.update()
        except BaseException:
            self.close()
            raise

    def move(self, vp: int | None) -> None:
        """Interrupt this VP from now on; None = no interrupts."""
        self.vp = vp
        self.update()

    def update(self) -> None:
        """Point the interrupt where the registers say now."""
        processor = None if self.vp is None else self._synic.processors[self.vp]
        if processor is None or not processor.interrupts_enabled(self._sint):
            self.interrupt.target(None, self._sint, self._flag, self._parked_fd)
            return
        page = synic.PageRegister.unpack(processor.siefp)
        gpa = page.gpa if page.enabled else None
        self.interrupt.target(gpa, self._sint, self._flag, processor.interrupt_fd)

    def close(self) -> None:
        """Signals go nowhere from now on."""
        self._synic.unbind(self)
        self.interrupt.close()
        os.close(self._parked_fd)


class VirtualProcessor:
    """The SynIC registers of one VP, its interrupt eventfd, and the messages waiting for its slots."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.interrupt_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.scontrol = 0
        self.siefp = 0
        self.simp = 0
        self.sints = [synic.HV_SINT_RESET_VALUE] * synic.HV_SYNIC_SINT_COUNT
        self.queues: list[deque[synic.Message]] = [deque() for _ in range(synic.HV_SYNIC_SINT_COUNT)]
        self.outstanding: set[int] = set()

    def messages_enabled(self) -> bool:
        """Whether a message may be written into a slot now."""
        return bool(self.scontrol & self.simp & synic.HV_SYNIC_ENABLE)

    def interrupts_enabled(self, sint: int) -> bool:
        """Whether event flags of this SINT are signalled; a masked SINT is not."""
        return bool(self.scontrol & synic.HV_SYNIC_ENABLE) and not self.sints[sint] & synic.HV_SINT_MASKED

    def save(self) -> dict[str, Any]:
        return {"scontrol": self.scontrol, "siefp": self.siefp, "simp": self.simp, "sints": list(self.sints)}

    def restore(self, saved: dict[str, Any]) -> None:
        self.scontrol, self.siefp, self.simp = saved["scontrol"], saved["siefp"], saved["simp"]
        self.sints = list(saved["sints"])


class Synic:
    """All virtual processors of a partition."""

    def __init__(
        self,
        vp_count: int,
        privileges: int,
        engine: Engine,
        clock: Clock,
        send: Callable[[door.Deliver], bool],
        changed: Callable[[], None],
    ) -> None:
        self._memory: GuestMemory | None = None
        self.interrupt_type = interrupt_class(engine)
        self.processors = [VirtualProcessor(index) for index in range(vp_count)]
        self.guest_os_id = 0
        self.hypercall_page = 0
        self._privileges = privileges
        self._clock = clock
        self._created_ns = clock.raw_ns()
        self._send = send
        self._changed = changed
        self._bound: list[BoundInterrupt] = []
        self._queued = 0
        self.on_room: Callable[[], None] = lambda: None

    @property
    def memory(self) -> GuestMemory:
        """The partition's memory; there once the partition was created or its door was resumed."""
        if self._memory is None:
            raise MemoryAccessError("the partition's memory is not mapped: its door has not been resumed yet")
        return self._memory

    @memory.setter
    def memory(self, memory: GuestMemory) -> None:
        self._memory = memory

    # --- messages ---

    def post(self, vp: int, sint: int, message: synic.Message) -> None:
        """Queue a message for the slot of (vp, sint), FIFO."""
        self.processors[vp].queues[sint].append(message)
        self._queued += 1
        self._pump(vp, sint)

    def queued(self) -> int:
        """Messages that no DELIVER has carried yet."""
        return self._queued

    def end_of_message(self, vp: int, sint: int) -> None:
        """The guest's side emptied the slot. WireError when no message was outstanding there."""
        if vp >= len(self.processors) or sint not in self.processors[vp].outstanding:
            raise WireError(f"EOM: no message is outstanding for virtual processor {vp}, SINT {sint}")
        self.processors[vp].outstanding.discard(sint)
        self._pump(vp, sint)
        self.on_room()

    def forget_messages(self) -> None:
        """Drop everything that waits (a new contact: the guest expects nothing of the old one)."""
        for processor in self.processors:
            for queue in processor.queues:
                queue.clear()
        self._queued = 0

    def door_lost(self) -> None:
        """What was outstanding is lost with the door; what waits belongs to a conversation that ended."""
        self.forget_messages()
        for processor in self.processors:
            processor.outstanding.clear()

    def _pump_all(self, vp: int) -> None:
        """Deliver whatever may be delivered to this processor."""
        for sint in range(synic.HV_SYNIC_SINT_COUNT):
            self._pump(vp, sint)

    def _pump(self, vp: int, sint: int) -> None:
        processor = self.processors[vp]
        queue = processor.queues[sint]
        if not queue or sint in processor.outstanding or not processor.messages_enabled():
            return
        message = queue[0]
        if len(queue) > 1:
            message = message._replace(flags=message.flags | synic.HV_MESSAGE_FLAG_PENDING)
        if self._send(door.Deliver(vp, sint, message.pack())):
            processor.outstanding.add(sint)
            queue.popleft()
            self._queued -= 1

    # --- events ---

    def bind(self, flag: int, sint: int, vp: int | None) -> BoundInterrupt:
        """An interrupt for event flag `flag` of SINT `sint` on this VP (None: not yet, or disabled)."""
        bound = BoundInterrupt(self, flag, sint, vp)
        self._bound.append(bound)
        return bound

    def unbind(self, bound: BoundInterrupt) -> None:
        """Forget it."""
        if bound in self._bound:
            self._bound.remove(bound)

    def new_interrupt_fds(self) -> list[int]:
        """One eventfd per VP for a new door."""
        old = [processor.interrupt_fd for processor in self.processors]
        for processor in self.processors:
            processor.interrupt_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._retarget()
        for fd in old:
            os.close(fd)
        return [processor.interrupt_fd for processor in self.processors]

    def _retarget(self) -> None:
        for bound in self._bound:
            bound.update()

    # --- MSRs ---

    def reference_time(self) -> int:
        """Units of 100 ns since the partition was created."""
        return max(0, self._clock.raw_ns() - self._created_ns) // 100

    def _processor(self, vp: int, msr: int) -> VirtualProcessor:
        needed = _PRIVILEGE_OF_MSR.get(msr)
        if needed is None or not self._privileges & needed or vp >= len(self.processors):
            raise GeneralProtection
        return self.processors[vp]

    def read_msr(self, vp: int, msr: int) -> int:
        """RDMSR. Raises GeneralProtection."""
        processor = self._processor(vp, msr)
        if synic.HV_X64_MSR_SINT0 <= msr <= synic.HV_X64_MSR_SINT15:
            return processor.sints[msr - synic.HV_X64_MSR_SINT0]
        return {
            synic.HV_X64_MSR_GUEST_OS_ID: self.guest_os_id,
            synic.HV_X64_MSR_HYPERCALL: self.hypercall_page,
            synic.HV_X64_MSR_VP_INDEX: vp,
            synic.HV_X64_MSR_TIME_REF_COUNT: self.reference_time(),
            synic.HV_X64_MSR_SCONTROL: processor.scontrol,
            synic.HV_X64_MSR_SVERSION: synic.HV_SYNIC_VERSION,
            synic.HV_X64_MSR_SIEFP: processor.siefp,
            synic.HV_X64_MSR_SIMP: processor.simp,
            synic.HV_X64_MSR_EOM: 0,
        }[msr]

    def write_msr(self, vp: int, msr: int, value: int) -> None:
        """WRMSR. Raises GeneralProtection."""
        processor = self._processor(vp, msr)
        if synic.HV_X64_MSR_SINT0 <= msr <= synic.HV_X64_MSR_SINT15:
            self._write_sint(processor, msr - synic.HV_X64_MSR_SINT0, value)
        elif msr == synic.HV_X64_MSR_GUEST_OS_ID:
            self.guest_os_id = value
            if not value:
                self.hypercall_page &= ~synic.HV_SYNIC_ENABLE
        elif msr == synic.HV_X64_MSR_HYPERCALL:
            self._write_hypercall(value)
        elif msr == synic.HV_X64_MSR_SCONTROL:
            if value & ~synic.HV_SYNIC_ENABLE:
                raise GeneralProtection
            processor.scontrol = value
        elif msr == synic.HV_X64_MSR_SIEFP:
            processor.siefp = self._page(value)
        elif msr == synic.HV_X64_MSR_SIMP:
            processor.simp = self._page(value)
        elif msr != synic.HV_X64_MSR_EOM:
            raise GeneralProtection
        if msr != synic.HV_X64_MSR_EOM:
            self._retarget()
            self._changed()
        self._pump_all(vp)

    def _page(self, value: int) -> int:
        page = synic.PageRegister.unpack(value)
        if page.enabled:
            try:
                self.memory.read(page.gpa, _PAGE)
            except MemoryAccessError:
                raise GeneralProtection from None
        return page.pack()

    def _write_hypercall(self, value: int) -> None:
        if self.hypercall_page & _HYPERCALL_LOCKED:
            raise GeneralProtection
        enabled = bool(value & synic.HV_SYNIC_ENABLE and self.guest_os_id)
        page = self._page(synic.PageRegister(enabled, value & ~(_PAGE - 1)).pack())
        self.hypercall_page = page | value & _HYPERCALL_LOCKED

    def _write_sint(self, processor: VirtualProcessor, sint: int, value: int) -> None:
        if value & ~_SINT_BITS:
            raise GeneralProtection
        if value & 0xFF < 16 and not value & (synic.HV_SINT_MASKED | synic.HV_SINT_POLLING):
            raise GeneralProtection
        processor.sints[sint] = value

    # --- life ---

    def save(self) -> dict[str, Any]:
        """Registers as plain values."""
        return {
            "guest_os_id": self.guest_os_id,
            "hypercall": self.hypercall_page,
            "created_ns": self._created_ns,
            "processors": [processor.save() for processor in self.processors],
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Registers from `save()`."""
        self.guest_os_id = saved["guest_os_id"]
        self.hypercall_page = saved["hypercall"]
        self._created_ns = saved["created_ns"]
        for processor, registers in zip(self.processors, saved["processors"], strict=True):
            processor.restore(registers)

    def reset(self) -> None:
        """Registers of a partition that was just created (a fresh HELLO)."""
        self.guest_os_id = 0
        self.hypercall_page = 0
        for processor in self.processors:
            processor.scontrol = processor.siefp = processor.simp = 0
            processor.sints = [synic.HV_SINT_RESET_VALUE] * synic.HV_SYNIC_SINT_COUNT
        self.door_lost()
        self._retarget()

    def close(self) -> None:
        """Give the eventfds back."""
        for bound in list(self._bound):
            bound.close()
        for processor in self.processors:
            if processor.interrupt_fd >= 0:
                os.close(processor.interrupt_fd)
                processor.interrupt_fd = -1
