"""Landlock: file access, TCP, signals and abstract sockets beyond an allow-list are refused, also to root.

A ruleset handles every access right that the running kernel knows; what no rule allows is then denied with
EACCES. Rights are those of Linux include/uapi/linux/landlock.h; each kernel's ABI number says which exist.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterable
from pathlib import Path

from vswitch_confine import libc
from vswitch_confine.errors import ConfinementRefused

EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
REFER = 1 << 13
TRUNCATE = 1 << 14
IOCTL_DEV = 1 << 15

_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_NET_BIND_TCP = 1 << 0
_NET_CONNECT_TCP = 1 << 1
_SCOPE_ABSTRACT_UNIX_SOCKET = 1 << 0
_SCOPE_SIGNAL = 1 << 1
_REMEDY = "Linux 5.13 or newer with `landlock` in the lsm= boot parameter has it"


def abi() -> int:
    """The kernel's Landlock ABI, 1 or more. Raises ConfinementRefused where there is none."""
    try:
        return libc.syscall(libc.syscall_number("landlock"), None, 0, _CREATE_RULESET_VERSION)
    except OSError as error:
        raise ConfinementRefused("Landlock", error.errno or errno.ENOSYS, _REMEDY) from error


def handled_rights(version: int) -> tuple[int, int, int]:
    """All (file, network, scope) rights that a kernel of this ABI can deny."""
    files = (1 << 13) - 1
    if version >= 2:
        files |= REFER
    if version >= 3:
        files |= TRUNCATE
    if version >= 5:
        files |= IOCTL_DEV
    network = _NET_BIND_TCP | _NET_CONNECT_TCP if version >= 4 else 0
    scope = _SCOPE_ABSTRACT_UNIX_SOCKET | _SCOPE_SIGNAL if version >= 6 else 0
    return files, network, scope


def restrict(readable: Iterable[Path] = (), writable: Iterable[Path] = ()) -> int:
    """Deny this thread and its children everything but reading (and writing) beneath the given paths.

    A path that does not exist is left out: it needs no permission. Needs no_new_privs, set before. Returns
    the ABI used. Raises ConfinementRefused.
    """
    version = abi()
    files, network, scope = handled_rights(version)
    attributes = struct.pack("=QQQ", files, network, scope)[: 8 if version < 4 else 16 if version < 6 else 24]
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    base = libc.syscall_number("landlock")
    try:
        ruleset = libc.syscall(base, ctypes.cast(buffer, ctypes.c_void_p), len(attributes), 0)
        try:
            for path in readable:
                _allow(ruleset, path, READ_FILE | READ_DIR)
            for path in writable:
                _allow(ruleset, path, files & ~(EXECUTE | REFER | IOCTL_DEV))
            libc.syscall(base + 2, ruleset, 0)
        finally:
            os.close(ruleset)
    except OSError as error:
        raise ConfinementRefused("Landlock", error.errno or errno.EPERM, _REMEDY) from error
    return version


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, fd), 12)
        pointer = ctypes.cast(rule, ctypes.c_void_p)
        libc.syscall(libc.syscall_number("landlock") + 1, ruleset, _RULE_PATH_BENEATH, pointer, 0)
    finally:
        os.close(fd)
