"""The daemon's gRPC servers: one per role on a socket of its own, sharing what does the work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from vswitch_api.v1 import (
    capture_pb2_grpc,
    daemon_pb2_grpc,
    extension_pb2_grpc,
    nic_pb2_grpc,
    partition_pb2_grpc,
    port_pb2_grpc,
    switch_pb2_grpc,
    trace_pb2_grpc,
    watch_pb2_grpc,
)
from vswitchd.access import Role
from vswitchd.interceptor import RoleInterceptor
from vswitchd.services.daemon import CaptureServicer, DaemonServicer, WatchServicer
from vswitchd.services.partitions import NicServicer, PartitionServicer
from vswitchd.services.switches import (
    ExtensionServicer,
    PortServicer,
    SwitchServicer,
    TraceServicer,
)

# 256 frames of 64 KiB and a little; a request beyond this is refused by gRPC.
MAX_MESSAGE = 18 << 20
SERVICES = tuple(
    f"vswitch.v1.{name}Service"
    for name in (
        "Capture",
        "Daemon",
        "Extension",
        "Nic",
        "Partition",
        "Port",
        "Switch",
        "Trace",
        "Watch",
    )
)


class Servicers:
    """What does the work, shared by the servers of all roles but for the daemon's own service."""

    def __init__(
        self,
        capture: CaptureServicer,
        daemon: Callable[[Role], DaemonServicer],
        extension: ExtensionServicer,
        nic: NicServicer,
        partition: PartitionServicer,
        port: PortServicer,
        switch: SwitchServicer,
        trace: TraceServicer,
        watch: WatchServicer,
    ) -> None:
        self.capture = capture
        self.daemon = daemon
        self.extension = extension
        self.nic = nic
        self.partition = partition
        self.port = port
        self.switch = switch
        self.trace = trace
        self.watch = watch


async def serve(role: Role, path: Path, servicers: Servicers) -> grpc.aio.Server:
    """A started server for callers of `role` on a socket at `path`."""
    server = grpc.aio.server(
        interceptors=[RoleInterceptor(role)],
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            ("grpc.max_concurrent_streams", 256),
            ("grpc.so_reuseport", 0),
        ],
    )
    capture_pb2_grpc.add_CaptureServiceServicer_to_server(servicers.capture, server)
    daemon_pb2_grpc.add_DaemonServiceServicer_to_server(servicers.daemon(role), server)
    extension_pb2_grpc.add_ExtensionServiceServicer_to_server(servicers.extension, server)
    nic_pb2_grpc.add_NicServiceServicer_to_server(servicers.nic, server)
    partition_pb2_grpc.add_PartitionServiceServicer_to_server(servicers.partition, server)
    port_pb2_grpc.add_PortServiceServicer_to_server(servicers.port, server)
    switch_pb2_grpc.add_SwitchServiceServicer_to_server(servicers.switch, server)
    trace_pb2_grpc.add_TraceServiceServicer_to_server(servicers.trace, server)
    watch_pb2_grpc.add_WatchServiceServicer_to_server(servicers.watch, server)
    checker = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    for name in ("", *SERVICES):
        await checker.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    await asyncio.to_thread(path.unlink, missing_ok=True)
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    return server
