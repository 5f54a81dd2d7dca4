"""SwitchService, PortService, ExtensionService and TraceService."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sized
from typing import Any

from vswitch_api.v1 import (
    extension_pb2,
    extension_pb2_grpc,
    port_pb2,
    port_pb2_grpc,
    switch_pb2,
    switch_pb2_grpc,
    trace_pb2,
    trace_pb2_grpc,
)
from vswitchd.errors import invalid, precondition
from vswitchd.extensions import ExtensionManager
from vswitchd.partitions import PartitionManager
from vswitchd.portio import PortIo
from vswitchd.resources import mac_text, page
from vswitchd.switches import SwitchManager, SwitchRecord
from vswitchd.tracing import trace

MAX_BATCH = 1000


class SwitchServicer(switch_pb2_grpc.SwitchServiceServicer):
    """Switches, their MAC tables, their flows."""

    def __init__(
        self, switches: SwitchManager, partitions: PartitionManager, extensions: ExtensionManager
    ) -> None:
        self._switches = switches
        self._partitions = partitions
        self._extensions = extensions

    async def GetSwitch(
        self, request: switch_pb2.GetSwitchRequest, context: Any
    ) -> switch_pb2.GetSwitchResponse:
        record = self._switches.find(request.name)
        return switch_pb2.GetSwitchResponse(switch=self._switches.describe(record))

    async def ListSwitches(
        self, request: switch_pb2.ListSwitchesRequest, context: Any
    ) -> switch_pb2.ListSwitchesResponse:
        records, token = page(
            self._switches.records.values(),
            lambda record: (record.name,),
            request.page_size,
            request.page_token,
        )
        return switch_pb2.ListSwitchesResponse(
            switches=map(self._switches.describe, records), next_page_token=token
        )

    async def CreateSwitch(
        self, request: switch_pb2.CreateSwitchRequest, context: Any
    ) -> switch_pb2.CreateSwitchResponse:
        record = await self._switches.create(request.switch_id, request.switch)
        return switch_pb2.CreateSwitchResponse(switch=self._switches.describe(record))

    async def DeleteSwitch(
        self, request: switch_pb2.DeleteSwitchRequest, context: Any
    ) -> switch_pb2.DeleteSwitchResponse:
        record = self._switches.find(request.name)
        if request.force:
            await self._empty(record)
        async with self._switches.lock:
            record = self._switches.find(request.name)
            if record.ports or record.extensions:
                ports, extensions = (
                    _counted(record.ports, "port"),
                    _counted(record.extensions, "extension"),
                )
                raise precondition(
                    record.name,
                    f"{record.name} has {ports} and {extensions}",
                    reason="SWITCH_NOT_EMPTY",
                    remedy="delete them first, or delete the switch with `force`",
                )
            await self._switches.remove(record)
        return switch_pb2.DeleteSwitchResponse()

    async def _empty(self, record: SwitchRecord) -> None:
        for extension in list(record.extensions.values()):
            await self._extensions.delete(extension.message.name)
        for port in list(record.ports.values()):
            if port.owner.startswith("partitions/"):
                await self._partitions.delete_nic(port.owner)
        async with self._switches.lock:
            for port in list(record.ports.values()):
                await self._switches.remove_port(port)

    async def ListMacEntries(
        self, request: switch_pb2.ListMacEntriesRequest, context: Any
    ) -> switch_pb2.ListMacEntriesResponse:
        record = self._switches.find(request.parent, "parent")
        names = {port.number: port.name for port in record.ports.values()}
        entries, token = page(
            record.datapath.mac_table(),
            lambda entry: (mac_text(entry.mac), entry.vlan_id),
            request.page_size,
            request.page_token,
        )
        return switch_pb2.ListMacEntriesResponse(
            entries=[
                switch_pb2.MacEntry(mac=mac_text(entry.mac), port=names.get(entry.port_id, ""))
                for entry in entries
            ],
            next_page_token=token,
        )

    async def ListFlows(
        self, request: switch_pb2.ListFlowsRequest, context: Any
    ) -> switch_pb2.ListFlowsResponse:
        record = self._switches.find(request.parent, "parent")
        flows = [
            switch_pb2.Flow(
                match=",".join(f"{name}={value}" for name, value in flow.match.items()),
                action=",".join(flow.actions),
                packets=flow.packets,
                bytes=flow.bytes,
            )
            for flow in record.datapath.flows()
        ]
        chosen, token = page(flows, lambda flow: (flow.match,), request.page_size, request.page_token)
        return switch_pb2.ListFlowsResponse(flows=chosen, next_page_token=token)

    async def FlushFlows(
        self, request: switch_pb2.FlushFlowsRequest, context: Any
    ) -> switch_pb2.FlushFlowsResponse:
        self._switches.find(request.parent, "parent").datapath.flush_flows()
        return switch_pb2.FlushFlowsResponse()


class PortServicer(port_pb2_grpc.PortServiceServicer):
    """Ports and frames in and out of them."""

    def __init__(self, switches: SwitchManager, partitions: PartitionManager) -> None:
        self._switches = switches
        self._partitions = partitions
        self._io = PortIo(switches)

    async def GetPort(self, request: port_pb2.GetPortRequest, context: Any) -> port_pb2.GetPortResponse:
        port = self._switches.find_port(request.name)
        return port_pb2.GetPortResponse(port=self._switches.describe_port(port))

    async def ListPorts(self, request: port_pb2.ListPortsRequest, context: Any) -> port_pb2.ListPortsResponse:
        ports, token = page(
            (port for record in self._switches.of_parent(request.parent) for port in record.ports.values()),
            lambda port: (port.name,),
            request.page_size,
            request.page_token,
        )
        return port_pb2.ListPortsResponse(
            ports=map(self._switches.describe_port, ports), next_page_token=token
        )

    async def CreatePort(
        self, request: port_pb2.CreatePortRequest, context: Any
    ) -> port_pb2.CreatePortResponse:
        (port,) = await self._switches.create_ports([request])
        return port_pb2.CreatePortResponse(port=self._switches.describe_port(port))

    async def BatchCreatePorts(
        self, request: port_pb2.BatchCreatePortsRequest, context: Any
    ) -> port_pb2.BatchCreatePortsResponse:
        if len(request.requests) > MAX_BATCH:
            raise invalid("requests", f"{len(request.requests)}; at most {MAX_BATCH} are taken")
        self._switches.find(request.parent, "parent")
        ports = await self._switches.create_ports(request.requests, request.parent)
        return port_pb2.BatchCreatePortsResponse(ports=map(self._switches.describe_port, ports))

    async def UpdatePort(
        self, request: port_pb2.UpdatePortRequest, context: Any
    ) -> port_pb2.UpdatePortResponse:
        port = await self._switches.update_port(request)
        return port_pb2.UpdatePortResponse(port=self._switches.describe_port(port))

    async def DeletePort(
        self, request: port_pb2.DeletePortRequest, context: Any
    ) -> port_pb2.DeletePortResponse:
        port = self._switches.find_port(request.name)
        if request.force and port.owner.startswith("partitions/"):
            with_nic = port.made_by_nic
            await self._partitions.delete_nic(port.owner)
            if with_nic:
                return port_pb2.DeletePortResponse()
        async with self._switches.lock:
            await self._switches.remove_port(port)
        return port_pb2.DeletePortResponse()

    async def InjectFrames(
        self, requests: AsyncIterator[port_pb2.InjectFramesRequest], context: Any
    ) -> port_pb2.InjectFramesResponse:
        return await self._io.inject(requests)

    async def PortIo(
        self, requests: AsyncIterator[port_pb2.PortIoRequest], context: Any
    ) -> AsyncIterator[port_pb2.PortIoResponse]:
        async for response in self._io.stream(requests):
            yield response


class ExtensionServicer(extension_pb2_grpc.ExtensionServiceServicer):
    """Extensions."""

    def __init__(self, switches: SwitchManager, extensions: ExtensionManager) -> None:
        self._switches = switches
        self._extensions = extensions

    async def GetExtension(
        self, request: extension_pb2.GetExtensionRequest, context: Any
    ) -> extension_pb2.GetExtensionResponse:
        described = self._extensions.describe(*self._extensions.find(request.name))
        return extension_pb2.GetExtensionResponse(extension=described)

    async def ListExtensions(
        self, request: extension_pb2.ListExtensionsRequest, context: Any
    ) -> extension_pb2.ListExtensionsResponse:
        found, token = page(
            (
                (switch, record)
                for switch in self._switches.of_parent(request.parent)
                for record in switch.extensions.values()
            ),
            lambda pair: (pair[0].name, pair[1].position),
            request.page_size,
            request.page_token,
        )
        return extension_pb2.ListExtensionsResponse(
            extensions=[self._extensions.describe(*pair) for pair in found], next_page_token=token
        )

    async def CreateExtension(
        self, request: extension_pb2.CreateExtensionRequest, context: Any
    ) -> extension_pb2.CreateExtensionResponse:
        return extension_pb2.CreateExtensionResponse(extension=await self._extensions.create(request))

    async def UpdateExtension(
        self, request: extension_pb2.UpdateExtensionRequest, context: Any
    ) -> extension_pb2.UpdateExtensionResponse:
        return extension_pb2.UpdateExtensionResponse(extension=await self._extensions.update(request))

    async def DeleteExtension(
        self, request: extension_pb2.DeleteExtensionRequest, context: Any
    ) -> extension_pb2.DeleteExtensionResponse:
        await self._extensions.delete(request.name)
        return extension_pb2.DeleteExtensionResponse()


class TraceServicer(trace_pb2_grpc.TraceServiceServicer):
    """Traces."""

    def __init__(self, switches: SwitchManager) -> None:
        self._switches = switches

    async def Trace(self, request: trace_pb2.TraceRequest, context: Any) -> trace_pb2.TraceResponse:
        return await trace(self._switches, request)


def _counted(things: Sized, word: str) -> str:
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"
