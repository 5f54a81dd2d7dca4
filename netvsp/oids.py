"""OIDs of the synthetic NIC: what a guest may query and set, with the sizes that stock guests check.

Meanings: ntddndis.h and the OID pages of the Windows driver documentation; answers as openvmm ``netvsp``
and vmswitch give them. Statuses are NDIS_STATUS values.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from netvsp import limits
from netvsp.offload import RX, TX, InvalidParameters, NotOffered, OffloadState
from netvsp.rss import TOEPLITZ
from vswitch_wire import ndis, rndis
from vswitch_wire.errors import WireError

T = TypeVar("T")

VENDOR_ID = 0x0000155D
VENDOR_DESCRIPTION = b"Microsoft Corporation"
FRIENDLY_NAME = "Network Adapter"
"""What Linux takes for "no name was given": with any other it sets the interface's alias."""
FRIENDLY_NAME_BYTES = 512
BUFFER_SPACE = 262144
MAC_OPTIONS = 0x24D

BASE_LIST = (
    ndis.OID_GEN_SUPPORTED_LIST,
    ndis.OID_GEN_HARDWARE_STATUS,
    ndis.OID_GEN_MEDIA_SUPPORTED,
    ndis.OID_GEN_MEDIA_IN_USE,
    ndis.OID_GEN_MAXIMUM_LOOKAHEAD,
    ndis.OID_GEN_MAXIMUM_FRAME_SIZE,
    ndis.OID_GEN_LINK_SPEED,
    ndis.OID_GEN_TRANSMIT_BUFFER_SPACE,
    ndis.OID_GEN_RECEIVE_BUFFER_SPACE,
    ndis.OID_GEN_TRANSMIT_BLOCK_SIZE,
    ndis.OID_GEN_RECEIVE_BLOCK_SIZE,
    ndis.OID_GEN_VENDOR_ID,
    ndis.OID_GEN_VENDOR_DESCRIPTION,
    ndis.OID_GEN_CURRENT_PACKET_FILTER,
    ndis.OID_GEN_CURRENT_LOOKAHEAD,
    ndis.OID_GEN_DRIVER_VERSION,
    ndis.OID_GEN_MAXIMUM_TOTAL_SIZE,
    ndis.OID_GEN_MAC_OPTIONS,
    ndis.OID_GEN_MEDIA_CONNECT_STATUS,
    ndis.OID_GEN_MAXIMUM_SEND_PACKETS,
    ndis.OID_GEN_VENDOR_DRIVER_VERSION,
    ndis.OID_GEN_NETWORK_LAYER_ADDRESSES,
    ndis.OID_GEN_RNDIS_CONFIG_PARAMETER,
    ndis.OID_GEN_XMIT_OK,
    ndis.OID_GEN_RCV_OK,
    ndis.OID_GEN_XMIT_ERROR,
    ndis.OID_GEN_RCV_ERROR,
    ndis.OID_GEN_RCV_NO_BUFFER,
    ndis.OID_GEN_FRIENDLY_NAME,
    ndis.OID_802_3_PERMANENT_ADDRESS,
    ndis.OID_802_3_CURRENT_ADDRESS,
    ndis.OID_802_3_MULTICAST_LIST,
    ndis.OID_802_3_MAXIMUM_LIST_SIZE,
    ndis.OID_802_3_RCV_ERROR_ALIGNMENT,
    ndis.OID_802_3_XMIT_ONE_COLLISION,
    ndis.OID_802_3_XMIT_MORE_COLLISIONS,
)
NDIS6_LIST = (
    ndis.OID_GEN_MAX_LINK_SPEED,
    ndis.OID_GEN_LINK_STATE,
    ndis.OID_GEN_BYTES_RCV,
    ndis.OID_GEN_BYTES_XMIT,
    ndis.OID_OFFLOAD_ENCAPSULATION,
    ndis.OID_TCP_OFFLOAD_CURRENT_CONFIG,
    ndis.OID_TCP_OFFLOAD_PARAMETERS,
    ndis.OID_TCP_OFFLOAD_HARDWARE_CAPABILITIES,
)
NDIS630_LIST = (ndis.OID_GEN_RECEIVE_SCALE_CAPABILITIES, ndis.OID_GEN_RECEIVE_SCALE_PARAMETERS)


