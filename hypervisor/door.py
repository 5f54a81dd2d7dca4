"""The host's end of a door: what serves the socket, and what it hands to the partition.

`DoorBackend` is the seam between the partition (this package) and whatever owns the sockets. `AsyncioDoors`
is the plain-Python backend; a native thread behind the same protocol does the same work off the event loop
and calls the same handler on it.

Life cycle: `open()` takes a connected SOCK_SEQPACKET socket and gives a `DoorLink`; the handler then gets
whole, checked messages in order, `door_closed()` exactly once at the end, and nothing after it. All handler
calls are made on the event loop, never from inside `send()`. Fairness: at most `frames_per_turn` frames of
one door per turn, `frames_per_second` on average; a door that sends more is simply read later.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from hypervisor.clock import Clock, SystemClock, Timer
from hypervisor.quotas import Quotas
from vswitch_wire import door
from vswitch_wire.errors import WireError

_log = logging.getLogger("hypervisor.door")

# The longest frame a guest may send: a header, two words, a text.
GUEST_FRAME_LIMIT = door.HEADER_SIZE + 8 + door.MAX_TEXT
_ANCILLARY = socket.CMSG_SPACE(4 * (door.MAX_REGIONS + 1))


class DoorHandler(Protocol):
    """A partition, as its door sees it."""

    def door_message(self, sequence: int, message: door.DoorMessage, fds: list[int]) -> None:
        """One checked message; the handler owns the descriptors.

        WireError closes the door with ERROR MALFORMED.
        """

    def door_closed(self, reason: str) -> None:
        """The connection is over: end of file, an error on either side, or `close()`."""


class DoorLink(Protocol):
    """One open connection."""

    @property
    def closed(self) -> bool:
        """Whether `door_closed` was or will be called."""

    def send(self, message: door.DoorMessage, sequence: int = 0, fds: Sequence[int] = ()) -> None:
        """Queue a frame; never blocks. `fds` stay the caller's and may be closed at once.

        Ignored once closed.
        """

    def expect_fds(self, count: int) -> None:
        """How many descriptors the next frame may carry; 0 (the default) makes the kernel discard any."""

    def hold(self, held: bool) -> None:
        """Stop reading the guest's frames, or go on."""

    def close(self, reason: str, code: door.ErrorCode | None = None) -> None:
        """Send ERROR if a code is given, then close."""


class DoorBackend(Protocol):
    """Owner of all doors of one hypervisor."""

    def open(self, sock: socket.socket, name: str, handler: DoorHandler, quotas: Quotas) -> DoorLink:
        """Serve a connected socket, which is the backend's from now on."""

    async def close(self) -> None:
        """Close every door."""


