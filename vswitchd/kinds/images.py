"""Kernels and RAM disks of virtual machines: opened by the daemon, checked, and handed over as
descriptors.
"""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

MAX_KERNEL_BYTES = 512 << 20
MAX_INITRD_BYTES = 4 << 30
BZIMAGE = "a bzImage: /boot/vmlinuz-* of a distribution, arch/x86/boot/bzImage of a kernel's own build"


class ImageProblem(Exception):
    """A file that cannot be booted; the message names it, `remedy` says what to do."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


def open_kernel(path: str) -> int:
    """A descriptor of the kernel. ImageProblem."""
    fd = _open(path, "kernel", MAX_KERNEL_BYTES, f"give {BZIMAGE}")
    try:
        _check_kernel(path, os.pread(fd, 0x210, 0))
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_initrd(path: str) -> int:
    """A descriptor of the initial RAM disk. ImageProblem."""
    return _open(path, "initrd", MAX_INITRD_BYTES, "give a cpio archive, compressed or not")


def size_of(fd: int) -> int:
    """Bytes of an open image."""
    return os.fstat(fd).st_size


def _open(path: str, what: str, most: int, remedy: str) -> int:
    if not os.path.isabs(path) or "\0" in path:
        raise ImageProblem(f"{what} {path!r} is not an absolute path", "begin it with /")
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        raise ImageProblem(f"{what} {path} does not exist", _near(path) or remedy) from None
    except PermissionError:
        raise ImageProblem(
            f"{what} {path} may not be read by the daemon (uid {os.geteuid()})",
            "copy it to a place of your own, or have it made readable: chmod +r",
        ) from None
    except OSError as error:
        raise ImageProblem(f"{what} {path} cannot be opened: {error.strerror}", remedy) from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ImageProblem(f"{what} {path} is not a regular file", remedy)
        if status.st_size == 0:
            raise ImageProblem(f"{what} {path} is empty", remedy)
        if status.st_size > most:
            raise ImageProblem(
                f"{what} {path} has {status.st_size >> 20} MiB; at most {most >> 20} MiB are taken", remedy
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def _near(path: str) -> str:
    """Files beside a missing one whose names begin alike: kernels are named by their version."""
    parent, stem = Path(path).parent, Path(path).name.split("-")[0]
    try:
        names = sorted(entry.name for entry in parent.iterdir() if stem and entry.name.startswith(stem))
    except OSError:
        return ""
    return f"in {parent} there is: {', '.join(names[:5])}" if names else ""


def _check_kernel(path: str, head: bytes) -> None:
    """The setup header of the x86 boot protocol (Linux Documentation/arch/x86/boot.rst), or an ELF file."""
    if head.startswith(b"\x7fELF"):
        return
    if len(head) < 0x210 or head[0x1FE:0x200] != b"\x55\xaa" or head[0x202:0x206] != b"HdrS":
        raise ImageProblem(f"kernel {path} is no Linux kernel for x86", f"give {BZIMAGE}")
    version = struct.unpack_from("<H", head, 0x206)[0]
    if version < 0x206:
        spoken = f"{version >> 8}.{version & 0xFF:02}"
        raise ImageProblem(
            f"kernel {path} speaks boot protocol {spoken}, older than 2.06",
            "give a kernel of 2.6.22 or newer",
        )
