"""`python -m netvsc.probe`: ping and a TCP transfer with digests, for guests that lack ping(8) and iperf3.

    ping ADDRESS --count 20 --interval 0.05 --json       requests on schedule, replies by sequence
    tcp-serve --port 5001 --json                         takes one transfer, prints its size and SHA-256
    tcp-send ADDRESS --port 5001 --bytes 67108864 --json

Exit status 0 when nothing was lost, 1 otherwise, 2 for a wrong command line. Standard library alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass, field
from typing import Any

__all__ = ["main"]

_ICMP = struct.Struct(">BBHHH")
_STAMP = struct.Struct(">d")
_CHUNK = 256 * 1024
_LINGER = 1.0  # seconds after the last request that a reply still counts


def _checksum(data: bytes) -> int:
    data += b"\0" * (len(data) & 1)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


@dataclass(slots=True)
class _Pings:
    """What was sent and what came back."""

    sent: int = 0
    duplicates: int = 0
    replies: dict[int, float] = field(default_factory=dict)
    largest_gap: float = 0.0
    last: float = 0.0

    def reply(self, sequence: int, rtt: float, now: float) -> None:
        if sequence in self.replies:
            self.duplicates += 1
            return
        self.replies[sequence] = rtt
        if self.last:
            self.largest_gap = max(self.largest_gap, now - self.last)
        self.last = now


class _Echo:
    """An ICMP or ICMPv6 echo socket. A raw one where allowed (root of a guest is), else a ping socket."""

    def __init__(self, address: str, identifier: int, size: int) -> None:
        family, _, _, _, target = socket.getaddrinfo(address, None, type=socket.SOCK_RAW)[0]
        self._target: Any = target
        self._v6 = family == socket.AF_INET6
        protocol = socket.IPPROTO_ICMPV6 if self._v6 else socket.IPPROTO_ICMP
        try:
            self.socket = socket.socket(family, socket.SOCK_RAW, protocol)
            self._raw = True
        except PermissionError:
            self.socket = socket.socket(family, socket.SOCK_DGRAM, protocol)
            self._raw = False
        self.socket.setblocking(False)
        self.identifier = identifier
        if not self._raw:
            self.socket.bind(("", identifier))
            self.identifier = self.socket.getsockname()[1]
        self._padding = bytes(index & 0xFF for index in range(max(0, size - _STAMP.size)))
        self.address = str(self._target[0])

    def send(self, sequence: int) -> bool:
        body = _STAMP.pack(time.monotonic()) + self._padding
        kind = 128 if self._v6 else 8
        head = _ICMP.pack(kind, 0, 0, self.identifier, sequence & 0xFFFF)
        if not self._v6:
            head = _ICMP.pack(kind, 0, _checksum(head + body), self.identifier, sequence & 0xFFFF)
        try:
            self.socket.sendto(head + body, self._target)
        except OSError:  # link down, no neighbour: lost like any other
            return False
        return True

    def receive(self) -> tuple[int, float] | None:
        """(sequence, round trip in seconds) of one reply to us; None when none waits."""
        while True:
            try:
                data, _ = self.socket.recvfrom(65536)
            except BlockingIOError:
                return None
            except OSError:
                continue
            if self._raw and not self._v6:
                data = data[(data[0] & 0xF) * 4 :]
            if len(data) < _ICMP.size + _STAMP.size:
                continue
            kind, _, _, identifier, sequence = _ICMP.unpack_from(data)
            if kind == (129 if self._v6 else 0) and identifier == self.identifier:
                return sequence, time.monotonic() - _STAMP.unpack_from(data, _ICMP.size)[0]


def ping(options: argparse.Namespace) -> int:
    """Send on schedule, collect replies, print the summary."""
    echo = _Echo(options.address, options.identifier, options.size)
    pings = _Pings()
    stop: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _frame: stop.append(number))
    signal.signal(signal.SIGTERM, lambda number, _frame: stop.append(number))
    start = time.monotonic()
    end_of_input = options.until_eof
    while not stop and (options.count == 0 or pings.sent < options.count):
        due = start + pings.sent * options.interval
        if _wait(echo, pings, due, end_of_input):
            break
        pings.sent += 1
        echo.send(pings.sent)
    deadline = time.monotonic() + _LINGER
    while len(pings.replies) < pings.sent and time.monotonic() < deadline:
        _wait(echo, pings, min(deadline, time.monotonic() + 0.1), False)
    result = _summary(echo, pings)
    if options.json:
        print(json.dumps(result), flush=True)
    else:
        print(in_words(result))
    return 0 if pings.sent and not result["lost"] else 1


def in_words(result: dict[str, Any]) -> str:
    """A summary as one line; what no reply came for has no times."""
    counts = f"{result['sent']} sent, {result['received']} received, {result['lost']} lost"
    if not result["received"]:
        return counts
    rtt = result["rtt_ms"]
    times = f"rtt min/avg/max {rtt['min']}/{rtt['avg']}/{rtt['max']} ms"
    return f"{counts}; {times}, largest gap {result['largest_gap_ms']} ms"


def _wait(echo: _Echo, pings: _Pings, until: float, watch_input: bool) -> bool:
    """Take replies until `until`; True when standard input ended."""
    while True:
        left = until - time.monotonic()
        watched: list[Any] = [echo.socket, sys.stdin] if watch_input else [echo.socket]
        try:
            ready, _, _ = select.select(watched, [], [], max(0.0, left))
        except InterruptedError:
            return False
        while (reply := echo.receive()) is not None:
            pings.reply(reply[0], reply[1], time.monotonic())
        if watch_input and sys.stdin in ready and not os.read(sys.stdin.fileno(), 4096):
            return True
        if left <= 0:
            return False


def _summary(echo: _Echo, pings: _Pings) -> dict[str, Any]:
    times = [value * 1000 for value in pings.replies.values()]
    return {
        "address": echo.address,
        "identifier": echo.identifier,
        "sent": pings.sent,
        "received": len(times),
        "lost": pings.sent - len(times),
        "duplicates": pings.duplicates,
        "rtt_ms": {
            "min": round(min(times), 3) if times else None,
            "avg": round(sum(times) / len(times), 3) if times else None,
            "max": round(max(times), 3) if times else None,
        },
        "largest_gap_ms": round(pings.largest_gap * 1000, 3),
    }


def tcp_serve(options: argparse.Namespace) -> int:
    """Take one connection to its end; print what arrived."""
    family = socket.AF_INET6 if ":" in options.bind else socket.AF_INET
    with socket.create_server((options.bind, options.port), family=family) as server:
        print(json.dumps({"listening": server.getsockname()[1]}), flush=True)
        server.settimeout(options.timeout)
        connection, peer = server.accept()
    digest, total = hashlib.sha256(), 0
    start = time.monotonic()
    with connection:
        connection.settimeout(options.timeout)
        buffer = bytearray(_CHUNK)
        while count := connection.recv_into(buffer):
            digest.update(memoryview(buffer)[:count])
            total += count
        connection.sendall(digest.digest())
    return _report(options, total, digest.hexdigest(), time.monotonic() - start, peer=peer[0])


def tcp_send(options: argparse.Namespace) -> int:
    """Send pseudo-random bytes; the receiver's digest comes back on the same connection."""
    digest, left = hashlib.sha256(), options.bytes
    block = hashlib.shake_256(str(options.seed).encode()).digest(_CHUNK)
    start = time.monotonic()
    with socket.create_connection((options.address, options.port), timeout=options.timeout) as connection:
        number = 0
        while left:
            piece = struct.pack(">Q", number) + block[8:]
            piece = piece[: min(len(piece), left)]
            digest.update(piece)
            connection.sendall(piece)
            left -= len(piece)
            number += 1
        connection.shutdown(socket.SHUT_WR)
        echoed = b""
        while len(echoed) < digest.digest_size and (data := connection.recv(64)):
            echoed += data
    status = _report(
        options, options.bytes, digest.hexdigest(), time.monotonic() - start, peer=options.address
    )
    return status if echoed == digest.digest() else 1


