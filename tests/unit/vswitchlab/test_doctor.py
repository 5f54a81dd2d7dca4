"""The doctor names cause and remedy: each cause by injected facts, and one real run on this machine."""

# ruff: noqa: E501 - a table of cases, one cause each

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vswitchlab.doctor import Facts, Finding, Level, blockers, diagnose, gather
from vswitchlab.doctor.facts import Leftover, run_dir_problem

STEPS = (
    "memfd_seals",
    "user_namespace",
    "id_map",
    "net_namespace",
    "tap",
    "veth",
    "packet_socket",
    "mount_namespace",
    "private_mounts",
    "tmpfs",
    "proc",
)
WELL = Facts(
    trial=dict.fromkeys(STEPS, "ok"),
    versions={
        "grpcio": "1.85.1",
        "protobuf": "7.36.2",
        "pyroute2": "0.9.7",
        "dpkt": "1.9.8",
        "scapy": "2.8.0",
    },
    layers=(
        ("namespaces", True, "", ""),
        ("landlock", True, "ABI 6", ""),
        ("seccomp", True, "filter installed", ""),
    ),
)


def trial(**steps: str) -> dict[str, str]:
    """A trial that goes well but for `steps`; what follows a refused namespace was not tried."""
    result: dict[str, str] = {}
    for step in STEPS:
        result[step] = steps.get(step, "ok")
        if result[step] != "ok" and step in ("user_namespace", "id_map", "net_namespace"):
            break
    return result


def finding(facts: Facts, check: str) -> Finding:
    return next(each for each in diagnose(facts) if each.check == check)


def test_a_machine_that_has_all_gets_only_ok() -> None:
    assert {each.level for each in diagnose(WELL)} == {Level.OK}
    assert finding(WELL, "virtual_machines").text == "KVM here runs stock kernels as Hyper-V guests"
    assert blockers(diagnose(WELL)) == []


