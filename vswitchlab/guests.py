"""What commands in guests are given: where our Python packages are."""

from __future__ import annotations

import os
from pathlib import Path

import vswitchctl

__all__ = ["environment"]


def environment() -> dict[str, str]:
    """PYTHONPATH with the folder that this process has vswitch from, so that `-m netvsc.probe` is found."""
    root = str(Path(vswitchctl.__file__).resolve().parent.parent)
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys([root, *filter(None, given)]))}
