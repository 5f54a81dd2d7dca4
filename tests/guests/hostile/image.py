"""Builds the payload: a freestanding ELF image that a virtual machine boots as its kernel."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.guests.packages import GuestsUnavailable

SOURCES = Path(__file__).parent / "payload"
FLAGS = (
    *("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-nostdlib", "-static"),
    # No library, no position independence, nothing below the stack pointer (interrupts use it), no SSE.
    *("-no-pie", "-fno-pic", "-fno-pie", "-mno-red-zone", "-mgeneral-regs-only", "-mcmodel=small"),
    *("-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fno-tree-loop-distribute-patterns"),
    *("-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,--no-warn-rwx-segments"),
)


def build(folder: Path) -> Path:
    """Compiles the payload into `folder`. GuestsUnavailable where there is no compiler, with its words."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise GuestsUnavailable("the payload needs a C compiler: apt install gcc")
    image = folder / "payload.elf"
    sources = [str(path) for suffix in ("*.S", "*.c") for path in sorted(SOURCES.glob(suffix))]
    done = subprocess.run(
        [compiler, *FLAGS, f"-Wl,-T,{SOURCES / 'payload.lds'}", "-o", str(image), *sources],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise GuestsUnavailable(f"the payload does not compile:\n{done.stderr}")
    return image
