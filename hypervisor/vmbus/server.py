"""The VMBus server of one partition: version negotiation, offers, channels, GPADLs (Linux
include/linux/hyperv.h; openvmm vmbus_server).

Messages from the guest are handled in order, on the event loop. A new contact or an unload first closes
every channel; until that is done, and while the guest does not take the messages it is owed, further
messages wait in the port's 16 buffers. A malformed or misplaced message gets the protocol's answer where
there is one and is otherwise dropped and counted (`protocol_errors`); it never reaches another partition.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from hypervisor.clock import Clock
from hypervisor.quotas import Quotas
from hypervisor.synic import Synic
from hypervisor.vmbus import abandoned
from hypervisor.vmbus.abandoned import OpenRings
from hypervisor.vmbus.channel import CONNECTION_ID_BASE, Channel, ChannelState
from hypervisor.vmbus.device import OpenedChannel, VmbusDevice
from hypervisor.vmbus.gpadls import GpadlTable
from hypervisor.vmbus.lifecycle import ChannelLifecycle
from hypervisor.vmbus.negotiation import (
    MESSAGE_CONNECTION_ID,
    NEWEST_VERSION,
    OLDEST_VERSION,
    Connection,
    negotiate,
)
from vswitch_wire import vmbus
from vswitch_wire.errors import WireError
from vswitch_wire.guest_codecs import GuestCodecs
from vswitch_wire.hypercall import HvStatus
from vswitch_wire.memory import signal_shared_fd
from vswitch_wire.synic import HVMSG_VMBUS, Message
from vswitch_wire.vmbus import VmbusVersion

_log = logging.getLogger("hypervisor.vmbus")

Tap = Callable[[str, bytes, int], None]
"""(direction "in" from the guest | "out" to it, the message, nanoseconds since 1970)."""


@dataclass(eq=False, frozen=True, slots=True)
class Offer:
    """A device's place on the bus; `relid` is stable for as long as the partition lives."""

    channel: Channel

    @property
    def relid(self) -> int:
        """The channel's id, 1..2047."""
        return self.channel.relid

    @property
    def state(self) -> ChannelState:
        """What the guest did with it."""
        return self.channel.state


