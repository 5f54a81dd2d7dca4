"""The messages of an extension's process to its host: JSON objects on a SOCK_SEQPACKET socket.

The process is not trusted: a message is read once, bounded, and checked before use. Messages, in order:
`{"pid": n}` from the trusted part before the file is looked at, `{"error": text}` or
`{"ready": {"class", "kind", "passes", "layers", "missing"}}`, later `{"stale": attribute}`.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import Any

from vswitch.upcall import Pass

MAX_MESSAGE = 8192
MAX_TEXT = 2000
_PASSES: tuple[Pass, ...] = ("ingress", "egress")


class ControlError(ValueError):
    """A message that an honest process does not send."""


@dataclass(frozen=True, slots=True)
class Started:
    """The process that will run the extension exists; `pid` as the host sees it."""

    pid: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The extension could not be loaded."""

    text: str


@dataclass(frozen=True, slots=True)
class Ready:
    """It is loaded and answers upcalls."""

    class_name: str
    kind: str
    passes: frozenset[Pass]
    layers: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stale:
    """An attribute changed that cached verdicts may rest on."""

    attribute: str


Message = Started | Refused | Ready | Stale


def send(connection: socket.socket, message: dict[str, object]) -> None:
    """Send one message; a host that is gone is no error here, its end of the socket tells."""
    try:
        connection.send(json.dumps(message).encode()[:MAX_MESSAGE])
    except OSError:
        return


def decode(data: bytes) -> Message:
    """Check and read a message. Raises ControlError."""
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ControlError(f"control message of {len(data)} bytes that is not JSON") from error
    if not isinstance(message, dict) or len(message) != 1:
        raise ControlError("control message that is not an object of one member")
    kind, value = next(iter(message.items()))
    if kind == "pid" and isinstance(value, int) and not isinstance(value, bool) and value > 1:
        return Started(value)
    if kind == "error" and isinstance(value, str):
        return Refused(_text(value))
    if kind == "stale" and isinstance(value, str):
        return Stale(_text(value))
    if kind == "ready" and isinstance(value, dict):
        named = _texts(value, "passes")
        passes = frozenset(known for known in _PASSES if known in named)
        if not passes or len(passes) != len(named):
            raise ControlError(f"control message with passes {named}")
        if value.get("kind") != "filter":
            raise ControlError("control message with an unknown kind of extension")
        name = value.get("class")
        if not isinstance(name, str):
            raise ControlError("control message without a class")
        layers, missing = _texts(value, "layers"), _texts(value, "missing")
        return Ready(_text(name), "filter", passes, layers, missing)
    raise ControlError(f"control message of unknown kind {_text(str(kind))!r}")


def _texts(value: dict[str, Any], key: str) -> tuple[str, ...]:
    items = value.get(key)
    if not isinstance(items, list) or len(items) > 16 or not all(isinstance(item, str) for item in items):
        raise ControlError(f"control message without a list {key}")
    return tuple(_text(item) for item in items)


def _text(value: str) -> str:
    """One line of printable text: what an extension says ends up on terminals."""
    return "".join(c if c.isprintable() else " " for c in value[:MAX_TEXT])
