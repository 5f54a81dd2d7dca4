"""The one exception of this package: a part of the confinement that the kernel refused."""

from __future__ import annotations

import os


class ConfinementRefused(OSError):
    """The kernel refused one layer: `layer` names it, `errno` is the cause, `remedy` one line of advice."""

    def __init__(self, layer: str, errno: int, remedy: str) -> None:
        super().__init__(errno, f"{layer}: the kernel refused it ({os.strerror(errno)}); {remedy}")
        self.layer = layer
        self.remedy = remedy
