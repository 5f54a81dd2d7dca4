"""Whose parsers read what a guest posts: the engine's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypervisor_world import EchoDevice, RawGuest, World

import vswitch_native
from vswitch_wire import gpadl, guest_codecs, vmbus
from vswitch_wire.engine import ENGINES, Engine

if vswitch_native.AVAILABLE:
    from vswitch_wire import native_codecs


class Counted:
    """A module or class whose attributes count their calls by name."""

    def __init__(self, inner: Any, calls: dict[str, int]) -> None:
        self._inner, self._calls = inner, calls

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._calls[name] = self._calls.get(name, 0) + 1
            result = value(*args, **kwargs)
            return Counted(result, self._calls) if name == "GpadlAssembler" else result

        return counted


@pytest.mark.parametrize("engine", ENGINES)
async def test_posted_messages_and_gpadls_are_read_by_the_engines_own_parsers(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "native" and not vswitch_native.AVAILABLE:
        pytest.skip(vswitch_native.WHY)
    native: dict[str, int] = {}
    python: dict[str, int] = {}
    if vswitch_native.AVAILABLE:
        monkeypatch.setattr(native_codecs, "native", Counted(native_codecs.native, native))
    twins = Counted(guest_codecs.PYTHON, python)
    assembler = Counted(gpadl, python).GpadlAssembler
    monkeypatch.setattr(
        guest_codecs,
        "PYTHON",
        guest_codecs.GuestCodecs(
            twins.post_message, twins.channel_message, lambda most: assembler(max_in_progress=most)
        ),
    )
    world = World(tmp_path, engine=engine)
    partition = await world.host.create_partition("a", memory_bytes=1 << 20)
    guest = await RawGuest(partition).attach()
    try:
        await (await guest.start_synic()).contact()
        await partition.vmbus.offer(EchoDevice())
        assert await guest.post(vmbus.RequestOffers()) == 0
        offer = await guest.message()
        assert isinstance(offer, vmbus.OfferChannel)
        await guest.message()
        parts = gpadl.encode_gpadl(offer.relid, 7, (gpadl.GpaRange(40 * 4096, 0, tuple(range(40))),))
        for part in parts:
            assert await guest.post(part) == 0
        assert await guest.message() == vmbus.GpadlCreated(offer.relid, 7, 0)
    finally:
        guest.close()
        await world.close()
    posts = 2 + len(parts)
    if engine == "native":
        assert native == {
            "GpadlAssembler": 1,
            "decode_post_message": posts,
            "decode_channel_message": posts,
            "header": 1,
            "body": len(parts) - 1,
            "clear": native["clear"],
        }
        assert python == {}
    else:
        assert native == {}
        assert python["post_message"] == python["channel_message"] == posts
        assert (python["header"], python["body"]) == (1, len(parts) - 1)
