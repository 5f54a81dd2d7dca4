"""Numbers and names that both engines, extension processes and Windows tools share."""

from __future__ import annotations

import pytest

import vswitch_native
from vswitch import fields
from vswitch.drops import DropReason
from vswitch.fields import Field
from vswitch.upcall import MAX_REASON, UpcallError, UpcallReply, UpcallRequest


@pytest.mark.skipif(not vswitch_native.AVAILABLE, reason="the native module is not built")
def test_both_engines_have_the_same_drop_reasons() -> None:
    from vswitch_native import switch as native

    ours = {reason.name.replace("_", "").lower(): reason.value for reason in DropReason}
    assert {name.lower(): code for name, code in native.drop_reasons()} == ours


def test_drop_reasons_have_their_windows_names() -> None:
    names = {reason.value: reason.label for reason in DropReason}
    assert (names[8], names[11], names[16], names[23]) == (
        "Filtered",
        "UnauthorizedMAC",
        "MacSpoofing",
        "MTUMismatch",
    )
    assert (names[9], names[25], names[27], names[404]) == (
        "FilteredVLAN",
        "InvalidVlanFormat",
        "InvalidSourceMac",
        "VMBusError",
    )
    assert all(reason.meaning for reason in DropReason)


def test_a_field_brings_along_what_gives_it_meaning() -> None:
    closed = fields.close(Field.L4_DST.bit)
    assert fields.names(closed) == ("eth_type", "ip_proto", "ip_frag", "l4_dst")
    assert fields.close(Field.ETH_DST.bit) == Field.ETH_DST.bit
    assert fields.mask_of([Field.ETH_DST, Field.RAW]) == Field.ETH_DST.bit | fields.RAW_BIT


def test_upcall_messages_read_back_what_was_written() -> None:
    request = UpcallRequest(True, 3, 7, 0x2005, 9000, "büro", bytes(range(100)), trace=True)
    large = UpcallRequest(False, 3, None, None, 60000, "p1", bytes(54), large_send=True)
    assert UpcallRequest.decode(large.pack()) == large
    assert UpcallRequest.decode(request.pack() + bytes(7)) == request
    reply = UpcallReply(1, Field.L4_DST.bit, True, 1500, "no telnet here")
    assert UpcallReply.decode(reply.pack() + bytes(6)) == reply
    loud = UpcallReply.decode(UpcallReply(1, reason="a\n\x1b[2J\x9bb\xe9").pack())
    assert loud.reason == "a  [2J b\xe9"
    long = UpcallReply.decode(UpcallReply(1, reason="é" * 400).pack())
    assert len(long.reason.encode()) <= MAX_REASON


@pytest.mark.parametrize("size", range(24))
def test_a_request_cut_short_is_refused(size: int) -> None:
    whole = UpcallRequest(False, 1, None, None, 60, "p1", bytes(60)).pack()
    with pytest.raises(UpcallError):
        UpcallRequest.decode(whole[:size])
    with pytest.raises(UpcallError, match="says that it has"):
        UpcallRequest.decode(whole[:-1])
