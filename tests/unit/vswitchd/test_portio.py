"""Frames of a port's stream, in messages that any client takes."""

from __future__ import annotations

from vswitchd import portio


def test_answers_are_bounded_in_frames_and_in_bytes_and_keep_their_order() -> None:
    frames = [number.to_bytes(2, "big") * (30 if number < 600 else 32_000) for number in range(700)]
    messages = list(portio.answers(frames))
    assert [frame.data for message in messages for frame in message.frames.frames] == frames
    assert max(len(message.frames.frames) for message in messages) == portio.MAX_FRAMES
    assert max(message.ByteSize() for message in messages) < 2 << 20
    assert list(portio.answers([])) == []
