"""The synthetic NIC: what VMBus offers to a guest, connected to a switch port.

Life cycle: made with the port it is plugged into, offered by the partition's VMBus server. Each time the
guest opens the channel a session starts from nothing (handshake, RNDIS, buffers); only link state, MTU and
the configured address outlive it. Closing detaches the port first, so that nothing touches guest memory when
`close` returns.

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
from netvsp.data_channel import DataChannel, open_data_channel
from netvsp.handshake import Handshake, ProtocolError, Step
from netvsp.oids import Adapter
from netvsp.rndis_control import RndisControl
from vswitch.drops import DropReason
from vswitch_wire import ndis, nvsp, rndis
from vswitch_wire.engine import Engine
from vswitch_wire.gpadl import GpaRange

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


class SyntheticNic:
    """A synthetic network adapter (VmbusDevice) plugged into one switch port."""

    class_id = CLASS_ID

    def __init__(
        self,
        name: str,
        mac: bytes,
        instance_id: UUID,
        port: SwitchPort,
        *,
        mtu: int = 1500,
        engine: Engine = "native",
        link_speed_bps: int = 10_000_000_000,
    ) -> None:
        """``mac``: 6 bytes, no group address; ``mtu``: layer-3 bytes, 68..9202. Raises ValueError."""
        if len(mac) != 6 or mac[0] & 1 or not any(mac):
            raise ValueError(f"NIC {name}: {mac.hex(':')} is no station address; give six bytes, not a group")
        if not 68 <= mtu <= limits.MTU_MAX - limits.ETHERNET_HEADER:
            largest = limits.MTU_MAX - limits.ETHERNET_HEADER
            raise ValueError(f"NIC {name}: MTU {mtu} is out of range; choose 68 to {largest}")
        self.name = name
        self.instance_id = instance_id
        self.sub_channel_limit = 0
        self.mac = bytes(mac)
        self.mtu = mtu
        self.engine: Engine = engine
        self.link_speed_bps = link_speed_bps
        self._port = port
        self._link = True
        self._tap = False
        self._session: _Session | None = None
        self.faults: list[str] = []
        """Why guests lost this NIC's channel, newest last, at most 16."""

    async def open(self, channel: OpenedChannel) -> None:
        """The guest opened the channel. Raises ChannelRefused when its rings are unusable."""
        if channel.sub_channel_index:
            raise ChannelRefused(
                f"NIC {self.name}: sub-channel {channel.sub_channel_index} was never offered"
            )
        if self._session is not None:
            raise ChannelRefused(f"NIC {self.name}: the channel is open already")
        try:
            data = open_data_channel(self.engine, channel)
        except ValueError as error:
            raise ChannelRefused(f"NIC {self.name}: {error}") from error
        session = _Session(self, channel, data)
        self._session = session
        try:
            session.start()
            data.set_link(self._link)
            data.tap(self._tap)
            await self._port.attach(data.endpoint())
        except BaseException:
            session.stop()
            data.close()
            self._session = None
            raise

    async def close(self, channel: OpenedChannel) -> None:
        """Ends the session; returns when neither rings nor buffers are touched any more."""
        session = self._session
        if session is None or session.opened is not channel:
            return
        session.stop()
        await self._port.detach()
        session.data.close()
        self._session = None

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
        )

    async def set_link(self, up: bool) -> None:
        """Plugs or unplugs the cable: the guest is told, frames towards it are dropped while it is down."""
        changed = up != self._link
        self._link = up
        session = self._session
        if session is None or not changed:
            return
        session.adapter.link = up
        session.data.set_link(up)
        status = rndis.RNDIS_STATUS_MEDIA_CONNECT if up else rndis.RNDIS_STATUS_MEDIA_DISCONNECT
        session.control.indicate(status)

    def stats(self) -> dict[str, int]:
        """The open channel's counters; empty while it is closed."""
        return self._session.data.stats() if self._session else {}

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


