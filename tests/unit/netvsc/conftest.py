"""A scripted host, and a NIC driven up to the packet filter."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from scripted_host import FakeLink, Host

from netvsc.datapath import DataPath
from netvsc.driver import NetVsc


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.tear()


@pytest.fixture
def link() -> Iterator[FakeLink]:
    link = FakeLink()
    yield link
    link.close()


class Nic:
    """A driver on the scripted host with the plain Python data path."""

    def __init__(self, host: Host, link: FakeLink) -> None:
        self.carriers: list[bool] = []
        self.faults: list[str] = []
        self.host, self.link = host, link

        def open_datapath(channel: object) -> DataPath:
            assert host.channel is channel
            assert host.channel is not None
            path = DataPath(host.memory, host.channel.ring_pfns, 16, host.signalled, link)  # type: ignore[arg-type]
            host.channel.on_interrupt = path.on_interrupt
            self.path = path
            return path

        self.driver = NetVsc(
            host,
            host.allocator,
            host.offer,
            open_datapath,
            on_carrier=self.carriers.append,
            on_fault=self.faults.append,
        )


@pytest.fixture
async def nic(host: Host, link: FakeLink) -> AsyncIterator[Nic]:
    nic = Nic(host, link)
    yield nic
    nic.driver.abandon("the test is over")
