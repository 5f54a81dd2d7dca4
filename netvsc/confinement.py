"""What a netns guest may see of its host: its own namespaces, its own /proc, no run directory of the
daemon.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from vswitch_confine import libc, namespaces
from vswitch_confine.errors import ConfinementRefused
from vswitch_confine.namespaces import cover, enter

__all__ = ["HOSTS", "cover", "enter", "isolate_files", "run_directory_of", "set_host_name", "write_hosts"]

HOSTS = Path("/etc/hosts")
_SHARED_MEMORY = Path("/dev/shm")


def run_directory_of(listener: socket.socket) -> Path | None:
    """The daemon's run directory, from the path its door socket was bound to (RUN_DIR/doors/ID.sock)."""
    name = listener.getsockname()
    if not isinstance(name, str) or not name.startswith("/"):
        return None
    directory = Path(name).parent
    return directory.parent if directory.name == "doors" else None


def isolate_files() -> list[str]:
    """As PID 1: an own /proc, /sys, shared memory, ping for every group. Returns warnings, one per thing not
    granted."""
    warnings: list[str] = []
    try:
        namespaces.mount_proc()
    except ConfinementRefused as refused:
        cover(Path("/proc"), size="4k")  # what the host runs stays out of sight all the same
        warnings.append(f"/proc is empty in this guest: {refused.strerror}")
    try:  # /sys/class/net is the mounter's network namespace: without this, the host's interfaces
        libc.mount("sysfs", "/sys", "sysfs", libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC)
    except OSError as error:
        warnings.append(f"/sys shows the host's interfaces in this guest: {error.strerror}")
    if _SHARED_MEMORY.is_dir():
        cover(_SHARED_MEMORY, size="64m")
    try:
        Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 0\n", encoding="ascii")
    except OSError as error:
        warnings.append(f"unprivileged ping stays off: {error}")
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    return warnings


def set_host_name(name: str) -> None:
    """Set the guest's own host name (UTS namespace)."""
    socket.sethostname(name)


def write_hosts(text: str) -> None:
    """Give the guest an /etc/hosts of its own with this content; later calls replace the content.

    OSError where there is no /etc/hosts to bind over.
    """
    if not _hosts_is_ours():
        own = _SHARED_MEMORY / ".hosts"
        own.write_text(text, encoding="utf-8")
        own.chmod(0o644)
        libc.mount(str(own), str(HOSTS), "", libc.MS_BIND)
        own.unlink()  # the bind keeps it
        return
    HOSTS.write_text(text, encoding="utf-8")


def _hosts_is_ours() -> bool:
    return HOSTS.exists() and os.stat(HOSTS).st_dev == os.stat(_SHARED_MEMORY).st_dev
