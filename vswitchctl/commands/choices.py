"""Values that several commands take or show."""

from __future__ import annotations

from enum import StrEnum

from vswitch_api.v1 import common_pb2


class EngineChoice(StrEnum):
    """The two engines."""

    NATIVE = "native"
    PYTHON = "python"


class OnFailureChoice(StrEnum):
    """What happens to frames while an extension has failed."""

    OPEN = "open"
    CLOSED = "closed"


def engine_text(value: common_pb2.Engine.ValueType) -> str:
    return short_enum(common_pb2.Engine.Name(value), "ENGINE_")


def short_enum(name: str, prefix: str) -> str:
    """`PARTITION_STATE_RUNNING` -> `running`."""
    return name.removeprefix(prefix).lower().replace("_", " ")


def pairs(values: list[str], what: str) -> dict[str, str]:
    """`key=value` options as a dictionary. ValueError for one without "="."""
    found: dict[str, str] = {}
    for value in values:
        key, equals, rest = value.partition("=")
        if not equals or not key:
            raise ValueError(f"{value!r}: {what} is needed")
        found[key] = rest
    return found
