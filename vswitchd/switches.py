"""Switches and their ports: made, listed, changed, deleted, and made again from the store.

One lock orders everything that changes which switches and ports exist.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from vswitch import Switch
from vswitch.drops import DropReason
from vswitch.engine import Datapath
from vswitch.extension.host import ExtensionEvent, ExtensionEventKind, ExtensionHost
from vswitch.switch import MAX_PORTS, Port
from vswitch_api.v1 import extension_pb2, port_pb2, switch_pb2
from vswitchd.core import Core, engine_value, new_uid, now
from vswitchd.errors import ApiError, already_exists, exhausted, invalid, not_found, precondition
from vswitchd.resources import check_id, check_labels, check_mask, parse

MAX_SWITCHES = 256
MAX_FRIENDLY_NAME = 255

PORT_MTU = 9202
"""What a port lets through: what its NIC takes is the NIC's own affair."""


@dataclass
class PortRecord:
    """A port that exists. `owner` is the NIC (resource name) or stream that is connected, "" for none."""

    message: port_pb2.Port
    switch: SwitchRecord
    port: Port
    owner: str = ""
    made_by_nic: bool = False

    @property
    def name(self) -> str:
        return self.message.name

    @property
    def number(self) -> int:
        return self.port.id


@dataclass
class ExtensionRecord:
    """A loaded extension; its run is the `ExtensionHost`'s."""

    message: extension_pb2.Extension
    position: int


@dataclass
class SwitchRecord:
    """A switch that exists."""

    message: switch_pb2.Switch
    switch: Switch
    host: ExtensionHost
    ports: dict[str, PortRecord] = field(default_factory=dict)
    extensions: dict[str, ExtensionRecord] = field(default_factory=dict)
    positions: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def name(self) -> str:
        return self.message.name

    @property
    def datapath(self) -> Datapath:
        return self.switch.datapath

    def port_numbered(self, number: int) -> PortRecord | None:
        return next((port for port in self.ports.values() if port.number == number), None)


