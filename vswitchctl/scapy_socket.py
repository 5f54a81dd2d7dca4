"""A scapy socket on a port of a running switch: `PortSocket("s0/p1")` sends, sniffs and answers as any other.

    me = "02:00:00:00:00:99"
    who_has = Ether(src=me, dst="ff:ff:ff:ff:ff:ff") / ARP(hwsrc=me, psrc="10.0.0.99", pdst="10.0.0.1")
    with PortSocket("s0/me") as port:
        answer = port.sr1(who_has, timeout=2)

As an endpoint (the default) the socket is the port's NIC: the port must have none. As a monitor it stands
beside the NIC: it sees the port's frames in both directions, and what it sends enters the switch as if the
NIC had sent it. Importing this needs scapy: `pip install 'vswitch[scapy]'`.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

import grpc
from scapy.config import conf
from scapy.data import MTU
from scapy.layers.l2 import Ether
from scapy.packet import Packet
from scapy.supersocket import SuperSocket

from vswitch_api.v1 import port_pb2
from vswitchctl import names, transport
from vswitchctl.client import Client
from vswitchctl.errors import from_rpc_error

FRAMES_KEPT = 10_000
"""Frames that wait to be received; the oldest go first when nobody reads."""
OPEN_SECONDS = 10.0

Mode = Literal["endpoint", "monitor"]
_MODES = {"endpoint": port_pb2.PORT_IO_MODE_ENDPOINT, "monitor": port_pb2.PORT_IO_MODE_MONITOR}


class PortSocket(SuperSocket):
    """Frames in and out of one port. Errors of the daemon are `vswitchctl.errors.VswitchError`.

    One thread of its own receives; `send` and `recv` may be called from any.
    """

    desc = "frames of a port of a vswitch"

    def __init__(self, port: str, *, mode: Mode = "endpoint", client: Client | None = None) -> None:
        """Open `switch/port`; without `client` at this user's daemon."""
        self._own = client is None
        self._client = client or Client()
        self._requests: queue.SimpleQueue[port_pb2.PortIoRequest | None] = queue.SimpleQueue()
        self._frames: deque[tuple[bytes, float]] = deque(maxlen=FRAMES_KEPT)
        self._error: Exception | None = None
        self._opened = threading.Event()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.lost = 0
        """Frames that went because nobody read them."""
        self.promisc = True
        self.closed = False
        opening = port_pb2.PortIoOpen(port=names.port(port), mode=_MODES[mode])
        self._requests.put(port_pb2.PortIoRequest(open=opening))
        method: Any = self._client.channel.stream_stream(
            transport.path_of("PortService/PortIo"),
            request_serializer=port_pb2.PortIoRequest.SerializeToString,
            response_deserializer=port_pb2.PortIoResponse.FromString,
        )
        self._stream = method(self._outgoing())
        self._receiver = threading.Thread(target=self._receive, name=f"port {port}", daemon=True)
        self._receiver.start()
        if not self._opened.wait(OPEN_SECONDS) or self._error is not None:
            error = self._error or TimeoutError(f"port {port} was not opened within {OPEN_SECONDS:g} s")
            self.close()
            raise error

    def fileno(self) -> int:
        """Readable while frames wait, and when the stream has ended."""
        return self._wake

    def send(self, x: Any) -> int:
        """Send one frame, a scapy packet or bytes; its length.

        Raises what ended the stream, if something did.
        """
        if self._error is not None:
            raise self._error
        frame = bytes(x)
        if isinstance(x, Packet):
            x.sent_time = time.time()
        frames = port_pb2.PortIoFrames(frames=[port_pb2.Frame(data=frame)])
        self._requests.put(port_pb2.PortIoRequest(frames=frames))
        return len(frame)

    def recv_raw(self, x: int = MTU) -> tuple[type[Packet] | None, bytes | None, float | None]:
        """The next frame, waiting for it; (None, None, None) when the stream has ended."""
        while True:
            if self._frames:
                data, moment = self._frames.popleft()
                return conf.l2types.num2layer.get(1, Ether), data[:x], moment
            if self._error is not None or self.closed:
                return None, None, None
            self._wait()

    @staticmethod
    def select(sockets: list[SuperSocket], remain: float | None = None) -> list[SuperSocket]:
        """The sockets of which one can receive now; waits `remain` seconds at most."""
        ready: list[SuperSocket] = [
            s for s in sockets if isinstance(s, PortSocket) and (s._frames or s._error is not None)
        ]
        if ready:
            return ready
        for found in SuperSocket.select(sockets, remain):
            if isinstance(found, PortSocket):
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(found._wake)
                if found._frames or found._error is not None:
                    ready.append(found)
            else:
                ready.append(found)
        return ready

    def close(self) -> None:
        """End the stream; as an endpoint the port has no NIC from then on."""
        if self.closed:
            return
        self.closed = True
        self._requests.put(None)
        self._stream.cancel()
        self._receiver.join(OPEN_SECONDS)
        os.close(self._wake)
        if self._own:
            self._client.close()

    def _outgoing(self) -> Iterator[port_pb2.PortIoRequest]:
        while (request := self._requests.get()) is not None:
            yield request

    def _receive(self) -> None:
        try:
            for response in self._stream:
                if response.WhichOneof("message") == "opened":
                    self._opened.set()
                moment = time.time()
                for frame in response.frames.frames:
                    self.lost += len(self._frames) == FRAMES_KEPT
                    self._frames.append((frame.data, moment))
                os.eventfd_write(self._wake, 1)
            self._error = EOFError("the daemon has ended the stream")
        except grpc.RpcError as error:
            self._error = from_rpc_error(error, str(self._client.socket))
        self._opened.set()
        os.eventfd_write(self._wake, 1)

    def _wait(self) -> None:
        SuperSocket.select([self], 0.5)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
