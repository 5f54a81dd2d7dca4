"""Values that several commands take or show."""

from __future__ import annotations

import re
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


def mebibytes(text: str) -> int:
    """`256M`, `1G` or a number of MiB as bytes. ValueError."""
    found = re.fullmatch(r"([0-9]{1,9})(M|G|MiB|GiB)?", text, re.IGNORECASE)
    if found is None:
        raise ValueError(f"memory {text!r}: a size is needed, as 256M or 1G")
    return int(found[1]) << (30 if (found[2] or "M")[0] in "Gg" else 20)


def cpu_list(text: str) -> list[int]:
    """`0,2-3` as numbers. ValueError."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or int(last or first) > 4095:
            raise ValueError(f"host CPUs {text!r}: numbers and ranges are needed, as 0,2-3")
        found += range(int(first), int(last or first) + 1)
    return found


def pairs(values: list[str], what: str) -> dict[str, str]:
    """`key=value` options as a dictionary. ValueError for one without "="."""
    found: dict[str, str] = {}
    for value in values:
        key, equals, rest = value.partition("=")
        if not equals or not key:
            raise ValueError(f"{value!r}: {what} is needed")
        found[key] = rest
    return found
