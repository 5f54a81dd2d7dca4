"""Results on standard output, as a table for people or as JSON or YAML for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message


class Format(StrEnum):
    """How results are written."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


Columns = Mapping[str, Callable[[Any], object]]


def to_plain(message: Message) -> dict[str, Any]:
    """A message as plain values, with the field names of the proto."""
    plain: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return plain


def write_list(messages: Iterable[Message], columns: Columns, style: Format) -> None:
    """Many resources: a table with these columns, or a list of objects."""
    if style is Format.TABLE:
        rows = [[_text(column(message)) for column in columns.values()] for message in messages]
        write_table(list(columns), rows)
    else:
        write_plain([to_plain(message) for message in messages], style)


def write_one(message: Message, columns: Columns, style: Format) -> None:
    """One resource: a line per column, or an object."""
    if style is Format.TABLE:
        width = max(map(len, columns))
        for name, column in columns.items():
            sys.stdout.write(f"{name.lower():<{width}}  {_text(column(message))}\n")
    else:
        write_plain(to_plain(message), style)


def write_plain(value: object, style: Format) -> None:
    """Plain values as JSON or YAML."""
    if style is Format.YAML:
        import yaml

        sys.stdout.write(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
    else:
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def counted(number: int, word: str) -> str:
    """`1 packet`, `2 packets`."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def write_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their content. Headings are bold on a terminal, unless NO_COLOR is set."""
    widths = [
        max([len(heading), *(len(row[index]) for row in rows)]) for index, heading in enumerate(headings)
    ]
    bold, plain = ("\x1b[1m", "\x1b[0m") if coloured() else ("", "")
    sys.stdout.write(f"{bold}{_line([heading.upper() for heading in headings], widths)}{plain}\n")
    for row in rows:
        sys.stdout.write(_line(row, widths) + "\n")


def coloured() -> bool:
    """Whether standard output is a terminal that wants colours (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def printable(text: str) -> str:
    """What guests, extensions and files say, fit for a terminal: of control characters line ends stay."""
    return "".join(character if character.isprintable() or character == "\n" else "?" for character in text)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return printable(text).replace("\n", "?") or "-"
