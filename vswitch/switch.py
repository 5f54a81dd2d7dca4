"""A switch as its owner sees it: named ports, connected NICs, extensions, capture, trace and events.

`from vswitch import Switch` needs no daemon:

    switch = Switch("s0")
    a = switch.add_port("a")
    host = switch.host_endpoint()
    await a.attach(host.endpoint)

All methods belong to one asyncio loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

from vswitch.drops import DropReason
from vswitch.endpoint import Frame
from vswitch.engine import (
    NO_PORT,
    CaptureTap,
    Datapath,
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
from vswitch.engine.python import PythonDatapath
from vswitch.inprocess import InProcessEndpoint, make_endpoint
from vswitch_wire.engine import Engine, check_engine, default_engine

__all__ = ["Port", "Switch", "make_datapath"]

MAX_PORTS = 1024
MAX_NAME = 64
EVENTS_KEPT = 1024
"""Events that wait for one slow subscriber; older ones are lost to it."""


def make_datapath(engine: Engine, *, limits: Limits | None = None, manual_time: bool = False) -> Datapath:
    """A datapath of the engine. Raises RuntimeError where the native one is asked for and not built."""
    if check_engine(engine) == "python":
        return PythonDatapath(limits=limits, manual_time=manual_time)
    from vswitch.engine.native import NativeDatapath

    return NativeDatapath(limits=limits, manual_time=manual_time)


class Port:
    """One port of a switch; made by `Switch.add_port`."""

    def __init__(self, switch: Switch, port_id: int, config: PortConfig) -> None:
        self._switch = switch
        self._id = port_id
        self._config = config
        self._connected = False

    @property
    def switch(self) -> Switch:
        return self._switch

    @property
    def id(self) -> int:
        """32 bits, unique for the switch's whole life, never 0."""
        return self._id

    @property
    def name(self) -> str:
        return self._config.name

    @property
    def mtu(self) -> int:
        return self._config.mtu

    @property
    def connected(self) -> bool:
        """Whether a NIC is attached."""
        return self._connected

    async def attach(self, endpoint: object) -> None:
        """Connects a NIC's endpoint. Raises ValueError if there is one, TypeError for the other engine's
        kind."""
        await self._switch.datapath.attach(self._id, endpoint)
        self._connected = True
        self._switch.tell(DatapathEvent(EventKind.PORT_CONNECTED, self._id, self.name))

    async def detach(self) -> None:
        """Disconnects the NIC; on return nothing touches its endpoint or memory any more."""
        await self._switch.datapath.detach(self._id)
        if self._connected:
            self._connected = False
            self._switch.tell(DatapathEvent(EventKind.PORT_DISCONNECTED, self._id, self.name))

    def counters(self) -> PortCounters:
        return self._switch.datapath.port_counters(self._id)

    def drops(self) -> dict[DropReason, int]:
        return self._switch.datapath.drops(self._id)

    def inject(self, frame: Frame | bytes) -> None:
        """Treats `frame` as if the port's NIC had sent it."""
        self._switch.datapath.inject(self._id, frame)

    async def trace(self, frame: Frame | bytes) -> list[TraceStep]:
        """Tells what would happen to `frame`, had the port's NIC sent it now."""
        return await self._switch.datapath.trace(self._id, frame)

    def __repr__(self) -> str:
        return f"<Port {self.name} ({self._id}) of {self._switch.name}>"


