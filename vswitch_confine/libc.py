"""The system calls that Python's `os` module does not offer, through ctypes and nothing else.

Every wrapper raises OSError with the kernel's errno. Numbers of calls that glibc does not wrap are listed per
machine; a machine that is not listed cannot be confined and says so.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

PR_SET_PDEATHSIG = 1
PR_GET_DUMPABLE = 3
PR_SET_DUMPABLE = 4
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18

_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_NUMBERS = {
    "x86_64": {"seccomp": 317, "capset": 126, "landlock": 444},
    "aarch64": {"seccomp": 277, "capset": 91, "landlock": 444},
}


def syscall_number(name: str) -> int:
    """The number of a call in `_NUMBERS`; OSError(ENOSYS) on a machine that is not listed there."""
    numbers = _NUMBERS.get(platform.machine())
    if numbers is None:
        raise OSError(errno.ENOSYS, f"no system call numbers known for {platform.machine()}")
    return numbers[name]


def syscall(number: int, *arguments: ctypes.c_void_p | ctypes.c_long | int | None) -> int:
    """Make a raw system call; integers are passed as longs. Raises OSError."""
    converted = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *converted))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def prctl(option: int, *arguments: int) -> int:
    """prctl(2) with up to four longs. Raises OSError."""
    padded = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    result = int(_libc.prctl(ctypes.c_int(option), *padded))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def unshare(flags: int) -> None:
    """unshare(2). Raises OSError."""
    if _libc.unshare(ctypes.c_int(flags)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def mount(source: str, target: str, filesystem: str, flags: int, data: str = "") -> None:
    """mount(2). Raises OSError naming the target."""
    done = _libc.mount(
        source.encode(), target.encode(), filesystem.encode(), ctypes.c_ulong(flags), data.encode() or None
    )
    if done < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), target)


def drop_capabilities() -> None:
    """Empty the effective, permitted, inheritable and ambient sets, and the bounding set where allowed."""
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            break  # EINVAL: past the last one; EPERM: without CAP_SETPCAP nothing is to be gained either
    try:
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a kernel without ambient capabilities
            raise
    header = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()
    pointers = (ctypes.cast(header, ctypes.c_void_p), ctypes.cast(data, ctypes.c_void_p))
    syscall(syscall_number("capset"), *pointers)
