"""Page allocation in the guest's own memory: what rings, buffers and SynIC pages are made of."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence
from typing import Protocol

PAGE = 4096


class _Region(Protocol):
    @property
    def gpa(self) -> int: ...
    @property
    def size(self) -> int: ...


class PageAllocator:
    """Free pages as sorted runs. Page 0 is never given out: drivers take address 0 for "none"."""

    def __init__(self, regions: Iterable[_Region]) -> None:
        self._runs: list[tuple[int, int]] = []
        for region in regions:
            first, end = region.gpa // PAGE, (region.gpa + region.size) // PAGE
            first = max(first, 1)
            if first < end:
                insort(self._runs, (first, end - first))
        self._used: set[int] = set()

    @property
    def available(self) -> int:
        """Free pages."""
        return sum(count for _, count in self._runs)

    def alloc(self, pages: int) -> list[int]:
        """Page numbers of `pages` pages, contiguous where one run has that many. MemoryError when they
        are not there.

        The pages hold whatever their last user left.
        """
        if pages < 1:
            raise ValueError(f"{pages} pages asked for")
        if pages > self.available:
            raise MemoryError(f"{pages} pages of guest memory asked for, {self.available} are free")
        for index, (first, count) in enumerate(self._runs):
            if count >= pages:
                self._take(index, pages)
                return self._hand_out(range(first, first + pages))
        pfns: list[int] = []
        while len(pfns) < pages:
            # The largest runs first keep the list short.
            index = max(range(len(self._runs)), key=lambda entry: self._runs[entry][1])
            first, count = self._runs[index]
            take = min(count, pages - len(pfns))
            self._take(index, take)
            pfns.extend(range(first, first + take))
        return self._hand_out(pfns)

    def _take(self, index: int, pages: int) -> None:
        first, count = self._runs[index]
        if count == pages:
            del self._runs[index]
        else:
            self._runs[index] = (first + pages, count - pages)

    def _hand_out(self, pfns: Iterable[int]) -> list[int]:
        result = list(pfns)
        self._used.update(result)
        return result

    def free(self, pfns: Sequence[int]) -> None:
        """Give pages back. ValueError, with nothing freed, for a page that is not in use or named twice."""
        wrong = set(pfns) - self._used
        if wrong or len(set(pfns)) != len(pfns):
            raise ValueError(f"page {min(wrong) if wrong else pfns[0]:#x} is not in use, or given back twice")
        self._used.difference_update(pfns)
        for first, count in _runs_of(sorted(pfns)):
            insort(self._runs, (first, count))
        merged: list[tuple[int, int]] = []
        for first, count in self._runs:
            if merged and merged[-1][0] + merged[-1][1] == first:
                merged[-1] = (merged[-1][0], merged[-1][1] + count)
            else:
                merged.append((first, count))
        self._runs = merged


def _runs_of(pfns: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for pfn in pfns:
        if runs and runs[-1][0] + runs[-1][1] == pfn:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((pfn, 1))
    return runs
