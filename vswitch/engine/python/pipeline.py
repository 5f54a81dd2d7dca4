"""The switch's pipeline, stage by stage, as one readable walk: the document of record for a frame's fate.

Order (WDK, "Packet Flow through the Extensible Switch Data Path"): filter extensions in their order, built-in
ingress policies, the turn (learning and choice of destinations), then for each destination built-in egress
policies
and the filter extensions in reverse order. Capture and delivery lie around it, in the datapath.

A walk is a generator: it yields an `Ask` whenever an extension has to be consulted, is sent the `Answer`,
and returns the `Program`, which is what the flow cache keeps. It has no effect but learning, and not even
that when it is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vswitch.drops import DropReason
from vswitch.engine import ExtensionChannel, TraceStep
from vswitch.engine.python.mac import MacKey
from vswitch.engine.python.parse import Packet
from vswitch.engine.texts import mac_text
from vswitch.fields import ALL_BITS, RAW_BIT, Field, close, names

__all__ = ["Answer", "Ask", "Destination", "Drop", "Program", "Recorder", "Surroundings", "Walk", "walk"]

_GROUP_BIT = 1 << 40
BROADCAST = 0xFFFF_FFFF_FFFF
_BRIDGE_GROUP = 0x0180_C200_0000
"""01-80-C2-00-00-00 to -0F: IEEE 802.1D table 7-10, never forwarded by a bridge."""


class Drop(NamedTuple):
    """A frame's end, at its source or towards one destination."""

    reason: DropReason
    detail: str
    dropped_by: str | None = None
    """Name of the extension, or None for the switch itself."""


class Destination(NamedTuple):
    """One output; `drop` is the verdict of an egress filter on it."""

    port_id: int
    drop: Drop | None = None


class Program(NamedTuple):
    """What to do with a frame, and with all that are equal to it in the fields that were read."""

    drop: Drop | None
    destinations: tuple[Destination, ...] = ()
    unknown: bool = False
    """Flooded because the destination is unknown."""
    source: MacKey | None = None
    """The address that hits keep young."""


class Ask(NamedTuple):
    """The walk wants to know what an extension says; `out_port` None = the ingress pass."""

    channel: ExtensionChannel
    out_port: int | None


class Answer(NamedTuple):
    """What came of it. `fields`, `cacheable` and `ttl_ns` say how far it holds."""

    drop: Drop | None
    fields: int = 0
    cacheable: bool = False
    ttl_ns: int = 0


Walk = Generator[Ask, Answer, Program]


