"""The errors that bad bytes from the other side of a door raise."""

from __future__ import annotations


class WireError(ValueError):
    """Bytes that no conforming peer sends; the message names the object and what was expected of it."""


class UnknownMessage(WireError):
    """A message whose type number this protocol does not have.

    Kept apart from malformed messages because the protocols answer the two differently: VMBus ignores an
    unknown channel message, RNDIS answers an unknown request with "not supported".
    """

    def __init__(self, protocol: str, number: int) -> None:
        super().__init__(f"{protocol}: unknown message type {number:#x}")
        self.protocol = protocol
        self.number = number


class RingError(WireError):
    """The peer's ring indices or packet lengths lie; the channel that owns the ring is lost."""


class MemoryAccessError(WireError):
    """An address or length outside the partition's memory, or an access after the memory was released."""
