"""`vswitch doctor`: tries what guests need, and says of each lack its cause and what mends it."""

from __future__ import annotations

from vswitchlab.doctor.facts import Facts, Trial, gather
from vswitchlab.doctor.findings import Finding, Level, blockers, diagnose

__all__ = ["Facts", "Finding", "Level", "Trial", "blockers", "diagnose", "gather"]
