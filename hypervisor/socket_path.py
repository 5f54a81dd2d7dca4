"""Unix socket addresses hold 107 bytes; run directories may have longer paths."""

from __future__ import annotations

import os
from pathlib import Path

_MAX_SOCKET_PATH = 100


class ShortPath:
    """A path of at most 107 bytes for AF_UNIX, through the directory's descriptor where the real one is
    longer.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._directory = -1

    def __enter__(self) -> str:
        if len(os.fsencode(self._path)) <= _MAX_SOCKET_PATH:
            return str(self._path)
        self._directory = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._directory}/{self._path.name}"

    def __exit__(self, *_: object) -> None:
        if self._directory >= 0:
            os.close(self._directory)
