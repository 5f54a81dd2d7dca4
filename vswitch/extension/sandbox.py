"""The cage of an extension's process: what is taken away from it before the first line of its file runs.

Seccomp and Landlock are required. Namespaces come on top where the machine gives them; where it does not,
the two others still refuse sockets, signals, processes and files, and the extension's record says what is
missing.
"""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from vswitch_confine import ConfinementRefused, landlock, libc, limits, namespaces, seccomp

MEMORY_BYTES = 512 << 20
"""Address space of one extension's process."""
DESCRIPTORS = 32
NOBODY = 65534

# Status flags of a descriptor are shared with the process at its other end: were F_SETFL allowed, an
# extension could make the switch's eventfds blocking and then fill them. Duplicates are of no use to it.
_NOT_ALLOWED = frozenset(("fcntl", "dup", "dup2", "dup3", "pipe2", "eventfd2", "close_range"))
CALLS = tuple(name for name in seccomp.COMPUTE_AND_READ if name not in _NOT_ALLOWED)


@dataclass(frozen=True, slots=True)
class Cage:
    """What holds the process: the names of the layers, and a reason for each that is missing."""

    layers: tuple[str, ...]
    missing: tuple[str, ...]


def enter_namespaces() -> str:
    """User, PID, mount, network and IPC namespace of one's own. Returns why not, empty when entered."""
    try:
        namespaces.unshare(ipc=True, inside_uid=NOBODY, inside_gid=NOBODY)
    except ConfinementRefused as error:
        return str(error)
    return ""


def confine(missing: str) -> Cage:
    """Give up everything else, in the process that will run the extension. Raises ConfinementRefused."""
    limits.set_limits(memory_bytes=MEMORY_BYTES, descriptors=DESCRIPTORS, processes=0, file_bytes=0)
    limits.no_new_privileges()
    libc.drop_capabilities()
    limits.non_dumpable()
    version = landlock.restrict(readable=readable_paths())
    seccomp.restrict(CALLS)
    layers = ["no_new_privs", "capabilities dropped", f"Landlock ABI {version}", "seccomp", "rlimits"]
    if not missing:
        layers.insert(0, "namespaces")
    return Cage(tuple(layers), (missing,) if missing else ())


def readable_paths() -> list[Path]:
    """What imports need: the interpreter's library, installed packages, shared libraries, and our own
    packages.
    """
    names = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    names |= {*site.getsitepackages(), os.path.join(sys.base_prefix, "lib"), os.path.join(sys.prefix, "lib")}
    names |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"}
    root = Path(__file__).resolve().parent.parent.parent
    ours = [root / name for name in ("vswitch", "vswitch_confine", "vswitch_native", "vswitch_wire")]
    return [Path(name) for name in sorted(names)] + ours
