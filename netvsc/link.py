"""The network interface that a guest's kernel sees: a TAP, or a veth pair joined by AF_PACKET where there is
no TAP.

Frames cross `fd` behind a 10-byte virtio-net header (struct virtio_net_hdr, little-endian) in both
directions; a VLAN tag is inline. The interface outlives any VMBus channel: its carrier alone says whether
there is one.

Blocking calls here are ioctls that take microseconds; addresses and routes go through pyroute2's asyncio
core.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import ipaddress
import os
import socket
import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "VNET_HEADER_LENGTH",
    "InterfaceConfig",
    "Link",
    "LinkError",
    "PacketLink",
    "TapLink",
    "configure",
    "limit_segments",
    "loopback_up",
    "open_link",
    "tap_refusal",
]

VNET_HEADER_LENGTH = 10
MAX_READ = 65536 + VNET_HEADER_LENGTH + 4

_TUN = "/dev/net/tun"
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_TUNSETVNETHDRSZ = 0x400454D8
_TUNSETVNETLE = 0x400454DC
_TUNSETCARRIER = 0x400454E2
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 0x01, 0x02, 0x04
_SIOCETHTOOL = 0x8946
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFHWADDR, _SIOCSIFMTU, _SIOCSIFNAME = (
    0x8913,
    0x8914,
    0x8924,
    0x8922,
    0x8923,
)
_ETHTOOL_STXCSUM, _ETHTOOL_STSO, _ETHTOOL_SGSO = 0x17, 0x1F, 0x24
_IFF_UP = 0x1
_ARPHRD_ETHER = 1
_ETH_P_ALL = 0x0003
_SOL_PACKET = 263
_PACKET_ADD_MEMBERSHIP, _PACKET_AUXDATA, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 1, 8, 15, 23
_PACKET_MR_PROMISC = 1
_TP_STATUS_VLAN_VALID = 0x10
_AUXDATA = struct.Struct("=IIIHHHH")


class LinkError(OSError):
    """The interface could not be made or set; the message names it and the remedy."""


@dataclass(frozen=True, slots=True)
class InterfaceConfig:
    """What the daemon wants of one interface, from a CONFIGURE document."""

    mac: bytes
    name: str
    addresses: tuple[str, ...]
    mtu: int
    gateway: str | None

    @classmethod
    def parse(cls, document: object) -> InterfaceConfig:
        """Check one element of "interfaces". ValueError names the key and what it must be.

        Other keys are ignored: a guest outlives its daemon, and the next one may be newer.
        """
        if not isinstance(document, dict):
            raise ValueError("interfaces: every element must be an object")
        mac = parse_mac(document.get("mac"))
        name = document.get("name")
        if not isinstance(name, str) or not 1 <= len(name.encode()) <= 15 or "/" in name or name.isspace():
            raise ValueError(f"interface {format_mac(mac)}: name must be 1..15 bytes without '/'")
        mtu = document.get("mtu") or 1500
        if not isinstance(mtu, int) or not 68 <= mtu <= 65521:
            raise ValueError(f"interface {name}: mtu must be 68..65521")
        addresses = document.get("addresses") or []
        if not isinstance(addresses, list) or len(addresses) > 64:
            raise ValueError(f"interface {name}: addresses must be a list of at most 64")
        checked: list[str] = []
        for address in addresses:
            if not isinstance(address, str) or "/" not in address:
                raise ValueError(f"interface {name}: address {address!r} must be ADDRESS/PREFIX")
            checked.append(str(ipaddress.ip_interface(address)))
        gateway = document.get("gateway")
        if gateway is not None:
            gateway = str(ipaddress.ip_address(gateway))
        return cls(mac, name, tuple(checked), mtu, gateway)


def parse_mac(text: object) -> bytes:
    """Six bytes from "02:00:00:00:00:01" (or with '-'). ValueError."""
    if isinstance(text, str):
        parts = text.replace("-", ":").split(":")
        if len(parts) == 6 and all(len(part) == 2 for part in parts):
            return bytes(int(part, 16) for part in parts)
    raise ValueError(f"interfaces: mac {text!r} must be six hex bytes, aa:bb:cc:dd:ee:ff")


def format_mac(mac: bytes) -> str:
    """ "02:00:00:00:00:01"."""
    return mac.hex(":")


def _ifreq(name: str, data: bytes = b"") -> bytes:
    return struct.pack("16s24s", name.encode(), data)


def _control(request: int, argument: bytes) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        return fcntl.ioctl(handle, request, argument)


def _set_flag_up(name: str, up: bool) -> None:
    flags = struct.unpack_from("H", _control(_SIOCGIFFLAGS, _ifreq(name)), 16)[0]
    flags = flags | _IFF_UP if up else flags & ~_IFF_UP
    _control(_SIOCSIFFLAGS, _ifreq(name, struct.pack("H", flags)))


class Link(ABC):
    """An interface in this network namespace and the descriptor its frames cross."""

    kind: str
    fd: int
    name: str
    is_packet_socket: bool

    @abstractmethod
    def set_carrier(self, up: bool) -> None:
        """Tell the guest's kernel whether the link is there."""

    @abstractmethod
    def set_offload(self, *, checksum: bool, lso4: bool, lso6: bool) -> None:
        """Say what frames read from `fd` may leave to the host: checksums, TCP segmentation."""

    @abstractmethod
    def read(self) -> bytes | None:
        """One frame behind its header; None when there is none now."""

    @abstractmethod
    def write(self, data: bytes) -> bool:
        """Give one frame behind its header to the kernel; False = refused (interface down, or malformed)."""

    @abstractmethod
    def close(self) -> None:
        """Remove the interface."""

    def set_mac(self, mac: bytes) -> None:
        """Set the interface's address; it may be up or down."""
        _control(_SIOCSIFHWADDR, _ifreq(self.name, struct.pack("H6s", _ARPHRD_ETHER, mac)))

    def set_mtu(self, mtu: int) -> None:
        """Set the largest layer 3 packet, in bytes."""
        _control(_SIOCSIFMTU, _ifreq(self.name, struct.pack("i", mtu)))

    def rename(self, name: str) -> None:
        """Give the interface another name; it goes down for that moment."""
        if name == self.name:
            return
        _set_flag_up(self.name, False)
        _control(_SIOCSIFNAME, _ifreq(self.name, name.encode()))
        self.name = name


