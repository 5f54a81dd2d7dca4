"""The native end of the doors: one Rust thread owns every socket, checks frames and keeps quotas.

`NativeDoors` is the `DoorBackend` of the native engine. Frames reach the event loop whole and checked,
through an eventfd; what a frame means is decided by the same handler as behind `AsyncioDoors`, with the same
answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hypervisor.door import DoorHandler
from hypervisor.quotas import Quotas
from vswitch_wire import door
from vswitch_wire.errors import WireError

if TYPE_CHECKING:
    from vswitch_native.door import Doors

_log = logging.getLogger("hypervisor.door")
EVENTS_PER_TURN = 128
"""Frames of all doors worked off in one turn of the event loop."""


class NativeDoors:
    """Serves all doors on a native thread; handlers run on the event loop that made this."""

    def __init__(self) -> None:
        from vswitch_native.door import Doors

        self._loop = asyncio.get_running_loop()
        self._doors: Doors = Doors()
        self._links: dict[int, NativeDoorLink] = {}
        self._waiting: deque[tuple[int, bytes, list[int]] | tuple[int, None, str]] = deque()
        self._scheduled = False
        self._all_closed = asyncio.Event()
        self._loop.add_reader(self._doors.event_fd, self._wake)

    def open(self, sock: socket.socket, name: str, handler: DoorHandler, quotas: Quotas) -> NativeDoorLink:
        """Serve `sock`."""
        sock.setblocking(False)
        number = self._doors.open(
            sock.detach(),
            frames_per_turn=quotas.frames_per_turn,
            frames_per_second=quotas.frames_per_second,
            frames_burst=quotas.frames_burst,
            send_backlog=quotas.send_backlog,
            send_limit=quotas.send_limit,
        )
        link = NativeDoorLink(self._doors, number, name, handler)
        self._links[number] = link
        return link

    async def close(self) -> None:
        """Close every door with GONE, wait until their handlers know, and end the thread."""
        for link in list(self._links.values()):
            link.close("the host is shutting down", door.ErrorCode.GONE)
        self._all_closed.clear()
        while self._links:
            await self._all_closed.wait()
            self._all_closed.clear()
        self._loop.remove_reader(self._doors.event_fd)
        self._doors.stop()

    def _wake(self) -> None:
        self._waiting.extend(self._doors.take())
        if not self._scheduled:
            self._work()

    def _work(self) -> None:
        """A bounded share of what waits; the rest after the loop's other business."""
        self._scheduled = False
        for _ in range(min(EVENTS_PER_TURN, len(self._waiting))):
            self._one(*self._waiting.popleft())
        if self._waiting:
            self._scheduled = True
            self._loop.call_soon(self._work)

    def _one(self, number: int, data: bytes | None, rest: list[int] | str) -> None:
        link = self._links.get(number)
        if isinstance(rest, str):
            if link is not None:
                del self._links[number]
                link.ended(rest)
            if not self._links:
                self._all_closed.set()
        elif link is None or data is None:
            _close_all(rest)
        else:
            link.arrived(data, rest)


class NativeDoorLink:
    """One door, as its partition sees it."""

    def __init__(self, doors: Doors, number: int, name: str, handler: DoorHandler) -> None:
        self._doors = doors
        self._number = number
        self._name = name
        self._handler = handler
        self._held = False
        self._kept: deque[tuple[bytes, list[int]]] = deque()
        self.closed = False
        self.frames_in = 0
        self.frames_out = 0

    def send(self, message: door.DoorMessage, sequence: int = 0, fds: Sequence[int] = ()) -> None:
        """Queue a frame; the descriptors are duplicated at once."""
        if not self.closed:
            self.frames_out += 1
            self._doors.send(self._number, door.pack(message, sequence), fds)

    def expect_fds(self, count: int) -> None:
        """Let the next frame carry up to `count` descriptors."""
        self._doors.expect_fds(self._number, count)

    def hold(self, held: bool) -> None:
        """Stop or resume reading; frames that the thread had read already are kept meanwhile."""
        self._held = held
        self._doors.hold(self._number, held)
        if not held and self._kept:
            asyncio.get_running_loop().call_soon(self._release)

    def close(self, reason: str, code: door.ErrorCode | None = None) -> None:
        """Close; an ERROR frame is sent only if the socket takes it at once."""
        if not self.closed:
            self.closed = True
            self._drop_kept()
            self._doors.close(self._number, reason, None if code is None else int(code))

    def arrived(self, data: bytes, fds: list[int]) -> None:
        """A frame from the thread."""
        if self.closed:
            _close_all(fds)
        elif self._held or self._kept:
            self._kept.append((data, fds))
        else:
            self._handle(data, fds)

    def ended(self, reason: str) -> None:
        """The thread let go of the socket."""
        self.closed = True
        self._drop_kept()
        self._handler.door_closed(reason)

    def _release(self) -> None:
        while self._kept and not self._held and not self.closed:
            self._handle(*self._kept.popleft())

    def _handle(self, data: bytes, fds: list[int]) -> None:
        self.frames_in += 1
        self._doors.consumed(self._number, 1)
        handed_over = False
        try:
            sequence, message = door.decode(data)
            handed_over = True
            self._handler.door_message(sequence, message, fds)
        except WireError as error:
            self.close(str(error), door.ErrorCode.MALFORMED)
        except Exception as error:
            _log.exception("partition %s: door message failed", self._name)
            self.close(f"the host failed on a frame ({type(error).__name__})", door.ErrorCode.INTERNAL)
        finally:
            if not handed_over:
                _close_all(fds)

    def _drop_kept(self) -> None:
        for _, fds in self._kept:
            _close_all(fds)
        self._kept.clear()


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