@dataclass(slots=True)
class Recorder:
    """Notes everything that a walk looked at, and for a trace each stage's words."""

    tracing: bool = False
    mask: int = 0
    dependencies: list[tuple[MacKey, int | None]] = field(default_factory=list)
    """Rows of the MAC table that were looked up, and what was found."""
    cacheable: bool = True
    ttl_ns: int = 0
    steps: list[TraceStep] = field(default_factory=list)

    def read(self, *fields: Field) -> None:
        for one in fields:
            self.mask |= one.bit

    def verdict(self, answer: Answer) -> None:
        """Takes over what an extension's verdict depends on."""
        self.mask |= close(answer.fields & ALL_BITS)
        if not answer.cacheable or answer.fields & RAW_BIT:
            self.cacheable = False
        if answer.ttl_ns and (not self.ttl_ns or answer.ttl_ns < self.ttl_ns):
            self.ttl_ns = answer.ttl_ns

    def step(
        self,
        stage: str,
        verdict: str,
        detail: str,
        fields: int = 0,
        port_id: int | None = None,
        drop: Drop | None = None,
    ) -> None:
        if self.tracing:
            reason = None if drop is None else drop.reason
            by = None if drop is None else drop.dropped_by
            self.steps.append(TraceStep(stage, verdict, detail, names(fields), port_id, reason, by))


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a walk may ask of its datapath."""

    ingress: Sequence[ExtensionChannel]
    egress: Sequence[ExtensionChannel]
    """In the order in which the egress pass consults them."""
    port_name: Callable[[int], str]
    connected: Callable[[], list[int]]
    """Ids of the connected ports, ascending."""
    lookup: Callable[[MacKey], int | None]
    learn: Callable[[MacKey, int], bool]
    egress_policy: Callable[[Packet, int], Drop | None]
    """Per-frame checks towards a port; repeated whenever a frame is sent there."""


def walk(packet: Packet, recorder: Recorder, around: Surroundings) -> Walk:
    """Decides about one parsed frame."""
    recorder.read(Field.IN_PORT)
    for channel in around.ingress:
        answer = yield Ask(channel, None)
        _heard(recorder, "filter in", channel, answer, None)
        if answer.drop is not None:
            return Program(answer.drop)

    drop = _ingress_policy(packet, recorder)
    if drop is not None:
        return Program(drop)

    program = _turn(packet, recorder, around)
    if program.drop is not None:
        return program

    destinations: list[Destination] = []
    for destination in program.destinations:
        port_id = destination.port_id
        drop = around.egress_policy(packet, port_id)
        if drop is not None:
            if drop.reason is DropReason.MTU_MISMATCH and around.egress:
                recorder.cacheable = False  # a shorter frame of the flow would have been shown to the filters
            recorder.step("policy out", "drop", drop.detail, 0, port_id, drop)
            destinations.append(Destination(port_id))
            continue
        recorder.step("policy out", "continue", "connected, fits the MTU", 0, port_id)
        for channel in around.egress:
            answer = yield Ask(channel, port_id)
            _heard(recorder, "filter out", channel, answer, port_id)
            drop = answer.drop
            if drop is not None:
                break
        destinations.append(Destination(port_id, drop))
    return program._replace(destinations=tuple(destinations))


def _heard(
    recorder: Recorder, stage: str, channel: ExtensionChannel, answer: Answer, port_id: int | None
) -> None:
    recorder.verdict(answer)
    if answer.drop is None:
        recorder.step(stage, "continue", f"extension {channel.name} allows it", answer.fields, port_id)
    else:
        detail = f"extension {channel.name}: {answer.drop.detail}"
        recorder.step(stage, "drop", detail, answer.fields, port_id, answer.drop)


def _ingress_policy(packet: Packet, recorder: Recorder) -> Drop | None:
    recorder.read(Field.ETH_SRC, Field.ETH_DST)
    source = packet.fields[Field.ETH_SRC]
    destination = packet.fields[Field.ETH_DST]
    drop = None
    if source & _GROUP_BIT:
        drop = Drop(DropReason.INVALID_SOURCE_MAC, f"source address {mac_text(source)} is a group address")
    elif source == 0:
        drop = Drop(DropReason.INVALID_SOURCE_MAC, "source address is all zero")
    elif destination & ~0xF == _BRIDGE_GROUP:
        drop = Drop(DropReason.BRIDGE_RESERVED, f"{mac_text(destination)} is never forwarded by a bridge")
    read = Field.ETH_SRC.bit | Field.ETH_DST.bit
    if drop is None:
        recorder.step("policy in", "continue", "addresses are valid", read)
    else:
        recorder.step("policy in", "drop", drop.detail, read, None, drop)
    return drop


def _turn(packet: Packet, recorder: Recorder, around: Surroundings) -> Program:
    recorder.read(Field.VLAN_TCI)
    vlan = packet.vlan_id
    source: MacKey = (vlan, packet.fields[Field.ETH_SRC])
    if recorder.tracing or around.learn(source, packet.in_port):
        recorder.dependencies.append((source, packet.in_port))
    else:
        recorder.cacheable = False  # it is to be learned as soon as there is room
    address = packet.fields[Field.ETH_DST]
    read = Field.ETH_SRC.bit | Field.ETH_DST.bit | Field.VLAN_TCI.bit

    def nowhere(reason: DropReason, detail: str) -> Program:
        drop = Drop(reason, detail)
        recorder.step("turn", "drop", detail, read, None, drop)
        return Program(drop, source=source)

    others = [port_id for port_id in around.connected() if port_id != packet.in_port]
    unknown = False
    if address & _GROUP_BIT:
        kind = "broadcast" if address == BROADCAST else "multicast"
        if not others:
            return nowhere(DropReason.BROADCAST_NO_DESTINATIONS, f"{kind}, and no other port is connected")
    else:
        key: MacKey = (vlan, address)
        found = around.lookup(key)
        if recorder.tracing and key == source:
            found = packet.in_port  # as it would be, had the frame been learned from
        recorder.dependencies.append((key, found))
        if found == packet.in_port:
            return nowhere(
                DropReason.UNICAST_NO_DESTINATION, f"{mac_text(address)} is behind the port it came from"
            )
        if found is not None:
            recorder.step(
                "turn", "forward", f"{mac_text(address)} is behind {around.port_name(found)}", read, found
            )
            return Program(None, (Destination(found),), source=source)
        kind, unknown = "unknown", True
        if not others:
            detail = f"{mac_text(address)} is unknown, and no other port is connected"
            return nowhere(DropReason.UNICAST_NO_DESTINATION, detail)
    recorder.step("turn", "flood", f"{kind} address {mac_text(address)}: {len(others)} ports", read)
    return Program(None, tuple(Destination(port_id) for port_id in others), unknown, source)
