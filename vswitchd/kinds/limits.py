"""Checks that all kinds of guest share."""

from __future__ import annotations

from datetime import timedelta

from google.protobuf.duration_pb2 import Duration

from vswitchd.errors import invalid

MAX_GRACE_SECONDS = 86400.0
DEFAULT_GRACE_SECONDS = 30.0


def checked_grace(field: str, given: Duration | None) -> Duration:
    """How long a guest lives on without a daemon."""
    grace = Duration()
    if given is None:
        grace.FromTimedelta(timedelta(seconds=DEFAULT_GRACE_SECONDS))
        return grace
    grace.CopyFrom(given)
    seconds = grace.ToTimedelta().total_seconds()
    if not 0.0 <= seconds <= MAX_GRACE_SECONDS:
        raise invalid(field, f"{seconds:g} s is not within 0 to {MAX_GRACE_SECONDS:g} s")
    return grace
