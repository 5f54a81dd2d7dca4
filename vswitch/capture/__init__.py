"""Captures: sightings of frames at ports, and a VMBus channel's messages, as live pcapng."""

from __future__ import annotations

from vswitch.capture.pcapng import PcapngWriter
from vswitch.capture.ports import PortCapture
from vswitch.capture.vmbus import VmbusCapture

__all__ = ["PcapngWriter", "PortCapture", "VmbusCapture"]
