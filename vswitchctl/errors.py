"""What went wrong with a call, as an exception that says which object, why, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2

STATUS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True)
class FieldViolation:
    """One field of the request and what is wrong with it."""

    field: str
    description: str


@dataclass
class VswitchError(Exception):
    """A call that failed. `str()` gives the message; `remedy` may be empty."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    remedy: str = ""
    violations: list[FieldViolation] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


class DaemonUnavailable(VswitchError):
    """No daemon answers on the socket."""


@contextmanager
def rpc_errors(target: str) -> Iterator[None]:
    """Failures of calls to `target` in the block, as `VswitchError`."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, target) from None


def from_rpc_error(error: grpc.RpcError, target: str) -> VswitchError:
    """The exception for a failed call to `target`, with its `google.rpc.Status` details unpacked."""
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    message = (error.details() if hasattr(error, "details") else None) or str(error)
    status = _status(error)
    if status is None:
        if code == grpc.StatusCode.UNAVAILABLE:
            return DaemonUnavailable(
                code,
                f"no vswitch daemon answers at {target}{_unusual(message)}",
                reason="DAEMON_UNAVAILABLE",
                remedy="start one with `vswitch daemon start`, or name its directory with VSWITCH_RUN_DIR",
            )
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return VswitchError(
                code, f"the daemon did not answer in time ({message})", reason="DEADLINE_EXCEEDED"
            )
        return VswitchError(code, message)
    result = VswitchError(code, status.message or message)
    for detail in status.details:
        _unpack(detail, result)
    return result


def _unusual(message: str) -> str:
    """Why a connection failed, unless there simply is nobody."""
    cause = message.rpartition("last error: ")[2]
    return "" if "No such file" in cause or "Connection refused" in cause else f" ({cause})"


def _unpack(detail: AnyMessage, result: VswitchError) -> None:
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    if detail.Unpack(info):
        result.reason = info.reason
        result.metadata = dict(info.metadata)
        result.remedy = result.metadata.pop("remedy", "")
    elif detail.Unpack(bad):
        result.violations += [FieldViolation(each.field, each.description) for each in bad.field_violations]


def _status(error: grpc.RpcError) -> status_pb2.Status | None:
    trailing: Any = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    for key, value in trailing or ():
        if key == STATUS_KEY and isinstance(value, bytes):
            return status_pb2.Status.FromString(value)
    return None
