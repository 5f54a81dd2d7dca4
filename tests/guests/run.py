"""`make guests`: stock kernels boot as our guests and work; each kernel in one run of tests/guests/inside.

    python -m tests.guests.run [--kernel 6.1]... [--volume MIB] [--or-skip] [-- PYTEST ARGUMENTS...]
    python -m tests.guests.run --own-kernel F --own-modules DIR [--own-initrd F]

The evidence of each kernel is kept in build/guests/RELEASE/, the results of all in build/guests/tests.xml.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.guests import kvm, nested
from tests.guests.images import GUEST_MODULES, guest_initrd
from tests.guests.kernels import DEFAULT, KernelImage, debian, own
from tests.guests.packages import OUTPUT, ROOT, GuestsUnavailable, Suite

# MiB per transfer. Under emulation a guest's processor does a few MB/s; the size alone differs.
VOLUME_REAL = 1024
VOLUME_EMULATED = 4
_INSIDE = "tests/guests/inside"
# "short" is what fits into a test run on a small machine that emulates: every driver does everything, but of
# the long lists (offload combinations, protocol versions) each kernel takes its share, and what is about our
# own commands rather than drivers is left to "all".
SUITES = {
    "short": [
        f"{_INSIDE}/test_{name}.py"
        for name in (
            "boot",
            "confinement",
            "data",
            "integration_services",
            "netvsc",
            "utils",
            "versions",
            "zz_end",
        )
    ],
    "all": [_INSIDE],
}
# For one kernel, where guests are emulated; VSWITCH_GUESTS_SECONDS for slower machines.
SECONDS = {"short": 1200.0, "all": 2400.0}


def _package_hashes(image: KernelImage) -> dict[str, str]:
    """What the Debian package itself says of the kernel's files: MD5 by path, from its control data."""
    if image.origin is None:
        return {}
    files = Suite(image.origin.suite).unpacked(image.origin)
    listed = (files / "DEBIAN" / "md5sums").read_text().splitlines()
    return {path: digest for digest, path in (line.split(None, 1) for line in listed)}


def _same_as_package(image: KernelImage, path: Path, hashes: dict[str, str]) -> str:
    """The file's MD5 where it is what the package's list says; an error else."""
    assert image.origin is not None
    inside = str(path.relative_to(Suite(image.origin.suite).unpacked(image.origin)))
    digest = hashlib.md5(path.read_bytes()).hexdigest()
    if hashes.get(inside) != digest:
        raise GuestsUnavailable(f"{inside} is not the file of package {image.package} {image.version}")
    return digest


def manifest(image: KernelImage, initrd: Path) -> dict[str, object]:
    """What a run of the tests has to know of the kernel, and the proof of where it comes from."""
    hashes = _package_hashes(image)
    modules = {}
    for name in image.load_order(GUEST_MODULES):
        entry: dict[str, str] = {"sha256": image.module_sha256(name)}
        if hashes:
            entry["package_md5"] = _same_as_package(image, image.modules[name], hashes)
        # The note that the linker made of all that was linked: the kernel shows it of what it has loaded.
        found = re.search(rb"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0(.{20})", image.module(name), re.S)
        entry["build_id"] = found[1].hex() if found else ""
        modules[name] = entry
    kernel: dict[str, str] = {"path": str(image.vmlinuz), "sha256": image.sha256}
    if hashes:
        kernel["package_md5"] = _same_as_package(image, image.vmlinuz, hashes)
    return {
        "release": image.release,
        "package": image.package,
        "version": image.version,
        "package_sha256": image.origin.sha256 if image.origin else "",
        "kernel": kernel,
        "modules": modules,
        "initrd": str(initrd),
    }


