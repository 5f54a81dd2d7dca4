"""The demo's evidence: what /proc tells of a process, and what dpkt tells of a capture."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import dpkt
import pytest

from vswitch.capture.pcapng import DIRECTION_INBOUND, DIRECTION_OUTBOUND, PcapngWriter
from vswitchlab import packets, processes
from vswitchlab.shipped import example


@contextmanager
def process(code: str, *fds: int) -> Iterator[subprocess.Popen[bytes]]:
    """A child that has run `code` and waits."""
    command = [sys.executable, "-c", f"import sys\n{code}\nprint('ready', flush=True)\nsys.stdin.read()"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=fds)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        yield child
    finally:
        child.communicate()


def test_memory_door_events_and_foreign_things_are_told_apart(tmp_path: Path) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    other = tmp_path / "shortcut"
    other.write_bytes(bytes(4096))
    code = f"""
import mmap, os
memory = os.memfd_create("guest")
os.ftruncate(memory, 4096)
mapped = mmap.mmap(memory, 4096)
event = os.eventfd(0)
foreign = open({str(other)!r}, "r+b")
shared = mmap.mmap(foreign.fileno(), 4096)
"""
    door = os.fstat(there.fileno()).st_ino
    with here, there, process(code, there.fileno()) as child:
        held = processes.holdings(child.pid)
    assert len(held.memory) == 1
    assert held.mapped == held.memory
    assert held.doors == {door}
    assert held.events == 1
    assert [each for each in held.others if str(other) in each]
    assert held.foreign_maps == [str(other)]


def test_a_stream_socket_to_this_machine_is_a_shortcut() -> None:
    one, two = socket.socketpair()
    with one, two, process("", two.fileno()) as child:
        held = processes.holdings(child.pid)
    assert [each for each in held.others if "socket:" in each]
    assert not held.doors


def test_descendants_and_the_living_are_found() -> None:
    code = "import atexit, subprocess\nchild = subprocess.Popen(['sleep', '60'])\natexit.register(child.kill)"
    with process(code) as child:
        inner = processes.descendants(child.pid)
        assert len(inner) == 1
        assert processes.alive([child.pid, *inner]) == [child.pid, *inner]
        assert child.pid in processes.descendants(os.getpid())
        assert processes.namespace(child.pid, "net") == processes.namespace(os.getpid(), "net")
    assert processes.alive([child.pid]) == []


def test_processes_are_found_by_a_text_on_their_command_line(tmp_path: Path) -> None:
    with process(f"mark = {str(tmp_path)!r}") as child:
        assert processes.mentioning(str(tmp_path)) == [child.pid]
    assert processes.mentioning(str(tmp_path)) == []


def echo_frame(identifier: int, sequence: int) -> bytes:
    message = dpkt.icmp.ICMP(type=8, data=dpkt.icmp.ICMP.Echo(id=identifier, seq=sequence, data=b"x" * 8))
    packet = dpkt.ip.IP(
        src=ip_address("10.77.0.1").packed, dst=ip_address("10.77.0.2").packed, p=1, data=message
    )
    packet.len = len(packet)
    return bytes(
        dpkt.ethernet.Ethernet(dst=b"\0\x15\x5d\0\0\2", src=b"\0\x15\x5d\0\0\1", type=0x800, data=packet)
    )


def test_a_capture_is_read_back_with_ports_directions_and_reasons() -> None:
    writer = PcapngWriter()
    data = writer.section()
    a, block = writer.interface("switches/s0/ports/a-eth0")
    data += block
    b, block = writer.interface("switches/s0/ports/b-eth0")
    data += block
    frame = echo_frame(0x7600, 3)
    syn = packets.frame_to("00:15:5d:00:00:01", "00:15:5d:00:00:02", "10.77.0.1", "10.77.0.2", 23)
    data += writer.packet(a, 1_000, frame, len(frame), flags=DIRECTION_INBOUND, packet_id=7)
    data += writer.packet(b, 2_000, frame, len(frame), flags=DIRECTION_OUTBOUND, packet_id=7)
    data += writer.packet(
        a, 3_000, syn, len(syn), flags=DIRECTION_INBOUND, packet_id=8, comment="dropped: FILTERED"
    )
    first, second, third = packets.read(data)
    assert packets.echo(first) == packets.echo(second) == (8, 0x7600, 3)
    assert (first.direction, second.direction, first.packet_id) == ("in", "out", 7)
    assert packets.syn_to(third) == 23
    assert third.comment == "dropped: FILTERED"
    assert packets.echo(third) is None
    assert packets.syn_to(first) is None
    assert packets.summary(third) == (
        "switches/s0/ports/a-eth0 in: TCP SYN 10.77.0.1:40000 -> 10.77.0.2:23, 54 bytes [dropped: FILTERED]"
    )
    assert "ICMP type 8 id 30208 seq 3 10.77.0.1 -> 10.77.0.2" in packets.summary(first)


def test_a_built_syn_has_good_checksums() -> None:
    frame = packets.frame_to("00:15:5d:00:00:01", "00:15:5d:00:00:02", "10.77.0.1", "10.77.0.2", 8023)
    packet = dpkt.ethernet.Ethernet(frame).data
    assert dpkt.in_cksum(bytes(packet)[:20]) == 0
    pseudo = packet.src + packet.dst + b"\0\x06" + len(bytes(packet.data)).to_bytes(2, "big")
    assert dpkt.in_cksum(pseudo + bytes(packet.data)) == 0


def test_the_demo_finds_its_extension_and_says_where_it_looked() -> None:
    assert example("extensions/block_telnet.py").is_file()
    with pytest.raises(FileNotFoundError, match=r"neither at .* nor in the installed vswitch"):
        example("extensions/no_such.py")
