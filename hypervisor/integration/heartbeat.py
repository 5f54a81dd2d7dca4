"""Heartbeat: whether the guest's kernel still answers (Linux drivers/hv/hv_util.c,
heartbeat_onchannelcallback; include/linux/hyperv.h, struct heartbeat_msg_data).

Body: `u64 sequence, 8 x u32 reserved`. Every two seconds the host sends a number, the guest answers the next.
"""

from __future__ import annotations

import enum
import logging
import struct
from datetime import UTC, datetime
from typing import ClassVar
from uuid import UUID

from hypervisor.clock import Clock
from hypervisor.integration import icmsg
from hypervisor.integration.icmsg import Version
from hypervisor.integration.service import Answer, IntegrationError, IntegrationService, pause

_log = logging.getLogger("hypervisor.integration")

VERSIONS = (Version(1, 0), Version(3, 0))
INTERVAL_SECONDS = 2.0
LOST_SECONDS = 10.0
_BODY = struct.Struct("<Q32x")
_SEQUENCE = struct.Struct("<Q")


class HeartbeatState(enum.StrEnum):
    """What is known of the guest's kernel."""

    UNKNOWN = "unknown"
    """No driver has answered yet."""
    OK = "ok"
    LOST = "lost"
    """A driver answered once, and does no more."""


class Heartbeat(IntegrationService):
    """The guest's heartbeat driver."""

    name: ClassVar[str] = "heartbeat"
    class_id = UUID("57164f39-9115-4e78-ab55-382f3bd5422d")
    instance_id = UUID("fd149e91-82e0-4a7d-afa6-2a4166cbd7c0")
    message_type: ClassVar[int] = icmsg.ICMSGTYPE_HEARTBEAT
    largest_body: ClassVar[int] = _BODY.size

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock, VERSIONS)
        self.state = HeartbeatState.UNKNOWN
        self.last: datetime | None = None
        """When the guest answered last, by the host's clock."""
        self.wrong = 0
        """Answers with another number than the next one."""
        self._sequence = 0

    async def serve(self) -> None:
        """A beat every two seconds, as long as each is answered."""
        while True:
            session = self._ready()
            lost = self.clock.call_later(LOST_SECONDS, lambda: self._change(HeartbeatState.LOST))
            try:
                async with session.lock:
                    self._beat(await self.start(session, _BODY.pack(self._sequence)))
            except IntegrationError as error:
                if session.closed:
                    raise
                # The request could not be sent: a later one may.
                _log.debug("%s", error)
                self._change(HeartbeatState.LOST)
            finally:
                lost.cancel()
            await pause(self.clock, INTERVAL_SECONDS)

    def _beat(self, answer: Answer) -> None:
        expected = (self._sequence + 1) % (1 << 64)
        self._sequence = (expected + 1) % (1 << 64)
        if answer.status != icmsg.HV_S_OK or answer.body[:8] != _SEQUENCE.pack(expected):
            self.wrong += 1
            self._change(HeartbeatState.LOST)
            return
        self.last = datetime.fromtimestamp(self.clock.wall_ns() / 1e9, UTC)
        self._change(HeartbeatState.OK)

    def _change(self, state: HeartbeatState) -> None:
        if state is not self.state:
            self.state = state
            self.on_changed()

    def closed(self) -> None:
        """Whether the kernel lives is unknown without its driver."""
        self.state = HeartbeatState.UNKNOWN
