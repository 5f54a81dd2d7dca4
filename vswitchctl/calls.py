"""Every unary call of the API as a function that builds it; the synchronous and the asyncio client run them.

A `Call` is a request with its method and how to unpack the answer; a `ListCall` is followed through all its
pages. Names may be short ("s0/p0") or full ("switches/s0/ports/p0"), see `vswitchctl.names`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from vswitch_api.v1 import (
    capture_pb2,
    common_pb2,
    daemon_pb2,
    extension_pb2,
    nic_pb2,
    partition_pb2,
    port_pb2,
    switch_pb2,
    trace_pb2,
)
from vswitchctl import names

T = TypeVar("T")

# Starting a guest or an extension means starting a Python; a loaded machine takes its time.
SLOW_CALL_SECONDS = 60.0
# The longest google.protobuf.Duration.
MAX_DURATION_SECONDS = 315_576_000_000


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One unary call: `method` is "Service/Method", `timeout` seconds or None for the client's own."""

    method: str
    request: Message
    response: type[Message]
    unpack: Callable[[Any], T]
    timeout: float | None = None


@dataclass(frozen=True, slots=True)
class ListCall(Generic[T]):
    """A paged call: its request has `page_token`, its answer `next_page_token`."""

    method: str
    request: Message
    response: type[Message]
    unpack: Callable[[Any], Iterable[T]]


def engine_value(engine: str | None) -> common_pb2.Engine.ValueType:
    """`native`, `python` or None (the daemon's default) as the API's value; ValueError for anything else."""
    values = {
        None: common_pb2.ENGINE_UNSPECIFIED,
        "native": common_pb2.ENGINE_NATIVE,
        "python": common_pb2.ENGINE_PYTHON,
    }
    if engine not in values:
        raise ValueError(f"engine {engine!r} is neither 'native' nor 'python'")
    return values[engine]


# --- switches -----------------------------------------------------------------------------------------------


def get_switch(name: str) -> Call[switch_pb2.Switch]:
    return Call(
        "SwitchService/GetSwitch",
        switch_pb2.GetSwitchRequest(name=names.switch(name)),
        switch_pb2.GetSwitchResponse,
        lambda response: response.switch,
    )


def list_switches() -> ListCall[switch_pb2.Switch]:
    return ListCall(
        "SwitchService/ListSwitches",
        switch_pb2.ListSwitchesRequest(),
        switch_pb2.ListSwitchesResponse,
        lambda response: response.switches,
    )


def create_switch(
    switch_id: str, *, engine: str | None = None, labels: Mapping[str, str] | None = None
) -> Call[switch_pb2.Switch]:
    """A switch with an engine of its own, or the daemon's."""
    return Call(
        "SwitchService/CreateSwitch",
        switch_pb2.CreateSwitchRequest(
            switch_id=switch_id,
            switch=switch_pb2.Switch(engine=engine_value(engine), labels=labels or {}),
        ),
        switch_pb2.CreateSwitchResponse,
        lambda response: response.switch,
    )


def delete_switch(name: str, *, force: bool = False) -> Call[None]:
    """`force` also deletes its ports, NICs and extensions."""
    return Call(
        "SwitchService/DeleteSwitch",
        switch_pb2.DeleteSwitchRequest(name=names.switch(name), force=force),
        switch_pb2.DeleteSwitchResponse,
        _nothing,
        timeout=SLOW_CALL_SECONDS if force else None,
    )


def list_mac_entries(switch: str) -> ListCall[switch_pb2.MacEntry]:
    return ListCall(
        "SwitchService/ListMacEntries",
        switch_pb2.ListMacEntriesRequest(parent=names.switch(switch)),
        switch_pb2.ListMacEntriesResponse,
        lambda response: response.entries,
    )


def list_flows(switch: str) -> ListCall[switch_pb2.Flow]:
    return ListCall(
        "SwitchService/ListFlows",
        switch_pb2.ListFlowsRequest(parent=names.switch(switch)),
        switch_pb2.ListFlowsResponse,
        lambda response: response.flows,
    )


