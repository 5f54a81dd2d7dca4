"""hv_utils in this process: a guest's utility drivers as drivers/hv/hv_util.c, hv_kvp.c and channel_mgmt.c
of Linux describe them, with their checks, byte offsets taken from include/linux/hyperv.h and nothing of the
host's codecs used."""

from __future__ import annotations

import struct
from collections.abc import Callable
from uuid import UUID

from hypervisor_world import PAGE, Guest

from netvsc.vmbus import GuestChannel
from vswitch_wire import packet
from vswitch_wire.memory import signal_fd
from vswitch_wire.ring import RingReader, RingWriter

RING_PAGES = 4
"""VMBUS_RING_SIZE(3 * HV_HYP_PAGE_SIZE): a control page and three pages of data."""
IC_HEADER = 28
FRAMEWORKS = [(3, 0), (1, 0)]
SHUTDOWN_VERSIONS = [(3, 2), (3, 1), (3, 0), (1, 0)]
TIMESYNC_VERSIONS = [(4, 0), (3, 0), (1, 0)]
HEARTBEAT_VERSIONS = [(3, 0), (1, 0)]
KVP_VERSIONS = [(4, 0), (3, 0), (1, 0)]
SHUTDOWN = UUID("0e0b6031-5213-4934-818b-38d90ced39db")
TIMESYNC = UUID("9527e630-d0ae-497b-adce-e80ab0175caf")
HEARTBEAT = UUID("57164f39-9115-4e78-ab55-382f3bd5422d")
KVP = UUID("a9a0f4e7-5a45-4d96-b827-8a841e8c03e6")
HV_E_FAIL = 0x80004005
HV_S_CONT = 0x80070103


class Driver:
    """One open utility channel: `vmbus_recvpacket` and `vmbus_sendpacket` around `callback`."""

    versions: list[tuple[int, int]]
    kind: int
    every_packet = False
    """Whether the callback drains the ring; the others take one packet per interrupt."""
    packet_limit = PAGE

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.errors: list[str] = []
        self.version = (0, 0)
        self.mute = False
        self.channel: GuestChannel

    async def open(self, class_id: UUID) -> None:
        """util_probe."""
        (offer,) = [entry for entry in self.guest.offers if entry.class_id == class_id]
        self.channel = await self.guest.vmbus.open(offer, ring_pages=RING_PAGES)
        self.map()
        self.interrupted()

    def map(self) -> None:
        split, pages = self.channel.downstream_page_offset, self.channel.ring_pfns
        self.writer = RingWriter(self.channel.memory.view(pages[:split], 0, split * PAGE))
        self.reader = RingReader(self.channel.memory.view(pages[split:], 0, (len(pages) - split) * PAGE))
        self.channel.on_interrupt = self.interrupted

    async def close(self) -> None:
        """util_remove."""
        self.channel.on_interrupt = lambda: None
        await self.guest.vmbus.close(self.channel)

    def interrupted(self) -> None:
        while self.receive() and self.every_packet:
            pass

    def receive(self) -> bool:
        if self.mute:
            return False
        packets = self.reader.read(1)
        if not packets:
            return False
        if self.reader.commit():
            signal_fd(self.channel.signal_fd)
        received = packet.decode(packets[0])
        if len(received.payload) > self.packet_limit:
            self.errors.append("could not read into the buffer")
            return False
        if len(received.payload) < IC_HEADER:
            self.errors.append("packet length too small")
            return False
        self.handle(bytearray(received.payload), received.transaction_id)
        return True

    def handle(self, buffer: bytearray, request: int) -> None:
        (kind,) = struct.unpack_from("<H", buffer, 12)
        if kind == 0:
            self.negotiate(buffer)
        elif kind == self.kind:
            if not self.callback(buffer):
                return
        else:
            self.errors.append(f"invalid message type {kind}")
            struct.pack_into("<I", buffer, 20, HV_E_FAIL)
        self.respond(buffer, request)

    def respond(self, buffer: bytearray, request: int) -> None:
        buffer[25] = 5
        self.send(packet.encode_inband(bytes(buffer), request, False))

    def send(self, raw: bytes) -> None:
        assert self.writer.write(raw)
        if self.writer.commit():
            signal_fd(self.channel.signal_fd)

    def negotiate(self, buffer: bytearray) -> None:
        """vmbus_prep_negotiate_resp: the first of its own versions that the host has, newest first."""
        struct.pack_into("<H", buffer, 18, 0x10)
        frameworks, messages = struct.unpack_from("<HH", buffer, 28)
        if frameworks > 100 or messages > 100 or 36 + 4 * (frameworks + messages) > len(buffer):
            self.errors.append("invalid negotiation")
            return
        offered = list(struct.iter_unpack("<HH", buffer[36 : 36 + 4 * (frameworks + messages)]))
        framework = next((entry for entry in FRAMEWORKS if entry in offered[:frameworks]), None)
        version = next((entry for entry in self.versions if entry in offered[frameworks:]), None)
        if framework is None or version is None:
            struct.pack_into("<HH", buffer, 28, 0, 0)
            return
        self.version = version
        struct.pack_into("<HH", buffer, 28, 1, 1)
        struct.pack_into("<HHHH", buffer, 36, *framework, *version)

    def callback(self, buffer: bytearray) -> bool:
        """Whether the buffer is the answer; False when it was dropped or is answered later."""
        raise NotImplementedError


