"""Every test of the NIC runs with both engines."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from scripted_guest import ENGINES, ScriptedGuest


@pytest.fixture(params=ENGINES)
async def guest(request: pytest.FixtureRequest) -> AsyncIterator[ScriptedGuest]:
    scripted = ScriptedGuest(request.param)
    yield scripted
    await scripted.close()