class OidError(Exception):
    """An OID request that fails with an NDIS status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def _u32(value: int) -> bytes:
    return struct.pack("<I", value & 0xFFFFFFFF)


@dataclass(slots=True)
class RssState:
    """Receive-side scaling as the guest set it."""

    enabled: bool = False
    key: bytes = b""
    table: tuple[int, ...] = ()
    hash_info: int = 0


@dataclass(slots=True)
class Adapter:
    """The adapter that RNDIS shows to the guest: its state, queried and set by OID."""

    permanent_address: bytes
    mtu: int = limits.MTU_DEFAULT
    """With the Ethernet header."""
    link_speed_bps: int = 10_000_000_000
    link: bool = True
    address: bytes = b""
    filter: int = 0
    ndis_version: tuple[int, int] = (6, 30)
    max_queues: int = 1
    offload: OffloadState = field(default_factory=OffloadState)
    rss: RssState = field(default_factory=RssState)
    counters: Callable[[], dict[str, int]] = dict
    on_change: Callable[[int], None] = lambda oid: None
    """Called after a successful set with the OID: the data path follows."""

    def __post_init__(self) -> None:
        self.address = self.address or self.permanent_address

    def query(self, oid: int, data: bytes) -> bytes:
        """The information of one OID. Raises OidError with the NDIS status to answer."""
        handler = _QUERIES.get(oid)
        if handler is None:
            raise OidError(rndis.RNDIS_STATUS_NOT_SUPPORTED, f"query of OID {oid:#010x} is not supported")
        return handler(self)

    def set(self, oid: int, data: bytes) -> None:
        """Sets one OID. Raises OidError; then nothing was changed."""
        handler = _SETTERS.get(oid)
        if handler is None:
            raise OidError(rndis.RNDIS_STATUS_NOT_SUPPORTED, f"set of OID {oid:#010x} is not supported")
        handler(self, data)
        self.on_change(oid)


def supported_list(adapter: Adapter) -> bytes:
    """OID_GEN_SUPPORTED_LIST for the NDIS version that the guest announced."""
    major, minor = adapter.ndis_version
    if major not in (5, 6):
        raise OidError(rndis.RNDIS_STATUS_BAD_VERSION, f"NDIS version {major}.{minor} is unknown")
    oids = list(BASE_LIST)
    if major == 6:
        oids += NDIS6_LIST
        if minor >= 30:
            oids += NDIS630_LIST
    return struct.pack(f"<{len(oids)}I", *oids)


def link_state(adapter: Adapter) -> bytes:
    """NDIS_LINK_STATE: here 1 is connected, in OID_GEN_MEDIA_CONNECT_STATUS 0 is."""
    speed = adapter.link_speed_bps
    return ndis.LinkState(1 if adapter.link else 2, 2, speed, speed).pack()


def rss_capabilities(adapter: Adapter) -> bytes:
    """NDIS_RECEIVE_SCALE_CAPABILITIES."""
    return ndis.RssCapabilities(receive_queues=adapter.max_queues).pack()


def set_filter(adapter: Adapter, data: bytes) -> None:
    """OID_GEN_CURRENT_PACKET_FILTER: 4 bytes."""
    if len(data) < 4:
        raise OidError(rndis.RNDIS_STATUS_INVALID_LENGTH, f"a packet filter of {len(data)} bytes, 4 expected")
    adapter.filter = int.from_bytes(data[:4], "little")


def set_offload(adapter: Adapter, data: bytes) -> None:
    """OID_TCP_OFFLOAD_PARAMETERS."""
    try:
        adapter.offload.apply(data)
    except InvalidParameters as error:
        raise OidError(rndis.RNDIS_STATUS_INVALID_DATA, str(error)) from error
    except NotOffered as error:
        raise OidError(rndis.RNDIS_STATUS_NOT_SUPPORTED, str(error)) from error


def set_encapsulation(adapter: Adapter, data: bytes) -> None:
    """OID_OFFLOAD_ENCAPSULATION: 802.3 with 14 bytes of header, nothing else is possible."""
    wanted = _decoded(ndis.OffloadEncapsulation.unpack, data)
    for enabled, kind, header in (
        (wanted.ipv4_enabled, wanted.ipv4_type, wanted.ipv4_header_size),
        (wanted.ipv6_enabled, wanted.ipv6_type, wanted.ipv6_header_size),
    ):
        plain = (ndis.NDIS_ENCAPSULATION_IEEE_802_3, limits.ETHERNET_HEADER)
        if enabled == 1 and (kind, header) != plain:
            raise OidError(
                rndis.RNDIS_STATUS_NOT_SUPPORTED, f"encapsulation type {kind} with a header of {header} bytes"
            )


def set_rss(adapter: Adapter, data: bytes) -> None:
    """OID_GEN_RECEIVE_SCALE_PARAMETERS; switching it off needs neither key nor table."""
    wanted = _decoded(ndis.RssParameters.unpack, data)
    before = adapter.rss
    if not wanted.enabled:
        adapter.rss = RssState(False, before.key, before.table, before.hash_info)
        return
    unchanged = wanted.flags
    key = before.key if unchanged & ndis.NDIS_RSS_PARAM_FLAG_HASH_KEY_UNCHANGED else wanted.key
    table = (
        before.table if unchanged & ndis.NDIS_RSS_PARAM_FLAG_ITABLE_UNCHANGED else wanted.indirection_table
    )
    types = wanted.hash_information
    if unchanged & ndis.NDIS_RSS_PARAM_FLAG_HASH_INFO_UNCHANGED:
        types = before.hash_info
    if not key or not table:
        raise OidError(rndis.RNDIS_STATUS_INVALID_DATA, "RSS switched on without a key or a table")
    if types & 0xFF != TOEPLITZ:
        raise OidError(
            rndis.RNDIS_STATUS_INVALID_DATA, f"RSS hash function {types & 0xFF}: Toeplitz (1) only"
        )
    highest = max(table)
    if highest >= adapter.max_queues:
        raise OidError(rndis.RNDIS_STATUS_INVALID_DATA, f"RSS queue {highest} of {adapter.max_queues}")
    adapter.rss = RssState(True, key, table, types)


def set_config_parameter(adapter: Adapter, data: bytes) -> None:
    """OID_GEN_RNDIS_CONFIG_PARAMETER: a named setting; unknown names are accepted and ignored."""
    parameter = _decoded(ndis.ConfigParameter.unpack, data)
    name = parameter.name
    if name == "NetworkAddress":
        adapter.address = _address(_decoded(lambda _: parameter.text, data))
    elif name in _CONFIG_CHECKSUMS:
        # Bit 0 transmit, bit 1 receive: the same bits as TX and RX.
        setattr(adapter.offload, _CONFIG_CHECKSUMS[name], _digit(name, parameter, TX | RX))
    elif name in _CONFIG_SWITCHES:
        setattr(adapter.offload, _CONFIG_SWITCHES[name], bool(_digit(name, parameter, 1)))


def _decoded(decode: Callable[[bytes], T], data: bytes) -> T:
    try:
        return decode(data)
    except WireError as error:
        raise OidError(rndis.RNDIS_STATUS_INVALID_DATA, str(error)) from error


_CONFIG_CHECKSUMS = {
    "*IPChecksumOffloadIPv4": "ipv4",
    "*TCPChecksumOffloadIPv4": "tcp4",
    "*UDPChecksumOffloadIPv4": "udp4",
    "*TCPChecksumOffloadIPv6": "tcp6",
    "*UDPChecksumOffloadIPv6": "udp6",
}
# The last is our own, without the asterisk of NDIS keywords; other hosts take and ignore it.
_CONFIG_SWITCHES = {"*LsoV2IPv4": "lso4", "*LsoV2IPv6": "lso6", ndis.RX_PARTIAL_CHECKSUM: "partial"}


def _address(value: str) -> bytes:
    try:
        address = bytes.fromhex(value)
    except ValueError:
        address = b""
    if len(value) != 12 or len(address) != 6:
        raise OidError(rndis.RNDIS_STATUS_INVALID_DATA, f"NetworkAddress {value!r}: 12 hex digits expected")
    if address[0] & 1 or not any(address):
        raise OidError(rndis.RNDIS_STATUS_INVALID_DATA, f"NetworkAddress {value!r} is no station address")
    return address


def _digit(name: str, parameter: ndis.ConfigParameter, largest: int) -> int:
    value = _decoded(lambda _: parameter.text, b"")
    if len(value) != 1 or not value.isascii() or not value.isdigit() or int(value) > largest:
        raise OidError(rndis.RNDIS_STATUS_INVALID_DATA, f"{name} = {value!r}: expected 0..{largest}")
    return int(value)


def _ignore(adapter: Adapter, data: bytes) -> None:
    """Accepted without effect, as vmswitch does."""


def _counter(*names: str) -> Callable[[Adapter], bytes]:
    def read(adapter: Adapter) -> bytes:
        counters = adapter.counters()
        return struct.pack("<Q", sum(counters.get(name, 0) for name in names))

    return read


def _constant(value: int) -> Callable[[Adapter], bytes]:
    return lambda adapter: _u32(value)


_QUERIES: dict[int, Callable[[Adapter], bytes]] = {
    ndis.OID_GEN_SUPPORTED_LIST: supported_list,
    ndis.OID_GEN_HARDWARE_STATUS: _constant(0),
    ndis.OID_GEN_MEDIA_SUPPORTED: _constant(0),
    ndis.OID_GEN_MEDIA_IN_USE: _constant(0),
    ndis.OID_GEN_MAXIMUM_LOOKAHEAD: lambda a: _u32(a.mtu - limits.ETHERNET_HEADER),
    ndis.OID_GEN_CURRENT_LOOKAHEAD: lambda a: _u32(a.mtu - limits.ETHERNET_HEADER),
    ndis.OID_GEN_MAXIMUM_FRAME_SIZE: lambda a: _u32(a.mtu - limits.ETHERNET_HEADER),
    ndis.OID_GEN_LINK_SPEED: lambda a: _u32(min(a.link_speed_bps // 100, 0xFFFFFFFF)),
    ndis.OID_GEN_TRANSMIT_BUFFER_SPACE: _constant(BUFFER_SPACE),
    ndis.OID_GEN_RECEIVE_BUFFER_SPACE: _constant(BUFFER_SPACE),
    ndis.OID_GEN_TRANSMIT_BLOCK_SIZE: lambda a: _u32(a.mtu),
    ndis.OID_GEN_RECEIVE_BLOCK_SIZE: lambda a: _u32(a.mtu),
    ndis.OID_GEN_VENDOR_ID: _constant(VENDOR_ID),
    ndis.OID_GEN_VENDOR_DESCRIPTION: lambda a: VENDOR_DESCRIPTION,
    ndis.OID_GEN_CURRENT_PACKET_FILTER: lambda a: _u32(a.filter),
    ndis.OID_GEN_DRIVER_VERSION: lambda a: struct.pack("<H", 0x0100),
    ndis.OID_GEN_VENDOR_DRIVER_VERSION: lambda a: struct.pack("<H", 0x0100),
    ndis.OID_GEN_MAXIMUM_TOTAL_SIZE: lambda a: _u32(a.mtu),
    ndis.OID_GEN_MAC_OPTIONS: _constant(MAC_OPTIONS),
    ndis.OID_GEN_MEDIA_CONNECT_STATUS: lambda a: _u32(0 if a.link else 1),
    ndis.OID_GEN_MAXIMUM_SEND_PACKETS: _constant(0xFFFFFFFF),
    ndis.OID_GEN_RECEIVE_SCALE_CAPABILITIES: rss_capabilities,
    ndis.OID_GEN_MAX_LINK_SPEED: lambda a: struct.pack("<2Q", a.link_speed_bps, a.link_speed_bps),
    ndis.OID_GEN_LINK_STATE: link_state,
    ndis.OID_GEN_XMIT_OK: _counter("frames_from_guest"),
    ndis.OID_GEN_RCV_OK: _counter("frames_to_guest"),
    ndis.OID_GEN_XMIT_ERROR: _counter("malformed"),
    ndis.OID_GEN_RCV_ERROR: _counter("receive_failures"),
    ndis.OID_GEN_RCV_NO_BUFFER: _counter("no_buffer"),
    ndis.OID_GEN_FRIENDLY_NAME: lambda a: FRIENDLY_NAME.encode("utf-16-le").ljust(FRIENDLY_NAME_BYTES, b"\0"),
    ndis.OID_GEN_BYTES_RCV: _counter("bytes_to_guest"),
    ndis.OID_GEN_BYTES_XMIT: _counter("bytes_from_guest"),
    ndis.OID_802_3_PERMANENT_ADDRESS: lambda a: a.permanent_address,
    ndis.OID_802_3_CURRENT_ADDRESS: lambda a: a.address,
    ndis.OID_802_3_MAXIMUM_LIST_SIZE: _constant(0),
    ndis.OID_802_3_RCV_ERROR_ALIGNMENT: _constant(0),
    ndis.OID_802_3_XMIT_ONE_COLLISION: _constant(0),
    ndis.OID_802_3_XMIT_MORE_COLLISIONS: _constant(0),
    ndis.OID_OFFLOAD_ENCAPSULATION: lambda a: ndis.OffloadEncapsulation(1).pack(),
    ndis.OID_TCP_OFFLOAD_CURRENT_CONFIG: lambda a: a.offload.current(),
    ndis.OID_TCP_OFFLOAD_HARDWARE_CAPABILITIES: lambda a: a.offload.hardware(),
}

_SETTERS: dict[int, Callable[[Adapter, bytes], None]] = {
    ndis.OID_GEN_CURRENT_PACKET_FILTER: set_filter,
    ndis.OID_GEN_NETWORK_LAYER_ADDRESSES: _ignore,
    ndis.OID_GEN_CURRENT_LOOKAHEAD: _ignore,
    ndis.OID_802_3_MULTICAST_LIST: _ignore,
    ndis.OID_GEN_RECEIVE_SCALE_PARAMETERS: set_rss,
    ndis.OID_GEN_RNDIS_CONFIG_PARAMETER: set_config_parameter,
    ndis.OID_TCP_OFFLOAD_PARAMETERS: set_offload,
    ndis.OID_OFFLOAD_ENCAPSULATION: set_encapsulation,
}
