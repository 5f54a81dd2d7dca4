"""Resource names and pages: taking names of requests apart, checking ids, cutting lists into pages."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from vswitchd.errors import ApiError, invalid

T = TypeVar("T")

ID = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
# What Linux takes as an interface name, and a little less: IFNAMSIZ is 16 with its NUL.
NIC_ID = re.compile(r"[a-z][a-z0-9_.-]{0,14}")
MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
SINGULAR = {
    "switches": "switch",
    "ports": "port",
    "nics": "nic",
    "partitions": "partition",
    "extensions": "extension",
    "captures": "capture",
}
PAGE_DEFAULT = 100
PAGE_MAX = 1000
MAX_LABELS = 32
MAX_LABEL_BYTES = 255

Key = tuple[str | int, ...]


def check_id(field: str, value: str, pattern: re.Pattern[str] = ID) -> str:
    """`value`, when it may name a resource."""
    if pattern.fullmatch(value) is None:
        raise invalid(
            field,
            f"{value[:80]!r} is not a name: {pattern.pattern} is needed",
            "use lower-case letters, digits, '-', '_' and '.'",
        )
    return value


def parse(field: str, name: str, *collections: str) -> tuple[str, ...]:
    """The ids of `name`, which must be "collection/id/collection/id..." with these collections."""
    parts = name.split("/")
    ids = tuple(parts[1::2])
    if len(parts) != 2 * len(collections) or tuple(parts[0::2]) != collections or not all(ids):
        shape = "/".join(f"{collection}/{{{SINGULAR[collection]}}}" for collection in collections)
        raise invalid(field, f"{name[:120]!r} is not a name of the form {shape}")
    return ids


def page(
    items: Iterable[T], key: Callable[[T], Key], page_size: int, page_token: str
) -> tuple[Sequence[T], str]:
    """One page of `items` in the order of `key`, and the token of the next ("" when this is the last).

    A token holds the key of the last item given, so items that come and go meanwhile do no harm.
    """
    ordered = sorted(items, key=key)
    if page_token:
        last = _decode_token(page_token)
        try:
            ordered = [item for item in ordered if key(item) > last]
        except TypeError:
            raise _bad_token() from None
    size = min(page_size or PAGE_DEFAULT, PAGE_MAX)
    cut = ordered[:size]
    return cut, _encode_token(key(cut[-1])) if len(ordered) > size else ""


def _encode_token(key: Key) -> str:
    return base64.urlsafe_b64encode(json.dumps(key).encode()).decode()


def _decode_token(token: str) -> Key:
    try:
        key = json.loads(base64.urlsafe_b64decode(token.encode()))
    except (ValueError, binascii.Error, RecursionError):
        raise _bad_token() from None
    if not isinstance(key, list) or not all(isinstance(part, str | int) for part in key):
        raise _bad_token()
    return tuple(key)


def _bad_token() -> ApiError:
    return invalid("page_token", "not a token of this daemon", "start again with an empty page_token")


def check_mask(paths: Sequence[str], allowed: Sequence[str]) -> None:
    """An update mask must name something, and nothing that cannot be changed."""
    if not paths:
        raise invalid("update_mask", "empty", f"name what to change: {', '.join(allowed)}")
    for path in paths:
        if path not in allowed:
            raise invalid("update_mask", f"{path[:80]!r} cannot be changed", f"use {', '.join(allowed)}")


def check_labels(field: str, labels: Mapping[str, str]) -> None:
    """At most 32 labels of at most 255 bytes each."""
    if len(labels) > MAX_LABELS:
        raise invalid(field, f"{len(labels)} labels; at most {MAX_LABELS} are taken")
    for key, value in labels.items():
        if not key or max(len(key.encode()), len(value.encode())) > MAX_LABEL_BYTES:
            raise invalid(field, f"label {key[:40]!r} is empty or longer than {MAX_LABEL_BYTES} bytes")


def check_mac(field: str, text: str) -> bytes:
    """A unicast MAC address as 6 bytes."""
    if MAC.fullmatch(text.lower()) is None:
        raise invalid(field, f"{text[:40]!r} is not a MAC address", "write it as 00:15:5d:01:02:03")
    mac = bytes.fromhex(text.replace(":", ""))
    if mac[0] & 1 or mac == bytes(6):
        raise invalid(field, f"{text} is not a unicast address", "use one whose first byte is even")
    return mac


def check_interface_address(field: str, text: str) -> str:
    """An address with its prefix length, "10.0.0.1/24"."""
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError:
        raise invalid(field, f"{text[:60]!r} is not an address", "write it as 10.0.0.1/24") from None
    if "/" not in text:
        raise invalid(field, f"{text} has no prefix length", f"write it as {text}/24")
    return str(interface)


def check_address(field: str, text: str) -> str:
    """An IP address without prefix length."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise invalid(field, f"{text[:60]!r} is not an IP address", "write it as 10.0.0.1") from None


def mac_text(mac: bytes) -> str:
    return mac.hex(":")
