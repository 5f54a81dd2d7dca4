"""The extensible switch: switches, ports, extensions, capture and trace, in-process or under the daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vswitch.drops import DropReason
    from vswitch.endpoint import Frame
    from vswitch.switch import Port, Switch

__all__ = ["DropReason", "Frame", "Port", "Switch"]

_HOMES = {
    "DropReason": "vswitch.drops",
    "Frame": "vswitch.endpoint",
    "Port": "vswitch.switch",
    "Switch": "vswitch.switch",
}


def __getattr__(name: str) -> object:
    # Loaded when asked for: an extension's process imports `vswitch.extension` and nothing of the engines.
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'vswitch' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(home), name)
