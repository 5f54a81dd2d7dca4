"""Stock hv_utils and our integration services: versions, the clock on request, unload and reload."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tests.guests.inside.world import VM2, World, until

if TYPE_CHECKING:
    from tests.guests.stock_guest import StockGuest

NEWEST = {"shutdown": "3.2", "time sync": "4.0", "heartbeat": "3.0", "key-value exchange": "4.0"}
"""The newest versions that drivers/hv/hv_util.c and hv_kvp.c know."""


def _services(world: World) -> dict[str, str]:
    return dict(world.client.get_partition(VM2.name).guest.services)


def _ahead(guest: StockGuest) -> tuple[float, float]:
    """At least and at most how many seconds the guest's clock is ahead of this machine's."""
    before = time.time()
    shown = float(guest.sh("date +%s"))
    return shown - time.time(), shown + 1 - before


def test_every_service_agrees_on_the_newest_version(world: World, vm2: StockGuest) -> None:
    until(lambda: _services(world) == NEWEST, "four drivers with their newest versions", 90)
    said = vm2.sh("dmesg")
    for line in ("Heartbeat IC version 3.0", "Shutdown IC version 3.2", "TimeSync IC version 4.0"):
        assert line in said


def test_a_clock_an_hour_wrong_is_corrected_on_request(world: World, vm2: StockGuest) -> None:
    for wrong in (3600, -3600):
        vm2.sh(f"date -s @$(( $(date +%s) + {wrong} ))")
        least, most = _ahead(vm2)
        assert least - 2 <= wrong <= most + 2
        world.cli("partition", "sync-time", VM2.name)
        # By the reference time in the message, not by when it arrived: right to the second that is shown.
        until(lambda: _ahead(vm2)[0] <= 0.2 and _ahead(vm2)[1] >= -0.2, "the guest's clock is right", 20)


def test_hv_utils_unloads_and_loads_again(world: World, vm2: StockGuest) -> None:
    vm2.sh("killall hv_kvp_daemon; sleep 0.5; rmmod hv_utils", 60)
    until(lambda: not _services(world), "no driver is there", 30)
    vm2.sh("load hv_utils; until [ -e /dev/vmbus/hv_kvp ]; do sleep 0.2; done; hv_kvp_daemon", 60)
    until(lambda: _services(world) == NEWEST, "four drivers again", 90)
