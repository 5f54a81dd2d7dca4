"""Writes the seed corpus: real messages of every kind, so that the fuzzers start behind the first checks."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit" / "vswitch_wire")]

import test_golden_nic as nic  # noqa: E402
import test_golden_vmbus as golden  # noqa: E402

from vswitch_wire import door, hypercall  # noqa: E402
from vswitch_wire.gpadl import GpaRange, encode_gpadl  # noqa: E402

CORPUS = Path(__file__).parent / "corpus"


def save(target: str, name: str, data: bytes) -> None:
    """One seed file."""
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name.replace(" ", "-").replace(",", "")).write_bytes(data)


def step(kind: int, detail: int, number: int) -> bytes:
    """One step of the ring target."""
    return struct.pack("<BBH", kind, detail, number)


def main() -> None:
    """Writes everything."""
    for name, _, data in golden.GOLDEN:
        save("channel_messages", name, data)
    for count in (1, 27, 80):
        ranges = (GpaRange(count * 4096, 0, tuple(range(count))),)
        parts = [part.pack() for part in encode_gpadl(1, 1, ranges)]
        save("gpadl", f"{count} pages", b"".join(bytes([len(part)]) + part for part in parts))
    first, second = (encode_gpadl(1, n, (GpaRange(40 * 4096, 0, tuple(range(40))),)) for n in (1, 2))
    both = [part.pack() for couple in zip(first, second, strict=True) for part in couple]
    save("gpadl", "interleaved", b"".join(bytes([len(part)]) + part for part in both))
    for number, (message, data, _) in enumerate(nic.NVSP):
        save("nvsp", f"{number} {type(message).__name__}", data)
    for number, (message, data) in enumerate(nic.RNDIS):
        save("rndis", f"{number} {type(message).__name__}", data)
    frame = nic.RNDIS[-1][1]
    save("rndis", "aggregate", frame * 3)
    save("rndis", "header", bytes([len(frame) // 8 + 1]) + frame)
    post = hypercall.PostMessage(1, 1, golden.GOLDEN[15][2]).pack()
    save("door", "posted message", post)
    messages: list[door.DoorMessage] = [
        door.Hello(1, 2, (door.RegionEntry(0, 1 << 20), door.RegionEntry(1 << 32, 1 << 20)), 0),
        door.HelloAck(),
        door.Hypercall(0, hypercall.ControlWord(hypercall.HvCallSignalEvent, fast=True).pack(), 0x2005),
        door.HypercallResult(0x12),
        door.MsrWrite(0, 0x40000082, 0x5001),
        door.MsrRead(0, 0x40000083),
        door.MsrResult(False, 1),
        door.Deliver(0, 2, bytes(256)),
        door.Eom(0, 2),
        door.EventFd(0x2005, True),
        door.Park(),
        door.Configured(0, "ready"),
        door.ExecStarted(0, 7),
        door.ExecExit(0x100, ""),
        door.Kill(3, 15),
        door.DoorError(1, "no"),
    ]
    for message in messages:
        save("door", type(message).__name__, door.pack(message, 9))
    write_read = step(3, 1, 100) + step(4, 0, 0) + step(5, 0, 0) + step(6, 0, 0)
    save("ring", "write and read", write_read * 4)
    save("ring", "wrap", (step(3, 1, 1500) + step(4, 0, 0) + step(5, 0, 0) + step(6, 0, 0)) * 4)
    save("ring", "fill and drain", step(3, 0, 1000) * 5 + step(4, 0, 0) + step(5, 0, 0) * 3 + step(6, 0, 0))
    save("ring", "lies", step(3, 0, 8) + step(4, 0, 0) + step(0, 0, 4096) + step(5, 0, 0))
    header = struct.pack("<HHHHQ", 9, 5, 6, 1, 1) + struct.pack("<IIIIQ", 0, 1, 64, 0, 3) + bytes(16)
    save("ring", "foreign packet", step(2, len(header), 0) + header + step(0, 0, 56) + step(5, 0, 0))


if __name__ == "__main__":
    main()