def _machine() -> str | None:
    """Why no guest can boot on this machine, in words; None where one can."""
    if kvm.missing() and not shutil.which(nested.QEMU):
        return f"{kvm.missing()}, and there is no {nested.QEMU} to emulate one: apt install qemu-system-x86"
    found = subprocess.run(
        [sys.executable, "-c", "from vswitch_native import vmm as v; print(v.find() or '', v.why())"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    path, _, why = (found.stdout or f" {found.stderr}").partition(" ")
    return None if path else f"vswitch-vmm is missing: {why.strip()}"


def _compile() -> None:
    """Byte code is made here, once: where the guests boot, files are read-only and processors slow."""
    for folder in sorted(path.parent for path in ROOT.glob("*/__init__.py")):
        compileall.compile_dir(folder, quiet=2)
    compileall.compile_dir(ROOT / "tests" / "guests", quiet=2)


class _Prefixed:
    """Takes a job's output; prints whole lines with a name before each."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._rest = b""

    def __call__(self, some: bytes) -> None:
        """More of the output."""
        *lines, self._rest = (self._rest + some).split(b"\n")
        text = "".join(f"{self._name}: {line.decode(errors='replace').rstrip()}\n" for line in lines)
        nested.to_stdout(text.encode())


def _inside(
    image: KernelImage, initrd: Path, volume: int, suite: str, part: tuple[int, int], arguments: list[str]
) -> tuple[int, Path]:
    """Runs the tests with one kernel, the n-th of so many; their exit status and their results."""
    output = _Prefixed(image.release.rpartition("-")[0] or image.release)
    folder = OUTPUT / image.release
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    told = folder / "manifest.json"
    told.write_text(json.dumps(manifest(image, initrd), indent=1))
    results = folder / "tests.xml"
    command = [
        sys.executable, "-m", "pytest", *SUITES[suite], "-p", "no:cacheprovider",
        "-p", "no:vswitchlab.pytest_plugin",
        "--override-ini=addopts=-ra --strict-markers", "--durations=12",
        "--timeout=300", "--override-ini=timeout_func_only=true",
        f"--junitxml={results}", f"--override-ini=junit_suite_name={image.release}", *arguments,
    ]  # fmt: skip
    environment = {
        "VSWITCH_GUESTS_MANIFEST": str(told),
        "VSWITCH_GUESTS_VOLUME": str(volume),
        "VSWITCH_GUESTS_ONCE": "no" if part[0] else "yes",
        "VSWITCH_GUESTS_PART": f"{part[0]}/{part[1]}" if suite == "short" else "0/1",
    }
    timeout = float(os.environ.get("VSWITCH_GUESTS_SECONDS", SECONDS[suite]))
    if not kvm.missing():
        timeout *= 4  # a gigabyte for each transfer
    console = folder / "console-nested.log"
    status = nested.run(
        command,
        timeout=timeout,
        environment=environment,
        console=console,
        output=output,
        tries=nested.TRIES,
    )
    lost = folder / "failures.txt"
    if status == 0 and lost.exists():
        # A try whose machine ended later: not this run's result, but nobody shall overlook it.
        names = re.findall(r"^--- (\S+)", lost.read_text(), re.M)
        print(f"guests: failed in a try whose machine failed later: {', '.join(names)}; see {lost}")
    if not results.exists():
        _no_results(results, image.release, status)
    return status, results


def _no_results(results: Path, release: str, status: int) -> None:
    """A JUnit file for a run that left none: an error, so that nobody takes silence for success."""
    suite = ElementTree.Element("testsuite", name=release, tests="1", errors="1")
    case = ElementTree.SubElement(suite, "testcase", classname="tests.guests.run", name="the_tests_ran")
    ElementTree.SubElement(case, "error", message=f"no results; status {status}")
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.ElementTree(root).write(results, encoding="utf-8", xml_declaration=True)


def _merge(parts: list[Path], whole: Path) -> None:
    """One JUnit file out of several."""
    root = ElementTree.Element("testsuites")
    for part in parts:
        if part.exists():
            root.extend(ElementTree.parse(part).getroot().iter("testsuite"))
    ElementTree.ElementTree(root).write(whole, encoding="utf-8", xml_declaration=True)


def main() -> int:
    """The command line; 0 when every kernel passed every test."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.guests.run", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--kernel", action="append", choices=tuple(DEFAULT), help="Debian's (default: all of them)"
    )
    parser.add_argument("--own-kernel", type=Path, metavar="F", help="a bzImage of your own instead")
    parser.add_argument("--own-modules", type=Path, metavar="DIR", help="its lib/modules/RELEASE")
    parser.add_argument(
        "--own-initrd", type=Path, metavar="F", help="an initial RAM disk below the tests' own"
    )
    parser.add_argument(
        "--suite", choices=tuple(SUITES), default="short", help="all: every test with every kernel"
    )
    parser.add_argument("--volume", type=int, metavar="MIB", help="of each transfer")
    parser.add_argument("--or-skip", action="store_true", help="a machine that cannot do it is no failure")
    parser.add_argument("pytest", nargs="*", metavar="PYTEST ARGUMENT")
    options = parser.parse_args()
    started = time.monotonic()
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    try:
        if why := _machine():
            raise GuestsUnavailable(why)
        if options.own_kernel:
            if not options.own_modules:
                parser.error("--own-kernel needs --own-modules")
            images = [own(options.own_kernel.absolute(), options.own_modules.absolute())]
        else:
            images = [debian(version) for version in options.kernel or DEFAULT]
        ready = [(image, guest_initrd(image, base=options.own_initrd)) for image in images]
    except GuestsUnavailable as error:
        print(f"guests: {'SKIPPED' if options.or_skip else 'cannot run'}: {error}", file=sys.stderr)
        return 0 if options.or_skip else 1
    volume = options.volume or (VOLUME_EMULATED if kvm.missing() else VOLUME_REAL)
    _compile()
    for image, _ in ready:
        print(f"guests: kernel {image.release} ({image.package} {image.version}), {volume} MiB per transfer")
    sys.stdout.flush()
    # An emulated machine is one thread of this machine's; guests on real processors have them to themselves.
    at_once = min(len(ready), os.cpu_count() or 1) if kvm.missing() else 1
    with ThreadPoolExecutor(at_once) as pool:
        runs = [
            pool.submit(_inside, image, initrd, volume, options.suite, (number, len(ready)), options.pytest)
            for number, (image, initrd) in enumerate(ready)
        ]
        ended = [run.result() for run in runs]
    failed = [
        f"{image.release} (status {status})"
        for (image, _), (status, _) in zip(ready, ended, strict=True)
        if status
    ]
    _merge([results for _, results in ended], OUTPUT / "tests.xml")
    print(f"guests: {len(ready)} kernels in {time.monotonic() - started:.0f} s; evidence in {OUTPUT}")
    if failed:
        print(f"guests: failed with {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
