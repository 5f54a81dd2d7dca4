"""DaemonService, WatchService and CaptureService."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from importlib import metadata
from typing import Any

import vswitch_native
from vswitch_api.v1 import (
    capture_pb2,
    capture_pb2_grpc,
    daemon_pb2,
    daemon_pb2_grpc,
    watch_pb2,
    watch_pb2_grpc,
)
from vswitchd.access import Role
from vswitchd.captures import CaptureManager
from vswitchd.core import Config, engine_value, now
from vswitchd.partitions import Restored
from vswitchd.resources import page
from vswitchd.watching import WatchHub


class DaemonServicer(daemon_pb2_grpc.DaemonServiceServicer):
    """The daemon itself, as the callers of one role see it."""

    def __init__(
        self, role: Role, config: Config, restored: Restored, shut_down: Callable[[bool], None]
    ) -> None:
        self._role = role
        self._config = config
        self._restored = restored
        self._shut_down = shut_down
        self._started = now()

    async def GetInfo(self, request: daemon_pb2.GetInfoRequest, context: Any) -> daemon_pb2.GetInfoResponse:
        return daemon_pb2.GetInfoResponse(
            version=version(),
            pid=os.getpid(),
            default_engine=engine_value(self._config.engine),
            native_missing=vswitch_native.WHY,
            run_dir=str(self._config.run_dir.root),
            start_time=self._started,
            role=daemon_pb2.Role.ValueType(self._role),
            restore=daemon_pb2.RestoreReport(
                reattached=sorted(self._restored.reattached),
                gone=sorted(self._restored.gone),
                orphans_ended=self._restored.orphans_ended,
            ),
            started_by=self._config.started_by,
            socket_path=str(self._config.socket),
        )

    async def Shutdown(
        self, request: daemon_pb2.ShutdownRequest, context: Any
    ) -> daemon_pb2.ShutdownResponse:
        self._shut_down(request.stop_guests)
        return daemon_pb2.ShutdownResponse()


class WatchServicer(watch_pb2_grpc.WatchServiceServicer):
    """Watches."""

    def __init__(self, hub: WatchHub) -> None:
        self._hub = hub

    async def Watch(
        self, request: watch_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[watch_pb2.WatchResponse]:
        async for response in self._hub.watch(request):
            yield response


class CaptureServicer(capture_pb2_grpc.CaptureServiceServicer):
    """Captures."""

    def __init__(self, captures: CaptureManager) -> None:
        self._captures = captures

    async def Capture(
        self, request: capture_pb2.CaptureRequest, context: Any
    ) -> AsyncIterator[capture_pb2.CaptureResponse]:
        async for response in self._captures.stream(request):
            yield response

    async def GetCapture(
        self, request: capture_pb2.GetCaptureRequest, context: Any
    ) -> capture_pb2.GetCaptureResponse:
        return capture_pb2.GetCaptureResponse(capture=self._captures.find(request.name).describe())

    async def ListCaptures(
        self, request: capture_pb2.ListCapturesRequest, context: Any
    ) -> capture_pb2.ListCapturesResponse:
        records, token = page(
            self._captures.records.values(),
            lambda record: (int(record.message.name.rpartition("/")[2]),),
            request.page_size,
            request.page_token,
        )
        return capture_pb2.ListCapturesResponse(
            captures=[record.describe() for record in records], next_page_token=token
        )

    async def DeleteCapture(
        self, request: capture_pb2.DeleteCaptureRequest, context: Any
    ) -> capture_pb2.DeleteCaptureResponse:
        self._captures.stop(request.name)
        return capture_pb2.DeleteCaptureResponse()


def version() -> str:
    """The installed version of vswitch."""
    try:
        return metadata.version("vswitch")
    except metadata.PackageNotFoundError:
        return "0+source"
