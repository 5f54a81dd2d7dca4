"""What every integration service is: a VMBus device whose ring carries requests and answers, one at a time
(Linux drivers/hv/hv_util.c).

Life cycle: offered; each time the guest opens the channel, versions are negotiated, then `serve()` runs until
the channel closes. The guest's drivers take one message per interrupt and answer in the order of the
requests, so the next request waits for the last answer, however late that is.

Everything the guest sends is copied out of its ring once, checked, then used. A guest that breaks the ring
loses the channel; an answer that nobody asked for, or that does not fit its request, is dropped and counted;
after `STRAY_LIMIT` of them the channel is lost. Its doorbell is looked at 200 times a second at most: a guest
that rings without end costs no more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple
from uuid import UUID

from hypervisor.clock import Clock, deadline
from hypervisor.integration import icmsg
from hypervisor.integration.icmsg import IcMessage, Version
from hypervisor.vmbus.device import ChannelRefused, OpenedChannel
from vswitch_wire import packet, vmbus
from vswitch_wire.errors import WireError
from vswitch_wire.memory import drain_fd
from vswitch_wire.ring import RingReader, RingWriter

_log = logging.getLogger("hypervisor.integration")

PAGE = 4096
RING_PAGES_LIMIT = 256
"""Pages of one channel's rings; stock drivers take 8."""
PACKETS_PER_TURN = 4
STRAY_LIMIT = 64
DOORBELL_PAUSE = 0.005
"""Seconds between two looks at the ring."""
PIPE_MODE_MESSAGE = 4


class IntegrationError(RuntimeError):
    """The guest cannot or does not do what was asked; the message names the service and what to do."""


class Answer(NamedTuple):
    """What the guest answered."""

    status: int
    body: bytes


@dataclass(eq=False, slots=True)
class _Outstanding:
    """The request that the guest has not answered."""

    type: int
    packet_id: int
    transaction_id: int
    future: asyncio.Future[Answer]


@dataclass(eq=False, slots=True)
class Session:
    """One opening of the channel."""

    channel: OpenedChannel
    reader: RingReader
    writer: RingWriter
    framework: Version = icmsg.FRAMEWORK_VERSIONS[0]
    version: Version | None = None
    refused: bool = False
    strays: int = 0
    number: int = 0
    closed: bool = False
    outstanding: _Outstanding | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    task: asyncio.Task[None] | None = None
    pause: asyncio.TimerHandle | None = None


