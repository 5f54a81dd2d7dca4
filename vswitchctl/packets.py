"""Frames that a user describes on the command line: hex bytes, or a scapy expression.

An expression is parsed, never evaluated as Python: layers of scapy joined by `/`, called with literal
arguments, and strings or bytes as payload. `Ether()/IP(dst="10.0.0.2")/TCP(dport=23, flags="S")/"hello"`.
"""

from __future__ import annotations

import ast
import importlib
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_FRAME = 65535
MAX_TEXT = 65536
_LAYER_MODULES = (
    "scapy.layers.l2",
    "scapy.layers.inet",
    "scapy.layers.inet6",
    "scapy.layers.vxlan",
    "scapy.layers.dhcp",
    "scapy.layers.dhcp6",
    "scapy.layers.dns",
    "scapy.layers.sctp",
    "scapy.contrib.lldp",
)
_HEX = re.compile(r"(?:0x)?[0-9a-fA-F]{2}(?:[\s:.-]?[0-9a-fA-F]{2})*")
_EXAMPLE = 'Ether()/IP(dst="10.0.0.2")/TCP(dport=23)'


class PacketTextError(ValueError):
    """The text describes no frame; the message says where and why."""


@dataclass(frozen=True, slots=True)
class Sender:
    """Whose frame it is: what an expression leaves open is as the NIC at the port would send it."""

    mac: str = "00:00:00:00:00:00"
    addresses: tuple[str, ...] = ()
    # IP address -> MAC of every NIC on the switch.
    neighbours: Mapping[str, str] = field(default_factory=dict)

    def address(self, version: int) -> str:
        """Its first address of an IP version; the unspecified one where it has none."""
        found = (text for text in self.addresses if ipaddress.ip_address(text).version == version)
        return next(found, "0.0.0.0" if version == 4 else "::")


def is_hex(text: str) -> bool:
    """Whether `text` gives the frame's bytes, so that nothing in it is left open."""
    return _HEX.fullmatch(text.strip()) is not None


def parse_packet(text: str, sender: Sender | None = None) -> bytes:
    """The frame that `text` describes, 14 to 65535 bytes.

    Hex may be grouped by blanks, colons, dots or dashes. In an expression, addresses that are not given are
    the sender's, and the destination MAC is that of the neighbour with the destination address, else
    broadcast: this machine's own addresses and neighbours have no part in it. Raises PacketTextError, also
    when scapy is needed and not installed.
    """
    text = text.strip()
    if len(text) > MAX_TEXT:
        raise PacketTextError(f"a description of {len(text)} characters, at most {MAX_TEXT}")
    if is_hex(text):
        frame = bytes.fromhex(re.sub(r"^0x|[\s:.-]", "", text))
    else:
        frame = _from_scapy(text, sender or Sender())
    if not 14 <= len(frame) <= MAX_FRAME:
        raise PacketTextError(f"a frame of {len(frame)} bytes; an Ethernet frame has 14 to {MAX_FRAME}")
    return frame


def _from_scapy(text: str, sender: Sender) -> bytes:
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f" at character {error.offset}" if isinstance(error, SyntaxError) else ""
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise PacketTextError(f"{text!r} is neither hex nor an expression{where}: {reason}") from None
    layers = _layers()
    parts = [_part(node, layers) for node in _stacked(tree.body)]
    packet = parts[0]
    if isinstance(packet, str | bytes):
        raise PacketTextError(f"an expression begins with a layer, as in {_EXAMPLE}")
    try:
        for part in parts[1:]:
            packet = packet / part
        _complete(packet, sender)
        frame = bytes(packet)
    except Exception as error:  # scapy raises what its fields raise
        raise PacketTextError(f"scapy cannot build {text!r}: {error}") from None
    if packet.name != "Ethernet" and packet.name != "802.3":
        raise PacketTextError(
            f"the outermost layer is {packet.name}; a port takes Ethernet frames: Ether()/..."
        )
    return frame


def _complete(packet: Any, sender: Sender) -> None:
    """Fills in the addresses that the expression leaves open; scapy would ask this machine's network."""
    outer = packet.getlayer("Ether")
    inner = next((packet.getlayer(name) for name in ("IP", "IPv6", "ARP") if packet.haslayer(name)), None)
    if inner is not None and inner.name == "ARP":
        inner.fields.setdefault("hwsrc", sender.mac)
        inner.fields.setdefault("psrc", sender.address(4))
    elif inner is not None:
        inner.fields.setdefault("src", sender.address(6 if inner.name == "IPv6" else 4))
    if outer is not packet:
        return
    target = "ff:ff:ff:ff:ff:ff"
    if inner is not None and inner.name != "ARP":
        target = sender.neighbours.get(str(inner.dst), target)
    outer.fields.setdefault("src", sender.mac)
    outer.fields.setdefault("dst", target)


def _layers() -> dict[str, Any]:
    """Name -> class of every layer that an expression may use."""
    try:
        base = importlib.import_module("scapy.packet")
        modules = [importlib.import_module(name) for name in _LAYER_MODULES]
    except ImportError:
        raise PacketTextError(
            "a packet expression needs scapy: pip install 'vswitch[scapy]'; or give the frame in hex"
        ) from None
    found = {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base.Packet) and value is not base.Packet
    }
    return {**found, "Raw": base.Raw, "Padding": base.Padding}


def _stacked(node: ast.expr) -> list[ast.expr]:
    """The operands of `a / b / c`, left to right."""
    parts: list[ast.expr] = []
    while isinstance(node, ast.BinOp):
        if not isinstance(node.op, ast.Div):
            raise PacketTextError(f"at character {node.col_offset + 1}: layers are joined by / only")
        parts.append(node.right)
        node = node.left
    parts.append(node)
    return parts[::-1]


def _part(node: ast.expr, layers: dict[str, Any]) -> Any:
    where = f"at character {node.col_offset + 1}"
    if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
        return node.value
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise PacketTextError(f"{where}: expected a layer such as IP(...), or a string; as in {_EXAMPLE}")
    name = node.func.id
    if name not in layers:
        raise PacketTextError(f"{where}: no layer is named {name}; as in {_EXAMPLE}")
    keywords: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise PacketTextError(f"{where}: {name}(**...) is not allowed; name each field")
        keywords[keyword.arg] = _literal(keyword.value, layers)
    arguments = [_literal(argument, layers) for argument in node.args]
    if arguments and name not in ("Raw", "Padding"):
        raise PacketTextError(f"{where}: name the fields of {name}, as in {_EXAMPLE}")
    known = [field.name for field in layers[name].fields_desc]
    for given in keywords:
        if given not in known:
            raise PacketTextError(f"{where}: {name} has no field {given}; it has {', '.join(known)}")
    try:
        return layers[name](*arguments, **keywords)
    except Exception as error:  # scapy raises what its fields raise
        raise PacketTextError(f"{where}: {name}: {error}") from None


def _literal(node: ast.expr, layers: dict[str, Any]) -> Any:
    """Numbers, strings, bytes, None, and lists or tuples of them; layers within lists (DNS records,
    options).
    """
    if isinstance(node, ast.Call):
        return _part(node, layers)
    if isinstance(node, ast.List):
        return [_literal(item, layers) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_literal(item, layers) for item in node.elts)
    try:
        return ast.literal_eval(node)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise PacketTextError(
            f"at character {node.col_offset + 1}: a field takes a literal: a number, a string, a list"
        ) from None
