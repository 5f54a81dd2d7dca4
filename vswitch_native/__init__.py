"""The compiled half of vswitch, where it was built; `AVAILABLE` and `WHY` say whether it is here.

`from vswitch_native import switch` gives a submodule of the extension module built from `native/`. Without it
(no cargo at install time) this package still imports, `AVAILABLE` is False and the Python engine runs.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["AVAILABLE", "SUBMODULES", "WHY", "outdated"]

_REBUILD = "run `make native`"
SUBMODULES = ("wire", "memory", "ring", "door", "switch", "netvsp", "netvsc")

AVAILABLE: bool
WHY: str

try:
    _native = importlib.import_module("vswitch_native._native")
except ImportError as error:
    AVAILABLE = False
    WHY = f"the native module is not built ({error}); install cargo and run `make native`, or install a wheel"
else:
    AVAILABLE = all(hasattr(_native, name) for name in SUBMODULES)
    WHY = "" if AVAILABLE else f"the native module is older than this source; {_REBUILD}"
    for _name in SUBMODULES if AVAILABLE else ():
        _module = getattr(_native, _name)
        globals()[_name] = _module
        sys.modules[f"vswitch_native.{_name}"] = _module


def outdated() -> str:
    """What says that the module was built from another source than the one around it, with the remedy; empty
    when it fits. Held against the type stubs, which are kept in step with it.
    """
    if not AVAILABLE:
        return ""
    missing = [name for each in SUBMODULES for name in _missing(each)]
    if not missing:
        return ""
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return f"the native module is older than this source: it lacks {missing[0]}{more}; {_REBUILD}"


def _missing(submodule: str) -> Iterator[str]:
    stub = Path(__file__).with_name(f"{submodule}.pyi")
    module = sys.modules[f"vswitch_native.{submodule}"]
    for node in ast.parse(stub.read_text(encoding="utf-8")).body:
        for name in _names(node):
            found = getattr(module, name, None)
            if found is None:
                yield f"{submodule}.{name}"
            elif isinstance(node, ast.ClassDef):
                members = (name for each in node.body for name in _names(each))
                yield from (f"{submodule}.{node.name}.{each}" for each in members if not hasattr(found, each))


def _names(node: ast.stmt) -> list[str]:
    """What a statement of a stub declares; private names are the stub's own."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        names = [node.name]
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        names = [node.target.id]
    else:
        names = []
    return [name for name in names if not name.startswith("_")]
