"""Runs a command where KVM can run stock Hyper-V guests: here if it can, else in an emulated machine.

    python -m tests.guests.nested run [--timeout S] [--memory M] [--env NAME=VALUE] -- COMMAND...

The emulated machine is QEMU without acceleration (its processor offers AMD-V with nested paging) and Debian's
generic kernel. It sees this machine's files read-only over 9p; `/tmp` and `/run` are its own;
`build/guests` is shared and writable. COMMAND runs there as root, in this directory; its output
and exit status come back.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.guests import kvm
from tests.guests.cpio import Archive
from tests.guests.kernels import KernelImage, debian
from tests.guests.packages import OUTPUT, GuestsUnavailable, Suite, cache

QEMU = "qemu-system-x86_64"
# Twice as fast as QEMU 7.2 (bookworm's) where guests are nested.
PROVEN = (10, 0)
NEWER = {"bookworm": "bookworm-backports"}
# kvm-amd for the guests; tun and veth for TAPs and links; the rest to reach this machine's files and speak.
MODULES = ("9p", "9pnet_virtio", "virtio_pci", "virtio_console", "kvm-amd", "tun", "veth", "overlay")
TIMED_OUT = 124
DIED = 125
"""The emulated machine itself ended or stood still: nothing that the job did or did not."""
TRIES = 4
"""QEMU's AMD-V is not without faults: an emulated machine's own kernel may panic or stand still."""
# The machine writes a sign of life every few seconds; one without for so long stands still.
SILENT_SECONDS = 60
_CMDLINE = "console=ttyS0 panic=-1 nokaslr quiet mitigations=off audit=0 cryptomgr.notests no_timer_check"

_INIT = r"""#!/bin/sh
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /new
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t sysfs sys /sys
# An error before the job begins is told on the console and leaves no status: the machine's failure.
fail() { echo "nested: $*"; poweroff -f; }
for module in $(cat /modules/order); do
    insmod /modules/$module.ko || echo "nested: $module is not loaded"
done
mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=512000,cache=loose root /new || fail "no root over 9p"
# Parts of this machine that lie below /tmp or /run are seen through it before they are covered.
mkdir -p /keep
mount -t tmpfs keep /keep
while read -r path; do mkdir -p "/keep$path"; mount --bind "/new$path" "/keep$path"; done </keep.list
mount -t proc proc /new/proc
mount -t sysfs sys /new/sys
mount --move /dev /new/dev
mkdir -p /new/dev/pts /new/dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts /new/dev/pts
mount -t tmpfs -o mode=1777 shm /new/dev/shm
mount -t cgroup2 cgroup /new/sys/fs/cgroup
mount -t tmpfs -o mode=1777,size=75% tmp /new/tmp
mount -t tmpfs -o mode=755 run /new/run
mkdir -p /new/run/lock /new/run/home
while read -r path; do mkdir -p "/new$path"; mount --bind "/keep$path" "/new$path"; done </keep.list
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=none guests \
    "/new$(cat /shared)" || fail "no share"
