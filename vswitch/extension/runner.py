"""`python -m vswitch.extension.runner`: the process that runs one extension.

Started by `vswitch.extension.host` with the source on its standard input and four descriptors named on the
command line: the upcall memfd, its request and reply eventfds, and the control socket. It makes its
namespaces, forks the process that will run the extension (PID 1 inside), and remains as that one's parent
to pass on how it ended; when the host goes away it kills it. The child confines itself, runs the file, and
answers upcalls until killed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import traceback

from vswitch.extension import control, sandbox
from vswitch.extension.loader import ExtensionLoadError, describe, load
from vswitch.extension.packet import Packet
from vswitch.extension.plugin import Extension, judge, passes_of, watch_staleness
from vswitch.upcall import (
    REPLY_OFFSET,
    REQUEST_OFFSET,
    RING_BYTES,
    VERDICT_ALLOW,
    VERDICT_DROP,
    VERDICT_ERROR,
    UpcallReply,
    UpcallRequest,
)
from vswitch_confine import ConfinementRefused, limits, namespaces
from vswitch_wire import packet as ring_packet
from vswitch_wire.memory import GuestMemory, Region, drain_fd, signal_fd
from vswitch_wire.ring import RingReader, RingWriter

_PAGE = 4096
_FULL_RING_PAUSE_MS = 20


class Upcalls:
    """The process's end of the upcall channel: takes requests, gives replies."""

    def __init__(self, memfd: int, request_fd: int, reply_fd: int) -> None:
        self._request_fd = request_fd
        self._reply_fd = reply_fd
        size = 2 * RING_BYTES
        self._memory = GuestMemory([Region(0, size, memfd)])
        os.close(memfd)
        pages = range(size // _PAGE)
        self._reader = RingReader(self._memory.view(list(pages), REQUEST_OFFSET, RING_BYTES))
        self._writer = RingWriter(self._memory.view(list(pages), REPLY_OFFSET, RING_BYTES))
        self._poll = select.poll()
        self._poll.register(request_fd, select.POLLIN)

    def serve(self, extension: Extension, file_name: str) -> None:
        """Answer for ever. RingError and UpcallError end the process: then the switch itself is broken."""
        while True:
            self._poll.poll()
            drain_fd(self._request_fd)
            while packets := self._reader.read():
                for data in packets:
                    request = ring_packet.decode(data)
                    reply = answer(extension, file_name, UpcallRequest.decode(request.payload))
                    self._reply(ring_packet.encode_completion(request.transaction_id, reply.pack()))
                if self._reader.commit():
                    signal_fd(self._reply_fd)

    def _reply(self, data: bytes) -> None:
        while not self._writer.write(data):
            self._poll.poll(_FULL_RING_PAUSE_MS)
            drain_fd(self._request_fd)
        if self._writer.commit():
            signal_fd(self._reply_fd)


def answer(extension: Extension, file_name: str, request: UpcallRequest) -> UpcallReply:
    """Judge one frame. What the extension raises becomes verdict error with file, line and exception."""
    packet = Packet(request)
    try:
        verdict = judge(extension, request.egress, packet)
        ttl_ms = 0 if verdict.ttl is None else max(1, min(int(verdict.ttl * 1000), 0xFFFFFFFF))
        return UpcallReply(
            verdict=VERDICT_DROP if verdict.dropped else VERDICT_ALLOW,
            fields=packet.fields_read,
            cacheable=packet.may_be_cached(verdict),
            ttl_ms=ttl_ms,
            reason=verdict.reason,
        )
    except Exception as error:
        return UpcallReply(VERDICT_ERROR, reason=describe(error, file_name))


def run(arguments: dict[str, object], connection: socket.socket, missing: str) -> None:
    """The child: confine, load, serve. Does not return unless the extension cannot be loaded."""
    file_name = str(arguments["file_name"])
    source = sys.stdin.buffer.read()
    upcalls = Upcalls(*(int(str(arguments[name])) for name in ("memfd", "request_fd", "reply_fd")))
    try:
        cage = sandbox.confine(missing)
    except ConfinementRefused as error:
        control.send(connection, {"error": f"the extension's process cannot be confined: {error}"})
        return
    try:
        extension = load(source, file_name)
    except ExtensionLoadError as error:
        control.send(connection, {"error": str(error)})
        return
    watch_staleness(lambda attribute: control.send(connection, {"stale": attribute}))
    ready = {
        "class": type(extension).__name__,
        "kind": extension.kind,
        "passes": sorted(passes_of(type(extension))),
        "layers": cage.layers,
        "missing": cage.missing,
    }
    control.send(connection, {"ready": ready})
    upcalls.serve(extension, file_name)


def wait_for(child: int, connection: socket.socket) -> int:
    """Wait until the child ends; kill it when the host's end of the control socket closes.

    Its exit status.
    """
    pidfd = os.pidfd_open(child)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(connection, 0)
    if any(fd == connection.fileno() for fd, _ in poll.poll()):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def main() -> None:
    """Entry point; the one argument is a JSON object with file_name and the descriptors."""
    arguments = json.loads(sys.argv[1])
    connection = socket.socket(fileno=int(arguments["control_fd"]))
    descriptors = [int(arguments[name]) for name in ("memfd", "request_fd", "reply_fd", "control_fd")]
    limits.close_all_but(descriptors)
    missing = sandbox.enter_namespaces()
    told, telling = os.pipe()
    child = namespaces.fork_first()
    if child:
        control.send(connection, {"pid": child})
        # Now the child may speak: what it says before the host knows of it is out of turn.
        os.close(telling)
        os.close(told)
        sys.exit(wait_for(child, connection))
    os.close(telling)
    os.read(told, 1)
    os.close(told)
    try:
        run(arguments, connection, missing)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
