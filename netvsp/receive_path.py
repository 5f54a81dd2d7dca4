"""What a frame becomes on its way to one guest: filtered, its offloads completed or passed on, as RNDIS
messages.

Twin of ``native/netvsp/src/receive_path.rs``. Packet filter bits: ntddndis.h NDIS_PACKET_TYPE_*; receive
checksum and packet-id information: NDIS_TCP_IP_CHECKSUM_NET_BUFFER_LIST_INFO, and the NVSP 6.1 receive
segment coalescing of Linux ``drivers/net/hyperv`` (rndis_filter.c).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from netvsp import checksum, limits
from netvsp.rndis_data import (
    RX_IP_OK,
    RX_TCP_OK,
    RX_UDP_OK,
    RX_VALUE_INVALID,
    build_packet,
)
from vswitch.drops import DropReason
from vswitch.endpoint import Checksum, Frame
from vswitch_wire import ndis, rndis

RX_IPV4 = 1
RX_TCP4 = 2
RX_UDP4 = 4
RX_TCP6 = 8
RX_UDP6 = 16
RSC_IPV4 = 32
RSC_IPV6 = 64
RX_PARTIAL = 128
"""The guest reads "value invalid": it takes frames whose transport checksum is known to be good and not
there. Stock Linux looks at "good" alone, and verifies by itself, without telling, when receive checksums are
switched off; it also forwards what it got. So this is for a guest that asks for it by name."""

BROADCAST = b"\xff" * 6


@dataclass(slots=True)
class Settings:
    """What decides about frames towards one guest."""

    filter: int = 0
    address: bytes = bytes(6)
    link: bool = True
    mtu: int = limits.MTU_DEFAULT
    offload: int = 0

    def largest(self, data: bytes | bytearray) -> int:
        """The largest frame with such an Ethernet header: a tag does not count."""
        tagged = int.from_bytes(data[12:14], "big") in checksum.ETHERTYPE_VLAN
        return self.mtu + (4 if tagged else 0)


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
    if not frame.offload.mss and len(data) > settings.largest(data):
        return DropReason.MTU_MISMATCH
    return None


def passes_filter(destination: bytes, settings: Settings) -> bool:
    """The packet filter; "multicast" takes every group, as a NIC that announces no multicast list does."""
    bits = settings.filter
    if bits & ndis.NDIS_PACKET_TYPE_PROMISCUOUS:
        return True
    if destination == BROADCAST:
        return bool(bits & ndis.NDIS_PACKET_TYPE_BROADCAST)
    if destination[0] & 1:
        return bool(bits & (ndis.NDIS_PACKET_TYPE_MULTICAST | ndis.NDIS_PACKET_TYPE_ALL_MULTICAST))
    return bool(bits & ndis.NDIS_PACKET_TYPE_DIRECTED) and destination == settings.address


def messages(
    frame: Frame, settings: Settings, counters: Counter[str], hashed: tuple[int, int] | None = None
) -> Run | DropReason:
    """The frame as RNDIS messages for this guest, or why not: headers that contradict the offload metadata,
    segments above the MTU. ``hashed``: the frame's RSS hash and its type, for the guest."""
    offload = frame.offload
    if offload.mss:
        return _large(frame, settings, counters, hashed)
    transport = None
    if offload.checksum is not Checksum.NONE:
        transport = checksum.find_transport(frame.data)
        if transport is not None and not checksum.is_tcp_or_udp(frame.data, transport):
            transport = None
    if transport is None:
        # Nothing to vouch for is fine; a checksum to complete in a frame without one is not.
        if offload.checksum is Checksum.PARTIAL:
            return DropReason.INVALID_PACKET
        return Run([build_packet(frame, frame.data, hashed=hashed)])
    flags = known_good(transport, settings.offload)
    data = frame.data
    if offload.checksum is Checksum.PARTIAL:
        if flags and settings.offload & RX_PARTIAL:
            counters["checksums_passed_on"] += 1
            flags |= RX_VALUE_INVALID
        else:
            counters["checksums_completed"] += 1
            data = bytearray(data)
            checksum.complete_transport_checksum(data, transport)
    return Run([build_packet(frame, data, flags, hashed=hashed)])


def known_good(transport: checksum.Transport, enabled: int) -> int:
    """Receive checksum information for a verified TCP or UDP frame; 0 if the guest did not enable it."""
    tcp = transport.protocol == checksum.TCP
    pair = (RX_TCP4, RX_UDP4) if transport.ip_version == 4 else (RX_TCP6, RX_UDP6)
    if not enabled & pair[0 if tcp else 1]:
        return 0
    flags = RX_TCP_OK if tcp else RX_UDP_OK
    if transport.ip_version == 4 and enabled & RX_IPV4:
        flags |= RX_IP_OK
    return flags


def _large(
    frame: Frame, settings: Settings, counters: Counter[str], hashed: tuple[int, int] | None
) -> Run | DropReason:
    """A large send: one coalesced run for a guest that takes RSC, else segments made in software."""
    transport = checksum.find_transport(frame.data)
    if transport is None or transport.protocol != checksum.TCP:
        return DropReason.INVALID_PACKET
    try:
        segments = checksum.segment(frame.data, transport, frame.offload.mss)
    except ValueError:
        return DropReason.INVALID_PACKET
    if len(segments) > limits.MAX_SEGMENTS:
        return DropReason.INVALID_PACKET
    if len(segments[0]) > settings.largest(frame.data):
        return DropReason.MTU_MISMATCH
    takes = settings.offload & (RSC_IPV4 if transport.ip_version == 4 else RSC_IPV6)
    if takes and 1 < len(segments) <= limits.MAX_RSC_RANGES:
        return _coalesced(frame, transport, segments, settings, counters, hashed)
    counters["large_sends_segmented"] += 1
    flags = known_good(transport, settings.offload)
    return Run([build_packet(frame, piece, flags, hashed=hashed) for piece in segments])


def _coalesced(
    frame: Frame,
    transport: checksum.Transport,
    segments: list[bytearray],
    settings: Settings,
    counters: Counter[str],
    hashed: tuple[int, int] | None,
) -> Run:
    """The whole large packet in pieces: headers in the first, payload alone in the others."""
    whole = coalesced_frame(frame.data, transport)
    first = len(segments[0])
    step = frame.offload.mss
    flags = known_good(transport, settings.offload)
    if flags and settings.offload & RX_PARTIAL:
        counters["checksums_passed_on"] += 1
        flags |= RX_VALUE_INVALID
    else:
        counters["checksums_completed"] += 1
        checksum.complete_transport_checksum(whole, transport)
    run = Run(coalesced=True)
    starts = [0, *range(first, len(whole), step)]
    for number, start in enumerate(starts):
        end = first if number == 0 else min(start + step, len(whole))
        mark = rndis.PACKET_ID_MULTI_SUB_ALLOCATION
        mark |= rndis.PACKET_ID_FIRST_FRAGMENT if number == 0 else 0
        mark |= rndis.PACKET_ID_LAST_FRAGMENT if end == len(whole) else 0
        run.messages.append(build_packet(frame, whole[start:end], flags, rndis.PacketId(mark, 0), hashed))
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
