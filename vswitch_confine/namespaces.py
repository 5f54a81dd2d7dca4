"""Namespaces of a process's own: user, PID, mount, network, UTS, IPC; for root and for ordinary users alike.

`unshare()` needs a single-threaded caller (the kernel's rule for user namespaces). A PID namespace holds the
children made after it, so a caller that asked for one forks next: that child is its PID 1, and with it
everything inside ends (`fork_first`). user_namespaces(7), pid_namespaces(7).
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterable
from pathlib import Path

from vswitch_confine import libc
from vswitch_confine.errors import ConfinementRefused

_FLAGS = {
    "user": libc.CLONE_NEWUSER,
    "pid": libc.CLONE_NEWPID,
    "mount": libc.CLONE_NEWNS,
    "net": libc.CLONE_NEWNET,
    "uts": libc.CLONE_NEWUTS,
    "ipc": libc.CLONE_NEWIPC,
}


def unshare(
    *,
    user: bool = True,
    pid: bool = True,
    mount: bool = True,
    net: bool = True,
    uts: bool = False,
    ipc: bool = False,
    inside_uid: int = 0,
    inside_gid: int = 0,
) -> None:
    """Enter new namespaces; the caller's uid and gid appear inside as `inside_uid` and `inside_gid`.

    Mounts are made private, so that nothing mounted inside is seen outside. Raises ConfinementRefused.
    """
    chosen = {"user": user, "pid": pid, "mount": mount, "net": net, "uts": uts, "ipc": ipc}
    flags = 0
    for name, wanted in chosen.items():
        flags |= _FLAGS[name] if wanted else 0
    uid, gid = os.geteuid(), os.getegid()
    try:
        libc.unshare(flags)
    except OSError as error:
        raise ConfinementRefused("namespaces", error.errno or errno.EPERM, remedy(error.errno)) from error
    if user:
        _map_ids(uid, gid, inside_uid, inside_gid)
    if mount:
        try:
            libc.mount("none", "/", "", libc.MS_REC | libc.MS_PRIVATE)
        except OSError as error:
            raise ConfinementRefused(
                "mount namespace", error.errno or errno.EPERM, remedy(error.errno)
            ) from error


def _map_ids(uid: int, gid: int, inside_uid: int, inside_gid: int) -> None:
    """One line each: an ordinary user may map only itself, and root needs no more than that."""
    own = Path("/proc/self")
    try:
        (own / "setgroups").write_text("deny")
        (own / "uid_map").write_text(f"{inside_uid} {uid} 1\n")
        (own / "gid_map").write_text(f"{inside_gid} {gid} 1\n")
    except OSError as error:
        raise ConfinementRefused("user namespace", error.errno or errno.EPERM, remedy(error.errno)) from error


def cover(directory: Path, size: str = "64k") -> None:
    """Put an empty tmpfs over `directory`. Raises ConfinementRefused."""
    flags = libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC
    try:
        libc.mount("tmpfs", str(directory), "tmpfs", flags, f"size={size},mode=0755")
    except OSError as error:
        raise ConfinementRefused(
            f"cover over {directory}", error.errno or 0, "run where tmpfs may be mounted in a user namespace"
        ) from error


def enter(covered: Iterable[Path]) -> int:
    """Make all namespaces and fork; returns 0 in PID 1 of the new ones and its pid in the process outside.

    Must be called with a single thread. `covered` directories are empty inside for good: two user namespaces
    are nested, and a mount made in the outer one is locked for all that happens in the inner one
    (mount_namespaces(7)), so that root inside cannot lift it.
    """
    unshare(user=True, mount=True, pid=False, net=False)
    for directory in covered:
        cover(directory)
    unshare(user=True, mount=True, pid=True, net=True, uts=True, ipc=True)
    return fork_first()


def fork_first() -> int:
    """Fork after `unshare(pid=True)`: returns 0 in the child (PID 1 inside), its pid in the caller.

    The child is killed when the caller dies. A PID 1 gets no default signal handlers from the kernel; SIGTERM
    and SIGINT must be handled by it if they are to have an effect.
    """
    child = os.fork()
    if child == 0:
        libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    return child


def mount_proc() -> None:
    """Mount a /proc of the new PID namespace, as its PID 1. Raises ConfinementRefused."""
    try:
        libc.mount("proc", "/proc", "proc", libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC)
    except OSError as error:
        advice = "a container that masks parts of /proc forbids it; run outside it or with --privileged"
        raise ConfinementRefused("mount of /proc", error.errno or errno.EPERM, advice) from error


def remedy(code: int | None) -> str:
    """One line of advice for an errno of unshare(2), as this machine's settings explain it."""
    if _setting("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1":
        return (
            "AppArmor restricts unprivileged user namespaces here; as root: "
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
        )
    if _setting("/proc/sys/kernel/unprivileged_userns_clone") == "0":
        return "as root: sysctl -w kernel.unprivileged_userns_clone=1"
    if code == errno.ENOSPC or _setting("/proc/sys/user/max_user_namespaces") == "0":
        return "as root: sysctl -w user.max_user_namespaces=15000"
    if code == errno.EINVAL:
        return "the caller has more than one thread, or the kernel was built without this namespace"
    if code == errno.ENOSYS:
        return "the kernel was built without namespaces"
    return (
        "a container's seccomp profile or a security module forbids it; "
        "run outside the container or with --security-opt seccomp=unconfined"
    )


def _setting(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
