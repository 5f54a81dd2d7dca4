"""The data path against a scripted host: sections, aggregation, back-pressure, completions, lies."""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from typing import TYPE_CHECKING

import pytest
from scripted_host import SLOT, FakeLink, Host, until

from netvsc import frames
from vswitch_wire import nvsp, packet, rndis
from vswitch_wire.memory import drain_fd

if TYPE_CHECKING:
    from conftest import Nic

BROADCAST = b"\xff" * 6 + bytes.fromhex("020000000001") + b"\x08\x06"


def frame(number: int, size: int = 60) -> bytes:
    return BROADCAST + struct.pack(">I", number) + bytes(size - 18)


async def settled(nic: Nic) -> None:
    """The native worker has done all that it was told until now, and published what it had received."""
    marker = (1 << 40, nvsp.NVSP_STAT_SUCCESS)
    nic.path.send_completion(marker[0], nvsp.SendRndisPacketComplete(marker[1]).pack(40))
    await until(lambda: marker in nic.host.completed)
    nic.host.completed.remove(marker)


@pytest.fixture
async def running(nic: Nic) -> Nic:
    await nic.driver.start(1500)
    await nic.driver.set_filter(True)
    await settled(nic)
    assert len(nic.host.completed) == nic.host.next_slot
    nic.host.sent.clear()
    nic.host.messages.clear()
    nic.host.completed.clear()
    return nic


async def test_frames_reach_the_host_in_order(host: Host, link: FakeLink, running: Nic) -> None:
    for number in range(40):
        link.send(frame(number))
    await until(lambda: len(host.messages) == 40)
    assert host.messages == [frame(number) for number in range(40)]


async def test_frames_that_wait_together_share_a_section_of_at_most_eight(
    host: Host, link: FakeLink, running: Nic
) -> None:
    running.path.set_running(False)
    await settled(running)
    assert running.path.stats()["in_flight"] == 0
    for number in range(20):
        link.send(frame(number, 61))
    running.path.set_running(True)
    await until(lambda: len(host.messages) == 20)
    assert len(host.sent) == 3
    assert host.messages == [frame(number, 61) for number in range(20)]


async def test_a_frame_larger_than_a_section_goes_by_gpa_direct(
    host: Host, link: FakeLink, running: Nic
) -> None:
    link.send(frame(1, 9000))
    await until(lambda: len(host.messages) == 1)
    assert host.messages[0] == frame(1, 9000)
    (item,) = host.sent
    assert [entry.byte_count for entry in item.ranges] == [9044]


