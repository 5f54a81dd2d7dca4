"""Privilege masks of partitions (TLFS, Feature Discovery: CPUID 0x40000003 EAX and EBX)."""

from __future__ import annotations

from vswitch_wire import hypercall

# What the stock VMBus drivers need.
GUEST = (
    hypercall.PRIVILEGE_ACCESS_PARTITION_REFERENCE_COUNTER
    | hypercall.PRIVILEGE_ACCESS_SYNIC_REGS
    | hypercall.PRIVILEGE_ACCESS_HYPERCALL_MSRS
    | hypercall.PRIVILEGE_ACCESS_VP_INDEX
    | hypercall.PRIVILEGE_ACCESS_PARTITION_ID
    | hypercall.PRIVILEGE_POST_MESSAGES
    | hypercall.PRIVILEGE_SIGNAL_EVENTS
)
# A guest that may have partitions of its own.
PARENT = GUEST | hypercall.PRIVILEGE_CREATE_PARTITIONS