def flush_flows(switch: str) -> Call[None]:
    return Call(
        "SwitchService/FlushFlows",
        switch_pb2.FlushFlowsRequest(parent=names.switch(switch)),
        switch_pb2.FlushFlowsResponse,
        _nothing,
    )


# --- ports --------------------------------------------------------------------------------------------------


def get_port(name: str) -> Call[port_pb2.Port]:
    return Call(
        "PortService/GetPort",
        port_pb2.GetPortRequest(name=names.port(name)),
        port_pb2.GetPortResponse,
        lambda response: response.port,
    )


def list_ports(switch: str = "-") -> ListCall[port_pb2.Port]:
    """The ports of one switch, or of all ("-")."""
    return ListCall(
        "PortService/ListPorts",
        port_pb2.ListPortsRequest(parent=names.switch(switch)),
        port_pb2.ListPortsResponse,
        lambda response: response.ports,
    )


def create_port(name: str, *, friendly_name: str = "") -> Call[port_pb2.Port]:
    return Call(
        "PortService/CreatePort",
        _create_port(name, friendly_name),
        port_pb2.CreatePortResponse,
        lambda response: response.port,
    )


def create_ports(switch: str, port_ids: Sequence[str]) -> Call[Sequence[port_pb2.Port]]:
    """All of them or, when one is refused, none."""
    parent = names.switch(switch)
    return Call(
        "PortService/BatchCreatePorts",
        port_pb2.BatchCreatePortsRequest(
            parent=parent,
            requests=[port_pb2.CreatePortRequest(parent=parent, port_id=port_id) for port_id in port_ids],
        ),
        port_pb2.BatchCreatePortsResponse,
        lambda response: list(response.ports),
    )


def update_port(name: str, *, friendly_name: str) -> Call[port_pb2.Port]:
    return Call(
        "PortService/UpdatePort",
        port_pb2.UpdatePortRequest(
            port=port_pb2.Port(name=names.port(name), friendly_name=friendly_name),
            update_mask=FieldMask(paths=["friendly_name"]),
        ),
        port_pb2.UpdatePortResponse,
        lambda response: response.port,
    )


def delete_port(name: str, *, force: bool = False) -> Call[None]:
    """`force` also deletes the NIC that is connected to it."""
    return Call(
        "PortService/DeletePort",
        port_pb2.DeletePortRequest(name=names.port(name), force=force),
        port_pb2.DeletePortResponse,
        _nothing,
        timeout=SLOW_CALL_SECONDS if force else None,
    )


# --- NICs ---------------------------------------------------------------------------------------------------


def get_nic(name: str) -> Call[nic_pb2.Nic]:
    return Call(
        "NicService/GetNic",
        nic_pb2.GetNicRequest(name=names.nic(name)),
        nic_pb2.GetNicResponse,
        lambda response: response.nic,
    )


def list_nics(partition: str = "-") -> ListCall[nic_pb2.Nic]:
    """The NICs of one partition, or of all ("-")."""
    return ListCall(
        "NicService/ListNics",
        nic_pb2.ListNicsRequest(parent=names.partition(partition)),
        nic_pb2.ListNicsResponse,
        lambda response: response.nics,
    )


def create_nic(
    name: str,
    *,
    port: str,
    mac: str = "",
    mtu: int = 0,
    queues: int = 0,
    addresses: Sequence[str] = (),
    gateway: str = "",
    create_port: bool = True,
) -> Call[nic_pb2.Nic]:
    """A NIC ("a/eth0") on a port ("s0/p0"), which is made with it unless `create_port` is False."""
    full = names.nic(name)
    return Call(
        "NicService/CreateNic",
        nic_pb2.CreateNicRequest(
            parent=full.rsplit("/", 2)[0],
            nic_id=names.leaf(full),
            nic=nic_pb2.Nic(
                port=names.port(port),
                mac=mac,
                mtu=mtu,
                queues=queues,
                addresses=addresses,
                gateway=gateway,
            ),
            create_port=create_port,
        ),
        nic_pb2.CreateNicResponse,
        lambda response: response.nic,
    )


