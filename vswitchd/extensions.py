"""Loading, listing and unloading extensions of switches; the processes are `vswitch.extension.host`'s."""

from __future__ import annotations

from collections.abc import Iterator

from vswitch.extension.host import ExtensionLoadError, ExtensionState
from vswitch.upcall import FailureMode
from vswitch_api.v1 import extension_pb2
from vswitchd.core import Core, new_uid, now
from vswitchd.errors import already_exists, exhausted, invalid, not_found, unavailable
from vswitchd.resources import check_id, check_labels, check_mask, parse
from vswitchd.switches import ExtensionRecord, SwitchManager, SwitchRecord

MAX_EXTENSIONS = 32
MAX_SOURCE = 1 << 20

KINDS = {
    "capture": extension_pb2.EXTENSION_KIND_CAPTURE,
    "filter": extension_pb2.EXTENSION_KIND_FILTER,
    "forwarding": extension_pb2.EXTENSION_KIND_FORWARDING,
}
STATES = {
    ExtensionState.STARTING: extension_pb2.EXTENSION_STATE_STARTING,
    ExtensionState.RUNNING: extension_pb2.EXTENSION_STATE_RUNNING,
    ExtensionState.FAILED: extension_pb2.EXTENSION_STATE_FAILED,
}


class ExtensionManager:
    """The extensions of all switches."""

    def __init__(self, core: Core, switches: SwitchManager) -> None:
        self._core = core
        self._switches = switches
        switches.on_extension_change = self._changed

    def find(self, name: str, field_name: str = "name") -> tuple[SwitchRecord, ExtensionRecord]:
        switch_id, extension_id = parse(field_name, name, "switches", "extensions")
        switch = self._switches.find(f"switches/{switch_id}", field_name)
        record = switch.extensions.get(extension_id)
        if record is None:
            raise not_found(name, "see `vswitch extension list`")
        return switch, record

    def describe(self, switch: SwitchRecord, record: ExtensionRecord) -> extension_pb2.Extension:
        message = extension_pb2.Extension()
        message.CopyFrom(record.message)
        message.ClearField("source")
        try:
            info = switch.host.get(_leaf(record.message.name))
        except KeyError:
            message.state = extension_pb2.EXTENSION_STATE_FAILED
            message.detail = "it could not be loaded again after the daemon's restart"
            return message
        message.kind = KINDS.get(info.kind, extension_pb2.EXTENSION_KIND_UNSPECIFIED)
        message.state = STATES[info.state]
        message.detail = info.detail
        message.pid = info.pid
        message.restarts = info.restarts
        return message

    def snapshot(self) -> Iterator[extension_pb2.Extension]:
        for switch in self._switches.records.values():
            for record in switch.extensions.values():
                yield self.describe(switch, record)

    async def create(self, request: extension_pb2.CreateExtensionRequest) -> extension_pb2.Extension:
        extension_id = check_id("extension_id", request.extension_id)
        wanted = request.extension
        check_labels("extension.labels", wanted.labels)
        if not wanted.source:
            raise invalid("extension.source", "empty", "send the text of a plug-in file")
        if len(wanted.source) > MAX_SOURCE:
            raise invalid("extension.source", f"{len(wanted.source)} bytes; at most {MAX_SOURCE} are taken")
        async with self._switches.lock:
            switch = self._switches.find(request.parent, "parent")
            name = f"{switch.name}/extensions/{extension_id}"
            if extension_id in switch.extensions:
                raise already_exists(name)
            if len(switch.extensions) >= MAX_EXTENSIONS:
                raise exhausted(f"{switch.name} has {MAX_EXTENSIONS} extensions", "unload one")
            message = extension_pb2.Extension(
                name=name,
                uid=new_uid(),
                source=wanted.source,
                file_name=_leaf(wanted.file_name) or f"{extension_id}.py",
                on_failure=wanted.on_failure or extension_pb2.ON_FAILURE_OPEN,
                create_time=now(),
                labels=wanted.labels,
            )
            record = ExtensionRecord(message, next(switch.positions))
            await self._load(switch, record)
            switch.extensions[extension_id] = record
            await self._core.save(message, {"position": record.position})
            described = self.describe(switch, record)
            self._core.hub.added(described)
            self._core.hub.modified(self._switches.describe(switch))
        return described

    async def _load(self, switch: SwitchRecord, record: ExtensionRecord) -> None:
        message = record.message
        try:
            await switch.host.load(
                _leaf(message.name), message.source, message.file_name, on_failure=_mode(message.on_failure)
            )
        except ExtensionLoadError as error:
            raise invalid(
                "extension.source", str(error), "correct the plug-in; see examples/extensions/"
            ) from None

    async def update(self, request: extension_pb2.UpdateExtensionRequest) -> extension_pb2.Extension:
        check_mask(request.update_mask.paths, ["on_failure"])
        if request.extension.on_failure == extension_pb2.ON_FAILURE_UNSPECIFIED:
            raise invalid("extension.on_failure", "unspecified", "say open or closed")
        async with self._switches.lock:
            switch, record = self.find(request.extension.name, "extension.name")
            name = record.message.name
            try:
                await switch.host.set_on_failure(_leaf(name), _mode(request.extension.on_failure))
            except (ExtensionLoadError, KeyError) as error:
                raise unavailable(
                    name,
                    f"{name} could not be started anew, and goes on as it was: {error.args[0]}",
                    reason="EXTENSION_DID_NOT_START",
                    remedy="unload it and load it again",
                ) from None
            record.message.on_failure = request.extension.on_failure
            await self._core.save(record.message, {"position": record.position})
            described = self.describe(switch, record)
            self._core.hub.modified(described)
        return described

    async def delete(self, name: str) -> None:
        async with self._switches.lock:
            switch, record = self.find(name)
            described = self.describe(switch, record)
            del switch.extensions[_leaf(name)]
            await self._core.store.delete(name)
            if any(info.name == _leaf(name) for info in switch.host.list()):
                await switch.host.unload(_leaf(name))
            self._core.hub.removed(described)
            self._core.hub.modified(self._switches.describe(switch))

    def _changed(self, name: str) -> None:
        switch_id, extension_id = parse("name", name, "switches", "extensions")
        switch = self._switches.records.get(switch_id)
        record = switch.extensions.get(extension_id) if switch is not None else None
        if switch is not None and record is not None:
            self._core.hub.modified(self.describe(switch, record))

    async def restore(self) -> None:
        """Loads again what the store holds, in the old order."""
        rows = await self._core.store.load("extension")
        for row in sorted(rows, key=lambda row: int(row.private.get("position", 0))):
            message = extension_pb2.Extension.FromString(row.body)
            switch_id, extension_id = parse("name", message.name, "switches", "extensions")
            switch = self._switches.records.get(switch_id)
            if switch is None:
                continue
            record = ExtensionRecord(message, next(switch.positions))
            switch.extensions[extension_id] = record
            try:
                await self._load(switch, record)
            except Exception as error:
                self._core.hub.event("extension_lost", message.name, str(error))


def _leaf(name: str) -> str:
    return name.rpartition("/")[2]


def _mode(value: extension_pb2.OnFailure.ValueType) -> FailureMode:
    return "closed" if value == extension_pb2.ON_FAILURE_CLOSED else "open"
