"""Capture, trace and events: what is to be seen of a switch from outside."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from switch_frames import BROADCAST, ethernet, ipv4, mac, tagged, tcp
from switch_world import World

from vswitch.drops import DropReason
from vswitch.endpoint import Frame, Offload
from vswitch.engine import DatapathEvent, EventKind, Limits
from vswitch.upcall import VERDICT_ALLOW, VERDICT_DROP, UpcallReply, UpcallRequest

A, B = mac(1), mac(2)


async def test_a_capture_shows_every_sighting_of_a_frame_under_one_id(world: World) -> None:
    await world.add("p1", "p2", "p3")
    tap = world.switch.open_tap()
    frame = ethernet(BROADCAST, A)
    await world.send("p1", frame, frame)
    seen = [(one.packet_id, one.port_id, one.direction) for one in tap.read()]
    assert seen == [(1, 1, "in"), (1, 2, "out"), (1, 3, "out"), (2, 1, "in"), (2, 2, "out"), (2, 3, "out")]
    tap.close()
    await world.send("p1", frame)
    assert tap.read() == []


async def test_a_capture_is_of_the_ports_asked_for_and_cut_to_length(world: World) -> None:
    (_, p2, _) = await world.add("p1", "p2", "p3")
    tap = world.switch.open_tap([p2], snaplen=20)
    await world.send("p1", ethernet(BROADCAST, A, payload=bytes(1000)))
    (one,) = tap.read()
    assert (one.port_id, one.direction, len(one.data), one.original_length) == (2, "out", 20, 1014)


async def test_a_capture_shows_drops_only_when_asked(world: World) -> None:
    await world.add("p1", "p2")
    with_drops = world.switch.open_tap(drops=True)
    without = world.switch.open_tap(drops=False)
    await world.send("p1", ethernet(B, bytes(6)))
    (arrival, drop) = with_drops.read()
    assert (arrival.drop_reason, drop.drop_reason) == (None, DropReason.INVALID_SOURCE_MAC)
    assert (drop.detail, drop.dropped_by) == ("source address is all zero", None)
    assert arrival.packet_id == drop.packet_id
    assert [one.drop_reason for one in without.read()] == [None]


async def test_a_capture_keeps_metadata_and_a_signal(world: World) -> None:
    await world.add("p1", "p2")
    tap = world.switch.open_tap()
    awake = asyncio.Event()
    asyncio.get_running_loop().add_reader(tap.fd, awake.set)
    await world.switch.datapath.advance(2)
    await world.send("p1", Frame(ethernet(BROADCAST, A), Offload(mss=1400), vlan_tci=7))
    await asyncio.wait_for(awake.wait(), 5)
    asyncio.get_running_loop().remove_reader(tap.fd)
    one = tap.read()[0]
    assert (one.vlan_tci, one.offload.mss, one.timestamp_ns) == (7, 1400, 2_000_000_000)


async def test_a_slow_reader_loses_frames_and_knows_how_many(make_world: Callable[..., World]) -> None:
    world = make_world(limits=Limits(capture_frames=5))
    await world.add("p1", "p2")
    tap = world.switch.open_tap()
    assert len((await world.send("p1", *[ethernet(B, A)] * 10))["p2"]) == 10
    assert len(tap.read()) == 5
    assert tap.lost == 15


async def test_a_trace_names_every_stage_and_changes_nothing(world: World) -> None:
    (p1, p2, _) = await world.add("p1", "p2", "p3")
    asked: list[UpcallRequest] = []

    def judge(request: UpcallRequest) -> UpcallReply:
        asked.append(request)
        if request.out_port == 3:
            return UpcallReply(VERDICT_DROP, 1 << 1, True, reason="not there")
        return UpcallReply(VERDICT_ALLOW, 1 << 2, True)

    await world.load(world.extension(judge, name="judge"))
    before = world.switch.counters()
    steps = await p1.trace(ethernet(BROADCAST, A))
    assert [(step.stage, step.verdict, step.port_id) for step in steps] == [
        ("receive", "continue", None),
        ("filter in", "continue", None),
        ("policy in", "continue", None),
        ("turn", "flood", None),
        ("policy out", "continue", 2),
        ("filter out", "continue", 2),
        ("policy out", "continue", 3),
        ("filter out", "drop", 3),
        ("deliver", "deliver", 2),
    ]
    assert steps[0].detail == "60 bytes from p1"
    assert steps[1].detail == "extension judge allows it"
    assert steps[1].fields == ("eth_src",)
    assert steps[3].detail == "broadcast address ff:ff:ff:ff:ff:ff: 2 ports"
    assert (steps[7].reason, steps[7].dropped_by) == (DropReason.FILTERED, "judge")
    assert steps[7].detail == "extension judge: not there"
    assert all(request.trace for request in asked)
    assert world.switch.counters() == before
    assert world.switch.mac_table() == world.switch.flows() == []
    assert world.arrived() == {}
    assert p2.counters().tx_packets == p1.counters().rx_packets == 0


@pytest.mark.parametrize(
    ("frame", "stage", "reason"),
    [
        (b"short", "receive", DropReason.INVALID_PACKET),
        (ethernet(B, A, payload=bytes(3000)), "receive", DropReason.INVALID_PACKET),
        (ethernet(B, bytes(6)), "policy in", DropReason.INVALID_SOURCE_MAC),
        (ethernet(bytes.fromhex("0180c2000003"), A), "policy in", DropReason.BRIDGE_RESERVED),
        (ethernet(A, A), "turn", DropReason.UNICAST_NO_DESTINATION),
        (ethernet(mac(9), A, payload=bytes(500)), "policy out", DropReason.MTU_MISMATCH),
    ],
)
async def test_a_trace_agrees_with_what_happens(
    world: World, frame: bytes, stage: str, reason: DropReason
) -> None:
    (p1,) = await world.add("p1")
    await world.add("p2", mtu=100)
    steps = await p1.trace(frame)
    assert (steps[-1].stage, steps[-1].verdict, steps[-1].reason) == (stage, "drop", reason)
    assert await world.send("p1", frame) == {}
    assert world.switch.counters().drops == {reason: 1}


async def test_a_trace_says_where_a_known_address_is(world: World) -> None:
    (p1, p2) = await world.add("p1", "p2")
    await world.add("p3")
    await world.send("p2", ethernet(BROADCAST, B))
    steps = await p1.trace(ipv4(B, A, payload=tcp(1, 2)))
    turn = next(step for step in steps if step.stage == "turn")
    assert (turn.verdict, turn.detail, turn.port_id) == ("forward", f"{B.hex(':')} is behind p2", p2.id)
    assert turn.fields == ("eth_dst", "eth_src", "vlan_tci")
    (steps_tagged,) = [step for step in await p1.trace(tagged(B, A, 5)) if step.stage == "turn"]
    assert steps_tagged.verdict == "flood"
    with pytest.raises(KeyError, match="no port 9"):
        await world.switch.datapath.trace(9, ethernet(B, A))


async def test_events_tell_of_ports_and_extensions(world: World) -> None:
    told: list[DatapathEvent] = []

    async def listen() -> None:
        async for event in world.switch.events():
            told.append(event)

    listener = asyncio.create_task(listen())
    await asyncio.sleep(0)
    await world.add("p1")
    await world.load()
    await world.remove("p1")
    await asyncio.sleep(0.01)
    listener.cancel()
    assert [(event.kind, event.subject) for event in told] == [
        (EventKind.PORT_ADDED, 1),
        (EventKind.PORT_CONNECTED, 1),
        (EventKind.EXTENSIONS_CHANGED, 0),
        (EventKind.PORT_DISCONNECTED, 1),
        (EventKind.PORT_REMOVED, 1),
    ]


async def test_time_moves_only_in_a_switch_made_for_it(make_world: Callable[..., World]) -> None:
    with pytest.raises(ValueError, match="manual_time=True"):
        await make_world(manual_time=False).switch.datapath.advance(1)


async def test_a_switch_on_the_systems_time_ages_by_itself(make_world: Callable[..., World]) -> None:
    world = make_world(
        manual_time=False,
        limits=Limits(flow_idle_seconds=0.5, mac_age_seconds=0.5, upcall_deadline_seconds=0.2),
    )
    await world.add("p1", "p2")
    mute = world.extension(lambda _: None, passes=("ingress",), on_failure="open")
    await world.load(mute)
    assert list(await world.send("p1", ethernet(B, A))) == ["p2"], "after the deadline"
    await world.load()
    await world.send("p1", ethernet(B, A))
    assert world.switch.flows()
    for _ in range(50):
        await asyncio.sleep(0.1)
        if not world.switch.flows() and not world.switch.mac_table():
            return
    raise AssertionError(f"still there: {world.switch.flows()} {world.switch.mac_table()}")


async def test_what_waits_for_a_slow_reader_is_bounded_in_bytes(make_world: Callable[..., World]) -> None:
    world = make_world(limits=Limits(capture_bytes=300))
    await world.add("p1", "p2")
    tap = world.switch.open_tap()
    await world.send("p1", *[ethernet(B, A, payload=bytes(86))] * 3)
    assert [len(one.data) for one in tap.read()] == [100, 100, 100]
    assert tap.lost == 3
    await world.send("p1", ethernet(B, A))
    assert len(tap.read()) == 2
