"""A running capture of switch ports: sightings from a datapath's tap, encoded as pcapng, piece by piece.

Life cycle: made with an open tap (from then on frames are seen), read once with `async for`, ended by
`stop` or at its packet limit; the last piece holds the statistics. It owns the tap and closes it. One
asyncio loop.

What a reader finds: one interface per port, named as the port; `epb_flags` with the direction as the port's
NIC sees the switch ("inbound" came in from the NIC); `epb_packetid`, the same at every sighting of one
frame; `epb_queue`; for a drop `epb_verdict` with the reason's code and a comment in words.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from vswitch.capture import pcapng
from vswitch.endpoint import Checksum
from vswitch.engine import CapturedFrame, CaptureTap

READ_FRAMES = 512
"""Frames taken from the tap at once."""


@dataclass(slots=True)
class _Interface:
    number: int
    seen: int = 0


class PortCapture:
    """One capture.

    `port_name` gives the name of a port by its number; later ports are asked for when first seen.
    """

    def __init__(
        self,
        tap: CaptureTap,
        port_name: Callable[[int], str],
        *,
        switch: str = "",
        snaplen: int = 0,
        packet_limit: int = 0,
    ) -> None:
        self._tap = tap
        self._port_name = port_name
        self._switch = switch
        self._snaplen = snaplen
        self._packet_limit = packet_limit
        self._writer = pcapng.PcapngWriter()
        self._interfaces: dict[int, _Interface] = {}
        self._stopped = asyncio.Event()
        self._start_ns = time.time_ns()
        self._lost_told = 0
        self.packets = 0
        """Sightings written, drops included."""
        self.drops = 0
        """Those that are drops."""

    @property
    def lost(self) -> int:
        """Sightings that were not recorded because the reader was too slow."""
        return self._tap.lost

    def stop(self) -> None:
        """End it; what the tap holds is still delivered, then the statistics."""
        self._stopped.set()

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        """Pieces of the file, whole blocks each; the first one comes at once."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._tap.fd, readable.set)
        try:
            yield self._writer.section()
            while not self._finished():
                readable.clear()
                stopping = self._stopped.is_set()
                frames = self._tap.read(READ_FRAMES)
                if frames:
                    for piece in pcapng.in_pieces(self._encode(frames)):
                        yield piece
                elif stopping:
                    break
                else:
                    await self._wait(readable)
            yield self.statistics()
        finally:
            loop.remove_reader(self._tap.fd)
            self._tap.close()

    async def write_to(self, stream: BinaryIO) -> None:
        """Write all pieces to a file or pipe as they come.

        A reader that hangs up (BrokenPipeError) ends it.
        """
        # Closed here and now: an abandoned iterator would keep its tap until the garbage collector comes by.
        async with contextlib.aclosing(self.__aiter__()) as pieces:
            with contextlib.suppress(BrokenPipeError):
                async for piece in pieces:
                    await asyncio.to_thread(_write, stream, piece)

    def statistics(self) -> bytes:
        """The closing block of each interface."""
        now = time.time_ns()
        return b"".join(
            self._writer.statistics(
                interface.number,
                self._start_ns,
                now,
                received=interface.seen,
                lost=self._tap.lost if index == 0 else 0,
                delivered=interface.seen,
            )
            for index, interface in enumerate(self._interfaces.values())
        )

    def _encode(self, frames: list[CapturedFrame]) -> Iterator[bytes]:
        """The blocks of these sightings, as far as the packet limit allows."""
        for frame in frames:
            if self._finished():
                break
            yield self._encode_one(frame)

    def _finished(self) -> bool:
        return 0 < self._packet_limit <= self.packets

    async def _wait(self, readable: asyncio.Event) -> None:
        waits = [asyncio.ensure_future(event.wait()) for event in (readable, self._stopped)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _encode_one(self, frame: CapturedFrame) -> bytes:
        before = b""
        interface = self._interfaces.get(frame.port_id)
        if interface is None:
            name = self._port_name(frame.port_id)
            description = f"port {name} of switch {self._switch}" if self._switch else f"port {name}"
            number, before = self._writer.interface(name, description, snaplen=self._snaplen)
            interface = self._interfaces[frame.port_id] = _Interface(number)
        interface.seen += 1
        self.packets += 1
        dropped = frame.drop_reason is not None
        self.drops += dropped
        lost, self._lost_told = self._tap.lost - self._lost_told, self._tap.lost
        data, length = _with_tag(frame)
        return before + self._writer.packet(
            interface.number,
            frame.timestamp_ns,
            data,
            length,
            flags=_flags(frame),
            packet_id=frame.packet_id,
            queue=frame.queue,
            verdict=frame.drop_reason,
            lost=lost,
            comment=_comment(frame),
        )


def _with_tag(frame: CapturedFrame) -> tuple[bytes, int]:
    """The frame as on a wire: a tag that travels beside it is put in."""
    if frame.vlan_tci is None or len(frame.data) < 12:
        return frame.data, frame.original_length
    tag = b"\x81\x00" + frame.vlan_tci.to_bytes(2, "big")
    return frame.data[:12] + tag + frame.data[12:], frame.original_length + 4


def _flags(frame: CapturedFrame) -> int:
    flags = pcapng.DIRECTION_INBOUND if frame.direction == "in" else pcapng.DIRECTION_OUTBOUND
    flags |= pcapng.reception(frame.data[:6])
    if frame.offload.checksum is Checksum.PARTIAL:
        flags |= pcapng.CHECKSUM_NOT_READY
    elif frame.offload.checksum is Checksum.GOOD:
        flags |= pcapng.CHECKSUM_VALID
    if frame.offload.mss:
        flags |= pcapng.TCP_SEGMENTATION
    return flags


def _comment(frame: CapturedFrame) -> str:
    if frame.drop_reason is None:
        return ""
    text = f"dropped: {frame.drop_reason.label} ({int(frame.drop_reason)})"
    if frame.dropped_by:
        text += f" by {frame.dropped_by}"
    return f"{text}: {frame.detail}" if frame.detail else text


def _write(stream: BinaryIO, piece: bytes) -> None:
    stream.write(piece)
    stream.flush()
