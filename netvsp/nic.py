"""The synthetic NIC: what VMBus offers to a guest, connected to a switch port.

Life cycle: made with the port it is plugged into, offered by the partition's VMBus server. Each time the
guest opens the primary channel a session starts from nothing (`netvsp.session`: handshake, RNDIS, buffers,
sub-channels); only link state, MTU and the configured address outlive it. Closing detaches the port first, so
that nothing touches guest memory when `close` returns.

Threads: everything here runs on the event loop; with the native engine the data channel's other half runs
on the switch's worker and hands whole control messages over through `control_fd`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID

from hypervisor.vmbus.device import ChannelRefused, OpenedChannel
from netvsp import limits
from netvsp.data_channel import open_data_channel
from netvsp.session import Session
from vswitch_wire import nvsp, rndis
from vswitch_wire.engine import Engine

QUIET, QUIET_LIMIT = 0.15, 5.0
"""Seconds without a frame that make a guest quiet, and how long is waited for them. Linux acts on a link
change two seconds after the last one at the earliest."""
CLASS_ID = UUID("f8615163-df3e-46c5-913f-f2d2f965ed0e")


class SwitchPort(Protocol):
    """The port a NIC is plugged into; `vswitch.Port` is one."""

    async def attach(self, endpoint: Any) -> None:
        """Connects the data channel's endpoint."""

    async def detach(self) -> None:
        """Disconnects it; returns when nothing touches the endpoint any more."""


@dataclass(frozen=True, slots=True)
class NicState:
    """What the NIC is now, for the API and for people."""

    name: str
    open: bool
    initialised: bool
    """RNDIS is up: frames flow if the guest also set a packet filter."""
    nvsp_version: int
    """0 until one was agreed."""
    link: bool
    mtu: int
    """Agreed largest frame with Ethernet header, bytes."""
    permanent_address: bytes
    address: bytes
    packet_filter: int
    path: str
    """``synthetic`` or ``vf``."""
    queues: int
    """The most channels that the guest may have."""
    open_queues: int
    """Channels that it has now."""
    rss: bool
    """Whether the guest switched receive-side scaling on."""


