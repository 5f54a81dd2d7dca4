"""Run by path as a process of its own: does what a netns guest does, step by step; prints outcomes as JSON.

Standard library only, and nothing of ours, so that it runs under `python -I` whatever else is broken. Each
value printed is "ok" or the name of the errno. Leaves nothing behind: all of it lives in its own namespaces.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import socket
import struct
import sys
from collections.abc import Callable

CLONE_NEWNS = 0x0002_0000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000

TUNSETIFF = 0x4004_54CA
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000

NETLINK_ROUTE, RTM_NEWLINK, NLM_F_CREATE_ACK = 0, 16, 0x0605
IFLA_IFNAME, IFLA_LINKINFO, IFLA_INFO_KIND = 3, 18, 1

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _unshare(flags: int) -> None:
    _check(_libc.unshare(ctypes.c_int(flags)))


def _mount(source: bytes, target: bytes, kind: bytes, flags: int) -> None:
    _check(_libc.mount(source, target, kind, ctypes.c_ulong(flags), None))


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _map_ids(uid: int, gid: int) -> None:
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"0 {uid} 1")
    _write("/proc/self/gid_map", f"0 {gid} 1")


def _tap() -> None:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    with contextlib.closing(os.fdopen(fd, "rb", buffering=0)):
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"doctor0", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def _veth() -> None:
    info = _attribute(IFLA_LINKINFO, _attribute(IFLA_INFO_KIND, b"veth"))
    body = struct.pack("BxHiII", socket.AF_UNSPEC, 0, 0, 0, 0) + _attribute(IFLA_IFNAME, b"doctor1\0") + info
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE) as netlink:
        netlink.settimeout(5)
        netlink.send(struct.pack("IHHII", 16 + len(body), RTM_NEWLINK, NLM_F_CREATE_ACK, 1, 0) + body)
        number = -struct.unpack_from("i", netlink.recv(4096), 16)[0]
    if number:
        raise OSError(number, os.strerror(number))


def _packet_socket() -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()


def _sealed_memory() -> None:
    fd = os.memfd_create("doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 4096)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) != seals:
            raise OSError(errno.EOPNOTSUPP, "seals do not stick")
    finally:
        os.close(fd)


def _own_proc() -> None:
    """PID 1 of a new PID namespace mounts its own /proc; told by the exit status, which is an errno."""
    child = os.fork()
    if child == 0:
        number = 0
        try:
            _mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        except OSError as error:
            number = error.errno or errno.EIO
        os._exit(number)
    number = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if number:
        raise OSError(number, os.strerror(number))


def main() -> int:
    """Prints {"step": "ok" | errno name}; steps that need an earlier one that failed are left out."""
    result: dict[str, str] = {}

    def step(name: str, action: Callable[[], None]) -> bool:
        try:
            action()
        except OSError as error:
            result[name] = errno.errorcode.get(error.errno or 0, str(error))
            return False
        result[name] = "ok"
        return True

    step("memfd_seals", _sealed_memory)
    uid, gid = os.getuid(), os.getgid()
    if (
        step("user_namespace", lambda: _unshare(CLONE_NEWUSER))
        and step("id_map", lambda: _map_ids(uid, gid))
        and step("net_namespace", lambda: _unshare(CLONE_NEWNET))
    ):
        step("tap", _tap)
        step("veth", _veth)
        step("packet_socket", _packet_socket)
        if step("mount_namespace", lambda: _unshare(CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUTS)) and step(
            "private_mounts", lambda: _mount(b"none", b"/", b"none", MS_REC | MS_PRIVATE)
        ):
            step("tmpfs", lambda: _mount(b"tmpfs", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV))
            step("proc", _own_proc)
    sys.stdout.write(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
