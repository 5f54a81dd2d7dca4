"""pcapng blocks (draft-ietf-opsawg-pcapng): each method returns the bytes of whole blocks.

The file is one little-endian section of unknown length, so that it can be streamed. Timestamps are
nanoseconds since the Unix epoch.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Iterable, Iterator

LINKTYPE_ETHERNET = 1
LINKTYPE_USER0 = 147
DIRECTION_INBOUND = 1
DIRECTION_OUTBOUND = 2
RECEPTION_UNICAST = 1 << 2
RECEPTION_MULTICAST = 2 << 2
RECEPTION_BROADCAST = 3 << 2
CHECKSUM_NOT_READY = 1 << 9
CHECKSUM_VALID = 1 << 10
TCP_SEGMENTATION = 1 << 11
VERDICT_HARDWARE = 0
"""Type of verdict whose bytes are the capturing device's own: here the drop reason's code, u32."""

_BLOCK_SECTION = 0x0A0D0D0A
_BLOCK_INTERFACE = 1
_BLOCK_STATISTICS = 5
_BLOCK_PACKET = 6
_BYTE_ORDER_MAGIC = 0x1A2B3C4D
_LENGTH_UNKNOWN = 0xFFFFFFFFFFFFFFFF

_OPT_COMMENT = 1
_SHB_HARDWARE = 2
_SHB_OS = 3
_SHB_USERAPPL = 4
_IF_NAME = 2
_IF_DESCRIPTION = 3
_IF_TSRESOL = 9
_EPB_FLAGS = 2
_EPB_DROPCOUNT = 4
_EPB_PACKETID = 5
_EPB_QUEUE = 6
_EPB_VERDICT = 7
_ISB_STARTTIME = 2
_ISB_ENDTIME = 3
_ISB_IFRECV = 4
_ISB_IFDROP = 5
_ISB_USRDELIV = 8

PIECE_BYTES = 1 << 20
"""What a reader that takes the file by messages has to take at once."""

_NANOSECONDS = b"\x09"
_MAX_TEXT = 65535


def in_pieces(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Blocks joined to pieces of at most `PIECE_BYTES`, unless one block alone is longer."""
    piece = bytearray()
    for block in blocks:
        if piece and len(piece) + len(block) > PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
        piece += block
    if piece:
        yield bytes(piece)


class PcapngWriter:
    """Makes blocks and numbers interfaces; holds no file."""

    def __init__(self, *, application: str = "vswitch", hardware: str = "") -> None:
        self._application = application
        self._hardware = hardware or f"vswitch on {platform.machine()}"
        self._interfaces = 0

    def section(self) -> bytes:
        """The section header; the first block of the file."""
        options = _text(_SHB_HARDWARE, self._hardware)
        options += _text(_SHB_OS, f"{platform.system()} {platform.release()}")
        options += _text(_SHB_USERAPPL, self._application)
        body = struct.pack("<IHHQ", _BYTE_ORDER_MAGIC, 1, 0, _LENGTH_UNKNOWN)
        return _block(_BLOCK_SECTION, body, options)

    def interface(
        self, name: str, description: str = "", *, link_type: int = LINKTYPE_ETHERNET, snaplen: int = 0
    ) -> tuple[int, bytes]:
        """An interface and its number for `packet`. A snaplen of 0 is no limit."""
        number, self._interfaces = self._interfaces, self._interfaces + 1
        options = _text(_IF_NAME, name)
        if description:
            options += _text(_IF_DESCRIPTION, description)
        options += _option(_IF_TSRESOL, _NANOSECONDS)
        return number, _block(_BLOCK_INTERFACE, struct.pack("<HHI", link_type, 0, snaplen), options)

    def packet(
        self,
        interface: int,
        timestamp_ns: int,
        data: bytes,
        original_length: int,
        *,
        flags: int = 0,
        packet_id: int | None = None,
        queue: int | None = None,
        verdict: int | None = None,
        lost: int = 0,
        comment: str = "",
    ) -> bytes:
        """One packet.

        `verdict` is a drop reason's code; `lost` counts packets missed just before this one.
        """
        options = _text(_OPT_COMMENT, comment) if comment else b""
        if flags:
            options += _option(_EPB_FLAGS, struct.pack("<I", flags))
        if lost:
            options += _option(_EPB_DROPCOUNT, struct.pack("<Q", lost))
        if packet_id is not None:
            options += _option(_EPB_PACKETID, struct.pack("<Q", packet_id))
        if queue is not None:
            options += _option(_EPB_QUEUE, struct.pack("<I", queue))
        if verdict is not None:
            options += _option(_EPB_VERDICT, struct.pack("<BI", VERDICT_HARDWARE, verdict))
        high, low = timestamp_ns >> 32, timestamp_ns & 0xFFFFFFFF
        body = struct.pack("<IIIII", interface, high, low, len(data), original_length) + _pad(data)
        return _block(_BLOCK_PACKET, body, options)

    def statistics(
        self, interface: int, start_ns: int, end_ns: int, *, received: int, lost: int, delivered: int
    ) -> bytes:
        """What an interface saw in all; written when the capture stops."""
        options = _option(_ISB_STARTTIME, _time(start_ns)) + _option(_ISB_ENDTIME, _time(end_ns))
        options += _option(_ISB_IFRECV, struct.pack("<Q", received))
        options += _option(_ISB_IFDROP, struct.pack("<Q", lost))
        options += _option(_ISB_USRDELIV, struct.pack("<Q", delivered))
        return _block(_BLOCK_STATISTICS, struct.pack("<I", interface) + _time(end_ns), options)


def reception(destination: bytes) -> int:
    """The reception bits of `epb_flags` for an Ethernet destination address."""
    if destination == b"\xff" * 6:
        return RECEPTION_BROADCAST
    return RECEPTION_MULTICAST if destination[:1] and destination[0] & 1 else RECEPTION_UNICAST


def _block(kind: int, body: bytes, options: bytes) -> bytes:
    end_of_options = b"\0\0\0\0" if options else b""
    length = 12 + len(body) + len(options) + len(end_of_options)
    word = struct.pack("<I", length)
    return struct.pack("<I", kind) + word + body + options + end_of_options + word


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + _pad(value)


def _text(code: int, text: str) -> bytes:
    return _option(code, text.encode()[:_MAX_TEXT].decode("utf-8", "ignore").encode())


def _time(timestamp_ns: int) -> bytes:
    return struct.pack("<II", timestamp_ns >> 32, timestamp_ns & 0xFFFFFFFF)


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