async def test_without_a_free_section_frames_stay_with_the_kernel(
    host: Host, link: FakeLink, running: Nic
) -> None:
    host.hold_completions = True
    for number in range(3000):
        link.send(frame(number, 1000))
    await until(lambda: running.path.stats()["tx_stopped"] > 0)
    assert len(link.outgoing) > 1000
    await until(lambda: len(host.held) == 256 * 4096 // 6144 - 1)
    assert len(host.held) == len(set(host.held)) == 256 * 4096 // 6144 - 1
    host.hold_completions = False
    for identity in host.held:
        host.release(identity)
    host.interrupt()
    await until(lambda: len(host.messages) == 3000)
    assert [int.from_bytes(data[14:18], "big") for data in host.messages] == list(range(3000))


async def test_every_receive_packet_is_completed_once_with_its_own_id(
    host: Host, link: FakeLink, running: Nic
) -> None:
    ids = [
        host.send_rndis(rndis.Packet(frame(n)).pack(), rndis.Packet(frame(n + 100)).pack()) for n in range(30)
    ]
    host.interrupt()
    await until(lambda: len(host.completed) == 30)
    assert host.completed == [(identity, nvsp.NVSP_STAT_SUCCESS) for identity in ids]
    assert [data[10:] for data in link.received[:2]] == [frame(0), frame(100)]
    assert len(link.received) == 60


@pytest.mark.parametrize(
    "message",
    [
        b"\1\0\0\0",
        struct.pack("<2I", 1, 4000) + bytes(60),
        rndis.Packet(frame(1)).pack()[:50],
        struct.pack("<2I", 1, 60) + struct.pack("<I", 0xFFFFFFF0) + bytes(48),
    ],
)
async def test_a_malformed_message_is_completed_as_failed_and_counted(
    host: Host, link: FakeLink, running: Nic, message: bytes
) -> None:
    good = rndis.Packet(frame(2)).pack()
    identity = host.send_rndis(message, good)
    host.interrupt()
    await until(lambda: len(host.completed) == 1)
    assert host.completed == [(identity, nvsp.NVSP_STAT_FAIL)]
    assert running.path.stats()["rx_errors"] == 1
    assert [data[10:] for data in link.received] == [frame(2)]


async def test_a_run_of_coalesced_segments_arrives_as_one_frame(
    host: Host, link: FakeLink, running: Nic
) -> None:
    whole = frame(7, 3000)

    def piece(data: bytes, flags: int) -> bytes:
        info = rndis.PerPacketInfo(0x80000001, struct.pack("<BBH", 1, flags, 0))
        return rndis.Packet(data, (info,)).pack()

    host.send_rndis(piece(whole[:1000], 1 | 2), piece(whole[1000:2000], 1), piece(whole[2000:], 1 | 4))
    host.send_rndis(piece(whole[:1000], 1 | 2))  # a run that does not end in its packet
    host.interrupt()
    await until(lambda: len(host.completed) == 2)
    assert [data[10:] for data in link.received] == [whole]
    assert [status for _, status in host.completed] == [nvsp.NVSP_STAT_SUCCESS, nvsp.NVSP_STAT_FAIL]


async def test_completions_for_what_was_never_sent_change_nothing(
    host: Host, link: FakeLink, running: Nic
) -> None:
    for identity in (1 << 32 | 5, 1 << 32 | 0xFFFF, 2 << 32 | 1, 3 << 32, 9 << 40):
        host.release(identity)
    host.interrupt()
    await until(lambda: running.path.stats()["stray_completions"] == 5)
    link.send(frame(1))
    await until(lambda: len(host.messages) == 1)


async def test_a_stopped_path_completes_what_it_receives_and_reads_no_frames(
    host: Host, link: FakeLink, running: Nic
) -> None:
    running.path.set_running(False)
    await settled(running)
    link.send(frame(1))
    host.send_rndis(rndis.Packet(frame(2)).pack())
    host.interrupt()
    await until(lambda: len(host.completed) == 1)
    assert (link.received, link.waiting) == ([], True)
    assert running.path.stats()["rx_dropped"] == 1


@pytest.mark.parametrize("ring_pages", [64])
async def test_a_host_that_reads_late_and_interrupts_only_when_asked_loses_nothing(
    host: Host, running: Nic
) -> None:
    """Completions fill the ring and what waits behind it, reading stops; one signal, and all goes on."""
    loop = asyncio.get_running_loop()
    loop.remove_reader(host.signalled)
    message = [packet.TransferRange(4, host.next_slot * SLOT)]
    body = nvsp.SendRndisPacket(nvsp.RMC_DATA).pack(40)
    waiting = deque(range(63 * 4096 // 32 + 4096 + 5000))
    everything = [(identity, nvsp.NVSP_STAT_FAIL) for identity in waiting]

    def offer(asked: bool) -> None:
        while waiting and host.writer.write(
            packet.encode_transfer_pages(waiting[0], nvsp.NETVSC_RECEIVE_BUFFER_ID, message, body)
        ):
            waiting.popleft()
        if host.writer.commit() or asked:
            host.wake()

    # Until the guest has no room for another completion: it reads no more, so the host cannot write.
    offer(False)
    offered = -1
    while offered != len(waiting):
        offered = len(waiting)
        await asyncio.sleep(0.5)
        offer(False)
    assert len(waiting) > 1000

    def on_signal() -> None:
        drain_fd(host.signalled)
        asked = False
        while data := host.reader.read(64):
            for entry in data:
                host.on_packet(packet.decode(entry))
            asked |= host.reader.commit()
        offer(asked)

    loop.add_reader(host.signalled, on_signal)
    await until(lambda: len(host.completed) == len(everything), seconds=20)
    assert host.completed == everything


def test_the_bounce_buffer_takes_the_largest_frame() -> None:
    largest = bytes(frames.VNET.size) + BROADCAST + bytes(65535)
    assert len(frames.transmit(largest, checksum=True)) <= 17 * 4096
