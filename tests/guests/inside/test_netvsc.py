"""hv_netvsc as it is: channels, offloads, MTU, link, reload under traffic, rescind and a new offer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.guests.inside.world import BOX, VM1, VM2, Box, Pinging, World, has_address, pings, until

if TYPE_CHECKING:
    from tests.guests.stock_guest import StockGuest


KEY = ":".join(f"{byte:02x}" for byte in range(0x6D, 0x6D + 40))


def channels(guest: StockGuest) -> int:
    """How many channels the adapter has now, by ethtool."""
    said = guest.sh("ethtool -l eth0")
    current = said.partition("Current hardware settings")[2]
    found = re.search(r"Combined:\s+(\d+)", current)
    assert found, said
    return int(found[1])


def queues(guest: StockGuest, direction: str) -> dict[int, int]:
    """Packets per queue, by ethtool."""
    said = guest.sh("ethtool -S eth0")
    return {int(n): int(count) for n, count in re.findall(rf"{direction}_queue_(\d+)_packets: (\d+)", said)}


def grown(before: dict[int, int], after: dict[int, int], least: int = 1) -> set[int]:
    """The queues that have taken at least so many packets since."""
    return {queue for queue, count in after.items() if count - before.get(queue, 0) >= least}


def works(guest: StockGuest, to: str = BOX.address) -> None:
    """The guest's network does what it should."""
    until(lambda: guest.run(f"ping -q -c 1 -W 1 {to}").status == 0, f"{guest.name} reaches {to}", 30)
    assert pings(guest.sh(f"ping -q -c 10 -i 0.05 {to}")) == (10, 10)


def test_four_processors_have_four_channels_and_all_carry_traffic(vm1: StockGuest, box: Box) -> None:
    assert channels(vm1) == 4
    listed = vm1.sh("ls -d /sys/class/net/eth0/device/channels/*; ls -d /sys/class/net/eth0/queues/rx-*")
    assert len(re.findall(r"/channels/\d+", listed)) == 4
    received, sent = queues(vm1, "rx"), queues(vm1, "tx")
    box.ask(verb="flows", address=VM1.address, port=9, count=64)
    vm1.sh(f"for n in $(seq 16); do wget -q -O /dev/null http://{BOX.address}:8000/100; done", 60)
    assert grown(received, queues(vm1, "rx")) == {0, 1, 2, 3}
    assert len(grown(sent, queues(vm1, "tx"))) >= 3, queues(vm1, "tx")
    # Every channel is bound to a processor of its own.
    cpus = vm1.sh("cat /sys/class/net/eth0/device/channels/*/cpu").split()
    assert sorted(cpus) == ["0", "1", "2", "3"]


def test_the_number_of_channels_changes_under_pings(vm1: StockGuest, vm2: StockGuest) -> None:
    with Pinging(vm2, [BOX.address]):
        for count in (1, 2, 4):
            vm1.sh(f"ethtool -L eth0 combined {count}", 60)
            until(lambda: channels(vm1) == count, f"{count} channels")  # noqa: B023
            works(vm1)


def test_the_indirection_table_chooses_the_queues(vm1: StockGuest, box: Box) -> None:
    said = vm1.sh("ethtool -x eth0")
    assert "RX flow hash indirection table" in said
    key = re.search(r"RSS hash key:\s*([0-9a-f:]+)", said)
    assert key, said
    assert len(key[1].split(":")) == 40
    try:
        vm1.sh("ethtool -X eth0 weight 0 0 1 0")
        before = queues(vm1, "rx")
        box.ask(verb="flows", address=VM1.address, port=9, count=64)
        # The flows by the table; the few others (ARP has no hash) are at home on queue 0.
        assert grown(before, queues(vm1, "rx"), least=20) == {2}
    finally:
        # A key too: when the driver goes from one channel to several it forgets its own and sets zeros
        # (netvsc_devinfo_get copies the key of a device that never had RSS): all flows would be in one queue.
        vm1.sh(f"ethtool -X eth0 equal 4 hkey {KEY}")
    assert KEY in vm1.sh("ethtool -x eth0")
    before = queues(vm1, "rx")
    box.ask(verb="flows", address=VM1.address, port=9, count=64)
    assert grown(before, queues(vm1, "rx")) == {0, 1, 2, 3}


