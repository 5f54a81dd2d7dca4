"""The VMM behind a bare hypervisor: one stock kernel's life, told from outside, without the daemon.

For those who change the VMM; `make guests` tells it of the whole product. Where KVM runs Hyper-V guests:

    VSWITCH_GUESTS_MANIFEST=build/guests/RELEASE/manifest.json pytest tests/guests/vmm_alone.py
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from uuid import UUID

from hypervisor import Hypervisor, PartitionState
from netvsp.nic import SyntheticNic
from tests.guests.stock_guest import Console, StockGuest
from tests.guests.vmm import machine
from tests.integration.netns_guests import World
from vswitch import Switch

ADDRESS, MAC = "10.9.0.100", "02:15:5d:00:01:00"
CMDLINE = (
    "console=ttyS0 quiet panic=-1 rdinit=/sbin/init "
    f"vswitch.hostname=vm vswitch.nic=vm/eth0,{MAC},{ADDRESS}/24"
)


def confinement(pid: int) -> set[tuple[str, str, str]]:
    """(Seccomp, NoNewPrivs, CapEff) of every thread."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
        found.add((lines["Seccomp"], lines["NoNewPrivs"], lines["CapEff"]))
    return found


def images() -> tuple[Path, Path]:
    """Kernel and initial RAM disk of this run."""
    manifest = json.loads(Path(os.environ["VSWITCH_GUESTS_MANIFEST"]).read_text())
    return Path(manifest["kernel"]["path"]), Path(manifest["initrd"])


async def test_a_stock_kernel_from_power_on_to_power_off(tmp_path: Path) -> None:
    hypervisor = Hypervisor(engine="native", run_dir=tmp_path / "run")
    lab = World("native", tmp_path, hypervisor, Switch("s0", engine="native"))
    try:
        partition = await hypervisor.create_partition("vm", memory_bytes=256 << 20, vp_count=2)
        resets: list[str] = []
        partition.on_reset.append(lambda: resets.append(str(partition.state)))
        port = lab.switch.add_port("vm")
        mac = bytes.fromhex(MAC.replace(":", ""))
        await partition.vmbus.offer(SyntheticNic("vm-eth0", mac, UUID(int=0xF80), port, engine="native"))
        kernel, initrd = images()
        peer = await lab.add("peer")
        async with machine(partition, tmp_path, kernel, initrd, CMDLINE) as vm:
            guest = StockGuest("vm", Console.at(vm.console), tmp_path / "vm.seen")

            async def pings() -> None:
                script = f"n=0; until ping -c 1 -W 1 {peer.address}; do n=$((n+1)); [ $n -lt 30 ]; done"
                await asyncio.to_thread(guest.sh, script, 60)
                answer = await asyncio.to_thread(guest.sh, f"ping -c 3 -i 0.2 {peer.address}", 30)
                assert " 0% packet loss" in answer

            await asyncio.to_thread(guest.wait_ready, 150)
            dmesg = await asyncio.to_thread(guest.sh, "dmesg")
            assert "Hypervisor detected: Microsoft Hyper-V" in dmesg
            assert "Vmbus version:5.3" in dmesg
            assert "KVM" not in dmesg
            await pings()
            assert confinement(vm.process.pid) == {("2", "1", "0" * 16)}

            # The host lets go of the door; the guest goes on and gets its NIC back.
            assert partition._link is not None
            partition._link.close("a test cut it")
            while partition.state is not PartitionState.DETACHED:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await asyncio.to_thread(guest.sh, "true")
            await partition.attach()
            await pings()

            await partition.park()
            running = asyncio.create_task(asyncio.to_thread(guest.sh, "true"))
            await asyncio.sleep(1)
            assert not running.done(), "a parked guest runs"
            partition.resume()
            await running
            await pings()

            await asyncio.to_thread(guest.sh, "(sleep 1; reboot -f) >/dev/null 2>&1 &")
            await asyncio.to_thread(guest.wait_ready, 150)
            assert resets == ["PartitionState.RUNNING"]
            uptime = await asyncio.to_thread(guest.sh, "cat /proc/uptime")
            assert float(uptime.split()[0]) < 120
            await pings()

            await asyncio.to_thread(guest.sh, "(sleep 1; poweroff -f) >/dev/null 2>&1 &")
            assert await vm.ended(60) == 0
            guest.close()
    finally:
        await lab.close()