class ShutdownDriver(Driver):
    versions = SHUTDOWN_VERSIONS
    kind = 3

    def __init__(self, guest: Guest) -> None:
        super().__init__(guest)
        self.done: list[str] = []

    def callback(self, buffer: bytearray) -> bool:
        if len(buffer) < IC_HEADER + 2060:
            self.errors.append("invalid shutdown message")
            return False
        (flags,) = struct.unpack_from("<I", buffer, IC_HEADER + 8)
        action = {0: "poweroff", 1: "poweroff", 2: "reboot", 3: "reboot"}.get(flags)
        struct.pack_into("<I", buffer, 20, 0 if action else HV_E_FAIL)
        if action:
            self.done.append(action)
        return True


class TimesyncDriver(Driver):
    versions = TIMESYNC_VERSIONS
    kind = 4
    every_packet = True

    def __init__(self, guest: Guest, reference: Callable[[], int]) -> None:
        super().__init__(guest)
        self.reference = reference
        self.clock_ns: list[int] = []
        """What do_settimeofday64 was called with."""
        self.samples = 0

    def callback(self, buffer: bytearray) -> bool:
        if self.version > (3, 0):
            host, reference, flags = struct.unpack_from("<QQB", buffer, IC_HEADER)
            enough = IC_HEADER + 22
        else:
            host, _, _, flags = struct.unpack_from("<QQQB", buffer, IC_HEADER)
            reference, enough = self.reference(), IC_HEADER + 25
        if len(buffer) < enough:
            self.errors.append("invalid timesync message")
            return False
        if flags & 1:
            self.clock_ns.append((host + self.reference() - reference - 116444736000000000) * 100)
        if flags & 2:
            self.samples += 1
        return True


class HeartbeatDriver(Driver):
    versions = HEARTBEAT_VERSIONS
    kind = 1
    every_packet = True

    def callback(self, buffer: bytearray) -> bool:
        (number,) = struct.unpack_from("<Q", buffer, IC_HEADER)
        struct.pack_into("<Q", buffer, IC_HEADER, (number + 1) % (1 << 64))
        return True


class KvpDriver(Driver):
    """hv_kvp.c with hv_kvp_daemon.c behind it, which is there once `registered`."""

    versions = KVP_VERSIONS
    kind = 2
    packet_limit = 2 * PAGE

    def __init__(self, guest: Guest) -> None:
        super().__init__(guest)
        self.registered = True
        self.pools: dict[int, list[tuple[str, str]]] = {2: []}
        self.adapters: dict[str, tuple[str, str, str, str, int]] = {}

    def receive(self) -> bool:
        # Below HVUTIL_READY the negotiation stays in the ring until the daemon is there.
        return self.registered and super().receive()

    def register(self) -> None:
        """The daemon opens /dev/vmbus/hv_kvp."""
        self.registered = True
        self.interrupted()

    def callback(self, buffer: bytearray) -> bool:
        operation, pool = struct.unpack_from("<BB", buffer, IC_HEADER)
        status = 0
        if operation == 3:
            (index,) = struct.unpack_from("<I", buffer, IC_HEADER + 4)
            entries = self.pools.get(pool, [])
            if index < len(entries):
                self.put(buffer, IC_HEADER + 8, *entries[index])
            else:
                status = HV_S_CONT
        elif operation == 0:
            (size,) = struct.unpack_from("<I", buffer, IC_HEADER + 8)
            key = bytes(buffer[IC_HEADER + 16 : IC_HEADER + 16 + size]).decode("utf-16-le").rstrip("\0")
            found = [value for name, value in self.pools.get(pool, []) if name == key]
            if found:
                self.put(buffer, IC_HEADER + 4, None, found[0])
            else:
                status = HV_S_CONT
        elif operation == 4:
            at = IC_HEADER + 2
            adapter = bytes(buffer[at : at + 256]).decode("utf-16-le").split("\0")[0]
            known = self.adapters.get(adapter)
            if known is None:
                status = HV_E_FAIL
            else:
                buffer[at + 257] = known[4]
                position = at + 258
                for text, room in zip(known[:4], (2048, 2048, 1024, 2048), strict=True):
                    encoded = text.encode("utf-16-le")
                    buffer[position : position + len(encoded)] = encoded
                    position += room
        else:
            status = HV_E_FAIL
        struct.pack_into("<I", buffer, 20, status)
        return True

    @staticmethod
    def put(buffer: bytearray, at: int, key: str | None, value: str) -> None:
        """utf8s_to_utf16s into struct hv_kvp_exchg_msg_value."""
        if key is not None:
            encoded = key.encode("utf-16-le") + b"\0\0"
            struct.pack_into("<I", buffer, at + 4, len(encoded))
            buffer[at + 12 : at + 12 + len(encoded)] = encoded
        encoded = value.encode("utf-16-le") + b"\0\0"
        struct.pack_into("<I", buffer, at, 1)
        struct.pack_into("<I", buffer, at + 8, len(encoded))
        buffer[at + 524 : at + 524 + len(encoded)] = encoded
