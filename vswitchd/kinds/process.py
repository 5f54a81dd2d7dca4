"""Process guests: `python -m netvsc`, whose agent takes configuration and runs commands."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from hypervisor import Partition
from vswitch_api.v1 import nic_pb2, partition_pb2
from vswitchd.core import Core, engine_value
from vswitchd.errors import invalid, unavailable
from vswitchd.kinds.limits import checked_grace
from vswitchd.launcher import Ending, Launch, environment
from vswitchd.nics import interface_config
from vswitchd.resources import check_address, check_id

DEFAULT_MEMORY = 32 << 20
MEMORY_RANGE = range(4 << 20, (1 << 30) + 1)
MAX_HOSTS = 4096
KINDS = {
    partition_pb2.PROCESS_KIND_NETNS: "netns",
}
LINKS = {
    partition_pb2.GUEST_LINK_UNSPECIFIED: "auto",
    partition_pb2.GUEST_LINK_TAP: "tap",
    partition_pb2.GUEST_LINK_VETH: "veth",
}


def check(core: Core, partition_id: str, wanted: partition_pb2.ProcessSpec) -> partition_pb2.ProcessSpec:
    """The specification complete with defaults. INVALID_ARGUMENT."""
    spec = partition_pb2.ProcessSpec()
    spec.CopyFrom(wanted)
    spec.kind = spec.kind or partition_pb2.PROCESS_KIND_NETNS
    if spec.kind not in KINDS:
        raise invalid("partition.process.kind", f"unknown value {spec.kind}")
    if spec.guest_link not in LINKS:
        raise invalid("partition.process.guest_link", f"unknown value {spec.guest_link}")
    spec.hostname = check_id("partition.process.hostname", spec.hostname or partition_id)
    spec.engine = engine_value(core.engine_of(spec.engine, "partition.process.engine"))
    grace = checked_grace("partition.process.grace", wanted.grace if wanted.HasField("grace") else None)
    spec.grace.CopyFrom(grace)
    check_hosts("partition.process.hosts", spec)
    return spec


def check_hosts(field_name: str, process: partition_pb2.ProcessSpec) -> None:
    """INVALID_ARGUMENT unless /etc/hosts can be made of it."""
    if len(process.hosts) > MAX_HOSTS:
        raise invalid(field_name, f"{len(process.hosts)} names; at most {MAX_HOSTS} are taken")
    for name, entry in process.hosts.items():
        if not name or len(name) > 253 or any(character.isspace() for character in name):
            raise invalid(field_name, f"{name[:80]!r} is not a host name")
        for address in entry.addresses:
            check_address(f"{field_name}[{name}]", address)


class ProcessGuest:
    """The guest's side of a process partition."""

    stop_seconds = 2.0
    end_seconds = 2.0

    def __init__(self, core: Core, message: partition_pb2.Partition) -> None:
        self._core = core
        self._message = message

    @asynccontextmanager
    async def launch(
        self, partition: Partition, door: int, nics: Sequence[nic_pb2.Nic]
    ) -> AsyncIterator[Launch]:
        """`-P`: nothing is imported from the current directory."""
        spec = self._message.process
        argv = [sys.executable, "-P", "-m", "netvsc", "--kind", KINDS[spec.kind], "--name", partition.name]
        argv += ["--engine", self._core.engine_of(spec.engine, "partition.process.engine")]
        argv += ["--grace", f"{spec.grace.ToTimedelta().total_seconds():g}"]
        argv += ["--hide", str(self._core.config.run_dir.root), "--link", LINKS[spec.guest_link]]
        yield Launch(argv, environment(door), (door,), Path(self._message.log_path))

    def status_path(self, partition_id: int) -> Path | None:
        return None

    async def offer(self, partition: Partition) -> None:
        return

    async def configure(self, partition: Partition, nics: Sequence[nic_pb2.Nic]) -> None:
        message = self._message
        hosts = message.process.hosts
        document = {
            "hostname": message.process.hostname,
            "hosts": {name: list(entry.addresses) for name, entry in sorted(hosts.items())},
            "interfaces": [interface_config(nic) for nic in nics],
        }
        try:
            await partition.configure(document)
        except TimeoutError as error:
            raise unavailable(
                message.name,
                f"{message.name}: its guest does not answer: {error}",
                reason="GUEST_SILENT",
                remedy=f"read {message.log_path}; stop it and start it again",
            ) from error

    async def ask_to_end(self, partition: Partition, seconds: float) -> None:
        await partition.shutdown(seconds)

    def verdict(self, ending: Ending) -> tuple[partition_pb2.PartitionState.ValueType, str]:
        return partition_pb2.PARTITION_STATE_FAILED, f"the guest {ending}"

    def describe(self, message: partition_pb2.Partition, *, whole: bool) -> None:
        return

    async def clear(self, partition_id: int) -> None:
        return
