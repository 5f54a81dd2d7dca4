"""The hub behind Watch: every change of state is published once and reaches each watcher in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import UTC, datetime

import grpc
from google.protobuf.message import Message

from vswitch_api.v1 import extension_pb2, nic_pb2, partition_pb2, port_pb2, switch_pb2, watch_pb2
from vswitchd.errors import ApiError

log = logging.getLogger("vswitchd.event")

# Changes that wait for one watcher; a lab of a thousand ports comes up within it.
QUEUE_LIMIT = 8192

Resource = switch_pb2.Switch | port_pb2.Port | nic_pb2.Nic | partition_pb2.Partition | extension_pb2.Extension


def change_of(kind: watch_pb2.ChangeType.ValueType, resource: Resource) -> watch_pb2.ResourceChange:
    """A change that carries a copy of `resource`."""
    change = watch_pb2.ResourceChange(type=kind, name=resource.name)
    holder: Message = getattr(change, type(resource).DESCRIPTOR.name.lower())
    holder.CopyFrom(resource)
    return change


class WatchHub:
    """Publishes changes and events; `snapshot` gives the resources that exist now."""

    def __init__(self, snapshot: Callable[[], Iterable[Resource]]) -> None:
        self._snapshot = snapshot
        self._watchers: set[asyncio.Queue[watch_pb2.WatchResponse]] = set()
        self._revision = 0

    def added(self, resource: Resource) -> None:
        self._publish(watch_pb2.WatchResponse(change=change_of(watch_pb2.CHANGE_TYPE_ADDED, resource)))

    def modified(self, resource: Resource) -> None:
        self._publish(watch_pb2.WatchResponse(change=change_of(watch_pb2.CHANGE_TYPE_MODIFIED, resource)))

    def removed(self, resource: Resource) -> None:
        self._publish(watch_pb2.WatchResponse(change=change_of(watch_pb2.CHANGE_TYPE_REMOVED, resource)))

    def event(self, kind: str, resource: str, text: str) -> None:
        """Something worth a line: to the log and to all watchers."""
        log.info(kind, extra={"resource": resource, "text": text})
        event = watch_pb2.Event(kind=kind, resource=resource, text=text)
        event.time.FromDatetime(datetime.now(UTC))
        self._publish(watch_pb2.WatchResponse(event=event))

    def _publish(self, response: watch_pb2.WatchResponse) -> None:
        self._revision += 1
        response.revision = self._revision
        for queue in list(self._watchers):
            if queue.qsize() >= QUEUE_LIMIT:
                # It has read nothing for long: its stream ends when it gets to the mark.
                self._watchers.discard(queue)
                queue.put_nowait(watch_pb2.WatchResponse())
            else:
                queue.put_nowait(response)

    async def watch(self, request: watch_pb2.WatchRequest) -> AsyncIterator[watch_pb2.WatchResponse]:
        """The answer stream of one watcher."""
        prefixes = tuple(request.prefixes) or ("",)
        queue: asyncio.Queue[watch_pb2.WatchResponse] = asyncio.Queue()
        # No await between the snapshot and the subscription: nothing is missed, nothing comes twice.
        existing = [] if request.exclude_snapshot else list(self._snapshot())
        revision = self._revision
        self._watchers.add(queue)
        try:
            for resource in existing:
                if resource.name.startswith(prefixes):
                    yield watch_pb2.WatchResponse(
                        revision=revision, change=change_of(watch_pb2.CHANGE_TYPE_ADDED, resource)
                    )
            yield watch_pb2.WatchResponse(revision=revision, synced=watch_pb2.Synced())
            while True:
                response = await queue.get()
                kind = response.WhichOneof("message")
                if kind is None:
                    raise ApiError(
                        grpc.StatusCode.RESOURCE_EXHAUSTED,
                        f"this watcher fell more than {QUEUE_LIMIT} changes behind",
                        reason="WATCHER_TOO_SLOW",
                        remedy="start the watch anew and read its snapshot",
                    )
                name = response.change.name if kind == "change" else response.event.resource
                if name.startswith(prefixes):
                    yield response
        finally:
            self._watchers.discard(queue)
