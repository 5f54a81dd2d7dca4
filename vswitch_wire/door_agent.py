"""Door frames for a process partition's agent: CONFIGURE, EXEC, KILL, SHUTDOWN (docs/door.md section 9)."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vswitch_wire.door_layout import MAX_STRINGS, FrameType, cut_text, exact, json_object, text_field
from vswitch_wire.errors import WireError

_PAIR = struct.Struct("<II")
_U32 = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Configure:
    """Host name, /etc/hosts and interface addresses for a process partition's agent, as a JSON object."""

    TYPE: ClassVar[FrameType] = FrameType.CONFIGURE
    document: dict[str, Any]

    def body(self) -> bytes:
        return json.dumps(self.document, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, body: bytes) -> Configure:
        return cls(json_object(body, "CONFIGURE"))


@dataclass(frozen=True, slots=True)
class Configured:
    """Answer to CONFIGURE: status 0, or an errno value and a text that names the object and the remedy."""

    TYPE: ClassVar[FrameType] = FrameType.CONFIGURED
    status: int
    text: str = ""

    def body(self) -> bytes:
        return _U32.pack(self.status) + cut_text(self.text)

    @classmethod
    def parse(cls, body: bytes) -> Configured:
        if len(body) < 4:
            raise WireError(f"CONFIGURED: body is {len(body)} bytes, at least 4 expected")
        return cls(_U32.unpack_from(body)[0], text_field(body[4:], "CONFIGURED"))


@dataclass(frozen=True, slots=True)
class Exec:
    """Start a program inside a process partition; its stdin, stdout and stderr ride on the frame."""

    TYPE: ClassVar[FrameType] = FrameType.EXEC
    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    cwd: str | None = None
    tty: bool = False

    def body(self) -> bytes:
        document = {"argv": list(self.argv), "env": self.env, "cwd": self.cwd, "tty": self.tty}
        return json.dumps(document, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, body: bytes) -> Exec:
        document = json_object(body, "EXEC")
        unknown = set(document) - {"argv", "env", "cwd", "tty"}
        if unknown:
            raise WireError(f"EXEC: unknown key {sorted(unknown)[0]!r}")
        argv, env = document.get("argv"), document.get("env", {})
        cwd, tty = document.get("cwd"), document.get("tty", False)
        if (
            not isinstance(argv, list)
            or not 1 <= len(argv) <= MAX_STRINGS
            or not all(map(_is_c_string, argv))
        ):
            raise WireError(f"EXEC: argv must be 1..{MAX_STRINGS} strings without NUL")
        if (
            not isinstance(env, dict)
            or len(env) > MAX_STRINGS
            or not all(_is_c_string(key) and _is_c_string(value) for key, value in env.items())
        ):
            raise WireError(f"EXEC: env must be an object of at most {MAX_STRINGS} strings without NUL")
        if cwd is not None and not _is_c_string(cwd):
            raise WireError("EXEC: cwd must be null or a string without NUL")
        if not isinstance(tty, bool):
            raise WireError("EXEC: tty must be true or false")
        return cls(tuple(argv), dict(env), cwd, tty)


def _is_c_string(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value


@dataclass(frozen=True, slots=True)
class ExecStarted:
    """Answer to EXEC: status 0 and the pid inside the partition, or an errno value and a text."""

    TYPE: ClassVar[FrameType] = FrameType.EXEC_STARTED
    status: int
    pid: int = 0
    text: str = ""

    def body(self) -> bytes:
        return _PAIR.pack(self.status, self.pid) + cut_text(self.text)

    @classmethod
    def parse(cls, body: bytes) -> ExecStarted:
        if len(body) < 8:
            raise WireError(f"EXEC_STARTED: body is {len(body)} bytes, at least 8 expected")
        status, pid = _PAIR.unpack_from(body)
        return cls(status, pid, text_field(body[8:], "EXEC_STARTED"))


@dataclass(frozen=True, slots=True)
class ExecExit:
    """The program ended; wait_status is encoded as waitpid(2) gives it."""

    TYPE: ClassVar[FrameType] = FrameType.EXEC_EXIT
    wait_status: int
    text: str = ""

    def body(self) -> bytes:
        return _U32.pack(self.wait_status) + cut_text(self.text)

    @classmethod
    def parse(cls, body: bytes) -> ExecExit:
        if len(body) < 4:
            raise WireError(f"EXEC_EXIT: body is {len(body)} bytes, at least 4 expected")
        return cls(_U32.unpack_from(body)[0], text_field(body[4:], "EXEC_EXIT"))


@dataclass(frozen=True, slots=True)
class Kill:
    """Send a signal to the program that the EXEC with this sequence started."""

    TYPE: ClassVar[FrameType] = FrameType.KILL
    exec_sequence: int
    signal: int

    def body(self) -> bytes:
        return _PAIR.pack(self.exec_sequence, self.signal)

    @classmethod
    def parse(cls, body: bytes) -> Kill:
        exact(body, _PAIR.size, "KILL")
        exec_sequence, signal = _PAIR.unpack(body)
        if not 1 <= signal <= 64:
            raise WireError(f"KILL: signal {signal}, 1..64 exist")
        return cls(exec_sequence, signal)


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End the guest: programs get SIGTERM, then SIGKILL, then the guest's process exits."""

    TYPE: ClassVar[FrameType] = FrameType.SHUTDOWN

    def body(self) -> bytes:
        return b""

    @classmethod
    def parse(cls, body: bytes) -> Shutdown:
        exact(body, 0, "SHUTDOWN")
        return cls()
