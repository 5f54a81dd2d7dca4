"""Judges the doctor's facts: for each check its level, its cause in words, and a one-line remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum

from vswitchlab.doctor.facts import Facts

__all__ = ["Finding", "Level", "blockers", "diagnose"]


class Level(StrEnum):
    """ok: nothing to do. warning: works, with the cost named. error: netns guests cannot run."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check. `remedy` is empty where the level is ok."""

    check: str
    level: Level
    text: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """Plain values for JSON and YAML."""
        return {key: str(value) for key, value in asdict(self).items()}


def _ok(check: str, text: str) -> Finding:
    return Finding(check, Level.OK, text)


def diagnose(facts: Facts) -> list[Finding]:
    """Every check, in a fixed order. Pure: the same facts give the same findings."""
    return [check(facts) for check in _CHECKS] + list(_sandbox(facts))


def blockers(findings: Iterable[Finding]) -> list[Finding]:
    """Those that keep a netns guest from running."""
    return [finding for finding in findings if finding.level is Level.ERROR]


def _python(facts: Facts) -> Finding:
    text = "Python " + ".".join(map(str, facts.python))
    if facts.python < (3, 11):
        return Finding("python", Level.ERROR, f"{text} is too old", "use Python 3.11 or newer")
    return _ok("python", text)


def _packages(facts: Facts) -> Finding:
    needed = [name for name in facts.missing if name != "scapy"]
    if needed:
        return Finding(
            "packages", Level.ERROR, f"not installed: {', '.join(needed)}", f"pip install {' '.join(needed)}"
        )
    if "grpcio" in facts.versions and _number(facts.versions["grpcio"]) < (1, 70):
        text = f"grpcio {facts.versions['grpcio']} is older than 1.70"
        return Finding("packages", Level.ERROR, text, "pip install --upgrade grpcio")
    text = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    if "scapy" in facts.missing:
        return Finding(
            "packages",
            Level.WARNING,
            f"{text}; without scapy there are no VMBus, NVSP and RNDIS layers and no scapy sockets on ports",
            "pip install 'vswitch[scapy]'",
        )
    return _ok("packages", text)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _native(facts: Facts) -> Finding:
    if not facts.native_missing:
        return _ok("native_module", "the native engine is installed")
    remedy = (
        "run `make native`"
        if facts.cargo
        else "install a wheel of vswitch, or cargo (https://rustup.rs) and run `make native`"
    )
    return Finding(
        "native_module",
        Level.WARNING,
        f"{facts.native_missing}; the Python engine runs: everything works, "
        "packets cost about a hundred times more CPU",
        remedy,
    )


def _virtual_machines(facts: Facts) -> Finding:
    """One sentence on whether stock kernels boot here as Hyper-V guests."""
    check = "virtual_machines"
    cannot = "virtual machines cannot run (process guests can)"
    if not facts.vmm_missing and not facts.kvm_refusal:
        return _ok(check, "KVM here runs stock kernels as Hyper-V guests")
    if facts.machine != "x86_64":
        text = f"{cannot}: this machine is {facts.machine}, and Hyper-V guests here are x86-64"
        return Finding(check, Level.WARNING, text, "use an x86-64 machine")
    if not facts.kvm_exists:
        if facts.container:
            return Finding(
                check,
                Level.WARNING,
                f"{cannot}: there is no /dev/kvm in this container",
                "start it with `--device /dev/kvm`",
            )
        return Finding(
            check,
            Level.WARNING,
            f"{cannot}: there is no /dev/kvm",
            "switch virtualisation on in the firmware (in a virtual machine: nested virtualisation), then "
            "sudo modprobe kvm_intel or kvm_amd",
        )
    if not facts.kvm_open:
        text = f"{cannot}: uid {facts.uid} may not open /dev/kvm (mode {facts.kvm_mode})"
        return Finding(check, Level.WARNING, text, "sudo usermod -aG kvm $USER, then log in again")
    cause, _, remedy = (facts.vmm_missing or facts.kvm_refusal).partition("; ")
    return Finding(check, Level.WARNING, f"{cannot}: {cause}", remedy or "see docs/guests.md")


