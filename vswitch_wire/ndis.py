"""OIDs and the NDIS objects that RNDIS queries and sets carry (windows-driver-docs-ddi ntddndis, Linux
hyperv_net.h)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, Self

from .errors import WireError
from .layout import Fixed, need

OID_GEN_SUPPORTED_LIST = 0x00010101
OID_GEN_HARDWARE_STATUS = 0x00010102
OID_GEN_MEDIA_SUPPORTED = 0x00010103
OID_GEN_MEDIA_IN_USE = 0x00010104
OID_GEN_MAXIMUM_LOOKAHEAD = 0x00010105
OID_GEN_MAXIMUM_FRAME_SIZE = 0x00010106
OID_GEN_LINK_SPEED = 0x00010107
OID_GEN_TRANSMIT_BUFFER_SPACE = 0x00010108
OID_GEN_RECEIVE_BUFFER_SPACE = 0x00010109
OID_GEN_TRANSMIT_BLOCK_SIZE = 0x0001010A
OID_GEN_RECEIVE_BLOCK_SIZE = 0x0001010B
OID_GEN_VENDOR_ID = 0x0001010C
OID_GEN_VENDOR_DESCRIPTION = 0x0001010D
OID_GEN_CURRENT_PACKET_FILTER = 0x0001010E
OID_GEN_CURRENT_LOOKAHEAD = 0x0001010F
OID_GEN_DRIVER_VERSION = 0x00010110
OID_GEN_MAXIMUM_TOTAL_SIZE = 0x00010111
OID_GEN_PROTOCOL_OPTIONS = 0x00010112
OID_GEN_MAC_OPTIONS = 0x00010113
OID_GEN_MEDIA_CONNECT_STATUS = 0x00010114
OID_GEN_MAXIMUM_SEND_PACKETS = 0x00010115
OID_GEN_VENDOR_DRIVER_VERSION = 0x00010116
OID_GEN_NETWORK_LAYER_ADDRESSES = 0x00010118
OID_GEN_RECEIVE_SCALE_CAPABILITIES = 0x00010203
OID_GEN_RECEIVE_SCALE_PARAMETERS = 0x00010204
OID_GEN_MAX_LINK_SPEED = 0x00010206
OID_GEN_LINK_STATE = 0x00010207
OID_GEN_LINK_PARAMETERS = 0x00010208
OID_GEN_RNDIS_CONFIG_PARAMETER = 0x0001021B
OID_GEN_XMIT_OK = 0x00020101
OID_GEN_RCV_OK = 0x00020102
OID_GEN_XMIT_ERROR = 0x00020103
OID_GEN_RCV_ERROR = 0x00020104
OID_GEN_RCV_NO_BUFFER = 0x00020105
OID_GEN_FRIENDLY_NAME = 0x00020216
OID_GEN_BYTES_RCV = 0x00020219
OID_GEN_BYTES_XMIT = 0x0002021A
OID_802_3_PERMANENT_ADDRESS = 0x01010101
OID_802_3_CURRENT_ADDRESS = 0x01010102
OID_802_3_MULTICAST_LIST = 0x01010103
OID_802_3_MAXIMUM_LIST_SIZE = 0x01010104
OID_802_3_RCV_ERROR_ALIGNMENT = 0x01020101
OID_802_3_XMIT_ONE_COLLISION = 0x01020102
OID_802_3_XMIT_MORE_COLLISIONS = 0x01020103
OID_OFFLOAD_ENCAPSULATION = 0x0101010A
OID_TCP_OFFLOAD_CURRENT_CONFIG = 0xFC01020B
OID_TCP_OFFLOAD_PARAMETERS = 0xFC01020C
OID_TCP_OFFLOAD_HARDWARE_CAPABILITIES = 0xFC01020D

NDIS_PACKET_TYPE_DIRECTED = 0x0001
NDIS_PACKET_TYPE_MULTICAST = 0x0002
NDIS_PACKET_TYPE_ALL_MULTICAST = 0x0004
NDIS_PACKET_TYPE_BROADCAST = 0x0008
NDIS_PACKET_TYPE_PROMISCUOUS = 0x0020
NDIS_PACKET_TYPE_ALL_LOCAL = 0x0080

NDIS_OBJECT_TYPE_DEFAULT = 0x80
NDIS_OBJECT_TYPE_RSS_CAPABILITIES = 0x88
NDIS_OBJECT_TYPE_RSS_PARAMETERS = 0x89
NDIS_OBJECT_TYPE_OID_REQUEST = 0x96
NDIS_OBJECT_TYPE_OFFLOAD = 0xA7
NDIS_OBJECT_TYPE_OFFLOAD_ENCAPSULATION = 0xA8

NDIS_ENCAPSULATION_IEEE_802_3 = 2
NDIS_OFFLOAD_SIZE_NDIS_5_1 = 112
NDIS_OFFLOAD_SIZE_NDIS_6_1 = 144
NDIS_OFFLOAD_SIZE_NDIS_6_30 = 156

IPV4_CHECKSUM_IP_OPTIONS = 0x001
IPV4_CHECKSUM_TCP_OPTIONS = 0x004
IPV4_CHECKSUM_TCP = 0x010
IPV4_CHECKSUM_UDP = 0x040
IPV4_CHECKSUM_IP_HEADER = 0x100
IPV6_CHECKSUM_EXTENSION_HEADERS = 0x001
IPV6_CHECKSUM_TCP_OPTIONS = 0x004
IPV6_CHECKSUM_TCP = 0x010
IPV6_CHECKSUM_UDP = 0x040
LSO_V6_EXTENSION_HEADERS = 0x1
LSO_V6_TCP_OPTIONS = 0x4
LSO_MAXIMUM_SIZE = 0xF53C
LSO_MINIMUM_SEGMENTS = 2

NDIS_HASH_FUNCTION_TOEPLITZ = 0x1
NDIS_HASH_IPV4 = 0x100
NDIS_HASH_TCP_IPV4 = 0x200
NDIS_HASH_IPV6 = 0x400
NDIS_HASH_IPV6_EX = 0x800
NDIS_HASH_TCP_IPV6 = 0x1000
NDIS_HASH_TCP_IPV6_EX = 0x2000
NDIS_RSS_PARAM_FLAG_HASH_INFO_UNCHANGED = 0x02
NDIS_RSS_PARAM_FLAG_ITABLE_UNCHANGED = 0x04
NDIS_RSS_PARAM_FLAG_HASH_KEY_UNCHANGED = 0x08
NDIS_RSS_PARAM_FLAG_DISABLE_RSS = 0x10
RSS_CAPABILITIES_SIZE = 18
RSS_KEY_SIZE = 40

NDIS_OFFLOAD_PARAMETERS_NO_CHANGE = 0
OFFLOAD_CHECKSUM_OFF = 1
OFFLOAD_CHECKSUM_TX = 2
OFFLOAD_CHECKSUM_RX = 3
OFFLOAD_CHECKSUM_BOTH = 4
OFFLOAD_OFF = 1
OFFLOAD_ON = 2

RX_PARTIAL_CHECKSUM = "RxPartialChecksum"
"""Name of a configuration parameter that only our own guest sets ("1"): its network stack takes a received
frame whose transport checksum is marked good and invalid, as the sender's stack left it."""
CONFIG_PARAMETER_INTEGER = 0
CONFIG_PARAMETER_STRING = 2
_OBJECT = struct.Struct("<BBH")


