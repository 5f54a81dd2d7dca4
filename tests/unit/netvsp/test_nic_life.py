"""What a closed NIC leaves behind: nothing, whatever its port did."""

from __future__ import annotations

import asyncio
import gc
import os
import weakref
from collections.abc import Iterator

import pytest
from scripted_guest import ScriptedGuest


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def open_fds() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@pytest.mark.usefixtures("no_collector")
async def test_a_closed_nic_waits_for_no_garbage_collector(guest: ScriptedGuest) -> None:
    await asyncio.sleep(0)
    before = open_fds()
    await guest.up()
    guest.nic.tap(True)
    session = guest.nic._session
    assert session is not None
    left, control = weakref.ref(session), weakref.ref(session.control)
    del session
    await guest.nic.close(guest.opened)
    assert (left(), control()) == (None, None)
    assert open_fds() == before


async def test_a_port_that_fails_to_let_go_does_not_keep_the_nic_closed(
    guest: ScriptedGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    await guest.up()
    let_go = guest.port.detach

    async def fails() -> None:
        await let_go()
        raise OSError("the port is broken")

    with monkeypatch.context() as patch:
        patch.setattr(guest.port, "detach", fails)
        with pytest.raises(OSError, match="broken"):
            await guest.nic.close(guest.opened)
    assert not guest.nic.state.open
    await guest.nic.open(guest.opened)
    assert guest.nic.state.open


async def test_a_port_that_refuses_leaves_the_nic_closed(
    guest: ScriptedGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuses(endpoint: object) -> None:
        raise ValueError("the port has an endpoint already")

    with monkeypatch.context() as patch:
        patch.setattr(guest.port, "attach", refuses)
        with pytest.raises(ValueError, match="already"):
            await guest.open()
    assert not guest.nic.state.open
    await guest.open()
