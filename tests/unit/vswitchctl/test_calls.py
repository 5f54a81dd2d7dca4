"""Calls as they are built, before any daemon sees them."""

from __future__ import annotations

import pytest

from vswitchctl import calls


def test_what_takes_its_nics_along_gets_the_time_that_takes() -> None:
    for force, seconds in ((True, calls.SLOW_CALL_SECONDS), (False, None)):
        assert calls.delete_switch("s0", force=force).timeout == seconds
        assert calls.delete_port("s0/p0", force=force).timeout == seconds


@pytest.mark.parametrize("seconds", [-0.5, -3, float("nan"), float("inf")])
def test_a_duration_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds; give 0 to"):
        calls.stop_partition("a", timeout=seconds)


def test_a_duration_keeps_its_fraction() -> None:
    timeout = calls.stop_partition("a", timeout=1.25).request.timeout  # type: ignore[attr-defined]
    assert (timeout.seconds, timeout.nanos) == (1, 250_000_000)
