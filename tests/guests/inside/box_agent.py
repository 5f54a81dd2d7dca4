"""In the process guest: an HTTP server, transfers with digests, an echo; asked for by lines of JSON.

Standard library alone; whoever started it reads an answer for each line.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import http.server
import json
import random
import socket
import sys
import threading
import time
from typing import Any

_CHUNK = 1 << 20


class Content:
    """A megabyte that is repeated: every transfer's content, and the digest of so many bytes of it."""

    data = random.Random(20260101).randbytes(_CHUNK)

    @classmethod
    def digest(cls, size: int) -> str:
        total = hashlib.sha256()
        for at in range(0, size, _CHUNK):
            total.update(cls.data[: min(_CHUNK, size - at)])
        return total.hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """GET /SIZE answers with so many bytes."""

    def do_GET(self) -> None:
        size = int(self.path.strip("/"))
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        for at in range(0, size, _CHUNK):
            self.wfile.write(Content.data[: min(_CHUNK, size - at)])

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the answers are the log."""


def fetch(address: str, path: str, times: int) -> dict[str, Any]:
    """Reads a file of a guest's web server `times` times in a row; size and digest of all of it."""
    total = hashlib.sha256()
    size = 0
    started = time.monotonic()
    for _ in range(times):
        connection = http.client.HTTPConnection(address, 8000, timeout=120)
        connection.request("GET", path)
        response = connection.getresponse()
        if response.status != 200:
            raise OSError(f"status {response.status} for {path}")
        while some := response.read(1 << 18):
            total.update(some)
            size += len(some)
        connection.close()
    return {"bytes": size, "sha256": total.hexdigest(), "seconds": time.monotonic() - started}


def echo(address: str, port: int, text: str) -> dict[str, Any]:
    """Sends a line to a guest's echo and reads it back."""
    with socket.create_connection((address, port), timeout=20) as connection:
        connection.sendall(text.encode() + b"\n")
        connection.shutdown(socket.SHUT_WR)
        got = b""
        while some := connection.recv(4096):
            got += some
    return {"echoed": got.decode().strip()}


def flows(address: str, port: int, count: int) -> dict[str, Any]:
    """TCP flows to a port where nobody listens: Linux asks for hashes of TCP's ports, and of no other's."""
    refused = 0
    for _ in range(count):
        with socket.socket() as flow:
            flow.settimeout(10)
            refused += flow.connect_ex((address, port)) == errno.ECONNREFUSED
    return {"refused": refused}


def main() -> int:
    """Answers until its input ends."""
    server = http.server.ThreadingHTTPServer(("0.0.0.0", 8000), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    verbs: dict[str, Any] = {
        "hello": lambda: {"hello": "box"},
        "digest": lambda size: {"sha256": Content.digest(size)},
        "fetch": fetch,
        "echo": echo,
        "flows": flows,
    }
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = verbs[request.pop("verb")](**request)
        except Exception as error:  # told to the test, which fails with it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
