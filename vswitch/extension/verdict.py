"""What an extension answers for a frame."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """Made by `packet.allow()` and `packet.drop(reason)`."""

    dropped: bool
    reason: str = ""
    """Shown with the counted drop, in captures and in traces; at most 256 bytes are kept."""
    ttl: float | None = None
    """Seconds for which the verdict holds; None: for as long as its flow's cache entry lives."""
    cacheable: bool = True
    """False: ask again for the next frame of the flow."""
