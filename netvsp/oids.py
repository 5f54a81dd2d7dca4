"""OIDs of the synthetic NIC: what a guest may query and set, with the sizes that stock guests check.

Meanings: ntddndis.h and the OID pages of the Windows driver documentation; answers as openvmm ``netvsp`` and vmswitch
give them. Statuses are NDIS_STATUS values.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from netvsp import limits
from netvsp.offload import ENCAPSULATION_8023, RX, TX, InvalidParameters, OffloadState

STATUS_SUCCESS = 0
STATUS_FAILURE = 0xC0000001
STATUS_NOT_SUPPORTED = 0xC00000BB
STATUS_BAD_VERSION = 0xC0010004
STATUS_INVALID_LENGTH = 0xC0010014
STATUS_INVALID_DATA = 0xC0010015
STATUS_BUFFER_TOO_SHORT = 0xC0010016

GEN_SUPPORTED_LIST = 0x00010101
GEN_HARDWARE_STATUS = 0x00010102
GEN_MEDIA_SUPPORTED = 0x00010103
GEN_MEDIA_IN_USE = 0x00010104
GEN_MAXIMUM_LOOKAHEAD = 0x00010105
GEN_MAXIMUM_FRAME_SIZE = 0x00010106
GEN_LINK_SPEED = 0x00010107
GEN_TRANSMIT_BUFFER_SPACE = 0x00010108
GEN_RECEIVE_BUFFER_SPACE = 0x00010109
GEN_TRANSMIT_BLOCK_SIZE = 0x0001010A
GEN_RECEIVE_BLOCK_SIZE = 0x0001010B
GEN_VENDOR_ID = 0x0001010C
GEN_VENDOR_DESCRIPTION = 0x0001010D
GEN_CURRENT_PACKET_FILTER = 0x0001010E
GEN_CURRENT_LOOKAHEAD = 0x0001010F
GEN_DRIVER_VERSION = 0x00010110
GEN_MAXIMUM_TOTAL_SIZE = 0x00010111
GEN_MAC_OPTIONS = 0x00010113
GEN_MEDIA_CONNECT_STATUS = 0x00010114
GEN_MAXIMUM_SEND_PACKETS = 0x00010115
GEN_VENDOR_DRIVER_VERSION = 0x00010116
GEN_NETWORK_LAYER_ADDRESSES = 0x00010118
GEN_RECEIVE_SCALE_CAPABILITIES = 0x00010203
GEN_RECEIVE_SCALE_PARAMETERS = 0x00010204
GEN_MAX_LINK_SPEED = 0x00010206
GEN_LINK_STATE = 0x00010207
GEN_RNDIS_CONFIG_PARAMETER = 0x0001021B
GEN_XMIT_OK = 0x00020101
GEN_RCV_OK = 0x00020102
GEN_XMIT_ERROR = 0x00020103
GEN_RCV_ERROR = 0x00020104
GEN_RCV_NO_BUFFER = 0x00020105
GEN_FRIENDLY_NAME = 0x00020216
GEN_BYTES_RCV = 0x00020219
GEN_BYTES_XMIT = 0x0002021A
ETHERNET_PERMANENT_ADDRESS = 0x01010101
ETHERNET_CURRENT_ADDRESS = 0x01010102
ETHERNET_MULTICAST_LIST = 0x01010103
ETHERNET_MAXIMUM_LIST_SIZE = 0x01010104
ETHERNET_RCV_ERROR_ALIGNMENT = 0x01020101
ETHERNET_XMIT_ONE_COLLISION = 0x01020102
ETHERNET_XMIT_MORE_COLLISIONS = 0x01020103
OFFLOAD_ENCAPSULATION = 0x0101010A
TCP_OFFLOAD_CURRENT_CONFIG = 0xFC01020B
TCP_OFFLOAD_PARAMETERS = 0xFC01020C
TCP_OFFLOAD_HARDWARE_CAPABILITIES = 0xFC01020D

VENDOR_ID = 0x0000155D
VENDOR_DESCRIPTION = b"Microsoft Corporation"
FRIENDLY_NAME_BYTES = 512
BUFFER_SPACE = 262144
MAC_OPTIONS = 0x24D
OBJECT_RSS_CAPABILITIES = 0x88
RSS_CAPABILITIES = 0x301
RSS_TABLE_ENTRIES = 128
RSS_KEY_BYTES = 40
RSS_DISABLE = 0x10
MAX_CONFIG_STRING = 255

BASE_LIST = (
    GEN_SUPPORTED_LIST,
    GEN_HARDWARE_STATUS,
    GEN_MEDIA_SUPPORTED,
    GEN_MEDIA_IN_USE,
    GEN_MAXIMUM_LOOKAHEAD,
    GEN_MAXIMUM_FRAME_SIZE,
    GEN_LINK_SPEED,
    GEN_TRANSMIT_BUFFER_SPACE,
    GEN_RECEIVE_BUFFER_SPACE,
    GEN_TRANSMIT_BLOCK_SIZE,
    GEN_RECEIVE_BLOCK_SIZE,
    GEN_VENDOR_ID,
    GEN_VENDOR_DESCRIPTION,
    GEN_CURRENT_PACKET_FILTER,
    GEN_CURRENT_LOOKAHEAD,
    GEN_DRIVER_VERSION,
    GEN_MAXIMUM_TOTAL_SIZE,
    GEN_MAC_OPTIONS,
    GEN_MEDIA_CONNECT_STATUS,
    GEN_MAXIMUM_SEND_PACKETS,
    GEN_VENDOR_DRIVER_VERSION,
    GEN_NETWORK_LAYER_ADDRESSES,
    GEN_RNDIS_CONFIG_PARAMETER,
    GEN_XMIT_OK,
    GEN_RCV_OK,
    GEN_XMIT_ERROR,
    GEN_RCV_ERROR,
    GEN_RCV_NO_BUFFER,
    GEN_FRIENDLY_NAME,
    ETHERNET_PERMANENT_ADDRESS,
    ETHERNET_CURRENT_ADDRESS,
    ETHERNET_MULTICAST_LIST,
    ETHERNET_MAXIMUM_LIST_SIZE,
    ETHERNET_RCV_ERROR_ALIGNMENT,
    ETHERNET_XMIT_ONE_COLLISION,
    ETHERNET_XMIT_MORE_COLLISIONS,
)
NDIS6_LIST = (
    GEN_MAX_LINK_SPEED,
    GEN_LINK_STATE,
    GEN_BYTES_RCV,
    GEN_BYTES_XMIT,
    OFFLOAD_ENCAPSULATION,
    TCP_OFFLOAD_CURRENT_CONFIG,
    TCP_OFFLOAD_PARAMETERS,
    TCP_OFFLOAD_HARDWARE_CAPABILITIES,
)
NDIS630_LIST = (GEN_RECEIVE_SCALE_CAPABILITIES, GEN_RECEIVE_SCALE_PARAMETERS)


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
            raise OidError(STATUS_NOT_SUPPORTED, f"query of OID {oid:#010x} is not supported")
        return handler(self)

    def set(self, oid: int, data: bytes) -> None:
        """Sets one OID. Raises OidError; then nothing was changed."""
        handler = _SETTERS.get(oid)
        if handler is None:
            raise OidError(STATUS_NOT_SUPPORTED, f"set of OID {oid:#010x} is not supported")
        handler(self, data)
        self.on_change(oid)


def supported_list(adapter: Adapter) -> bytes:
    """OID_GEN_SUPPORTED_LIST for the NDIS version that the guest announced."""
    major, minor = adapter.ndis_version
    if major not in (5, 6):
        raise OidError(STATUS_BAD_VERSION, f"NDIS version {major}.{minor} is unknown")
    oids = list(BASE_LIST)
    if major == 6:
        oids += NDIS6_LIST
        if minor >= 30:
            oids += NDIS630_LIST
    return struct.pack(f"<{len(oids)}I", *oids)


def link_state(adapter: Adapter) -> bytes:
    """NDIS_LINK_STATE, 40 bytes: 1 = connected (unlike OID_GEN_MEDIA_CONNECT_STATUS, where 0 is)."""
    header = struct.pack("<BBH", 0x80, 1, 40)
    speed = adapter.link_speed_bps
    return header + struct.pack("<3I2Q2I", 1 if adapter.link else 2, 2, 0, speed, speed, 0, 0)


def rss_capabilities(adapter: Adapter) -> bytes:
    """NDIS_RECEIVE_SCALE_CAPABILITIES revision 2: 18 bytes, because Linux fails the query on a longer answer."""
    header = struct.pack("<BBH", OBJECT_RSS_CAPABILITIES, 2, 18)
    return header + struct.pack("<3IH", RSS_CAPABILITIES, 1, adapter.max_queues, RSS_TABLE_ENTRIES)


def encapsulation(adapter: Adapter) -> bytes:
    """NDIS_OFFLOAD_ENCAPSULATION: plain Ethernet for both IP versions."""
    one = (1, ENCAPSULATION_8023, limits.ETHERNET_HEADER)
    return struct.pack("<BBH", 0xA8, 1, 28) + struct.pack("<6I", *one, *one)


def set_filter(adapter: Adapter, data: bytes) -> None:
    """OID_GEN_CURRENT_PACKET_FILTER: 4 bytes."""
    if len(data) < 4:
        raise OidError(STATUS_INVALID_LENGTH, f"a packet filter of {len(data)} bytes, 4 expected")
    adapter.filter = int.from_bytes(data[:4], "little")


def set_offload(adapter: Adapter, data: bytes) -> None:
    """OID_TCP_OFFLOAD_PARAMETERS."""
    try:
        adapter.offload.apply(data)
    except InvalidParameters as error:
        status = STATUS_NOT_SUPPORTED if "version 1" in str(error) else STATUS_INVALID_DATA
        raise OidError(status, str(error)) from error


def set_encapsulation(adapter: Adapter, data: bytes) -> None:
    """OID_OFFLOAD_ENCAPSULATION: 802.3 with 14 bytes of header, nothing else is possible."""
    if len(data) < 28:
        raise OidError(STATUS_INVALID_LENGTH, f"an encapsulation of {len(data)} bytes, 28 expected")
    for enabled, kind, header in (struct.unpack_from("<3I", data, at) for at in (4, 16)):
        if enabled == 1 and (kind, header) != (ENCAPSULATION_8023, limits.ETHERNET_HEADER):
            raise OidError(STATUS_NOT_SUPPORTED, f"encapsulation type {kind} with a header of {header} bytes")


def set_rss(adapter: Adapter, data: bytes) -> None:
    """OID_GEN_RECEIVE_SCALE_PARAMETERS. Headers differ between senders, so offsets alone are believed, checked."""
    if len(data) < 28:
        raise OidError(STATUS_INVALID_LENGTH, f"RSS parameters of {len(data)} bytes, at least 28")
    flags, _, hash_info, table_bytes, _, table_at, key_bytes, _, key_at = struct.unpack_from(
        "<HHIHHIHHI", data, 4
    )
    if flags & RSS_DISABLE or not hash_info & 0xFF:
        adapter.rss = RssState()
        return
    if key_bytes != RSS_KEY_BYTES or key_at + key_bytes > len(data):
        raise OidError(STATUS_INVALID_DATA, f"an RSS key of {key_bytes} bytes at {key_at}")
    if not table_bytes or table_bytes % 4 or table_at + table_bytes > len(data):
        raise OidError(STATUS_INVALID_DATA, f"an RSS table of {table_bytes} bytes at {table_at}")
    if table_bytes > 4 * RSS_TABLE_ENTRIES:
        raise OidError(STATUS_INVALID_DATA, f"an RSS table of {table_bytes // 4} entries, at most 128")
    table = struct.unpack_from(f"<{table_bytes // 4}I", data, table_at)
    if max(table) >= adapter.max_queues:
        raise OidError(STATUS_INVALID_DATA, f"RSS queue {max(table)} of {adapter.max_queues}")
    adapter.rss = RssState(True, data[key_at : key_at + key_bytes], table, hash_info)


def set_config_parameter(adapter: Adapter, data: bytes) -> None:
    """OID_GEN_RNDIS_CONFIG_PARAMETER: a named setting; unknown names are accepted and ignored."""
    if len(data) < 20:
        raise OidError(STATUS_INVALID_LENGTH, f"a configuration parameter of {len(data)} bytes")
    name_at, name_bytes, _kind, value_at, value_bytes = struct.unpack_from("<5I", data)
    name = _config_string(data, name_at, name_bytes, "name")
    value = _config_string(data, value_at, value_bytes, "value")
    if name == "NetworkAddress":
        adapter.address = _address(value)
    elif name in _CONFIG_CHECKSUMS:
        direction = _digit(name, value, 3)
        setattr(adapter.offload, _CONFIG_CHECKSUMS[name], (TX if direction & 1 else 0) | (RX if direction & 2 else 0))
    elif name in _CONFIG_LSO:
        setattr(adapter.offload, _CONFIG_LSO[name], bool(_digit(name, value, 1)))


_CONFIG_CHECKSUMS = {
    "*IPChecksumOffloadIPv4": "ipv4",
    "*TCPChecksumOffloadIPv4": "tcp4",
    "*UDPChecksumOffloadIPv4": "udp4",
    "*TCPChecksumOffloadIPv6": "tcp6",
    "*UDPChecksumOffloadIPv6": "udp6",
}
_CONFIG_LSO = {"*LsoV2IPv4": "lso4", "*LsoV2IPv6": "lso6"}


def _config_string(data: bytes, at: int, size: int, what: str) -> str:
    if size > MAX_CONFIG_STRING or size % 2 or at + size > len(data):
        raise OidError(STATUS_INVALID_DATA, f"a configuration {what} of {size} bytes at {at} of {len(data)}")
    try:
        return data[at : at + size].decode("utf-16-le")
    except UnicodeDecodeError as error:
        raise OidError(STATUS_INVALID_DATA, f"a configuration {what} that is not UTF-16") from error


def _address(value: str) -> bytes:
    try:
        address = bytes.fromhex(value)
    except ValueError:
        address = b""
    if len(value) != 12 or len(address) != 6:
        raise OidError(STATUS_INVALID_DATA, f"NetworkAddress {value!r}: 12 hex digits expected")
    if address[0] & 1 or not any(address):
        raise OidError(STATUS_INVALID_DATA, f"NetworkAddress {value!r} is a group address or zero")
    return address


def _digit(name: str, value: str, largest: int) -> int:
    if len(value) != 1 or not value.isascii() or not value.isdigit() or int(value) > largest:
        raise OidError(STATUS_INVALID_DATA, f"{name} = {value!r}: a digit up to {largest} expected")
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
    GEN_SUPPORTED_LIST: supported_list,
    GEN_HARDWARE_STATUS: _constant(0),
    GEN_MEDIA_SUPPORTED: _constant(0),
    GEN_MEDIA_IN_USE: _constant(0),
    GEN_MAXIMUM_LOOKAHEAD: lambda a: _u32(a.mtu - limits.ETHERNET_HEADER),
    GEN_CURRENT_LOOKAHEAD: lambda a: _u32(a.mtu - limits.ETHERNET_HEADER),
    GEN_MAXIMUM_FRAME_SIZE: lambda a: _u32(a.mtu - limits.ETHERNET_HEADER),
    GEN_LINK_SPEED: lambda a: _u32(min(a.link_speed_bps // 100, 0xFFFFFFFF)),
    GEN_TRANSMIT_BUFFER_SPACE: _constant(BUFFER_SPACE),
    GEN_RECEIVE_BUFFER_SPACE: _constant(BUFFER_SPACE),
    GEN_TRANSMIT_BLOCK_SIZE: lambda a: _u32(a.mtu),
    GEN_RECEIVE_BLOCK_SIZE: lambda a: _u32(a.mtu),
    GEN_VENDOR_ID: _constant(VENDOR_ID),
    GEN_VENDOR_DESCRIPTION: lambda a: VENDOR_DESCRIPTION,
    GEN_CURRENT_PACKET_FILTER: lambda a: _u32(a.filter),
    GEN_DRIVER_VERSION: lambda a: struct.pack("<H", 0x0100),
    GEN_VENDOR_DRIVER_VERSION: lambda a: struct.pack("<H", 0x0100),
    GEN_MAXIMUM_TOTAL_SIZE: lambda a: _u32(a.mtu),
    GEN_MAC_OPTIONS: _constant(MAC_OPTIONS),
    GEN_MEDIA_CONNECT_STATUS: lambda a: _u32(0 if a.link else 1),
    GEN_MAXIMUM_SEND_PACKETS: _constant(0xFFFFFFFF),
    GEN_RECEIVE_SCALE_CAPABILITIES: rss_capabilities,
    GEN_MAX_LINK_SPEED: lambda a: struct.pack("<2Q", a.link_speed_bps, a.link_speed_bps),
    GEN_LINK_STATE: link_state,
    GEN_XMIT_OK: _counter("frames_from_guest"),
    GEN_RCV_OK: _counter("frames_to_guest"),
    GEN_XMIT_ERROR: _counter("malformed"),
    GEN_RCV_ERROR: _counter("receive_failures"),
    GEN_RCV_NO_BUFFER: _counter("no_buffer"),
    GEN_FRIENDLY_NAME: lambda a: "Network Device".encode("utf-16-le").ljust(FRIENDLY_NAME_BYTES, b"\0"),
    GEN_BYTES_RCV: _counter("bytes_to_guest"),
    GEN_BYTES_XMIT: _counter("bytes_from_guest"),
    ETHERNET_PERMANENT_ADDRESS: lambda a: a.permanent_address,
    ETHERNET_CURRENT_ADDRESS: lambda a: a.address,
    ETHERNET_MAXIMUM_LIST_SIZE: _constant(0),
    ETHERNET_RCV_ERROR_ALIGNMENT: _constant(0),
    ETHERNET_XMIT_ONE_COLLISION: _constant(0),
    ETHERNET_XMIT_MORE_COLLISIONS: _constant(0),
    OFFLOAD_ENCAPSULATION: encapsulation,
    TCP_OFFLOAD_CURRENT_CONFIG: lambda a: a.offload.current(),
    TCP_OFFLOAD_HARDWARE_CAPABILITIES: lambda a: a.offload.hardware(),
}

_SETTERS: dict[int, Callable[[Adapter, bytes], None]] = {
    GEN_CURRENT_PACKET_FILTER: set_filter,
    GEN_NETWORK_LAYER_ADDRESSES: _ignore,
    GEN_CURRENT_LOOKAHEAD: _ignore,
    ETHERNET_MULTICAST_LIST: _ignore,
    GEN_RECEIVE_SCALE_PARAMETERS: set_rss,
    GEN_RNDIS_CONFIG_PARAMETER: set_config_parameter,
    TCP_OFFLOAD_PARAMETERS: set_offload,
    OFFLOAD_ENCAPSULATION: set_encapsulation,
}
