"""What comes from extensions' processes, from files and from command lines is refused by its own error,
never by another.
"""

from __future__ import annotations

import contextlib
import io
import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vswitch.capture.pcapng import PcapngWriter
from vswitch.extension import control
from vswitchctl.capture_file import CaptureFileError, read
from vswitchctl.capture_show import lines
from vswitchctl.packets import PacketTextError, parse_packet

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(
                ["pid", "error", "ready", "stale", "passes", "kind", "class", "layers", "missing", "x"]
            ),
            inner,
            max_size=5,
        ),
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(data=st.one_of(st.binary(max_size=200), JSON.map(lambda value: json.dumps(value).encode())))
def test_a_control_message_is_understood_or_refused(data: bytes) -> None:
    with contextlib.suppress(control.ControlError):
        message = control.decode(data)
        for text in (getattr(message, name, "") for name in ("text", "attribute", "class_name")):
            assert text.isprintable() or not text, "it ends up on terminals"


def test_a_control_message_of_deep_nesting_is_refused() -> None:
    for text in ("[" * 4000, '{"ready":' * 900, "[" * 100_000 + "]" * 100_000):
        with pytest.raises(control.ControlError):
            control.decode(text.encode())


def test_the_text_of_a_control_message_is_cut() -> None:
    message = control.decode(b'{"error":"' + b"x" * 8000 + b'"}')
    assert message == control.Refused("x" * control.MAX_TEXT)


def capture() -> bytes:
    writer = PcapngWriter()
    number, interface = writer.interface("a", "port a")
    packet = writer.packet(
        number, 10**18, bytes(60), 60, flags=5, packet_id=1, queue=0, verdict=8, comment="x"
    )
    return (
        writer.section()
        + interface
        + packet
        + writer.statistics(number, 0, 1, received=1, lost=0, delivered=1)
    )


CAPTURE = capture()


@settings(max_examples=400, deadline=None)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(CAPTURE) - 1), st.integers(0, 255)), min_size=1, max_size=6
    ),
    cut=st.one_of(st.none(), st.integers(0, len(CAPTURE))),
)
def test_a_damaged_capture_is_read_as_far_as_it_goes_or_refused(
    changes: list[tuple[int, int]], cut: int | None
) -> None:
    data = bytearray(CAPTURE)
    for offset, value in changes:
        data[offset] = value
    with contextlib.suppress(CaptureFileError):
        for line in lines(read(io.BytesIO(bytes(data[:cut])))):
            assert "\n" not in line
    with contextlib.suppress(CaptureFileError):
        list(read(io.BytesIO(struct.pack("<I", 0xA1B2C3D4) + bytes(data[4:cut]))))


@settings(max_examples=200, deadline=None)
@given(
    text=st.one_of(st.text(max_size=60), st.from_regex(r"(Ether|IP|TCP|Raw)\([a-z]*=?.{0,8}\)(/.{0,12})?"))
)
def test_a_packet_description_is_a_frame_or_refused(text: str) -> None:
    with contextlib.suppress(PacketTextError):
        assert 14 <= len(parse_packet(text)) <= 65535
