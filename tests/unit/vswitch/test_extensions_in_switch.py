"""Extensions in their own processes, in a switch that forwards: verdicts, failures, restarts.

Both engines.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from switch_frames import ethernet, ipv4, mac, tcp, udp

from vswitch.drops import DropReason
from vswitch.endpoint import Checksum, Frame, Offload
from vswitch.engine import Limits
from vswitch.extension.host import BackOff, ExtensionEvent, ExtensionEventKind, ExtensionHost, ExtensionState
from vswitch.inprocess import InProcessEndpoint
from vswitch.switch import Switch
from vswitch_wire.engine import Engine

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "extensions"
A, B = mac(1), mac(2)
TELNET = ipv4(B, A, payload=tcp(4000, 23))
HTTP = ipv4(B, A, payload=tcp(4000, 80))
OTHER = ethernet(B, A)


class Net:
    """Ports a and b of a switch, and its extensions."""

    def __init__(self, engine: Engine, deadline: float) -> None:
        limits = Limits(upcall_deadline_seconds=deadline)
        self.switch = Switch("s0", engine=engine, limits=limits)
        self.events: list[ExtensionEvent] = []
        self.host = ExtensionHost.of(
            self.switch, on_event=self.events.append, back_off=BackOff(first=0.1, limit=0.4, healthy=60)
        )
        self.ends: dict[str, InProcessEndpoint] = {}

    async def open(self) -> None:
        for name in ("a", "b"):
            self.ends[name] = self.switch.host_endpoint()
            await self.switch.add_port(name).attach(self.ends[name].endpoint)
        self.ends["b"].send(ethernet(A, B))  # so that b's address is known and nothing floods
        await self.arrived("a")

    async def close(self) -> None:
        await self.host.close()
        await self.switch.close()
        for end in self.ends.values():
            end.close()

    async def arrived(self, name: str, count: int = 1, patience: float = 5.0) -> list[bytes]:
        """The next `count` frames at a port, or fewer when that takes too long."""
        frames: list[bytes] = []
        deadline = time.monotonic() + patience
        while len(frames) < count and time.monotonic() < deadline:
            frames += [bytes(frame.data) for frame in self.ends[name].received()]
            await asyncio.sleep(0.002)
        return frames

    async def passes(self, frame: bytes | Frame, patience: float = 5.0) -> bool:
        """Whether a frame sent from a arrives at b (True) or is counted as dropped at a (False)."""
        before = self.switch.port("a").counters().rx_dropped
        self.ends["a"].send(frame)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if self.ends["b"].received():
                return True
            if self.switch.port("a").counters().rx_dropped > before:
                return False
            await asyncio.sleep(0.002)
        raise AssertionError("the frame was neither delivered nor counted as dropped")

    async def until(self, condition: Callable[[], object], patience: float = 10.0) -> None:
        deadline = time.monotonic() + patience
        while not condition():
            assert time.monotonic() < deadline, f"gave up waiting; events: {self.events}"
            await asyncio.sleep(0.005)

    async def load(self, body: str, *, name: str = "x", **options: Any) -> int:
        """Load a filter whose `ingress` is `body`; its process."""
        lines = "".join(f"        {line}\n" for line in body.splitlines())
        source = (
            "from vswitch.extension import Filter\n"
            "class X(Filter):\n"
            "    count = 0\n"
            "    def ingress(self, packet):\n"
        )
        return (await self.host.load(name, (source + lines).encode(), "x.py", **options)).pid

    def kinds(self) -> list[ExtensionEventKind]:
        return [event.kind for event in self.events]

    def asked(self, name: str = "x") -> int:
        return self.switch.extension_counters()[self.host.get(name).channel_id].upcalls


@pytest.fixture
async def net(engine: Engine) -> AsyncIterator[Net]:
    net = Net(engine, deadline=1.0)
    await net.open()
    yield net
    await net.close()


@pytest.mark.parametrize("said", [20, 0, 39, 65535])
async def test_a_large_send_hides_nothing_behind_the_length_in_its_ip_header(net: Net, said: int) -> None:
    """The host gives its segments true lengths: what the sender wrote there must not decide what is seen."""
    await net.host.load_file(EXAMPLES / "block_telnet.py", on_failure="closed")
    lying = Frame(TELNET[:16] + said.to_bytes(2, "big") + TELNET[18:], Offload(Checksum.PARTIAL, mss=1400))
    assert not await net.passes(lying)
    assert net.switch.port("a").counters().rx_drops == {DropReason.FILTERED: 1}


async def test_block_telnet_drops_the_syn_with_reason_and_counter_and_lets_the_rest_flow(net: Net) -> None:
    await net.host.load_file(EXAMPLES / "block_telnet.py")
    tap = net.switch.open_tap()
    assert not await net.passes(TELNET)
    assert await net.passes(HTTP)
    assert await net.passes(ipv4(B, A, proto=17, payload=udp(1, 23)))
    assert await net.passes(OTHER)
    assert net.switch.port("a").drops() == {DropReason.FILTERED: 1}
    drops = [frame for frame in tap.read() if frame.drop_reason is not None]
    tap.close()
    assert [(frame.data, frame.dropped_by, frame.detail) for frame in drops] == [
        (TELNET, "block_telnet", "telnet is not allowed here")
    ]
    await net.host.unload("block_telnet")
    assert await net.passes(TELNET), "restored"


async def test_a_verdict_is_used_for_later_frames_of_the_flow_without_asking(net: Net) -> None:
    await net.host.load_file(EXAMPLES / "block_telnet.py")
    for _ in range(5):
        assert not await net.passes(TELNET)
        assert await net.passes(HTTP)
    assert net.asked("block_telnet") == 2
    matches = [flow.match for flow in net.switch.flows()]
    assert any(match.get("l4_dst") == "23" for match in matches), matches


async def test_trace_asks_the_extension_and_changes_nothing(net: Net) -> None:
    await net.host.load_file(EXAMPLES / "block_telnet.py")
    steps = await net.switch.port("a").trace(TELNET)
    assert steps[-1].verdict == "drop"
    assert steps[-1].dropped_by == "block_telnet"
    assert "telnet is not allowed here" in steps[-1].detail
    assert "l4_dst" in steps[-1].fields
    assert net.switch.port("a").drops() == {}
    assert net.switch.flows() == []


async def test_only_these_macs_judges_by_port_and_address(net: Net) -> None:
    await net.host.load_file(EXAMPLES / "only_these_macs.py")
    for _ in range(2):
        assert await net.passes(OTHER)
        assert not await net.passes(ethernet(B, mac(9)))
    assert net.asked("only_these_macs") == 2, "the tuple of the class is a constant"


async def test_one_connection_per_second_counts_and_so_is_asked_for_each_syn(net: Net) -> None:
    await net.host.load_file(EXAMPLES / "one_connection_per_second.py")
    assert await net.passes(HTTP)
    assert not await net.passes(ipv4(B, A, payload=tcp(4001, 80)))
    assert not await net.passes(HTTP)
    for _ in range(3):
        assert await net.passes(ipv4(B, A, payload=tcp(4000, 80, flags=0x10)))
    assert net.asked("one_connection_per_second") == 4, "three SYNs, one flow of others"
    await asyncio.sleep(1.05)
    assert await net.passes(HTTP)


async def test_state_in_self_is_never_the_silent_condition_of_a_cached_verdict(net: Net) -> None:
    await net.load("self.count += 1\nreturn packet.drop('odd') if self.count % 2 else packet.allow()")
    assert [await net.passes(OTHER) for _ in range(4)] == [False, True, False, True]


async def test_a_constant_that_changes_later_makes_the_switch_forget_what_rested_on_it(net: Net) -> None:
    await net.load(
        "if packet.eth.type == 0x0800:\n    self.count = 1\n"
        "return packet.drop('c') if self.count else packet.allow()"
    )
    assert await net.passes(OTHER)
    assert await net.passes(OTHER)
    assert net.asked() == 1
    assert not await net.passes(HTTP)
    await net.until(lambda: not net.switch.flows())
    assert not await net.passes(OTHER), "the cached verdict is gone"


@pytest.mark.parametrize(("on_failure", "delivered"), [("open", True), ("closed", False)])
async def test_an_extension_that_raises_is_named_with_file_line_and_exception(
    net: Net, on_failure: Any, delivered: bool
) -> None:
    await net.load("if packet.tcp:\n    return {}['key']\nreturn packet.allow()", on_failure=on_failure)
    assert await net.passes(HTTP) is delivered
    await net.until(lambda: ExtensionEventKind.ERROR in net.kinds())
    event = next(event for event in net.events if event.kind is ExtensionEventKind.ERROR)
    assert "x.py:6: KeyError: 'key'" in event.text
    assert event.extension == "x"
    info = net.host.get("x")
    assert (info.state, info.errors) == (ExtensionState.RUNNING, 1)
    assert await net.passes(OTHER), "only the frame that it raised for is affected"
    if not delivered:
        assert net.switch.port("a").drops() == {DropReason.REQUIRED_EXTENSION_MISSING: 1}


async def test_an_answer_that_is_no_verdict_is_an_error_that_says_what_to_return(net: Net) -> None:
    await net.load("return True")
    await net.passes(OTHER)
    await net.until(lambda: ExtensionEventKind.ERROR in net.kinds())
    assert "X.ingress returned True; return packet.allow() or packet.drop(reason)" in net.events[-1].text


async def test_errors_at_every_frame_are_told_once_a_second_and_counted_all(net: Net) -> None:
    await net.load("raise ValueError(packet.length)")
    for _ in range(20):
        await net.passes(OTHER)
    await net.until(lambda: net.host.get("x").errors == 20)
    assert net.kinds().count(ExtensionEventKind.ERROR) < 5


@pytest.mark.parametrize(("on_failure", "delivered"), [("open", True), ("closed", False)])
async def test_a_killed_extension_applies_on_failure_at_once_and_comes_back(
    net: Net, on_failure: Any, delivered: bool
) -> None:
    pid = await net.load("return packet.drop('x') if packet.tcp else packet.allow()", on_failure=on_failure)
    assert not await net.passes(HTTP)
    os.kill(pid, signal.SIGKILL)
    await net.until(lambda: net.host.get("x").state is ExtensionState.FAILED)
    assert await net.passes(ethernet(B, A, 0x88B6)) is delivered
    if not delivered:
        assert net.switch.port("a").drops()[DropReason.REQUIRED_EXTENSION_MISSING] == 1
    await net.until(lambda: net.host.get("x").state is ExtensionState.RUNNING)
    assert await net.passes(ethernet(B, A, 0x88B7))
    assert not await net.passes(ipv4(B, A, payload=tcp(1, 2)))
    info = net.host.get("x")
    assert info.restarts == 1
    assert info.pid != pid
    failed = next(event for event in net.events if event.kind is ExtensionEventKind.FAILED)
    assert failed.text == f"its process was killed by SIGKILL; fail-{on_failure}, new start in 0.1 s"


async def test_a_hang_past_the_deadline_is_a_failure_and_the_process_is_replaced(engine: Engine) -> None:
    net = Net(engine, deadline=0.3)
    await net.open()
    try:
        pid = await net.load("while packet.tcp: pass\nreturn packet.allow()", on_failure="open")
        start = time.monotonic()
        assert await net.passes(HTTP), "fail-open lets the waiting frame go"
        assert 0.25 < time.monotonic() - start < 1.5
        await net.until(lambda: ExtensionEventKind.RESTARTED in net.kinds())
        assert str(pid) not in os.listdir("/proc")
        assert await net.passes(OTHER)
        assert "no verdict within 0.3 s" in next(
            e.text for e in net.events if e.kind is ExtensionEventKind.FAILED
        )
    finally:
        await net.close()


@pytest.mark.parametrize(
    ("crime", "why"),
    [
        ("b'nonsense'", "reply of 8 bytes, at least 20 expected"),
        ("struct.pack('<HBBIQHH', 1, 9, 0, 0, 0, 0, 0)", "reply with verdict 9"),
        ("struct.pack('<HBBIQHH', 1, 0, 1, 0, 1 << 40, 0, 0)", "unknown fields"),
    ],
)
async def test_a_malformed_reply_is_the_failure_of_that_extension_alone(
    net: Net, crime: str, why: str
) -> None:
    await net.load("return packet.drop('udp') if packet.udp else packet.allow()", name="honest")
    await net.load(
        "import gc, struct\n"
        "from vswitch_wire import packet as p\n"
        "from vswitch_wire.memory import signal_fd\n"
        "up = [o for o in gc.get_objects() if type(o).__name__ == 'Upcalls'][0]\n"
        f"up._writer.write(p.encode_completion(1, {crime}))\n"
        "up._writer.commit()\n"
        "signal_fd(up._reply_fd)\n"
        "while True: pass",
        name="liar",
        on_failure="open",
    )
    assert await net.passes(OTHER)
    await net.until(lambda: ExtensionEventKind.FAILED in net.kinds())
    failed = next(event for event in net.events if event.kind is ExtensionEventKind.FAILED)
    assert (failed.extension, why in failed.text) == ("liar", True), failed
    assert not await net.passes(ipv4(B, A, proto=17, payload=udp(1, 2)))
    assert net.host.get("honest").restarts == 0


async def test_a_forged_ring_index_is_the_failure_of_that_extension_alone(net: Net) -> None:
    await net.load(
        "import gc\n"
        "from vswitch_wire.memory import signal_fd\n"
        "up = [o for o in gc.get_objects() if type(o).__name__ == 'Upcalls'][0]\n"
        "up._writer._view.store_u32(0, 0xFFFFFFF7)\n"
        "signal_fd(up._reply_fd)\n"
        "while True: pass",
        on_failure="open",
    )
    assert await net.passes(OTHER)
    await net.until(lambda: ExtensionEventKind.FAILED in net.kinds())
    failed = next(event for event in net.events if event.kind is ExtensionEventKind.FAILED)
    assert "write index" in failed.text


async def test_lies_on_the_control_socket_end_the_process(net: Net) -> None:
    await net.load(
        "import os\n"
        "for fd in range(3, 4096):\n"
        "    try:\n"
        "        os.write(fd, b'{\"pid\": 1234}')\n"
        "    except OSError:\n"
        "        pass\n"
        "return packet.allow()",
        on_failure="open",
    )
    assert await net.passes(OTHER)
    await net.until(lambda: ExtensionEventKind.FAILED in net.kinds())
    failed = next(event for event in net.events if event.kind is ExtensionEventKind.FAILED)
    assert "broke its protocol: Started message out of turn" in failed.text


async def test_pauses_between_restarts_double_up_to_a_limit(net: Net) -> None:
    await net.load("import os\nos._exit(3)", on_failure="open")
    for number in range(1, 5):
        await net.passes(ethernet(B, A, 0x9000 + number))
        await net.until(lambda wanted=number: net.kinds().count(ExtensionEventKind.RESTARTED) == wanted)  # type: ignore[misc]
    pauses = [
        event.text.rsplit("in ", 1)[1] for event in net.events if event.kind is ExtensionEventKind.FAILED
    ]
    assert pauses == ["0.1 s", "0.2 s", "0.4 s", "0.4 s"]
    assert "its process ended with exit status 3" in net.events[1].text


async def test_while_one_extension_is_killed_again_and_again_the_others_traffic_loses_nothing(
    net: Net,
) -> None:
    """100 frames per second through another extension's verdicts, while one is killed five times."""
    await net.load("return packet.drop('udp') if packet.udp else packet.allow()", name="steady")
    await net.load("return packet.allow(cache=False)", name="victim", on_failure="open")
    sent, got, killed = 0, 0, set()
    while sent < 200 or (len(killed) < 5 and sent < 4000):
        net.ends["a"].send(ethernet(B, A, payload=sent.to_bytes(2, "big") + bytes(44)))
        sent += 1
        info = net.host.get("victim")
        if sent % 20 == 0 and info.state is ExtensionState.RUNNING and len(killed) < 5:
            os.kill(info.pid, signal.SIGKILL)
            killed.add(info.pid)
        await asyncio.sleep(0.01)
        got += len(net.ends["b"].received())
    got += len(await net.arrived("b", sent - got, patience=3.0))
    assert (got, len(killed)) == (sent, 5)
    assert net.host.get("steady").restarts == 0
    await net.until(lambda: net.host.get("victim").restarts == 5)


