"""What all parts of the daemon share: its configuration, its store, its watchers."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from google.protobuf.timestamp_pb2 import Timestamp

from vswitch_api.v1 import common_pb2
from vswitch_wire.engine import Engine, check_engine
from vswitchd.access import Role
from vswitchd.errors import ApiError, invalid
from vswitchd.rundir import RunDir
from vswitchd.store import Row, Store
from vswitchd.watching import Resource, WatchHub


@dataclass(frozen=True)
class Config:
    """What the command line said."""

    run_dir: RunDir
    socket: Path
    engine: Engine
    roles: Mapping[int, Role] = field(default_factory=dict)
    started_by: str = ""


@dataclass
class Core:
    """Shared by the managers of one daemon."""

    config: Config
    store: Store
    hub: WatchHub

    def engine_of(self, value: common_pb2.Engine.ValueType, field_name: str) -> Engine:
        """The engine that a request asked for, or the daemon's default."""
        if value == common_pb2.ENGINE_UNSPECIFIED:
            return self.config.engine
        engine: Engine = "native" if value == common_pb2.ENGINE_NATIVE else "python"
        try:
            return check_engine(engine)
        except RuntimeError as error:
            raise invalid(field_name, str(error)) from None

    async def save(self, resource: Resource, private: dict[str, object] | None = None) -> None:
        """Stores a resource as it is now."""
        kind = type(resource).DESCRIPTOR.name.lower()
        await self.store.put(Row(resource.name, kind, resource.SerializeToString(), private or {}))


def engine_value(engine: Engine) -> common_pb2.Engine.ValueType:
    return common_pb2.ENGINE_NATIVE if engine == "native" else common_pb2.ENGINE_PYTHON


def new_uid() -> str:
    return str(uuid.uuid4())


def now() -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(datetime.now(UTC))
    return stamp


__all__ = ["ApiError", "Config", "Core", "engine_value", "new_uid", "now"]
