"""Writes the corpus of the stateful target, programs of `vmbus_server.py` that reach each of its corners, and
that of the integration services.

PYTHONPATH=. python tests/fuzz/seeds.py
"""

from __future__ import annotations

from pathlib import Path

from hypervisor.integration import icmsg, kvp_messages
from vswitch_wire import packet

CORPUS = Path(__file__).resolve().parent / "corpus" / "vmbus_server"

COPPER, WIN10 = 10, 5
"""Indices of `VmbusVersion`."""


def contact(version: int = COPPER, more: int = 0) -> bytes:
    """INITIATE_CONTACT, and the guest reads the answer."""
    return bytes([1, version | (0x80 if version >= 6 else 0), more]) + eom()


def eom(count: int = 8) -> bytes:
    """The guest empties its slots."""
    return bytes([13, 0, count - 1])


def turns(count: int = 7) -> bytes:
    """The loop turns."""
    return bytes([14, count, 0])


def offers() -> bytes:
    """REQUESTOFFERS."""
    return bytes([2, 0, 0]) + eom()


def both(channel: int, gpadl_id: int, of: int) -> int:
    """The byte that names a channel, one `of` so many, and a GPADL's id."""
    return next(n for n in range(240) if n % of == channel and 1 + n % 5 == gpadl_id)


def gpadl(channel: int, pages: int, gpadl_id: int = 1, of: int = 2) -> bytes:
    """A GPADL of one `of` the channels, in as many messages as it needs. Odd `pages` make whole pages."""
    choice = both(channel, gpadl_id, of)
    bodies = 0 if pages <= 26 else 1
    return bytes([3, choice, pages - 1]) + bytes([5, 0, 0]) * bodies + eom()


def opened(channel: int, gpadl_id: int = 1, split: int = 0, of: int = 2) -> bytes:
    """OPENCHANNEL, and the device opens."""
    choice = both(channel, gpadl_id, of)
    return bytes([6, choice, split]) + turns() + eom()


UP = contact() + offers()
OPEN = UP + gpadl(0, 5) + opened(0)
SPENT = turns() + eom()
SUB = OPEN + bytes([16, 0, 0xC0]) + SPENT + gpadl(2, 7, 2, of=4) + opened(2, 2, of=4)

PROGRAMS: dict[str, bytes] = {
    "negotiate": UP,
    "versions": b"".join(contact(version) for version in range(11)),
    "open and close": OPEN + bytes([8, 0, 0]) + SPENT,
    "two channels": UP + gpadl(0, 5) + gpadl(1, 7, 2) + opened(0) + opened(1, 2) + SPENT,
    "gpadl in parts": contact(WIN10) + offers() + gpadl(0, 39) + bytes([9, 0, 0]) + eom(),
    "teardown while open": OPEN + bytes([9, 0, 0, 8, 0, 0]) + SPENT,
    "refused": UP + gpadl(0, 5) + bytes([16, 0, 0x12]) + opened(0) + opened(0) + SPENT,
    "reopen while closing": OPEN
    + bytes([16, 0, 1, 8, 0, 0])
    + opened(0)
    + bytes([16, 0, 2])
    + SPENT
    + turns(),
    "rescind and offer": UP + bytes([17, 0, 0]) + SPENT + bytes([10, 0, 0, 17, 0, 0]) + SPENT,
    "fault": OPEN + bytes([16, 0, 5]) + SPENT,
    "sub-channels": OPEN + bytes([16, 0, 0xC0]) + SPENT,
    "sub-channel open": SUB,
    "sub-channel's primary closes": SUB + bytes([8, 0, 0]) + SPENT,
    "sub-channel's primary goes": SUB + bytes([17, 0, 0]) + SPENT,
    "door lost": OPEN + bytes([18, 1, 0]) + eom() + bytes([10, 0, 0]),
    "unload": OPEN + bytes([12, 1, 0]) + SPENT + contact(),
    "buffers": OPEN + bytes([16, 0, 3, 0, 16, 0, 4, 0]) + SPENT,
    "registers": bytes([15, 0, 1, 15, 1, 2, 15, 2, 3, 15, 3, 4, 15, 7, 0, 15, 4, 5, 15, 0, 0]) + contact(),
    "hypercalls": bytes([18, 0, 0])
    + bytes(24)
    + bytes([18, 0, 0, 0x5D, 0, 1, *bytes(5), 1, 0, 1])
    + bytes(14),
    "no end of message": contact() + bytes([2, 0, 0]) + bytes([12, 0, 0]) * 30 + bytes([13, 0, 7]) * 3,
    "raw": contact() + bytes([0, 8, 4, 3, *bytes(8), 12, 4, 7, *bytes(7), 1, 0, 0, 0]),
}


def answer(body: bytes, kind: int = icmsg.ICMSGTYPE_KVPEXCHANGE, status: int = 0) -> bytes:
    """A packet with a guest's answer."""
    version = icmsg.Version(3, 0)
    message = icmsg.IcMessage(kind, version, version, body, status, 1, 5)
    return packet.encode_inband(message.pack(), 1, False)


def entry(key: str, value: str) -> bytes:
    """An answered enumeration."""
    body = bytearray(kvp_messages.pack_enumerate(kvp_messages.KvpPool.AUTO, 0))
    for size_at, at, text in ((12, 20, key), (16, 532, value)):
        encoded = text.encode("utf-16-le") + b"\0\0"
        body[size_at : size_at + 4] = len(encoded).to_bytes(4, "little")
        body[at : at + len(encoded)] = encoded
    body[8] = kvp_messages.REG_SZ
    return bytes(body)


ANSWERS: dict[str, bytes] = {
    "chosen": answer(bytes.fromhex("0100010000000000 0300000003000000".replace(" ", "")), 0),
    "nothing chosen": answer(bytes(16), 0),
    "heartbeat": answer((1).to_bytes(40, "little"), icmsg.ICMSGTYPE_HEARTBEAT),
    "refused": answer(b"", icmsg.ICMSGTYPE_SHUTDOWN, icmsg.HV_E_FAIL),
    "key and value": answer(entry("OSName", "Debian")),
    "addresses": answer(entry("NetworkAddressIPv4", "10.0.0.2;10.0.0.3")),
    "adapter": kvp_messages.pack_get_ip_info("00:15:5d:00:00:01")[:600],
}


def main() -> None:
    """Writes everything."""
    integration = CORPUS.parent / "integration"
    integration.mkdir(parents=True, exist_ok=True)
    for name, data in ANSWERS.items():
        (integration / name.replace(" ", "-")).write_bytes(data)
    CORPUS.mkdir(parents=True, exist_ok=True)
    for name, program in PROGRAMS.items():
        (CORPUS / name.replace(" ", "-").replace("'s", "")).write_bytes(program)


if __name__ == "__main__":
    main()
