"""A scapy socket on a port of a running daemon: endpoint and monitor, and frames injected from a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw
from scapy.sendrecv import AsyncSniffer, sniff
from scapy.utils import wrpcap
from waiting import eventually

from vswitchctl.errors import VswitchError
from vswitchctl.scapy_socket import PortSocket

if TYPE_CHECKING:
    from tests.conftest import RunningDaemon

A, B = "02:00:00:00:00:0a", "02:00:00:00:00:0b"


@pytest.fixture
def switch(daemon: RunningDaemon) -> RunningDaemon:
    daemon.client.create_switch("s0")
    for port in ("a", "b"):
        daemon.client.create_port(f"s0/{port}")
    return daemon


def test_two_scapy_sockets_are_hosts_on_the_switch(switch: RunningDaemon) -> None:
    with PortSocket("s0/a", client=switch.client) as a, PortSocket("s0/b", client=switch.client) as b:
        responder = AsyncSniffer(
            opened_socket=b,
            count=1,
            lfilter=lambda p: ARP in p,
            prn=lambda p: b.send(
                Ether(src=B, dst=p.src) / ARP(op=2, hwsrc=B, psrc=p[ARP].pdst, hwdst=p.src, pdst=p[ARP].psrc)
            ),
        )
        responder.start()
        answer = a.sr1(
            Ether(src=A, dst="ff:ff:ff:ff:ff:ff") / ARP(hwsrc=A, psrc="10.0.0.1", pdst="10.0.0.2"),
            timeout=10,
            verbose=False,
        )
        responder.join(timeout=10)
    assert answer is not None
    assert answer[ARP].hwsrc == B
    assert answer[ARP].psrc == "10.0.0.2"


def test_bursts_arrive_whole_and_in_order(switch: RunningDaemon) -> None:
    with PortSocket("s0/a", client=switch.client) as a, PortSocket("s0/b", client=switch.client) as b:
        b.send(Ether(src=B, dst="ff:ff:ff:ff:ff:ff", type=0x88B5) / Raw(bytes(46)))
        assert a.recv() is not None
        sent = [Ether(src=A, dst=B, type=0x88B5) / Raw(n.to_bytes(2, "big") + bytes(44)) for n in range(257)]
        for frame in sent:
            a.send(frame)
        got = sniff(opened_socket=b, count=257, timeout=20)
    assert [bytes(frame) for frame in got] == [bytes(frame) for frame in sent]


def test_a_monitor_sees_both_directions_and_speaks_for_the_nic(switch: RunningDaemon) -> None:
    with (
        PortSocket("s0/a", client=switch.client) as a,
        PortSocket("s0/b", client=switch.client) as b,
        PortSocket("s0/a", mode="monitor", client=switch.client) as beside,
    ):
        ping = Ether(src=A, dst="ff:ff:ff:ff:ff:ff") / IP(src="10.0.0.1", dst="10.0.0.2") / ICMP(id=7)
        a.send(ping)
        assert bytes(b.recv()) == bytes(ping)
        reply = Ether(src=B, dst=A) / IP(src="10.0.0.2", dst="10.0.0.1") / ICMP(type=0, id=7)
        b.send(reply)
        assert bytes(a.recv()) == bytes(reply)
        seen = sniff(opened_socket=beside, count=2, timeout=10)
        assert [bytes(frame) for frame in seen] == [bytes(ping), bytes(reply)]
        spoken = Ether(src=A, dst=B) / IP(src="10.0.0.1", dst="10.0.0.2") / TCP(dport=80)
        beside.send(spoken)
        assert bytes(b.recv()) == bytes(spoken)


def test_a_port_has_one_endpoint(switch: RunningDaemon) -> None:
    with PortSocket("s0/a", client=switch.client), pytest.raises(VswitchError, match="s0/ports/a"):
        PortSocket("s0/a", client=switch.client)
    with PortSocket("s0/a", client=switch.client):
        pass


def test_an_unknown_port_is_an_error_that_names_it(switch: RunningDaemon) -> None:
    with pytest.raises(VswitchError, match="switches/s0/ports/zz"):
        PortSocket("s0/zz", client=switch.client)


def test_when_the_daemon_dies_the_socket_says_so(switch: RunningDaemon) -> None:
    with PortSocket("s0/a", client=switch.client) as a:
        switch.kill()
        assert a.recv_raw() == (None, None, None)
        with pytest.raises(VswitchError):
            a.send(Ether())
    switch.restart()


def test_inject_lets_the_frames_of_a_file_enter_at_a_port(switch: RunningDaemon, tmp_path: Path) -> None:
    file = tmp_path / "x.pcap"
    frames = [Ether(src=A, dst=B, type=0x88B5) / Raw(bytes([n]) * 46) for n in range(3)]
    wrpcap(str(file), frames)
    with PortSocket("s0/b", client=switch.client) as b:
        done = switch.cli("inject", "s0/a", str(file))
        assert done.stdout == "3 frames, 180 bytes\n", done.stderr
        got = sniff(opened_socket=b, count=3, timeout=10)
    assert [bytes(frame) for frame in got] == [bytes(frame) for frame in frames]
    assert eventually_counted(switch) == 3


def eventually_counted(switch: RunningDaemon) -> int:
    eventually(lambda: switch.client.get_port("s0/a").counters.in_packets >= 3)
    return switch.client.get_port("s0/a").counters.in_packets
