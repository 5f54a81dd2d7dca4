"""What an extension's file imports: `from vswitch.extension import Filter, Packet, Verdict`."""

from __future__ import annotations

from vswitch.extension.packet import Packet
from vswitch.extension.plugin import Filter
from vswitch.extension.verdict import Verdict

__all__ = ["Filter", "Packet", "Verdict"]