class AsyncioDoors:
    """Serves all doors on the running event loop."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._links: set[AsyncioDoorLink] = set()

    def open(self, sock: socket.socket, name: str, handler: DoorHandler, quotas: Quotas) -> AsyncioDoorLink:
        """Serve `sock`."""
        link = AsyncioDoorLink(sock, name, handler, quotas, self._clock, self._links)
        self._links.add(link)
        return link

    async def close(self) -> None:
        """Close every door with GONE."""
        for link in list(self._links):
            link.close("the host is shutting down", door.ErrorCode.GONE)
        await asyncio.sleep(0)


class _Bucket:
    """Tokens at a rate, up to a burst."""

    def __init__(self, rate: int, burst: int, clock: Clock) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._tokens = float(burst)
        self._at = clock.now_ns()

    def take(self) -> float:
        """0.0 and one token gone, or the seconds until there is one."""
        now = self._clock.now_ns()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate / 1e9)
        self._at = now
        if self._tokens >= 1:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) / self._rate

    def put_back(self) -> None:
        """Nothing was there to be taken."""
        self._tokens += 1


class AsyncioDoorLink:
    """One door on the event loop."""

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        handler: DoorHandler,
        quotas: Quotas,
        clock: Clock,
        links: set[AsyncioDoorLink],
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._name = name
        self._handler = handler
        self._quotas = quotas
        self._clock = clock
        self._links = links
        self._loop = asyncio.get_running_loop()
        self._backlog: deque[tuple[bytes, list[int]]] = deque()
        self._bucket = _Bucket(quotas.frames_per_second, quotas.frames_burst, clock)
        self._throttle: Timer | None = None
        self._held = False
        self._reading = False
        self._fds_expected = 0
        self.closed = False
        self.frames_in = 0
        self.frames_out = 0
        self.throttled = 0
        self._update_reader()

    def send(self, message: door.DoorMessage, sequence: int = 0, fds: Sequence[int] = ()) -> None:
        """Send now if the socket takes it, else queue; the descriptors of a queued frame are duplicated."""
        if self.closed:
            return
        frame = door.pack(message, sequence)
        if not self._backlog and self._try_send(frame, fds):
            return
        if self.closed:
            return
        if len(self._backlog) >= self._quotas.send_limit:
            self._drop(f"the guest has not taken {len(self._backlog)} frames")
            return
        self._backlog.append((frame, [os.dup(fd) for fd in fds]))
        if len(self._backlog) == 1:
            self._loop.add_writer(self._sock, self._writable)
        self._update_reader()

    def expect_fds(self, count: int) -> None:
        """Let the next frame carry up to `count` descriptors."""
        self._fds_expected = count

    def hold(self, held: bool) -> None:
        """Stop or resume reading."""
        self._held = held
        self._update_reader()

    def close(self, reason: str, code: door.ErrorCode | None = None) -> None:
        """Close; an ERROR frame is sent only if the socket takes it now."""
        if self.closed:
            return
        if code is not None and not self._backlog:
            self._try_send(door.pack(door.DoorError(code, reason)), ())
        self._drop(reason)

    def _try_send(self, frame: bytes, fds: Sequence[int]) -> bool:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._sock.sendmsg([frame], ancillary, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self._drop(f"the guest's side is gone ({error.strerror})")
            return False
        self.frames_out += 1
        return True

    def _writable(self) -> None:
        while self._backlog and not self.closed:
            frame, fds = self._backlog[0]
            if not self._try_send(frame, fds):
                return
            self._backlog.popleft()
            for fd in fds:
                os.close(fd)
        if not self.closed:
            self._loop.remove_writer(self._sock)
            self._update_reader()

    def _update_reader(self) -> None:
        wanted = not (
            self.closed
            or self._held
            or self._throttle is not None
            or len(self._backlog) >= self._quotas.send_backlog
        )
        if wanted and not self._reading:
            self._loop.add_reader(self._sock, self._readable)
        elif not wanted and self._reading:
            self._loop.remove_reader(self._sock)
        self._reading = wanted

    def _readable(self) -> None:
        for _ in range(self._quotas.frames_per_turn):
            # The handler may hold or close this door in the middle of a turn.
            if not self._reading:
                return
            delay = self._bucket.take()
            if delay:
                self.throttled += 1
                # At least a millisecond, so that a flood costs timers at that rate and no more.
                self._throttle = self._clock.call_later(max(delay, 0.001), self._unthrottle)
                self._update_reader()
                return
            if not self._receive():
                return

    def _unthrottle(self) -> None:
        self._throttle = None
        self._update_reader()

    def _receive(self) -> bool:
        room = _ANCILLARY if self._fds_expected else 0
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                GUEST_FRAME_LIMIT, room, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            self._bucket.put_back()
            return False
        except OSError as error:
            self._drop(f"the guest's side is gone ({error.strerror})")
            return False
        fds: list[int] = []
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                fds.extend(received)
        if not data:
            _close_all(fds)
            self._drop("the guest's side closed the door")
            return False
        self.frames_in += 1
        handed_over = False
        try:
            if flags & socket.MSG_TRUNC:
                raise WireError(f"door frame: longer than the {GUEST_FRAME_LIMIT} bytes a guest may send")
            if flags & socket.MSG_CTRUNC or len(fds) > self._fds_expected:
                raise WireError("door frame: carries descriptors that its type does not have")
            sequence, message = door.decode(data)
            if message.TYPE not in door.GUEST_TO_HOST:
                raise WireError(f"{message.TYPE.name}: this frame goes from host to guest only")
            if isinstance(message, door.DoorError):
                self._drop(f"the guest's side reported error {message.code}: {message.text}")
                return False
            self._fds_expected = 0
            handed_over = True
            self._handler.door_message(sequence, message, fds)
        except door.Unsupported as error:
            self.close(str(error), door.ErrorCode.UNSUPPORTED)
        except WireError as error:
            self.close(str(error), door.ErrorCode.MALFORMED)
        except Exception as error:
            _log.exception("partition %s: door message failed", self._name)
            self.close(f"the host failed on a frame ({type(error).__name__})", door.ErrorCode.INTERNAL)
        finally:
            if not handed_over:
                _close_all(fds)
        return not self.closed

    def _drop(self, reason: str) -> None:
        if self.closed:
            return
        self.closed = True
        self._links.discard(self)
        if self._throttle is not None:
            self._throttle.cancel()
            self._throttle = None
        self._loop.remove_writer(self._sock)
        self._update_reader()
        self._sock.close()
        for _, fds in self._backlog:
            _close_all(fds)
        self._backlog.clear()
        self._loop.call_soon(self._handler.door_closed, reason)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