def _report(options: argparse.Namespace, total: int, digest: str, seconds: float, *, peer: str) -> int:
    rate = round(total * 8 / max(seconds, 1e-9) / 1e6, 1)
    result = {
        "bytes": total,
        "sha256": digest,
        "seconds": round(seconds, 3),
        "mbit_per_second": rate,
        "peer": peer,
    }
    text = f"{total} bytes, sha256 {digest}, {seconds:.2f} s, {rate} Mbit/s"
    print(json.dumps(result) if options.json else text, flush=True)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m netvsc.probe", description="Ping and TCP transfer with digests."
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("ping", help="ICMP echo")
    one.add_argument("address")
    one.add_argument("--count", type=int, default=5, help="0 = until a signal")
    one.add_argument("--interval", type=float, default=1.0, help="seconds between requests")
    one.add_argument("--size", type=int, default=56, help="bytes of ICMP data, at least 8")
    one.add_argument(
        "--identifier", type=int, default=os.getpid() & 0xFFFF or 1, help="the ICMP id on the wire"
    )
    one.add_argument("--until-eof", action="store_true", help="stop when standard input ends")
    one.set_defaults(run=ping)
    two = commands.add_parser("tcp-serve", help="receive one transfer")
    two.add_argument("--bind", default="0.0.0.0")
    two.add_argument("--port", type=int, default=5001)
    two.set_defaults(run=tcp_serve)
    three = commands.add_parser("tcp-send", help="send one transfer")
    three.add_argument("address")
    three.add_argument("--port", type=int, default=5001)
    three.add_argument("--bytes", type=int, default=64 << 20)
    three.add_argument("--seed", type=int, default=1)
    three.set_defaults(run=tcp_send)
    for command in (one, two, three):
        command.add_argument("--json", action="store_true", help="one JSON object per line")
        command.add_argument("--timeout", type=float, default=60.0)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except OSError as error:
        print(f"probe: {error}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
