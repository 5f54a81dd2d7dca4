"""PartitionService and NicService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from vswitch_api.v1 import nic_pb2, nic_pb2_grpc, partition_pb2, partition_pb2_grpc
from vswitchd.consoles import ConsoleJoiner
from vswitchd.errors import invalid
from vswitchd.executing import Executor
from vswitchd.partitions import PartitionManager
from vswitchd.resources import page

MAX_BATCH = 1000


class PartitionServicer(partition_pb2_grpc.PartitionServiceServicer):
    """Partitions, commands in them, and their consoles."""

    def __init__(self, partitions: PartitionManager) -> None:
        self._partitions = partitions
        self._executor = Executor(partitions)
        self._joiner = ConsoleJoiner(partitions)

    async def GetPartition(
        self, request: partition_pb2.GetPartitionRequest, context: Any
    ) -> partition_pb2.GetPartitionResponse:
        record = self._partitions.find(request.name)
        return partition_pb2.GetPartitionResponse(partition=record.describe(whole=True))

    async def ListPartitions(
        self, request: partition_pb2.ListPartitionsRequest, context: Any
    ) -> partition_pb2.ListPartitionsResponse:
        records, token = page(
            self._partitions.records.values(),
            lambda record: (record.name,),
            request.page_size,
            request.page_token,
        )
        return partition_pb2.ListPartitionsResponse(
            partitions=[record.describe() for record in records], next_page_token=token
        )

    async def CreatePartition(
        self, request: partition_pb2.CreatePartitionRequest, context: Any
    ) -> partition_pb2.CreatePartitionResponse:
        record = await self._partitions.create(request)
        return partition_pb2.CreatePartitionResponse(partition=record.describe())

    async def UpdatePartition(
        self, request: partition_pb2.UpdatePartitionRequest, context: Any
    ) -> partition_pb2.UpdatePartitionResponse:
        record = await self._partitions.update(request)
        return partition_pb2.UpdatePartitionResponse(partition=record.describe())

    async def StartPartition(
        self, request: partition_pb2.StartPartitionRequest, context: Any
    ) -> partition_pb2.StartPartitionResponse:
        record = await self._partitions.start(request.name)
        return partition_pb2.StartPartitionResponse(partition=record.describe())

    async def StopPartition(
        self, request: partition_pb2.StopPartitionRequest, context: Any
    ) -> partition_pb2.StopPartitionResponse:
        seconds = request.timeout.ToTimedelta().total_seconds() if request.HasField("timeout") else None
        record = await self._partitions.stop(request.name, seconds)
        return partition_pb2.StopPartitionResponse(partition=record.describe())

    async def DeletePartition(
        self, request: partition_pb2.DeletePartitionRequest, context: Any
    ) -> partition_pb2.DeletePartitionResponse:
        await self._partitions.delete(request.name, force=request.force)
        return partition_pb2.DeletePartitionResponse()

    async def SyncPartitionTime(
        self, request: partition_pb2.SyncPartitionTimeRequest, context: Any
    ) -> partition_pb2.SyncPartitionTimeResponse:
        await self._partitions.sync_time(request.name)
        return partition_pb2.SyncPartitionTimeResponse()

    async def Exec(
        self, requests: AsyncIterator[partition_pb2.ExecRequest], context: Any
    ) -> AsyncIterator[partition_pb2.ExecResponse]:
        async for response in self._executor.stream(requests):
            yield response

    async def Console(
        self, requests: AsyncIterator[partition_pb2.ConsoleRequest], context: Any
    ) -> AsyncIterator[partition_pb2.ConsoleResponse]:
        async for response in self._joiner.stream(requests):
            yield response


class NicServicer(nic_pb2_grpc.NicServiceServicer):
    """NICs of partitions."""

    def __init__(self, partitions: PartitionManager) -> None:
        self._partitions = partitions

    async def GetNic(self, request: nic_pb2.GetNicRequest, context: Any) -> nic_pb2.GetNicResponse:
        _, nic = self._partitions.find_nic(request.name)
        return nic_pb2.GetNicResponse(nic=nic.describe(counters=True))

    async def ListNics(self, request: nic_pb2.ListNicsRequest, context: Any) -> nic_pb2.ListNicsResponse:
        nics, token = page(
            (nic for record in self._partitions.of_parent(request.parent) for nic in record.nics.values()),
            lambda nic: (nic.name,),
            request.page_size,
            request.page_token,
        )
        return nic_pb2.ListNicsResponse(nics=[nic.describe() for nic in nics], next_page_token=token)

    async def CreateNic(self, request: nic_pb2.CreateNicRequest, context: Any) -> nic_pb2.CreateNicResponse:
        nic = await self._partitions.create_nic(request)
        return nic_pb2.CreateNicResponse(nic=nic.describe())

    async def BatchCreateNics(
        self, request: nic_pb2.BatchCreateNicsRequest, context: Any
    ) -> nic_pb2.BatchCreateNicsResponse:
        if len(request.requests) > MAX_BATCH:
            raise invalid("requests", f"{len(request.requests)}; at most {MAX_BATCH} are taken")
        nics = await self._partitions.create_nics(request.requests)
        return nic_pb2.BatchCreateNicsResponse(nics=[nic.describe() for nic in nics])

    async def UpdateNic(self, request: nic_pb2.UpdateNicRequest, context: Any) -> nic_pb2.UpdateNicResponse:
        nic = await self._partitions.update_nic(request)
        return nic_pb2.UpdateNicResponse(nic=nic.describe())

    async def DeleteNic(self, request: nic_pb2.DeleteNicRequest, context: Any) -> nic_pb2.DeleteNicResponse:
        await self._partitions.delete_nic(request.name)
        return nic_pb2.DeleteNicResponse()