def set_nic_link(name: str, *, up: bool) -> Call[nic_pb2.Nic]:
    """What the guest is told of its link."""
    link = common_pb2.LINK_STATE_UP if up else common_pb2.LINK_STATE_DOWN
    return Call(
        "NicService/UpdateNic",
        nic_pb2.UpdateNicRequest(
            nic=nic_pb2.Nic(name=names.nic(name), link=link), update_mask=FieldMask(paths=["link"])
        ),
        nic_pb2.UpdateNicResponse,
        lambda response: response.nic,
    )


def delete_nic(name: str) -> Call[None]:
    return Call(
        "NicService/DeleteNic",
        nic_pb2.DeleteNicRequest(name=names.nic(name)),
        nic_pb2.DeleteNicResponse,
        _nothing,
        timeout=SLOW_CALL_SECONDS,
    )


# --- partitions ---------------------------------------------------------------------------------------------


def get_partition(name: str) -> Call[partition_pb2.Partition]:
    return Call(
        "PartitionService/GetPartition",
        partition_pb2.GetPartitionRequest(name=names.partition(name)),
        partition_pb2.GetPartitionResponse,
        lambda response: response.partition,
    )


def list_partitions() -> ListCall[partition_pb2.Partition]:
    return ListCall(
        "PartitionService/ListPartitions",
        partition_pb2.ListPartitionsRequest(),
        partition_pb2.ListPartitionsResponse,
        lambda response: response.partitions,
    )


def create_partition(
    partition_id: str,
    *,
    kind: str = "netns",
    hostname: str = "",
    hosts: Mapping[str, Sequence[str]] | None = None,
    engine: str | None = None,
    grace_seconds: float | None = None,
    guest_link: str | None = None,
    memory_bytes: int = 0,
    vp_count: int = 0,
    labels: Mapping[str, str] | None = None,
) -> Call[partition_pb2.Partition]:
    """A process partition, not yet started. `kind`: netns; `guest_link`: tap, veth or None for
    auto.
    """
    process = partition_pb2.ProcessSpec(
        kind=partition_pb2.ProcessKind.Value(f"PROCESS_KIND_{kind.upper()}"),
        hostname=hostname,
        hosts=_hosts(hosts),
        engine=engine_value(engine),
        grace=None if grace_seconds is None else _duration(grace_seconds),
        guest_link=partition_pb2.GuestLink.Value(f"GUEST_LINK_{(guest_link or 'unspecified').upper()}"),
    )
    return Call(
        "PartitionService/CreatePartition",
        partition_pb2.CreatePartitionRequest(
            partition_id=partition_id,
            partition=partition_pb2.Partition(
                process=process, memory_bytes=memory_bytes, vp_count=vp_count, labels=labels or {}
            ),
        ),
        partition_pb2.CreatePartitionResponse,
        lambda response: response.partition,
    )


def create_kvm_partition(
    partition_id: str,
    *,
    kernel: str,
    initrd: str = "",
    cmdline: str = "",
    hostname: str = "",
    host_cpus: Sequence[int] = (),
    grace_seconds: float | None = None,
    memory_bytes: int = 0,
    vp_count: int = 0,
    labels: Mapping[str, str] | None = None,
) -> Call[partition_pb2.Partition]:
    """A virtual machine, not yet started. `kernel` and `initrd` are absolute paths on the daemon's
    machine.
    """
    kvm = partition_pb2.KvmSpec(
        kernel=kernel,
        initrd=initrd,
        cmdline=cmdline,
        hostname=hostname,
        host_cpus=host_cpus,
        grace=None if grace_seconds is None else _duration(grace_seconds),
    )
    return Call(
        "PartitionService/CreatePartition",
        partition_pb2.CreatePartitionRequest(
            partition_id=partition_id,
            partition=partition_pb2.Partition(
                kvm=kvm, memory_bytes=memory_bytes, vp_count=vp_count, labels=labels or {}
            ),
        ),
        partition_pb2.CreatePartitionResponse,
        lambda response: response.partition,
    )


