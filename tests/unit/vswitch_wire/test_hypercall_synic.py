"""The hypercall ABI and SynIC layouts, bit for bit as the TLFS gives them."""

from __future__ import annotations

import pytest

import vswitch_native
from vswitch_wire import hypercall, synic
from vswitch_wire.errors import WireError
from vswitch_wire.hypercall import ControlWord, HvStatus


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (0x0000_0000_0000_005C, ControlWord(hypercall.HvCallPostMessage)),
        (0x0000_0000_0001_005D, ControlWord(hypercall.HvCallSignalEvent, fast=True)),
        (
            0x0002_0003_8000_0048,
            ControlWord(hypercall.HvCallDepositMemory, nested=True, rep_count=3, rep_start=2),
        ),
        (0x0000_0000_0004_007E, ControlWord(hypercall.HvCallRetargetDeviceInterrupt, variable_header=2)),
    ],
)
def test_control_words_have_the_bits_of_the_tlfs(value: int, word: ControlWord) -> None:
    assert word.pack() == value
    assert ControlWord.unpack(value) == word
    if vswitch_native.AVAILABLE:
        from vswitch_native import wire as native

        assert native.decode_control_word(value) == tuple(word)


@pytest.mark.parametrize("bit", [27, 30, 44, 47, 60, 63])
def test_reserved_bits_of_a_control_word_are_refused(bit: int) -> None:
    with pytest.raises(WireError, match="reserved bits"):
        ControlWord.unpack(0x5C | 1 << bit)


def test_a_result_is_sixteen_bits_of_status_and_the_absolute_rep_index() -> None:
    assert hypercall.result_word(HvStatus.INSUFFICIENT_MEMORY, 5) == 0x0000_0005_0000_000B
    assert hypercall.split_result(0xFFFF_F005_FFFF_000B) == (HvStatus.INSUFFICIENT_MEMORY, 5)


def test_post_message_is_a_256_byte_block() -> None:
    post = hypercall.PostMessage(4, 1, b"hello")
    data = post.pack()
    assert data == bytes.fromhex("04000000 00000000 01000000 05000000") + b"hello" + bytes(235)
    assert hypercall.PostMessage.unpack(data) == post


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [(8, 0, "message type 0x0"), (8, 0x80000001, "message type"), (12, 241, "241 bytes, at most 240")],
)
def test_a_post_that_breaks_the_rules_is_refused(at: int, value: int, words: str) -> None:
    data = bytearray(hypercall.PostMessage(4, 1, b"hello").pack())
    data[at : at + 4] = value.to_bytes(4, "little")
    with pytest.raises(WireError, match=words):
        hypercall.PostMessage.unpack(bytes(data))


def test_inputs_have_the_sizes_of_the_tlfs() -> None:
    assert hypercall.SignalEvent(0x2005, 1).pack() == bytes.fromhex("05200000 0100 0000")
    assert len(hypercall.CreatePartition().pack()) == 56
    assert hypercall.CreatePartition(compatibility_version=0x0609).pack()[16:20] == bytes.fromhex("09060000")
    assert hypercall.SetPartitionProperty(1, 0x10000, 2).pack() == bytes.fromhex(
        "0100000000000000 00000100 00000000 0200000000000000"
    )


def test_a_message_slot_is_256_bytes() -> None:
    message = synic.Message(synic.HVMSG_VMBUS, b"abc", sender=0x1234, flags=synic.HV_MESSAGE_FLAG_PENDING)
    data = message.pack()
    assert data == bytes.fromhex("01000000 03 01 0000 3412000000000000") + b"abc" + bytes(237)
    assert synic.Message.unpack(data) == message
    lying = data[:4] + b"\xf1" + data[5:]
    with pytest.raises(WireError, match="241 bytes"):
        synic.Message.unpack(lying)


def test_sint_registers_have_the_bits_of_the_tlfs() -> None:
    assert synic.Sint(0x30, masked=True, auto_eoi=True).pack() == 0x30030
    assert synic.Sint.unpack(synic.HV_SINT_RESET_VALUE) == synic.Sint(0, masked=True)
    with pytest.raises(WireError, match="vector 15"):
        synic.Sint.unpack(15)


def test_page_registers_hold_a_page_and_an_enable_bit() -> None:
    assert synic.PageRegister(True, 0x5000).pack() == 0x5001
    assert synic.PageRegister.unpack(0x5001) == synic.PageRegister(True, 0x5000)
