"""Task offload: the capability object that a guest reads, and what it enables of it.

Formats: ntddndis.h NDIS_OFFLOAD (revision 3, 156 bytes) and NDIS_OFFLOAD_PARAMETERS. Only what the data path really
does is offered: transmit and receive checksums, TCP large send version 2, and receive segment coalescing where the
guest speaks NVSP 6.1 and asked for it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from netvsp import limits, receive_path

OFFLOAD_SIZE = 156
OBJECT_OFFLOAD = 0xA7
OBJECT_DEFAULT = 0x80
REVISION = 3
ENCAPSULATION_8023 = 2

IP_OPTIONS, TCP_OPTIONS, TCP, UDP, IP_HEADER = 0x001, 0x004, 0x010, 0x040, 0x100
IPV6_EXTENSIONS = 0x001
LSO_V6_OPTIONS = 0x1 | 0x4

TX, RX = 1, 2
# NDIS_OFFLOAD_PARAMETERS checksum values 1..4 as direction bits; 0 leaves things as they are.
CHECKSUM_VALUES = {1: 0, 2: TX, 3: RX, 4: TX | RX}
CHECKSUM_NAMES = ("ipv4", "tcp4", "udp4", "tcp6", "udp6")
PARAMETERS_MIN = 20


class InvalidParameters(ValueError):
    """An NDIS_OFFLOAD_PARAMETERS object that cannot be honoured."""


@dataclass(slots=True)
class OffloadState:
    """What the guest enabled; directions as TX | RX bits."""

    ipv4: int = 0
    tcp4: int = 0
    udp4: int = 0
    tcp6: int = 0
    udp6: int = 0
    lso4: bool = False
    lso6: bool = False
    rsc4: bool = False
    rsc6: bool = False
    rsc_offered: bool = False
    """Both sides speak NVSP 6.1 and the guest announced receive segment coalescing."""

    def apply(self, data: bytes) -> None:
        """Acts on NDIS_OFFLOAD_PARAMETERS. Senders put revision 3 whatever the size: only the size counts.

        Raises InvalidParameters, changing nothing, for a short object, an impossible value or large send version 1.
        """
        if len(data) < PARAMETERS_MIN:
            raise InvalidParameters(f"offload parameters of {len(data)} bytes, at least {PARAMETERS_MIN}")
        checksums = data[4:9]
        if any(value > 4 for value in checksums):
            raise InvalidParameters("a checksum offload value above 4")
        lso1, lso4, lso6 = data[9], data[11], data[12]
        rsc4, rsc6 = (data[22], data[23]) if len(data) >= 24 else (0, 0)
        if lso1 == 2:
            raise InvalidParameters("large send version 1 is not offered")
        if any(value > 2 for value in (lso1, lso4, lso6, rsc4, rsc6)):
            raise InvalidParameters("a large send or coalescing value above 2")
        for name, value in zip(CHECKSUM_NAMES, checksums, strict=True):
            if value:
                setattr(self, name, CHECKSUM_VALUES[value])
        for name, value in (("lso4", lso4), ("lso6", lso6)):
            if value:
                setattr(self, name, value == 2)
        for name, value in (("rsc4", rsc4), ("rsc6", rsc6)):
            if value:
                setattr(self, name, value == 2 and self.rsc_offered)

    def receive_bits(self) -> int:
        """The data channel's `set_offload` argument."""
        pairs = (
            (self.ipv4 & RX, receive_path.RX_IPV4),
            (self.tcp4 & RX, receive_path.RX_TCP4),
            (self.udp4 & RX, receive_path.RX_UDP4),
            (self.tcp6 & RX, receive_path.RX_TCP6),
            (self.udp6 & RX, receive_path.RX_UDP6),
            (self.rsc4, receive_path.RSC_IPV4),
            (self.rsc6, receive_path.RSC_IPV6),
        )
        return sum(bit for enabled, bit in pairs if enabled)

    def current(self) -> bytes:
        """NDIS_OFFLOAD with what is enabled now (OID_TCP_OFFLOAD_CURRENT_CONFIG and its indication)."""
        v4 = [self._flags4(direction) for direction in (TX, RX)]
        v6 = [self._flags6(direction) for direction in (TX, RX)]
        return _object(v4[0], v4[1], v6[0], v6[1], self.lso4, self.lso6, self.rsc4, self.rsc6)

    def hardware(self) -> bytes:
        """NDIS_OFFLOAD with all that the data path can do (OID_TCP_OFFLOAD_HARDWARE_CAPABILITIES)."""
        full = OffloadState(TX | RX, TX | RX, TX | RX, TX | RX, TX | RX, True, True)
        full.rsc4 = full.rsc6 = self.rsc_offered
        return full.current()

    def _flags4(self, direction: int) -> int:
        flags = IP_HEADER if self.ipv4 & direction else 0
        flags |= TCP | TCP_OPTIONS if self.tcp4 & direction else 0
        flags |= UDP if self.udp4 & direction else 0
        return flags | IP_OPTIONS if flags else 0

    def _flags6(self, direction: int) -> int:
        flags = TCP | TCP_OPTIONS if self.tcp6 & direction else 0
        flags |= UDP if self.udp6 & direction else 0
        return flags | IPV6_EXTENSIONS if flags else 0


def _object(
    tx4: int, rx4: int, tx6: int, rx6: int, lso4: bool, lso6: bool, rsc4: bool, rsc6: bool
) -> bytes:
    words: list[int] = []
    for flags in (tx4, rx4, tx6, rx6):
        words += [ENCAPSULATION_8023 if flags else 0, flags]
    large4 = (ENCAPSULATION_8023, limits.LSO_MAX_SIZE, limits.LSO_MIN_SEGMENTS) if lso4 else (0, 0, 0)
    large6 = (ENCAPSULATION_8023, limits.LSO_MAX_SIZE, limits.LSO_MIN_SEGMENTS) if lso6 else (0, 0, 0)
    out = struct.pack("<BBH", OBJECT_OFFLOAD, REVISION, OFFLOAD_SIZE)
    out += struct.pack("<8I", *words)
    out += bytes(16 + 28)
    out += struct.pack("<7I", *large4, *large6, LSO_V6_OPTIONS if lso6 else 0)
    out += bytes(4 + 32)
    out += struct.pack("<BB2x", rsc4, rsc6)
    return out.ljust(OFFLOAD_SIZE, b"\0")
