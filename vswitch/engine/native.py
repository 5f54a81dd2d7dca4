"""The native engine behind the same interface: the worker thread's datapath, wrapped for the asyncio loop.

Calls block the loop for at most one batch of the worker, a barrier for the batches in front of it. Traces,
barriers and the datapath's own events come back through an eventfd that the loop watches from the first time
it is needed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable
from typing import Any

from vswitch.drops import DropReason
from vswitch.endpoint import Checksum, Frame, Offload
from vswitch.engine import (
    CapturedFrame,
    DatapathEvent,
    EventKind,
    ExtensionChannel,
    ExtensionCounters,
    FlowInfo,
    Limits,
    MacEntry,
    PortConfig,
    PortCounters,
    SwitchCounters,
    TraceStep,
)
from vswitch.engine.texts import DropText, action_texts, match_texts
from vswitch.fields import Field, names
from vswitch.upcall import check_channels
from vswitch_native import switch as native

__all__ = ["NativeDatapath", "NativeTap"]


def _offload_tuple(offload: Offload) -> tuple[int, bool, int, int]:
    """Offload metadata as the native module takes it."""
    return (int(offload.checksum), offload.ip_checksum, offload.l4_offset, offload.mss)


def _offload(row: tuple[int, bool, int, int]) -> Offload:
    return Offload(Checksum(row[0]), row[1], row[2], row[3])


_log = logging.getLogger("vswitch.engine")


class NativeTap:
    """See `vswitch.engine.CaptureTap`."""

    def __init__(self, tap: native.CaptureTap) -> None:
        self._tap = tap

    @property
    def fd(self) -> int:
        return self._tap.fd

    @property
    def lost(self) -> int:
        return self._tap.lost

    def read(self, limit: int = 1024) -> list[CapturedFrame]:
        frames = []
        for stamp, port_id, outward, packet_id, data, length, tci, offload, drop in self._tap.read(limit):
            reason, by, detail = drop if drop is not None else (None, None, "")
            frames.append(
                CapturedFrame(
                    stamp,
                    port_id,
                    "out" if outward else "in",
                    packet_id,
                    data,
                    length,
                    None if reason is None else DropReason(reason),
                    by,
                    detail,
                    vlan_tci=tci,
                    offload=_offload(offload),
                )
            )
        return frames

    def close(self) -> None:
        self._tap.close()


class NativeDatapath:
    """See `vswitch.engine.Datapath`."""

    def __init__(self, *, limits: Limits | None = None, manual_time: bool = False) -> None:
        chosen = limits or Limits()
        self._native = native.Datapath(
            (
                chosen.mac_entries,
                int(chosen.mac_age_seconds * 1e9),
                chosen.flow_entries,
                chosen.flow_masks,
                int(chosen.flow_idle_seconds * 1e9),
                chosen.held_per_flow,
                chosen.held_total,
                chosen.upcalls_per_port,
                int(chosen.upcall_deadline_seconds * 1e9),
                chosen.capture_frames,
                chosen.capture_bytes,
            ),
            manual_time,
        )
        self._manual_time = manual_time
        self._waiters: dict[int, asyncio.Future[Any]] = {}
        self._ids = itertools.count(1)
        self._event: Callable[[DatapathEvent], None] = lambda event: None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._names: dict[int, str] = {}
        self._closed = False

    # -- ports and endpoints
    # ------------------------------------------------------------------------------------

    def add_port(self, port_id: int, config: PortConfig) -> None:
        if not 0 < port_id < 0xFFFF_FFFF:
            raise ValueError(f"port id {port_id}: 1 to {0xFFFF_FFFE} expected (0 is the switch itself)")
        self._native.add_port(port_id, config.name, config.mtu)
        self._names[port_id] = config.name

    async def remove_port(self, port_id: int) -> None:
        self._watch()
        self._native.remove_port(port_id)
        del self._names[port_id]

    async def attach(self, port_id: int, endpoint: object) -> None:
        if not isinstance(endpoint, native.EndpointHandle):
            raise TypeError(f"the native engine cannot use {type(endpoint).__name__} as an endpoint")
        self._watch()
        self._native.attach(port_id, endpoint)

    async def detach(self, port_id: int) -> None:
        self._native.detach(port_id)

    def inject(self, port_id: int, frame: Frame | bytes) -> None:
        if isinstance(frame, Frame):
            offload = _offload_tuple(frame.offload)
            self._native.inject(port_id, bytes(frame.data), offload, frame.vlan_tci, frame.hash)
        else:
            self._native.inject(port_id, bytes(frame))

    # -- extensions
    # ---------------------------------------------------------------------------------------------

    async def set_extensions(self, channels: Iterable[ExtensionChannel]) -> None:
        wanted = check_channels(channels)
        self._watch()
        self._native.set_extensions(
            [
                (
                    channel.id,
                    channel.name,
                    channel.on_failure == "open",
                    channel.memfd,
                    channel.request_fd,
                    channel.reply_fd,
                    "ingress" in channel.passes,
                    "egress" in channel.passes,
                )
                for channel in wanted
            ]
        )
        self._event(DatapathEvent(EventKind.EXTENSIONS_CHANGED, 0, f"{len(wanted)} extensions"))

    def fail_extension(self, extension_id: int, why: str) -> None:
        if not self._native.fail_extension(extension_id, why):
            raise KeyError(f"no extension has id {extension_id}")

    def extension_counters(self) -> dict[int, ExtensionCounters]:
        return {row[0]: ExtensionCounters(*row[1:]) for row in self._native.extension_counters()}

    # -- trace and barrier
    # --------------------------------------------------------------------------------------

    async def trace(self, port_id: int, frame: Frame | bytes) -> list[TraceStep]:
        whole = frame if isinstance(frame, Frame) else Frame(bytes(frame))
        number, waiter = self._waiter()
        try:
            offload = _offload_tuple(whole.offload)
            self._native.trace(number, port_id, bytes(whole.data), offload, whole.vlan_tci)
            steps: list[TraceStep] = await waiter
        finally:
            self._waiters.pop(number, None)
        return steps

    async def barrier(self) -> None:
        number, waiter = self._waiter()
        try:
            self._native.barrier(number)
            await waiter
        finally:
            self._waiters.pop(number, None)

    def _waiter(self) -> tuple[int, asyncio.Future[Any]]:
        self._watch()
        number = next(self._ids)
        self._waiters[number] = asyncio.get_running_loop().create_future()
        return number, self._waiters[number]

    def _watch(self) -> None:
        if self._loop is None and not self._closed:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._native.event_fd, self._take_events)

    def _take_events(self) -> None:
        for kind, number, text, rows in self._native.events():
            if kind == "failed":
                self._event(DatapathEvent(EventKind.EXTENSION_FAILED, number, text))
            elif kind == "error":
                self._event(DatapathEvent(EventKind.EXTENSION_ERROR, number, text))
            elif kind == "disconnected":
                _log.error("port %d is disconnected: %s", number, text)
                self._event(DatapathEvent(EventKind.PORT_DISCONNECTED, number, text))
            else:
                waiter = self._waiters.get(number)
                if waiter is not None and not waiter.done():
                    waiter.set_result([_step(row) for row in rows])

    # -- what is to be seen
    # -------------------------------------------------------------------------------------

    def port_counters(self, port_id: int) -> PortCounters:
        rx, tx = self._native.port_counters(port_id)
        values: dict[str, Any] = {}
        for prefix, counters in (("rx", rx), ("tx", tx)):
            values |= {f"{prefix}_{name}": value for name, value in counters.items()}
            values[f"{prefix}_drops"] = _drops(counters["drops"])
        return PortCounters(**values)

    def drops(self, port_id: int) -> dict[DropReason, int]:
        counters = self.port_counters(port_id)
        reasons = sorted({*counters.rx_drops, *counters.tx_drops})
        return {
            reason: counters.rx_drops.get(reason, 0) + counters.tx_drops.get(reason, 0) for reason in reasons
        }

    def switch_counters(self) -> SwitchCounters:
        counters = self._native.switch_counters()
        return SwitchCounters(**{**counters, "drops": _drops(counters["drops"])})

    def mac_table(self) -> list[MacEntry]:
        return [
            MacEntry(address.to_bytes(6, "big"), vlan, port_id, age_ns / 1e9)
            for vlan, address, port_id, age_ns in self._native.mac_table()
        ]

    def flows(self) -> list[FlowInfo]:
        flows = []
        for mask, values, (drop, destinations), packets, size, idle_ns, left_ns in self._native.flows():
            fields = [field for field in Field if mask & field.bit]
            actions = action_texts(
                _drop_text(drop), [(port_id, _drop_text(one)) for port_id, one in destinations]
            )
            left = None if left_ns is None else left_ns / 1e9
            match = match_texts(dict(zip(fields, values, strict=True)))
            flows.append(FlowInfo(match, actions, packets, size, idle_ns / 1e9, left))
        return flows

    def flush_flows(self) -> None:
        self._native.flush_flows()

    def open_tap(self, ports: Iterable[int] | None, snaplen: int, drops: bool) -> NativeTap:
        return NativeTap(self._native.open_tap(None if ports is None else list(ports), snaplen, drops))

    def on_event(self, callback: Callable[[DatapathEvent], None]) -> None:
        self._event = callback

    # -- time, and the end
    # --------------------------------------------------------------------------------------

    async def advance(self, seconds: float) -> None:
        if not self._manual_time:
            raise ValueError("this datapath runs on the system's time; make it with manual_time=True")
        self._native.advance(int(seconds * 1e9))
        self._take_events()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._native.close()
        if self._loop is not None:
            self._loop.remove_reader(self._native.event_fd)
        for waiter in self._waiters.values():
            if not waiter.done():
                waiter.set_exception(RuntimeError("the switch was closed"))


def _drops(pairs: list[tuple[int, int]]) -> dict[DropReason, int]:
    return {DropReason(code): count for code, count in pairs}


def _drop_text(drop: tuple[int, str, str | None] | None) -> DropText | None:
    return None if drop is None else DropText(DropReason(drop[0]), drop[1], drop[2])


def _step(row: tuple[str, str, str, int, int | None, int | None, str | None]) -> TraceStep:
    stage, verdict, detail, fields, port_id, reason, by = row
    return TraceStep(
        stage, verdict, detail, names(fields), port_id, None if reason is None else DropReason(reason), by
    )
