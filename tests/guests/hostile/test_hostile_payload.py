"""Random harm from inside a virtual machine, for the time that was asked: nothing outside gives way."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from tests.guests.hostile.scene import EVIL, PROCESSORS, Exits, Scene, say, tasks, wait_for
from vswitch_api.v1 import partition_pb2

RUNNING = partition_pb2.PARTITION_STATE_RUNNING
# How a guest may end its own machine: power-off, or a crash (triple fault, a crash report).
ENDINGS = {
    partition_pb2.PARTITION_STATE_STOPPED: "the guest powered off",
    partition_pb2.PARTITION_STATE_FAILED: "the guest crashed",
}
OPENED = 4
"""The payload's `deepest` from here on: it had a channel open."""


def test_a_hostile_guest_harms_nobody_but_itself(scene: Scene) -> None:
    exits = Exits()
    scene.create(scene.seed)
    starts, endings, harm = 0, [], 0.0
    consoles: list[str] = []
    confined: dict[str, dict[str, str]] = {}
    while harm < scene.seconds:
        scene.start(EVIL)
        starts += 1
        say(f"the payload runs, start {starts}")
        began = time.monotonic()
        vmm = wait_for("the VMM's process", scene.vmm, 10)
        if starts == 1:
            confined = _threads(vmm)
        while harm + time.monotonic() - began < scene.seconds:
            time.sleep(0.5)
            exits.look(vmm)
            partition = scene.partition()
            if partition.state != RUNNING:
                expected = ENDINGS.get(partition.state)
                assert expected, f"state {partition.state}: {partition.detail}"
                assert partition.detail.startswith(expected), partition.detail
                endings.append(partition.detail)
                say(f"it ended: {partition.detail}")
                break
        harm += time.monotonic() - began
        consoles.append(scene.console())
        assert scene.daemon.process.poll() is None, "the daemon has ended"
    scene.keep("console.log", "".join(consoles))
    pings = scene.pings()
    told = _told("".join(consoles))
    report = {
        "seed": scene.seed,
        "seconds": round(harm, 1),
        "starts": starts,
        "reboots": scene.partition().guest.boots - 1,
        "endings": endings,
        "exits": exits.total if exits.known else None,
        "exits_per_second": round(exits.total / harm) if exits.known else None,
        "payload": told,
        "bystanders": pings,
        "threads": confined,
    }
    scene.keep("report.json", json.dumps(report, indent=1))
    print(
        f"\nhostile: seed {scene.seed}, {harm:.0f} s, {report['exits']} exits,"
        f" {report['exits_per_second']} exits per second, {starts} starts, {report['reboots']} reboots since"
        f" the last, {told}; bystanders: {pings['sent']} pings, {pings['lost']} lost, largest gap"
        f" {pings['largest_gap_ms']} ms",
        flush=True,
    )
    # It really ran, survived its own faults, and got deep before it turned bad.
    assert told["steps"] > 1000
    assert told["faults"] > 100
    assert told["posted"] > 100
    assert told["deepest"] >= OPENED
    assert not exits.known or exits.total > 10 * harm
    _assert_confined(confined)
    # And nobody else noticed.
    assert pings["sent"] > 10 * harm
    assert pings["lost"] == 0
    assert scene.daemon.process.poll() is None
    said = scene.daemon_log()
    assert "Traceback" not in said, said[-4000:]
    assert "the host failed on a frame" not in said
    # The partition can be taken away, and nothing is left of it.
    vmm = scene.vmm()
    scene.client.delete_partition(EVIL, force=True)
    wait_for("the VMM's end", lambda: vmm is None or not Path(f"/proc/{vmm}").exists(), 10)


def _threads(vmm: int) -> dict[str, dict[str, str]]:
    """What the kernel says of every thread of a VMM whose guest runs."""
    wait_for("a thread for each processor", lambda: len(tasks(vmm)) > PROCESSORS, 10)
    # The guest's first words: the filters came before them.
    time.sleep(1)
    return tasks(vmm)


def _assert_confined(threads: dict[str, dict[str, str]]) -> None:
    """Seccomp's filter mode, no capability, no new privileges."""
    assert len(threads) > PROCESSORS
    for name, fields in threads.items():
        assert fields["Seccomp"] == "2", name
        assert fields["NoNewPrivs"] == "1", name
        assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0, name


def _told(console: str) -> dict[str, int]:
    """The payload's own counters, summed over its boots (each boot's last line; depth: the greatest)."""
    totals = {"boots": 0, "steps": 0, "faults": 0, "posted": 0, "refused": 0, "packets": 0, "deepest": 0}
    pattern = re.compile(
        r"hostile: seed \d+ steps (\d+)\+(\d+) faults (\d+) interrupts \d+ posted (\d+) refused (\d+)"
        r" packets (\d+) deepest (\d+)"
    )
    for boot in re.split(r"hostile: seed \d+ processors \d+", console)[1:]:
        totals["boots"] += 1
        lines = pattern.findall(boot)
        if lines:
            first, second, faults, posted, refused, packets, deepest = map(int, lines[-1])
            for name, value in (
                ("steps", first + second),
                ("faults", faults),
                ("posted", posted),
                ("refused", refused),
                ("packets", packets),
            ):
                totals[name] += value
            totals["deepest"] = max(totals["deepest"], deepest)
    return totals
