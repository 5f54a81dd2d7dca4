"""The seam between a switch and its datapath: what both engines, Python and native, do alike.

Data structures: a datapath holds ports (id -> config, endpoint, counters), one MAC table, one flow cache, the
channels of the extensions in their order, and capture taps.

Life cycle: `add_port` -> `attach` -> traffic -> `detach` -> `remove_port`; `close` ends it all. `detach`,
`remove_port` and `close` return only after no frame of that port is in work and no memory of its endpoint
will be
touched any more.

Threads: all methods are called on the asyncio loop's thread. The Python engine runs there too; the native
engine
runs on a worker thread of its own and never calls into Python.

Counting: "rx" is what the switch received from the port's NIC, "tx" what it delivered to it. A drop before
destinations are chosen belongs to the source port ("in"), a drop on the way to one destination to that port
("out").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, Protocol

from vswitch.drops import DropReason
from vswitch.endpoint import NO_OFFLOAD, Frame, Offload
from vswitch.upcall import ExtensionChannel, ExtensionKind, FailureMode

__all__ = [
    "BATCH",
    "HEAD_BYTES",
    "MAX_FRAME_BYTES",
    "NO_PORT",
    "CaptureTap",
    "CapturedFrame",
    "Datapath",
    "DatapathEvent",
    "Direction",
    "EventKind",
    "ExtensionChannel",
    "ExtensionCounters",
    "ExtensionKind",
    "FailureMode",
    "FlowInfo",
    "Limits",
    "MacEntry",
    "PortConfig",
    "PortCounters",
    "SwitchCounters",
    "TraceStep",
]

Direction = Literal["in", "out"]

BATCH = 64
"""Frames taken from one endpoint per turn."""
HEAD_BYTES = 192
"""Bytes of a frame that the parser may look at; the native engine copies these once and judges the copy."""
MAX_FRAME_BYTES = 65535 + 18
"""The longest frame that the switch carries: a large send with its Ethernet header and VLAN tag."""
NO_PORT = 0
"""Port 0 is the switch itself and is never created."""


@dataclass(frozen=True, slots=True)
class PortConfig:
    """What the datapath needs to know of a port."""

    name: str
    mtu: int = 1500
    """Largest layer-3 packet in bytes; large sends (`Offload.mss` > 0) may exceed it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one datapath; whatever a guest could grow has one."""

    mac_entries: int = 4096
    mac_age_seconds: float = 300.0
    flow_entries: int = 16384
    flow_masks: int = 32
    flow_idle_seconds: float = 10.0
    held_per_flow: int = 64
    """Frames of one flow waiting behind its upcall."""
    held_total: int = 4096
    upcalls_per_port: int = 256
    """Frames of one source port with an upcall in flight."""
    upcall_deadline_seconds: float = 1.0
    capture_frames: int = 4096
    """Frames waiting in one capture tap to be read."""
    capture_bytes: int = 16 << 20
    """Their bytes in all."""


@dataclass(slots=True)
class PortCounters:
    """Counters of one port since it was added."""

    rx_packets: int = 0
    rx_bytes: int = 0
    rx_unicast: int = 0
    rx_multicast: int = 0
    rx_broadcast: int = 0
    rx_dropped: int = 0
    rx_extension_dropped: int = 0
    """Those of `rx_dropped` that an extension, or its failure, caused."""
    tx_packets: int = 0
    tx_bytes: int = 0
    tx_unicast: int = 0
    tx_multicast: int = 0
    tx_broadcast: int = 0
    tx_dropped: int = 0
    tx_extension_dropped: int = 0
    rx_drops: dict[DropReason, int] = field(default_factory=dict)
    tx_drops: dict[DropReason, int] = field(default_factory=dict)


@dataclass(slots=True)
class SwitchCounters:
    """Counters of the whole datapath; drops here survive the removal of the port they happened at."""

    flooded: int = 0
    macs_learned: int = 0
    macs_moved: int = 0
    macs_purged: int = 0
    macs_refused: int = 0
    """Frames whose source was not learned because the table is full."""
    flow_hits: int = 0
    flow_misses: int = 0
    flows_published: int = 0
    flows_evicted: int = 0
    flows_refused: int = 0
    """Walks whose result may not be cached, or for which the cache had no room for another mask."""
    upcalls: int = 0
    upcall_failures: int = 0
    endpoints_failed: int = 0
    """Endpoints that raised (or panicked) and were let go of."""
    drops: dict[DropReason, int] = field(default_factory=dict)


@dataclass(slots=True)
class ExtensionCounters:
    """What one extension was asked and what came of it."""

    upcalls: int = 0
    allowed: int = 0
    dropped: int = 0
    errors: int = 0
    """Replies that said the extension raised."""
    failed: bool = False
    why: str = ""


@dataclass(frozen=True, slots=True)
class MacEntry:
    """One learned address."""

    mac: bytes
    vlan_id: int
    """0 for untagged and priority-tagged frames."""
    port_id: int
    age_seconds: float


@dataclass(frozen=True, slots=True)
class FlowInfo:
    """One flow-cache entry, for people."""

    match: dict[str, str]
    """Field name -> value, for every field that anyone looked at."""
    actions: tuple[str, ...]
    packets: int
    bytes: int
    idle_seconds: float
    ttl_seconds: float | None


@dataclass(frozen=True, slots=True)
class TraceStep:
    """What one stage of the pipeline decided about a traced frame."""

    stage: str
    """`receive`, `filter in`, `policy in`, `turn`, `policy out`, `filter out`, `deliver`."""
    verdict: str
    """`continue`, `flood`, `forward`, `deliver` or `drop`."""
    detail: str
    fields: tuple[str, ...] = ()
    """Names of the header fields that this stage read."""
    port_id: int | None = None
    """The destination that this step concerns; None before destinations are chosen."""
    reason: DropReason | None = None
    dropped_by: str | None = None


@dataclass(frozen=True, slots=True)
class CapturedFrame:
    """One sighting of a frame at a port, or its drop."""

    timestamp_ns: int
    """Nanoseconds since the Unix epoch."""
    port_id: int
    direction: Direction
    """`in` from the port's NIC, `out` towards it."""
    packet_id: int
    """The same at every sighting of one frame; unique per datapath."""
    data: bytes
    original_length: int
    drop_reason: DropReason | None = None
    dropped_by: str | None = None
    """Name of the extension, or None for the switch itself."""
    detail: str = ""
    """The drop's reason in words."""
    queue: int = 0
    vlan_tci: int | None = None
    offload: Offload = NO_OFFLOAD


