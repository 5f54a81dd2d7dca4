"""What arrives is what was sent: SHA-256 at both ends for each combination of checksum, LSO and RSC."""

from __future__ import annotations

import itertools
import json
import re
from typing import TYPE_CHECKING

import pytest

from tests.guests.inside.world import BOX, MIB, VM1, VM2, Box, Pinging, World

if TYPE_CHECKING:
    from tests.guests.stock_guest import StockGuest

FILE_MIB = 16
COMBINATIONS = list(itertools.product((True, False), repeat=3))


def _times(world: World) -> tuple[int, int]:
    """(MiB of the file that is sent, how often): a guest's memory holds no gigabyte."""
    size = min(FILE_MIB, world.volume // MIB)
    return size, world.volume // (size * MIB)


@pytest.fixture(scope="module")
def digests(world: World) -> dict[str, str]:
    """Each stock guest serves a file of random bytes; the digest of all that will be read of it."""
    size, times = _times(world)
    found = {}
    for name in (VM1.name, VM2.name):
        guest = world.guests[name]
        guest.sh(
            f"mkdir -p /run/srv; dd if=/dev/urandom of=/run/srv/data bs=65536 count={size * 16} 2>/dev/null",
            120,
        )
        guest.sh("httpd -p 8000 -h /run/srv")
        copies = " ".join(["/run/srv/data"] * times)
        found[name] = guest.sh(f"cat {copies} | sha256sum", 300).split()[0]
    assert found[VM1.name] != found[VM2.name]
    found[BOX.name] = world.box.ask(verb="digest", size=size * MIB)["sha256"] if times == 1 else ""
    return found


def _set(guest: StockGuest, checksum: bool, lso: bool, rsc: bool) -> dict[str, str]:
    """Turns offloads on or off; what the driver made of it."""
    word = {True: "on", False: "off"}
    guest.sh(
        f"ethtool -K eth0 rx {word[checksum]} tx {word[checksum]} 2>&1;"
        f"ethtool -K eth0 tso {word[lso]} 2>&1; ethtool -K eth0 lro {word[rsc]} 2>&1",
        60,
    )
    said = guest.sh("ethtool -k eth0")
    return {
        name: state
        for name, state in re.findall(r"^([\w-]+): (on|off)", said, re.M)
        if name in ("rx-checksumming", "tx-checksumming", "tcp-segmentation-offload", "large-receive-offload")
    }


def _read(guest: StockGuest, url: str, times: int) -> str:
    """The digest of a file that the guest reads `times` times over the network."""
    one = f"wget -q -O - {url}"
    return guest.sh("{ " + "; ".join([one] * times) + "; } | sha256sum", 600).split()[0]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("checksum", "lso", "rsc"), COMBINATIONS)
def test_digests_are_equal_for_each_combination_of_offloads(
    world: World,
    vm1: StockGuest,
    vm2: StockGuest,
    box: Box,
    digests: dict[str, str],
    checksum: bool,
    lso: bool,
    rsc: bool,
) -> None:
    size, times = _times(world)
    states = {guest.name: _set(guest, checksum, lso, rsc) for guest in (vm1, vm2)}
    for state in states.values():
        assert state["rx-checksumming"] == ("on" if checksum else "off")
        assert state["tx-checksumming"] == ("on" if checksum else "off")
        assert state["large-receive-offload"] == ("on" if rsc else "off")
        # Linux offers no LSO without checksum offload: it segments in software then.
        assert state["tcp-segmentation-offload"] == ("on" if lso and checksum else "off")
    with Pinging(vm1, [VM2.address]), Pinging(vm2, [BOX.address]):
        got = {
            "vm1 to vm2": (_read(vm2, f"http://{VM1.address}:8000/data", times), digests[VM1.name]),
            "vm2 to vm1": (_read(vm1, f"http://{VM2.address}:8000/data", times), digests[VM2.name]),
            "box to vm1": (
                _read(vm1, f"http://{BOX.address}:8000/{size * MIB * times}", 1),
                box.ask(verb="digest", size=size * MIB * times)["sha256"],
            ),
            "vm1 to box": (
                box.ask(verb="fetch", address=VM1.address, path="/data", times=times, timeout=600)["sha256"],
                digests[VM1.name],
            ),
        }
    name = f"checksum={checksum} lso={lso} rsc={rsc}"
    report = world.folder / "transfers.json"
    known = json.loads(report.read_text()) if report.exists() else {"bytes of each": world.volume}
    known[name] = {"offloads": states, **{way: {"received": a, "sent": b} for way, (a, b) in got.items()}}
    report.write_text(json.dumps(known, indent=1))
    for way, (received, sent) in got.items():
        assert received == sent, f"{way} with {name}"
