"""The two engines are one switch: whatever is done to both, both say and do the same.

Hypothesis makes up ports that come, go and reconnect, frames of every shape, extensions loaded and unloaded,
time passing; after each step every delivery, drop, counter, capture, table and cached flow is compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from switch_frames import BROADCAST, ethernet, ipv4, mac, tagged, tcp, udp
from switch_world import ScriptedExtension, World

import vswitch_native
from vswitch.endpoint import Frame, Offload
from vswitch.engine import CapturedFrame, CaptureTap, Limits
from vswitch.fields import ALL_BITS, Field
from vswitch.upcall import VERDICT_ALLOW, VERDICT_DROP, VERDICT_ERROR, UpcallReply, UpcallRequest
from vswitch_wire.engine import ENGINES

pytestmark = [
    pytest.mark.skipif(not vswitch_native.AVAILABLE, reason="the native module is not built"),
    pytest.mark.timeout(300),
]

LIMITS = Limits(
    mac_entries=6,
    mac_age_seconds=6,
    flow_entries=12,
    flow_masks=3,
    flow_idle_seconds=4,
    capture_frames=100_000,
)
EXTENSIONS = ("ports", "hosts", "ttl", "faulty", "egress")
NAMES = ("p1", "p2", "p3", "p4")
HEADERS = 54
"""Bytes of the longest headers (Ethernet, IPv4, TCP): frames equal in these are of one flow."""

macs = st.sampled_from(
    [mac(n) for n in range(1, 9)]
    + [BROADCAST, bytes.fromhex("01005e000001"), bytes.fromhex("0180c2000002"), bytes(6), b"\x03" + bytes(5)]
)
ports = st.sampled_from([22, 23, 53, 80, 443])


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    dst, src = draw(macs), draw(macs)
    kind = draw(
        st.sampled_from(["plain", "tagged", "tcp", "udp", "fragment", "ipv6", "arp", "garbage", "big"])
    )
    offload, tci = Offload(), draw(st.one_of(st.none(), st.sampled_from([0, 5, 0x2005])))
    if kind == "plain":
        data = ethernet(dst, src, draw(st.sampled_from([0x88B5, 0x0100, 0x8100])))
    elif kind == "tagged":
        data = tagged(dst, src, draw(st.sampled_from([0, 5, 0x4006])))
    elif kind == "tcp":
        data = ipv4(dst, src, payload=tcp(draw(ports), draw(ports), draw(st.sampled_from([2, 16, 17]))))
    elif kind == "udp":
        data = ipv4(
            dst, src, proto=17, ttl=draw(st.sampled_from([1, 64])), payload=udp(draw(ports), draw(ports))
        )
    elif kind == "fragment":
        data = ipv4(
            dst, src, payload=tcp(draw(ports), draw(ports)), fragment=draw(st.sampled_from([0x2000, 9]))
        )
    elif kind == "ipv6":
        chain = draw(st.sampled_from([b"", b"\x06\x00" + bytes(6), b"\x06\x00\x00\x01" + bytes(4)]))
        first = {0: 6, 8: 60 if chain[3:4] == b"\x00" else 44}[len(chain)]
        body = chain + tcp(draw(ports), draw(ports))
        data = ethernet(
            dst,
            src,
            0x86DD,
            b"\x60\0\0\0" + len(body).to_bytes(2, "big") + bytes([first, 64]) + bytes(32) + body,
        )
    elif kind == "arp":
        data = ethernet(
            dst, src, 0x0806, b"\0\1\x08\0\6\4\0" + draw(st.sampled_from([b"\1", b"\2"])) + bytes(20)
        )
    elif kind == "big":
        offload = Offload(mss=draw(st.sampled_from([0, 1400])))
        data = ipv4(dst, src, payload=tcp(1, 2, payload=bytes(draw(st.sampled_from([90, 1460, 1480, 9000])))))
    else:
        data = (
            dst
            + src
            + draw(st.sampled_from([b"\x08\0", b"\x86\xdd", b"\x81\0"]))
            + draw(st.binary(max_size=60))
        )
        data = data[: draw(st.integers(0, 80))]
    return Frame(data, offload, tci)


POOL = [
    Frame(ipv4(mac(a), mac(b), payload=tcp(22, port))) for a in (1, 2) for b in (2, 3) for port in (23, 80)
]
"""Frames that come again and again, so that flows are hit."""
bursts = st.lists(st.one_of(frames(), st.sampled_from(POOL), st.sampled_from(POOL)), min_size=1, max_size=6)

steps = st.one_of(
    st.tuples(st.just("send"), st.sampled_from(NAMES), bursts),
    st.tuples(st.just("send"), st.sampled_from(NAMES), bursts),
    st.tuples(st.just("send"), st.sampled_from(NAMES), bursts),
    st.tuples(st.just("inject"), st.sampled_from(NAMES), frames()),
    st.tuples(st.just("trace"), st.sampled_from(NAMES), frames()),
    st.tuples(st.just("port"), st.sampled_from(NAMES), st.sampled_from([100, 1500])),
    st.tuples(st.just("detach"), st.sampled_from(NAMES)),
    st.tuples(st.just("extensions"), st.lists(st.sampled_from(EXTENSIONS), max_size=2, unique=True)),
    st.tuples(st.just("wait"), st.sampled_from([0.5, 1, 3, 7])),
)


def by_ports(request: UpcallRequest) -> UpcallReply:
    """Drops TCP or UDP to port 23, as a parser of its own finds it."""
    data = request.data
    at = 14 + (4 if data[12:14] == b"\x81\0" and request.vlan_tci is None else 0)
    reads = Field.L4_DST.bit
    first = data[at + 6 : at + 8] in (b"\0\0", b"\x20\0")
    is_ip = data[at - 2 : at] == b"\x08\0" and data[at : at + 1] == b"\x45"
    if (
        is_ip
        and first
        and data[at + 9 : at + 10] in (b"\6", b"\x11")
        and data[at + 22 : at + 24] == b"\0\x17"
    ):
        return UpcallReply(VERDICT_DROP, reads, True, reason="port 23")
    return UpcallReply(VERDICT_ALLOW, reads, True)


def by_hosts(request: UpcallRequest) -> UpcallReply:
    reads = Field.ETH_SRC.bit | Field.IN_PORT.bit
    if request.data[11:12] == b"\3":
        return UpcallReply(VERDICT_DROP, reads, True, reason="host 3")
    return UpcallReply(VERDICT_ALLOW, reads, True)


def for_a_while(request: UpcallRequest) -> UpcallReply:
    return UpcallReply(VERDICT_ALLOW, Field.ETH_TYPE.bit, True, ttl_ms=800)


def faulty(request: UpcallRequest) -> UpcallReply:
    if request.frame_length % 3 == 0:
        return UpcallReply(VERDICT_ERROR, reason="raised")
    return UpcallReply(VERDICT_ALLOW, Field.RAW.bit, True)


def on_egress(request: UpcallRequest) -> UpcallReply:
    reads = Field.ETH_DST.bit
    if request.egress and request.out_port is not None and request.out_port % 3 == 0:
        return UpcallReply(VERDICT_DROP, reads, True, reason="not out there")
    return UpcallReply(VERDICT_ALLOW, reads, True)


JUDGES: dict[str, Callable[[UpcallRequest], UpcallReply]] = {
    "ports": by_ports,
    "hosts": by_hosts,
    "ttl": for_a_while,
    "faulty": faulty,
    "egress": on_egress,
}


class Twin:
    """One engine under test, driven by steps."""

    def __init__(self, engine: Any) -> None:
        self.world = World(engine, limits=LIMITS)
        self.tap: CaptureTap = self.world.switch.open_tap()
        self.loaded = 0

    async def do(self, step: tuple[Any, ...]) -> object:
        kind, *rest = step
        world = self.world
        if kind == "wait":
            return await world.switch.datapath.advance(rest[0])
        if kind == "extensions":
            self.loaded = len(rest[0])
            return await world.load(*(self._extension(name) for name in rest[0]))
        name = rest[0]
        if kind == "port":
            if name in world.switch.ports:
                await world.remove(name)
                return None
            return [port.id for port in await world.add(name, mtu=rest[1])]
        if name not in world.endpoints:
            return None
        port = world.switch.port(name)
        if kind == "send" and port.connected:
            return await self.send(name, *rest[1])
        if kind == "inject":
            port.inject(rest[1])
            return await self.send(name)
        if kind == "trace":
            return await self._trace(name, rest[1])
        if kind == "detach" and port.connected:
            await port.detach()
        return None

    async def _trace(self, name: str, frame: Frame) -> object:
        """The trace, held to what happens to the frame sent right after it."""
        world = self.world
        port = world.switch.port(name)
        self.tap.read()
        traced = await port.trace(frame)
        port.inject(frame)
        arrived = await world.send(name)
        ids = {world.switch.port(other).id for other in arrived}
        assert {step.port_id for step in traced if step.verdict == "deliver"} == ids
        seen = {
            (one.drop_reason, one.port_id, one.dropped_by)
            for one in self.tap.read()
            if one.drop_reason is not None
        }
        told = {
            (step.reason, step.port_id or port.id, step.dropped_by)
            for step in traced
            if step.verdict == "drop"
        }
        assert told == seen
        return traced, arrived

    def _extension(self, name: str) -> ScriptedExtension:
        return self.world.extension(JUDGES[name], name=name)

    async def send(self, name: str, *frames: Frame) -> dict[str, list[bytes]]:
        """What arrives where, in order.

        Frames of different flows keep their order while one extension is asked. Two are processes of their
        own: which of them answers first decides whose frame goes on first, in either engine.
        """
        arrived = await self.world.send(name, *frames)
        return (
            arrived
            if self.loaded < 2
            else {port: sorted(data, key=lambda one: one[:HEADERS]) for port, data in arrived.items()}
        )

    def captured(self) -> list[CapturedFrame]:
        """Sightings in order; with two extensions in the order of their packets (see `send`)."""
        seen = self.tap.read(100_000)
        return seen if self.loaded < 2 else sorted(seen, key=lambda one: one.packet_id)

    def sight(self) -> dict[str, object]:
        switch = self.world.switch
        return {
            "arrived": self.world.arrived(),
            "switch": asdict(switch.counters()),
            "ports": {name: asdict(port.counters()) for name, port in switch.ports.items()},
            "drops": {name: port.drops() for name, port in switch.ports.items()},
            "extensions": {id: asdict(counters) for id, counters in switch.extension_counters().items()},
            "asked": [len(extension.asked) for extension in self.world.extensions],
            "macs": switch.mac_table(),
            "flows": switch.flows(),
            "captured": self.captured(),
        }


async def compare(script: list[tuple[Any, ...]]) -> None:
    twins = [Twin("python"), Twin("native")]
    try:
        for twin in twins:
            await twin.world.add("p1", "p2", "p3")
        for step in script:
            results = [await asyncio.wait_for(twin.do(step), 10) for twin in twins]
            assert results[0] == results[1], step
            sights = [twin.sight() for twin in twins]
            for what in sights[0]:
                assert sights[0][what] == sights[1][what], (step, what)
    finally:
        for twin in twins:
            await twin.world.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(steps, max_size=15))
def test_both_engines_do_and_say_the_same(script: list[tuple[Any, ...]]) -> None:
    asyncio.run(compare(script))


def reads_all(request: UpcallRequest) -> UpcallReply:
    return UpcallReply(VERDICT_ALLOW, ALL_BITS & ~Field.RAW.bit, True)


@st.composite
def damaged(draw: st.DrawFn) -> Frame:
    """A frame with some of its header bytes changed, or cut short."""
    frame = draw(frames())
    data = bytearray(frame.data)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(
            st.one_of(st.sampled_from([12, 13, 14, 16, 17, 18, 20, 21, 23, 46, 47]), st.integers(12, 90))
        )
        if at < len(data):
            data[at] = draw(st.sampled_from([0, 1, 6, 0x0F, 0x11, 0x40, 0x44, 0x45, 0x4F, 0x50, 0x60, 0xFF]))
    return Frame(
        bytes(data[: draw(st.sampled_from([0, 20, 40, 60, 10_000])) or None]), frame.offload, frame.vlan_tci
    )


async def compare_parsers(some: list[Frame]) -> None:
    limits = Limits(flow_entries=1000, mac_entries=1000)
    seen = []
    for engine in ENGINES:
        world = World(engine, limits=limits)
        await world.add("p1", "p2", mtu=65000)
        await world.load(world.extension(reads_all, passes=("ingress",)))
        for frame in some:
            await world.send("p1", frame)
        seen.append(([flow.match for flow in world.switch.flows()], asdict(world.switch.counters())))
        await world.close()
    assert seen[0] == seen[1]


@settings(max_examples=60, deadline=None)
@given(st.lists(damaged(), min_size=5, max_size=30))
def test_both_engines_read_the_same_fields_in_any_header(some: list[Frame]) -> None:
    asyncio.run(compare_parsers(some))
