"""What users do to see and steer frames, typed as they type it, with two guests: extension, capture,
trace.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import dpkt
import pytest
from scapy.utils import PcapNgReader
from waiting import eventually

import vswitch_native
from netvsc.scapy_layers import NVSP, VMBusCaptured
from vswitch_api.v1 import nic_pb2
from vswitchctl.capture_file import Record, read
from vswitchctl.frame_text import describe
from vswitchctl.launch import ROOT

if TYPE_CHECKING:
    from tests.conftest import RunningDaemon, StartDaemon

pytestmark = pytest.mark.timeout(150)

ENGINES = ["python", *(["native"] if vswitch_native.AVAILABLE else [])]
EXAMPLES = ROOT / "examples" / "extensions"
A, B = "02:00:00:00:0a:01", "02:00:00:00:0a:02"
CONNECT = (
    "import socket, sys\n"
    "s = socket.socket(); s.settimeout(float(sys.argv[2]))\n"
    "try:\n"
    "    s.connect(('10.0.0.2', int(sys.argv[1]))); print('connected')\n"
    "except ConnectionRefusedError:\n"
    "    print('refused')\n"
    "except TimeoutError:\n"
    "    print('silence')\n"
)


@pytest.fixture(params=ENGINES)
def pair(request: pytest.FixtureRequest, daemon_factory: StartDaemon) -> RunningDaemon:
    """A daemon with two guests, a (10.0.0.1) and b (10.0.0.2), on one switch."""
    return start_pair(daemon_factory(engine=request.param))


@pytest.fixture
def default_pair(daemon_factory: StartDaemon) -> RunningDaemon:
    """The same with the default engine alone."""
    return start_pair(daemon_factory())


def start_pair(daemon: RunningDaemon) -> RunningDaemon:
    daemon.client.create_switch("s0")
    for number, (name, mac) in enumerate((("a", A), ("b", B)), 1):
        daemon.client.create_partition(name)
        daemon.client.create_nic(
            f"{name}/eth0", port=f"s0/{name}", mac=mac, addresses=[f"10.0.0.{number}/24"]
        )
        daemon.client.start_partition(name)
    assert ping(daemon) == 3
    return daemon


def ping(daemon: RunningDaemon, count: int = 3) -> int:
    """Answers to so many pings from a to b."""
    command = [sys.executable, "-m", "netvsc.probe", "ping", "10.0.0.2", "--count", str(count)]
    done = daemon.client.run_in("a", [*command, "--interval", "0.05", "--json"], timeout=30)
    return int(json.loads(done.stdout)["received"])


def connect(daemon: RunningDaemon, port: int, patience: float = 5) -> str:
    """What guest a gets when it connects to guest b: nobody listens there, so a refusal means "it
    arrived".
    """
    command = [sys.executable, "-c", CONNECT, str(port), str(patience)]
    return daemon.client.run_in("a", command, timeout=30).stdout.decode().strip()


def checked(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def capturing(daemon: RunningDaemon, *arguments: str) -> Iterator[list[Record]]:
    """`vswitch capture start ... --write -` into a pipe of this process; the records are there after the
    block.
    """
    environment = {
        **os.environ,
        "VSWITCH_RUN_DIR": str(daemon.run_dir),
        "VSWITCH_SOCKET": str(daemon.socket),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-P", "-m", "vswitchctl.main", "capture", "start", *arguments, "--write", "-"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        assert b"Ctrl-C ends it" in process.stderr.readline()
        records: list[Record] = []
        try:
            yield records
            time.sleep(0.2)
        finally:
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=20)
        records += read(io.BytesIO(output))
        assert len(list(dpkt.pcapng.Reader(io.BytesIO(output)))) == len(records), "dpkt reads the same"
        (daemon.run_dir / "seen.pcapng").write_bytes(output)


def test_telnet_is_blocked_seen_explained_and_restored(pair: RunningDaemon) -> None:
    assert connect(pair, 23) == "refused"
    with capturing(pair, "s0") as records:
        loaded = checked(pair.cli("extension", "load", str(EXAMPLES / "block_telnet.py"), "--switch", "s0"))
        assert "block_telnet" in loaded
        assert connect(pair, 23, patience=0.5) == "silence"
        assert connect(pair, 80) == "refused", "the rest flows"
        assert ping(pair) == 3
        traced = checked(
            pair.cli(
                "trace",
                "s0/a",
                "--packet",
                f'Ether(src="{A}", dst="{B}")/IP(src="10.0.0.1", dst="10.0.0.2")/TCP(dport=23, flags="S")',
            )
        )
        assert "=> dropped: FILTERED: block_telnet: " in traced
        assert "telnet is not allowed here" in traced
        assert "l4_dst" in traced
        short = checked(pair.cli("trace", "s0/a", "--packet", 'Ether()/IP(dst="10.0.0.2")/TCP(dport=80)'))
        assert "=> delivered to s0/b\n" in short, "what is left open is as the port's NIC would send it"
        checked(pair.cli("extension", "unload", "s0/block_telnet"))
        assert connect(pair, 23) == "refused", "restored"
    dropped = [record for record in records if record.drop_code is not None]
    assert dropped
    assert {record.comment for record in dropped} == {
        "dropped: Filtered (8) by block_telnet: telnet is not allowed here"
    }
    for record in dropped:
        segment = dpkt.ethernet.Ethernet(record.data).data.data
        assert (segment.dport, bool(segment.flags & dpkt.tcp.TH_SYN)) == (23, True)
        assert (record.interface, record.direction) == ("a", "in")
    drops = pair.client.get_port("s0/a").counters.drops
    assert [(drop.reason, drop.packets) for drop in drops if drop.code == 8] == [("FILTERED", len(dropped))]
    requests = {
        record.packet_id: record
        for record in records
        if isinstance(dpkt.ethernet.Ethernet(record.data).data.data, dpkt.icmp.ICMP)
        and (record.interface, record.direction) == ("a", "in")
    }
    assert len(requests) == 3
    delivered = {
        record.packet_id for record in records if (record.interface, record.direction) == ("b", "out")
    }
    assert set(requests) <= delivered, "one frame has the same id where it came in and where it went out"
    shown = checked(pair.cli("capture", "show", str(pair.run_dir / "seen.pcapng"), "--drops"))
    assert shown.count("\n") == len(dropped)
    assert "10.0.0.2:23 TCP SYN" in shown
    shown = checked(pair.cli("capture", "show", str(pair.run_dir / "seen.pcapng"), "--filter", "icmp"))
    assert shown.count("echo request") == 6, "three pings, seen at two ports each"


def test_trace_of_a_file_says_what_then_happens(default_pair: RunningDaemon, tmp_path: Path) -> None:
    pair = default_pair
    with capturing(pair, "s0/a") as records:
        assert ping(pair, 1) == 1
    request = next(record for record in records if "echo request" in line_of(record))
    file = tmp_path / "one.pcap"
    with file.open("wb") as stream:
        dpkt.pcap.Writer(stream).writepkt(request.data, 0.0)
    traced = checked(pair.cli("trace", "s0/a", "--pcap", str(file)))
    assert "=> delivered to s0/b" in traced
    before = pair.client.get_port("s0/b").counters.out_packets
    assert checked(pair.cli("inject", "s0/a", str(file))).startswith("1 frame, ")
    eventually(lambda: pair.client.get_port("s0/b").counters.out_packets > before)


def test_a_capture_on_a_pipe_is_there_while_it_runs(default_pair: RunningDaemon) -> None:
    """As `... --write - | wireshark -k -i -` needs it: whole blocks at once, not at the end."""
    pair = default_pair
    environment = {**os.environ, "VSWITCH_RUN_DIR": str(pair.run_dir), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-m", "vswitchctl.main"]
    with (
        subprocess.Popen(
            [*command, "capture", "start", "s0", "--write", "-"], env=environment, stdout=subprocess.PIPE
        ) as capture,
        subprocess.Popen(
            [*command, "capture", "show", "-"],
            env=environment | {"PYTHONUNBUFFERED": "1"},
            stdin=capture.stdout,
            stdout=subprocess.PIPE,
            text=True,
        ) as show,
    ):
        assert capture.stdout is not None
        assert show.stdout is not None
        capture.stdout.close()
        try:
            eventually(lambda: len(pair.client.list_captures()) == 1)
            assert ping(pair, 1) == 1
            while "echo reply" not in (line := show.stdout.readline()):
                assert line, "the reader ended before it saw the ping"
            assert capture.poll() is None, "the packets were shown while the capture ran"
        finally:
            capture.send_signal(signal.SIGINT)
        assert capture.wait(20) == 0
        show.stdout.read()
        assert show.wait(20) == 0


def line_of(record: Record) -> str:
    return describe(record.data)


def test_the_vmbus_of_a_guest_is_recorded_and_scapy_dissects_it(pair: RunningDaemon) -> None:
    with capturing(pair, "a", "--vmbus") as records:
        assert ping(pair) == 3
        pair.client.create_nic("a/eth1", port="s0/extra", addresses=["10.0.1.1/24"])
        eventually(lambda: pair.client.get_nic("a/eth1").state == nic_pb2.NIC_STATE_OPEN)
    assert {record.link_type for record in records} == {147}
    layers = [VMBusCaptured(record.data) for record in records]
    ring = [layer for layer in layers if layer.kind == 2 and NVSP in layer]
    kinds = {(layer.sender, int(layer[NVSP].type)) for layer in ring}
    assert {(0, 107), (1, 107), (0, 108), (1, 108)} <= kinds, "data and completions both ways"
    messages = [layer.payload.payload for layer in layers if layer.kind == 1]
    names = [message.name for message in messages]
    for name in ("OFFERCHANNEL", "GPADL_HEADER", "GPADL_CREATED", "OPENCHANNEL", "OPENCHANNEL_RESULT"):
        assert f"VMBus {name}" in names
    offer = next(message for message in messages if message.name == "VMBus OFFERCHANNEL")
    assert str(offer.class_id) == "f8615163-df3e-46c5-913f-f2d2f965ed0e"
    with PcapNgReader(str(pair.run_dir / "seen.pcapng")) as reader:
        assert isinstance(next(iter(reader)), VMBusCaptured), "scapy opens the file by its link type"
    shown = checked(pair.cli("capture", "show", str(pair.run_dir / "seen.pcapng")))
    assert "host > guest channel message VMBus OFFERCHANNEL" in shown
    assert "NVSP SEND_RNDIS_PKT channel_type=data" in shown


def test_an_extension_s_mistakes_are_told_where_the_user_looks(
    default_pair: RunningDaemon, tmp_path: Path
) -> None:
    pair = default_pair
    broken = tmp_path / "broken.py"
    broken.write_text("from vswitch.extension import Filter\nclass A(Filter)\n")
    done = pair.cli("extension", "load", str(broken), "--switch", "s0")
    assert done.returncode != 0
    assert "broken.py:2: expected ':'" in done.stderr
    raising = tmp_path / "raising.py"
    raising.write_text(
        "from vswitch.extension import Filter\n"
        "class A(Filter):\n"
        "    def ingress(self, packet):\n"
        "        return packet.drop('x') if packet.icmp else 1 / 0\n"
    )
    checked(pair.cli("extension", "load", str(raising), "--switch", "s0", "--on-failure", "closed"))
    assert connect(pair, 80, patience=0.5) == "silence", "fail-closed"
    eventually(lambda: "ZeroDivisionError" in checked(pair.cli("extension", "show", "s0/raising")))
    assert (
        "raising.py:4: ZeroDivisionError: division by zero" in pair.client.get_extension("s0/raising").detail
    )
    reasons = {drop.reason for drop in pair.client.get_port("s0/a").counters.drops}
    assert "REQUIRED_EXTENSION_MISSING" in reasons
    checked(pair.cli("extension", "unload", "s0/raising"))
    assert connect(pair, 80) == "refused"
