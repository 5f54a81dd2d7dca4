"""Fixtures of the hypervisor's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
from hypervisor_world import World


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A host with no partition."""
    world = World(tmp_path / "run")
    yield world
    await world.close()
