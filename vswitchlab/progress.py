"""Tells the user what goes on: a bar on a terminal, plain numbered lines elsewhere. Writes to stderr."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

__all__ = ["Reporter", "Silent"]


class Silent:
    """A reporter that says nothing; also the interface of `Reporter`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def begin(self, total: int) -> None:
        """`total` steps are ahead."""

    def doing(self, text: str) -> None:
        """What is being waited for now."""

    def done(self, text: str) -> None:
        """One step is finished."""

    def note(self, text: str) -> None:
        """Something worth knowing that is no step."""


class Reporter(Silent):
    """Progress for people. On a terminal the bar vanishes at the end and what was done stays as lines."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.total = 0
        self.count = 0
        self.started = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        self.started = time.monotonic()
        if self.console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self.console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("starting", total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def begin(self, total: int) -> None:
        self.total, self.count = total, 0
        if self._bar is not None:
            self._bar.update(self._task, total=total, completed=0)

    def doing(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=text)

    def done(self, text: str) -> None:
        self.count += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self.count)
        width = len(str(self.total))
        elapsed = time.monotonic() - self.started
        self.console.print(f"[{self.count:{width}}/{self.total}] {text} ({elapsed:.1f} s)", markup=False)

    def note(self, text: str) -> None:
        self.console.print(text, markup=False)
