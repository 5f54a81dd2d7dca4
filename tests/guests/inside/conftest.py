"""Fixtures of the tests that run where stock guests boot."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

# Outside of `make guests` there is no kernel to boot and often no KVM: these files are not tests there.
collect_ignore_glob = [] if "VSWITCH_GUESTS_MANIFEST" in os.environ else ["test_*.py"]
# What is about our own programs rather than a kernel's drivers runs with the first kernel alone.
ONCE = ["test_control_plane.py", "test_docs.py"]
SHARED_OUT = (
    "test_digests_are_equal_for_each_combination_of_offloads",
    "test_the_driver_works_at_each_protocol_version",
)
if os.environ.get("VSWITCH_GUESTS_ONCE") == "no":
    collect_ignore_glob += ONCE

if "VSWITCH_GUESTS_MANIFEST" in os.environ:
    from tests.guests.inside.world import BOX, VM1, VM2, Box, World, has_address
    from tests.guests.stock_guest import StockGuest

    def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
        """Of long lists this kernel takes every n-th, the other kernels the rest."""
        part, parts = map(int, os.environ.get("VSWITCH_GUESTS_PART", "0/1").split("/"))
        seen: Counter[str] = Counter()
        others = []
        for item in items:
            name = getattr(item, "originalname", "")
            if name in SHARED_OUT:
                if seen[name] % parts != part:
                    others.append(item)
                seen[name] += 1
        items[:] = [item for item in items if item not in others]
        config.hook.pytest_deselected(items=others)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        item: pytest.Function, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Failures are kept as they come, with what every port has seen: an emulated machine may not live to
        the end of the run.
        """
        report = yield
        if report.failed:
            with Path(os.environ["VSWITCH_GUESTS_MANIFEST"]).with_name("failures.txt").open("a") as kept:
                kept.write(f"--- {report.nodeid} ({report.when})\n{report.longreprtext}\n")
                if "world" in item.funcargs:
                    kept.writelines(f"{port}\n" for port in item.funcargs["world"].client.list_ports())
        return report

    @pytest.fixture(scope="session")
    def world() -> Iterator[World]:
        """The lab, with its guests up."""
        told = Path(os.environ["VSWITCH_GUESTS_MANIFEST"])
        world = World(
            json.loads(told.read_text()), told.parent, int(os.environ.get("VSWITCH_GUESTS_VOLUME", "4"))
        )
        try:
            # One after the other: what boots takes all of an emulated machine's processors.
            world.client.create_switch("s0")
            world.client.create_partition(BOX.name)
            world.client.create_nic(BOX.nic, port=BOX.port, mac=BOX.mac, addresses=[f"{BOX.address}/24"])
            world.client.start_partition(BOX.name)
            world.box = Box(world)
            for machine in (VM1, VM2):
                world.create(machine)
                guest = world.boot(machine)
                guest.wait_ready(150)
                has_address(guest)
            yield world
        finally:
            world.end()

    @pytest.fixture
    def vm1(world: World) -> StockGuest:
        """The guest with several processors."""
        return world.guests[VM1.name]

    @pytest.fixture
    def vm2(world: World) -> StockGuest:
        """The guest with one."""
        return world.guests[VM2.name]

    @pytest.fixture
    def box(world: World) -> Box:
        """The process guest."""
        return world.box
