"""A switch port whose other side is Python code in this process: two bounded queues with an eventfd each.

Used where a program wants to be a host on the switch: the scapy socket, frames replayed from a file, tests.
"""

from __future__ import annotations

import os
from collections import deque
from typing import Protocol

from vswitch.drops import DropReason
from vswitch.endpoint import Checksum, Frame, Offload
from vswitch.engine import MAX_FRAME_BYTES
from vswitch_wire.engine import Engine, check_engine
from vswitch_wire.memory import drain_fd, signal_fd

__all__ = ["InProcessEndpoint", "NativeQueueEndpoint", "PythonQueueEndpoint", "make_endpoint"]

DEFAULT_LIMIT = 4096


class InProcessEndpoint(Protocol):
    """What `make_endpoint` gives for either engine."""

    @property
    def endpoint(self) -> object:
        """What `Datapath.attach` takes."""
        ...

    @property
    def fd(self) -> int:
        """Readable while frames from the switch wait."""
        ...

    def send(self, frame: Frame | bytes) -> bool:
        """Gives a frame to the switch; False = the queue is full. ValueError for more than 65553 bytes."""
        ...

    def received(self) -> list[Frame]:
        """Takes all frames that the switch delivered since the last call."""
        ...

    def close(self) -> None:
        """Closes the fds; call it after `detach`."""
        ...


class PythonQueueEndpoint:
    """For the Python engine: is its own endpoint (`vswitch.endpoint.Endpoint`)."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        """`limit` frames wait in each direction at most."""
        self._limit = limit
        self._to_switch: deque[Frame] = deque()
        self._from_switch: deque[Frame] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ready = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._unsignalled = False

    @property
    def endpoint(self) -> object:
        return self

    @property
    def fd(self) -> int:
        return self._ready

    def send(self, frame: Frame | bytes) -> bool:
        _check(frame)
        if len(self._to_switch) >= self._limit:
            return False
        self._to_switch.append(frame if isinstance(frame, Frame) else Frame(bytes(frame)))
        signal_fd(self._wake)
        return True

    def received(self) -> list[Frame]:
        drain_fd(self._ready)
        frames = list(self._from_switch)
        self._from_switch.clear()
        return frames

    def close(self) -> None:
        for fd in (self._wake, self._ready):
            os.close(fd)

    # The switch's side:

    @property
    def wake_fd(self) -> int:
        return self._wake

    def receive(self, limit: int) -> list[Frame]:
        return [self._to_switch.popleft() for _ in range(min(limit, len(self._to_switch)))]

    def take_drops(self) -> dict[DropReason, int]:
        return {}

    def transmit(self, frame: Frame) -> DropReason | None:
        if len(self._from_switch) >= self._limit:
            return DropReason.RESOURCES
        self._from_switch.append(frame)
        self._unsignalled = True
        return None

    def flush(self) -> None:
        if self._unsignalled:
            self._unsignalled = False
            signal_fd(self._ready)

    def rearm(self) -> bool:
        return bool(self._to_switch)


class NativeQueueEndpoint:
    """For the native engine: the queues are native, so that the worker never waits for Python."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        from vswitch_native import switch as native

        self._queue = native.QueueEndpoint(limit)

    @property
    def endpoint(self) -> object:
        return self._queue.handle()

    @property
    def fd(self) -> int:
        return self._queue.fd

    def send(self, frame: Frame | bytes) -> bool:
        _check(frame)
        if isinstance(frame, Frame):
            offload = (
                int(frame.offload.checksum),
                frame.offload.ip_checksum,
                frame.offload.l4_offset,
                frame.offload.mss,
            )
            return self._queue.send(bytes(frame.data), offload, frame.vlan_tci, frame.hash)
        return self._queue.send(bytes(frame))

    def received(self) -> list[Frame]:
        return [
            Frame(data, Offload(Checksum(checksum), ip_checksum, l4_offset, mss), vlan_tci, hash)
            for data, (checksum, ip_checksum, l4_offset, mss), vlan_tci, hash in self._queue.received()
        ]

    def close(self) -> None:
        """The fds close with the last of both sides."""


def _check(frame: Frame | bytes) -> None:
    length = len(frame.data if isinstance(frame, Frame) else frame)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes, at most {MAX_FRAME_BYTES} are possible")


def make_endpoint(engine: Engine, limit: int = DEFAULT_LIMIT) -> InProcessEndpoint:
    """An endpoint for `engine`; `limit` frames wait in each direction at most."""
    return PythonQueueEndpoint(limit) if check_engine(engine) == "python" else NativeQueueEndpoint(limit)
