"""Captures: live pcapng streams of ports or of a partition's VMBus, listed while they run.

Bounds: `MAX_CAPTURES` at once. A reader that is too slow loses sightings, which are counted, and delays
nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from grpc import StatusCode

from netvsp import SyntheticNic
from vswitch.capture.ports import PortCapture
from vswitch.capture.vmbus import VmbusCapture, VmbusDirection
from vswitch_api.v1 import capture_pb2
from vswitchd.core import now
from vswitchd.errors import ApiError, exhausted, invalid, not_found
from vswitchd.nics import NicRecord
from vswitchd.partitions import PartitionManager, PartitionRecord
from vswitchd.resources import parse
from vswitchd.switches import PortRecord, SwitchManager, SwitchRecord

MAX_CAPTURES = 64
MAX_SOURCES = 256
MAX_SNAP_LENGTH = 65535
# How often the ring packets that a NIC has kept are collected.
TAP_SECONDS = 0.01


@dataclass
class CaptureRecord:
    """A capture that runs."""

    message: capture_pb2.Capture
    running: PortCapture | VmbusCapture

    def describe(self) -> capture_pb2.Capture:
        message = capture_pb2.Capture()
        message.CopyFrom(self.message)
        message.packets = self.running.packets
        message.lost = self.running.lost
        if isinstance(self.running, PortCapture):
            message.drops = self.running.drops
        return message


class CaptureManager:
    """All captures of the daemon."""

    def __init__(self, switches: SwitchManager, partitions: PartitionManager) -> None:
        self._switches = switches
        self._partitions = partitions
        self._numbers = itertools.count(1)
        self._ring_taps = RingTaps()
        self.records: dict[str, CaptureRecord] = {}

    def find(self, name: str) -> CaptureRecord:
        (number,) = parse("name", name, "captures")
        record = self.records.get(number)
        if record is None:
            raise not_found(name, "see `vswitch capture list`")
        return record

    def stop(self, name: str) -> None:
        """Its stream ends in good order."""
        self.find(name).running.stop()

    def stop_all(self) -> None:
        for record in self.records.values():
            record.running.stop()

    async def stream(self, request: capture_pb2.CaptureRequest) -> AsyncIterator[capture_pb2.CaptureResponse]:
        """The answer stream of one Capture call."""
        if not request.sources:
            raise invalid("sources", "empty", "name a port, a switch, or with `vmbus` a partition or NIC")
        if len(request.sources) > MAX_SOURCES:
            raise invalid("sources", f"{len(request.sources)}; at most {MAX_SOURCES} are taken")
        if request.snap_length > MAX_SNAP_LENGTH:
            raise invalid("snap_length", f"{request.snap_length} is more than {MAX_SNAP_LENGTH}")
        if len(self.records) >= MAX_CAPTURES:
            raise exhausted(f"{MAX_CAPTURES} captures run", "end one; see `vswitch capture list`")
        opened = self._vmbus(request) if request.vmbus else self._ports(request)
        async with opened as running:
            number = str(next(self._numbers))
            message = capture_pb2.Capture(
                name=f"captures/{number}",
                sources=request.sources,
                vmbus=request.vmbus,
                start_time=now(),
            )
            record = self.records[number] = CaptureRecord(message, running)
            try:
                yield capture_pb2.CaptureResponse(capture=record.describe())
                # A caller that hangs up ends the tap at once, not when garbage is collected.
                async with contextlib.aclosing(running.__aiter__()) as pieces:
                    async for piece in pieces:
                        yield capture_pb2.CaptureResponse(pcapng=piece)
                yield capture_pb2.CaptureResponse(capture=record.describe())
            finally:
                del self.records[number]

    @asynccontextmanager
    async def _ports(self, request: capture_pb2.CaptureRequest) -> AsyncIterator[PortCapture]:
        switch: SwitchRecord | None = None
        ports: dict[str, PortRecord] | None = {}
        for index, source in enumerate(request.sources):
            at = f"sources[{index}]"
            if source.count("/") == 1:
                found = self._switches.find(source, at)
                ports = None
            else:
                port = self._port(source, at)
                found = port.switch
                if ports is not None:
                    ports[port.name] = port
            if switch is not None and found is not switch:
                raise invalid(at, f"{source} is of another switch", "one capture covers one switch")
            switch = found
        assert switch is not None
        tap = switch.switch.open_tap(
            None if ports is None else [port.port for port in ports.values()],
            snaplen=request.snap_length,
            drops=not request.exclude_drops,
        )
        names: dict[int, str] = {}

        def port_name(number: int) -> str:
            record = switch.port_numbered(number)
            if record is not None:
                names[number] = record.name.rpartition("/")[2]
            return names.get(number, str(number))

        capture = PortCapture(
            tap,
            port_name,
            switch=switch.name.rpartition("/")[2],
            snaplen=request.snap_length,
            packet_limit=request.packet_limit,
        )
        try:
            yield capture
        finally:
            with contextlib.suppress(OSError, ValueError):
                tap.close()

    def _port(self, source: str, at: str) -> PortRecord:
        """The port of this name; who named a NIC instead is told its port."""
        try:
            return self._switches.find_port(source, at)
        except ApiError as error:
            kind, first, _, second = [*source.split("/"), "", "", ""][:4]
            record = self._partitions.records.get(first)
            nic = record.nics.get(second) if record is not None else None
            if error.code is not StatusCode.NOT_FOUND or kind != "switches" or nic is None:
                raise
            _, switch, _, port = nic.message.port.split("/")
            remedy = f"{first}/{second} is a NIC: capture its port, {switch}/{port}, or its ring with --vmbus"
            raise not_found(source, remedy) from None

    @asynccontextmanager
    async def _vmbus(self, request: capture_pb2.CaptureRequest) -> AsyncIterator[VmbusCapture]:
        record: PartitionRecord | None = None
        nics: list[NicRecord] = []
        for index, source in enumerate(request.sources):
            at = f"sources[{index}]"
            if source.count("/") == 1:
                found = self._partitions.find(source, at)
                nics = list(found.nics.values())
            else:
                found, nic = self._partitions.find_nic(source, at)
                if nic not in nics:
                    nics.append(nic)
            if record is not None and found is not record:
                raise invalid(at, f"{source} is of another partition", "one capture covers one VMBus")
            record = found
        assert record is not None
        partition = record.running()
        capture = VmbusCapture(record.id, snaplen=request.snap_length, packet_limit=request.packet_limit)

        def observe(direction: str, message: bytes, timestamp_ns: int) -> None:
            capture.observe_message("in" if direction == "in" else "out", message, timestamp_ns)

        partition.vmbus.tap.append(observe)
        self._ring_taps.add(capture, nics)
        try:
            yield capture
        finally:
            self._ring_taps.remove(capture)
            if observe in partition.vmbus.tap:
                partition.vmbus.tap.remove(observe)


class RingTaps:
    """Feeds the ring packets of NICs' channels into the captures that asked for them.

    A NIC keeps its packets once and gives them once: captures of one NIC share what is collected.
    """

    def __init__(self) -> None:
        self._readers: dict[VmbusCapture, list[NicRecord]] = {}
        self._tapped: set[SyntheticNic] = set()
        self._task: asyncio.Task[None] | None = None

    def add(self, capture: VmbusCapture, nics: list[NicRecord]) -> None:
        """From now on the capture gets what passes the rings of these NICs, also when they come back."""
        self._collect()  # What has passed already is for the others.
        self._readers[capture] = nics
        self._collect()
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    def remove(self, capture: VmbusCapture) -> None:
        """Nothing more for this capture; NICs that no other one watches keep no packets any more."""
        self._collect()
        del self._readers[capture]
        for device in self._tapped - self._devices():
            device.tap(False)
        self._tapped &= self._devices()
        if not self._readers and self._task is not None:
            self._task.cancel()
            self._task = None

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(TAP_SECONDS)
            self._collect()

    def _devices(self) -> set[SyntheticNic]:
        nics = [nic for own in self._readers.values() for nic in own]
        return {nic.device for nic in nics if nic.device is not None and nic.offer is not None}

    def _collect(self) -> None:
        found: dict[SyntheticNic, list[tuple[int, str, bytes]]] = {}
        for device in self._devices():
            if device not in self._tapped:
                device.tap(True)
            found[device] = device.take_tapped()
        self._tapped = set(found)
        for capture, nics in self._readers.items():
            for nic in nics:
                if nic.device is None or nic.offer is None:
                    continue
                for timestamp_ns, direction, packet in found[nic.device]:
                    kind: VmbusDirection = "in" if direction == "in" else "out"
                    capture.observe_packet(kind, nic.offer.relid, packet, timestamp_ns)