ip link set lo up
[ ! -c /new/dev/net/tun ] || chmod 0666 /new/dev/net/tun
[ ! -c /new/dev/kvm ] || chmod 0666 /new/dev/kvm
hostname nested
cp /job /new/run/job
cp /bin/busybox /new/run/busybox
exec switch_root /new /run/busybox sh /run/job
"""

# What runs as process 1 after switch_root: the job with its output on the virtio console, then the end.
_JOB = r"""
busybox=/run/busybox
port=
for name in /sys/class/virtio-ports/*; do
    [ "$($busybox cat $name/name)" = job ] && port=/dev/$($busybox basename $name)
done
while $busybox date >{alive}; do $busybox sleep 3; done &
(
    cd {directory} || exit 125
    {environment}
    exec /usr/bin/env {command}
) </dev/null >$port 2>&1
status=$?
echo $status >{status}.partial && $busybox mv {status}.partial {status}
$busybox sync
$busybox poweroff -f
"""


def tools() -> dict[str, Path]:
    """The programs that emulated machines and guests are made of, from packages that are not installed."""
    busybox = Suite("bookworm").unpacked(Suite("bookworm").find("busybox-static"))
    return {"busybox": busybox / "bin" / "busybox"}


def _version(program: str | Path) -> tuple[int, int]:
    """(major, minor) of a QEMU; (0, 0) for one that does not run."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"version (\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _unpacked_qemu(suite: Suite) -> list[str]:
    """A QEMU out of packages that are not installed; its libraries are those of the one that is."""
    names = ("qemu-system-x86", "qemu-system-data", "seabios")
    program, *data = (suite.unpacked(suite.find(name)) for name in names)
    shares = [folder / "usr/share" / name for folder, name in zip(data, ("qemu", "seabios"), strict=True)]
    return [str(program / "usr/bin" / QEMU), *(word for share in shares for word in ("-L", str(share)))]


@functools.cache
def qemu() -> tuple[str, ...]:
    """The emulator as a command: the machine's own, or a newer one of Debian's where that is too old."""
    installed = shutil.which(QEMU)
    if not installed:
        raise GuestsUnavailable(f"{QEMU} is missing and {kvm.missing()}: apt install qemu-system-x86")
    if _version(installed) >= PROVEN:
        return (installed,)
    release = Path("/etc/os-release")
    found = re.search(r"^VERSION_CODENAME=(\w+)", release.read_text() if release.exists() else "", re.M)
    why = "this system has no newer one"
    if found and found[1] in NEWER:
        try:
            command = _unpacked_qemu(Suite(NEWER[found[1]]))
            if _version(command[0]) >= PROVEN:
                return tuple(command)
            why = f"{command[0]} does not run here"
        except GuestsUnavailable as error:
            why = str(error)
    major, minor = _version(installed)
    print(
        f"nested: QEMU {major}.{minor} is slower than {'.'.join(map(str, PROVEN))}, and {why}",
        file=sys.stderr,
    )
    return (installed,)


def _kept() -> list[str]:
    """Folders below /tmp and /run that the job needs although the machine has its own there."""
    needed = {Path.cwd(), OUTPUT.parent.parent, Path(sys.prefix), Path(sys.base_prefix), cache()}
    return sorted(str(path) for path in needed if path.resolve().parts[1:2] in (("tmp",), ("run",)))


def _initrd(kernel: KernelImage, job: str) -> bytes:
    """The machine's own small root: modules, the way to this machine's files, the job."""
    archive = Archive()
    archive.copy("bin/busybox", tools()["busybox"])
    archive.link("bin/sh", "busybox")
    order = kernel.load_order(MODULES)
    for name in order:
        archive.file(f"modules/{name}.ko", kernel.module(name))
    archive.file("modules/order", "\n".join(order) + "\n")
    archive.file("keep.list", "".join(f"{path}\n" for path in _kept()))
    archive.file("shared", str(OUTPUT))
    archive.file("job", job)
    archive.file("init", _INIT.replace("#!/bin/sh", "#!/bin/busybox sh", 1), 0o755)
    return archive.packed()


def _script(command: list[str], environment: dict[str, str], folder: Path) -> str:
    """The job as a shell script: it leaves its exit status in `folder`, and signs of life until then."""
    exported = {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "HOME": "/run/home",
        "LANG": os.environ.get("LANG", "C.UTF-8"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "XDG_RUNTIME_DIR": "/run",
        "VSWITCH_NESTED": "emulated",
        "VSWITCH_GUESTS_CACHE": str(cache().resolve()),
        **environment,
    }
    return _JOB.format(
        directory=shlex.quote(str(Path.cwd())),
        environment="\n    ".join(f"export {name}={shlex.quote(value)}" for name, value in exported.items()),
        command=shlex.join(command),
        status=shlex.quote(str(folder / "status")),
        alive=shlex.quote(str(folder / "alive")),
    )


def _qemu(kernel: KernelImage, initrd: Path, console: Path, memory: int) -> list[str]:
    """The emulated machine's command line.

    One processor: with two, an interrupt between them has been seen (in QEMU 7.2 and 10.0) to reach the
    kernel right behind a VMRUN, with the nested guest's registers, which is its end.
    """
    share = "security_model=none,multidevs=remap"
    return [
        *qemu(), "-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", "max,la57=off", "-smp", "1",
        "-m", str(memory),
        "-kernel", str(kernel.vmlinuz), "-initrd", str(initrd),
        "-append", _CMDLINE,
        "-display", "none", "-monitor", "none", "-nic", "none", "-no-reboot",
        "-serial", f"file:{console}",
        "-device", "virtio-serial", "-chardev", "stdio,id=job,signal=off",
        "-device", "virtserialport,chardev=job,name=job",
        "-virtfs", f"local,path=/,mount_tag=root,readonly=on,{share}",
        "-virtfs", f"local,path={OUTPUT},mount_tag=guests,{share}",
    ]  # fmt: skip


def _end_with_parent() -> None:
    """In QEMU's process: ends with this one, and Ctrl-C at the terminal is this one's to judge."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.setpgid(0, 0)


class _Watch(threading.Thread):
    """Ends a machine whose time is up, or that stands still."""

    def __init__(self, machine: subprocess.Popen[bytes], alive: Path, timeout: float) -> None:
        super().__init__(daemon=True, name="nested-watch")
        self._machine = machine
        self._alive = alive
        self._end = time.monotonic() + timeout
        self.why = ""
        self.status = DIED

    def run(self) -> None:
        """Looks every second."""
        seen, since = 0, time.monotonic()
        while self._machine.poll() is None:
            time.sleep(1)
            now = time.monotonic()
            sign = self._alive.stat().st_mtime_ns if self._alive.exists() else 0
            if sign != seen:
                seen, since = sign, now
            if now > self._end:
                self.why, self.status = "the time was up", TIMED_OUT
            elif now - since > SILENT_SECONDS:
                self.why = f"the machine gave no sign of life for {SILENT_SECONDS} s"
            if self.why:
                self._machine.kill()
                return


def to_stdout(some: bytes) -> None:
    """Where a job's output goes when nobody else takes it."""
    sys.stdout.buffer.write(some)
    sys.stdout.buffer.flush()


def emulated(
    command: list[str],
    timeout: float,
    memory: int,
    environment: dict[str, str],
    console: Path,
    output: Callable[[bytes], None] = to_stdout,
) -> int:
    """Runs the command in the emulated machine; its exit status, TIMED_OUT, or DIED."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    kernel = debian("6.1")
    with tempfile.TemporaryDirectory(prefix="nested-", dir=OUTPUT) as name:
        folder = Path(name)
        initrd = folder / "initrd"
        initrd.write_bytes(_initrd(kernel, _script(command, environment, folder)))
        # What it says on its own is of use when it fails; else it is about sound and displays.
        with (folder / "qemu.log").open("w+", encoding="utf-8", errors="replace") as said:
            # The pipe to its standard input stays open: the port to the job ends with it. The output is
            # copied, since QEMU makes descriptors that it is given non-blocking, which would befall this
            # process's own.
            machine = subprocess.Popen(
                _qemu(kernel, initrd, console, memory),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                preexec_fn=_end_with_parent,
            )
            watch = _Watch(machine, folder / "alive", timeout)
            watch.start()
            try:
                assert machine.stdout is not None
                while some := os.read(machine.stdout.fileno(), 65536):
                    output(some)
                machine.wait()
            finally:
                machine.kill()
                machine.wait()
                watch.join()
            if (folder / "status").exists():
                return int((folder / "status").read_text())
            said.seek(0)
            print(said.read()[-2000:], end="", file=sys.stderr)
    why = watch.why or "the machine ended before the job did"
    print(f"nested: {why}; its console ({console}) ends with:", file=sys.stderr)
    print(console.read_text(errors="replace")[-2000:] if console.exists() else "", file=sys.stderr)
    return watch.status


def run(
    command: list[str],
    timeout: float = 600,
    memory: int = 3072,
    environment: dict[str, str] | None = None,
    emulate: bool = False,
    console: Path = OUTPUT / "console-nested.log",
    output: Callable[[bytes], None] = to_stdout,
    tries: int = 1,
) -> int:
    """Runs the command where stock Hyper-V guests can run; its exit status.

    `console` is the file for what an emulated machine's kernel says, `output` takes what the command says. An
    emulated machine that fails itself is tried again, which is said; what its job found until then is lost.
    """
    why = "it was asked for" if emulate else kvm.missing()
    started = time.monotonic()
    if why is None:
        print(
            "nested: this machine's own KVM runs stock Hyper-V guests; no emulation",
            file=sys.stderr,
            flush=True,
        )
        try:
            given = {**os.environ, "VSWITCH_NESTED": "direct", **(environment or {})}
            return subprocess.run(command, timeout=timeout, check=False, env=given).returncode
        except subprocess.TimeoutExpired:
            return TIMED_OUT
    print(f"nested: an emulated machine is used: {why}", file=sys.stderr, flush=True)
    for attempt in range(1, tries + 1):
        kept = console.with_stem(f"{console.stem}-{attempt}") if tries > 1 else console
        result = emulated(command, timeout, memory, environment or {}, kept, output)
        if result != DIED:
            break
        print(f"nested: the emulated machine itself failed, try {attempt} of {tries}", file=sys.stderr)
    print(f"nested: exit status {result} after {time.monotonic() - started:.1f} s", file=sys.stderr)
    return result


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.guests.nested", description=__doc__.splitlines()[0]
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("run", help="run a command")
    verb.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds (default 600)")
    verb.add_argument("--memory", type=int, default=3072, metavar="MIB", help="of the emulated machine")
    verb.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the command")
    verb.add_argument("--emulate", action="store_true", help="even where this machine's own KVM would do")
    verb.add_argument("command", nargs="+", metavar="COMMAND")
    verbs.add_parser("why", help="say why this machine needs emulation")
    options = parser.parse_args()
    if options.verb == "why":
        print(kvm.missing() or "this machine's own KVM runs stock Hyper-V guests")
        return 0
    environment = dict(pair.split("=", 1) for pair in options.env)
    try:
        return run(options.command, options.timeout, options.memory, environment, options.emulate)
    except GuestsUnavailable as error:
        print(f"nested: {error}", file=sys.stderr)
        return DIED


if __name__ == "__main__":
    sys.exit(main())
