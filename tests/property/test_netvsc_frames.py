"""The two twins of the guest's frame conversion agree on everything, well-formed or not."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vswitch_native
from netvsc import frames
from vswitch_wire.errors import WireError

pytestmark = pytest.mark.skipif(not vswitch_native.AVAILABLE, reason=vswitch_native.WHY)

ETHERTYPES = st.sampled_from([b"\x08\x00", b"\x86\xdd", b"\x81\x00\x20\x05\x08\x00", b"\x08\x06"])


@st.composite
def ip_frames(draw: st.DrawFn) -> bytes:
    """Ethernet frames that are IP more often than chance would have it."""
    kind = draw(ETHERTYPES)
    body = bytearray(draw(st.binary(min_size=46, max_size=2200)))
    if kind.endswith(b"\x08\x00"):
        body[0] = 0x40 | draw(st.integers(0, 15))
        body[9] = draw(st.sampled_from([6, 17, 1]))
        body[6:8] = draw(st.sampled_from([b"\0\0", b"\x40\0", b"\x20\x01"]))
    elif kind == b"\x86\xdd":
        body[6] = draw(st.sampled_from([6, 17, 58]))
    return bytes(12) + kind + bytes(body)


@st.composite
def interface_reads(draw: st.DrawFn) -> bytes:
    """What a TAP gives: a virtio-net header, mostly sane, and a frame."""
    flags = draw(st.sampled_from([0, 1, 2, 3]))
    gso = draw(st.sampled_from([0, 0, 1, 4, 0x81, 3]))
    start = draw(st.one_of(st.sampled_from([34, 38, 54, 14]), st.integers(0, 0xFFFF)))
    offset = draw(st.one_of(st.sampled_from([6, 16]), st.integers(0, 0xFFFF)))
    header = frames.VNET.pack(flags, gso, 54, draw(st.integers(0, 0xFFFF)), start, offset)
    return header + draw(ip_frames())


def outcome(act: Callable[[], bytes]) -> bytes | None:
    try:
        return act()
    except WireError:
        return None


def interface_write(message: bytes, mtu: int) -> bytes:
    return frames.reassemble([frames.receive(message)], mtu)


@given(interface_reads(), st.booleans())
def test_transmit_twins_agree(data: bytes, checksum: bool) -> None:
    from vswitch_native import netvsc as native

    plain = outcome(lambda: frames.transmit(data, checksum=checksum))
    assert outcome(lambda: native.transmit(data, checksum)) == plain


@given(interface_reads(), st.integers(0, 0x1FF), st.sampled_from([576, 1500]), st.data())
def test_receive_twins_agree_also_on_lies(data: bytes, result: int, mtu: int, more: st.DataObject) -> None:
    from vswitch_native import netvsc as native

    message = outcome(lambda: frames.transmit(data, checksum=True))
    if message is None:
        return
    changed = bytearray(message)
    offset, infos = struct.unpack_from("<I", message, 8)[0], struct.unpack_from("<I", message, 32)[0]
    if infos:  # the last record becomes a receive checksum result
        struct.pack_into("<I", changed, 8 + offset - 12, 0)
        struct.pack_into("<I", changed, 8 + offset - 4, result)
    if more.draw(st.booleans()):
        place = more.draw(st.integers(0, 15)) * 4
        struct.pack_into("<I", changed, place, more.draw(st.integers(0, 0xFFFFFFFF)))
    changed = changed[: more.draw(st.sampled_from([len(changed), len(changed), 50, 20]))]
    plain = outcome(lambda: interface_write(bytes(changed), mtu))
    assert outcome(lambda: native.receive(bytes(changed), mtu)) == plain
