"""Fixtures of the hostile payload's tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Outside of `make hostile` there is no payload, and often no KVM: these files are not tests there.
collect_ignore_glob = [] if "VSWITCH_HOSTILE_IMAGE" in os.environ else ["test_*.py"]

if "VSWITCH_HOSTILE_IMAGE" in os.environ:
    from tests.guests.hostile.scene import Scene

    @pytest.fixture
    def scene() -> Iterator[Scene]:
        """A daemon, two process guests that ping each other, and a virtual machine with the payload."""
        scene = Scene()
        try:
            scene.up()
            yield scene
        finally:
            scene.end()
