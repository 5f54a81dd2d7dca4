"""Writes initial RAM disks: the kernel's `newc` cpio format, compressed; the same bytes for the same content.

Format: Documentation/driver-api/early-userspace/buffer-format.rst of the Linux sources.
"""

from __future__ import annotations

import gzip
import stat
from pathlib import Path


class Archive:
    """Files gathered in memory; folders are made as they are needed."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, bytes]] = {}

    def folder(self, path: str) -> None:
        """A folder and those above it."""
        parts = path.strip("/").split("/")
        for count in range(1, len(parts) + 1):
            self._entries.setdefault("/".join(parts[:count]), (stat.S_IFDIR | 0o755, b""))

    def _put(self, path: str, mode: int, data: bytes) -> None:
        path = path.strip("/")
        if "/" in path:
            self.folder(path.rpartition("/")[0])
        self._entries[path] = (mode, data)

    def file(self, path: str, data: bytes | str, mode: int = 0o644) -> None:
        """A regular file."""
        self._put(path, stat.S_IFREG | mode, data.encode() if isinstance(data, str) else data)

    def copy(self, path: str, source: Path, mode: int = 0o755) -> None:
        """A regular file with the content of `source`."""
        self.file(path, source.read_bytes(), mode)

    def link(self, path: str, target: str) -> None:
        """A symbolic link."""
        self._put(path, stat.S_IFLNK | 0o777, target.encode())

    def packed(self) -> bytes:
        """The archive, compressed."""
        out = bytearray()
        for number, (name, (mode, data)) in enumerate(
            [*sorted(self._entries.items()), ("TRAILER!!!", (0, b""))]
        ):
            fields = (number + 1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name.encode()) + 1, 0)
            out += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
            out += bytes(-len(out) % 4)
            out += data
            out += bytes(-len(out) % 4)
        return gzip.compress(bytes(out), compresslevel=1, mtime=0)
