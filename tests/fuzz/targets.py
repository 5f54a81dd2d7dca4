"""The list of fuzz targets: name, function, corpus, and which share of the time it gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import parsers
import vmbus_server

ROOT = Path(__file__).resolve().parents[2]


class Target(NamedTuple):
    """One target. `share` of the seconds: parsers without state are through in less."""

    run: Callable[[bytes], None]
    corpus: Path
    share: float


_NATIVE = ROOT / "native" / "fuzz" / "corpus"

TARGETS: dict[str, Target] = {
    "vmbus_server": Target(vmbus_server.vmbus_server, Path(__file__).parent / "corpus" / "vmbus_server", 1.0),
    "channel_messages": Target(parsers.channel_messages, _NATIVE / "channel_messages", 1 / 4),
    "gpadl": Target(parsers.gpadls, _NATIVE / "gpadl", 1 / 4),
    "nvsp": Target(parsers.nvsp_messages, _NATIVE / "nvsp", 1 / 4),
    "rndis": Target(parsers.rndis_messages, _NATIVE / "rndis", 1 / 4),
    "integration": Target(
        parsers.integration_messages, Path(__file__).parent / "corpus" / "integration", 1 / 4
    ),
    "door": Target(parsers.door_frames, _NATIVE / "door", 1 / 4),
}
