"""hv_utils as it is: the guest's clock, its heartbeat, what it tells of itself."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tests.guests.inside.world import VM1, VM2, World, until
from vswitch_api.v1 import partition_pb2

if TYPE_CHECKING:
    from tests.guests.stock_guest import StockGuest


def _wrong(guest: StockGuest) -> float:
    """How many seconds the guest's clock is from this machine's."""
    return abs(float(guest.sh("date +%s")) - time.time())


def test_a_clock_an_hour_wrong_is_corrected(vm2: StockGuest) -> None:
    assert _wrong(vm2) < 30
    vm2.sh("utils stop", 30)
    vm2.sh("date -s @$(( $(date +%s) - 3600 ))")
    assert _wrong(vm2) > 3500
    # The host's first sample after the driver has opened its channel sets the clock.
    vm2.sh("utils start", 60)
    until(lambda: _wrong(vm2) < 30, "the guest's clock is right again", 30)


def test_the_heartbeat_is_seen(world: World, vm1: StockGuest) -> None:
    def seen() -> partition_pb2.GuestInfo:
        return world.client.get_partition(VM1.name).guest

    until(lambda: seen().heartbeat == partition_pb2.HEARTBEAT_STATE_OK, "a heartbeat", 60)
    first = seen().heartbeat_time.ToNanoseconds()
    until(lambda: seen().heartbeat_time.ToNanoseconds() > first, "the next heartbeat", 30)
    vm1.sh("true")


def test_partition_show_tells_the_guests_addresses(world: World, vm1: StockGuest) -> None:
    assert "hv_kvp_daemon" in vm1.sh("ps")

    def told() -> Any:
        guest = world.client.get_partition(VM1.name).guest
        return guest if VM1.address in guest.addresses else None

    guest = until(told, "the guest's address by key-value exchange", 90)
    assert guest.hostname == VM1.name
    assert world.manifest["release"].split("-")[0] in " ".join([guest.os, *guest.values.values()])
    shown = world.cli("partition", "show", VM1.name)
    assert VM1.address in shown
    world.keep(
        "partition-show.txt", shown + "\n" + str(guest) + str(world.client.get_partition(VM2.name).guest)
    )