def _read(fd: int) -> bytes | None:
    try:
        return os.read(fd, MAX_READ)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENETDOWN, errno.EBADFD):  # interface down
            return None
        raise


class TapLink(Link):
    """A TAP device with IFF_VNET_HDR; it exists as long as its descriptor."""

    kind = "tap"
    is_packet_socket = False

    def __init__(self, name: str) -> None:
        self.fd = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
            answer = fcntl.ioctl(self.fd, _TUNSETIFF, _ifreq(name, struct.pack("H", flags)))
            fcntl.ioctl(self.fd, _TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER_LENGTH))
            fcntl.ioctl(self.fd, _TUNSETVNETLE, struct.pack("i", 1))
        except OSError:
            os.close(self.fd)
            raise
        self.name = answer[:16].split(b"\0", 1)[0].decode()
        self.set_carrier(False)

    def set_carrier(self, up: bool) -> None:
        fcntl.ioctl(self.fd, _TUNSETCARRIER, struct.pack("i", int(up)))

    def set_offload(self, *, checksum: bool, lso4: bool, lso6: bool) -> None:
        bits = 0
        if checksum:
            bits = _TUN_F_CSUM | (_TUN_F_TSO4 if lso4 else 0) | (_TUN_F_TSO6 if lso6 else 0)
        fcntl.ioctl(self.fd, _TUNSETOFFLOAD, bits)

    def read(self) -> bytes | None:
        return _read(self.fd)

    def write(self, data: bytes) -> bool:
        try:
            os.write(self.fd, data)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EIO, errno.EINVAL, errno.ENOBUFS, errno.ENOMEM):
                return False
            raise
        return True

    def close(self) -> None:
        os.close(self.fd)


class PacketLink(Link):
    """A veth pair inside the namespace: its far end, named after the near one with "-nic" behind, is read by
    AF_PACKET.

    The carrier is the far end's administrative state.
    """

    kind = "veth"
    is_packet_socket = True

    def __init__(self, name: str, far: str) -> None:
        """Both ends exist already (`make_veth`)."""
        self.name, self._far = name, far
        self._socket = socket.socket(
            socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0
        )
        self.fd = self._socket.fileno()
        try:
            for option in (_PACKET_VNET_HDR, _PACKET_AUXDATA, _PACKET_IGNORE_OUTGOING):
                self._socket.setsockopt(_SOL_PACKET, option, 1)
            index = socket.if_nametoindex(far)
            membership = struct.pack("iHH8s", index, _PACKET_MR_PROMISC, 0, b"")
            self._socket.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, membership)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            self._socket.bind((far, _ETH_P_ALL))
        except OSError:
            self._socket.close()
            raise

    def set_carrier(self, up: bool) -> None:
        _set_flag_up(self._far, up)

    def set_mtu(self, mtu: int) -> None:
        super().set_mtu(mtu)
        _control(_SIOCSIFMTU, _ifreq(self._far, struct.pack("i", mtu)))

    def set_offload(self, *, checksum: bool, lso4: bool, lso6: bool) -> None:
        segmentation = checksum and lso4 and lso6
        for command, value in (
            (_ETHTOOL_STXCSUM, checksum),
            (_ETHTOOL_STSO, segmentation),
            (_ETHTOOL_SGSO, segmentation),
        ):
            words = array.array("I", [command, int(value)])
            address = struct.pack("P", words.buffer_info()[0])
            try:
                _control(_SIOCETHTOOL, _ifreq(self.name, address))
            except OSError as error:
                raise LinkError(
                    error.errno, f"cannot set offloads of {self.name}: {error.strerror}"
                ) from error

    def read(self) -> bytes | None:
        try:
            data, ancillary, _flags, _address = self._socket.recvmsg(MAX_READ, 64)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.ENETDOWN:  # reported once when the far end goes down
                return None
            raise
        for level, kind, body in ancillary:
            if level == _SOL_PACKET and kind == _PACKET_AUXDATA and len(body) >= _AUXDATA.size:
                status, _len, _snap, _mac, _net, tci, tpid = _AUXDATA.unpack_from(body)
                if status & _TP_STATUS_VLAN_VALID:
                    return _with_tag(data, tpid or 0x8100, tci)
        return data

    def write(self, data: bytes) -> bool:
        try:
            self._socket.send(data)
        except OSError as error:
            if error.errno in (
                errno.EAGAIN,
                errno.ENETDOWN,
                errno.ENOBUFS,
                errno.EMSGSIZE,
                errno.EINVAL,
                errno.ENXIO,
            ):
                return False
            raise
        return True

    def close(self) -> None:
        self._socket.close()


