"""The VMBus client of a guest: version negotiation, offers, GPADLs, channels, rescind, unload (Linux
drivers/hv is the model).

Requests are answered by messages; a request that waits fails with `DoorLostError` when the door is lost and
with `ChannelRescinded` when its channel is taken away. After a resume the host rescinds every channel it
offered before and offers it anew; a host that forgot to is asked to start over.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from netvsc.door import DoorClient, DoorLostError
from netvsc.memory import PAGE, PageAllocator
from netvsc.synic import Synic
from vswitch_wire import hypercall, vmbus
from vswitch_wire.errors import WireError
from vswitch_wire.gpadl import GpaRange, encode_gpadl
from vswitch_wire.hypercall import HvStatus
from vswitch_wire.memory import GuestMemory
from vswitch_wire.synic import HVMSG_VMBUS, Message
from vswitch_wire.vmbus import OfferChannel, VmbusVersion

__all__ = ["ChannelRefusedError", "ChannelRescinded", "GuestChannel", "VmbusClient", "VmbusError"]

_log = logging.getLogger("netvsc.vmbus")

POST_RETRIES = 100
FIRST_GPADL = 0xE1E10
RESUME_PATIENCE = 1.0
"""Seconds after a resume in which the host rescinds what it offered.

Then the guest starts the connection over.
"""
_RETRIED = {HvStatus.INVALID_CONNECTION_ID, HvStatus.INSUFFICIENT_MEMORY, HvStatus.INSUFFICIENT_BUFFERS}
_VERSIONS = sorted((version for version in VmbusVersion if version >= VmbusVersion.WIN8), reverse=True)


class VmbusError(ConnectionError):
    """The host answered in a way that ends this attempt."""


class ChannelRescinded(VmbusError):
    """The host took the channel back while something waited for it."""


class ChannelRefusedError(VmbusError):
    """The host answered OPENCHANNEL or a GPADL with a failure status."""


class _NoConnection(VmbusError):
    """The host has no such message connection: an older VMBus."""


@dataclass(eq=False, slots=True)
class GuestChannel:
    """An open channel.

    The first `downstream_page_offset` of `ring_pfns` are guest to host, the others host to guest.
    """

    offer: OfferChannel
    relid: int
    memory: GuestMemory
    ring_pfns: list[int]
    downstream_page_offset: int
    ring_gpadl: int
    signal_fd: int
    """Write it to signal the host; the SynIC's, valid until the channel is closed or the door lost."""
    vp: int
    sint: int
    siefp_gpa: int
    irq_fd: int
    """Interrupt eventfd of the channel's VP; for whoever took it with `Synic.take_interrupt()`."""
    on_interrupt: Callable[[], None] = lambda: None
    """Called on the loop when the host may have something, unless somebody took the interrupt."""
    is_open: bool = True


