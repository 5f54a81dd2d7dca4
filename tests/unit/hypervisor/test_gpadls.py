"""GPADLs: what is refused, what is counted, how bodies interleave, when memory comes back."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from hypervisor_world import PAGE, EchoDevice, RawGuest, World

from hypervisor import Quotas
from vswitch_wire import vmbus
from vswitch_wire.gpadl import GpaRange, encode_gpadl

MEMORY = 1 << 20
QUOTAS = Quotas(gpadls=4, gpadl_pages=200, gpadls_in_progress=2)


@pytest_asyncio.fixture
async def guest(world: World) -> AsyncIterator[RawGuest]:
    partition = await world.host.create_partition("a", memory_bytes=MEMORY, quotas=QUOTAS)
    guest = await (await RawGuest(partition).attach()).start_synic()
    await partition.vmbus.offer(EchoDevice())
    await guest.contact()
    await guest.post(vmbus.RequestOffers())
    await guest.message()
    await guest.message()
    yield guest
    guest.close()


def header(data: bytes, *, size: int | None = None, count: int = 1, relid: int = 1, gpadl: int = 7) -> bytes:
    return vmbus.GpadlHeader(relid, gpadl, len(data) if size is None else size, count, data).pack()


def one_range(pfns: list[int], *, count: int | None = None, offset: int = 0) -> bytes:
    length = len(pfns) * PAGE if count is None else count
    return struct.pack(f"<II{len(pfns)}Q", length, offset, *pfns)


REFUSED = {
    "unknown relid": header(one_range([16]), relid=2),
    "relid 0": header(one_range([16]), relid=0),
    "id 0": header(one_range([16]), gpadl=0),
    "no range": header(one_range([16]), count=0),
    "page outside memory": header(one_range([MEMORY // PAGE])),
    "page beyond 52 bits": header(one_range([1 << 63])),
    "offset of a page": header(one_range([16], count=8, offset=PAGE)),
    "no bytes": header(one_range([16], count=0)),
    "fewer pages than bytes": header(one_range([16], count=2 * PAGE)),
    "more pages than bytes": header(one_range([16, 17], count=PAGE)),
    "two ranges announced": header(one_range([16, 17]), count=2),
    "65535 ranges": header(one_range([16]), count=0xFFFF),
    "length not in eights": header(one_range([16]), size=15),
    "over the page quota": header(one_range([16] * 20), size=8 + 8 * 300),
}


@pytest.mark.parametrize("payload", REFUSED.values(), ids=REFUSED.keys())
async def test_an_invalid_gpadl_is_answered_by_a_failure(guest: RawGuest, payload: bytes) -> None:
    await guest.post(payload)
    answer = await guest.message()
    assert isinstance(answer, vmbus.GpadlCreated)
    assert answer.status != 0
    assert (answer.relid, answer.gpadl_id) == struct.unpack_from("<II", payload, 8)
    assert len(guest.partition.vmbus.gpadls) == 0
    assert guest.partition.vmbus.gpadls.pages == 0


async def create(guest: RawGuest, gpadl: int, pages: int) -> int:
    for message in encode_gpadl(1, gpadl, (GpaRange(pages * PAGE, 0, tuple(range(16, 16 + pages))),)):
        await guest.post(message)
    answer = await guest.message()
    assert isinstance(answer, vmbus.GpadlCreated)
    return answer.status


async def test_bodies_of_two_gpadls_may_interleave_and_surplus_bytes_are_ignored(guest: RawGuest) -> None:
    first = encode_gpadl(1, 11, (GpaRange(60 * PAGE, 0, tuple(range(16, 76))),))
    second = encode_gpadl(1, 12, (GpaRange(60 * PAGE, 0, tuple(range(80, 140))),))
    for one, other in zip(first, second, strict=True):
        await guest.post(one.pack().ljust(240, b"\xee") if one is first[-1] else one)
        await guest.post(other)
    assert await guest.message() == vmbus.GpadlCreated(1, 11, 0)
    assert await guest.message() == vmbus.GpadlCreated(1, 12, 0)
    assert guest.partition.vmbus.gpadls.pages == 120


async def test_an_id_in_use_is_refused_and_the_first_one_lives(guest: RawGuest) -> None:
    assert await create(guest, 7, 4) == 0
    assert await create(guest, 7, 2) != 0
    assert guest.partition.vmbus.gpadls.pages == 4


async def test_number_and_pages_are_bounded_and_come_back_with_teardown(guest: RawGuest) -> None:
    assert await create(guest, 1, 150) == 0
    assert await create(guest, 2, 60) != 0
    for gpadl in (3, 4, 5):
        assert await create(guest, gpadl, 1) == 0
    assert await create(guest, 6, 1) != 0
    await guest.post(vmbus.GpadlTeardown(1, 1))
    assert await guest.message() == vmbus.GpadlTorndown(1)
    assert await create(guest, 6, 100) == 0
    assert guest.partition.vmbus.gpadls.pages == 103


async def test_unfinished_gpadls_are_bounded(guest: RawGuest) -> None:
    for gpadl in (1, 2, 3):
        await guest.post(header(one_range([16] * 20)[:168], size=8 + 8 * 40, gpadl=gpadl))
    assert await guest.message() == vmbus.GpadlCreated(1, 3, vmbus.STATUS_UNSUCCESSFUL)
    assert await guest.silent()


async def test_a_gpadl_in_two_uses_is_held_until_both_have_ended(guest: RawGuest) -> None:
    table = guest.partition.vmbus.gpadls
    assert await create(guest, 7, 4) == 0
    table.ring(1, 7, 2)
    table.use(1, 7)
    assert table.teardown(vmbus.GpadlTeardown(1, 7)) is None
    assert table.release(1, 7) is None
    assert table.pages == 4
    assert table.release(1, 7) == vmbus.GpadlTorndown(7)
    assert table.pages == 0


async def test_a_closed_channel_ends_every_use_of_its_gpadls(guest: RawGuest) -> None:
    table = guest.partition.vmbus.gpadls
    assert await create(guest, 7, 4) == 0
    table.use(1, 7)
    table.use(1, 7)
    assert table.teardown(vmbus.GpadlTeardown(1, 7)) is None
    assert table.release_channel(1) == [vmbus.GpadlTorndown(7)]


async def test_a_teardown_of_an_unknown_gpadl_is_an_error_without_an_answer(guest: RawGuest) -> None:
    await guest.post(vmbus.GpadlTeardown(1, 99))
    assert await guest.silent()
    assert guest.partition.vmbus.protocol_errors == 1
