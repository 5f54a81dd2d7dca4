"""Scapy layers for VMBus, NVSP and RNDIS: field tables of their own, independent of vswitch's codecs.

`import netvsc.scapy_layers` is enough for scapy to dissect captures made with `capture --vmbus`. Importing
this needs scapy (GPL-2.0), which vswitch itself does not.
"""

from __future__ import annotations

from netvsc.scapy_layers.captured import VMBusCaptured, summary
from netvsc.scapy_layers.nvsp import NVSP
from netvsc.scapy_layers.rndis import RNDIS
from netvsc.scapy_layers.vmbus import VMBusMessage, VMBusPacket

__all__ = ["NVSP", "RNDIS", "VMBusCaptured", "VMBusMessage", "VMBusPacket", "summary"]
