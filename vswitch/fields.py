"""The header fields that a verdict may depend on: numbers of the recorder's bits, and what each one needs.

`native/switch/src/fields.rs` has the same numbers; extension processes report the fields they read as a bit
set.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

__all__ = ["ALL_BITS", "RAW_BIT", "Field", "close", "mask_of", "names"]


class Field(IntEnum):
    """Bit number of a field. ARP sender and target addresses are `IP_SRC` and `IP_DST`."""

    IN_PORT = 0
    ETH_DST = 1
    ETH_SRC = 2
    ETH_TYPE = 3
    VLAN_TCI = 4
    IP_PROTO = 5
    IP_SRC = 6
    IP_DST = 7
    IP_DSCP = 8
    IP_TTL = 9
    IP_FRAG = 10
    L4_SRC = 11
    L4_DST = 12
    TCP_FLAGS = 13
    ICMP_TYPE = 14
    ICMP_CODE = 15
    ARP_OP = 16
    FRAME_LEN = 17
    RAW = 63

    @property
    def bit(self) -> int:
        """This field as a one-bit mask."""
        return 1 << self.value


RAW_BIT = Field.RAW.bit
ALL_BITS = sum(field.bit for field in Field)

_L3 = (
    sum(
        field.bit
        for field in (Field.IP_PROTO, Field.IP_SRC, Field.IP_DST, Field.IP_DSCP, Field.IP_TTL, Field.IP_FRAG)
    )
    | Field.ARP_OP.bit
)
_L4 = sum(
    field.bit for field in (Field.L4_SRC, Field.L4_DST, Field.TCP_FLAGS, Field.ICMP_TYPE, Field.ICMP_CODE)
)


def close(mask: int) -> int:
    """Adds what the fields in `mask` only mean something together with.

    A port number says nothing without the protocol, nor an IP address without the EtherType: an entry that
    matched
    the one without the other would catch frames whose field means something else.
    """
    if mask & _L4:
        mask |= Field.IP_PROTO.bit | Field.IP_FRAG.bit
    if mask & _L3:
        mask |= Field.ETH_TYPE.bit
    return mask


def names(mask: int) -> tuple[str, ...]:
    """Lower-case names of the fields in `mask`, in bit order."""
    return tuple(field.name.lower() for field in Field if mask & field.bit)


def mask_of(fields: Iterable[Field]) -> int:
    """The bit set of `fields`."""
    mask = 0
    for field in fields:
        mask |= field.bit
    return mask
