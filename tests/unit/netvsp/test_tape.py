"""What a capture keeps of a guest's ring packets is bounded."""

from __future__ import annotations

from netvsp import limits
from netvsp.tape import Tape


def test_a_tap_that_nobody_reads_keeps_a_bounded_number_of_bytes() -> None:
    tape = Tape()
    for number in range(200):
        tape.push(number, "in", bytes(512 << 10))
    kept = tape.take()
    assert [entry[0] for entry in kept] == list(range(168, 200))
    assert sum(len(entry[2]) for entry in kept) == limits.TAP_BYTES
    assert tape.take() == []


def test_a_tap_that_nobody_reads_keeps_a_bounded_number_of_packets() -> None:
    tape = Tape()
    for number in range(limits.TAP_PACKETS + 5):
        tape.push(number, "out", b"packet")
    assert [entry[0] for entry in tape.take()][:2] == [5, 6]
