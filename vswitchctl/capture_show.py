"""`vswitch capture show`: a capture as text, one line per packet, and the filter that picks packets.

12:01:02.123456789 a in   10.0.0.1:4000 > 10.0.0.2:23 TCP SYN seq 0 len 0  [dropped: Filtered (8) by t]
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator

from vswitchctl.capture_file import LINKTYPE_ETHERNET, LINKTYPE_USER0, Record
from vswitchctl.frame_text import describe
from vswitchctl.output import counted

PacketFilter = Callable[[Record], bool]

_DIRECTIONS = {0: "guest > host", 1: "host > guest"}
_KINDS = {1: "channel message", 2: "ring packet"}


class FilterError(ValueError):
    """The filter is wrong or cannot be run here; the text says which and what to do."""


def lines(records: Iterable[Record]) -> Iterator[str]:
    """A line per packet, and one where the capture says that it missed some. Times are UTC."""
    for record in records:
        if record.lost:
            yield f"... {counted(record.lost, 'packet')} lost here: the capture's reader was too slow"
        yield line(record)


def line(record: Record) -> str:
    """One packet in one line."""
    seconds = record.timestamp_ns // 1_000_000_000 % 86_400
    when = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    when += f".{record.timestamp_ns % 1_000_000_000:09d}"
    text = _text(record)
    where = " ".join(part for part in (record.interface, f"{record.direction:<3}") if part.strip())
    where = f" {where}" if where else ""
    note = record.comment or ("" if record.drop_code is None else f"dropped: reason {record.drop_code}")
    shown = f"{when}{where}  {text}" + (f"  [{note}]" if note else "")
    return "".join(c if c.isprintable() else "?" for c in shown)


def plain(record: Record) -> dict[str, object]:
    """One packet as plain values, for programs; its bytes are in hex."""
    return {
        "timestamp_ns": record.timestamp_ns,
        "interface": record.interface,
        "direction": record.direction,
        "packet_id": record.packet_id,
        "link_type": record.link_type,
        "original_length": record.original_length,
        "summary": _text(record),
        "drop_code": record.drop_code,
        "comment": record.comment,
        "lost_before": record.lost,
        "data": record.data.hex(),
    }


def _text(record: Record) -> str:
    if record.link_type == LINKTYPE_ETHERNET:
        return describe(record.data)
    if record.link_type == LINKTYPE_USER0:
        return describe_vmbus(record.data)
    return f"link type {record.link_type}, {record.original_length} bytes"


def describe_vmbus(data: bytes) -> str:
    """A record of `capture --vmbus`: by the scapy layers where scapy is installed, else its first bytes."""
    if len(data) < 8 or data[0] != 1:
        return f"VMBus record of {len(data)} bytes: {data[:16].hex(' ')}"
    direction, kind = _DIRECTIONS.get(data[1], "?"), _KINDS.get(data[2], f"kind {data[2]}")
    relid = int.from_bytes(data[4:8], "little")
    channel = f" relid {relid}" if relid else ""
    try:
        layers = importlib.import_module("netvsc.scapy_layers")
    except ImportError:
        body = data[8:]
        shown = body[:32].hex(" ") + (" ..." if len(body) > 32 else "")
        return (
            f"{direction} {kind}{channel}, {len(body)} bytes: {shown} (install vswitch[scapy] to decode it)"
        )
    return f"{direction} {kind}{channel} {layers.summary(data)}"


def compile_filter(expression: str) -> PacketFilter:
    """A pcap-filter(7) expression as a predicate, run by libpcap.

    Raises FilterError when the expression is wrong, or when cypcap, which brings libpcap, is not installed.
    """
    try:
        import cypcap
    except ImportError:
        raise FilterError(
            "filters need libpcap's compiler, which is not installed; pip install 'vswitch[filter]'"
        ) from None
    try:
        ethernet = cypcap.DatalinkType.EN10MB
        program = cypcap.compile(ethernet, 65535, expression, True, cypcap.NETMASK_UNKNOWN)
    except cypcap.Error as error:
        raise FilterError(f"filter {expression!r}: {error}") from None

    def matches(record: Record) -> bool:
        if record.link_type != LINKTYPE_ETHERNET:
            return False
        header = cypcap.Pkthdr(0.0, len(record.data), record.original_length)
        return bool(program.offline_filter(header, record.data))

    return matches
