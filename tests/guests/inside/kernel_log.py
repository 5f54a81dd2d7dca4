"""What a stock kernel may warn of: nothing that a stock Hyper-V host would not cause as well."""

from __future__ import annotations

import os
import re

# Warnings (and worse) that a stock Hyper-V host causes as well, or that are of the guest's small userland.
# Each with its reason; whatever is not here fails the test.
ALLOWED: dict[str, str] = {
    r"^PCI: Fatal: No config space access function found$": (
        "Hyper-V's machines of generation 2 have no PCI configuration mechanism either: Linux says the same "
        "there (github.com/docker/for-win issue 1279 shows such a machine's log)"
    ),
    r"^PCI: System does not support PCI$": "the same, said once more by 6.12",
    r"^amd_pstate: the _CPC object is not present in SBIOS or ACPI disabled$": (
        "the driver of AMD's processors finds no performance controls: a virtual machine of Hyper-V has none"
    ),
    r"^TCP: eth\d+: Driver has suspect GRO implementation, TCP performance may be compromised\.$": (
        "hv_netvsc hands up coalesced segments (RSC) without the size of one, and tcp_measure_rcv_mss takes "
        "the whole for one: so with every host that coalesces"
    ),
    r"^ +#\d+$": "the numbers of the processors as they come up, one by one",
}
"""regular expression -> reason"""
SLOW = (
    r"^hrtimer: interrupt took \d+ ns$",
    r"^sched: DL replenish lagged too much$",
    r"^sched: RT throttling activated$",
    r"^perf: interrupt took too long ",
    r"^workqueue: \S+ hogged CPU for >\d+us ",
)
"""What a kernel says of a processor that is slower than it thought possible: an emulated one is."""


def unexpected(log: str) -> list[str]:
    """Lines of warning level and above that no reason covers; from `dmesg -r`."""
    allowed = [*ALLOWED, *(SLOW if os.environ.get("VSWITCH_NESTED") == "emulated" else ())]
    bad = []
    for line in log.splitlines():
        found = re.match(r"<(\d+)>\[[ \d.]+\] (.*)", line)
        if not found or int(found[1]) & 7 > 4:
            continue
        if not any(re.search(pattern, found[2]) for pattern in allowed):
            bad.append(found[2])
    return bad
