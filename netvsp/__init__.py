"""The host end of a synthetic NIC: NVSP, RNDIS, OIDs, the data channel."""

from __future__ import annotations

from netvsp.nic import NicState, SwitchPort, SyntheticNic

__all__ = ["NicState", "SwitchPort", "SyntheticNic"]
