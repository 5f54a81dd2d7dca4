"""Key-value exchange: what the guest's system says of itself, its addresses among it (Linux
drivers/hv/hv_kvp.c, tools/hv/hv_kvp_daemon.c).

The guest's kernel passes each request to a daemon in the guest and answers for it after 30 s if that is
silent. Without the daemon even the negotiation is answered late (55 s) and every request fails.
"""

from __future__ import annotations

import logging
from typing import ClassVar
from uuid import UUID

from hypervisor.clock import Clock
from hypervisor.integration import icmsg, kvp_messages
from hypervisor.integration.icmsg import Version
from hypervisor.integration.kvp_messages import IpInfo, KvpPool
from hypervisor.integration.service import Answer, IntegrationError, IntegrationService, pause
from vswitch_wire.errors import WireError

_log = logging.getLogger("hypervisor.integration")

VERSIONS = (Version(1, 0), Version(3, 0), Version(4, 0))
IP_INFO_FROM = Version(4, 0)
ANSWER_SECONDS = 90.0
"""Beyond the 30 s after which the guest's kernel answers for its daemon, for this request and two before."""
REFRESH_SECONDS = 15.0
ENTRIES_LIMIT = 256
"""Entries taken of one pool; a guest that has more is cut short."""


class KeyValueExchange(IntegrationService):
    """The guest's key-value driver and the daemon behind it."""

    name: ClassVar[str] = "key-value exchange"
    class_id = UUID("a9a0f4e7-5a45-4d96-b827-8a841e8c03e6")
    instance_id = UUID("242ff919-07db-4180-9c2e-b86cb68c8c55")
    message_type: ClassVar[int] = icmsg.ICMSGTYPE_KVPEXCHANGE
    largest_body: ClassVar[int] = kvp_messages.LARGEST_BODY

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock, VERSIONS)
        self.guest_info: dict[str, str] = {}
        """The AUTO pool as it was read last."""

    async def serve(self) -> None:
        """Reads what the guest says of itself, again and again."""
        while True:
            try:
                await self.refresh()
            except IntegrationError as error:
                _log.debug("%s", error)
            await pause(self.clock, REFRESH_SECONDS)

    async def refresh(self) -> None:
        """Read the AUTO pool anew. IntegrationError."""
        info = await self.enumerate(KvpPool.AUTO)
        if info != self.guest_info:
            self.guest_info = info
            self.on_changed()

    async def enumerate(self, pool: KvpPool) -> dict[str, str]:
        """All keys of a pool and their values. IntegrationError."""
        entries: dict[str, str] = {}
        for index in range(ENTRIES_LIMIT):
            answer = await self._ask(kvp_messages.pack_enumerate(pool, index))
            if answer.status == icmsg.HV_S_CONT:
                break
            self._check(answer, f"pool {pool.name}")
            try:
                key, value = kvp_messages.unpack_enumerate(answer.body)
            except WireError as error:
                raise IntegrationError(f"{self.name}: {error}") from None
            entries[key] = value
        return entries

    async def get(self, pool: KvpPool, key: str) -> str:
        """One key's value; hv_kvp_daemon of Linux answers this with an empty text, so `enumerate` is surer.

        IntegrationError, also for a key that does not exist.
        """
        try:
            request = kvp_messages.pack_get(pool, key)
        except WireError as error:
            raise IntegrationError(f"{self.name}: {error}") from None
        answer = await self._ask(request)
        self._check(answer, f"key {key!r} of pool {pool.name}")
        try:
            return kvp_messages.unpack_get(answer.body)
        except WireError as error:
            raise IntegrationError(f"{self.name}: {error}") from None

    async def ip_info(self, mac: str) -> IpInfo:
        """What is set on the adapter with this MAC address. IntegrationError."""
        version = self._ready().version
        if version is None or version < IP_INFO_FROM:
            raise IntegrationError(
                f"{self.name}: the guest speaks version {version}; addresses per adapter need {IP_INFO_FROM}"
            )
        try:
            request = kvp_messages.pack_get_ip_info(mac)
        except WireError as error:
            raise IntegrationError(f"{self.name}: {error}") from None
        answer = await self._ask(request)
        self._check(answer, f"adapter {mac}")
        try:
            return kvp_messages.unpack_ip_info(answer.body)
        except WireError as error:
            raise IntegrationError(f"{self.name}: {error}") from None

    async def _ask(self, body: bytes) -> Answer:
        return await self.request(body, ANSWER_SECONDS)

    def _check(self, answer: Answer, what: str) -> None:
        if answer.status != icmsg.HV_S_OK:
            raise IntegrationError(
                f"{self.name}: {what}: {icmsg.status_text(answer.status)};"
                " is hv_kvp_daemon running in the guest?"
            )

    def closed(self) -> None:
        """What the guest said is past."""
        self.guest_info = {}
