"""Every test of the switch runs with both engines."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from switch_world import World

import vswitch_native
from vswitch_wire.engine import Engine

NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(not vswitch_native.AVAILABLE, reason="the native module is not built")
)


@pytest.fixture(params=["python", NATIVE])
def engine(request: pytest.FixtureRequest) -> Engine:
    chosen: Engine = request.param
    return chosen


@pytest.fixture
async def make_world(engine: Engine) -> AsyncIterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(**options: Any) -> World:
        worlds.append(World(engine, **options))
        return worlds[-1]

    yield make
    for world in worlds:
        await world.close()


@pytest.fixture
async def world(make_world: Callable[..., World]) -> World:
    return make_world()