class SwitchManager:
    """All switches of the daemon."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.lock = asyncio.Lock()
        self.records: dict[str, SwitchRecord] = {}
        # Told the name of an extension whose state has changed by itself.
        self.on_extension_change: Callable[[str], None] = lambda name: None

    # --- looking --------------------------------------------------------------------------------------------

    def find(self, name: str, field_name: str = "name") -> SwitchRecord:
        (switch_id,) = parse(field_name, name, "switches")
        record = self.records.get(switch_id)
        if record is None:
            raise not_found(name, "see `vswitch switch list`")
        return record

    def find_port(self, name: str, field_name: str = "name") -> PortRecord:
        switch_id, port_id = parse(field_name, name, "switches", "ports")
        port = self.find(f"switches/{switch_id}", field_name).ports.get(port_id)
        if port is None:
            raise not_found(name, "see `vswitch port list`")
        return port

    def of_parent(self, parent: str) -> Sequence[SwitchRecord]:
        """The switch of this name, or all for "switches/-"."""
        if parent == "switches/-":
            return list(self.records.values())
        return [self.find(parent, "parent")]

    def describe(self, record: SwitchRecord) -> switch_pb2.Switch:
        message = switch_pb2.Switch()
        message.CopyFrom(record.message)
        message.port_count = len(record.ports)
        ordered = sorted(record.extensions.values(), key=lambda extension: extension.position)
        message.extensions.extend(extension.message.name for extension in ordered)
        return message

    def describe_port(self, record: PortRecord) -> port_pb2.Port:
        message = port_pb2.Port()
        message.CopyFrom(record.message)
        message.number = record.number
        message.nic = record.owner if record.owner.startswith("partitions/") else ""
        counters = record.switch.datapath.port_counters(record.number)
        message.counters.CopyFrom(
            port_pb2.PortCounters(
                in_packets=counters.rx_packets,
                in_bytes=counters.rx_bytes,
                out_packets=counters.tx_packets,
                out_bytes=counters.tx_bytes,
                drops=[
                    port_pb2.DropCounter(code=int(reason), reason=DropReason(reason).name, packets=packets)
                    for reason, packets in sorted(record.switch.datapath.drops(record.number).items())
                    if packets
                ],
            )
        )
        return message

    def snapshot(self) -> Iterator[switch_pb2.Switch | port_pb2.Port]:
        for record in self.records.values():
            yield self.describe(record)
            for port in record.ports.values():
                yield self.describe_port(port)

    # --- switches -------------------------------------------------------------------------------------------

    async def create(self, switch_id: str, wanted: switch_pb2.Switch) -> SwitchRecord:
        check_id("switch_id", switch_id)
        check_labels("switch.labels", wanted.labels)
        engine = self._core.engine_of(wanted.engine, "switch.engine")
        if engine == "native" and self._core.config.engine == "python":
            raise invalid(
                "switch.engine",
                "this daemon keeps its guests' memory in the Python engine, which native switches cannot use",
                "start the daemon with --engine native",
            )
        message = switch_pb2.Switch(
            name=f"switches/{switch_id}",
            uid=new_uid(),
            engine=engine_value(engine),
            create_time=now(),
            labels=wanted.labels,
        )
        async with self.lock:
            if switch_id in self.records:
                raise already_exists(message.name)
            if len(self.records) >= MAX_SWITCHES:
                raise exhausted(f"{MAX_SWITCHES} switches exist", "delete one that is not needed")
            record = self._build(message)
            await self._core.save(message)
            self.records[switch_id] = record
            self._core.hub.added(self.describe(record))
        return record

    def _build(self, message: switch_pb2.Switch) -> SwitchRecord:
        """The running switch of a stored or new message."""
        switch_id = message.name.rpartition("/")[2]
        engine = self._core.engine_of(message.engine, "switch.engine")
        switch = Switch(switch_id, engine=engine)
        record = SwitchRecord(
            message, switch, ExtensionHost(switch.datapath, on_event=self._tell(message.name))
        )
        switch.on_event(record.host.on_datapath_event)
        return record

    def _tell(self, switch_name: str) -> Callable[[ExtensionEvent], None]:
        """Passes on what happens to the extensions of a switch: to the log, to watchers."""

        def tell(event: ExtensionEvent) -> None:
            name = f"{switch_name}/extensions/{event.extension}"
            self._core.hub.event(f"extension_{event.kind.value}", name, event.text)
            if event.kind is not ExtensionEventKind.UNLOADED:
                self.on_extension_change(name)

        return tell

    async def remove(self, record: SwitchRecord) -> None:
        """Takes away a switch without ports. The caller holds the lock."""
        switch_id = record.name.rpartition("/")[2]
        await self._core.store.delete(record.name)
        del self.records[switch_id]
        await record.host.close()
        await record.switch.close()
        self._core.hub.removed(record.message)

    # --- ports ----------------------------------------------------------------------------------------------

    async def create_ports(
        self, requests: Sequence[port_pb2.CreatePortRequest], parent: str = ""
    ) -> list[PortRecord]:
        """All of them, or none and an error that names the one that was refused."""
        async with self.lock:
            checked: dict[str, tuple[SwitchRecord, port_pb2.Port]] = {}
            for index, request in enumerate(requests):
                at = f"requests[{index}]." if parent else ""
                if parent and request.parent not in ("", parent):
                    raise invalid(f"{at}parent", f"{request.parent[:80]!r} is not {parent}")
                record = self.find(request.parent or parent, f"{at}parent")
                message = self._checked_port(at, request, record)
                if message.name in checked:
                    raise invalid(f"{at}port_id", f"{request.port_id!r} comes twice in this batch")
                checked[message.name] = (record, message)
            return [await self._add_port(record, message) for record, message in checked.values()]

    async def ensure_port(self, name: str) -> tuple[PortRecord, bool]:
        """The port of this name, and whether it had to be made for it."""
        switch_id, port_id = parse("nic.port", name, "switches", "ports")
        async with self.lock:
            record = self.find(f"switches/{switch_id}", "nic.port")
            existing = record.ports.get(port_id)
            if existing is not None:
                return existing, False
            request = port_pb2.CreatePortRequest(parent=record.name, port_id=port_id)
            message = self._checked_port("nic.port: ", request, record)
            return await self._add_port(record, message), True

    def _checked_port(
        self, at: str, request: port_pb2.CreatePortRequest, record: SwitchRecord
    ) -> port_pb2.Port:
        port_id = check_id(f"{at}port_id", request.port_id)
        _check_friendly_name(f"{at}port.friendly_name", request.port.friendly_name)
        name = f"{record.name}/ports/{port_id}"
        if port_id in record.ports:
            raise already_exists(name)
        if len(record.ports) >= MAX_PORTS:
            raise exhausted(f"{record.name} has {MAX_PORTS} ports", "delete one that is not needed")
        return port_pb2.Port(
            name=name, uid=new_uid(), friendly_name=request.port.friendly_name, create_time=now()
        )

    async def _add_port(self, record: SwitchRecord, message: port_pb2.Port) -> PortRecord:
        port = self._build_port(record, message)
        await self._core.save(message)
        self._core.hub.added(self.describe_port(port))
        return port

    def _build_port(self, record: SwitchRecord, message: port_pb2.Port) -> PortRecord:
        port_id = message.name.rpartition("/")[2]
        port = PortRecord(message, record, record.switch.add_port(port_id, mtu=PORT_MTU))
        record.ports[port_id] = port
        return port

    async def update_port(self, request: port_pb2.UpdatePortRequest) -> PortRecord:
        port = self.find_port(request.port.name, "port.name")
        check_mask(request.update_mask.paths, ["friendly_name"])
        _check_friendly_name("port.friendly_name", request.port.friendly_name)
        port.message.friendly_name = request.port.friendly_name
        await self._core.save(port.message)
        self._core.hub.modified(self.describe_port(port))
        return port

    async def remove_port(self, port: PortRecord) -> None:
        """Takes away a port that nothing is connected to. The caller holds the lock."""
        if port.owner:
            raise precondition(
                port.name,
                f"{port.name} is in use by {port.owner}",
                reason="PORT_IN_USE",
                remedy="delete the NIC first, or delete the port with `force`",
            )
        port_id = port.name.rpartition("/")[2]
        if port.switch.ports.pop(port_id, None) is None:
            raise not_found(port.name)
        await self._core.store.delete(port.name)
        await port.switch.switch.remove_port(port_id)
        self._core.hub.removed(port.message)

    def claim(self, port: PortRecord, owner: str) -> None:
        """Connects `owner` to a free port; FAILED_PRECONDITION when something else is there."""
        if port.owner and port.owner != owner:
            raise precondition(
                port.name,
                f"{port.name} is in use by {port.owner}",
                reason="PORT_IN_USE",
                remedy="use another port",
            )
        port.owner = owner

    # --- after a restart ------------------------------------------------------------------------------------

    async def restore(self) -> None:
        """Builds again what the store holds; one that cannot be built is reported and left out."""
        for row in await self._core.store.load("switch"):
            message = switch_pb2.Switch.FromString(row.body)
            try:
                self.records[message.name.rpartition("/")[2]] = self._build(message)
            except ApiError as error:
                self._core.hub.event("switch_lost", message.name, error.message)
        for row in await self._core.store.load("port"):
            port = port_pb2.Port.FromString(row.body)
            switch_id, _ = parse("name", port.name, "switches", "ports")
            record = self.records.get(switch_id)
            if record is not None:
                built = self._build_port(record, port)
                built.made_by_nic = bool(row.private.get("made_by_nic"))

    async def close_extensions(self) -> None:
        """Ends the extensions' processes; the store keeps them."""
        for record in self.records.values():
            await record.host.close()

    async def close(self) -> None:
        """Ends the datapaths; the store keeps the switches."""
        for record in self.records.values():
            await record.switch.close()
        self.records.clear()


def _check_friendly_name(field_name: str, text: str) -> None:
    if len(text.encode()) > MAX_FRIENDLY_NAME:
        raise invalid(field_name, f"{len(text.encode())} bytes; at most {MAX_FRIENDLY_NAME} are taken")
