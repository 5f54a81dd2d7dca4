"""What one opened NIC has: from the guest's open of the primary channel to its close.

The session listens for what the data channel hands up (control messages, faults, buffers and queues let go
of), drives NVSP and RNDIS, and keeps the sub-channels: granted by the handshake, offered after the answer,
opened and closed by the guest in any order.

Threads: on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from hypervisor.vmbus.device import OpenedChannel
from netvsp import limits
from netvsp.data_channel import DataChannel
from netvsp.handshake import Handshake, ProtocolError, Step
from netvsp.oids import Adapter
from netvsp.rndis_control import RndisControl
from vswitch.drops import DropReason
from vswitch_wire import ndis, nvsp, rndis
from vswitch_wire.gpadl import GpaRange

_log = logging.getLogger("netvsp")

SEND_TABLE_ENTRIES = 16
HOST_REQUEST_ID = 1 << 63
"""Transaction id of in-band messages of the host's own: receive packets never have it."""


class Nic(Protocol):
    """What a session needs of its NIC."""

    name: str
    mac: bytes
    mtu: int
    link_speed_bps: int
    sub_channel_limit: int

    @property
    def link(self) -> bool: ...
    def note_fault(self, text: str) -> None: ...


class Session:
    """One opened NIC: its handshake, its RNDIS control plane, its data channel, its sub-channels."""

    def __init__(self, nic: Nic, opened: OpenedChannel, data: DataChannel) -> None:
        self.nic = nic
        self.opened = opened
        self.data = data
        self._gpadls: dict[bytes, int] = {}
        self._indicate_offload = False
        self._stopped = self._faulty = False
        self.sub_channels: dict[int, OpenedChannel] = {}
        self._closing: dict[int, asyncio.Future[None]] = {}
        self.adapter = Adapter(
            nic.mac,
            mtu=nic.mtu + limits.ETHERNET_HEADER,
            link_speed_bps=nic.link_speed_bps,
            link=nic.link,
            max_queues=1 + nic.sub_channel_limit,
            counters=self._counters,
            on_change=self._oid_set,
        )
        self.control = RndisControl(self.adapter, data.send_rndis, self._rndis_state)
        self.handshake = Handshake(
            data,
            self._gpadl,
            self.control.query,
            self._drop_gpadl,
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

    def ended(self) -> None:
        """The port let go of the endpoint: no ring is touched any more."""
        self.stop()
        for done in self._closing.values():
            if not done.done():
                done.set_result(None)
        # They call back into this session: such a circle would keep guest memory mapped and eventfds open
        # until the garbage collector comes by.
        del self.adapter, self.control, self.handshake

    # Sub-channels.

    def open_sub_channel(self, channel: OpenedChannel) -> None:
        """The guest opened one that it was granted. Raises ValueError."""
        index = channel.sub_channel_index
        if not 0 < index <= self.handshake.sub_channels:
            raise ValueError(f"sub-channel {index} of {self.handshake.sub_channels} that were granted")
        if index in self.sub_channels or index in self._closing:
            raise ValueError(f"sub-channel {index} is open already")
        self.data.open_queue(index, channel.ring_pfns, channel.downstream_page_offset, channel.interrupt)
        self.sub_channels[index] = channel
        if len(self.sub_channels) == self.handshake.sub_channels:
            self._send_indirection_table()

    async def close_sub_channel(self, channel: OpenedChannel) -> None:
        """Returns when its rings are not touched any more."""
        index = channel.sub_channel_index
        if self.sub_channels.get(index) is not channel:
            return
        done = self._closing[index] = asyncio.get_running_loop().create_future()
        del self.sub_channels[index]
        self.data.close_queue(index)
        try:
            # Said by the data path or, when the primary channel closes meanwhile, by the session's end.
            await done
        finally:
            self._closing.pop(index, None)

    def _let_go(self, index: int) -> None:
        done = self._closing.get(index)
        if done is not None and not done.done():
            done.set_result(None)

    def _send_indirection_table(self) -> None:
        """Which channel the guest is to send by: all in turn (Linux sets the same by itself)."""
        channels = 1 + self.handshake.sub_channels
        table = tuple(entry % channels for entry in range(SEND_TABLE_ENTRIES))
        self.data.send_inband(nvsp.SendIndirectionTable(table).pack(), HOST_REQUEST_ID, False)

    def _on_control(self) -> None:
        for kind, transaction_id, requested, payload in self.data.take_control():
            if kind == "closed":
                self._let_go(transaction_id)
            elif not self._faulty:
                try:
                    self._take(kind, transaction_id, requested, payload)
                except ProtocolError as error:
                    self._fault(str(error))
                except Exception:
                    # Whatever it is, a guest that waits for an answer for ever is worse.
                    _log.exception("NIC %s: a %s message could not be handled", self.nic.name, kind)
                    self._fault(f"the host failed on a message ({kind})")
        fault = self.data.fault()
        if fault is not None and not self._faulty:
            self._fault(fault)

    def _fault(self, text: str) -> None:
        # It still listens: the sub-channels close before the primary does.
        self._faulty = True
        self.nic.note_fault(text)
        self.opened.report_fault(f"NIC {self.nic.name}: {text}")

    def _take(self, kind: str, transaction_id: int, requested: bool, payload: bytes) -> None:
        if kind == "inband":
            granted = self.handshake.sub_channels
            answer = self.handshake.handle(payload)
            self._follow_handshake()
            if requested:
                self.data.send_completion(transaction_id, answer or b"")
            if self.handshake.sub_channels > granted:
                self.opened.offer_sub_channels(self.handshake.sub_channels)
        elif kind == "rndis":
            if not self.handshake.ready:
                raise ProtocolError("an RNDIS message before the receive buffer")
            self.control.handle(payload)
            if self._indicate_offload:
                self._indicate_offload = False
                status = rndis.RNDIS_STATUS_TASK_OFFLOAD_CURRENT_CONFIG
                self.control.indicate(status, self.adapter.offload.current())
        elif kind == "revoked":
            self._drop_gpadl(payload)

    def _drop_gpadl(self, kind: bytes) -> None:
        """Nothing touches the buffer (any more): the guest may have its GPADL back."""
        gpadl = self._gpadls.pop(kind, None)
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
        if oid == ndis.OID_GEN_RECEIVE_SCALE_PARAMETERS:
            rss = self.adapter.rss
            self.data.set_rss(rss.key, rss.table if rss.enabled else (), rss.hash_info)
        self.data.set_offload(self.adapter.offload.receive_bits())
        self.data.set_filter(self.adapter.filter, self.adapter.address)

    def _rndis_state(self, initialised: bool) -> None:
        self.data.set_filter(self.adapter.filter, self.adapter.address)
        self.data.set_data(initialised)

    def _counters(self) -> dict[str, int]:
        counters = self.data.stats()
        counters["no_buffer"] = self.data.drops().get(int(DropReason.RESOURCES), 0)
        return counters
