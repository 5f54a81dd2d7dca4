"""A guest's keys that depend on its kind: what a virtual machine boots, and how much memory either kind
has.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

from vswitchlab import files
from vswitchlab.problems import Path as Place
from vswitchlab.topology import Machine

__all__ = ["DEFAULT_CMDLINE", "machine", "memory"]

DEFAULT_CMDLINE = "console=ttyS0"
VM_KEYS = ("kernel", "initrd", "cmdline", "cpus", "host_cpus")
# MiB: what the daemon takes, by kind.
MEMORY = {"netns": (8, 1024), "vm": (16, 65536)}


class Report(Protocol):
    """Notes a problem at a place of the lab file."""

    def __call__(self, path: Place, what: str, remedy: str = "", *, at_value: bool = True) -> None: ...


def memory(bad: Report, path: Place, body: dict[str, Any]) -> int | None:
    """Guest memory in MiB; None for the daemon's default."""
    given = body.get("memory")
    if given is None:
        return None
    text = str(given)
    mebibytes = int(re.sub(r"[^0-9]", "", text)) << (10 if "G" in text else 0)
    kind = body.get("kind", "netns")
    low, high = MEMORY[kind]
    if not low <= mebibytes <= high:
        what = f"{text} is out of range for kind {kind}; allowed: {low}M to {high}M"
        bad((*path, "memory"), what, "for example 256M")
    return mebibytes


def machine(bad: Report, directory: Path, path: Place, body: dict[str, Any]) -> Machine | None:
    """What a guest of kind vm boots; None for another kind. Reports keys that do not go with the kind."""
    if body.get("kind", "netns") != "vm":
        for key in VM_KEYS:
            if key in body:
                bad((*path, key), f'"{key}" is for virtual machines', "add kind: vm", at_value=False)
        return None
    if "commands" in body:
        what = "no agent of ours runs in a virtual machine: there is nothing that could run commands"
        bad((*path, "commands"), what, "put them into its initrd, or take the key away", at_value=False)
    if "kernel" not in body:
        bad(path, 'the key "kernel" is missing', "for example kernel: /boot/vmlinuz-6.1.0-28-amd64")
        return None
    initrd = body.get("initrd")
    return Machine(
        _file(bad, directory, (*path, "kernel"), body["kernel"]),
        _file(bad, directory, (*path, "initrd"), initrd) if initrd else None,
        body.get("cmdline", DEFAULT_CMDLINE),
        body.get("cpus", 1),
        tuple(body.get("host_cpus", ())),
    )


def _file(bad: Report, directory: Path, path: Place, text: str) -> Path:
    file = (directory / Path(text).expanduser()).resolve()
    wrong = files.problem(file)
    if wrong is not None:
        bad(path, *wrong)
    return file