def set_partition_hosts(name: str, hosts: Mapping[str, Sequence[str]]) -> Call[partition_pb2.Partition]:
    """Replaces what /etc/hosts says inside."""
    return Call(
        "PartitionService/UpdatePartition",
        partition_pb2.UpdatePartitionRequest(
            partition=partition_pb2.Partition(
                name=names.partition(name), process=partition_pb2.ProcessSpec(hosts=_hosts(hosts))
            ),
            update_mask=FieldMask(paths=["process.hosts"]),
        ),
        partition_pb2.UpdatePartitionResponse,
        lambda response: response.partition,
    )


def start_partition(name: str) -> Call[partition_pb2.Partition]:
    """Returns when the guest runs and its NICs are configured."""
    return Call(
        "PartitionService/StartPartition",
        partition_pb2.StartPartitionRequest(name=names.partition(name)),
        partition_pb2.StartPartitionResponse,
        lambda response: response.partition,
        timeout=SLOW_CALL_SECONDS,
    )


def stop_partition(name: str, *, timeout: float | None = None) -> Call[partition_pb2.Partition]:
    """`timeout`: seconds that the guest may take to end by itself."""
    return Call(
        "PartitionService/StopPartition",
        partition_pb2.StopPartitionRequest(
            name=names.partition(name), timeout=None if timeout is None else _duration(timeout)
        ),
        partition_pb2.StopPartitionResponse,
        lambda response: response.partition,
        timeout=SLOW_CALL_SECONDS + (timeout or 0.0),
    )


def sync_partition_time(name: str) -> Call[None]:
    """Sets a virtual machine's clock to the host's."""
    return Call(
        "PartitionService/SyncPartitionTime",
        partition_pb2.SyncPartitionTimeRequest(name=names.partition(name)),
        partition_pb2.SyncPartitionTimeResponse,
        _nothing,
    )


def delete_partition(name: str, *, force: bool = False) -> Call[None]:
    """`force` stops it first. Its NICs go with it."""
    return Call(
        "PartitionService/DeletePartition",
        partition_pb2.DeletePartitionRequest(name=names.partition(name), force=force),
        partition_pb2.DeletePartitionResponse,
        _nothing,
        timeout=SLOW_CALL_SECONDS,
    )


# --- extensions ---------------------------------------------------------------------------------------------


def get_extension(name: str) -> Call[extension_pb2.Extension]:
    return Call(
        "ExtensionService/GetExtension",
        extension_pb2.GetExtensionRequest(name=names.extension(name)),
        extension_pb2.GetExtensionResponse,
        lambda response: response.extension,
    )


def list_extensions(switch: str = "-") -> ListCall[extension_pb2.Extension]:
    """The extensions of one switch, or of all ("-")."""
    return ListCall(
        "ExtensionService/ListExtensions",
        extension_pb2.ListExtensionsRequest(parent=names.switch(switch)),
        extension_pb2.ListExtensionsResponse,
        lambda response: response.extensions,
    )


def load_extension(
    switch: str,
    extension_id: str,
    source: bytes,
    *,
    file_name: str = "",
    on_failure: str = "open",
    labels: Mapping[str, str] | None = None,
) -> Call[extension_pb2.Extension]:
    """Loads a plug-in from its source. `on_failure`: open or closed."""
    return Call(
        "ExtensionService/CreateExtension",
        extension_pb2.CreateExtensionRequest(
            parent=names.switch(switch),
            extension_id=extension_id,
            extension=extension_pb2.Extension(
                source=source, file_name=file_name, on_failure=_on_failure(on_failure), labels=labels or {}
            ),
        ),
        extension_pb2.CreateExtensionResponse,
        lambda response: response.extension,
        timeout=SLOW_CALL_SECONDS,
    )