class IntegrationService:
    """One service of one partition; a `VmbusDevice`. On the event loop."""

    name: ClassVar[str]
    class_id: UUID
    instance_id: UUID
    sub_channel_limit = 0
    channel_flags = vmbus.VMBUS_CHANNEL_NAMED_PIPE_MODE
    user_data = PIPE_MODE_MESSAGE.to_bytes(4, "little")
    message_type: ClassVar[int]
    largest_body: ClassVar[int]
    """Bytes of its longest request or answer."""

    def __init__(self, clock: Clock, versions: tuple[Version, ...]) -> None:
        """`versions`: those offered to the guest, oldest first."""
        self.clock = clock
        self.versions = versions
        self.on_changed: Callable[[], None] = lambda: None
        """Called when what the service knows of the guest changed."""
        self.strays = 0
        """Packets that answered nothing."""
        self._session: Session | None = None

    @property
    def version(self) -> Version | None:
        """The version that the guest chose; None before."""
        return self._session.version if self._session is not None else None

    # --- VmbusDevice ---

    async def open(self, channel: OpenedChannel) -> None:
        """The guest's driver is there."""
        split, pages = channel.downstream_page_offset, channel.ring_pfns
        if len(pages) > RING_PAGES_LIMIT:
            raise ChannelRefused(f"{self.name}: rings of {len(pages)} pages, at most {RING_PAGES_LIMIT}")
        reader = RingReader(channel.memory.view(pages[:split], 0, split * PAGE))
        writer = RingWriter(channel.memory.view(pages[split:], 0, (len(pages) - split) * PAGE))
        needed = packet.DESCRIPTOR_SIZE + icmsg.OVERHEAD + self.largest_body + 7
        if writer.capacity < needed:
            raise ChannelRefused(f"{self.name}: a ring of {writer.size} bytes, its messages need {needed}")
        session = self._session = Session(channel, reader, writer)
        loop = asyncio.get_running_loop()
        loop.add_reader(channel.doorbell_fd, self._doorbell, session)
        # The task's first step comes after the guest's answer to OPENCHANNEL was queued.
        session.task = loop.create_task(self._run(session))

    async def close(self, channel: OpenedChannel) -> None:
        """The driver is gone: nothing touches its rings from here on."""
        session = self._session
        if session is None or session.channel is not channel:
            return
        self._session = None
        session.closed = True
        asyncio.get_running_loop().remove_reader(channel.doorbell_fd)
        if session.pause is not None:
            session.pause.cancel()
        if session.outstanding is not None:
            self._fail(session.outstanding, "the guest closed the channel")
            session.outstanding = None
        if session.task is not None and session.task is not asyncio.current_task():
            session.task.cancel()
            await asyncio.wait({session.task})
        self.closed()
        self.on_changed()

    async def _run(self, session: Session) -> None:
        try:
            await self._negotiate(session)
            if session.version is not None:
                self.on_changed()
                await self.serve()
        except IntegrationError as error:
            _log.info("%s", error)
        except Exception:
            _log.exception("integration service %s failed", self.name)

    # --- what a service does ---

    async def serve(self) -> None:
        """Runs while the channel is open, versions agreed."""

    def closed(self) -> None:
        """The channel closed: forget what was known of the guest."""

    # --- requests ---

    async def request(self, body: bytes | Callable[[], bytes], seconds: float) -> Answer:
        """One request of this service and its answer. IntegrationError, also after `seconds`, in which the
        answers to the requests before are waited for, too.

        A callable makes the body at the moment of sending.
        """
        exchange = asyncio.ensure_future(self._exchange(self._ready(), body))
        try:
            return await deadline(self.clock, seconds, exchange, self.name)
        except TimeoutError:
            raise IntegrationError(
                f"{self.name}: the guest has not answered within {seconds:g} s; see its console"
            ) from None
        finally:
            exchange.cancel()

    async def _exchange(self, session: Session, body: bytes | Callable[[], bytes]) -> Answer:
        async with session.lock:
            # The answer stays awaited when nobody waits for it any more.
            return await asyncio.shield(self.start(session, body if isinstance(body, bytes) else body()))

    def _ready(self) -> Session:
        session = self._session
        if session is None:
            raise IntegrationError(
                f"{self.name}: the guest has no driver for it open; load hv_utils in the guest"
            )
        if session.refused:
            offered = ", ".join(map(str, self.versions))
            raise IntegrationError(f"{self.name}: the guest knows none of the versions {offered}")
        if session.version is None:
            raise IntegrationError(f"{self.name}: the guest has not answered the negotiation yet; try again")
        return session

    def start(self, session: Session, body: bytes, message_type: int | None = None) -> asyncio.Future[Answer]:
        """Send a request; its answer, however late. IntegrationError when the last one is unanswered."""
        if session.closed:
            raise IntegrationError(f"{self.name}: the guest closed the channel")
        if session.outstanding is not None:
            raise IntegrationError(
                f"{self.name}: the guest has not answered the request before; see its console"
            )
        session.number += 1
        message = IcMessage(
            type=self.message_type if message_type is None else message_type,
            framework=session.framework,
            version=session.version or Version(1, 0),
            body=body,
            transaction_id=session.number & 0xFF,
        )
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        # Failing while nobody waits is legal: the channel closed.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            if not session.writer.write(packet.encode_inband(message.pack(), session.number)):
                raise IntegrationError(f"{self.name}: the guest does not empty its ring")
            signal = session.writer.commit()
        except WireError as error:
            self._broken(session, str(error))
            raise IntegrationError(f"{self.name}: {error}") from None
        session.outstanding = _Outstanding(message.type, session.number, message.transaction_id, future)
        if signal:
            session.channel.interrupt.signal()
        return future

    async def _negotiate(self, session: Session) -> None:
        body = icmsg.pack_negotiation(icmsg.FRAMEWORK_VERSIONS, self.versions)
        # Without a limit: key-value exchange answers when the guest's daemon has started.
        answer = await self.start(session, body, icmsg.ICMSGTYPE_NEGOTIATE)
        try:
            chosen = icmsg.unpack_negotiation(answer.body, icmsg.FRAMEWORK_VERSIONS, self.versions)
        except WireError as error:
            self._broken(session, str(error))
            return
        if chosen is None:
            session.refused = True
            _log.info("%s: the guest knows none of the versions offered", self.name)
        else:
            session.framework, session.version = chosen

    # --- what comes from the guest ---

    def _doorbell(self, session: Session) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(session.channel.doorbell_fd)
        drain_fd(session.channel.doorbell_fd)
        session.pause = loop.call_later(DOORBELL_PAUSE, self._look_again, session)
        self._read(session)

    def _look_again(self, session: Session) -> None:
        session.pause = None
        if session.closed:
            return
        try:
            more = session.reader.pending()
        except WireError as error:
            self._broken(session, str(error))
            return
        loop = asyncio.get_running_loop()
        if more:
            session.pause = loop.call_later(DOORBELL_PAUSE, self._look_again, session)
            self._read(session)
        else:
            loop.add_reader(session.channel.doorbell_fd, self._doorbell, session)

    def _read(self, session: Session) -> None:
        try:
            packets = session.reader.read(PACKETS_PER_TURN)
            if session.reader.commit():
                session.channel.interrupt.signal()
        except WireError as error:
            self._broken(session, str(error))
            return
        for raw in packets:
            try:
                self._answered(session, raw)
            except WireError as error:
                self.strays += 1
                session.strays += 1
                _log.debug("%s: %s", self.name, error)
                if session.strays >= STRAY_LIMIT:
                    self._broken(session, f"{STRAY_LIMIT} packets that answer nothing, the last: {error}")
                    return

    def _answered(self, session: Session, raw: bytes) -> None:
        received = packet.decode(raw)
        outstanding = session.outstanding
        if received.type != packet.VM_PKT_DATA_INBAND:
            raise WireError(f"packet type {received.type:#x}, expected in-band data")
        if outstanding is None or received.transaction_id != outstanding.packet_id:
            raise WireError(f"packet {received.transaction_id:#x} answers no request")
        message = IcMessage.unpack(received.payload)
        if (
            message.type != outstanding.type
            or message.transaction_id != outstanding.transaction_id
            or not message.flags & icmsg.ICMSGHDRFLAG_RESPONSE
        ):
            raise WireError(
                f"message type {message.type}, transaction {message.transaction_id}, flags {message.flags:#x}"
                f" does not answer type {outstanding.type}, transaction {outstanding.transaction_id}"
            )
        session.outstanding = None
        if not outstanding.future.done():
            outstanding.future.set_result(Answer(message.status, message.body))

    def _broken(self, session: Session, why: str) -> None:
        """The guest loses this channel."""
        session.closed = True
        asyncio.get_running_loop().remove_reader(session.channel.doorbell_fd)
        if session.pause is not None:
            session.pause.cancel()
            session.pause = None
        if session.outstanding is not None:
            self._fail(session.outstanding, why)
            session.outstanding = None
        session.channel.report_fault(f"{self.name}: {why}")

    def _fail(self, outstanding: _Outstanding, why: str) -> None:
        if not outstanding.future.done():
            outstanding.future.set_exception(IntegrationError(f"{self.name}: {why}"))


async def pause(clock: Clock, seconds: float) -> None:
    """Sleep by the given clock."""
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    timer = clock.call_later(seconds, lambda: None if done.done() else done.set_result(None))
    try:
        await done
    finally:
        timer.cancel()
