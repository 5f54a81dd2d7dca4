#!/usr/bin/env python3
"""A program with the command line, door and console of `vswitch-vmm` that boots nothing: what the control
plane does is tested with it where there is no KVM. Standard library only; written from docs/door.md.

Its console understands lines: `poweroff`, `crash`, `refuse`, `abort`, `flood N`; all else is echoed.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import hashlib
import json
import os
import selectors
import signal
import socket
import struct
import sys
import time

HELLO, HELLO_ACK, CONFIGURE, CONFIGURED, SHUTDOWN, RESET, RESET_DONE = (
    0x01,
    0x02,
    0x40,
    0x41,
    0x46,
    0x33,
    0x34,
)
RESULTS = (0x11, 0x14)
REPLAY = 65536


class Vmm:
    """Door on one side, console on the other."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.selector = selectors.DefaultSelector()
        self.door: socket.socket | None = None
        self.caller: socket.socket | None = None
        self.memory: list[int] = []
        self.interrupts: list[int] = []
        self.replay = bytearray()
        self.line = bytearray()
        self.lost = time.monotonic()
        self.boots = 0
        self.door_listener = socket.socket(fileno=int(os.environ["VSWITCH_DOOR_FD"]))
        self.console_listener = socket.socket(fileno=options.console_fd)
        self.selector.register(self.door_listener, selectors.EVENT_READ, self.accept_door)
        self.selector.register(self.console_listener, selectors.EVENT_READ, self.accept_caller)

    def run(self) -> None:
        while True:
            for key, _ in self.selector.select(0.1):
                key.data()
            if self.door is None and time.monotonic() - self.lost > self.options.grace:
                sys.exit(4)

    # --- the console ---

    def say(self, text: str) -> None:
        data = text.encode().replace(b"\n", b"\r\n")
        self.replay = (self.replay + data)[-REPLAY:]
        os.write(1, data)
        if self.caller is not None:
            with contextlib.suppress(OSError):
                self.caller.sendall(data)

    def accept_caller(self) -> None:
        self.selector.unregister(self.console_listener)
        self.caller, _ = self.console_listener.accept()
        self.selector.register(self.caller, selectors.EVENT_READ, self.keys)
        self.caller.sendall(bytes(self.replay))

    def keys(self) -> None:
        assert self.caller is not None
        try:
            data = self.caller.recv(4096)
        except OSError:
            data = b""
        if not data:
            self.selector.unregister(self.caller)
            self.caller.close()
            self.caller = None
            self.selector.register(self.console_listener, selectors.EVENT_READ, self.accept_caller)
            return
        for byte in data:
            if byte in b"\r\n":
                words, self.line = self.line.decode(errors="replace").split(), bytearray()
                self.command(words)
            else:
                self.line.append(byte)

    def command(self, words: list[str]) -> None:
        first = words[0] if words else ""
        if first == "poweroff":
            self.say("power down\n")
            sys.exit(0)
        elif first == "crash":
            self.say("kernel panic\n")
            sys.exit(3)
        elif first == "refuse":
            print("vswitch-vmm: KVM_CREATE_VCPU: no memory", file=sys.stderr)
            sys.exit(1)
        elif first == "abort":
            os.abort()
        elif first == "reboot":
            self.send(RESET, b"", 1)
        elif first == "flood":
            for _ in range(int(words[1])):
                self.say("x" * 1023 + "\n")
            self.say("flooded\n")
        else:
            self.say(f"you typed: {' '.join(words)}\n")

    # --- the door ---

    def accept_door(self) -> None:
        self.selector.unregister(self.door_listener)
        self.door, _ = self.door_listener.accept()
        self.selector.register(self.door, selectors.EVENT_READ, self.frame)

    def frame(self) -> None:
        assert self.door is not None
        try:
            data, ancillary, _, _ = self.door.recvmsg(
                65536, socket.CMSG_SPACE(80 * 4), socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            data, ancillary = b"", []
        fds = array.array("i")
        for _, _, payload in ancillary:
            fds.frombytes(payload[: len(payload) // 4 * 4])
        if not data:
            self.selector.unregister(self.door)
            self.door.close()
            self.door = None
            self.lost = time.monotonic()
            self.selector.register(self.door_listener, selectors.EVENT_READ, self.accept_door)
            return
        kind, _, sequence, length, _ = struct.unpack_from("<HHIII", data)
        body = data[16 : 16 + length]
        if kind == HELLO:
            self.hello(body, sequence, list(fds))
        elif kind == CONFIGURE:
            self.send(CONFIGURED, struct.pack("<I", 95) + b"no agent", sequence)
        elif kind == SHUTDOWN:
            self.say("ended from outside\n")
            sys.exit(0)
        elif kind == RESET_DONE:
            self.boot()

    def hello(self, body: bytes, sequence: int, fds: list[int]) -> None:
        flags, _, processors, regions = struct.unpack_from("<IQII", body, 4)
        if flags & 1:
            for fd in self.interrupts:
                os.close(fd)
            self.interrupts = fds
            self.send(HELLO_ACK, struct.pack("<HHI", 1, 0, 1), sequence, self.memory)
            return
        self.memory, self.interrupts = fds[:regions], fds[regions:]
        sizes = [struct.unpack_from("<QQ", body, 32 + 16 * index) for index in range(regions)]
        self.send(HELLO_ACK, struct.pack("<HHI", 1, 0, 0), sequence)
        self.layout = f"{processors} processors, memory " + " ".join(
            f"{gpa:#x}+{size:#x}" for gpa, size in sizes
        )
        self.boot()

    def boot(self) -> None:
        self.boots += 1
        digests = [
            hashlib.sha256(os.pread(fd, os.fstat(fd).st_size, 0)).hexdigest()
            for fd in (self.options.kernel_fd, self.options.initrd_fd)
            if fd is not None
        ]
        self.say(f"boot {self.boots}: {self.layout}\nimages: {' '.join(digests)}\n")
        self.say(f"Command line: {self.options.cmdline}\n")

    def send(self, kind: int, body: bytes, sequence: int, fds: list[int] | None = None) -> None:
        assert self.door is not None
        socket.send_fds(self.door, [struct.pack("<HHIII", kind, 0, sequence, len(body), 0) + body], fds or [])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--probe", action="store_true")
    parser.add_argument("--name", default="")
    parser.add_argument("--kernel-fd", type=int)
    parser.add_argument("--initrd-fd", type=int)
    parser.add_argument("--console-fd", type=int)
    parser.add_argument("--cmdline", default="")
    parser.add_argument("--grace", type=float, default=30.0)
    parser.add_argument("--host-cpus", default="")
    options = parser.parse_args()
    if options.probe:
        print(json.dumps({"ok": True, "why": "", "caps": {}}))
        return
    if "refuse" in options.cmdline:
        print("vswitch-vmm: /dev/kvm: permission denied; add yourself to group kvm", file=sys.stderr)
        sys.exit(1)
    # As PID 1 of its namespace it gets no signal that it does not handle.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
    Vmm(options).run()


if __name__ == "__main__":
    main()
