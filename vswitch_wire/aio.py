"""Signals eventfds that a hostile peer shares: by the completion of an asynchronous no-op (Linux AIO).

O_NONBLOCK belongs to the open file description: a peer may clear it and fill the counter between any two of
our calls: a write could block for ever. An AIO completion signals with the kernel's `eventfd_signal`, which
saturates instead of waiting. io_submit(2), IOCB_FLAG_RESFD; structures of include/uapi/linux/aio_abi.h.
The twin of native/memory/src/aio.rs.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import select
import struct

_NUMBERS = {"x86_64": (206, 208, 209), "aarch64": (0, 4, 2)}
"""io_setup, io_getevents, io_submit per machine."""
_IOCB = struct.Struct("<QIIHhIQQqQII")
_IOCB_CMD_POLL = 5
_IOCB_FLAG_RESFD = 1
_EVENTS = 128
_EVENT_BYTES = 32
_ATTEMPTS = 8


class _Context:
    """The process's one context; never taken down."""

    def __init__(self) -> None:
        """OSError where the kernel gives none."""
        self._setup, self._getevents, self._submit = _NUMBERS.get(platform.machine(), (-1, -1, -1))
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.syscall.restype = ctypes.c_long
        self._id = ctypes.c_ulong(0)
        self._call(self._setup, ctypes.c_long(_EVENTS), ctypes.byref(self._id))
        # Always readable: polling it completes at once.
        self._readable = os.eventfd(1, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._events = ctypes.create_string_buffer(_EVENTS * _EVENT_BYTES)
        self._now = (ctypes.c_long * 2)(0, 0)

    def _call(self, number: int, *arguments: object) -> int:
        result: int = self._libc.syscall(ctypes.c_long(number), *arguments)
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result

    def signal(self, fd: int) -> None:
        """Adds 1 to the eventfd `fd`, or leaves it full, and wakes its pollers. OSError when it cannot."""
        request = ctypes.create_string_buffer(
            _IOCB.pack(
                0, 0, 0, _IOCB_CMD_POLL, 0, self._readable, select.POLLIN, 0, 0, 0, _IOCB_FLAG_RESFD, fd
            ),
            _IOCB.size,
        )
        requests = ctypes.pointer(request)
        for _ in range(_ATTEMPTS):
            try:
                self._call(self._submit, self._id, ctypes.c_long(1), ctypes.byref(requests))
                return
            except BlockingIOError:
                # The ring of completions is full; they tell nothing and are forgotten.
                self._call(
                    self._getevents,
                    self._id,
                    ctypes.c_long(0),
                    ctypes.c_long(_EVENTS),
                    self._events,
                    self._now,
                )
        raise OSError(errno.EAGAIN, "no room for a completion")


@functools.cache
def _context() -> _Context | None:
    try:
        return _Context()
    except OSError:
        return None


def available() -> bool:
    """Makes the context ready, before a peer can use up the system's share of them; whether there is one."""
    return _context() is not None


def signal(fd: int) -> bool:
    """Adds 1 to the eventfd `fd`, whatever its peer does to it; False when the kernel does not do that."""
    context = _context()
    if context is None:
        return False
    try:
        context.signal(fd)
    except OSError:
        return False
    return True
