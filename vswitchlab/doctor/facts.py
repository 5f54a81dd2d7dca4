"""What the doctor knows before it judges: sysctls, outcomes of real trials, versions, leftovers."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import platform
import socket
import stat
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from vswitchctl.paths import default_run_dir
from vswitchlab.guests import environment

__all__ = ["Facts", "Leftover", "Trial", "gather", "native_missing", "run_dir_problem"]

Trial = dict[str, str]

_PROBE = Path(__file__).with_name("probe.py")
_SYSCTLS = (
    "user/max_user_namespaces",
    "user/max_net_namespaces",
    "kernel/unprivileged_userns_clone",
    "kernel/apparmor_restrict_unprivileged_userns",
)
_DISTRIBUTIONS = ("grpcio", "protobuf", "pyroute2", "dpkt", "scapy")


@dataclass(frozen=True, slots=True)
class Leftover:
    """A process of ours that nobody answers for: `what` is guest or daemon."""

    pid: int
    what: str
    name: str


@dataclass(frozen=True, slots=True)
class Facts:
    """One machine, one user, one moment. Tests make their own; `gather()` looks."""

    uid: int = 1000
    python: tuple[int, int, int] = (3, 11, 0)
    kernel: str = "6.8"
    sysctls: dict[str, int] = field(default_factory=dict)
    trial: Trial = field(default_factory=dict)
    trial_error: str = ""
    tun_exists: bool = True
    tun_mode: str = "crw-rw-rw-"
    container: str = ""
    seccomp_filtered: bool = False
    layers: tuple[tuple[str, bool, str, str], ...] = ()
    native_missing: str = ""
    machine: str = "x86_64"
    vmm_missing: str = ""
    kvm_refusal: str = ""
    kvm_exists: bool = True
    kvm_mode: str = "crw-rw----"
    kvm_open: bool = True
    cargo: bool = True
    versions: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    run_dir: str = "/run/user/1000/vswitch"
    run_dir_problem: str = ""
    daemon_answers: bool = False
    stale_sockets: tuple[str, ...] = ()
    leftovers: tuple[Leftover, ...] = ()
    open_files: int = 1024


def gather(directory: Path | None = None) -> Facts:
    """Looks at this machine; takes about half a second, changes nothing."""
    import resource
    import shutil

    where = directory or default_run_dir()
    trial, trial_error = _trial()
    sockets = {path: _answers(path) for path in sorted(where.glob("*.sock"))} if where.is_dir() else {}
    answers = any(sockets.values())
    versions, missing = _versions()
    tun, kvm = Path("/dev/net/tun"), Path("/dev/kvm")
    vmm_missing, kvm_refusal = _virtual_machines()
    return Facts(
        uid=os.getuid(),
        python=sys.version_info[:3],
        kernel=platform.release(),
        sysctls=_sysctls(),
        trial=trial,
        trial_error=trial_error,
        tun_exists=tun.exists(),
        tun_mode=stat.filemode(tun.stat().st_mode) if tun.exists() else "",
        container=_container(),
        seccomp_filtered=_seccomp_filtered(),
        layers=_layers(),
        native_missing=native_missing(),
        machine=platform.machine(),
        vmm_missing=vmm_missing,
        kvm_refusal=kvm_refusal,
        kvm_exists=kvm.exists(),
        kvm_mode=stat.filemode(kvm.stat().st_mode) if kvm.exists() else "",
        kvm_open=os.access(kvm, os.R_OK | os.W_OK),
        cargo=shutil.which("cargo") is not None,
        versions=versions,
        missing=missing,
        run_dir=str(where),
        run_dir_problem=run_dir_problem(where),
        daemon_answers=answers,
        stale_sockets=tuple(str(path) for path, alive in sockets.items() if not alive),
        leftovers=() if answers else _leftovers(where),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def _trial() -> tuple[Trial, str]:
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(_PROBE)], capture_output=True, timeout=20, check=False
        )
        outcome = json.loads(done.stdout or b"null")
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return {}, f"the trial could not be run: {error}"
    if not isinstance(outcome, dict):
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return {}, f"the trial ended with status {done.returncode}: {''.join(last) or 'no output'}"
    return outcome, ""


def native_missing() -> str:
    """Why the native module cannot be used, or an empty text. Tried in a process of its own: it may crash."""
    code = "import vswitch_native; print(vswitch_native.WHY or vswitch_native.outdated())"
    try:
        done = _ask([sys.executable, "-P", "-c", code])
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the native module could not be tried: {error}"
    if done.returncode:
        return f"loading the native module ends the process with status {done.returncode}"
    return done.stdout.decode(errors="replace").strip()


def _virtual_machines() -> tuple[str, str]:
    """Why there is no VMM, and why the one there is cannot run stock guests here; empty texts when all is
    well. The VMM itself tries it (`vswitch-vmm --probe`).
    """
    code = "from vswitch_native import vmm; print(vmm.find() or ''); print(vmm.why())"
    try:
        asked = _ask([sys.executable, "-P", "-c", code])
        program, why = [*asked.stdout.decode(errors="replace").splitlines(), "", ""][:2]
        if not program:
            return why or "the place of the VMM could not be found out", ""
        answer = json.loads(_ask([program, "--probe"]).stdout or b"null")
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return "", f"the VMM could not be tried: {error}"
    if not isinstance(answer, dict) or "ok" not in answer:
        return "", "the VMM gives no answer to --probe; run `make native`"
    return "", "" if answer["ok"] else str(answer.get("why") or "the VMM gives no reason")


def _ask(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    variables = {**os.environ, **environment()}
    return subprocess.run(command, env=variables, capture_output=True, timeout=20, check=False)


def _sysctls() -> dict[str, int]:
    found = {}
    for name in _SYSCTLS:
        try:
            found[name.replace("/", ".")] = int(Path("/proc/sys", name).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
    return found


def _container() -> str:
    if Path("/.dockerenv").exists():
        return "docker"
    if Path("/run/.containerenv").exists():
        return "podman"
    told = os.environ.get("container", "")  # noqa: SIM112 - systemd's name for it
    return told or ("kubernetes" if "KUBERNETES_SERVICE_HOST" in os.environ else "")


def _seccomp_filtered() -> bool:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("Seccomp:"):
            return line.split()[1] == "2"
    return False


def _layers() -> tuple[tuple[str, bool, str, str], ...]:
    from vswitch_confine.probe import probe

    try:
        return tuple((layer.name, layer.available, layer.detail, layer.remedy) for layer in probe())
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return (("sandbox", False, f"could not be tried: {error}", "report this as a defect"),)


def _versions() -> tuple[dict[str, str], tuple[str, ...]]:
    found, missing = {}, []
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return found, tuple(missing)


def run_dir_problem(directory: Path) -> str:
    """Why the daemon would refuse `directory`, or an empty text."""
    if len(os.fsencode(directory)) > 70:
        length = len(os.fsencode(directory))
        return f"the path is {length} bytes long; socket paths in it would pass the kernel's 107"
    if not os.path.lexists(directory):
        parent = directory.parent
        while not parent.exists() and parent != parent.parent:
            parent = parent.parent
        return (
            "" if os.access(parent, os.W_OK | os.X_OK) else f"{parent} is not writable for uid {os.getuid()}"
        )
    info = directory.lstat()
    if not stat.S_ISDIR(info.st_mode):
        return "it is not a directory"
    if info.st_uid != os.getuid():
        return f"it belongs to uid {info.st_uid}, not to uid {os.getuid()}"
    if info.st_mode & 0o077:
        return f"others may enter it (mode {stat.S_IMODE(info.st_mode):04o}, 0700 is needed)"
    return ""


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1)
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True


def _leftovers(directory: Path) -> tuple[Leftover, ...]:
    """Processes of this user that name `directory` on their command line though no daemon answers there."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if entry.stat().st_uid != os.getuid():
                continue
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        what = _kind(words)
        if what and any(str(directory) in word for word in words):
            name = words[words.index("--name") + 1] if "--name" in words[:-1] else ""
            found.append(Leftover(int(entry.name), what, name))
    return tuple(sorted(found, key=lambda each: each.pid))


def _kind(words: list[str]) -> str:
    # Extensions end with their daemon whatever happens to it.
    modules = {"netvsc": "guest", "vswitchd": "daemon"}
    for flag, module in itertools.pairwise(words):
        if flag == "-m" and module in modules:
            return modules[module]
    return ""
