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


def vmm_seeds() -> None:
    """Programs of the VMM's target: a message's life, ports, and heads of images."""

    def act(kind: int, choice: int = 0, port: int = 0, value: int = 0) -> bytes:
        return struct.pack("<BBHQ", kind, choice, port, value)

    enabled = act(3, 1, 0, 0x3001) + act(3, 0, 0, 1)
    life = enabled + act(4, 2) + act(5) + act(6) + act(7, 0, 0x320, 0) + act(6)
    save("vmm", "message", b"\1" + life)
    save(
        "vmm",
        "slot in use",
        b"\1" + enabled + act(7, 0, 0x320, 1) + act(4, 2) + act(5) + act(7, 0, 0x320) + act(5),
    )
    save("vmm", "switched off", b"\1" + enabled + act(4, 2) + act(5) + act(4, 3) + act(3, 0) + act(5))
    save("vmm", "pages outside", b"\1" + act(3, 1, 0, (1 << 64) - 1) + act(3, 0, 0, 1) + act(4, 15) + act(5))
    save(
        "vmm",
        "serial",
        b"\1" + act(0, 1, 0x3F8, 0x41) + act(0, 1, 0x3FC, 0x10) + act(2, 65, 99) + act(1, 1, 0x3F8),
    )
    save(
        "vmm",
        "power",
        b"\1" + act(0, 1, 0x600, 0x34) + act(0, 1, 0xCF9, 6) + act(0, 1, 0x64, 0xFE) + act(1, 1, 0x71),
    )
    head = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, 0x200000, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 120, 0x200000, 0x200000, 8, 4096, 4096)
    save("vmm", "elf", b"\0" + head + segment + b"\xf4" * 8)
    setup = bytearray(1024 + 512)
    setup[0x1F1] = 1
    struct.pack_into("<H4sH", setup, 0x1FE, 0xAA55, b"\xeb\x66Hd", 0x5372)
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, 0x20F)
    setup[0x211] = 1
    struct.pack_into("<HH", setup, 0x234, 1, 1)
    struct.pack_into("<IIQI", setup, 0x238, 2047, 0, 0x100000, 4096)
    save("vmm", "bzimage", b"\0" + bytes(setup))


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
    vmm_seeds()
    header = struct.pack("<HHHHQ", 9, 5, 6, 1, 1) + struct.pack("<IIIIQ", 0, 1, 64, 0, 3) + bytes(16)
    save("ring", "foreign packet", step(2, len(header), 0) + header + step(0, 0, 56) + step(5, 0, 0))


if __name__ == "__main__":
    main()
