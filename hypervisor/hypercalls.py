"""Hypercall dispatch: the register image in, the register image out (TLFS, Hypercall Interface).

Every status a guest can see is decided here or in the method that a call ends in. Nothing a guest passes
raises beyond this module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vswitch_wire import hypercall
from vswitch_wire.door import Hypercall, HypercallResult
from vswitch_wire.errors import MemoryAccessError, WireError
from vswitch_wire.guest_codecs import GuestCodecs
from vswitch_wire.hypercall import HvStatus
from vswitch_wire.memory import GuestMemory

_PAGE = 4096


class HypercallFailure(Exception):
    """The call ends with this status."""

    def __init__(self, status: HvStatus) -> None:
        super().__init__(status.name)
        self.status = status


class Caller(Protocol):
    """What a hypercall may ask of the partition that makes it."""

    id: int
    privileges: int
    codecs: GuestCodecs

    @property
    def memory(self) -> GuestMemory: ...
    def post_message(self, connection_id: int, message_type: int, payload: bytes) -> HvStatus: ...
    def signal_event(self, connection_id: int) -> HvStatus: ...
    def create_child(self) -> int: ...
    def finalize_child(self, partition_id: int) -> None: ...
    def delete_child(self, partition_id: int) -> None: ...
    def property_of(self, partition_id: int, code: int) -> int: ...


@dataclass(frozen=True, slots=True)
class _Call:
    handler: Callable[[Caller, bytes], bytes]
    input_size: int
    output_size: int = 0
    privilege: int = 0
    fast: bool = False


def dispatch(caller: Caller, registers: Hypercall) -> HypercallResult:
    """Run one hypercall of `caller`."""
    try:
        _run(caller, registers)
        status = HvStatus.SUCCESS
    except HypercallFailure as failure:
        status = failure.status
    return HypercallResult(
        hypercall.result_word(status), registers.rcx, registers.rdx, registers.r8, registers.xmm
    )


def _run(caller: Caller, registers: Hypercall) -> None:
    code = registers.rcx & 0xFFFF
    call = _CALLS.get(code)
    if call is None:
        raise HypercallFailure(HvStatus.INVALID_HYPERCALL_CODE)
    try:
        control = hypercall.ControlWord.unpack(registers.rcx)
    except WireError:
        raise HypercallFailure(HvStatus.INVALID_HYPERCALL_INPUT) from None
    if control.variable_header or control.rep_count or control.rep_start or control.nested:
        raise HypercallFailure(HvStatus.INVALID_HYPERCALL_INPUT)
    if control.fast and not call.fast:
        raise HypercallFailure(HvStatus.INVALID_HYPERCALL_CODE)
    if call.privilege & ~caller.privileges:
        raise HypercallFailure(HvStatus.ACCESS_DENIED)
    if control.fast:
        block = (registers.rdx | registers.r8 << 64).to_bytes(16, "little")[: call.input_size]
    else:
        block = _read_block(caller.memory, registers.rdx, call.input_size)
        if call.output_size:
            # Checked before the call has effects, so that a bad address cannot lose its result.
            _check_block(registers.r8, call.output_size)
            _overlap(registers.rdx, call.input_size, registers.r8, call.output_size)
            _read_block(caller.memory, registers.r8, call.output_size)
    output = call.handler(caller, block)
    if output:
        caller.memory.write(registers.r8, output)


def _check_block(gpa: int, size: int) -> None:
    if gpa % 8:
        raise HypercallFailure(HvStatus.INVALID_ALIGNMENT)
    if gpa % _PAGE + size > _PAGE:
        raise HypercallFailure(HvStatus.INVALID_HYPERCALL_INPUT)


def _overlap(first: int, first_size: int, second: int, second_size: int) -> None:
    if first_size and first < second + second_size and second < first + first_size:
        raise HypercallFailure(HvStatus.INVALID_HYPERCALL_INPUT)


def _read_block(memory: GuestMemory, gpa: int, size: int) -> bytes:
    if not size:
        return b""
    _check_block(gpa, size)
    try:
        return memory.read(gpa, size)
    except MemoryAccessError:
        raise HypercallFailure(HvStatus.INVALID_HYPERCALL_INPUT) from None


def _post_message(caller: Caller, block: bytes) -> bytes:
    if any(block[4:8]):
        raise HypercallFailure(HvStatus.INVALID_PARAMETER)
    try:
        message = caller.codecs.post_message(block)
    except WireError:
        raise HypercallFailure(HvStatus.INVALID_PARAMETER) from None
    _finish(caller.post_message(_connection(message.connection_id), message.message_type, message.payload))
    return b""


def _signal_event(caller: Caller, block: bytes) -> bytes:
    event = hypercall.SignalEvent.unpack(block)
    if event.flag or event.reserved:
        raise HypercallFailure(HvStatus.INVALID_PARAMETER)
    _finish(caller.signal_event(_connection(event.connection_id)))
    return b""


def _connection(value: int) -> int:
    if value & ~hypercall.CONNECTION_ID_MASK:
        raise HypercallFailure(HvStatus.INVALID_HYPERCALL_INPUT)
    return value


def _finish(status: HvStatus) -> None:
    if status is not HvStatus.SUCCESS:
        raise HypercallFailure(status)


def _create_partition(caller: Caller, block: bytes) -> bytes:
    wanted = hypercall.CreatePartition.unpack(block)
    if wanted.flags or wanted.isolation:
        raise HypercallFailure(HvStatus.INVALID_PARAMETER)
    if wanted.disabled_features_0 or wanted.disabled_features_1 or wanted.disabled_xsave_features:
        raise HypercallFailure(HvStatus.INVALID_PARAMETER)
    return caller.create_child().to_bytes(8, "little")


def _finalize_partition(caller: Caller, block: bytes) -> bytes:
    caller.finalize_child(hypercall.PartitionId.unpack(block).partition_id)
    return b""


def _delete_partition(caller: Caller, block: bytes) -> bytes:
    caller.delete_child(hypercall.PartitionId.unpack(block).partition_id)
    return b""


def _get_partition_property(caller: Caller, block: bytes) -> bytes:
    wanted = hypercall.GetPartitionProperty.unpack(block)
    target = caller.id if wanted.partition_id == hypercall.HV_PARTITION_ID_SELF else wanted.partition_id
    return caller.property_of(target, wanted.property_code).to_bytes(8, "little")


def _get_partition_id(caller: Caller, block: bytes) -> bytes:
    return caller.id.to_bytes(8, "little")


_CALLS = {
    hypercall.HvCallCreatePartition: _Call(
        _create_partition, 56, output_size=8, privilege=hypercall.PRIVILEGE_CREATE_PARTITIONS
    ),
    hypercall.HvCallFinalizePartition: _Call(_finalize_partition, 8, fast=True),
    hypercall.HvCallDeletePartition: _Call(_delete_partition, 8, fast=True),
    hypercall.HvCallGetPartitionProperty: _Call(_get_partition_property, 16, output_size=8),
    hypercall.HvCallGetPartitionId: _Call(
        _get_partition_id, 0, output_size=8, privilege=hypercall.PRIVILEGE_ACCESS_PARTITION_ID
    ),
    hypercall.HvCallPostMessage: _Call(_post_message, 256, privilege=hypercall.PRIVILEGE_POST_MESSAGES),
    hypercall.HvCallSignalEvent: _Call(
        _signal_event, 8, privilege=hypercall.PRIVILEGE_SIGNAL_EVENTS, fast=True
    ),
}