async def test_on_failure_can_be_changed_without_a_frame_escaping(net: Net) -> None:
    await net.load("return packet.drop('always')", on_failure="open")
    changed = asyncio.ensure_future(net.host.set_on_failure("x", "closed"))
    while not changed.done():
        assert not await net.passes(OTHER)
    info = await changed
    assert (info.on_failure, info.state) == ("closed", ExtensionState.RUNNING)
    os.kill(info.pid, signal.SIGKILL)
    assert not await net.passes(ethernet(B, A, 0x9999))


async def test_an_extension_can_be_unloaded_while_it_is_failed(net: Net) -> None:
    pid = await net.load("return packet.drop('x')", on_failure="closed")
    os.kill(pid, signal.SIGKILL)
    await net.until(lambda: net.host.get("x").state is ExtensionState.FAILED)
    await net.host.unload("x")
    assert await net.passes(OTHER)
    await asyncio.sleep(0.5)
    assert net.host.list() == []
    assert ExtensionEventKind.RESTARTED not in net.kinds()


async def test_what_an_extension_prints_can_be_read(net: Net) -> None:
    await net.load("print('seen', packet.eth.dst)\nreturn packet.allow()")
    assert await net.passes(OTHER)
    await net.until(lambda: net.host.get("x").output)
    assert net.host.get("x").output == ("seen 02:00:00:00:00:02",)


async def test_egress_is_asked_once_per_destination(net: Net) -> None:
    source = (
        "from vswitch.extension import Filter\n"
        "class X(Filter):\n"
        "    def egress(self, packet):\n"
        "        return packet.drop('not to b') if packet.port == 'b' else packet.allow()\n"
    )
    await net.host.load("x", source.encode(), "x.py")
    net.ends["c"] = net.switch.host_endpoint()
    await net.switch.add_port("c").attach(net.ends["c"].endpoint)
    net.ends["a"].send(ethernet(b"\xff" * 6, A))
    assert len(await net.arrived("c")) == 1
    assert await net.arrived("b", patience=0.1) == []
    assert net.switch.port("b").drops() == {DropReason.FILTERED: 1}
