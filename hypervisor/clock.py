"""The one clock behind every timer, age and deadline of the hypervisor; tests stop and warp it."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

_T = TypeVar("_T")


class Timer(Protocol):
    """A call that has not happened yet."""

    def cancel(self) -> None:
        """Never make the call."""


class Clock(Protocol):
    """Time since the machine booted, and calls at a later time."""

    def now_ns(self) -> int:
        """Nanoseconds since boot; keeps counting over a restart of this process."""

    def raw_ns(self) -> int:
        """Nanoseconds of the machine's counter, which nobody steers; the pace of KVM's guests."""

    def wall_ns(self) -> int:
        """Nanoseconds since 1970, for records that people read."""

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` on the event loop after `delay` seconds."""


class SystemClock:
    """Real time."""

    def now_ns(self) -> int:
        """CLOCK_BOOTTIME."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def raw_ns(self) -> int:
        """CLOCK_MONOTONIC_RAW."""
        return time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)

    def wall_ns(self) -> int:
        """CLOCK_REALTIME."""
        return time.time_ns()

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Through the running event loop."""
        return asyncio.get_running_loop().call_later(delay, callback)


class _ManualTimer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class ManualClock:
    """Time that moves only by `advance()`."""

    def __init__(self, now_ns: int = 1_000_000_000) -> None:
        self._now_ns = now_ns
        self._order = itertools.count()
        self._timers: list[tuple[int, int, _ManualTimer]] = []

    def now_ns(self) -> int:
        """The time set so far."""
        return self._now_ns

    def raw_ns(self) -> int:
        """The same time."""
        return self._now_ns

    def wall_ns(self) -> int:
        """The same time, counted from 1970."""
        return self._now_ns

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Due once `advance()` has passed it."""
        timer = _ManualTimer(callback)
        heapq.heappush(self._timers, (self._now_ns + int(delay * 1e9), next(self._order), timer))
        return timer

    def advance(self, seconds: float) -> None:
        """Move on and make the calls that fall due, in order."""
        target = self._now_ns + int(seconds * 1e9)
        while self._timers and self._timers[0][0] <= target:
            due, _, timer = heapq.heappop(self._timers)
            self._now_ns = due
            if timer.callback is not None:
                timer.callback()
        self._now_ns = target


async def deadline(clock: Clock, seconds: float, future: asyncio.Future[_T], what: str) -> _T:
    """The future's result; TimeoutError naming `what` when the clock passes the deadline first."""
    expired: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    timer = clock.call_later(seconds, lambda: None if expired.done() else expired.set_result(None))
    try:
        await asyncio.wait([future, expired], return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            future.cancel()
            raise TimeoutError(f"{what}: nothing within {seconds:g} s")
        return future.result()
    finally:
        timer.cancel()
        expired.cancel()
