"""A tap that a test feeds by hand."""

from __future__ import annotations

import contextlib
import os

from vswitch.engine import CapturedFrame


class FedTap:
    """The `CaptureTap` of an engine, without the engine."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.lost = 0
        self.closed = False
        self._frames: list[CapturedFrame] = []

    def feed(self, *frames: CapturedFrame) -> None:
        self._frames += frames
        os.eventfd_write(self.fd, 1)

    def read(self, limit: int = 1024) -> list[CapturedFrame]:
        taken, self._frames = self._frames[:limit], self._frames[limit:]
        if not self._frames:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.fd)
        return taken

    def close(self) -> None:
        self.closed = True
        os.close(self.fd)
