"""The guest's end of the door (docs/door.md).

Accept, HELLO, hypercalls and MSRs, frames for the agent, loss and resume.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from vswitch_wire import door, hypercall
from vswitch_wire.engine import Engine, memory_class
from vswitch_wire.errors import WireError
from vswitch_wire.memory import GuestMemory, Region

_log = logging.getLogger("netvsc.door")

Handler = Callable[[int, Any, list[int]], None]
"""(sequence, message, descriptors): called on the loop; the descriptors are the handler's to close."""

_ANCILLARY = socket.CMSG_SPACE(4 * (door.MAX_REGIONS + door.MAX_VPS))
_EOPNOTSUPP = 95


class DoorLostError(ConnectionError):
    """The door closed; what waited for an answer does not get one."""


class DoorClient:
    """The guest's side of one partition's door. All methods on the event loop.

    `accept()` waits for the host; after a loss (`on_lost`) call it again. Memory and descriptors of the
    regions are kept over a resume.
    """

    def __init__(self, listener: socket.socket, *, engine: Engine = "python") -> None:
        """`listener` is the inherited listening socket, this object's from now on."""
        listener.setblocking(False)
        self._listener = listener
        self._engine: Engine = engine
        self._sock: socket.socket | None = None
        self._loop = asyncio.get_running_loop()
        self._sequence = 0
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._backlog: deque[tuple[bytes, list[int]]] = deque()
        self._fds: list[int] = []
        self._memory: GuestMemory | None = None
        self._parked = False
        self._held: list[door.Deliver] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.regions: tuple[door.RegionEntry, ...] = ()
        self.interrupts: list[int] = []
        """One eventfd per VP; new ones after every resume."""
        self.partition_id = 0
        self.vp_count = 0
        self.privileges = 0
        self.handlers: dict[door.FrameType, Handler] = {}
        self.on_lost: list[Callable[[str], None]] = []
        self.on_resumed: list[Callable[[], None]] = []
        self.on_replaced: list[Callable[[], None]] = []
        """A fresh HELLO is replacing partition and memory: whoever works on the old ones stops.

        Emptied each time.
        """
        self.on_park: list[Callable[[], Awaitable[None]]] = []
        self.on_resume: list[Callable[[], None]] = []
        self.on_deliver: Callable[[door.Deliver], None] = lambda message: None
        self.on_eventfd: Callable[[int, int | None], None] = _drop_eventfd

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] = os.environ, *, engine: Engine = "python"
    ) -> DoorClient:
        """The door that VSWITCH_DOOR_FD names. RuntimeError when it is not there."""
        text = environment.get("VSWITCH_DOOR_FD", "")
        try:
            return cls(socket.socket(fileno=int(text)), engine=engine)
        except (ValueError, OSError) as error:
            raise RuntimeError(
                f"VSWITCH_DOOR_FD is {text!r}, not an inherited listening socket ({error});"
                " guests are started by the daemon"
            ) from None

    @property
    def memory(self) -> GuestMemory:
        """The partition's memory. DoorLostError before the first HELLO."""
        if self._memory is None:
            raise DoorLostError("no HELLO has come yet: there is no memory")
        return self._memory

    @property
    def connected(self) -> bool:
        """Whether the door is open."""
        return self._sock is not None

    async def accept(self) -> bool:
        """Wait until a host has connected and greeted.

        True: a resume, memory is as it was; False: a fresh partition.
        """
        while True:
            sock, _ = await self._loop.sock_accept(self._listener)
            sock.setblocking(False)
            try:
                resumed = await self._greet(sock)
            except (WireError, OSError) as error:
                _log.warning("a connection to the door came to nothing: %s", error)
                code = door.ErrorCode.RESUME if isinstance(error, _NotResumable) else door.ErrorCode.MALFORMED
                with contextlib.suppress(OSError):
                    frame = door.pack(door.DoorError(code, str(error)))
                    sock.send(frame, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
                sock.close()
                continue
            except BaseException:
                sock.close()
                raise
            self._sock = sock
            self._parked = False
            self._held.clear()
            self._loop.add_reader(sock, self._readable)
            if resumed:
                for callback in list(self.on_resumed):
                    callback()
            return resumed

    async def _greet(self, sock: socket.socket) -> bool:
        sequence, message, fds = await self._first(sock)
        taken = False
        try:
            if not isinstance(message, door.Hello):
                raise WireError(f"{message.TYPE.name} came before HELLO")
            if len(fds) != door.fds_expected(message):
                raise WireError(f"HELLO: {len(fds)} descriptors, {door.fds_expected(message)} expected")
            if not message.version_min <= door.DOOR_VERSION <= message.version_max:
                raise WireError(f"HELLO: the host speaks {message.version_min}..{message.version_max}, not 1")
            resume = bool(message.flags & door.HelloFlags.RESUME)
            if resume:
                mine = (self.partition_id, self.regions)
                if self._memory is None or (message.partition_id, message.regions) != mine:
                    raise _NotResumable("this guest's side does not have that partition's memory")
                interrupts = fds
            else:
                interrupts = fds[len(message.regions) :]
                self._adopt(message, fds[: len(message.regions)])
            taken = True
            _close_all(self.interrupts)
            self.interrupts = interrupts
            frame = door.pack(door.HelloAck(door.DOOR_VERSION, message.flags), sequence)
            if resume:
                socket.send_fds(sock, [frame], self._fds, socket.MSG_NOSIGNAL)
            else:
                sock.send(frame, socket.MSG_NOSIGNAL)
            return resume
        finally:
            if not taken:
                _close_all(fds)

    def _adopt(self, hello: door.Hello, fds: list[int]) -> None:
        regions = [Region(entry.gpa, entry.size, fd) for entry, fd in zip(hello.regions, fds, strict=True)]
        memory = memory_class(self._engine)(regions)
        replaced, self.on_replaced = self.on_replaced, []
        for callback in replaced:
            callback()
        if self._memory is not None:
            self._memory.close()
        _close_all(self._fds)
        self._memory, self._fds = memory, fds
        self.regions = hello.regions
        self.partition_id, self.vp_count = hello.partition_id, hello.vp_count
        self.privileges = hello.privileges

    async def _first(self, sock: socket.socket) -> tuple[int, door.DoorMessage, list[int]]:
        readable: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(sock, lambda: None if readable.done() else readable.set_result(None))
        try:
            await readable
        finally:
            self._loop.remove_reader(sock)
        received = _receive(sock)
        if received is None:
            raise ConnectionResetError("the host went away before its HELLO")
        return received

    # --- frames from the host ---

    def _readable(self) -> None:
        for _ in range(64):
            if self._sock is None:
                return
            try:
                received = _receive(self._sock)
            except BlockingIOError:
                return
            except (WireError, OSError) as error:
                self._lose(str(error))
                return
            if received is None:
                self._lose("the host closed the door")
                return
            sequence, message, fds = received
            try:
                if len(fds) != door.fds_expected(message):
                    raise WireError(f"{message.TYPE.name}: {len(fds)} descriptors")
                self._handle(sequence, message, fds)
            except WireError as error:
                self._fail(str(error))

    def _handle(self, sequence: int, message: door.DoorMessage, fds: list[int]) -> None:
        if isinstance(message, door.HypercallResult | door.MsrResult):
            waiting = self._waiting.pop(sequence, None)
            if waiting is None:
                raise WireError(f"{message.TYPE.name}: nothing waits for answer {sequence}")
            if not waiting.done():
                waiting.set_result(message)
        elif isinstance(message, door.Deliver):
            if self._parked:
                self._held.append(message)
            else:
                self.on_deliver(message)
        elif isinstance(message, door.EventFd):
            self.on_eventfd(message.connection_id, fds[0] if fds else None)
        elif isinstance(message, door.Park):
            self._spawn(self._park(sequence))
        elif isinstance(message, door.Resume):
            self._unpark()
        elif isinstance(message, door.DoorError):
            self._lose(f"the host reported error {message.code}: {message.text}")
        elif message.TYPE in self.handlers:
            self.handlers[message.TYPE](sequence, message, fds)
        else:
            _close_all(fds)
            self._without_agent(sequence, message)

    def _without_agent(self, sequence: int, message: door.DoorMessage) -> None:
        text = "this guest has no agent for that"
        if isinstance(message, door.Configure):
            self.send(door.Configured(_EOPNOTSUPP, text), sequence)
        elif isinstance(message, door.Exec):
            self.send(door.ExecStarted(_EOPNOTSUPP, 0, text), sequence)
        elif isinstance(message, door.Shutdown):
            self._lose("the host asked this guest to end")
        elif not isinstance(message, door.Kill):
            raise WireError(f"{message.TYPE.name}: not a frame from the host, or at the wrong time")

    async def _park(self, sequence: int) -> None:
        for callback in list(self.on_park):
            await callback()
        self._parked = True
        self.send(door.Parked(), sequence)

    def _unpark(self) -> None:
        if not self._parked:
            return
        self._parked = False
        for callback in list(self.on_resume):
            callback()
        held, self._held = self._held, []
        for message in held:
            self.on_deliver(message)

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- frames to the host ---

    def send(self, message: door.DoorMessage, sequence: int = 0, fds: Sequence[int] = ()) -> None:
        """Queue a frame; `fds` stay the caller's. DoorLostError when the door is closed."""
        if self._sock is None:
            raise DoorLostError("the door is closed")
        frame = door.pack(message, sequence)
        if not self._backlog and self._try_send(self._sock, frame, fds):
            return
        if self._sock is None:
            raise DoorLostError("the door is closed")
        self._backlog.append((frame, [os.dup(fd) for fd in fds]))
        self._loop.add_writer(self._sock, self._writable)

    def _try_send(self, sock: socket.socket, frame: bytes, fds: Sequence[int]) -> bool:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sock.sendmsg([frame], ancillary, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self._lose(f"the host is gone ({error.strerror})")
            return False
        return True

    def _writable(self) -> None:
        while self._sock is not None and self._backlog:
            frame, fds = self._backlog[0]
            if not self._try_send(self._sock, frame, fds):
                return
            self._backlog.popleft()
            _close_all(fds)
        if self._sock is not None:
            self._loop.remove_writer(self._sock)

    async def _ask(self, message: door.DoorMessage) -> Any:
        self._sequence = self._sequence % 0xFFFFFFFF + 1
        sequence = self._sequence
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._waiting[sequence] = answer
        try:
            self.send(message, sequence)
        except DoorLostError:
            self._waiting.pop(sequence, None)
            raise
        return await answer

    async def hypercall(
        self, code: int, *, vp: int = 0, fast: bool = False, rdx: int = 0, r8: int = 0
    ) -> door.HypercallResult:
        """Make a simple hypercall: RDX and R8 are GPAs, or the input itself when fast. DoorLostError."""
        control = hypercall.ControlWord(code, fast).pack()
        result = await self._ask(door.Hypercall(vp, control, rdx, r8))
        assert isinstance(result, door.HypercallResult)
        return result

    async def write_msr(self, vp: int, msr: int, value: int) -> None:
        """WRMSR. PermissionError where hardware raises #GP; DoorLostError."""
        result = await self._ask(door.MsrWrite(vp, msr, value))
        if result.fault:
            raise PermissionError(f"writing {value:#x} to MSR {msr:#x} of virtual processor {vp} raises #GP")

    async def read_msr(self, vp: int, msr: int) -> int:
        """RDMSR. PermissionError where hardware raises #GP; DoorLostError."""
        result = await self._ask(door.MsrRead(vp, msr))
        if result.fault:
            raise PermissionError(f"reading MSR {msr:#x} of virtual processor {vp} raises #GP")
        return int(result.value)

    # --- the end ---

    def _fail(self, text: str) -> None:
        if self._sock is not None:
            with contextlib.suppress(OSError):
                error = door.DoorError(door.ErrorCode.MALFORMED, text)
                self._sock.send(door.pack(error), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        self._lose(text)

    def _lose(self, reason: str) -> None:
        sock, self._sock = self._sock, None
        if sock is None:
            return
        self._loop.remove_reader(sock)
        self._loop.remove_writer(sock)
        sock.close()
        for _, fds in self._backlog:
            _close_all(fds)
        self._backlog.clear()
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(DoorLostError(reason))
                # Whoever asked may have gone: then nobody looks.
                future.exception()
        for callback in list(self.on_lost):
            callback(reason)

    def close(self) -> None:
        """Close the door and give everything back."""
        self._lose("this guest's side closed the door")
        self._listener.close()
        _close_all(self.interrupts)
        self.interrupts = []
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        _close_all(self._fds)
        self._fds = []


class _NotResumable(WireError):
    """The host wants to resume a partition that this side does not have."""


def _receive(sock: socket.socket) -> tuple[int, door.DoorMessage, list[int]] | None:
    """One frame; None at the end. WireError with every descriptor closed."""
    data, ancillary, flags, _ = sock.recvmsg(
        door.MAX_FRAME + 1, _ANCILLARY, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if not data:
        _close_all(fds)
        return None
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise WireError("door frame: longer, or with more descriptors, than is allowed")
        sequence, message = door.decode(data)
        if message.TYPE not in door.HOST_TO_GUEST:
            raise WireError(f"{message.TYPE.name}: this frame goes from guest to host only")
    except WireError:
        _close_all(fds)
        raise
    return sequence, message, list(fds)


def _drop_eventfd(connection_id: int, fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