REFUSED = trial(user_namespace="EPERM")
CASES = [
    ("tap", replace(WELL, trial=trial(tap="ENOENT"), tun_exists=False), Level.WARNING,
     "there is no /dev/net/tun; guests use a veth pair", "sudo modprobe tun"),
    ("tap", replace(WELL, trial=trial(tap="ENOENT"), tun_exists=False, container="docker"), Level.WARNING,
     "there is no /dev/net/tun in this container", "start it with `--device /dev/net/tun`"),
    ("tap", replace(WELL, trial=trial(tap="EACCES"), tun_mode="crw-------"), Level.WARNING,
     "uid 1000 may not open /dev/net/tun (mode crw-------)", "sudo chmod 0666 /dev/net/tun"),
    ("tap", replace(WELL, trial=trial(tap="EPERM"), container="podman"), Level.WARNING,
     "this container may not open /dev/net/tun (EPERM)", "start it with `--device /dev/net/tun`"),
    ("tap", replace(WELL, trial=trial(tap="ENODEV")), Level.WARNING,
     "/dev/net/tun has no driver (ENODEV)", "sudo modprobe tun"),
    ("tap", replace(WELL, trial=trial(tap="ENOENT", veth="EOPNOTSUPP"), tun_exists=False), Level.ERROR,
     "and a veth pair cannot be made either (EOPNOTSUPP)", "sudo modprobe tun"),
    ("user_namespaces", replace(WELL, trial=trial(user_namespace="ENOSPC"), sysctls={"user.max_user_namespaces": 0}),
     Level.ERROR, "user.max_user_namespaces is 0", "sudo sysctl -w user.max_user_namespaces=15000"),
    ("user_namespaces", replace(WELL, trial=REFUSED, sysctls={"kernel.unprivileged_userns_clone": 0}),
     Level.ERROR, "kernel.unprivileged_userns_clone is 0", "sudo sysctl -w kernel.unprivileged_userns_clone=1"),
    ("user_namespaces",
     replace(WELL, trial=trial(id_map="EPERM"), sysctls={"kernel.apparmor_restrict_unprivileged_userns": 1}),
     Level.ERROR, "the default of Ubuntu 24.04", "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"),
    ("user_namespaces",
     replace(WELL, trial=trial(net_namespace="EPERM"), sysctls={"kernel.apparmor_restrict_unprivileged_userns": 1}),
     Level.ERROR, "AppArmor", "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"),
    ("user_namespaces", replace(WELL, trial=REFUSED, container="docker", seccomp_filtered=True), Level.ERROR,
     "this docker container forbids namespaces (unshare: EPERM)",
     "start it with `docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined "
     "--device /dev/net/tun`"),
    ("user_namespaces", replace(WELL, trial=trial(user_namespace="ENOSPC")), Level.ERROR,
     "user.max_user_namespaces is reached", "sudo sysctl -w user.max_user_namespaces=15000"),
    ("user_namespaces", replace(WELL, trial=trial(net_namespace="ENOSPC")), Level.ERROR,
     "user.max_net_namespaces is reached", "sudo sysctl -w user.max_net_namespaces=15000"),
    ("user_namespaces", replace(WELL, trial=trial(user_namespace="EINVAL")), Level.ERROR,
     "this kernel has no user namespaces", "use a kernel with CONFIG_USER_NS=y"),
    ("user_namespaces", replace(WELL, trial=REFUSED, seccomp_filtered=True), Level.ERROR,
     "a seccomp filter forbids namespaces", "run outside of the sandbox that started this shell"),
    ("user_namespaces", replace(WELL, trial=REFUSED), Level.ERROR,
     "namespaces are refused (unshare: EPERM)", "ask what forbids `unshare -Urn true` on this machine"),
    ("user_namespaces", replace(WELL, trial={}, trial_error="the trial could not be run: no exec"), Level.ERROR,
     "the trial could not be run: no exec", "report this as a defect"),
    ("guest_mounts", replace(WELL, trial=trial(proc="EPERM"), container="docker"), Level.ERROR,
     "a guest cannot have its own proc (EPERM)", "start it with `--security-opt systempaths=unconfined`"),
    ("guest_memory", replace(WELL, trial=trial(memfd_seals="ENOSYS")), Level.ERROR,
     "sealed shared memory (memfd) is refused: ENOSYS",
     "use a kernel with CONFIG_MEMFD_CREATE, or allow memfd_create in the container's seccomp profile"),
    ("native_module", replace(WELL, native_missing="the native module is not built"), Level.WARNING,
     "the Python engine runs: everything works, packets cost about a hundred times more CPU", "run `make native`"),
    ("native_module", replace(WELL, native_missing="the native module is not built", cargo=False), Level.WARNING,
     "the native module is not built",
     "install a wheel of vswitch, or cargo (https://rustup.rs) and run `make native`"),
    ("native_module", replace(WELL, native_missing="the native module is older than this source: it lacks wire.x; run `make native`"),
     Level.WARNING, "the native module is older than this source: it lacks wire.x", "run `make native`"),
    ("virtual_machines", replace(WELL, vmm_missing="vswitch-vmm is not built; install cargo and run `make native`, or a wheel"),
     Level.WARNING, "virtual machines cannot run (process guests can): vswitch-vmm is not built",
     "install cargo and run `make native`, or a wheel"),
    ("virtual_machines", replace(WELL, kvm_refusal="no /dev/kvm", kvm_exists=False), Level.WARNING,
     "there is no /dev/kvm",
     "switch virtualisation on in the firmware (in a virtual machine: nested virtualisation), then sudo modprobe "
     "kvm_intel or kvm_amd"),
    ("virtual_machines", replace(WELL, kvm_refusal="no /dev/kvm", kvm_exists=False, container="docker"), Level.WARNING,
     "there is no /dev/kvm in this container", "start it with `--device /dev/kvm`"),
    ("virtual_machines", replace(WELL, kvm_refusal="permission denied", kvm_open=False), Level.WARNING,
     "uid 1000 may not open /dev/kvm (mode crw-rw----)", "sudo usermod -aG kvm $USER, then log in again"),
    ("virtual_machines", replace(WELL, vmm_missing="not built", machine="aarch64"), Level.WARNING,
     "this machine is aarch64, and Hyper-V guests here are x86-64", "use an x86-64 machine"),
    ("virtual_machines",
     replace(WELL, kvm_refusal="this machine's KVM cannot run Hyper-V guests: it lacks KVM_CAP_HYPERV_SYNIC2; use another kernel"),
     Level.WARNING, "it lacks KVM_CAP_HYPERV_SYNIC2", "use another kernel"),
    ("virtual_machines", replace(WELL, kvm_refusal="no reason"), Level.WARNING, "no reason", "see docs/guests.md"),
    ("python", replace(WELL, python=(3, 10, 4)), Level.ERROR, "Python 3.10.4 is too old", "use Python 3.11 or newer"),
    ("packages", replace(WELL, missing=("grpcio", "scapy")), Level.ERROR, "not installed: grpcio", "pip install grpcio"),
    ("packages", replace(WELL, versions={"grpcio": "1.62.0"}), Level.ERROR,
     "grpcio 1.62.0 is older than 1.70", "pip install --upgrade grpcio"),
    ("packages", replace(WELL, missing=("scapy",)), Level.WARNING,
     "no scapy sockets on ports", "pip install 'vswitch[scapy]'"),
    ("run_dir", replace(WELL, run_dir_problem="others may enter it (mode 0755, 0700 is needed)"), Level.ERROR,
     "the run directory /run/user/1000/vswitch cannot be used: others may enter it",
     "set VSWITCH_RUN_DIR to a directory of your own with mode 0700"),
    ("daemon", replace(WELL, leftovers=(Leftover(41, "guest", "a"), Leftover(43, "daemon", ""))), Level.WARNING,
     "no daemon answers, but its processes are there: guest a (pid 41), daemon (pid 43)",
     "`vswitch daemon start` takes guests over, `kill 41 43` ends them; guests also end after 30 s"),
    ("daemon", replace(WELL, stale_sockets=("/run/x/api.sock",)), Level.WARNING,
     "a socket of an earlier one is left: /run/x/api.sock", "nothing: the next daemon replaces it"),
    ("open_files", replace(WELL, open_files=64), Level.WARNING, "only 64 files may be open", "ulimit -n 4096"),
    ("sandbox_landlock", replace(WELL, layers=(("landlock", False, "ENOSYS", "boot with lsm=landlock"),)),
     Level.WARNING, "extensions run with one layer of confinement less", "boot with lsm=landlock"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "facts", "level", "cause", "remedy"), CASES, ids=range(len(CASES)))
