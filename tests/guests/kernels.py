"""Kernels to boot: a Debian package's or one's own, with its modules and the order in which they load."""

from __future__ import annotations

import hashlib
import lzma
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tests.guests.packages import GuestsUnavailable, Package, Suite, sha256

# What is booted by default: bookworm's kernel, and one of another series, from the next stable release.
DEFAULT = {"6.1": "bookworm", "6.12": "trixie"}
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


def _plain(path: Path) -> bytes:
    """A module's content; Debian compresses them with xz since 6.10."""
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def _name(path: Path) -> str:
    """hv_vmbus for .../hv_vmbus.ko.xz: file names may have dashes where module names have underscores."""
    return path.name.split(".ko")[0].replace("-", "_")


@dataclass(frozen=True)
class KernelImage:
    """A bootable kernel: where it is, what it is, and its modules by name."""

    release: str
    vmlinuz: Path
    folder: Path
    package: str
    version: str
    origin: Package | None = None
    _plain: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def modules(self) -> dict[str, Path]:
        """Every module of the kernel by its name."""
        return {_name(path): path for path in self.folder.rglob("*.ko*")}

    @cached_property
    def builtin(self) -> set[str]:
        """What this kernel has built in instead of as a module."""
        listed = self.folder / "modules.builtin"
        return {_name(Path(line)) for line in listed.read_text().split()} if listed.exists() else set()

    @cached_property
    def sha256(self) -> str:
        """The kernel file's own hash."""
        return sha256(self.vmlinuz)

    def module(self, name: str) -> bytes:
        """A module as the kernel loads it, uncompressed."""
        if name not in self._plain:
            self._plain[name] = _plain(self.modules[name])
        return self._plain[name]

    def module_sha256(self, name: str) -> str:
        """The hash of a module as the guest sees it."""
        return hashlib.sha256(self.module(name)).hexdigest()

    def load_order(self, names: Iterable[str], optional: bool = False) -> list[str]:
        """`names` and what they need, each after its needs; what is built in is left out."""
        order: list[str] = []

        def add(name: str, needed_by: str) -> None:
            name = name.replace("-", "_")
            if name in order or name in self.builtin:
                return
            if name not in self.modules:
                if optional:
                    return
                raise GuestsUnavailable(
                    f"kernel {self.release} has no module {name} (needed for {needed_by})"
                )
            found = _DEPENDS.search(self.module(name))
            for need in found[1].decode().split(",") if found and found[1] else []:
                add(need, name)
            order.append(name)

        for name in names:
            add(name, "the test")
        return order


def debian(version: str) -> KernelImage:
    """The generic kernel of the Debian release that has `version`, fetched and checked when needed."""
    if version not in DEFAULT:
        raise GuestsUnavailable(
            f"no Debian suite is known for kernel {version}; known are {', '.join(DEFAULT)}"
        )
    suite = Suite(DEFAULT[version])
    meta = suite.find("linux-image-amd64")
    depends = re.search(r"linux-image-[0-9][^\s,]*-amd64", meta.depends)
    if not depends:
        raise GuestsUnavailable(f"Debian {suite.name}'s linux-image-amd64 names no kernel: {meta.depends}")
    package = suite.find(depends[0])
    files = suite.unpacked(package)
    vmlinuz = next((files / "boot").glob("vmlinuz-*"))
    release = vmlinuz.name.removeprefix("vmlinuz-")
    folder = next(path for path in files.glob(f"**/lib/modules/{release}") if path.is_dir())
    return KernelImage(release, vmlinuz, folder, package.name, package.version, package)


def own(vmlinuz: Path, modules: Path) -> KernelImage:
    """A kernel of one's own: the file, and the folder lib/modules/RELEASE of `make modules_install`."""
    if not vmlinuz.is_file():
        raise GuestsUnavailable(f"KERNEL={vmlinuz} is not a file")
    if not modules.is_dir() or not any(modules.rglob("*.ko*")):
        raise GuestsUnavailable(
            f"MODULES={modules} has no kernel modules; give the folder lib/modules/RELEASE"
        )
    release = modules.resolve().name
    return KernelImage(release, vmlinuz, modules, "of your own", release)
