"""Synthetic NICs: checked, connected to a port, offered to the guest when its partition runs."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

from hypervisor import Offer, Partition
from netvsp import SyntheticNic
from vswitch_api.v1 import common_pb2, nic_pb2, partition_pb2
from vswitchd.core import Core, now
from vswitchd.errors import ApiError, already_exists, exhausted, invalid, not_found
from vswitchd.resources import (
    NIC_ID,
    check_address,
    check_id,
    check_interface_address,
    check_mac,
    check_mask,
    mac_text,
    parse,
)
from vswitchd.switches import PortRecord, SwitchManager

MAX_NICS = 32
MAX_ADDRESSES = 32
MTU_RANGE = range(576, 9001)
DEFAULT_MTU = 1500
MACHINE_MTU = 9000
"""What a virtual machine's own driver may choose up to: it starts with 1500."""
QUEUES = range(1, 65)
DEFAULT_QUEUES = 8
# Microsoft's, which Hyper-V hosts give to synthetic NICs.
OUI = bytes.fromhex("00155d")


@dataclass
class NicRecord:
    """A NIC that exists; `device` and `offer` while its partition runs."""

    message: nic_pb2.Nic
    port: PortRecord
    device: SyntheticNic | None = None
    offer: Offer | None = None
    told: nic_pb2.NicState.ValueType = nic_pb2.NIC_STATE_UNSPECIFIED

    @property
    def name(self) -> str:
        return self.message.name

    def describe(self, *, counters: bool = False) -> nic_pb2.Nic:
        """What the API shows; with what went through its queues if asked for."""
        message = nic_pb2.Nic()
        message.CopyFrom(self.message)
        if self.device is not None:
            message.open_queues = self.device.state.open_queues
            message.receive_scaling = self.device.state.rss
            if counters:
                message.queue_counters.extend(
                    nic_pb2.NicQueue(
                        index=index,
                        rx_packets=queue.get("frames_to_guest", 0),
                        rx_bytes=queue.get("bytes_to_guest", 0),
                        tx_packets=queue.get("frames_from_guest", 0),
                        tx_bytes=queue.get("bytes_from_guest", 0),
                        signals=queue.get("signals", 0),
                    )
                    for index, queue in enumerate(self.device.queue_stats())
                )
        if self.device is None:
            message.state = nic_pb2.NIC_STATE_IDLE
        elif self.device.state.open:
            message.state = nic_pb2.NIC_STATE_OPEN
            # NVSP_PROTOCOL_VERSION_6_1 is 0x60001, Linux drivers/net/hyperv/hyperv_net.h; 1 and 2 have no
            # minor.
            version = self.device.state.nvsp_version
            message.nvsp_version = f"{version >> 16}.{version & 0xFFFF}" if version >> 16 else ""
        else:
            message.state = nic_pb2.NIC_STATE_OFFERED
        return message

    def has_changed(self) -> bool:
        """Whether its state is another than when this was last asked: guests open and close by themselves."""
        before, self.told = self.told, self.describe().state
        return before != self.told


