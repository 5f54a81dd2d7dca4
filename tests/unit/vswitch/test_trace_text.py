"""A trace of the real pipeline in words and as data, with both engines."""

from __future__ import annotations

import json

from switch_frames import ethernet, ipv4, mac, tcp
from switch_world import World

from vswitch import trace
from vswitch.upcall import VERDICT_ALLOW, VERDICT_DROP, UpcallReply, UpcallRequest

A, B = mac(1), mac(2)


def judge(request: UpcallRequest) -> UpcallReply:
    if request.egress and request.port_name == "p3":
        return UpcallReply(VERDICT_DROP, cacheable=True, reason="not to p3")
    return UpcallReply(VERDICT_ALLOW, cacheable=True)


async def steps_and_ports(world: World, frame: bytes) -> tuple[list[trace.TraceStep], dict[int, str]]:
    steps = await world.switch.port("p1").trace(frame)
    return steps, {port.id: port.name for port in world.switch.ports.values()}


async def test_a_flood_of_which_one_copy_is_dropped_tells_both(world: World) -> None:
    await world.add("p1", "p2", "p3")
    extension = world.extension(judge, name="guard")
    await world.switch.set_extensions([extension.channel])
    steps, ports = await steps_and_ports(world, ethernet(b"\xff" * 6, A))
    told = trace.text(steps, ports)
    last = told.splitlines()[-1]
    assert last.startswith("=> delivered to p2; dropped on the way to p3: Filtered (8):")
    assert "not to p3" in last
    assert len(told.splitlines()) == len(steps) + 1
    column = told.splitlines()[0].index(steps[0].verdict)
    for line, step in zip(told.splitlines(), steps, strict=False):
        assert line[column:].startswith(step.verdict), "verdicts stand in one column"


async def test_the_data_form_survives_json_and_names_reason_and_port(world: World) -> None:
    await world.add("p1", "p2", "p3")
    extension = world.extension(judge, name="guard")
    await world.switch.set_extensions([extension.channel])
    steps, ports = await steps_and_ports(world, ipv4(b"\xff" * 6, A, payload=tcp(1, 2)))
    data = json.loads(json.dumps(trace.as_data(steps, ports)))
    drop = next(entry for entry in data if entry["verdict"] == "drop")
    assert drop["reason"] == {"code": 8, "name": "Filtered"}
    assert (drop["port"], drop["dropped_by"]) == ("p3", "guard")
    assert all("reason" not in entry for entry in data if entry["verdict"] != "drop")
    assert any("eth_dst" in entry.get("fields", ()) for entry in data)


async def test_a_frame_that_can_go_nowhere_is_told_as_what_the_switch_does_with_it(world: World) -> None:
    await world.add("p1")
    steps, ports = await steps_and_ports(world, ethernet(B, A))
    assert trace.outcome(steps, ports).startswith(("dropped:", "not delivered:"))
