"""The `lab` fixture: passes hide everything; failures carry packets, drop counters and the capture."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(90)

TESTS = """
def test_good(lab):
    net = lab({"guests": ["a", "b"]})
    assert net.ping("a", "b", count=2) == 0


def test_bad(lab):
    net = lab({"guests": ["a", "b"]})
    net.client.load_extension("s0", "no_ping", b'''
from vswitch.extension import Filter

class NoPing(Filter):
    def ingress(self, packet):
        return packet.drop("no ping today") if packet.icmp else packet.allow()
''')
    assert net.ping("a", "10.77.0.2", count=3, interval=0.05) == 0
"""


def test_a_failed_test_shows_the_packets_and_the_drops(tmp_path: Path) -> None:
    file = tmp_path / "test_sample.py"
    file.write_text(TESTS, encoding="utf-8")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "vswitchlab.pytest_plugin",
            "-p",
            "no:cacheprovider",
            file.name,
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=80,
        check=False,
    )
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "lab lab" in done.stdout
    assert re.search(r"drops at s0/a-eth0: .*FILTERED 3", done.stdout), done.stdout
    assert re.search(
        r"ICMP type 8 id \d+ seq 1 10\.77\.0\.1 -> 10\.77\.0\.2, .*\[.*no ping today", done.stdout
    )
    assert "test_good" not in done.stdout