def update_extension(name: str, *, on_failure: str) -> Call[extension_pb2.Extension]:
    return Call(
        "ExtensionService/UpdateExtension",
        extension_pb2.UpdateExtensionRequest(
            extension=extension_pb2.Extension(name=names.extension(name), on_failure=_on_failure(on_failure)),
            update_mask=FieldMask(paths=["on_failure"]),
        ),
        extension_pb2.UpdateExtensionResponse,
        lambda response: response.extension,
    )


def unload_extension(name: str) -> Call[None]:
    return Call(
        "ExtensionService/DeleteExtension",
        extension_pb2.DeleteExtensionRequest(name=names.extension(name)),
        extension_pb2.DeleteExtensionResponse,
        _nothing,
        timeout=SLOW_CALL_SECONDS,
    )


# --- captures, trace, daemon --------------------------------------------------------------------------------


def get_capture(name: str) -> Call[capture_pb2.Capture]:
    return Call(
        "CaptureService/GetCapture",
        capture_pb2.GetCaptureRequest(name=names.capture(name)),
        capture_pb2.GetCaptureResponse,
        lambda response: response.capture,
    )


def list_captures() -> ListCall[capture_pb2.Capture]:
    return ListCall(
        "CaptureService/ListCaptures",
        capture_pb2.ListCapturesRequest(),
        capture_pb2.ListCapturesResponse,
        lambda response: response.captures,
    )


def stop_capture(name: str) -> Call[None]:
    """Its stream ends in good order."""
    return Call(
        "CaptureService/DeleteCapture",
        capture_pb2.DeleteCaptureRequest(name=names.capture(name)),
        capture_pb2.DeleteCaptureResponse,
        _nothing,
    )


def trace(port: str, frames: Sequence[bytes]) -> Call[Sequence[trace_pb2.TracedFrame]]:
    """What would happen to each frame if it entered at the port. Changes nothing."""
    return Call(
        "TraceService/Trace",
        trace_pb2.TraceRequest(port=names.port(port), frames=frames),
        trace_pb2.TraceResponse,
        lambda response: list(response.frames),
    )


def get_info() -> Call[daemon_pb2.GetInfoResponse]:
    return Call(
        "DaemonService/GetInfo",
        daemon_pb2.GetInfoRequest(),
        daemon_pb2.GetInfoResponse,
        lambda response: response,
    )


def shutdown(*, stop_guests: bool = False) -> Call[None]:
    """Ends the daemon; its guests live on for their grace period unless `stop_guests`."""
    return Call(
        "DaemonService/Shutdown",
        daemon_pb2.ShutdownRequest(stop_guests=stop_guests),
        daemon_pb2.ShutdownResponse,
        _nothing,
        timeout=SLOW_CALL_SECONDS,
    )


def _nothing(response: Any) -> None:
    return None


def _create_port(name: str, friendly_name: str) -> port_pb2.CreatePortRequest:
    full = names.port(name)
    return port_pb2.CreatePortRequest(
        parent=full.rsplit("/", 2)[0],
        port_id=names.leaf(full),
        port=port_pb2.Port(friendly_name=friendly_name),
    )


def _hosts(hosts: Mapping[str, Sequence[str]] | None) -> dict[str, partition_pb2.AddressList]:
    return {name: partition_pb2.AddressList(addresses=addresses) for name, addresses in (hosts or {}).items()}


def _duration(seconds: float) -> Duration:
    if not 0 <= seconds <= MAX_DURATION_SECONDS:
        raise ValueError(f"{seconds} seconds; give 0 to {MAX_DURATION_SECONDS}")
    return Duration(seconds=int(seconds), nanos=int((seconds % 1) * 1_000_000_000))


def _on_failure(value: str) -> extension_pb2.OnFailure.ValueType:
    values = {"open": extension_pb2.ON_FAILURE_OPEN, "closed": extension_pb2.ON_FAILURE_CLOSED}
    if value not in values:
        raise ValueError(f"on_failure {value!r} is neither 'open' nor 'closed'")
    return values[value]
