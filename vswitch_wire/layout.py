"""Fixed layouts as dataclasses: the field order of the class is the field order of its struct format."""

from __future__ import annotations

import struct
from dataclasses import fields
from typing import Any, ClassVar, Self
from uuid import UUID

from .errors import WireError


class Fixed:
    """A record with a fixed layout. `FORMAT` is a little-endian struct format; `16s` fields declared UUID are
    GUIDs.

    GUIDs travel as `u32 LE, u16 LE, u16 LE, 8 raw bytes` (`UUID.bytes_le`).
    """

    __slots__ = ()
    FORMAT: ClassVar[struct.Struct]

    def pack_fields(self) -> bytes:
        """The record's bytes. Raises WireError when a value does not fit its field."""
        values: list[Any] = []
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            values.append(value.bytes_le if isinstance(value, UUID) else value)
        try:
            return self.FORMAT.pack(*values)
        except struct.error as error:
            raise WireError(f"{type(self).__name__}: a value does not fit its field: {error}") from error

    @classmethod
    def unpack_fields(cls, data: bytes | memoryview, offset: int = 0) -> Self:
        """Reads the record at `offset`; bytes beyond it are ignored. Raises WireError when `data` is too
        short."""
        need(cls.__name__, data, offset + cls.FORMAT.size)
        values: list[Any] = list(cls.FORMAT.unpack_from(data, offset))
        for index, field in enumerate(fields(cls)):  # type: ignore[arg-type]
            if field.type == "UUID":
                values[index] = UUID(bytes_le=bytes(values[index]))
            elif field.type == "bool":
                values[index] = bool(values[index])
        return cls(*values)


def need(name: str, data: bytes | memoryview, size: int) -> None:
    """Raises WireError unless `data` holds at least `size` bytes."""
    if len(data) < size:
        raise WireError(f"{name}: needs {size} bytes, has {len(data)}")


def pad8(data: bytes) -> bytes:
    """`data` padded with zeros to a multiple of 8 bytes."""
    return data + bytes(-len(data) % 8)
