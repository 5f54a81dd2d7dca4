"""The guest's network interfaces: one per offered synthetic NIC, kept over rescinds and over a lost door.

An interface is known by the instance id of its offer. Its TAP (or veth) and its addresses stay when the
channel goes; only the carrier goes with it. When the offer has not come back after `FORGET_AFTER` seconds
on a live door, the NIC was taken out for good and the interface goes too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any
from uuid import UUID

from netvsc import link as links
from netvsc.datapath import DataPathProtocol
from netvsc.driver import NETVSC_CLASS, DriverError, NetVsc
from netvsc.link import InterfaceConfig, Link, format_mac

__all__ = ["Interface", "Interfaces"]

FORGET_AFTER = 5.0
DEFAULT_MTU = 1500

_log = logging.getLogger("netvsc.interfaces")


class Interface:
    """One NIC's interface and the driver of its present channel."""

    def __init__(self, instance_id: UUID, link: Link) -> None:
        self.instance_id = instance_id
        self.link = link
        self.mac = bytes(6)
        self.driver: NetVsc | None = None
        self.configured: InterfaceConfig | None = None
        self.up = asyncio.Event()
        self.failure = ""
        self.work: asyncio.Task[None] | None = None
        self.removal: asyncio.TimerHandle | None = None


class Interfaces:
    """All of them. `open_datapath(channel, link)` is the engine's."""

    def __init__(self, open_datapath: Callable[[Any, Link], DataPathProtocol], link_kind: str) -> None:
        self._open_datapath = open_datapath
        self._link_kind = link_kind
        self._allocator: Any = None
        self._vmbus: Any = None
        self._by_instance: dict[UUID, Interface] = {}
        self._configs: dict[bytes, InterfaceConfig] = {}
        self._changed = asyncio.Condition()
        self._numbers = 0

    def use(self, vmbus: Any, allocator: Any) -> None:
        """The VMBus connection and page allocator that offers come from."""
        self._vmbus = vmbus
        self._allocator = allocator

    def __iter__(self) -> Any:
        return iter(list(self._by_instance.values()))

    # Offers.

    def on_offer(self, offer: Any) -> None:
        """A channel was offered; anything but a primary NetVSC channel is left alone."""
        if offer.class_id != NETVSC_CLASS or offer.sub_channel_index:
            return
        known = self._by_instance.get(offer.instance_id)
        previous = known.work if known is not None else None
        work = asyncio.get_running_loop().create_task(self._bring_up(offer, previous))
        if known is not None:
            known.work = work
        else:
            work.add_done_callback(_report)

    def on_rescind(self, offer: Any) -> None:
        """The host took a channel back."""
        interface = self._by_instance.get(offer.instance_id)
        if offer.class_id != NETVSC_CLASS or interface is None or offer.sub_channel_index:
            self._vmbus.release(offer.relid)
            return
        previous = interface.work
        self._lose(interface, "its offer was rescinded")
        interface.work = asyncio.get_running_loop().create_task(self._give_back(interface, offer, previous))
        interface.removal = asyncio.get_running_loop().call_later(FORGET_AFTER, self._remove, interface)

    async def _bring_up(self, offer: Any, previous: asyncio.Task[None] | None) -> None:
        if previous is not None:
            await asyncio.gather(previous, return_exceptions=True)
        interface = self._by_instance.get(offer.instance_id)
        if interface is None:
            name = f"vswitch{self._numbers}"
            self._numbers += 1
            interface = Interface(offer.instance_id, await links.open_link(name, self._link_kind))
            self._by_instance[offer.instance_id] = interface
        if interface.removal is not None:
            interface.removal.cancel()
            interface.removal = None
        interface.failure = ""
        try:
            await self._attach(interface, offer)
            if (late := self._configs.get(interface.mac)) is not None:  # told while we negotiated
                interface.failure = await self._reconfigure(late)
        except (DriverError, OSError, MemoryError) as error:
            interface.failure = str(error)
            _log.error("%s", error)
            self._lose(interface, str(error))
        async with self._changed:
            self._changed.notify_all()

    async def _attach(self, interface: Interface, offer: Any) -> None:
        mtu = interface.configured.mtu if interface.configured is not None else DEFAULT_MTU
        properties = await self._start_driver(interface, offer, mtu)
        config = self._configs.get(properties.mac)
        if config is not None and config.mtu != mtu and config.mtu != properties.mtu:
            # As the stock driver changes its MTU: the whole negotiation again on the same offer.
            assert interface.driver is not None
            await interface.driver.stop()
            properties = await self._start_driver(interface, offer, config.mtu)
        link = interface.link
        if interface.mac != properties.mac:
            link.set_mac(properties.mac)
            interface.mac = properties.mac
        link.set_mtu(properties.mtu)
        link.set_offload(checksum=properties.checksum, lso4=properties.lso4, lso6=properties.lso6)
        if properties.lso_max_size:
            await links.limit_segments(link, properties.lso_max_size)
        if config is not None and config != interface.configured:
            await links.configure(link, config)
            interface.configured = config
        assert interface.driver is not None
        await interface.driver.set_filter(True)
        link.set_carrier(interface.driver.properties.connected)
        interface.up.set()

    async def _start_driver(self, interface: Interface, offer: Any, mtu: int) -> Any:
        def carrier(up: bool) -> None:
            if interface.up.is_set():
                interface.link.set_carrier(up)

        def fault(text: str) -> None:
            _log.error("interface %s: the channel is lost: %s", interface.link.name, text)
            interface.failure = text
            self._lose(interface, text)

        interface.driver = NetVsc(
            self._vmbus,
            self._allocator,
            offer,
            lambda channel: self._open_datapath(channel, interface.link),
            on_carrier=carrier,
            on_fault=fault,
        )
        return await interface.driver.start(mtu)

    def _lose(self, interface: Interface, why: str) -> None:
        interface.up.clear()
        interface.link.set_carrier(False)
        if interface.driver is not None:
            interface.driver.abandon(why)

    async def _give_back(self, interface: Interface, offer: Any, previous: asyncio.Task[None] | None) -> None:
        if previous is not None:
            await asyncio.gather(previous, return_exceptions=True)
        driver, interface.driver = interface.driver, None
        if driver is not None:
            driver.abandon("its offer was rescinded")
            await driver.released()
        self._vmbus.release(offer.relid)

    def _remove(self, interface: Interface) -> None:
        if self._by_instance.get(interface.instance_id) is interface and interface.driver is None:
            del self._by_instance[interface.instance_id]
            _log.info("interface %s: its NIC was taken out", interface.link.name)
            interface.link.close()

    # The door.

    def door_lost(self) -> None:
        """Carriers off, rings untouched from now on; the interfaces stay."""
        for interface in self._by_instance.values():
            self._lose(interface, "the door to the host is lost")
            if interface.removal is not None:
                interface.removal.cancel()
                interface.removal = None

    def memory_replaced(self) -> None:
        """The door came back with other memory: what the drivers held of the old is void."""
        for interface in self._by_instance.values():
            interface.driver = None

    async def stop(self) -> None:
        """Orderly end of every NIC."""
        drivers = [
            interface.driver for interface in self._by_instance.values() if interface.driver is not None
        ]
        for interface in self._by_instance.values():
            interface.link.set_carrier(False)
        await asyncio.gather(*(driver.stop() for driver in drivers), return_exceptions=True)

    # Configuration.

    async def configure(self, configs: list[InterfaceConfig], patience: float) -> list[str]:
        """Apply these; waits up to `patience` seconds for their NICs. Returns what went wrong, one text
        each."""
        self._configs = {config.mac: config for config in configs}
        failures: list[str] = []
        awaited: list[InterfaceConfig] = []
        for config in configs:
            if text := await self._reconfigure(config):
                failures.append(text)  # its NIC is there: waiting brings nothing
            else:
                awaited.append(config)
        try:
            async with asyncio.timeout(patience), self._changed:
                await self._changed.wait_for(lambda: not self._pending(awaited))
        except TimeoutError:
            failures += [
                f"interface {config.name}: no NIC with MAC {format_mac(config.mac)} was offered; "
                "connect the port or correct the MAC"
                for config in self._pending(awaited)
            ]
        wanted = {config.mac for config in configs}
        for interface in self._by_instance.values():
            if interface.failure and (interface.mac in wanted or not any(interface.mac)):
                failures.append(interface.failure)
        return failures

    def _pending(self, configs: list[InterfaceConfig]) -> list[InterfaceConfig]:
        if any(i.failure and not any(i.mac) for i in self._by_instance.values()):
            return []  # a NIC failed before it told its MAC: waiting brings nothing
        settled = {i.configured for i in self._by_instance.values() if i.up.is_set()}
        failed = {i.mac for i in self._by_instance.values() if i.failure}
        return [config for config in configs if config not in settled and config.mac not in failed]

    async def _reconfigure(self, config: InterfaceConfig) -> str:
        """Apply to an interface that is up already. Returns a failure's text."""
        for interface in self._by_instance.values():
            if interface.mac == config.mac and interface.up.is_set() and config != interface.configured:
                try:
                    if interface.driver is not None and config.mtu != interface.driver.properties.mtu:
                        await self._change_mtu(interface, config)
                        continue
                    await links.configure(interface.link, config)
                    interface.configured = config
                except (OSError, DriverError) as error:
                    return str(error)
        return ""

    async def _change_mtu(self, interface: Interface, config: InterfaceConfig) -> None:
        driver = interface.driver
        assert driver is not None
        interface.up.clear()
        interface.link.set_carrier(False)
        await driver.stop()
        await links.configure(interface.link, config)
        interface.configured = config
        await self._attach(interface, driver.offer)


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("a NIC could not be brought up: %s", error)
