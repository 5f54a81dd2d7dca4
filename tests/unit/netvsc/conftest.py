"""A scripted host, and a NIC driven up to the packet filter."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from scripted_host import FakeLink, Host

import vswitch_native
from netvsc.datapath import DataPath, DataPathProtocol
from netvsc.driver import NetVsc

NEEDS_NATIVE = pytest.mark.skipif(not vswitch_native.AVAILABLE, reason=vswitch_native.WHY)


@pytest.fixture
def ring_pages() -> int:
    """Pages of either ring; a test that needs others has a parameter of this name."""
    return 16


@pytest.fixture
def host(ring_pages: int) -> Iterator[Host]:
    host = Host(ring_pages=ring_pages)
    yield host
    host.tear()


@pytest.fixture
def link() -> Iterator[FakeLink]:
    link = FakeLink()
    yield link
    link.close()


class Nic:
    """A driver on the scripted host, with the data path of one engine."""

    def __init__(self, host: Host, link: FakeLink, engine: str) -> None:
        self.carriers: list[bool] = []
        self.faults: list[str] = []
        self.host, self.link = host, link
        self.worker: Any = None
        self.path: DataPathProtocol
        self.driver = NetVsc(
            host,
            host.allocator,
            host.offer,
            self._native if engine == "native" else self._python,
            on_carrier=self.carriers.append,
            on_fault=self.faults.append,
        )

    def _python(self, channel: Any) -> DataPathProtocol:
        path = DataPath(
            self.host.memory,
            channel.ring_pfns,
            channel.downstream_page_offset,
            self.host.signalled,
            cast(Any, self.link),
        )
        channel.on_interrupt = path.on_interrupt
        self.path = path
        return path

    def _native(self, channel: Any) -> DataPathProtocol:
        from netvsc.native import NativeDataPath
        from vswitch_native import memory, netvsc

        self.worker = netvsc.Worker(memory.GuestMemory([self.host.region]), self.host.interrupt_fd, 4096, 2)
        inner = self.worker.open(
            channel.relid,
            channel.ring_pfns,
            channel.downstream_page_offset,
            self.host.signalled,
            self.link.fd,
            False,
        )
        self.path = NativeDataPath(inner)
        return self.path


@pytest.fixture(params=["python", pytest.param("native", marks=NEEDS_NATIVE)])
async def nic(host: Host, link: FakeLink, request: pytest.FixtureRequest) -> AsyncIterator[Nic]:
    nic = Nic(host, link, request.param)
    yield nic
    nic.driver.abandon("the test is over")
    if nic.worker is not None:
        nic.worker.close()
