"""Extensions as the datapath sees them: verdicts, their caching, their order, and all that goes wrong."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Callable

import pytest
from switch_frames import BROADCAST, ethernet, ipv4, mac, tcp, udp
from switch_world import World

from vswitch.drops import DropReason
from vswitch.engine import EventKind, Limits
from vswitch.fields import Field
from vswitch.upcall import (
    MEMFD_BYTES,
    REPLY_OFFSET,
    VERDICT_ALLOW,
    VERDICT_DROP,
    VERDICT_ERROR,
    ExtensionChannel,
    UpcallReply,
    UpcallRequest,
)

A, B = mac(1), mac(2)
PORT_FIELDS = Field.L4_DST.bit


def telnet(request: UpcallRequest) -> UpcallReply:
    """Drops TCP to port 23; depends on the destination port alone."""
    data = request.data
    first = data[20] & 0x1F == 0 and data[21] == 0
    if data[12:14] == b"\x08\x00" and first and data[23] == 6 and data[36:38] == b"\x00\x17":
        return UpcallReply(VERDICT_DROP, PORT_FIELDS, True, reason="no telnet here")
    return UpcallReply(VERDICT_ALLOW, PORT_FIELDS, True)


def allow(request: UpcallRequest) -> UpcallReply:
    return UpcallReply(VERDICT_ALLOW, 0, True)


def segment(dport: int, sport: int = 40000) -> bytes:
    return ipv4(B, A, payload=tcp(sport, dport))


async def test_a_verdict_drops_with_its_words_and_the_rest_flows(world: World) -> None:
    (p1, _) = await world.add("p1", "p2")
    extension = world.extension(telnet, name="block_telnet", passes=("ingress",))
    await world.load(extension)
    tap = world.switch.open_tap()
    assert await world.send("p1", segment(23), segment(80)) == {"p2": [segment(80)]}
    assert p1.counters().rx_drops == {DropReason.FILTERED: 1}
    assert p1.counters().rx_extension_dropped == 1
    (drop,) = [seen for seen in tap.read() if seen.drop_reason is not None]
    assert (drop.dropped_by, drop.detail, drop.direction) == ("block_telnet", "no telnet here", "in")
    counters = world.switch.extension_counters()[1]
    assert (counters.upcalls, counters.allowed, counters.dropped) == (2, 1, 1)


async def test_a_cached_verdict_asks_no_more(world: World) -> None:
    await world.add("p1", "p2")
    extension = world.extension(telnet, passes=("ingress",))
    await world.load(extension)
    for _ in range(5):
        await world.send("p1", segment(23), segment(80))
    assert len(extension.asked) == 2
    drops = [flow for flow in world.switch.flows() if flow.actions[0].startswith("drop")]
    assert drops[0].match["l4_dst"] == "23"
    assert drops[0].match.keys() == {"in_port", "eth_type", "ip_proto", "ip_frag", "l4_dst"}
    assert drops[0].actions == ("drop FILTERED by ext: no telnet here",)
    assert drops[0].packets == 5


async def test_a_verdict_on_a_port_number_does_not_catch_another_protocol(world: World) -> None:
    await world.add("p1", "p2")
    await world.load(world.extension(telnet, passes=("ingress",)))
    datagram = ipv4(B, A, proto=17, payload=udp(40000, 23))
    later = ipv4(B, A, payload=tcp(40000, 23), fragment=100)
    plain = ethernet(B, A)
    assert await world.send("p1", segment(23), datagram, later, plain) == {"p2": [datagram, later, plain]}


async def test_an_uncacheable_verdict_is_asked_for_every_frame(world: World) -> None:
    await world.add("p1", "p2")
    extension = world.extension(
        lambda _: UpcallReply(VERDICT_ALLOW, Field.RAW.bit, True), passes=("ingress",)
    )
    await world.load(extension)
    assert len((await world.send("p1", *[segment(80)] * 5))["p2"]) == 5
    assert len(extension.asked) == 5
    assert world.switch.flows() == []
    other = world.extension(lambda _: UpcallReply(VERDICT_ALLOW, 0, False), passes=("ingress",))
    await world.load(other)
    await world.send("p1", *[segment(80)] * 5)
    assert len(other.asked) == 5


async def test_frames_with_contradictory_headers_are_never_cached(world: World) -> None:
    await world.add("p1", "p2")
    extension = world.extension(telnet, passes=("ingress",))
    await world.load(extension)
    cut = segment(23)[:40]
    await world.send("p1", cut, cut)
    assert len(extension.asked) == 2
    assert world.switch.flows() == []


async def test_a_verdict_with_a_time_to_live_ends(world: World) -> None:
    await world.add("p1", "p2")
    extension = world.extension(lambda _: UpcallReply(VERDICT_ALLOW, 0, True, 2500), passes=("ingress",))
    await world.load(extension)
    await world.send("p1", segment(80))
    await world.switch.datapath.advance(2.4)
    await world.send("p1", segment(80))
    assert len(extension.asked) == 1
    await world.switch.datapath.advance(0.2)
    await world.send("p1", segment(80))
    assert len(extension.asked) == 2


async def test_the_egress_pass_judges_each_destination_in_reverse_order(world: World) -> None:
    ports = await world.add("p1", "p2", "p3")
    order: list[tuple[str, bool, int | None, str]] = []

    def judge(name: str) -> Callable[[UpcallRequest], UpcallReply]:
        def one(request: UpcallRequest) -> UpcallReply:
            order.append((name, request.egress, request.out_port, request.port_name))
            if name == "first" and request.out_port == 3:
                return UpcallReply(VERDICT_DROP, 0, True, reason="not there")
            return UpcallReply(VERDICT_ALLOW, 0, True)

        return one

    await world.load(*(world.extension(judge(name), name=name) for name in ("first", "second")))
    frame = ethernet(BROADCAST, A)
    assert await world.send("p1", frame, frame) == {"p2": [frame, frame]}
    assert order == [
        ("first", False, None, "p1"),
        ("second", False, None, "p1"),
        ("second", True, 2, "p2"),
        ("first", True, 2, "p2"),
        ("second", True, 3, "p3"),
        ("first", True, 3, "p3"),
    ]
    assert ports[2].counters().tx_drops == {DropReason.FILTERED: 2}
    assert ports[2].counters().tx_extension_dropped == 2
    assert ports[0].drops() == {}
    (flow,) = world.switch.flows()
    assert flow.actions == ("output 2", "output 3: drop FILTERED by first: not there")


async def test_frames_of_a_flow_wait_their_turn_and_keep_their_order(
    make_world: Callable[..., World],
) -> None:
    world = make_world(limits=Limits(held_per_flow=3))
    (p1, _) = await world.add("p1", "p2")
    extension = world.extension(lambda _: None, passes=("ingress",))
    await world.load(extension)
    frames = [segment(80) + bytes([number]) for number in range(6)]
    for frame in frames:
        world.endpoints["p1"].send(frame)
    world.endpoints["p1"].send(segment(81))
    await world.until(lambda: len(extension.unanswered) >= 2)
    assert len(extension.asked) == 2, "one for each flow, the rest waits"
    for upcall in extension.unanswered:
        extension.reply(upcall, UpcallReply(VERDICT_ALLOW, 0, True))
    await world.switch.datapath.barrier()
    arrived = world.arrived()["p2"]
    assert [frame for frame in arrived if frame != segment(81)] == frames[:4]
    assert segment(81) in arrived
    assert p1.drops() == {DropReason.RESOURCES: 2}


async def test_a_barrier_waits_for_the_frames_before_it_and_no_others(world: World) -> None:
    await world.add("p1", "p2")
    extension = world.extension(lambda request: None, passes=("ingress",))
    await world.load(extension)
    world.switch.port("p1").inject(segment(23))
    first = asyncio.ensure_future(world.switch.datapath.barrier())
    await world.until(lambda: len(extension.unanswered) == 1)
    world.switch.port("p1").inject(segment(24))
    await world.until(lambda: len(extension.unanswered) == 2)
    assert not first.done()
    extension.reply(extension.unanswered[0], UpcallReply(VERDICT_ALLOW))
    await asyncio.wait_for(first, 5)
    second = asyncio.ensure_future(world.switch.datapath.barrier())
    await asyncio.sleep(0.05)
    assert not second.done()
    extension.reply(extension.unanswered[1], UpcallReply(VERDICT_ALLOW))
    await asyncio.wait_for(second, 5)


async def test_frames_in_upcall_are_bounded_per_port(make_world: Callable[..., World]) -> None:
    world = make_world(limits=Limits(upcalls_per_port=4))
    (p1, p2) = await world.add("p1", "p2")
    extension = world.extension(lambda _: None, passes=("ingress",), on_failure="open")
    await world.load(extension)
    for port in range(10):
        world.endpoints["p1"].send(segment(1000 + port))
    world.endpoints["p2"].send(ethernet(A, B))
    await world.until(lambda: len(extension.unanswered) >= 5)
    assert p1.drops() == {DropReason.RESOURCES: 6}
    assert p2.drops() == {}
    await world.switch.datapath.advance(1.5)
    await world.switch.datapath.barrier()
    assert {name: len(frames) for name, frames in world.arrived().items()} == {"p1": 1, "p2": 4}


async def test_requests_that_fill_the_ring_all_get_their_answer(make_world: Callable[..., World]) -> None:
    world = make_world(limits=Limits(upcalls_per_port=500))
    await world.add("p1", "p2")
    extension = world.extension(lambda _: UpcallReply(VERDICT_ALLOW, 0, False), passes=("ingress",))
    await world.load(extension)
    frames = [ipv4(B, A, payload=tcp(40000, 1000 + port, payload=bytes(1400))) for port in range(400)]
    assert sorted((await world.send("p1", *frames))["p2"]) == sorted(frames)


@pytest.mark.parametrize("on_failure", ["open", "closed"])
async def test_a_silent_extension_is_failed_at_its_deadline(world: World, on_failure: str) -> None:
    (p1, _) = await world.add("p1", "p2")
    extension = world.extension(lambda _: None, name="mute", passes=("ingress",), on_failure=on_failure)
    await world.load(extension)
    world.endpoints["p1"].send(segment(80))
    await world.until(lambda: len(extension.unanswered) > 0)
    await world.switch.datapath.advance(0.9)
    assert world.arrived() == {}
    await world.switch.datapath.advance(0.2)
    event = await world.told(EventKind.EXTENSION_FAILED)
    assert (event.subject, event.text) == (extension.channel.id, "no verdict within 1 s")
    got = await world.send("p1", segment(80))
    if on_failure == "open":
        assert got == {"p2": [segment(80)] * 2}
    else:
        assert got == {}
        assert p1.drops() == {DropReason.REQUIRED_EXTENSION_MISSING: 2}
    counters = world.switch.extension_counters()[extension.channel.id]
    assert (counters.failed, counters.why) == (True, "no verdict within 1 s")
    assert world.switch.counters().upcall_failures == 1
    assert world.switch.flows() == [], "a failure is not a verdict and must not be cached"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"", "reply of 0 bytes, at least 20 expected"),
        (struct.pack("<HBBIQHH", 7, 0, 0, 0, 0, 0, 0), "reply of version 7, 1 expected"),
        (struct.pack("<HBBIQHH", 1, 9, 0, 0, 0, 0, 0), "reply with verdict 9, 0 to 2 expected"),
        (struct.pack("<HBBIQHH", 1, 0, 0, 0, 1 << 40, 0, 0), "names unknown fields 0x10000000000"),
        (struct.pack("<HBBIQHH", 1, 1, 0, 0, 0, 200, 0), "with a reason of 200"),
        (struct.pack("<HBBIQHH", 1, 1, 0, 0, 0, 2, 0) + b"\xff\xfe", "reason is not UTF-8"),
    ],
)
async def test_a_malformed_reply_fails_that_extension_alone(world: World, reply: bytes, words: str) -> None:
    await world.add("p1", "p2")
    bad = world.extension(lambda _: reply, name="bad", passes=("ingress",), on_failure="open")
    good = world.extension(telnet, name="good", passes=("ingress",))
    await world.load(bad, good)
    assert await world.send("p1", segment(80), segment(23)) == {"p2": [segment(80)]}
    event = await world.told(EventKind.EXTENSION_FAILED)
    assert event.subject == bad.channel.id
    assert words in event.text
    counters = world.switch.extension_counters()
    assert (counters[bad.channel.id].failed, counters[good.channel.id].failed) == (True, False)


async def test_an_answer_to_no_question_fails_the_extension(world: World) -> None:
    await world.add("p1", "p2")
    extension = world.extension(telnet)
    await world.load(extension)
    extension.reply(77, UpcallReply(VERDICT_ALLOW))
    event = await world.told(EventKind.EXTENSION_FAILED)
    assert event.text == "a reply to upcall 77, which was not asked"


async def test_lying_ring_indices_fail_the_extension_alone(world: World) -> None:
    await world.add("p1", "p2")
    extension = world.extension(telnet, on_failure="open")
    await world.load(extension)
    os.pwrite(extension.channel.memfd, (12345).to_bytes(4, "little"), REPLY_OFFSET)
    extension.signal()
    event = await world.told(EventKind.EXTENSION_FAILED)
    assert "index" in event.text
    assert await world.send("p1", segment(23)) == {"p2": [segment(23)]}


async def test_an_extension_that_raised_harms_that_frame_alone(world: World) -> None:
    (p1, _) = await world.add("p1", "p2")

    def judge(request: UpcallRequest) -> UpcallReply:
        if request.data[36:38] == b"\x00\x17":
            return UpcallReply(VERDICT_ERROR, reason="plug.py:12: ZeroDivisionError: division by zero")
        return UpcallReply(VERDICT_ALLOW, PORT_FIELDS, True)

    extension = world.extension(judge, name="plug", passes=("ingress",))
    await world.load(extension)
    tap = world.switch.open_tap()
    assert await world.send("p1", segment(23), segment(80)) == {"p2": [segment(80)]}
    event = await world.told(EventKind.EXTENSION_ERROR)
    assert event.text == "plug.py:12: ZeroDivisionError: division by zero"
    assert p1.drops() == {DropReason.REQUIRED_EXTENSION_MISSING: 1}
    (drop,) = [seen for seen in tap.read() if seen.drop_reason is not None]
    assert drop.detail == "extension plug raised: plug.py:12: ZeroDivisionError: division by zero"
    counters = world.switch.extension_counters()[extension.channel.id]
    assert (counters.errors, counters.failed) == (1, False)


async def test_a_dead_extension_releases_what_waits_for_it(world: World) -> None:
    await world.add("p1", "p2")
    extension = world.extension(lambda _: None, on_failure="open")
    await world.load(extension)
    world.endpoints["p1"].send(segment(80))
    await world.until(lambda: len(extension.unanswered) > 0)
    world.switch.datapath.fail_extension(extension.channel.id, "killed by signal 9")
    assert await world.send("p1") == {"p2": [segment(80)]}
    assert (await world.told(EventKind.EXTENSION_FAILED)).text == "killed by signal 9"
    with pytest.raises(KeyError, match="no extension has id 99"):
        world.switch.datapath.fail_extension(99, "")


async def test_waiting_frames_are_judged_by_the_new_extensions(world: World) -> None:
    (p1, _) = await world.add("p1", "p2")
    mute = world.extension(lambda _: None, passes=("ingress",))
    await world.load(mute)
    for port in (23, 80, 80):
        world.endpoints["p1"].send(segment(port))
    await world.until(lambda: len(mute.unanswered) >= 2)
    await world.load(world.extension(telnet, passes=("ingress",)))
    assert await world.send("p1") == {"p2": [segment(80)] * 2}
    assert p1.drops() == {DropReason.FILTERED: 1}
    assert p1.counters().rx_packets == 3


async def test_late_answers_of_an_extension_that_stays_are_ignored(world: World) -> None:
    await world.add("p1", "p2")
    extension = world.extension(lambda _: None, passes=("ingress",))
    await world.load(extension)
    world.endpoints["p1"].send(segment(80))
    await world.until(lambda: len(extension.unanswered) > 0)
    await world.add("p3")
    extension.judge = allow
    await world.until(lambda: len(extension.asked) >= 2)
    extension.reply(extension.unanswered[0], UpcallReply(VERDICT_DROP))
    assert await world.send("p1") == {"p2": [segment(80)], "p3": [segment(80)]}
    assert not world.switch.extension_counters()[extension.channel.id].failed


async def test_ports_that_come_and_go_give_a_silent_extension_no_new_time(world: World) -> None:
    await world.add("p1", "p2")
    extension = world.extension(lambda _: None, passes=("ingress",), on_failure="open")
    await world.load(extension)
    world.endpoints["p1"].send(segment(80))
    await world.until(lambda: len(extension.unanswered) > 0)
    for number in range(3, 6):
        await world.switch.datapath.advance(0.4)
        await world.add(f"p{number}")
    event = await world.told(EventKind.EXTENSION_FAILED)
    assert (event.subject, event.text) == (extension.channel.id, "no verdict within 1 s")
    assert (await world.send("p1"))["p2"] == [segment(80)]


async def test_unloading_brings_everything_back(world: World) -> None:
    await world.add("p1", "p2")
    await world.load(world.extension(telnet))
    assert await world.send("p1", segment(23)) == {}
    await world.load()
    assert await world.send("p1", segment(23)) == {"p2": [segment(23)]}
    assert world.switch.extension_counters() == {}


async def test_removing_a_port_drops_its_waiting_frames_with_a_reason(world: World) -> None:
    await world.add("p1", "p2")
    extension = world.extension(lambda _: None)
    await world.load(extension)
    world.endpoints["p1"].send(segment(80))
    world.endpoints["p1"].send(segment(80))
    await world.until(lambda: len(extension.unanswered) > 0)
    await world.remove("p1")
    await asyncio.wait_for(world.switch.datapath.barrier(), 5)
    assert world.switch.counters().drops == {DropReason.DISCONNECTED: 2}


async def test_channels_that_cannot_work_are_refused(world: World) -> None:
    await world.add("p1", "p2")
    channel = ExtensionChannel.create(1, "steer", kind="forwarding")
    with pytest.raises(ValueError, match="extension steer is of kind forwarding"):
        await world.switch.set_extensions([channel])
    short = os.memfd_create("short", os.MFD_ALLOW_SEALING)
    bad = ExtensionChannel(2, "short", "filter", "open", short, channel.request_fd, channel.reply_fd)
    with pytest.raises((ValueError, OSError)):
        await world.switch.set_extensions([bad])
    with pytest.raises(ValueError, match="the same id"):
        await world.switch.set_extensions([bad, bad])
    os.close(short)
    channel.close()
    assert await world.send("p1", segment(23)) == {"p2": [segment(23)]}


async def test_an_extension_sees_at_most_two_kilobytes(world: World) -> None:
    await world.add("p1", "p2", mtu=9000)
    extension = world.extension(allow, passes=("ingress",))
    await world.load(extension)
    frame = ethernet(B, A, payload=bytes(5000))
    assert await world.send("p1", frame) == {"p2": [frame]}
    (request,) = extension.asked
    assert (len(request.data), request.frame_length) == (2048, 5014)
    assert MEMFD_BYTES == 512 * 1024
