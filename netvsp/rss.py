"""Receive-side scaling: which queue of a NIC a frame goes to, by the guest's key and indirection table.

Twin of ``native/netvsp/src/rss.rs``. Hash function and its inputs: "RSS hashing types" and "Verifying the RSS
hash calculation" in the Windows driver documentation; flags: ntddndis.h NDIS_HASH_*. Addresses and ports are
taken in the order source, destination. Extended IPv6 types hash the header's own addresses, which NDIS asks
for where the extension headers name no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from netvsp import checksum

HASH_IPV4, HASH_TCP_IPV4, HASH_UDP_IPV4 = 0x100, 0x200, 0x4000
HASH_IPV6, HASH_TCP_IPV6, HASH_UDP_IPV6 = 0x400, 0x1000, 0x8000
HASH_IPV6_EX, HASH_TCP_IPV6_EX, HASH_UDP_IPV6_EX = 0x800, 0x2000, 0x10000
TOEPLITZ = 1
KEY_BYTES = 40
HEAD = 128
"""Headers are looked for in the first bytes alone: the native engine has no more at hand."""


@dataclass(frozen=True, slots=True)
class Flow:
    """What is hashed of a frame."""

    kind: int
    """The NDIS_HASH_* type that applied."""
    data: bytes


class Rss:
    """The guest's key, table and hash types; immutable."""

    def __init__(self, key: bytes, table: Sequence[int], types: int) -> None:
        """Raises ValueError for a key that is not 40 bytes or an empty table."""
        if len(key) != KEY_BYTES or not table:
            raise ValueError(f"RSS key of {len(key)} bytes, table of {len(table)} entries")
        self._key = int.from_bytes(key, "big")
        self._table = tuple(table)
        self._types = types

    def place(self, frame: bytes | bytearray) -> tuple[int, int, int] | None:
        """(queue, hash value, hash type) of a frame; None = nothing that the guest wants hashed."""
        found = flow(frame[:HEAD], self._types)
        if found is None:
            return None
        value = self.hash(found.data)
        return self._table[value % len(self._table)], value, found.kind

    def hash(self, data: bytes) -> int:
        """Toeplitz: the sum of the 32-bit windows of the key at the data's bits that are set."""
        value = 0
        bits = len(data) * 8
        number = int.from_bytes(data, "big")
        for position in range(bits):
            if number >> (bits - 1 - position) & 1:
                value ^= self._key >> (KEY_BYTES * 8 - 32 - position)
        return value & 0xFFFFFFFF


def flow(head: bytes | bytearray, types: int) -> Flow | None:
    """What of the frame is to be hashed, given the types that the guest enabled."""
    at = _network(head)
    if at is None:
        return None
    version, start = at
    if version == 4:
        addresses = bytes(head[start + 12 : start + 20])
        kinds = {checksum.TCP: HASH_TCP_IPV4, checksum.UDP: HASH_UDP_IPV4}
        plain = types & HASH_IPV4
    else:
        addresses = bytes(head[start + 8 : start + 40])
        kinds = {
            checksum.TCP: HASH_TCP_IPV6 if types & HASH_TCP_IPV6 else HASH_TCP_IPV6_EX,
            checksum.UDP: HASH_UDP_IPV6 if types & HASH_UDP_IPV6 else HASH_UDP_IPV6_EX,
        }
        plain = types & HASH_IPV6 or types & HASH_IPV6_EX
    transport = checksum.find_transport(head)
    if transport is not None and transport.l4_offset + 4 <= len(head):
        kind = kinds.get(transport.protocol, 0) & types
        if kind:
            return Flow(kind, addresses + bytes(head[transport.l4_offset : transport.l4_offset + 4]))
    return Flow(plain, addresses) if plain else None


def _network(head: bytes | bytearray) -> tuple[int, int] | None:
    """IP version and where its header starts, the whole fixed header present."""
    start = 14
    ethertype = int.from_bytes(head[12:14], "big")
    if ethertype in checksum.ETHERTYPE_VLAN:
        start = 18
        ethertype = int.from_bytes(head[16:18], "big")
    version, size = {checksum.ETHERTYPE_IPV4: (4, 20), checksum.ETHERTYPE_IPV6: (6, 40)}.get(
        ethertype, (0, 0)
    )
    if not version or len(head) < start + size or head[start] >> 4 != version:
        return None
    return version, start
