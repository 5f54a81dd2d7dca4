"""Who may do what: roles, the role that each method needs, and the role of each user."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from vswitch_api.v1 import daemon_pb2


class Role(IntEnum):
    """Each role may do what the smaller ones may. The values are the API's."""

    NONE = daemon_pb2.ROLE_UNSPECIFIED
    VIEWER = daemon_pb2.ROLE_VIEWER
    OPERATOR = daemon_pb2.ROLE_OPERATOR
    ADMIN = daemon_pb2.ROLE_ADMIN


# Every method of the API, by the least role that may call it. A method that is missing here is for nobody.
METHOD_ROLES: Mapping[str, Role] = {
    f"/vswitch.v1.{service}/{method}": role
    for role, services in {
        Role.VIEWER: {
            "SwitchService": "GetSwitch ListSwitches ListMacEntries ListFlows",
            "PortService": "GetPort ListPorts",
            "NicService": "GetNic ListNics",
            "PartitionService": "GetPartition ListPartitions",
            "ExtensionService": "GetExtension ListExtensions",
            "CaptureService": "GetCapture ListCaptures",
            "TraceService": "Trace",
            "DaemonService": "GetInfo",
            "WatchService": "Watch",
        },
        Role.OPERATOR: {
            "SwitchService": "FlushFlows",
            "PortService": "UpdatePort InjectFrames PortIo",
            "NicService": "UpdateNic",
            "PartitionService": "UpdatePartition StartPartition StopPartition SyncPartitionTime Exec Console",
            "ExtensionService": "UpdateExtension",
            "CaptureService": "Capture DeleteCapture",
        },
        Role.ADMIN: {
            "SwitchService": "CreateSwitch DeleteSwitch",
            "PortService": "CreatePort BatchCreatePorts DeletePort",
            "NicService": "CreateNic BatchCreateNics DeleteNic",
            "PartitionService": "CreatePartition DeletePartition",
            "ExtensionService": "CreateExtension DeleteExtension",
            "DaemonService": "Shutdown",
        },
    }.items()
    for service, methods in services.items()
    for method in methods.split()
}

# Served beside the API, to whoever has a role at all.
OPEN_PREFIXES = ("/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/")


def needed_role(method: str) -> Role | None:
    """The least role that may call `method` ("/vswitch.v1.PortService/GetPort"); None when nobody may."""
    if method.startswith(OPEN_PREFIXES):
        return Role.VIEWER
    return METHOD_ROLES.get(method)


@dataclass(frozen=True)
class AccessPolicy:
    """The role of each user: the daemon's own and root are admins, `granted` adds others."""

    granted: Mapping[int, Role] = field(default_factory=dict)
    owner: int = field(default_factory=os.geteuid)

    def role_of(self, uid: int) -> Role:
        if uid in (self.owner, 0):
            return Role.ADMIN
        return self.granted.get(uid, Role.NONE)
