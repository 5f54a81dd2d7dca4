"""Fixtures of the hypervisor's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from hypervisor_world import World

import vswitch_native

NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(not vswitch_native.AVAILABLE, reason=vswitch_native.WHY)
)


@pytest_asyncio.fixture(params=["python", NATIVE])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    """A host with no partition, over either engine's memory."""
    world = World(tmp_path / "run", engine=request.param)
    yield world
    await world.close()
