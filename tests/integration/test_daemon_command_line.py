"""The story of an extension, a capture, an injection and a trace, told by the command line alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vswitchctl.launch import ROOT, daemon_command, daemon_environment

if TYPE_CHECKING:
    from tests.conftest import RunningDaemon

PLUGIN = ROOT / "examples" / "extensions" / "block_telnet.py"
TELNET = "Ether(src='00:15:5d:00:00:01', dst='00:15:5d:00:00:02')/IP(dst='10.0.0.2')/TCP(dport=23)"


def write_pcap(path: Path, frame: bytes) -> None:
    """A classic pcap file of one frame."""
    header = (0xA1B2C3D4).to_bytes(4, "little") + bytes.fromhex("020004000000000000000000ffff000001000000")
    size = len(frame).to_bytes(4, "little")
    path.write_bytes(header + bytes(8) + size + size + frame)


def test_a_blocked_frame_is_injected_dropped_captured_shown_and_traced(
    daemon: RunningDaemon, tmp_path: Path
) -> None:
    cli = daemon.cli
    for arguments in (
        ["switch", "create", "s0"],
        ["port", "create", "s0/p0", "s0/p1"],
        ["extension", "load", str(PLUGIN), "--switch", "s0", "--on-failure", "closed"],
    ):
        done = cli(*arguments)
        assert done.returncode == 0, done.stderr
    assert "running" in cli("extension", "list").stdout
    traced = cli("trace", "s0/p0", "--packet", TELNET, "-o", "json")
    assert traced.returncode == 0, traced.stderr
    (frame,) = json.loads(traced.stdout)
    assert frame["drop_reason"] == "FILTERED"
    assert "block_telnet" in frame["drop_detail"]

    from vswitchctl.packets import parse_packet

    broken = cli("inject", "s0/p0", str(PLUGIN))
    assert (broken.returncode, "neither pcapng nor pcap" in broken.stderr) == (2, True), broken.stderr
    write_pcap(tmp_path / "telnet.pcap", parse_packet(TELNET))
    capture = subprocess.Popen(
        [sys.executable, "-P", "-m", "vswitchctl", "capture", "start", "s0/p0", "--write", "-"],
        env={**daemon_environment(), "VSWITCH_RUN_DIR": str(daemon.run_dir)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert capture.stderr is not None
    assert b"capturing s0/p0" in capture.stderr.readline()
    done = cli("inject", "s0/p0", str(tmp_path / "telnet.pcap"))
    assert done.stdout == f"1 frame, {len(parse_packet(TELNET))} bytes\n", done.stderr
    assert cli("capture", "list", "-o", "json").stdout.count("captures/") == 1
    capture.send_signal(signal.SIGINT)
    data, words = capture.communicate(timeout=20)
    assert capture.returncode == 0
    assert b"1 drop, 0 lost" in words
    (tmp_path / "out.pcapng").write_bytes(data)
    shown = cli("capture", "show", str(tmp_path / "out.pcapng"), "--drops")
    assert len(shown.stdout.splitlines()) == 1
    assert "block_telnet" in shown.stdout
    assert "1 FILTERED" in cli("port", "show", "s0/p0").stdout
    assert cli("extension", "unload", "s0/block_telnet").returncode == 0
    (frame,) = json.loads(cli("trace", "s0/p0", "--packet", TELNET, "-o", "json").stdout)
    assert frame.get("drop_reason") != "FILTERED"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["extension", "load", "/no/such/file.py", "--switch", "s0"], 2, "No such file"),
        (["extension", "load", str(PLUGIN), "--switch", "nowhere"], 4, "switches/nowhere does not exist"),
        (["inject", "s0/p9", str(PLUGIN)], 4, "switches/s0 does not exist"),
        (["trace", "s0/p0"], 2, "--packet or --pcap"),
        (["trace", "s0/p0", "--packet", "__import__('os').system('true')"], 2, "error"),
        (["capture", "start", "nowhere", "--write", "/dev/null"], 4, "switches/nowhere does not exist"),
        (["partition", "exec", "a", "--", "true"], 4, "partitions/a does not exist"),
        (["nic", "create", "a/eth0", "--port", "s0/p0", "--mac", "ff:ff:ff:ff:ff:ff"], 4, "partitions/a"),
    ],
)
def test_mistakes_are_told_in_words_with_their_exit_status(
    shared_daemon: RunningDaemon, arguments: list[str], status: int, words: str
) -> None:
    done = shared_daemon.cli(*arguments)
    assert words.lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr
    assert done.returncode == status


def test_who_names_a_nic_for_a_port_is_told_its_port(shared_daemon: RunningDaemon) -> None:
    client = shared_daemon.client
    client.create_switch("s0")
    client.create_partition("a")
    client.create_nic("a/eth0", port="s0/p0")
    done = shared_daemon.cli("capture", "start", "a/eth0", "--write", "/dev/null")
    assert done.returncode == 4
    assert "remedy: a/eth0 is a NIC: capture its port, s0/p0, or its ring with --vmbus" in done.stderr
    done = shared_daemon.cli("switch", "delete", "s0")
    assert "switches/s0 has 1 port and 0 extensions" in done.stderr


def test_a_daemon_in_the_foreground_ends_at_ctrl_c(tmp_path: Path) -> None:
    ready, tell = os.pipe()
    process = subprocess.Popen(
        daemon_command(tmp_path / "run", "--ready-fd", str(tell), "--engine", "python"),
        env=daemon_environment(),
        pass_fds=(tell,),
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(tell)
    assert os.read(ready, 16) == b"ready\n"
    os.close(ready)
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=20)
    assert process.returncode == 0
    events = [json.loads(line)["event"] for line in log.splitlines()]
    assert events == ["serving", "ending"]
    assert not (tmp_path / "run" / "api.sock").exists()