class _Object(Fixed):
    """An NDIS object without its 4-byte header."""

    __slots__ = ()
    OBJECT_TYPE: ClassVar[int]
    REVISION: ClassVar[int]

    def pack(self) -> bytes:
        """The object with its header. Raises WireError when a value does not fit its field."""
        body = self.pack_fields()
        return _OBJECT.pack(self.OBJECT_TYPE, self.REVISION, _OBJECT.size + len(body)) + body

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Decodes the object; what follows it is ignored. Raises WireError for another type or too few
        bytes."""
        need(cls.__name__, data, _OBJECT.size)
        kind, _, _ = _OBJECT.unpack_from(data)
        if kind != cls.OBJECT_TYPE:
            raise WireError(f"{cls.__name__}: NDIS object type {kind:#x}, expected {cls.OBJECT_TYPE:#x}")
        return cls.unpack_fields(data, _OBJECT.size)


@dataclass(frozen=True, slots=True)
class RssCapabilities(_Object):
    """NDIS_RECEIVE_SCALE_CAPABILITIES revision 2, 18 bytes (longer replies make Linux fail the query)."""

    OBJECT_TYPE: ClassVar[int] = NDIS_OBJECT_TYPE_RSS_CAPABILITIES
    REVISION: ClassVar[int] = 2
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<IIIH")
    flags: int = 0x301
    interrupt_messages: int = 1
    receive_queues: int = 1
    indirection_entries: int = 128


@dataclass(frozen=True, slots=True)
class RssParameters:
    """NDIS_RECEIVE_SCALE_PARAMETERS, as revision 2 with the table after the header and the key after the
    table."""

    HEADER: ClassVar[struct.Struct] = struct.Struct("<BBHHHIHxxIHxxIIII")
    flags: int
    base_cpu: int
    hash_information: int
    indirection_table: tuple[int, ...]
    key: bytes

    @property
    def enabled(self) -> bool:
        """RSS is on: not switched off by flag and with a hash function."""
        kept = bool(self.flags & NDIS_RSS_PARAM_FLAG_HASH_INFO_UNCHANGED)
        return not self.flags & NDIS_RSS_PARAM_FLAG_DISABLE_RSS and (
            kept or bool(self.hash_information & 0xFF)
        )

    def pack(self) -> bytes:
        """The object, Linux's layout. Raises WireError when a value does not fit its field."""
        size = self.HEADER.size
        table_bytes = len(self.indirection_table) * 4
        try:
            head = self.HEADER.pack(
                NDIS_OBJECT_TYPE_RSS_PARAMETERS,
                2,
                size,
                self.flags,
                self.base_cpu,
                self.hash_information,
                table_bytes,
                size,
                len(self.key),
                size + table_bytes,
                0,
                0,
                0,
            )
            return head + struct.pack(f"<{len(self.indirection_table)}I", *self.indirection_table) + self.key
        except struct.error as error:
            raise WireError(f"RssParameters: a value does not fit its field: {error}") from error

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Decodes any revision; the header is not checked, as vmswitch does not, nor where an absent table or
        key would be. What switches RSS off has neither.

        Raises WireError for a table or key outside `data`, a table size that is no multiple of 4 or above
        512, a key that is neither absent nor 40 bytes.
        """
        need("RssParameters", data, 28)
        _, _, _, flags, base_cpu, information, table_bytes, table_at, key_size, key_at = struct.unpack_from(
            "<BBHHHIHxxIHxxI", data
        )
        if flags & NDIS_RSS_PARAM_FLAG_DISABLE_RSS:
            return cls(flags, base_cpu, information, (), b"")
        if table_bytes and (table_bytes % 4 or table_bytes > 512 or table_at + table_bytes > len(data)):
            raise WireError(f"RssParameters: table of {table_bytes} bytes at {table_at} of {len(data)}")
        if key_size and (key_size != RSS_KEY_SIZE or key_at + key_size > len(data)):
            raise WireError(f"RssParameters: key of {key_size} bytes at {key_at} of {len(data)}")
        table = struct.unpack_from(f"<{table_bytes // 4}I", data, table_at) if table_bytes else ()
        return cls(flags, base_cpu, information, table, bytes(data[key_at : key_at + key_size]))


@dataclass(frozen=True, slots=True)
class Offload:
    """NDIS_OFFLOAD: what the NIC can do, or does now. Encapsulation 802.3 stands for "supported"."""

    v4_tx_checksum: int = 0
    v4_rx_checksum: int = 0
    v6_tx_checksum: int = 0
    v6_rx_checksum: int = 0
    lso_v4_maximum: int = 0
    lso_v4_minimum_segments: int = 0
    lso_v6_maximum: int = 0
    lso_v6_minimum_segments: int = 0
    lso_v6_options: int = 0
    rsc_v4: bool = False
    rsc_v6: bool = False

    def pack(self, size: int = NDIS_OFFLOAD_SIZE_NDIS_6_30) -> bytes:
        """The object: 112 (revision 1), 144 (2) or 156 bytes (3). Raises WireError for another size."""
        revision = {
            NDIS_OFFLOAD_SIZE_NDIS_5_1: 1,
            NDIS_OFFLOAD_SIZE_NDIS_6_1: 2,
            NDIS_OFFLOAD_SIZE_NDIS_6_30: 3,
        }
        if size not in revision:
            raise WireError(f"NDIS_OFFLOAD: no revision has {size} bytes; expected 112, 144 or 156")

        def encapsulation(flags: int) -> int:
            return NDIS_ENCAPSULATION_IEEE_802_3 if flags else 0

        checksums: list[int] = []
        for flags in (self.v4_tx_checksum, self.v4_rx_checksum, self.v6_tx_checksum, self.v6_rx_checksum):
            checksums += [encapsulation(flags), flags]
        data = bytearray(NDIS_OFFLOAD_SIZE_NDIS_6_30)
        _OBJECT.pack_into(data, 0, NDIS_OBJECT_TYPE_OFFLOAD, revision[size], size)
        try:
            struct.pack_into("<8I", data, 4, *checksums)
            struct.pack_into(
                "<7I",
                data,
                80,
                encapsulation(self.lso_v4_maximum),
                self.lso_v4_maximum,
                self.lso_v4_minimum_segments,
                encapsulation(self.lso_v6_maximum),
                self.lso_v6_maximum,
                self.lso_v6_minimum_segments,
                self.lso_v6_options,
            )
        except struct.error as error:
            raise WireError(f"NDIS_OFFLOAD: a value does not fit its field: {error}") from error
        data[144:146] = bytes((self.rsc_v4, self.rsc_v6))
        return bytes(data[:size])

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Decodes any revision. Raises WireError for another type or too few bytes, as guests check it."""
        need("NDIS_OFFLOAD", data, NDIS_OFFLOAD_SIZE_NDIS_5_1)
        kind, revision, size = _OBJECT.unpack_from(data)
        if kind != NDIS_OBJECT_TYPE_OFFLOAD or revision < 1 or not 112 <= size <= len(data):
            raise WireError(
                f"NDIS_OFFLOAD: type {kind:#x} revision {revision} size {size} in {len(data)} bytes"
            )
        checksums = struct.unpack_from("<8I", data, 4)
        lso = struct.unpack_from("<7I", data, 80)
        rsc = data[144:146] if size >= NDIS_OFFLOAD_SIZE_NDIS_6_30 else b"\0\0"
        values = (*checksums[1::2], lso[1], lso[2], lso[4], lso[5], lso[6], bool(rsc[0]), bool(rsc[1]))
        return cls(*values)


