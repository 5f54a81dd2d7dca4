"""The RNDIS control plane of the host: answers to a guest's control messages, and indications to it.

Format: MS-RNDIS 2.2; behaviour as openvmm ``netvsp`` and vmswitch: HALT has no answer, RESET is refused,
KEEPALIVE is answered, indications wait for INITIALIZE because guests lose earlier ones.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from netvsp.oids import Adapter, OidError
from vswitch_wire import rndis
from vswitch_wire.errors import WireError


class RndisControl:
    """One channel's RNDIS state: initialised or not, and the adapter behind it."""

    def __init__(
        self, adapter: Adapter, send: Callable[[bytes], None], on_state: Callable[[bool], None]
    ) -> None:
        """``send`` takes whole RNDIS messages for the guest; ``on_state`` is told of INITIALIZE and HALT."""
        self._adapter = adapter
        self._send = send
        self._on_state = on_state
        self.initialised = False
        self.malformed = 0

    def handle(self, message: bytes) -> None:
        """Acts on one control message. A malformed one is counted, and answered where it names a request."""
        try:
            decoded = rndis.decode(message)
        except WireError:
            self.malformed += 1
            self._refuse(message)
            return
        if not self.initialised and not isinstance(decoded, rndis.Initialize | rndis.Halt):
            self.malformed += 1
            self._refuse(message, rndis.RNDIS_STATUS_FAILURE)
            return
        match decoded:
            case rndis.Initialize():
                self._initialise(decoded)
            case rndis.Halt():
                self.initialised = False
                self._adapter.filter = 0
                self._on_state(False)
            case rndis.Query():
                status, info = self.query(decoded.oid, decoded.info)
                self._send(rndis.QueryComplete(decoded.request_id, status, info).pack())
            case rndis.Set():
                self._send(rndis.SetComplete(decoded.request_id, self._set(decoded.oid, decoded.info)).pack())
            case rndis.KeepAlive():
                self._send(rndis.KeepAliveComplete(decoded.request_id, rndis.RNDIS_STATUS_SUCCESS).pack())
            case rndis.Reset():
                self._send(rndis.ResetComplete(rndis.RNDIS_STATUS_NOT_SUPPORTED, 0).pack())
            case _:
                self.malformed += 1

    def query(self, oid: int, info: bytes) -> tuple[int, bytes]:
        """NDIS status and answer of an OID query (also for NVSP's OID_QUERY_EX)."""
        try:
            return rndis.RNDIS_STATUS_SUCCESS, self._adapter.query(oid, info)
        except OidError as error:
            return error.status, b""

    def indicate(self, status: int, data: bytes = b"") -> bool:
        """Sends a status indication; False before INITIALIZE, when a guest would lose it."""
        if not self.initialised:
            return False
        self._send(rndis.IndicateStatus(status, data).pack())
        return True

    def _set(self, oid: int, info: bytes) -> int:
        try:
            self._adapter.set(oid, info)
        except OidError as error:
            return error.status
        return rndis.RNDIS_STATUS_SUCCESS

    def _initialise(self, message: rndis.Initialize) -> None:
        if message.major_version != rndis.RNDIS_MAJOR_VERSION:
            self._send(rndis.InitializeComplete(message.request_id, rndis.RNDIS_STATUS_BAD_VERSION).pack())
            return
        self.initialised = True
        # The data path opens first: a guest may send the moment it reads the answer.
        self._on_state(True)
        self._send(rndis.InitializeComplete(message.request_id).pack())

    def _refuse(self, message: bytes, status: int = rndis.RNDIS_STATUS_INVALID_LENGTH) -> None:
        """Answers a request that could not be understood, if it is long enough to name its id."""
        kind = int.from_bytes(message[:4], "little")
        if len(message) < 12:
            return
        (request_id,) = struct.unpack_from("<I", message, 8)
        if kind == rndis.RNDIS_MSG_INIT:
            self._send(rndis.InitializeComplete(request_id, status).pack())
        elif kind == rndis.RNDIS_MSG_QUERY:
            self._send(rndis.QueryComplete(request_id, status).pack())
        elif kind == rndis.RNDIS_MSG_SET:
            self._send(rndis.SetComplete(request_id, status).pack())
        elif kind == rndis.RNDIS_MSG_KEEPALIVE:
            self._send(rndis.KeepAliveComplete(request_id, status).pack())
        elif kind == rndis.RNDIS_MSG_RESET:
            self._send(rndis.ResetComplete(status, 0).pack())