def test_cause_and_remedy(check: str, facts: Facts, level: Level, cause: str, remedy: str) -> None:
    found = finding(facts, check)
    assert (found.level, found.remedy) == (level, remedy)
    assert cause in found.text
    assert "\n" not in found.remedy


def test_root_is_not_told_of_apparmors_restriction_on_ordinary_users() -> None:
    facts = replace(WELL, uid=0, trial=REFUSED, sysctls={"kernel.apparmor_restrict_unprivileged_userns": 1})
    assert "AppArmor" not in finding(facts, "user_namespaces").text


def test_what_depends_on_namespaces_is_not_blamed_for_their_lack() -> None:
    found = {each.check: each for each in diagnose(replace(WELL, trial=REFUSED))}
    assert found["tap"].remedy == found["guest_mounts"].remedy == "see user_namespaces"
    assert [each.check for each in blockers(found.values())] == ["user_namespaces"]


def test_run_directory_problems_are_told_apart(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert run_dir_problem(directory) == ""
    directory.mkdir(mode=0o700)
    assert run_dir_problem(directory) == ""
    directory.chmod(0o755)
    assert "mode 0755" in run_dir_problem(directory)
    file = tmp_path / "file"
    file.touch()
    assert run_dir_problem(file) == "it is not a directory"
    assert "bytes long" in run_dir_problem(tmp_path / ("x" * 100))


def test_this_machine_is_really_probed(tmp_path: Path) -> None:
    """The trial's outcome is that of the field's own tool, and it leaves nothing behind."""
    before = set(os.listdir("/sys/class/net"))
    facts = gather(tmp_path / "run")
    assert set(os.listdir("/sys/class/net")) == before
    assert facts.trial_error == ""
    assert facts.python == sys.version_info[:3]
    assert facts.trial["memfd_seals"] == "ok"
    tool = subprocess.run(["unshare", "-Urn", "true"], capture_output=True, check=False)
    assert (facts.trial.get("net_namespace") == "ok") == (tool.returncode == 0)
    assert all(outcome == "ok" or hasattr(errno, outcome) for outcome in facts.trial.values())
    assert len(diagnose(facts)) >= 10
    assert not facts.daemon_answers


def test_the_vmm_itself_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vmm = tmp_path / "vmm"
    for answer, refusal in (
        ('{"ok": true, "why": "", "caps": {}}', ""),
        ('{"ok": false, "why": "no SynIC; use another kernel", "caps": {}}', "no SynIC; use another kernel"),
        ("gibberish", "the VMM could not be tried: Expecting value: line 1 column 1 (char 0)"),
    ):
        vmm.write_text(f"#!/bin/sh\ntest $1 = --probe && echo '{answer}'\n")
        vmm.chmod(0o755)
        monkeypatch.setenv("VSWITCH_VMM", str(vmm))
        facts = gather(tmp_path / "run")
        assert (facts.vmm_missing, facts.kvm_refusal) == ("", refusal)
    monkeypatch.setenv("VSWITCH_VMM", "/nowhere/vmm")
    assert gather(tmp_path / "run").vmm_missing.startswith(
        "VSWITCH_VMM names /nowhere/vmm, which is no program"
    )
