"""Reads a lab file: YAML text to plain values, with the line and column of every key kept for error messages.

Scalars follow the YAML 1.2 core schema (as editors do), so `no`, `on` and `12:34:56:10:20:30` stay text.
Input is bounded: 1 MiB of text, 20 000 values after aliases are expanded, 32 levels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml

from vswitchlab.problems import LabFileError, Path, Problem, dotted

__all__ = ["MAX_BYTES", "MAX_DEPTH", "MAX_VALUES", "Source", "load_file", "load_text"]

MAX_BYTES = 1 << 20
MAX_VALUES = 20_000
MAX_DEPTH = 32


class _Loader(yaml.SafeLoader):
    """PyYAML with the implicit types of YAML 1.2's core schema instead of those of YAML 1.1."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the shape PyYAML asks for


def _implicit(tag: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first) or None)


_implicit("null", r"^(?:~|null|Null|NULL|)$", "")
_implicit("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF")
_implicit("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789")
_implicit("float", r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789")


@dataclass(slots=True)
class Source:
    """A lab file as typed: its values, and where each stands. Paths are key/index tuples."""

    file: str
    directory: FilePath
    value: Any = None
    keys: dict[Path, tuple[int, int]] = field(default_factory=dict)
    values: dict[Path, tuple[int, int]] = field(default_factory=dict)

    def problem(self, path: Path, what: str, remedy: str = "", *, at_value: bool = False) -> Problem:
        """A mistake at `path`; points at the key, or at its value when `at_value`."""
        order = (self.values, self.keys) if at_value else (self.keys, self.values)
        place: tuple[int, int] | None = None
        for end in range(len(path), -1, -1):
            place = order[0].get(path[:end]) or order[1].get(path[:end])
            if place:
                break
        line, column = place or (1, 1)
        return Problem(self.file, line, column, dotted(path), what, remedy)


def load_file(path: str | FilePath) -> Source:
    """Reads `path`. Raises LabFileError where it cannot be read or is no YAML."""
    file = FilePath(path)
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise LabFileError(
            [Problem(str(path), 1, 1, "", f"cannot read the lab file: {reason}", "check the path")]
        ) from None
    if len(data) > MAX_BYTES:
        what = "the file is larger than 1 MiB"
        raise LabFileError([Problem(str(path), 1, 1, "", what, "a lab file is a short text: check the path")])
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LabFileError(
            [Problem(str(path), line, 1, "", "the file is not UTF-8 text", "save it as UTF-8")]
        ) from None
    return load_text(text, file=str(path), directory=file.resolve().parent)


def load_text(text: str, *, file: str = "<lab>", directory: FilePath | None = None) -> Source:
    """Parses `text`; relative paths in it are meant from `directory` (default: the current one)."""
    source = Source(file, directory or FilePath.cwd())
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise LabFileError(
                    [Problem(file, 1, 1, "", "the file is empty", 'start with "guests: [a, b]"')]
                )
            source.value = _Builder(source, loader).build(node, (), 0)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise LabFileError([_syntax(file, error)]) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - (before.rfind("\n") + 1) + 1
        what = f"the character U+{ord(text[error.position]):04X} is not allowed in YAML"
        raise LabFileError([Problem(file, line, column, "", what, "delete it")]) from None
    except RecursionError:
        raise LabFileError([_too_deep(file, 1, 1, ())]) from None
    return source


def _syntax(file: str, error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    what = error.problem or error.context or "cannot be read"
    remedy = "check indentation, quotes and brackets on this line and the one above"
    if "\\t" in what:
        what, remedy = "a tab stands where YAML wants spaces", "indent with spaces"
    elif "single document" in (error.context or ""):
        what, remedy = "a second YAML document starts here", "one lab per file: remove the '---'"
    elif "undefined alias" in what:
        remedy = "define it with & before it is used"
    return Problem(file, line, column, "", f"not valid YAML: {what}", remedy)


def _too_deep(file: str, line: int, column: int, path: Path) -> Problem:
    return Problem(
        file,
        line,
        column,
        dotted(path[:4]),
        f"nested deeper than {MAX_DEPTH} levels",
        "no key of a lab is that deep",
    )


class _Builder:
    """Node tree to values, counting what is built: aliases may multiply nodes."""

    def __init__(self, source: Source, loader: _Loader) -> None:
        self.source = source
        self.loader = loader
        self.count = 0

    def build(self, node: yaml.Node, path: Path, depth: int) -> Any:
        line, column = node.start_mark.line + 1, node.start_mark.column + 1
        self.source.values[path] = (line, column)
        self.count += 1
        file = self.source.file
        if self.count > MAX_VALUES:
            what = f"more than {MAX_VALUES} values after aliases are expanded"
            raise LabFileError([Problem(file, line, column, dotted(path[:4]), what, "split the lab")])
        if depth > MAX_DEPTH:
            raise LabFileError([_too_deep(file, line, column, path)])
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.build(child, (*path, index), depth + 1) for index, child in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALARS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            what, remedy = f"the YAML tag {tag} is not used in lab files", "write the plain value"
            raise LabFileError([Problem(file, line, column, dotted(path), what, remedy)])
        try:
            return _SCALARS[node.tag](node.value)
        except ValueError:
            what = f"{node.value!r} is too large a number"
            raise LabFileError(
                [Problem(file, line, column, dotted(path), what, "quote it if it is text")]
            ) from None

    def _mapping(self, node: yaml.MappingNode, path: Path, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line, column = key_node.start_mark.line + 1, key_node.start_mark.column + 1
            if not isinstance(key_node, yaml.ScalarNode):
                what, remedy = "a key must be a word", "check brackets and indentation"
                raise LabFileError([Problem(self.source.file, line, column, dotted(path), what, remedy)])
            key = key_node.value
            here = (*path, key)
            if key in result:
                first = self.source.keys[here][0]
                what, remedy = f"given twice (first on line {first})", "keep one"
                raise LabFileError([Problem(self.source.file, line, column, dotted(here), what, remedy)])
            self.source.keys[here] = (line, column)
            result[key] = self.build(value_node, here, depth + 1)
        return result


def _int(text: str) -> int:
    digits = text.lstrip("+-")
    base = 8 if digits.startswith("0o") else 16 if digits.startswith("0x") else 10
    return int(text, base)


_SCALARS: dict[str, Any] = {
    "tag:yaml.org,2002:str": str,
    "tag:yaml.org,2002:int": _int,
    "tag:yaml.org,2002:float": float,
    "tag:yaml.org,2002:bool": lambda text: text.lower() == "true",
    "tag:yaml.org,2002:null": lambda text: None,
}
