"""What happens between OPENCHANNEL and the device's `close()`: one task per channel, never two at a time."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from hypervisor.synic import Synic
from hypervisor.vmbus.abandoned import OpenRings
from hypervisor.vmbus.channel import Channel, ChannelState
from hypervisor.vmbus.device import ChannelRefused, OpenedChannel
from vswitch_wire import vmbus
from vswitch_wire.errors import WireError

if TYPE_CHECKING:
    from hypervisor.vmbus.server import VmbusServer

_log = logging.getLogger("hypervisor.vmbus")


class ChannelLifecycle:
    """Opens and closes the channels of one server. On the event loop."""

    def __init__(
        self, server: VmbusServer, synic: Synic, send_eventfd: Callable[[int, int | None], None]
    ) -> None:
        self._server = server
        self._synic = synic
        self._send_eventfd = send_eventfd
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    def start_open(self, channel: Channel, message: vmbus.OpenChannel) -> None:
        """Open a closed channel. The guest is answered when the device has, at once for a bad request."""
        assert channel.device is not None
        doorbell = -1
        try:
            vp: int | None = message.target_vp
            if vp == vmbus.TARGET_VP_DISABLED:
                vp = None
            elif message.target_vp >= len(self._synic.processors):
                raise WireError(f"virtual processor {message.target_vp} does not exist")
            # Descriptors first: where they fail nothing else has to be given back.
            doorbell = self._doorbell(channel)
            channel.interrupt = self._synic.bind(channel.relid, self._server.sint, vp)
            pfns = self._server.gpadls.ring(channel.relid, message.ring_gpadl, message.downstream_page_offset)
        except (WireError, OSError) as error:
            if isinstance(error, OSError):
                _log.warning(
                    "partition %s: channel %d cannot be opened: %s", self._server.name, channel.relid, error
                )
            if doorbell >= 0:
                os.close(doorbell)
            channel.drop_resources()
            self._server.error(f"OPENCHANNEL of channel {channel.relid}: {error}")
            self._server.send(
                vmbus.OpenChannelResult(message.relid, message.open_id, vmbus.STATUS_UNSUCCESSFUL)
            )
            return
        channel.opened = opened = OpenedChannel(
            relid=channel.relid,
            open_id=message.open_id,
            sub_channel_index=channel.sub_channel_index,
            memory=self._synic.memory,
            ring_pfns=pfns,
            downstream_page_offset=message.downstream_page_offset,
            doorbell_fd=doorbell,
            interrupt=channel.interrupt.interrupt,
            user_data=message.user_data,
            gpadl=functools.partial(self._server.gpadls.use, channel.relid),
            release_gpadl=functools.partial(self._server.release_gpadl, channel.relid),
            report_fault=lambda text: self._server.report_fault(channel, opened, text),
            offer_sub_channels=functools.partial(self._server.offer_sub_channels, channel),
        )
        channel.rings = OpenRings(tuple(pfns), message.downstream_page_offset, vp)
        channel.state = ChannelState.OPENING
        self.run(channel, self._open(channel, opened))

    def _doorbell(self, channel: Channel) -> int:
        """The eventfd that the guest signals: the primary's for a device that serves all rings at once."""
        if channel.sub_channel_index and getattr(channel.device, "shares_doorbell", False):
            primary = self._server.primary_of(channel)
            if primary is not None and primary.opened is not None:
                return os.dup(primary.opened.doorbell_fd)
        return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    async def _open(self, channel: Channel, opened: OpenedChannel) -> None:
        device = channel.device
        assert device is not None
        status = vmbus.STATUS_SUCCESS
        self._send_eventfd(channel.connection_id, opened.doorbell_fd)
        try:
            await device.open(opened)
        except ChannelRefused as refused:
            status = refused.status
            self._server.error(f"channel {channel.relid}: {refused}")
        except WireError as error:
            status = vmbus.STATUS_UNSUCCESSFUL
            self._server.error(f"channel {channel.relid}: {error}")
        except Exception:
            status = vmbus.STATUS_UNSUCCESSFUL
            _log.exception(
                "partition %s: device of channel %d failed to open", self._server.name, channel.relid
            )
        if status != vmbus.STATUS_SUCCESS:
            channel.state = ChannelState.CLOSING
            if not channel.sub_channel_index:
                await self._server.revoke_sub_channels(channel)
            channel.rings = None
            channel.reopen = None  # one OPENCHANNEL at a time: what came before the answer was misplaced
            self._let_go(channel)
        else:
            channel.state = ChannelState.OPEN
            self._server.changed()
        if not channel.revoking and not self._server.resetting:
            self._server.send(vmbus.OpenChannelResult(channel.relid, opened.open_id, status))

    async def close_for_guest(self, channel: Channel) -> None:
        """CLOSECHANNEL: close the device, take sub-channels away, open again if that was asked meanwhile."""
        channel.rings = None
        await self._close_rings(channel)
        if not channel.sub_channel_index:
            # Before the channel counts as closed: an OPENCHANNEL that comes now waits for the sub-channels to
            # be gone, so that those asked for after it are offered anew.
            await self._server.revoke_sub_channels(channel)
        self._let_go(channel)
        if channel.reopen is not None:
            # This task is the channel's current one: the next may start when it has ended.
            self._loop.call_soon(self._reopen, channel)

    def _reopen(self, channel: Channel) -> None:
        # Whoever quiesced the channel since then took the message out; the device may be gone too.
        message, channel.reopen = channel.reopen, None
        if (
            message is not None
            and channel.device is not None
            and channel.offered
            and channel.state is ChannelState.CLOSED
            and channel.task is None
            and not (channel.revoking or channel.revoked or self._server.resetting)
        ):
            self.start_open(channel, message)

    async def _close_device(self, channel: Channel) -> None:
        await self._close_rings(channel)
        self._let_go(channel)

    async def _close_rings(self, channel: Channel) -> None:
        channel.state = ChannelState.CLOSING
        assert channel.device is not None
        assert channel.opened is not None
        try:
            await channel.device.close(channel.opened)
        except Exception:
            _log.exception(
                "partition %s: device of channel %d failed to close", self._server.name, channel.relid
            )

    def _let_go(self, channel: Channel) -> None:
        channel.drop_resources()
        channel.state = ChannelState.CLOSED
        self._send_eventfd(channel.connection_id, None)
        self._server.send_all(self._server.gpadls.release_channel(channel.relid))

    def run(self, channel: Channel, work: Awaitable[None]) -> None:
        """Make this the channel's task; there must be none."""

        async def guarded() -> None:
            try:
                await work
            finally:
                channel.task = None

        channel.task = self.spawn(guarded())

    def spawn(self, work: Any) -> asyncio.Task[None]:
        """A task that is kept until it ends."""
        task: asyncio.Task[None] = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def quiesce(self, channel: Channel) -> None:
        """Returns when the channel is closed, whatever state it was in."""
        channel.reopen = None
        while channel.task is not None or channel.opened is not None:
            if channel.task is None:
                self.run(channel, self._close_device(channel))
            assert channel.task is not None
            await asyncio.wait({channel.task})
