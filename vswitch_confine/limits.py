"""What a process gives up for itself: resource limits, core dumps, new privileges, inherited descriptors."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterable

from vswitch_confine import libc


def no_new_privileges() -> None:
    """No execve from here on may gain privileges (set-uid, file capabilities). Irrevocable."""
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)


def non_dumpable() -> None:
    """Processes of the same user can neither trace this one nor read its memory or descriptors in /proc."""
    libc.prctl(libc.PR_SET_DUMPABLE, 0)


def set_limits(
    *,
    memory_bytes: int | None = None,
    descriptors: int | None = None,
    processes: int | None = None,
    file_bytes: int | None = None,
) -> None:
    """Lower soft and hard limits; core dumps are always off. A limit already lower stays.

    `processes` counts all processes of the real uid in the user namespace, so it must be set after
    entering one. It does not bind a caller with CAP_SYS_RESOURCE.
    """
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_NOFILE: descriptors,
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_FSIZE: file_bytes,
    }
    for kind, value in wanted.items():
        if value is None:
            continue
        _, hard = resource.getrlimit(kind)
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (limit, limit))


def close_all_but(keep: Iterable[int]) -> None:
    """Close every descriptor of this process except 0, 1, 2 and those in `keep`."""
    kept = {*keep, 0, 1, 2}
    for fd in [int(name) for name in os.listdir("/proc/self/fd")]:
        if fd not in kept:
            with contextlib.suppress(OSError):  # the listing's own descriptor is closed already
                os.close(fd)
