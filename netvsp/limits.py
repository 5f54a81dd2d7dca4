"""Sizes and bounds of the synthetic NIC's host end, in one place for both engines.

What stock implementations use: openvmm ``vm/devices/net/netvsp``, Linux ``drivers/net/hyperv``.
"""

from __future__ import annotations

ETHERNET_HEADER = 14
MTU_DEFAULT = 1500 + ETHERNET_HEADER
"""NVSP counts the MTU with the Ethernet header."""
MTU_MIN, MTU_MAX = 1514, 9216

SEND_SECTION_SIZE = 6144
SUB_ALLOCATION_OVERHEAD = 256 + 36
"""RNDIS header and per-packet info, and 36 bytes that a Windows guest's defect makes unusable."""
CONTROL_RESERVE = 16
MAX_RECEIVE_BUFFER = 31 << 20
MAX_RECEIVE_BUFFER_V2 = 15 << 20
MAX_SEND_BUFFER = 31 << 20

MAX_QUEUES = 64
"""Channels of one NIC; Linux opens no more."""
MAX_RANGES_PER_PACKET = 375
MAX_RSC_RANGES = 562
MAX_SEGMENTS = 2048
"""Segments of one large send: what a sender whose peer announced the least MSS there is makes of 64 KiB."""
MAX_GPA_RANGES = 64
"""Ranges in one packet from a guest; Linux sends at most 32."""
MAX_MESSAGE_BYTES = 8 * 65536
"""RNDIS bytes behind one 107: eight messages, each up to a large send."""
MAX_CONTROL_BYTES = 8192
MAX_CONTROL_QUEUED = 256
MAX_CONTROL_BACKLOG_BYTES = 100 * 1024
"""Host messages waiting for room in the ring or the receive buffer."""
MAX_COMPLETIONS_QUEUED = 1024
"""Completions waiting for room in the ring; reading the guest's packets stops there."""
TAP_PACKETS = 4096
TAP_BYTES = 16 << 20
"""Ring packets kept for a capture that has not asked; the oldest go."""


def sub_allocation_size(mtu: int) -> int:
    """Bytes of one receive sub-allocation for an MTU with Ethernet header: a multiple of 64, 1856 for 1514.

    Never less than that: control answers have to fit whatever the MTU is.
    """
    return (max(mtu, MTU_DEFAULT) + SUB_ALLOCATION_OVERHEAD + 63) // 64 * 64