def test_statistics_are_there_and_show_no_trouble(vm1: StockGuest) -> None:
    said = vm1.sh("ethtool -S eth0; ethtool -i eth0; ethtool eth0")
    counters = dict(re.findall(r"^\s+(\w+): (\d+)$", said, re.M))
    for name in ("tx_send_full", "rx_comp_busy", "rx_no_memory", "tx_no_memory", "tx_no_space", "tx_too_big"):
        assert counters[name] == "0", name
    assert "driver: hv_netvsc" in said
    assert "Link detected: yes" in said


@pytest.mark.parametrize("mtu", [1400, 9000, 1500])
def test_the_mtu_changes(vm1: StockGuest, vm2: StockGuest, mtu: int) -> None:
    """hv_netvsc closes its channel and opens it anew; the largest packet that fits passes unfragmented."""
    changing = [guest.start(f"ip link set eth0 mtu {mtu}") for guest in (vm1, vm2)]
    for job in changing:
        assert job.wait(60).status == 0
    works(vm1, VM2.address)
    payload = mtu - 28
    for guest, to in ((vm1, VM2), (vm2, VM1)):
        assert pings(guest.sh(f"ping -q -c 5 -i 0.1 -s {payload} {to.address}")) == (5, 5)
    assert vm1.sh("cat /sys/class/net/eth0/mtu").strip() == str(mtu)


def test_link_down_and_up_by_the_guest(vm1: StockGuest, vm2: StockGuest) -> None:
    with Pinging(vm2, [BOX.address]):
        for _ in range(3):
            vm1.sh("ip link set eth0 down", 30)
            assert vm1.run(f"ping -q -c 1 -W 1 {BOX.address}").status != 0
            vm1.sh("ip link set eth0 up", 30)
            works(vm1)


def test_link_down_and_up_by_the_host(world: World, vm1: StockGuest, vm2: StockGuest) -> None:
    def carrier() -> str:
        return vm1.sh("cat /sys/class/net/eth0/carrier").strip()

    with Pinging(vm2, [BOX.address]):
        assert carrier() == "1"
        world.cli("nic", "link", VM1.nic, "down")
        until(lambda: carrier() == "0", "the guest sees that its link is down")
        assert vm1.run(f"ping -q -c 1 -W 1 {BOX.address}").status != 0
        world.client.set_nic_link(VM1.nic, up=True)
        until(lambda: carrier() == "1", "the guest sees that its link is up")
        works(vm1)


def test_the_driver_is_unloaded_and_reloaded_under_traffic(vm1: StockGuest, vm2: StockGuest) -> None:
    traffic = vm2.start(f"iping -q -i 0.01 {VM1.address}; true")
    with Pinging(vm2, [BOX.address]) as pinging:
        for _ in range(2):
            vm1.sh("rmmod hv_netvsc", 60)
            assert vm1.run("test -e /sys/class/net/eth0").status != 0
            vm1.sh("load hv_netvsc", 60)
            has_address(vm1)
            works(vm1)
    # Those to the guest without a driver were lost, and only they.
    sent, received = pings(traffic.wait(20).output)
    assert 0 < received < sent
    assert pinging.received > 0
    assert channels(vm1) == VM1.cpus


def test_the_host_takes_the_adapter_away_and_offers_it_again(
    world: World, vm1: StockGuest, vm2: StockGuest
) -> None:
    with Pinging(vm2, [BOX.address]):
        world.client.delete_nic(VM1.nic)
        until(lambda: vm1.run("test -e /sys/class/net/eth0").status != 0, "the adapter is gone")
        world.client.create_nic(VM1.nic, port=VM1.port, mac=VM1.mac, addresses=[f"{VM1.address}/24"])
        has_address(vm1)
        works(vm1)
    assert channels(vm1) == VM1.cpus
