"""What a frame becomes on its way to one guest: filtered, its offloads completed or passed on, as RNDIS messages.

Twin of ``native/netvsp/src/receive_path.rs``. Packet filter bits: ntddndis.h NDIS_PACKET_TYPE_*; receive checksum
and packet-id information: NDIS_TCP_IP_CHECKSUM_NET_BUFFER_LIST_INFO, and the NVSP 6.1 receive segment coalescing of
Linux ``drivers/net/hyperv`` (rndis_filter.c).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from netvsp import checksum, limits
from netvsp.rndis_data import (
    RSC_FIRST,
    RSC_LAST,
    RSC_MULTIPLE,
    RX_IP_OK,
    RX_TCP_OK,
    RX_UDP_OK,
    RX_VALUE_INVALID,
    build_packet,
    receive_info,
)
from vswitch.drops import DropReason
from vswitch.endpoint import Checksum, Frame

FILTER_DIRECTED = 0x0001
FILTER_MULTICAST = 0x0002
FILTER_ALL_MULTICAST = 0x0004
FILTER_BROADCAST = 0x0008
FILTER_PROMISCUOUS = 0x0020

RX_IPV4 = 1
RX_TCP4 = 2
RX_UDP4 = 4
RX_TCP6 = 8
RX_UDP6 = 16
RSC_IPV4 = 32
RSC_IPV6 = 64

BROADCAST = b"\xff" * 6


@dataclass(slots=True)
class Settings:
    """What decides about frames towards one guest."""

    filter: int = 0
    address: bytes = bytes(6)
    link: bool = True
    mtu: int = limits.MTU_DEFAULT
    offload: int = 0


@dataclass(slots=True)
class Run:
    """RNDIS messages of one frame; ``coalesced``: they are one packet to the guest and stay together."""

    messages: list[bytes] = field(default_factory=list)
    coalesced: bool = False


def refusal(frame: Frame, settings: Settings) -> DropReason | None:
    """Why the NIC does not take the frame: link, filter, size; None if it does."""
    if not settings.link:
        return DropReason.DISCONNECTED
    if not settings.filter:
        return DropReason.NOT_READY
    data = frame.data
    if len(data) < limits.ETHERNET_HEADER:
        return DropReason.INVALID_PACKET
    if not passes_filter(bytes(data[:6]), settings):
        return DropReason.FAILED_PACKET_FILTER
    tagged = int.from_bytes(data[12:14], "big") in checksum.ETHERTYPE_VLAN
    if not frame.offload.mss and len(data) > settings.mtu + (4 if tagged else 0):
        return DropReason.MTU_MISMATCH
    return None


def passes_filter(destination: bytes, settings: Settings) -> bool:
    """The packet filter; "multicast" takes every group, as a NIC that announces no multicast list does."""
    bits = settings.filter
    if bits & FILTER_PROMISCUOUS:
        return True
    if destination == BROADCAST:
        return bool(bits & FILTER_BROADCAST)
    if destination[0] & 1:
        return bool(bits & (FILTER_MULTICAST | FILTER_ALL_MULTICAST))
    return bool(bits & FILTER_DIRECTED) and destination == settings.address


def messages(frame: Frame, settings: Settings, counters: Counter[str]) -> Run | None:
    """The frame as RNDIS messages for this guest; None if its headers contradict its offload metadata."""
    offload = frame.offload
    if offload.mss:
        return _large(frame, settings, counters)
    if offload.checksum is Checksum.NONE:
        return Run([build_packet(receive_info(frame, 0), frame.data)])
    transport = checksum.find_transport(frame.data)
    if transport is None or not checksum.fits(len(frame.data), transport):
        return None if offload.checksum is Checksum.PARTIAL else Run([build_packet(receive_info(frame, 0), frame.data)])
    if transport.protocol not in (checksum.TCP, checksum.UDP):
        return None if offload.checksum is Checksum.PARTIAL else Run([build_packet(receive_info(frame, 0), frame.data)])
    flags = known_good(transport, settings.offload)
    if offload.checksum is Checksum.PARTIAL:
        if flags:
            counters["checksums_passed_on"] += 1
            flags |= RX_VALUE_INVALID
        else:
            data = bytearray(frame.data)
            checksum.complete_transport_checksum(data, transport)
            counters["checksums_completed"] += 1
            return Run([build_packet(receive_info(frame, 0), data)])
    return Run([build_packet(receive_info(frame, flags), frame.data)])


def known_good(transport: checksum.Transport, enabled: int) -> int:
    """Receive checksum information for a verified TCP or UDP frame; 0 if the guest did not enable it."""
    tcp = transport.protocol == checksum.TCP
    if transport.ip_version == 4:
        needed = RX_TCP4 if tcp else RX_UDP4
    else:
        needed = RX_TCP6 if tcp else RX_UDP6
    if not enabled & needed:
        return 0
    flags = RX_TCP_OK if tcp else RX_UDP_OK
    if transport.ip_version == 4 and enabled & RX_IPV4:
        flags |= RX_IP_OK
    return flags


def _large(frame: Frame, settings: Settings, counters: Counter[str]) -> Run | None:
    """A large send: one coalesced run for a guest that takes RSC, else segments made in software."""
    transport = checksum.find_transport(frame.data)
    if transport is None or transport.protocol != checksum.TCP or not checksum.fits(len(frame.data), transport):
        return None
    try:
        segments = checksum.segment(frame.data, transport, frame.offload.mss)
    except ValueError:
        return None
    if len(segments) > limits.MAX_RSC_RANGES or len(segments[0]) > settings.mtu + 4:
        return None
    if settings.offload & (RSC_IPV4 if transport.ip_version == 4 else RSC_IPV6) and len(segments) > 1:
        return _coalesced(frame, transport, segments, settings, counters)
    counters["large_sends_segmented"] += 1
    flags = known_good(transport, settings.offload)
    return Run([build_packet(receive_info(frame, flags), piece) for piece in segments])


def _coalesced(
    frame: Frame,
    transport: checksum.Transport,
    segments: list[bytearray],
    settings: Settings,
    counters: Counter[str],
) -> Run:
    """The whole large packet in pieces: headers in the first, payload alone in the others."""
    whole = coalesced_frame(frame.data, transport)
    first = len(segments[0])
    step = frame.offload.mss
    flags = known_good(transport, settings.offload)
    if flags:
        flags |= RX_VALUE_INVALID
    run = Run(coalesced=True)
    starts = [0, *range(first, len(whole), step)]
    for number, start in enumerate(starts):
        end = first if number == 0 else min(start + step, len(whole))
        mark = RSC_MULTIPLE
        mark |= RSC_FIRST if number == 0 else 0
        mark |= RSC_LAST if end == len(whole) else 0
        info = receive_info(frame, flags, packet_id=1 | mark << 8)
        run.messages.append(build_packet(info, whole[start:end]))
    counters["large_sends_coalesced"] += 1
    return run


def coalesced_frame(data: bytes | bytearray, transport: checksum.Transport) -> bytearray:
    """The super-frame with true lengths, IPv4 checksum and pseudo-header sum in its headers."""
    whole = bytearray(data)
    ip = transport.ip_offset
    if transport.ip_version == 4:
        whole[ip + 2 : ip + 4] = min(len(whole) - ip, 0xFFFF).to_bytes(2, "big")
        checksum.fill_ipv4_header_checksum(whole, transport)
    else:
        whole[ip + 4 : ip + 6] = min(len(whole) - ip - 40, 0xFFFF).to_bytes(2, "big")
    l4_length = len(whole) - transport.l4_offset
    at = checksum.checksum_offset(transport)
    whole[at : at + 2] = checksum.pseudo_header_sum(whole, transport, l4_length).to_bytes(2, "big")
    return whole
