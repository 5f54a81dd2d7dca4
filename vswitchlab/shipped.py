"""Finds the example files that the demo uses: in a checkout, or where a wheel has put them."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

__all__ = ["example"]


def example(path: str) -> Path:
    """The file `path` of the examples folder, for example `extensions/block_telnet.py`.

    Raises FileNotFoundError, naming both places that were looked at.
    """
    checkout = Path(__file__).resolve().parent.parent / "examples" / path
    if checkout.is_file():
        return checkout
    try:
        files = importlib.metadata.files("vswitch") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.as_posix().endswith(f"share/vswitch/examples/{path}"):
            found = Path(str(file.locate())).resolve()
            if found.is_file():
                return found
    raise FileNotFoundError(f"the example {path} is neither at {checkout} nor in the installed vswitch")
