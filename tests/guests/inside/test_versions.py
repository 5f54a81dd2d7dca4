"""VMBus at every protocol version that the kernel can be held to."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.guests.inside.test_netvsc import works
from tests.guests.inside.world import BOX, Pinging, World, has_address

if TYPE_CHECKING:
    from tests.guests.stock_guest import StockGuest

# Linux 6.1 and 6.12 know these (drivers/hv/connection.c, vmbus_versions).
VERSIONS = [(5, 3), (5, 2), (5, 1), (5, 0), (4, 1), (4, 0), (3, 0), (2, 4)]


def _reload(guest: StockGuest, *parameters: str) -> None:
    """The VMBus driver anew, with those that use it."""
    guest.sh("utils stop && rmmod hv_netvsc && rmmod hv_vmbus", 90)
    # What was said until now is kept for the last test; what follows is of this load alone.
    guest.sh("dmesg -r -c >>/run/dmesg.kept")
    guest.sh(f"load hv_vmbus {' '.join(parameters)} && load hv_netvsc && utils start", 90)


@pytest.mark.parametrize(("major", "minor"), VERSIONS)
def test_the_driver_works_at_each_protocol_version(
    vm1: StockGuest, vm2: StockGuest, major: int, minor: int
) -> None:
    with Pinging(vm2, [BOX.address]):
        _reload(vm1, f"max_version={major << 16 | minor:#x}")
        said = vm1.sh("dmesg")
        found = re.search(r"Vmbus version:(\d+)\.(\d+)", said)
        assert found, said
        assert (int(found[1]), int(found[2])) == (major, minor)
        has_address(vm1)
        works(vm1)


def test_the_newest_version_is_agreed_by_default(world: World, vm1: StockGuest) -> None:
    _reload(vm1)
    found = re.search(r"Vmbus version:(\d+\.\d+)", vm1.sh("dmesg"))
    assert found
    assert found[1] == "5.3"
    has_address(vm1)
    works(vm1)
    world.keep("vmbus-version.txt", found[1])