def _with_tag(data: bytes, tpid: int, tci: int) -> bytes:
    """Put a VLAN tag that the kernel took out back into the frame, and move csum_start with it."""
    head = bytearray(data[:VNET_HEADER_LENGTH])
    if head[0] & 1:
        start = struct.unpack_from("<H", head, 6)[0]
        struct.pack_into("<H", head, 6, start + 4)
    frame = VNET_HEADER_LENGTH + 12
    return bytes(head) + data[VNET_HEADER_LENGTH:frame] + struct.pack(">HH", tpid, tci) + data[frame:]


def tap_refusal() -> str | None:
    """Why a TAP cannot be used here, in one line with its remedy; None when it can."""
    try:
        os.close(os.open(_TUN, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return f"{_TUN} does not exist; as root: modprobe tun (in a container: --device {_TUN})"
    except PermissionError:
        return f"{_TUN} may not be opened by this user; as root: chmod 0666 {_TUN}"
    except OSError as error:
        return f"{_TUN} cannot be opened ({error.strerror}); as root: modprobe tun"
    return None


async def open_link(name: str, kind: str) -> Link:
    """Make the interface `name` in this namespace; `kind` is "tap" or "veth". LinkError."""
    try:
        if kind == "tap":
            return TapLink(name)
        far = f"{name[:11]}-nic"
        await _make_veth(name, far)
        return PacketLink(name, far)
    except OSError as error:
        raise LinkError(
            error.errno or 0, f"cannot make interface {name} ({kind}): {error.strerror}"
        ) from error


def _route() -> Any:
    from pyroute2 import AsyncIPRoute  # a quarter of a second to import: not before it is needed

    return AsyncIPRoute()


async def _make_veth(name: str, far: str) -> None:
    async with _route() as ip:
        await ip.link("add", ifname=name, kind="veth", peer={"ifname": far})
        # The far end is a wire's end, not a host: no address of its own, no neighbour discovery on it.
        index = socket.if_nametoindex(far)
        await ip.link("set", index=index, arp=False)
    _disable_ipv6(far)


def _disable_ipv6(name: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1\n", encoding="ascii")


async def loopback_up() -> None:
    """Bring lo up."""
    _set_flag_up("lo", True)


async def limit_segments(link: Link, size: int) -> None:
    """The interface's kernel leaves no TCP frame larger than `size` bytes to the host."""
    async with _route() as ip:
        await ip.link("set", index=socket.if_nametoindex(link.name), gso_max_size=size)


async def configure(link: Link, config: InterfaceConfig) -> None:
    """Name, addresses, gateway; the interface is up afterwards. Repeating it with other values replaces
    them."""
    import pyroute2

    link.rename(config.name)
    index = socket.if_nametoindex(link.name)
    wanted = {ipaddress.ip_interface(address) for address in config.addresses}
    async with _route() as ip:
        await ip.link("set", index=index, state="up")
        present: set[Any] = set()
        async for message in await ip.addr("dump", index=index):
            if message.get("scope") == 253:  # link-local, the kernel's own
                continue
            present.add(ipaddress.ip_interface(f"{message.get('address')}/{message['prefixlen']}"))
        for address in present - wanted:
            await ip.addr("del", index=index, address=str(address.ip), prefixlen=address.network.prefixlen)
        for address in wanted - present:
            extra = {"flags": 0x02} if address.version == 6 else {}  # IFA_F_NODAD: usable at once
            await ip.addr(
                "add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen, **extra
            )
        if config.gateway is not None:
            family = {} if "." in config.gateway else {"family": socket.AF_INET6}
            try:
                await ip.route("replace", dst="default", gateway=config.gateway, oif=index, **family)
            except pyroute2.NetlinkError as error:
                raise LinkError(
                    error.code,
                    f"interface {link.name}: gateway {config.gateway} is not reachable from "
                    f"{', '.join(config.addresses) or 'no address'}",
                ) from error
