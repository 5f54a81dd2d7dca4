"""A watcher sees the snapshot, the mark, then every change once and in order; a sleeper is cut off."""

from __future__ import annotations

import asyncio

import pytest

from vswitch_api.v1 import port_pb2, switch_pb2, watch_pb2
from vswitchd import watching
from vswitchd.errors import ApiError
from vswitchd.watching import WatchHub


async def test_snapshot_mark_and_changes_come_in_order() -> None:
    hub = WatchHub(lambda: [switch_pb2.Switch(name="switches/s0")])
    stream = hub.watch(watch_pb2.WatchRequest())
    first, mark = await anext(stream), await anext(stream)
    assert (first.change.type, first.change.switch.name) == (watch_pb2.CHANGE_TYPE_ADDED, "switches/s0")
    assert mark.HasField("synced")
    hub.added(port_pb2.Port(name="switches/s0/ports/p0"))
    hub.event("guest_lost", "partitions/a", "it ended")
    hub.removed(port_pb2.Port(name="switches/s0/ports/p0"))
    seen = [await anext(stream) for _ in range(3)]
    assert [response.WhichOneof("message") for response in seen] == ["change", "event", "change"]
    assert seen[2].change.type == watch_pb2.CHANGE_TYPE_REMOVED
    assert [response.revision for response in seen] == [1, 2, 3]
    await stream.aclose()  # type: ignore[attr-defined]


async def test_a_change_during_the_snapshot_is_not_missed() -> None:
    hub = WatchHub(lambda: [switch_pb2.Switch(name=f"switches/s{number}") for number in range(3)])
    stream = hub.watch(watch_pb2.WatchRequest())
    await anext(stream)
    hub.added(switch_pb2.Switch(name="switches/late"))
    names = [(await anext(stream)).change.name for _ in range(4)]
    assert names == ["switches/s1", "switches/s2", "", "switches/late"]
    await stream.aclose()  # type: ignore[attr-defined]


async def test_prefixes_choose() -> None:
    hub = WatchHub(list)
    stream = hub.watch(watch_pb2.WatchRequest(prefixes=["partitions/"], exclude_snapshot=True))
    await anext(stream)
    hub.added(switch_pb2.Switch(name="switches/s0"))
    hub.event("guest_lost", "partitions/a", "it ended")
    assert (await anext(stream)).event.resource == "partitions/a"
    await stream.aclose()  # type: ignore[attr-defined]


async def test_a_watcher_that_does_not_read_is_ended_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "QUEUE_LIMIT", 3)
    hub = WatchHub(list)
    stream = hub.watch(watch_pb2.WatchRequest())
    await anext(stream)
    for number in range(10):
        hub.added(switch_pb2.Switch(name=f"switches/s{number}"))
    for number in range(3):
        assert (await asyncio.wait_for(anext(stream), 1)).change.name == f"switches/s{number}"
    with pytest.raises(ApiError, match="fell more than 3 changes behind"):
        await anext(stream)
