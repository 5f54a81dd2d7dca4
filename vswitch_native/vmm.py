"""Where the virtual machine monitor is: the program `vswitch-vmm`, built from `native/vmm`."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

__all__ = ["PROGRAM", "VARIABLE", "find", "why"]

PROGRAM = "vswitch-vmm"
VARIABLE = "VSWITCH_VMM"


def find() -> Path | None:
    """The program: what VSWITCH_VMM names, else the one beside the native module, else the one that a
    wheel put beside Python's other programs.
    """
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named) if _is_program(Path(named)) else None
    scripts = sysconfig.get_path("scripts")
    for place in (Path(__file__).resolve().parent, *([Path(scripts)] if scripts else [])):
        if _is_program(place / PROGRAM):
            return place / PROGRAM
    return None


def why() -> str:
    """Why there is none, with the remedy; an empty text when there is one."""
    if find() is not None:
        return ""
    named = os.environ.get(VARIABLE)
    if named:
        return f"{VARIABLE} names {named}, which is not a program with an absolute path; unset it"
    return f"{PROGRAM} is not built; install cargo and run `make native`, or install a wheel"


def _is_program(path: Path) -> bool:
    return path.is_absolute() and path.is_file() and os.access(path, os.X_OK)
