"""The NetVSC driver: what a guest's kernel does with one offered synthetic NIC, from the offer to frames and
back.

The order of messages and OIDs is the stock Linux driver's (drivers/net/hyperv/netvsc.c, rndis_filter.c). One
instance is one life of the channel: after a rescind or a lost door it is abandoned and a new one is made for
the next offer, on the same interface.

    start() -> set_filter(True) -> stop()   orderly
    abandon() -> released()                 the offer was rescinded; without released(): door lost

Everything runs on the event loop; requests wait for their answer at most `REPLY_TIMEOUT` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID

from netvsc.datapath import ControlPacket, DataPathProtocol
from vswitch_wire import ndis, nvsp, rndis
from vswitch_wire.errors import WireError
from vswitch_wire.nvsp import NvspVersion

__all__ = ["NETVSC_CLASS", "DriverError", "NetVsc", "NicProperties"]

NETVSC_CLASS = UUID("f8615163-df3e-46c5-913f-f2d2f965ed0e")
VERSIONS = (NvspVersion.V61, NvspVersion.V6, NvspVersion.V5, NvspVersion.V4, NvspVersion.V2, NvspVersion.V1)

PAGE = 4096
ETH_HEADER = 14
RING_PAGES = 128  # per direction
RECEIVE_PAGES = (1024, 512, 256, 128)  # largest first, as memory allows
SEND_PAGES = 256
BOUNCE_PAGES = 17 * 32
REPLY_TIMEOUT = 60.0
DRAIN_TIMEOUT = 2.0

_log = logging.getLogger("netvsc.driver")


class DriverError(Exception):
    """The NIC cannot be brought up; the message names it, the step, and what the host answered."""


class _Channel(Protocol):
    relid: int


class _Vmbus(Protocol):
    """What the driver uses of VmbusClient."""

    async def open(self, offer: Any, ring_pages: int = ...) -> Any: ...
    async def close(self, channel: Any) -> None: ...
    async def create_gpadl(self, relid: int, pages: list[int]) -> int: ...
    async def teardown_gpadl(self, relid: int, gpadl_id: int) -> None: ...


class _Allocator(Protocol):
    def alloc(self, pages: int) -> list[int]: ...
    def free(self, pfns: list[int]) -> None: ...


@dataclass(slots=True)
class NicProperties:
    """What the negotiation found out."""

    mac: bytes = bytes(6)
    mtu: int = 1500
    connected: bool = False
    link_speed: int = 0  # bit/s
    nvsp_version: int = 0
    checksum: bool = False
    lso4: bool = False
    lso6: bool = False
    lso_max_size: int = 0  # bytes of TCP payload and headers in one frame
    rsc: bool = False


class NetVsc:
    """One synthetic NIC."""

    def __init__(
        self,
        vmbus: _Vmbus,
        allocator: _Allocator,
        offer: Any,
        open_datapath: Callable[[Any], DataPathProtocol],
        *,
        on_carrier: Callable[[bool], None],
        on_fault: Callable[[str], None],
    ) -> None:
        """`open_datapath(channel)` makes the data path of the chosen engine."""
        self._vmbus = vmbus
        self._allocator = allocator
        self.offer = offer
        self._open_datapath = open_datapath
        self._on_carrier = on_carrier
        self._on_fault = on_fault
        self.properties = NicProperties()
        self._channel: Any = None
        self._path: DataPathProtocol | None = None
        self._buffers: list[tuple[int, list[int]]] = []  # (GPADL id, pages)
        self._bounce: list[int] = []
        self._transaction = itertools.count(1)
        self._request = itertools.count(1)
        self._completions: dict[int, asyncio.Future[bytes]] = {}
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._gone: str | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"NIC {self.offer.instance_id}"

    # Bringing up.

    async def start(self, mtu: int) -> NicProperties:
        """Open the channel and negotiate everything up to, not including, the packet filter. DriverError."""
        try:
            await self._start(mtu)
        except WireError as error:
            raise DriverError(f"{self.name}: the host's answer cannot be used: {error}") from error
        except TimeoutError as error:
            raise DriverError(f"{self.name}: the host did not answer within {REPLY_TIMEOUT:.0f} s") from error
        return self.properties

    async def _start(self, mtu: int) -> None:
        self._channel = await self._vmbus.open(self.offer, ring_pages=RING_PAGES)
        self._path = self._open_datapath(self._channel)
        asyncio.get_running_loop().add_reader(self._path.control_fd, self._on_control)
        version = await self._negotiate(mtu)
        self.properties.nvsp_version = version
        high = version >= NvspVersion.V5
        self._tell(nvsp.SendNdisVersion(6, 30 if high else 1))
        await self._share_receive_buffer()
        await self._share_send_buffer()
        await self._initialize_rndis()
        await self._query_properties(mtu)
        self._path.set_offload(self.properties.checksum, self.properties.mtu)

    @property
    def _data(self) -> DataPathProtocol:
        if self._path is None or self._gone is not None:
            raise DriverError(f"{self.name}: {self._gone or 'the channel is not open'}")
        return self._path

    def _size(self) -> int:
        # Linux sends the longest form whatever the version; hosts take what they know.
        return nvsp.message_size(NvspVersion.V61)

    def _tell(self, message: nvsp.NvspMessage) -> None:
        self._data.send_inband(message.pack(self._size()), next(self._transaction), False)

    async def _ask(self, message: nvsp.NvspMessage) -> Any:
        identity = next(self._transaction)
        future = asyncio.get_running_loop().create_future()
        self._completions[identity] = future
        try:
            self._data.send_inband(message.pack(self._size()), identity, True)
            async with asyncio.timeout(REPLY_TIMEOUT):
                payload = await future
        finally:
            self._completions.pop(identity, None)
        return nvsp.decode(payload, completion=True)

    async def _negotiate(self, mtu: int) -> int:
        for version in VERSIONS:
            answer = await self._ask(nvsp.Init(version, version))
            if not isinstance(answer, nvsp.InitComplete):
                raise WireError(f"INIT was answered by {type(answer).__name__}")
            if answer.status != nvsp.NVSP_STAT_SUCCESS:
                continue
            if version >= NvspVersion.V2:
                capabilities = nvsp.NVSP_CAPABILITY_VMQ | nvsp.NVSP_CAPABILITY_CHIMNEY
                if version >= NvspVersion.V5:
                    capabilities |= nvsp.NVSP_CAPABILITY_SRIOV | nvsp.NVSP_CAPABILITY_TEAMING
                if version >= NvspVersion.V61:
                    capabilities |= nvsp.NVSP_CAPABILITY_RSC_OVER_VMBUS
                self._tell(nvsp.SendNdisConfig(mtu + ETH_HEADER, capabilities))
            return int(version)
        raise DriverError(f"{self.name}: the host refused every NVSP version from 6.1 down to 1")

    async def _share(self, pages: list[int]) -> int:
        """Let the host see these pages; they are remembered for the teardown."""
        gpadl = await self._vmbus.create_gpadl(self._channel.relid, pages)
        self._buffers.append((gpadl, pages))
        return gpadl

    def _allocate(self, sizes: tuple[int, ...]) -> list[int]:
        for size in sizes:
            with contextlib.suppress(MemoryError):
                return self._allocator.alloc(size)
        raise DriverError(
            f"{self.name}: no {sizes[-1]} free pages of guest memory; give the partition more memory_bytes"
        )

    async def _share_receive_buffer(self) -> None:
        pages = self._allocate(RECEIVE_PAGES)
        gpadl = await self._share(pages)
        answer = await self._ask(nvsp.SendReceiveBuffer(gpadl, nvsp.NETVSC_RECEIVE_BUFFER_ID))
        if (
            not isinstance(answer, nvsp.SendReceiveBufferComplete)
            or answer.status != nvsp.NVSP_STAT_SUCCESS
            or len(answer.sections) != 1
        ):
            raise DriverError(f"{self.name}: the host refused the receive buffer ({answer})")
        section = answer.sections[0]
        slot, count = section.sub_allocation_size, section.count
        if section.offset or not slot or not count or slot * count > len(pages) * PAGE:
            raise DriverError(
                f"{self.name}: {count} receive sub-allocations of {slot} bytes do not fit the buffer"
            )
        self._data.set_receive_buffer(pages, nvsp.NETVSC_RECEIVE_BUFFER_ID, slot, count)

    async def _share_send_buffer(self) -> None:
        pages = self._allocate((SEND_PAGES, SEND_PAGES // 4))
        gpadl = await self._share(pages)
        answer = await self._ask(nvsp.SendSendBuffer(gpadl, nvsp.NETVSC_SEND_BUFFER_ID))
        if not isinstance(answer, nvsp.SendSendBufferComplete) or answer.status != nvsp.NVSP_STAT_SUCCESS:
            raise DriverError(f"{self.name}: the host refused the send buffer ({answer})")
        if not 256 <= answer.section_size <= len(pages) * PAGE // 2:
            raise DriverError(
                f"{self.name}: send sections of {answer.section_size} bytes do not fit the buffer"
            )
        self._bounce = self._allocate((BOUNCE_PAGES, BOUNCE_PAGES // 8))
        self._data.set_send_buffer(pages, answer.section_size, self._bounce)

    # RNDIS.

    async def _request_rndis(self, request: int, message: bytes) -> Any:
        future = asyncio.get_running_loop().create_future()
        self._replies[request] = future
        try:
            self._data.send_rndis(message)
            async with asyncio.timeout(REPLY_TIMEOUT):
                return await future
        finally:
            self._replies.pop(request, None)

    async def _initialize_rndis(self) -> None:
        request = next(self._request)
        reply = await self._request_rndis(request, rndis.Initialize(request).pack())
        if not isinstance(reply, rndis.InitializeComplete) or reply.status != rndis.RNDIS_STATUS_SUCCESS:
            raise DriverError(f"{self.name}: the host refused RNDIS INITIALIZE ({reply})")
        if not 0 <= reply.packet_alignment_factor <= 12:
            raise DriverError(
                f"{self.name}: RNDIS alignment 2^{reply.packet_alignment_factor} is out of range"
            )
        self._data.set_aggregation(min(reply.max_packets_per_message, 8), 1 << reply.packet_alignment_factor)

    async def _query(self, oid: int, data: bytes = b"", *, least: int = 0, fatal: bool = True) -> bytes:
        """The answer's bytes, at least `least`; b"" for a failure that is not fatal."""
        request = next(self._request)
        reply = await self._request_rndis(request, rndis.Query(request, oid, data).pack())
        answered = isinstance(reply, rndis.QueryComplete) and reply.status == rndis.RNDIS_STATUS_SUCCESS
        if answered and len(reply.info) >= least:
            return bytes(reply.info)
        if fatal:
            raise DriverError(f"{self.name}: the host did not answer OID {oid:#010x} ({reply})")
        return b""

    async def _set(self, oid: int, data: bytes, *, fatal: bool = True) -> bool:
        request = next(self._request)
        reply = await self._request_rndis(request, rndis.Set(request, oid, data).pack())
        done = isinstance(reply, rndis.SetComplete) and reply.status == rndis.RNDIS_STATUS_SUCCESS
        if fatal and not done:
            raise DriverError(f"{self.name}: the host did not accept OID {oid:#010x} ({reply})")
        return done

    async def _query_properties(self, mtu: int) -> None:
        properties = self.properties
        frame = int.from_bytes((await self._query(ndis.OID_GEN_MAXIMUM_FRAME_SIZE, least=4))[:4], "little")
        properties.mtu = min(mtu, frame) if frame >= 68 else mtu
        properties.mac = (await self._query(ndis.OID_802_3_PERMANENT_ADDRESS, least=6))[:6]
        await self._negotiate_offloads()
        state = (await self._query(ndis.OID_GEN_MEDIA_CONNECT_STATUS, least=4))[:4]
        properties.connected = int.from_bytes(state, "little") == 0
        if properties.nvsp_version >= NvspVersion.V5:
            speed = await self._query(ndis.OID_GEN_LINK_SPEED, least=4, fatal=False)
            properties.link_speed = int.from_bytes(speed[:4], "little") * 100
            # One channel is all that this driver runs; asked as the stock driver asks, so that the host sees
            # its order.
            header = ndis.RssCapabilities(0, 0, 0, 0).pack()
            await self._query(ndis.OID_GEN_RECEIVE_SCALE_CAPABILITIES, header, fatal=False)

    async def _negotiate_offloads(self) -> None:
        """Take what the host offers in full and say so; anything partial stays off."""
        properties = self.properties
        high = properties.nvsp_version >= NvspVersion.V5
        size = ndis.NDIS_OFFLOAD_SIZE_NDIS_6_30 if high else ndis.NDIS_OFFLOAD_SIZE_NDIS_6_1
        question = ndis.Offload().pack(size)
        offered = ndis.Offload.unpack(
            await self._query(ndis.OID_TCP_OFFLOAD_HARDWARE_CAPABILITIES, question, least=112)
        )
        properties.checksum = _all_checksums(offered)
        properties.lso4 = properties.checksum and offered.lso_v4_maximum > 0
        v6_options = ndis.LSO_V6_EXTENSION_HEADERS | ndis.LSO_V6_TCP_OPTIONS
        properties.lso6 = (
            properties.checksum
            and offered.lso_v6_maximum > 0
            and offered.lso_v6_options & v6_options == v6_options
        )
        limits = [offered.lso_v4_maximum] * properties.lso4 + [offered.lso_v6_maximum] * properties.lso6
        properties.lso_max_size = min(limits, default=0)
        properties.rsc = offered.rsc_v4 and offered.rsc_v6 and properties.nvsp_version >= NvspVersion.V61
        checksum = ndis.OFFLOAD_CHECKSUM_BOTH if properties.checksum else ndis.OFFLOAD_CHECKSUM_OFF

        def switch(on: bool) -> int:
            return ndis.OFFLOAD_ON if on else ndis.OFFLOAD_OFF

        wanted = ndis.OffloadParameters(
            checksum,
            checksum,
            checksum,
            checksum,
            checksum,
            lso_v2_ipv4=switch(properties.lso4),
            lso_v2_ipv6=switch(properties.lso6),
            rsc_ipv4=switch(properties.rsc) if high else 0,
            rsc_ipv6=switch(properties.rsc) if high else 0,
        )
        await self._set(ndis.OID_TCP_OFFLOAD_PARAMETERS, wanted.pack(28 if high else 22))
        if properties.checksum:
            # The interface takes partial checksums. Hosts that do not know the name ignore it.
            partial = ndis.ConfigParameter(ndis.RX_PARTIAL_CHECKSUM, "1".encode("utf-16-le"))
            await self._set(ndis.OID_GEN_RNDIS_CONFIG_PARAMETER, partial.pack(), fatal=False)

    async def set_filter(self, receiving: bool) -> None:
        """Begin (directed, all multicast, broadcast) or end receiving, and sending with it."""
        bits = (
            ndis.NDIS_PACKET_TYPE_DIRECTED
            | ndis.NDIS_PACKET_TYPE_ALL_MULTICAST
            | ndis.NDIS_PACKET_TYPE_BROADCAST
            if receiving
            else 0
        )
        if not receiving:
            self._data.set_running(False)
        await self._set(ndis.OID_GEN_CURRENT_PACKET_FILTER, bits.to_bytes(4, "little"))
        if receiving:
            self._data.set_running(True)

    def stats(self) -> dict[str, int]:
        """The data path's counters; empty when there is none."""
        return self._path.stats() if self._path is not None else {}

    # Events.

    def _on_control(self) -> None:
        if self._path is None:
            return
        for item in self._path.take_control():
            try:
                self._on_item(item)
            except WireError as error:
                _log.warning("%s: a message from the host is ignored: %s", self.name, error)

    def _on_item(self, item: ControlPacket) -> None:
        if item.kind == "fault":
            text = item.payload.decode(errors="replace")
            self._lose(f"the host broke the ring: {text}")
            self._on_fault(text)
        elif item.kind == "completion":
            future = self._completions.get(item.transaction_id)
            if future is not None and not future.done():
                future.set_result(item.payload)
        elif item.kind == "inband":
            if item.completion_requested:  # nothing that stock drivers answer either, except by this
                self._data.send_completion(item.transaction_id, b"")
        else:
            self._on_rndis(rndis.decode(item.payload))

    def _on_rndis(self, message: Any) -> None:
        if isinstance(message, rndis.IndicateStatus):
            self._on_indication(message)
            return
        future = self._replies.get(getattr(message, "request_id", 0))
        if future is not None and not future.done():
            future.set_result(message)

    def _on_indication(self, message: Any) -> None:
        if message.status == rndis.RNDIS_STATUS_MEDIA_CONNECT:
            self._carrier(True)
        elif message.status == rndis.RNDIS_STATUS_MEDIA_DISCONNECT:
            self._carrier(False)
        elif message.status == rndis.RNDIS_STATUS_NETWORK_CHANGE and self.properties.connected:
            self._carrier(False)  # so that the guest's DHCP and neighbour caches notice
            self._carrier(True)
        elif message.status == rndis.RNDIS_STATUS_LINK_SPEED_CHANGE and len(message.buffer) >= 4:
            self.properties.link_speed = int.from_bytes(message.buffer[:4], "little") * 100

    def _carrier(self, up: bool) -> None:
        self.properties.connected = up
        self._on_carrier(up)

    # Taking down.

    async def stop(self) -> None:
        """Orderly end, the offer stays: filter 0, HALT, sends drained, buffers revoked, channel closed,
        pages freed."""
        if self._path is not None and self._gone is None:
            with contextlib.suppress(DriverError, TimeoutError, WireError):
                async with asyncio.timeout(DRAIN_TIMEOUT):
                    await self.set_filter(False)
                    self._data.send_rndis(rndis.Halt(next(self._request)).pack())
                    while self._data.stats()["in_flight"]:  # noqa: ASYNC110 - the worker has no event for it
                        await asyncio.sleep(0.001)
                self._tell(nvsp.RevokeReceiveBuffer(nvsp.NETVSC_RECEIVE_BUFFER_ID))
                self._tell(nvsp.RevokeSendBuffer(nvsp.NETVSC_SEND_BUFFER_ID))
        self._lose("the NIC was stopped")
        await self._return_pages(close=True)

    def abandon(self, why: str) -> None:
        """The offer was rescinded or the door is lost: touch the ring no more; every waiting request
        fails."""
        self._lose(why)

    async def released(self) -> None:
        """After a rescind: take the buffers back from the host. The caller then releases the relid."""
        await self._return_pages(close=True)

    def forget(self) -> None:
        """The host is gone for good (its memory of our GPADLs with it): take the pages back without
        asking."""
        for _, pages in self._buffers:
            self._allocator.free(pages)
        self._buffers.clear()
        self._free_bounce()
        self._channel = None

    def _lose(self, why: str) -> None:
        if self._gone is not None:
            return
        self._gone = why
        if self._path is not None:
            asyncio.get_running_loop().remove_reader(self._path.control_fd)
            self._path.close()
        for future in [*self._completions.values(), *self._replies.values()]:
            if not future.done():
                future.set_exception(DriverError(f"{self.name}: {why}"))

    async def _return_pages(self, *, close: bool) -> None:
        """Channel first, then the GPADLs: from VMBus 4.0 on, that order is the stock driver's."""
        if self._channel is not None and close:
            channel, self._channel = self._channel, None
            await self._vmbus.close(channel)
            for gpadl, pages in self._buffers:
                await self._vmbus.teardown_gpadl(channel.relid, gpadl)
                self._allocator.free(pages)
            self._buffers.clear()
        self._free_bounce()

    def _free_bounce(self) -> None:
        if self._bounce:
            self._allocator.free(self._bounce)
            self._bounce = []


def _all_checksums(offered: ndis.Offload) -> bool:
    """TCP and UDP, both address families, both directions: the interface's kernel knows no finer switch."""
    v4 = ndis.IPV4_CHECKSUM_TCP_OPTIONS | ndis.IPV4_CHECKSUM_TCP | ndis.IPV4_CHECKSUM_UDP
    v6 = ndis.IPV6_CHECKSUM_TCP_OPTIONS | ndis.IPV6_CHECKSUM_TCP | ndis.IPV6_CHECKSUM_UDP
    return (
        all(flags & v4 == v4 for flags in (offered.v4_tx_checksum, offered.v4_rx_checksum))
        and all(flags & v6 == v6 for flags in (offered.v6_tx_checksum, offered.v6_rx_checksum))
        and bool(offered.v6_tx_checksum & ndis.IPV6_CHECKSUM_EXTENSION_HEADERS)
    )
