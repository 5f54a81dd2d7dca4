"""What `/proc` says about the processes of a lab: what they hold, what they map, what is left of them.

The demo's and the tests' evidence that a guest has no other way to the switch than its memory and its door.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = [
    "Holdings",
    "alive",
    "holdings",
    "members_of_namespaces",
    "mentioning",
    "namespace",
    "unix_sockets",
]

SOCK_SEQPACKET = 5
SO_ACCEPTCON = 0x10000


@dataclass(slots=True)
class Holdings:
    """The descriptors of one process, sorted by what they are. Inode numbers stand for memory and sockets."""

    pid: int
    memory: set[int] = field(default_factory=set)
    doors: set[int] = field(default_factory=set)  # connected
    listening: set[int] = field(default_factory=set)  # where a restarted daemon connects to the door again
    events: int = 0
    taps: set[str] = field(default_factory=set)  # names of their interfaces
    inside: int = 0  # sockets that exist only in the guest's own network namespace
    loops: int = 0  # epoll and signal descriptors: the process's own event loop
    pipes: int = 0
    stdio: int = 0  # 0, 1 and 2: /dev/null and the guest's log
    others: list[str] = field(default_factory=list)
    mapped: set[int] = field(default_factory=set)  # inodes of memory files mapped shared
    foreign_maps: list[str] = field(default_factory=list)


def holdings(pid: int) -> Holdings:
    """Reads `/proc/<pid>`: descriptors and shared mappings. Raises OSError when it is gone or not ours."""
    held = Holdings(pid)
    outside = {each.inode: each for each in unix_sockets(os.getpid())}
    inside = {each.inode for each in unix_sockets(pid)} | set(_other_sockets(pid))
    separate = namespace(pid, "net") != namespace(os.getpid(), "net")
    for number, target in _descriptors(pid):
        path = Path(f"/proc/{pid}/fd/{number}")
        if target.startswith("/memfd:"):
            held.memory.add(path.stat().st_ino)
        elif target.startswith("socket:["):
            inode = int(target[8:-1])
            if inode in outside and outside[inode].kind == SOCK_SEQPACKET:
                (held.listening if outside[inode].listens else held.doors).add(inode)
            elif separate and inode in inside and inode not in outside:
                held.inside += 1
            else:
                held.others.append(f"{number}: {target}")
        elif target == "anon_inode:[eventfd]":
            held.events += 1
        elif target in ("anon_inode:[eventpoll]", "anon_inode:[signalfd]", "anon_inode:[timerfd]"):
            held.loops += 1
        elif target == "/dev/net/tun":
            held.taps.add(_information(path, "iff"))
        elif target.startswith("pipe:["):
            held.pipes += 1
        elif number <= 2 and _harmless_stdio(path, target):
            held.stdio += 1
        else:
            held.others.append(f"{number}: {target}")
    for inode, target in _shared_maps(pid):
        if inode in held.memory:
            held.mapped.add(inode)
        elif not target.startswith(("/dev/zero", "anon_inode:", "/dev/shm/sem")):
            held.foreign_maps.append(target)
    return held


def _descriptors(pid: int) -> Iterator[tuple[int, str]]:
    for name in sorted(os.listdir(f"/proc/{pid}/fd"), key=int):
        try:
            yield int(name), os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue


def _harmless_stdio(path: Path, target: str) -> bool:
    """/dev/null, or a regular file opened for nothing but writing (the guest's log)."""
    if target == "/dev/null":
        return True
    if not stat.S_ISREG(path.stat().st_mode):
        return False
    return int(_information(path, "flags"), 8) & os.O_ACCMODE == os.O_WRONLY


def _information(path: Path, key: str) -> str:
    """A value of /proc/<pid>/fdinfo/<number>."""
    for line in path.parent.parent.joinpath("fdinfo", path.name).read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return value.strip()
    return ""


def _shared_maps(pid: int) -> Iterator[tuple[int, str]]:
    """(inode, path) of every writable mapping shared with whoever else has the file."""
    for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        words = line.split(maxsplit=5)
        if words[1][3] == "s" and words[1][1] == "w":
            yield int(words[4]), words[5] if len(words) > 5 else ""


@dataclass(frozen=True, slots=True)
class UnixSocket:
    """A line of /proc/net/unix; `path` is empty where it has no name."""

    inode: int
    kind: int
    listens: bool
    path: str


def unix_sockets(pid: int) -> Iterator[UnixSocket]:
    """The Unix sockets in the network namespace of `pid`."""
    for line in Path(f"/proc/{pid}/net/unix").read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
        words = line.split(maxsplit=7)
        listens = bool(int(words[3], 16) & SO_ACCEPTCON)
        yield UnixSocket(int(words[6]), int(words[4], 16), listens, words[7] if len(words) > 7 else "")


def _other_sockets(pid: int) -> Iterator[int]:
    """Inodes of the packet and netlink sockets in the network namespace of `pid`."""
    for table, column in (("packet", 8), ("netlink", 9)):
        for line in Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            yield int(line.split()[column])


def namespace(pid: int, kind: str) -> int:
    """Inode of a namespace of `pid`: the number that names it."""
    return os.stat(f"/proc/{pid}/ns/{kind}").st_ino


def interfaces(pid: int) -> list[str]:
    """Names of the network interfaces that `pid` sees."""
    lines = Path(f"/proc/{pid}/net/dev").read_text(encoding="ascii").splitlines()[2:]
    return sorted(line.split(":")[0].strip() for line in lines)


def alive(pids: Iterable[int]) -> list[int]:
    """Those that still run; a zombie does not."""
    found = []
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        if text.rpartition(")")[2].split()[0] not in ("Z", "X"):
            found.append(pid)
    return found


def _all() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            yield int(name)


def mentioning(text: str) -> list[int]:
    """Processes of this user whose command line or environment holds `text`, and that run."""
    needle = os.fsencode(text)
    found = []
    for pid in _all():
        for file in ("cmdline", "environ"):
            try:
                data = Path(f"/proc/{pid}/{file}").read_bytes()
            except OSError:
                continue
            if needle in data:
                found.append(pid)
                break
    return alive(found)


def members_of_namespaces(inodes: set[int]) -> list[int]:
    """Processes that live in one of the network namespaces `inodes`."""
    found = []
    for pid in _all():
        try:
            if namespace(pid, "net") in inodes:
                found.append(pid)
        except OSError:
            continue
    return found


def descendants(pid: int) -> list[int]:
    """Children of `pid`, their children and so on."""
    children: dict[int, list[int]] = {}
    for each in _all():
        try:
            text = Path(f"/proc/{each}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        children.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(each)
    found, todo = [], [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            found.append(child)
            todo.append(child)
    return found