class Switch:
    """One extensible switch."""

    def __init__(
        self,
        name: str = "switch",
        *,
        engine: Engine | None = None,
        limits: Limits | None = None,
        manual_time: bool = False,
    ) -> None:
        """`engine` None = native where it is built. `manual_time`: time stands still until
        `datapath.advance`."""
        self._name = name
        self._engine: Engine = default_engine() if engine is None else check_engine(engine)
        self._datapath = make_datapath(self._engine, limits=limits, manual_time=manual_time)
        self._datapath.on_event(self._on_event)
        self._ports: dict[str, Port] = {}
        self._next_id = NO_PORT + 1
        self._extensions: tuple[ExtensionChannel, ...] = ()
        self._subscribers: list[asyncio.Queue[DatapathEvent]] = []
        self._listeners: list[Callable[[DatapathEvent], None]] = []

    @property
    def name(self) -> str:
        return self._name

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def datapath(self) -> Datapath:
        return self._datapath

    @property
    def ports(self) -> dict[str, Port]:
        """The ports by name (a copy)."""
        return dict(self._ports)

    @property
    def extensions(self) -> tuple[ExtensionChannel, ...]:
        return self._extensions

    def port(self, name: str) -> Port:
        """The port of that name. Raises KeyError naming the switch and its ports."""
        try:
            return self._ports[name]
        except KeyError:
            known = ", ".join(sorted(self._ports)) or "none"
            raise KeyError(f"switch {self._name} has no port {name}; its ports: {known}") from None

    def port_by_id(self, port_id: int) -> Port:
        """The port with that id. Raises KeyError."""
        for port in self._ports.values():
            if port.id == port_id:
                return port
        raise KeyError(f"switch {self._name} has no port with id {port_id}")

    def add_port(self, name: str, *, mtu: int = 1500) -> Port:
        """A new port, not connected. Raises ValueError for a bad or taken name, an MTU out of 68..65535, or
        when
        the switch is full."""
        if not name or len(name) > MAX_NAME or not name.isprintable():
            raise ValueError(f"port name {name!r}: 1 to {MAX_NAME} printable characters expected")
        if name in self._ports:
            raise ValueError(f"switch {self._name} has a port {name} already")
        if not 68 <= mtu <= 65535:
            raise ValueError(f"port {name}: MTU {mtu} is not within 68..65535")
        if len(self._ports) >= MAX_PORTS:
            raise ValueError(f"switch {self._name} has {MAX_PORTS} ports already; remove one first")
        config = PortConfig(name, mtu)
        port = Port(self, self._next_id, config)
        self._datapath.add_port(port.id, config)
        self._next_id += 1
        self._ports[name] = port
        self.tell(DatapathEvent(EventKind.PORT_ADDED, port.id, name))
        return port

    async def remove_port(self, name: str) -> None:
        """Removes a port, disconnecting it first. Raises KeyError."""
        port = self.port(name)
        await port.detach()
        await self._datapath.remove_port(port.id)
        del self._ports[name]
        self.tell(DatapathEvent(EventKind.PORT_REMOVED, port.id, name))

    def host_endpoint(self, limit: int = 4096) -> InProcessEndpoint:
        """An endpoint for this switch's engine whose other side is the caller; `limit` frames each way."""
        return make_endpoint(self._engine, limit)

    async def set_extensions(self, channels: Sequence[ExtensionChannel]) -> None:
        """Replaces the extension list; see `Datapath.set_extensions`."""
        await self._datapath.set_extensions(channels)
        self._extensions = tuple(channels)

    def counters(self) -> SwitchCounters:
        return self._datapath.switch_counters()

    def extension_counters(self) -> dict[int, ExtensionCounters]:
        return self._datapath.extension_counters()

    def mac_table(self) -> list[MacEntry]:
        return self._datapath.mac_table()

    def flows(self) -> list[FlowInfo]:
        return self._datapath.flows()

    def open_tap(
        self, ports: Iterable[Port] | None = None, *, snaplen: int = 0, drops: bool = True
    ) -> CaptureTap:
        """Captures at `ports` (None = all), `snaplen` bytes of each frame (0 = all)."""
        ids = None if ports is None else [port.id for port in ports]
        return self._datapath.open_tap(ids, snaplen, drops)

    async def events(self) -> AsyncIterator[DatapathEvent]:
        """Yields events from now on, until the switch is closed or the iteration left."""
        queue: asyncio.Queue[DatapathEvent] = asyncio.Queue(EVENTS_KEPT)
        self._subscribers.append(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._subscribers.remove(queue)

    def on_event(self, listener: Callable[[DatapathEvent], None]) -> None:
        """Calls `listener` with every event, on the loop."""
        self._listeners.append(listener)

    def tell(self, event: DatapathEvent) -> None:
        """Gives an event to all who listen."""
        for listener in self._listeners:
            listener(event)
        for queue in self._subscribers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)

    async def close(self) -> None:
        """Removes all ports and ends the datapath."""
        for name in list(self._ports):
            await self.remove_port(name)
        await self._datapath.close()

    def _on_event(self, event: DatapathEvent) -> None:
        if event.kind is EventKind.PORT_DISCONNECTED:
            for port in self._ports.values():
                if port.id == event.subject:
                    port._connected = False
        self.tell(event)
