"""A stock guest as a test sees it: shell commands go in over its console, output and exit status come back.

The other end is `guestroot/bin/command-server`; lines that are no answer go to a log.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import os
import queue
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_ANSWER = re.compile(rb"vsw:(\d+):(\w+)(?::([^\r\n]*))?\r?\n")
# A serial port's receive queue is small and emptied at the guest's pace: a long script goes in pieces.
_PIECE = 600


class GuestFailed(AssertionError):
    """The guest did not answer, or a command failed that had to succeed; the text has its last output."""


@dataclass(frozen=True)
class Result:
    """How a command ended and what it printed (standard output and error together)."""

    status: int
    output: str

    def __str__(self) -> str:
        return f"status {self.status}\n{self.output}"


class Console:
    """The two directions of a guest's serial console, whatever carries them."""

    def __init__(
        self, receive: Callable[[], bytes], send: Callable[[bytes], None], close: Callable[[], None]
    ):
        self.receive = receive
        self.send = send
        self.close = close

    @classmethod
    def at(cls, path: Path, timeout: float = 30) -> Console:
        """The console that a VMM serves on a UNIX socket."""
        end = time.monotonic() + timeout
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(path))
                break
            except OSError:
                connection.close()
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

        def close() -> None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

        return cls(lambda: connection.recv(65536), connection.sendall, close)

    @classmethod
    def by(cls, command: list[str], environment: dict[str, str] | None = None) -> Console:
        """The console as a command serves it on its input and output (`vswitch partition console`)."""
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **(environment or {})}
        )
        assert child.stdin is not None
        assert child.stdout is not None
        source, sink = child.stdout, child.stdin

        def send(data: bytes) -> None:
            sink.write(data)
            sink.flush()

        def close() -> None:
            child.terminate()
            child.wait(10)

        return cls(lambda: os.read(source.fileno(), 65536), send, close)


class StockGuest:
    """One guest's console from its first character on."""

    def __init__(self, name: str, console: Console, log: Path) -> None:
        self.name = name
        self._console = console
        self._log = log
        self._answers: queue.Queue[tuple[int, str, str]] = queue.Queue()
        self._number = int(time.monotonic() * 1000) % 1_000_000_000
        self._lock = threading.Lock()
        self._seen = bytearray()
        self._changed = threading.Condition()
        self._ended = False
        log.parent.mkdir(parents=True, exist_ok=True)
        self._reader = threading.Thread(target=self._read, daemon=True, name=f"console-{name}")
        self._reader.start()

    def _read(self) -> None:
        """Sorts what the console prints into answers and the rest."""
        rest = b""
        with self._log.open("ab") as log:
            while True:
                try:
                    some = self._console.receive()
                except OSError:
                    some = b""
                if not some:
                    break
                rest += some
                *lines, rest = rest.split(b"\n")
                for line in lines:
                    found = _ANSWER.search(line + b"\n")
                    if found:
                        number, kind, text = found.groups()
                        self._answers.put(
                            (int(number), kind.decode(), (text or b"").decode(errors="replace"))
                        )
                        continue
                    log.write(line + b"\n")
                    with self._changed:
                        self._seen += line + b"\n"
                        self._changed.notify_all()
                log.flush()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def console(self) -> str:
        """What the console printed until now, answers apart."""
        with self._changed:
            return self._seen.decode(errors="replace")

    def wait_console(self, text: str, timeout: float = 60, after: int = 0) -> str:
        """Waits until the console has printed `text` (a regular expression) behind its first `after`
        characters; the text that matched.
        """
        pattern = re.compile(text)
        end = time.monotonic() + timeout
        with self._changed:
            while not (found := pattern.search(self._seen.decode(errors="replace"), after)):
                left = end - time.monotonic()
                if left <= 0 or self._ended:
                    raise GuestFailed(
                        f"{self.name}: no {text!r} on the console within {timeout:.0f} s{self._tail()}"
                    )
                self._changed.wait(left)
        return found[0]

    def _tail(self) -> str:
        text = self._seen[-1500:].decode(errors="replace")
        return f"; it {'ended after' if self._ended else 'printed last'}:\n{text}"

    def wait_ready(self, timeout: float = 120) -> None:
        """Waits until the guest takes commands."""
        end = time.monotonic() + timeout
        with self._lock:
            while time.monotonic() < end and not self._ended:
                # The guest says by itself when it is ready; it is asked where that was before the log began.
                try:
                    while self._answers.get(timeout=20)[1] != "ready":
                        pass
                except queue.Empty:
                    self._number += 1
                    self._send(f"hello {self._number}\n")
                    continue
                return
        raise GuestFailed(f"{self.name}: takes no commands after {timeout:.0f} s{self._tail()}")

    def _send(self, line: str) -> None:
        try:
            self._console.send(line.encode())
        except OSError as error:
            raise GuestFailed(f"{self.name}: the console is closed ({error}){self._tail()}") from error

    def _next(self, number: int, end: float) -> tuple[str, str]:
        while True:
            try:
                got, kind, text = self._answers.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise GuestFailed(f"{self.name}: no answer from the console{self._tail()}") from None
            if got == number:
                return kind, text

    def run(self, script: str, timeout: float = 30) -> Result:
        """Runs a shell script in the guest; ends it there after `timeout` seconds (status 143 or 137)."""
        text = base64.b64encode(script.encode()).decode()
        pieces = [text[at : at + _PIECE] for at in range(0, len(text), _PIECE)] or [""]
        with self._lock:
            for piece in pieces[:-1]:
                self._number += 1
                self._send(f"put {self._number} {piece}\n")
                self._next(self._number, time.monotonic() + 15)
            self._number += 1
            self._send(f"run {self._number} {timeout:.0f} {pieces[-1]}\n")
            end = time.monotonic() + timeout + 20
            packed = ""
            while True:
                kind, rest = self._next(self._number, end)
                if kind == "d":
                    packed += rest
                    continue
                status, digest = rest.split(":")
                data = base64.b64decode(packed)
                if hashlib.md5(data).hexdigest() != digest:
                    raise GuestFailed(f"{self.name}: an answer was damaged on the console")
                return Result(int(status), gzip.decompress(data).decode(errors="replace"))

    def sh(self, script: str, timeout: float = 30) -> str:
        """Runs a shell script that must succeed; its output."""
        result = self.run(script, timeout)
        if result.status:
            raise GuestFailed(f"{self.name}: {script!r} ended with {result}")
        return result.output

    def start(self, script: str) -> Job:
        """Starts a shell script in the guest that goes on beside others."""
        job = Job(self, f"/run/job-{self._number}")
        body = f"cat >{job.path} <<'END-OF-JOB'\n{script}\nEND-OF-JOB\n"
        around = f"sh {job.path} >{job.path}.out 2>&1; echo $? >{job.path}.rc"
        self.sh(f"{body}setsid sh -c '{around}' </dev/null >/dev/null 2>&1 &")
        return job

    def close(self) -> None:
        """Lets go of the console."""
        self._console.close()
        self._reader.join(5)


class Job:
    """A script that runs in the guest beside others."""

    def __init__(self, guest: StockGuest, path: str) -> None:
        self._guest = guest
        self.path = path

    def wait(self, timeout: float = 60) -> Result:
        """Waits for the script's end."""
        ended = f"[ -s {self.path}.rc ] || [ $n -gt {timeout * 5:.0f} ]"
        waiting = f"n=0; until {ended}; do sleep 0.2; n=$((n+1)); done"
        return self._guest.run(
            f"{waiting}; cat {self.path}.out; exit $(cat {self.path}.rc || echo 124)", timeout + 5
        )
