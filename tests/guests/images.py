"""What stock guests boot from: kernels, and a small Debian userland made into an initial RAM disk.

    python -m tests.guests.images [KERNEL VERSION...]

makes everything ready under build/guests/cache, so that nothing is fetched where the guests run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.guests.cpio import Archive
from tests.guests.kernels import DEFAULT, KernelImage, debian
from tests.guests.packages import Suite, cache, sha256

__all__ = ["GUEST_MODULES", "KernelImage", "guest_initrd", "kernel", "prepare"]

_HERE = Path(__file__).resolve().parent
# Loaded at boot, in this order; the balloon driver has no counterpart in our hosts and stays idle.
GUEST_MODULES = ("hv_vmbus", "hv_netvsc", "hv_utils")
# In the guest's root for whoever loads them; a kernel without one of them boots all the same.
SPARE_MODULES = ("hv_balloon", "hv_sock", "tulip", "e1000", "igbvf")
# Userland: bookworm's, whatever the kernel. (package, file in it, name in the guest)
_PROGRAMS = (
    ("ethtool", "sbin/ethtool", "sbin/ethtool"),
    ("hyperv-daemons", "usr/sbin/hv_kvp_daemon", "usr/sbin/hv_kvp_daemon"),
    # Busybox's ping gives its socket 7 KiB: replies are lost there once something else has the processor. Its
    # shell would run its own whatever the path.
    ("iputils-ping", "bin/ping", "bin/iping"),
)
_LIBRARIES = ("libc6", "libmnl0", "libcap2", "libidn2-0", "libunistring2")
_KVP_SCRIPTS = "usr/libexec/hypervkvpd"

kernel = debian


def _libraries(program: Path, folders: list[Path]) -> dict[str, Path]:
    """The shared libraries that a program loads, found below `folders`, by their name."""
    loader = next(folder / "ld-linux-x86-64.so.2" for folder in folders if (folder / "libc.so.6").exists())
    listed = subprocess.run(
        [loader, "--library-path", ":".join(map(str, folders)), "--list", program],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = {}
    for line in listed.splitlines():
        name, arrow, rest = line.strip().partition(" => ")
        if arrow:
            found[name] = Path(rest.split(" (")[0])
    return found


def _userland(archive: Archive) -> None:
    """Busybox, the programs that the tests call and Hyper-V's own daemon, with what they load."""
    suite = Suite("bookworm")
    busybox = suite.unpacked(suite.find("busybox-static")) / "bin" / "busybox"
    archive.copy("bin/busybox", busybox)
    for name in subprocess.run(
        [busybox, "--list"], capture_output=True, text=True, check=True
    ).stdout.split():
        if name != "busybox":
            archive.link(
                f"{'sbin' if name in ('init', 'poweroff', 'reboot', 'halt') else 'bin'}/{name}",
                "/bin/busybox",
            )
    folders = [
        folder
        for package in _LIBRARIES
        for folder in suite.unpacked(suite.find(package)).glob("**/x86_64-linux-gnu")
        if any(folder.glob("*.so.*"))
    ]
    for package, file, name in _PROGRAMS:
        program = suite.unpacked(suite.find(package)) / file
        archive.copy(name, program)
        for library, path in _libraries(program, folders).items():
            archive.copy(f"lib/{library}", path)
    archive.copy("lib64/ld-linux-x86-64.so.2", folders[0] / "ld-linux-x86-64.so.2")
    for script in (suite.unpacked(suite.find("hyperv-daemons")) / _KVP_SCRIPTS).iterdir():
        archive.copy(f"{_KVP_SCRIPTS}/{script.name}", script)
    archive.file(
        "etc/os-release", 'NAME="Debian GNU/Linux"\nVERSION_ID="12"\nID=debian\nVERSION="12 (guest)"\n'
    )
    archive.file("etc/passwd", "root::0:0:root:/root:/bin/sh\n")
    archive.file("etc/hosts", "127.0.0.1 localhost\n")
    archive.file("etc/nsswitch.conf", "hosts: files\n")


def _modules(archive: Archive, image: KernelImage, names: Iterable[str], boot: Iterable[str]) -> None:
    """Modules with a list beside each of what it needs first."""
    for name in image.load_order(names, optional=True):
        *needs, _ = image.load_order([name])
        archive.file(f"lib/modules/{name}.ko", image.module(name))
        archive.file(f"lib/modules/{name}.need", "\n".join(needs))
    loaded = [name for name in boot if name in image.modules]
    archive.file("etc/modules.load", "\n".join(loaded) + "\n")


def guest_initrd(
    image: KernelImage,
    extra: dict[str, Path] | None = None,
    modules: Iterable[str] = (),
    boot: Iterable[str] = GUEST_MODULES,
    base: Path | None = None,
) -> Path:
    """The guest's root for a kernel; the kernel is started with `rdinit=/sbin/init`.

    `extra` are more files (path in the guest: file here), `modules` more modules, `boot` what the guest loads
    by itself, `base` an initial RAM disk of one's own on which this one is laid.
    """
    archive = Archive()
    _userland(archive)
    _modules(archive, image, (*boot, *SPARE_MODULES, *modules), boot)
    for path in sorted((_HERE / "guestroot").rglob("*")):
        if path.is_file():
            mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
            archive.copy(str(path.relative_to(_HERE / "guestroot")), path, mode)
    for name, source in (extra or {}).items():
        archive.copy(name, source)
    # Where there is no rdinit= the kernel runs /init.
    archive.link("init", "/bin/busybox")
    packed = (base.read_bytes() if base else b"") + archive.packed()
    folder = cache() / "initrds"
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{image.release}.partial"
    partial.write_bytes(packed)
    made = folder / f"{image.release}-{sha256(partial)[:12]}.img"
    partial.rename(made)
    return made


def prepare(versions: Iterable[str] = tuple(DEFAULT)) -> list[tuple[KernelImage, Path]]:
    """Fetches and makes what the guests boot from."""
    return [(image, guest_initrd(image)) for image in map(kernel, versions)]


def main() -> int:
    """Prints what was made ready."""
    for image, initrd in prepare(sys.argv[1:] or tuple(DEFAULT)):
        line = {
            "kernel": str(image.vmlinuz),
            "release": image.release,
            "package": f"{image.package} {image.version}",
            "sha256": image.sha256,
            "initrd": str(initrd),
        }
        print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
