"""The ports of the Python engine: delivery, drops, counters and capture.

Every drop passes `Ports.drop` or `Ports.count_drop`: there is no other way to lose a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from vswitch.drops import DropReason
from vswitch.endpoint import Endpoint
from vswitch.engine import CapturedFrame, Direction, Limits, PortConfig, PortCounters, SwitchCounters
from vswitch.engine.python.parse import Packet
from vswitch.engine.python.pipeline import BROADCAST, Destination, Drop, Program
from vswitch.engine.python.tap import PythonTap
from vswitch.fields import Field

__all__ = ["Port", "Ports"]


@dataclass(slots=True)
class Port:
    """A port and what it has counted."""

    config: PortConfig
    endpoint: Endpoint | None = None
    counters: PortCounters = field(default_factory=PortCounters)
    walks: int = 0
    """Frames from this port with an upcall in flight."""


class Ports:
    """The ports, with everything that happens to a frame at one of them."""

    def __init__(self, limits: Limits, wall_ns: Callable[[], int]) -> None:
        self.counters = SwitchCounters()
        self.touched: dict[int, None] = {}
        """Ports whose endpoint got or gave frames and is to be flushed."""
        self._ports: dict[int, Port] = {}
        self._taps: list[PythonTap] = []
        self._limits = limits
        self._wall_ns = wall_ns

    def add(self, port_id: int, config: PortConfig) -> None:
        """Raises ValueError for an id that is taken or impossible."""
        if not 0 < port_id < 0xFFFF_FFFF:
            raise ValueError(f"port id {port_id}: 1 to {0xFFFF_FFFE} expected (0 is the switch itself)")
        if port_id in self._ports:
            raise ValueError(f"port {port_id} exists already")
        self._ports[port_id] = Port(config)

    def remove(self, port_id: int) -> None:
        del self._ports[port_id]

    def find(self, port_id: int) -> Port | None:
        """The port, or None if it is gone."""
        return self._ports.get(port_id)

    def get(self, port_id: int) -> Port:
        """The port. Raises KeyError."""
        port = self._ports.get(port_id)
        if port is None:
            raise KeyError(f"the switch has no port {port_id}")
        return port

    def name(self, port_id: int) -> str:
        """The port's name; of one that is gone, its id."""
        port = self._ports.get(port_id)
        return str(port_id) if port is None else port.config.name

    def connected(self) -> list[int]:
        """Ids of the ports with an endpoint, ascending."""
        return sorted(port_id for port_id, port in self._ports.items() if port.endpoint is not None)

    def ids(self) -> list[int]:
        return list(self._ports)

    def flush(self) -> None:
        """Lets every touched endpoint publish what it got and complete what it gave."""
        while self.touched:
            touched, self.touched = self.touched, {}
            for port_id in touched:
                port = self._ports.get(port_id)
                if port is not None and port.endpoint is not None:
                    port.endpoint.flush()

    def arrived(self, packet: Packet, port: Port) -> None:
        """Counts and captures a frame from the port's NIC."""
        data = packet.frame.data
        counters = port.counters
        counters.rx_packets += 1
        counters.rx_bytes += packet.length
        if packet.length < 6 or not data[0] & 1:
            counters.rx_unicast += 1
        elif int.from_bytes(data[:6], "big") == BROADCAST:
            counters.rx_broadcast += 1
        else:
            counters.rx_multicast += 1
        self.sight(packet, packet.in_port, "in")

    def execute(self, packet: Packet, program: Program) -> None:
        """Does what was decided about a frame."""
        if program.drop is not None:
            self.drop(packet, packet.in_port, "in", program.drop)
            return
        if program.unknown:
            self.counters.flooded += 1
        for destination in program.destinations:
            self.output(packet, destination)

    def output(self, packet: Packet, destination: Destination) -> None:
        port_id = destination.port_id
        drop = self.egress_policy(packet, port_id) or destination.drop
        if drop is not None:
            self.drop(packet, port_id, "out", drop)
            return
        self.sight(packet, port_id, "out")
        port = self._ports[port_id]
        assert port.endpoint is not None, "the egress policy lets nothing through to a disconnected port"
        self.touched[port_id] = None
        reason = port.endpoint.transmit(packet.frame)
        if reason is not None:
            self.drop(packet, port_id, "out", Drop(reason, "the NIC did not take it"))
            return
        counters = port.counters
        counters.tx_packets += 1
        counters.tx_bytes += packet.length
        if not packet.frame.data[0] & 1:
            counters.tx_unicast += 1
        elif packet.fields[Field.ETH_DST] == BROADCAST:
            counters.tx_broadcast += 1
        else:
            counters.tx_multicast += 1

    def egress_policy(self, packet: Packet, port_id: int) -> Drop | None:
        """Per-frame checks towards a port."""
        port = self._ports.get(port_id)
        if port is None or port.endpoint is None:
            return Drop(DropReason.DISCONNECTED, "no NIC is connected to the port")
        if packet.l3_length > port.config.mtu and not packet.frame.offload.mss:
            detail = f"{packet.l3_length} bytes exceed the destination's MTU of {port.config.mtu}"
            return Drop(DropReason.MTU_MISMATCH, detail)
        return None

    def drop(self, packet: Packet, port_id: int, direction: Direction, drop: Drop) -> None:
        """Ends a frame at a port, counted and captured."""
        self.count_drop(port_id, direction, drop)
        self.sight(packet, port_id, direction, drop)

    def count_drop(self, port_id: int, direction: Direction, drop: Drop) -> None:
        total = self.counters.drops
        total[drop.reason] = total.get(drop.reason, 0) + 1
        port = self._ports.get(port_id)
        if port is None:
            return
        counters = port.counters
        by_reason = counters.rx_drops if direction == "in" else counters.tx_drops
        by_reason[drop.reason] = by_reason.get(drop.reason, 0) + 1
        by_extension = drop.dropped_by is not None
        if direction == "in":
            counters.rx_dropped += 1
            counters.rx_extension_dropped += by_extension
        else:
            counters.tx_dropped += 1
            counters.tx_extension_dropped += by_extension

    def sight(self, packet: Packet, port_id: int, direction: Direction, drop: Drop | None = None) -> None:
        if not self._taps:
            return
        stamp = self._wall_ns()
        for tap in self._taps:
            if not tap.wants(port_id, drop is not None):
                continue
            data = bytes(packet.frame.data[: tap.snaplen] if tap.snaplen else packet.frame.data)
            sighting = CapturedFrame(
                stamp,
                port_id,
                direction,
                packet.id,
                data,
                packet.length,
                vlan_tci=packet.frame.vlan_tci,
                offload=packet.frame.offload,
            )
            if drop is not None:
                sighting = replace(
                    sighting, drop_reason=drop.reason, dropped_by=drop.dropped_by, detail=drop.detail
                )
            tap.put(sighting)

    def port_counters(self, port_id: int) -> PortCounters:
        counters = self.get(port_id).counters
        return replace(counters, rx_drops=dict(counters.rx_drops), tx_drops=dict(counters.tx_drops))

    def drops(self, port_id: int) -> dict[DropReason, int]:
        counters = self.get(port_id).counters
        reasons = {**counters.rx_drops, **counters.tx_drops}
        return {
            reason: counters.rx_drops.get(reason, 0) + counters.tx_drops.get(reason, 0)
            for reason in sorted(reasons)
        }

    def switch_counters(self) -> SwitchCounters:
        return replace(self.counters, drops=dict(self.counters.drops))

    def open_tap(self, ports: Iterable[int] | None, snaplen: int, drops: bool) -> PythonTap:
        tap = PythonTap(ports, snaplen, drops, self._limits, self._taps.remove)
        self._taps.append(tap)
        return tap

    def close_taps(self) -> None:
        for tap in list(self._taps):
            tap.close()
