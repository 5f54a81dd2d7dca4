"""Task offload: the capability object that a guest reads, and what it enables of it.

Only what the data path really does is offered: transmit and receive checksums, TCP large send version 2,
and receive segment coalescing where the guest speaks NVSP 6.1 and asked for it. Objects: ntddndis.h
NDIS_OFFLOAD, NDIS_OFFLOAD_PARAMETERS.
"""

from __future__ import annotations

from dataclasses import dataclass

from netvsp import receive_path
from vswitch_wire import ndis
from vswitch_wire.errors import WireError

TX, RX = 1, 2
# NDIS_OFFLOAD_PARAMETERS checksum values as direction bits; 0 leaves things as they are.
CHECKSUM_VALUES = {
    ndis.OFFLOAD_CHECKSUM_OFF: 0,
    ndis.OFFLOAD_CHECKSUM_TX: TX,
    ndis.OFFLOAD_CHECKSUM_RX: RX,
    ndis.OFFLOAD_CHECKSUM_BOTH: TX | RX,
}


class InvalidParameters(ValueError):
    """Offload parameters with values that NDIS does not have."""


class NotOffered(ValueError):
    """Offload parameters that switch on what this NIC does not offer."""


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
    partial: bool = False
    """The guest takes frames whose transport checksum is good and not there (`receive_path.RX_PARTIAL`)."""
    rsc_offered: bool = False
    """Both sides speak NVSP 6.1 and the guest announced receive segment coalescing."""

    def apply(self, data: bytes) -> None:
        """Acts on NDIS_OFFLOAD_PARAMETERS; nothing is changed when it raises.

        Raises InvalidParameters for a malformed object, NotOffered for large send version 1.
        """
        try:
            wanted = ndis.OffloadParameters.unpack(data)
        except WireError as error:
            raise InvalidParameters(str(error)) from error
        checksums = {
            "ipv4": wanted.ipv4_checksum,
            "tcp4": wanted.tcp4_checksum,
            "udp4": wanted.udp4_checksum,
            "tcp6": wanted.tcp6_checksum,
            "udp6": wanted.udp6_checksum,
        }
        switches = {
            "lso4": wanted.lso_v2_ipv4,
            "lso6": wanted.lso_v2_ipv6,
            "rsc4": wanted.rsc_ipv4,
            "rsc6": wanted.rsc_ipv6,
        }
        if max(checksums.values()) > ndis.OFFLOAD_CHECKSUM_BOTH:
            raise InvalidParameters("a checksum offload value above 4")
        if max(*switches.values(), wanted.lso_v1) > ndis.OFFLOAD_ON:
            raise InvalidParameters("a large send or coalescing value above 2")
        if wanted.lso_v1 == ndis.OFFLOAD_ON:
            raise NotOffered("large send version 1 is not offered")
        for name, value in checksums.items():
            if value:
                setattr(self, name, CHECKSUM_VALUES[value])
        for name, value in switches.items():
            if value:
                offered = self.rsc_offered or name.startswith("lso")
                setattr(self, name, offered and value == ndis.OFFLOAD_ON)

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
            (self.partial, receive_path.RX_PARTIAL),
        )
        return sum(bit for enabled, bit in pairs if enabled)

    def current(self) -> bytes:
        """NDIS_OFFLOAD, 156 bytes, with what is enabled now."""
        return ndis.Offload(
            self._flags4(TX),
            self._flags4(RX),
            self._flags6(TX),
            self._flags6(RX),
            ndis.LSO_MAXIMUM_SIZE if self.lso4 else 0,
            ndis.LSO_MINIMUM_SEGMENTS if self.lso4 else 0,
            ndis.LSO_MAXIMUM_SIZE if self.lso6 else 0,
            ndis.LSO_MINIMUM_SEGMENTS if self.lso6 else 0,
            ndis.LSO_V6_EXTENSION_HEADERS | ndis.LSO_V6_TCP_OPTIONS if self.lso6 else 0,
            self.rsc4,
            self.rsc6,
        ).pack()

    def hardware(self) -> bytes:
        """NDIS_OFFLOAD, 156 bytes, with all that the data path can do."""
        full = OffloadState(TX | RX, TX | RX, TX | RX, TX | RX, TX | RX, lso4=True, lso6=True)
        full.rsc4 = full.rsc6 = self.rsc_offered
        return full.current()

    def _flags4(self, direction: int) -> int:
        flags = ndis.IPV4_CHECKSUM_IP_HEADER if self.ipv4 & direction else 0
        if self.tcp4 & direction:
            flags |= ndis.IPV4_CHECKSUM_TCP | ndis.IPV4_CHECKSUM_TCP_OPTIONS
        flags |= ndis.IPV4_CHECKSUM_UDP if self.udp4 & direction else 0
        return flags | ndis.IPV4_CHECKSUM_IP_OPTIONS if flags else 0

    def _flags6(self, direction: int) -> int:
        flags = 0
        if self.tcp6 & direction:
            flags |= ndis.IPV6_CHECKSUM_TCP | ndis.IPV6_CHECKSUM_TCP_OPTIONS
        flags |= ndis.IPV6_CHECKSUM_UDP if self.udp6 & direction else 0
        return flags | ndis.IPV6_CHECKSUM_EXTENSION_HEADERS if flags else 0