class VmbusServer:
    """VMBus as one guest sees it. All methods on the event loop."""

    def __init__(
        self,
        name: str,
        synic: Synic,
        quotas: Quotas,
        clock: Clock,
        send_eventfd: Callable[[int, int | None], None],
        changed: Callable[[], None],
        *,
        codecs: GuestCodecs,
        oldest: VmbusVersion = OLDEST_VERSION,
        newest: VmbusVersion = NEWEST_VERSION,
    ) -> None:
        self.name = name
        self.tap: list[Tap] = []
        self.protocol_errors = 0
        self.last_error = ""
        self.connection: Connection | None = None
        self.offers_requested = False
        self.gpadls = GpadlTable(quotas, codecs)
        self._codecs = codecs
        self._synic = synic
        self._quotas = quotas
        self._clock = clock
        self._changed = changed
        self._oldest, self._newest = oldest, newest
        self._vp, self.sint = 0, vmbus.VMBUS_MESSAGE_SINT
        self._channels: dict[int, Channel] = {}
        self._relids: dict[tuple[UUID, UUID, int], int] = {}
        self._queue: deque[bytes] = deque()
        self._resetting: asyncio.Task[None] | None = None
        self._pumping = False
        self._attached = False
        self._loop = asyncio.get_running_loop()
        self._lifecycle = ChannelLifecycle(self, synic, send_eventfd)
        synic.on_room = self._pump

    @property
    def resetting(self) -> bool:
        """Whether a new contact or an unload is closing everything: nothing is answered meanwhile."""
        return self._resetting is not None

    def changed(self) -> None:
        """Something that `save()` has is different."""
        self._changed()

    # --- the host's requests ---

    @property
    def channels(self) -> list[Channel]:
        """All channels in relid order."""
        return [self._channels[relid] for relid in sorted(self._channels)]

    async def offer(self, device: VmbusDevice) -> Offer:
        """Offer a device.

        ValueError if one with these GUIDs is offered, RuntimeError when the relids are used up.
        """
        key = (device.class_id, device.instance_id, 0)
        channel = next((entry for entry in self._channels.values() if entry.key == key), None)
        if channel is not None:
            if channel.device is not None:
                raise ValueError(f"partition {self.name}: device {device.instance_id} is already offered")
            # The guest still holds the relid from before: the device is offered again when it lets go.
            channel.device = device
            channel.withheld = ""
            return Offer(channel)
        channel = self._add_channel(key, device)
        if self.offers_requested and self._attached and self._resetting is None:
            self._offer_channel(channel)
        return Offer(channel)

    async def rescind(self, offer: Offer) -> None:
        """Take a device away; returns when it is closed and the guest has been told."""
        await self._revoke(offer.channel)

    def signal_event(self, connection_id: int) -> HvStatus:
        """HvCallSignalEvent, flag 0."""
        channel = self._channels.get(connection_id - CONNECTION_ID_BASE)
        if channel is None or channel.opened is None:
            return HvStatus.INVALID_CONNECTION_ID
        signal_shared_fd(channel.opened.doorbell_fd)
        return HvStatus.SUCCESS

    def post_message(self, connection_id: int, message_type: int, payload: bytes) -> HvStatus:
        """HvCallPostMessage from the guest."""
        known = {vmbus.VMBUS_MESSAGE_CONNECTION_ID}
        if self._newest >= VmbusVersion.WIN10_RS3_1:
            known.add(vmbus.VMBUS_MESSAGE_CONNECTION_ID_4)
        if self.connection is not None and self.connection.version >= VmbusVersion.WIN10_RS3_1:
            known.add(MESSAGE_CONNECTION_ID)
        if connection_id not in known:
            return HvStatus.INVALID_CONNECTION_ID
        if message_type != HVMSG_VMBUS:
            self.error(f"message type {message_type:#x} on a VMBus connection")
            return HvStatus.SUCCESS
        if len(self._queue) >= self._quotas.port_messages:
            return HvStatus.INSUFFICIENT_BUFFERS
        self._queue.append(payload)
        self._pump()
        return HvStatus.SUCCESS

    # --- the door ---

    def attached(self) -> None:
        """A fresh guest's side is there: it knows nothing yet."""
        self._attached = True

    def resumed(self) -> None:
        """The guest's side is there again.

        Everything offered before is rescinded, and offered anew once released.
        """
        self._attached = True
        for channel in sorted(
            self._channels.values(), key=lambda entry: (-entry.sub_channel_index, entry.relid)
        ):
            if channel.offered:
                channel.revoked = True
                channel.withheld = ""
                self._complete_abandoned(channel)
                self.send(vmbus.RescindChannelOffer(channel.relid))
        self._pump()

    def _complete_abandoned(self, channel: Channel) -> None:
        """What the guest sent and no host completed fails now: its driver may wait for that for ever."""
        rings, channel.rings = channel.rings, None
        if rings is None:
            return
        primary = self.primary_of(channel)
        answer = getattr(primary and primary.device, "abandoned", lambda _: b"")
        try:
            try:
                abandoned.complete(self._synic.memory, rings, answer)
            finally:
                # Also for a part of them; an interrupt for nothing is legal.
                bound = self._synic.bind(channel.relid, self.sint, rings.vp)
                bound.interrupt.signal()
                bound.close()
        except (WireError, IndexError, OSError) as error:
            self.error(f"channel {channel.relid}: what it had under way cannot be completed: {error}")

    async def detached(self) -> None:
        """The door is lost: close every channel; what was offered stays known for `resumed()`."""
        self._attached = False
        await self._settled()
        await self._close_all()
        self.gpadls.clear()

    async def reset(self) -> None:
        """The guest starts anew: close every channel; whatever it was offered or told holds no more."""
        await self._settled()
        self._reset(lambda: None)
        await self._settled()
        self._vp, self.sint = 0, vmbus.VMBUS_MESSAGE_SINT

    async def _settled(self) -> None:
        """Returns when nothing that the guest posted is waited for or waits: the end of one contact may begin
        the next one.
        """
        self._queue.clear()
        while self._resetting is not None:
            await asyncio.wait({self._resetting})
            self._queue.clear()

    async def close(self) -> None:
        """Close everything for good."""
        await self.detached()
        for channel in self._channels.values():
            channel.device = None
        self._channels.clear()

    # --- messages ---

    def _pump(self) -> None:
        if self._pumping:
            return
        self._pumping = True
        try:
            while (
                self._queue
                and self._resetting is None
                and self._synic.queued() < self._quotas.queued_messages
            ):
                self._handle(self._queue.popleft())
        finally:
            self._pumping = False

    def _handle(self, payload: bytes) -> None:
        self._observe("in", payload)
        try:
            message = self._codecs.channel_message(payload)
            if isinstance(message, vmbus.InitiateContact):
                self._reset(functools.partial(self._contact, message))
            elif isinstance(message, vmbus.Unload):
                self._reset(self._unloaded)
            elif self.connection is None:
                raise WireError(f"{type(message).__name__} without a connection")
            else:
                handler = _HANDLERS.get(type(message))
                if handler is None:
                    raise WireError(f"{type(message).__name__} is not a message for the host, or not served")
                handler(self, message)
        except WireError as error:
            self.error(str(error))

    def error(self, text: str) -> None:
        """Count a message that is malformed or misplaced, or a fault."""
        self.protocol_errors += 1
        self.last_error = text
        _log.debug("partition %s: %s", self.name, text)

    def _observe(self, direction: str, payload: bytes) -> None:
        if self.tap:
            now = self._clock.wall_ns()
            for observer in self.tap:
                observer(direction, payload, now)

    def send(self, message: vmbus.ChannelMessage) -> None:
        """Queue a channel message to the guest; dropped while there is none."""
        if not self._attached:
            return
        payload = message.pack()
        self._observe("out", payload)
        self._synic.post(self._vp, self.sint, Message(HVMSG_VMBUS, payload))

    def send_all(self, messages: Iterable[vmbus.ChannelMessage | None]) -> None:
        """Send those that are not None."""
        for message in messages:
            if message is not None:
                self.send(message)

    # --- the connection ---

    def _reset(self, then: Callable[[], None]) -> None:
        self._resetting = self._lifecycle.spawn(self._do_reset(then))

    async def _do_reset(self, then: Callable[[], None]) -> None:
        try:
            await self._close_all()
            self.gpadls.clear()
            self._synic.forget_messages()
            self.connection = None
            self.offers_requested = False
            for channel in list(self._channels.values()):
                if channel.device is None or channel.sub_channel_index:
                    del self._channels[channel.relid]
                channel.offered = channel.revoked = False
                channel.withheld = ""
                channel.rings = None
            self._changed()
            if self._attached:
                then()
        finally:
            self._resetting = None
        self._pump()

    def _contact(self, message: vmbus.InitiateContact) -> None:
        answer = negotiate(message, len(self._synic.processors), self._oldest, self._newest)
        self._vp, self.sint = answer.vp, answer.sint
        self.connection = answer.connection
        self._changed()
        self.send(answer.response)

    def _unloaded(self) -> None:
        self.send(vmbus.UnloadResponse())

    def _on_request_offers(self, message: vmbus.RequestOffers) -> None:
        if self.offers_requested:
            raise WireError("REQUESTOFFERS: asked twice on one connection")
        self.offers_requested = True
        for channel in sorted(self._channels.values(), key=lambda entry: _offer_order(entry)):
            if channel.device is not None and not channel.offered and not channel.revoking:
                self._offer_channel(channel)
        self.send(vmbus.AllOffersDelivered())
        self._changed()

    # --- channels ---

    @property
    def _most_channels(self) -> int:
        return min(self._quotas.channels, vmbus.MAXIMUM_RELID)

    def _add_channel(self, key: tuple[UUID, UUID, int], device: VmbusDevice | None) -> Channel:
        if len(self._channels) >= self._most_channels:
            raise RuntimeError(f"partition {self.name}: {len(self._channels)} channels, no more are allowed")
        relid = self._relids.get(key, 0)
        if not relid or relid in self._channels:
            taken = set(self._channels) | set(self._relids.values())
            free = (number for number in range(1, vmbus.MAXIMUM_RELID + 1) if number not in taken)
            relid = next(free, 0)
        if not relid:
            # Every number was somebody's once: what is gone for good gives its number back.
            self._relids = {entry.key: entry.relid for entry in self._channels.values()}
            relid = next(n for n in range(1, vmbus.MAXIMUM_RELID + 1) if n not in self._channels)
        self._relids[key] = relid
        channel = Channel(relid, *key, device)
        self._channels[relid] = channel
        return channel

    def _offer_channel(self, channel: Channel) -> None:
        channel.offered = True
        self._changed()
        self.send(channel.offer_message())

    def _guests(self, relid: int, what: str) -> Channel:
        channel = self._channels.get(relid)
        if channel is None or not channel.offered:
            raise WireError(f"{what}: channel {relid} is not offered")
        return channel

    def _on_open(self, message: vmbus.OpenChannel) -> None:
        channel = self._guests(message.relid, "OPENCHANNEL")
        if channel.revoked:
            return
        if channel.state is ChannelState.CLOSING:
            channel.reopen = message
        elif channel.state is ChannelState.CLOSED and not channel.revoking:
            primary = self.primary_of(channel)
            if channel.sub_channel_index and (primary is None or primary.leaving):
                # Its RESCIND follows the primary's end; whoever waits for an answer is woken by it.
                self.error(f"OPENCHANNEL: the primary of sub-channel {channel.relid} is not open")
                return
            self._lifecycle.start_open(channel, message)
        else:
            raise WireError(f"OPENCHANNEL: channel {channel.relid} is {channel.state.value}")

    def _on_close(self, message: vmbus.CloseChannel) -> None:
        channel = self._guests(message.relid, "CLOSECHANNEL")
        if channel.revoked or channel.revoking:
            return
        if channel.state is not ChannelState.OPEN:
            raise WireError(f"CLOSECHANNEL: channel {channel.relid} is {channel.state.value}")
        channel.state = ChannelState.CLOSING
        self._lifecycle.run(channel, self._lifecycle.close_for_guest(channel))

    async def _close_all(self) -> None:
        # Sub-channels before their primaries.
        for channel in sorted(self._channels.values(), key=lambda entry: -entry.sub_channel_index):
            await self._lifecycle.quiesce(channel)

    async def _revoke(self, channel: Channel, *, keep_device: bool = False) -> None:
        while channel.revoking is not None:
            await asyncio.wait({channel.revoking})
            if keep_device or channel.device is None:
                return
        channel.revoking = done = self._loop.create_future()
        try:
            if not channel.sub_channel_index:
                await self.revoke_sub_channels(channel)
            await self._lifecycle.quiesce(channel)
            if not keep_device:
                channel.device = None
            if self._channels.get(channel.relid) is not channel:
                return
            if channel.offered:
                if self._attached and not channel.revoked:
                    channel.revoked = True
                    self.send_all(self.gpadls.abandon_channel(channel.relid))
                    self.send(vmbus.RescindChannelOffer(channel.relid))
            elif channel.device is None:
                del self._channels[channel.relid]
        finally:
            channel.revoking = None
            done.set_result(None)
        self._changed()

    async def revoke_sub_channels(self, primary: Channel) -> None:
        """Take the sub-channels of a primary channel away."""
        for channel in self.channels:
            if channel.key[:2] == primary.key[:2] and channel.sub_channel_index:
                await self._revoke(channel)

    def offer_sub_channels(self, primary: Channel, count: int) -> None:
        """`OpenedChannel.offer_sub_channels`. ValueError for more than the device has.

        Of a channel that is on its way out none are offered: the guest is told of its end instead. Nor are
        any while there is no room for them; that is the guest's own fault, counted as an error.
        """
        device = primary.device
        if primary.leaving:
            return
        if device is None or count > device.sub_channel_limit:
            raise ValueError(f"channel {primary.relid}: {count} sub-channels are more than the device has")
        there = [
            entry
            for entry in self._channels.values()
            if entry.key[:2] == primary.key[:2] and entry.sub_channel_index
        ]
        # One that is rescinded and waits for RELID_RELEASED does not stand in the way: the guest may ask
        # again before it has let go of the old one, and waits for the new one without a limit. But a guest
        # that never lets go may not use up the relids: the host's own offers need some.
        going = [entry for entry in there if entry.revoked or entry.revoking]
        indices = {entry.sub_channel_index for entry in there if entry not in going}
        missing = [index for index in range(1, count + 1) if index not in indices]
        if len(going) > 2 * device.sub_channel_limit:
            self.error(
                f"channel {primary.relid}: no sub-channels are offered while {len(going)} rescinded ones are"
                " not released"
            )
        elif len(self._channels) + len(missing) > self._most_channels:
            self.error(f"channel {primary.relid}: {len(missing)} sub-channels are more than there are relids")
        else:
            for index in missing:
                key = (primary.class_id, primary.instance_id, index)
                self._offer_channel(self._add_channel(key, device))

    def primary_of(self, channel: Channel) -> Channel | None:
        """The primary channel of the device that `channel` belongs to."""
        key = (*channel.key[:2], 0)
        return next((entry for entry in self._channels.values() if entry.key == key), None)

    def report_fault(self, channel: Channel, opened: OpenedChannel, text: str) -> None:
        """`OpenedChannel.report_fault`; from any thread."""
        first = not opened.faults
        if len(opened.faults) < 16:
            opened.faults.append(text)
        if first:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._fault, channel, opened, text)

    def _fault(self, channel: Channel, opened: OpenedChannel, text: str) -> None:
        if channel.opened is not opened:
            return
        _log.warning("partition %s: channel %d is taken away: %s", self.name, channel.relid, text)
        self.error(f"channel {channel.relid}: {text}")
        channel.faults = [*channel.faults[-15:], text]
        channel.withheld = text
        self._lifecycle.spawn(self._revoke(channel, keep_device=True))

    def _on_relid_released(self, message: vmbus.RelidReleased) -> None:
        channel = self._guests(message.relid, "RELID_RELEASED")
        if channel.revoked:
            self.gpadls.forget_channel(channel.relid)
            channel.offered = channel.revoked = False
            channel.rings = None
            if channel.device is None or channel.sub_channel_index:
                del self._channels[channel.relid]
            elif self.offers_requested and not channel.withheld:
                self._offer_channel(channel)
        elif channel.state in (ChannelState.CLOSED, ChannelState.CLOSING):
            channel.offered = False
            channel.withheld = "the guest released the relid"
            channel.reopen = None
        else:
            raise WireError(f"RELID_RELEASED: channel {channel.relid} is {channel.state.value}")
        self._changed()

    def _on_modify_channel(self, message: vmbus.ModifyChannel) -> None:
        channel = self._guests(message.relid, "MODIFYCHANNEL")
        status = vmbus.STATUS_UNSUCCESSFUL
        if channel.interrupt is not None and message.target_vp < len(self._synic.processors):
            channel.interrupt.move(message.target_vp)
            status = vmbus.STATUS_SUCCESS
        else:
            self.error(
                f"MODIFYCHANNEL: channel {channel.relid} to virtual processor {message.target_vp:#x} refused"
            )
        assert self.connection is not None
        if self.connection.version >= VmbusVersion.IRON:
            self.send(vmbus.ModifyChannelResponse(channel.relid, status))

    # --- GPADLs ---

    def _on_gpadl_header(self, message: vmbus.GpadlHeader) -> None:
        channel = self._channels.get(message.relid)
        if channel is None or not channel.offered:
            self.error(f"GPADL_HEADER: channel {message.relid} is not offered")
            self.send(vmbus.GpadlCreated(message.relid, message.gpadl_id, vmbus.STATUS_UNSUCCESSFUL))
            return
        self._send_created(self.gpadls.header(message, self._synic.memory))

    def _on_gpadl_body(self, message: vmbus.GpadlBody) -> None:
        self._send_created(self.gpadls.body(message, self._synic.memory))

    def _send_created(self, answer: vmbus.GpadlCreated | None) -> None:
        if answer is None:
            return
        if answer.status:
            self.error(f"GPADL {answer.gpadl_id:#x} of channel {answer.relid} refused")
        self.send(answer)

    def _on_gpadl_teardown(self, message: vmbus.GpadlTeardown) -> None:
        channel = self._guests(message.relid, "GPADL_TEARDOWN")
        try:
            self.send_all([self.gpadls.teardown(message)])
        except WireError:
            if not channel.revoked:
                raise
            # After a rescind every teardown is answered at once: the guest waits for it without a limit.
            self.send(vmbus.GpadlTorndown(message.gpadl_id))

    def release_gpadl(self, relid: int, gpadl_id: int) -> None:
        """`OpenedChannel.release_gpadl`."""
        self.send_all([self.gpadls.release(relid, gpadl_id)])

    def _on_tl_connect(self, message: vmbus.TlConnectRequest) -> None:
        assert self.connection is not None
        if self.connection.version < VmbusVersion.WIN10_RS3_0:
            # The answer came with 4.1; guests of earlier versions warn of a message they do not know.
            raise WireError("TL_CONNECT_REQUEST: no sockets are served")
        self.send(
            vmbus.TlConnectResult(message.endpoint_id, message.service_id, vmbus.STATUS_CONNECTION_REFUSED)
        )

    # --- save and restore ---

    def save(self) -> dict[str, Any]:
        """What a new server needs to go on with this guest."""
        connection = self.connection
        return {
            "version": 1,
            "connection": None
            if connection is None
            else {
                "version": int(connection.version),
                "vp": connection.vp,
                "sint": connection.sint,
                "features": connection.features,
            },
            "offers_requested": self.offers_requested,
            "offered": [
                {
                    "relid": channel.relid,
                    "class": str(channel.class_id),
                    "instance": str(channel.instance_id),
                    "sub_channel_index": channel.sub_channel_index,
                    "rings": channel.rings and channel.rings.save(),
                }
                for channel in self.channels
                if channel.offered
            ],
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """State from `save()`; devices are offered again by `offer()`."""
        if saved["version"] != 1:
            raise ValueError(
                f"partition {self.name}: saved VMBus state has version {saved['version']}, 1 is known"
            )
        if saved["connection"] is not None:
            connection = saved["connection"]
            self.connection = Connection(
                VmbusVersion(connection["version"]),
                connection["vp"],
                connection["sint"],
                connection["features"],
            )
            self._vp, self.sint = connection["vp"], connection["sint"]
        self.offers_requested = saved["offers_requested"]
        for entry in saved["offered"]:
            key = (UUID(entry["class"]), UUID(entry["instance"]), entry["sub_channel_index"])
            self._relids[key] = entry["relid"]
            rings = entry.get("rings")  # absent in what an older host saved
            self._channels[entry["relid"]] = Channel(
                entry["relid"], *key, None, offered=True, rings=OpenRings.restore(rings) if rings else None
            )


def _offer_order(channel: Channel) -> tuple[str, str, int]:
    return str(channel.class_id), str(channel.instance_id), channel.sub_channel_index


_HANDLERS: dict[type[vmbus.ChannelMessage], Callable[[VmbusServer, Any], None]] = {
    vmbus.RequestOffers: VmbusServer._on_request_offers,
    vmbus.OpenChannel: VmbusServer._on_open,
    vmbus.CloseChannel: VmbusServer._on_close,
    vmbus.GpadlHeader: VmbusServer._on_gpadl_header,
    vmbus.GpadlBody: VmbusServer._on_gpadl_body,
    vmbus.GpadlTeardown: VmbusServer._on_gpadl_teardown,
    vmbus.RelidReleased: VmbusServer._on_relid_released,
    vmbus.ModifyChannel: VmbusServer._on_modify_channel,
    vmbus.TlConnectRequest: VmbusServer._on_tl_connect,
}
