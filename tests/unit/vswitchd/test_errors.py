"""Errors travel as google.rpc.Status and come out at the client as they went in."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest

from vswitchctl.errors import FieldViolation, VswitchError, from_rpc_error
from vswitchd.errors import ApiError, invalid, not_found, precondition


def over_the_wire(error: ApiError) -> VswitchError:
    failed = grpc.aio.AioRpcError(
        error.code,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(*error.trailing_metadata()),
        error.message,
    )
    return from_rpc_error(failed, "/run/api.sock")


def test_a_refused_field_arrives_with_its_path_and_description() -> None:
    arrived = over_the_wire(invalid("nic.mac", "'x' is not a MAC address", "write it as 00:15:5d:01:02:03"))
    assert arrived.code is grpc.StatusCode.INVALID_ARGUMENT
    assert arrived.violations == [FieldViolation("nic.mac", "'x' is not a MAC address")]
    assert arrived.remedy == "write it as 00:15:5d:01:02:03"
    assert str(arrived) == "nic.mac: 'x' is not a MAC address"


def test_a_missing_resource_arrives_with_its_name() -> None:
    arrived = over_the_wire(not_found("switches/s0", "see the list"))
    assert (arrived.code, arrived.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
    assert arrived.metadata == {"resource": "switches/s0"}


def test_a_precondition_arrives_with_reason_and_remedy() -> None:
    arrived = over_the_wire(precondition("partitions/a", "a runs", reason="PARTITION_RUNS", remedy="stop it"))
    assert (arrived.reason, arrived.remedy) == ("PARTITION_RUNS", "stop it")


def test_no_daemon_is_an_error_of_its_own_that_says_how_to_start_one() -> None:
    failed = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "error: Connection refused"
    )
    arrived = from_rpc_error(failed, "/run/api.sock")
    assert str(arrived) == "no vswitch daemon answers at /run/api.sock"
    assert "vswitch daemon start" in arrived.remedy


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED])
def test_a_status_without_details_keeps_its_code_and_words(code: grpc.StatusCode) -> None:
    failed = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "some words")
    assert (from_rpc_error(failed, "x").code, str(from_rpc_error(failed, "x"))) == (code, "some words")
