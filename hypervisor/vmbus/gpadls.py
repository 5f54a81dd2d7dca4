"""The GPADLs of one VMBus connection.

Made from messages, checked against memory and quotas, held while a device uses them.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypervisor.quotas import Quotas
from vswitch_wire import vmbus
from vswitch_wire.errors import WireError
from vswitch_wire.gpadl import AssembledGpadl, GpadlError, GpaRange
from vswitch_wire.guest_codecs import GuestCodecs
from vswitch_wire.memory import GuestMemory

_PAGE = 4096


@dataclass(eq=False, slots=True)
class _Gpadl:
    ranges: tuple[GpaRange, ...]
    pages: int
    uses: int = 0
    teardown_asked: bool = False


class GpadlTable:
    """GPADLs by (relid, id). Not thread-safe; lives on the event loop."""

    def __init__(self, quotas: Quotas, codecs: GuestCodecs) -> None:
        self._quotas = quotas
        self._assembler = codecs.gpadl_assembler(quotas.gpadls_in_progress)
        self._gpadls: dict[tuple[int, int], _Gpadl] = {}
        self._pages = 0

    def __len__(self) -> int:
        return len(self._gpadls)

    @property
    def pages(self) -> int:
        """Pages over all GPADLs."""
        return self._pages

    def header(self, message: vmbus.GpadlHeader, memory: GuestMemory) -> vmbus.GpadlCreated | None:
        """The answer, or None when bodies are to follow. `relid` must be known to be a channel."""
        try:
            if (message.relid, message.gpadl_id) in self._gpadls:
                raise GpadlError(message.relid, message.gpadl_id, "this id is in use on this channel")
            if message.range_bytes // 8 > self._quotas.gpadl_pages - self._pages + 2:
                raise GpadlError(message.relid, message.gpadl_id, "the partition's page quota is used up")
            whole = self._assembler.header(message)
            return None if whole is None else self._accept(whole, memory)
        except GpadlError as error:
            return vmbus.GpadlCreated(error.relid, error.gpadl_id, vmbus.STATUS_UNSUCCESSFUL)

    def body(self, message: vmbus.GpadlBody, memory: GuestMemory) -> vmbus.GpadlCreated | None:
        """The answer when this body completes its GPADL. WireError for a body of no known GPADL."""
        try:
            whole = self._assembler.body(message)
            return None if whole is None else self._accept(whole, memory)
        except GpadlError as error:
            return vmbus.GpadlCreated(error.relid, error.gpadl_id, vmbus.STATUS_UNSUCCESSFUL)

    def _accept(self, whole: AssembledGpadl, memory: GuestMemory) -> vmbus.GpadlCreated:
        relid, gpadl_id = whole.relid, whole.gpadl_id
        if len(self._gpadls) >= self._quotas.gpadls:
            raise GpadlError(relid, gpadl_id, f"more than {self._quotas.gpadls} GPADLs")
        if self._pages + whole.pages > self._quotas.gpadl_pages:
            raise GpadlError(relid, gpadl_id, f"more than {self._quotas.gpadl_pages} pages in GPADLs")
        for entry in whole.ranges:
            try:
                memory.view(entry.pfns, entry.byte_offset, entry.byte_count)
            except WireError as error:
                raise GpadlError(relid, gpadl_id, str(error)) from None
        self._gpadls[relid, gpadl_id] = _Gpadl(whole.ranges, whole.pages)
        self._pages += whole.pages
        return vmbus.GpadlCreated(relid, gpadl_id, vmbus.STATUS_SUCCESS)

    def ring(self, relid: int, gpadl_id: int, downstream_page_offset: int) -> list[int]:
        """The pages of a ring GPADL, held for the channel. WireError when it cannot be a pair of rings."""
        entry = self._find(relid, gpadl_id)
        if len(entry.ranges) != 1:
            raise WireError(f"ring GPADL {gpadl_id:#x} has {len(entry.ranges)} ranges, must have one")
        (ring,) = entry.ranges
        if ring.byte_offset or ring.byte_count % _PAGE:
            raise WireError(f"ring GPADL {gpadl_id:#x} is not made of whole pages")
        # Each ring has a control page and at least one page of data.
        if downstream_page_offset < 2 or len(ring.pfns) - downstream_page_offset < 2:
            raise WireError(
                f"ring GPADL {gpadl_id:#x}: {len(ring.pfns)} pages split at {downstream_page_offset},"
                " each ring needs 2"
            )
        entry.uses += 1
        return list(ring.pfns)

    def use(self, relid: int, gpadl_id: int) -> GpaRange:
        """The one range of a GPADL, held until `release()`.

        WireError when there is none, or several ranges.
        """
        entry = self._find(relid, gpadl_id)
        if len(entry.ranges) != 1:
            raise WireError(f"GPADL {gpadl_id:#x} has {len(entry.ranges)} ranges, a buffer must have one")
        entry.uses += 1
        return entry.ranges[0]

    def _find(self, relid: int, gpadl_id: int) -> _Gpadl:
        entry = self._gpadls.get((relid, gpadl_id))
        if entry is None or entry.teardown_asked:
            raise WireError(f"channel {relid} has no GPADL {gpadl_id:#x}")
        return entry

    def release(self, relid: int, gpadl_id: int) -> vmbus.GpadlTorndown | None:
        """The device let go of one GPADL once; the answer to a teardown that waited for the last time."""
        entry = self._gpadls.get((relid, gpadl_id))
        if entry is None:
            return None
        return self._let_go(relid, gpadl_id, entry.uses - 1)

    def _let_go(self, relid: int, gpadl_id: int, uses: int) -> vmbus.GpadlTorndown | None:
        entry = self._gpadls[relid, gpadl_id]
        entry.uses = max(uses, 0)
        if entry.teardown_asked and not entry.uses:
            self._remove(relid, gpadl_id)
            return vmbus.GpadlTorndown(gpadl_id)
        return None

    def release_channel(self, relid: int) -> list[vmbus.GpadlTorndown]:
        """The channel closed: nothing of it is in use; answers to teardowns that waited."""
        answers = [self._let_go(*key, 0) for key in list(self._gpadls) if key[0] == relid]
        return [answer for answer in answers if answer is not None]

    def teardown(self, message: vmbus.GpadlTeardown) -> vmbus.GpadlTorndown | None:
        """The answer, or None while a device still uses the memory. WireError for an unknown GPADL."""
        entry = self._gpadls.get((message.relid, message.gpadl_id))
        if entry is None or entry.teardown_asked:
            raise WireError(f"GPADL_TEARDOWN: channel {message.relid} has no GPADL {message.gpadl_id:#x}")
        if entry.uses:
            entry.teardown_asked = True
            return None
        self._remove(message.relid, message.gpadl_id)
        return vmbus.GpadlTorndown(message.gpadl_id)

    def abandon_channel(self, relid: int) -> list[vmbus.GpadlCreated | vmbus.GpadlTorndown]:
        """Answers owed for the channel before it is rescinded; nothing may be in use."""
        answers: list[vmbus.GpadlCreated | vmbus.GpadlTorndown] = [
            vmbus.GpadlCreated(relid, gpadl_id, vmbus.STATUS_UNSUCCESSFUL)
            for gpadl_id in self._assembler.discard_channel(relid)
        ]
        answers.extend(self.release_channel(relid))
        return answers

    def forget_channel(self, relid: int) -> None:
        """The relid was released: its GPADLs are gone without an answer."""
        self._assembler.discard_channel(relid)
        for owner, gpadl_id in list(self._gpadls):
            if owner == relid:
                self._remove(owner, gpadl_id)

    def clear(self) -> None:
        """Forget everything (new contact, unload, lost door); nothing may be in use."""
        self._assembler.clear()
        self._gpadls.clear()
        self._pages = 0

    def _remove(self, relid: int, gpadl_id: int) -> None:
        self._pages -= self._gpadls.pop((relid, gpadl_id)).pages
