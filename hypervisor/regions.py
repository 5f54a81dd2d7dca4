"""Memory regions of a partition.

Made and sealed by the host, and recognised again when a guest's side brings them back.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from typing import Any

from vswitch_wire.memory import REGION_SEALS, Region, create_region

_F_GET_SEALS = 1034
_PAGE = 4096
# Guest-physical addresses from here to 4 GiB belong to devices on a PC; memory goes around them.
_HOLE_START = 0xC000_0000
_HOLE_END = 0x1_0000_0000


@dataclass(frozen=True, slots=True)
class RegionIdentity:
    """What makes a memfd this region's: the host records it when it makes the region."""

    gpa: int
    size: int
    device: int
    inode: int

    @classmethod
    def of(cls, region: Region) -> RegionIdentity:
        """The identity of an open region."""
        status = os.fstat(region.fd)
        return cls(region.gpa, region.size, status.st_dev, status.st_ino)

    def check(self, fd: int) -> Region:
        """The region behind `fd`.

        ValueError, which says what differs, unless it is this one with its seals.
        """
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != (self.device, self.inode):
            raise ValueError(f"region at {self.gpa:#x}: another file came back than was handed out")
        if status.st_size != self.size:
            raise ValueError(
                f"region at {self.gpa:#x}: {status.st_size} bytes came back, {self.size} were handed out"
            )
        try:
            seals = fcntl.fcntl(fd, _F_GET_SEALS)
        except OSError:
            raise ValueError(f"region at {self.gpa:#x}: what came back is not a memfd") from None
        if seals & REGION_SEALS != REGION_SEALS:
            raise ValueError(f"region at {self.gpa:#x}: its size is not sealed (seals {seals:#x})")
        return Region(self.gpa, self.size, fd)

    def save(self) -> dict[str, int]:
        """As plain values."""
        return {"gpa": self.gpa, "size": self.size, "device": self.device, "inode": self.inode}

    @classmethod
    def restore(cls, saved: dict[str, Any]) -> RegionIdentity:
        """From `save()`."""
        return cls(saved["gpa"], saved["size"], saved["device"], saved["inode"])


def create_regions(name: str, memory_bytes: int) -> list[Region]:
    """Sealed memfds for `memory_bytes` (rounded up to whole pages) from address 0, around the PC's
    device hole.
    """
    if memory_bytes <= 0:
        raise ValueError(f"partition {name}: {memory_bytes} bytes of memory, at least one page is needed")
    left = (memory_bytes + _PAGE - 1) // _PAGE * _PAGE
    layout = [(0, min(left, _HOLE_START))]
    if left > _HOLE_START:
        layout.append((_HOLE_END, left - _HOLE_START))
    regions: list[Region] = []
    try:
        for gpa, size in layout:
            regions.append(Region(gpa, size, create_region(f"vswitch-{name}-{gpa:x}", size)))
    except BaseException:
        for region in regions:
            os.close(region.fd)
        raise
    return regions
