"""Labs: a file naming guests and switches becomes a running network; also demo, doctor and a pytest plugin.

Everything here is a client of the daemon's API (`vswitch.v1`) and of nothing else on the host side.
"""

from __future__ import annotations

from vswitchlab.problems import LabFileError, Problem
from vswitchlab.resolve import resolve
from vswitchlab.source import load_file, load_text
from vswitchlab.topology import Lab

__all__ = ["Lab", "LabFileError", "Problem", "load_file", "load_text", "resolve"]
