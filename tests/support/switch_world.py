"""A switch with host endpoints and scripted extensions, for tests of either engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vswitch.endpoint import Frame
from vswitch.engine import DatapathEvent, EventKind, Limits
from vswitch.inprocess import InProcessEndpoint
from vswitch.switch import Port, Switch
from vswitch.upcall import (
    MEMFD_BYTES,
    REPLY_OFFSET,
    RING_BYTES,
    ExtensionChannel,
    FailureMode,
    Pass,
    UpcallReply,
    UpcallRequest,
)
from vswitch_wire import packet as ring_packet
from vswitch_wire.engine import Engine
from vswitch_wire.memory import GuestMemory, Region, drain_fd, signal_fd
from vswitch_wire.ring import RingReader, RingWriter

Judge = Callable[[UpcallRequest], UpcallReply | bytes | None]


class ScriptedExtension:
    """The process side of an upcall channel on the test's own loop; `judge` answers, None = stays silent."""

    def __init__(
        self,
        id: int,
        judge: Judge,
        *,
        name: str = "ext",
        on_failure: FailureMode = "closed",
        passes: tuple[Pass, ...] = ("ingress", "egress"),
    ) -> None:
        self.channel = ExtensionChannel.create(id, name, on_failure=on_failure, passes=passes)
        self.judge = judge
        self.asked: list[UpcallRequest] = []
        self.unanswered: list[int] = []
        self._memory = GuestMemory([Region(0, MEMFD_BYTES, self.channel.memfd)])
        pages = RING_BYTES // 4096
        self._reader = RingReader(self._memory.view(range(pages), 0, RING_BYTES))
        self.writer = RingWriter(self._memory.view(range(pages, 2 * pages), 0, RING_BYTES))
        assert REPLY_OFFSET == RING_BYTES
        asyncio.get_running_loop().add_reader(self.channel.request_fd, self._work)

    def _work(self) -> None:
        drain_fd(self.channel.request_fd)
        while True:
            packets = self._reader.read()
            for data in packets:
                packet = ring_packet.decode(data)
                request = UpcallRequest.decode(packet.payload)
                self.asked.append(request)
                answer = self.judge(request)
                if answer is None:
                    self.unanswered.append(packet.transaction_id)
                else:
                    self.reply(packet.transaction_id, answer)
            if self._reader.commit():
                self.signal()
            if not packets and not self._reader.unmask():
                return

    def reply(self, upcall_id: int, answer: UpcallReply | bytes) -> None:
        payload = answer if isinstance(answer, bytes) else answer.pack()
        assert self.writer.write(ring_packet.encode_completion(upcall_id, payload))
        self.writer.commit()
        self.signal()

    def signal(self) -> None:
        signal_fd(self.channel.reply_fd)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.channel.request_fd)
        self._memory.close()
        self.channel.close()


class World:
    """Ports `p1`, `p2`, ... with an endpoint each."""

    def __init__(self, engine: Engine, *, limits: Limits | None = None, manual_time: bool = True) -> None:
        self.switch = Switch("s0", engine=engine, limits=limits, manual_time=manual_time)
        self.endpoints: dict[str, InProcessEndpoint] = {}
        self.extensions: list[ScriptedExtension] = []
        self.events: list[DatapathEvent] = []
        self.switch.on_event(self.events.append)

    async def add(self, *names: str, mtu: int = 1500, limit: int = 4096) -> list[Port]:
        ports = []
        for name in names:
            port = self.switch.add_port(name, mtu=mtu)
            self.endpoints[name] = self.switch.host_endpoint(limit)
            await port.attach(self.endpoints[name].endpoint)
            ports.append(port)
        return ports

    async def remove(self, name: str) -> None:
        await self.switch.remove_port(name)
        self.endpoints.pop(name).close()

    def extension(self, judge: Judge, **options: object) -> ScriptedExtension:
        extension = ScriptedExtension(len(self.extensions) + 1, judge, **options)  # type: ignore[arg-type]
        self.extensions.append(extension)
        return extension

    async def load(self, *extensions: ScriptedExtension) -> None:
        await self.switch.set_extensions([extension.channel for extension in extensions])

    async def send(self, name: str, *frames: bytes | Frame) -> dict[str, list[bytes]]:
        """Sends from a port and returns what arrived where, once all is decided."""
        for frame in frames:
            assert self.endpoints[name].send(frame)
        await asyncio.wait_for(self.switch.datapath.barrier(), 10)
        return self.arrived()

    def arrived(self) -> dict[str, list[bytes]]:
        """What the endpoints received since the last look; ports without anything are left out."""
        taken = {
            name: [bytes(frame.data) for frame in end.received()] for name, end in self.endpoints.items()
        }
        return {name: frames for name, frames in taken.items() if frames}

    async def told(self, kind: EventKind) -> DatapathEvent:
        """The first event of a kind; waits for it."""
        for _ in range(500):
            for event in self.events:
                if event.kind is kind:
                    return event
            await asyncio.sleep(0.01)
        raise AssertionError(f"no {kind} among {self.events}")

    async def until(self, holds: Callable[[], bool]) -> None:
        """Waits for something that the datapath does by itself."""
        for _ in range(500):
            if holds():
                return
            await asyncio.sleep(0.01)
        raise AssertionError("it did not come true within 5 s")

    async def close(self) -> None:
        await self.switch.close()
        for endpoint in self.endpoints.values():
            endpoint.close()
        for extension in self.extensions:
            extension.close()
