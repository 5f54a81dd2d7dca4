"""Errors as callers see them: a status code, a message that names the object, a reason, and what to
do next.
"""

from __future__ import annotations

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

DOMAIN = "vswitch"
STATUS_KEY = "grpc-status-details-bin"


class ApiError(Exception):
    """An error with its `google.rpc.Status` details. `reason` is stable and UPPER_SNAKE; `remedy` is
    for humans.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str,
        remedy: str = "",
        violations: tuple[tuple[str, str], ...] = (),
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = reason
        self.remedy = remedy
        self.violations = violations
        self.metadata = metadata or {}

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        """The rich error model's trailer."""
        metadata = dict(self.metadata)
        if self.remedy:
            metadata["remedy"] = self.remedy
        details: list[Message] = [
            error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=metadata)
        ]
        if self.violations:
            details.append(
                error_details_pb2.BadRequest(
                    field_violations=[
                        error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
                        for field, description in self.violations
                    ]
                )
            )
        status = status_pb2.Status(
            code=code_pb2.Code.Value(self.code.name), message=self.message, details=map(_any, details)
        )
        return ((STATUS_KEY, status.SerializeToString()),)


def _any(message: Message) -> Any:
    packed = Any()
    packed.Pack(message)
    return packed


def not_found(name: str, remedy: str = "") -> ApiError:
    """There is no resource of this name."""
    return ApiError(
        grpc.StatusCode.NOT_FOUND,
        f"{name} does not exist",
        reason="NOT_FOUND",
        remedy=remedy,
        metadata={"resource": name},
    )


def already_exists(name: str) -> ApiError:
    """The name is taken."""
    return ApiError(
        grpc.StatusCode.ALREADY_EXISTS,
        f"{name} exists already",
        reason="ALREADY_EXISTS",
        remedy="choose another name, or delete it first",
        metadata={"resource": name},
    )


def invalid(field: str, description: str, remedy: str = "") -> ApiError:
    """One field of the request is wrong."""
    return ApiError(
        grpc.StatusCode.INVALID_ARGUMENT,
        f"{field}: {description}",
        reason="INVALID_FIELD",
        remedy=remedy,
        violations=((field, description),),
    )


def precondition(name: str, message: str, *, reason: str, remedy: str) -> ApiError:
    """The resource is not in a state in which this can be done."""
    return ApiError(
        grpc.StatusCode.FAILED_PRECONDITION,
        message,
        reason=reason,
        remedy=remedy,
        metadata={"resource": name},
    )


def exhausted(message: str, remedy: str) -> ApiError:
    """A limit is reached."""
    return ApiError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, reason="LIMIT_REACHED", remedy=remedy)


def unavailable(name: str, message: str, *, reason: str, remedy: str) -> ApiError:
    """Something that the daemon depends on did not come up or has gone."""
    return ApiError(
        grpc.StatusCode.UNAVAILABLE, message, reason=reason, remedy=remedy, metadata={"resource": name}
    )
