"""The Console method: one caller's stream joined to a virtual machine's console."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from vswitch_api.v1 import partition_pb2
from vswitchd.console import ConsoleBusy, ConsoleLink
from vswitchd.errors import ApiError, invalid, precondition, unavailable
from vswitchd.kinds import require_kvm
from vswitchd.partitions import PartitionManager, PartitionRecord

MAX_INPUT_BYTES = 65536


class ConsoleJoiner:
    """Joins callers to consoles."""

    def __init__(self, partitions: PartitionManager) -> None:
        self._partitions = partitions

    async def stream(
        self, requests: AsyncIterator[partition_pb2.ConsoleRequest]
    ) -> AsyncIterator[partition_pb2.ConsoleResponse]:
        """The answer stream of one Console call."""
        iterator = aiter(requests)
        first = await anext(iterator, None)
        if first is None or first.WhichOneof("message") != "open":
            raise invalid("open", "the first request must open a console")
        record = self._partitions.find(first.open.partition, "open.partition")
        link = await _join(record, take_over=first.open.take_over)
        feeding = asyncio.create_task(_feed(iterator, link))
        # A caller that breaks the rules is told at once, not when its guest prints next.
        feeding.add_done_callback(lambda task: _end_if_failed(task, link))
        try:
            yield partition_pb2.ConsoleResponse(opened=partition_pb2.ConsoleOpened())
            async with contextlib.aclosing(link.output()) as output:
                async for data in output:
                    yield partition_pb2.ConsoleResponse(output=data)
            if feeding.done():
                feeding.result()
            yield partition_pb2.ConsoleResponse(end=partition_pb2.ConsoleEnd(detail=link.why))
        finally:
            feeding.cancel()
            await asyncio.wait([feeding])
            link.close()


def _end_if_failed(feeding: asyncio.Task[None], link: ConsoleLink) -> None:
    if not feeding.cancelled() and feeding.exception() is not None:
        link.end("its caller broke the rules")


async def _join(record: PartitionRecord, *, take_over: bool) -> ConsoleLink:
    side = require_kvm(record.message, record.side, "console")
    record.running()
    try:
        return await side.console.join(take_over=take_over)
    except ConsoleBusy:
        raise _busy(record) from None
    except OSError as error:
        raise unavailable(
            record.name,
            f"{record.name}: its console does not answer: {error.strerror or error}",
            reason="NO_CONSOLE",
            remedy=f"see `vswitch partition show {record.id}`",
        ) from None


def _busy(record: PartitionRecord) -> ApiError:
    return precondition(
        record.name,
        f"{record.name}: another caller is at its console",
        reason="CONSOLE_BUSY",
        remedy=f"end the other one with `vswitch partition console {record.id} --take-over`",
    )


async def _feed(requests: AsyncIterator[partition_pb2.ConsoleRequest], link: ConsoleLink) -> None:
    """Keys, until the caller has no more; it may go on reading."""
    async for request in requests:
        if request.WhichOneof("message") != "input":
            raise invalid("open", "a stream opens one console, once")
        if len(request.input) > MAX_INPUT_BYTES:
            raise invalid("input", f"{len(request.input)} bytes; at most {MAX_INPUT_BYTES} are taken at once")
        await link.write(request.input)
