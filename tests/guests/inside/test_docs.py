"""docs/guests.md: its commands run, one after the other, as shown."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.guests.stock_guest import Console, StockGuest

if TYPE_CHECKING:
    from tests.guests.inside.world import World

PAGE = Path(__file__).resolve().parents[3] / "docs" / "guests.md"


def commands() -> list[str]:
    """Every line that a reader would type, in order."""
    blocks = re.findall(r"^```console\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]


def _probed(words: list[str]) -> list[str]:
    """The same ping by our own probe, on a machine without ping(8)."""
    at = words.index("--")
    probe = [sys.executable, "-m", "netvsc.probe", "ping", words[-1], "--count", "3"]
    # Options stand before the partition's name: what follows it is the guest's.
    return [*words[:3], "-e", f"PYTHONPATH={PAGE.parents[1]}", *words[3:at], "--", *probe]


def test_the_five_minutes_are_as_shown(world: World) -> None:
    told = {"KERNEL": world.manifest["kernel"]["path"], "INITRD": world.manifest["initrd"]}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**world.environment, "VSWITCH_RUN_DIR": folder, "NO_COLOR": "1", **told}
        del environment["VSWITCH_SOCKET"]
        guest = None
        said = {}
        try:
            for command in commands():
                words = [os.path.expandvars(word) for word in shlex.split(command)]
                words = [told.get(word.removeprefix("$"), word) for word in words]
                assert words[0] == "vswitch"
                if "ping" in words and not shutil.which("ping"):
                    words = _probed(words)
                done = subprocess.run(
                    [sys.executable, "-P", "-m", "vswitchctl", *words[1:]],
                    env=environment, capture_output=True, text=True, timeout=120, check=False,
                )  # fmt: skip
                assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
                said[command] = done.stdout
                if command == "vswitch partition start mine":
                    console = Console.by(
                        [sys.executable, "-P", "-m", "vswitchctl", "partition", "console", "mine"],
                        environment,
                    )
                    guest = StockGuest("mine", console, world.folder / "console-docs.log")
                    guest.wait_ready(150)
                    guest.sh("until ip address show eth0 | grep -q 10.0.0.1/; do sleep 1; done", 60)
        finally:
            if guest:
                guest.close()
            subprocess.run(
                [sys.executable, "-P", "-m", "vswitchctl", "daemon", "stop", "--stop-guests"],
                env=environment, capture_output=True, timeout=60, check=False,
            )  # fmt: skip
        assert guest is not None
        assert "shutdown hooks: ran" in guest.console
        assert any("mine" in text and "running" in text for text in said.values())
