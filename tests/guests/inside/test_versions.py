"""VMBus at every protocol version that the kernel can be held to."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.guests.inside.kernel_log import unexpected
from tests.guests.inside.test_netvsc import works
from tests.guests.inside.world import BOX, VM1, Machine, Pinging, World, has_address

if TYPE_CHECKING:
    from tests.guests.stock_guest import StockGuest

# Linux 6.1 and 6.12 know these (drivers/hv/connection.c, vmbus_versions).
NEWEST = (5, 3)
VERSIONS = [(5, 2), (5, 1), (5, 0), (4, 1), (4, 0), (3, 0), (2, 4)]
HELD = Machine("held", 1, "10.9.0.4", "00:15:5d:09:00:04")


@pytest.mark.parametrize(("major", "minor"), VERSIONS)
def test_the_driver_works_at_each_protocol_version(
    world: World, vm2: StockGuest, major: int, minor: int
) -> None:
    """A guest of its own for each. hv_vmbus cannot be unloaded where timers interrupt directly: its
    vmbus_exit stops the timers of every processor and leaves none, on Hyper-V as well.
    """
    world.create(HELD, f"hv_vmbus.max_version={major << 16 | minor:#x}", memory_mib=160)
    try:
        with Pinging(vm2, [BOX.address], interval=0.1):
            guest = world.boot(HELD)
            guest.wait_ready(150)
            said = guest.sh("dmesg")
            found = re.search(r"Vmbus version:(\d+)\.(\d+)", said)
            assert found, said
            assert (int(found[1]), int(found[2])) == (major, minor)
            has_address(guest)
            works(guest)
            works(guest, VM1.address)
            log = guest.sh("dmesg -r")
            world.keep(f"dmesg-vmbus-{major}.{minor}.txt", log)
            assert unexpected(log) == []
    finally:
        world.remove(HELD)


def test_the_newest_version_is_agreed_by_default(world: World, vm1: StockGuest) -> None:
    found = re.search(r"Vmbus version:(\d+)\.(\d+)", vm1.sh("dmesg"))
    assert found
    assert (int(found[1]), int(found[2])) == NEWEST
    world.keep("vmbus-version.txt", found[0])
