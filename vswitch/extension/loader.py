"""From an extension's source text to its one object, with an error for each way in which that goes wrong."""

from __future__ import annotations

import linecache
import sys
import traceback
from types import ModuleType

from vswitch.extension.plugin import Extension, Filter, passes_of

MAX_SOURCE = 1 << 20
"""Bytes of an extension's file."""


class ExtensionLoadError(ValueError):
    """The file cannot be an extension. The text names file and line, what is wrong and what to do."""


def load(source: bytes, file_name: str) -> Extension:
    """Run the file as a module and make its extension. Raises ExtensionLoadError."""
    if len(source) > MAX_SOURCE:
        raise ExtensionLoadError(
            f"{file_name} has {len(source)} bytes, an extension has at most {MAX_SOURCE}"
        )
    try:
        code = compile(source, file_name, "exec", dont_inherit=True)
    except SyntaxError as error:
        where = f"{file_name}:{error.lineno}" if error.lineno else file_name
        shown = f": {error.text.strip()}" if error.text else ""
        raise ExtensionLoadError(f"{where}: {error.msg}{shown}") from None
    except ValueError as error:  # null bytes, a wrong coding line
        raise ExtensionLoadError(f"{file_name} is not Python source: {error}") from None
    text = source.decode("utf-8", "replace")
    linecache.cache[file_name] = (len(text), None, text.splitlines(keepends=True), file_name)
    module = ModuleType("extension")
    module.__file__ = file_name
    sys.modules["extension"] = module
    try:
        exec(code, module.__dict__)
        found = find(module, file_name)
        return found()
    except ExtensionLoadError:
        raise
    except Exception as error:
        raise ExtensionLoadError(f"{describe(error, file_name)} (while it was being loaded)") from None


def find(module: ModuleType, file_name: str) -> type[Extension]:
    """The one class of the module that is an extension. Raises ExtensionLoadError."""
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Extension) and value.__module__ == module.__name__
    ]
    # A base class of another in the same file is not an extension of its own.
    leaves = [c for c in dict.fromkeys(classes) if not any(c is not d and issubclass(d, c) for d in classes)]
    if not leaves:
        raise ExtensionLoadError(
            f"{file_name} defines no extension: write one class that derives from vswitch.extension.Filter"
        )
    if len(leaves) > 1:
        names = ", ".join(c.__name__ for c in leaves)
        raise ExtensionLoadError(
            f"{file_name} defines {len(leaves)} extensions ({names}): one file holds one"
        )
    if issubclass(leaves[0], Filter) and not passes_of(leaves[0]):
        raise ExtensionLoadError(
            f"{file_name}: class {leaves[0].__name__} judges nothing: "
            "define ingress(self, packet) or egress(self, packet)"
        )
    return leaves[0]


def describe(error: BaseException, file_name: str) -> str:
    """`file.py:12: ZeroDivisionError: division by zero`, the line being the file's own innermost one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame.lineno for frame in frames if frame.filename == file_name]
    where = f"{file_name}:{own[-1]}" if own else file_name
    text = " ".join(str(error).split())
    return f"{where}: {type(error).__name__}: {text}" if text else f"{where}: {type(error).__name__}"
