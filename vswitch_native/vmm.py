"""Where the VMM's program is: built beside the native module, installed with vswitch's scripts, or named by
VSWITCH_VMM.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

__all__ = ["find", "why"]

NAME = "vswitch-vmm"
VARIABLE = "VSWITCH_VMM"


def find() -> Path | None:
    """The program, or None; `why()` says what is to be done then."""
    named = os.environ.get(VARIABLE)
    if named:
        return _program(Path(named))
    places = (Path(__file__).resolve().parent, Path(sysconfig.get_path("scripts")))
    return next((found for place in places if (found := _program(place / NAME))), None)


def why() -> str:
    """Why there is no program, with the remedy; empty when there is one."""
    if find() is not None:
        return ""
    named = os.environ.get(VARIABLE)
    if named:
        return f"{VARIABLE} names {named}, which is no program"
    return f"{NAME} is not built; install cargo and run `make native`, or install a wheel"


def _program(path: Path) -> Path | None:
    return path if path.is_file() and os.access(path, os.X_OK) else None
