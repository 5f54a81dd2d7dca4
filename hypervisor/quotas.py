"""What one partition may use of the host, and what one door may ask per turn."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Quotas:
    """Bounds per partition; docs/door.md section 7 says what a guest sees beyond each."""

    port_messages: int = 16
    """Messages posted by the guest that the VMBus server has not taken yet; beyond: INSUFFICIENT_BUFFERS."""
    queued_messages: int = 64
    """VMBus messages waiting for the guest's EOM before the server takes no further message from the
    guest.
    """
    channels: int = 2047
    """Channels offered at one time (relids 1..2047)."""
    gpadls: int = 1024
    """GPADLs that exist at one time."""
    gpadls_in_progress: int = 16
    """GPADLs whose page lists are incomplete."""
    gpadl_pages: int = 131072
    """Pages over all GPADLs (512 MiB): eight NICs with the largest buffers that stock drivers take."""
    frames_per_turn: int = 32
    """Door frames taken in one turn of the event loop."""
    frames_per_second: int = 20000
    """Door frames taken per second on average."""
    frames_burst: int = 1000
    """Door frames taken above the average in one go."""
    send_backlog: int = 256
    """Frames the guest has not taken before the host stops reading its door."""
    send_limit: int = 4096
    """Frames the guest has not taken before its door is closed."""
    children: int = 8
    """Partitions that this partition may create."""
    child_memory_bytes: int = 16 << 20
    """Memory of a partition that a guest creates by hypercall."""
    depth: int = 3
    """How deep partitions nest below the root."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            if getattr(self, entry.name) < 1 and entry.name not in {"children", "depth"}:
                raise ValueError(f"quota {entry.name} is {getattr(self, entry.name)}, must be at least 1")

    def save(self) -> dict[str, int]:
        """The quotas as plain values."""
        return asdict(self)

    @classmethod
    def restore(cls, saved: dict[str, Any]) -> Quotas:
        """Quotas from `save()`; keys that this version does not have are ignored."""
        known = {entry.name for entry in fields(cls)}
        return cls(**{key: int(value) for key, value in saved.items() if key in known})
