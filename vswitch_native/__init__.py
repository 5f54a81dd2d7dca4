"""The compiled half of vswitch, where it was built; `AVAILABLE` and `WHY` say whether it is here.

`from vswitch_native import switch` gives a submodule of the extension module built from `native/`. Without it
(no cargo at install time) this package still imports, `AVAILABLE` is False and the Python engine runs.
"""

from __future__ import annotations

import importlib
import sys

__all__ = ["AVAILABLE", "SUBMODULES", "WHY"]

SUBMODULES = ("wire", "memory", "ring", "door", "switch", "netvsp", "netvsc")

AVAILABLE: bool
WHY: str

try:
    _native = importlib.import_module("vswitch_native._native")
except ImportError as error:
    AVAILABLE = False
    WHY = f"the native module is not built ({error}); install cargo and run `make native`, or install a wheel"
else:
    AVAILABLE = True
    WHY = ""
    for _name in SUBMODULES:
        _module = getattr(_native, _name)
        globals()[_name] = _module
        sys.modules[f"vswitch_native.{_name}"] = _module
