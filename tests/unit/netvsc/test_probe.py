"""The probe that stands in for ping(8) and iperf3."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

from netvsc.probe import in_words

PROBE = [sys.executable, "-m", "netvsc.probe"]


def test_a_transfer_ends_with_the_same_digest_on_both_sides() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    server = subprocess.Popen(
        [*PROBE, "tcp-serve", "--bind", "127.0.0.1", "--port", port, "--json"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    assert json.loads(server.stdout.readline()) == {"listening": int(port)}
    command = [*PROBE, "tcp-send", "127.0.0.1", "--port", port, "--bytes", "1000001", "--json"]
    sent = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout)
    received = json.loads(server.communicate(timeout=30)[0])
    assert server.returncode == 0
    assert (sent["bytes"], sent["sha256"]) == (received["bytes"], received["sha256"])
    assert sent["bytes"] == 1000001


def test_a_summary_has_times_only_where_replies_came() -> None:
    rtt = {"min": 0.1, "avg": 0.2, "max": 0.3}
    result = {"sent": 3, "received": 2, "lost": 1, "rtt_ms": rtt, "largest_gap_ms": 201.5}
    assert in_words(result) == (
        "3 sent, 2 received, 1 lost; rtt min/avg/max 0.1/0.2/0.3 ms, largest gap 201.5 ms"
    )
    silent = {"sent": 3, "received": 0, "lost": 3, "rtt_ms": dict.fromkeys(rtt), "largest_gap_ms": 0.0}
    assert in_words(silent) == "3 sent, 0 received, 3 lost"