@dataclass(frozen=True, slots=True)
class OffloadParameters:
    """NDIS_OFFLOAD_PARAMETERS: 0 no change; checksums 1 off 2 TX 3 RX 4 both; others 1 off 2 on.

    Linux sends 22 bytes on old protocol versions with a revision byte of 3: the size decides, not the
    revision.
    """

    HEADER: ClassVar[struct.Struct] = struct.Struct("<BBH11B")
    ipv4_checksum: int = 0
    tcp4_checksum: int = 0
    udp4_checksum: int = 0
    tcp6_checksum: int = 0
    udp6_checksum: int = 0
    lso_v1: int = 0
    ipsec_v1: int = 0
    lso_v2_ipv4: int = 0
    lso_v2_ipv6: int = 0
    tcp_connection_ipv4: int = 0
    tcp_connection_ipv6: int = 0
    flags: int = 0
    rsc_ipv4: int = 0
    rsc_ipv6: int = 0

    def pack(self, size: int = 28) -> bytes:
        """The object in 20, 22 or 28 bytes, revision byte 3 as Linux sends it. Raises WireError."""
        if size not in (20, 22, 28):
            raise WireError(f"NDIS_OFFLOAD_PARAMETERS: no revision has {size} bytes; expected 20, 22 or 28")
        data = bytearray(28)
        try:
            self.HEADER.pack_into(
                data,
                0,
                NDIS_OBJECT_TYPE_DEFAULT,
                3,
                size,
                self.ipv4_checksum,
                self.tcp4_checksum,
                self.udp4_checksum,
                self.tcp6_checksum,
                self.udp6_checksum,
                self.lso_v1,
                self.ipsec_v1,
                self.lso_v2_ipv4,
                self.lso_v2_ipv6,
                self.tcp_connection_ipv4,
                self.tcp_connection_ipv6,
            )
            struct.pack_into("<I", data, 16, self.flags)
            struct.pack_into("<BB", data, 22, self.rsc_ipv4, self.rsc_ipv6)
        except struct.error as error:
            raise WireError(f"NDIS_OFFLOAD_PARAMETERS: a value does not fit its field: {error}") from error
        return bytes(data[:size])

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Decodes 20 bytes or more. Raises WireError for another object type or too few bytes."""
        need("NDIS_OFFLOAD_PARAMETERS", data, 20)
        kind, _, _, *values = cls.HEADER.unpack_from(data)
        if kind != NDIS_OBJECT_TYPE_DEFAULT:
            raise WireError(f"NDIS_OFFLOAD_PARAMETERS: NDIS object type {kind:#x}, expected 0x80")
        (flags,) = struct.unpack_from("<I", data, 16)
        rsc = (data[22], data[23]) if len(data) >= 24 else (0, 0)
        everything = (*values, flags, *rsc)
        return cls(*everything)


@dataclass(frozen=True, slots=True)
class OffloadEncapsulation(_Object):
    """NDIS_OFFLOAD_ENCAPSULATION revision 1, 28 bytes."""

    OBJECT_TYPE: ClassVar[int] = NDIS_OBJECT_TYPE_OFFLOAD_ENCAPSULATION
    REVISION: ClassVar[int] = 1
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<IIIIII")
    ipv4_enabled: int
    ipv4_type: int = NDIS_ENCAPSULATION_IEEE_802_3
    ipv4_header_size: int = 14
    ipv6_enabled: int = 1
    ipv6_type: int = NDIS_ENCAPSULATION_IEEE_802_3
    ipv6_header_size: int = 14


@dataclass(frozen=True, slots=True)
class LinkState(_Object):
    """NDIS_LINK_STATE revision 1, 40 bytes. `connect_state` 1 is connected, 2 disconnected; speeds in
    bit/s."""

    OBJECT_TYPE: ClassVar[int] = NDIS_OBJECT_TYPE_DEFAULT
    REVISION: ClassVar[int] = 1
    FORMAT: ClassVar[struct.Struct] = struct.Struct("<II4xQQII")
    connect_state: int
    duplex: int
    transmit_speed: int
    receive_speed: int
    pause: int = 0
    auto_negotiation: int = 0


@dataclass(frozen=True, slots=True)
class ConfigParameter:
    """RNDIS_CONFIG_PARAMETER_INFO: a named value; strings are UTF-16LE without NUL, at most 255 bytes."""

    HEADER: ClassVar[struct.Struct] = struct.Struct("<IIIII")
    MAXIMUM_STRING: ClassVar[int] = 255
    name: str
    value: bytes
    type: int = CONFIG_PARAMETER_STRING

    @property
    def text(self) -> str:
        """The value as a string. Raises WireError when it is not UTF-16."""
        return _utf16(self.value)

    def pack(self) -> bytes:
        """The structure, name after the header, value after the name."""
        name = self.name.encode("utf-16-le")
        at = self.HEADER.size
        head = self.HEADER.pack(at, len(name), self.type, at + len(name), len(self.value))
        return head + name + self.value

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Raises WireError when name or value leaves `data`, is too long, or the name is not UTF-16."""
        need("RNDIS_CONFIG_PARAMETER", data, cls.HEADER.size)
        name_at, name_size, kind, value_at, value_size = cls.HEADER.unpack_from(data)
        for what, at, size in (("name", name_at, name_size), ("value", value_at, value_size)):
            if size > cls.MAXIMUM_STRING or at + size > len(data):
                raise WireError(f"RNDIS_CONFIG_PARAMETER: {what} of {size} bytes at {at} of {len(data)}")
        return cls(
            _utf16(data[name_at : name_at + name_size]), bytes(data[value_at : value_at + value_size]), kind
        )


def _utf16(data: bytes) -> str:
    try:
        return data.decode("utf-16-le")
    except UnicodeDecodeError as error:
        raise WireError(f"RNDIS_CONFIG_PARAMETER: not UTF-16: {error}") from error
