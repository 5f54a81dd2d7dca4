"""The Python engine: a switch's datapath on the asyncio loop, slow, complete, and the document of record.

A frame's way: `_service` takes it from its endpoint; `_receive` counts and captures it; `_decide` finds a
cached program or starts a walk; `_execute` does what the program says. A walk that needs an extension's
verdict is suspended, and later frames of its flow wait behind it, in order.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from vswitch.drops import DropReason
from vswitch.endpoint import Endpoint, Frame
from vswitch.engine import (
    BATCH,
    MAX_FRAME_BYTES,
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
from vswitch.engine.python.flows import FlowCache, FlowEntry
from vswitch.engine.python.mac import MacTable
from vswitch.engine.python.parse import ETHERNET_HEADER, Packet, parse
from vswitch.engine.python.pipeline import (
    Answer,
    Ask,
    Drop,
    Program,
    Recorder,
    Surroundings,
    Walk,
    walk,
)
from vswitch.engine.python.ports import Port, Ports
from vswitch.engine.python.tap import PythonTap
from vswitch.engine.python.upcalls import ExtensionLink, Settled
from vswitch.fields import Field
from vswitch.upcall import MAX_FRAME, UpcallRequest, check_channels
from vswitch_wire.memory import drain_fd

__all__ = ["PythonDatapath"]

_log = logging.getLogger("vswitch.engine.python")

TICK_NS = 1_000_000_000
"""How often ages are looked at, and how often a cached flow refreshes its source address."""
BARRIER_ROUNDS = 256
"""Batches that a barrier takes from each endpoint at most: a guest that never pauses holds it no longer."""

_FLOW_FIELDS = tuple(
    one.value
    for one in (
        Field.IN_PORT,
        Field.ETH_DST,
        Field.ETH_SRC,
        Field.ETH_TYPE,
        Field.VLAN_TCI,
        Field.IP_PROTO,
        Field.IP_SRC,
        Field.IP_DST,
    )
)
_FlowKey = tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Job:
    """A frame whose walk is suspended, or a trace."""

    packet: Packet
    recorder: Recorder
    steps: Walk
    flow: _FlowKey
    generation: int
    held: deque[Packet] = field(default_factory=deque)
    done: asyncio.Future[list[TraceStep]] | None = None
    suspended: bool = False


class PythonDatapath:
    """See `vswitch.engine.Datapath`."""

    def __init__(self, *, limits: Limits | None = None, manual_time: bool = False) -> None:
        self._limits = limits or Limits()
        self._manual_ns: int | None = 0 if manual_time else None
        self._ports = Ports(self._limits, self._wall)
        self._counters = self._ports.counters
        self._flows = FlowCache(self._limits, self._counters)
        self._macs = MacTable(self._limits, self._counters, self._flows.invalidate)
        self._links: list[ExtensionLink[_Job]] = []
        self._link_by_id: dict[int, ExtensionLink[_Job]] = {}
        self._jobs: dict[_Job, None] = {}
        self._holders: dict[_FlowKey, _Job] = {}
        self._held = 0
        self._generation = 0
        self._packet_id = 0
        self._barriers: list[tuple[int, asyncio.Future[None]]] = []
        """The last frame that each waits for, and who waits."""
        self._due: dict[int, Endpoint] = {}
        """Ports that have another batch coming by themselves, each once."""
        self._event: Callable[[DatapathEvent], None] = lambda event: None
        self._timer: asyncio.TimerHandle | None = None
        self._next_tick_ns = self._now() + TICK_NS
        self._closed = False
        self._surroundings = self._make_surroundings()

    # -- ports and endpoints

    def add_port(self, port_id: int, config: PortConfig) -> None:
        self._ports.add(port_id, config)

    async def remove_port(self, port_id: int) -> None:
        await self.detach(port_id)
        self._ports.remove(port_id)
        self._macs.forget_port(port_id)
        for job in [job for job in self._jobs if job.packet.in_port == port_id]:
            self._abandon(job)
        self._changed()

    async def attach(self, port_id: int, endpoint: object) -> None:
        port = self._ports.get(port_id)
        if port.endpoint is not None:
            raise ValueError(f"port {port.config.name} has an endpoint already; detach it first")
        if not isinstance(endpoint, Endpoint):
            raise TypeError(f"the Python engine cannot use {type(endpoint).__name__} as an endpoint")
        loop = asyncio.get_running_loop()
        port.endpoint = endpoint
        self._changed()
        loop.add_reader(endpoint.wake_fd, self._service, port_id, endpoint)
        loop.call_soon(self._service, port_id, endpoint)
        self._arm_timer()

    async def detach(self, port_id: int) -> None:
        port = self._ports.get(port_id)
        if port.endpoint is None:
            return
        self._flush()
        asyncio.get_running_loop().remove_reader(port.endpoint.wake_fd)
        port.endpoint = None
        self._changed()

    def inject(self, port_id: int, frame: Frame | bytes) -> None:
        self._ports.get(port_id)
        self._receive(port_id, _as_frame(frame))
        self._flush()

    def _service(self, port_id: int, endpoint: Endpoint) -> None:
        """Takes one batch from an endpoint; comes back by itself while there is more."""
        port = self._ports.find(port_id)
        if port is None or port.endpoint is not endpoint:
            return
        drain_fd(endpoint.wake_fd)
        # A guest that signals without need gets no second share beside the one that is due.
        if self._due.get(port_id) is not endpoint and self._take_batch(port_id, port, endpoint):
            self._serve_again(port_id, endpoint)

    def _serve_again(self, port_id: int, endpoint: Endpoint) -> None:
        if self._due.get(port_id) is not endpoint:
            self._due[port_id] = endpoint
            asyncio.get_running_loop().call_soon(self._serve_due, port_id, endpoint)

    def _serve_due(self, port_id: int, endpoint: Endpoint) -> None:
        if self._due.get(port_id) is endpoint:
            del self._due[port_id]
            self._service(port_id, endpoint)

    def _take_one(self, port_id: int) -> bool:
        port = self._ports.find(port_id)
        return (
            port is not None and port.endpoint is not None and self._take_batch(port_id, port, port.endpoint)
        )

    def _take_batch(self, port_id: int, port: Port, endpoint: Endpoint) -> bool:
        """True = there is, or may be, more."""
        try:
            frames = endpoint.receive(BATCH)
            dropped = endpoint.take_drops()
        except Exception as error:
            self._endpoint_broke(port_id, port, endpoint, error)
            return False
        for reason, count in dropped.items():
            for _ in range(count):
                self._ports.count_drop(port_id, "in", Drop(reason, "dropped by the NIC"))
        for frame in frames:
            self._receive(port_id, frame)
        self._ports.touched[port_id] = None
        self._flush()
        return bool(frames) or (port.endpoint is endpoint and endpoint.rearm())

    def _endpoint_broke(self, port_id: int, port: Port, endpoint: Endpoint, error: Exception) -> None:
        _log.exception("port %s: its endpoint raised; the port is disconnected", port.config.name)
        asyncio.get_running_loop().remove_reader(endpoint.wake_fd)
        port.endpoint = None
        self._counters.endpoints_failed += 1
        self._changed()
        self._event(DatapathEvent(EventKind.PORT_DISCONNECTED, port_id, f"its endpoint raised: {error}"))

    def _flush(self) -> None:
        while dirty := [link for link in self._links if link.dirty]:
            for link in dirty:
                self._push(link)
        self._ports.flush()
        if self._barriers:
            self._answer_barriers()

    def _answer_barriers(self) -> None:
        # What is held behind a frame is younger than it.
        waiting = [job.packet.id for job in self._jobs if job.done is None]
        for last, waiter in list(self._barriers):
            if not waiting or min(waiting) > last:
                self._barriers.remove((last, waiter))
                if not waiter.done():
                    waiter.set_result(None)

    # -- a frame's way

    def _receive(self, port_id: int, frame: Frame) -> None:
        port = self._ports.get(port_id)
        self._packet_id += 1
        packet = Packet(frame, port_id, self._packet_id)
        self._ports.arrived(packet, port)
        drop = self._prepare(packet, port.config)
        if drop is not None:
            self._ports.drop(packet, port_id, "in", drop)
            return
        self._decide(packet)

    @staticmethod
    def _prepare(packet: Packet, config: PortConfig) -> Drop | None:
        """The checks that every frame gets, cached or not; parses it."""
        if packet.length < ETHERNET_HEADER:
            detail = f"{packet.length} bytes are less than an Ethernet header"
            return Drop(DropReason.INVALID_PACKET, detail)
        if packet.length > MAX_FRAME_BYTES:
            return Drop(DropReason.INVALID_PACKET, f"{packet.length} bytes are more than any frame has")
        parse(packet)
        if packet.l3_length > config.mtu and not packet.frame.offload.mss:
            return Drop(
                DropReason.INVALID_PACKET, f"{packet.l3_length} bytes exceed the port's MTU of {config.mtu}"
            )
        return None

    def _decide(self, packet: Packet) -> None:
        """Finds the frame's program in the cache or walks the pipeline."""
        flow = _flow_key(packet)
        holder = self._holders.get(flow)
        if holder is not None:
            if len(holder.held) >= self._limits.held_per_flow or self._held >= self._limits.held_total:
                detail = "too many frames wait for an extension's verdict"
                self._ports.drop(packet, packet.in_port, "in", Drop(DropReason.RESOURCES, detail))
            else:
                self._held += 1
                holder.held.append(_own(packet))
            return
        now = self._now()
        if packet.regular:
            entry = self._flows.lookup(packet, now)
            if entry is not None:
                self._refresh(entry, now)
                self._ports.execute(packet, entry.program)
                return
        else:
            self._counters.flow_misses += 1
        recorder = Recorder()
        job = _Job(packet, recorder, walk(packet, recorder, self._surroundings), flow, self._generation)
        self._advance(job, None)

    def _refresh(self, entry: FlowEntry, now: int) -> None:
        if entry.program.source is not None and now - entry.refreshed_ns >= TICK_NS:
            entry.refreshed_ns = now
            self._macs.refresh(entry.program.source, now)

    # -- walks that wait for extensions

    def _advance(self, job: _Job, answer: Answer | None) -> None:
        """Takes a walk as far as it goes without waiting."""
        while True:
            try:
                ask = next(job.steps) if answer is None else job.steps.send(answer)
            except StopIteration as stop:
                program: Program = stop.value
                self._finish(job, program)
                return
            if job.done is None and not job.suspended and not self._suspend(job):
                return
            answer = self._ask(job, ask)
            if answer is None:
                return

    def _suspend(self, job: _Job) -> bool:
        """Makes a job of a frame that has to wait; False = its port has too many of them."""
        port = self._ports.get(job.packet.in_port)
        if port.walks >= self._limits.upcalls_per_port:
            detail = "too many frames of the port wait for extensions"
            self._ports.drop(job.packet, job.packet.in_port, "in", Drop(DropReason.RESOURCES, detail))
            return False
        port.walks += 1
        job.suspended = True
        job.packet = _own(job.packet)
        self._jobs[job] = None
        self._holders[job.flow] = job
        return True

    def _ask(self, job: _Job, ask: Ask) -> Answer | None:
        packet = job.packet
        port_id = packet.in_port if ask.out_port is None else ask.out_port
        request = UpcallRequest(
            egress=ask.out_port is not None,
            in_port=packet.in_port,
            out_port=ask.out_port,
            vlan_tci=packet.frame.vlan_tci,
            frame_length=packet.length,
            port_name=self._ports.name(port_id),
            data=bytes(packet.frame.data[:MAX_FRAME]),
            trace=job.recorder.tracing,
            large_send=packet.frame.offload.mss > 0,
        )
        answer = self._link_by_id[ask.channel.id].ask(request, job, self._now())
        if job.done is None and answer is None:
            self._counters.upcalls += 1
        return answer

    def _finish(self, job: _Job, program: Program) -> None:
        if job.done is not None:
            self._finish_trace(job, program)
            return
        if job.suspended:
            self._release(job)
        self._publish(job, program)
        self._ports.execute(job.packet, program)
        while job.held:
            self._held -= 1
            self._decide(job.held.popleft())

    def _release(self, job: _Job) -> None:
        del self._jobs[job]
        del self._holders[job.flow]
        port = self._ports.find(job.packet.in_port)
        if port is not None:
            port.walks -= 1

    def _publish(self, job: _Job, program: Program) -> None:
        """Caches the program if all that it was made from still holds."""
        recorder = job.recorder
        holds = job.generation == self._generation and all(
            self._macs.lookup(key) == found for key, found in recorder.dependencies
        )
        if not holds or not recorder.cacheable or not job.packet.regular:
            self._counters.flows_refused += 1
            return
        depends_on = tuple(key for key, _ in recorder.dependencies)
        self._flows.publish(job.packet, recorder.mask, program, depends_on, recorder.ttl_ns, self._now())

    def _abandon(self, job: _Job) -> None:
        """The source port of a waiting frame is gone: drops it and what waits behind it."""
        self._give_up({job})
        drop = Drop(DropReason.DISCONNECTED, "its source port was removed")
        if job.done is not None:
            del self._jobs[job]
            job.recorder.step("receive", "drop", drop.detail, drop=drop)
            if not job.done.done():
                job.done.set_result(job.recorder.steps)
            return
        self._release(job)
        for packet in (job.packet, *job.held):
            self._ports.drop(packet, packet.in_port, "in", drop)
        self._held -= len(job.held)
        job.held.clear()

    def _changed(self) -> None:
        """Ports or extensions changed: nothing cached holds, and waiting frames are judged anew."""
        self._generation += 1
        self._flows.flush()
        jobs = list(self._jobs)
        self._give_up(set(jobs))
        for job in jobs:
            job.recorder = Recorder(tracing=job.recorder.tracing)
            job.generation = self._generation
            if job.done is not None:
                self._trace_head(job)
            job.steps = walk(job.packet, job.recorder, self._surroundings)
            self._advance(job, None)
        self._flush()

    def _give_up(self, jobs: set[_Job]) -> None:
        for link in self._link_by_id.values():
            link.give_up(lambda job: job in jobs)

    # -- extensions

    async def set_extensions(self, channels: Iterable[ExtensionChannel]) -> None:
        loop = asyncio.get_running_loop()
        wanted = check_channels(channels)
        deadline_ns = int(self._limits.upcall_deadline_seconds * 1e9)
        fresh: list[ExtensionLink[_Job]] = []
        try:
            for channel in wanted:
                if channel.id not in self._link_by_id:
                    fresh.append(ExtensionLink(channel, deadline_ns))
        except BaseException:
            for link in fresh:
                link.close()
            raise
        available = self._link_by_id | {link.channel.id: link for link in fresh}
        old = self._links
        self._links = [available[channel.id] for channel in wanted]
        self._surroundings = self._make_surroundings()
        for link in fresh:
            self._link_by_id[link.channel.id] = link
            loop.add_reader(link.reply_fd, self._replies, link)
        self._changed()
        for link in old:
            if link not in self._links:
                loop.remove_reader(link.reply_fd)
                del self._link_by_id[link.channel.id]
                link.close()
        self._event(DatapathEvent(EventKind.EXTENSIONS_CHANGED, 0, f"{len(wanted)} extensions"))
        self._arm_timer()

    def fail_extension(self, extension_id: int, why: str) -> None:
        link = self._link_by_id.get(extension_id)
        if link is None:
            raise KeyError(f"no extension has id {extension_id}")
        self._fail(link, why)
        self._flush()

    def _replies(self, link: ExtensionLink[_Job]) -> None:
        errors = link.counters.errors
        settled: list[Settled[_Job]] = []
        why = None
        try:
            link.replies(settled)
        except ValueError as error:
            why = str(error)
        if link.counters.errors != errors:
            self._event(DatapathEvent(EventKind.EXTENSION_ERROR, link.channel.id, link.counters.why))
        self._settle(settled)
        if why is not None:
            self._fail(link, why)
        self._flush()

    def _push(self, link: ExtensionLink[_Job]) -> None:
        try:
            link.push()
        except ValueError as error:
            self._fail(link, str(error))
        self._arm_timer()

    def _fail(self, link: ExtensionLink[_Job], why: str) -> None:
        if link.failed:
            return
        self._counters.upcall_failures += 1
        settled = link.fail(why)
        _log.warning(
            "extension %s failed: %s; on_failure=%s", link.channel.name, why, link.channel.on_failure
        )
        self._event(DatapathEvent(EventKind.EXTENSION_FAILED, link.channel.id, why))
        self._settle(settled)

    def _settle(self, settled: list[Settled[_Job]]) -> None:
        for one in settled:
            if one.waiter in self._jobs:
                self._advance(one.waiter, one.answer)

    # -- trace

    async def trace(self, port_id: int, frame: Frame | bytes) -> list[TraceStep]:
        port = self._ports.get(port_id)
        packet = Packet(_as_frame(frame), port_id, 0)
        drop = self._prepare(packet, port.config)
        if drop is not None:
            return [TraceStep("receive", "drop", drop.detail, reason=drop.reason)]
        recorder = Recorder(tracing=True)
        done: asyncio.Future[list[TraceStep]] = asyncio.get_running_loop().create_future()
        steps = walk(packet, recorder, self._surroundings)
        job = _Job(packet, recorder, steps, (), self._generation, done=done)
        self._jobs[job] = None
        self._trace_head(job)
        self._advance(job, None)
        self._flush()
        return await done

    def _trace_head(self, job: _Job) -> None:
        name = self._ports.name(job.packet.in_port)
        job.recorder.step("receive", "continue", f"{job.packet.length} bytes from {name}")

    def _finish_trace(self, job: _Job, program: Program) -> None:
        assert job.done is not None, "only traces come here"
        del self._jobs[job]
        for destination in program.destinations:
            port_id = destination.port_id
            if destination.drop is None and self._ports.egress_policy(job.packet, port_id) is None:
                detail = f"to {self._ports.name(port_id)}"
                job.recorder.step("deliver", "deliver", detail, port_id=port_id)
        if not job.done.done():
            job.done.set_result(job.recorder.steps)

    # -- what is to be seen

    def port_counters(self, port_id: int) -> PortCounters:
        return self._ports.port_counters(port_id)

    def drops(self, port_id: int) -> dict[DropReason, int]:
        return self._ports.drops(port_id)

    def switch_counters(self) -> SwitchCounters:
        return self._ports.switch_counters()

    def extension_counters(self) -> dict[int, ExtensionCounters]:
        return {link.channel.id: replace(link.counters) for link in self._links}

    def mac_table(self) -> list[MacEntry]:
        return self._macs.rows(self._now())

    def flows(self) -> list[FlowInfo]:
        return self._flows.rows(self._now())

    def flush_flows(self) -> None:
        self._flows.flush()

    def open_tap(self, ports: Iterable[int] | None, snaplen: int, drops: bool) -> PythonTap:
        return self._ports.open_tap(ports, snaplen, drops)

    def on_event(self, callback: Callable[[DatapathEvent], None]) -> None:
        self._event = callback

    # -- time, and the end

    async def barrier(self) -> None:
        for _ in range(BARRIER_ROUNDS):
            if not sum(self._take_one(port_id) for port_id in list(self._ports.connected())):
                break
            # Some guests never pause: others have their turn between two rounds.
            await asyncio.sleep(0)
        else:
            # What the last round leaves is work all the same.
            for port_id in self._ports.connected():
                endpoint = self._ports.get(port_id).endpoint
                if endpoint is not None:
                    self._serve_again(port_id, endpoint)
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._barriers.append((self._packet_id, waiter))
        self._answer_barriers()
        await waiter

    async def advance(self, seconds: float) -> None:
        if self._manual_ns is None:
            raise ValueError("this datapath runs on the system's time; make it with manual_time=True")
        self._manual_ns += int(seconds * 1e9)
        self._run_timers()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for port_id in self._ports.ids():
            await self.remove_port(port_id)
        await self.set_extensions([])
        self._ports.close_taps()
        if self._timer is not None:
            self._timer.cancel()

    def _now(self) -> int:
        return time.monotonic_ns() if self._manual_ns is None else self._manual_ns

    def _wall(self) -> int:
        return time.time_ns() if self._manual_ns is None else self._manual_ns

    def _run_timers(self) -> None:
        now = self._now()
        for link in list(self._links):
            if link.overdue(now):
                seconds = self._limits.upcall_deadline_seconds
                self._fail(link, f"no verdict within {seconds:g} s")
        if now >= self._next_tick_ns:
            self._next_tick_ns = now + TICK_NS
            self._macs.sweep(now)
            self._flows.sweep(now)
        self._flush()

    def _arm_timer(self) -> None:
        """Wakes for the next tick or deadline, whichever is first; with manual time, `advance` does."""
        if self._manual_ns is not None or self._closed:
            return
        due = self._next_tick_ns
        for link in self._links:
            deadline = link.next_deadline_ns()
            if deadline is not None:
                due = min(due, deadline)
        if self._timer is not None:
            if self._timer_due <= due:
                return
            self._timer.cancel()
        self._timer_due = due
        delay = max(0, due - self._now()) / 1e9
        self._timer = asyncio.get_running_loop().call_later(delay, self._on_timer)

    _timer_due = 0

    def _on_timer(self) -> None:
        self._timer = None
        self._run_timers()
        self._arm_timer()

    def _make_surroundings(self) -> Surroundings:
        channels = [link.channel for link in self._links]
        return Surroundings(
            ingress=[channel for channel in channels if "ingress" in channel.passes],
            egress=[channel for channel in reversed(channels) if "egress" in channel.passes],
            port_name=self._ports.name,
            connected=self._ports.connected,
            lookup=self._macs.lookup,
            learn=lambda key, port_id: self._macs.learn(key, port_id, self._now()),
            egress_policy=self._ports.egress_policy,
        )


def _as_frame(frame: Frame | bytes) -> Frame:
    return frame if isinstance(frame, Frame) else Frame(bytes(frame))


def _own(packet: Packet) -> Packet:
    """Makes sure that a frame which outlives its batch lies in memory that nobody reuses."""
    if not isinstance(packet.frame.data, bytes):
        packet.frame = replace(packet.frame, data=bytes(packet.frame.data))
    return packet


def _flow_key(packet: Packet) -> _FlowKey:
    """What must stay in order: addresses, protocol and ports, but all fragments of a host pair together."""
    ports = (
        (0, 0) if packet.fields[Field.IP_FRAG] else (packet.fields[Field.L4_SRC], packet.fields[Field.L4_DST])
    )
    return packet.key(_FLOW_FIELDS) + ports