class NicWorkshop:
    """Makes and unmakes NICs for the partition manager, which orders the calls."""

    def __init__(self, core: Core, switches: SwitchManager) -> None:
        self._core = core
        self._switches = switches

    def check(
        self, at: str, request: nic_pb2.CreateNicRequest, partition: partition_pb2.Partition
    ) -> nic_pb2.Nic:
        """The NIC that a request asks for, complete but for its port."""
        nic_id = check_id(f"{at}nic_id", request.nic_id, NIC_ID)
        wanted = request.nic
        mac = check_mac(f"{at}nic.mac", wanted.mac) if wanted.mac else OUI + os.urandom(3)
        mtu = wanted.mtu or (MACHINE_MTU if partition.HasField("kvm") else DEFAULT_MTU)
        if mtu not in MTU_RANGE:
            raise invalid(f"{at}nic.mtu", f"{mtu} is not within {MTU_RANGE.start} to {MTU_RANGE.stop - 1}")
        queues = wanted.queues or min(max(partition.vp_count, 1), DEFAULT_QUEUES)
        if queues not in QUEUES:
            raise invalid(f"{at}nic.queues", f"{queues} is not within {QUEUES.start} to {QUEUES.stop - 1}")
        if len(wanted.addresses) > MAX_ADDRESSES:
            raise invalid(f"{at}nic.addresses", f"{len(wanted.addresses)}; at most {MAX_ADDRESSES} are taken")
        addresses = [
            check_interface_address(f"{at}nic.addresses[{index}]", address)
            for index, address in enumerate(wanted.addresses)
        ]
        gateway = check_address(f"{at}nic.gateway", wanted.gateway) if wanted.gateway else ""
        parse(f"{at}nic.port", wanted.port, "switches", "ports")
        return nic_pb2.Nic(
            name=f"{partition.name}/nics/{nic_id}",
            uid=str(uuid.uuid4()),
            port=wanted.port,
            mac=mac_text(mac),
            mtu=mtu,
            link=wanted.link or common_pb2.LINK_STATE_UP,
            addresses=addresses,
            gateway=gateway,
            create_time=now(),
            queues=queues,
        )

    async def create(
        self, message: nic_pb2.Nic, existing: dict[str, NicRecord], *, create_port: bool
    ) -> NicRecord:
        """A NIC connected to its port, in the store, not yet offered."""
        nic_id = message.name.rpartition("/")[2]
        if nic_id in existing:
            raise already_exists(message.name)
        if len(existing) >= MAX_NICS:
            raise exhausted(f"the partition has {MAX_NICS} NICs", "delete one that is not needed")
        made = False
        if create_port:
            port, made = await self._switches.ensure_port(message.port)
        else:
            port = self._switches.find_port(message.port, "nic.port")
        self._switches.claim(port, message.name)
        record = NicRecord(message, port)
        if made:
            port.made_by_nic = True
            await self._core.save(port.message, {"made_by_nic": True})
        await self._core.save(message)
        existing[nic_id] = record
        self._core.hub.added(record.describe())
        return record

    async def offer(self, record: NicRecord, partition: Partition) -> None:
        """Tells a running guest of the NIC."""
        message = record.message
        record.device = SyntheticNic(
            message.name,
            bytes.fromhex(message.mac.replace(":", "")),
            UUID(message.uid),
            record.port.port,
            mtu=message.mtu,
            # A NIC that was stored before NICs had queues has one.
            queues=message.queues or 1,
            engine=record.port.switch.switch.engine,
        )
        await record.device.set_link(message.link != common_pb2.LINK_STATE_DOWN)
        record.offer = await partition.vmbus.offer(record.device)
        self._core.hub.modified(record.describe())

    async def rescind(self, record: NicRecord, partition: Partition | None) -> None:
        """Takes the NIC away from its guest; on return nothing touches the guest's memory."""
        if record.offer is not None and partition is not None:
            if record.device is not None:
                await record.device.retire()
            await partition.vmbus.rescind(record.offer)
        record.offer = record.device = None

    async def set_link(self, record: NicRecord, request: nic_pb2.UpdateNicRequest) -> None:
        check_mask(request.update_mask.paths, ["link"])
        if request.nic.link == common_pb2.LINK_STATE_UNSPECIFIED:
            raise invalid("nic.link", "unspecified", "say up or down")
        record.message.link = request.nic.link
        if record.device is not None:
            await record.device.set_link(request.nic.link == common_pb2.LINK_STATE_UP)
        await self._core.save(record.message)
        self._core.hub.modified(record.describe())

    async def delete(self, record: NicRecord, existing: dict[str, NicRecord]) -> None:
        """Forgets a NIC that is not offered any more, and the port that was made with it."""
        existing.pop(record.name.rpartition("/")[2], None)
        await self._core.store.delete(record.name)
        record.port.owner = ""
        self._core.hub.removed(record.message)
        if record.port.made_by_nic:
            async with self._switches.lock:
                await self._switches.remove_port(record.port)

    async def restore(self, partition: str) -> Iterator[NicRecord]:
        """The stored NICs of a partition, connected to their ports again."""
        records = []
        for row in await self._core.store.load("nic"):
            message = nic_pb2.Nic.FromString(row.body)
            if not message.name.startswith(f"{partition}/"):
                continue
            try:
                port = self._switches.find_port(message.port, "nic.port")
                self._switches.claim(port, message.name)
            except ApiError as error:
                self._core.hub.event("nic_lost", message.name, error.message)
                continue
            records.append(NicRecord(message, port))
        return iter(records)


def interface_config(message: nic_pb2.Nic) -> dict[str, object]:
    """What the agent is told of one interface (door, CONFIGURE)."""
    return {
        "mac": message.mac,
        "name": message.name.rpartition("/")[2],
        "addresses": list(message.addresses),
        "mtu": message.mtu,
        "gateway": message.gateway or None,
    }


def require(records: dict[str, NicRecord], name: str, same: NicRecord | None = None) -> NicRecord:
    """The NIC of this name among a partition's; the `same` one where it may have been replaced meanwhile."""
    record = records.get(name.rpartition("/")[2])
    if record is None or (same is not None and record is not same):
        raise not_found(name, "see `vswitch nic list`")
    return record
