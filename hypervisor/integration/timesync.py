"""Time sync: the host's time for the guest (Linux drivers/hv/hv_util.c, timesync_onchannelcallback;
include/linux/hyperv.h, struct ictimesync_data and ictimesync_ref_data).

Times count 100 ns from 1601. A message flagged "sync" makes the guest set its clock: the first one after the
driver opened, each one asked for, and one whenever the host's own clock was set. The others are samples,
which a guest may steer by.

Version 4 carries the partition's reference time at which the sample was taken; it is offered only where that
is the counter the guest reads. Earlier versions are taken as true when they arrive.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from typing import ClassVar
from uuid import UUID

from hypervisor.clock import Clock
from hypervisor.integration import icmsg
from hypervisor.integration.icmsg import Version
from hypervisor.integration.service import Answer, IntegrationError, IntegrationService, pause

_log = logging.getLogger("hypervisor.integration")

VERSIONS = (Version(1, 0), Version(3, 0), Version(4, 0))
REFERENCE_FROM = Version(4, 0)
EPOCH_1601 = 116444736000000000
FLAG_SYNC = 1
FLAG_SAMPLE = 2
SAMPLE_SECONDS = 5.0
JUMP_NS = 500_000_000
"""The host's clock was set when it moved so much against the time since boot between two samples."""
ANSWER_SECONDS = 10.0

_DATA = struct.Struct("<QQQB")
_REFERENCE_DATA = struct.Struct("<QQBbB3x")


def pack_sample(version: Version, wall_ns: int, reference: int, flags: int) -> bytes:
    """The body for a guest of this version. `wall_ns` counts from 1970, `reference` in 100 ns."""
    host = EPOCH_1601 + wall_ns // 100
    if version >= REFERENCE_FROM:
        # No leap second, stratum not given.
        return _REFERENCE_DATA.pack(host, reference, flags, 0, 0)
    return _DATA.pack(host, 0, 0, flags)


class TimeSync(IntegrationService):
    """The guest's time sync driver."""

    name: ClassVar[str] = "time sync"
    class_id = UUID("9527e630-d0ae-497b-adce-e80ab0175caf")
    instance_id = UUID("2dd1ce17-079e-403c-b352-a1921ee207ee")
    message_type: ClassVar[int] = icmsg.ICMSGTYPE_TIMESYNC
    largest_body: ClassVar[int] = _DATA.size

    def __init__(self, clock: Clock, reference_time: Callable[[], int] | None = None) -> None:
        """`reference_time`: the counter that the guest reads as its reference time, in 100 ns."""
        offered = VERSIONS if reference_time is not None else VERSIONS[:-1]
        super().__init__(clock, offered)
        self._reference_time = reference_time
        self._offset_ns = 0

    async def sync(self, seconds: float = ANSWER_SECONDS) -> None:
        """Set the guest's clock to the host's time; returns when its driver has it. IntegrationError."""
        offset = self._offset()
        answer = await self.request(lambda: self._body(FLAG_SYNC), seconds)
        if answer.status != icmsg.HV_S_OK:
            raise IntegrationError(f"time sync: the guest refuses: {icmsg.status_text(answer.status)}")
        self._offset_ns = offset

    async def serve(self) -> None:
        """Set the clock once, then samples, and again when the host's clock was set."""
        flags = FLAG_SYNC
        while True:
            try:
                self._offset_ns = self._offset()
                await self._sample(flags)
                flags = FLAG_SAMPLE
            except IntegrationError as error:
                # The guest owes the answer to a request that was given up: the same again later.
                _log.debug("%s", error)
            await pause(self.clock, SAMPLE_SECONDS)
            if self._jumped():
                flags = FLAG_SYNC

    async def _sample(self, flags: int) -> Answer:
        session = self._ready()
        async with session.lock:
            return await self.start(session, self._body(flags))

    def _body(self, flags: int) -> bytes:
        version = self._ready().version
        assert version is not None
        reference = 0 if self._reference_time is None else self._reference_time()
        return pack_sample(version, self.clock.wall_ns(), reference, flags)

    def _offset(self) -> int:
        return self.clock.wall_ns() - self.clock.now_ns()

    def _jumped(self) -> bool:
        return abs(self._offset() - self._offset_ns) >= JUMP_NS
