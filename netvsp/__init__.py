"""The host end of a synthetic NIC: NVSP, RNDIS, OIDs, and the data channel between a guest's rings and a switch port."""

from __future__ import annotations

from netvsp.nic import NicState, SwitchPort, SyntheticNic

__all__ = ["NicState", "SwitchPort", "SyntheticNic"]
