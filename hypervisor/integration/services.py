"""The integration services of one partition, together."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from hypervisor.clock import Clock
from hypervisor.integration.heartbeat import Heartbeat, HeartbeatState
from hypervisor.integration.kvp import KeyValueExchange
from hypervisor.integration.kvp_messages import IpInfo, KvpPool
from hypervisor.integration.service import IntegrationService
from hypervisor.integration.shutdown import Shutdown
from hypervisor.integration.timesync import TimeSync
from hypervisor.partition import Partition
from hypervisor.vmbus.server import Offer


class IntegrationServices:
    """Shutdown, time sync, heartbeat and key-value exchange for a partition that runs a real kernel.

    Life cycle: make one per partition; `offer()` before or after `attach()`; the channels come and go with
    the guest's drivers; `close()` takes the devices away. After `Hypervisor.restore()` make a new one.
    Everything on the event loop.
    """

    def __init__(self, partition: Partition, clock: Clock, *, reference_time: bool = True) -> None:
        """`reference_time`: whether what the guest reads as TIME_REF_COUNT is what its door answers."""
        self.on_changed: list[Callable[[], None]] = []
        """Called when `guest_info`, `heartbeat_state` or `versions` changed; not at each beat."""
        self._partition = partition
        self._offers: list[Offer] = []
        self._shutdown = Shutdown(clock)
        self._time_sync = TimeSync(clock, partition.synic.reference_time if reference_time else None)
        self._heartbeat = Heartbeat(clock)
        self._kvp = KeyValueExchange(clock)
        self._services: tuple[IntegrationService, ...] = (
            self._shutdown,
            self._time_sync,
            self._heartbeat,
            self._kvp,
        )
        for service in self._services:
            service.on_changed = self._changed

    def _changed(self) -> None:
        for callback in list(self.on_changed):
            callback()

    async def offer(self) -> None:
        """Offer the four devices; once."""
        for service in self._services[len(self._offers) :]:
            self._offers.append(await self._partition.vmbus.offer(service))

    async def close(self) -> None:
        """Take the devices away; returns when nothing of them touches the guest any more."""
        offers, self._offers = self._offers, []
        for offer in offers:
            await self._partition.vmbus.rescind(offer)

    @property
    def versions(self) -> dict[str, str]:
        """The version agreed with the guest, for each service whose driver is there."""
        return {
            service.name: str(service.version) for service in self._services if service.version is not None
        }

    async def shutdown(self, reboot: bool = False, *, force: bool = True, seconds: float = 10.0) -> None:
        """Ask the guest to power off or restart through its init; returns when its kernel has agreed.

        IntegrationError with words when it has no driver for that, refuses or is silent.
        """
        await self._shutdown.shutdown(restart=reboot, force=force, seconds=seconds)

    async def sync_time(self) -> None:
        """Set the guest's clock to the host's now. IntegrationError."""
        await self._time_sync.sync()

    @property
    def heartbeat(self) -> datetime | None:
        """When the guest's kernel answered last."""
        return self._heartbeat.last

    @property
    def heartbeat_state(self) -> HeartbeatState:
        """Whether the guest's kernel answers."""
        return self._heartbeat.state

    @property
    def guest_info(self) -> dict[str, str]:
        """What the guest's system says of itself; empty until its daemon answered.

        FullyQualifiedDomainName, OSName, OSVersion, NetworkAddressIPv4 and NetworkAddressIPv6 (separated by
        ";") and more.
        """
        return dict(self._kvp.guest_info)

    async def refresh(self) -> None:
        """Read `guest_info` now. IntegrationError."""
        await self._kvp.refresh()

    async def enumerate(self, pool: KvpPool) -> dict[str, str]:
        """All keys of a pool of the guest. IntegrationError."""
        return await self._kvp.enumerate(pool)

    async def get(self, pool: KvpPool, key: str) -> str:
        """One key's value. IntegrationError."""
        return await self._kvp.get(pool, key)

    async def ip_info(self, mac: str) -> IpInfo:
        """What is set on the guest's adapter with this MAC address. IntegrationError."""
        return await self._kvp.ip_info(mac)
