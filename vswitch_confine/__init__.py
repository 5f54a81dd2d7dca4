"""Confinement of a process by itself: namespaces, Landlock, seccomp, limits. Stdlib and ctypes only."""

from __future__ import annotations

from vswitch_confine.errors import ConfinementRefused

__all__ = ["ConfinementRefused"]