class CaptureTap(Protocol):
    """A bounded queue of sightings; closing it is the only way to stop paying for it."""

    @property
    def fd(self) -> int:
        """Readable while frames wait (an eventfd; `read` clears it)."""
        ...

    @property
    def lost(self) -> int:
        """Sightings that found the queue full."""
        ...

    def read(self, limit: int = 1024) -> list[CapturedFrame]: ...

    def close(self) -> None: ...


class EventKind(Enum):
    """Things that the switch tells its owner without being asked."""

    EXTENSION_FAILED = "extension_failed"
    """It broke the protocol, missed its deadline or died; its `on_failure` applies until its channel is
    replaced."""
    EXTENSION_ERROR = "extension_error"
    """It answered that its code raised; only that frame was affected."""
    PORT_ADDED = "port_added"
    PORT_REMOVED = "port_removed"
    PORT_CONNECTED = "port_connected"
    PORT_DISCONNECTED = "port_disconnected"
    EXTENSIONS_CHANGED = "extensions_changed"


@dataclass(frozen=True, slots=True)
class DatapathEvent:
    """One event; `subject` is the id of the port or extension."""

    kind: EventKind
    subject: int
    text: str


class Datapath(Protocol):
    """One switch's datapath. Unknown port ids raise KeyError naming the id."""

    def add_port(self, port_id: int, config: PortConfig) -> None: ...

    async def remove_port(self, port_id: int) -> None: ...

    async def attach(self, port_id: int, endpoint: object) -> None:
        """Connects `endpoint`: an `Endpoint` for the Python engine, an `EndpointHandle` for the native one.

        Raises TypeError for the other engine's kind, ValueError if the port has one already.
        """
        ...

    async def detach(self, port_id: int) -> None:
        """Disconnects the port's endpoint; returns once nothing touches it any more. No endpoint: no
        effect."""
        ...

    def port_counters(self, port_id: int) -> PortCounters: ...

    def drops(self, port_id: int) -> dict[DropReason, int]:
        """Drops at the port by reason, both directions together."""
        ...

    def switch_counters(self) -> SwitchCounters: ...

    def extension_counters(self) -> dict[int, ExtensionCounters]: ...

    def mac_table(self) -> list[MacEntry]: ...

    def flows(self) -> list[FlowInfo]: ...

    def flush_flows(self) -> None: ...

    async def set_extensions(self, channels: Iterable[ExtensionChannel]) -> None:
        """Replaces the extension list, first = first to see a frame coming in.

        Frames waiting for a verdict are judged anew by the new list; on return no cached verdict of the old
        one is
        left. The caller closes the old channels afterwards.
        """
        ...

    def fail_extension(self, extension_id: int, why: str) -> None:
        """Tells that the extension's process is gone: its `on_failure` applies to all that waits for it."""
        ...

    def open_tap(self, ports: Iterable[int] | None, snaplen: int, drops: bool) -> CaptureTap:
        """Starts capturing at `ports` (None = all, later ones too), `snaplen` bytes each (0 = all); `drops`
        adds a
        sighting with the reason for every frame dropped there."""
        ...

    def inject(self, port_id: int, frame: Frame | bytes) -> None:
        """Treats `frame` as if the port's NIC had sent it."""
        ...

    async def trace(self, port_id: int, frame: Frame | bytes) -> list[TraceStep]:
        """Walks `frame` through the pipeline without delivering, learning, counting or caching anything."""
        ...

    async def barrier(self) -> None:
        """Returns once all that endpoints offered or `inject` gave before the call has been decided."""
        ...

    def on_event(self, callback: Callable[[DatapathEvent], None]) -> None:
        """Sets who is told of events; called on the loop's thread."""
        ...

    async def advance(self, seconds: float) -> None:
        """Moves the time of a datapath made with `manual_time=True`, and does what falls due.

        Else ValueError.
        """
        ...

    async def close(self) -> None: ...