class VmbusClient:
    """VMBus as one guest drives it. All methods on the event loop; lives across a door loss."""

    def __init__(self, client: DoorClient, synic: Synic, allocator: PageAllocator) -> None:
        self.version: VmbusVersion | None = None
        self.offers: dict[int, OfferChannel] = {}
        self.channels: dict[int, GuestChannel] = {}
        self.on_offer: Callable[[OfferChannel], None] = lambda offer: None
        self.on_rescind: Callable[[OfferChannel], None] = lambda offer: self.release(offer.relid)
        """Close what uses the channel, then call `release(relid)`."""
        self._door = client
        self._synic = synic
        self._allocator = allocator
        self._loop = asyncio.get_running_loop()
        self._posting = asyncio.Lock()
        self._input = 0
        self._connection_id = vmbus.VMBUS_MESSAGE_CONNECTION_ID
        self._max_version: VmbusVersion = VmbusVersion.COPPER
        self._gpadl_ids = itertools.count(FIRST_GPADL)
        self._gpadls: dict[int, int] = {}
        self._waiting: dict[tuple[object, ...], tuple[int, asyncio.Future[Any]]] = {}
        self._rescinded: set[int] = set()
        self._forgotten: set[int] = set()
        self._connecting = asyncio.Lock()
        self._started = False
        self._offers_at_loss: list[OfferChannel] = []
        self._all_released = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        synic.on_message = self._message
        synic.on_flags = self._flags
        client.on_lost.append(self._door_lost)
        client.on_resumed.append(self._resumed)
        client.on_replaced.append(self.dispose)

    # --- connection ---

    async def connect(self, max_version: VmbusVersion = VmbusVersion.COPPER) -> VmbusVersion:
        """Negotiate, newest version first, and collect the offers; returns when all have been delivered.

        VmbusError when the host knows no version of ours; DoorLostError: it is tried again after a resume.
        """
        self._started = True
        self._max_version = max_version
        async with self._connecting:
            for version in _VERSIONS:
                if version <= max_version and await self._contact(version):
                    break
            else:
                raise VmbusError("the host accepts no VMBus version from 2.4 to 6.0")
            self.version = version
            delivered = self._expect(("offers",))
            await self._post(vmbus.RequestOffers())
            await delivered
            return version

    async def _contact(self, version: VmbusVersion) -> bool:
        modern = version >= VmbusVersion.WIN10_RS3_1
        self._connection_id = (
            vmbus.VMBUS_MESSAGE_CONNECTION_ID_4 if modern else vmbus.VMBUS_MESSAGE_CONNECTION_ID
        )
        answer = self._expect(("version",))
        target = vmbus.InitiateContact.target(vmbus.VMBUS_MESSAGE_SINT) if modern else 0
        try:
            await self._post(vmbus.InitiateContact(version, 0, target), first=True)
        except _NoConnection:
            self._give_up(("version",))
            return False
        response: vmbus.VersionResponse = await answer
        if not response.version_supported:
            return False
        if response.connection_state != vmbus.CONNECTION_STATE_SUCCESSFUL:
            state = response.connection_state
            raise VmbusError(f"the host refused VMBus {version:#x}: connection state {state}")
        if modern:
            self._connection_id = response.selected_version_or_connection_id
        return True

    async def unload(self) -> None:
        """Close the connection: afterwards the host touches no guest memory.

        Channels are gone, without callbacks.
        """
        if self.version is None:
            return
        answer = self._expect(("unload",))
        await self._post(vmbus.Unload())
        await answer
        self.version = None
        for relid in list(self.offers):
            self._drop(relid)

    # --- channels ---

    async def open(
        self, offer: OfferChannel, ring_pages: int = 128, user_data: bytes = b"", vp: int = 0
    ) -> GuestChannel:
        """Open a channel with two rings of `ring_pages` pages each, control page included.

        ChannelRefusedError, ChannelRescinded, DoorLostError; MemoryError when the pages are not there.
        """
        relid = offer.relid
        if relid in self.channels:
            raise VmbusError(f"channel {relid} is open already")
        if ring_pages < 2:
            raise ValueError(f"rings of {ring_pages} pages: a ring has a control page and at least one more")
        pfns = self._allocator.alloc(2 * ring_pages)
        gpadl = 0
        try:
            size = len(pfns) * PAGE
            self._door.memory.view(pfns, 0, size).write(0, bytes(size))
            gpadl = await self.create_gpadl(relid, pfns)
            answer = self._expect(("open", relid), relid)
            wanted = user_data.ljust(vmbus.USER_DATA_SIZE, b"\0")
            await self._post(vmbus.OpenChannel(relid, relid, gpadl, vp, ring_pages, wanted))
            result: vmbus.OpenChannelResult = await answer
            if result.status:
                raise ChannelRefusedError(
                    f"the host refused to open channel {relid} (status {result.status:#x})"
                )
            assert offer.connection_id is not None
            try:
                signal_fd = self._synic.eventfd(offer.connection_id)
            except KeyError:
                raise VmbusError(f"the host opened channel {relid} without its eventfd") from None
        except BaseException:
            if gpadl and self._door.connected:
                with contextlib.suppress(VmbusError, DoorLostError):
                    await self.teardown_gpadl(relid, gpadl)
            self._allocator.free(pfns)
            raise
        channel = GuestChannel(
            offer=offer,
            relid=relid,
            memory=self._door.memory,
            ring_pfns=pfns,
            downstream_page_offset=ring_pages,
            ring_gpadl=gpadl,
            signal_fd=signal_fd,
            vp=vp,
            sint=vmbus.VMBUS_MESSAGE_SINT,
            siefp_gpa=self._synic.siefp_gpa(vp),
            irq_fd=self._door.interrupts[vp],
        )
        self.channels[relid] = channel
        return channel

    async def close(self, channel: GuestChannel) -> None:
        """CLOSECHANNEL, then the ring's GPADL; the ring's pages are free afterwards.

        Its user must have let go of them.
        """
        if not channel.is_open:
            return
        channel.is_open = False
        self.channels.pop(channel.relid, None)
        try:
            if channel.relid not in self._forgotten:
                await self._post(vmbus.CloseChannel(channel.relid))
            await self.teardown_gpadl(channel.relid, channel.ring_gpadl)
        finally:
            self._allocator.free(channel.ring_pfns)

    async def modify(self, channel: GuestChannel, vp: int) -> None:
        """Have the channel interrupt another VP. VmbusError when the host refuses."""
        assert self.version is not None
        key = ("modify", channel.relid)
        answer = self._expect(key, channel.relid) if self.version >= VmbusVersion.IRON else None
        await self._post(vmbus.ModifyChannel(channel.relid, vp))
        if answer is not None:
            response: vmbus.ModifyChannelResponse = await answer
            if response.status:
                raise VmbusError(f"channel {channel.relid} cannot interrupt virtual processor {vp}")
        channel.vp, channel.irq_fd = vp, self._door.interrupts[vp]
        channel.siefp_gpa = self._synic.siefp_gpa(vp)

    async def create_gpadl(self, relid: int, pages: Sequence[int]) -> int:
        """Let the host see whole pages (8190 at most); the GPADL's id.

        ChannelRefusedError, ChannelRescinded.
        """
        gpadl = next(self._gpadl_ids)
        entry = GpaRange(len(pages) * PAGE, 0, tuple(pages))
        answer = self._expect(("gpadl", relid, gpadl), relid)
        try:
            for message in encode_gpadl(relid, gpadl, (entry,)):
                await self._post(message)
            created: vmbus.GpadlCreated = await answer
        except BaseException:
            self._give_up(("gpadl", relid, gpadl))
            raise
        if created.status:
            raise ChannelRefusedError(f"the host refused a GPADL of {len(pages)} pages for channel {relid}")
        self._gpadls[gpadl] = relid
        return gpadl

    async def teardown_gpadl(self, relid: int, gpadl: int) -> None:
        """Take the pages back; returns when the host has let go of them."""
        if self._gpadls.pop(gpadl, None) is None or relid in self._forgotten:
            return
        answer = self._expect(("torndown", gpadl))
        await self._post(vmbus.GpadlTeardown(relid, gpadl))
        await answer

    def release(self, relid: int) -> None:
        """Everything that used a rescinded channel is gone: tell the host that the relid is free."""
        if relid not in self._rescinded:
            return
        forgotten = relid in self._forgotten
        self._drop(relid)
        if not forgotten and self._door.connected:
            self._spawn(self._post(vmbus.RelidReleased(relid)))
        if not self._rescinded:
            self._all_released.set()

    def _drop(self, relid: int) -> None:
        self.offers.pop(relid, None)
        self._rescinded.discard(relid)
        self._forgotten.discard(relid)
        for gpadl in [key for key, owner in self._gpadls.items() if owner == relid]:
            del self._gpadls[gpadl]
        channel = self.channels.pop(relid, None)
        if channel is not None and channel.is_open:
            channel.is_open = False
            self._allocator.free(channel.ring_pfns)

    # --- messages ---

    async def _post(self, message: vmbus.ChannelMessage, *, first: bool = False) -> None:
        payload = message.pack()
        async with self._posting:
            if not self._input:
                (pfn,) = self._allocator.alloc(1)
                self._input = pfn * PAGE
            delay = 0.000001
            for _ in range(POST_RETRIES):
                block = hypercall.PostMessage(self._connection_id, HVMSG_VMBUS, payload).pack()
                self._door.memory.write(self._input, block)
                result = await self._door.hypercall(hypercall.HvCallPostMessage, rdx=self._input)
                status, _ = hypercall.split_result(result.rax)
                if status == HvStatus.SUCCESS:
                    return
                if status == HvStatus.INVALID_CONNECTION_ID and first:
                    raise _NoConnection("the host has no such message connection")
                if status not in _RETRIED:
                    raise VmbusError(f"posting {type(message).__name__} failed: status {status:#x}")
                await asyncio.sleep(delay)
                delay = min(delay * 2, 2.0)
            raise VmbusError(f"posting {type(message).__name__}: no buffer at the host {POST_RETRIES} times")

    def _expect(self, key: tuple[object, ...], relid: int = 0) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()
        old = self._waiting.get(key)
        if old is not None and not old[1].done():
            old[1].cancel()
        self._waiting[key] = relid, future
        if relid and relid in self._rescinded:
            self._fail(key, ChannelRescinded(f"channel {relid} was rescinded"))
        return future

    def _give_up(self, key: tuple[object, ...]) -> None:
        entry = self._waiting.pop(key, None)
        if entry is not None and not entry[1].done():
            entry[1].cancel()

    def _fail(self, key: tuple[object, ...], error: Exception) -> None:
        _, future = self._waiting.pop(key)
        if not future.done():
            future.set_exception(error)
            # Whoever asked may have gone: then nobody looks.
            future.exception()

    def _answer(self, key: tuple[object, ...], message: object) -> None:
        entry = self._waiting.pop(key, None)
        if entry is None:
            _log.debug("an answer nobody waits for: %s", message)
        elif not entry[1].done():
            entry[1].set_result(message)

    def _message(self, message: Message) -> None:
        try:
            decoded = vmbus.decode(message.payload)
        except WireError as error:
            _log.warning("a VMBus message from the host cannot be used: %s", error)
            return
        match decoded:
            case vmbus.OfferChannel():
                self._offered(decoded)
            case vmbus.RescindChannelOffer(relid=relid):
                self._taken_back(relid)
            case vmbus.AllOffersDelivered():
                self._answer(("offers",), decoded)
            case vmbus.OpenChannelResult(relid=relid):
                self._answer(("open", relid), decoded)
            case vmbus.GpadlCreated(relid=relid, gpadl_id=gpadl):
                self._answer(("gpadl", relid, gpadl), decoded)
            case vmbus.GpadlTorndown(gpadl_id=gpadl):
                self._answer(("torndown", gpadl), decoded)
            case vmbus.VersionResponse():
                self._answer(("version",), decoded)
            case vmbus.UnloadResponse():
                self._answer(("unload",), decoded)
            case vmbus.ModifyChannelResponse(relid=relid):
                self._answer(("modify", relid), decoded)
            case _:
                _log.warning("the host sent %s, which is not for this guest", type(decoded).__name__)

    def _offered(self, offer: OfferChannel) -> None:
        if offer.relid in self.offers:
            _log.warning("the host offered channel %d twice", offer.relid)
            return
        self.offers[offer.relid] = offer
        self.on_offer(offer)

    def _taken_back(self, relid: int) -> None:
        offer = self.offers.get(relid)
        if offer is None or relid in self._rescinded:
            return
        self._rescinded.add(relid)
        for key in [key for key, (owner, _) in self._waiting.items() if owner == relid]:
            self._fail(key, ChannelRescinded(f"channel {relid} was rescinded"))
        self.on_rescind(offer)

    def _flags(self, flags: set[int]) -> None:
        # Plain Python cannot clear flags atomically: every channel looks for itself, a wake-up too many is
        # legal.
        for channel in list(self.channels.values()):
            channel.on_interrupt()

    # --- loss and resume ---

    def _door_lost(self, reason: str) -> None:
        self._offers_at_loss = list(self.offers.values())
        for key in list(self._waiting):
            self._fail(key, DoorLostError(reason))

    def _resumed(self) -> None:
        if self._started:
            self._spawn(self._after_resume())

    async def _after_resume(self) -> None:
        async with self._connecting:
            pass  # an attempt that the loss cut short ends first
        if self.version is not None:
            await asyncio.sleep(RESUME_PATIENCE)
            if not self._door.connected or not self._left_over():
                return
            _log.warning("the host did not take back what it offered before; starting the connection over")
        for relid in list(self.offers):
            # The host does not know these any more: nothing is asked of it when they are given back.
            self._forgotten.add(relid)
            self._taken_back(relid)
        self._all_released.clear()
        if self._rescinded:
            await self._all_released.wait()
        self.version = None
        await self.connect(self._max_version)

    def _left_over(self) -> bool:
        """Whether an offer from before the loss is still there, not rescinded."""
        return any(
            self.offers.get(offer.relid) is offer and offer.relid not in self._rescinded
            for offer in self._offers_at_loss
        )

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.debug("VMBus: %s", error)

    def dispose(self) -> None:
        """Take no more part in the door's life (a fresh partition replaces this one)."""
        self._door_lost("the partition was replaced")
        for task in list(self._tasks):
            task.cancel()
        if self._door_lost in self._door.on_lost:
            self._door.on_lost.remove(self._door_lost)
        if self._resumed in self._door.on_resumed:
            self._door.on_resumed.remove(self._resumed)
