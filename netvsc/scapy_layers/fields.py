"""Fields that these layers need beside scapy's own: a GUID and integers that old senders leave out."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from scapy.fields import Field, LEIntField, LELongField, LEShortField, UUIDField, XLEIntField


class GuidField(UUIDField):
    """A GUID as Windows writes it: u32 LE, u16 LE, u16 LE, 8 raw bytes."""

    def __init__(self, name: str, default: Any) -> None:
        super().__init__(name, default or UUID(int=0), uuid_fmt=UUIDField.FORMAT_LE)  # type: ignore[arg-type]


class OptionalField(Field[Any, Any]):
    """At a message's end: None where the sender's message is too short to have it."""

    def getfield(self, pkt: Any, s: bytes) -> tuple[bytes, Any]:
        if len(s) < self.sz:
            return s, None
        return super().getfield(pkt, s)

    def addfield(self, pkt: Any, s: bytes, val: Any) -> bytes:
        return s if val is None else super().addfield(pkt, s, val)


class OptionalLEShortField(OptionalField, LEShortField):
    """u16 or absent."""


class OptionalLEIntField(OptionalField, LEIntField):
    """u32 or absent."""


class OptionalXLEIntField(OptionalField, XLEIntField):
    """u32, shown in hexadecimal, or absent."""


class OptionalLELongField(OptionalField, LELongField):
    """u64 or absent."""


class OptionalGuidField(GuidField):
    """A GUID or absent."""

    def __init__(self, name: str) -> None:
        super().__init__(name, None)
        self.default = None

    def getfield(self, pkt: Any, s: bytes) -> tuple[bytes, Any]:
        if len(s) < 16:
            return s, None
        return super().getfield(pkt, s)

    def addfield(self, pkt: Any, s: bytes, val: Any) -> bytes:
        return s if val is None else super().addfield(pkt, s, val)