class _Session:
    """One opened channel: its handshake, its RNDIS control plane, its data channel."""

    def __init__(self, nic: SyntheticNic, opened: OpenedChannel, data: DataChannel) -> None:
        self.nic = nic
        self.opened = opened
        self.data = data
        self._gpadls: dict[bytes, int] = {}
        self._indicate_offload = False
        self._stopped = False
        self.adapter = Adapter(
            nic.mac,
            mtu=nic.mtu + limits.ETHERNET_HEADER,
            link_speed_bps=nic.link_speed_bps,
            link=nic.state.link,
            max_queues=1 + nic.sub_channel_limit,
            counters=self._counters,
            on_change=self._oid_set,
        )
        self.control = RndisControl(self.adapter, data.send_rndis, self._rndis_state)
        self.handshake = Handshake(
            data,
            self._gpadl,
            self.control.query,
            sub_channel_limit=nic.sub_channel_limit,
            host_mtu=nic.mtu + limits.ETHERNET_HEADER,
            mtu=min(limits.MTU_DEFAULT, nic.mtu + limits.ETHERNET_HEADER),
        )
        data.set_mtu(self.handshake.mtu)

    def start(self) -> None:
        """Listens for control messages."""
        asyncio.get_running_loop().add_reader(self.data.control_fd, self._on_control)

    def stop(self) -> None:
        """Stops listening; the data channel is still open."""
        if not self._stopped:
            self._stopped = True
            asyncio.get_running_loop().remove_reader(self.data.control_fd)

    def _on_control(self) -> None:
        for kind, transaction_id, requested, payload in self.data.take_control():
            try:
                self._take(kind, transaction_id, requested, payload)
            except ProtocolError as error:
                self._fault(str(error))
                return
        fault = self.data.fault()
        if fault is not None:
            self._fault(fault)

    def _fault(self, text: str) -> None:
        self.stop()
        self.nic.note_fault(text)
        self.opened.report_fault(f"NIC {self.nic.name}: {text}")

    def _take(self, kind: str, transaction_id: int, requested: bool, payload: bytes) -> None:
        if kind == "inband":
            answer = self.handshake.handle(payload)
            self._follow_handshake()
            if requested:
                self.data.send_completion(transaction_id, answer or b"")
        elif kind == "rndis":
            if not self.handshake.ready:
                raise ProtocolError("an RNDIS message before the receive buffer")
            self.control.handle(payload)
            if self._indicate_offload:
                self._indicate_offload = False
                status = rndis.RNDIS_STATUS_TASK_OFFLOAD_CURRENT_CONFIG
                self.control.indicate(status, self.adapter.offload.current())
        elif kind == "revoked":
            gpadl = self._gpadls.pop(payload, None)
            if gpadl is not None:
                self.opened.release_gpadl(gpadl)

    def _gpadl(self, gpadl_id: int) -> GpaRange:
        pages: GpaRange = self.opened.gpadl(gpadl_id)
        receive = self.handshake.step is Step.RECEIVE_BUFFER_SET
        self._gpadls[b"receive" if receive else b"send"] = gpadl_id
        return pages

    def _follow_handshake(self) -> None:
        shake = self.handshake
        self.adapter.mtu = shake.mtu
        if shake.ndis_version != (0, 0):
            self.adapter.ndis_version = shake.ndis_version
        self.adapter.offload.rsc_offered = shake.version >= nvsp.NvspVersion.V61 and bool(
            shake.capabilities & nvsp.NVSP_CAPABILITY_RSC_OVER_VMBUS
        )

    def _oid_set(self, oid: int) -> None:
        if oid == ndis.OID_TCP_OFFLOAD_PARAMETERS:
            self._indicate_offload = True
        self.data.set_offload(self.adapter.offload.receive_bits())
        self.data.set_filter(self.adapter.filter, self.adapter.address)

    def _rndis_state(self, initialised: bool) -> None:
        self.data.set_filter(self.adapter.filter, self.adapter.address)
        self.data.set_data(initialised)

    def _counters(self) -> dict[str, int]:
        counters = self.data.stats()
        counters["no_buffer"] = self.data.drops().get(int(DropReason.RESOURCES), 0)
        return counters


__all__ = ["CLASS_ID", "NicState", "SwitchPort", "SyntheticNic"]
