"""At the end: nothing in the kernels' logs that Hyper-V would not cause, then reboot and shutdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.guests.inside.kernel_log import unexpected
from tests.guests.inside.test_netvsc import works
from tests.guests.inside.world import BOX, VM1, VM2, Pinging, World, has_address
from vswitch_api.v1 import partition_pb2

if TYPE_CHECKING:
    from tests.guests.stock_guest import StockGuest


def test_the_kernels_warn_of_nothing_that_hyper_v_would_not_cause(
    world: World, vm1: StockGuest, vm2: StockGuest
) -> None:
    bad = {}
    for guest in (vm1, vm2):
        log = guest.sh("dmesg -r", 60)
        world.keep(f"dmesg-{guest.name}.txt", log)
        bad[guest.name] = unexpected(log)
    assert bad == {VM1.name: [], VM2.name: []}


def test_the_guest_reboots_by_itself_and_is_back(world: World, vm1: StockGuest, vm2: StockGuest) -> None:
    boots = world.client.get_partition(VM1.name).guest.boots
    with Pinging(vm2, [BOX.address], interval=0.1):
        vm1.sh("(sleep 1; reboot) >/dev/null 2>&1 &")
        vm1.wait_console("shutdown hooks: ran", 60)
        vm1.wait_ready(150)
        has_address(vm1)
        works(vm1)
    assert world.client.get_partition(VM1.name).guest.boots == boots + 1
    assert float(vm1.sh("cut -d. -f1 /proc/uptime")) < 150


def test_shutdown_on_request_runs_the_guests_hooks(world: World, vm1: StockGuest, vm2: StockGuest) -> None:
    with Pinging(vm2, [BOX.address], interval=0.1):
        before = len(vm1.console)
        world.cli("partition", "stop", VM1.name, "--timeout", "60", timeout=120)
        assert "adapters: " in vm1.wait_console(r"shutdown hooks: ran .*", 10, after=before)
    partition = world.client.get_partition(VM1.name)
    assert partition.state == partition_pb2.PARTITION_STATE_STOPPED
    assert "Requesting system poweroff" in vm1.console[before:]
    assert VM2.name in {each.name.rpartition("/")[2] for each in world.client.list_partitions()}