class SyntheticNic:
    """A synthetic network adapter (VmbusDevice) plugged into one switch port."""

    class_id = CLASS_ID
    shares_doorbell = True
    """All channels signal one eventfd: one worker serves all rings, and looks at each when it wakes."""

    def __init__(
        self,
        name: str,
        mac: bytes,
        instance_id: UUID,
        port: SwitchPort,
        *,
        mtu: int = 1500,
        queues: int = 1,
        engine: Engine = "native",
        link_speed_bps: int = 10_000_000_000,
    ) -> None:
        """``mac``: 6 bytes, no group address; ``mtu``: layer-3 bytes, 68..9202; ``queues``: channels that a
        guest may open, 1..64. Raises ValueError."""
        if len(mac) != 6 or mac[0] & 1 or not any(mac):
            raise ValueError(f"NIC {name}: {mac.hex(':')} is no station address; give six bytes, not a group")
        if not 68 <= mtu <= limits.MTU_MAX - limits.ETHERNET_HEADER:
            largest = limits.MTU_MAX - limits.ETHERNET_HEADER
            raise ValueError(f"NIC {name}: MTU {mtu} is out of range; choose 68 to {largest}")
        if not 1 <= queues <= limits.MAX_QUEUES:
            raise ValueError(f"NIC {name}: {queues} queues; choose 1 to {limits.MAX_QUEUES}")
        self.name = name
        self.instance_id = instance_id
        self.sub_channel_limit = queues - 1
        self.mac = bytes(mac)
        self.mtu = mtu
        self.engine: Engine = engine
        self.link_speed_bps = link_speed_bps
        self._port = port
        self._link = True
        self._tap = False
        self._session: Session | None = None
        self.faults: list[str] = []
        """Why guests lost this NIC's channel, newest last, at most 16."""

    @staticmethod
    def abandoned(payload: bytes) -> bytes:
        """A frame that no host took is answered as failed; so is whatever else waits, with nothing."""
        sends = payload[:4] == nvsp.NVSP_MSG1_TYPE_SEND_RNDIS_PKT.to_bytes(4, "little")
        return nvsp.SendRndisPacketComplete(nvsp.NVSP_STAT_FAIL).pack() if sends else b""

    async def open(self, channel: OpenedChannel) -> None:
        """The guest opened a channel. Raises ChannelRefused when its rings are unusable."""
        if channel.sub_channel_index:
            if self._session is None:
                raise ChannelRefused(f"NIC {self.name}: the primary channel is closed")
            try:
                self._session.open_sub_channel(channel)
            except ValueError as error:
                raise ChannelRefused(f"NIC {self.name}: {error}") from error
            return
        if self._session is not None:
            raise ChannelRefused(f"NIC {self.name}: the channel is open already")
        try:
            data = open_data_channel(self.engine, channel)
        except ValueError as error:
            raise ChannelRefused(f"NIC {self.name}: {error}") from error
        session = Session(self, channel, data)
        self._session = session
        try:
            session.start()
            data.set_link(self._link)
            data.tap(self._tap)
            await self._port.attach(data.endpoint())
        except BaseException:
            self._end(session)
            raise

    async def close(self, channel: OpenedChannel) -> None:
        """Ends a sub-channel or, with the primary channel, the session; returns when neither rings nor
        buffers are touched any more."""
        session = self._session
        if session is None:
            return
        if channel.sub_channel_index:
            await session.close_sub_channel(channel)
            return
        if session.opened is not channel:
            return
        session.stop()
        try:
            await self._port.detach()
        finally:
            # A port that fails to let go must not keep the NIC from ever being opened again.
            self._end(session)

    def _end(self, session: Session) -> None:
        self._session = None
        session.ended()
        session.data.close()

    @property
    def link(self) -> bool:
        """Whether the cable is plugged in."""
        return self._link

    @property
    def state(self) -> NicState:
        """A snapshot."""
        session = self._session
        return NicState(
            name=self.name,
            open=session is not None,
            initialised=session is not None and session.control.initialised,
            nvsp_version=session.handshake.version if session else 0,
            link=self._link,
            mtu=session.handshake.mtu if session else self.mtu + limits.ETHERNET_HEADER,
            permanent_address=self.mac,
            address=session.adapter.address if session else self.mac,
            packet_filter=session.adapter.filter if session else 0,
            path="synthetic",
            queues=1 + self.sub_channel_limit,
            open_queues=1 + len(session.sub_channels) if session else 0,
            rss=session is not None and session.adapter.rss.enabled,
        )

    async def set_link(self, up: bool) -> None:
        """Plugs or unplugs the cable: the guest is told, frames are dropped both ways while it is down."""
        changed = up != self._link
        self._link = up
        session = self._session
        if session is None or not changed:
            return
        session.adapter.link = up
        session.data.set_link(up)
        status = rndis.RNDIS_STATUS_MEDIA_CONNECT if up else rndis.RNDIS_STATUS_MEDIA_DISCONNECT
        session.control.indicate(status)

    async def retire(self) -> None:
        """Before the offer is rescinded: takes the link down and waits, some seconds at most, until the guest
        sends no more. After a rescind nobody answers, and Linux waits for answers (netvsc.c, wait_drain)."""
        session = self._session
        if session is None or not session.control.initialised:
            return
        await self.set_link(False)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + QUIET_LIMIT
        before = -1
        while self._session is session and loop.time() < deadline:
            sent = session.data.stats().get("frames_from_guest", 0)
            if sent == before:
                return
            before = sent
            await asyncio.sleep(QUIET)

    def stats(self) -> dict[str, int]:
        """The open channel's counters; empty while it is closed."""
        return self._session.data.stats() if self._session else {}

    def queue_stats(self) -> list[dict[str, int]]:
        """The open channel's counters by queue; empty while it is closed."""
        return self._session.data.queue_stats() if self._session else []

    def drops(self) -> dict[int, int]:
        """Frames that the open channel itself refused, by drop-reason code."""
        return self._session.data.drops() if self._session else {}

    def tap(self, on: bool) -> None:
        """Starts or stops keeping copies of the channel's ring packets, over reopens too."""
        self._tap = on
        if self._session:
            self._session.data.tap(on)

    def take_tapped(self) -> list[tuple[int, str, bytes]]:
        """(nanoseconds since the epoch, ``in`` | ``out``, ring packet) since the last call."""
        return self._session.data.take_tapped() if self._session else []

    def note_fault(self, text: str) -> None:
        """Remembers why a guest lost the channel."""
        self.faults = [*self.faults[-15:], text]


__all__ = ["CLASS_ID", "NicState", "SwitchPort", "SyntheticNic"]
