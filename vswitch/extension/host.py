"""The extensions of one switch: loaded, supervised, started again after a failure, unloaded.

Each runs in a process of its own (`process`, `runner`); frames reach it through the upcall channel, never
through this code. A process that ends, misses its deadline or breaks a protocol has failed: the datapath
applies `on_failure` from that moment, the process is killed, and a fresh one takes its place after a pause
that doubles with each failure.

All methods are called on one asyncio loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vswitch.engine import DatapathEvent, EventKind
from vswitch.extension.control import Ready
from vswitch.extension.loader import MAX_SOURCE, ExtensionLoadError
from vswitch.extension.process import ExtensionProcess
from vswitch.upcall import ExtensionChannel, FailureMode

if TYPE_CHECKING:
    from vswitch.switch import Switch

__all__ = [
    "BackOff",
    "ExtensionEvent",
    "ExtensionEventKind",
    "ExtensionHost",
    "ExtensionInfo",
    "ExtensionLoadError",
    "ExtensionState",
    "Stack",
]

_log = logging.getLogger("vswitch.extension")


class Stack(Protocol):
    """What the host needs of a datapath; `vswitch.engine.Datapath` has it."""

    async def set_extensions(self, channels: Iterable[ExtensionChannel]) -> None: ...

    def fail_extension(self, extension_id: int, why: str) -> None: ...

    def flush_flows(self) -> None: ...


class _SwitchStack:
    """A switch as a `Stack`: it remembers its extensions, its datapath does the rest."""

    def __init__(self, switch: Switch) -> None:
        self._switch = switch

    async def set_extensions(self, channels: Iterable[ExtensionChannel]) -> None:
        await self._switch.set_extensions(tuple(channels))

    def fail_extension(self, extension_id: int, why: str) -> None:
        self._switch.datapath.fail_extension(extension_id, why)

    def flush_flows(self) -> None:
        self._switch.datapath.flush_flows()


class ExtensionState(Enum):
    """Where an extension is in its life."""

    STARTING = "starting"
    RUNNING = "running"
    FAILED = "failed"
    """Its `on_failure` applies; it is started again after a pause."""


class ExtensionEventKind(Enum):
    """What happened to an extension."""

    LOADED = "loaded"
    FAILED = "failed"
    ERROR = "error"
    """Its code raised for a frame; the text names file, line and exception."""
    RESTARTED = "restarted"
    RESTART_FAILED = "restart_failed"
    UNLOADED = "unloaded"


@dataclass(frozen=True, slots=True)
class ExtensionEvent:
    """One event, for people and for the API's watchers."""

    kind: ExtensionEventKind
    extension: str
    text: str
    time_ns: int = field(default_factory=time.time_ns)


@dataclass(frozen=True, slots=True)
class ExtensionInfo:
    """A snapshot of one extension."""

    name: str
    file_name: str
    class_name: str
    kind: str
    passes: tuple[str, ...]
    on_failure: FailureMode
    state: ExtensionState
    detail: str
    """The last failure or error; empty when there was none."""
    pid: int
    """The confined process; 0 while there is none."""
    restarts: int
    errors: int
    channel_id: int
    layers: tuple[str, ...]
    """What confines the process."""
    missing: tuple[str, ...]
    """What could not be had on this machine, with the remedy."""
    output: tuple[str, ...]
    """The last lines that it printed."""


@dataclass(frozen=True, slots=True)
class BackOff:
    """Pauses between restarts, in seconds: `first`, doubling up to `limit`, anew after `healthy` of
    running well.
    """

    first: float = 0.2
    limit: float = 30.0
    healthy: float = 60.0

    def pause(self, failures: int) -> float:
        """The pause after so many failures in a row, at least 1."""
        return min(self.first * 2.0 ** min(failures - 1, 32), self.limit)


@dataclass(slots=True)
class _Loaded:
    """One extension and its current run."""

    name: str
    file_name: str
    source: bytes
    on_failure: FailureMode
    channel: ExtensionChannel | None = None
    process: ExtensionProcess | None = None
    ready: Ready | None = None
    state: ExtensionState = ExtensionState.STARTING
    detail: str = ""
    restarts: int = 0
    errors: int = 0
    failures_in_a_row: int = 0
    running_since: float = 0.0
    last_error_at: float = float("-inf")
    errors_unsaid: int = 0
    restarting: asyncio.Task[None] | None = None


