"""Shutdown on request: the guest's init runs its hooks and powers off or restarts (Linux
drivers/hv/hv_util.c, shutdown_onchannelcallback; include/linux/hyperv.h, struct shutdown_msg_data).

Body: `u32 reason, u32 seconds to wait, u32 flags, 2048 bytes of text (UTF-16)`. The answer has the status
alone. Hibernation is not asked for.
"""

from __future__ import annotations

import struct
from typing import ClassVar
from uuid import UUID

from hypervisor.clock import Clock
from hypervisor.integration import icmsg
from hypervisor.integration.icmsg import Version
from hypervisor.integration.service import IntegrationError, IntegrationService

VERSIONS = (Version(1, 0), Version(3, 0), Version(3, 1), Version(3, 2))
RESTART_FROM = Version(3, 1)
REASON_PLANNED = 0x80000000
FLAG_FORCE = 1
FLAG_RESTART = 2
TEXT_BYTES = 2048

_BODY = struct.Struct(f"<III{TEXT_BYTES}s")


def pack_shutdown(flags: int, text: str = "", seconds: int = 0) -> bytes:
    """The body of a request; a long text is cut."""
    encoded = text.encode("utf-16-le")[: TEXT_BYTES - 2]
    return _BODY.pack(REASON_PLANNED, seconds, flags, encoded)


class Shutdown(IntegrationService):
    """The guest's shutdown driver."""

    name: ClassVar[str] = "shutdown"
    class_id = UUID("0e0b6031-5213-4934-818b-38d90ced39db")
    instance_id = UUID("b6650ff7-33bc-4840-8048-e0676786f393")
    message_type: ClassVar[int] = icmsg.ICMSGTYPE_SHUTDOWN
    largest_body: ClassVar[int] = _BODY.size

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock, VERSIONS)

    async def shutdown(self, *, restart: bool = False, force: bool = True, seconds: float = 10.0) -> None:
        """Ask the guest to shut down or restart; returns when it has agreed. IntegrationError when not."""
        version = self._ready().version
        if restart and (version is None or version < RESTART_FROM):
            raise IntegrationError(
                f"shutdown: the guest speaks version {version}, restarts need {RESTART_FROM}; shut it down"
            )
        flags = (FLAG_FORCE if force else 0) | (FLAG_RESTART if restart else 0)
        answer = await self.request(pack_shutdown(flags, "requested by the host"), seconds)
        if answer.status != icmsg.HV_S_OK:
            raise IntegrationError(f"shutdown: the guest refuses: {icmsg.status_text(answer.status)}")
