"""Learning, flooding, unicast, drops and their counters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from switch_frames import BROADCAST, ethernet, ipv4, mac, tagged, tcp
from switch_world import World

from vswitch.drops import DropReason
from vswitch.endpoint import Checksum, Frame, Offload
from vswitch.engine import Limits

A, B, C = mac(1), mac(2), mac(3)


async def test_an_unknown_address_is_flooded_until_it_is_learned(world: World) -> None:
    await world.add("p1", "p2", "p3")
    there, back = ethernet(B, A), ethernet(A, B)
    assert await world.send("p1", there) == {"p2": [there], "p3": [there]}
    assert await world.send("p2", back) == {"p1": [back]}
    assert await world.send("p1", there, there) == {"p2": [there, there]}
    counters = world.switch.counters()
    assert (counters.flooded, counters.macs_learned) == (1, 2)
    assert (counters.flow_hits, counters.flow_misses) == (1, 3)


async def test_broadcast_and_multicast_reach_every_other_port(world: World) -> None:
    ports = await world.add("p1", "p2", "p3")
    for address in (BROADCAST, b"\x33\x33\x00\x00\x00\x01"):
        frame = ethernet(address, A)
        assert await world.send("p1", frame) == {"p2": [frame], "p3": [frame]}
    counters = ports[0].counters()
    assert (counters.rx_packets, counters.rx_broadcast, counters.rx_multicast) == (2, 1, 1)
    assert (ports[1].counters().tx_broadcast, ports[1].counters().tx_multicast) == (1, 1)
    assert ports[1].counters().tx_bytes == 120
    assert world.switch.counters().flooded == 0


async def test_a_frame_never_goes_back_to_its_port(world: World) -> None:
    (p1, _) = await world.add("p1", "p2")
    await world.send("p1", ethernet(BROADCAST, A), ethernet(BROADCAST, B))
    assert await world.send("p1", ethernet(B, A)) == {}
    assert await world.send("p1", ethernet(A, A)) == {}
    assert p1.drops() == {DropReason.UNICAST_NO_DESTINATION: 2}
    assert p1.counters().rx_dropped == 2


async def test_an_address_that_moves_is_found_at_its_new_port(world: World) -> None:
    await world.add("p1", "p2", "p3")
    await world.send("p2", ethernet(BROADCAST, B))
    frame = ethernet(B, A)
    assert await world.send("p1", frame) == {"p2": [frame]}
    await world.send("p3", ethernet(BROADCAST, B))
    assert await world.send("p1", frame) == {"p3": [frame]}
    assert world.switch.counters().macs_moved == 1


async def test_a_learned_address_ages_and_hits_keep_it_young(make_world: Callable[..., World]) -> None:
    world = make_world(limits=Limits(mac_age_seconds=5, flow_idle_seconds=100))
    await world.add("p1", "p2", "p3")
    await world.send("p2", ethernet(BROADCAST, B))
    frame, beat = ethernet(B, A), ethernet(A, B)
    await world.send("p1", frame)
    for _ in range(4):
        await world.switch.datapath.advance(2)
        assert await world.send("p2", beat) == {"p1": [beat]}
        assert await world.send("p1", frame) == {"p2": [frame]}
    await world.switch.datapath.advance(6)
    assert world.switch.mac_table() == []
    assert await world.send("p1", frame) == {"p2": [frame], "p3": [frame]}
    assert world.switch.counters().macs_purged == 2


async def test_hits_refresh_an_address_once_per_second(world: World) -> None:
    await world.add("p1", "p2")
    ages = []
    for wait in (0, 0.5, 0.5, 0.9, 0.2):
        await world.switch.datapath.advance(wait)
        await world.send("p1", ethernet(B, A))
        ages.append(round(world.switch.mac_table()[0].age_seconds, 3))
    assert ages == [0, 0.5, 0, 0.9, 0]


async def test_the_mac_table_is_bounded(make_world: Callable[..., World]) -> None:
    world = make_world(limits=Limits(mac_entries=4))
    await world.add("p1", "p2")
    await world.send("p1", *(ethernet(BROADCAST, mac(number)) for number in range(1, 8)))
    assert len(world.switch.mac_table()) == 4
    assert world.switch.counters().macs_refused == 3


async def test_vlans_learn_apart(world: World) -> None:
    await world.add("p1", "p2", "p3")
    await world.send("p2", tagged(BROADCAST, B, 10))
    inside, outside = tagged(B, A, 10), tagged(B, A, 20)
    assert await world.send("p1", inside) == {"p2": [inside]}
    assert await world.send("p1", outside) == {"p2": [outside], "p3": [outside]}
    beside = Frame(ethernet(B, A), vlan_tci=10)
    assert list(await world.send("p1", beside)) == ["p2"]
    assert [(row.vlan_id, row.mac, row.port_id) for row in world.switch.mac_table()] == [
        (10, A, 1),
        (10, B, 2),
        (20, A, 1),
    ]


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"short", DropReason.INVALID_PACKET),
        (b"", DropReason.INVALID_PACKET),
        (ethernet(B, b"\x03" + bytes(5)), DropReason.INVALID_SOURCE_MAC),
        (ethernet(B, bytes(6)), DropReason.INVALID_SOURCE_MAC),
        (ethernet(bytes.fromhex("0180c2000000"), A), DropReason.BRIDGE_RESERVED),
        (ethernet(bytes.fromhex("0180c200000e"), A), DropReason.BRIDGE_RESERVED),
        (ethernet(B, A, payload=bytes(1501)), DropReason.INVALID_PACKET),
    ],
)
async def test_bad_frames_are_dropped_with_their_reason(
    world: World, frame: bytes, reason: DropReason
) -> None:
    (p1, p2) = await world.add("p1", "p2")
    assert await world.send("p1", frame) == {}
    assert p1.drops() == {reason: 1}
    assert p1.counters().rx_drops == {reason: 1}
    assert p1.counters().rx_packets == 1
    assert p2.drops() == {}
    assert world.switch.counters().drops == {reason: 1}


async def test_a_frame_with_nowhere_to_go_is_dropped_with_a_reason(world: World) -> None:
    (p1,) = await world.add("p1")
    await world.send("p1", ethernet(BROADCAST, A), ethernet(B, A))
    assert p1.drops() == {DropReason.BROADCAST_NO_DESTINATIONS: 1, DropReason.UNICAST_NO_DESTINATION: 1}


async def test_drops_on_the_way_out_belong_to_the_destination(make_world: Callable[..., World]) -> None:
    world = make_world()
    (p1, p2) = await world.add("p1", "p2", mtu=9000)
    (small,) = await world.add("small", mtu=100)
    (full,) = await world.add("full", limit=1)
    big = ethernet(BROADCAST, A, payload=bytes(1000))
    assert await world.send("p1", big, big) == {"p2": [big, big], "full": [big]}
    assert p1.drops() == p2.drops() == {}
    assert small.counters().tx_drops == {DropReason.MTU_MISMATCH: 2}
    assert full.counters().tx_drops == {DropReason.RESOURCES: 1}
    assert (full.counters().tx_packets, full.counters().tx_dropped) == (1, 1)


async def test_a_disconnected_port_gets_nothing_and_says_so(world: World) -> None:
    (_, p2) = await world.add("p1", "p2")
    await world.send("p2", ethernet(BROADCAST, B))
    await p2.detach()
    await world.send("p1", ethernet(B, A), ethernet(B, A))
    assert p2.counters().tx_drops == {DropReason.DISCONNECTED: 2}


async def test_offloads_travel_with_the_frame(world: World) -> None:
    await world.add("p1", "p2")
    offload = Offload(Checksum.PARTIAL, True, 34, 1448)
    sent = Frame(ipv4(B, A, payload=tcp(1, 2, payload=bytes(30000))), offload, 0x2005, 0xDEADBEEF)
    world.endpoints["p1"].send(sent)
    await world.switch.datapath.barrier()
    (got,) = world.endpoints["p2"].received()
    assert (bytes(got.data), got.offload, got.vlan_tci, got.hash) == (sent.data, offload, 0x2005, 0xDEADBEEF)


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 257])
async def test_bursts_arrive_whole_and_in_order(world: World, count: int) -> None:
    await world.add("p1", "p2")
    frames = [ethernet(B, A, payload=number.to_bytes(46, "big")) for number in range(count)]
    assert await world.send("p1", *frames) == {"p2": frames}


async def test_injected_frames_come_from_the_port(world: World) -> None:
    (p1, _) = await world.add("p1", "p2")
    frame = ethernet(B, A)
    p1.inject(frame)
    assert await world.send("p1") == {"p2": [frame]}
    assert p1.counters().rx_packets == 1


async def test_a_frame_longer_than_any_is_refused(world: World) -> None:
    (p1, _) = await world.add("p1", "p2")
    with pytest.raises(ValueError, match="a frame of 65554 bytes, at most 65553 are possible"):
        world.endpoints["p1"].send(bytes(65554))
    p1.inject(bytes(70000))
    assert await world.send("p1") == {}
    assert p1.drops() == {DropReason.INVALID_PACKET: 1}


async def test_ports_have_ids_that_are_never_reused(world: World) -> None:
    (p1, _) = await world.add("p1", "p2")
    assert p1.id == 1
    await world.remove("p1")
    (again,) = await world.add("p1")
    assert again.id == 3
    with pytest.raises(ValueError, match="switch s0 has a port p2 already"):
        world.switch.add_port("p2")
    with pytest.raises(KeyError, match="switch s0 has no port p9; its ports: p1, p2"):
        world.switch.port("p9")
    with pytest.raises(ValueError, match="has an endpoint already; detach it first"):
        await again.attach(world.switch.host_endpoint().endpoint)
    with pytest.raises(TypeError, match="as an endpoint"):
        await world.switch.add_port("p4").attach(object())


async def test_a_removed_port_is_forgotten(world: World) -> None:
    await world.add("p1", "p2", "p3")
    await world.send("p2", ethernet(BROADCAST, B))
    await world.remove("p2")
    frame = ethernet(B, A)
    assert await world.send("p1", frame) == {"p3": [frame]}
    assert [row.port_id for row in world.switch.mac_table()] == [1]
    with pytest.raises(KeyError, match="no port 2"):
        world.switch.datapath.port_counters(2)


async def test_the_flow_cache_is_bounded_in_entries(make_world: Callable[..., World]) -> None:
    world = make_world(limits=Limits(flow_entries=3))
    await world.add("p1", "p2")
    await world.send("p1", *(ethernet(mac(number), A) for number in range(10, 20)))
    assert len(world.switch.flows()) == 3
    assert world.switch.counters().flows_evicted == 7


async def test_idle_flows_are_dropped(make_world: Callable[..., World]) -> None:
    world = make_world(limits=Limits(flow_idle_seconds=10))
    await world.add("p1", "p2")
    await world.send("p1", ethernet(B, A))
    assert [flow.actions for flow in world.switch.flows()] == [("output 2",)]
    await world.switch.datapath.advance(9)
    assert len(world.switch.flows()) == 1
    await world.switch.datapath.advance(2)
    assert world.switch.flows() == []