class ExtensionHost:
    """Loads extensions into one datapath and keeps them running."""

    @classmethod
    def of(cls, switch: Switch, **options: Any) -> ExtensionHost:
        """The host of a switch's extensions; the keyword arguments are those of the class."""
        host = cls(_SwitchStack(switch), **options)
        switch.on_event(host.on_datapath_event)
        return host

    def __init__(
        self,
        stack: Stack,
        *,
        on_event: Callable[[ExtensionEvent], None] = lambda _event: None,
        back_off: BackOff | None = None,
        load_timeout: float = 10.0,
    ) -> None:
        self._stack = stack
        self._on_event = on_event
        self._back_off = back_off or BackOff()
        self._load_timeout = load_timeout
        self._loaded: dict[str, _Loaded] = {}
        self._channel_ids = itertools.count(1)
        self._publishing = asyncio.Lock()

    # What users ask for.

    async def load(
        self, name: str, source: bytes, file_name: str, *, on_failure: FailureMode = "open"
    ) -> ExtensionInfo:
        """Load an extension behind those already there; on return every new frame meets it.

        Raises ExtensionLoadError with the file's own error, ValueError when the name is taken.
        """
        if name in self._loaded:
            raise ValueError(f"extension {name} is loaded already; unload it first or choose another name")
        loaded = _Loaded(name, file_name, source, on_failure)
        self._loaded[name] = loaded
        try:
            await self._start(loaded)
        except BaseException:
            if self._loaded.get(name) is loaded:
                del self._loaded[name]
            raise
        assert loaded.ready is not None
        self._tell(ExtensionEventKind.LOADED, loaded, f"class {loaded.ready.class_name} of {file_name}")
        return self._info(loaded)

    async def load_file(
        self, path: str | Path, *, name: str | None = None, on_failure: FailureMode = "open"
    ) -> ExtensionInfo:
        """Load an extension from a file; its name is the file's without `.py` unless given.

        Raises OSError too.
        """
        path = Path(path)
        source = await asyncio.to_thread(_read, path)
        return await self.load(name or path.stem, source, path.name, on_failure=on_failure)

    async def unload(self, name: str) -> None:
        """Take an extension out; on return no frame can meet it and its process is gone.

        KeyError if unknown.
        """
        loaded = self._loaded.pop(name, None)
        if loaded is None:
            raise KeyError(f"extension {name} is not loaded; loaded are: {', '.join(self._loaded) or 'none'}")
        await self._cancel_restart(loaded)
        loaded.state = ExtensionState.FAILED  # from here on the end of its process is expected
        await self._publish()
        await self._end(loaded)
        self._tell(ExtensionEventKind.UNLOADED, loaded, "")

    async def set_on_failure(self, name: str, on_failure: FailureMode) -> ExtensionInfo:
        """Change what happens to frames while the extension has failed. KeyError if unknown.

        The mode belongs to a channel's whole life, so a fresh process on a channel of its own takes over:
        frames always meet one or the other. Raises ExtensionLoadError when it cannot start; then nothing
        changed.
        """
        loaded = self._find(name)
        if on_failure == loaded.on_failure:
            return self._info(loaded)
        before, loaded.on_failure = loaded.on_failure, on_failure
        await self._cancel_restart(loaded)
        try:
            await self._start(loaded)
        except BaseException:
            loaded.on_failure = before
            if loaded.state is ExtensionState.FAILED:
                loaded.restarting = asyncio.get_running_loop().create_task(self._restart(loaded))
            raise
        return self._info(loaded)

    def get(self, name: str) -> ExtensionInfo:
        """One extension. KeyError if unknown."""
        return self._info(self._find(name))

    def list(self) -> list[ExtensionInfo]:
        """All, in the order in which a frame coming in meets them."""
        return [self._info(loaded) for loaded in self._loaded.values()]

    async def close(self) -> None:
        """Unload all."""
        for name in list(self._loaded):
            await self.unload(name)

    # What the datapath tells.

    def on_datapath_event(self, event: DatapathEvent) -> None:
        """To be given every event of the datapath; those about extensions are acted on."""
        if event.kind not in (EventKind.EXTENSION_FAILED, EventKind.EXTENSION_ERROR):
            return
        for loaded in self._loaded.values():
            if loaded.channel is not None and loaded.channel.id == event.subject:
                if event.kind is EventKind.EXTENSION_FAILED:
                    self._failed(loaded, event.text)
                else:
                    self._raised(loaded, event.text)

    # How it is done.

    async def _start(self, loaded: _Loaded) -> None:
        """Spawn a process on a channel of its own and put that into the datapath in place of the old one."""
        channel = ExtensionChannel.create(next(self._channel_ids), loaded.name, on_failure=loaded.on_failure)
        try:
            process, ready = await ExtensionProcess.spawn(
                channel, loaded.source, loaded.file_name, self._load_timeout
            )
            if self._loaded.get(loaded.name) is not loaded:
                await process.kill()
                raise ExtensionLoadError(f"extension {loaded.name} was unloaded while it was being loaded")
        except BaseException:
            channel.close()
            raise
        old_channel, old_process, old_ready, old_state = (
            loaded.channel,
            loaded.process,
            loaded.ready,
            loaded.state,
        )
        loaded.channel = dataclasses.replace(channel, passes=ready.passes)
        loaded.process, loaded.ready = process, ready
        loaded.state = ExtensionState.RUNNING
        loaded.running_since = time.monotonic()
        process.on_stale = lambda attribute: self._stale(loaded, attribute)
        process.ended.add_done_callback(lambda ended: self._process_ended(loaded, process, ended))
        try:
            await self._publish()
        except BaseException:
            # The datapath goes on with what it has.
            loaded.channel, loaded.process = old_channel, old_process
            loaded.ready, loaded.state = old_ready, old_state
            await process.kill()
            channel.close()
            raise
        if old_channel is not None:
            old_channel.close()
        if old_process is not None:
            await old_process.kill()

    async def _publish(self) -> None:
        """Give the datapath the channels as they are now."""
        async with self._publishing:
            await self._stack.set_extensions(
                [loaded.channel for loaded in self._loaded.values() if loaded.channel is not None]
            )

    async def _end(self, loaded: _Loaded) -> None:
        if loaded.process is not None:
            await loaded.process.kill()
            loaded.process = None
        if loaded.channel is not None:
            loaded.channel.close()
            loaded.channel = None

    async def _cancel_restart(self, loaded: _Loaded) -> None:
        restarting, loaded.restarting = loaded.restarting, None
        if restarting is not None:
            restarting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await restarting

    def _process_ended(self, loaded: _Loaded, process: ExtensionProcess, ended: asyncio.Future[str]) -> None:
        if loaded.process is process:
            self._failed(loaded, f"its process {ended.result()}")

    def _failed(self, loaded: _Loaded, why: str) -> None:
        if loaded.state is not ExtensionState.RUNNING or loaded.channel is None:
            return
        loaded.state = ExtensionState.FAILED
        loaded.detail = why
        with contextlib.suppress(KeyError):  # it failed before the datapath had it
            self._stack.fail_extension(loaded.channel.id, why)
        if time.monotonic() - loaded.running_since >= self._back_off.healthy:
            loaded.failures_in_a_row = 0
        loaded.failures_in_a_row += 1
        pause = self._back_off.pause(loaded.failures_in_a_row)
        self._tell(
            ExtensionEventKind.FAILED, loaded, f"{why}; fail-{loaded.on_failure}, new start in {pause:g} s"
        )
        loaded.restarting = asyncio.get_running_loop().create_task(self._restart(loaded))

    async def _restart(self, loaded: _Loaded) -> None:
        if loaded.process is not None:
            await loaded.process.kill()
            loaded.process = None
        while True:
            await asyncio.sleep(self._back_off.pause(loaded.failures_in_a_row))
            try:
                await self._start(loaded)
            except (ExtensionLoadError, OSError) as error:
                loaded.failures_in_a_row += 1
                loaded.detail = str(error)
                self._tell(ExtensionEventKind.RESTART_FAILED, loaded, str(error))
                continue
            loaded.restarts += 1
            loaded.restarting = None
            self._tell(ExtensionEventKind.RESTARTED, loaded, f"start number {loaded.restarts + 1}")
            return

    def _raised(self, loaded: _Loaded, text: str) -> None:
        """An extension that raises for every frame is worth one event per second."""
        loaded.errors += 1
        loaded.detail = text
        now = time.monotonic()
        if now - loaded.last_error_at < 1.0:
            loaded.errors_unsaid += 1
            return
        more = f" (and {loaded.errors_unsaid} more errors since)" if loaded.errors_unsaid else ""
        loaded.last_error_at, loaded.errors_unsaid = now, 0
        self._tell(ExtensionEventKind.ERROR, loaded, text + more)

    def _stale(self, loaded: _Loaded, attribute: str) -> None:
        _log.info("%s changed self.%s: cached verdicts are forgotten", loaded.name, attribute)
        self._stack.flush_flows()

    def _find(self, name: str) -> _Loaded:
        loaded = self._loaded.get(name)
        if loaded is None:
            raise KeyError(f"extension {name} is not loaded; loaded are: {', '.join(self._loaded) or 'none'}")
        return loaded

    def _tell(self, kind: ExtensionEventKind, loaded: _Loaded, text: str) -> None:
        _log.info("extension %s %s: %s", loaded.name, kind.value, text)
        self._on_event(ExtensionEvent(kind, loaded.name, text))

    def _info(self, loaded: _Loaded) -> ExtensionInfo:
        ready, process = loaded.ready, loaded.process
        return ExtensionInfo(
            name=loaded.name,
            file_name=loaded.file_name,
            class_name=ready.class_name if ready else "",
            kind=ready.kind if ready else "",
            passes=tuple(sorted(ready.passes)) if ready else (),
            on_failure=loaded.on_failure,
            state=loaded.state,
            detail=loaded.detail,
            pid=process.pid if process else 0,
            restarts=loaded.restarts,
            errors=loaded.errors,
            channel_id=loaded.channel.id if loaded.channel else 0,
            layers=ready.layers if ready else (),
            missing=ready.missing if ready else (),
            output=tuple(process.output) if process else (),
        )


def _read(path: Path) -> bytes:
    """One byte more than an extension may have is enough to refuse it."""
    with path.open("rb") as stream:
        return stream.read(MAX_SOURCE + 1)
