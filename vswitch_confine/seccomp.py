"""A seccomp filter from a list of allowed system calls, assembled here; everything else gets EPERM.

The program checks the machine first (a foreign ABI's call numbers mean other calls: the process is killed),
then compares the number. `clone3` is answered ENOSYS so that libc falls back to `clone`, whose flags a filter
can read. seccomp(2); Linux include/uapi/linux/seccomp.h, bpf_common.h.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
from collections.abc import Iterable

from vswitch_confine import libc
from vswitch_confine.calls import CALLS
from vswitch_confine.errors import ConfinementRefused

_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_GET_ACTION_AVAIL = 2
_RET_KILL_PROCESS = 0x80000000
_RET_ERRNO = 0x00050000
_RET_ALLOW = 0x7FFF0000

_LOAD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_GREATER_EQUAL = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_OFFSET_NUMBER = 0  # struct seccomp_data: nr, arch, instruction pointer, args
_OFFSET_MACHINE = 4
_X32_BIT = 0x40000000

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_REMEDY = "a kernel with CONFIG_SECCOMP_FILTER has it; containers allow it by default"

# What a Python process needs that computes, reads files, waits on descriptors it was given, and ends.
# No sockets are made, no process or thread is started, nothing is executed, signalled or traced.
COMPUTE_AND_READ = """
    access arch_prctl brk clock_getres clock_gettime clock_nanosleep close close_range dup dup2 dup3
    epoll_create1 epoll_ctl epoll_pwait epoll_wait eventfd2 exit exit_group faccessat faccessat2
    fcntl fstat futex get_robust_list getcwd getdents64 getegid geteuid getgid getpgid getpgrp
    getpid getppid getrandom getresgid getresuid getrlimit getrusage getsid gettid gettimeofday
    getuid lseek lstat madvise membarrier mmap mprotect mremap munmap nanosleep newfstatat open
    openat pipe2 poll ppoll pread64 preadv preadv2 prlimit64 pselect6 pwrite64 read readlink readlinkat
    readv recvfrom recvmsg restart_syscall rseq rt_sigaction rt_sigprocmask rt_sigreturn
    sched_getaffinity sched_yield select sendmsg sendto set_robust_list set_tid_address sigaltstack
    stat statx sysinfo time times umask uname write writev
""".split()  # noqa: SIM905 - a list of 90 quoted words is harder to read


def supported() -> None:
    """Raise ConfinementRefused when the kernel or this machine cannot run such a filter."""
    if platform.machine() not in _AUDIT_ARCH:
        advice = f"call numbers for {platform.machine()} are not known here; x86_64 and aarch64 are"
        raise ConfinementRefused("seccomp", errno.ENOSYS, advice)
    action = ctypes.c_uint32(_RET_KILL_PROCESS)
    pointer = ctypes.cast(ctypes.pointer(action), ctypes.c_void_p)
    try:
        libc.syscall(libc.syscall_number("seccomp"), _SECCOMP_GET_ACTION_AVAIL, 0, pointer)
    except OSError as error:
        raise ConfinementRefused("seccomp", error.errno or errno.ENOSYS, _REMEDY) from error


def assemble(allowed: Iterable[str], machine: str | None = None) -> bytes:
    """The BPF program that allows the named calls; names this machine does not have are left out.

    ValueError on a name that no machine has. At most 250 calls: jumps reach 255 instructions.
    """
    machine = machine or platform.machine()
    table = CALLS[machine]
    numbers: set[int] = set()
    for name in allowed:
        if name in table:
            numbers.add(table[name])
        elif not any(name in other for other in CALLS.values()):
            raise ValueError(f"seccomp: no system call is named {name!r}")
    ordered = sorted(numbers)
    if len(ordered) > 250:
        raise ValueError(f"seccomp: {len(ordered)} allowed calls, at most 250 fit one filter")
    count = len(ordered)
    program = [
        (_LOAD_WORD, 0, 0, _OFFSET_MACHINE),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _RET_KILL_PROCESS),
        (_LOAD_WORD, 0, 0, _OFFSET_NUMBER),
    ]
    if machine == "x86_64":  # x32 calls carry this bit and would otherwise need numbers of their own
        program += [(_JUMP_GREATER_EQUAL, 0, 1, _X32_BIT), (_RETURN, 0, 0, _RET_KILL_PROCESS)]
    program += [(_JUMP_EQUAL, 0, 1, table["clone3"]), (_RETURN, 0, 0, _RET_ERRNO | errno.ENOSYS)]
    # Each comparison jumps over the remaining ones and the refusal to the last instruction.
    program += [(_JUMP_EQUAL, count - index, 0, number) for index, number in enumerate(ordered)]
    program += [(_RETURN, 0, 0, _RET_ERRNO | errno.EPERM), (_RETURN, 0, 0, _RET_ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def restrict(allowed: Iterable[str] = COMPUTE_AND_READ) -> None:
    """Allow this thread and its children these calls only. Needs no_new_privs. Raises ConfinementRefused."""
    supported()
    program = assemble(allowed)
    code = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):  # struct sock_fprog
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    header = Program(len(program) // 8, ctypes.addressof(code))
    pointer = ctypes.cast(ctypes.pointer(header), ctypes.c_void_p)
    try:
        libc.syscall(libc.syscall_number("seccomp"), _SECCOMP_SET_MODE_FILTER, 0, pointer)
    except OSError as error:
        raise ConfinementRefused("seccomp", error.errno or errno.EPERM, _REMEDY) from error
