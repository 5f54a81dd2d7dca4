"""Key-value exchange on the wire (Linux include/uapi/linux/hyperv.h, struct hv_kvp_msg and hv_kvp_ip_msg;
drivers/hv/hv_kvp.c).

Texts are UTF-16 in fields of fixed size. An answer has the size of its request, so a request brings the room
for it. What comes from a guest is shown to people: characters that are not printable become U+FFFD.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from vswitch_wire.errors import WireError
from vswitch_wire.layout import need

KVP_OP_GET = 0
KVP_OP_SET = 1
KVP_OP_DELETE = 2
KVP_OP_ENUMERATE = 3
KVP_OP_GET_IP_INFO = 4
KVP_OP_SET_IP_INFO = 5

KEY_BYTES = 512
VALUE_BYTES = 2048
REG_SZ, REG_U32, REG_U64 = 1, 4, 8

ADAPTER_ID_BYTES = 256
ADDRESS_BYTES = 2048
GATEWAY_BYTES = 1024


class KvpPool(enum.IntEnum):
    """Whose keys (enum hv_kvp_exchg_pool)."""

    EXTERNAL = 0
    """Written by the host, read by the guest's programs."""
    GUEST = 1
    """Written by the guest's programs."""
    AUTO = 2
    """What the guest's system says of itself: names, versions, addresses."""
    AUTO_EXTERNAL = 3
    AUTO_INTERNAL = 4


_HEADER = struct.Struct("<BBH")
_INDEX = struct.Struct("<I")
_VALUE = struct.Struct(f"<III{KEY_BYTES}s{VALUE_BYTES}s")
_IP_HEADER = struct.Struct("<BB")
_IP = struct.Struct(f"<{ADAPTER_ID_BYTES}sBB{ADDRESS_BYTES}s{ADDRESS_BYTES}s{GATEWAY_BYTES}s{ADDRESS_BYTES}s")
LARGEST_BODY = max(_HEADER.size + _INDEX.size + _VALUE.size, _IP_HEADER.size + _IP.size)


@dataclass(frozen=True, slots=True)
class IpInfo:
    """What the guest says of one adapter; texts as the guest wrote them, not checked to be addresses."""

    addresses: tuple[str, ...]
    subnets: tuple[str, ...]
    """Masks of IPv4 addresses, `/length` of IPv6 ones."""
    gateways: tuple[str, ...]
    dns: tuple[str, ...]
    dhcp: bool


def pack_enumerate(pool: KvpPool, index: int) -> bytes:
    """Ask for the entry number `index` of a pool."""
    return _HEADER.pack(KVP_OP_ENUMERATE, pool, 0) + _INDEX.pack(index) + _VALUE.pack(0, 0, 0, b"", b"")


def unpack_enumerate(body: bytes) -> tuple[str, str]:
    """Key and value."""
    start = _HEADER.size + _INDEX.size
    need("key-value entry", body, start + _VALUE.size)
    kind, key_size, value_size, key, value = _VALUE.unpack_from(body, start)
    return _text("key", key, key_size), _value(kind, value, value_size)


def pack_get(pool: KvpPool, key: str) -> bytes:
    """Ask for one key's value. WireError when the key is too long."""
    encoded = _key(key)
    return _HEADER.pack(KVP_OP_GET, pool, 0) + _VALUE.pack(0, len(encoded), 0, encoded, b"")


def unpack_get(body: bytes) -> str:
    """The value."""
    need("key-value answer", body, _HEADER.size + _VALUE.size)
    kind, _, value_size, _, value = _VALUE.unpack_from(body, _HEADER.size)
    return _value(kind, value, value_size)


def pack_get_ip_info(mac: str) -> bytes:
    """Ask what is set on the adapter with this MAC address (`00:15:5D:00:00:01`, as guests compare it)."""
    adapter = mac.upper().encode("utf-16-le")
    if len(adapter) > ADAPTER_ID_BYTES - 2:
        raise WireError(f"adapter {mac!r}: at most {ADAPTER_ID_BYTES // 2 - 1} characters")
    return _IP_HEADER.pack(KVP_OP_GET_IP_INFO, KvpPool.EXTERNAL) + _IP.pack(adapter, 0, 0, b"", b"", b"", b"")


def unpack_ip_info(body: bytes) -> IpInfo:
    """What is set on the adapter."""
    need("adapter's addresses", body, _IP_HEADER.size + _IP.size)
    _, _, dhcp, addresses, subnets, gateways, dns = _IP.unpack_from(body, _IP_HEADER.size)
    return IpInfo(_list(addresses), _list(subnets), _list(gateways), _list(dns), bool(dhcp))


def _key(key: str) -> bytes:
    encoded = key.encode("utf-16-le") + b"\0\0"
    if len(encoded) > KEY_BYTES:
        raise WireError(f"key {key[:20]!r}...: at most {KEY_BYTES // 2 - 1} characters")
    return encoded


def _value(kind: int, value: bytes, size: int) -> str:
    if kind == REG_SZ:
        return _text("value", value, size)
    if kind == REG_U32:
        return str(int.from_bytes(value[:4], "little"))
    if kind == REG_U64:
        return str(int.from_bytes(value[:8], "little"))
    raise WireError(f"key-value entry: value of type {kind}, expected text (1), u32 (4) or u64 (8)")


def _text(what: str, field: bytes, size: int) -> str:
    if size > len(field) or size % 2:
        raise WireError(f"key-value entry: a {what} of {size} bytes in a field of {len(field)}")
    return _decode(field[:size])


def _decode(field: bytes) -> str:
    text = field.decode("utf-16-le", errors="replace").split("\0", 1)[0]
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _list(field: bytes) -> tuple[str, ...]:
    return tuple(entry.strip() for entry in _decode(field).split(";") if entry.strip())