def _memory(facts: Facts) -> Finding:
    if facts.trial_error:
        return Finding("guest_memory", Level.WARNING, "could not be tried", "see user_namespaces")
    outcome = facts.trial.get("memfd_seals", "not tried")
    if outcome != "ok":
        return Finding(
            "guest_memory",
            Level.ERROR,
            f"sealed shared memory (memfd) is refused: {outcome}",
            "use a kernel with CONFIG_MEMFD_CREATE, or allow memfd_create in the container's seccomp profile",
        )
    return _ok("guest_memory", "sealed shared memory works")


def _user_namespaces(facts: Facts) -> Finding:
    check = "user_namespaces"
    if facts.trial_error:
        return Finding(check, Level.ERROR, facts.trial_error, "report this as a defect")
    outcome = facts.trial.get("user_namespace", "not tried")
    identity = facts.trial.get("id_map", "not tried")
    network = facts.trial.get("net_namespace", "not tried")
    if outcome == identity == network == "ok":
        return _ok(check, "user and network namespaces can be made")
    sysctl = facts.sysctls.get
    if sysctl("user.max_user_namespaces", 1) == 0:
        text = "user namespaces are forbidden (user.max_user_namespaces is 0)"
        return Finding(check, Level.ERROR, text, "sudo sysctl -w user.max_user_namespaces=15000")
    if sysctl("kernel.unprivileged_userns_clone", 1) == 0:
        text = "user namespaces are forbidden to ordinary users (kernel.unprivileged_userns_clone is 0)"
        return Finding(check, Level.ERROR, text, "sudo sysctl -w kernel.unprivileged_userns_clone=1")
    if sysctl("kernel.apparmor_restrict_unprivileged_userns", 0) and facts.uid != 0:
        text = (
            "AppArmor takes all capabilities from user namespaces of ordinary programs "
            "(kernel.apparmor_restrict_unprivileged_userns is 1, the default of Ubuntu 24.04)"
        )
        return Finding(
            check, Level.ERROR, text, "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
        )
    if facts.container:
        flags = "--security-opt seccomp=unconfined --security-opt apparmor=unconfined --device /dev/net/tun"
        tool = facts.container if facts.container in ("docker", "podman") else "docker"
        text = f"this {facts.container} container forbids namespaces (unshare: {_first_bad(facts)})"
        return Finding(check, Level.ERROR, text, f"start it with `{tool} run {flags}`")
    if outcome == "ENOSPC":
        text = "no more user namespaces may be made (user.max_user_namespaces is reached)"
        return Finding(check, Level.ERROR, text, "sudo sysctl -w user.max_user_namespaces=15000")
    if network == "ENOSPC":
        text = "no more network namespaces may be made (user.max_net_namespaces is reached)"
        return Finding(check, Level.ERROR, text, "sudo sysctl -w user.max_net_namespaces=15000")
    if outcome == "EINVAL":
        text = "this kernel has no user namespaces"
        return Finding(check, Level.ERROR, text, "use a kernel with CONFIG_USER_NS=y")
    if facts.seccomp_filtered:
        text = f"a seccomp filter forbids namespaces (unshare: {_first_bad(facts)})"
        return Finding(check, Level.ERROR, text, "run outside of the sandbox that started this shell")
    text = f"namespaces are refused (unshare: {_first_bad(facts)})"
    return Finding(check, Level.ERROR, text, "ask what forbids `unshare -Urn true` on this machine")


def _first_bad(facts: Facts) -> str:
    steps = ("user_namespace", "id_map", "net_namespace")
    return next((facts.trial[step] for step in steps if facts.trial.get(step, "ok") != "ok"), "unknown")


def _namespace_ok(facts: Facts) -> bool:
    return facts.trial.get("net_namespace") == "ok"


