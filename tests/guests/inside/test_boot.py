"""The stock kernel finds a Hyper-V host, is the package's own, and talks through the switch."""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING

from tests.guests.inside.world import BOX, VM1, VM2, Box, Pinging, World, pings

if TYPE_CHECKING:
    from tests.guests.stock_guest import StockGuest


def test_the_kernel_finds_hyper_v_and_no_kvm(world: World, vm1: StockGuest) -> None:
    said = vm1.sh("dmesg")
    world.keep("dmesg-boot-vm1.txt", said)
    assert "Hypervisor detected: Microsoft Hyper-V" in said
    assert re.search(r"hv_vmbus: Vmbus version:[45]\.\d", said)
    assert "kvm-clock" not in said
    assert "kvm-guest" not in said
    clock = vm1.sh("cat /sys/devices/system/clocksource/clocksource0/current_clocksource")
    assert clock.strip() == "hyperv_clocksource_tsc_page"
    assert vm1.sh("nproc").strip() == str(VM1.cpus)
    # The interrupts of VMBus reach every processor, in the line that the kernel keeps for them.
    counts = re.search(r"^ *HYP: +(.*?) +Hypervisor", vm1.sh("cat /proc/interrupts"), re.M)
    assert counts is not None
    assert len(counts[1].split()) == VM1.cpus
    assert all(int(count) > 0 for count in counts[1].split())


def test_kernel_and_modules_are_those_of_the_package(world: World, vm1: StockGuest) -> None:
    told = world.manifest
    release = vm1.sh("uname -r").strip()
    assert release == told["release"]
    if told["package_sha256"]:
        assert f"Debian {told['version']}" in vm1.sh("uname -v")
    files = vm1.sh(
        "cd /lib/modules; sha256sum *.ko; cd /sys/module; for name in hv_*; do "
        'echo "$name loaded $(tail -c 20 $name/notes/.note.gnu.build-id | od -An -v -tx1 | tr -d " \\n")"; '
        "done"
    )
    seen = {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (\w+)\.ko$", files, re.M)}
    loaded = dict(re.findall(r"^(\w+) loaded ([0-9a-f]{40})$", files, re.M))
    evidence = {}
    for name, entry in told["modules"].items():
        # The file in the guest is the package's, and the module in its kernel was made of that file.
        assert seen[name] == entry["sha256"], name
        assert loaded[name] == entry["build_id"], name
        evidence[name] = {**entry, "in the guest": seen[name], "loaded": loaded[name]}
    assert {"hv_vmbus", "hv_netvsc", "hv_utils"} <= set(evidence)
    partition = world.client.get_partition(VM1.name)
    assert partition.kvm.kernel == told["kernel"]["path"]
    world.keep("hashes.json", {**told, "release in the guest": release, "modules": evidence})


def test_a_nonce_comes_back_through_the_network(world: World, vm1: StockGuest, box: Box) -> None:
    before = world.counters(VM1)
    server = vm1.start("nc -l -p 7007 -e cat")
    nonce = secrets.token_hex(16)
    vm1.sh("until netstat -ltn | grep -q :7007; do sleep 0.2; done", 20)
    answer = box.ask(verb="echo", address=VM1.address, port=7007, text=nonce)
    assert answer["echoed"] == nonce
    server.wait(20)
    after = world.counters(VM1)
    world.keep("nonce.json", {"sent": nonce, **answer, "port before": str(before), "port after": str(after)})


def test_pings_between_all_kinds_of_guests(vm1: StockGuest, vm2: StockGuest) -> None:
    for guest, to in ((vm1, VM2), (vm1, BOX), (vm2, VM1), (vm2, BOX)):
        assert pings(guest.sh(f"ping -q -c 20 -i 0.05 {to.address}")) == (20, 20), (guest.name, to.name)


def test_pings_every_ten_milliseconds(vm1: StockGuest, vm2: StockGuest) -> None:
    with Pinging(vm2, [VM1.address, BOX.address]) as pinging:
        vm1.sh("sleep 5")
    assert pinging.sent >= 400
