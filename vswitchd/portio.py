"""Frames in and out of a port by API: a stream as the port's NIC, or beside the NIC that is there;
injection.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any

from vswitch_api.v1 import port_pb2
from vswitchd.errors import invalid
from vswitchd.resources import parse
from vswitchd.switches import PortRecord, SwitchManager

MAX_FRAMES = 256
FRAME_BYTES = range(14, 65536)
# Of an answer: clients need not take messages as long as ours, and gRPC's own limit is 4 MiB.
MESSAGE_BYTES = 1 << 20


def checked_frames(field_name: str, frames: Iterable[port_pb2.Frame]) -> list[bytes]:
    """The frames' bytes, when there are not too many and each could be one."""
    data = [frame.data for frame in frames]
    if len(data) > MAX_FRAMES:
        raise invalid(field_name, f"{len(data)} frames; at most {MAX_FRAMES} are taken at once")
    for index, frame in enumerate(data):
        if len(frame) not in FRAME_BYTES:
            raise invalid(
                f"{field_name}[{index}]",
                f"{len(frame)} bytes; a frame has {FRAME_BYTES.start} to {FRAME_BYTES.stop - 1}",
            )
    return data


def answers(frames: Iterable[bytes]) -> Iterator[port_pb2.PortIoResponse]:
    """The frames in as few messages as the bounds allow."""
    batch: list[port_pb2.Frame] = []
    size = 0
    for frame in frames:
        if batch and (len(batch) == MAX_FRAMES or size + len(frame) > MESSAGE_BYTES):
            yield port_pb2.PortIoResponse(frames=port_pb2.PortIoFrames(frames=batch))
            batch, size = [], 0
        batch.append(port_pb2.Frame(data=frame))
        size += len(frame)
    if batch:
        yield port_pb2.PortIoResponse(frames=port_pb2.PortIoFrames(frames=batch))


class PortIo:
    """Streams of frames on ports."""

    def __init__(self, switches: SwitchManager) -> None:
        self._switches = switches
        self._numbers = itertools.count(1)

    async def inject(
        self, requests: AsyncIterator[port_pb2.InjectFramesRequest]
    ) -> port_pb2.InjectFramesResponse:
        """Lets the frames of a stream enter at the port that its first request names."""
        port: PortRecord | None = None
        answer = port_pb2.InjectFramesResponse()
        async for request in requests:
            if port is None or (request.port and request.port != port.name):
                if port is not None:
                    raise invalid("port", "a stream injects at one port", "open another stream")
                port = self._switches.find_port(request.port, "port")
            for frame in checked_frames("frames", request.frames):
                port.port.inject(frame)
                answer.frames += 1
                answer.bytes += len(frame)
        if port is None:
            raise invalid("port", "the stream has ended before it named a port")
        # What was injected has been decided when the caller looks at counters.
        await port.switch.datapath.barrier()
        return answer

    async def stream(
        self, requests: AsyncIterator[port_pb2.PortIoRequest]
    ) -> AsyncIterator[port_pb2.PortIoResponse]:
        """The answer stream of one PortIo call."""
        iterator = aiter(requests)
        first = await anext(iterator, None)
        if first is None or first.WhichOneof("message") != "open":
            raise invalid("open", "the first request must open a port")
        name, mode = first.open.port, first.open.mode
        parse("open.port", name, "switches", "ports")
        port = self._switches.find_port(name, "open.port")
        if mode == port_pb2.PORT_IO_MODE_ENDPOINT:
            opened = self._endpoint(port)
        elif mode == port_pb2.PORT_IO_MODE_MONITOR:
            opened = self._monitor(port)
        else:
            raise invalid("open.mode", "unspecified", "say endpoint or monitor")
        async with opened as (fd, send, receive):
            yield port_pb2.PortIoResponse(opened=port_pb2.PortIoOpened(mode=mode))
            reader = asyncio.create_task(self._feed(iterator, send))
            ready = asyncio.Event()
            loop = asyncio.get_running_loop()
            loop.add_reader(fd, ready.set)
            try:
                while not reader.done():
                    waiting = asyncio.create_task(ready.wait())
                    try:
                        await asyncio.wait([reader, waiting], return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        waiting.cancel()
                    ready.clear()
                    for answer in answers(receive()):
                        yield answer
                reader.result()
            finally:
                loop.remove_reader(fd)
                reader.cancel()

    async def _feed(self, requests: AsyncIterator[port_pb2.PortIoRequest], send: Any) -> None:
        async for request in requests:
            if request.WhichOneof("message") != "frames":
                raise invalid("open", "a stream opens one port, once")
            for frame in checked_frames("frames.frames", request.frames.frames):
                send(frame)

    @asynccontextmanager
    async def _endpoint(self, port: PortRecord) -> AsyncIterator[tuple[int, Any, Any]]:
        self._switches.claim(port, f"PortIo stream {next(self._numbers)}")
        endpoint = port.switch.switch.host_endpoint()
        try:
            await port.port.attach(endpoint.endpoint)
            yield (
                endpoint.fd,
                endpoint.send,
                lambda: [bytes(frame.data) for frame in endpoint.received()],
            )
        finally:
            await asyncio.shield(port.port.detach())
            endpoint.close()
            port.owner = ""

    @asynccontextmanager
    async def _monitor(self, port: PortRecord) -> AsyncIterator[tuple[int, Any, Any]]:
        tap = port.switch.switch.open_tap([port.port], drops=False)
        try:
            yield tap.fd, port.port.inject, lambda: [seen.data for seen in tap.read()]
        finally:
            tap.close()