def _tap(facts: Facts) -> Finding:
    check = "tap"
    if not _namespace_ok(facts):
        return Finding(check, Level.WARNING, "could not be tried without namespaces", "see user_namespaces")
    outcome = facts.trial.get("tap", "not tried")
    if outcome == "ok":
        return _ok(check, "a TAP can be made in a guest's namespace")
    if not facts.tun_exists or outcome == "ENOENT":
        if facts.container:
            cause, remedy = (
                "there is no /dev/net/tun in this container",
                "start it with `--device /dev/net/tun`",
            )
        else:
            cause = "there is no /dev/net/tun"
            remedy = "sudo modprobe tun"
    elif outcome == "EPERM" and facts.container:
        cause = f"this container may not open /dev/net/tun ({outcome})"
        remedy = "start it with `--device /dev/net/tun`"
    elif outcome == "EACCES":
        cause = f"uid {facts.uid} may not open /dev/net/tun (mode {facts.tun_mode})"
        remedy = "sudo chmod 0666 /dev/net/tun"
    elif outcome in ("ENODEV", "ENXIO"):
        cause = f"/dev/net/tun has no driver ({outcome})"
        remedy = "sudo modprobe tun"
    else:
        cause = f"making a TAP is refused ({outcome})"
        remedy = "ask what forbids `unshare -Urn ip tuntap add tap0 mode tap` on this machine"
    if facts.trial.get("veth") == facts.trial.get("packet_socket") == "ok":
        cost = "guests use a veth pair instead: without checksum and segmentation offload"
        return Finding(check, Level.WARNING, f"{cause}; {cost}", remedy)
    veth = facts.trial.get("veth", "not tried")
    return Finding(check, Level.ERROR, f"{cause}, and a veth pair cannot be made either ({veth})", remedy)


def _guest_mounts(facts: Facts) -> Finding:
    check = "guest_mounts"
    if not _namespace_ok(facts):
        return Finding(check, Level.WARNING, "could not be tried without namespaces", "see user_namespaces")
    for step in ("mount_namespace", "private_mounts", "tmpfs", "proc"):
        outcome = facts.trial.get(step, "not tried")
        if outcome != "ok":
            what = step.replace("_", " ")
            remedy = (
                "start it with `--security-opt systempaths=unconfined`"
                if facts.container
                else f"ask what forbids `unshare -Urnpfm --mount-proc true` on this machine ({outcome})"
            )
            return Finding(check, Level.ERROR, f"a guest cannot have its own {what} ({outcome})", remedy)
    return _ok(check, "a guest can have its own mounts, /proc and host name")


def _run_dir(facts: Facts) -> Finding:
    if facts.run_dir_problem:
        return Finding(
            "run_dir",
            Level.ERROR,
            f"the run directory {facts.run_dir} cannot be used: {facts.run_dir_problem}",
            "set VSWITCH_RUN_DIR to a directory of your own with mode 0700",
        )
    return _ok("run_dir", f"{facts.run_dir} can be used")


def _daemon(facts: Facts) -> Finding:
    if facts.daemon_answers:
        return _ok("daemon", "a daemon answers")
    if facts.leftovers:
        kinds = ", ".join(
            f"{each.what} {each.name}".strip() + f" (pid {each.pid})" for each in facts.leftovers[:5]
        )
        more = f" and {len(facts.leftovers) - 5} more" if len(facts.leftovers) > 5 else ""
        pids = " ".join(str(each.pid) for each in facts.leftovers)
        return Finding(
            "daemon",
            Level.WARNING,
            f"no daemon answers, but its processes are there: {kinds}{more}",
            f"`vswitch daemon start` takes guests over, `kill {pids}` ends them; guests also end after 30 s",
        )
    if facts.stale_sockets:
        text = f"no daemon answers; a socket of an earlier one is left: {', '.join(facts.stale_sockets)}"
        return Finding("daemon", Level.WARNING, text, "nothing: the next daemon replaces it")
    return _ok("daemon", "no daemon runs; `vswitch lab up` starts one")


def _open_files(facts: Facts) -> Finding:
    if facts.open_files < 512:
        text = f"only {facts.open_files} files may be open; a daemon needs about 12 for each guest"
        return Finding("open_files", Level.WARNING, text, "ulimit -n 4096")
    return _ok("open_files", f"{facts.open_files} files may be open")


def _sandbox(facts: Facts) -> Iterable[Finding]:
    for name, available, detail, remedy in facts.layers:
        if name == "namespaces":
            continue  # tried above, in more detail
        check = f"sandbox_{name}"
        if available:
            yield _ok(check, f"{name}: {detail}")
        else:
            text = f"{name} is not available ({detail}); extensions run with one layer of confinement less"
            yield Finding(check, Level.WARNING, text, remedy)


_CHECKS: tuple[Callable[[Facts], Finding], ...] = (
    _python,
    _packages,
    _native,
    _virtual_machines,
    _memory,
    _user_namespaces,
    _tap,
    _guest_mounts,
    _run_dir,
    _daemon,
    _open_files,
)
