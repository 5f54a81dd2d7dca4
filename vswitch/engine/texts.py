"""Flow-cache entries in words, for both engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vswitch.drops import DropReason
from vswitch.fields import Field

__all__ = ["NO_VLAN_VALUES", "DropText", "action_texts", "field_text", "mac_text", "match_texts"]

NO_VLAN_VALUES = (0xFFFF_FFFF, 0x1_FFFF)
"""How the Python and the native engine write "no tag" in a key."""


class DropText(NamedTuple):
    """A drop's reason, detail, and the extension's name or None."""

    reason: DropReason
    detail: str
    dropped_by: str | None


def mac_text(address: int) -> str:
    """`02:00:00:00:00:01`"""
    return address.to_bytes(6, "big").hex(":")


def match_texts(values: dict[Field, int]) -> dict[str, str]:
    """Field names and values as people write them."""
    eth_type = values.get(Field.ETH_TYPE)
    return {field.name.lower(): field_text(field, value, eth_type) for field, value in values.items()}


def field_text(field: Field, value: int, eth_type: int | None) -> str:
    """One field's value; addresses are IPv6 where the EtherType says so."""
    if field in (Field.ETH_DST, Field.ETH_SRC):
        return mac_text(value)
    if field is Field.ETH_TYPE:
        return f"0x{value:04x}"
    if field is Field.VLAN_TCI:
        return "none" if value in NO_VLAN_VALUES else str(value)
    if field in (Field.IP_SRC, Field.IP_DST):
        if eth_type == 0x86DD:
            groups = value.to_bytes(16, "big").hex()
            return ":".join(groups[at : at + 4] for at in range(0, 32, 4))
        return ".".join(str(byte) for byte in (value & 0xFFFF_FFFF).to_bytes(4, "big"))
    return str(value)


def action_texts(
    drop: DropText | None, destinations: Sequence[tuple[int, DropText | None]]
) -> tuple[str, ...]:
    """`output 2`, `drop FILTERED by x: why`, `output 3: drop ...`."""
    if drop is not None:
        return (_drop_words(drop),)
    return tuple(
        f"output {port_id}" + ("" if one is None else f": {_drop_words(one)}")
        for port_id, one in destinations
    )


def _drop_words(drop: DropText) -> str:
    by = f" by {drop.dropped_by}" if drop.dropped_by else ""
    return f"drop {drop.reason.name}{by}: {drop.detail}"
